"""Text files -> token ids."""

import collections
import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gpt2cli.console import say
from gpt2cli.errors import UserError
from gpt2cli.options import TextOptions
from gpt2cli.text import corpus, inputs, marks, packed, records, stored
from gpt2cli.text.batches import Tokens
from gpt2cli.text.corpus import ENCODED, Progress
from gpt2cli.text.documents import Part
from gpt2cli.text.encoder import Encoder
from gpt2cli.text.inputs import Tally
from gpt2cli.text.stored import Ids

NO_PROMPT = (
    "--loss completion needs records with prompt and completion or with messages, or a --template"
)
SEPARATOR_LENGTH = len("<|endoftext|>")  # counts for --combine, as in nshepperd/gpt-2

Group = list[Part | None] | np.ndarray  # parts with None where a chunk ends, or a whole chunk
Seen = Callable[[str, np.ndarray, bool], None]


def encode(
    paths: Iterable[Path],
    encoder: Encoder | None,
    options: TextOptions,
    n_vocab: int,
    progress: Progress = lambda size: None,
    seen: Seen | None = None,
    tally: Tally | None = None,
    chat_template: Path | None = None,
) -> Iterator[Ids]:
    """Encode files, with the real end token after each document (WordPiece: [CLS] ... [SEP]).

    Files shorter than `options.combine` characters share a chunk with those after them. The chunks
    of an encoded file stay as they are.

    Args:
        paths: from `inputs.find`.
        encoder: the vocabulary, or None if no path is text.
        options: how to read text.
        n_vocab: the model's; every id must be below it.
        progress: called with the number of bytes just read.
        seen: called with each text, its ids without separators and whether a document ends with
            it, from several threads.
        tally: counts the documents and what is skipped.
        chat_template: file of the model's folder with a template for messages, which is not run.

    Yields:
        (1-D array, whether it ends a chunk): long chunks come in parts. The array's type is
        `stored.dtype_of(n_vocab)`, or int32 if ids are marked (see `marks`); a mapped .npy keeps
        the type of its file.

    Raises:
        UserError: a file cannot be read, is not text in that encoding, contains wrong ids, or has
            no dialogue although --loss is completion.
    """
    dtype = stored.dtype_of(n_vocab)

    def encode_group(group: Group) -> list[Ids]:
        if isinstance(group, np.memmap):
            return [(group, True)]
        if isinstance(group, np.ndarray):
            return [(group if marks.is_marked(group) else group.astype(dtype), True)]
        assert encoder is not None
        documents = [part for part in group if part]
        arrays = _arrays(documents, encoder, options)
        if seen:
            for part, ids in zip(documents, arrays, strict=True):
                seen(part.text, ids, part.closes)
        found = []
        for ids, ends in _assemble(group, iter(arrays), encoder, options.loss == "completion"):
            low = stored.check_range(ids, n_vocab, "the text in this folder's vocabulary")
            found.append((ids if low < 0 else ids.astype(dtype), ends))
        return found

    paths = list(paths)
    corpus.check_flags(paths, options)
    tally = tally or Tally(inputs.Found([], 0, {}))
    groups = _groups(paths, encoder, options, n_vocab, progress, tally, chat_template)
    with _no_threads_inside():
        for parts in _in_order(encode_group, groups, options.workers):
            yield from parts


def load(
    path: str | Path,
    encoder: Encoder | None,
    options: TextOptions,
    n_vocab: int,
    chat_template: Path | None = None,
) -> Tokens:
    """Return the tokens of a text, .csv, .jsonl, .npz or .npy file, a folder or a glob.

    Prints what was read and skipped.

    Raises:
        UserError: see `inputs.find` and `encode`; or there are fewer than 2 tokens, or none of them
            counts in the loss.
    """
    found = inputs.find(path)
    tally = Tally(found)
    parts = encode(
        found.paths,
        encoder,
        options,
        n_vocab,
        tally=tally,
        chat_template=chat_template,
    )
    tokens = Tokens(list(chunks(parts)), path)
    for line in tally.lines():
        say(f"{path}: {line}")
    check_learnt(path, tokens.learnt, tokens.total, options.loss)
    return tokens


def check_learnt(path: str | Path, learnt: int, total: int, loss: str) -> None:
    """Print the number of tokens that count in the loss, if not all do.

    Raises:
        UserError: none does, or all do although --loss is completion.
    """
    if not learnt:
        raise UserError(
            f"{path} contains no completion: none of its {total:,} tokens would count in the "
            "loss. Check the records, or use --loss all"
        )
    if learnt < total:
        say(f"{path}: {learnt:,} of {total:,} tokens count in the loss; the others are only read")
    elif loss == "completion":
        raise UserError(
            f"{path} contains no prompt, so --loss completion would leave nothing out. Encode "
            "records with prompt and completion, or with messages, with --loss completion"
        )


def chunks(parts: Iterable[Ids]) -> Iterator[np.ndarray]:
    """Join the output of `encode` to one array per chunk; empty chunks are left out."""
    chunk: list[np.ndarray] = []
    for ids, ends in itertools.chain(parts, [stored.LAST]):
        if len(ids):
            chunk.append(ids)
        if ends and chunk:
            yield chunk[0] if len(chunk) == 1 else np.concatenate(chunk)
            chunk = []


def _groups(
    paths: Iterable[Path],
    encoder: Encoder | None,
    options: TextOptions,
    n_vocab: int,
    progress: Progress,
    tally: Tally,
    chat_template: Path | None,
) -> Iterator[Group]:
    """Yield the work of one thread at a time."""
    group: list[Part | None] = []
    size = 0  # characters in the group
    length = 0  # characters in the chunk, with its separators
    for path in paths:
        if path.suffix.lower() in ENCODED:
            if group or length:
                yield [*group, None]
                group, size, length = [], 0, 0
            yield from stored.read(path, n_vocab)
            progress(path.stat().st_size)
            continue
        documents = 0
        for part in _parts_of(path, encoder, options, progress, tally, chat_template):
            group.append(part)
            characters = len(part.text)
            size += characters + 1  # blank lines take memory too
            length += characters
            if part.closes:
                length += SEPARATOR_LENGTH
                documents += 1
            if size >= corpus.BLOCK:
                yield group
                group, size = [], 0
        tally.documents += documents
        if not documents:
            tally.skip_file("files without text", path)
        # nshepperd/gpt-2 load_dataset.py compares the length without the last separator.
        if length - SEPARATOR_LENGTH >= options.combine:
            group.append(None)
            length = 0
    if length:
        group.append(None)
    if group:
        yield group


def _parts_of(
    path: Path,
    encoder: Encoder | None,
    options: TextOptions,
    progress: Progress,
    tally: Tally,
    chat_template: Path | None,
) -> Iterator[Part]:
    """Yield the parts of a file of text.

    Raises:
        UserError: they cannot be read, or not in the way that --loss and --template say.
    """
    if encoder is None:
        raise UserError(
            f"{path} is text, but the model folder has no vocabulary to read it with. Copy "
            "the vocabulary files into it, or use an encoded .npz or .npy"
        )
    parts = corpus.parts_of(path, encoder.CUT, options, progress, tally)
    is_masked = options.loss == "completion"
    if not (is_masked or records.is_records(packed.names_of(path)[0])):
        yield from parts  # the many parts of plain text need no look at each
        return
    for part in parts:
        if part.is_dialogue:
            if part.is_turn and (chat_template or encoder.end is None):
                raise _no_template(path, chat_template)
        elif is_masked:
            raise UserError(f"{path} has text without a prompt. {NO_PROMPT}")
        yield part


def _in_order(
    encode_group: Callable[[Group], list[Ids]], groups: Iterable[Group], workers: int
) -> Iterator[list[Ids]]:
    """Encode groups in N threads (0: one per core), at most a few ahead of the consumer.

    Threads and not processes: tiktoken and tokenizers release the interpreter lock while they
    encode, and threads share the vocabulary and need no pipe for the ids.
    """
    workers = workers or os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers)
    waiting: collections.deque[Future[list[Ids]]] = collections.deque()
    try:
        for group in groups:
            waiting.append(pool.submit(encode_group, group))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _no_threads_inside() -> Iterator[None]:
    """Keep `tokenizers` from spreading each call over all cores, unless the user set it to.

    It would do so whatever --workers says.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ.setdefault(name, "false")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)


def _no_template(path: Path, chat_template: Path | None) -> UserError:
    """Return the error for messages that have no default form with this vocabulary."""
    why = f"{chat_template} has a chat template, which gpt2cli does not run"
    if chat_template is None:
        why = "this vocabulary has no end token to put after each message"
    return UserError(
        f"{path} has messages, and {why}. Give the form of one message with "
        r'--template, such as "{role}:\n{content}\n"'
    )


def _arrays(parts: Sequence[Part], encoder: Encoder, options: TextOptions) -> list[np.ndarray]:
    """Encode parts; in a template's own text special tokens are always tokens."""
    texts = [part.text for part in parts]
    is_special = options.special == "token"
    arrays = encoder.arrays(texts, special=is_special) if texts else []
    if not is_special:
        for place, part in enumerate(parts):
            if part.is_literal:
                arrays[place] = encoder.arrays([part.text], special=True)[0]
    return arrays


def _assemble(
    group: Iterable[Part | None], arrays: Iterator[np.ndarray], encoder: Encoder, marked: bool
) -> Iterator[Ids]:
    """Put separators around the ids of a group's documents; yield as `encode` does.

    Args:
        group: the parts.
        arrays: the ids of each.
        encoder: the vocabulary.
        marked: whether to mark the ids of parts that do not count in the loss.
    """
    before = np.array(encoder.prefix, np.int32)
    after = np.array(encoder.after, np.int32)
    found = [before[:0]]
    for part in group:
        if part is None:
            yield np.concatenate(found), True
            found = [before[:0]]
            continue
        if part.opens:
            found.append(marks.read_only(before) if marked and not part.learnt else before)
        ids = next(arrays)
        if part.is_dialogue:
            found.append(_with_marks(part, ids, encoder, marked))
            continue
        found.append(ids)
        if part.closes:
            found.append(after)
    yield np.concatenate(found), False


def _with_marks(part: Part, ids: np.ndarray, encoder: Encoder, marked: bool) -> np.ndarray:
    """Return the ids of a part of a dialogue with the end tokens after it, marked as needed.

    A template that ends with the end token gets no second one.
    """
    end = encoder.end
    has_own = part.is_literal and len(ids) and ids[-1] == end
    if part.closes and not has_own:
        ids = np.append(ids, np.array(encoder.after, np.int32))
    elif part.is_turn and end is not None:
        ids = np.append(ids, np.int32(end))
    if marked and not part.learnt:
        ids = marks.read_only(ids)
    if end is None:
        return ids
    last = len(ids) - 1 if part.closes else len(ids)
    return np.concatenate([marks.inner(ids[:last], end), ids[last:]])
