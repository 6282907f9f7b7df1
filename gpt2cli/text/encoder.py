"""Text <-> token ids: GPT-2's byte-pair encoding and BERT's WordPiece behind one interface.

`load` chooses by the files of a model folder; nothing here uses the network. Both kinds have the
methods below and these attributes:
    n_vocab     number of ids: the highest and one
    end         id that follows a document and ends a sample, or None
    start       id that a sample from nothing begins with, or None
    prefix      list of the ids that come before a prompt and before a document
    banned      list of the ids that are never to be sampled
    CUT         regex whose search finds the last place at which a text may be cut: both parts
                together encode to the ids of the whole. It lies at the start of the match
"""

import codecs
import collections
from pathlib import Path

import numpy as np
import regex

from gpt2cli import files
from gpt2cli.errors import UserError
from gpt2cli.storage import folders

# openai/gpt-2 src/encoder.py, in the equal but faster spelling of tiktoken_ext/openai_public.py.
SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
END = "<|endoftext|>"
KINDS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"), ("vocab.txt",))


def exists(folder):
    """Whether the folder holds any vocabulary file, complete or not."""
    return any((Path(folder) / name).is_file() for kind in KINDS for name in kind)


def load(folder):
    """The BPE or WordPiece of a model folder.

    Raises:
        UserError: files are missing or spoilt; the text names the file and what to do.
    """
    folder = Path(folder)
    present = {name for kind in KINDS for name in kind if (folder / name).is_file()}
    for kind in KINDS:
        if present.issuperset(kind):
            return WordPiece(folder) if kind == ("vocab.txt",) else BPE(folder, *kind)
    found = f"only {' and '.join(sorted(present))}" if present else "none of them"
    raise UserError(
        f"no vocabulary in {folder.absolute()}: it takes encoder.json and vocab.bpe, or vocab.json "
        f"and merges.txt, or vocab.txt, and {found} is there. Copy them from the model that this "
        "one was made from"
    )


def of_model(folder, n_vocab=None):
    """The vocabulary of a model folder, or None where there is none: such a model takes ids only.

    Args:
        n_vocab: rows of the model's token embedding; if not given, what its hparams.json says.

    Raises:
        UserError: it is spoilt, or has more tokens than the model.
    """
    if not exists(folder):
        return None
    vocabulary = load(folder)
    n_vocab = n_vocab or ids_of(folder, vocabulary)
    if vocabulary.n_vocab > n_vocab:
        raise UserError(
            f"{folder}: the vocabulary has {vocabulary.n_vocab} tokens, the model (hparams.json) "
            f"{n_vocab}. Use the vocabulary files that belong to it"
        )
    return vocabulary


def ids_of(folder, vocabulary):
    """Number of ids that the model in a folder knows, without its weights being read.

    GPT2_ML's json gives 8021 beside the release with 21128 tokens (and 21130 rows), so that the
    vocabulary counts where it is larger.
    """
    n_vocab = folders.read_config(folder).n_vocab
    if folders.config_path(folder).name == "hparams.json" or vocabulary is None:
        return n_vocab
    return max(n_vocab, vocabulary.n_vocab)


def _without_surrogates(text):
    """Pairs of surrogates become their character, lone ones U+FFFD: all other text is as it was."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class BPE:
    """Byte-level byte-pair encoding, through tiktoken.

    tiktoken joins two neighbours whenever their bytes together are a token, BPE only if that very
    pair is in the merges file. In a vocabulary that was made by training the two agree: neighbours
    p q that spell token t = l + r were made by merges of lower rank inside those bytes only; the
    training text was merged in that order too when it joined l and r to t, so p = l and q = r.
    """

    # Searched from the end of a text, hence (?r). What SPLIT matches on both sides of such a place
    # is the same if the text is cut there: a match that holds a non-space goes on only with
    # non-spaces, and one that holds a letter only with letters, so all end there; nothing looks
    # back; and SPLIT looks ahead ($, (?!\S)) only from within spaces, which none ends in here.
    # Letters and digits are listed, because two libraries may know different Unicode versions.
    CUT = regex.compile(r"(?r)(?<=\S)[ \n]|(?<=[A-Za-z一-龥])[0-9。，、！？；：]")

    def __init__(self, folder, vocab_name, merges_name):
        import tiktoken

        vocab = _read_vocab(Path(folder) / vocab_name)
        merged = _read_merges(Path(folder) / merges_name, vocab, vocab_name)
        single = sorted((c for c in BYTE_OF if c in vocab), key=vocab.get)
        if len(single) < 256:
            lacking = ", ".join(f"0x{BYTE_OF[c]:02x}" for c in BYTE_OF if c not in vocab)
            raise UserError(
                f"{Path(folder) / vocab_name} lacks the tokens of the bytes {lacking:.60}; a "
                "byte-level BPE has all 256. Train it with them (initial_alphabet) or fetch it anew"
            )
        ranked = list(dict.fromkeys(single + merged))
        self.n_vocab = max(vocab.values()) + 1
        _, start, end = _options(Path(folder), vocab, END, END)
        self.end, self.start = vocab.get(end), vocab.get(start)
        self.prefix, self.banned = [], []
        self._vocab = vocab
        self._bytes = {index: _token_bytes(token) for token, index in vocab.items()}
        self._bytes |= {} if self.end is None else {self.end: end.encode()}
        # tiktoken's ids are ranks; ours are the file's, and in GPT-2's own files they are the same.
        ids = [vocab[token] for token in ranked] + ([] if self.end is None else [self.end])
        self._ids = None if ids == list(range(len(ids))) else np.array(ids, np.int32)
        self._special = set() if self.end is None else {end}
        self._tiktoken = tiktoken.Encoding(
            str(folder),
            pat_str=SPLIT,
            mergeable_ranks={_token_bytes(token): rank for rank, token in enumerate(ranked)},
            special_tokens={token: len(ranked) for token in self._special},
        )

    def encode(self, text, special=False):
        """Text -> list of ids; with `special`, the literal <|endoftext|> is the end token."""
        return self._encode(text, special).tolist()

    def arrays(self, texts, special=False):
        """`encode` of each text as an int32 array; runs without the interpreter lock."""
        return [self._encode(text, special) for text in texts]

    def _encode(self, text, special):
        allowed = self._special if special else set()
        try:
            ranks = self._tiktoken.encode_to_numpy(
                text, allowed_special=allowed, disallowed_special=()
            )
        except UnicodeEncodeError:
            return self._encode(_without_surrogates(text), special)
        except ValueError:  # tiktoken: no stack left to backtrack through a million spaces
            parts = _between_spaces(text)
            if len(parts) == 1:
                raise
            return np.concatenate([self._encode(part, special) for part in parts])
        return ranks.view(np.int32) if self._ids is None else self._ids[ranks]

    def decode(self, ids):
        """Ids -> text; an id outside the vocabulary is nothing, a byte outside UTF-8 is U+FFFD."""
        return self.bytes_of(ids).decode("utf-8", "replace")

    def bytes_of(self, ids):
        """Ids -> bytes, which may end inside a character."""
        return b"".join(self._bytes.get(int(index), b"") for index in ids)

    def stream(self):
        """A decoder for ids that arrive bit by bit; see BPEStream."""
        return BPEStream(self)

    def id_of(self, token):
        """The id of a token as text (`<|endoftext|>`, ` the`); None if it is not one token."""
        if token in self._special:
            return self.end
        return self._vocab.get("".join(CHAR_OF[b] for b in _without_surrogates(token).encode()))


def _between_spaces(text):
    """Cut out each very long run of spaces, except the last of them, which SPLIT leaves to the word
    that follows; all of a run at the end of the text is one match, so that stays."""
    runs = [run.span() for run in regex.finditer(r"\s{9999,}+", text) if run.end() < len(text)]
    cuts = [0, *(cut for start, end in runs for cut in (start, end - 1)), len(text)]
    return [text[i:j] for i, j in zip(cuts, cuts[1:], strict=False) if i < j]


class BPEStream:
    """`feed` and `finish` give what `decode` of all ids gives, and never half a character."""

    def __init__(self, encoder):
        self._encoder = encoder
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __copy__(self):
        twin = BPEStream(self._encoder)
        twin._decoder.setstate(self._decoder.getstate())
        return twin

    def feed(self, ids):
        """The text that these ids complete."""
        return self._decoder.decode(self._encoder.bytes_of(ids))

    def finish(self):
        """What was held back: a character whose last bytes never came is U+FFFD."""
        return self._decoder.decode(b"", final=True)


# openai/gpt-2 src/encoder.py bytes_to_unicode: printable bytes are written as themselves, the
# others as the characters from U+0100 on.
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
_OTHERS = sorted(set(range(256)) - set(_PRINTABLE))
CHAR_OF = {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(_OTHERS)}
BYTE_OF = {char: byte for byte, char in CHAR_OF.items()}


def _token_bytes(token):
    """The bytes of a token as the vocabulary file spells it; added tokens may be plain text."""
    try:
        return bytes([BYTE_OF[char] for char in token])
    except KeyError:
        return _without_surrogates(token).encode()


def _read_vocab(path):
    """Token -> id from encoder.json or vocab.json."""
    vocab = files.read_object(path)
    token_of = {}
    for token, index in vocab.items():
        if type(index) is not int or not 0 <= index < 2**31:
            raise UserError(f"{path}: the id of {token!r} is {index!r}, not a whole number from 0")
        if token_of.setdefault(index, token) is not token:
            raise UserError(f"{path}: {token_of[index]!r} and {token!r} have the same id {index}")
    return vocab


def _read_merges(path, vocab, vocab_name):
    """The tokens that the merges make, in order of rank."""
    merged = []
    for number, line in enumerate(files.read_text(path).split("\n"), 1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not all(char in BYTE_OF for char in "".join(parts)):
            raise UserError(f"{path} line {number} is not two tokens: {line!r:.60}. Fetch it again")
        for token in (*parts, "".join(parts)):
            if token not in vocab:
                raise UserError(
                    f"{path} line {number} names {token!r}, which {vocab_name} lacks: the two "
                    "files are not of one model. Copy both from the same place"
                )
        merged.append("".join(parts))
    return merged


class WordPiece:
    """BERT's WordPiece, through tokenizers; vocab.txt has one token a line, line 0 is id 0."""

    # BERT splits words before a space and between Chinese characters whatever stands around them
    # (GPT2_ML tokenization.py), and no letter is normalised differently for its neighbours.
    CUT = regex.compile(r"(?r)(?<=\S)[ \n]|(?<=[一-龥])[一-龥。，、！？；：]")

    def __init__(self, folder):
        import tokenizers

        path = Path(folder) / "vocab.txt"
        tokens = [
            line.rstrip("\r") for line in files.read_text(path).removesuffix("\n").split("\n")
        ]
        self._vocab = {token: index for index, token in enumerate(tokens)}
        lacking = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in self._vocab]
        if lacking:
            raise UserError(
                f"{path} lacks {', '.join(lacking)} ({len(self._vocab)} tokens read): it is not a "
                "BERT vocabulary, or not all of it. Copy it again, one token a line"
            )
        self._tokens = dict(enumerate(tokens))
        self._missing = {}  # character -> whether the vocabulary lacks it
        self.n_vocab = len(tokens)
        self.lower_case, start, end = _options(Path(folder), self._vocab, "[CLS]", "[SEP]")
        self.unknown, self.end, self.start = map(self._vocab.get, ("[UNK]", end, start))
        self.prefix = [] if self.start is None else [self.start]
        banned = ("[PAD]", "[UNK]", "[CLS]", "[MASK]")
        self.banned = [self._vocab[token] for token in banned if token in self._vocab]
        model = tokenizers.models.WordPiece(
            self._vocab, unk_token="[UNK]", max_input_chars_per_word=100
        )
        self._tokenizer = tokenizers.Tokenizer(model)
        self._tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(
            lowercase=self.lower_case
        )
        self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()

    def encode(self, text, special=False):
        """Text -> list of ids; with `special`, the literal end token is that token."""
        return self.arrays([text], special)[0].tolist()

    def arrays(self, texts, special=False):
        """`encode` of each text as an int32 array; runs without the interpreter lock."""
        texts = [_without_surrogates(text) for text in texts]
        end = self._tokens[self.end] if special and self.end is not None else None
        parts = [text.split(end) if end else [text] for text in texts]
        encoded = iter(self._tokenizer.encode_batch_fast([p for part in parts for p in part]))
        arrays = []
        for part in parts:
            ids = next(encoded).ids
            for _ in part[1:]:
                ids += [self.end, *next(encoded).ids]
            arrays.append(np.array(ids, np.int32))
        return arrays

    def decode(self, ids):
        """Ids -> text: Chinese without spaces, English with them; see WordPieceStream."""
        stream = self.stream()
        return stream.feed(ids) + stream.finish()

    def stream(self):
        """A decoder for ids that arrive bit by bit; see WordPieceStream."""
        return WordPieceStream(self._tokens)

    def bytes_of(self, ids):
        """Ids -> their tokens as the vocabulary spells them, in UTF-8."""
        return "".join(self._tokens.get(token, "") for token in ids).encode()

    def id_of(self, token):
        """The id of a token as the vocabulary spells it, or None."""
        return self._vocab.get(token)

    def missing(self, text):
        """Counter of the characters that are [UNK] alone and have no ## form either."""
        counts = collections.Counter(text)
        for char in list(counts):
            if char not in self._missing:
                plain = self._tokenizer.normalizer.normalize_str(_without_surrogates(char)).strip()
                known = all(c in self._vocab or f"##{c}" in self._vocab for c in plain)
                self._missing[char] = not known
            if not self._missing[char]:
                del counts[char]
        return counts


def _options(folder, vocab, start, end):
    """(lower_case, start token, end token) that a folder asks for; the arguments are the defaults.

    hparams.json may have lower_case, start_token and end_token, null for none. A GPT2_ML model has
    neither token: its training text had none. Otherwise Hugging Face's do_lower_case counts.
    """
    lower_case = True
    if (folder / "tokenizer_config.json").is_file():
        lower_case = files.read_object(folder / "tokenizer_config.json").get("do_lower_case", True)
    if folders.config_path(folder):
        config = folders.read_config(folder)
        lower_case = config.extra.get("lower_case", lower_case)
        if config.arch == "gpt2_ml":
            start = end = None
        start, end = config.extra.get("start_token", start), config.extra.get("end_token", end)
        for key in ("start_token", "end_token"):
            token = config.extra.get(key)
            if token is not None and token not in vocab:
                raise UserError(
                    f"{folder}: hparams.json's {key} {token!r} is not in the vocabulary"
                )
    if type(lower_case) is not bool:
        raise UserError(f"{folder}: lower_case must be true or false, got {lower_case!r}")
    return lower_case, start, end


class WordPieceStream:
    """Joins word pieces one by one and never takes anything back.

    The spacing is that of bert4keras' Tokenizer.decode (tokenizers.py:206-235), but no space comes
    before a Chinese character or between two punctuation marks.
    """

    # The blocks that BERT takes for Chinese characters (GPT2_ML tokenization.py:264-284).
    HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ceaf\U0002f800-\U0002fa1f"
    SPECIAL = regex.compile(r"\[.+\]|<[ST]>")
    NONE_BEFORE = regex.compile(rf"[{HAN}]|[\p{{P}}!-/:-@\[-`{{-~～￥]+\Z")  # a token
    NONE_AFTER = regex.compile(rf"(?V1)(?:[{HAN}～￥+\-/=\{{(<\[]|[\p{{P}}--[!-~]])\Z")  # the text
    SHORT_FORMS = frozenset(("re", "m", "s", "t", "ve", "d", "ll"))

    def __init__(self, tokens):
        self._tokens = tokens  # id -> token
        self._tail = ""  # the last two characters of the text so far
        self._held = ""  # a short form after ', until it is known to be a whole word

    def feed(self, ids):
        """The text that these ids add."""
        return "".join(self._add(self._tokens.get(int(index), "")) for index in ids)

    def finish(self):
        """What was held back."""
        held, self._held = self._held, ""
        return self._give(held)

    def _add(self, token):
        if not token or self.SPECIAL.fullmatch(token):
            return ""
        joined = token.startswith("##") and len(token) > 2
        before = ""
        if self._held:
            before = self._give(" " * joined + self._held)
            self._held = ""
        if joined:
            return before + self._give(token[2:])
        if self._tail.endswith("'") and token in self.SHORT_FORMS:
            self._held = token
            return before
        return before + self._give(" " * self._spaced(token) + token)

    def _spaced(self, token):
        """Whether a space comes between the text so far and this token."""
        number = regex.fullmatch(r"\d\.", self._tail) and token[0].isdecimal()  # 3 . 5
        no = not self._tail or number
        return not (no or self.NONE_BEFORE.match(token) or self.NONE_AFTER.search(self._tail))

    def _give(self, text):
        self._tail = (self._tail + text)[-2:]
        return text
