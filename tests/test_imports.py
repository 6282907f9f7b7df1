"""Who may import whom, and what may not be imported at all."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gpt2cli"
# A module imports only from the groups before its own.
GROUPS = (
    {"errors"},
    {"flags"},
    {"config", "hparams"},
    {"files", "engine", "cluster", "machine"},
    {"runs", "jobs", "journal", "kernels", "completions", "replicas", "processes"},
    {"folders"},
    {"encoder", "graph_rules", "model", "transfer", "windows"},
    {"optimizers", "score", "training_memory"},
    {"dataset", "vocabularies", "checkpoint", "program", "sampling", "training", "hub"},
    {"beams", "continuation", "generation", "graph", "lite", "statedict"},
    {"inference", "formats"},
    {"loop", "scheduler", "answers"},
    {"service", "server"},
    {"commands"},
    {"cli"},
)
WITHOUT_TENSORFLOW = (
    *(
        "errors",
        "flags",
        "config",
        "hparams",
        "files",
        "runs",
        "folders",
        "jobs",
        "encoder",
        "windows",
        "dataset",
        "vocabularies",
        "completions",
        "server",
        "cluster",
        "machine",
        "processes",
        "answers",
    ),
    *("cli", "commands"),
)


def own_imports(path):
    """The gpt2cli modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gpt2cli"):
            parts = node.module.split(".")
            yield from parts[1:2] or [alias.name for alias in node.names]


def group_of(name):
    return next(i for i, group in enumerate(GROUPS) if name in group)


MODULES = sorted(p for p in PACKAGE.rglob("*.py") if not p.name.startswith("__"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_modules_import_only_from_the_groups_before_them(path):
    name = "commands" if path.parent.name == "commands" else path.stem
    for imported in own_imports(path):
        if imported == "__version__":
            continue
        assert group_of(imported) < group_of(name), f"{name} may not import {imported}"


def test_only_the_engine_imports_tensorflow():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found = [n for n in names if n.split(".")[0] in ("tensorflow", "torch", "transformers")]
            assert not found or path.stem == "engine", f"{path.name} imports {found}"


def test_what_needs_no_network_graph_imports_no_tensorflow():
    names = [f"gpt2cli.{n}" for n in WITHOUT_TENSORFLOW]
    names += [f"gpt2cli.commands.{p.stem}" for p in (PACKAGE / "commands").glob("[a-z]*.py")]
    code = f"import sys, {', '.join(names)}; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0
