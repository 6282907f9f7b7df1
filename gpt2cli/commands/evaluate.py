"""gpt2cli evaluate: how well a model predicts a text."""

import json
import math
import sys
from dataclasses import dataclass
from typing import Literal

from tqdm import tqdm

from gpt2cli.flags import check
from gpt2cli.options import CheckpointOptions, TextOptions
from gpt2cli.storage import folders
from gpt2cli.text import corpus as dataset
from gpt2cli.text import encoder


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(CheckpointOptions, TextOptions):
    """Measure how well a model predicts a text: loss (nats per token), perplexity, accuracy.

    Data:
        dataset: text, .csv or .jsonl file, a folder or glob of them, or an encoded .npz or .npy.
        batch_size: windows of n_ctx tokens per pass on a GPU; a CPU takes one at a time.

    Output:
        format: text (one line) or json (one object).

    Environment:
        XDG_CACHE_HOME: folder for converted programs (default: ~/.cache).

    Examples:
        gpt2cli evaluate data/held-out.txt --run_name books
        gpt2cli evaluate data/held-out.txt --model_name 124M --format json
    """

    dataset: str
    batch_size: int = 1
    format: Literal["text", "json"] = "text"

    def __post_init__(self) -> None:
        check(self, batch_size=(1, None))
        self._check_text()
        self._check_source()


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
