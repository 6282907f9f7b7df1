"""Coverage-guided fuzzing of our own parsers: `make fuzz`, or python tests/fuzz.py TARGET.

Any bytes may cause a UserError and no other error. This needs atheris (`pip install -e .[fuzz]`);
test_bad_input.py is the short form without it.
"""

import bz2
import contextlib
import functools
import gzip
import hashlib
import io
import json
import lzma
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

CORPORA = ("txt", "csv", "tsv", "jsonl", "json", "npz", "npy", "parquet")
CORPORA += ("txt.gz", "csv.bz2", "jsonl.xz", "txt.zst")
FOLDER = Path(tempfile.mkdtemp(prefix="gpt2cli-fuzz-"))
TINY = Path(__file__).parents[1] / "models" / "tiny"

# JSON texts of values in the wrong place: of another type, too large, too deep, or not JSON at all.
ODD = (
    *("null", "true", "0", "-1", "1.5", "1.0", "NaN", "-Infinity", "1e400", "9" * 20, "9" * 4000),
    *("9" * 5000, "2147483647", "2147483648", '""', '"x"', '"7"', '"\\ud800"', '"a\\u0000b"'),
    *('"\\u001b[2J\\n\\u202e"', '"' + "x" * 5000 + '"', "[]", "[1]", '["x"]', "[null]", "[[]]"),
    *("{}", '{"x": 1}', '{"__class__": "os"}', '{"type": "x"}', '{"content": 1}'),
    *("[" * 200_000, "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900),
)
PLACE = "@place@"


def places(values, path=()):
    """Yield the path of every value in a JSON value."""
    yield path
    keys = values if isinstance(values, dict) else ()
    if isinstance(values, list):
        keys = range(len(values))
    for key in list(keys)[:20]:
        yield from places(values[key], (*path, key))


def with_odd(values, path, odd):
    """Return the JSON text of a value with another text at a path."""
    values = json.loads(json.dumps({"": values}))
    inner = values
    for key in ("", *path)[:-1]:
        inner = inner[key]
    inner[("", *path)[-1]] = PLACE
    return json.dumps(values[""]).replace(json.dumps(PLACE), odd)


def small_weights():
    """Write weights of four numbers a row, and an adapter of one of them."""
    from safetensors.numpy import save_file

    from gpt2cli.formats.names import places_of
    from gpt2cli.model.sizes import ModelConfig
    from gpt2cli.model.weights import weight_shapes

    shapes = weight_shapes(ModelConfig(n_vocab=5, n_ctx=4, n_embd=4, n_head=2, n_layer=1))
    weights = {}
    for name, shape in shapes.items():
        (place,) = places_of(name, "hf")
        weights[place] = np.ones(shape[1:] if len(shape) == 3 else shape, np.float32)
    save_file(weights, FOLDER / "model.safetensors")
    adapter = FOLDER / "adapter"
    adapter.mkdir(exist_ok=True)
    pair = {"A": (2, 4), "B": (12, 2)}
    save_file(
        {f"h.0.attn.c_attn.lora_{k}.weight": np.ones(v, np.float32) for k, v in pair.items()},
        adapter / "adapter_model.safetensors",
    )
    return shapes


def small_checkpoint():
    """Write a model folder with the weights of `small_weights`; return it and its index's block."""
    import indexes

    from gpt2cli.model.sizes import ModelConfig
    from gpt2cli.model.weights import weight_shapes

    folder = FOLDER / "checkpoint"
    folder.mkdir(exist_ok=True)
    sizes = ModelConfig(n_vocab=5, n_ctx=4, n_embd=4, n_head=2, n_layer=1)
    weights = {n: np.ones(shape, np.float32) for n, shape in weight_shapes(sizes).items()}
    block, data = indexes.model(weights)
    (folder / "hparams.json").write_text(sizes.to_json())
    (folder / "model.ckpt.data-00000-of-00001").write_bytes(data)
    return folder, block


def json_targets(file):
    """Return name -> function of bytes, for the readers of JSON files of models and downloads."""
    from gpt2cli.formats import adapters, statedict, tensors, vocabularies
    from gpt2cli.jobs import lines as results
    from gpt2cli.remote import hub, manifest, released, transfer
    from gpt2cli.storage import folders
    from gpt2cli.text.description import SYMBOLS

    shapes = small_weights()
    home = FOLDER / "home"
    for folder in (home, FOLDER / "copy", FOLDER / "job"):
        folder.mkdir(exist_ok=True)
    (home / "vocab.json").write_text(json.dumps({c: n for n, c in enumerate(sorted(SYMBOLS))}))
    (home / "merges.txt").write_text("#version: 0.2\n")

    def config(data):
        found = statedict.open_weights(
            tensors.read(FOLDER / "model.safetensors"), file("config.json", data)
        )
        found.tensor("model/wte", shapes["model/wte"])

    def beside(name):
        def read(data):
            path = home / name
            path.write_bytes(data)
            try:
                [*vocabularies.read(home, 4096, home).notes()]
            finally:
                path.unlink()

        return read

    def adapter(data):
        file("adapter/adapter_config.json", data)
        found = adapters.find(FOLDER / "adapter")
        name = "model/h0/attn/c_attn/w"
        read = adapters.merged(found, lambda _, shape: np.zeros(shape, np.float32), shapes)
        assert f"{found}" and read(name, shapes[name]).shape

    def downloaded(data):
        file("download.json", data)
        released.intact_names(FOLDER, manifest.read(FOLDER), "124M")
        manifest.check_same(FOLDER, "hf:me/tiny", "main")

    def model(data):
        file("copy/hparams.json", data)
        folders.copy_description(folders.open_folder(FOLDER / "copy"), FOLDER / "copied")

    def job(data):
        file("job/out.part", b"")
        file("job/out.part.json", data)
        known = {"seed": None, "processes": 1, "length": 5}
        with results.gathered(FOLDER / "job" / "out", known, {}, 7) as lines:
            assert type(lines.job["seed"]) is int

    return {
        "config.json": config,
        **{name: beside(name) for name in BESIDE},
        "adapter_config.json": adapter,
        "index.json": lambda data: tensors.read(file("model.safetensors.index.json", data)),
        "download.json": downloaded,
        "copied": model,
        "job": job,
        "part": lambda data: transfer.read_note(file("x.part.json", data)),
        "listing": lambda data: hub._described(
            hub.Repository("me/tiny", "url", "", {}, None), data, "hub"
        ),
    }


BESIDE = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
BESIDE += ("added_tokens.json",)


def targets():
    """Return name -> function of bytes."""
    import indexes

    from gpt2cli import cli, files
    from gpt2cli.formats import tensors
    from gpt2cli.jobs import lines as results
    from gpt2cli.jobs import shards
    from gpt2cli.jobs.prompts import read as read_prompts
    from gpt2cli.model.sizes import ModelConfig
    from gpt2cli.options import TextOptions
    from gpt2cli.remote import transfer
    from gpt2cli.serving import api
    from gpt2cli.storage import folders, reading, runs
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

    def named(data):
        folder = FOLDER / "named"
        folder.mkdir(exist_ok=True)
        (folder / "checkpoint").write_bytes(data)
        runs.named(folder)

    def headers(data):
        texts = [*data.decode("latin-1").split("\n"), *[""] * 6]
        names = ("ETag", "Content-Length", "Last-Modified", "Content-Range", "Content-MD5")
        answer = SimpleNamespace(headers=dict(zip(names, texts, strict=False)))
        note = transfer.note_of(answer, "url")
        assert note["bytes"] is None or 0 <= note["bytes"] < 2**63
        transfer.is_rest(answer, 1, {**note, "bytes": 5})

    def environment(data):
        value = data.decode("utf-8", "surrogateescape")
        assert 1 <= int(shards.resolve("auto/9", {"SLURM_ARRAY_TASK_ID": value})[0]) <= 9

    def index(seal):
        folder, _ = small_checkpoint()

        def read(data):
            (folder / "model.ckpt.index").write_bytes(seal(data))
            reading.verify(folder)

        return read

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
        "checkpoint": named,
        "index": index(bytes),
        "block": index(indexes.sealed),  # what is behind the checksums of an index
        "headers": headers,
        "environment": environment,
        "safetensors": lambda data: tensors.read(file("weights.safetensors", data)),
        **json_targets(file),
    }


@functools.cache
def seeds():
    """Return name of a target -> valid bytes, from which fuzzing starts."""
    import indexes
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
    _, block = small_checkpoint()
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
        "checkpoint": b'model_checkpoint_path: "model-7"\n',
        "index": indexes.sealed(block),
        "block": block,
        "headers": b'"v1"\n5\nWed, 21 Oct 2015 07:28:00 GMT\nbytes 1-4/5\n1B2M2Y8AsgTpgAmY7PhCfg==',
        "environment": b"7",
        "safetensors": (FOLDER / "model.safetensors").read_bytes(),
        **{name: json.dumps(values).encode() for name, values in json_seeds().items()},
        "request": b'{"prompt": [[1], [2]], "max_tokens": 5, "stop": ["a"], "top_p": 0.5}',
        "flags": b"sample\0--prompt\0x\0--top_k=3\0--stop=a\0--nsamples\0002",
    }


def json_seeds():
    """Return name of a target -> a valid value, for the targets that read JSON objects."""
    tiny = json.loads((TINY / "hparams.json").read_text())
    token = {"content": "<e>", "lstrip": False, "special": True}
    whole = (FOLDER / "model.safetensors").read_bytes()
    record = {"bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest(), "etag": None}
    sizes = {"vocab_size": 5, "n_positions": 4, "n_embd": 4, "n_head": 2, "n_layer": 1}
    lfs = {"size": 5, "sha256": "0" * 64}
    return {
        "config.json": {
            **sizes, "n_inner": None, "activation_function": "gelu", "model_type": "gpt2",
            "layer_norm_epsilon": 1e-5, "scale_attn_by_inverse_layer_idx": True,
            "tie_word_embeddings": True, "pruned_heads": {}, "n_ctx": 4, "auto_map": {},
        },
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": [1, 2]},
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer", "bos_token": "<b>", "eos_token": token,
            "pad_token": None, "add_bos_token": True, "extra_special_tokens": {"a_token": "<a>"},
            "add_prefix_space": False,
            "added_tokens_decoder": {"256": {**token, "content": "<y>"}},
        },
        "special_tokens_map.json": {"bos_token": token, "additional_special_tokens": ["<x>"]},
        "added_tokens.json": {"<q>": 256, "<r>": 257},
        "adapter_config.json": {
            "peft_type": "LORA", "base_model_name_or_path": "gpt2", "r": 2, "lora_alpha": 4,
            "use_rslora": False, "bias": "none", "rank_pattern": {}, "modules_to_save": None,
        },
        "index.json": {"metadata": {}, "weight_map": {"wte.weight": "model.safetensors"}},
        "download.json": {
            "url": "hf:me/tiny", "revision": "main", "commit": "0" * 40,
            "files": {"model.safetensors": record},
        },
        "copied": {
            **tiny, "arch": "gpt2", "ln_epsilon": 1e-5, "activation": "gelu", "n_inner": 640,
            "start_token": "a", "end_token": None, "end_ids": [1], "lower_case": True,
        },
        "job": {"seed": 5, "processes": 1, "length": 5},
        "part": {"url": "u", "validator": '"v1"', "etag": '"v1"', "bytes": 5, "md5": ["0"]},
        "listing": {
            "sha": "0" * 40,
            "siblings": [
                {"rfilename": "a", "lfs": lfs},
                {"rfilename": "b", "size": 5, "blobId": "0" * 40},
            ],
        },
    }  # fmt: skip


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
