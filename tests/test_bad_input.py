"""Any bytes in any file that we parse cause at worst a UserError. The long form is fuzz.py."""

import contextlib
import json

import fuzz
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2cli import console, counts, files
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


JSON_SEEDS = fuzz.json_seeds()
MANY = pytest.mark.parametrize("examples", [10, pytest.param(200, marks=pytest.mark.slow)])


@MANY
@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_are_read_or_rejected_with_a_message(name, examples):
    @settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @given(BYTES)
    def check(data):
        read_or_reject(name, data)

    TARGETS[name](fuzz.seeds()[name])  # valid input is read
    check()


FOUND = (("sums", b"0  " + b"n" * 300), ("sums", b"0  a\0b"))  # by fuzz.py


@pytest.mark.parametrize("name, data", FOUND)
def test_input_found_by_fuzzing_is_read_or_rejected(name, data):
    with contextlib.suppress(UserError):
        TARGETS[name](data)


@pytest.mark.parametrize("name", JSON_SEEDS)
def test_an_odd_value_anywhere_in_a_json_file_is_read_or_rejected(name):
    seed = JSON_SEEDS[name]
    spots = [*fuzz.places(seed)]

    @settings(max_examples=10, deadline=None, database=None, derandomize=True)
    @given(st.sampled_from(spots), st.sampled_from(fuzz.ODD) | JSON.map(json.dumps))
    def check(spot, odd):
        read_or_reject(name, fuzz.with_odd(seed, spot, odd).encode())

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", JSON_SEEDS)
def test_every_odd_value_everywhere_in_a_json_file_is_read_or_rejected(name):
    seed = JSON_SEEDS[name]
    for spot in fuzz.places(seed):
        for odd in fuzz.ODD:
            read_or_reject(name, fuzz.with_odd(seed, spot, odd).encode())


def read_or_reject(name, data):
    """Read some bytes; a UserError must be one readable line."""
    try:
        TARGETS[name](data)
    except UserError as error:
        assert str(error) and "\n" not in console.visible(f"gpt2cli: {error}")
        assert len(console.visible(str(error))) < 2 * console.LONGEST


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"b": {"a": [1], "a": [2]}}'])
def test_a_key_with_two_values_is_rejected(text):
    with pytest.raises(UserError, match=r"x.json has 'a' twice"):
        files.parse_object(text, "x.json")


def test_a_repeated_key_with_one_value_is_read():
    assert files.parse_object('{"a": 1, "a": 1}', "x.json") == {"a": 1}


@pytest.mark.parametrize(
    ("text", "number"),
    [("7", 7), ("0", 0), ("2147483647", 2**31 - 1), ("2147483648", None), ("9" * 5000, None),
     ("-1", None), ("+1", None), (" 1", None), ("1_0", None), ("\u0663", None), ("\u00b2", None),
     ("", None), ("1.0", None), ("1\n", None), (7, None), (None, None)],
)  # fmt: skip
def test_a_number_in_a_text_has_only_ascii_digits(text, number):
    assert counts.whole_of(text) == number


@pytest.mark.parametrize("value", [True, 1.0, "1", None, [1], -1, 2**31, 10**4000])
def test_only_an_integer_is_a_whole_number_in_json(value):
    assert not counts.is_whole(value) and counts.is_whole(1)


@pytest.mark.parametrize("value", [True, "1", None, 10**4000, float("nan"), float("inf"), 1e31])
def test_a_real_number_in_json_is_finite(value):
    assert not counts.is_real(value) and counts.is_real(1) and counts.is_real(-1.5)
