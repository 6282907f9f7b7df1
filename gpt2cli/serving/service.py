"""The model being served, and its queue.

The event loop only waits; tokenization and the model run in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import prometheus_client

from gpt2cli import console
from gpt2cli.errors import UserError
from gpt2cli.inference.generator import LanguageModel
from gpt2cli.inference.text import Prompt
from gpt2cli.serving import api, scheduler
from gpt2cli.serving.answer import Answer
from gpt2cli.serving.api import CompletionRequest, RequestError
from gpt2cli.storage import folders

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
        reused = gauge(
            "gpt2cli_reused_prompt_tokens", "tokens of prompts that the model had read before"
        )
        reused.set_function(lambda: service.model.network.prefixes.reused if service.model else 0)
        kept = gauge("gpt2cli_prefix_cache_bytes", "memory for common beginnings of prompts")
        kept.set_function(lambda: service.model.network.prefixes.size if service.model else 0)


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
