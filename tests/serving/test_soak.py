"""`serve` under thousands of mixed requests: slow readers, cancelled streams, noise, reloads."""

import collections
import concurrent.futures
import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from conftest import ROOT
from test_serve import get_status, serving, wait_until

KEY = "sesame"
LOADED = "serving model.ckpt"
RELOADS = 8  # after each 250 requests; the memory of two models settles after a few
JSON = "Content-Type: application/json\r\n"
FORM = "Content-Type: application/x-www-form-urlencoded\r\n"
BEARER = f"Authorization: Bearer {KEY}\r\n"


class Client:
    """Sends one request of a random kind; each kind knows the status it must get.

    Args:
        port: of the server.
        seed: chooses the kind and the texts.
    """

    def __init__(self, port, seed):
        self.port, self.random = port, random.Random(seed)

    def request(self, method, path, headers="", body="", length=None):
        """Return the bytes of a request."""
        length = len(body.encode()) if length is None else length
        sized = f"Content-Length: {length}\r\n" if body or length else ""
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        return f"{head}{headers}{sized}\r\n{body}".encode()

    def completion(self, more="", headers=JSON + BEARER):
        """Return the bytes of a request for a completion."""
        count, seed = self.random.randrange(1, 40), self.random.randrange(1000)
        body = f'{{"prompt": "The import", "max_tokens": {count}, "seed": {seed}{more}}}'
        return self.request("POST", "/v1/completions", headers, body)

    def kinds(self):
        """Return the kinds: name -> (bytes, the status to get, how to read the response)."""
        stream, large = ', "stream": true', ', "user": "' + "x" * 300_000 + '"'
        smuggled = JSON + BEARER + "Transfer-Encoding: chunked\r\n"
        return {
            "completion": (self.completion(), 200, "whole"),
            "samples": (self.completion(', "n": 3, "logprobs": 2, "echo": true'), 200, "whole"),
            "stream": (self.completion(stream), 200, "whole"),
            "slow reader": (self.completion(stream), 200, "slow"),
            "cancelled stream": (self.completion(stream), 200, "begin"),
            "cancelled": (self.completion(), None, "leave"),
            "half a body": (self.completion()[:-9], None, "leave"),
            "half a head": (self.completion()[:60], None, "leave"),
            "large body": (self.completion(large), 200, "whole"),
            "no key": (self.completion(headers=JSON), 401, "whole"),
            "wrong field": (self.completion(', "top_p": 2'), 400, "whole"),
            "no JSON": (self.request("POST", "/v1/completions", JSON + BEARER, "{"), 400, "whole"),
            "no type": (self.completion(headers=BEARER), 415, "whole"),
            "too large": (
                self.request("POST", "/v1/completions", JSON + BEARER, length=10**9),
                413,
                "whole",
            ),
            "too long": (self.completion(f', "stop": "{"x" * 2000}"'), 400, "whole"),
            "other page": (self.completion(headers=JSON + "Origin: http://x\r\n"), 401, "whole"),
            "smuggled": (self.completion(headers=smuggled), 400, "whole"),
            "noise": (self.random.randbytes(50) + b"\r\n\r\n", 400, "whole"),
            "page": (self.request("GET", "/"), 200, "whole"),
            "script": (self.request("GET", "/static/app.js"), 200, "whole"),
            "form": (
                self.request("POST", "/", FORM, f"seed=a&max_tokens=3&key={KEY}"),
                200,
                "whole",
            ),
            "metrics": (self.request("GET", "/metrics", BEARER), 200, "whole"),
            "chat": (self.request("POST", "/v1/chat/completions", JSON, "{}"), 404, "whole"),
        }

    def run(self):
        """Send a request; return its kind, the status it must get, and the one it got."""
        name, (sent, status, manner) = self.random.choice(list(self.kinds().items()))
        with socket.create_connection(("127.0.0.1", self.port), timeout=120) as connection:
            connection.sendall(sent)
            if manner == "leave":
                return name, status, None
            found = connection.recv(100)
            try:
                while manner != "begin" and (piece := connection.recv(65536)):
                    found += piece
                    time.sleep(0.01 if manner == "slow" else 0)
            except ConnectionResetError:  # the server closed before it had read everything
                pass
        if b"event-stream" in found and manner != "begin":
            assert found.rstrip().endswith(b"data: [DONE]\n\n\r\n0"), name
        code = re.match(rb"HTTP/1\.1 (\d+)", found)
        return name, status, code and int(code[1])


def hammer(port, numbers):
    """Send a request for each number, twelve at a time; return how many of each kind."""
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda number: Client(port, number).run(), numbers))
    wrong = collections.Counter(one for one in found if one[1] != one[2])
    assert not wrong
    return collections.Counter(name for name, *_ in found)


def test_mixed_requests_get_what_they_ask_for(tiny, caplog):
    with serving(tiny, api_key=KEY, max_queue=500, max_idle=5) as (address, made):
        port = int(address.rpartition(":")[2])
        before = len(os.listdir("/proc/self/fd"))
        assert len(hammer(port, range(150))) == len(Client(port, 0).kinds())
        wait_until(lambda: made.counts() == (0, 0))
        wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)
    assert "Traceback" not in caplog.text


@contextlib.contextmanager
def started(*words, files=4096):
    """Run the command with a limit of open files; yield the process and its port."""
    command = [sys.executable, "-m", "gpt2cli", "serve", "--model_name", "tiny", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GPT2CLI_API_KEY": KEY}
    limited = ["bash", "-c", f'ulimit -n {files}; exec "$@"', "-", *command, *words]
    with open("log", "w") as log:
        one = subprocess.Popen(limited, env=environment, stderr=log)
    try:
        wait_until(lambda: LOADED in Path("log").read_text())
        yield one, int(re.search(r"http://127.0.0.1:(\d+)", Path("log").read_text())[1])
    finally:
        one.kill()
        one.wait()


@pytest.mark.slow
def test_five_thousand_requests_leave_nothing_behind(workdir):
    """Run the command; print its memory after each 250 requests."""
    with started("--max_queue", "500") as (one, port):
        files, kinds, memory = set(), collections.Counter(), []
        for part in range(20):
            kinds += hammer(port, range(250 * part, 250 * (part + 1)))
            wait_until(lambda: is_idle(port))
            memory.append(resident(one.pid))
            files.add(len(os.listdir(f"/proc/{one.pid}/fd")))
            print(f"{250 * (part + 1)} requests: {memory[-1]:.1f} MB, open files {files}")
            if part < RELOADS:
                one.send_signal(signal.SIGHUP)
                wait_until(lambda n=part + 2: Path("log").read_text().count(LOADED) == n)
        print(dict(kinds))
        assert sum(kinds.values()) == 5000 and len(kinds) == len(Client(port, 0).kinds())
        settled = memory[RELOADS + 1 :]
        assert max(settled) < min(settled[:3]) + 10, memory
        assert max(files) - min(files) <= 1, files  # one for a client that is still leaving
        headers = {"authorization": f"Bearer {KEY}"}
        sent = {"prompt": "The", "max_tokens": 5, "temperature": 0}
        url = f"http://127.0.0.1:{port}/v1/completions"
        assert httpx.post(url, json=sent, headers=headers).status_code == 200
        one.terminate()
        assert one.wait(60) == 0
    text = Path("log").read_text()
    assert "Traceback" not in text and KEY not in text
    assert len(text.splitlines()) < 5200


def is_idle(port):
    """Return whether no sample is running or waiting."""
    state = httpx.get(f"http://127.0.0.1:{port}/health").json()
    return state["running"] == state["waiting"] == 0


def resident(process):
    """Return the memory of a process in megabytes."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1000


@pytest.mark.slow
def test_the_server_survives_more_connections_than_open_files(workdir):
    with started(files=64) as (_, port):
        assert "--max_connections is lowered from 1000 to 32" in Path("log").read_text()
        held = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
        wait_until(lambda: "32 connections are open" in Path("log").read_text())
        time.sleep(3)  # asyncio tries again every second
        for one in held:
            one.close()
        wait_until(lambda: get_status(f"http://127.0.0.1:{port}/health") == 200)
    text = Path("log").read_text()
    assert "Traceback" not in text and text.count("Too many open files") <= 1
    assert len(text.splitlines()) < 300
