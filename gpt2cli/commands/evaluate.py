"""gpt2cli evaluate: how well a model predicts a text."""

import json
import math
import sys

from gpt2cli import dataset, encoder, files


def run(config):
    """Print mean loss in nats a token, perplexity and the number of tokens predicted."""
    folder = files.source_dir(config)
    prefix = files.find_checkpoint(folder)
    dataset.find(config.dataset)
    n_vocab, vocabulary = files.read_config(folder).n_vocab, encoder.of_model(folder)
    tokens = dataset.load(config.dataset, vocabulary, config, n_vocab)

    from gpt2cli import engine, inference  # what can be refused was refused before this import

    model = inference.load_model(prefix, config.precision)
    print(f"{prefix}: {engine.describe_devices()}", file=sys.stderr)
    loss, count = model.evaluate(tokens, config.batch_size)
    perplexity = math.exp(min(loss, 700))  # the largest that a float holds is exp(709)
    if config.format == "json":
        print(json.dumps({"loss": loss, "perplexity": perplexity, "tokens": count}))
    else:
        print(f"loss {loss:.6f} nats/token  perplexity {perplexity:.4f}  tokens {count}")
