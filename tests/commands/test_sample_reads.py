"""One `sample` opens each file of the model once, and encodes its prompt once."""

import json
import os
import subprocess
import sys

from conftest import ROOT

SCRIPT = """
import collections, json, os, sys

opened, encoded = collections.Counter(), []

def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        opened[os.path.basename(arguments[0])] += 1

from gpt2cli.text.bpe import BPE

def counting(self, text, special=False, encode=BPE._encode):
    encoded.append(text)
    return encode(self, text, special)

BPE._encode = counting
sys.addaudithook(watch)
from gpt2cli.cli import main

main(sys.argv[2:])
with open(sys.argv[1], "w") as file:
    json.dump([opened, encoded], file)
"""
ONCE = ("hparams.json", "encoder.json", "vocab.bpe", "SHA256SUMS")


def test_sample_reads_each_file_and_encodes_the_prompt_once(workdir):
    from gpt2cli.storage import folders

    folders.write_sums(workdir / "models" / "tiny")
    words = ["sample", "--model_name", "tiny", "--prompt", "The kettle", "--length", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, "counts.json", *words]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    opened, encoded = json.loads((workdir / "counts.json").read_text())
    assert {name: opened.get(name) for name in ONCE} == dict.fromkeys(ONCE, 1)
    assert encoded == ["The kettle"]
