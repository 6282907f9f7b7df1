"""gpt2cli vocab: text files -> the vocabulary files of a model folder."""

import collections
import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from gpt2cli import files
from gpt2cli.errors import UsageError, UserError
from gpt2cli.flags import check
from gpt2cli.options import MAX_TOKENS, TextOptions
from gpt2cli.storage import folders
from gpt2cli.text import corpus as dataset
from gpt2cli.text import encoder


@dataclass(frozen=True, kw_only=True)
class VocabOptions(TextOptions):
    """Train a vocabulary on a corpus and write the vocabulary files of a model folder.

    Files:
        in_text: text, .csv (one column) or .jsonl ("text") file, a folder of them, or a glob.
        out: folder to write the vocabulary to.
        overwrite: replace existing vocabulary files.

    Vocabulary:
        kind: bpe for GPT-2's byte-pair encoding, wordpiece for BERT's (for Chinese).
        size: number of tokens, including special ones.
        min_frequency: number of times a pair or character must occur to become a token.
        lower_case: read text in lower case and without accents (wordpiece).

    Messages:
        verbose: show TensorFlow's own messages.

    Examples:
        gpt2cli vocab data/books/ vocabulary
        gpt2cli vocab data/chinese.txt vocabulary --kind wordpiece --size 8000 --lines
    """

    in_text: str
    out: str
    overwrite: bool = False
    kind: Literal["bpe", "wordpiece"] = "bpe"
    size: int = 50257
    min_frequency: int = 2
    lower_case: bool = True
    verbose: bool = False

    def __post_init__(self) -> None:
        check(self, size=(10, MAX_TOKENS), min_frequency=(1, None))
        self._check_text()


SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # [PAD] is id 0, as in BERT's
SMALLEST = {"bpe": 257, "wordpiece": len(SPECIAL) + 1}  # 256 bytes and the end token
SAMPLE = 2**20  # characters, over which the bytes a token are counted


def run(config):
    """Train a vocabulary on `config.in_text` and write it into the folder `config.out`.

    Raises:
        UserError: unreadable input, nothing in it, or a folder whose files are to stay.
    """
    started = time.monotonic()
    if config.size < SMALLEST[config.kind]:
        raise UsageError(
            f"--size must be at least {SMALLEST[config.kind]} with --kind {config.kind}, "
            f"got {config.size}"
        )
    if not config.out:
        raise UsageError("OUT must name a folder, got ''")
    folder = Path(config.out)
    _check_folder(folder, config.size, config.overwrite)
    bpe = config.kind == "bpe"
    cut, end = (encoder.BPE.CUT, encoder.END) if bpe else (encoder.WordPiece.CUT, "[SEP]")
    paths = dataset.find(config.in_text)
    sample = _sample(paths, cut, config)
    if config.workers:
        # rayon, the threads of `tokenizers`, reads this once in a process
        os.environ.setdefault("RAYON_NUM_THREADS", str(config.workers))
    size = sum(path.stat().st_size for path in paths) * (1 if bpe else 2)
    # disable=None: a bar on a terminal, nothing in a log file.
    with tqdm(total=size, unit="B", unit_scale=True, disable=None, leave=False) as bar:

        def texts():
            """The corpus from its start, without the literal end tokens, which are ids already."""
            for text in dataset.texts(paths, cut, config, bar.update):
                text = text.encode("utf-8", "replace").decode()  # JSON can spell half a character
                yield from text.split(end) if config.special == "token" else [text]

        if bpe:
            made = train_bpe(texts(), config.size, config.min_frequency)
        else:
            made = train_wordpiece(texts, config.size, config.min_frequency, config.lower_case)
    write(folder, made)
    vocabulary = encoder.load(folder)
    if vocabulary.n_vocab < config.size:
        _say(
            f"the text makes only {vocabulary.n_vocab:,} tokens of the {config.size:,} that --size "
            "asks for. Give more text, or lower --min_frequency"
        )
    tokens = sum(map(len, vocabulary.arrays(sample)))
    per_token = sum(len(text.encode("utf-8", "replace")) for text in sample) / tokens
    _say(
        f"{folder}: {vocabulary.n_vocab:,} tokens in {' and '.join(made)}, {per_token:.2f} bytes "
        f"of text per token where the corpus begins; {time.monotonic() - started:.1f} s"
    )


def _check_folder(folder, size, overwrite):
    """UserError if a vocabulary of `size` tokens may not be written into the folder."""
    config = folders.config_path(folder) and folders.read_config(folder)
    if config and config.n_vocab < size:
        raise UserError(
            f"{folder} is a model of {config.n_vocab} tokens, and the vocabulary would have up to "
            f"{size}. Write it into a folder of its own, and make a model for it with: "
            "gpt2cli init NAME --vocab FOLDER"
        )
    found = [name for name in folders.ENCODER_FILES if (folder / name).exists()]
    if found and not overwrite:
        raise UserError(
            f"{folder} has a vocabulary already ({', '.join(found)}). Name another folder as OUT, "
            "or replace it with --overwrite"
        )


def _sample(paths, cut, settings):
    """The texts with which the corpus begins; UserError if there are none."""
    found, length = [], 0
    for text in dataset.texts(paths, cut, settings):
        found.append(text)
        length += len(text)
        if length >= SAMPLE:
            break
    if not any(text.strip() for text in found):
        raise UserError(f"{settings.in_text} holds no text. Is it the right file?")
    return found


def train_bpe(texts, size, min_frequency=2):
    """Texts -> a byte-pair vocabulary as {file name: text}: bytes, merges, the end token last.

    The same texts give the same files.

    Args:
        texts: iterable of str; only its distinct words are held.
        size: tokens, fewer if the texts have no more pairs.
        min_frequency: a pair that occurs less often is not merged.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # splits words as encoder.SPLIT does, and that is how GPT-2 encodes
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,
        min_frequency=min_frequency,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bpe = json.loads(tokenizer.to_str())["model"]
    vocab = {**bpe["vocab"], encoder.END: len(bpe["vocab"])}
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in bpe["merges"]]
    lines = ["#version: 0.2", *merges, ""]
    return {"encoder.json": json.dumps(vocab), "vocab.bpe": "\n".join(lines)}


def train_wordpiece(texts, size, min_frequency=2, lower_case=True):
    """Texts -> a WordPiece vocabulary as {file name: text}: special tokens, characters, pieces.

    The characters come first, the most frequent ones where not all have room, each with its ##
    form if it occurs inside words; Chinese ones never do, since BERT makes each a word. What room
    is left is for pieces. The same texts give the same files.

    Args:
        texts: function that gives the texts from their start; they are read twice.
        size: tokens, fewer if the texts have no more pairs.
        min_frequency: what occurs less often makes no token.
        lower_case: whether texts are read in lower case and without accents.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    normalizer = normalizers.BertNormalizer(lowercase=lower_case)

    def train(texts, **options):
        """What WordPieceTrainer learns, in the order of its ids."""
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(show_progress=False, **options)
        tokenizer.train_from_iterator(texts, trainer)
        vocab = tokenizer.get_vocab()
        return sorted(vocab, key=vocab.get)

    raw = collections.Counter()

    def counted():
        for text in texts():
            raw.update(text)
            yield text

    # the characters and ## forms that occur, and not one merge
    found = set(train(counted(), vocab_size=1))
    times = collections.Counter()
    for char, number in raw.items():
        for part in normalizer.normalize_str(char):
            times[part] += number
    alphabet, inner, room = [], [], size - len(SPECIAL)
    for char in sorted((t for t in found if len(t) == 1), key=lambda c: (-times[c], c)):
        forms = [f"##{char}"] if f"##{char}" in found else []
        if times[char] < min_frequency or room < 1 + len(forms):
            break
        alphabet.append(char)
        inner += forms
        room -= 1 + len(forms)
    first = [*SPECIAL, *sorted(inner)]
    trained = train(
        texts(),
        vocab_size=size,
        min_frequency=min_frequency,
        # The trainer would number the ## forms in the random order of a hash table, and that order
        # decides which of two equally frequent pairs is merged.
        special_tokens=first,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
    )
    known = {*first, *alphabet}
    tokens = [*SPECIAL, *sorted(alphabet), *sorted(inner)]
    tokens += [token for token in trained if token not in known]
    made = {"vocab.txt": "".join(f"{token}\n" for token in tokens)}
    if not lower_case:
        made["tokenizer_config.json"] = json.dumps({"do_lower_case": False}) + "\n"
    return made


def write(folder, made):
    """Write {file name: text} into a folder and remove what it has of another vocabulary.

    All is on disk before the first file is renamed. UserError if the folder cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        for name, text in made.items():
            file = stack.enter_context(files.replacing(folder / name))
            file.write(text.encode())
    for name in folders.ENCODER_FILES:
        if name not in made:
            (folder / name).unlink(missing_ok=True)


def _say(text):
    print(text, file=sys.stderr)
