"""OpenAI's completions API: what a request may say, and the form of answers and errors.

Names, defaults and shapes are those of OpenAI's reference of POST /v1/completions; top_k,
repetition_penalty, no_repeat_ngram and min_length are ours.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from gpt2cli import __version__, flags
from gpt2cli.errors import UsageError, UserError
from gpt2cli.options import GenerateOptions

RANGES = {
    "max_tokens": (0, 2**31 - 1),
    "temperature": (0, 100),
    "top_p": (0, 1),
    "n": (1, 2**31 - 1),
    "seed": (-(2**63), 2**63 - 1),
    "logprobs": (0, 5),  # OpenAI's limit
    "top_k": (0, 2**31 - 1),
    "min_length": (0, 2**31 - 1),
    "no_repeat_ngram": (0, 2**31 - 1),
    "presence_penalty": (0, 0),
    "frequency_penalty": (0, 0),
}
STOPS = 16  # texts in `stop`; each is looked for after every token
STOP_LENGTH = 1000  # characters

STREAM_OPTIONS = ("include_usage", "include_obfuscation")  # the second does nothing here

# The form of what takes more than one type, in OpenAPI's words.
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXT = {"type": "string"}
_STOP = {"type": "string", "minLength": 1, "maxLength": STOP_LENGTH}
_PROMPT = [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1}, _TOKENS]
FORMS = {
    "prompt": {"anyOf": [*_PROMPT, {"type": "array", "items": _TOKENS, "minItems": 1}]},
    "stop": {"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": STOPS}]},
    "stream_options": {
        "type": "object",
        "properties": {name: {"type": "boolean"} for name in STREAM_OPTIONS},
        "additionalProperties": False,
    },
    "logit_bias": {"type": "object", "maxProperties": 0},
    "suffix": {"type": "string", "maxLength": 0},
}


class Refused(Exception):
    """A request that is answered by an error.

    Args:
        status: of HTTP.
        message: what is wrong and what to do.
        param: the field, or None.
        code: a word for programs, or None.
        headers: of the answer.
    """

    def __init__(self, status, message, param=None, code=None, headers=None):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def as_json(self):
        """OpenAI's error object."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        default = "invalid_request_error" if self.status < 500 else "server_error"
        kind = kinds.get(self.status, default)
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """The body of POST /v1/completions.

    Args:
        model: the model that is served; any other is refused.
        prompt: a text, a list of texts, token ids, or a list of lists of token ids; without it,
            text from nothing.
        max_tokens: tokens to generate; 0, with echo, only looks at the prompt.
        temperature: below 1 favours likely tokens, above 1 unlikely ones; 0 always takes the
            likeliest.
        top_p: sample from the likeliest tokens that together reach this probability.
        n: samples of each prompt.
        seed: the same seed gives the same samples, however busy the server is.
        stop: a text, or up to 16, that end a sample; not in the answer themselves.
        echo: give the prompt back before its continuation.
        logprobs: of each token the log-probability, and those of up to 5 likeliest in its place.
        stream: send the text while it is generated, as server-sent events.
        stream_options: include_usage sends the usage in a last event.
        user: not used.
        top_k: sample from the k likeliest tokens; 0 from all.
        repetition_penalty: above 1 makes tokens that already occurred less likely.
        no_repeat_ngram: never write the same this many tokens in a row twice; 0 allows it.
        min_length: tokens before which neither the end token nor a stop text ends a sample.
        best_of: as n, or left out.
        presence_penalty: 0, or left out; see repetition_penalty.
        frequency_penalty: 0, or left out; see repetition_penalty.
        logit_bias: empty, or left out.
        suffix: empty, or left out.
    """

    model: str | None = None
    prompt: Any = None
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    seed: int | None = None
    stop: Any = None
    echo: bool = False
    logprobs: int | None = None
    stream: bool = False
    stream_options: Any = None
    user: str | None = None
    top_k: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    min_length: int = 0
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Any = None
    suffix: str | None = None

    def __post_init__(self):
        flags.check(self, **RANGES)
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        stop = [] if stop is None else stop
        if not isinstance(stop, list) or len(stop) > STOPS or not all(map(_is_stop, stop)):
            raise UsageError(
                f"--stop takes a text or a list of up to {STOPS}, each of 1 to {STOP_LENGTH:,} "
                "characters"
            )
        object.__setattr__(self, "stop", tuple(stop))
        options = {} if self.stream_options is None else self.stream_options
        known = isinstance(options, dict) and set(options) <= {*STREAM_OPTIONS}
        if not known or not all(type(value) is bool for value in options.values()):
            raise UsageError("--stream_options takes an object with include_usage, true or false")
        object.__setattr__(self, "stream_options", options)
        if self.logit_bias not in (None, {}) or self.suffix:
            name = "suffix" if self.suffix else "logit_bias"
            raise UsageError(f"--{name} is not supported by this server: leave it out")
        if self.best_of not in (None, self.n):
            raise UsageError("--best_of is not supported by this server: leave it out")
        if self.max_tokens == 0 and not self.echo:
            raise UsageError("--max_tokens must be at least 1 without echo")
        if self.max_tokens and self.min_length > self.max_tokens:
            raise UsageError("--min_length is more than max_tokens")

    @classmethod
    def parse(cls, body):
        """The request that some bytes are; Refused names the field that is wrong."""
        try:
            values = _clean(json.loads(body.decode("utf-8"), parse_constant=_no_number))
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise Refused(400, "the body must be a JSON object")
        fields = flags.fields_of(cls)
        unknown = next((name for name in values if name not in fields), None)
        if unknown is not None:
            known = ", ".join(fields)
            message = f"{unknown:.50} is not a field of this API; the fields are {known}"
            raise Refused(400, message, unknown[:50])
        return checked({name: value for name, value in values.items() if value is not None})

    def settings(self):
        """The GenerateOptions of one of its samples."""
        return GenerateOptions(
            **{name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "stop")},
            length=max(1, self.max_tokens),
            min_length=self.min_length,
            repetition_penalty=self.repetition_penalty,
            no_repeat_ngram=self.no_repeat_ngram,
            logprobs=self.logprobs is not None,
        )

    def prompts(self):
        """The prompts as a list of texts, lists of ids, or None."""
        prompt = self.prompt
        if prompt is None or isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt, list) and prompt:
            if all(type(item) is int for item in prompt):
                return [prompt]
            if all(isinstance(item, str) for item in prompt) or all(map(_is_ids, prompt)):
                return prompt
        raise Refused(
            400,
            "prompt takes a text, a list of texts, a list of token ids, or a list of such lists; "
            "none of the lists may be empty",
            "prompt",
        )


def checked(values):
    """The CompletionRequest of these fields; Refused names the one that is wrong."""
    try:
        request = CompletionRequest(**values)
        request.settings()  # has rules of its own
    except UserError as error:
        raise refused(error) from None
    return request


def _is_stop(value):
    return isinstance(value, str) and 1 <= len(value) <= STOP_LENGTH


def _clean(value):
    """The same JSON value; half a character, which no UTF-8 can hold, becomes U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {_clean(name): _clean(item) for name, item in value.items()}
    return value


def _is_ids(value):
    return isinstance(value, list) and value != [] and all(type(item) is int for item in value)


def _no_number(name):
    raise ValueError(f"{name} is no number of JSON")


def refused(error, param=None):
    """The 400 that an error of the checks which all commands share is, in the API's names."""
    names = {"length": "max_tokens", "nsamples": "n"}
    found = re.search(r"--(\w+)", str(error))
    param = param or (found and names.get(found[1], found[1]))
    text = re.sub(r"--(\w+)", lambda match: names.get(match[1], match[1]), str(error))
    return Refused(400, text[:500], param)


def token_text(vocabulary, token):
    """A token as the API writes it: its text, or bytes: and its bytes where they are no text."""
    raw = vocabulary.bytes_of([token])
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def logprobs_object(vocabulary, tokens, found, count, stream, offset):
    """OpenAI's logprobs of some tokens.

    Args:
        tokens: ids.
        stream: the decoder of the text, which has seen all before.
        found: of each its log-probability and {id: log-probability} of the likeliest.
        count: of these so many are told.
        offset: the characters before the first.

    Returns:
        The object, and the characters before what follows.
    """
    texts = [token_text(vocabulary, token) for token in tokens]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(stream.feed([token]))
    tops = []
    for token, (own, likeliest) in zip(tokens, found, strict=True):
        best = dict(list(likeliest.items())[:count]) | ({} if own is None else {token: own})
        tops.append({token_text(vocabulary, t): value for t, value in best.items()})
    return {
        "tokens": texts,
        "token_logprobs": [own for own, _ in found],
        "top_logprobs": [top or None for top in tops] if count else None,
        "text_offset": offsets,
    }, offset


def choice(index, text, reason=None, logprobs=None):
    """One of an answer's choices; no reason while it is not done."""
    reason = "stop" if reason == "end" else reason  # OpenAI's word for both
    return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}


def usage(prompt, generated):
    """The usage object of two numbers of tokens."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }


KINDS = {int: "integer", float: "number", bool: "boolean", str: "string"}


def describe(name):
    """A field's type in a word or two."""
    form = _form(name)
    return form.get("type") or " or ".join(part["type"] for part in form["anyOf"][:2])


def _form(name):
    """The JSON schema of a field, without its description."""
    hint, default, _ = flags.fields_of(CompletionRequest)[name]
    types = getattr(hint, "__args__", (hint,))
    form = dict(FORMS.get(name) or {"type": next(KINDS[kind] for kind in types if kind in KINDS)})
    low, high = RANGES.get(name, (None, None))
    form |= {k: v for k, v in (("minimum", low), ("maximum", high)) if v is not None}
    if name == "repetition_penalty":
        form["exclusiveMinimum"] = 0
    return form if default is None else form | {"default": default}


def schema():
    """CompletionRequest as a JSON schema, from its fields, defaults and help."""
    properties = {
        name: _form(name) | {"description": text}
        for name, (_, _, text) in flags.fields_of(CompletionRequest).items()
    }
    return {
        "type": "object",
        "description": CompletionRequest.__doc__.partition("\n")[0],
        "properties": properties,
        "additionalProperties": False,
    }


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_CHOICE = {
    "type": "object",
    "required": ["text", "index", "logprobs", "finish_reason"],
    "properties": {
        "text": {"type": "string"},
        "index": {"type": "integer"},
        "logprobs": {"type": ["object", "null"]},
        "finish_reason": {"type": ["string", "null"], "enum": ["stop", "length", None]},
    },
}
_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")
_ANSWER = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "text_completion"},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "choices": {"type": "array", "items": _CHOICE},
        "usage": {
            "type": "object",
            "required": list(_COUNTS),
            "properties": {name: {"type": "integer"} for name in _COUNTS},
        },
    },
}
_MODEL = {"type": "object", "required": ["id", "object", "created", "owned_by"]}
_MODELS = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}},
}
# of each status that a request may be answered with, what it means
REFUSALS = {
    400: "a field is wrong; param names it",
    401: "the key is wrong",
    404: "no such model",
    408: "the request did not come in time",
    413: "the request is too large",
    415: "not JSON",
    503: "the queue is full, or the model is being loaded; see Retry-After",
    504: "not done in time",
}


def openapi_document(has_key=False):
    """The API in OpenAPI's form."""

    def answers(good, statuses):
        content = {"application/json": {"schema": good}}
        found = {"200": {"description": "done", "content": content}}
        for status in statuses:
            wrong = {"application/json": {"schema": _ERROR}}
            found[str(status)] = {"description": REFUSALS[status], "content": wrong}
        return found

    def get(text, good, statuses=(), **more):
        return {"get": {"summary": text, "responses": answers(good, statuses), **more}}

    keys = [401] if has_key else []
    streamed = {"type": "string", "description": "with stream: events of such objects, [DONE]"}
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    body = {"application/json": {"schema": schema()}}
    document = {
        "openapi": "3.1.0",
        "info": {"title": "gpt2cli serve", "version": __version__},
        "paths": {
            "/v1/completions": {
                "post": {
                    "summary": "continue a text",
                    "requestBody": {"required": True, "content": body},
                    "responses": answers(_ANSWER, [s for s in REFUSALS if s != 401 or has_key]),
                }
            },
            "/v1/models": get("the model that is served", _MODELS, keys),
            "/v1/models/{model}": get("the same", _MODEL, [404, *keys], parameters=[name]),
            "/health": get("whether it is ready", {"type": "object"}, [503]),
        },
    }
    good = document["paths"]["/v1/completions"]["post"]["responses"]["200"]
    good["content"]["text/event-stream"] = {"schema": streamed}
    if has_key:
        key = {"type": "http", "scheme": "bearer"}
        document |= {"components": {"securitySchemes": {"key": key}}, "security": [{"key": []}]}
    return document
