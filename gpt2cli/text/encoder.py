"""Text <-> token ids: GPT-2's byte-pair encoding or BERT's WordPiece behind one interface.

`load` chooses by the files of a folder; nothing here uses the network. Both kinds have the same
methods and these attributes:
    n_vocab     number of ids: the highest plus one
    end         id that follows a document, or None
    ends        ids that end a sample; `end` is among them unless the model's files say otherwise
    start       id that a sample from nothing begins with, or None
    added       text -> id of the tokens that `encode(text, special=True)` recognizes in a text
    unknown     id of the token for text that the vocabulary lacks, or None
    prefix      ids before a prompt and before a document
    banned      ids that are never sampled
    CUT         regex that finds the last place where a text may be cut so that both parts together
                encode to the ids of the whole; the cut is at the start of the match
"""

from pathlib import Path

from gpt2cli.errors import UserError
from gpt2cli.storage import folders
from gpt2cli.storage.folders import ModelFolder
from gpt2cli.text.bpe import BPE
from gpt2cli.text.wordpiece import WordPiece

KINDS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"), ("vocab.txt",))

Encoder = BPE | WordPiece


def exists(folder: str | Path) -> bool:
    """Return whether the folder contains any vocabulary file, complete or not."""
    return any((Path(folder) / name).is_file() for kind in KINDS for name in kind)


def load(folder: str | Path | ModelFolder) -> Encoder:
    """Return the vocabulary of a folder.

    Raises:
        UserError: files are missing or damaged; the text names the file and what to do.
    """
    opened = folder if isinstance(folder, ModelFolder) else folders.open_folder(folder)
    present = {name for kind in KINDS for name in kind if opened.has(name)}
    for kind in KINDS:
        if present.issuperset(kind):
            return WordPiece(opened) if kind == ("vocab.txt",) else BPE(opened, *kind)
    found = f"only {' and '.join(sorted(present))}" if present else "none of them"
    raise UserError(
        f"no vocabulary in {opened.path.absolute()}: it needs encoder.json and vocab.bpe, or "
        f"vocab.json and merges.txt, or vocab.txt, but has {found}. Copy them from the model that "
        "this one is based on"
    )


def of_model(folder: str | Path | ModelFolder, n_vocab: int | None = None) -> Encoder | None:
    """Return the vocabulary of a model folder; None where there is none, so it takes ids only.

    Args:
        folder: the model folder.
        n_vocab: rows of the token embedding; if not given, the sizes of the folder say it.

    Raises:
        UserError: the vocabulary is damaged, or has more tokens than the model.
    """
    opened = folder if isinstance(folder, ModelFolder) else folders.open_folder(folder)
    if not exists(opened.path):
        return None
    vocabulary = load(opened)
    check_fits(opened, vocabulary, n_vocab or ids_of(opened, vocabulary))
    return vocabulary


def check_fits(folder: ModelFolder, vocabulary: Encoder, n_vocab: int) -> None:
    """Reject (UserError) a vocabulary with more tokens than the model."""
    if vocabulary.n_vocab > n_vocab:
        raise UserError(
            f"{folder.path}: the vocabulary has {vocabulary.n_vocab} tokens, but the model only "
            f"{n_vocab} (hparams.json). Use the vocabulary files that belong to it"
        )


def ids_of(folder: str | Path | ModelFolder, vocabulary: Encoder | None) -> int:
    """Return the number of ids that a folder's model knows, without reading its weights.

    GPT2_ML's JSON file says 8021 beside the release with 21128 tokens (and 21130 rows), so a larger
    vocabulary counts there.
    """
    opened = folder if isinstance(folder, ModelFolder) else folders.open_folder(folder)
    n_vocab = opened.known_sizes().n_vocab
    is_hparams = opened.sizes_path is not None and opened.sizes_path.name == "hparams.json"
    if is_hparams or vocabulary is None:
        return n_vocab
    return max(n_vocab, vocabulary.n_vocab)
