"""gpt2cli vocab: text files to the vocabulary files of a model folder."""

import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gpt2cli.console import announce, progress, say
from gpt2cli.errors import UsageError, UserError
from gpt2cli.flags import check
from gpt2cli.options import MAX_TOKENS, TextOptions, check_added
from gpt2cli.paths import check_folder

if TYPE_CHECKING:
    from regex import Pattern

SAMPLE = 2**20  # characters over which bytes per token are measured


@dataclass(frozen=True, kw_only=True)
class VocabOptions(TextOptions):
    """Train a vocabulary on a corpus and write the vocabulary files of a model folder.

    Files:
        in_text: file, folder or glob, in any form that `encode` reads.
        out: folder to write the vocabulary to.
        overwrite: replace existing vocabulary files.

    Vocabulary:
        kind: bpe for GPT-2's byte-pair encoding, wordpiece for BERT's (for Chinese).
        size: number of tokens, including special ones.
        min_frequency: number of times a pair or character must occur to become a token.
        lower_case: read text in lower case and without accents (wordpiece).
        add_token: text of a token to add to the trained ones, such as "<|user|>". --size includes
            it.

    Messages:
        verbose: show TensorFlow's own messages.

    Examples:
        gpt2cli vocab data/books/ vocabulary
        gpt2cli vocab data/chinese.txt vocabulary --kind wordpiece --size 8000 --lines
        gpt2cli vocab data/dialogues.txt vocabulary --add_token "<|user|>"
    """

    in_text: str
    out: str
    overwrite: bool = False
    kind: Literal["bpe", "wordpiece"] = "bpe"
    size: int = 50257
    min_frequency: int = 2
    lower_case: bool = True
    add_token: tuple[str, ...] = ()
    verbose: bool = False

    def __post_init__(self) -> None:
        check(self, size=(10, MAX_TOKENS), min_frequency=(1, None))
        self._check_text()
        if self.loss != "all":
            raise UsageError("--loss is for encode, train and evaluate: a vocabulary has no loss")
        check_added(self.add_token)


def run(options: VocabOptions) -> None:
    """Train a vocabulary on `options.in_text` and write it into the folder `options.out`.

    Raises:
        UserError: unreadable or empty input, or a folder whose files may not be replaced.
    """
    announce(f"reading {options.in_text}")

    from gpt2cli.text import corpus, encoder, inputs, vocabulary  # after the first line

    started = time.monotonic()
    smallest = vocabulary.SMALLEST[options.kind] + len(options.add_token)
    if options.size < smallest:
        raise UsageError(
            f"--size must be at least {smallest} with --kind {options.kind}"
            f"{' and these added tokens' if options.add_token else ''}, got {options.size}"
        )
    folder = check_folder(options.out, "out")
    _check_folder(folder, options.size, options.overwrite)
    cut = (encoder.BPE if options.kind == "bpe" else encoder.WordPiece).CUT
    found = inputs.find(options.in_text)
    paths = found.paths
    corpus.check_flags(paths, options)
    sample = _sample(paths, cut, options)
    made = vocabulary.with_added(_train(paths, cut, options), options.add_token)
    vocabulary.write(folder, made)
    trained = encoder.load(folder)
    if trained.n_vocab < options.size:
        say(
            f"the text yields only {trained.n_vocab:,} of the {options.size:,} tokens that --size "
            "requests. Use more text, or lower --min_frequency"
        )
    tokens = sum(map(len, trained.arrays(sample)))
    per_token = sum(len(text.encode("utf-8", "replace")) for text in sample) / tokens
    say(
        f"{folder}: {trained.n_vocab:,} tokens in {' and '.join(made)}, {per_token:.2f} bytes of "
        f"text per token at the start of the corpus; {time.monotonic() - started:.1f} s"
    )
    for line in inputs.Tally(found).lines():
        say(line)


def _check_folder(folder: Path, size: int, overwrite: bool) -> None:
    """Reject (UserError) a folder that a vocabulary of `size` tokens must not be written to."""
    from gpt2cli.storage import folders

    sizes = folders.open_folder(folder).sizes
    if sizes is not None and sizes.n_vocab < size:
        raise UserError(
            f"{folder} is a model with {sizes.n_vocab} tokens, but the vocabulary may have "
            f"{size}. Write it to a new folder, and create a model for it with: "
            "gpt2cli init NAME --vocab FOLDER"
        )
    found = [name for name in folders.ENCODER_FILES if (folder / name).exists()]
    if found and not overwrite:
        raise UserError(
            f"{folder} already has a vocabulary ({', '.join(found)}). Name another folder, or "
            "replace it with --overwrite"
        )


def _train(paths: Sequence[Path], cut: "Pattern[str]", options: VocabOptions) -> dict[str, str]:
    """Return the files of a vocabulary trained on the corpus: name -> content."""
    from gpt2cli.text import corpus, vocabulary

    if options.workers:
        # rayon, which gives `tokenizers` its threads, reads this once in a process
        os.environ.setdefault("RAYON_NUM_THREADS", str(options.workers))
    is_bpe = options.kind == "bpe"
    end = vocabulary.END if is_bpe else "[SEP]"
    marks = re.compile("|".join(map(re.escape, (end, *options.add_token))))
    n_bytes = sum(path.stat().st_size for path in paths)
    with progress(
        n_bytes if is_bpe else 2 * n_bytes, "B"
    ) as bar:  # WordPiece reads the corpus twice

        def texts() -> Iterator[str]:
            """Yield the corpus from its start, without literal end tokens and new tokens."""
            for text in corpus.texts(paths, cut, options, bar.update):
                text = text.encode("utf-8", "replace").decode()  # JSON can spell half a character
                yield from marks.split(text) if options.special == "token" else [text]

        size = options.size - len(options.add_token)
        if is_bpe:
            return vocabulary.train_bpe(texts(), size, options.min_frequency)
        return vocabulary.train_wordpiece(texts, size, options.min_frequency, options.lower_case)


def _sample(paths: Sequence[Path], cut: "Pattern[str]", options: VocabOptions) -> list[str]:
    """Return the texts at the start of the corpus; UserError if there are none."""
    from gpt2cli.text import corpus

    found, length = [], 0
    for text in corpus.texts(paths, cut, options):
        found.append(text)
        length += len(text)
        if length >= SAMPLE:
            break
    if not any(text.strip() for text in found):
        raise UserError(f"{options.in_text} contains no text. Is it the right file?")
    return found
