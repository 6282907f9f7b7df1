"""Coverage-guided noise for the parsers that are ours: `make fuzz`, or python tests/fuzz.py TARGET.

Only a UserError may come of any bytes. Needs atheris (`pip install -e .[fuzz]`); the short form,
without it, is test_bad_input.py.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

FOLDER = Path(tempfile.mkdtemp(prefix="gpt2cli-fuzz-"))
TINY = Path(__file__).parents[1] / "models" / "tiny"


def targets():
    """Name -> function of bytes."""
    from gpt2cli import cli, config, dataset, encoder, files, folders, jobs, runs
    from gpt2cli.commands import sample

    vocabulary = encoder.load(TINY)

    def file(name, content):
        path = FOLDER / name
        path.write_bytes(content)
        return path

    def corpus(ending):
        settings = config.TextSettings(workers=1)
        return lambda data: dataset.load(file(f"in.{ending}", data), vocabulary, settings, 2048)

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
            sample.read_prompts(config.SampleConfig(prompts=str(path)))

        return read

    def state(data):
        file("state-1.json", data)
        runs.read_state(FOLDER, 1)

    def sums(data):
        file("hparams.json", b"{}")
        file("SHA256SUMS", data)
        folders.check_sums(FOLDER)

    def lines(data):
        json.dumps(list(jobs._whole_lines(data.splitlines(keepends=True))))

    def flags(data):
        words = data.decode("utf-8", "surrogateescape").split("\0")
        with contextlib.redirect_stdout(io.StringIO()):
            cli.read_command_line(words)

    return {
        "hparams": lambda data: config.ModelConfig.from_json(data.decode("utf-8", "replace")),
        "object": lambda data: files.read_object(file("object.json", data)),
        **{ending: corpus(ending) for ending in ("txt", "csv", "jsonl", "npz", "npy")},
        "encoder.json": bpe("encoder.json", "vocab.bpe"),
        "vocab.bpe": bpe("vocab.bpe", "encoder.json"),
        "vocab.txt": wordpiece,
        "prompts.txt": prompts("txt"),
        "prompts.jsonl": prompts("jsonl"),
        "state": state,
        "sums": sums,
        "lines": lines,
        "flags": flags,
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

    os.chdir(FOLDER)
    atheris.Setup(sys.argv, once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
