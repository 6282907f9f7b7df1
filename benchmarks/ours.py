"""gpt2cli as a worker: LanguageModel.generate and .loss of a folder without a vocabulary.

It runs any version of gpt2cli since load_model exists; TensorFlow is imported only where that
version needs it, and for the kind "graph".
"""

import dataclasses
import os

import worker

import gpt2cli


class Ours:
    """A model in one precision; or "graph", TensorFlow's float32, the reference."""

    def __init__(self, folder, kind, cores):
        folder /= "models/random"
        if kind == "graph":
            from gpt2cli.inference.engines.xla import XlaEngine
            from gpt2cli.inference.generator import LanguageModel
            from gpt2cli.storage import checkpoint

            self.model = LanguageModel(XlaEngine(checkpoint.load(folder)), None)
        else:
            # as the commands of versions that load TensorFlow here do
            os.environ.setdefault("TF_ONEDNN_USE_SYSTEM_ALLOCATOR", "1")
            self.model = gpt2cli.load_model(folder, kind)
        self.versions = worker.versions("tensorflow", "ai-edge-litert")

    def generate(self, prompts, length, greedy, seed, lookup=None, **settings):
        """Return a list of new ids for each prompt; lookup switches prompt look-up on or off."""
        settings |= {} if lookup is None else _lookup(lookup)
        settings |= {"length": length, "batch_size": len(prompts), "seed": seed}
        temperature = 0.0 if greedy else 1.0
        samples = self.model.generate(prompts, temperature=temperature, **settings)
        return [sample.tokens for sample in samples]

    def loss(self, ids):
        """Return the nats per token."""
        return self.model.loss(ids)


def _lookup(on):
    """Return the setting of prompt look-up; on is as users get it.

    Raises:
        NotImplementedError: this version has no such setting.
    """
    from gpt2cli.options import GenerateOptions

    for field in dataclasses.fields(GenerateOptions):
        if "lookup" in field.name.replace("_", ""):
            off = {bool: False, str: "off"}.get(type(field.default), 0)
            if not on:
                return {field.name: off}
            return {field.name: True} if field.default in (False, 0) else {}
    raise NotImplementedError("this version has no prompt look-up")


if __name__ == "__main__":
    worker.serve(Ours)
