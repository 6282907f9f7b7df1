"""gpt2cli as a worker: Model.generate and Model.loss of a folder without a vocabulary."""

import worker

import gpt2cli
from gpt2cli import tensorflow as engine
from gpt2cli.inference import generator as inference
from gpt2cli.inference.engines import xla as graph
from gpt2cli.storage import checkpoint


class Ours:
    """A model in float32, bfloat16 or int8, or the float32 graph."""

    def __init__(self, folder, kind, cores):
        folder /= "models/random"
        if kind == "graph":  # TensorFlow's in float32, by which the others are checked
            self.model = inference.Model(graph.Graph(checkpoint.load(folder)), None)
        else:
            engine.keep_no_memory()  # as the commands do
            self.model = gpt2cli.load_model(folder, kind)
        self.versions = worker.versions("tensorflow")

    def generate(self, prompts, length, greedy, seed):
        """Lists of new ids, one a prompt."""
        temperature = 0.0 if greedy else 1.0
        samples = self.model.generate(
            prompts, length=length, batch_size=len(prompts), temperature=temperature, seed=seed
        )
        return [sample.tokens for sample in samples]

    def loss(self, ids):
        """Nats a token."""
        return self.model.loss(ids)


if __name__ == "__main__":
    worker.serve(Ours)
