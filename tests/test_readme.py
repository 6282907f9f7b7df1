"""README and docs: commands are accepted or run, Python runs, and links lead to files."""

import dataclasses
import itertools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from gpt2cli import cli

DOCS = ROOT / "docs"
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / folder / "README.md" for folder in ("benchmarks", "data", "models")),
    *sorted(DOCS.rglob("*.md")),
]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def blocks(text, kind):
    """The contents of the fenced blocks of one kind, such as "sh"."""
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.M | re.S)


def section(path, heading):
    """The text of a document between `heading` and the next heading of its level."""
    text = path.read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert found, f"{path.name} has no section {heading!r}"
    return found[1]


def command_lines(path):
    """The words after `gpt2cli` of each command line in the sh blocks of a document."""
    for block in blocks(path.read_text(encoding="utf-8"), "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if match := re.search(r"^(?:.*\| )?(?:bin/)?gpt2cli (.*)", line):
                lexer = shlex.shlex(match[1], posix=True, punctuation_chars=True)
                lexer.whitespace_split = True
                yield list(itertools.takewhile(lambda w: not w or set(w) - set("|&;<>"), lexer))


def test_every_command_line_in_the_documents_is_accepted(monkeypatch):
    """Each line is parsed as the program would parse it; none is run."""
    for name, value in (("ID", "1"), ("MIN", "0"), ("MAX", "7"), ("COUNT", "8")):  # as Slurm does
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    seen = set()
    for path in DOCUMENTS:
        for words in command_lines(path):
            made = cli.read_command_line(words)
            assert made is None or dataclasses.is_dataclass(made), (path, words)
            seen.add(words[0])
    assert seen >= set(cli.COMMANDS)


@pytest.mark.parametrize("name", NAMES)
def test_the_links_of_a_document_lead_to_files(name):
    text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not re.match(r"https?:", link):
            target = (ROOT / name).parent / link
            assert target.exists(), f"{name} links to {link}, which does not exist"


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder as `git clone` makes it, after bin/quickstart with two training steps.

    It has the files that git tracks, as they are in the working tree. Its .venv runs this Python
    with the clone's own package.
    """
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is not a git repository, so there is nothing to clone")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, module in (("python", ""), ("gpt2cli", " -m gpt2cli")):
        command = f'PYTHONPATH="{folder}" exec "{sys.executable}"{module} "$@"'
        (programs / name).write_text(f"#!/bin/sh\n{command}\n")
        (programs / name).chmod(0o755)
    shutil.copy(folder / "setup.py", folder / ".venv" / ".installed")  # bin/install's stamp
    in_clone(folder, "QUICKSTART_STEPS=2 bin/quickstart")
    return folder


def in_clone(folder, line):
    """Run a line of shell in the clone, with its .venv on the path; returns standard output."""
    environment = {**os.environ, "PATH": f"{folder}/.venv/bin{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (line, done.stderr[-3000:])
    return done.stdout


def test_the_quickstart_leaves_its_text_and_its_run(clone):
    for name in ("data/stdlib.txt", "data/held-out.txt", "data/stdlib.npz"):
        assert (clone / name).stat().st_size > 1000, name
    assert (clone / "checkpoint" / "quickstart" / "model-2.index").is_file()


def test_the_six_commands_of_the_readme_run_after_the_quickstart(clone):
    _, block = blocks(section(ROOT / "README.md", "Six commands"), "sh")
    lines = block.splitlines()
    assert len(lines) == 6
    printed = {re.search(r"gpt2cli (\w+)", line)[1]: in_clone(clone, line) for line in lines}
    assert list(printed) == ["encode", "train", "sample", "evaluate", "export", "interactive"]
    assert " SAMPLE 1 " in printed["sample"] and "perplexity" in printed["evaluate"]
    assert printed["interactive"].strip()
    for name in ("data/demo.npz", "checkpoint/demo/model-20.index", "models/demo/model.ckpt.index"):
        assert (clone / name).is_file(), name
    assert list((clone / "samples" / "demo").glob("sample-20-seed1.txt"))


def test_the_python_of_the_readme_runs(workdir, capsys):
    (block,) = blocks(section(ROOT / "README.md", "Python"), "python")
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.count("length") >= 1 and ", 2048)" in printed


def test_the_python_of_its_page_runs(workdir, capsys):
    (workdir / "data").mkdir()
    (workdir / "data" / "books.txt").write_text("It was a dark and stormy night.\n" * 60)
    (workdir / "data" / "held-out.txt").write_text("The night was dark.\n" * 40)
    names = {}
    found = blocks((DOCS / "python.md").read_text(encoding="utf-8"), "python")
    assert found
    for block in found:
        exec(compile(block, "python.md", "exec"), names)
    assert Path("checkpoint/notebook/model-10.index").is_file()
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_the_python_of_a_document_compiles(name):
    for block in blocks((ROOT / name).read_text(encoding="utf-8"), "python"):
        compile(block, name, "exec")


def test_the_tables_of_scaling_are_the_scripts(capsys):
    script = runpy.run_path(str(ROOT / "benchmarks" / "scaling.py"))
    script["table"]()
    *lines, apart = capsys.readouterr().out.strip().splitlines()
    text = (DOCS / "scaling.md").read_text(encoding="utf-8")
    assert len(lines) > 12 and not [line for line in lines if line not in text]
    assert float(apart.split()[-2]) < 2
