"""gpt2cli evaluate: how well a model predicts a text."""

import json
import math
from dataclasses import dataclass
from typing import Literal

from gpt2cli.console import progress, say
from gpt2cli.errors import UserError
from gpt2cli.flags import check
from gpt2cli.options import CheckpointOptions, TextOptions


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(TextOptions, CheckpointOptions):
    """Measure how well a model predicts a text: loss (nats per token), perplexity, accuracy.

    Data:
        dataset: file, folder or glob, in any form that `encode` reads, or an encoded .npz or .npy.
        batch_size: windows of n_ctx tokens per pass on a GPU; a CPU always reads one at a time.

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


def run(options: EvaluateOptions) -> dict[str, float]:
    """Print and return mean loss in nats per token, perplexity, accuracy and number of tokens.

    Raises:
        UserError: the model or the text cannot be read, or no token is predicted.
    """
    from gpt2cli.storage import folders
    from gpt2cli.text import documents, encoded, encoder, inputs

    folder = folders.open_source(options)
    inputs.find(options.dataset)
    vocabulary = encoder.of_model(folder)
    n_vocab = encoder.ids_of(folder, vocabulary)
    chat_template = documents.chat_template_of(folder)
    tokens = encoded.load(options.dataset, vocabulary, options, n_vocab, chat_template)

    from gpt2cli.inference import devices, generator  # wrong input was rejected before this

    model = generator.load_model(folder, options.precision, vocabulary)
    say(f"{folder.checkpoint}: {devices.describe(options.precision)}")
    batches = tokens.evaluation_windows(model.config.n_ctx, options.batch_size)
    total = math.ceil((tokens.total - 1) / (model.config.n_ctx * options.batch_size))
    with progress(total, " batches", items=batches) as bar:
        score = model.score(bar)
    if not score.tokens:
        raise UserError(f"{options.dataset}: no token that counts in the loss follows another")
    perplexity = math.exp(min(score.loss, 700))  # a float overflows above exp(709)
    found = {"perplexity": perplexity, **score._asdict()}
    if options.format == "json":
        print(json.dumps(found))
    else:
        print(
            f"loss {score.loss:.6f} nats/token  perplexity {perplexity:.4f}  "
            f"accuracy {score.accuracy:.4f}  tokens {score.tokens}"
        )
    return found
