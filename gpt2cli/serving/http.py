"""The HTTP side of `serve`: connections, routes, limits. What answers is service.py."""

import asyncio
import contextlib
import signal
import sys
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs

import jinja2
import prometheus_client
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from uvicorn.protocols.http.h11_impl import H11Protocol

from gpt2cli import __version__, flags
from gpt2cli.serving import api as completions
from gpt2cli.serving.api import CompletionRequest, Refused

WEB = Path(__file__).parent / "web"
# The page needs nothing from elsewhere and may send nothing elsewhere.
SAFETY = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
OVERFULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: 0\r\n\r\n"
)
CLOSE = {"connection": "close"}
GONE = Refused(499, "the client went away")  # which nobody reads; the number is nginx'

# The fields of the page: its name -> the API's. `seed`, the text, is named as gpt-2-flask-api did,
# whose lengths and temperatures the defaults are (deployment/run_server.py); it had no others.
FORM = {
    "max_tokens": "max_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "repetition_penalty": "repetition_penalty",
    "n": "n",
    "random_seed": "seed",
}
FORM_DEFAULTS = {"temperature": "0.7", "top_k": "40", "top_p": "1", "repetition_penalty": "1"}
FORM_DEFAULTS |= {"n": "1", "random_seed": "", "seed": "", "key": ""}
FORM_FIELDS = 50  # more are refused


def connection_class(most, idle):
    """uvicorn's HTTP/1.1 with a limit to connections, and to the patience with silent clients.

    Args:
        most: connections at once; one more is told 503.
        idle: seconds for the head of a request, from the connection's beginning or the last answer
            on, and for a client to take what it is sent.
    """

    class Connection(H11Protocol):
        def connection_made(self, transport):
            super().connection_made(transport)
            self._stalled = None
            self._give_time()
            if len(self.connections) > most:
                transport.write(OVERFULL)
                transport.close()

        def data_received(self, data):
            # uvicorn's own stops the clock at the first byte; here a whole head does
            self.conn.receive_data(data)
            self.handle_events()
            if self.cycle is not None and not self.cycle.response_complete:
                self._unset_keepalive_if_required()
            else:
                self._give_time()

        def _give_time(self):
            if self.timeout_keep_alive_task is None and not self.transport.is_closing():
                late = self.timeout_keep_alive_handler
                self.timeout_keep_alive_task = self.loop.call_later(idle, late)

        def connection_lost(self, error):
            super().connection_lost(error)
            self._unset_keepalive_if_required()
            self._take_time()

        def pause_writing(self):
            super().pause_writing()
            self._stalled = self._stalled or self.loop.call_later(idle, self.transport.abort)

        def resume_writing(self):
            super().resume_writing()
            self._take_time()

        def _take_time(self):
            if self._stalled:
                self._stalled.cancel()
            self._stalled = None

    return Connection


def make_server(service):
    """The uvicorn.Server of a service.Service; `should_exit` ends it once all is answered."""
    config = service.config
    return uvicorn.Server(
        uvicorn.Config(
            make_app(service),
            http=connection_class(config.max_connections, config.max_idle),
            ws="none",
            proxy_headers=False,  # who may be believed is not known
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=config.max_idle,
            timeout_graceful_shutdown=int(config.max_time) + 1,
        )
    )


def make_app(service):
    """The ASGI application of a service.Service."""
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
            Mount("/static", StaticFiles(directory=WEB / "static")),
        ],
        lifespan=_lifespan,
        exception_handlers={
            Refused: lambda _, error: _error(error),
            HTTPException: _not_here,
            Exception: lambda *_: _error(Refused(500, "the server failed; its log says why")),
        },
    )
    app.state.service = service
    app.state.pages = jinja2.Environment(loader=jinja2.FileSystemLoader(WEB), autoescape=True)
    return Logged(app, service)


@contextlib.asynccontextmanager
async def _lifespan(app):
    service = app.state.service
    service.loop = asyncio.get_running_loop()

    def load(again):
        threading.Thread(target=service.load, args=[again], daemon=True).start()

    with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread, as in a test
        service.loop.add_signal_handler(signal.SIGHUP, load, True)
    load(False)
    yield
    await asyncio.to_thread(service.scheduler.close)


class Logged:
    """The application, with a line of log and a count for each request, and headers of safety."""

    def __init__(self, app, service):
        self.app, self.service = app, service

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 499  # as nginx: the client went away
        scope.setdefault("state", {})

        async def sending(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                known = {name.lower() for name, _ in message["headers"]}
                more = [(name.encode(), value.encode()) for name, value in SAFETY.items()]
                headers = [*message["headers"], *(pair for pair in more if pair[0] not in known)]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self.app(scope, receive, sending)
        finally:
            self._tell(scope, status, time.monotonic() - began)

    def _tell(self, scope, status, seconds):
        path, answer = scope["path"], scope["state"].get("answer")
        routes = ("/", "/v1/completions", "/v1/models", "/docs", "/openapi.json")
        self.service.metrics.requests.labels(path if path in routes else "other", status).inc()
        if path in ("/health", "/metrics") and status == 200:
            return  # asked every few seconds
        client = (scope.get("client") or ["-"])[0]
        line = f"{time.strftime('%F %T')} {client!a} {scope['method']} {path[:200]!a} {status}"
        if answer:
            line += f" {answer.prompt_tokens}+{answer.generated()} tokens"
        line += f" {seconds:.2f} s"
        if answer and self.service.config.log_prompts:
            line += f" {[row.text.prompt for row in answer.rows[:: answer.request.n]]!a}"
        print(line, file=sys.stderr, flush=True)


def _error(error):
    return JSONResponse(error.as_json(), error.status, error.headers)


def _not_here(request, error):
    """A wrong path or method, in the API's form."""
    text = f"{request.method} {request.scope['path']:.100} is not here. See /docs"
    return _error(Refused(error.status_code, text, headers=error.headers))


def _service(request):
    return request.app.state.service


def _checked(request):
    """The Service, for who has the key."""
    bearer = request.headers.get("authorization", "")
    _service(request).check_key(bearer[7:] if bearer[:7].lower() == "bearer " else "")
    return _service(request)


async def _body(request):
    """The bytes of a request; Refused for too many, or if they do not come."""
    config = _service(request).config
    too_large = Refused(413, f"a request may have {config.max_body:,} bytes here", headers=CLOSE)
    told = request.headers.get("content-length", "")
    if told.isdigit() and int(told) > config.max_body:
        raise too_large

    async def read():
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > config.max_body:
                raise too_large
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), config.max_idle)
    except ClientDisconnect:
        raise GONE from None
    except asyncio.TimeoutError:  # noqa: UP041, in Python 3.10 it is not the builtin one
        late = f"the request did not come within {config.max_idle:g} seconds"
        raise Refused(408, late, headers=CLOSE) from None


async def _unless_gone(request, work):
    """What a coroutine gives; it is cancelled if the client goes away before."""

    async def gone():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise GONE
        return await tasks[0]
    finally:
        for task in tasks:
            task.cancel()


async def _begun(request, wanted, streams):
    """The Answer to a CompletionRequest; see Service.begin."""
    answer = await _unless_gone(request, _service(request).begin(wanted, streams))
    request.state.answer = answer
    return answer


async def _whole(request, wanted):
    """The object that answers a CompletionRequest."""
    answer = await _begun(request, wanted, False)
    try:
        return await _unless_gone(request, answer.whole())
    finally:
        answer.close()


async def complete(request):
    """POST /v1/completions."""
    _checked(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a page from elsewhere cannot send unasked
        raise Refused(415, "send the request as JSON: Content-Type: application/json")
    wanted = CompletionRequest.parse(await _body(request))
    if not wanted.stream:
        return JSONResponse(await _whole(request, wanted))
    answer = await _begun(request, wanted, True)
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    # a client may go away before the first event is asked for, which would close it
    done = BackgroundTask(answer.close)
    return StreamingResponse(answer.events(), 200, headers, "text/event-stream", done)


async def models(request):
    """GET /v1/models."""
    return JSONResponse({"object": "list", "data": [_checked(request).described()]})


async def one_model(request):
    """GET /v1/models/NAME."""
    service = _checked(request)
    if request.path_params["name"] != service.name:
        raise Refused(404, f"the model here is {service.name}", "model", "model_not_found")
    return JSONResponse(service.described())


async def health(request):
    """GET /health: 200 once the first request will be served at full speed."""
    service = _service(request)
    service.ready()
    running, waiting = service.counts()
    told = {"status": "ok", "model": service.name, "checkpoint": service.checkpoint}
    return JSONResponse(told | {"running": running, "waiting": waiting})


async def metrics(request):
    """GET /metrics, for Prometheus."""
    text = prometheus_client.generate_latest(_checked(request).metrics.registry)
    return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)


async def openapi(request):
    """GET /openapi.json."""
    return JSONResponse(completions.openapi_document(bool(_service(request).config.api_key)))


async def docs(request):
    """GET /docs: the same to read."""
    fields = flags.fields_of(CompletionRequest)
    rows = [
        (name, completions.describe(name), "" if default is None else default, text)
        for name, (_, default, text) in fields.items()
    ]
    return _page(request, "docs.html", fields=rows)


def _page(request, name, status=200, headers=None, **values):
    service = _service(request)
    values |= {"model": service.name, "version": __version__}
    values |= {"needs_key": bool(service.config.api_key)}
    text = request.app.state.pages.get_template(name).render(values)
    return HTMLResponse(text, status, headers)


async def home(request):
    """The page; POST is for browsers without JavaScript and programs for gpt-2-flask-api."""
    service, form = _service(request), FORM_DEFAULTS
    n_ctx = service.model.config.n_ctx if service.model else 1024
    form = {"max_tokens": str(min(n_ctx // 2, service.config.max_tokens or n_ctx)), **form}
    if request.method != "POST":
        return _page(request, "page.html", form=form)
    try:
        if not _is_from_here(request.headers):
            raise Refused(403, "this form is for the page of this server alone")
        form |= _form(await _body(request))
        service.check_key(form["key"])
        found = await _whole(request, _wanted(form))
    except Refused as error:
        about = {"error": str(error), "form": form}
        return _page(request, "page.html", error.status, error.headers, **about)
    samples = [choice["text"] for choice in found["choices"]]
    return _page(request, "page.html", form=form, samples=samples)


def _is_from_here(headers):
    """Whether a form was sent by our page or by no page; a browser tells, in one way or another."""
    if site := headers.get("sec-fetch-site"):
        return site in ("same-origin", "none")
    origin = headers.get("origin")  # where there is no TLS, browsers tell only this
    return origin is None or origin.partition("://")[2] == headers.get("host")


def _form(body):
    """The fields of a form that was sent."""
    try:
        pairs = parse_qs(
            body.decode("utf-8"),
            keep_blank_values=True,
            max_num_fields=FORM_FIELDS,
            errors="strict",
        )
    except ValueError:
        raise Refused(400, "this is no form, or not in UTF-8") from None
    if "seed" not in pairs:
        raise Refused(400, "the field seed, the text to go on from, is missing", "seed")
    fields = {name: values[-1] for name, values in pairs.items()}
    # a browser sends a line's end as CRLF
    return fields | {"seed": fields["seed"].replace("\r\n", "\n")}


def _wanted(form):
    """The CompletionRequest of a form."""
    fields, values = flags.fields_of(CompletionRequest), {}
    for name, ours in FORM.items():
        if text := form[name].strip():
            try:
                values[ours] = flags.parse_value(fields[ours][0], text)
            except ValueError:
                what = completions.describe(ours)
                raise Refused(400, f"{name} takes {what}, not {text!r:.50}", name) from None
    return completions.checked(values | {"prompt": form["seed"]})
