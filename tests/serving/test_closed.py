"""`serve` fails closed: hosts, origins, framing, ids, large requests, open files, the key."""

import asyncio
import concurrent.futures
import contextlib
import json
import logging
import re
import resource
import socket
import threading

import httpx
import pytest
from test_serve import complete, serving, wait_until

from gpt2cli.commands import serve
from gpt2cli.commands.serve import ServeOptions
from gpt2cli.errors import UsageError, UserError
from gpt2cli.inference.generator import LanguageModel
from gpt2cli.serving import connections
from gpt2cli.serving.api import CompletionRequest
from gpt2cli.serving.sites import Sites

BODY = b'{"prompt": "a", "max_tokens": 1}'
JSON = b"Content-Type: application/json\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" + JSON
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST = HEALTH[:-2] + b"Connection: close\r\n\r\n"
HEADERS = ("content-security-policy", "x-content-type-options", "referrer-policy")


@pytest.fixture(scope="module")
def served(tiny):
    with serving(tiny, max_idle=2) as (address, made):
        yield address, made


@pytest.fixture
def address(served):
    yield served[0]
    wait_until(lambda: served[1].counts() == (0, 0))


@pytest.fixture(scope="module")
def web():
    """One client for many requests: making one takes longer than answering."""
    with httpx.Client(timeout=60) as client:
        yield client


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="gpt2cli")
    return caplog


def exchange(address, *parts):
    """Send bytes as they are; return all that the server sends until it closes the connection."""
    port = int(address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        found = b""
        with contextlib.suppress(ConnectionError):  # the server closes before it has read all
            for part in parts:
                connection.sendall(part)
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(65536):
                found += piece
        return found.decode("latin-1")


def statuses(text):
    return [int(status) for status in re.findall(r"HTTP/1\.1 (\d{3}) ", text)]


def ids(text):
    return re.findall(r"^x-request-id: (.*)\r$", text, re.M)


LOCAL = ["localhost", "LocalHost:1", "localhost.", "127.0.0.1:80", "127.9.9.9", "[::1]", "[::1]:5"]
LOCAL += ["[::ffff:127.0.0.1]", "localhost:", "127.0.0.1."]
OTHERS = ["evil.example", "evil.example:5000", "localhost.evil.example", "evil.example:localhost"]
OTHERS += ["evil@localhost", "localhost@evil", "[localhost]", "localhost, evil", "localhost.."]
OTHERS += ["2130706433", "0x7f.1", "127.1", "0177.0.0.1", "::1", "[::1%25lo]", "[[::1]]", "", ":80"]
OTHERS += ["192.168.1.5", "8.8.8.8", "0.0.0.0", "[::]", "localhost\xe9", "localhost:999999"]


def allows(header, listens="10.0.0.7", **settings):
    options = ServeOptions(model_name="tiny", **settings)
    try:
        Sites(options).check("GET", {"host": header}, listens)
    except Exception as error:
        assert error.status == 403 and "--allowed_hosts" in str(error)
        return False
    return True


def test_without_a_key_only_known_hosts_are_answered():
    assert [host for host in LOCAL if not allows(host)] == []
    assert [host for host in OTHERS if allows(host)] == []
    named = dict(allowed_hosts=("Books.example", "10.1.1.1", "[fe80::1]"))
    assert allows("books.EXAMPLE.:80", **named) and allows("10.1.1.1", **named)
    assert allows("[FE80:0::1]:9", **named) and not allows("www.books.example", **named)
    assert allows("mine.lan", host="mine.lan") and allows("10.0.0.7:5000", host="mine.lan")
    assert not allows("10.0.0.8", host="mine.lan")
    for every in ("0.0.0.0", "::"):  # a website can point a name here, but not an address
        assert allows("192.168.1.5", host=every) and allows(socket.gethostname(), host=every)
        assert allows(f"{socket.gethostname()}.local", host=every)
        assert not allows("evil.example", host=every)


def test_a_key_makes_every_host_known_unless_hosts_are_named():
    assert allows("books.example", api_key="sesame")
    named = dict(api_key="sesame", allowed_hosts=("books.example",))
    assert allows("books.example", **named) and not allows("evil.example", **named)


def test_every_route_rejects_unknown_hosts(web, address):
    for path in ("/", "/v1/models", "/docs", "/static/app.js", "/metrics", "/nothing"):
        found = web.get(f"{address}{path}", headers={"host": "evil.example"})
        assert found.status_code == 403
        assert "the host name evil.example" in found.json()["error"]["message"]
    old = "GET /v1/models HTTP/1.0\r\n%s\r\n"
    assert statuses(exchange(address, (old % "").encode())) == [403]
    assert statuses(exchange(address, (old % "Host: localhost\r\n").encode())) == [200]
    for double in ("evil.example", "localhost"):
        text = f"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: {double}\r\n\r\n"
        assert statuses(exchange(address, text.encode())) == [400]
    for target in ("http://evil.example/v1/models", "http://localhost/v1/models", "*"):
        text = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        assert statuses(exchange(address, text.encode())) == [404]


def test_a_load_balancer_may_ask_for_the_health_by_any_name(address):
    for head in ("GET /health HTTP/1.0\r\n", "HEAD /health HTTP/1.0\r\nHost: cluster_1\r\n"):
        assert statuses(exchange(address, f"{head}\r\n".encode())) == [200]


@pytest.mark.parametrize("flag", ["--allowed_hosts", "--allowed_origins"])
def test_an_invalid_host_or_origin_is_rejected_at_the_start(cli, flag):
    wrong = {
        "--allowed_hosts": (
            "http://books.example",
            "books.example:80",
            "*",
            "",
            "a b",
            "bücher.de",
        ),
        "--allowed_origins": (
            "books.example",
            "null",
            "https://books.example/",
            "",
            "http://a b",
            "http://b\xfccher.de",
        ),
    }
    for value in wrong[flag]:
        found = cli("serve", "--model_name", "tiny", flag, value)
        assert found.returncode == 2 and flag in found.stderr and "such as" in found.stderr


def test_every_origin_needs_a_key():
    options = ServeOptions(model_name="tiny", allowed_origins=("*",))
    with pytest.raises(UserError, match=r"\* needs an API key"):
        serve.with_key(options)


def test_a_page_from_elsewhere_cannot_generate(web, address, served):
    before = served[1].metrics.registry.get_sample_value("gpt2cli_generated_tokens_total")
    foreign = [{"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "https://a.b"}]
    foreign += [{"sec-fetch-site": site} for site in ("cross-site", "same-site")]
    for headers in foreign:
        for kind in ("application/json", "text/plain", "application/x-www-form-urlencoded"):
            for path, body in (("/v1/completions", BODY), ("/", b"seed=a&max_tokens=1")):
                sent = {**headers, "content-type": kind}
                found = web.post(f"{address}{path}", content=body, headers=sent)
                assert found.status_code == 403
                assert "--allowed_origins" in found.json()["error"]["message"]
        asks = {**headers, "access-control-request-method": "POST"}
        found = web.options(f"{address}/v1/completions", headers=asks)
        assert found.status_code in (403, 405)
        assert not [name for name in found.headers if name.startswith("access-control")]
    read = web.get(f"{address}/v1/models", headers=foreign[0])
    assert "access-control-allow-origin" not in read.headers
    after = served[1].metrics.registry.get_sample_value("gpt2cli_generated_tokens_total")
    assert before == after
    for headers in ({"origin": address}, {"sec-fetch-site": "same-origin"}, {}):
        sent = {**headers, "content-type": "application/json"}
        found = web.post(f"{address}/v1/completions", content=BODY, headers=sent)
        assert found.status_code == 200


def test_pages_of_allowed_origins_may_use_the_api(tiny):
    origins = ("https://Books.example:443", "http://other.example")
    asks = {"access-control-request-method": "POST"}
    asks |= {"access-control-request-headers": "authorization,x-stainless-os"}
    with serving(tiny, allowed_origins=origins) as (address, _):
        for origin in ("https://books.example", "http://other.example"):
            found = httpx.options(f"{address}/v1/completions", headers={"origin": origin, **asks})
            assert found.status_code == 200
            assert found.headers["access-control-allow-headers"].count("x-stainless-os")
            for body, status in ((BODY, 200), (b"{", 400)):
                headers = {"origin": origin, "content-type": "application/json"}
                url = f"{address}/v1/completions"
                found = httpx.post(url, content=body, headers=headers)
                assert found.status_code == status
                assert found.headers["access-control-allow-origin"] == origin
                assert "access-control-allow-credentials" not in found.headers
                assert "x-request-id" in found.headers["access-control-expose-headers"]
        for origin in ("null", "https://evil.example", "http://books.example"):
            found = httpx.options(f"{address}/v1/completions", headers={"origin": origin, **asks})
            assert found.status_code == 403
    with serving(tiny, allowed_origins=("*",), api_key="sesame") as (address, _):
        headers = {"origin": "null", "content-type": "application/json"}
        found = httpx.post(f"{address}/v1/completions", content=BODY, headers=headers)
        assert found.status_code == 401 and found.headers["access-control-allow-origin"] == "*"


def test_with_a_key_the_key_decides_and_no_page_may_read_the_answer(tiny):
    """Extensions and Electron send an Origin; behind a proxy, the page's own is not the Host."""
    with serving(tiny, api_key="sesame") as (address, _):
        for origin in ("chrome-extension://abc", "app://obsidian.md", "http://books.lan", "null"):
            for key, status in (("Bearer sesame", 200), ("Bearer x", 401)):
                sent = {"origin": origin, "authorization": key, "content-type": "application/json"}
                found = httpx.post(f"{address}/v1/completions", content=BODY, headers=sent)
                assert found.status_code == status
                assert not [name for name in found.headers if name.startswith("access-control")]
            found = httpx.post(address, data={"seed": "a"}, headers={"origin": origin})
            assert found.status_code == 401
        asks = {"origin": "http://books.lan", "access-control-request-method": "POST"}
        found = httpx.options(f"{address}/v1/completions", headers=asks)
        assert found.status_code == 405
        assert not [name for name in found.headers if name.startswith("access-control")]


def framed(*lines, body=BODY):
    return POST + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body


CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
LENGTH = b"Content-Length: %d" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked"
AMBIGUOUS = {
    "length and chunks": framed(LENGTH, CHUNKED, body=CHUNKS),
    "chunks and length": framed(CHUNKED, b"Content-Length: 6", body=b"0\r\n\r\n"),
    "chunks in 1.0": framed(CHUNKED, body=CHUNKS).replace(b"HTTP/1.1", b"HTTP/1.0"),
    "two lengths": framed(LENGTH, b"Content-Length: 3"),
    "signed length": framed(b"Content-Length: +29"),
    "long length": framed(b"Content-Length: " + b"9" * 5000),
    "twice chunked": framed(CHUNKED, CHUNKED, body=CHUNKS),
    "other coding": framed(b"Transfer-Encoding: gzip, chunked", body=CHUNKS),
    "space before the colon": framed(b"Transfer-Encoding : chunked", body=CHUNKS),
    "bad chunk": framed(CHUNKED, body=b"zz\r\n"),
    "bad chunk end": framed(CHUNKED, body=b"3\r\nabcXY0\r\n\r\n"),
    "NUL": framed(b"X: a\0b", LENGTH),
    "CR": framed(b"X: a\rb", LENGTH),
    "no HTTP": b"BAD\r\n\r\n",
    "TLS": bytes.fromhex("16030100a5010000a10303") + b"\0" * 100,
    "large head": framed(b"X: " + b"a" * 200_000),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_an_ambiguous_request_closes_the_connection(address, log, name):
    """What follows in the same connection is not read as a request: it may be smuggled."""
    text = exchange(address, AMBIGUOUS[name] + HEALTH)
    assert len(statuses(text)) == 1 and statuses(text)[0] in (400, 431, 501)
    assert '"error":' in text and "connection: close" in text.lower()
    wait_until(lambda: f"id {ids(text)[0]}" in log.text)
    assert "Traceback" not in log.text and "bytearray" not in text


def test_unusual_but_valid_requests_are_answered(address):
    for odd in (
        framed(LENGTH, LENGTH),
        framed(b"X: a", b" Transfer-Encoding: chunked", LENGTH),  # a folded line
        framed(b"Transfer-Encoding: CHUNKED", body=CHUNKS),
        POST.replace(b"\r\n", b"\n") + LENGTH + b"\n\n" + BODY,
        HEALTH[:-2] + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    ):
        assert statuses(exchange(address, odd + LAST)) == [200, 200]


def test_a_broken_body_after_an_early_response_is_not_a_failure(tiny, caplog):
    head = POST.replace(b"/v1/completions", b"/nothing") + CHUNKED + b"\r\n\r\n"
    with serving(tiny, max_idle=2) as (address, _):
        port = int(address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(head)
            answer = b""
            while not answer.endswith(b"}}"):  # the head and the body may come one after the other
                answer += connection.recv(65536) or pytest.fail(f"no whole answer: {answer}")
            assert b" 404 " in answer
            connection.sendall(b"zz\r\n")
            assert connection.recv(65536) == b""
        assert httpx.get(f"{address}/health").status_code == 200
    assert "Traceback" not in caplog.text and not caplog.records


def one_too_many(address, limit):
    """Open more connections than the limit; return what the last one gets."""
    with contextlib.ExitStack() as stack:
        port = int(address.rpartition(":")[2])
        held = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(limit + 4)]
        for one in held:
            stack.callback(one.close)
        return held[-1].makefile(newline="").read()


def test_each_response_has_an_id_that_is_also_in_the_log(tiny, log):
    with serving(tiny, max_idle=0.3, max_body=200, max_connections=8) as (address, made):
        answers = [
            httpx.get(f"{address}{path}")
            for path in ("/", "/docs", "/v1/models", "/static/app.js", "/static/no", "/nothing")
        ]
        sent = {"prompt": "a", "max_tokens": 2, "seed": 1}
        answers += [complete(address, **sent, stream=stream) for stream in (False, True)]
        answers += [complete(address, temperature=-1), complete(address, prompt="a" * 300)]
        answers += [httpx.get(f"{address}/", headers={"host": "evil"}), httpx.head(address)]
        answers += [httpx.request("DELETE", f"{address}/v1/completions")]
        answers += [httpx.post(f"{address}/v1/completions", content=b"x")]
        found = [(one.status_code, one.headers) for one in answers]
        texts = [
            exchange(address, framed(b"Content-Length: 50", body=b"{")),
            exchange(address, framed(CHUNKED, b"Content-Length: 1")),
            exchange(address, b"GET /health\r\n\r\n"),
        ]
        texts.append(wait_until(lambda: one_too_many(address, 8)))
        for text in texts:
            lines = [line.partition(": ") for line in text.partition("\r\n\r\n")[0].split("\r\n")]
            found.append((statuses(text)[0], {key.lower(): value for key, _, value in lines}))
        codes = [code for code, _ in found]
        assert {200, 400, 403, 404, 405, 408, 413, 415, 503} == set(codes)
        for code, headers in found:
            line = rf" {code} .*id {headers['x-request-id']}$"
            wait_until(lambda line=line: re.search(line, log.text, re.M))
            assert all(name in headers for name in HEADERS), code
        assert len({headers["x-request-id"] for _, headers in found}) == len(found)


def test_a_clients_own_id_is_kept_if_it_is_plain(web, address, log):
    def given(name):
        return web.get(f"{address}/docs", headers={"x-request-id": name}).headers["x-request-id"]

    for plain in ("a", "A-b_c.d:9", "x" * 64):
        assert given(plain) == plain
    for odd in ("", "x" * 65, "a b", "a\tb", 'a"', "\xe9", "a,b", "<b>"):
        assert re.fullmatch("[0-9a-f]{32}", given(odd.encode("latin-1")))
    assert "<b>" not in log.text


ELSEWHERE = ["chat/completions", "responses", "embeddings", "audio/speech", "messages", "images/a"]


def test_routes_for_other_kinds_of_models_name_the_route_to_use(web, address):
    for path in ELSEWHERE:
        for method in ("GET", "POST"):
            found = web.request(method, f"{address}/v1/{path}", json={"messages": []})
            error = found.json()["error"]
            assert found.status_code == 404 and error["type"] == "invalid_request_error"
            assert "base model" in error["message"]
            assert "POST /v1/completions" in error["message"]
    found = web.get(f"{address}/v1/completions")
    assert found.status_code == 405 and found.headers["allow"] == "POST"
    assert "accepts POST, not GET" in found.json()["error"]["message"]
    found = web.post(f"{address}/chat/completions", json={})
    assert found.status_code == 404 and "begin with /v1" in found.json()["error"]["message"]
    # a redirect would repeat the host that the client sent
    assert web.get(f"{address}/docs/").status_code == 404


HALF = "a lone surrogate"
ODD = [
    (b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
    (b'{"a":' * 150_000, "nested too deeply"),
    (b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", "prompt must be"),
    (b'{"max_tokens": ' + b"9" * 5000 + b"}", "5000 digits"),
    (b'{"max_tokens": ' + b"9" * 4000 + b"}", "max_tokens must be"),
    (b'{"temperature": NaN}', "NaN"),
    (b'{"temperature": 1e999}', "temperature must be"),
    (b'{"max_tokens": 1, "max_tokens": 2}', "the field max_tokens is given twice"),
    (b'{"stream_options": {"a": 1, "a": 1}}', "the field a is given twice"),
    (b'{"\\ud800": 1, "\\ud800": 2}', r"the field \ud800 is given twice"),
    (b'{"prompt": "a\\ud83d"}', HALF),
    (b'{"\\udfff": 1}', HALF),
    (b'{"model": "\\ud800"}', HALF),
    (b'{"\\u001b[31m\\u009b\\u007f": 1}', r"unknown field \x1b[31m\x9b\x7f"),
    (b'{"prompt": "\xff"}', "not valid JSON"),
    (b"\xef\xbb\xbf{}", "not valid JSON"),
    (b"", "not valid JSON"),
]


@pytest.mark.parametrize("body, said", ODD, ids=lambda value: str(value)[:30])
def test_invalid_json_gets_status_400(address, body, said):
    headers = {"content-type": "application/json"}
    found = httpx.post(f"{address}/v1/completions", content=body, headers=headers)
    error = found.json()["error"]
    assert found.status_code == 400 and said in error["message"], error
    assert "set_int_max_str_digits" not in error["message"]
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", error["message"] + str(error["param"]))


def test_a_whole_surrogate_pair_is_a_character(address):
    body = b'{"prompt": "\\ud83d\\ude00", "max_tokens": 1, "echo": true}'
    headers = {"content-type": "application/json"}
    found = httpx.post(f"{address}/v1/completions", content=body, headers=headers).json()
    assert found["choices"][0]["text"].startswith("\U0001f600")


def test_a_field_that_a_form_has_twice_is_rejected(address):
    headers = {"content-type": "application/x-www-form-urlencoded"}
    for body in (b"seed=a&seed=b", b"seed=a&n=1&n=2"):
        found = httpx.post(address, content=body, headers=headers)
        assert found.status_code == 400 and "is given twice" in found.text


LONG = {
    "spaces": " " * 900_000,
    "emoji": "\U0001f600" * 240_000,
    "unknown": "\U000e0001" * 240_000,
    "token ids": [1] * 300_000,
    "prompts": [""] * 150_000,
    "id lists": [[1]] * 150_000,
    "one of two": ["a", " " * 900_000],
}


@pytest.mark.parametrize("name", LONG)
def test_a_prompt_that_cannot_fit_is_rejected_before_it_is_encoded(
    tiny, address, monkeypatch, name
):
    assert tiny.longest_token == max(len(tiny.encoder.bytes_of([t])) for t in range(2048)) > 10
    encoded = []
    monkeypatch.setattr(LanguageModel, "check_prompt", lambda *_: encoded.append(1))
    body = json.dumps({"prompt": LONG[name], "max_tokens": 1}, ensure_ascii=False).encode()
    headers = {"content-type": "application/json"}
    found = httpx.post(f"{address}/v1/completions", content=body, headers=headers, timeout=60)
    error = found.json()["error"]
    assert found.status_code == 400 and error["param"] == "prompt" and not encoded
    if name == "spaces":
        assert "has 900,000 characters; this server accepts up to 256 tokens" in error["message"]


def test_large_bodies_do_not_hold_up_small_ones(address, monkeypatch):
    """Eight bodies of a megabyte that take forever to parse; then a small request is answered."""
    real, finish, begun = CompletionRequest.parse, threading.Event(), threading.Event()

    def parse(body):
        if len(body) > 900_000:
            begun.set()
            assert finish.wait(60)
        return real(body)

    monkeypatch.setattr(CompletionRequest, "parse", parse)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        large = [pool.submit(complete, address, prompt=" " * 950_000) for _ in range(8)]
        try:
            assert begun.wait(60)
            assert complete(address, prompt="a", max_tokens=1).status_code == 200
            assert not any(one.done() for one in large)
        finally:
            finish.set()
        assert {one.result().status_code for one in large} == {400}


def test_a_503_counts_the_samples_whose_prompts_are_being_encoded(tiny, monkeypatch):
    real, finish = LanguageModel.check_prompt, threading.Event()

    def check_prompt(*given):
        assert finish.wait(60)
        return real(*given)

    with serving(tiny, max_batch=2, max_queue=1) as (address, made):
        monkeypatch.setattr(LanguageModel, "check_prompt", check_prompt)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            first = pool.submit(complete, address, prompt="a", n=3, max_tokens=1, seed=1)
            wait_until(lambda: made.counts() == (0, 3))
            assert httpx.get(f"{address}/health").json()["waiting"] == 3
            found = complete(address, prompt="a", n=2)
            finish.set()
            assert first.result().status_code == 200
    assert found.status_code == 503 and int(found.headers["retry-after"]) > 0
    assert found.json()["error"]["message"] == (
        "no room for 2 more samples: 0 running and 3 waiting, and this server's limit is 3. "
        "Try again in 1 second"
    )


@pytest.mark.parametrize("key", [" ", "a b", "key\n", "\t", "schl\xfcssel"])
def test_a_key_that_no_header_can_carry_is_rejected(cli, monkeypatch, key):
    monkeypatch.setenv("GPT2CLI_API_KEY", key)
    found = cli("serve", "--model_name", "tiny", "--port", 0)
    assert found.returncode == 2 and "GPT2CLI_API_KEY must consist of" in found.stderr
    monkeypatch.delenv("GPT2CLI_API_KEY")
    with pytest.raises(UsageError, match="--api_key must consist of"):
        ServeOptions(model_name="tiny", api_key=key)


def test_an_empty_key_in_the_environment_is_rejected(cli, monkeypatch):
    monkeypatch.setenv("GPT2CLI_API_KEY", "")
    result = cli("serve", "--model_name", "tiny", "--port", 0)
    assert result.returncode == 1 and "GPT2CLI_API_KEY is set but empty" in result.stderr


def test_the_key_appears_nowhere(tiny, log):
    key = "sesame-open-1234"
    with serving(tiny, api_key=key, log_prompts=True) as (address, _):
        bearer = {"authorization": f"Bearer {key}"}
        texts = [httpx.get(f"{address}/health").text]  # without the key, as documented
        assert httpx.get(f"{address}/metrics").status_code == 401
        for path in (
            "/metrics",
            "/openapi.json",
            "/docs",
            "/",
            "/v1/models",
            "/nothing",
            "/health",
        ):
            texts.append(httpx.get(f"{address}{path}", headers=bearer).text)
        for wrong in ({"authorization": f"Basic {key}"}, {"authorization": f"Bearer {key}x"}):
            found = httpx.get(f"{address}/v1/models", headers=wrong)
            assert found.status_code == 401
            texts += [found.text, str(found.headers)]
        form = {"seed": "a", "key": key, "n": "none"}
        texts.append(httpx.post(address, data=form).text)
    assert not [text for text in texts if key in text] and key not in log.text


def limit(monkeypatch, soft, hard):
    """Give the process a limit of open files, as far as serve sees; return what it sets."""
    now = [soft, hard]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(now))
    monkeypatch.setattr(resource, "setrlimit", lambda _, given: now.__setitem__(slice(2), given))
    return now


def test_connections_fit_the_limit_of_open_files(monkeypatch):
    every = resource.RLIM_INFINITY
    for soft, hard, fits, then in (
        (every, every, 1000, every),
        (1024, 4096, 1000, 1128),
        (1024, every, 1000, 1128),
        (1024, 1024, 896, 1024),
        (256, 300, 172, 300),
        (64, 64, 32, 64),
        (1, 1, 1, 1),
    ):
        now = limit(monkeypatch, soft, hard)
        assert (serve.fit_connections(1000), now[0]) == (fits, then)


def test_lowered_connections_are_reported(monkeypatch, log):
    limit(monkeypatch, 300, 300)
    options = serve.fitted(ServeOptions(model_name="tiny"))
    assert options.max_connections == 172
    assert "--max_connections is lowered from 1000 to 172" in log.text and "ulimit -n" in log.text


def test_running_out_of_open_files_is_one_line(log):
    loop = asyncio.new_event_loop()
    others = []
    loop.default_exception_handler = others.append
    connections.report_exhaustion(loop)
    lack = {"message": "socket.accept() out of system resource"}
    lack |= {"exception": OSError(24, "Too many open files")}
    for _ in range(5000):
        loop.call_exception_handler(lack)
    loop.call_exception_handler({"message": "another"})
    loop.close()
    assert len(log.records) == 1 and "Too many open files: new connections wait" in log.text
    assert others == [{"message": "another"}]


def test_answers_need_no_open_file(address, monkeypatch):
    def none(*_, **__):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("builtins.open", none)
    monkeypatch.setattr("os.open", none)
    for path in ("/", "/docs", "/static/app.js", "/static/style.css", "/openapi.json"):
        assert statuses(exchange(address, LAST.replace(b"/health", path.encode()))) == [200]


def test_small_answers_are_sent_at_once():
    with serve.listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP  # else asyncio sets no TCP_NODELAY
