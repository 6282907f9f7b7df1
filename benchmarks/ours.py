"""gpt2cli as a worker: LanguageModel.generate and .loss of a folder without a vocabulary."""

import worker

import gpt2cli
from gpt2cli import tensorflow
from gpt2cli.inference.engines.xla import XlaEngine
from gpt2cli.inference.generator import LanguageModel
from gpt2cli.storage import checkpoint


class Ours:
    """A model in float32, bfloat16 or int8; or "graph", TensorFlow's float32, the reference."""

    def __init__(self, folder, kind, cores):
        folder /= "models/random"
        if kind == "graph":
            self.model = LanguageModel(XlaEngine(checkpoint.load(folder)), None)
        else:
            tensorflow.keep_no_memory()  # as the commands do
            self.model = gpt2cli.load_model(folder, kind)
        self.versions = worker.versions("tensorflow")

    def generate(self, prompts, length, greedy, seed):
        """Return a list of new ids for each prompt."""
        temperature = 0.0 if greedy else 1.0
        samples = self.model.generate(
            prompts, length=length, batch_size=len(prompts), temperature=temperature, seed=seed
        )
        return [sample.tokens for sample in samples]

    def loss(self, ids):
        """Return the nats per token."""
        return self.model.loss(ids)


if __name__ == "__main__":
    worker.serve(Ours)
