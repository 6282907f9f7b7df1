"""New vocabularies: trained on a corpus, written as the files of a model folder."""

import collections
import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2cli import files
from gpt2cli.storage import folders
from gpt2cli.text.classes import END

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # [PAD] is id 0, as in BERT
SMALLEST = {"bpe": 257, "wordpiece": len(SPECIAL) + 1}  # 256 bytes and the end token


def train_bpe(texts: Iterable[str], size: int, min_frequency: int = 2) -> dict[str, str]:
    """Train a byte-pair vocabulary: 256 bytes, merges, the end token last.

    The same texts give the same files.

    Args:
        texts: the corpus; only its distinct words stay in memory.
        size: number of tokens, fewer if the texts have no more pairs.
        min_frequency: number of times a pair must occur to be merged.

    Returns:
        file name -> content.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # splits words as bpe.SPLIT does, which is how GPT-2 encodes
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,
        min_frequency=min_frequency,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bpe = json.loads(tokenizer.to_str())["model"]
    vocab = {**bpe["vocab"], END: len(bpe["vocab"])}
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in bpe["merges"]]
    lines = ["#version: 0.2", *merges, ""]
    return {"encoder.json": json.dumps(vocab), "vocab.bpe": "\n".join(lines)}


def train_wordpiece(
    texts: Callable[[], Iterable[str]],
    size: int,
    min_frequency: int = 2,
    lower_case: bool = True,
) -> dict[str, str]:
    """Train a WordPiece vocabulary: special tokens, characters, pieces.

    Characters come first, the most frequent ones if not all fit. Each has its ## form if it occurs
    inside words, which Chinese ones never do: BERT makes each a word. Pieces fill the rest. The
    same texts give the same files.

    Args:
        texts: function that yields the corpus from its start; it is called twice.
        size: see `train_bpe`.
        min_frequency: number of times a character or pair must occur to become a token.
        lower_case: whether texts are read in lower case and without accents.

    Returns:
        file name -> content.
    """
    from tokenizers import normalizers

    normalizer = normalizers.BertNormalizer(lowercase=lower_case)
    raw: collections.Counter[str] = collections.Counter()

    def watched() -> Iterator[str]:
        for text in texts():
            raw.update(text)
            yield text

    # a size of 1 has no room for merges: only the characters and ## forms that occur
    found = set(_train_pieces(watched(), normalizer, vocab_size=1))
    times: collections.Counter[str] = collections.Counter()
    for char, number in raw.items():
        for part in normalizer.normalize_str(char):
            times[part] += number
    alphabet, inner = _alphabet(found, times, min_frequency, room=size - len(SPECIAL))
    first = [*SPECIAL, *sorted(inner)]
    trained = _train_pieces(
        texts(),
        normalizer,
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


def _alphabet(
    found: set[str], times: collections.Counter[str], min_frequency: int, room: int
) -> tuple[list[str], list[str]]:
    """Return the most frequent characters for which there is room, and their ## forms."""
    alphabet: list[str] = []
    inner: list[str] = []
    for char in sorted((t for t in found if len(t) == 1), key=lambda c: (-times[c], c)):
        forms = [f"##{char}"] if f"##{char}" in found else []
        if times[char] < min_frequency or room < 1 + len(forms):
            break
        alphabet.append(char)
        inner += forms
        room -= 1 + len(forms)
    return alphabet, inner


def _train_pieces(texts: Iterable[str], normalizer: Any, **options: Any) -> list[str]:
    """Return the tokens that WordPieceTrainer learns, in the order of their ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(show_progress=False, **options)
    tokenizer.train_from_iterator(texts, trainer)
    vocab = tokenizer.get_vocab()
    return sorted(vocab, key=vocab.__getitem__)


def with_added(made: dict[str, str], texts: Sequence[str]) -> dict[str, str]:
    """Return vocabulary files with new tokens, whose ids follow the others.

    Args:
        made: file name -> content.
        texts: the texts of the new tokens; those that are already tokens stay what they are.
    """
    if "vocab.txt" in made:
        known = {token: n for n, token in enumerate(made["vocab.txt"][:-1].split("\n"))}
    else:
        known = json.loads(made["encoder.json"])
    new = [text for text in texts if text not in known]
    added = {text: len(known) + n for n, text in enumerate(new)}
    if not added:
        return made
    return {**made, "added_tokens.json": json.dumps(added, ensure_ascii=False, indent=2) + "\n"}


def write(folder: Path, made: Mapping[str, str]) -> None:
    """Write vocabulary files into a folder and remove the files of its old vocabulary.

    `made` is file name -> content. All files are on disk before the first one is renamed.

    Raises:
        UserError: the folder cannot be written to.
    """
    had_sums = (folder / folders.SUMS).is_file()
    if had_sums:  # those of the old vocabulary
        (folder / folders.SUMS).unlink()
    with contextlib.ExitStack() as stack:
        for name, text in made.items():
            file = stack.enter_context(files.replacing(folder / name))
            file.write(text.encode())
    for name in folders.ENCODER_FILES:
        if name not in made:
            (folder / name).unlink(missing_ok=True)
    if had_sums:
        folders.write_sums(folder)
