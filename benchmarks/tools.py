"""The programs that are compared, and their virtual environments."""

import subprocess
import venv
from dataclasses import dataclass, field

import machine

OURS = "import typing; from gpt2cli.options import Precision; print(*typing.get_args(Precision))"
CT2 = "import ctranslate2 as lib; print(*lib.get_supported_compute_types('cpu'))"
PRECISIONS = ("float32", "bfloat16", "int8")
TRAINED = ("float32", "bfloat16", "float32, recomputed", "bfloat16, recomputed")


@dataclass(frozen=True)
class Tool:
    """A program.

    Attributes:
        script: its worker.
        generates: the kinds of model that it generates with.
        trains: the kinds of training that it does.
        install: the words of `pip install`, once for each tuple.
        known: Python code that prints the kinds that its version has on this processor.
        needs: beginning of a kind -> the flag of /proc/cpuinfo without which a call takes minutes.
    """

    script: str
    generates: tuple
    trains: tuple = ()
    install: tuple = ()
    known: str = ""
    needs: dict = field(default_factory=dict)

    def lacks(self, kind):
        """Return the name of the instruction set that this processor lacks for a kind, or None."""
        for beginning, flag in self.needs.items():
            if kind.startswith(beginning) and flag not in machine.flags():
                return machine.FLAGS[flag]
        return None


TOOLS = {
    "ours": Tool("ours.py", (*PRECISIONS, "int4"), TRAINED, known=OURS),
    "base": Tool("ours.py", (*PRECISIONS, "int4"), TRAINED, known=OURS),
    "transformers": Tool(
        "peer_transformers.py",
        ("float32", "bfloat16"),
        (
            *("float32", "bfloat16 (autocast)", "bfloat16 (whole)"),
            *("bfloat16 (autocast), recomputed", "bfloat16 (whole), recomputed"),
        ),
        (("torch", "transformers"),),
        needs={"bfloat16": "avx512bw"},
    ),
    "ctranslate2": Tool("peer_ctranslate2.py", PRECISIONS, (), (("ctranslate2",),), CT2),
    "llama": Tool("peer_llama.py", PRECISIONS, (), (("llama-cpp-python", "gguf"),)),
    "gpt2simple": Tool(
        "peer_gpt2simple.py",
        ("float32",),
        ("float32",),
        # it asks for a TensorFlow that is no longer there
        (("tensorflow", "regex", "requests", "tqdm"), ("--no-deps", "gpt-2-simple", "toposort")),
    ),
}
ENCODERS = ("ours", "base", "tiktoken", "tokenizers")
OWN = ("ours", "base")  # two checkouts of gpt2cli, run by the same Python


def install(folder, names, say):
    """Make the virtual environments that are missing."""
    for name in names:
        tool = TOOLS.get(name)
        if tool is None or not tool.install or (folder / name).exists():
            continue
        say(f"installing {name}")
        venv.create(folder / name, with_pip=True)
        for words in tool.install:
            pip = [folder / name / "bin/python", "-m", "pip", "install", "-q", *words]
            if subprocess.run(pip).returncode:
                say(f"pip failed: {folder / name} is incomplete; remove it and try again")
