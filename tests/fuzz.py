"""Coverage-guided fuzzing of our own parsers: `make fuzz`, or python tests/fuzz.py TARGET.

Any bytes may cause a UserError and no other error. This needs atheris (`pip install -e .[fuzz]`);
test_bad_input.py is the short form without it.
"""

import bz2
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

CORPORA = ("txt", "csv", "tsv", "jsonl", "json", "npz", "npy", "parquet")
CORPORA += ("txt.gz", "csv.bz2", "jsonl.xz", "txt.zst")
FOLDER = Path(tempfile.mkdtemp(prefix="gpt2cli-fuzz-"))
TINY = Path(__file__).parents[1] / "models" / "tiny"


def targets():
    """Return name -> function of bytes."""
    from gpt2cli import cli, files
    from gpt2cli.jobs import lines as results
    from gpt2cli.jobs.prompts import read as read_prompts
    from gpt2cli.model.sizes import ModelConfig
    from gpt2cli.options import TextOptions
    from gpt2cli.serving import api
    from gpt2cli.storage import folders, runs
    from gpt2cli.text import encoded, encoder

    vocabulary = encoder.load(TINY)

    def file(name, content):
        path = FOLDER / name
        path.write_bytes(content)
        return path

    def corpus(ending):
        one = TextOptions(workers=1)
        return lambda data: encoded.load(file(f"in.{ending}", data), vocabulary, one, 2048)

    def bpe(name, other):
        def read(data):
            file(other, (TINY / other).read_bytes())
            file(name, data)
            encoder.load(FOLDER).encode("The kettle")

        return read

    def wordpiece(data):
        folder = FOLDER / "wordpiece"
        folder.mkdir(exist_ok=True)
        (folder / "vocab.txt").write_bytes(b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n" + data)
        encoder.load(folder).encode("a b")

    def prompts(ending):
        def read(data):
            path = file(f"prompts.{ending}", data)
            read_prompts(prompt=None, prompt_file=None, prompts=str(path), options=TextOptions())

        return read

    def state(data):
        file("state-1.json", data)
        runs.read_state(FOLDER, 1)

    def sums(data):
        folder = FOLDER / "sums"
        folder.mkdir(exist_ok=True)
        (folder / "hparams.json").write_bytes((TINY / "hparams.json").read_bytes())
        (folder / "SHA256SUMS").write_bytes(data)
        folders.open_folder(folder)

    def lines(data):
        json.dumps(list(results.read(file("lines.jsonl", data))))

    def flags(data):
        words = data.decode("utf-8", "surrogateescape").split("\0")
        with contextlib.redirect_stdout(io.StringIO()):
            cli.read_command_line(words)

    def request(data):
        with contextlib.suppress(api.RequestError):
            api.CompletionRequest.parse(data).prompts()

    return {
        "hparams": lambda data: ModelConfig.from_json(data.decode("utf-8", "replace")),
        "object": lambda data: files.read_object(file("object.json", data)),
        **{ending: corpus(ending) for ending in CORPORA},
        "encoder.json": bpe("encoder.json", "vocab.bpe"),
        "vocab.bpe": bpe("vocab.bpe", "encoder.json"),
        "vocab.txt": wordpiece,
        "prompts.txt": prompts("txt"),
        "prompts.jsonl": prompts("jsonl"),
        "state": state,
        "sums": sums,
        "lines": lines,
        "flags": flags,
        "request": request,
    }


def seeds():
    """Return name of a target -> valid bytes, from which fuzzing starts."""
    import pyarrow.parquet
    import zstandard

    from gpt2cli.storage import runs

    npy, npz = io.BytesIO(), io.BytesIO()
    np.save(npy, np.arange(9, dtype=np.uint16))
    np.savez_compressed(npz, np.arange(9), np.arange(5))
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["the kettle", None]}), parquet)
    runs.write_state(FOLDER, {"step": 1, "save": 1, "running_loss": [1.5, 2]}, {})
    tiny = {name: (TINY / name).read_bytes() for name in ("encoder.json", "vocab.bpe")}
    hparams = (TINY / "hparams.json").read_bytes()
    return {
        "hparams": hparams,
        "object": hparams,
        "txt": "née\r\n<|endoftext|>\ufeff".encode(),
        "csv": b'text\n"a ""b"",\nc"\nd\n',
        "jsonl": b'{"text": "a\\ud83d\\ude00 b"}\n\n{"text": ""}\n{"messages": [{"role": "user", '
        b'"content": "a"}]}\n{"prompt": "a", "completion": "b"}',
        "tsv": b'text\n"a ""b"""\nc\n',
        "json": b' [ "a\\n", {"text": "b", "n": 1.5},{"prompt": "", "completion": "b"} ]\n',
        "txt.gz": gzip.compress(b"the kettle\n", mtime=0),
        "csv.bz2": bz2.compress(b"text\nthe kettle\n"),
        "jsonl.xz": lzma.compress(b'"the kettle"\n'),
        "txt.zst": zstandard.compress(b"the kettle\n"),
        "parquet": parquet.getvalue(),
        "npz": npz.getvalue(),
        "npy": npy.getvalue(),
        **tiny,
        "vocab.txt": b"a\nb\n##c\n",
        "prompts.txt": b"The kettle\n\nA letter",
        "prompts.jsonl": b'"a"\n[1, 2]\n{"tokens": [3]}\n{"prompt": "b"}\n',
        "state": (FOLDER / "state-1.json").read_bytes(),
        "sums": hashlib.sha256(hparams).hexdigest().encode() + b"  hparams.json\n",
        "lines": b'{"index": 0, "error": "x"}\n{"index": 1}\n',
        "request": b'{"prompt": [[1], [2]], "max_tokens": 5, "stop": ["a"], "top_p": 0.5}',
        "flags": b"sample\0--prompt\0x\0--top_k=3\0--stop=a\0--nsamples\0002",
    }


def main():
    import atheris

    with atheris.instrument_imports(include=["gpt2cli"]):
        known = targets()
    from gpt2cli.errors import UserError

    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name == "list":
        print(*known)
        return
    if name not in known:
        sys.exit(f"python tests/fuzz.py TARGET [-max_total_time=60]; targets: {', '.join(known)}")

    def once(data):
        with contextlib.suppress(UserError):
            known[name](data)

    corpus = FOLDER / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(seeds()[name])
    os.chdir(FOLDER)
    atheris.Setup([*sys.argv, "-max_len=100000", str(corpus)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
