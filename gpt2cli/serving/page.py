"""The web page: its templates, and the form that browsers without JavaScript send."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import jinja2

from gpt2cli import __version__
from gpt2cli.serving.api import CompletionRequest, RequestError

if TYPE_CHECKING:
    from gpt2cli.serving.service import Service

WEB = Path(__file__).parent / "web"
# In memory, so that no request needs to open a file.
PAGES = jinja2.Environment(
    loader=jinja2.DictLoader({path.name: path.read_text("utf-8") for path in WEB.glob("*.html")}),
    autoescape=True,
)
STATIC = {path.name: path.read_bytes() for path in (WEB / "static").iterdir()}
KINDS = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}

# Headers of every response: the page needs nothing from other sites and may send nothing to them.
POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    b"connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
SECURITY = [
    (b"content-security-policy", POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]
# Fields of the form: the name in the API, and the default. As in gpt-2-flask-api, `seed` is the
# prompt; the defaults are its lengths and temperatures (deployment/run_server.py).
FIELDS = {
    "seed": ("prompt", ""),
    "max_tokens": ("max_tokens", ""),
    "temperature": ("temperature", "0.7"),
    "top_k": ("top_k", "40"),
    "top_p": ("top_p", "1"),
    "repetition_penalty": ("repetition_penalty", "1"),
    "n": ("n", "1"),
    "random_seed": ("seed", ""),
    "special": ("special", "text"),  # not on the page
}
NOT_SENT_ON = ("key", "submit")  # the API key; the button of gpt-2-flask-api's form
MAX_FIELDS = 50  # a form with more is rejected


def render(service: Service, name: str, **values: Any) -> str:
    """Return the HTML of a template of web/."""
    values |= {"model": service.name, "version": __version__}
    values |= {"needs_key": bool(service.options.api_key)}
    return PAGES.get_template(name).render(values)


def empty_form(service: Service) -> dict[str, str]:
    """Return the form's default values."""
    n_ctx = service.model.config.n_ctx if service.model else 1024
    form = {field: default for field, (_, default) in FIELDS.items()}
    return form | {"max_tokens": str(min(n_ctx // 2, service.options.max_tokens or n_ctx))}


def read_form(body: bytes) -> dict[str, str]:
    """Return the fields of a submitted form.

    Raises:
        RequestError: it is not a form, has no prompt, or has a field that does not exist.
    """
    try:
        pairs = parse_qs(
            body.decode("utf-8"),
            keep_blank_values=True,
            max_num_fields=MAX_FIELDS,
            errors="strict",
        )
    except ValueError:
        raise RequestError(400, "the request is not a form in UTF-8") from None
    if "seed" not in pairs:
        raise RequestError(400, "the form's field seed, the text to continue, is missing", "seed")
    unknown = next((name for name in pairs if name not in (*FIELDS, *NOT_SENT_ON)), None)
    if unknown is not None:
        known = ", ".join(FIELDS)
        raise RequestError(
            400, f"unknown field {unknown:.50}; the fields are {known}", unknown[:50]
        )
    twice = next((name for name, values in pairs.items() if len(values) > 1), None)
    if twice is not None:
        raise RequestError(400, f"the field {twice} is given twice", twice)
    fields = {name: values[0] for name, values in pairs.items()}
    # browsers send line ends as CRLF
    return fields | {"seed": fields["seed"].replace("\r\n", "\n")}


def request_of(form: Mapping[str, str]) -> CompletionRequest:
    """Return the request that a form makes; raises RequestError for a wrong value."""
    values = {name: form[field] for field, (name, _) in FIELDS.items() if form[field].strip()}
    return CompletionRequest.checked(values | {"prompt": form["seed"]}, strict=False)
