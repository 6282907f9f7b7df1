"""The rows of .parquet files."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from gpt2cli.errors import UserError
from gpt2cli.options import FileOptions
from gpt2cli.text import packed
from gpt2cli.text.documents import Record
from gpt2cli.text.records import value_of, wanted

ROWS = 256  # rows that are in memory as Python objects


def rows_of(
    path: Path, options: FileOptions, default: str, progress: Callable[[int], Any]
) -> Iterator[Record]:
    """Yield the rows of a .parquet file; read only the columns needed, a few rows at a time.

    Raises:
        UserError: pyarrow is missing, the file is damaged, or it has no such column.
    """
    library = packed.extra("pyarrow.parquet", path, "is a Parquet file")
    errors = packed.extra("pyarrow", path, "is a Parquet file").ArrowException
    with packed.opened(path) as (content, _):
        try:
            source = content if not packed.names_of(path)[1] else _spooled(content)
            table = library.ParquetFile(source)
            names = wanted(
                str(path), table.schema_arrow.names, _texts(table.schema_arrow), options, default
            )
            size, total = path.stat().st_size, max(table.metadata.num_rows, 1)
            number = done = 0
            for batch in table.iter_batches(batch_size=ROWS, columns=names, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    value = value_of({name: row[name] for name in names}, options)
                    yield Record("" if value is None else value, f"{path} row {number}")
                progress(size * number // total - done)
                done = size * number // total
        except (errors, OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{path} is damaged or not a Parquet file ({error!s:.200}). Download it again"
            ) from None


def _spooled(content: IO[bytes]) -> IO[bytes]:
    """Unpack a file to the disk, because Parquet needs random access."""
    file = tempfile.TemporaryFile()  # noqa: SIM115  # closed with its reader
    shutil.copyfileobj(content, file)
    file.seek(0)
    return file


def _texts(schema: Any) -> list[str]:
    """Return the columns of a schema that contain text."""
    kinds = ("string", "large_string", "string_view")

    def is_text(kind: Any) -> bool:
        return str(getattr(kind, "value_type", kind)) in kinds and not hasattr(kind, "value_field")

    return [
        field.name
        for field in schema
        if is_text(field.type) and not field.name.startswith("__index_level_")
    ]
