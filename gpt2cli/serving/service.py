"""The model being served, its queue, and the answers to requests.

The event loop only waits; tokenization and the model run in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import json
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import prometheus_client

from gpt2cli import console
from gpt2cli.errors import UserError
from gpt2cli.inference.generator import LanguageModel
from gpt2cli.inference.rows import Row
from gpt2cli.inference.text import Prompt, prefix_text
from gpt2cli.options import new_seed
from gpt2cli.serving import api, scheduler
from gpt2cli.serving.api import CompletionRequest, RequestError
from gpt2cli.storage import folders
from gpt2cli.text.encoder import Encoder

if TYPE_CHECKING:
    from gpt2cli.commands.serve import ServeOptions

LOG = logging.getLogger(__name__)
LARGE = 20_000  # bytes of a request, or characters of its prompts: about 5 milliseconds of work
T = TypeVar("T")


class Metrics:
    """The numbers of /metrics, in Prometheus' form."""

    def __init__(self, service: Service) -> None:
        self.registry = registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=registry)
        counter = functools.partial(prometheus_client.Counter, registry=registry)
        self.requests = counter("gpt2cli_requests", "requests answered", ["route", "status"])
        self.prompt_tokens = counter("gpt2cli_prompt_tokens", "tokens of prompts")
        self.generated = counter("gpt2cli_generated_tokens", "tokens of samples")
        self.first = prometheus_client.Histogram(
            "gpt2cli_first_token_seconds",
            "time from a request to its first token",
            buckets=(0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100),
            registry=registry,
        )
        gauge = functools.partial(prometheus_client.Gauge, registry=registry)
        running = gauge("gpt2cli_samples_running", "samples in the batch")
        running.set_function(lambda: service.counts()[0])
        waiting = gauge("gpt2cli_samples_waiting", "samples in the queue")
        waiting.set_function(lambda: service.counts()[1])


class Service:
    """The model being served, and the state that all requests share.

    Args:
        options: the server's options.
        load: returns a warm LanguageModel and the name of its checkpoint.
        leave: stops the server.
    """

    def __init__(
        self,
        options: ServeOptions,
        load: Callable[[], tuple[LanguageModel, str]],
        leave: Callable[[], None],
    ) -> None:
        self.options, self._load, self._leave = options, load, leave
        self.name = options.run_name or options.model_name or folders.DEFAULT_MODEL
        self.loop: asyncio.AbstractEventLoop  # set when the server starts
        self.model: LanguageModel | None = None
        self.checkpoint = ""
        self.failure: Exception | None = None
        self.began = int(time.time())
        self.scheduler = scheduler.Scheduler(options.max_batch, options.max_queue)
        self.metrics = Metrics(self)
        self._loading = threading.Lock()
        self._again = False
        self._prepared = 0  # samples whose prompts are being encoded, not yet in the queue
        self._scores = asyncio.Semaphore(1)  # scoring a whole prompt takes hundreds of megabytes
        self._large = asyncio.Semaphore(1)  # see in_thread

    def counts(self) -> tuple[int, int]:
        """Return the number of samples running and waiting; those being encoded are waiting."""
        running, waiting = self.scheduler.counts()
        return running, waiting + self._prepared

    def described(self) -> api.Model:
        """Return the model as the API lists it."""
        return {"id": self.name, "object": "model", "created": self.began, "owned_by": "gpt2cli"}

    def load(self, again: bool = False) -> None:
        """Load the model, or replace it by the newest checkpoint; callable from any thread."""
        self._again = again
        while self._loading.acquire(blocking=False):
            try:
                self._again = False
                self.model, self.checkpoint = self._load()
                LOG.info("serving %s", self.checkpoint)
            except Exception as error:
                if self.model is None:
                    self.failure = error
                    self._leave()
                    return
                LOG.warning("%s. Still serving %s", error, self.checkpoint)
            finally:
                self._loading.release()
            if not self._again:  # a call that found the lock held wants a checkpoint newer still
                return

    def ready(self) -> LanguageModel:
        """Return the model; raises RequestError while there is none."""
        if not self.scheduler.is_alive():
            raise RequestError(503, "the server failed; see its log", code="failure")
        if self.model is None:
            headers = {"retry-after": "2"}
            raise RequestError(503, "the model is loading", code="loading", headers=headers)
        return self.model

    def check_key(self, given: str) -> None:
        """Raise RequestError unless this is the API key."""
        key = self.options.api_key
        if key and not hmac.compare_digest(given.encode("utf-8", "replace"), key.encode()):
            raise RequestError(
                401,
                "an API key is required; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    def check_model(self, name: str) -> None:
        """Raise RequestError unless this is the model being served."""
        if name != self.name:
            message = f"no model {name:.100} here; this server has {self.name}"
            raise RequestError(404, message, "model", "model_not_found")

    async def in_time(self, work: Coroutine[Any, Any, T]) -> T:
        """Return a coroutine's result; raises RequestError if it takes longer than --max_time."""
        try:
            return await asyncio.wait_for(work, self.options.max_time)
        except asyncio.TimeoutError:  # noqa: UP041, in Python 3.10 it is not the builtin one
            raise self.late() from None

    async def in_thread(self, size: int, function: Callable[..., T], *values: Any) -> T:
        """Call a function in a thread, so that the server can answer others; return its result.

        Python runs one thread at a time. Large requests wait for each other, so that small ones
        get their turn.

        Args:
            size: characters, bytes or tokens to read.
            function: what to call.
            values: its arguments.
        """
        async with self._large if size > LARGE else contextlib.nullcontext():
            return await asyncio.to_thread(function, *values)

    async def begin(self, request: CompletionRequest, streams: bool) -> Answer:
        """Put a request into the queue and return its Answer.

        It may be cancelled while prompts are prepared, and --max_time limits that as well.

        Raises:
            RequestError: a limit is exceeded, or the queue is full.
        """
        model, options = self.ready(), self.options
        if request.model is not None:
            self.check_model(request.model)
        prompts, most = len(request.prompts()), min(options.max_n, self._places())
        count = prompts * request.n
        if count > most:
            message = f"{prompts} prompts x n={request.n} exceed this server's limit of {most}"
            raise RequestError(400, f"{message} samples per request", "n")
        longest = options.max_tokens or model.config.n_ctx
        if request.max_tokens > longest:
            message = f"max_tokens {request.max_tokens} exceeds this server's limit of {longest}"
            raise RequestError(400, message, "max_tokens")
        for prompt in request.prompts():
            self.check_length(model, prompt)
        if sum(self.counts()) + count > self._places():
            raise self._full(count)
        self._prepared += count
        try:
            answer = await self.in_time(self._prepare(model, request, streams))
        finally:
            self._prepared -= count
        if request.max_tokens:
            try:
                self.scheduler.submit(answer.job)
            except scheduler.Full:
                raise self._full(count) from None
        self.metrics.prompt_tokens.inc(answer.prompt_tokens)
        return answer

    async def _prepare(
        self, model: LanguageModel, request: CompletionRequest, streams: bool
    ) -> Answer:
        """Encode a request's prompts and, for echo with logprobs, score them."""
        size = sum(len(prompt or "") for prompt in request.prompts())
        answer = await self.in_thread(size, Answer, self, model, request, streams)
        if request.echo and request.logprobs is not None:
            for row in answer.rows[:: request.n]:
                prompt = row.tokens[: row.prompt_length]
                async with self._scores:
                    try:
                        found = await asyncio.to_thread(model.logprobs, prompt)
                    except UserError as error:
                        raise api.from_user_error(error, "prompt") from None
                answer.scores.append(found)
        return answer

    def check_length(self, model: LanguageModel, prompt: Prompt) -> None:
        """Raise RequestError for a prompt that is too long.

        Text is checked before it is encoded too: encoding a megabyte takes seconds.
        """
        most = self.options.max_prompt or model.config.n_ctx
        unit, limit = "tokens", most
        if isinstance(prompt, str):
            unit, limit = "characters", most * model.longest_token
        if prompt is not None and len(prompt) > limit:
            has = f"the prompt has {len(prompt):,} {unit}"
            message = f"{has}; this server accepts up to {most:,} tokens"
            raise RequestError(400, message, "prompt", "context_length_exceeded")

    def _places(self) -> int:
        """Return the number of samples that may run or wait."""
        return self.options.max_batch + self.options.max_queue

    def _full(self, count: int) -> RequestError:
        (running, waiting), seconds = self.counts(), self.scheduler.seconds_until_room()
        message = (
            f"no room for {console.counted(count, 'more sample')}: {running} running and "
            f"{waiting} waiting, and this server's limit is {self._places()}. Try again in "
            f"{console.counted(seconds, 'second')}"
        )
        headers = {"retry-after": str(seconds)}
        return RequestError(503, message, code="queue_full", headers=headers)

    def late(self) -> RequestError:
        """Return the error of a request that took too long."""
        limit = f"this server's limit of {self.options.max_time:g} seconds"
        return RequestError(504, f"the request exceeded {limit}", code="timeout")


class Answer:
    """A request that is being answered.

    Args:
        service: the Service.
        model: answers the request, even if another model is loaded meanwhile.
        request: the request.
        streams: report text while it grows.

    Raises:
        RequestError: a prompt cannot be continued.
    """

    def __init__(
        self, service: Service, model: LanguageModel, request: CompletionRequest, streams: bool
    ) -> None:
        assert model.encoder is not None, "serve rejects folders without a vocabulary"
        self.service, self.model, self.request = service, model, request
        self.encoder: Encoder = model.encoder
        self.id, self.created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self.asked = time.monotonic()
        settings = request.settings()
        seed = new_seed() if request.seed is None else request.seed % 2**63
        self.rows: list[Row] = []
        for prompt in request.prompts():
            try:
                ids = model.check_prompt(prompt, settings.special == "token")
                service.check_length(model, ids)
                self.rows += [
                    model.begin(index, prompt, settings, seed, ids) for index in range(request.n)
                ]
            except UserError as error:
                raise api.from_user_error(error, "prompt") from None
        self.prompt_tokens = sum(row.prompt_length for row in self.rows[:: request.n])
        self._closed = False
        # for echo with logprobs: LanguageModel.logprobs of each prompt
        self.scores: list[list[tuple[float | None, dict[int, float]]]] = []
        self._news: asyncio.Queue[list[scheduler.Piece]] = asyncio.Queue()
        self.job = scheduler.Job(model, self.rows, self._receive, service.options.max_time, streams)
        shown = [self._prompt_text(row.text.prompt) for row in self.rows]
        # for the logprobs of each text: its decoder, and the offset of its next token
        self._streams = [None if request.echo else self.encoder.stream() for _ in shown]
        self._offsets = [
            self._unencoded(row) if request.echo else len(text)
            for text, row in zip(shown, self.rows, strict=True)
        ]
        self.echoes = shown if request.echo else [""] * len(shown)

    def _prompt_text(self, prompt: Prompt) -> str:
        if prompt is None or isinstance(prompt, str):
            return prompt or ""
        return self.encoder.decode(prompt)

    def _receive(self, pieces: list[scheduler.Piece]) -> None:
        """Hand pieces to the event loop; called on the scheduler's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.service.loop.call_soon_threadsafe(self._news.put_nowait, pieces)

    async def pieces(self) -> AsyncIterator[scheduler.Piece]:
        """Yield the pieces of all texts as they come.

        Raises:
            RequestError: the request took too long, or the server failed.
        """
        left = len(self.rows) if self.request.max_tokens else 0
        while left:
            for piece in await self._news.get():
                if piece.error == "timeout":
                    raise self.service.late()
                if piece.error:
                    raise RequestError(500, "the server failed; see its log", code="failure")
                left -= piece.done
                yield piece

    def logprobs(self, number: int, begin: int, end: int) -> api.LogProbs | None:
        """Return the logprobs of a text's tokens; the first call includes an echoed prompt's."""
        if self.request.logprobs is None:
            return None
        vocabulary = self.encoder
        row = self.rows[number]
        tokens = row.continuation[begin:end]
        found: list[tuple[float | None, dict[int, float]]] = []
        # slices first: the scheduler's thread may be adding to the lists' ends
        found += zip(row.logprobs[begin:end], row.likeliest[begin:end], strict=True)
        if self.scores and self._streams[number] is None:
            begin = row.prompt_length - self._echoed_length(number)
            tokens = row.tokens[begin : row.prompt_length] + tokens
            found = self.scores[number // self.request.n][begin:] + found
        stream = self._streams[number] = self._streams[number] or vocabulary.stream()
        offsets: list[int] = []
        tops: list[dict[str, float] | None] = []
        for token, (own, likeliest) in zip(tokens, found, strict=True):
            offsets.append(self._offsets[number])
            self._offsets[number] += len(stream.feed([token]))
            best = dict(list(likeliest.items())[: self.request.logprobs])
            best |= {} if own is None else {token: own}
            tops.append({token_text(vocabulary, t): value for t, value in best.items()} or None)
        return {
            "tokens": [token_text(vocabulary, token) for token in tokens],
            "token_logprobs": [own for own, _ in found],
            "top_logprobs": tops if self.request.logprobs else None,
            "text_offset": offsets,
        }

    def _echoed_length(self, number: int) -> int:
        """Return the tokens of a prompt, without those the model puts before every text."""
        row = self.rows[number]
        prompt = row.text.prompt
        if prompt is None or isinstance(prompt, str):
            # an empty prompt has no text; its ids come before every text
            return row.prompt_length - len(self.encoder.prefix) if prompt else 0
        return row.prompt_length

    def _unencoded(self, row: Row) -> int:
        """Return the length of a prompt's start, such as [CLS], that has no echoed token."""
        start, prompt = prefix_text(self.encoder), row.text.prompt
        return len(start) if isinstance(prompt, str) and prompt.startswith(start) else 0

    def _choice(self, number: int, text: str, done: bool, begin: int, end: int) -> dict[str, Any]:
        """Return the Choice of a text, or of a piece of it with these of its tokens."""
        reason = None
        if done and not self.request.max_tokens:
            reason = "length"
        elif done:
            reason = self.model.sample(self.rows[number], 0).finish_reason
        choice = {
            "text": text,
            "index": number,
            "logprobs": self.logprobs(number, begin, end),
            "finish_reason": "stop" if reason == "end" else reason,  # OpenAI has one word for both
        }
        cut = self.model.prompt_cut(self.rows[number])
        return choice | {"prompt_cut": cut} if cut and self.request.max_tokens else choice

    def generated(self) -> int:
        """Return the number of tokens generated so far."""
        return sum(row.generated for row in self.rows)

    def as_json(self, choices: list, **more: Any) -> dict[str, Any]:
        """Return the Completion that carries choices."""
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

    def usage(self) -> api.Usage:
        """Return the number of tokens so far."""
        prompt, generated = self.prompt_tokens, self.generated()
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
        }

    async def whole(self) -> dict[str, Any]:
        """Return the Completion, once all texts are finished."""
        async for _ in self.pieces():
            pass
        choices = []
        for number, (echo, row) in enumerate(zip(self.echoes, self.rows, strict=True)):
            shown = echo + row.text.so_far if self.request.max_tokens else echo
            choices.append(self._choice(number, shown, True, 0, row.generated))
            await asyncio.sleep(0)  # thousands of logprobs must not hold up other requests
        return self.as_json(choices, usage=self.usage())

    async def events(self) -> AsyncIterator[str]:
        """Yield server-sent events; the last is [DONE], or an error."""
        try:
            for number, echo in enumerate(self.echoes):
                if echo or not self.request.max_tokens:
                    done = not self.request.max_tokens
                    yield _event(self.as_json([self._choice(number, echo, done, 0, 0)]))
            async for piece in self.pieces():
                if not (piece.text or piece.done) and self.request.logprobs is None:
                    continue
                number, text, begin, end, done, _ = piece
                yield _event(self.as_json([self._choice(number, text, done, begin, end)]))
            if self.request.stream_options.get("include_usage"):
                yield _event(self.as_json([], usage=self.usage()))
            yield "data: [DONE]\n\n"
        except RequestError as error:
            yield _event(error.as_json())
        finally:
            self.close()

    def close(self) -> None:
        """Free the request's places and count its tokens; further calls do nothing."""
        if self._closed:
            return
        self._closed = True
        if self.job.first:
            self.service.metrics.first.observe(self.job.first - self.asked)
        self.service.metrics.generated.inc(self.generated())
        self.service.scheduler.cancel(self.job)


def token_text(vocabulary: Encoder, token: int) -> str:
    r"""Return a token's text, or bytes:\xNN... if its bytes are not valid UTF-8."""
    raw = vocabulary.bytes_of([token])
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
