"""gpt2cli as a worker: LanguageModel.generate and .loss of a folder without a vocabulary.

It runs any version of gpt2cli since load_model exists; TensorFlow is imported only where that
version needs it, and for the kind "graph".
"""

import inspect
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
            self.model = _load(folder, kind)
        self.versions = worker.versions("tensorflow", "ai-edge-litert")

    def generate(self, prompts, length, greedy, seed, **settings):
        """Return a list of new ids for each prompt; settings are more fields of GenerateOptions."""
        settings |= {"length": length, "batch_size": len(prompts), "seed": seed}
        temperature = 0.0 if greedy else 1.0
        samples = self.model.generate(prompts, temperature=temperature, **settings)
        return [sample.tokens for sample in samples]

    def loss(self, ids):
        """Return the nats per token."""
        return self.model.loss(ids)


def _load(folder, kind):
    """Load a model; "int8, look-up off" is one without prompt look-up.

    Raises:
        NotImplementedError: this version has no prompt look-up.
    """
    precision, _, switch = kind.partition(", look-up ")
    if not switch:
        return gpt2cli.load_model(folder, precision)
    from gpt2cli.inference import generator

    if "lookup" not in inspect.signature(generator.load_model).parameters:
        raise NotImplementedError("this version has no prompt look-up")
    return generator.load_model(folder, precision, lookup=switch == "on")


if __name__ == "__main__":
    worker.serve(Ours)
