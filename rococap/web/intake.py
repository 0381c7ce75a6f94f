"""What happens before a request is answered: whether there is room for it, before its body is read, and its log line.

Nothing that a client has sent is logged but sizes and times, and the path if the API has it.
"""

import logging
import time
from collections.abc import Collection
from typing import Final

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rococap.web.access import API
from rococap.web.calls import GONE, ApiError, Service, error_response, explain, is_form

log = logging.getLogger(__name__)

MAX_REQUESTS: Final = 1_000
"""Requests that are answered at a time, open pages included."""
MAX_HELD: Final = 512_000_000
"""Bytes that all requests to the API together may have sent and not been answered yet."""
MAX_VALUES: Final = 200_000
"""Values in a JSON document, of which each takes many times the memory of its text. A picture in base64 is one."""
MEDIA_TYPES: Final = ("application/json", "multipart/form-data")

# Its warnings about broken forms quote them; the answer says what is wrong.
logging.getLogger("python_multipart").setLevel(logging.ERROR)


class Bounded:
    """ASGI middleware that answers at most MAX_REQUESTS at a time. Whether the process lives is always answered.

    HEAD is answered as GET, wherever there is one: uvicorn leaves the body out.

    The connection of a client that has kept its body back, and is not asked for it, is closed: it must not send
    another request in the body's place.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._n = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        app = self._app
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        if self._n >= MAX_REQUESTS and not scope["path"].startswith("/health"):
            app = error_response(503, f"{MAX_REQUESTS:,} requests are being answered. Try again later.")
        keeps_back = Headers(scope=scope).get("expect", "").lower() == "100-continue"

        async def take() -> Message:
            nonlocal keeps_back
            keeps_back = False
            return await receive()

        async def answer(message: Message) -> None:
            if keeps_back and message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        self._n += 1
        try:
            await app(scope, take, answer)
        finally:
            self._n -= 1


class Intake:
    """ASGI middleware before the routes of the API, which are at these `paths`."""

    def __init__(self, app: ASGIApp, service: Service, paths: Collection[str]) -> None:
        self._app = app
        self._service = service
        self._paths = paths
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        is_json = not is_form(request)
        began = time.monotonic()
        status = n_bytes = n_values = 0
        is_read = False

        async def take() -> Message:
            nonlocal n_bytes, n_values, is_read
            message = await receive()
            if message["type"] == "http.disconnect" and not is_read:
                raise HTTPException(499, GONE)  # FastAPI would call it a body that cannot be read
            is_read = not message.get("more_body", False)
            body = message.get("body", b"")
            n_bytes += len(body)
            self._held += len(body)
            if body and time.monotonic() - began > self._service.timeout:
                raise HTTPException(408, f"The request was not sent within {self._service.timeout:g} s.")
            if body and self._held > MAX_HELD:
                raise HTTPException(429, "The requests of all clients are too large together. Try again later.")
            if is_json:
                n_values += sum(map(body.count, (b",", b"[", b"{")))
                if n_values > MAX_VALUES:
                    raise HTTPException(400, f"A request may have at most {MAX_VALUES:,} values.")
            return message

        async def answer(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if request.method == "POST":
                _check_head(request)
                self._service.captioner.check_room()
            await self._app(scope, take, answer)
        except Exception as error:
            response = explain(error)
            if not status:
                await response(scope, receive, answer)
        finally:
            self._held -= n_bytes
            path, seconds = self._path(scope), time.monotonic() - began
            self._service.captioner.meter.answered(path, status, seconds)
            state = scope.get("state", {})
            log.info(
                "%s %s: %d, %d bytes, %d pictures, %d tokens, %.0f ms",
                *(request.method, path, status, n_bytes),
                *(state.get("pictures", 0), state.get("tokens", 0), 1_000 * seconds),
            )

    def _path(self, scope: Scope) -> str:
        """The path if the API has it. Others may hold anything."""
        path: str = scope["path"]
        return path if path in self._paths else f"{API}…"


def _check_head(request: Request) -> None:
    """Raises ApiError for a body that is not read."""
    media_type, options = parse_options_header(request.headers.get("content-type", MEDIA_TYPES[0]))
    if media_type.decode("latin-1") not in MEDIA_TYPES:
        raise ApiError(415, f"Requests are sent as {' or '.join(MEDIA_TYPES)}.")
    # Others would be decoded as well, of which punycode takes half a minute for a text of 400 kB.
    if options.get(b"charset", b"utf-8").lower() != b"utf-8":
        raise ApiError(415, "Requests are sent in UTF-8.")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "Compressed requests are not read. Send the request without Content-Encoding.")
