"""Train the same on one device and on logical CPUs: python tests/follow.py COUNT CASES.

It is a process of its own, because logical devices must exist before TensorFlow's first operation.
A case is a JSON object of TrainOptions's fields, `steps`, and `parts`, into which the one device
splits a batch. The output is a JSON list with the losses and norms of both for each case.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import tensorflow as tf

COUNT = int(sys.argv[1])
# before gpt2cli, whose first operation silences XLA where TensorFlow is older than 2.21
(processor,) = tf.config.list_physical_devices("CPU")
devices = [tf.config.LogicalDeviceConfiguration()] * COUNT
tf.config.set_logical_device_configuration(processor, devices)

from gpt2cli.commands.train import TrainOptions  # noqa: E402
from gpt2cli.model import network as model  # noqa: E402
from gpt2cli.model.sizes import ModelConfig  # noqa: E402
from gpt2cli.model.weights import random_weights  # noqa: E402
from gpt2cli.text import batches as windows  # noqa: E402
from gpt2cli.text import marks  # noqa: E402
from gpt2cli.training import step as training  # noqa: E402
from gpt2cli.training.devices import Replicas  # noqa: E402

SIZES = ModelConfig(n_vocab=97, n_ctx=24, n_embd=32, n_head=4, n_layer=2)
ROWS = 12  # of the global batch, which 1, 2, 3 and 4 devices can share


def losses(replicas, steps, parts=1, **fields):
    """Return loss and norm of each step, and the loss of a validation after them.

    Args:
        parts: the number of parts of a batch; the gradients of each are rounded.
    """
    fields = {"accumulate_gradients": parts} | fields
    config = TrainOptions(**{"dataset": "x", "seed": 3, "learning_rate": 1e-3} | fields)
    with replicas.strategy.scope():
        network = model.GPT2(SIZES, random_weights(SIZES), config.precision, "float32")
    trainer = training.Trainer(network, config, replicas)
    ids = np.random.default_rng(0).integers(0, 97, 5000).astype(np.int32)
    if config.loss == "completion":
        ids = np.where(np.arange(5000) % 37 < 25, marks.read_only(ids), ids)
    tokens = windows.Tokens([ids])
    sampler, found = tokens.sampler("random", 16, 3), []
    for number in range(steps):
        batch = sampler.batch(number, ROWS // parts * config.accumulate_gradients)
        found.append(trainer.step(number, batch)[::2])
    check = tokens.sampler("random", 16, 5)
    batches = [check.batch(number, 2) for number in range(7)]
    score = trainer.score(batches)
    assert score.tokens == sum(batch.mask.sum() for batch in batches) <= 7 * 2 * 16
    return [*zip(*found, strict=True), [score.loss]]


def main():
    many = Replicas("mirrored")
    assert many.count == COUNT
    found = []
    for case in json.loads(sys.argv[2]):
        parts = case.pop("parts", 1)
        found.append([losses(Replicas(), parts=parts, **case), losses(many, **case)])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
