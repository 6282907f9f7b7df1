"""Measure the structure of a Python package: python benchmarks/structure.py [PACKAGE_FOLDER ...]

One row a folder given (default: gpt2cli): modules, folders, lines, functions, the median and the
longest function in lines, public parameters with a type, public things with a docstring, and the
imports between modules and between folders.
"""

import ast
import statistics
import sys
from pathlib import Path

HEADS = [
    "modules",
    "folders",
    "lines",
    "functions",
    "median",
    "longest",
    "typed",
    "docstrings",
    "arrows",
]


def is_public(names):
    return not any(name.startswith("_") for name in names)


def walk(tree, names=()):
    """Yield (names, node) of each class and function that is not inside a function."""
    for node in getattr(tree, "body", []):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield (*names, node.name), node
        if isinstance(node, ast.ClassDef):
            yield from walk(node, (*names, node.name))


def parameters(node, is_method):
    """Yield whether each parameter has a type; self and cls need none."""
    arguments = [*node.args.posonlyargs, *node.args.args]
    plain = any(getattr(d, "id", "") == "staticmethod" for d in node.decorator_list)
    for argument in arguments[1 if is_method and not plain else 0 :] + node.args.kwonlyargs:
        yield argument.annotation is not None
    for argument in (node.args.vararg, node.args.kwarg):
        if argument is not None:
            yield argument.annotation is not None


def arrows(package, trees):
    """The pairs (importing, imported) of modules, and of folders."""
    names = {
        ".".join([package.name, *path.relative_to(package).with_suffix("").parts]) for path in trees
    }
    pairs = set()
    for path, tree in trees.items():
        own = ".".join([package.name, *path.relative_to(package).with_suffix("").parts])
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    for found in (f"{node.module}.{alias.name}", node.module):
                        if found in names and found != own:
                            pairs.add((own, found))
                            break
    folders = {(a.rpartition(".")[0], b.rpartition(".")[0]) for a, b in pairs}
    return len(pairs), len({(a, b) for a, b in folders if a != b})


def measure(package):
    paths = sorted(package.rglob("*.py"))
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    lengths, typed, documented = [], [], []
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths.append(node.end_lineno - node.lineno + 1)
        if tree.body:
            documented.append(ast.get_docstring(tree) is not None)
        for names, node in walk(tree):
            is_dunder = node.name.startswith("__") and node.name.endswith("__")
            if not is_public(names[:-1]) or not (is_public(names[-1:]) or is_dunder):
                continue
            if not is_dunder:
                documented.append(ast.get_docstring(node) is not None)
            if not isinstance(node, ast.ClassDef):
                typed += parameters(node, len(names) > 1)
    modules, folders = arrows(package, trees)
    return {
        "modules": len(paths),
        "folders": len({path.parent for path in paths}),
        "lines": sum(len(text.splitlines()) for text in texts.values()),
        "functions": len(lengths),
        "median": int(statistics.median(lengths)),
        "longest": max(lengths),
        "typed": f"{sum(typed)}/{len(typed)}",
        "docstrings": f"{sum(documented)}/{len(documented)}",
        "arrows": f"{modules}, folders {folders}",
    }


def main():
    found = [measure(Path(name)) for name in sys.argv[1:] or ["gpt2cli"]]
    rows = [HEADS, *([str(row[head]) for head in HEADS] for row in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    main()
