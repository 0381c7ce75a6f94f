"""Passes requests to the inference API on to the processes of a pool, and their answers back, as they come."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any, Final

import httpx
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from rococap.web.access import MAX_REQUEST
from rococap.web.api import create_api, explain_errors
from rococap.web.calls import ApiError, Events, RecipeOf, Service, explain, timed_out, unless_gone
from rococap.web.chat import error_event
from rococap.web.pool import Pool, Replica

METHODS: Final = ("DELETE", "GET", "OPTIONS", "PATCH", "POST", "PUT")
PASSED_ON: Final = (b"content-type", b"content-length")
"""Headers of requests that a process is sent. Tokens and cookies are none of its concern."""
OF_ONE_CONNECTION: Final = frozenset(["connection", "date", "keep-alive", "transfer-encoding"])
"""Headers of answers that are not passed on."""
LATE_SEC: Final = 10.0
"""How much longer than its own limit a process may take until it counts as not answering."""
DIED: Final = "The process that had this request has died, and another takes its place. Send the request again."


def api_of(service: Service | Pool, recipe_of: RecipeOf) -> ASGIApp:
    """The application below /v1."""
    return Proxy(service) if isinstance(service, Pool) else create_api(service, recipe_of)


class Proxy(Starlette):
    """Sends each request to the process with the fewest, once: what that process loses is answered with status 502.

    Only a request that no process has seen anything of goes to another one.
    """

    def __init__(self, pool: Pool) -> None:
        super().__init__(
            routes=[Route("/{path:path}", self._forward, methods=METHODS)],
            max_body_size=MAX_REQUEST,
        )
        explain_errors(self)
        self._pool = pool
        self._timeout = pool.timeout + LATE_SEC
        self._clients = {replica: _client_of(replica, self._timeout) for replica in pool.children()}

    async def _forward(self, request: Request) -> Response:
        is_read = asyncio.Event()
        try:
            return await unless_gone(request, self._answer(request, _body(request, is_read)), math.inf, is_read)
        except HTTPException:
            raise
        except Exception as error:
            return explain(error)

    async def _answer(self, request: Request, body: AsyncIterator[bytes]) -> Response:
        tried: set[Replica] = set()
        while True:
            replica = self._pool.least_loaded(tried)
            tried.add(replica)
            try:
                return await self._answer_of(replica, request, body)
            except httpx.ConnectError:
                continue
            except httpx.TransportError as error:
                raise self._explained(error) from error

    async def _answer_of(self, replica: Replica, request: Request, body: AsyncIterator[bytes]) -> Response:
        async with AsyncExitStack() as stack:
            stack.enter_context(replica.busy())
            client = self._clients[replica]
            answer = await client.send(_passed_on(client, request, body), stream=True)
            stack.push_async_callback(answer.aclose)
            headers = {name: value for name, value in answer.headers.items() if name not in OF_ONE_CONNECTION}
            if headers.get("content-type", "").startswith("text/event-stream"):
                return Events(self._events(answer), stack.pop_all(), answer.status_code, headers)
            return Response(await answer.aread(), answer.status_code, headers)

    async def _events(self, answer: httpx.Response) -> AsyncIterator[bytes]:
        try:
            async for some in answer.aiter_raw():
                yield some
        except httpx.TransportError as error:
            yield error_event(self._explained(error))

    def _explained(self, error: httpx.TransportError) -> ApiError:
        if isinstance(error, httpx.TimeoutException):
            return timed_out(self._timeout)
        return ApiError(502, DIED, code="process_died")


def _client_of(replica: Replica, timeout: float) -> httpx.AsyncClient:
    # A connection that was kept could end just when it is used again, which would look like the death of the process.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    transport = httpx.AsyncHTTPTransport(uds=str(replica.socket), limits=limits)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=timeout)


def _passed_on(client: httpx.AsyncClient, request: Request, body: AsyncIterator[bytes]) -> httpx.Request:
    headers = [(name, value) for name, value in request.headers.raw if name in PASSED_ON]
    has_body = "content-length" in request.headers or "transfer-encoding" in request.headers
    scope: dict[str, Any] = dict(request.scope)
    # httpx would resolve the dots in an address, which could then lead out of the API.
    target = {"target": scope["raw_path"] + b"?" + scope["query_string"]}
    content = body if has_body else None
    return client.build_request(request.method, "/", headers=headers, content=content, extensions=target)


async def _body(request: Request, is_read: asyncio.Event) -> AsyncIterator[bytes]:
    async for some in request.stream():
        yield some
    is_read.set()
