"""The examples in docs/coming-from/ and of training in little memory run, with smaller numbers.

Small models stand in for the real ones; downloads are tested elsewhere, against local servers.
"""

import importlib.util
import math
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, lively

from gpt2cli.formats.convert import open_source
from gpt2cli.inference import generator
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.model.weights import weight_shapes
from gpt2cli.storage import checkpoint
from gpt2cli.storage.folders import ModelFolder

PAGES = (ROOT / "docs" / "coming-from").glob("*.md")
SYSTEMS = {page.stem: page.read_text(encoding="utf-8") for page in PAGES}
INDEX = SYSTEMS.pop("README")
CONVERTER, PIPELINE = SYSTEMS.pop("transformers").split("## Pipelines")
SYSTEMS |= {"converter": CONVERTER, "pipeline": PIPELINE}
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
SYSTEMS["less memory"] = re.search(r"^## Less memory\n(.*?)^## ", TRAINING, re.M | re.S)[1]
POEM = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。\n床前明月光，疑是地上霜。\n春眠不觉晓。\n"
CHINESE = sorted(set("今天气不错这是很久之前的事情了一个人" + POEM) - {"\n"})


def in_small(line):
    """Return a command line of a page with numbers for a model of a few kilobytes."""
    line = re.sub(r"(--(?:steps|warmup_steps|val_every)) (\d+)", _thousandth, line)
    line = re.sub(r"--seq_length \d+", "--seq_length 24", line)
    line = re.sub(r"--length \d+", "--length 14", line)
    line = re.sub(r"--min_length \d+", "--min_length 3", line)
    line = re.sub(r"--batch_size \d+", "--batch_size 2", line)
    line = line.replace("--epochs 30", "--epochs 1")
    if re.match("gpt2cli (train|sample)", line):
        line += " --seed 1"  # a test must give the same samples each time
    line = line.replace("--size 8000", "--size 60 --min_frequency 1")
    return line.replace("--size distil", "--n_layer 1 --n_head 2 --n_embd 16 --n_ctx 32")


def _thousandth(match):
    return f"{match[1]} {math.ceil(int(match[2]) / 1000)}"


@pytest.fixture
def workplace(workdir, monkeypatch, tiny):
    """models/, data/ and the other files that the pages' commands name."""
    load = generator.load_model

    def load_once(source, *options, **more):  # models/tiny is compiled for the other tests already
        folder = source.path if isinstance(source, ModelFolder) else Path(source).parent
        return tiny if folder.name == "124M" else load(source, *options, **more)

    monkeypatch.setattr(generator, "load_model", load_once)
    for name in ("124M", "1558M"):
        shutil.copytree(TINY, workdir / "models" / name)
    write_chinese("models/gpt2-chinese-cluecorpussmall", "hparams.json", "gpt2")
    write_chinese("models/mega", "mega.json", "gpt2_ml")
    (workdir / "data").mkdir()
    text = "Romeo, Romeo! Wherefore art thou Romeo?\n" * 30
    for name in ("books.txt", "held-out.txt", "romeo_and_juliet.txt"):
        (workdir / "data" / name).write_text(text)
    (workdir / "data" / "tweets.csv").write_text('tweet\n"Today, rain."\n' + "so be it\n" * 40)
    (workdir / "data" / "chinese.txt").write_text(POEM * 5, encoding="utf-8")
    return workdir


def write_chinese(folder, sizes_name, arch):
    """Write a small random Chinese model; GPT2_ML's has the names and the json of its release."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHINESE]
    sizes = ModelConfig(len(tokens), 32, 16, 2, 1, arch=arch)
    network = lively(sizes)
    prefix = ROOT.joinpath(folder) if folder.startswith("/") else folder
    checkpoint.write(f"{prefix}/model.ckpt-100000", network.weights)
    text = sizes.to_json()
    if arch == "gpt2_ml":
        text = (
            '{"vocab_size": 21, "hidden_size": 16, "intermediate_size": 64, '
            '"max_position_embeddings": 32, "num_attention_heads": 2, "num_hidden_layers": 1}'
        )
    for name, content in ((sizes_name, text), ("vocab.txt", "\n".join(tokens))):
        with open(f"{prefix}/{name}", "w", encoding="utf-8") as file:
            file.write(content)


def run_lines(cli, system):
    """Run every command line of a system's example; return line -> result."""
    results = {}
    for block in re.findall(r"^```sh\n(.*?)^```", SYSTEMS[system], re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(in_small(line))
            assert words[0] == "gpt2cli"
            if words[1] in ("download", "serve"):  # needs a network; never ends
                continue
            if ".bin" in line and not importlib.util.find_spec("torch"):
                continue
            results[line] = cli(*words[1:])
            assert results[line].returncode == 0, (line, results[line].stderr)
    assert results, f"no command of {system} was run"
    return results


def test_the_index_names_every_page():
    pages = set(re.findall(r"\]\((\S+)\.md\)", INDEX)) - {"../differences"}
    assert pages == set(SYSTEMS) - {"converter", "pipeline", "less memory"} | {"transformers"}


LARGE = pytest.param("less memory", marks=pytest.mark.slow)
ENGLISH = ("openai-gpt-2", "nshepperd", "converter", LARGE)


@pytest.mark.parametrize("system", ENGLISH)
def test_the_english_examples_run(cli, workplace, system):
    if system == "converter":
        shutil.copytree("models/124M", "checkpoint/books")
    results = run_lines(cli, system)
    assert len(results) >= (1 if system == "less memory" else 2)
    if system == "converter":
        back, run = (checkpoint.load(f) for f in ("models/books-again", "checkpoint/books"))
        assert run.weights
        for name, value in run.weights.items():
            assert np.array_equal(value, back.weights[name])


def test_the_notebook_of_gpt_2_simple_runs(workplace, capsys):
    (block,) = re.findall(r"^```python\n(.*?)^```", SYSTEMS["gpt-2-simple"], re.M | re.S)
    block = block.replace("steps=500", "steps=2, seq_length=24").replace("length=60", "length=9")
    names = {}
    exec(compile(block, "gpt-2-simple.md", "exec"), names)
    assert len(names["texts"]) == 5 and all(isinstance(text, str) for text in names["texts"])
    assert capsys.readouterr().out == ""
    for number in (1, 2):
        written = (workplace / "gen" / f"tweets-{number}.txt").read_text()
        assert written.count("=" * 20 + "\n") == 5 and written.count("Today") >= 5


def test_the_server_file_is_read(cli, workplace):
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
    state = {}
    for name, variable in checkpoint.load(TINY).weights.items():
        value = variable.numpy()
        key = name.removeprefix("model/").replace("/", ".")
        key = re.sub(r"^h(\d+)", r"h.\1", key)
        key = re.sub(r"\.[gw]$", ".weight", re.sub(r"\.b$", ".bias", key))
        key += ".weight" if key in ("wte", "wpe") else ""
        state[key] = torch.tensor(value[0] if value.ndim == 3 else value)
    torch.save(state, "gpt2-pytorch_model.bin")
    line = "--n_head 12"
    assert line in SYSTEMS["gpt-2-flask-api"]
    SYSTEMS["gpt-2-flask-api"] = SYSTEMS["gpt-2-flask-api"].replace(line, "--n_head 5")
    results = run_lines(cli, "gpt-2-flask-api")
    assert len(results) == 2
    ours = open_source("models/flask")
    assert ours.config.n_head == 5 and ours.config.n_layer == 4


def test_the_pipeline_examples_run(cli, workplace):
    results = run_lines(cli, "pipeline")
    beams = next(result for line, result in results.items() if "--beams" in line)
    assert '"logprobs": [' in beams.stdout
    romeo = next(result for line, result in results.items() if "--epochs" in line)
    assert "validation" not in romeo.stderr and "[1 |" in romeo.stderr


def test_gpt2_ml_is_used_in_place_and_fine_tuned(cli, workplace):
    results = run_lines(cli, "gpt2-ml-bert4keras")
    assert len(results) == 2
    tuned = checkpoint.load("checkpoint/mega")
    assert tuned.config.arch == "gpt2_ml" and tuned.config.n_vocab == 5 + len(CHINESE)
    assert set(tuned.weights) == set(weight_shapes(tuned.config))
    assert cli("sample", "--run_name", "mega", "--prompt", "今天", "--length", 5).returncode == 0
    pieces = ("--model_name", "mega", "--run_name", "new", "--sampling", "documents", "--steps", 1)
    rejected = cli("train", "data/chinese.txt", *pieces)
    assert rejected.returncode == 1 and "end_token" in rejected.stderr
    assert not (workplace / "checkpoint" / "new").exists()


def test_a_chinese_model_is_trained_from_scratch_in_two_stages(cli, workplace):
    SYSTEMS["UER"] = "\n".join(
        line
        for line in SYSTEMS["uer-py"].splitlines()
        if "uer_model.bin" not in line  # test_formats has such files
    )
    results = run_lines(cli, "UER")
    assert len(results) == 6
    for stage in ("stage1", "stage2"):
        log = (workplace / "checkpoint" / stage / "log.jsonl").read_text().splitlines()
        assert len(log) >= 3
    sample = next(result for line, result in results.items() if "sample" in line)
    assert " SAMPLE 1 " in sample.stdout
