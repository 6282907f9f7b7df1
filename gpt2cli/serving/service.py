"""What `serve` does with a request, whichever way it came: the model, its queue, answers.

The loop of asyncio only waits; vocabulary and model work in threads.
"""

import asyncio
import contextlib
import hmac
import json
import sys
import threading
import time
import uuid

import prometheus_client

from gpt2cli.errors import UserError
from gpt2cli.options import new_seed
from gpt2cli.serving import api as completions
from gpt2cli.serving import scheduler
from gpt2cli.serving.api import Refused
from gpt2cli.storage import folders


class Metrics:
    """What /metrics tells, in Prometheus' form."""

    def __init__(self, service):
        self.registry = registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=registry)
        self.requests = prometheus_client.Counter(
            "gpt2cli_requests", "requests answered", ["route", "status"], registry=registry
        )
        self.prompt_tokens = prometheus_client.Counter(
            "gpt2cli_prompt_tokens", "tokens of prompts", registry=registry
        )
        self.generated = prometheus_client.Counter(
            "gpt2cli_generated_tokens", "tokens of samples", registry=registry
        )
        self.first = prometheus_client.Histogram(
            "gpt2cli_first_token_seconds",
            "time from a request to its first token",
            buckets=(0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100),
            registry=registry,
        )

        def number(name, text, value):
            prometheus_client.Gauge(name, text, registry=registry).set_function(value)

        number("gpt2cli_samples_running", "samples in the batch", lambda: service.counts()[0])
        number("gpt2cli_samples_waiting", "samples in the queue", lambda: service.counts()[1])


class Service:
    """The model that is served, and what everybody who asks shares.

    Args:
        config: ServeOptions.
        load: function that gives an inference.LanguageModel, ready, and the name of its checkpoint.
        leave: function that has the server end.
    """

    def __init__(self, config, load, leave):
        self.config, self._load, self._leave = config, load, leave
        self.name = config.run_name or config.model_name or folders.DEFAULT_MODEL
        self.loop = None  # of asyncio, once it runs
        self.model, self.checkpoint, self.failure = None, None, None
        self.began = int(time.time())
        self.scheduler = scheduler.Scheduler(config.max_batch, config.max_queue)
        self.metrics = Metrics(self)
        self._loading = threading.Lock()
        self._again = False
        self._prepared = 0  # samples whose prompts are encoded, not yet in the queue
        self._scores = asyncio.Semaphore(1)  # logits of a whole prompt: hundreds of megabytes

    def counts(self):
        """Samples that run, and that wait."""
        return self.scheduler.counts()

    def described(self):
        """The model as the API lists it."""
        return {"id": self.name, "object": "model", "created": self.began, "owned_by": "gpt2cli"}

    def load(self, again=False):
        """Load the model, or the newest one instead of that which is there; in any thread."""
        self._again = again
        while self._loading.acquire(blocking=False):
            try:
                self._again = False
                self.model, self.checkpoint = self._load()
                _say(f"{self.checkpoint} is served")
            except Exception as error:
                if self.model is None:
                    self.failure = error
                    self._leave()
                    return
                _say(f"gpt2cli: {error}. {self.checkpoint} is served on")
            finally:
                self._loading.release()
            if not self._again:  # who asked meanwhile found the lock held, and means a newer one
                return

    def ready(self):
        """The model; Refused while there is none."""
        if not self.scheduler.is_alive():
            raise Refused(503, "the server has failed; its log says why", code="failure")
        if self.model is None:
            raise Refused(
                503, "the model is being loaded", code="loading", headers={"retry-after": "2"}
            )
        return self.model

    def check_key(self, given):
        """Refuse who does not know the key."""
        key = self.config.api_key
        if key and not hmac.compare_digest(given.encode("utf-8", "replace"), key.encode()):
            raise Refused(
                401,
                "this server wants its key: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    async def begin(self, request, streams):
        """The Answer to a CompletionRequest, which has a place in the queue; or Refused.

        May be cancelled while it is prepared, which takes no more than --max_time either.
        """
        model, config = self.ready(), self.config
        if request.model not in (None, self.name):
            raise Refused(
                404,
                f"the model {request.model:.100} is not here; this server has {self.name}",
                "model",
                "model_not_found",
            )
        prompts = request.prompts()
        count, most = len(prompts) * request.n, min(config.max_n, self._places())
        if count > most:
            message = f"{len(prompts)} prompts x n {request.n} are more samples than a request may"
            raise Refused(400, f"{message} have here, {most}", "n")
        longest = config.max_tokens or model.config.n_ctx
        if request.max_tokens > longest:
            message = f"max_tokens {request.max_tokens} is more than this server's {longest}"
            raise Refused(400, message, "max_tokens")
        if sum(self.counts()) + self._prepared + count > self._places():
            raise self._full(1)
        self._prepared += count
        try:
            work = self._prepare(model, request, prompts, streams)
            answer = await asyncio.wait_for(work, config.max_time)
        except asyncio.TimeoutError:  # noqa: UP041, in Python 3.10 it is not the builtin one
            raise self.late() from None
        finally:
            self._prepared -= count
        if request.max_tokens:
            try:
                self.scheduler.submit(answer.job)
            except scheduler.Full as full:
                raise self._full(full.seconds) from None
        self.metrics.prompt_tokens.inc(answer.prompt_tokens)
        return answer

    async def _prepare(self, model, request, prompts, streams):
        """The Answer, its prompts encoded and, for echo with logprobs, looked at."""
        answer = await asyncio.to_thread(Answer, self, model, request, prompts, streams)
        if request.echo and request.logprobs is not None:
            for row in answer.rows[:: request.n]:
                prompt = row.tokens[: row.prompt_length]
                async with self._scores:
                    try:
                        found = await asyncio.to_thread(model.logprobs, prompt)
                    except UserError as error:
                        raise completions.refused(error, "prompt") from None
                answer.scores.append(found)
        return answer

    def _places(self):
        """Samples that may run or wait."""
        return self.config.max_batch + self.config.max_queue

    def _full(self, seconds):
        return Refused(
            503,
            f"{sum(self.counts())} samples are at work or wait; try again later",
            code="queue_full",
            headers={"retry-after": str(seconds)},
        )

    def late(self):
        """The refusal of what took too long."""
        return Refused(504, f"not done within {self.config.max_time:g} seconds", code="timeout")


class Answer:
    """What is known of a request that is being answered.

    Args:
        service: the Service.
        model: the inference.LanguageModel that answers, whatever is loaded meanwhile.
        request: CompletionRequest.
        prompts: its prompts.
        streams: tell of the text while it grows.

    Raises:
        Refused: a prompt cannot be continued.
    """

    def __init__(self, service, model, request, prompts, streams):
        self.service, self.model, self.request = service, model, request
        self.id, self.created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self.asked = time.monotonic()
        settings = request.settings()
        seed = new_seed() if request.seed is None else request.seed % 2**63
        most = service.config.max_prompt or model.config.n_ctx
        self.rows = []
        for prompt in prompts:
            try:
                ids = model.check_prompt(prompt)
                if len(ids) > most:
                    raise Refused(
                        400,
                        f"the prompt has {len(ids)} tokens, and this server takes up to {most}",
                        "prompt",
                        "context_length_exceeded",
                    )
                self.rows += [
                    model.begin(index, prompt, settings, seed, ids) for index in range(request.n)
                ]
            except UserError as error:
                raise completions.refused(error, "prompt") from None
        self.prompt_tokens = sum(row.prompt_length for row in self.rows[:: request.n])
        self._closed = False
        self.scores = []  # of each prompt what Model.logprobs says, for echo with logprobs
        self._loop, self._news = service.loop, asyncio.Queue()
        self.job = scheduler.Job(model, self.rows, self._tell, service.config.max_time, streams)
        shown = [self._prompt_text(row.text.prompt) for row in self.rows]
        # of each text the decoder and the place of the next token of which logprobs are told
        self._streams = [None if request.echo else model.encoder.stream() for _ in shown]
        self._places = [0 if request.echo else len(text) for text in shown]
        self.echoes = shown if request.echo else [""] * len(shown)

    def _prompt_text(self, prompt):
        if prompt is None or isinstance(prompt, str):
            return prompt or ""
        return self.model.encoder.decode(prompt)

    def _tell(self, pieces):
        with contextlib.suppress(RuntimeError):  # the server has left
            self._loop.call_soon_threadsafe(self._news.put_nowait, pieces)

    async def pieces(self):
        """The Pieces of all texts, as they come; Refused where it broke off."""
        left = len(self.rows) if self.request.max_tokens else 0
        while left:
            for piece in await self._news.get():
                if piece.error == "timeout":
                    raise self.service.late()
                if piece.error:
                    raise Refused(500, "the server failed; its log says why", code="failure")
                left -= piece.done
                yield piece

    def logprobs(self, number, begin, end):
        """The logprobs object of tokens of a text; the first time with its prompt's, for echo."""
        if self.request.logprobs is None:
            return None
        row = self.rows[number]
        tokens = row.continuation[begin:end]
        found = list(zip(row.logprobs, row.likeliest, strict=False))[begin:end]
        if self.scores and self._streams[number] is None:
            begin = row.prompt_length - self._told_length(number)
            tokens = row.tokens[begin : row.prompt_length] + tokens
            found = self.scores[number // self.request.n][begin:] + found
        self._streams[number] = self._streams[number] or self.model.encoder.stream()
        made, self._places[number] = completions.logprobs_object(
            *(self.model.encoder, tokens, found, self.request.logprobs),
            *(self._streams[number], self._places[number]),
        )
        return made

    def _told_length(self, number):
        """Tokens of a prompt, without those that the model puts before every text."""
        row = self.rows[number]
        prompt = row.text.prompt
        if prompt is None or isinstance(prompt, str):
            return len(self.model.encoder.encode(prompt or ""))
        return row.prompt_length

    def reason(self, number):
        """Why a text ended."""
        if not self.request.max_tokens:
            return "length"
        return self.model.sample(self.rows[number], 0).finish_reason

    def generated(self):
        """Tokens generated so far."""
        return sum(row.generated for row in self.rows)

    def as_json(self, choices, **more):
        """The object that carries choices."""
        if self.request.stream_options.get("include_usage"):
            more = {"usage": None} | more
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.service.name,
            "choices": choices,
            **more,
        }

    def usage(self):
        """The usage object."""
        return completions.usage(self.prompt_tokens, self.generated())

    async def whole(self):
        """The texts, once all are done."""
        async for _ in self.pieces():
            pass
        return self.as_json(
            [
                completions.choice(
                    number,
                    self.echoes[number] + row.text.so_far * bool(self.request.max_tokens),
                    self.reason(number),
                    self.logprobs(number, 0, row.generated),
                )
                for number, row in enumerate(self.rows)
            ],
            usage=self.usage(),
        )

    async def events(self):
        """Server-sent events, the last of which is [DONE]."""
        try:
            for number, echo in enumerate(self.echoes):
                if echo or not self.request.max_tokens:
                    reason = None if self.request.max_tokens else "length"
                    found = self.logprobs(number, 0, 0)
                    yield _event(self.as_json([completions.choice(number, echo, reason, found)]))
            async for piece in self.pieces():
                if not (piece.text or piece.done) and self.request.logprobs is None:
                    continue
                number = piece.number
                reason = self.reason(number) if piece.done else None
                found = self.logprobs(number, piece.begin, piece.end)
                choice = completions.choice(number, piece.text, reason, found)
                yield _event(self.as_json([choice]))
            if self.request.stream_options.get("include_usage"):
                yield _event(self.as_json([], usage=self.usage()))
            yield "data: [DONE]\n\n"
        except Refused as error:
            yield _event(error.as_json())
        finally:
            self.close()

    def close(self):
        """Free the places, whoever went away, and count; any more calls do nothing."""
        if self._closed:
            return
        self._closed = True
        if self.job.first:
            self.service.metrics.first.observe(self.job.first - self.asked)
        self.service.metrics.generated.inc(self.generated())
        self.service.scheduler.cancel(self.job)


def _event(value):
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _say(text):
    print(text, file=sys.stderr, flush=True)
