"""Any bytes in any file that we parse cause at worst a UserError. The long form is fuzz.py."""

import contextlib
import json

import fuzz
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2cli.errors import UserError

TARGETS = fuzz.targets()
NAMES = st.text(max_size=4) | st.sampled_from(
    ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer", "arch", "ln_epsilon", "text", "prompt")
    + ("tokens", "step", "files", "sha256", "num_hidden_layers", "vocab_size", "hidden_size")
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=6),
    max_leaves=12,
)
FLAGS = st.sampled_from(("sample", "train", "encode", "--prompt", "--steps=", "--help", "x", "-h"))
BYTES = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.lists(JSON, max_size=3).map(lambda v: b"\n".join(json.dumps(x).encode() for x in v)),
    st.lists(FLAGS | st.text(max_size=6), max_size=5).map(
        lambda words: "\0".join(words).encode("utf-8", "surrogatepass")
    ),
)


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_are_read_or_rejected_with_a_message(name):
    @settings(max_examples=40, deadline=None, database=None, derandomize=True)
    @given(BYTES)
    def check(data):
        try:
            TARGETS[name](data)
        except UserError as error:
            assert str(error) and "\n" not in str(error)[:2000]

    TARGETS[name](fuzz.seeds()[name])  # valid input is read
    check()


FOUND = (("sums", b"0  " + b"n" * 300), ("sums", b"0  a\0b"))  # by fuzz.py


@pytest.mark.parametrize("name, data", FOUND)
def test_input_found_by_fuzzing_is_read_or_rejected(name, data):
    with contextlib.suppress(UserError):
        TARGETS[name](data)
