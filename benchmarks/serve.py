"""Measure `gpt2cli serve` under load, beside `sample --batch_size 16` on the same model.

    benchmarks/serve.py MODEL_FOLDER [--precision int8] [--clients 32] [--requests 2000]

Each client sends a request, reads the stream to its end, and sends the next. Prompts have 4 to 64
tokens and ask for 8 to 64, drawn once. `sample` gets the first eighth of the prompts and the mean
length, before and after. Twenty requests are repeated alone and must give the same text.
"""

import argparse
import concurrent.futures
import http.client
import json
import os
import queue
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
CLI = [sys.executable, "-m", "gpt2cli"]


def requests(count, n_vocab):
    """Yield request bodies: prompts of ids, lengths, seeds."""
    draw = random.Random(1)
    for number in range(count):
        prompt = [draw.randrange(n_vocab) for _ in range(draw.randint(4, 64))]
        body = {"prompt": prompt, "max_tokens": draw.randint(8, 64), "seed": number}
        yield body | {"min_length": body["max_tokens"], "stream": True}


def ask(connection, body):
    """Send one request; return (seconds to the first piece, tokens, text).

    Raises:
        RuntimeError: the response is an error.
    """
    began = time.monotonic()
    headers = {"Content-Type": "application/json"}
    options = {"include_usage": True}
    sent = json.dumps({**body, "stream_options": options})
    connection.request("POST", "/v1/completions", sent, headers)
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status} {answer.read(300)}")
    first, text, tokens = None, "", 0
    for line in answer:
        if not line.startswith(b"data: {"):
            continue
        first = first or time.monotonic() - began
        event = json.loads(line[6:])
        if "error" in event:
            raise RuntimeError(event)
        text += "".join(choice["text"] for choice in event["choices"])
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    return first, tokens, text


def clients(port, count, bodies):
    """Send all bodies from several clients; return the answers in order, and the seconds."""
    waiting, found = queue.SimpleQueue(), {}
    for pair in enumerate(bodies):
        waiting.put(pair)

    def work():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        while True:
            try:
                number, body = waiting.get_nowait()
            except queue.Empty:
                return
            found[number] = ask(connection, body)

    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(work) for _ in range(count)]:
            done.result()
    return [found[number] for number in range(len(bodies))], time.monotonic() - began


def memory(pid):
    """Return the resident memory of a process in megabytes."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


class Served:
    """A server that runs as long as the block.

    Raises:
        RuntimeError: it did not start within `limit` seconds; the text is its log.
    """

    def __init__(self, folder, *words, environment=ENVIRONMENT, limit=600):
        folder = folder.absolute()
        words = ["--models_dir", folder.parent, "--model_name", folder.name, *words]
        command = [*CLI, "serve", "--port", "0", *map(str, words)]
        self.process = subprocess.Popen(
            command,
            cwd=folder,  # Python would import gpt2cli from the current folder first
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        late = threading.Timer(limit, self.process.kill)
        late.start()
        try:
            self._wait()
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            late.cancel()
        # the server logs a line for each request, which must not fill the pipe
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def _wait(self):
        log = ""
        for line in self.process.stderr:
            log += line
            if found := re.search(r"http://127.0.0.1:(\d+)", line):
                self.port = int(found[1])
            if line.startswith("serving "):
                return
        raise RuntimeError(log)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()


def sampled(folder, bodies, precision, batch_size):
    """Return tokens/s of `sample --prompts` with the mean length, read from its last line."""
    length = round(sum(body["max_tokens"] for body in bodies) / len(bodies))
    with tempfile.TemporaryDirectory() as place:
        prompts = Path(place) / "prompts.jsonl"
        prompts.write_text("".join(json.dumps(body["prompt"]) + "\n" for body in bodies))
        words = ["--models_dir", folder.parent, "--model_name", folder.name, "--prompts", prompts]
        words += ["--length", length, "--min_length", length, "--batch_size", batch_size]
        words += ["--precision", precision, "--seed", 1]
        words += ["--format", "jsonl", "--out", Path(place) / "out.jsonl"]
        command = [*CLI, "sample", *map(str, words)]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    return float(re.search(r"([\d,.]+) tokens/s", done.stderr)[1].replace(",", ""))


def percentile(values, share):
    """Return the value below which this share of the values lies."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=16)
    flags = parser.parse_args()
    n_vocab = json.loads((flags.folder / "hparams.json").read_text())["n_vocab"]
    bodies = list(requests(flags.requests, n_vocab))
    some = bodies[: max(flags.batch_size, flags.requests // 8)]

    before = sampled(flags.folder, some, flags.precision, flags.batch_size)
    with Served(
        *(flags.folder, "--precision", flags.precision, "--max_batch", flags.batch_size)
    ) as served:
        sizes, done = [memory(served.process.pid)], threading.Event()

        def watch():
            while not done.wait(2):
                sizes.append(memory(served.process.pid))

        threading.Thread(target=watch, daemon=True).start()
        with concurrent.futures.ProcessPoolExecutor(1) as pool:
            answers, seconds = pool.submit(clients, served.port, flags.clients, bodies).result()
        done.set()
        alone = http.client.HTTPConnection("127.0.0.1", served.port)
        for number in range(0, len(bodies), max(1, len(bodies) // 20)):
            assert ask(alone, bodies[number])[2] == answers[number][2], f"request {number} differs"
    after = sampled(flags.folder, some, flags.precision, flags.batch_size)

    tokens = sum(count for _, count, _ in answers)
    assert tokens == sum(body["max_tokens"] for body in bodies)
    speed, firsts = tokens / seconds, [first for first, _, _ in answers]
    third = len(sizes) // 3
    report = {
        "requests": len(answers),
        "errors": 0,
        "tokens": tokens,
        "serve_tokens_per_second": round(speed, 1),
        "sample_tokens_per_second": [before, after],
        "ratio": round(speed / ((before + after) / 2), 3),
        "first_token_seconds": {p: round(percentile(firsts, p / 100), 3) for p in (50, 95, 99)},
        "memory_mb": {
            "start": round(sizes[0]),
            "first third": round(max(sizes[: third + 1])),
            "last third": round(max(sizes[-third - 1 :])),
        },
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
