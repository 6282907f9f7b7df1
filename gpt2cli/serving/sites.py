"""Which web pages may use the server: the Host and Origin headers that browsers send."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING

from gpt2cli.serving.api import RequestError

if TYPE_CHECKING:
    from gpt2cli.commands.serve import ServeOptions

# A name, or an IPv6 address in brackets, and a port (RFC 9110, section 7.2).
HOST = re.compile(r"(?:\[([\da-f:.]+)\]|([\w.-]+))(?::\d{0,5})?", re.ASCII)
READS = ("GET", "HEAD")  # a page from elsewhere may send these, but cannot read the response


class Sites:
    """The hosts and origins that a server answers.

    Args:
        options: the server's options.
    """

    def __init__(self, options: ServeOptions) -> None:
        self.has_key = bool(options.api_key)
        self.open = self.has_key and not options.allowed_hosts
        self.every_address = _is_wildcard(options.host)
        named = ["localhost", options.host, *options.allowed_hosts]
        if self.every_address:
            named += [socket.gethostname(), f"{socket.gethostname()}.local"]  # the second: mDNS
        self.hosts = {_normal(name.strip("[]").removesuffix(".")) for name in named}
        self.origins = [_without_default_port(origin) for origin in options.allowed_origins]

    def check(self, method: str, headers: Mapping[str, str], listens: str | None) -> None:
        """Raise RequestError if a web page from elsewhere may have caused a request.

        A website can point its own name at this machine (DNS rebinding), so the Host must be known.
        A page can also send a form, or JSON that is declared as one, to a known name; then the
        Origin is that of the page. If a key is required, the page does not have it. Then the Origin
        is not checked, because some programs send one (browser extensions, Electron), and some
        proxies change the Host.

        Args:
            method: of the request.
            headers: of the request.
            listens: the address that the client connected to.
        """
        name = _name_in(headers.get("host", ""))
        if not (self.open or self._is_known(name, listens)):
            given = f"the host name {name:.100}" if name else "requests without a valid Host"
            raise RequestError(
                403, f"this server does not accept {given}; --allowed_hosts allows a name"
            )
        if self.has_key or method in READS or is_from_this_site(headers):
            return
        if "*" not in self.origins and headers.get("origin") not in self.origins:
            message = "this server does not accept requests from other websites' pages"
            raise RequestError(403, f"{message}; --allowed_origins allows an origin")

    def _is_known(self, name: str, listens: str | None) -> bool:
        """Return whether a Host is this server's; a website can misuse a name, not an address."""
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name in self.hosts
        is_local = (getattr(address, "ipv4_mapped", None) or address).is_loopback
        return is_local or self.every_address or name == listens or name in self.hosts


def is_from_this_site(headers: Mapping[str, str]) -> bool:
    """Return whether this server's own page, or a program, sent a request."""
    if site := headers.get("sec-fetch-site"):
        return site in ("same-origin", "none")
    origin = headers.get("origin")  # without TLS, browsers send only this header
    return origin is None or origin.partition("://")[2] == headers.get("host")


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that listens on a host."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_wildcard(host: str) -> bool:
    """Return whether a server that listens on a host listens on every address."""
    try:
        return not host or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _name_in(host: str) -> str:
    """Return the name in a Host header, or "" if the header is malformed."""
    found = HOST.fullmatch(host.lower())
    return _normal(found[1] or found[2].removesuffix(".")) if found else ""


def _normal(name: str) -> str:
    """Return the canonical spelling of a name or an address."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name.lower()


def _without_default_port(origin: str) -> str:
    """Return an origin as browsers send it."""
    return re.sub(r"^(http://.*):80$|^(https://.*):443$", r"\1\2", origin.lower())
