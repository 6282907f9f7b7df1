"""The HTTP API: routes, request bodies, the log. service.py and answer.py compute the responses."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeVar

import prometheus_client
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpt2cli.serving import api, connections, log, page
from gpt2cli.serving.api import CompletionRequest, RequestError
from gpt2cli.serving.sites import Sites

if TYPE_CHECKING:
    from gpt2cli.serving.answer import Answer
    from gpt2cli.serving.service import Service

T = TypeVar("T")
CLOSE = {"connection": "close"}
GONE = 499  # the client disconnected; never sent, nginx logs the same number


def make_app(service: Service) -> ASGIApp:
    """Return the ASGI application of a Service."""
    app = Starlette(
        routes=[
            Route("/", home, methods=["GET", "POST"]),
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", one_model),
            Route("/health", health),
            Route("/metrics", metrics),
            Route("/openapi.json", openapi),
            Route("/docs", docs),
            Route("/static/{name}", static),
        ],
        lifespan=_lifespan,
        exception_handlers={
            RequestError: lambda _, error: _error(error),
            HTTPException: _not_found,  # type: ignore[dict-item]
            Exception: lambda *_: _error(RequestError(500, "the server failed; see its log")),
        },
    )
    app.state.service = service
    app.router.redirect_slashes = False  # a redirect would repeat the client's Host
    origins = Sites(service.options).origins
    return Logged(_shared_with(app, origins) if origins else app, service)


def _shared_with(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Let pages of other origins use an application (CORS), without cookies."""
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),  # OpenAI's client sends a dozen of its own
        expose_headers=("x-request-id", "retry-after"),
    )


@contextlib.asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    service = app.state.service
    service.loop = asyncio.get_running_loop()
    connections.report_exhaustion(service.loop)

    def load(again: bool) -> None:
        threading.Thread(target=service.load, args=[again], daemon=True).start()

    with contextlib.suppress(ValueError, RuntimeError):  # outside the main thread, as in tests
        service.loop.add_signal_handler(signal.SIGHUP, load, True)
    load(False)
    yield
    await asyncio.to_thread(service.scheduler.close)


class Logged:
    """The application; checks, logs and counts each request, and adds headers to the response."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service, self.sites = app, service, Sites(service.options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, headers = time.monotonic(), GONE, Headers(scope=scope)
        name = log.new_id(headers.get("x-request-id"))
        scope.setdefault("state", {})

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *log.headers_of(name)]}
            await send(message)

        try:
            _check_framing(scope["http_version"], headers)
            if scope["path"] != "/health":  # load balancers send any Host, or none
                self.sites.check(scope["method"], headers, (scope.get("server") or [None])[0])
            await self.app(scope, receive, sending)
        except RequestError as error:  # of the checks; the application answers its own
            await _error(error)(scope, receive, sending)
        finally:
            self._log(scope, status, time.monotonic() - began, name)

    def _log(self, scope: Scope, status: int, seconds: float, name: str) -> None:
        path, answer = scope["path"], scope["state"].get("answer")
        routes = ("/", "/v1/completions", "/v1/models", "/docs", "/openapi.json")
        self.service.metrics.requests.labels(path if path in routes else "other", status).inc()
        if path in ("/health", "/metrics") and status == 200:
            return  # requested every few seconds
        rest = f"{seconds:.2f} s"
        if answer:
            rest = f"{answer.prompt_tokens}+{answer.generated()} tokens {rest}"
        if answer and self.service.options.log_prompts:
            rest += f" {[row.text.prompt for row in answer.rows[:: answer.request.n]]!a}"
        request = f"{scope['method']} {path[:200]!a}"
        log.write(scope.get("client"), request, status, rest, name)


def _check_framing(version: str, headers: Headers) -> None:
    """Raise RequestError if a proxy in front of this server may find another end of the body.

    Such a request may smuggle another one past the proxy (RFC 9112, section 6.1).
    """
    if "transfer-encoding" in headers and ("content-length" in headers or version == "1.0"):
        also = "HTTP/1.0" if version == "1.0" else "Content-Length"
        raise RequestError(400, f"Transfer-Encoding is not allowed with {also}", headers=CLOSE)


def _error(error: RequestError) -> JSONResponse:
    return JSONResponse(error.as_json(), error.status, error.headers)


def _not_found(request: Request, error: HTTPException) -> JSONResponse:
    """Answer a wrong path or method in the API's form."""
    method, path = request.method, f"{request.scope['path']:.100}"
    text = f"no route for {method} {path}"
    if methods := (error.headers or {}).get("Allow"):
        text = f"{path} accepts {', '.join(sorted(methods.split(', ')))}, not {method}"
    elif path.startswith("/v1/"):
        text += ": this server has a base model, which only continues text (POST /v1/completions)"
    elif f"/v1{path}" in ("/v1/completions", "/v1/models", "/v1/chat/completions"):
        text += ": the API's routes begin with /v1, such as POST /v1/completions"
    return _error(RequestError(error.status_code, f"{text}; see /docs", headers=error.headers))


def _service(request: Request) -> Service:
    return request.app.state.service


def _authorized(request: Request) -> Service:
    """Return the Service; raises RequestError without the API key."""
    bearer = request.headers.get("authorization", "")
    _service(request).check_key(bearer[7:] if bearer[:7].lower() == "bearer " else "")
    return _service(request)


async def _body(request: Request) -> bytes:
    """Read a request's body; raises RequestError if it is too large or too slow."""
    options = _service(request).options
    limit = f"the request body exceeds this server's limit of {options.max_body:,} bytes"
    too_large = RequestError(413, limit, headers=CLOSE)
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > options.max_body:
        raise too_large

    async def read() -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > options.max_body:
                raise too_large
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), options.max_idle)
    except ClientDisconnect:
        raise RequestError(GONE, "the client disconnected") from None
    except asyncio.TimeoutError:  # noqa: UP041, in Python 3.10 it is not the builtin one
        late = f"the request body did not arrive within {options.max_idle:g} seconds"
        raise RequestError(408, late, headers=CLOSE) from None


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """Return a coroutine's result; cancel it if the client disconnects first."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise RequestError(GONE, "the client disconnected")
        return await tasks[0]
    finally:
        for task in tasks:
            task.cancel()


async def _parsed(request: Request, parse: Callable[[bytes], T]) -> T:
    """Read a request's body and parse it; a large one does not hold up other requests."""
    body, service = await _body(request), _service(request)
    work = service.in_time(service.in_thread(len(body), parse, body))
    return await _unless_gone(request, work)


async def _begin(request: Request, wanted: CompletionRequest, streams: bool) -> Answer:
    """Start answering a request; see Service.begin."""
    answer = await _unless_gone(request, _service(request).begin(wanted, streams))
    request.state.answer = answer
    return answer


async def _whole(request: Request, wanted: CompletionRequest) -> api.Completion:
    """Return the finished response to a request."""
    answer = await _begin(request, wanted, False)
    try:
        return await _unless_gone(request, answer.whole())
    finally:
        answer.close()


async def complete(request: Request) -> Response:
    """POST /v1/completions."""
    _authorized(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # other sites' pages cannot send this type without asking
        raise RequestError(415, "send the request as JSON, with Content-Type: application/json")
    wanted = await _parsed(request, CompletionRequest.parse)
    if not wanted.stream:
        return JSONResponse(await _whole(request, wanted))
    answer = await _begin(request, wanted, True)
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    # if the client disconnects before the first event, events() never runs and cannot close it
    done = BackgroundTask(answer.close)
    return StreamingResponse(answer.events(), 200, headers, "text/event-stream", done)


async def models(request: Request) -> Response:
    """GET /v1/models."""
    return JSONResponse({"object": "list", "data": [_authorized(request).described()]})


async def one_model(request: Request) -> Response:
    """GET /v1/models/NAME."""
    service = _authorized(request)
    service.check_model(request.path_params["name"])
    return JSONResponse(service.described())


async def health(request: Request) -> Response:
    """GET /health: 200 once the server answers requests at full speed."""
    service = _service(request)
    service.ready()
    running, waiting = service.counts()
    state = {"status": "ok", "model": service.name, "checkpoint": service.checkpoint}
    return JSONResponse(state | {"running": running, "waiting": waiting})


async def metrics(request: Request) -> Response:
    """GET /metrics, for Prometheus."""
    text = prometheus_client.generate_latest(_authorized(request).metrics.registry)
    return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)


async def openapi(request: Request) -> Response:
    """GET /openapi.json."""
    return JSONResponse(api.openapi_document(bool(_service(request).options.api_key)))


async def docs(request: Request) -> Response:
    """GET /docs: the API as a page."""
    fields = api.request_schema()["properties"]
    return HTMLResponse(page.render(_service(request), "docs.html", fields=fields))


async def static(request: Request) -> Response:
    """GET /static/NAME: a file of the page."""
    name = request.path_params["name"]
    if name not in page.STATIC:
        raise HTTPException(404)
    return Response(page.STATIC[name], media_type=page.KINDS[PurePath(name).suffix])


async def home(request: Request) -> Response:
    """GET and POST /: the page. Browsers without JavaScript and gpt-2-flask-api's clients POST."""
    service = _service(request)
    form = page.empty_form(service)
    if request.method != "POST":
        return HTMLResponse(page.render(service, "page.html", form=form))
    try:
        form |= await _parsed(request, page.read_form)
        service.check_key(form.get("key", ""))
        found = await _whole(request, page.request_of(form))
    except RequestError as error:
        text = page.render(service, "page.html", form=form, error=str(error))
        return HTMLResponse(text, error.status, error.headers)
    samples = [choice["text"] for choice in found["choices"]]
    cut = max(choice.get("prompt_cut", 0) for choice in found["choices"])
    return HTMLResponse(page.render(service, "page.html", form=form, samples=samples, cut=cut))
