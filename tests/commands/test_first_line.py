"""On a terminal, each command prints a line before its slow imports."""

import os
import subprocess
import sys

import pexpect
import pytest
from conftest import ROOT

from gpt2cli import console

# The line ends the command, and nothing slow may have been imported by then.
FIRST = """
import sys
from gpt2cli import console


def announce(text):
    slow = ("numpy", "regex", "requests", "tiktoken", "tokenizers", "starlette", "uvicorn")
    raise console.Announced(text, [name for name in slow if name in sys.modules])


console.Announced, console.announce = type("Announced", (Exception,), {}), announce
from gpt2cli import cli

for line in sys.stdin.read().splitlines():
    try:
        cli.main(line.split())
        print(line, "prints no first line")
    except console.Announced as end:
        print(end.args)
"""
COMMANDS = {
    "sample --model_name tiny": "opening models/tiny (6.4 MB)",
    "sample --model_name tiny --prompts p --format jsonl --out o": "opening models/tiny (6.4 MB)",
    "interactive --model_name tiny": "opening models/tiny (6.4 MB)",
    "evaluate a.txt --model_name tiny": "opening models/tiny (6.4 MB)",
    "serve --model_name tiny --port 0": "opening models/tiny (6.4 MB)",
    "export run1 models/new": "opening checkpoint/run1 (0.0 MB)",
    "train a.txt --model_name tiny": "reading a.txt",
    "encode a.txt a.npz --model_name tiny": "reading a.txt",
    "vocab a.txt folder": "reading a.txt",
    "convert models/tiny hf --to hf": "reading models/tiny",
    "init new --vocab models/tiny": "creating models/new",
    "download 124M": "looking for 124M",
}


def test_the_first_line_of_each_command_comes_before_its_slow_imports(workdir):
    (workdir / "checkpoint" / "run1").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", FIRST],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        input="\n".join(COMMANDS),
        capture_output=True,
        text=True,
    )
    found = dict(zip(COMMANDS, done.stdout.splitlines(), strict=True))
    assert found == {words: str((text, [])) for words, text in COMMANDS.items()}, done.stderr


def test_a_terminal_shows_the_line_first(workdir):
    words = ["-m", "gpt2cli", "sample", "--model_name", "tiny", "--length", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = pexpect.spawn(sys.executable, words, env=environment, encoding="utf-8", timeout=120)
    child.expect(pexpect.EOF)
    assert child.before.startswith("opening models/tiny (6.4 MB)\r\n")
    child.close()
    assert child.exitstatus == 0


@pytest.mark.parametrize("is_terminal", [True, False])
def test_only_a_terminal_gets_the_line(capsys, monkeypatch, is_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    console.announce("opening a model")
    assert capsys.readouterr().err == ("opening a model\n" if is_terminal else "")


def test_without_standard_error_there_is_no_line(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    console.announce("opening a model")
