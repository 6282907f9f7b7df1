"""The answer to one request: its texts, their logprobs, and the forms in which they are sent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from gpt2cli.errors import UserError
from gpt2cli.inference.generator import LanguageModel
from gpt2cli.inference.rows import Row
from gpt2cli.inference.text import Prompt, prefix_text
from gpt2cli.options import new_seed
from gpt2cli.serving import api, scheduler
from gpt2cli.serving.api import CompletionRequest, RequestError
from gpt2cli.text.encoder import Encoder

if TYPE_CHECKING:
    from gpt2cli.serving.service import Service


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
