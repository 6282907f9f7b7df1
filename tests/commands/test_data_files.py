"""Files of each kind as `encode` and `sample --prompts` read them, and a broken one of each."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import resource
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from gpt2cli.text import encoder, marks

LONG = "The kettle clicked off.\n" * 4000  # many blocks of a packer
TEXTS = ["The kettle", 'a class, a "def"\nin two lines', "第一篇：“你好”"]


def parquet(table, **options):
    content = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(table), content, **options)
    return content.getvalue()


def csv_of(rows, separator=","):
    quoted = [[f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in row] for row in rows]
    return "\r\n".join(separator.join(row) for row in quoted).encode()


@pytest.fixture
def encode(cli, workdir):
    """Encode bytes as a file of a name; return the documents' texts and standard error."""

    def run(name, content, *flags):
        (workdir / name).write_bytes(content)
        result = cli("encode", name, "out.npz", "--model_name", "tiny", *flags)
        if result.returncode:
            assert result.returncode == 1 and result.stderr.startswith("gpt2cli: "), result.stderr
            assert not (workdir / "out.npz").exists()
            return None, result.stderr
        vocabulary = encoder.load(workdir / "models/tiny")
        with np.load("out.npz") as archive:
            ids = np.concatenate([archive[name] for name in archive.files])
        ends = np.flatnonzero(marks.is_end(ids, vocabulary.end)) + 1
        documents = np.split(ids, ends[:-1])
        return [vocabulary.decode(marks.ids_of(each)) for each in documents], result.stderr

    return run


def ended(texts):
    return [f"{text}<|endoftext|>" for text in texts]


MANY = [["0", text] for text in TEXTS]
KINDS = {
    "a.csv": (csv_of([["text"], *([t] for t in TEXTS)]), ()),
    "index.csv": (csv_of([["", "text"], *MANY]), ("--csv_column", "text")),
    "messages.csv": (csv_of([["id", "messages"], *MANY]), ("--csv_column", "messages")),
    "a.tsv": (csv_of([["id", "body"], *MANY], "\t"), ("--csv_column", "body")),
    "strings.jsonl": ("\n".join(map(json.dumps, TEXTS)).encode(), ()),
    "a.ndjson": (
        "\n".join(json.dumps({"body": t}) for t in TEXTS).encode(),
        ("--json_field=body",),
    ),
    "strings.json": (json.dumps(TEXTS).encode(), ()),
    "objects.json": (json.dumps([{"text": t, "n": 1} for t in TEXTS], indent=1).encode(), ()),
    "lines.json": ("\n".join(json.dumps({"text": t}) for t in TEXTS).encode(), ()),
    "a.parquet": (parquet({"n": [1, 2, 3], "body": TEXTS}), ()),
    "b.parquet": (parquet({"body": pa.array([*TEXTS, None]).dictionary_encode()}), ()),
    "two.parquet": (
        parquet({"title": ["x"] * 3, "body": TEXTS}, row_group_size=1),
        ("--csv_column", "body"),
    ),
    "a.parquet.gz": (gzip.compress(parquet({"body": TEXTS})), ()),
    "a.csv.bz2": (bz2.compress(csv_of([["text"], *([t] for t in TEXTS)])), ()),
    "a.jsonl.zst": (zstandard.compress("\n".join(map(json.dumps, TEXTS)).encode()), ()),
    "skipped.jsonl.zst": (  # pzstd begins with a frame to be skipped
        b"\x50\x2a\x4d\x18\4\0\0\0size"
        + zstandard.compress("\n".join(map(json.dumps, TEXTS)).encode()),
        (),
    ),
    "a.json.xz": (lzma.compress(json.dumps(TEXTS).encode()), ()),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_file_gives_its_records(encode, name):
    texts, stderr = encode(name, *KINDS[name][:1], *KINDS[name][1])
    assert texts == ended(TEXTS), stderr
    assert "read 1 file, 3 documents" in stderr
    is_plain = not name.endswith(("parquet", ".gz", ".bz2", ".zst", ".xz"))
    assert ("bytes of text per token" in stderr) == is_plain


PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


@pytest.mark.parametrize("ending", PACKERS)
def test_a_compressed_text_is_read_and_a_cut_or_damaged_one_is_rejected(encode, ending):
    rng = np.random.default_rng(1)
    text = LONG + "".join(map(chr, rng.integers(97, 123, 600_000)))  # what is packed is long too
    whole = PACKERS[ending](text.encode())
    texts, _ = encode(f"a.txt{ending}", whole)
    assert texts == ended([text])
    os.unlink("out.npz")
    texts, stderr = encode(f"a{ending}", whole + whole)  # two streams one after the other
    assert texts == ended([text + text])
    os.unlink("out.npz")
    for content in (whole[: len(whole) // 2], whole[:-3], whole[:40]):
        _, stderr = encode(f"a.txt{ending}", content)
        assert f"a.txt{ending} is damaged or incomplete" in stderr, len(content)
    if ending in (".gz", ".xz"):  # bzip2 compares a sum late, and zstandard writes none by default
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 255
        _, stderr = encode(f"a.txt{ending}", damaged)
        assert f"a.txt{ending} is damaged or incomplete" in stderr
    _, stderr = encode(f"a.txt{ending}", b"plain text")
    assert f"a.txt{ending} is not a " in stderr and "Rename it to match its content" in stderr
    _, stderr = encode("a.txt", whole)
    assert "a.txt is not text (file type: " in stderr
    assert f"Rename it so that it ends in {ending}" in stderr


def tar():
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.add(__file__, "a.py")
    return content.getvalue()


def zipped(*names):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, "application/epub+zip" if name == "mimetype" else "<x/>")
    return content.getvalue()


PAGE = b"\n<!-- saved -->\n<!DOCTYPE HTML><html><body>The kettle</body></html>"
OTHERS = {
    "a.zip": (zipped("a.txt"), "is not text \\(file type: zip\\). Unpack it first"),
    "a.txt": (zipped("a.txt"), "is not text \\(file type: zip\\)"),
    "a.docx": (
        zipped("[Content_Types].xml", "word/document.xml"),
        ".*\\(file type: docx\\).*pandoc",
    ),
    "docx.txt": (zipped("[Content_Types].xml"), ".*\\(file type: Office\\)"),
    "a.epub": (zipped("mimetype", "a.xhtml"), ".*\\(file type: EPUB\\).*Extract its text"),
    "book": (zipped("mimetype", "a.xhtml"), ".*\\(file type: EPUB\\).*Extract its text"),
    "a.pdf": (b"%PDF-1.7\n1 0 obj", ".*\\(file type: PDF\\).*pdftotext"),
    "paper.txt": (b"%PDF-1.7\n1 0 obj", ".*\\(file type: PDF\\).*pdftotext"),
    "a.html": (b"The kettle", "is an HTML page.*rename it to .txt"),
    "page": (PAGE, "is an HTML page.*rename it to .txt"),
    "a.htm.gz": (gzip.compress(PAGE), "is an HTML page"),
    "a.tar.gz": (gzip.compress(tar()), ".*\\(file type: tar\\).*Unpack"),
    "tar.gz": (gzip.compress(tar()), ".*\\(file type: tar\\).*Unpack"),
    "a.tgz": (gzip.compress(tar()), ".*\\(file type: tar\\).*Unpack"),
    "old.doc": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), ".*\\(file type: old Office"),
    "parquet.csv": (parquet({"a": ["b"]}), ".*\\(file type: Parquet\\).*ends in .parquet"),
    "a.npz.gz": (gzip.compress(b"x"), ".*\\(file type: NumPy\\).*decompress it"),
    "image.txt": (b"\x89PNG\r\n\x1a\n\0", ".*\\(file type: PNG\\)"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("errors", ["strict", "replace"])
def test_other_kinds_of_files_are_rejected_by_name(encode, name, errors):
    content, message = OTHERS[name]
    _, stderr = encode(name, content, "--errors", errors)
    assert re.search(f"{name} {message}", stderr), stderr


def test_a_web_page_or_json_named_txt_is_read_with_a_note(encode):
    texts, stderr = encode("page.txt", PAGE)
    assert texts == ended([PAGE.decode()]) and "looks like a web page" in stderr
    for content in (json.dumps(TEXTS), '{"text": "a"}\n{"text": "b"}', json.dumps([LONG, LONG])):
        texts, stderr = encode("list.txt", content.encode())
        assert texts == ended([content]) and "looks like JSON but is read as text" in stderr
    for content in ("[1] A footnote.", "{not json}", "[a link](there)", '["so", he said'):
        assert "looks like" not in encode("a.txt", content.encode())[1]


BROKEN = [
    ("a.json", b'{"a": 1}', "is neither a JSON list of texts or objects nor JSON lines"),
    ("a.json", b'{"data": ["a"]}', "is neither a JSON list .* extract the list.* jq"),
    ("a.json", b'{\n "data": []\n}', "is neither a JSON list"),
    ("a.json", b'{"a": "b"}', 'line 1 must be a JSON string or an object with a "text" string'),
    ("a.json", b'{"text": 1}', "line 1, text must be a text, not a number"),
    ("a.json", b"42", "is neither a JSON list of texts or objects nor JSON lines"),
    ("a.json", b"", "is neither a JSON list"),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", ".*git lfs pull"),
    ("a.json", b'["a",\n 3]', r"item 2 \(line 2\) must be a text or an object"),
    ("a.json", b'["a",\n ["b"]]', r"item 2 \(line 2\) must be a JSON string or an object"),
    ("a.json", b'["a",\n "b"', "line 2 is not JSON: a comma or ] is missing"),
    ("a.json", b'["a" "b"]', "line 1 is not JSON: a comma or ] is missing"),
    ("a.json", b'["a",]', "is not JSON: a comma or ] is missing"),
    ("a.json", b'["a"] x', "line 1 is not JSON: text follows the list"),
    ("a.json", b'["a",\n\n{"text": "b" "c"}]', r"item 2 \(line 3\) is not JSON .* at line 3"),
    ("a.json", b'["a",\n "b', r"item 2 \(line 2\) is not JSON \(Unterminated"),
    (
        "a.jsonl",
        b'{"content": "a", "n": 1}',
        "Its text fields are content: name one with --json_field",
    ),
    ("a.jsonl", b'{"conversations": []}', '"text" string. Its fields are: conversations'),
    (
        "a.jsonl",
        b'{"text": "a", "messages": []}',
        "has messages and text. Choose one with --json_f",
    ),
    ("a.jsonl", b'{"text": "a\\ud83d"}', "line 1, text: character 2 of the text is a lone surr"),
    ("a.jsonl", b'"\\u0000"', "line 1: character 1 of the text is a NUL character.*--errors r"),
    ("a.jsonl", b'"a\fb"', "line 1 is not JSON"),
    ("a.csv", b'text\nfine\n"open\nfor\never\n', "A quote opens at line 3 and is not closed"),
    ("a.csv", b'text\n"a\nb"\n"open\n""for""\n"ever"\n', "A quote opens at line 4"),
    ("a.csv", b"messages\nhello\n", "To read it as text, name it with --csv_column or"),
    (
        "a.tsv",
        b"id,text\n1,a\n",
        "has one column, .* separated by other characters than tabs",
    ),
    ("a.csv", b"id,text\n1,a\n", "has 2 columns with text: id, text. Name one with --csv_column"),
    ("a.csv", b"text,label\na, b,c\n", "has 2 columns with text"),
    ("a.csv", b"id;text\n1;a\n", "has one column, 'id;text', but its columns may be separated"),
    ("a.tsv", b"id\ttext\n1\ta\n", "has 2 columns with text: id, text"),
    ("a.parquet", parquet({"n": [1]}), "has no columns with text. Its columns are: n"),
    ("a.parquet", parquet({"a": ["x"], "b": ["y"]}), "has 2 columns with text: a, b. Name one"),
    ("a.parquet", parquet({"a": TEXTS})[:-50], "is damaged or not a Parquet file"),
    ("a.parquet", b"text", "is damaged or not a Parquet file"),
]


@pytest.mark.parametrize("name, content, message", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_is_rejected_with_the_place(encode, name, content, message):
    _, stderr = encode(name, content)
    assert re.search(f"{name} {message}|{name}.*{message}", stderr), stderr


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("index.csv", ["--csv_column", "body"], "no columns 'body'. Its columns are: (no name)"),
        (
            "two.parquet",
            ["--csv_column", "text"],
            "no columns 'text'. Its columns are: title",
        ),
        ("a.ndjson", ["--json_field", "content"], 'an object with a "content" string'),
        ("strings.json", ["--csv_column", "text"], "--csv_column is for .csv"),
        ("a.csv", ["--json_field", "text"], "--json_field is for .jsonl"),
        (
            "strings.jsonl",
            ["--template", "{prompt}"],
            "line 1 is not an object, but --template needs its fields",
        ),
        ("objects.json", ["--template", "{text}{answer}"], "item 1 (line 2) has no field answer"),
        (
            "index.csv",
            ["--template", "{text}{answer}"],
            "no columns 'answer', which",
        ),
        ("a.csv", ["--loss", "completion"], "has text without a prompt"),
    ],
)
def test_a_flag_that_does_not_fit_the_file_is_rejected(encode, name, flags, message):
    _, stderr = encode(name, KINDS[name][0], *flags)
    assert message in stderr


def test_a_column_of_a_row_with_other_columns_is_rejected(encode):
    _, stderr = encode("a.csv", b"id,text\n1,a\n2,one, two\n", "--csv_column", "text")
    assert "a.csv line 3 has 3 columns, not 2" in stderr


def test_a_nul_is_rejected_or_replaced_and_a_form_feed_is_text(encode):
    content = b"page one\f\npage two\n" * 300 + b"a\0b\0"
    _, stderr = encode("a.txt", content)
    assert f"a.txt has a NUL character at byte {content.index(0)} (line 601)" in stderr
    texts, _ = encode("a.txt", content, "--errors", "replace")
    assert texts == ended([content.decode().replace("\0", "\ufffd")])
    wide = "\n😀é\0".encode("utf-16")
    os.unlink("out.npz")
    _, stderr = encode("a.txt", wide)
    assert f"at byte {len(wide) - 2} (line 2)" in stderr
    _, stderr = encode("a.txt", "plain".encode("utf-16-le"), "--errors", "replace")
    assert "is not a text file" in stderr and "--encoding utf-16-le" in stderr
    texts, _ = encode("a.jsonl", b'"a\\u0000b\\ud83d"', "--errors", "replace")
    assert texts == ended(["a\ufffdb\ufffd"])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.json", "a.txt.gz"])
def test_a_byte_order_mark_decides(encode, encoding, name):
    text = {"a.csv": "text\ncafé", "a.json": '["café"]'}.get(name, "café")
    mark = "" if encoding in ("utf-16", "utf-32", "utf-8-sig") else "\ufeff"
    content = (mark + text).encode(encoding)
    texts, stderr = encode(name, gzip.compress(content) if name.endswith("gz") else content)
    assert texts == ended(["café"])
    named = encoding[:6].upper()
    assert (f"read as {named} because of the byte order mark: {name}" in stderr) == (
        named != "UTF-8-"
    )


def test_another_encoding_than_the_default_is_obeyed_without_a_mark(encode):
    texts, stderr = encode("a.csv", "text\ncafé".encode("latin-1"), "--encoding", "latin-1")
    assert texts == ended(["café"]) and "byte order" not in stderr
    texts, stderr = encode("a.txt", "café".encode("utf-16"), "--encoding", "utf-16")
    assert texts == ended(["café"]) and "byte order" not in stderr


def test_each_file_of_a_folder_is_read_or_counted_as_skipped(cli, workdir):
    folder = workdir / "in"
    (folder / ".git").mkdir(parents=True)
    (folder / ".hidden").write_text("x")
    (folder / "a.txt").write_text("The kettle")
    (folder / "empty.md").touch()
    (folder / "b.jsonl").write_text('"a class"\n""\n{"text": ""}')
    (workdir / "elsewhere").mkdir()
    (workdir / "elsewhere" / "c.txt").write_text("a def")
    (folder / "linked").symlink_to(workdir / "elsewhere")
    (folder / "loop").symlink_to(folder)
    (folder / "dangling.txt").symlink_to("nothing")
    (folder / "itself").symlink_to("itself")
    os.mkfifo(folder / "pipe")
    result = cli("encode", "in", "out.npz", "--model_name", "tiny")
    assert result.returncode == 0, result.stderr
    line = result.stderr.splitlines()[1]
    assert line.startswith("read 4 files, 3 documents; skipped: 2 hidden files or folders; ")
    for part in (
        "2 empty records",
        "files without text: in/empty.md",
        "links to folders already read: in/loop",
        "links to files that do not exist: in/dangling.txt",
        "neither files nor folders: in/pipe",
    ):
        assert part in line
    result = cli("encode", "in/**/*.txt", "out.npz", "--model_name", "tiny")
    assert "read 1 file, 1 document; skipped: " in result.stderr
    assert "linked folders, which ** does not follow: in/linked, in/loop" in result.stderr
    result = cli("encode", "in/dangling.txt", "out.npz", "--model_name", "tiny")
    assert result.returncode == 1 and "is a link to nothing, which does not exist" in result.stderr


def test_a_missing_package_is_named_with_the_command(encode, monkeypatch):
    for package, name in (("zstandard", "a.jsonl.zst"), ("pyarrow.parquet", "a.parquet")):
        monkeypatch.setitem(sys.modules, package, None)
        _, stderr = encode(name, KINDS[name][0])
        assert f"{package.partition('.')[0]} is not installed" in stderr
        assert "bin/install data" in stderr


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_small_compressed_file_does_not_fill_the_memory(encode, ending):
    part = PACKERS[ending]((b" " * (2**20 - 1) + b"\n") * 64)  # blank lines are skipped
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, stderr = encode(f"a.jsonl{ending}", part * 8)  # 512 MB in 500 kB or less
    assert "contains no text" in stderr
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


PROMPTS = ["The kettle", "A letter, with commas"]
PROMPT_FILES = {
    "p.txt": "\n\n".join(PROMPTS).encode("utf-16"),
    "p.csv": csv_of([["id", "prompt"], ["1", PROMPTS[0]], ["2", PROMPTS[1]]]),
    "q.csv": csv_of([["id", "question"], ["1", PROMPTS[0]], ["2", PROMPTS[1]]]),
    "p.json": json.dumps([PROMPTS[0], {"prompt": PROMPTS[1], "completion": "x"}]).encode(),
    "p.jsonl": "\n".join(json.dumps({"question": p}) for p in PROMPTS).encode("utf-16"),
    "p.parquet": parquet({"prompt": PROMPTS, "completion": ["x", "y"]}),
    "p.txt.gz": gzip.compress("\r\n".join(PROMPTS).encode()),
}


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_prompts_are_read_from_the_same_kinds_of_files(cli, workdir, name):
    (workdir / name).write_bytes(PROMPT_FILES[name])
    flags = {"q.csv": ("--csv_column", "question"), "p.jsonl": ("--json_field", "question")}
    command = ("sample", "--model_name", "tiny", "--prompts", name, "--length", 1)
    result = cli(*command, "--format", "jsonl", "--seed", 1, *flags.get(name, ()))
    assert result.returncode == 0, result.stderr
    assert [json.loads(line)["prompt"] for line in result.stdout.splitlines()] == PROMPTS
    if name in flags:
        result = cli(*command)
        assert result.returncode == 1 and flags[name][0] in result.stderr


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.txt", b"The kettle\n\0", "p.txt has a NUL character at byte 11 (line 2)"),
        ("p.txt", b"\xe9", "p.txt: byte 0 is not utf-8 text, at line 1"),
        ("p.txt", b"", "p.txt contains no prompt"),
        ("p.json", b'["a", 3]', "item 2 (line 1) must be a text or an object"),
        ("p.json", b'["a", {"messages": []}]', 'an object with "prompt" or "tokens"'),
        ("p.pdf", b"%PDF-1.7", "p.pdf is not text (file type: PDF)"),
        ("p.jsonl.gz", gzip.compress(b'"a"' * 99)[:20], "p.jsonl.gz is damaged"),
    ],
    ids=range(7),
)
def test_broken_prompts_are_rejected_with_the_place(cli, workdir, name, content, message):
    (workdir / name).write_bytes(content)
    result = cli("sample", "--model_name", "tiny", "--prompts", name)
    assert result.returncode == 1 and message in result.stderr


@pytest.mark.parametrize("content", [b"a\n\0b\n", b"a\n\xe9\n"])
def test_a_broken_pipe_of_prompts_is_reported_without_reading_it_again(cli, workdir, content):
    os.mkfifo("pipe")
    thread = threading.Thread(target=Path("pipe").write_bytes, args=(content,))
    thread.start()
    result = cli("sample", "--model_name", "tiny", "--prompts", "pipe")
    thread.join()
    assert result.returncode == 1 and "byte 2" in result.stderr and "line" not in result.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--prompt", "a", "--csv_column", "x"), "--csv_column needs --prompts FILE"),
        (("--prompt_file", "a.txt", "--json_field", "x"), "--json_field needs --prompts FILE"),
        (
            ("--prompt", "a", "--encoding", "latin-1"),
            "--encoding needs --prompts, --prompt_file or",
        ),
        (("--errors", "replace"), "--errors needs --prompts, --prompt_file or --prompt -"),
    ],
)
def test_a_flag_about_files_needs_a_file(cli, flags, message):
    result = cli("sample", "--model_name", "tiny", *flags)
    assert result.returncode == 2 and message in result.stderr


def test_standard_input_is_read_in_the_encoding_that_is_named(cli, monkeypatch):
    command = (
        "sample",
        "--model_name",
        "tiny",
        "--prompt",
        "-",
        "--length",
        1,
        "--format",
        "jsonl",
    )
    for flags, prompt in (
        (("--encoding", "latin-1"), "caf\xe9"),
        (("--errors", "replace"), "caf\ufffd"),
    ):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n")))
        result = cli(*command, *flags)
        assert result.returncode == 0 and json.loads(result.stdout)["prompt"] == prompt
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n")))
    result = cli(*command)
    assert result.returncode == 1 and "standard input is not UTF-8 text: byte 3" in result.stderr
