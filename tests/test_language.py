"""Plain English: phrases that read as translated stay out of code, help, messages and documents."""

import ast
import re

import pytest
from conftest import ROOT

BANNED = (
    r"refus(e|es|ed|ing)\b",  # reject
    r"\b(mend|mends|mended)\b",  # fix
    r"\banew\b",  # again, from scratch
    r"\b(goes|go|going|went|gone) on (with|from|where|at|behind)\b",  # resume, continue
    r"\bthe same command goes on\b",
    r"\bso many\b",  # N
    r"\b(is|are) told\b",  # is reported
    r"\btells? (of|what|how|where|which|whether)\b",  # report, say
    r"\b(is|are) not to be had\b",
    r"\bone word too many\b",
    r"\bset aside as\b",  # moved to
    r"\bof other than\b",
    r"\bwhatever (its|the) (flag|answer)\b",
    r"\bwho does not (send|know)\b",
    r"\b(is|are) of another\b",  # belongs to a different
    r"\bwhat (is|are|was|were) (not|too|there|left|begun|found|given)\b",  # name the thing
    r"\bin the middle between\b",
    r"\bas it is,? no more\b",
    r"\bto the letter\b",
    r"\b(is|are|be|would be) learnt\b",  # counts in the loss
    r"\bits kind is\b",  # is a ... file
    r"\b(is|are|be|also) packed\b",  # compressed
    r"\b(end|stop|hold up)s? no (command|run|work|training|stop)\b",  # does not end
    r"\bhalf a surrogate\b",  # a lone surrogate
    r"\bin a circle\b",  # a loop
    r"\bstands? in the (log|file)\b",  # is in
    r"\b(is|are) made again\b",  # written, encoded, converted again
)
PATTERN = re.compile("|".join(BANNED), re.IGNORECASE)
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]
CODE = sorted((ROOT / "gpt2cli").rglob("*.py"))
SHOWN = [*(ROOT / "gpt2cli" / "serving" / "web").rglob("*.html"), *ROOT.glob("bin/*")]


def texts_of(path):
    """Yield (line, text) of each string and comment of a Python file."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    for number, line in enumerate(source.splitlines(), 1):
        if "#" in line:
            yield number, line.partition("#")[2]


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_messages_help_docstrings_and_comments_have_no_banned_phrase(path):
    found = [
        f"{path.relative_to(ROOT)}:{line}: {match[0]!r}"
        for line, text in texts_of(path)
        for match in PATTERN.finditer(" ".join(text.split()))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", DOCUMENTS + SHOWN, ids=lambda p: str(p.relative_to(ROOT)))
def test_documents_have_no_banned_phrase(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    found = [match[0] for match in PATTERN.finditer(" ".join(text.split()))]
    assert not found, found


def test_the_check_finds_what_it_looks_for():
    assert len(CODE) > 50 and len(DOCUMENTS) > 20
    for phrase in ("the server refuses it", "write it anew", "'x' is one word too many"):
        assert PATTERN.search(phrase), phrase
