"""Programs of LiteRT without their weights: shipped ones, kept ones, and new ones.

Those of the released sizes lie in programs/, and `bin/programs` makes them. For another size,
TensorFlow is imported once to convert the graph, and the result is kept in the user's cache.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

from gpt2cli import files, paths
from gpt2cli.console import say
from gpt2cli.errors import UserError
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.model.weights import weight_shapes

SHIPPED = Path(__file__).parent / "programs"
# What programs are made from: a program of other sources is not used.
SOURCES = [
    *(Path(__file__).parents[2] / "model" / name for name in ("network.py", "kernels.py")),
    *(Path(__file__).with_name(name) for name in ("litert_convert.py", "skeletons.py")),
]

Part = Literal["layers", "head"]  # the network is run in these parts


class Place(NamedTuple):
    """Where a weight is described in a Skeleton; each is the place of the first byte.

    Args:
        offset: uint64, the weight's place in the file.
        size: uint64, its bytes.
        kind: int8, its type; 0 for a vector, which is always float32.
        scale: uint32, the distance from here to its scale; 0 for a vector.
        zero_point: uint32, the distance from here to its zero points; 0 for a vector.
    """

    offset: int
    size: int
    kind: int
    scale: int
    zero_point: int


class Skeleton(NamedTuple):
    """A part of the network as a program without the numbers of its weights.

    Args:
        content: the program, a flatbuffer of tensorflow/lite/schema/schema.fbs.
        places: where each weight is described.
        inputs: the names of its inputs, in order.
        places: where each weight is described.
        vocabulary: where n_vocab is: the places of int32 numbers.
    """

    content: bytes
    inputs: list[str]
    places: list[Place]
    vocabulary: list[int]

    def packed(self) -> bytes:
        """Return the bytes of a file."""
        head = json.dumps([self.inputs, self.places, self.vocabulary]).encode()
        return zlib.compress(head + b"\n" + self.content, 9)

    @classmethod
    def unpacked(cls, data: bytes) -> Skeleton:
        """Return the skeleton in the bytes of a file.

        Raises:
            Exception: of any kind; they are not those of a skeleton.
        """
        head, _, content = zlib.decompress(data).partition(b"\n")
        inputs, places, vocabulary = json.loads(head)
        return cls(content, inputs, [Place(*place) for place in places], vocabulary)


def weights_of(part: Part, config: ModelConfig) -> list[str]:
    """Return the names of the weights that a part takes, in the order of its arguments."""
    wte, _, *others = weight_shapes(config)
    return [wte] if part == "head" else others


def packed_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a weight's shape in a program: a matrix [n_in, n_out] is [n_out, n_in] for XNNPACK."""
    is_table = name.endswith(("wte", "word_embed"))
    return shape[-2:][::-1] if len(shape) > 1 and not is_table else shape


def find(part: Part, config: ModelConfig) -> Skeleton:
    """Return the skeleton of a part: shipped, kept on disk, or converted now and kept."""
    key = _key(part, config)
    shipped = SHIPPED / file_name(part, config)
    if is_current(shipped, part, config):
        return Skeleton.unpacked(_opened(shipped.read_bytes(), key))
    folder = cache_folder()
    path = folder / f"{key.hex()[:32]}.tflite" if folder else None
    if path and (kept := _kept(path, key)):
        return kept
    if part == "layers":
        say(f"{_sizes(config)}: the graph is converted with TensorFlow, once for each size")
    from gpt2cli.inference.engines import litert_convert  # takes seconds

    made = litert_convert.convert(part, config)
    with contextlib.suppress(UserError):
        if path:
            with files.replacing(path, access=0o644) as file:  # whatever the umask
                file.write(packed(made, part, config))
    return made


def file_name(part: Part, config: ModelConfig) -> str:
    """Return the name of a shipped skeleton's file."""
    if part == "head":
        return f"head-{config.n_embd}"
    return f"layers-{'-'.join(map(str, _sizes_of_layers(config)))}"


def is_current(path: Path, part: Part, config: ModelConfig) -> bool:
    """Return whether a file has the skeleton of a part, made from the present sources."""
    try:
        _opened(path.read_bytes(), _key(part, config))
    except (OSError, ValueError):
        return False
    return True


def packed(made: Skeleton, part: Part, config: ModelConfig) -> bytes:
    """Return the content of a skeleton's file."""
    return sealed(made.packed(), _key(part, config))


def _sizes_of_layers(config: ModelConfig) -> tuple[object, ...]:
    widths = (config.n_layer, config.n_embd, config.n_head, config.inner_width)
    return (config.arch, *widths, config.activation, config.ln_epsilon)


def _sizes(config: ModelConfig) -> str:
    return f"{config.n_layer} layers, {config.n_embd} wide"


def _key(part: Part, config: ModelConfig) -> bytes:
    """Return a digest of everything that a skeleton is made from."""
    sizes = (config.n_embd,) if part == "head" else _sizes_of_layers(config)
    return hashlib.sha256(_sources() + repr((part, *sizes)).encode()).digest()


@functools.cache
def _sources() -> bytes:
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in SOURCES)).digest()


def cache_folder() -> Path | None:
    """Return the folder for skeletons and the files of Programs.

    None without a home folder, or if the folder is not this user's own.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return _checked(Path(home) / "gpt2cli") if os.path.isabs(home) else None


@functools.cache
def _checked(folder: Path) -> Path | None:
    """Create the folder if necessary; if others can write to it, print that once, return None."""
    try:
        paths.check_own_folder(folder)
    except UserError as error:
        say(f"{error}, so no graphs are kept there. Set XDG_CACHE_HOME to a folder of your own")
        return None
    except OSError:  # the home is read-only
        return folder if folder.is_dir() else None
    return folder


def _kept(path: Path, key: bytes) -> Skeleton | None:
    """Return the skeleton in a file of the cache; None where there is none that can be used."""
    try:
        with paths.open_own(path, "rb", is_code=True) as file:
            return Skeleton.unpacked(_opened(file.read(), key))
    except FileNotFoundError:
        return None
    except UserError as error:
        say(f"{error}. For this command, the graph is converted again")
    except OSError as error:
        say(f"cannot read {path}: {error.strerror}. The graph is converted again")
    except Exception as error:  # zlib and json raise anything
        say(f"{path} is damaged ({error}). The graph is converted again")
    return None


def sealed(made: bytes, key: bytes) -> bytes:
    """Return the file of a skeleton: a checksum of it and of its key, then the skeleton."""
    return hashlib.sha256(key + made).digest() + made


def _opened(content: bytes, key: bytes) -> bytes:
    """Return what was sealed with this key (ValueError)."""
    made = content[hashlib.sha256().digest_size :]
    if content != sealed(made, key):
        raise ValueError("its checksum is wrong")
    return made
