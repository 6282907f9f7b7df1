"""gpt2cli evaluate: how well a model predicts a text."""

import json
import math
import sys

from tqdm import tqdm

from gpt2cli.storage import folders
from gpt2cli.text import corpus as dataset
from gpt2cli.text import encoder


def run(config):
    """Print mean loss in nats a token, perplexity, accuracy and the number of tokens."""
    prefix = folders.source_checkpoint(config)
    folder = prefix.parent
    dataset.find(config.dataset)
    vocabulary = encoder.of_model(folder)
    tokens = dataset.load(config.dataset, vocabulary, config, encoder.ids_of(folder, vocabulary))

    from gpt2cli import tensorflow as engine  # what can be refused was refused before this import
    from gpt2cli.inference import generator as inference

    engine.keep_no_memory()
    model = inference.load_model(prefix, config.precision)
    print(f"{prefix}: {engine.describe_devices(config.precision)}", file=sys.stderr)
    batches = tokens.evaluation_windows(model.config.n_ctx, config.batch_size)
    total = -(-(tokens.total - 1) // (model.config.n_ctx * config.batch_size))
    # disable=None: a bar on a terminal, nothing in a log file
    score = model.score(tqdm(batches, total=total, disable=None, leave=False))
    perplexity = math.exp(min(score.loss, 700))  # the largest that a float holds is exp(709)
    if config.format == "json":
        print(json.dumps({"perplexity": perplexity, **score._asdict()}))
    else:
        print(
            f"loss {score.loss:.6f} nats/token  perplexity {perplexity:.4f}  "
            f"accuracy {score.accuracy:.4f}  tokens {score.tokens}"
        )
