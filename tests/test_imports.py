"""Who may import whom: each package's docstring says it, and these tests hold it."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "gpt2cli"
# From the lowest layer to the highest; a package also imports whatever those it names import.
FOLDERS = sorted(path.parent for path in PACKAGE.glob("**/__init__.py") if path.parent != PACKAGE)
# A module at the top of the package imports only modules before its own.
TOP = ("errors", "console", "signals", "counts", "machine", "flags", "peers", "paths", "files")
TOP += ("locks", "tensorflow", "options", "cli", "python")
WITHOUT_TENSORFLOW = tuple(name for name in TOP if name != "tensorflow")


class RunningCode(ast.NodeTransformer):
    """Drops imports for type checkers: a type may be named from anywhere."""

    def visit_If(self, node):
        return None if getattr(node.test, "id", "") == "TYPE_CHECKING" else node


def own_imports(path):
    """Yield the gpt2cli modules that a file imports, anywhere in it, as dotted names."""
    tree = RunningCode().visit(ast.parse(path.read_text(encoding="utf-8")))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "gpt2cli":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gpt2cli."):
            module = node.module.removeprefix("gpt2cli.")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def named_in(folder):
    """Return the packages and modules that a package's docstring allows it to import."""
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    rule = re.search(r"^May import: ([\w., ]+)\.$", docstring.replace("\n", " ") + " ", re.M)
    rule = rule or re.search(r"May import: ([\w., \n]+?)\.(?:\s|$)", docstring)
    assert rule, f"{folder.name}/__init__.py has no line 'May import: ...'"
    return {name.strip() for name in rule[1].split(",")}


def allowed_in(folder):
    """Return all that a package may import: what it names, and what those may import in turn."""
    found, left = set(), named_in(folder)
    while left:
        name = left.pop()
        found.add(name)
        path = PACKAGE / name.replace(".", "/")
        if (path / "__init__.py").is_file():
            left |= named_in(path) - found
    return found


def package_of(path):
    return ".".join(path.relative_to(PACKAGE).parts[:-1])


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
INSIDE = [path for path in MODULES if path.parent != PACKAGE]


@pytest.mark.parametrize("path", INSIDE, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_what_its_packages_docstring_allows(path):
    own, allowed = package_of(path), allowed_in(path.parent)
    for imported in own_imports(path):
        parts = imported.split(".")
        prefixes = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        if imported == "__version__" or own in prefixes:
            continue
        assert prefixes & allowed, f"{path.relative_to(PACKAGE)} may not import {imported}"
    assert allowed


@pytest.mark.parametrize("name", TOP)
def test_a_module_at_the_top_imports_only_those_before_it(name):
    before = {"__version__", *TOP[: TOP.index(name)]}
    found = {imported.split(".")[0] for imported in own_imports(PACKAGE / f"{name}.py")}
    assert found <= before, f"{name} may not import {found - before}"


def test_no_package_allows_itself_to_be_imported_from_below():
    """The rules form no circle."""
    assert len(FOLDERS) >= 10
    for folder in FOLDERS:
        own = ".".join(folder.relative_to(PACKAGE).parts)
        for name in allowed_in(folder):
            path = PACKAGE / name.replace(".", "/")
            if (path / "__init__.py").is_file():
                assert own not in allowed_in(path), f"{own} and {name} import each other"


def test_commands_do_not_import_each_other():
    for path in (PACKAGE / "commands").glob("[a-z]*.py"):
        assert not [name for name in own_imports(path) if name.startswith("commands")], path


def test_only_one_module_imports_tensorflow():
    private = {"tensorflow.py"}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found = [n for n in names if n.split(".")[0] in ("tensorflow", "torch", "transformers")]
            assert not found or path.name in private, f"{path.name} imports {found}"


def test_nothing_below_the_commands_prints_to_standard_output():
    quiet = [path for path in MODULES if path.parent.name != "commands" and path.stem != "cli"]
    assert len(quiet) > 30
    for path in quiet:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                keywords = {keyword.arg for keyword in node.keywords}
                assert "file" in keywords, f"{path.relative_to(PACKAGE)} line {node.lineno}"


def test_help_needs_neither_numpy_nor_tensorflow():
    heavy = ("numpy", "tensorflow", "regex", "requests", "tqdm", "fire", "tiktoken", "tokenizers")
    code = f"import sys; from gpt2cli import cli; cli.general_help(); sys.exit(bool({heavy!r} and "
    code += f"[m for m in {heavy!r} if m in sys.modules]))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_modules_without_the_network_import_no_tensorflow():
    names = [f"gpt2cli.{n}" for n in WITHOUT_TENSORFLOW]
    packages = ("commands", "remote", "text", "jobs", "serving")
    names += [
        ".".join(["gpt2cli", *path.relative_to(PACKAGE).with_suffix("").parts])
        for path in INSIDE
        if path.parent.name in packages and path.stem not in ("answer", "scheduler", "service")
    ]
    names += [
        f"gpt2cli.storage.{n}" for n in ("folders", "runs", "bundle", "reading", "destinations")
    ]
    names += ["gpt2cli.model.sizes"]
    names += ["gpt2cli.training.hosts", "gpt2cli.formats.vocabularies"]
    code = f"import sys, {', '.join(names)}; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
