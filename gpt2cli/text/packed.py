"""Open text files: compressed ones are unpacked while they are read; other kinds are rejected."""

import bz2
import contextlib
import gzip
import importlib
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from gpt2cli.errors import UserError

PACKINGS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "Zstandard"}
ZSTD_PIECE = 2**10  # compressed bytes unpacked at a time: a block of 4 bytes may unpack to 128 kB

LFS = "Git LFS pointer"  # in place of a large file that was not fetched
# The first bytes of files that are not text. Sources: the formats' own specifications, and
# https://www.garykessler.net/library/file_sigs.html for those without one.
SIGNATURES = {
    b"\x1f\x8b": "gzip",
    **{b"BZh%d1AY&SY" % level: "bzip2" for level in range(1, 10)},
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    # its frames to be skipped, with which pzstd begins
    **{bytes([first]) + b"\x2a\x4d\x18": "Zstandard" for first in range(0x50, 0x60)},
    b"PK\x03\x04": "zip",
    b"%PDF-": "PDF",
    b"PAR1\x15": "Parquet",
    b"ARROW1\0\0": "Arrow",
    b"\x93NUMPY": "NumPy",
    b"\x89HDF\r\n\x1a\n": "HDF5",
    b"SQLite format 3\0": "SQLite",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
    b"Rar!\x1a\x07": "RAR",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "old Office (doc, xls, ppt)",
    b"{\\rtf": "RTF",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"\x7fELF": "ELF program",
    b"version https://git-lfs.github.com/spec/": LFS,
}
ARCHIVES = ("7-Zip", "RAR", "tar", "zip")
DOCUMENTS = ("PDF", "RTF", "old Office (doc, xls, ppt)", "docx", "Office", "EPUB", "OpenDocument")
# Content in the first kB of a zip archive -> its kind; Office's files begin with either.
ZIPPED = {
    b"mimetypeapplication/epub+zip": "EPUB",
    b"mimetypeapplication/vnd.oasis": "OpenDocument",
    b"word/": "docx",
    b"[Content_Types].xml": "Office",
    b"_rels/": "Office",
}
BY_NAME = {
    **dict.fromkeys((".tar", ".tgz", ".tbz2", ".txz"), "tar"),
    **dict.fromkeys((".xlsx", ".pptx"), "Office"),
    **dict.fromkeys((".doc", ".xls", ".ppt"), "old Office (doc, xls, ppt)"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "HTML"),
    **dict.fromkeys((".npz", ".npy"), "NumPy"),
    ".zip": "zip",
    ".7z": "7-Zip",
    ".rar": "RAR",
    ".pdf": "PDF",
    ".rtf": "RTF",
    ".docx": "docx",
    ".epub": "EPUB",
    ".odt": "OpenDocument",
}
HTML = re.compile(rb"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html[\s>])", re.I)
FIRST = 1024  # bytes that decide


def names_of(path: Path) -> tuple[str, str]:
    """Return the ending that names a file's kind, and its compression or "": such as .csv, .gz."""
    ending = path.suffix.lower()
    if ending in PACKINGS:
        return path.with_suffix("").suffix.lower(), ending
    return ending, ""


def is_packed(path: Path) -> bool:
    """Return whether the size of a file says nothing about the size of its text."""
    ending, packing = names_of(path)
    return bool(packing) or ending in (".parquet", ".pq")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a file; yield (its unpacked content, the file itself, whose position shows progress).

    Nothing is unpacked before it is read, so a small file cannot fill the memory.

    Raises:
        UserError: the file cannot be read, ends too early, or is not compressed as its name says.
    """
    _, packing = names_of(path)
    try:
        with open(path, "rb") as file:
            if not packing:
                yield file, file
                return
            start = file.read(2 if packing == ".gz" else 3)
            file.seek(0)
            if not any(start and sign.startswith(start) for sign in _signs(packing)):
                raise UserError(
                    f"{path} is not a {PACKINGS[packing]} file. Rename it to match its content, "
                    "or download it again"
                )
            yield _unpacker(file, packing, path), file
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from None
    except OSError as error:
        if packing == ".bz2" and error.errno is None:
            raise _damaged(path, error) from None
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged or incomplete ({error}). Download or compress it again")


def _unpacker(file: IO[bytes], packing: str, path: Path) -> Any:
    if packing == ".gz":
        return gzip.open(file)
    if packing == ".bz2":
        return bz2.open(file)
    if packing == ".xz":
        return lzma.open(file)
    return io.BufferedReader(_Zstd(file, path))


class _Zstd(io.RawIOBase):
    """Unpacks a Zstandard file. zstandard's own reader accepts a file that ends too early.

    Args:
        file: the compressed file.
        path: its name for messages.
    """

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._library = extra("zstandard", path, "is compressed with Zstandard")
        self._file = file
        self._frame: Any = None  # the frame that is being read
        self._rest = b""  # compressed bytes after the end of a frame
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; return 0 at the end.

        Raises:
            EOFError: the file ends within a frame.
            OSError: it is damaged.
        """
        while not self._ready:
            packed = self._rest or self._file.read(ZSTD_PIECE)
            self._rest = b""
            if not packed:
                if self._frame is not None:
                    raise EOFError("it ends too early")
                return 0
            if self._frame is None:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(packed))
            except self._library.ZstdError as error:
                raise EOFError(str(error)) from None
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def extra(package: str, path: Path, problem: str) -> Any:
    """Return a package of the extra `data`; UserError if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"{path} {problem}, and {package.partition('.')[0]} is not installed. Install it with: "
            'bin/install data (or pip install ".[data]")'
        ) from None


def _signs(packing: str) -> list[bytes]:
    """Return the first bytes that files of a compression can have."""
    return [sign for sign, kind in SIGNATURES.items() if kind == PACKINGS[packing]]


def _signature(start: bytes) -> str:
    """Return the kind that the first bytes of a file show, or an empty text."""
    kind = next((kind for sign, kind in SIGNATURES.items() if start.startswith(sign)), "")
    if kind == "zip":
        kind = next((kind for sign, kind in ZIPPED.items() if sign in start), kind)
    return kind or ("tar" if start[257:262] == b"ustar" else "")


def check_text(path: Path, start: bytes) -> None:
    """Reject (UserError) a file that is not text, by its first bytes and then by its name.

    A web page whose name ends in .txt is read with its markup.

    Args:
        path: the file.
        start: the first FIRST bytes of its content, unpacked; fewer if it is shorter.
    """
    ending, _ = names_of(path)
    kind = BY_NAME.get(ending) or _signature(start[:FIRST])
    if kind == "HTML" or (not kind and ending != ".txt" and looks_like_html(start)):
        raise UserError(
            f"{path} is an HTML page, so its markup would be read as text. Extract its text first, "
            "for example with trafilatura or pandoc, or rename it to .txt to keep the markup"
        )
    if kind:
        raise UserError(f"{path} is not text (file type: {kind}). {_way_out(kind)}")


def _way_out(kind: str) -> str:
    """Return the advice for a file of a kind that is not text."""
    packing = next((end for end, name in PACKINGS.items() if name == kind), None)
    if packing:
        return f"Rename it so that it ends in {packing}, or unpack it"
    if kind == "Parquet":
        return "Rename it so that it ends in .parquet"
    if kind in ARCHIVES:
        return "Unpack it first, and name the folder with its files"
    if kind in DOCUMENTS:
        by = "pdftotext" if kind == "PDF" else "pandoc"
        return f"Extract its text first, for example with {by}, or leave it out of the input"
    if kind == LFS:
        return "Fetch the file itself with: git lfs pull"
    if kind == "NumPy":
        return "If it contains token ids, decompress it and let its name end in .npz or .npy"
    return "Leave it out of the input"


def looks_like_html(start: bytes) -> bool:
    """Return whether a text begins as a web page does."""
    return HTML.match(start[:FIRST]) is not None
