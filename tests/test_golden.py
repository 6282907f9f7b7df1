"""The subset of the original programs' results that is part of the repository."""

import re

import pytest
from conftest import GOLDEN


def test_the_subset_is_smaller_than_500_kb():
    files = [path for path in GOLDEN.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    sizes = [path.stat().st_size for path in files]
    assert len(sizes) > 20 and sum(sizes) < 500_000


@pytest.mark.parametrize(
    "program", ["gpt2-openai", "gpt2-hf", "gpt2_ml", "uer", "nshepperd_npz", "bpe", "wordpiece"]
)
def test_the_readme_describes_the_results_of_each_program(program):
    table = re.findall(r"^\| `([\w-]+)/", (GOLDEN / "README.md").read_text(), re.MULTILINE)
    assert program in table
    assert any(path.is_file() for path in (GOLDEN / program).rglob("*"))
