"""`serve`: OpenAI's client, the page as a form, limits, failures and signals."""

import concurrent.futures
import contextlib
import dataclasses
import errno
import gc
import html
import http.client
import json
import logging
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import httpx
import numpy as np
import openai
import oracle
import pytest
from conftest import ROOT, compiled
from pydantic import ValidationError

from gpt2cli.commands.serve import ServeOptions
from gpt2cli.errors import UserError
from gpt2cli.inference import generator
from gpt2cli.options import GenerateOptions
from gpt2cli.serving import connections, scheduler, service
from gpt2cli.serving.answer import token_text
from gpt2cli.serving.api import CompletionRequest, RequestError, openapi_document
from gpt2cli.serving.routes import make_app
from gpt2cli.text import encoder

SECRET = "Nobody may read this in the log"


@contextlib.contextmanager
def serving(model, load=None, **settings):
    """Serve a Model in this process; yields the address and the Service."""
    config = ServeOptions(model_name="tiny", port=0, **settings)
    made = service.Service(config, load or (lambda: (model, "model.ckpt")), lambda: None)
    served = connections.make_server(make_app(made), config)
    listener = socket.create_server(("127.0.0.1", 0), backlog=2000)
    thread = threading.Thread(target=served.run, kwargs={"sockets": [listener]})
    thread.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        wait_until(lambda: served.started and (load or made.model))
        yield address, made
    finally:
        served.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def wait_until(is_so, seconds=300):
    """Wait until a function returns something true; return that."""
    until = time.monotonic() + seconds
    while not (found := is_so()):
        assert time.monotonic() < until, f"still false after {seconds} seconds"
        time.sleep(0.02)
    return found


@pytest.fixture
def log(caplog):
    """The log of the servers in this process; only the command itself prints it."""
    caplog.set_level(logging.INFO, logger="gpt2cli")
    return caplog


@pytest.fixture(scope="module")
def served(tiny):
    with serving(tiny, max_idle=2, max_tokens=400) as (address, made):
        yield address, made


@pytest.fixture
def address(served):
    yield served[0]
    wait_until(lambda: served[1].counts() == (0, 0))  # a test leaves nothing behind


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def slow_down(made, monkeypatch):
    """Make a step take as long as a large model's, and no text end before its length."""
    monkeypatch.setattr(made.model.encoder, "ends", ())
    report = made.scheduler._report

    def slowly(grown):
        time.sleep(0.05)
        report(grown)

    monkeypatch.setattr(made.scheduler, "_report", slowly)


def complete(address, **fields):
    return httpx.post(f"{address}/v1/completions", json=fields, timeout=60)


def test_a_completion_equals_the_librarys_own_text(tiny, client):
    prompts, settings = ["The import", "x = ", ""], dict(temperature=0.9, top_p=0.9)
    found = client.completions.create(
        model="tiny",
        prompt=prompts,
        max_tokens=30,
        n=2,
        seed=5,
        extra_body={"top_k": 30},
        **settings,
    )
    choices, generated = iter(found.choices), 0
    # generate() numbers samples over all prompts, the API over those of one prompt
    for prompt in prompts:
        for sample in tiny.generate(prompt, length=30, nsamples=2, seed=5, top_k=30, **settings):
            choice = next(choices)
            assert choice.text == sample.text
            assert choice.finish_reason == {"end": "stop"}.get(
                sample.finish_reason, sample.finish_reason
            )
            generated += len(sample.tokens)
    assert [choice.index for choice in found.choices] == list(range(6))
    count = sum(len(tiny.check_prompt(prompt)) for prompt in prompts)
    assert found.usage.prompt_tokens == count and found.usage.completion_tokens == generated


def test_token_ids_defaults_and_stops(tiny, client):
    ids = tiny.encoder.encode("The import")
    (text,) = client.completions.create(model="tiny", prompt=ids, seed=1).choices
    assert text.text == tiny.generate([ids], length=16, seed=1)[0].text
    both = client.completions.create(model="tiny", prompt=[ids, ids[:1]], seed=1).choices
    assert both[0].text == text.text and len(both) == 2
    words = dict(model="tiny", prompt="The", max_tokens=300, seed=2, temperature=0.8)
    (stopped,) = client.completions.create(stop=["\n\n", "."], **words).choices
    assert stopped.finish_reason == "stop" and not re.search(r"\n\n|\.", stopped.text)
    (greedy,) = client.completions.create(model="tiny", prompt="a", temperature=0).choices
    assert greedy.text == tiny.generate("a", length=16, temperature=0)[0].text
    for top_p in (0, 1e-9):
        (nearly,) = client.completions.create(model="tiny", prompt="a", seed=3, top_p=top_p).choices
        assert nearly.text == greedy.text
    (free,) = client.completions.create(model="tiny", prompt="a", seed=3, top_p=1).choices
    assert free.text != greedy.text


@pytest.mark.parametrize("stop", [None, ["the", "\n\n"]])
def test_the_pieces_of_a_stream_add_up_to_the_whole_response(client, stop):
    words = dict(model="tiny", prompt=["The import", "def"], max_tokens=40, n=2, seed=3, stop=stop)
    whole = client.completions.create(**words, logprobs=1, echo=True)
    options = {"include_usage": True}
    texts, tokens, reasons, usage = [""] * 4, [[] for _ in range(4)], [None] * 4, None
    pieces = 0
    stream = client.completions.create(
        **words, logprobs=1, echo=True, stream=True, stream_options=options
    )
    for event in stream:
        usage = event.usage or usage
        for choice in event.choices:
            pieces += 1
            texts[choice.index] += choice.text
            tokens[choice.index] += zip(
                choice.logprobs.tokens,
                choice.logprobs.token_logprobs,
                choice.logprobs.text_offset,
                strict=True,
            )
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage and pieces > 8
    for found, choice in zip(tokens, whole.choices, strict=True):
        logprobs = choice.logprobs
        expected = zip(logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset, strict=True)
        assert found == list(expected)


@pytest.mark.parametrize("fields", [{"seed": 20}, {"seed": 6, "stop": ["the ", " a", "\n"]}])
def test_a_stream_has_all_logprobs_when_a_character_is_split_or_text_is_held_back(address, fields):
    fields = {"prompt": "xé", "max_tokens": 60, "logprobs": 1, "temperature": 1.8, **fields}
    (whole,) = complete(address, **fields).json()["choices"]
    found = {"tokens": [], "text_offset": [], "token_logprobs": []}
    for event in complete(address, **fields, stream=True).text.split("\n\n"):
        if event.startswith("data: {"):
            (choice,) = json.loads(event[6:])["choices"]
            for name, values in found.items():
                values += choice["logprobs"][name]
    assert found == {name: whole["logprobs"][name] for name in found}
    assert any(token.startswith("bytes:") for token in found["tokens"]) or "stop" in fields


def test_the_echo_of_an_empty_prompt_has_no_token(client):
    words = dict(model="tiny", prompt="", max_tokens=2, logprobs=1, echo=True, seed=1)
    (choice,) = client.completions.create(**words).choices
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset[0] == 0 and choice.logprobs.token_logprobs[0] is not None


def test_logprobs_are_the_models_own(tiny, client):
    words = dict(model="tiny", prompt="The import", max_tokens=12, seed=4, logprobs=3, echo=True)
    (choice,) = client.completions.create(**words).choices
    found = choice.logprobs
    ids = tiny.encoder.encode("The import")
    ids += tiny.generate("The import", length=12, seed=4)[0].tokens
    assert "".join(found.tokens) == choice.text
    assert [choice.text[at:] for at in found.text_offset[:2]] == [choice.text, choice.text[3:]]
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    expected = oracle.log_softmax(tiny.logits(ids).astype(np.float64))
    for place in range(1, len(ids)):
        own = expected[place - 1]
        assert found.token_logprobs[place] == pytest.approx(own[ids[place]], abs=1e-3)
        best = {tiny.encoder.decode([t]) for t in np.argsort(-own)[:3]}
        assert set(found.top_logprobs[place]) == best | {found.tokens[place]}
    # evaluation harnesses score the prompt alone
    (scored,) = client.completions.create(**words | {"max_tokens": 0}).choices
    assert scored.text == "The import" and scored.logprobs.tokens == ["The", " import"]
    (plain,) = client.completions.create(**words | {"echo": False, "logprobs": 0}).choices
    assert plain.logprobs.top_logprobs is None
    assert plain.logprobs.token_logprobs == pytest.approx(found.token_logprobs[2:], abs=1e-4)
    assert plain.logprobs.text_offset[0] == len("The import")


def test_a_token_that_is_not_utf_8_is_shown_as_bytes(tiny):
    half = next(i for i in range(tiny.encoder.n_vocab) if tiny.encoder.decode([i]) == "\ufffd")
    raw = tiny.encoder.bytes_of([half])
    assert token_text(tiny.encoder, half) == "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def test_special_decides_whether_a_prompt_contains_a_token(tiny, address):
    text = "One<|endoftext|>two"
    for fields, special in (
        ({}, False),
        ({"special": "text"}, False),
        ({"special": "token"}, True),
    ):
        ids = tiny.check_prompt(text, special)
        assert (tiny.encoder.end in ids) == special
        settings = dict(temperature=0, max_tokens=8, echo=True, logprobs=0)
        found = complete(address, prompt=text, **settings, **fields).json()
        (choice,) = found["choices"]
        expected = tiny.generate([ids], length=8, temperature=0)[0].text
        assert choice["text"] == text + expected
        assert found["usage"]["prompt_tokens"] == len(ids)
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        shown = complete(address, prompt=ids, temperature=0, max_tokens=8).json()["choices"][0]
        assert shown["text"] == expected
    error = complete(address, prompt=text, special="yes").json()["error"]
    assert error["param"] == "special" and "'token' or 'text'" in error["message"]


def test_a_prompt_that_was_cut_is_marked_in_its_choices(tiny):
    long = [5] * 260
    with serving(tiny, max_prompt=300) as (address, _):
        fields = dict(prompt=[long, [5, 6]], max_tokens=3, seed=1)
        first, second = complete(address, **fields).json()["choices"]
        assert first["prompt_cut"] == 4 and "prompt_cut" not in second
        events = complete(address, **fields, stream=True).text.split("\n\n")
        choices = [json.loads(e[6:])["choices"][0] for e in events if e.startswith("data: {")]
        assert {(c["index"], c.get("prompt_cut")) for c in choices} == {(0, 4), (1, None)}
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            found = client.completions.create(model="tiny", **fields).choices
            assert found[0].prompt_cut == 4 and found[0].text == first["text"]
        unread = complete(address, prompt=long, max_tokens=0, echo=True).json()["choices"]
        assert "prompt_cut" not in unread[0]
        text = "word and " * 90
        cut = len(tiny.encoder.encode(text)) - 256
        page = httpx.post(address, data={"seed": text, "max_tokens": "3"}, timeout=60).text
        assert cut > 0 and f"The model did not see the first {cut} tokens of the text." in page
    schema = openapi_document()["components"]["schemas"]["Choice"]
    assert "prompt_cut" in schema["properties"] and "prompt_cut" not in schema["required"]


def test_a_typed_start_token_is_echoed_but_comes_once(network, tmp_path):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] + [chr(0x4E00 + n) for n in range(93)]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    model = generator.LanguageModel(compiled("lite", network), encoder.load(tmp_path))
    settings = dict(max_tokens=3, temperature=0, echo=True, logprobs=0)
    with serving(model) as (address, _):
        plain = complete(address, prompt="一丁", **settings).json()
        typed = complete(address, prompt="[CLS]一丁", **settings).json()
    assert typed["usage"] == plain["usage"] and plain["usage"]["prompt_tokens"] == 3
    (plain,), (typed,) = plain["choices"], typed["choices"]
    assert typed["text"] == f"[CLS]{plain['text']}"
    assert typed["logprobs"]["tokens"] == plain["logprobs"]["tokens"]
    offsets = plain["logprobs"]["text_offset"]
    assert typed["logprobs"]["text_offset"] == [5 + offset for offset in offsets]


WRONG = [
    (b"{", None),
    (b"[1]", None),
    (b"\xff", None),
    (b'{"temperature": NaN}', None),
    (b"[" * 100_000, None),
    (b'{"prompt": 7}', "prompt"),
    (b'{"prompt": []}', "prompt"),
    (b'{"prompt": [[1], []]}', "prompt"),
    (b'{"prompt": [99999999]}', "prompt"),
    (b'{"prompt": [-1]}', "prompt"),
    (b'{"prompt": ["a", 1]}', "prompt"),
    (b'{"max_tokens": "many"}', "max_tokens"),
    (b'{"max_tokens": 0}', "max_tokens"),
    (b'{"max_tokens": 401}', "max_tokens"),
    (b'{"max_tokens": 1e99}', "max_tokens"),
    (b'{"n": 0}', "n"),
    (b'{"n": 17}', "n"),
    (b'{"n": 9, "prompt": ["a", "b"]}', "n"),
    (b'{"temperature": -0.1}', "temperature"),
    (b'{"top_p": 1.1}', "top_p"),
    (b'{"top_p": "x"}', "top_p"),
    (b'{"seed": 1.5}', "seed"),
    (b'{"seed": "5"}', "seed"),
    (b'{"top_k": 5.0}', "top_k"),
    (b'{"n": true}', "n"),
    (b'{"temperature": "1"}', "temperature"),
    (b'{"temperature": true}', "temperature"),
    (b'{"prompt": [true]}', "prompt"),
    (b'{"user": 5}', "user"),
    (b'{"stop": [""]}', "stop"),
    (b'{"stop": {"a": 1}}', "stop"),
    (b'{"stop": {}}', "stop"),
    (b'{"stop": "' + b"x" * 1001 + b'"}', "stop"),
    (b'{"temperature": 1' + b"0" * 400 + b"}", "temperature"),
    (b'{"stream_options": []}', "stream_options"),
    (b'{"logprobs": 6}', "logprobs"),
    (b'{"echo": 1}', "echo"),
    (b'{"stream": "yes"}', "stream"),
    (b'{"stream_options": {"x": 1}}', "stream_options"),
    (b'{"stream_options": {"include_usage": true}}', "stream_options"),
    (b'{"repetition_penalty": 0}', "repetition_penalty"),
    (b'{"min_length": 20}', "min_length"),
    (b'{"presence_penalty": 0.5}', "presence_penalty"),
    (b'{"logit_bias": {"5": 1}}', "logit_bias"),
    (b'{"suffix": "x"}', "suffix"),
    (b'{"best_of": 2}', "best_of"),
    (b'{"messages": []}', "messages"),
    (b'{"messages": null}', "messages"),
]


@pytest.mark.parametrize("body, param", WRONG, ids=lambda value: str(value)[:40])
def test_an_error_names_the_wrong_field(address, body, param):
    headers = {"content-type": "application/json"}
    found = httpx.post(f"{address}/v1/completions", content=body, headers=headers)
    error = found.json()["error"]
    assert found.status_code == 400 and error["param"] == param, error
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 600
    assert param is None or re.search(rf"\b{param}\b", error["message"]) or param == "prompt"


def test_null_means_the_default_and_an_integer_is_a_number(address):
    wanted = CompletionRequest.parse(b'{"max_tokens": null, "stop": null, "temperature": 0}')
    assert wanted == CompletionRequest(temperature=0.0)
    nothing = dict.fromkeys(CompletionRequest.model_fields)
    assert complete(address, **nothing).json()["usage"]["completion_tokens"] <= 16


def test_a_long_list_with_wrong_items_makes_one_error():
    for prompt in (["a"] + [1] * 2000, [1] + ["a"] * 200_000, [[1]] * 3000):
        with pytest.raises(RequestError, match="prompt must be") as caught:
            CompletionRequest.parse(json.dumps({"prompt": prompt}).encode())
        assert caught.value.param == "prompt" and len(str(caught.value)) < 300
    with pytest.raises(ValidationError) as found:
        CompletionRequest.model_validate({"prompt": ["a"] + [1] * 2000})
    assert found.value.error_count() < 10  # one for each type that a prompt may have


def test_errors_have_openais_form(address, client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="x")
    assert caught.value.code == "model_not_found" and "tiny" in str(caught.value)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="tiny", messages=[])
    assert httpx.get(f"{address}/v1/completions").status_code == 405
    posted = httpx.post(f"{address}/v1/completions", content="{}")
    assert posted.status_code == 415 and "application/json" in posted.json()["error"]["message"]
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_only_a_prompt_longer_than_n_ctx_is_rejected(tiny, address):
    n_ctx = tiny.config.n_ctx
    found = complete(address, prompt=[1] * (n_ctx + 1))
    assert found.status_code == 400
    error = found.json()["error"]
    assert error["code"] == "context_length_exceeded" and str(n_ctx) in error["message"]
    # gpt-2-flask-api crashed from 514 tokens on: prompt and text had to fit the window
    found = complete(address, prompt=[1] * n_ctx, max_tokens=100, seed=1).json()
    expected = tiny.generate([[1] * n_ctx], length=100, seed=1)
    assert found["choices"][0]["text"] == expected[0].text


@pytest.mark.parametrize("count", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_the_same_seed_gives_the_same_text_on_a_busy_server(tiny, address, count):
    """More requests than places, of many lengths; each text equals the one generated alone."""
    random = np.random.default_rng(1)
    asked = [
        {
            "prompt": random.integers(0, 2000, random.integers(1, 60)).tolist(),
            "max_tokens": int(random.integers(1, 90)),
            "seed": number,
            "temperature": float(random.choice([0, 0.7, 1.0])),
            "top_k": int(random.choice([0, 40])),
            "min_length": int(random.choice([0, 1])),
        }
        for number in range(count)
    ]
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        found = list(pool.map(lambda fields: complete(address, **fields).json(), asked))
    for fields, answer in zip(asked, found, strict=True):
        names = ("seed", "temperature", "top_k", "min_length")
        settings = {name: fields[name] for name in names}
        (alone,) = tiny.generate([fields["prompt"]], length=fields["max_tokens"], **settings)
        assert answer["choices"][0]["text"] == alone.text
        assert answer["usage"]["completion_tokens"] == len(alone.tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_frees_its_place(served, stream, monkeypatch):
    address, made = served
    slow_down(made, monkeypatch)
    port = int(address.rpartition(":")[2])
    body = json.dumps({"prompt": "x", "max_tokens": 400, "n": 16, "stream": stream})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
        before = made.metrics.registry.get_sample_value(GENERATED)
        wait_until(lambda: made.counts()[0] == 16)
        time.sleep(0.2)
    wait_until(lambda: made.counts() == (0, 0))
    wait_until(lambda: before < made.metrics.registry.get_sample_value(GENERATED) < before + 3000)


GENERATED = "gpt2cli_generated_tokens_total"


def test_a_client_that_disconnects_before_the_response_costs_nothing(tiny, served, monkeypatch):
    """A prompt is scored before it enters the queue."""
    address, made = served
    port, calls, real = int(address.rpartition(":")[2]), [], tiny.logprobs

    def slowly(tokens):
        calls.append(1)
        time.sleep(0.05)
        return real(tokens)

    monkeypatch.setattr(tiny, "logprobs", slowly)
    fields = {"prompt": ["a"] * 16, "max_tokens": 0, "echo": True, "logprobs": 1}
    body = json.dumps(fields).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for _ in range(4):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            time.sleep(0.1)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head + b"Content-Length: 100\r\n\r\n{")
    begun = len(calls)
    assert complete(address, prompt="x", max_tokens=3).status_code == 200
    time.sleep(0.3)
    assert len(calls) <= begun + 1 < 4 * 16
    many = [complete(address, **{**fields, "prompt": "a"}).status_code for _ in range(2)]
    assert many == [200, 200]


def test_health_models_metrics_and_documents(address):
    assert httpx.get(f"{address}/health").json()["status"] == "ok"
    complete(address, prompt="x", max_tokens=5)
    text = httpx.get(f"{address}/metrics").text
    assert 'gpt2cli_requests_total{route="/v1/completions",status="200"}' in text
    for name in ("first_token_seconds_bucket", "generated_tokens", "samples_running"):
        assert f"gpt2cli_{name}" in text
    document = httpx.get(f"{address}/openapi.json").json()
    body = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]
    assert body["application/json"]["schema"]["$ref"] == "#/components/schemas/CompletionRequest"
    fields = document["components"]["schemas"]["CompletionRequest"]["properties"]
    operations = [way for route in document["paths"].values() for way in route.values()]
    names = ["createCompletion", "listModels", "retrieveModel", "getHealth"]
    assert [operation["operationId"] for operation in operations] == names
    assert {"Completion", "Choice", "Usage", "Error"} <= set(document["components"]["schemas"])
    assert fields["max_tokens"]["default"] == 16 and fields["top_p"]["maximum"] == 1
    docs = httpx.get(f"{address}/docs").text
    assert all(f"<code>{name}</code>" in docs for name in fields)


def test_the_page_works_as_a_form_and_escapes_html(tiny, address):
    page = httpx.get(address)
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "http" not in re.sub(r"<!doctype.*?>", "", page.text)  # nothing from other sites
    for name in re.findall(r'(?:src|href)="(static/[^"]+)"', page.text):
        assert httpx.get(f"{address}/{name}").status_code == 200
    text = '\n<script>alert(1)</script> "&\r\nx'
    sent = {"seed": text, "random_seed": "3", "max_tokens": "20", "n": "2"}
    shown = httpx.post(address, data=sent, timeout=60).text
    assert "<script>alert" not in shown
    plain = text.replace("\r\n", "\n")
    assert html.unescape(shown).count(f'<span class="prompt">{plain}</span>') == 2
    assert f"autofocus>\n{html.escape(plain)}</textarea>" in shown.replace("&#34;", "&quot;")
    settings = dict(length=20, temperature=0.7, top_k=40, seed=3, nsamples=2)
    for sample in tiny.generate(plain, **settings):
        assert f'<span class="new">{sample.text}</span>' in html.unescape(shown)


def test_a_form_of_gpt_2_flask_api_is_answered(tiny, address):
    """It has one field. An error shows a sentence and keeps the typed text."""
    found = httpx.post(address, data={"seed": "The", "submit": "Enter"}, timeout=60)
    assert found.status_code == 200 and '<span class="prompt">The</span>' in found.text
    assert len(re.findall(r'<span class="new">', found.text)) == 1
    for data, status, said in (
        ({"submit": "Enter"}, 400, "seed"),
        ({"seed": "x", "words": "50"}, 400, "unknown field words; the fields are seed, max_tokens"),
        ({"seed": "x", "n": "many"}, 400, "n must be a valid integer"),
        ({"seed": "x" * 5, "max_tokens": "500"}, 400, "max_tokens 500"),
    ):
        found = httpx.post(address, data=data)
        assert found.status_code == status and said in html.unescape(found.text)
    assert f">\n{'x' * 5}</textarea>" in found.text
    for elsewhere in ({"sec-fetch-site": "cross-site"}, {"origin": "http://elsewhere"}):
        assert httpx.post(address, data={"seed": "x"}, headers=elsewhere).status_code == 403
    for here in ({"sec-fetch-site": "same-origin"}, {"origin": address}):
        assert httpx.post(address, data={"seed": "x"}, headers=here, timeout=60).is_success
    assert httpx.post(address, content=b"seed=%ff").status_code == 400
    assert httpx.post(address, data={str(n): "" for n in range(60)}).status_code == 400


def test_each_limit_has_its_own_status(tiny, log, monkeypatch):
    limits = dict(max_batch=2, max_queue=1, max_n=3, max_body=1000, max_idle=1)
    limits |= dict(api_key="sesame", max_prompt=5, log_prompts=True)
    with serving(tiny, **limits) as (address, made):
        key = {"authorization": "Bearer sesame"}

        def post(headers=key, **fields):
            url = f"{address}/v1/completions"
            return httpx.post(url, json=fields, headers=headers, timeout=60)

        for headers in ({}, {"authorization": "Bearer open"}, {"authorization": "sesame"}):
            found = post(headers, prompt="x")
            assert found.status_code == 401 and found.headers["www-authenticate"] == "Bearer"
        for path in ("/metrics", "/v1/models", "/v1/models/tiny"):
            assert httpx.get(f"{address}{path}").status_code == 401
            assert httpx.get(f"{address}{path}", headers=key).status_code == 200
        assert 'name="key"' in httpx.get(address).text
        found = post(prompt="x", n=4)
        assert found.status_code == 400 and found.json()["error"]["param"] == "n"
        form = {"seed": "x", "max_tokens": "5"}
        assert httpx.post(address, data=form).status_code == 401
        assert httpx.post(address, data=form | {"key": "sesame"}).status_code == 200
        assert post(prompt="x" * 2000).status_code == 413
        assert post(prompt=[1] * 6).json()["error"]["code"] == "context_length_exceeded"

        late = {**key, "content-type": "application/json", "content-length": "900"}
        found = raw(address, "POST", "/v1/completions", late, b"{")
        assert found.status == 408
        found = raw(address, "POST", "/v1/completions", {**late, "content-length": "x"}, b"")
        assert found.status == 400
        chunked = {**key, "content-type": "application/json", "transfer-encoding": "chunked"}
        found = raw(
            address, "POST", "/v1/completions", chunked, b"3e9\r\n" + b"x" * 1001 + b"\r\n0\r\n\r\n"
        )
        assert found.status == 413

        long = dict(prompt=SECRET[:6], max_tokens=tiny.config.n_ctx)
        slow_down(made, monkeypatch)
        made.options = dataclasses.replace(made.options, max_time=1)
        go_on, report = threading.Event(), made.scheduler._report
        held = lambda grown: go_on.wait(60) and report(grown)  # noqa: E731
        monkeypatch.setattr(made.scheduler, "_report", held)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            first = pool.submit(post, **long, n=3)
            wait_until(lambda: made.counts() == (2, 1))
            full = post(prompt="x")
            go_on.set()
            assert full.status_code == 503 and int(full.headers["retry-after"]) > 0
            error = full.json()["error"]
            assert error["code"] == "queue_full"
            assert "no room for 1 more sample: 2 running and 1 waiting" in error["message"]
            assert first.result().status_code == 504
        events = post(**long, stream=True).text.strip().split("\n\n")
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        wait_until(lambda: made.counts() == (0, 0))
    assert repr(SECRET[:6]) in log.text


def raw(address, method, path, headers, body):
    """Send a request that no client library would send; return the response."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    connection.putrequest(method, path)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    connection.send(body)
    return connection.getresponse()


def test_the_log_contains_no_prompt(served, address, log):
    complete(address, prompt=SECRET, max_tokens=3, min_length=3)
    complete(address, prompt=SECRET, temperature=-1)
    httpx.post(address, data={"seed": SECRET})
    forged = {"x-forwarded-for": "6.6.6.6 \x1b[31m"}
    httpx.get(f"{address}/nothing", headers=forged)
    wait_until(lambda: "GET '/nothing' 404" in log.text)
    assert "6.6.6.6" not in log.text and SECRET not in log.text
    assert "POST '/v1/completions' 200" in log.text and "+3 tokens" in log.text


def test_a_client_that_does_not_read_is_disconnected(served):
    address, made = served
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as connection:
        connection.settimeout(0.5)
        found = None
        try:
            for _ in range(20_000):  # a hundred megabytes of responses, more than buffers hold
                connection.sendall(b"GET /docs HTTP/1.1\r\nHost: localhost\r\n\r\n")
        except ConnectionError as error:  # the server did not wait for all of them
            found = error.errno
        except TimeoutError:
            pass
        reset = (socket.SOL_SOCKET, socket.SO_ERROR)
        assert found or wait_until(lambda: connection.getsockopt(*reset)) == errno.ECONNRESET
    assert get_status(f"{address}/health") == 200


def test_silent_clients_are_disconnected(served):
    address, made = served
    port = int(address.rpartition(":")[2])
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]
    for connection, said in zip(
        connections[2:], (b"G", b"GET / HTTP/1.1\r\nX: ", b"\0" * 9), strict=False
    ):
        connection.sendall(said)
    began = time.monotonic()
    while time.monotonic() - began < 1.5:  # a byte now and then does not count as a request
        connections[0].sendall(b"G")
        time.sleep(0.3)
    for connection in connections:
        connection.settimeout(20)
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(1000):
                pass
        connection.close()
    wait_until(lambda: httpx.get(f"{address}/health").status_code == 200)


def test_the_page_requests_no_more_tokens_than_the_server_allows(tiny):
    with serving(tiny, max_tokens=20) as (address, _):
        assert 'min="1" required value="20"' in httpx.get(address).text
        assert httpx.post(address, data={"seed": "x"}, timeout=60).status_code == 200


def test_connections_over_the_limit_get_a_503(tiny):
    with serving(tiny, max_connections=3) as (address, _):
        port = int(address.rpartition(":")[2])
        held = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            found = connection.makefile().read()
        assert found.startswith("HTTP/1.1 503") and "retry-after: 1" in found
        for connection in held:
            connection.close()
        wait_until(lambda: get_status(f"{address}/health") == 200)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_dropped_connections_and_noise_do_no_harm(served, count):
    """No connection stays open, no response is a 500, and the server keeps serving."""
    address, made = served
    port = int(address.rpartition(":")[2])
    random = np.random.default_rng(2)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(count):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            if number % 3 == 1:
                noise = random.bytes(int(random.integers(1, 300)))
                begin = (b"", b"POST /v1/completions HTTP/1.1\r\n", b"GET /")[number % 9 // 3]
                with contextlib.suppress(OSError):
                    connection.sendall(begin + noise)
            if number % 30 == 1:
                connection.settimeout(0.3)
                with contextlib.suppress(OSError):
                    assert b" 500 " not in connection.recv(100)
    assert complete(address, prompt="x", max_tokens=3).status_code == 200
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before + 5)


def test_after_a_failed_step_the_next_request_succeeds(tiny, log, monkeypatch):
    with serving(tiny) as (address, made):
        real = scheduler.Generation.step
        monkeypatch.setattr(scheduler.Generation, "step", lambda *_: 1 / 0)
        found = complete(address, prompt="x")
        assert found.status_code == 500 and "ZeroDivisionError" not in found.text
        monkeypatch.setattr(scheduler.Generation, "step", real)
        assert complete(address, prompt="x").status_code == 200
    assert "ZeroDivisionError" in log.text


def test_requests_get_a_503_while_the_model_loads(tiny):
    loaded = threading.Event()

    def load():
        loaded.wait(30)
        return tiny, "model.ckpt"

    with serving(tiny, load) as (address, made):
        for found in (httpx.get(f"{address}/health"), complete(address, prompt="x")):
            assert found.status_code == 503 and found.headers["retry-after"]
        assert httpx.get(address).status_code == 200
        loaded.set()
        wait_until(lambda: httpx.get(f"{address}/health").status_code == 200)


def test_a_newer_model_is_loaded_while_requests_are_running(tiny, network, monkeypatch):
    real, go_on = scheduler.Generation.step, threading.Event()

    def step(batch, limit):
        """Let the first model's texts wait after their first step."""
        waits = batch.engine is tiny.network and any(row.generated for row in batch.live())
        return real(batch, limit) if not waits or go_on.wait(0.01) else []

    monkeypatch.setattr(scheduler.Generation, "step", step)
    other = generator.LanguageModel(compiled("lite", network), tiny.encoder)
    models = iter([(tiny, "model-1"), (other, "model-2")])

    def load():
        found = next(models, None)
        if found is None:
            raise UserError("no third one")
        return found

    with serving(tiny, load, max_tokens=2000) as (address, made):
        wait_until(lambda: made.model is tiny)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(complete, address, prompt="The", max_tokens=200, seed=1)
            wait_until(lambda: made.counts()[0] == 1)
            made.load(again=True)
            fresh = complete(address, prompt=[5, 6], max_tokens=9, seed=1).json()
            assert not running.done()
            go_on.set()
            text = running.result().json()["choices"][0]["text"]
        assert text == tiny.generate("The", length=200, seed=1)[0].text
        expected = other.generate([5, 6], length=9, seed=1)[0]
        assert fresh["choices"][0]["text"] == expected.text
        made.load(again=True)
        assert made.checkpoint == "model-2"
        assert (
            complete(address, prompt=[5, 6], max_tokens=9, seed=1).json()["choices"]
            == fresh["choices"]
        )


@pytest.mark.slow
def test_requests_generated_from_the_openapi_document(address):
    pytest.importorskip("schemathesis", reason="pip install -e .[browser]")
    program = Path(sys.executable).with_name("schemathesis")
    words = ["run", f"{address}/openapi.json", "--checks", CHECKS, "--seed", 1]
    words += ["--max-examples", 150, "--request-timeout", 60, "--no-color"]
    command = [str(word) for word in (program, *words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-5000:]


CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance,negative_data_rejection,unsupported_method"
)


@pytest.mark.slow  # XLA compiles for 15 seconds
def test_the_xla_engine_serves_too(tiny, network):
    model = generator.LanguageModel(compiled("graph", network), tiny.encoder)
    model.warm(4)
    with serving(model, max_batch=4, max_tokens=99) as (address, made):
        asked = [
            dict(prompt=[5] * (n + 1), max_tokens=4 * n + 1, seed=n, temperature=0, logprobs=2)
            for n in range(9)
        ]
        with concurrent.futures.ThreadPoolExecutor(9) as pool:
            found = list(pool.map(lambda fields: complete(address, **fields).json(), asked))
    for fields, answer in zip(asked, found, strict=True):
        (alone,) = model.generate([fields["prompt"]], length=fields["max_tokens"], temperature=0)
        assert answer["choices"][0]["text"] == alone.text


def test_a_replaced_model_is_freed(tiny, network, monkeypatch):
    seen = []

    def load():
        model = generator.LanguageModel(compiled("lite", network), tiny.encoder)
        seen.append(weakref.ref(model))
        return model, f"model-{len(seen)}"

    gc.collect()
    gc.disable()  # freeing must not depend on it
    try:
        with serving(tiny, load) as (address, made):
            wait_until(lambda: made.model)
            slow_down(made, monkeypatch)
            for _ in range(3):
                for stream in (False, True):
                    assert complete(address, prompt=[5], max_tokens=5, stream=stream).is_success
                with pytest.raises(httpx.ReadTimeout):  # a client that disconnects
                    wanted = {"prompt": [5], "max_tokens": 20}
                    httpx.post(f"{address}/v1/completions", json=wanted, timeout=0.1)
                wait_until(lambda: made.counts() == (0, 0))
                made.load(again=True)
            wait_until(lambda: [one() is None for one in seen] == [True, True, True, False])
    finally:
        gc.enable()


@pytest.mark.parametrize("count", [50, pytest.param(300, marks=pytest.mark.slow)])
def test_cancelling_a_request_changes_no_other_text(network, count):
    """Cancelled from another thread, as when a client disconnects."""
    model = generator.LanguageModel(compiled("lite", network), None)
    settings = GenerateOptions(length=40)
    (alone,) = model.generate([5, 6], length=40, seed=1)
    made, found = scheduler.Scheduler(4, 10_000), queue.SimpleQueue()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for number in range(count):
            rows = [model.begin(n, [5] * (number % 20 + 1), settings, number) for n in range(2)]
            gone = scheduler.Job(model, rows, lambda pieces: None, 60)
            stays = model.begin(0, [5, 6], settings, 1)
            made.submit(gone)
            made.submit(scheduler.Job(model, [stays], lambda _, s=stays: found.put(s), 60))
            time.sleep(0.0003 * (number % 11))
            made.cancel(gone)
        rows = [found.get(timeout=60) for _ in range(count)]
    finally:
        sys.setswitchinterval(interval)
        made.close()
    assert all(row.continuation == alone.tokens for row in rows)


@pytest.fixture
def process(workdir):
    """Start `gpt2cli serve` as a user would; return the process and its address."""
    started = []

    def start(*words):
        command = [sys.executable, "-m", "gpt2cli", "serve", "--port", "0", *map(str, words)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        log = open(workdir / "log", "w")
        one = subprocess.Popen(command, env=environment, stderr=log, stdout=subprocess.PIPE)
        started.append(one)
        log.close()
        wait_until(lambda: one.poll() is not None or "http://" in Path("log").read_text())
        found = re.search(r"http://[\d.:]+", Path("log").read_text())
        return one, found and found[0]

    yield start
    for one in started:
        one.kill()
        one.wait()


def test_sighup_loads_a_new_checkpoint_and_sigterm_finishes_requests(process, workdir):
    run = workdir / "checkpoint" / "run1"
    shutil.copytree(workdir / "models" / "tiny", run)
    one, address = process("--run_name", "run1")
    wait_until(lambda: get_status(f"{address}/health") == 200)
    state = httpx.get(f"{address}/health").json()
    assert state["model"] == "run1" and state["checkpoint"] == "model.ckpt"
    for path in list(run.glob("model.ckpt*")):
        path.rename(run / path.name.replace("model.ckpt", "model-7"))
    one.send_signal(signal.SIGHUP)
    wait_until(lambda: httpx.get(f"{address}/health").json()["checkpoint"] == "model-7")
    with httpx.stream(
        *("POST", f"{address}/v1/completions"),
        json={"prompt": "x", "max_tokens": 256, "n": 4, "stream": True},
        timeout=60,
    ) as answer:
        pieces = answer.iter_text()
        next(pieces)
        one.send_signal(signal.SIGTERM)
        with pytest.raises(httpx.TransportError):
            for _ in range(200):
                time.sleep(0.05)
                httpx.get(f"{address}/health")
        assert "".join(pieces).endswith("data: [DONE]\n\n")
    assert one.wait(60) == 0 and one.stdout.read() == b""
    log = Path("log").read_text()
    assert "serving model.ckpt" in log and "SIGTERM" in log and "Traceback" not in log


@pytest.mark.skipif(not shutil.which("curl"), reason="the examples need curl")
@pytest.mark.parametrize("name", ["README.md", "docs/serving.md"])
def test_the_requests_of_the_documents_are_answered(served, address, capsys, name, monkeypatch):
    monkeypatch.setattr(served[1].model.encoder, "ends", ())  # no text ends by chance
    text = (ROOT / name).read_text(encoding="utf-8").replace("http://127.0.0.1:5000", address)
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", text, re.M | re.S)
    curls = [block for kind, block in blocks if kind == "sh" and "curl" in block]
    assert len(curls) == (1 if name == "README.md" else 4)
    for block in curls:
        block = block.replace("curl", "curl --fail --silent --show-error")
        done = subprocess.run(["bash", "-ec", block], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (block, done.stderr)
        if "/v1/completions" in block:
            assert json.loads(done.stdout)["choices"][0]["text"]
        if "seed=" in block:
            assert 'class="new"' in done.stdout
    for kind, block in blocks:
        if kind == "python" and "openai" in block:
            exec(compile(block.replace('model="books"', 'model="tiny"'), name, "exec"), {})
            assert len(capsys.readouterr().out) > 20


def get_status(url):
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url).status_code


def test_serve_reports_an_impossible_start_at_once(cli, workdir, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = cli("serve", "--model_name", "tiny", "--port", port)
    assert found.returncode == 1 and f"port {port}" in found.stderr and "--port" in found.stderr
    assert cli("serve", "--run_name", "none").returncode == 1
    assert cli("serve", "--model_name", "tiny", "--port", 99999).returncode == 2
    (workdir / "models" / "tiny" / "vocab.bpe").unlink()
    (workdir / "models" / "tiny" / "encoder.json").unlink()
    found = cli("serve", "--model_name", "tiny")
    assert found.returncode == 1 and "vocabulary" in found.stderr
    monkeypatch.setitem(sys.modules, "gpt2cli.serving.routes", None)
    monkeypatch.delattr("gpt2cli.serving.routes")
    found = cli("serve", "--model_name", "tiny")
    assert found.returncode == 1 and 'pip install ".[serve]"' in found.stderr
