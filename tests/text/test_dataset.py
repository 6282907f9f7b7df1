"""Text files -> ids -> batches, compared with nshepperd/gpt-2's .npz files and references here."""

import itertools
import json
import math
import os
import pickle
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer

from gpt2cli.errors import UserError
from gpt2cli.options import TextOptions
from gpt2cli.text import corpus, encoded, encoder, inputs, stored
from gpt2cli.text.batches import Tokens
from gpt2cli.text.classes import END

DEFAULTS = TextOptions()


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A BPE of 300 tokens whose end token is 0."""
    folder = tmp_path_factory.mktemp("bpe")
    theirs = ByteLevelBPETokenizer()
    theirs.train_from_iterator(
        ["the kettle clicked off"], vocab_size=300, min_frequency=1, special_tokens=[END]
    )
    theirs.save_model(str(folder))
    return encoder.load(folder)


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wordpiece")
    (folder / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n今\n天\n气\n", encoding="utf-8")
    return encoder.load(folder)


def chunks_of(paths, vocabulary, options=DEFAULTS):
    """Return the chunks of the encoded files as lists."""
    parts = encoded.encode(map(Path, paths), vocabulary, options, vocabulary.n_vocab)
    return [chunk.tolist() for chunk in encoded.chunks(parts)]


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def nshepperds_files(folder):
    """Return (path, description) of each .npz file that nshepperd's encode.py wrote."""
    described = json.loads((folder / "expected.json").read_text())
    assert len(described) >= 2
    return [(folder / name, expected) for name, expected in described.items()]


def test_npz_files_of_nshepperd_load_with_the_same_ids(results):
    for path, expected in nshepperds_files(results / "nshepperd_npz"):
        tokens = encoded.load(path, None, DEFAULTS, 50257)
        assert tokens.chunks
        assert [c.tolist() for c in tokens.chunks] == [a["ids"] for a in expected["arrays"]]
        assert all(chunk.dtype == np.uint16 for chunk in tokens.chunks)


def test_texts_encode_like_nshepperd_except_for_his_spelled_separator(results, gpt2):
    spelled = gpt2.encode(END)
    for path, expected in nshepperds_files(results / "nshepperd_npz"):
        sources = [path.parent / name for name in expected["source"]]
        ours = chunks_of(sources, gpt2, TextOptions(combine=expected["combine"]))
        his = [array["ids"] for array in expected["arrays"]]
        assert his
        for our_chunk, his_chunk in zip(ours, his, strict=True):
            again = []
            for index in our_chunk:
                again += spelled if index == gpt2.end else [index]
            # He omits the separator after the file that completes a chunk; we never do.
            assert again in (his_chunk, his_chunk + spelled)


def test_texts_with_a_spelled_separator_encode_exactly_like_nshepperd(results, gpt2):
    for path, expected in nshepperds_files(results / "nshepperd_npz"):
        chunks, text = [], ""
        for name in expected["source"]:  # his load_dataset.py
            text += (path.parent / name).read_text(encoding="utf-8")
            if len(text) >= expected["combine"]:
                chunks.append(text)
                text = ""
            else:
                text += END
        chunks += [text] if text else []
        his = [array["ids"] for array in expected["arrays"]]
        assert [gpt2.encode(chunk) for chunk in chunks] == his


def draw(tokens, step, rows, length, seed, **noise):
    """Return a batch of random windows."""
    return tokens.sampler("random", length, seed).batch(step, rows, **noise)


def test_a_text_is_followed_by_the_end_token_and_short_files_share_a_chunk(tmp_path, bpe):
    paths = [
        write(tmp_path / name, text)
        for name, text in zip("abc", ("x", "yy", "z" * 40), strict=True)
    ]
    x, yy, z = (bpe.encode(path.read_text()) for path in paths)
    assert chunks_of(paths, bpe) == [[*x, 0, *yy, 0, *z, 0]]
    assert chunks_of(paths, bpe, TextOptions(combine=1)) == [[*x, 0], [*yy, 0], [*z, 0]]
    # x, the 13 characters of a separator and yy are 16, as nshepperd counts.
    assert chunks_of(paths, bpe, TextOptions(combine=16)) == [[*x, 0, *yy, 0], [*z, 0]]
    assert chunks_of(paths, bpe, TextOptions(combine=17)) == [[*x, 0, *yy, 0, *z, 0]]


def test_a_literal_end_token_is_the_token_unless_special_is_text(tmp_path, bpe):
    path = write(tmp_path / "a.txt", f"x{END}y")
    assert chunks_of([path], bpe) == [[*bpe.encode("x"), 0, *bpe.encode("y"), 0]]
    as_text = chunks_of([path], bpe, TextOptions(special="text"))
    assert as_text == [[*bpe.encode(f"x{END}y"), 0]]


def test_wordpiece_documents_are_between_cls_and_sep(tmp_path, wordpiece):
    paths = [write(tmp_path / "a.txt", "今天\n"), write(tmp_path / "b.jsonl", '"天"\n"气"')]
    assert chunks_of(paths, wordpiece) == [[1, 3, 4, 2, 1, 4, 2, 1, 5, 2]]


@pytest.mark.parametrize("block", [7, 64, 1 << 18])
def test_a_streamed_file_gives_the_ids_of_the_whole_text(tmp_path, bpe, monkeypatch, block):
    monkeypatch.setattr(corpus, "BLOCK", block)
    text = "the kettle  \n\n clicked\r\noff, 东京\u2028的夜\ufeff。\r" * 30 + f"{END} x" * 9
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbf" + text.encode())
    newlines = text.replace("\r\n", "\n").replace("\r", "\n")
    assert chunks_of([path], bpe) == [[*bpe.encode(newlines, special=True), 0]]


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(st.sampled_from("ab \nthe'é。1")), min_size=1, max_size=9))
def test_jsonl_records_are_documents_with_any_content(tmp_path_factory, bpe, texts):
    lines = [json.dumps(t if i % 2 else {"text": t, "n": i}) for i, t in enumerate(texts)]
    path = write(tmp_path_factory.mktemp("jsonl") / "a.jsonl", "\n\n".join(lines))
    expected = joined([*bpe.encode(text), 0] for text in texts if text)
    assert joined(chunks_of([path], bpe)) == expected


DOCUMENTS = ["the kettle", " clicked off", "今天", "'s é。1", "\u2028 the \x85 kettle"]


@pytest.mark.parametrize("block", [1, 5, 1 << 18])
@pytest.mark.parametrize("last", ["", "\n", "\r\n\n"])
def test_lines_are_documents_like_jsonl_records(tmp_path, bpe, monkeypatch, block, last):
    monkeypatch.setattr(corpus, "BLOCK", block)
    lines = write(tmp_path / "a.txt", "\n" + "\n \t \n\r\n".join(DOCUMENTS) + last)
    records = write(tmp_path / "a.jsonl", "\n".join(json.dumps(text) for text in DOCUMENTS))
    expected = joined([*bpe.encode(text), 0] for text in DOCUMENTS)
    for workers in (0, 1):
        by_line = TextOptions(lines=True, workers=workers)
        assert chunks_of([lines], bpe, by_line) == [expected]
        assert chunks_of([records], bpe, by_line) == [expected]


def test_files_of_lines_share_chunks_by_their_length(tmp_path, bpe):
    paths = [write(tmp_path / name, "x\ny\n") for name in "abc"]
    # two characters and the 13 of one separator between them
    together = chunks_of(paths, bpe, TextOptions(lines=True, combine=16))
    each = chunks_of(paths, bpe, TextOptions(lines=True, combine=15))
    x, y = bpe.encode("x"), bpe.encode("y")
    assert each == [[*x, 0, *y, 0]] * 3
    assert together == [[*x, 0, *y, 0] * 2, [*x, 0, *y, 0]]


@pytest.mark.parametrize("block", [1, 4, 1 << 18])
@pytest.mark.parametrize(
    "text, documents",
    [
        ("今\n天\n", ["今", "天"]),
        ("今\n天", ["今"]),
        ("今天 今天", ["今天今天"]),
        ("\n \n今\n\n天 天 天天天天", ["", "", "今", ""]),
        ("\n", [""]),
        ("", []),
    ],
)
def test_uer_compat_keeps_blank_lines_and_loses_an_unterminated_last_one(
    tmp_path, wordpiece, monkeypatch, block, text, documents
):
    monkeypatch.setattr(corpus, "BLOCK", block)
    path = write(tmp_path / "a.txt", text)
    expected = joined([1, *wordpiece.encode(text), 2] for text in documents)
    ids = chunks_of([path], wordpiece, TextOptions(uer_compat=True))
    assert ids == ([expected] if expected else [])


def test_documents_without_an_end_token_follow_each_other(tmp_path, wordpiece):
    folder = tmp_path / "gpt2_ml"
    write(folder / "vocab.txt", "\n".join(wordpiece._tokens.values()) + "\n")
    sizes = dict(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=6)
    write(folder / "config.json", json.dumps({**sizes, "max_position_embeddings": 8}))
    ml = encoder.load(folder)
    assert ml.end is None and ml.prefix == []
    paths = [write(tmp_path / "a.txt", "今\n天\n"), write(tmp_path / "b.txt", "气")]
    assert chunks_of(paths, ml, TextOptions(lines=True)) == [[3, 4, 5]]
    assert chunks_of(paths, ml, TextOptions(lines=True, combine=1)) == [[3, 4], [5]]


def test_the_number_of_workers_changes_no_id(tmp_path, wordpiece, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK", 64)
    path = write(tmp_path / "a.txt", "今天 天气\n" * 200)
    one, two, many = (
        chunks_of([path], wordpiece, TextOptions(workers=workers)) for workers in (1, 2, 7)
    )
    assert one == two == many


def test_n_workers_are_n_threads_and_tokenizers_adds_none(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK", 64)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    path = write(tmp_path / "a.txt", "the kettle clicked off\n" * 200)
    seen = set()

    class Watched:
        n_vocab, end, prefix, after, CUT = 256, 0, [], [0], encoder.BPE.CUT

        def arrays(self, texts, special):
            seen.add((threading.get_ident(), os.environ["TOKENIZERS_PARALLELISM"]))
            time.sleep(0.001)
            return [np.ones(len(text), np.int32) for text in texts]

    for workers in (1, 3):
        seen.clear()
        chunks_of([path], Watched(), TextOptions(workers=workers))
        assert len(seen) == workers and {value for _, value in seen} == {"false"}
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_texts_yields_the_content_of_files_and_rejects_ids(tmp_path):
    write(tmp_path / "a.txt", "the kettle\n\nclicked\n")
    write(tmp_path / "b.jsonl", '"off"')
    paths, cut = inputs.find(tmp_path).paths, encoder.BPE.CUT
    assert "".join(corpus.texts(paths, cut, DEFAULTS)) == "the kettle\n\nclicked\noff"
    lines = list(corpus.texts(paths, cut, TextOptions(lines=True)))
    assert lines == ["the kettle", "clicked", "off"]
    np.save(tmp_path / "c.npy", [1])
    with pytest.raises(UserError, match=r"c.npy contains token ids, not text"):
        list(corpus.texts(inputs.find(tmp_path).paths, cut, DEFAULTS))


def test_csv_records_are_documents_and_the_header_is_left_out(tmp_path, bpe):
    path = write(tmp_path / "a.csv", 'text\r\n"x, ""y"""\r\n\r\n"two\r\nlines\u2028"\r\nlast')
    head, *records = (bpe.encode(t) + [0] for t in ("text", 'x, "y"', "two\nlines\u2028", "last"))
    assert chunks_of([path], bpe) == [joined(records)]
    with_head = chunks_of([path], bpe, TextOptions(csv_header=False))
    assert with_head == [joined([head, *records])]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "h\nfine\na,b\n", r"a.csv line 3 has 2 columns"),
        ("a.csv", 'h\n"never closed\n', r"a.csv line 2 is not CSV"),
        ("a.jsonl", '"fine"\n{"text": 1}\n', r"a.jsonl line 2, text must be a text, not a number"),
        ("a.jsonl", '"fine"\nnot json\n', r"a.jsonl line 2 is not JSON"),
        ("a.jsonl", "[1]", r"a.jsonl line 1 must be"),
        (
            "a.txt",
            b"abc\xffdef",
            r"a.txt: byte 3 is not utf-8 text, at line 1 .*--encoding NAME",
        ),
        ("a.txt", b"abc\xe4\xb8", r"a.txt: byte 3 is not utf-8 text"),
        ("a.txt", b"\x89PNG\r\n\x1a\n\0\0", r"a.txt is not text \(file type: PNG\)"),
        ("a.txt", b"text\0text", r"a.txt is not a text file"),
    ],
)
def test_a_damaged_file_is_reported_with_the_place(tmp_path, bpe, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message):
        chunks_of([path], bpe)


@pytest.mark.parametrize("at", [5, 2**18 - 1, 2**18, 3 * 2**18 + 1])
def test_the_reported_byte_offset_is_right_in_every_block(tmp_path, bpe, at):
    path = write(
        tmp_path / "a.txt", b"ab \n" * (at // 4) + b"c" * (at % 4) + "é".encode()[:1] + b"x"
    )
    with pytest.raises(UserError, match=f"byte {at} is not utf-8"):
        chunks_of([path], bpe)


def test_other_encodings_and_replacement_are_read(tmp_path, bpe):
    latin = write(tmp_path / "latin.txt", "café".encode("latin-1"))
    assert chunks_of([latin], bpe, TextOptions(encoding="latin-1")) == [[*bpe.encode("café"), 0]]
    replaced = chunks_of([latin], bpe, TextOptions(errors="replace"))
    assert replaced == [[*bpe.encode("caf\ufffd"), 0]]
    wide = write(tmp_path / "wide.txt", "東京".encode("utf-16"))
    assert chunks_of([wide], bpe, TextOptions(encoding="utf-16")) == [[*bpe.encode("東京"), 0]]
    assert chunks_of([wide], bpe) == [[*bpe.encode("東京"), 0]]  # its byte order mark says so
    bare = write(tmp_path / "bare.txt", "ab".encode("utf-16-le"))
    with pytest.raises(UserError, match=r"bare.txt is not a text file: .* --encoding utf-16-le"):
        chunks_of([bare], bpe)


def test_a_path_is_a_file_a_folder_or_a_glob(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden", ".git/config", "odd[1].txt"):
        write(tmp_path / name, "x")
    names = [str(p.relative_to(tmp_path)) for p in inputs.find(tmp_path).paths]
    assert names == ["a.txt", "b.txt", "odd[1].txt", "sub/c.txt"]
    assert inputs.find(f"{tmp_path}/?.txt").paths == [tmp_path / "a.txt", tmp_path / "b.txt"]
    assert tmp_path / "sub/c.txt" in inputs.find(f"{tmp_path}/**/*.txt").paths
    assert inputs.find(tmp_path / "odd[1].txt").paths == [tmp_path / "odd[1].txt"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"no file matches: {tmp_path}/nothing"):
        inputs.find("nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the folder contains no files"):
        inputs.find("empty")


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_saved_tokens_load_unchanged(tmp_path, bpe, suffix):
    paths = [write(tmp_path / "in" / name, f"the kettle {name}") for name in "abc"]
    options = TextOptions(combine=1)
    out = tmp_path / f"out{suffix}"
    parts = encoded.encode(paths, bpe, options, bpe.n_vocab)
    if suffix == ".npz":
        stored.save_npz(out, parts)
        with np.load(out) as archive:  # nshepperd/gpt-2 load_dataset.py
            assert archive.files == ["arr_0", "arr_1", "arr_2"]
            assert [archive[n].tolist() for n in archive.files] == chunks_of(paths, bpe, options)
    else:
        stored.save_npy(out, parts, stored.dtype_of(bpe.n_vocab))
        assert np.load(out, mmap_mode="r").dtype == np.uint16
    loaded = encoded.load(out, None, DEFAULTS, bpe.n_vocab)
    direct = encoded.load(tmp_path / "in", bpe, options, bpe.n_vocab)
    assert loaded.whole().tolist() == direct.whole().tolist()
    assert loaded.total == direct.total == len(direct.whole())
    assert isinstance(loaded.chunks[0], np.memmap) == (suffix == ".npy")


def test_a_chunk_larger_than_memory_and_the_next_one_are_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "SPOOL", 2**20)
    blocks = [np.full(2**19, number, np.uint16) for number in range(32)]  # 32 MB
    parts = [*((block, False) for block in blocks), (blocks[1][:3], True), (blocks[2][:5], True)]
    tracemalloc.start()
    stored.save_npz(tmp_path / "out.npz", iter(parts))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20
    with np.load(tmp_path / "out.npz") as archive:
        long, short = (archive[name] for name in ("arr_0", "arr_1"))
    assert (long == np.concatenate([*blocks, blocks[1][:3]])).all() and long.dtype == np.uint16
    assert short.tolist() == [2] * 5
    assert os.listdir(tmp_path) == ["out.npz"]


def test_ids_above_16_bits_are_stored_in_32(tmp_path):
    ids = np.array([70000, 65535, 3], np.int32)
    np.savez(tmp_path / "a.npz", ids)
    loaded = encoded.load(tmp_path / "a.npz", None, DEFAULTS, 70001)
    assert loaded.whole().tolist() == ids.tolist()
    assert stored.dtype_of(65536) == np.uint16 and stored.dtype_of(65537) == np.int32


@pytest.mark.parametrize("combine", [1, 50000])
def test_encoded_files_and_texts_mix_in_order(tmp_path, bpe, combine):
    write(tmp_path / "a.txt", "x")
    np.save(tmp_path / "b.npy", np.array([5, 6], np.uint16))
    np.savez(tmp_path / "c.npz", np.array([7, 8], np.int64), np.array([9]))
    write(tmp_path / "d.txt", "y")
    loaded = encoded.load(tmp_path, bpe, TextOptions(combine=combine), bpe.n_vocab)
    x, y = bpe.encode("x"), bpe.encode("y")
    assert [c.tolist() for c in loaded.chunks] == [[*x, 0], [5, 6], [7, 8], [9], [*y, 0]]


def save_pickle(path):
    np.savez(path, np.array([{}, {}], dtype=object))


@pytest.mark.parametrize(
    "name, make, message",
    [
        ("a.npz", lambda p: np.savez(p, [[1, 2], [3, 4]]), r"arr_0 is int64 of shape \(2, 2\)"),
        ("a.npz", lambda p: np.savez(p, [1.5, 2.0]), "arr_0 is float64"),
        ("a.npz", lambda p: np.savez(p, [1, 2], [1, 300]), "arr_1 has token 300, .* 0 to 299"),
        ("a.npz", lambda p: np.savez(p, [1, -2]), "arr_0 has token -2"),
        ("a.npz", save_pickle, "damaged or not a NumPy file"),
        ("a.npz", lambda p: p.write_bytes(b"PK\x03\x04 cut off"), "damaged or not"),
        ("a.npz", lambda p: p.write_bytes(pickle.dumps([1, 2])), "damaged or not"),
        ("a.npz", lambda p: p.write_bytes(b""), "damaged or not"),
        ("a.npz", lambda p: p.write_text("<html>"), "damaged or not"),
        ("a.npz", lambda p: np.savez(p), "contains 0 tokens,"),
        ("a.npz", lambda p: np.savez(p, [7]), "contains 1 token,"),
        ("a.npy", lambda p: np.save(p, [1, 2, 999]), "the array has token 999"),
        ("a.npy", lambda p: np.save(p, [[1, 2]]), r"is int64 of shape \(1, 2\)"),
        ("a.npy", lambda p: np.save(p, np.zeros(0, np.uint16)), "contains 0 tokens"),
        ("a.txt", lambda p: p.write_text(""), "a.txt contains 0 tokens"),
    ],
)
def test_unusable_data_is_rejected(tmp_path, bpe, name, make, message):
    make(tmp_path / name)
    with pytest.raises(UserError, match=message):
        encoded.load(tmp_path / name, bpe, DEFAULTS, 300)


@pytest.mark.parametrize("name", ["a.npz", "a.npy"])
def test_a_file_that_ends_early_is_rejected(tmp_path, name):
    path = tmp_path / name
    ids = np.random.default_rng(1).integers(0, 300, 5000)
    np.savez_compressed(path, ids) if name == "a.npz" else np.save(path, ids)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or not"):
        encoded.load(path, None, DEFAULTS, 300)


def test_a_flipped_bit_in_an_npz_is_found(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, np.random.default_rng(1).integers(0, 300, 5000))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged or not"):
        encoded.load(path, None, DEFAULTS, 300)


def test_an_npz_that_would_fill_the_memory_is_rejected_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, np.zeros(5_000_000, np.int64))
    assert encoded.load(path, None, DEFAULTS, 300).total == 5_000_000
    monkeypatch.setattr(stored, "BOMB", 2**20)
    with pytest.raises(UserError, match=r"a.npz would unpack from .* to 40,000,128 bytes"):
        encoded.load(path, None, DEFAULTS, 300)
    monkeypatch.setattr(stored, "BOMB", 10**7)  # more than each of three arrays
    np.savez_compressed(path, *([np.zeros(1_000_000, np.int64)] * 3))
    with pytest.raises(UserError, match=r"a.npz would unpack from .* to 24,000,384 bytes"):
        encoded.load(path, None, DEFAULTS, 300)


@pytest.mark.parametrize("ending", [".npz", ".npy"])
@pytest.mark.parametrize(
    "shape",
    ["(10**13,)", "(10000000000000,)", "(-1,)", "(0, 1" + "0" * 30 + ")", "((", "'''", "\n 1"],
)
def test_a_false_header_is_rejected(tmp_path, shape, ending):
    path = tmp_path / f"a{ending}"
    header = f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}, }}".encode()
    content = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + b"\1\0" * 50
    if ending == ".npy":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", content)
    with pytest.raises(UserError, match=r"damaged or not|not one row|contains 0 tokens"):
        encoded.load(path, None, DEFAULTS, 300)


def test_circular_links_are_not_followed(tmp_path):
    write(tmp_path / "a" / "one.txt", "x")
    for name in ("up", "again"):  # two of them: 2 ** 40 paths
        (tmp_path / "a" / name).symlink_to(tmp_path / "a")
    os.mkfifo(tmp_path / "a" / "pipe.txt")
    expected = [tmp_path / "a" / "one.txt"]
    for path in (tmp_path, f"{tmp_path}/**/*.txt", f"{tmp_path}/a/**"):
        assert inputs.find(path).paths == expected
    with pytest.raises(UserError, match="no file matches"):
        inputs.find(tmp_path / "a" / "pipe.txt")


def test_text_without_a_vocabulary_is_rejected(tmp_path):
    path = write(tmp_path / "a.txt", "text")
    with pytest.raises(UserError, match=r"a.txt is text, but the model folder has no vocabulary"):
        encoded.load(path, None, DEFAULTS, 300)


def test_a_vocabulary_larger_than_the_model_is_rejected(tmp_path, bpe):
    path = write(tmp_path / "a.txt", "the kettle")
    with pytest.raises(UserError, match="the model knows only 0 to 9"):
        encoded.load(path, bpe, DEFAULTS, 10)


def test_every_place_of_every_chunk_is_drawn_equally_often():
    tokens = Tokens([np.arange(10, 16), np.arange(20, 22), np.arange(30, 31), np.arange(40, 44)])
    drawn = {}
    for step in range(40):
        for row in draw(tokens, step, 100, 3, seed=1).inputs:
            drawn[tuple(row)] = drawn.get(tuple(row), 0) + 1
    # 3 places in 10..15, the 2 tokens of 20..21 as one, nothing to predict in 30, 1 in 40..43.
    assert set(drawn) == {(10, 11, 12), (11, 12, 13), (12, 13, 14), (20, 21, 0), (40, 41, 42)}
    expected = 4000 / 5
    chi_square = sum((count - expected) ** 2 / expected for count in drawn.values())
    assert chi_square < 18.5  # 4 degrees of freedom: one in a thousand; the seed is fixed


def test_a_window_is_inputs_and_the_tokens_that_follow_them():
    batch = draw(Tokens([np.arange(100, 200)]), 0, 8, 5, seed=3)
    assert batch.inputs.dtype == batch.targets.dtype == np.int32
    assert batch.mask.dtype == np.float32 and batch.mask.min() == 1
    assert batch.inputs.shape == batch.targets.shape == batch.mask.shape == (8, 5)
    np.testing.assert_array_equal(batch.targets, batch.inputs + 1)


def test_a_chunk_shorter_than_the_window_is_padded_and_masked():
    batch = draw(Tokens([np.array([7, 8, 9])]), 0, 1, 5, seed=3)
    assert batch.inputs.tolist() == [[7, 8, 9, 0, 0]]
    assert batch.targets.tolist() == [[8, 9, 0, 0, 0]]
    assert batch.mask.tolist() == [[1, 1, 0, 0, 0]]


def test_the_last_tokens_are_drawn_and_a_chunk_of_exactly_one_window_works():
    tokens = Tokens([np.arange(6)])
    assert draw(tokens, 0, 1, 5, seed=0).targets.tolist() == [[1, 2, 3, 4, 5]]
    assert draw(tokens, 0, 64, 4, seed=0).targets.max() == 5


def test_windows_depend_on_seed_and_step_alone():
    tokens = Tokens([np.arange(1000)])
    first = draw(tokens, 5, 4, 8, seed=2**63 - 1)
    draw(tokens, 6, 4, 8, seed=1)
    again = draw(tokens, 5, 4, 8, seed=2**63 - 1)
    np.testing.assert_array_equal(first.inputs, again.inputs)
    assert not np.array_equal(first.inputs, draw(tokens, 6, 4, 8, seed=2**63 - 1).inputs)
    assert not np.array_equal(first.inputs, draw(tokens, 5, 4, 8, seed=1).inputs)


def test_noise_replaces_its_share_of_the_inputs_and_no_targets():
    tokens = Tokens([np.arange(1000)])
    clean = draw(tokens, 1, 16, 500, seed=1)
    noisy = draw(tokens, 1, 16, 500, seed=1, noise=0.25, n_vocab=10_000)
    np.testing.assert_array_equal(clean.targets, noisy.targets)
    assert abs((clean.inputs != noisy.inputs).mean() - 0.25) < 0.02
    assert noisy.inputs.dtype == np.int32 and 0 <= noisy.inputs.min() < noisy.inputs.max() < 10_000
    every = draw(tokens, 1, 16, 500, seed=1, noise=1.0, n_vocab=3)
    assert set(np.unique(every.inputs)) == {0, 1, 2}


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    n_ctx=st.integers(1, 12),
    batch_size=st.integers(1, 4),
)
def test_evaluation_predicts_every_token_but_the_first_once(sizes, n_ctx, batch_size):
    if max(sizes) < 2:
        return
    text = np.arange(1, sum(sizes) + 1)
    tokens = Tokens(np.split(text, np.cumsum(sizes)[:-1]))
    inputs, targets = [], []
    for batch in tokens.evaluation_windows(n_ctx, batch_size):
        rows, length = batch.inputs.shape
        assert 1 <= rows <= batch_size and 1 <= length <= n_ctx and batch.mask[0].all()
        inputs += batch.inputs[batch.mask == 1].tolist()
        targets += batch.targets[batch.mask == 1].tolist()
    assert inputs == text[:-1].tolist() and targets == text[1:].tolist()


def reference_windows(chunks, step, rows, length, seed):
    """Draw as --sampling random does since version 0.1, whose runs resume with the same draws."""
    random = np.random.Generator(np.random.Philox(key=np.array([seed, step], np.uint64)))
    places = [
        (chunk, start)
        for chunk in chunks
        if len(chunk) > 1
        for start in range(max(len(chunk) - length, 1))
    ]
    drawn = [places[place] for place in random.integers(len(places), size=rows)]
    return [chunk[start : start + length + 1].tolist() for chunk, start in drawn]


def rows_of(batch):
    """Return the tokens of each row without the padding, where no id is 0."""
    whole = np.concatenate([batch.inputs[:, :1], batch.targets], axis=1)
    return [row[row > 0].tolist() for row in whole]


def random_corpus(draw_sizes):
    return np.split(np.arange(1, sum(draw_sizes) + 1), np.cumsum(draw_sizes)[:-1])


SIZES = st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(lambda s: max(s) > 1)


@settings(max_examples=50, deadline=None)
@given(SIZES, st.integers(1, 8), st.integers(1, 5), st.integers(0, 2**63 - 1), st.integers(0, 99))
def test_random_sampling_draws_what_it_always_drew(sizes, length, rows, seed, step):
    chunks = random_corpus(sizes)
    tokens = Tokens(chunks)
    sampler = tokens.sampler("random", length, seed)
    expected = reference_windows(chunks, step, rows, length, seed)
    assert rows_of(sampler.batch(step, rows)) == expected
    assert rows_of(draw(tokens, step, rows, length, seed)) == expected
    assert sampler.count == math.ceil(sum(sizes) / length)


@settings(max_examples=50, deadline=None)
@given(SIZES, st.integers(1, 8), st.integers(1, 7))
def test_sequential_sampling_predicts_each_token_once_a_pass_in_order(sizes, length, rows):
    chunks = random_corpus(sizes)
    sampler = Tokens(chunks).sampler("sequential", length, seed=1)
    found = []
    for step in range(3 * sampler.count // rows + 1):
        batch = sampler.batch(step, rows)
        assert batch.mask.sum(1).tolist() == [len(row) - 1 for row in rows_of(batch)]
        found += rows_of(batch)
    first = found[: sampler.count]
    assert [token for row in first for token in row[1:]] == [t for c in chunks for t in c[1:]]
    assert all(len(row) <= length + 1 for row in first)
    again = found[sampler.count : 2 * sampler.count]  # a batch continues from the start of the text
    assert again == first[: len(again)]


def pieces_by_hand(chunks, length, end, uer_compat):
    """Cut documents as UER-py does (uer/utils/dataset.py:455-467), token by token."""
    pieces = []
    for chunk in chunks:
        piece = []
        for number, token in enumerate(chunk.tolist()):
            piece.append(token)
            ends = token == end or number == len(chunk) - 1
            if ends or len(piece) == length + 1:
                pieces.append(piece)
                piece = []
    return [piece for piece in pieces if len(piece) > 1 or uer_compat]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 4), max_size=30), min_size=1, max_size=4),
    st.integers(1, 6),
    st.sampled_from([1, None]),
    st.booleans(),
    st.integers(1, 9),
)
def test_documents_are_cut_into_pieces_and_each_comes_once_a_pass(
    chunks, length, end, uer_compat, rows
):
    chunks = [np.array(chunk, np.int32) for chunk in chunks]
    expected = pieces_by_hand(chunks, length, end, uer_compat)
    if max(map(len, chunks)) < 2:
        return
    tokens = Tokens(chunks, "corpus.txt")
    if not expected:
        with pytest.raises(UserError, match=r"every document in corpus.txt has fewer than 2"):
            tokens.sampler("documents", length, 1, end)
        return
    sampler = tokens.sampler("documents", length, 1, end, uer_compat)
    assert [piece(sampler, i) for i in range(sampler.count)] == expected
    found = []
    for step in range(2 * sampler.count // rows + 1):
        batch = sampler.batch(step, rows)
        found += rows_of(batch)
        predicted = [min(len(r) - 1 + uer_compat, length) for r in rows_of(batch)]
        assert batch.mask.sum(1).tolist() == predicted
        assert all((np.diff(row) <= 0).all() for row in batch.mask)  # ones, then zeros
    for number in range(len(found) // sampler.count):
        one_pass = found[number * sampler.count : (number + 1) * sampler.count]
        assert sorted(one_pass) == sorted(expected)


def piece(sampler, number):
    chunk, start, stop = sampler.piece(number)
    return sampler.chunks[chunk][start:stop].tolist()


def test_pieces_cross_the_borders_between_the_blocks_of_a_corpus(monkeypatch):
    ids = np.random.default_rng(1).integers(1, 50, 2**22 + 1000).astype(np.uint16)
    ids[2**22 - 3 : 2**22 + 200] = 7  # no end here, so that a document crosses the border
    for chunk in (ids, ids[: 2**22], np.append(ids[: 2**22 - 1], np.uint16(1))):
        sampler = Tokens([ids[:9], chunk]).sampler("documents", 16, 1, end=1)
        assert sampler.starts.nbytes + sampler.sizes.nbytes == 10 * sampler.count
        expected = pieces_by_hand([ids[:9], chunk], 16, 1, False)
        assert sampler.sizes.tolist() == [len(piece) for piece in expected]
        for number in (0, sampler.count // 2, sampler.count - 10, sampler.count - 1):
            assert piece(sampler, number) == expected[number]


@pytest.mark.parametrize("sampling", ["random", "sequential", "documents"])
def test_a_batch_depends_on_seed_and_step_alone(sampling):
    tokens = Tokens([np.random.default_rng(1).integers(1, 9, 500)])

    def batches(steps, seed=5):
        sampler = tokens.sampler(sampling, 6, seed, end=1)
        return {step: sampler.batch(step, 4, noise=0.5, n_vocab=9) for step in steps}

    onward, back = batches(range(60)), batches([59, 3, 40, 3])
    for step, batch in back.items():
        for one, other in zip(batch, onward[step], strict=True):
            np.testing.assert_array_equal(one, other)
        assert [field.dtype for field in batch] == [np.int32, np.int32, np.float32]
        assert all(field.shape == (4, 6) for field in batch)
    other = batches([3], seed=6)[3]
    assert (onward[3].targets == other.targets).all() == (sampling == "sequential")
    assert (onward[3].inputs != other.inputs).any()


def test_each_pass_over_the_documents_has_its_own_order():
    tokens = Tokens([np.arange(1000)])
    sampler = tokens.sampler("documents", 9, 1)
    passes = [sampler.order(number).tolist() for number in (0, 1, 2)]
    passes += [tokens.sampler("documents", 9, 2).order(0).tolist()]
    assert all(sorted(order) == list(range(100)) for order in passes)
    assert len({tuple(order) for order in passes}) == 4
    assert sampler.order(1).tolist() == passes[1]
    # a batch larger than the corpus takes several passes
    batch = tokens.sampler("documents", 9, 1).batch(0, 300)
    assert [row[0] // 10 for row in batch.inputs] == joined(passes[:3])


def test_many_small_chunks_are_sampled_quickly():
    tokens = Tokens([np.arange(1, 4)] * 100_000)
    for sampling in ("random", "sequential", "documents"):
        sampler = tokens.sampler(sampling, 8, 1, end=3)
        began = time.perf_counter()
        for step in range(100):
            sampler.batch(step, 8)
        assert time.perf_counter() - began < 2  # 0.02 s on an idle core; was 5 s


@pytest.mark.parametrize("seq_length", [32, 128])
@pytest.mark.parametrize("variant", ["as_written", "with_final_newline"])
def test_documents_equal_the_instances_of_uers_lm_processor(
    tmp_path, results, google_zh, variant, seq_length
):
    bert, folder = google_zh, results / "uer/lm_data"
    everything = json.loads((folder / "instances.json").read_text())
    expected = everything[variant][str(seq_length)]
    content = (folder / "corpus.txt").read_bytes()
    ending = b"" if variant == "as_written" else b"\n"
    path = write(tmp_path / "corpus.txt", content + ending)

    tokens = encoded.load(path, bert, TextOptions(uer_compat=True), bert.n_vocab)
    sampler = tokens.sampler("documents", seq_length, 1, bert.end, uer_compat=True)
    batch = sampler.batch(0, sampler.count)
    in_order = np.argsort(sampler.order(0))
    assert sampler.count == expected["n_instances"] >= 2
    assert batch.inputs[in_order].tolist() == [i["src"] for i in expected["instances"]]
    assert batch.targets[in_order].tolist() == [i["tgt"] for i in expected["instances"]]
    assert batch.mask.sum() == expected["loss_positions"]

    # Without UER's defects the last line always counts, and no padding is predicted.
    expected = everything["with_final_newline"][str(seq_length)]
    tokens = encoded.load(path, bert, TextOptions(lines=True), bert.n_vocab)
    sampler = tokens.sampler("documents", seq_length, 1, bert.end)
    batch = sampler.batch(0, sampler.count)
    assert sampler.count == sum(i["length"] > 1 for i in expected["instances"])
    assert batch.mask.sum() == expected["loss_positions_target_nonzero"]
    assert batch.targets[batch.mask == 1].min() > 0


@pytest.mark.parametrize("flags", ["", "lines=True"])
def test_memory_does_not_grow_with_the_file(tmp_path, flags):
    """Encode 40 MB to .npy; the whole text in memory would show in the process's peak."""
    # as one document, and as one line: neither may be in memory as a whole
    line = b"the kettle clicked off at half past six" + (b" " if flags else b"\n")
    path = write(tmp_path / "a.txt", line * 1_000_000)
    code = (
        "import resource, sys, pathlib; from gpt2cli.text import encoded, encoder, stored;"
        "from gpt2cli.options "
        "import TextOptions; import numpy as np\n"
        "path, out = pathlib.Path(sys.argv[1]), sys.argv[2]\n"
        "class Fast:\n"
        "    n_vocab, end, prefix, after, CUT = 256, 0, [], [0], encoder.BPE.CUT\n"
        "    def arrays(self, texts, special):\n"
        "        return [np.frombuffer(t.encode(), np.uint8).astype(np.int32) for t in texts]\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "parts = encoded.encode([path], Fast(), TextOptions(FLAGS), 256)\n"
        "stored.save_npy(out, parts, stored.dtype_of(256))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code.replace("FLAGS", flags), str(path), str(tmp_path / "o.npy")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert np.load(tmp_path / "o.npy", mmap_mode="r").shape == (40_000_001,)
    assert int(result.stdout) < 40_000  # kB
