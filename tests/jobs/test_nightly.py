"""bin/nightly-generate: every ending is logged, and nothing of an earlier night is lost."""

import fcntl
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY

SCRIPT = ROOT / "bin" / "nightly-generate"
TODAY = time.strftime("%Y-%m-%d")
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d"
WRITES = 'for word; do :; done; echo {} >"${word#--out=}"; echo done >&2'  # the last is --out=FILE


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A GPT2CLI_HOME with a space in its name, and the run run1."""
    folder = tmp_path / "my home"
    shutil.copytree(TINY, folder / "checkpoint" / "run1")
    (folder / "my prompts.txt").write_text("The kettle\n")
    monkeypatch.setenv("GPT2CLI_HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def script():
    """The script as a module."""
    loader = importlib.machinery.SourceFileLoader("nightly", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("nightly", loader))
    loader.exec_module(module)
    return module


@pytest.fixture
def nightly(home, script, monkeypatch, capsys):
    """Run the script in this process, with lines of shell in place of gpt2cli."""
    monkeypatch.setattr(script, "ROOT", home)
    monkeypatch.setattr(sys, "executable", "/bin/sh")
    (home / "bin").mkdir()

    def run(*words, run="run1", gpt2cli=WRITES):
        (home / "bin" / "gpt2cli").write_text(gpt2cli)
        handlers = {number: signal.getsignal(number) for number in (1, 2, 15)}
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may run the tests
        try:
            status = script.main(["--run_name", run, *words])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        found = capsys.readouterr()
        return status, found.out + found.err

    return run


def log_of(home):
    return (home / "samples" / "run1" / "nightly.log").read_text()


def nights(home):
    return sorted(path.name for path in (home / "samples" / "run1").iterdir())


def test_the_script_runs_from_cron(home):
    """From a shell that is not bash, and with almost no environment."""
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    words = "--run_name=run1 --prompts 'my prompts.txt' --length 4 --seed=1"
    result = subprocess.run(
        ["/bin/sh", "-c", f"'{SCRIPT}' {words}"],
        cwd="/",
        env={"GPT2CLI_HOME": str(home), "PATH": path},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout + result.stderr) == (0, ""), log_of(home)
    out, _ = nights(home)
    assert re.fullmatch(r"nightly-\d{4}-\d\d-\d\d\.jsonl", out)
    (line,) = (home / "samples" / "run1" / out).read_text().splitlines()
    assert json.loads(line)["prompt"] == "The kettle"
    assert re.fullmatch(TIME + r" status 0: .*, 4 tokens, .*, 0 failed\n", log_of(home))


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_goes_to_standard_output(script, capsys, word):
    assert script.main(["--run_name", "nothing", word]) == 0
    found = capsys.readouterr()
    assert "usage: nightly-generate --run_name RUN" in found.out and found.err == ""


@pytest.mark.parametrize(
    "words, status, said",
    [
        (["--nothing"], 2, "sample has no flag --nothing"),
        (["--out", "x"], 2, "--out is set by this script"),
        (["--format=text"], 2, "--format is set by this script"),
        (["--keep_days", "9" * 5000], 2, "--keep_days takes a number of days"),
        (["--keep-days=-1"], 2, "--keep_days takes a number of days"),
        (["--keep_days"], 2, "--keep_days needs a value"),
        (["--nsamples", "0"], 2, "--nsamples above 0"),
        (["--checkpoint_dir", "nowhere"], 1, "no run 'run1' in"),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, list) else "",
)
def test_a_wrong_flag_creates_nothing_and_is_logged_if_there_is_a_log(
    home, nightly, words, status, said
):
    code, shown = nightly(*words)
    assert code == status and shown.startswith("nightly-generate: ") and said in shown
    assert shown.count("\n") == 1 and not (home / "samples").exists()
    if words[0] in ("--nothing", "--checkpoint_dir"):
        assert nightly() == (0, "")
        assert nightly(*words) == (status, "")
        assert f"status {status}: " in log_of(home).splitlines()[1]


@pytest.mark.parametrize("run", ["nope", "../run1", "a/b", ".", ""])
def test_a_wrong_run_creates_nothing(home, nightly, run):
    before = sorted(home.rglob("*"))
    code, shown = nightly(run=run)
    assert code in (1, 2) and shown.count("\n") == 1
    assert [path for path in sorted(home.rglob("*")) if path.parent.name != "bin"] == before


def test_a_home_that_does_not_exist_is_reported_in_one_line(nightly, monkeypatch):
    monkeypatch.setenv("GPT2CLI_HOME", "/no such folder")
    code, shown = nightly()
    assert (code, shown) == (
        1,
        "nightly-generate: cannot enter /no such folder: No such file or directory. "
        "Set GPT2CLI_HOME\n",
    )


@pytest.mark.parametrize("number, status", [(1, 129), (2, 130), (15, 143)])
def test_signals_are_handed_on_and_logged(home, nightly, number, status):
    """The signal goes to the script alone, which waits until gpt2cli has ended."""
    trap = f"echo 3 samples kept >&2; sleep 0.1; echo stopped >&2; exit {status}"
    stub = f"trap '{trap}' {number}; kill -{number} $PPID; while :; do sleep 0.05; done"
    assert nightly(gpt2cli=stub) == (status, "")
    assert re.fullmatch(f"{TIME} status {status}: stopped\n    3 samples kept\n", log_of(home))


def test_the_last_lines_of_an_error_are_logged(home, nightly):
    stub = "for n in 1 2 3 4 5 6 7 8 9 10 11 12; do echo line $n >&2; done; exit 1"
    assert nightly(gpt2cli=stub) == (1, "")
    first, *rest = log_of(home).splitlines()
    assert first.endswith(" status 1: line 12")
    assert rest == [f"    line {number}" for number in range(3, 12)]
    assert nightly(gpt2cli="printf '\\033[2J\\n' >&2; kill -9 $$") == (137, "")
    assert log_of(home).endswith(" status 137: gpt2cli was ended by SIGKILL\n    \\x1b[2J\n")


def test_a_second_run_while_the_first_is_active_is_logged(home, nightly):
    assert nightly() == (0, "")
    with open(home / "samples" / "run1" / "nightly.log", "ab") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        assert nightly() == (75, "")
    assert log_of(home).endswith(" status 75: the previous run is still active\n")


def test_a_file_that_is_complete_is_never_replaced(home, nightly):
    """Neither by a second run on a day, nor after the clock was put back."""
    assert nightly() == (0, "")
    out = home / "samples" / "run1" / f"nightly-{TODAY}.jsonl"
    out.write_text("precious")
    assert nightly() == (0, "")
    assert out.read_text() == "precious"
    assert "is complete: nothing to do. Rename it to generate another" in log_of(home)


def test_only_old_files_of_this_script_are_deleted(home, nightly):
    folder = home / "samples" / "run1"
    (folder / "nightly-2020-01-09.jsonl").mkdir(parents=True)
    old = ["nightly-2020-01-01.jsonl", "nightly-2020-01-02.jsonl.part.json"]
    old += ["nightly-2020-01-03.jsonl.2-of-3.part", "nightly-2020-01-04.jsonl.part.old-2"]
    others = ["nightly-best.jsonl", "nightly-2020-01-01.jsonl.txt", "my-nightly-2020-01-01.jsonl"]
    others += ["sample-1-seed2.jsonl", f"nightly-{TODAY}.jsonl.part"]
    for name in (*old, *others, "nightly-2020-01-05.jsonl"):
        (folder / name).write_text("{}\n")
        days = 20 if name == "nightly-2020-01-05.jsonl" else 40
        os.utime(folder / name, times=(time.time() - days * 86400,) * 2)
    (folder / "nightly-2020-01-06.jsonl").symlink_to("sample-1-seed2.jsonl")
    os.utime(folder / "nightly-2020-01-06.jsonl", times=(0, 0), follow_symlinks=False)
    before = nights(home)
    assert nightly(gpt2cli="exit 1")[0] == 1
    assert nights(home) == sorted([*before, "nightly.log"])  # after a failure all stay
    assert nightly() == (0, "")
    made = [f"nightly-{TODAY}.jsonl", "nightly.log"]
    assert nights(home) == sorted({*before, *made} - set(old))
    assert log_of(home).endswith("".join(f"    deleted {name}\n" for name in old))


def test_an_entry_that_cannot_be_written_is_printed(script, capsys):
    with open("/dev/full", "wb", buffering=0) as log:
        assert script.end(log, 143, "stopped by SIGTERM") == 143
    shown = capsys.readouterr().err
    assert "cannot write /dev/full: No space left on device" in shown
    assert "status 143: stopped by SIGTERM" in shown


def test_a_log_that_is_a_link_is_not_written(home, nightly):
    folder = home / "samples" / "run1"
    folder.mkdir(parents=True)
    (home / "precious").write_text("precious")
    (folder / "nightly.log").symlink_to(home / "precious")
    code, shown = nightly()
    assert code == 1 and "samples/run1/nightly.log is a link" in shown
    assert (home / "precious").read_text() == "precious"
