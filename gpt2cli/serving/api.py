"""The HTTP API's requests, responses and errors, in the form of OpenAI's POST /v1/completions.

Field names and defaults come from OpenAI's API reference. The fields top_k, repetition_penalty,
no_repeat_ngram, min_length and special of a request, and prompt_cut of a choice, are additions of
gpt2cli.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

# pydantic requires the TypedDict of typing_extensions before Python 3.12; 3.10 has no NotRequired
from typing_extensions import NotRequired, TypedDict  # noqa: UP035

from gpt2cli import __version__, console
from gpt2cli.errors import UserError
from gpt2cli.options import GenerateOptions

INT32 = 2**31 - 1
INT64 = 2**63 - 1
MAX_LOGPROBS = 5  # OpenAI's limit
MAX_STOPS = 16  # strings in `stop`; each is searched for after every token
MAX_PROMPTS = 2048  # of a request; --max_n is usually lower
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
StreamOption = Literal["include_usage", "include_obfuscation"]

# fail_fast: a long list with wrong items makes one error, not one for each item.
NOT_EMPTY = Field(min_length=1, fail_fast=True)
SOME = Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)
Texts = Annotated[list[str], SOME]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], NOT_EMPTY]
Prompt = str | Texts | TokenIds | Annotated[list[TokenIds], SOME]

# Messages for fields that pydantic's own errors describe badly.
UNSUPPORTED = ("best_of", "presence_penalty", "frequency_penalty", "logit_bias", "suffix")
MESSAGES = {name: f"{name} is not supported by this server; leave it out" for name in UNSUPPORTED}
MESSAGES |= {
    "prompt": (
        "prompt must be a string, a list of strings, a list of token ids, or a list of such lists; "
        f"lists must not be empty or have more than {MAX_PROMPTS:,} prompts"
    ),
    "stop": f"stop must be a string or a list of up to {MAX_STOPS}, each of 1 to 1,000 characters",
    "stream_options": 'stream_options must be an object such as {"include_usage": true}',
}


class ErrorDetail(TypedDict):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(TypedDict):
    """The response to a request that failed."""

    error: ErrorDetail


@dataclass(eq=False)
class RequestError(Exception):
    """A request that is answered with an error."""

    status: int  # of HTTP
    message: str  # names the mistake and its remedy
    param: str | None = None  # the field at fault
    code: str | None = None  # a word for programs to test
    headers: Mapping[str, str] | None = None  # of the response

    def __post_init__(self) -> None:
        self.message = _visible(self.message)
        self.param = None if self.param is None else _visible(self.param)

    def __str__(self) -> str:
        return self.message

    def as_json(self) -> Error:
        """Return OpenAI's error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "authentication_error" if self.status == 401 else kind
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        }


def _visible(text: str) -> str:
    """Return a text with escapes for hidden characters: it may repeat what a client sent."""
    return console.visible(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def _allow_null(schema: dict[str, Any]) -> None:
    """Let a JSON schema accept null for every field, as CompletionRequest.checked does."""
    for field in schema["properties"].values():
        if "type" in field:
            field["type"] = [field["type"], "null"]
        elif {"type": "null"} not in field["anyOf"]:
            field["anyOf"].append({"type": "null"})


class CompletionRequest(BaseModel):
    """The body of POST /v1/completions. Null in place of a value means the default."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        use_attribute_docstrings=True,
        json_schema_extra=_allow_null,
    )

    model: str | None = None
    """Name of the model being served; any other name is rejected."""
    prompt: Prompt | None = None
    """A string, a list of strings, token ids, or a list of such lists; null starts from nothing."""
    max_tokens: int = Field(16, ge=0, le=INT32)
    """Number of tokens to generate; 0 is allowed with echo and only scores the prompt."""
    temperature: float = Field(1.0, ge=0, le=100, allow_inf_nan=False)
    """Below 1 favors likely tokens, above 1 unlikely ones; 0 always takes the most likely token."""
    top_p: float = Field(1.0, ge=0, le=1, allow_inf_nan=False)
    """Sample from the likeliest tokens that reach this probability; 0 takes the likeliest one."""
    n: int = Field(1, ge=1, le=INT32)
    """Number of samples for each prompt."""
    seed: int | None = Field(None, ge=-INT64 - 1, le=INT64)
    """The same seed gives the same samples, however busy the server is; null draws one."""
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] = []
    """Up to 16 strings; a sample ends before the first one it would contain."""
    echo: bool = False
    """Return the prompt before its continuation."""
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    """Return each token's log-probability, and those of up to 5 most likely tokens in its place."""
    stream: bool = False
    """Send the text as it is generated, as server-sent events."""
    stream_options: dict[StreamOption, bool] = Field({}, max_length=2)
    """include_usage ends a streamed response with its usage; include_obfuscation is ignored."""
    user: str | None = None
    """Accepted and ignored."""
    top_k: int = Field(0, ge=0, le=INT32)
    """Sample from the k most likely tokens; 0 means all."""
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Above 1 makes tokens that already occurred less likely."""
    no_repeat_ngram: int = Field(0, ge=0, le=INT32)
    """Never generate the same N tokens in a row twice; 0 allows it."""
    min_length: int = Field(0, ge=0, le=INT32)
    """Number of tokens before which neither an end token nor a stop string ends a sample."""
    special: Literal["token", "text"] = "text"
    """Read <|endoftext|> and other added tokens in a text prompt as plain text, or as tokens."""
    best_of: int | None = None
    """Not supported; only null or the value of n is accepted."""
    presence_penalty: float = Field(0.0, ge=0, le=0)
    """Not supported: 0. See repetition_penalty."""
    frequency_penalty: float = Field(0.0, ge=0, le=0)
    """Not supported: 0. See repetition_penalty."""
    logit_bias: dict[str, float] = Field({}, max_length=0)
    """Not supported: empty."""
    suffix: str | None = Field(None, max_length=0)
    """Not supported: empty."""

    @classmethod
    def parse(cls, body: bytes) -> "CompletionRequest":
        """Read a request from JSON.

        Raises:
            RequestError: the body is not a JSON object, or a field is wrong.
        """
        try:
            text = body.decode("utf-8")
            values = json.loads(text, parse_constant=_reject, object_pairs_hook=_object)
            if "\\u" in text:  # only an escape can be a lone surrogate
                json.dumps(values, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            half = repr(error.object[error.start])
            message = f"the body has a lone surrogate, {half}, which is not a character"
            raise RequestError(400, message) from None
        except RecursionError:
            raise RequestError(400, "the body's JSON is nested too deeply") from None
        except ValueError as error:
            reason = str(error).partition(";")[0]  # without Python's advice to programmers
            raise RequestError(400, f"the body is not valid JSON: {reason}") from None
        if not isinstance(values, dict):
            raise RequestError(400, "the body must be a JSON object")
        return cls.checked(values)

    @classmethod
    def checked(cls, values: dict[str, Any], strict: bool = True) -> "CompletionRequest":
        """Build a request from its fields.

        Args:
            values: None stands for the default.
            strict: reject text in place of a number; a form has nothing but text.

        Raises:
            RequestError: names the first field that is wrong.
        """
        unknown = next((name for name in values if name not in cls.model_fields), None)
        if unknown is not None:
            known = ", ".join(cls.model_fields)
            message = f"unknown field {unknown:.50}; the fields are {known}"
            raise RequestError(400, message, unknown[:50])
        given = {name: value for name, value in values.items() if value is not None}
        try:
            request = cls.model_validate(given, strict=strict)
            request.settings()  # checks the rules that all commands share
        except ValidationError as error:
            raise _from_validation(error) from None
        except UserError as error:
            raise from_user_error(error) from None
        if request.best_of not in (None, request.n):
            raise RequestError(400, MESSAGES["best_of"], "best_of")
        if request.stream_options and not request.stream:
            message = "stream_options needs stream: true"
            raise RequestError(400, message, "stream_options")
        if request.max_tokens == 0 and not request.echo:
            message = "max_tokens must be at least 1, or 0 with echo"
            raise RequestError(400, message, "max_tokens")
        return request

    def settings(self) -> GenerateOptions:
        """Return the settings of one sample.

        top_p 0 always takes the likeliest token, as clients of OpenAI and llama.cpp expect. In
        GenerateOptions, 0 samples from all tokens, as in nshepperd/gpt-2.

        Raises:
            UsageError: the fields break a rule that all commands share.
        """
        return GenerateOptions(
            length=max(1, self.max_tokens),
            temperature=self.temperature if self.top_p else 0.0,
            top_k=self.top_k,
            top_p=self.top_p,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            min_length=self.min_length,
            repetition_penalty=self.repetition_penalty,
            no_repeat_ngram=self.no_repeat_ngram,
            logprobs=self.logprobs is not None,
            special=self.special,
        )

    def prompts(self) -> Sequence[str | list[int] | None]:
        """Return the prompts one by one; None stands for text from nothing."""
        if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int):
            return self.prompt
        return [self.prompt]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raises RequestError if two of its fields have one name."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise RequestError(400, f"the field {name:.50} is given twice", name[:50])
        found[name] = value
    return found


def _reject(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _from_validation(error: ValidationError) -> RequestError:
    """Turn the first of pydantic's errors into a 400 that names the field."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = str(first["loc"][0])
    # "Input should be a valid integer, unable to parse ..." -> "top_k must be a valid integer"
    said = first["msg"].partition(",")[0].replace("Input should", f"{param} must", 1)
    message = MESSAGES.get(param) or f"{said}, got {json.dumps(first['input']):.50}"
    return RequestError(400, message, param)


def from_user_error(error: UserError, param: str | None = None) -> RequestError:
    """Turn an error of the checks that all commands share into a 400 in the API's names."""
    names = {"length": "max_tokens", "nsamples": "n"}
    found = re.search(r"--(\w+)", str(error))
    param = param or (found and names.get(found[1], found[1]))
    text = re.sub(r"--(\w+)", lambda match: names.get(match[1], match[1]), str(error))
    return RequestError(400, text[:500], param)


class LogProbs(TypedDict):
    """Log-probabilities of a choice's tokens, in nats; all lists have one item a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class Choice(TypedDict):
    """One sample, or a piece of it in a stream."""

    text: str
    index: int
    logprobs: LogProbs | None
    finish_reason: Literal["stop", "length"] | None
    prompt_cut: NotRequired[int]
    """Number of tokens at the prompt's start that the model did not see; left out if it saw all."""


class Usage(TypedDict):
    """Number of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(TypedDict):
    """The response to a CompletionRequest."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Model(TypedDict):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(TypedDict):
    """The models that are served: one."""

    object: Literal["list"]
    data: list[Model]


class Health(TypedDict):
    """The state of a server that is ready."""

    status: Literal["ok"]
    model: str
    checkpoint: str
    running: int
    waiting: int


# What each error status of POST /v1/completions means.
STATUSES = {
    400: "a field is wrong; param names it",
    401: "the API key is missing or wrong",
    403: "the request comes from another website's page, or names an unknown host",
    404: "no such model",
    408: "the request body did not arrive in time",
    413: "the request body is too large",
    415: "the Content-Type is not application/json",
    503: "the queue is full, or the model is loading; see Retry-After",
    504: "the request took too long",
}


def _content(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _operation(
    name: str, summary: str, returns: str, errors: Sequence[int], **more: Any
) -> dict[str, Any]:
    """Describe a route: the type of its response, and the statuses of its errors."""
    responses = {"200": {"description": "success", "content": _content(returns)}}
    responses |= {
        str(status): {"description": STATUSES[status], "content": _content("Error")}
        for status in errors
    }
    return {"operationId": name, "summary": summary, "responses": responses, **more}


@functools.cache
def request_schema() -> dict[str, Any]:
    """Return the JSON schema of a CompletionRequest."""
    return CompletionRequest.model_json_schema()


@functools.cache
def openapi_document(has_key: bool = False) -> dict[str, Any]:
    """Return the API's OpenAPI document; with has_key, it says that an API key is required."""
    types = (CompletionRequest, Completion, Error, Health, Model, ModelList)
    adapters = [(one.__name__, "validation", TypeAdapter(one)) for one in types]
    _, schemas = TypeAdapter.json_schemas(adapters, ref_template="#/components/schemas/{model}")  # type: ignore
    keys = [401, 403] if has_key else [403]
    every = [status for status in STATUSES if status != 401 or has_key]
    body = {"required": True, "content": _content("CompletionRequest")}
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    complete = _operation(
        "createCompletion", "Continue a text", "Completion", every, requestBody=body
    )
    success = complete["responses"]["200"]
    success["description"] = "success; with stream, server-sent events that end with [DONE]"
    success["content"]["text/event-stream"] = {}
    models = _operation("listModels", "List the model being served", "ModelList", keys)
    model = _operation(
        "retrieveModel", "Describe a model", "Model", [404, *keys], parameters=[name]
    )
    health = _operation("getHealth", "Report whether the server is ready", "Health", [503])
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "gpt2cli serve", "version": __version__},
        "paths": {
            "/v1/completions": {"post": complete},
            "/v1/models": {"get": models},
            "/v1/models/{model}": {"get": model},
            "/health": {"get": health | {"security": []}},
        },
        "components": {"schemas": schemas["$defs"]},
    }
    if has_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document
