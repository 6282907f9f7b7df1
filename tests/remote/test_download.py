"""`download` against a local server that fails in every way we could think of."""

import base64
import contextlib
import gzip
import hashlib
import http.server
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
import types
import zlib
from pathlib import Path

import pytest
from conftest import GOLDEN, ROOT, TINY, small_disk

from gpt2cli import console
from gpt2cli.commands import download
from gpt2cli.commands.download import DownloadOptions
from gpt2cli.errors import UserError
from gpt2cli.model.sizes import RELEASED, ModelConfig
from gpt2cli.remote import bodies, released, transfer
from gpt2cli.remote import hub as hub_module

CHECKPOINT = GOLDEN / "gpt2-openai" / "a-l2-h4-e16-c96"
DATA = "model.ckpt.data-00000-of-00001"

MODEL = {
    "encoder.json": b'{"a": 0, "b": 1}',
    "vocab.bpe": b"#version: 0.2\na b\n",
    "model.ckpt.meta": bytes(range(200)),
    DATA: hashlib.shake_128(b"weights").digest(100_000),
    "model.ckpt.index": b"\0index" * 20,
    "hparams.json": b'{"n_vocab": 2, "n_ctx": 8, "n_embd": 4, "n_head": 2, "n_layer": 1}',
    "checkpoint": b'model_checkpoint_path: "model.ckpt"\n',
}


class Mirror(http.server.ThreadingHTTPServer):
    """Serve `contents` (path -> bytes); each request uses up one of `faults` (name -> list)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/models"
        self.contents, self.faults, self.headers = {}, {}, {}
        self.etag = '"v1"'
        self.ignore_range = False
        self.endless = 0  # bytes sent of bodies without an end
        self.pause = 0  # seconds between two parts of a body
        self.asked = []  # (file name, Range header, bytes of body sent)
        self.tokens = []  # Authorization header of each request
        self.release = threading.Event()  # ends a stall

    def handle_error(self, *_):
        """Ignore a client that hangs up, which is part of the test."""

    def ranges(self, name):
        return [span for file, span, _ in self.asked if file == name]

    def sent(self, name):
        return sum(count for file, _, count in self.asked if file == name)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: no 40 ms of delayed acknowledgement

    def log_message(self, *_):
        pass

    def do_GET(self):
        mirror, path = self.server, self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        faults = mirror.faults.get(name, [])
        fault = faults.pop(0) if faults else {}
        content = fault.get("body", mirror.contents.get(path))
        status = fault.get("status", 200 if content is not None else 404)
        content = b"gone" if content is None else content
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = 0
        special = mirror.headers.get(name, {}) | fault.get("headers", {})
        headers = {"ETag": mirror.etag} | special
        may_resume = self.headers.get("If-Range") in headers.values() and "body" not in fault
        may_resume = may_resume or fault.get("deaf")
        if status == 200 and span and may_resume and not mirror.ignore_range:
            start, status = int(span[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if start >= len(content):
                status = 416
        body = content[start:] if status != 416 else b""
        headers = {"Content-Length": str(len(body))} | headers
        part = body[: fault.get("cut", len(body))]
        mirror.asked.append((name, self.headers.get("Range"), len(part)))
        mirror.tokens.append(self.headers.get("Authorization"))
        self.send_response(status, fault.get("reason"))
        for key, value in headers.items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        if "endless" in fault:
            self.send_forever(fault["endless"])
            return
        for start in range(0, len(part), 2**16):
            self.wfile.write(part[start : start + 2**16])
            self.wfile.flush()
            time.sleep(mirror.pause)
        self.wfile.flush()
        if fault.get("stall"):
            mirror.release.wait(5)
        if len(part) < int(headers["Content-Length"] or 0) or headers["Content-Length"] is None:
            self.close_connection = True

    def send_forever(self, piece):
        """Send a body of chunks until the client hangs up, or 40 MB."""
        self.close_connection = True
        for _ in range(40_000_000 // len(piece)):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.flush()
            self.server.endless += len(piece)


@contextlib.contextmanager
def serving():
    server = Mirror()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def mirror(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as server:
        yield server


@pytest.fixture
def waits(monkeypatch):
    """Record the pauses of download instead of making them."""
    pauses = []
    monkeypatch.setattr(transfer, "time", types.SimpleNamespace(sleep=pauses.append))
    return pauses


@pytest.fixture
def opened(monkeypatch):
    """Replace the module that reads checkpoints by one that opens everything and records it."""
    folders = []
    stand_in = types.ModuleType("gpt2cli.storage.reading")
    stand_in.verify = folders.append
    monkeypatch.setitem(sys.modules, "gpt2cli.storage.reading", stand_in)
    monkeypatch.setattr("gpt2cli.storage.reading", stand_in, raising=False)
    return folders


@pytest.fixture
def fetch(mirror, waits, opened, tmp_path):
    """Put MODEL on the mirror as `own`; the function runs download and returns the folder."""
    mirror.contents = {f"/models/own/{name}": content for name, content in MODEL.items()}

    def fetch(model="own"):
        download.run(
            DownloadOptions(model=model, url=mirror.url, models_dir=str(tmp_path / "models"))
        )
        return tmp_path / "models" / model

    return fetch


def assert_whole(folder, model=MODEL):
    assert {name: (folder / name).read_bytes() for name in model} == model
    assert not list(folder.glob("*.part*"))


def folder_of(tmp_path, name="own"):
    return tmp_path / "models" / name


def test_all_files_arrive_and_the_checkpoint_is_opened(fetch, mirror, opened, capsys):
    folder = fetch()
    assert_whole(folder)
    assert [name for name, _, _ in mirror.asked] == list(released.FILES)
    assert opened == [folder]
    out, err = capsys.readouterr()
    assert out == ""
    command = f"gpt2cli sample --model_name own --models_dir {folder.parent}"
    assert err.splitlines()[-1] == f"{folder} is complete. Try: {command}"


def test_the_default_folder_is_not_named_in_the_next_command(
    fetch, mirror, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    download.run(DownloadOptions(model="own", url=mirror.url + "/"))
    assert capsys.readouterr().err.endswith("Try: gpt2cli sample --model_name own\n")
    assert_whole(Path("models/own"))


@pytest.mark.parametrize("tenth", range(1, 10))
@pytest.mark.parametrize("name", [DATA, "hparams.json"])
def test_an_interrupted_download_resumes_at_any_tenth(fetch, mirror, name, tenth):
    size = len(MODEL[name])
    mirror.faults[name] = [{"cut": size * tenth // 10}]
    assert_whole(fetch())
    assert mirror.ranges(name)[0] is None and mirror.ranges(name)[1].startswith("bytes=")
    assert mirror.sent(name) <= size + size // 50 + 2


def test_a_file_interrupted_more_often_than_the_tries_arrives(fetch, mirror, waits):
    mirror.faults[DATA] = [{"cut": 10_000} for _ in range(9)]
    mirror.faults["checkpoint"] = [{"cut": 4} for _ in range(9)]
    assert_whole(fetch())
    assert max(waits) <= transfer.BACKOFF
    assert mirror.sent(DATA) < 115_000


def test_the_next_attempt_resumes_a_killed_one(fetch, mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "TRIES", 1)
    mirror.faults[DATA] = [{"cut": 60_000}, {"status": 503}]
    with pytest.raises(UserError, match="503"):
        fetch()
    assert not (folder_of(tmp_path) / DATA).exists()
    assert not (folder_of(tmp_path) / "checkpoint").exists()
    before = len(mirror.asked)
    assert_whole(fetch())
    names = [name for name, _, _ in mirror.asked[before:]]
    assert names == [DATA, "model.ckpt.index", "hparams.json", "checkpoint"]
    assert mirror.ranges(DATA)[-1].startswith("bytes=59")


def test_a_complete_part_is_not_fetched_again(fetch, mirror, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "fault_of", killed)
        mirror.contents.pop("/models/own/model.ckpt.meta")
        with pytest.raises(KeyboardInterrupt):
            fetch()
    part = folder_of(tmp_path) / "encoder.json.part"
    assert part.read_bytes() == MODEL["encoder.json"]
    fetch()
    assert mirror.ranges("encoder.json") == [None, "bytes=15-"]
    assert (folder_of(tmp_path) / "encoder.json").read_bytes() == MODEL["encoder.json"]


def test_a_server_without_range_sends_the_whole_file(fetch, mirror):
    mirror.ignore_range = True
    mirror.faults[DATA] = [{"cut": 70_000}]
    assert_whole(fetch())
    assert mirror.sent(DATA) == 170_000


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_tag_an_interrupted_file_starts_again(fetch, mirror, etag):
    mirror.headers[DATA] = {"ETag": etag}
    mirror.faults[DATA] = [{"cut": 70_000}]
    assert_whole(fetch())
    assert mirror.ranges(DATA) == [None, None]


@pytest.mark.parametrize("deaf", [False, True], ids=["If-Range", "server ignores If-Range"])
@pytest.mark.parametrize("tag", ["ETag", "Last-Modified"])
def test_a_file_that_changed_between_two_attempts_starts_again(
    fetch, mirror, deaf, tag, monkeypatch
):
    mirror.headers[DATA] = {"ETag": None, tag: '"v1"'}
    monkeypatch.setattr(transfer, "TRIES", 1)
    mirror.faults[DATA] = [{"cut": 60_000}, {"status": 503}]
    with pytest.raises(UserError):
        fetch()
    monkeypatch.setattr(transfer, "TRIES", 2)
    newer = MODEL[DATA][::-1]
    mirror.contents[f"/models/own/{DATA}"], mirror.etag = newer, '"v2"'
    mirror.headers[DATA] = {"ETag": None, tag: '"v2"'}
    mirror.faults[DATA] = [{"deaf": deaf}]
    assert_whole(fetch(), MODEL | {DATA: newer})


def test_a_file_that_is_now_shorter_than_its_part_starts_again(fetch, mirror):
    shorter = MODEL[DATA][:1000]
    mirror.faults[DATA] = [{"cut": 60_000}, {"body": shorter, "deaf": True}]
    mirror.contents[f"/models/own/{DATA}"] = shorter
    mirror.faults[DATA][0]["body"] = MODEL[DATA]
    assert_whole(fetch(), MODEL | {DATA: shorter})


def test_a_part_from_another_mirror_is_not_resumed(fetch, mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "TRIES", 1)
    mirror.faults[DATA] = [{"cut": 60_000}, {"status": 503}]
    with pytest.raises(UserError):
        fetch()
    other = {name: content[::-1] if name == DATA else content for name, content in MODEL.items()}
    mirror.contents = {f"/other/own/{name}": content for name, content in other.items()}
    url = mirror.url.replace("models", "other")
    download.run(DownloadOptions(model="own", url=url, models_dir=str(tmp_path / "models")))
    assert_whole(folder_of(tmp_path), other)


def test_a_body_that_always_ends_early_is_given_up_and_not_kept(fetch, mirror, waits, tmp_path):
    mirror.faults[DATA] = [{"cut": 5000}] * 3 + [{"cut": 0}] * 9
    with pytest.raises(UserError, match=r"connection was interrupted.*later to resume"):
        fetch()
    assert not (folder_of(tmp_path) / DATA).exists()
    assert waits == [0.5, 0.5, 0.5, 1, 2, 4, 8]


def test_a_length_that_is_too_large_is_detected(fetch, mirror, tmp_path):
    mirror.headers["vocab.bpe"] = {"Content-Length": "5000"}
    with pytest.raises(UserError, match=r"vocab.bpe: "):
        fetch()
    assert not (folder_of(tmp_path) / "vocab.bpe").exists()


def test_a_length_that_is_too_small_is_detected_by_the_checksum(fetch, mirror, tmp_path):
    md5 = base64.b64encode(hashlib.md5(MODEL[DATA]).digest()).decode()
    mirror.headers[DATA] = {"Content-MD5": md5, "Content-Length": "99000"}
    with pytest.raises(UserError, match="MD5"):
        fetch()
    assert not (folder_of(tmp_path) / DATA).exists()


WRONG = hashlib.md5(b"something else")


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-MD5": base64.b64encode(WRONG.digest()).decode()},
        {"ETag": f'"{WRONG.hexdigest()}"'},
        {"x-goog-hash": f"crc32c=AAAAAA==,md5={base64.b64encode(WRONG.digest()).decode()}"},
    ],
    ids=lambda headers: next(iter(headers)),
)
def test_a_wrong_checksum_is_rejected_after_a_second_try(fetch, mirror, tmp_path, headers):
    mirror.headers[DATA] = headers
    with pytest.raises(UserError, match="MD5 differs from the server"):
        fetch()
    assert len(mirror.ranges(DATA)) == bodies.DAMAGED_TRIES
    assert not list(folder_of(tmp_path).glob(DATA + "*t"))
    assert not (folder_of(tmp_path) / DATA).exists()


def test_right_checksums_and_other_tags_are_accepted_after_an_interruption(fetch, mirror):
    md5 = hashlib.md5(MODEL[DATA])
    stated = base64.b64encode(md5.digest()).decode()
    mirror.headers[DATA] = {
        "ETag": f'"{md5.hexdigest()}"',
        "Content-MD5": stated,
        "x-goog-hash": f"md5={stated}",
    }
    mirror.headers["vocab.bpe"] = {"ETag": f'"{WRONG.hexdigest()}-7"', "Content-MD5": "nonsense"}
    mirror.headers["checkpoint"] = {
        "ETag": f'"{WRONG.hexdigest()}"',
        "x-amz-server-side-encryption": "aws:kms",
    }
    mirror.faults[DATA] = [{"cut": 30_000}]
    assert_whole(fetch())


def test_bytes_damaged_on_the_way_are_fetched_again(fetch, mirror):
    md5 = base64.b64encode(hashlib.md5(MODEL[DATA]).digest()).decode()
    mirror.headers[DATA] = {"Content-MD5": md5}
    mirror.faults[DATA] = [{"body": bytes(100_000)}]
    assert_whole(fetch())


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_name_the_server_lacks_leaves_nothing(fetch, mirror, tmp_path, status):
    mirror.faults["encoder.json"] = [{"status": status}]
    with pytest.raises(UserError, match=rf"encoder.json .*{status}.*name and --url"):
        fetch()
    assert len(mirror.asked) == 1
    assert not folder_of(tmp_path).exists()


def test_other_client_errors_are_reported_at_once(fetch, mirror):
    mirror.faults["encoder.json"] = [{"status": 401}]
    with pytest.raises(UserError, match="401 Unauthorized"):
        fetch()
    assert len(mirror.asked) == 1


def test_a_busy_server_is_retried_after_the_wait_it_asks_for(fetch, mirror, waits):
    mirror.faults["encoder.json"] = [{"status": 429, "headers": {"Retry-After": "17"}}]
    mirror.faults["vocab.bpe"] = [{"status": 429, "headers": {"Retry-After": "soon"}}]
    assert_whole(fetch())
    assert waits == [17, 1]


def test_a_server_that_asks_for_an_hour_is_not_waited_for(fetch, mirror, waits):
    mirror.faults["encoder.json"] = [{"status": 429, "headers": {"Retry-After": "3600"}}]
    with pytest.raises(UserError, match="asks to wait 3,600 s"):
        fetch()
    assert waits == []


def test_a_server_that_fails_twice_and_then_works_is_used(fetch, mirror, waits):
    mirror.faults["encoder.json"] = [{"status": 503}, {"status": 500}]
    assert_whole(fetch())
    assert waits == [1, 2]


def test_a_server_that_keeps_failing_is_given_up_after_five_tries(fetch, mirror, waits):
    mirror.faults["encoder.json"] = [{"status": 503}] * 9
    with pytest.raises(UserError, match=r"503 Service Unavailable.*another server with --url"):
        fetch()
    assert len(mirror.asked) == 5 and waits == [1, 2, 4, 8]


@pytest.mark.parametrize("cut", [0, 40_000])
def test_a_stalled_request_is_repeated(fetch, mirror, monkeypatch, cut, capsys):
    monkeypatch.setattr(bodies, "READ_TIMEOUT", 0.2)
    mirror.faults[DATA] = [{"cut": cut, "stall": True}]
    assert_whole(fetch())
    assert "timed out" in capsys.readouterr().err
    assert mirror.sent(DATA) <= 100_000 + 2_000


def test_a_server_that_is_not_there_is_named(waits, opened, tmp_path):
    options = DownloadOptions(
        model="own", url="http://127.0.0.1:1/m", models_dir=str(tmp_path / "m")
    )
    with pytest.raises(UserError, match=r"http://127.0.0.1:1/m/own/encoder.json: .*refused"):
        download.run(options)
    assert not (tmp_path / "m" / "own").exists()


@pytest.mark.parametrize(
    "url", ["http://a..b/", "http://[x/", "http://" + "a" * 300, "http://127.0.0.1:99999/"]
)
def test_an_invalid_url_is_rejected(url, waits, opened, tmp_path):
    with pytest.raises(UserError, match="--url"):
        download.run(DownloadOptions(model="own", url=url, models_dir=str(tmp_path)))


HTML = b"<!DOCTYPE html>\n<html><body>Blocked by the proxy</body></html>"
XML = b"\xef\xbb\xbf<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"


@pytest.mark.parametrize("name", ["vocab.bpe", DATA, "model.ckpt.index", "checkpoint"])
@pytest.mark.parametrize(
    "page",
    [
        {"body": HTML, "headers": {"Content-Type": "text/html"}},
        {"body": HTML},
        {"body": XML},
        {"body": b"\n\n  " + HTML},
        {"body": b"\0fine", "headers": {"Content-Type": "application/xml"}},
    ],
    ids=["html type", "html body", "xml body", "blank lines first", "xml type"],
)
def test_an_error_page_with_status_200_is_never_kept(fetch, mirror, tmp_path, name, page):
    mirror.faults[name] = [dict(page) for _ in range(9)]
    with pytest.raises(UserError, match=f"{name}: "):
        fetch()
    assert not (folder_of(tmp_path) / name).exists()
    assert not (folder_of(tmp_path) / f"{name}.part").exists()
    mirror.faults.clear()
    assert_whole(fetch())


def test_an_error_page_does_not_discard_a_part(fetch, mirror):
    page = {"body": HTML, "headers": {"Content-Type": "text/html"}}
    mirror.faults[DATA] = [{"cut": 80_000}, page, {"body": XML}]
    assert_whole(fetch())
    assert mirror.ranges(DATA)[-1].startswith("bytes=79")


@pytest.mark.parametrize(
    "name, body",
    [
        ("hparams.json", b"service unavailable"),
        ("hparams.json", b'{"n_vocab": 2}'),
        ("hparams.json", b"\xff\xfe"),
        ("encoder.json", b"[1, 2]"),
        ("encoder.json", b"[" * 100_000),
        ("encoder.json", b'{"error": '),
        ("checkpoint", b"try again later"),
        ("vocab.bpe", b""),
    ],
)
def test_a_file_with_other_content_is_never_kept(fetch, mirror, tmp_path, name, body):
    mirror.contents[f"/models/own/{name}"] = body
    with pytest.raises(UserError, match=f"{name}: it "):
        fetch()
    assert not (folder_of(tmp_path) / name).exists()


def test_weights_may_begin_with_any_byte(fetch, mirror):
    weights = b"<" + MODEL[DATA]
    mirror.contents[f"/models/own/{DATA}"] = weights
    assert_whole(fetch(), MODEL | {DATA: weights})


def test_a_mirror_without_the_graph_is_complete(fetch, mirror):
    del mirror.contents["/models/own/model.ckpt.meta"]
    folder = fetch()
    assert_whole(folder, {n: c for n, c in MODEL.items() if n != "model.ckpt.meta"})
    asked = len(mirror.asked)
    fetch()
    assert len(mirror.asked) == asked


def test_a_mirror_without_content_length_works(fetch, mirror):
    mirror.headers = {name: {"Content-Length": None} for name in MODEL}
    assert_whole(fetch())


def test_a_complete_model_is_not_requested_again(fetch, mirror, opened, capsys):
    folder = fetch()
    asked = len(mirror.asked)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    mirror.shutdown()
    fetch()
    assert len(mirror.asked) == asked and len(opened) == 1
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("name", MODEL)
@pytest.mark.parametrize("damage", ["shorter", "one byte", "gone"])
def test_a_damaged_file_is_fetched_again_and_only_that(fetch, mirror, name, damage):
    folder = fetch()
    path, asked = folder / name, len(mirror.asked)
    content = MODEL[name]
    path.write_bytes(content[:-1] if damage == "shorter" else bytes([content[0] ^ 1]) + content[1:])
    damaged = path.read_bytes()
    if damage == "gone":
        path.unlink()
    assert_whole(fetch())
    assert [file for file, _, _ in mirror.asked[asked:]] == [name]
    if damage != "gone":
        assert (folder / f"{name}.old").read_bytes() == damaged


def test_files_fetched_by_another_program_are_kept_if_they_fit(fetch, mirror, tmp_path):
    folder = folder_of(tmp_path)
    folder.mkdir(parents=True)
    for name, content in MODEL.items():
        (folder / name).write_bytes(content)
    (folder / "vocab.bpe").write_bytes(b"#version: 0.2\n")
    (folder / "encoder.json").write_bytes(b'{"a": 0, "b": x}')
    assert_whole(fetch())
    assert len(mirror.asked) == 7 and (folder / "vocab.bpe.old").exists()
    assert (folder / "encoder.json.old").exists()
    assert not (folder / f"{DATA}.old").exists()


def test_a_damaged_manifest_is_ignored(fetch, mirror):
    folder = fetch()
    for text in ("", "[]", '{"files": []}', '{"files": {"checkpoint": 7, "../x": {}}}', "[" * 9999):
        (folder / "download.json").write_text(text)
        assert_whole(fetch())


def test_a_checkpoint_that_does_not_open_is_not_called_complete(fetch, opened, monkeypatch):
    def refuse(folder):
        raise UserError(f"{folder}/model.ckpt.index is damaged")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["gpt2cli.storage.reading"], "verify", refuse)
        for _ in range(2):
            with pytest.raises(UserError, match=r"index is damaged.*delete.*--url"):
                fetch()
    fetch()
    assert len(opened) == 1


@pytest.mark.parametrize("older, newer", [("117M", "124M"), ("345M", "355M")])
def test_the_older_names_fetch_into_the_newer_folders(
    fetch, mirror, tmp_path, monkeypatch, older, newer
):
    make_openais(monkeypatch, newer)
    mirror.contents = {f"/models/{newer}/{name}": content for name, content in MODEL.items()}
    fetch(older)
    assert_whole(folder_of(tmp_path, newer))
    assert not folder_of(tmp_path, older).exists()


def make_openais(monkeypatch, name):
    """Treat MODEL's files as those that `name` must have."""
    sums = {file: hashlib.sha256(content).hexdigest() for file, content in MODEL.items()}
    del sums["hparams.json"]  # compared by its values
    sizes = {name: ModelConfig.from_json(MODEL["hparams.json"])}
    monkeypatch.setattr(released, "SHA256", {name: sums})
    monkeypatch.setattr(released, "SIZES", sizes)


def signed(content):
    """Headers that agree with a body."""
    md5 = hashlib.md5(content)
    return {"ETag": f'"{md5.hexdigest()}"', "Content-MD5": base64.b64encode(md5.digest()).decode()}


def changed(name):
    """A file of MODEL with one byte changed, still of its kind."""
    old, new = {"encoder.json": (b"1", b"2"), "hparams.json": (b'"n_head": 2', b'"n_head": 1')}.get(
        name, (MODEL[name][-1:], bytes([MODEL[name][-1] ^ 1]))
    )
    assert old in MODEL[name]
    return MODEL[name].replace(old, new)


@pytest.mark.parametrize("name", MODEL)
def test_a_changed_file_is_rejected_although_the_headers_of_the_mirror_agree(
    fetch, mirror, monkeypatch, tmp_path, name
):
    make_openais(monkeypatch, "124M")
    mirror.contents = {f"/models/124M/{file}": content for file, content in MODEL.items()}
    mirror.contents[f"/models/124M/{name}"] = changed(name)
    mirror.headers[name] = signed(changed(name))
    with pytest.raises(UserError, match=f"{name}: its .* not th.* of OpenAI's file"):
        fetch("124M")
    folder = folder_of(tmp_path, "124M")
    assert not (folder / name).exists() and not list(folder.glob("*.part"))
    mirror.contents[f"/models/124M/{name}"] = MODEL[name]
    del mirror.headers[name]
    assert_whole(fetch("124M"))


def test_a_model_of_ones_own_on_a_mirror_may_have_any_content(fetch, mirror, monkeypatch):
    make_openais(monkeypatch, "124M")
    mirror.contents[f"/models/own/{DATA}"] = changed(DATA)
    assert (fetch("own") / DATA).read_bytes() == changed(DATA)


def test_changed_files_of_an_earlier_download_are_fetched_again(
    fetch, mirror, monkeypatch, tmp_path, capsys
):
    mirror.contents = {f"/models/124M/{file}": content for file, content in MODEL.items()}
    mirror.contents[f"/models/124M/{DATA}"] = changed(DATA)
    with monkeypatch.context() as patch:  # an earlier version, without checksums
        patch.setattr(released, "SHA256", {})
        patch.setattr(released, "SIZES", {})
        folder = fetch("124M")
    make_openais(monkeypatch, "124M")
    mirror.contents[f"/models/124M/{DATA}"] = MODEL[DATA]
    assert_whole(fetch("124M"))
    assert (folder / f"{DATA}.old").read_bytes() == changed(DATA)
    assert f"{DATA}.old" in capsys.readouterr().err


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_model_has_openais_sizes(tmp_path, name):
    path = tmp_path / "hparams.json"
    path.write_text(released.SIZES[name].to_json())
    assert released.content_fault(path, name) is None
    for change in ({"n_head": 1}, {"activation": "relu"}, {"end_token": "x"}):
        path.write_text(json.dumps(json.loads(released.SIZES[name].to_json()) | change))
        assert "its sizes are not those of OpenAI's" in released.content_fault(path, name)
        assert released.content_fault(path, "own") is None


def test_every_released_model_must_have_openais_encoder(fetch, mirror, tmp_path):
    for model in RELEASED:
        mirror.contents = {f"/models/{model}/{name}": content for name, content in MODEL.items()}
        with pytest.raises(UserError, match="encoder.json: its SHA-256 is not that of OpenAI's"):
            fetch(model)
        assert not (folder_of(tmp_path, model) / "encoder.json").exists()


def test_the_checksums_match_the_real_files(gpt2_vocabulary):
    assert set(released.SHA256) == set(RELEASED)
    assert set(released.SHA256["124M"]) == set(released.FILES) - {"hparams.json"}
    for name in RELEASED:
        for file in ("encoder.json", "vocab.bpe"):
            digest = hashlib.sha256((gpt2_vocabulary / file).read_bytes()).hexdigest()
            assert digest == released.SHA256[name][file]
    state = b'model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n'
    assert hashlib.sha256(state).hexdigest() == released.SHA256["124M"]["checkpoint"]


def test_an_unknown_name_lists_the_names(tmp_path, opened):
    with pytest.raises(UserError, match="no released model '125M': choose 124M, 355M, 774M, 155"):
        download.run(DownloadOptions(model="125M", models_dir=str(tmp_path / "models")))
    assert not (tmp_path / "models").exists()


def test_without_a_name_the_list_is_printed_on_standard_output(capsys):
    download.run(DownloadOptions())
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [
        "name   parameters     size",
        "124M    124 million   0.5 GB  also 117M",
        "355M    355 million   1.4 GB  also 345M",
        "774M    774 million   3.1 GB",
        "1558M 1,558 million   6.2 GB",
    ]


def test_a_second_download_into_the_same_folder_is_rejected(fetch, mirror, tmp_path):
    mirror.faults[DATA] = [{"cut": 50_000, "stall": True}]
    first = threading.Thread(target=fetch)
    first.start()
    while DATA not in [name for name, _, _ in mirror.asked]:
        first.join(0.01)
    with pytest.raises(UserError, match=r"another gpt2cli download is writing .*own"):
        fetch()
    mirror.release.set()
    first.join()
    assert_whole(folder_of(tmp_path))


def test_a_full_disk_is_reported_and_the_part_is_kept(fetch, mirror, monkeypatch, tmp_path):
    def fail(fd):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(transfer.os, "fsync", fail)
    with pytest.raises(UserError, match=r"No space left.*resumes after 16 bytes"):
        fetch()
    assert (folder_of(tmp_path) / "encoder.json.part").exists()


def test_a_disk_that_fills_up_leaves_no_whole_file_and_resumes_with_more_room(
    fetch, mirror, tmp_path
):
    big = hashlib.shake_128(b"weights").digest(1_500_000)
    mirror.contents[f"/models/own/{DATA}"] = big
    with small_disk(tmp_path / "models", 1) as disk:
        with pytest.raises(UserError, match=r"no space for .*1,500,000 bytes needed"):
            fetch()
        mirror.headers[DATA] = {"Content-Length": None}  # nobody can know before
        with pytest.raises(UserError, match="No space left on device"):
            fetch()
        assert not (disk / "own" / DATA).exists()
        part = (disk / "own" / f"{DATA}.part").stat().st_size
        assert 500_000 < part < 1_200_000
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        mirror.headers.clear()
        assert_whole(fetch(), {**MODEL, DATA: big})


def test_free_space_is_checked_before_the_body_is_written(fetch, mirror, monkeypatch, tmp_path):
    usage = types.SimpleNamespace(free=50_000)
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="100,000 bytes needed, 50,000 free"):
        fetch()
    assert not (folder_of(tmp_path) / f"{DATA}.part").exists()
    assert (folder_of(tmp_path) / "vocab.bpe").exists()


def test_a_folder_that_cannot_be_created_is_reported(mirror, opened, tmp_path):
    (tmp_path / "models").write_text("a file")
    with pytest.raises(UserError, match="cannot write"):
        download.run(
            DownloadOptions(model="own", url=mirror.url, models_dir=str(tmp_path / "models"))
        )


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Length": "\u00b2"},
        {"Content-Length": "9" * 5000},
        {"Retry-After": "9" * 5000},
        {"Retry-After": "Wed, 21 Oct 99999999 07:28:00 GMT"},
        {"Location": "http://[::1"},
    ],
    ids=["superscript", "long length", "long wait", "far date", "address"],
)
def test_odd_headers_of_a_mirror_are_one_error(fetch, mirror, headers):
    status = 302 if "Location" in headers else 503 if "Retry-After" in headers else 200
    mirror.faults["encoder.json"] = [{"status": status, "headers": headers, "body": b""}] * 9
    with pytest.raises(UserError, match=r"cannot download .*encoder.json"):
        fetch()


ENDLESS = {"Content-Length": None, "Transfer-Encoding": "chunked"}
SPARE = 15_000_000  # bytes that the systems' buffers may take before the client hangs up


def test_a_body_without_an_end_stops_at_the_largest_size_of_its_kind(fetch, mirror, monkeypatch):
    monkeypatch.setitem(released.MOST, "encoder.json", 100_000)
    fault = {"body": b"", "headers": ENDLESS, "endless": b"{" * 10_000}
    mirror.faults["encoder.json"] = [fault, fault]
    with pytest.raises(UserError, match=r"encoder.json sends more than 100,000 bytes"):
        fetch()
    assert mirror.endless < SPARE and len(mirror.asked) == 1
    assert_whole(fetch_again(mirror, fetch))


def fetch_again(mirror, fetch):
    """Fetch from a server that no longer fails."""
    mirror.faults.clear()
    mirror.headers.clear()
    return fetch()


@pytest.mark.parametrize("status", [302, 404, 500])
def test_the_body_of_an_error_or_a_redirect_is_not_read(fetch, mirror, status):
    headers = ENDLESS | {"Location": "encoder.json"}
    fault = {"body": b"", "headers": headers, "endless": b"x" * 10_000, "status": status}
    mirror.faults["encoder.json"] = [fault]
    if status == 404:
        with pytest.raises(UserError, match="404"):
            fetch()
    else:
        assert_whole(fetch())
    assert mirror.endless < SPARE


def test_a_length_beyond_the_largest_file_of_its_kind_is_rejected_at_once(fetch, mirror):
    size = 4 * released.PARAMETERS["124M"]
    assert released.most_of(DATA, "124M") == size == 497_759_232
    mirror.headers[DATA] = {"Content-Length": str(2**40)}
    with pytest.raises(UserError, match=r"has 1,099,511,627,776 bytes, but this file has at most"):
        fetch()
    assert_whole(fetch_again(mirror, fetch))


@pytest.mark.parametrize("packing", ["gzip", "x-gzip", "deflate"])
def test_a_compressed_body_is_decompressed(fetch, mirror, packing):
    pack = zlib.compress if packing == "deflate" else gzip.compress
    for name in ("encoder.json", DATA):
        headers = {"Content-Encoding": packing}
        mirror.faults[name] = [{"body": pack(MODEL[name]), "headers": headers}]
    assert_whole(fetch())


@pytest.mark.parametrize("coding", ["", "identity", "aws-chunked", "UTF-8"])
def test_a_body_that_is_called_something_else_than_packed_arrives_and_resumes(
    fetch, mirror, coding
):
    """Storage services state odd codings for content as it is."""
    mirror.headers = {name: {"Content-Encoding": coding} for name in MODEL}
    mirror.faults[DATA] = [{"cut": 60_000}]
    assert_whole(fetch())
    assert mirror.ranges(DATA)[1].startswith("bytes=5") and mirror.sent(DATA) < 102_000


@pytest.mark.parametrize("packing", ["gzip", "deflate", "br", "zstd", "gzip, gzip"])
def test_a_compressed_bomb_is_not_decompressed(fetch, mirror, monkeypatch, packing):
    monkeypatch.setitem(released.MOST, "encoder.json", 100_000)
    bomb = (gzip.compress if packing == "gzip" else zlib.compress)(b"{" * 30_000_000)
    headers = {"Content-Encoding": packing}
    mirror.faults["encoder.json"] = [{"body": bomb, "headers": headers}] * 2
    tracemalloc.start()
    with pytest.raises(UserError, match=r"sends more than 100,000 bytes|is compressed with '"):
        fetch()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 5_000_000


@pytest.mark.parametrize("damage", ["cut", "more", "other"])
def test_a_damaged_compressed_body_is_fetched_again(fetch, mirror, damage):
    packed = gzip.compress(MODEL["encoder.json"])
    damaged = {"cut": packed[:-9], "more": packed * 2, "other": b"{}"}[damage]
    headers = {"Content-Encoding": "gzip"}
    mirror.faults["encoder.json"] = [{"body": damaged, "headers": headers}]
    assert_whole(fetch())


def test_a_server_that_sends_almost_nothing_is_given_up(fetch, mirror, waits, monkeypatch):
    monkeypatch.setattr(bodies, "WINDOW", 1e-6)
    monkeypatch.setattr(bodies, "SLOWEST", 10**18)  # nothing is as fast
    with pytest.raises(UserError, match="bytes arrive per second"):
        fetch()
    assert waits == [1, 2, 4, 8]


@pytest.mark.parametrize("rate, arrives", [(7000, True), (101, True), (90, False), (1, False)])
def test_a_slow_but_steady_server_is_not_given_up(monkeypatch, rate, arrives):
    """Seconds pass as bytes are read: a modem brings 7,000 each."""
    clock, left = [0.0], [200 * rate]

    def read1(size, decode_content):
        clock[0] += 1
        left[0] -= rate
        return b"x" * rate if left[0] >= 0 else b""

    monkeypatch.setattr(bodies, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    response = types.SimpleNamespace(raw=types.SimpleNamespace(read1=read1), headers={})
    found = bodies.body_of(response, "http://x/y", 10**9)
    if arrives:
        assert len(b"".join(found)) == 200 * rate
    else:
        with pytest.raises(bodies.TryAgain, match="bytes arrive per second"):
            list(found)
        assert clock[0] < 2 * bodies.WINDOW


def test_redirect_loops_and_floods_of_headers_are_one_error(fetch, mirror):
    for headers in ({"Location": "encoder.json"}, {"X-Long": "a" * 70_000}):
        mirror.faults["encoder.json"] = [{"status": 302, "headers": headers, "body": b""}] * 40
        with pytest.raises(UserError, match=r"cannot download .*encoder.json") as caught:
            fetch()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tag", ['"' + "a" * 60_000 + '"', '"a\x0bb"', "\xff", '"'])
def test_etags_that_cannot_be_sent_back_are_not_kept(fetch, mirror, tag):
    mirror.etag = tag
    mirror.headers[DATA] = {"Last-Modified": "\x0bx", "Content-MD5": "\xff" * 22 + "=="}
    mirror.faults[DATA] = [{"cut": 50_000}]
    folder = fetch()
    assert_whole(folder)
    assert not re.search(r"a{300}|\\u000b|\\u00ff", (folder / "download.json").read_text())


@pytest.mark.parametrize(
    "change",
    [{"bytes": True}, {"bytes": -1}, {"bytes": 10**30}, {"bytes": "9"}, {"validator": [1]},
     {"validator": "\n"}, {"md5": "x"}, {"md5": [1]}, {"etag": {}}, {"url": None}],
)  # fmt: skip
def test_a_damaged_note_about_a_part_starts_the_file_again(fetch, mirror, tmp_path, change):
    folder = folder_of(tmp_path)
    folder.mkdir(parents=True)
    note = {"url": f"{mirror.url}/own/{DATA}", "validator": mirror.etag, "etag": mirror.etag}
    note |= {"bytes": len(MODEL[DATA]), "md5": []}
    part, note_path = transfer.part_of(folder / DATA)
    part.write_bytes(MODEL[DATA][:100])
    for values, asked in ((note | change, None), (note, "bytes=99-")):
        part.write_bytes(MODEL[DATA][:100])
        note_path.write_text(json.dumps(values))
        assert_whole(fetch())
        assert mirror.ranges(DATA)[-1] == asked
        (folder / DATA).unlink()


@pytest.mark.parametrize("name", ["/dev/zero", "../own/vocab.bpe", "a\0b", "n" * 300, ".."])
def test_a_manifest_with_impossible_names_is_ignored(fetch, mirror, tmp_path, name):
    folder = fetch()
    manifest = json.loads((folder / "download.json").read_text())
    manifest["files"][name] = {"bytes": 0, "sha256": "0", "etag": None}
    (folder / "download.json").write_text(json.dumps(manifest))
    assert_whole(fetch())


def test_escapes_in_a_message_are_made_visible(capsys):
    console.say("the server answered 418 \x1b[2J\x1b]0;pwned\x07teapot\n\tnext")
    err = capsys.readouterr().err
    assert err == "the server answered 418 \\x1b[2J\\x1b]0;pwned\\x07teapot\\n\tnext\n"
    console.say("a\x85b\x9b2Jc\u2028d\u202eexe.txt\u2066e\u200bf\ufeffg\U000e0041h\ud800")
    shown = "a\\x85b\\x9b2Jc\\u2028d\\u202eexe.txt\\u2066e\\u200bf\\ufeffg\\U000e0041h\\ud800\n"
    assert capsys.readouterr().err == shown


def test_ordinary_text_of_any_script_is_printed_as_it_is(capsys):
    text = "née שלום\u200f العربية می\u200cخواهم 中文 日本語 한국어 हिन्दी "
    text += "👩\u200d👩\u200d👧 🇩🇪 a\u00adb\tc"
    console.say(text, "second line")
    assert capsys.readouterr().err == f"{text}\nsecond line\n"


def test_the_middle_of_a_long_message_is_cut(capsys):
    console.say(f"no model {'x' * 100_000}. Check the name")
    err = capsys.readouterr().err
    assert err.startswith("no model xxx") and err.endswith("xxx. Check the name\n")
    assert "... (98,025 characters) ..." in err and len(err) < 2100


def test_a_part_that_is_a_link_is_not_written_through(fetch, tmp_path):
    (tmp_path / "precious").write_text("PRECIOUS")
    folder_of(tmp_path).mkdir(parents=True)
    (folder_of(tmp_path) / "encoder.json.part").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"encoder.json"):
        fetch()
    assert (tmp_path / "precious").read_text() == "PRECIOUS"


def test_a_password_in_the_url_is_not_written_down(fetch, mirror, tmp_path, capsys):
    url = mirror.url.replace("//", "//me:secret@")
    download.run(DownloadOptions(model="own", url=url, models_dir=str(tmp_path / "models")))
    written = b"".join(p.read_bytes() for p in folder_of(tmp_path).iterdir())
    assert b"secret" not in written and "secret" not in capsys.readouterr().err


def test_the_module_does_not_import_tensorflow():
    code = (
        "import sys; from gpt2cli.commands import download; sys.exit('tensorflow' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
    )


@pytest.mark.parametrize(
    "damage",
    [
        None,
        "hparams.json",
        "model.ckpt.index",
        DATA,
        "one byte",
    ],
)
def test_a_real_checkpoint_opens_and_a_damaged_one_is_rejected(mirror, waits, tmp_path, damage):
    mirror.contents = {
        f"/models/own/{name}": (CHECKPOINT / name).read_bytes()
        if (CHECKPOINT / name).exists()
        else MODEL[name]
        for name in MODEL
    }
    if damage == "hparams.json":
        hparams = json.loads(mirror.contents[f"/models/own/{damage}"])
        changed = json.dumps(hparams | {"n_embd": 12}).encode()
        mirror.contents[f"/models/own/{damage}"] = changed
    elif damage == "one byte":
        content = bytearray(mirror.contents[f"/models/own/{DATA}"])
        content[len(content) // 2] ^= 1
        mirror.contents[f"/models/own/{DATA}"] = bytes(content)
    elif damage:
        content = mirror.contents[f"/models/own/{damage}"]
        mirror.contents[f"/models/own/{damage}"] = content[: len(content) // 2]
    options = DownloadOptions(model="own", url=mirror.url, models_dir=str(tmp_path))
    if damage:
        with pytest.raises(UserError, match=r"delete .*own, and set another --url"):
            download.run(options)
    else:
        download.run(options)
        assert json.loads((tmp_path / "own/download.json").read_text())["opened"] is True


def check_kills(mirror, tmp_path, rounds):
    """Kill N downloads; no file ever has its name before it is whole, and all arrive."""
    contents = {name: (TINY / name).read_bytes() for name in MODEL if (TINY / name).exists()}
    assert DATA in contents
    mirror.contents = {f"/models/own/{name}": content for name, content in contents.items()}
    mirror.pause, chance, done = 0.005, random.Random(rounds), 0
    command = [sys.executable, "-m", "gpt2cli", "download", "own", "--url", mirror.url]
    command += ["--models_dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    folder, kills = tmp_path / "own", 0
    while kills < rounds or not done:
        wait = 0.2 + 2 * chance.random() if kills < rounds else 60
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            assert process.wait(wait) == 0
            assert_whole(folder, contents)
            done += 1
            shutil.rmtree(folder)
            continue
        process.kill()
        process.wait()
        kills += 1
        for name, content in contents.items():
            if (folder / name).exists():
                assert (folder / name).read_bytes() == content, name
    return done


@pytest.mark.slow
def test_a_download_killed_a_hundred_times_arrives(mirror, tmp_path):
    print(check_kills(mirror, tmp_path, 100), "whole ones between 100 kills")


@pytest.mark.slow
def test_two_downloads_at_once_do_not_harm_each_other(mirror, tmp_path):
    """One exits with the status of a busy folder; the other completes."""
    contents = {name: (TINY / name).read_bytes() for name in MODEL if (TINY / name).exists()}
    mirror.contents = {f"/models/own/{name}": content for name, content in contents.items()}
    mirror.pause = 0.01
    command = [sys.executable, "-m", "gpt2cli", "download", "own", "--url", mirror.url]
    command += ["--models_dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 75], said
    assert any("another gpt2cli download is writing" in text for text in said)
    assert_whole(tmp_path / "own", contents)


COMMIT = "0123456789abcdef0123456789abcdef01234567"
API = "/api/models/me/tiny/revision/main"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory):
    """The files of models/tiny in Hugging Face format: name -> bytes."""
    from gpt2cli.formats.convert import convert, open_source

    folder = tmp_path_factory.mktemp("hub") / "tiny"
    convert(open_source(TINY), folder, to="hf")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def publish(mirror, model, commit=COMMIT):
    """Put a model on the mirror as a hub does: the API's answer, and the files."""
    siblings = []
    for name, content in model.items():
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        file = {"rfilename": name, "size": len(content), "blobId": blob}
        if name.endswith((".safetensors", ".bin")):
            sha256 = hashlib.sha256(content).hexdigest()
            file["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
        siblings.append(file)
        mirror.contents[f"/me/tiny/resolve/{commit}/{name}"] = content
    answer = {"_id": "1", "id": "me/tiny", "modelId": "me/tiny", "sha": commit, "tags": []}
    mirror.contents[API] = json.dumps({**answer, "siblings": siblings}).encode()


@pytest.fixture
def hub(mirror, waits, tiny_hf, tmp_path, monkeypatch):
    """Publish models/tiny as me/tiny; the function runs download and returns the folder."""
    monkeypatch.setenv("HF_ENDPOINT", mirror.url.removesuffix("/models"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    publish(mirror, tiny_hf)

    def fetch(**settings):
        models = str(tmp_path / "models")
        download.run(DownloadOptions(model="hf:me/tiny", models_dir=models, **settings))
        return tmp_path / "models" / "tiny"

    return fetch


@pytest.fixture
def unconverted(monkeypatch):
    """Leave out the conversion, for tests of what is fetched."""
    monkeypatch.setattr("gpt2cli.formats.convert.convert", lambda *_, **__: None)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_model_of_the_hub_arrives_as_a_model_folder(hub, mirror, tmp_path, capsys):
    folder = hub()
    for name in ("encoder.json", "vocab.bpe", DATA):
        assert (folder / name).read_bytes() == (TINY / name).read_bytes()
    manifest = json.loads((folder / "download.json").read_text())
    assert (manifest["url"], manifest["revision"]) == ("hf:me/tiny", "main")
    assert manifest["commit"] == COMMIT and "hparams.json" in manifest["files"]
    assert names_in(folder.parent) == ["tiny"]
    asked = [name for name, _, _ in mirror.asked]
    assert asked[:2] == ["main", "config.json"] and asked[-1] == WEIGHTS
    assert "README.md" not in asked and set(mirror.tokens) == {"Bearer hf_secret"}
    out, err = capsys.readouterr()
    assert out == "" and err.endswith(f"sample --model_name tiny --models_dir {folder.parent}\n")
    assert "hf_secret" not in err + json.dumps(manifest)

    mirror.shutdown()
    hub()
    hub(revision=COMMIT)
    assert len(mirror.asked) == len(asked)
    assert len(capsys.readouterr().err.splitlines()) == 2
    with pytest.raises(UserError, match="contains the revision 'main', not 'v2'"):
        hub(revision="v2")
    (folder / "vocab.bpe").write_text("")
    with pytest.raises(UserError, match=r"has changed since the download: vocab.bpe"):
        hub()


def test_a_tokenizer_that_gpt2cli_lacks_is_rejected_before_the_weights(hub, mirror, tiny_hf):
    gone = ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")
    left = {name: content for name, content in tiny_hf.items() if name not in gone}
    mirror.contents.clear()
    publish(mirror, {**left, "spiece.model": b"\n\x0e\n\x05<unk>"})
    with pytest.raises(UserError, match=r"spiece.model is damaged or not a SentencePiece model"):
        hub()
    assert WEIGHTS not in [name for name, _, _ in mirror.asked]


def test_an_adapter_on_the_hub_is_named(hub, mirror):
    mirror.contents.clear()
    publish(mirror, {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"})
    with pytest.raises(UserError, match=r"is a LoRA adapter, not a model.*--base"):
        hub()


def test_without_a_token_none_is_sent(hub, mirror, unconverted, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    hub()
    assert mirror.tokens[1:] == [None] * (len(mirror.tokens) - 1)


def test_the_token_is_not_sent_to_another_host(hub, mirror, tiny_hf, unconverted, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with serving() as store:
        store.contents = {"/blob": tiny_hf[WEIGHTS]}
        place = store.url.replace("127.0.0.1", "localhost").replace("/models", "/blob")
        mirror.faults[WEIGHTS] = [{"status": 302, "headers": {"Location": place}}]
        hub()
        assert [name for name, _, _ in store.asked] == ["blob"] and store.tokens == [None]


def test_an_interrupted_hub_download_resumes(hub, mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "TRIES", 1)
    mirror.faults[WEIGHTS] = [{"cut": 1_000_000}, {"status": 503}]
    with pytest.raises(UserError, match=r"503.*HF_ENDPOINT"):
        hub()
    assert names_in(tmp_path / "models") == [".hf-me--tiny"]
    before = len(mirror.asked)
    hub()
    assert [name for name, _, _ in mirror.asked[before:]] == ["main", WEIGHTS]
    start = int(mirror.ranges(WEIGHTS)[-1].removeprefix("bytes=").removesuffix("-"))
    assert start > 900_000 and names_in(tmp_path / "models") == ["tiny"]


def test_a_model_that_changed_meanwhile_is_not_mixed(hub, mirror, tiny_hf, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "TRIES", 1)
    mirror.faults[WEIGHTS] = [{"status": 503}]
    with pytest.raises(UserError):
        hub()
    values = json.loads(tiny_hf["config.json"]) | {"layer_norm_epsilon": 1e-6}
    publish(mirror, tiny_hf | {"config.json": json.dumps(values).encode()}, commit="9" * 40)
    before = len(mirror.asked)
    assert '"ln_epsilon": 1e-06' in (hub() / "hparams.json").read_text()
    asked = [name for name, _, _ in mirror.asked[before:]]
    assert asked == ["main", "config.json", WEIGHTS]


@pytest.mark.parametrize(
    "name, answer, message",
    [
        (
            "main",
            {"status": 404, "code": "RepoNotFound"},
            "there is no .*me/tiny.*HF_TO",
        ),
        ("main", {"status": 401}, "(it answered 401).*HF_TOKEN"),
        ("main", {"status": 401, "said": "Bad token"}, "(Bad token).*HF_TOKEN"),
        ("main", {"status": 404, "code": "RevisionNotFound"}, "--revision"),
        ("main", {"status": 403, "code": "GatedRepo"}, "gated .*HF_TOKEN"),
        ("main", {"status": 403}, "gated .*HF_TOKEN"),
        ("main", {"status": 404}, "like a Hugging Face hub.*HF_ENDPOINT"),
        ("main", {"body": HTML}, "like a Hugging Face hub.*HF_ENDPOINT"),
        ("main", {"body": b'{"id": "me/tiny"}'}, "like a Hugging Face hub.*HF_ENDPOINT"),
        ("config.json", {"status": 403, "code": "GatedRepo"}, "gated .*HF_TOKEN"),
        ("config.json", {"status": 401}, "gated .*HF_TOKEN"),
        ("config.json", {"status": 404}, "cannot download .*HF_ENDPOINT"),
    ],
)
def test_a_hub_error_is_one_line_and_leaves_nothing(hub, mirror, tmp_path, name, answer, message):
    headers = {"X-Error-Code": answer.get("code"), "X-Error-Message": answer.get("said")}
    fault = {"body": b"{}", "headers": headers} | answer
    mirror.faults[name] = [dict(fault) for _ in range(9)]
    with pytest.raises(UserError, match=message) as caught:
        hub()
    assert "\n" not in str(caught.value) and "hf_secret" not in str(caught.value)
    assert names_in(tmp_path / "models") == []


def test_a_hub_that_is_not_there_is_named(hub, tmp_path, monkeypatch):
    for endpoint in ("http://127.0.0.1:1", "ftp://nowhere", "http://[x"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        with pytest.raises(UserError, match=re.escape(endpoint)) as caught:
            hub()
        assert "HF_ENDPOINT" in str(caught.value) and "\n" not in str(caught.value)
    assert names_in(tmp_path / "models") == []


@pytest.mark.parametrize(
    "answer",
    [
        b"[" * 200_000, b"[]", b"null", b'{"sha": ' + b"9" * 5000 + b"}", {"sha": [COMMIT]},
        {"sha": 5}, {"sha": COMMIT.upper()}, {"siblings": "config.json"}, {"siblings": {"a": 1}},
        {"siblings": [1]}, {"siblings": [None]}, {"siblings": [{"rfilename": ["config.json"]}]},
        {"siblings": [{"rfilename": "a", "lfs": {"size": True, "sha256": "0" * 64}}]},
        {"siblings": [{"rfilename": "a", "lfs": {"size": 10**30, "sha256": "0" * 64}}]},
        {"siblings": [{"rfilename": "a", "lfs": {"size": 1, "sha256": "x" * 64}}]},
        {"siblings": [{"rfilename": "a", "lfs": [1]}]},
        {"siblings": [{"rfilename": "a", "size": -5, "blobId": "0" * 40}]},
        {"siblings": [{"rfilename": "a", "size": 1.5, "blobId": "0" * 40}]},
        {"siblings": [{"rfilename": "a", "size": 5, "blobId": {}}]},
    ],
)  # fmt: skip
def test_an_odd_listing_of_a_hub_is_one_error(hub, mirror, tmp_path, answer):
    if isinstance(answer, dict):
        answer = json.dumps({"sha": COMMIT, "siblings": [], **answer}).encode()
    mirror.contents[API] = answer
    with pytest.raises(UserError, match="like a Hugging Face hub") as caught:
        hub()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert names_in(tmp_path / "models") == []


@pytest.mark.parametrize("status", [200, 302, 401, 500])
def test_a_listing_without_an_end_is_not_read(hub, mirror, monkeypatch, status):
    monkeypatch.setattr(hub_module, "LISTING", 100_000)
    headers = ENDLESS | {"Location": "/other"}
    fault = {"status": status, "body": b"", "headers": headers, "endless": b"[" * 10_000}
    mirror.faults["main"] = [fault]
    with pytest.raises(UserError, match=r"sends more than 100,000 bytes|HF_ENDPOINT|HF_TOKEN"):
        hub()
    assert mirror.endless < SPARE


def test_a_file_of_the_hub_stops_at_the_size_that_the_hub_states(hub, mirror, tiny_hf):
    for name in ("vocab.json", "special_tokens_map.json"):  # the second has less than one piece
        size = len(tiny_hf[name])
        assert (size < 10_000) == (name != "vocab.json")
        mirror.faults[name] = [{"body": b"", "headers": ENDLESS, "endless": b"{" * 10_000}]
        with pytest.raises(UserError, match=f"{name} sends more than {size:,} bytes"):
            hub()
    assert mirror.endless < 2 * SPARE
    values = json.loads(mirror.contents[API])
    for file in values["siblings"]:
        if file["rfilename"] == "vocab.json":
            file["size"] = 10**12
    mirror.contents[API] = json.dumps(values).encode()
    with pytest.raises(UserError, match=r"states 1,000,000,000,000 bytes for vocab.json"):
        hub()


def test_offline_means_offline(hub, mirror, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        hub()
    assert mirror.asked == []


@pytest.mark.parametrize("name", [WEIGHTS, "vocab.json"])
def test_a_damaged_hub_file_is_not_kept(hub, mirror, tiny_hf, tmp_path, name):
    damaged = tiny_hf[name][:-1] + b"!"
    mirror.faults[name] = [{"body": damaged}, {"body": damaged}]
    with pytest.raises(UserError, match=f"{name}: its .* checksum differs from the hub"):
        hub()
    assert not (tmp_path / "models" / ".hf-me--tiny" / name).exists()


def test_another_kind_of_model_is_rejected_before_its_weights_are_fetched(hub, mirror, tiny_hf):
    values = json.loads(tiny_hf["config.json"]) | {"model_type": "llama"}
    publish(mirror, tiny_hf | {"config.json": json.dumps(values).encode()})
    with pytest.raises(UserError, match='model_type is "llama"'):
        hub()
    assert WEIGHTS not in [name for name, _, _ in mirror.asked]


def test_only_the_files_of_the_model_are_fetched(hub, mirror, tiny_hf, unconverted):
    more = dict.fromkeys(("README.md", "tf_model.h5", "onnx/model.safetensors", "x.py"), b"x")
    publish(mirror, tiny_hf | more | {"pytorch_model.bin": b"x"})
    hub()
    fetched = {name for name, _, _ in mirror.asked[1:]}
    assert fetched == set(tiny_hf)


def test_a_repository_without_usable_weights_lists_its_files(hub, mirror, tiny_hf):
    publish(mirror, {"config.json": tiny_hf["config.json"], "model.gguf": b"x"})
    with pytest.raises(UserError, match=r"no weights .*it contains config\.json, model\.gguf"):
        hub()
    publish(mirror, {"model.safetensors": b"x"})
    with pytest.raises(UserError, match=r"no config\.json"):
        hub()


def test_pytorch_weights_without_pytorch_are_rejected_before_the_download(
    hub, mirror, tiny_hf, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torch", None)
    files = {name: content for name, content in tiny_hf.items() if name != WEIGHTS}
    publish(mirror, files | {"pytorch_model.bin": b"x"})
    with pytest.raises(UserError, match="bin/install torch"):
        hub()
    assert "pytorch_model.bin" not in [name for name, _, _ in mirror.asked]


def test_an_existing_folder_of_that_name_is_never_touched(hub, mirror, tmp_path):
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "hparams.json").write_text("my own")
    with pytest.raises(UserError, match="exists, but was not downloaded from hf:me/tiny"):
        hub()
    assert mirror.asked == [] and names_in(folder) == ["hparams.json"]
