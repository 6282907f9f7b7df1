"""New vocabularies: trained on a corpus, written as the files of a model folder."""

import collections
import contextlib
import json

from gpt2cli import files
from gpt2cli.storage import folders
from gpt2cli.text.bpe import END

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # [PAD] is id 0, as in BERT's
SMALLEST = {"bpe": 257, "wordpiece": len(SPECIAL) + 1}  # 256 bytes and the end token


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
    # splits words as bpe.SPLIT does, and that is how GPT-2 encodes
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
