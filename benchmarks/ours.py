"""gpt2cli as a worker: Model.generate and Model.loss of a folder without a vocabulary."""

import worker

import gpt2cli
from gpt2cli import checkpoint, graph, inference


class Ours:
    """A model in float32, bfloat16 or int8."""

    def __init__(self, folder, kind, cores):
        self.folder = folder / "models/random"
        self.model = gpt2cli.load_model(self.folder, kind)
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

    def graph_loss(self, ids):
        """The same by TensorFlow's float32 graph, which no precision here generates with."""
        return inference.Model(graph.Graph(checkpoint.load(self.folder)), None).loss(ids)


if __name__ == "__main__":
    worker.serve(Ours)
