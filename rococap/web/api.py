"""The inference API: captions and chat over HTTP, below /v1. Errors have OpenAI's shape, which every client reads."""

import asyncio
import base64
import binascii
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from rococap import prompts
from rococap.engines import Completion
from rococap.errors import RococapError
from rococap.queue.records import clean_text, flags_of
from rococap.recipe import Recipe, refuse_placeholders
from rococap.web.access import MAX_REQUEST
from rococap.web.captioner import LOADING, Captioner, flagged
from rococap.web.requests import Asked, Busy, Unavailable

log = logging.getLogger(__name__)

MAX_PICTURES: Final = 64
"""Pictures in one request."""
MAX_TEXT: Final = 100_000
"""Characters in one text of a request."""
RETRY_SEC: Final = 1
"""After how long a client may try again when the queue was full."""

RecipeOf = Callable[[str], Recipe]
"""The recipe of the run of this name. Raises RococapError if there is none."""


@dataclass(frozen=True, slots=True)
class Service:
    """What the API answers with: a model, and the name that clients know it by. `timeout` is in seconds."""

    captioner: Captioner
    model: str
    timeout: float


class ApiError(RococapError):
    """A request that is answered with this HTTP `status`. `param` names the field that is at fault."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Serving = Annotated[Service, Depends(service_of)]


def create_api(service: Service, recipe_of: RecipeOf) -> FastAPI:
    """The application below /v1."""
    api = FastAPI(openapi_url=None, max_body_size=MAX_REQUEST, telemetry={"auto_configure": False})
    api.state.service = service
    api.state.recipe_of = recipe_of
    api.add_api_route("/captions", captions, methods=["POST"])
    api.add_api_route("/models", models, methods=["GET"])
    api.add_exception_handler(RococapError, _explain)
    api.add_exception_handler(HTTPException, _explain_status)
    api.add_exception_handler(RequestValidationError, _explain_validation)
    api.add_exception_handler(Exception, _report)
    return api


# --- models ----------------------------------------------------------------------------------------------------


def models(service: Serving) -> dict[str, Any]:
    """The one model that is served, as OpenAI lists models. `root` changes with its weights."""
    if service.captioner.info is None:
        raise Unavailable(LOADING)
    digest = service.captioner.info.digest
    model = {"id": service.model, "object": "model", "created": 0, "owned_by": "rococap", "root": digest}
    return {"object": "list", "data": [model]}


# --- captions --------------------------------------------------------------------------------------------------


class CaptionsRequest(BaseModel):
    """Pictures, as base64 or data URLs, and at most one of the three ways to choose the prompt."""

    model_config = ConfigDict(extra="forbid")

    images: list[str]
    run: str | None = None
    preset: str | None = None
    prompt: str | None = None


async def captions(request: Request, service: Serving) -> dict[str, Any]:
    """Captions pictures, which are sent as a form or as JSON. A picture that has no caption fails alone."""
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        pictures, chosen = await _read_form(request)
    else:
        pictures, chosen = await _read_json(request)
    if not 1 <= len(pictures) <= (most := min(MAX_PICTURES, service.captioner.requests.max_waiting)):
        raise ApiError(400, f"A request may have 1 to {most} pictures, not {len(pictures)}.", param="images")
    recipe = await asyncio.to_thread(_chosen_recipe, service, request.app.state.recipe_of, chosen)
    batch = service.captioner.caption(pictures, recipe.prompt)
    async with answered(request, batch, service.timeout) as completions:
        listed = [_listed(asked, completion) for asked, completion in zip(batch, completions, strict=True)]
    return {"captions": listed, "model": service.model, "recipe_hash": recipe.hash}


async def _read_json(request: Request) -> tuple[list[bytes], CaptionsRequest]:
    try:
        chosen = CaptionsRequest.model_validate_json(await request.body())
    except ValidationError as error:
        raise _invalid(error.errors()[0]) from error
    return [decoded(text, f"images[{number}]") for number, text in enumerate(chosen.images)], chosen


async def _read_form(request: Request) -> tuple[list[bytes], CaptionsRequest]:
    parser = MultiPartParser(
        request.headers, request.stream(), max_files=MAX_PICTURES, max_fields=10, max_part_size=4 * MAX_TEXT
    )
    parser.spool_max_size = MAX_REQUEST  # nothing of a request is written to disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise ApiError(400, f"The form cannot be read: {error.message}") from error
    pictures: list[bytes] = []
    fields: dict[str, Any] = {"images": []}
    for name, value in form.multi_items():
        if isinstance(value, str):
            fields[name] = value
        elif name != "image":
            raise ApiError(400, "Pictures are sent in the field image.", param=name)
        else:
            pictures.append(await value.read())
    await form.close()
    try:
        return pictures, CaptionsRequest.model_validate(fields)
    except ValidationError as error:
        raise _invalid(error.errors()[0]) from error


def _chosen_recipe(service: Service, recipe_of: RecipeOf, chosen: CaptionsRequest) -> Recipe:
    """The recipe that is served, with the prompt that a request chooses. Raises ApiError."""
    named = {name: value for name in ("run", "preset", "prompt") if (value := getattr(chosen, name)) is not None}
    if len(named) > 1:
        raise ApiError(400, f"{' and '.join(named)} exclude one another: give only one of them.", param=min(named))
    recipe = service.captioner.recipe
    try:
        match named:
            case {"run": name}:
                return replace(recipe, prompt=_prompt_of(recipe_of(name), name, recipe))
            case {"preset": name}:
                return replace(recipe, prompt=prompts.find(name).prompt)
            case {"prompt": text}:
                check_text(text, "prompt")
                refuse_placeholders(text)
                return replace(recipe, prompt=text)
    except (RococapError, ValueError) as error:
        if isinstance(error, ApiError):
            raise
        raise ApiError(400, str(error), param=next(iter(named))) from error
    return recipe


def _prompt_of(run: Recipe, name: str, served: Recipe) -> str:
    if (run.model, run.adapter) != (served.model, served.adapter):
        raise ApiError(400, f"Run {name!r} has another model than the one served here.", param="run")
    return run.prompt


def _listed(asked: Asked, completion: Completion) -> dict[str, Any]:
    """A caption in the answer. Its text and flags are those that a worker stores."""
    completion = flagged(asked, completion)
    failure = completion.failure
    flags = "" if failure else flags_of(completion.text, completion.finish_reason, completion.flags)
    return {
        "caption": None if failure else clean_text(completion.text),
        "flags": [flag for flag in flags.split(",") if flag],
        "finish_reason": None if failure else completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "new_tokens": completion.new_tokens,
        "failure": failure and {"code": failure.code, "message": failure.message},
    }


# --- what all requests share -----------------------------------------------------------------------------------


def decoded(text: str, param: str) -> bytes:
    """The bytes of a picture that is given as base64 or as a data URL. Raises ApiError."""
    if text.startswith(("http://", "https://", "file:", "ftp:")):
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
    """Raises ApiError if a text is too long."""
    if len(text) > MAX_TEXT:
        raise ApiError(400, f"A text may have {MAX_TEXT:,} characters, not {len(text):,}.", param=param)


@asynccontextmanager
async def answered(request: Request, batch: Sequence[Asked], timeout: float) -> AsyncIterator[list[Completion]]:
    """Waits for the answers. Frees the places of requests whose client has gone, or has waited for `timeout` seconds.

    Raises ApiError for a time-out, and whatever a request failed with.
    """
    answers: asyncio.Future[list[Completion]] = asyncio.gather(*(asyncio.wrap_future(asked.answer) for asked in batch))
    gone: asyncio.Future[None] = asyncio.create_task(_disconnected(request))
    try:
        both: list[asyncio.Future[Any]] = [answers, gone]
        await asyncio.wait(both, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not answers.done():
            raise Gone if gone.done() else ApiError(504, f"There was no answer within {timeout:g} s.", code="timeout")
        yield answers.result()
    finally:
        gone.cancel()
        answers.cancel()


class Gone(ApiError):
    """The client has closed the connection, so nobody reads the answer."""

    def __init__(self) -> None:
        super().__init__(499, "The client has closed the connection.")


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# --- what goes wrong -------------------------------------------------------------------------------------------

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_response(status: int, message: str, *, code: str | None = None, param: str | None = None) -> JSONResponse:
    """An error in OpenAI's shape."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": str(RETRY_SEC)}}.get(status)
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status, headers)


def _explain(request: Request, error: Exception) -> Response:
    match error:
        case ApiError():
            return error_response(error.status, str(error), code=error.code, param=error.param)
        case Busy():
            return error_response(429, str(error), code="queue_full")
        case Unavailable():
            return error_response(503, str(error), code="unavailable")
    return error_response(503, str(error))  # the database


def _explain_status(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {404: "There is no such address.", 413: f"A request may have {MAX_REQUEST:,} bytes."}
    return error_response(error.status_code, messages.get(error.status_code, error.detail))


def _explain_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _explain(request, _invalid(error.errors()[0]))


def _invalid(first: Any) -> ApiError:
    """The error for what pydantic found first. It quotes nothing of the request."""
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    return ApiError(400, f"{where or 'The request'}: {first['msg']}.", param=where or None)


def _report(request: Request, error: Exception) -> Response:
    log.error("%s failed", request.url.path, exc_info=error)
    return error_response(500, "The server could not answer this request. Its log says why.")
