"""The benchmark's own code: targets, limits, a run that is stopped, the picture."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from conftest import ROOT, TINY

BENCHMARKS = ROOT / "benchmarks"
LIMITS = {
    "read 64": (100e9, "a cache"),
    "read 384": (40e9, "memory"),
    "float32": (400e9, "one library"),
    "bfloat16": (30e9, "another"),
    "int8": (1500e9, "one library"),
}


@pytest.fixture
def bench(monkeypatch):
    """Make the benchmark's modules importable; they have plain names, so only for one test."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def line(job, case, tool, kind, size="124M", **figures):
    place = {"job": job, "case": case, "size": size, "tool": tool, "kind": kind}
    return place | {"figures": {name: list(values) for name, values in figures.items()}}


def results(*lines):
    found = {"machine": "m", "load_before": 0.0, "rounds": 3, "versions": {}, "skipped": []}
    return found | {"limits": LIMITS, "losses": {}, "lines": list(lines)}


def verdicts(found):
    import targets

    return {text: (figure, verdict) for text, figure, _, verdict in targets.targets(found)}


def test_the_median_of_the_rounds_decides_whether_a_target_is_met(bench):
    base = line("start", "sample", "base", "", "tiny", seconds=(4.0, 4.0, 8.0))
    for seconds, verdict in (((0.9, 1.0, 8.0), "met"), ((0.9, 1.1, 2.4), "**missed**")):
        ours = line("start", "sample", "ours", "", "tiny", seconds=seconds)
        figure, found = verdicts(results(base, ours))["first token of tiny, `sample`: of base"]
        assert found == verdict, figure


def test_each_round_is_compared_with_the_same_round_of_base(bench):
    ours = line("generate", "1 x 128", "ours", "int8", rate=(100, 50, 10))
    base = line("generate", "1 x 128", "base", "int8", rate=(100, 50, 10))
    assert verdicts(results(ours, base))["1 x 128, int8: of base"] == ("1.00 (1.00 to 1.00)", "met")


def test_a_target_without_figures_is_not_met(bench):
    failed = line("train", "1 x 1024", "ours", "float32") | {"failed": "no memory"}
    base = line("train", "1 x 1024", "base", "float32", rate=[1.0])
    assert verdicts(results(failed, base))["train, float32: of base"] == ("not measured", "")


def test_a_line_above_its_limit_is_marked(bench):
    import tables

    slow = line("generate", "1 x 128", "ours", "float32", rate=[60.0], peak=[1.0])
    fast = line("generate", "1 x 128", "llama", "float32", rate=[90.0], peak=[1.0])
    text = tables.report(results(slow, fast))
    assert [row for row in text.splitlines() if "PASSES THE LIMIT" in row] == [
        "| llama | float32 | 90.0 (90.0 to 90.0) | 1.50 of float32 | 111% PASSES THE LIMIT | 1.00 |"
    ]
    assert (
        verdicts(results(slow, fast))["highest share of a limit, of all lines"][1] == "**missed**"
    )


def test_the_limit_of_a_narrow_format_is_at_least_that_of_a_wider_one(bench):
    import targets

    rate = [300.0]  # with products in bfloat16, which are slow here, 47 would be the limit
    found = line("train", "1 x 1024", "ours", "bfloat16", rate=rate, peak=[1.0])
    assert 0.5 < targets.of_limit(found, LIMITS) < 1


def test_small_weights_are_read_as_fast_as_arrays_of_their_size(bench):
    import targets

    # 124 MB in int8 may stay in a cache; 495 MB in float32 do not
    for kind, weights in (("int8", 123_653_376), ("float32", 4 * 123_653_376)):
        expected = (100e9 if kind == "int8" else 40e9) / weights
        assert targets.reading(weights, LIMITS) == expected


def test_bfloat16_of_transformers_is_left_out_where_it_takes_minutes(bench, monkeypatch):
    import machine
    import tools

    monkeypatch.setattr(machine, "flags", lambda: ["avx2"])
    assert tools.TOOLS["transformers"].lacks("bfloat16 (whole)") == "AVX-512"
    assert tools.TOOLS["transformers"].lacks("float32") is None
    monkeypatch.setattr(machine, "flags", lambda: ["avx2", "avx512bw"])
    assert tools.TOOLS["transformers"].lacks("bfloat16") is None


def test_look_up_is_switched_where_a_version_has_it(bench, monkeypatch):
    import ours

    from gpt2cli.inference import generator

    monkeypatch.setattr(generator, "load_model", lambda *words, lookup=True: (words, lookup))
    assert ours._load("folder", "int8, look-up off") == (("folder", "int8"), False)
    assert ours._load("folder", "int8, look-up on") == (("folder", "int8"), True)
    monkeypatch.setattr(generator, "load_model", lambda *words: words)
    assert ours._load("folder", "int8") == ("folder", "int8")
    with pytest.raises(NotImplementedError, match="no prompt look-up"):
        ours._load("folder", "int8, look-up off")


def test_a_call_that_takes_too_long_fails(bench, tmp_path):
    import session

    options = SimpleNamespace(only=[], base=None, limit=0.2, peers=tmp_path)
    with pytest.raises(session.Failed, match=r"no answer in 0\.2 s"):
        session.Session(options, tmp_path).run("encoders", "-c", "import time; time.sleep(60)")


def test_a_stopped_run_prints_and_writes_what_it_measured(tmp_path):
    (tmp_path / "text.txt").write_text("The import statement.\n" * 99)
    words = ["--jobs", "encode", "--only", "tokenizers", "--rounds", "999", "--text", "text.txt"]
    words += ["--vocabulary", TINY, "--json", "found.json", "--folder", tmp_path]
    command = [sys.executable, BENCHMARKS / "run.py", *map(str, words)]
    running = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    said = ""
    for text in running.stderr:
        said += text
        if "round 2 of 999" in text:
            running.send_signal(signal.SIGTERM)
    assert running.wait() == 128 + signal.SIGTERM, said
    assert "stopped by SIGTERM" in said
    assert "| tokenizers | 1 thread |" in running.stdout.read()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["lines"][0]["figures"]["rate"]
    assert sorted(os.listdir(tmp_path)) == ["found.json", "text.txt"]


def test_the_picture_has_a_mark_for_each_line(bench):
    import picture

    lines = [
        line("generate", "1 x 128", tool, "int8", size, rate=[speed, speed])
        for tool, speed in (("ours", 240.0), ("llama", 160.0))
        for size in ("124M", "774M")
    ]
    lines += [line("growth", "4 x 128", "ours", "int8", rate=[400.0])]
    lines += [line("growth", "4 x 128", "ours", "float32", rate=[400.0])]
    drawn = ElementTree.fromstring(picture.draw(results(*lines)))
    circles = [node for node in drawn.iter() if node.tag.endswith("circle")]
    # 124M with 1 x 128 is in all three panels, the other two in one each
    assert len(circles) == 2 * 3 + 2 * 1 + 1
    assert all(0 <= float(node.get("cx")) <= 950 for node in circles)
    assert Path(picture.__file__).parent == BENCHMARKS


def test_the_server_of_a_checkout_is_its_own_wherever_the_benchmark_runs(
    bench, monkeypatch, tmp_path
):
    import serve

    (tmp_path / "gpt2cli").mkdir()
    said = "import sys; print('http://127.0.0.1:7', 'serving it', sep='\\n', file=sys.stderr)"
    (tmp_path / "gpt2cli" / "__main__.py").write_text(said)
    monkeypatch.chdir(ROOT)  # which has a gpt2cli as well
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with serve.Served(TINY, environment=environment, limit=60) as served:
        assert served.port == 7
