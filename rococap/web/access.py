"""Who may ask for what: hosts, tokens, origins, and the headers that every answer carries.

This stands before every route, so that no page can forget it. A write is any request that is not GET, HEAD or OPTIONS.
"""

import hmac
import re
import secrets
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rococap.errors import RococapError

READS: Final = frozenset(["GET", "HEAD", "OPTIONS"])
OPEN_PATHS: Final = ("/health", "/static/")
"""Beginnings of paths that need no token. What they answer tells nothing about the queue."""
SHORTEST_TOKEN: Final = 16
MAX_BODY: Final = 1_000_000
"""Bytes that a request may send."""
API: Final = "/v1/"
"""The beginning of the paths of the inference API."""
MAX_REQUEST: Final = 64_000_000
"""Bytes that a request to the inference API may send."""

HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    # Not `no-referrer`, with which browsers send forms with the origin `null`.
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


class Refused(RococapError):
    """A request that is not answered, with its HTTP `status`."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Access:
    """What a server lets through. `hosts` are names that its pages may be asked for by, in lower case, besides IP
    addresses, to which no name can be rebound. Without a `token`, everybody who reaches the server may use it.
    """

    port: int
    hosts: frozenset[str]
    token: str | None = None
    read_only: bool = False

    @property
    def cookie(self) -> str:
        """The cookie's name. Browsers send cookies to every port of a host, so that servers need names of their own."""
        return f"rococap-{self.port}"


def is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ip_address(host).is_loopback)


def link_to(host: str, port: int) -> str:
    """The address for people to open. Where a server listens at every address, it is found by the machine's name."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/"


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def access_for(host: str, port: int, *, token: str, names: Iterable[str] = (), read_only: bool = False) -> Access:
    """The access to a server at this address. Beyond loopback it needs a token: `token`, or a new one if that is empty.

    Raises RococapError for a token that is too short to be secret, or that no header or cookie can hold.
    """
    if token and not re.fullmatch(rf"[A-Za-z0-9._~+/=-]{{{SHORTEST_TOKEN},}}", token):
        raise RococapError(
            f"ROCOCAP_TOKEN must have {SHORTEST_TOKEN} characters or more, letters, digits and ._~+/=- only. Make one: "
            "export ROCOCAP_TOKEN=$(python3 -c 'import secrets; print(secrets.token_urlsafe())'), or unset it"
        )
    if not token and not is_loopback(host):
        token = secrets.token_urlsafe()
    hosts = {"localhost", socket.gethostname().lower(), host.lower(), *(name.lower() for name in names)}
    return Access(port, frozenset(hosts), token or None, read_only)


Refuse = Callable[[Request, Refused], Response]
"""Makes the answer to a request that was refused."""


class Guard:
    """ASGI middleware that refuses what `access` does not allow, and adds those of HEADERS that an answer lacks."""

    def __init__(self, app: ASGIApp, access: Access, refuse: Refuse) -> None:
        self._app = app
        self._access = access
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # there are no WebSockets, and nothing is to be done when the server starts and ends

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in (HEADERS | {"Cache-Control": "no-store"}).items():
                    headers.setdefault(name, value)
            await send(message)

        request = Request(scope)
        try:
            answer = self._answer(request)
        except Refused as error:
            answer = self._refuse(request, error)
        await (answer or self._app)(scope, receive, send_with_headers)

    def _answer(self, request: Request) -> Response | None:
        """The answer to a request that needs no route; None if a route may answer it. Raises Refused."""
        _check_host(request, self._access)
        most = MAX_REQUEST if request.url.path.startswith(API) else MAX_BODY
        if int(request.headers.get("content-length", "0")) > most:
            raise Refused(413, f"A request to this address may have at most {most:,} bytes.")
        is_write = request.method not in READS
        if is_write:
            _check_origin(request)
        if self._access.token and not request.url.path.startswith(OPEN_PATHS):
            answer = _identify(request, self._access, self._access.token)
            if answer is not None:
                return answer
        if is_write and self._access.read_only:
            raise Refused(403, "This server only shows the queue: it was started with --read-only.")
        return None


def _check_host(request: Request, access: Access) -> None:
    """Without this, a page of another site could have its own name resolved to this server, and read from it."""
    given = request.headers.get("host", "")
    try:
        host = (urlsplit(f"//{given}").hostname or "").rstrip(".")
    except ValueError:
        host = ""
    if not (_is_address(host) or host in access.hosts):
        raise Refused(
            421,
            f"This server is not called {given[:100]!r}. Open it by its IP address, or start it with "
            "--allow-host NAME for the name that you use.",
        )


def _check_origin(request: Request) -> None:
    """Browsers name the origin of every write. Programs that are no browsers need not: nobody can lure them."""
    origin = request.headers.get("origin")
    if origin is None:
        is_own = request.headers.get("sec-fetch-site", "none") in ("none", "same-origin")
    else:
        is_own = origin.partition("://")[2].lower() == request.headers.get("host", "").lower()
    if not is_own:
        raise Refused(403, "A page of another site asked for this change, so nothing was changed.")


def _identify(request: Request, access: Access, token: str) -> Response | None:
    """None if the request has the token in its Authorization header or its cookie. `/?token=` sets the cookie."""
    given = request.query_params.get("token") if request.url.path == "/" else None
    if given is not None and request.method == "GET":
        if not _equal(given, token):
            raise Refused(401, "This token is wrong. The right one is in the output of rococap serve.")
        answer = RedirectResponse("/", status_code=303)
        is_https = request.url.scheme == "https"
        answer.set_cookie(access.cookie, token, httponly=True, samesite="strict", secure=is_https)
        return answer
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and _equal(bearer.strip(), token):
        return None
    if _equal(request.cookies.get(access.cookie, ""), token):
        return None
    if request.method == "GET" and request.headers.get("sec-fetch-site") == "cross-site":
        return _once_more(request)
    raise Refused(401, "This server needs its token, which is in the output of rococap serve.")


def _equal(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _once_more(request: Request) -> Response:
    """A page that asks for the same address again. After a link on another site, browsers keep strict cookies back."""
    url = escape(str(request.url))
    return HTMLResponse(
        f'<!doctype html><meta http-equiv="refresh" content="0; url={url}"><a href="{url}">Continue</a>'
    )
