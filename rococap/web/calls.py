"""What the calls of the inference API share: what they answer with, how they wait for it, and how they fail.

Errors have OpenAI's shape, which every client reads.
"""

import asyncio
import base64
import binascii
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeVar

from fastapi import Depends
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from rococap.engines import Completion
from rococap.errors import RococapError
from rococap.recipe import Recipe
from rococap.web.access import MAX_REQUEST
from rococap.web.captioner import Captioner
from rococap.web.requests import Asked, Busy, Unavailable

log = logging.getLogger(__name__)

MAX_TEXT: Final = 100_000
"""Characters in one text of a request."""
MAX_QUOTED: Final = 200
"""Characters of a request that an error repeats."""
RETRY_SEC: Final = 1
"""After how long a client may try again when the queue was full, or the model was loading."""
GONE: Final = "The client has closed the connection."
"""An answer that nobody reads."""

T = TypeVar("T")
RecipeOf = Callable[[str], Recipe]
"""The recipe of the run of this name. Raises RococapError if there is none."""


@dataclass(frozen=True, slots=True)
class Service:
    """What the API answers with: a model, and the name that clients know it by. `timeout` is in seconds."""

    captioner: Captioner
    model: str
    timeout: float

    @property
    def state(self) -> str:
        return self.captioner.state


async def service_of(request: Request) -> Service:
    # FastAPI would call a plain function in another thread.
    service: Service = request.app.state.service
    return service


Serving = Annotated[Service, Depends(service_of)]
"""The annotation of a route's parameter that receives the service."""


# --- errors ----------------------------------------------------------------------------------------------------

TYPES: Final = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Problem(BaseModel):
    """What went wrong. `param` names the field that is at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """An error, in OpenAI's shape."""

    error: Problem


ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    "4XX": {"model": ErrorAnswer, "description": "The request is wrong, or too many are waiting."},
    "5XX": {
        "model": ErrorAnswer,
        "description": "The server failed, is loading or stopping, or took too long.",
    },
}
"""The answers to requests that fail, for the OpenAPI document."""


class ApiError(RococapError):
    """A request that is answered with this HTTP `status`. `param` names the field that is at fault."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


def error_response(
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error in OpenAI's shape."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    later = {"Retry-After": str(RETRY_SEC)}
    headers = headers or {401: {"WWW-Authenticate": "Bearer"}, 429: later, 503: later}.get(status)
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status, headers)


def explain(error: Exception) -> JSONResponse:
    """The answer to a request that failed. An unexpected error is logged."""
    match error:
        case ApiError():
            return error_response(error.status, str(error), code=error.code, param=error.param)
        case Busy():
            return error_response(429, str(error), code="queue_full")
        case Unavailable():
            # A connection that is kept could end just when the next request is sent.
            later = {"Retry-After": str(RETRY_SEC), "Connection": "close"}
            return error_response(503, str(error), code="unavailable", headers=later)
        case RococapError():  # the database
            return error_response(503, str(error))
        case ClientDisconnect():
            return error_response(499, GONE)
    log_failure("a request failed", error)
    return error_response(500, "The server could not answer this request. Its log says why.")


def explain_status(request: Request, error: HTTPException) -> JSONResponse:
    """The answer to a request that has only a status."""
    messages = {
        404: "There is no such address. Those of the API begin with /v1/, and /docs describes them.",
        405: f"This address does not take {request.method}.",
        413: f"A request may have at most {MAX_REQUEST:,} bytes. Send its pictures in several requests.",
    }
    code = "queue_full" if error.status_code == 429 else None
    message = messages.get(error.status_code, error.detail)
    return error_response(error.status_code, message, code=code, headers=error.headers)


def log_failure(what: str, error: Exception) -> None:
    """Logs where an error happened. What it says may quote a request, and is only logged with --debug."""
    if log.isEnabledFor(logging.DEBUG):
        log.error(what, exc_info=error)
    else:
        log.error("%s (%s):\n%s", what, type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))


def invalid(first: Any) -> ApiError:
    """The error for what pydantic found first. It quotes the name of a field at most."""
    is_json = first["type"] != "json_invalid"  # else it says at which character, as if that were a field
    where = ".".join(str(part) for part in first["loc"] if part != "body")[:MAX_QUOTED] if is_json else ""
    return ApiError(400, f"{where or 'The request'}: {first['msg'][:MAX_QUOTED]}.", param=where or None)


# --- what is sent ----------------------------------------------------------------------------------------------


def is_form(request: Request) -> bool:
    """Whether a request is sent as a form. The names of media types have no case."""
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


def decoded(text: str, param: str) -> bytes:
    """The bytes of a picture that is given as base64 or as a data URL. Raises ApiError."""
    if text[:8].lower().startswith(("http://", "https://", "file:", "ftp:")):
        raise ApiError(
            400,
            "The server fetches no pictures. Send the picture itself, as a data URL.",
            code="remote_url",
            param=param,
        )
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise ApiError(400, "A data URL must look like data:image/png;base64,…", param=param)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"This is not base64: {error}.", param=param) from error


def check_text(text: str, param: str) -> None:
    """Raises ApiError if a text is too long, or no Unicode, as half of a surrogate pair."""
    if len(text) > MAX_TEXT:
        raise ApiError(400, f"A text may have {MAX_TEXT:,} characters, not {len(text):,}.", param=param)
    if text != text.encode(errors="replace").decode():
        raise ApiError(400, "A text is not valid Unicode.", param=param)


def check_model(name: str, service: Service) -> None:
    """Raises ApiError if the model that is served has another name."""
    if name != service.model:
        message = f"The model {name[:100]!r} does not exist. This server has {service.model!r}."
        raise ApiError(404, message, code="model_not_found", param="model")


# --- waiting ---------------------------------------------------------------------------------------------------


async def answers(request: Request, batch: Sequence[Asked], timeout: float) -> list[Completion]:
    """Waits for the answers. Frees the places of requests whose client has gone, or has waited for `timeout` seconds.

    Raises ApiError for both, and whatever a request failed with.
    """
    try:
        found = await unless_gone(request, _all(batch), timeout)
    finally:
        for asked in batch:
            asked.answer.cancel()
    completions = [one for one in found if isinstance(one, Completion)]
    if len(completions) < len(found):
        raise next(one for one in found if isinstance(one, BaseException))
    return completions


async def _all(batch: Sequence[Asked]) -> list[Completion | BaseException]:
    return await asyncio.gather(*(asyncio.wrap_future(asked.answer) for asked in batch), return_exceptions=True)


async def unless_gone(request: Request, work: Awaitable[T], timeout: float, is_read: asyncio.Event | None = None) -> T:
    """The result of `work`, which is cancelled when the client has gone, or has waited for `timeout` seconds.

    Work that reads the request says with `is_read` that it has done so. Raises ApiError for both.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request, is_read))
    both: list[asyncio.Future[Any]] = [working, gone]
    try:
        await asyncio.wait(both, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if gone.done():
            raise ApiError(499, GONE)
        raise timed_out(timeout)
    finally:
        for one in both:
            one.cancel()


def timed_out(timeout: float) -> ApiError:
    return ApiError(504, f"There was no answer within {timeout:g} s.", code="timeout")


async def _disconnected(request: Request, is_read: asyncio.Event | None) -> None:
    if is_read is not None:
        await is_read.wait()
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Events(StreamingResponse):
    """Server-sent events. However they end, `stack` is closed afterwards."""

    def __init__(
        self,
        events: AsyncIterator[bytes],
        stack: AsyncExitStack,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(events, status, headers, media_type="text/event-stream")
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            await super().__call__(scope, receive, send)
