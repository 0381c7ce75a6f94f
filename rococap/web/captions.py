"""`POST /v1/captions`: pictures in, captions out, as a worker would store them."""

import asyncio
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from rococap import prompts
from rococap.engines import Completion
from rococap.errors import DatabaseError, RococapError
from rococap.queue.records import clean_text, flags_of
from rococap.recipe import Recipe, refuse_placeholders
from rococap.web.access import MAX_REQUEST
from rococap.web.calls import (
    MAX_QUOTED,
    MAX_TEXT,
    ApiError,
    RecipeOf,
    Service,
    Serving,
    answers,
    check_text,
    decoded,
    invalid,
    is_form,
)
from rococap.web.captioner import flagged
from rococap.web.requests import Asked

MAX_PICTURES: Final = 64
"""Pictures in one request."""
LENGTH: Final[dict[str, Any]] = {"minItems": 1, "maxItems": MAX_PICTURES}
"""For the description only: the limit that applies is lower if `--max-waiting` is."""


class CaptionsRequest(BaseModel):
    """Pictures, as base64 or data URLs, and at most one of the three ways to choose the prompt."""

    model_config = ConfigDict(extra="forbid")

    images: list[str] = Field(json_schema_extra=LENGTH)
    run: str | None = None
    preset: str | None = None
    prompt: str | None = None


class CaptionFailure(BaseModel):
    """Why a picture has no caption."""

    code: str
    message: str


class Caption(BaseModel):
    """The caption of a picture, or the failure that it has instead."""

    caption: str | None
    flags: list[str]
    finish_reason: str | None
    prompt_tokens: int
    new_tokens: int
    failure: CaptionFailure | None


class Captions(BaseModel):
    """The captions of a request's pictures, in order, and what made them."""

    captions: list[Caption]
    model: str
    recipe_hash: str


def _described() -> dict[str, Any]:
    """The two forms of a request, which FastAPI cannot tell from the signature."""
    as_json = CaptionsRequest.model_json_schema()
    fields = {name: field for name, field in as_json["properties"].items() if name != "images"}
    pictures = {"type": "array", "items": {"type": "string", "format": "binary"}} | LENGTH
    as_form = {"type": "object", "properties": {"image": pictures} | fields, "required": ["image"]}
    content = {"application/json": {"schema": as_json}, "multipart/form-data": {"schema": as_form}}
    return {"requestBody": {"required": True, "content": content}}


CAPTIONS: Final[dict[str, Any]] = {"openapi_extra": _described()}
"""What FastAPI is told of the route."""


async def captions(request: Request, service: Serving) -> Captions:
    """Captions pictures, which are sent as a form or as JSON. A picture that has no caption fails alone."""
    if is_form(request):
        pictures, chosen = await _read_form(request)
    else:
        pictures, chosen = await asyncio.to_thread(_read_json, await request.body())
    most = min(MAX_PICTURES, service.captioner.requests.max_waiting)
    if not 1 <= len(pictures) <= most:
        raise ApiError(400, f"A request may have 1 to {most} pictures, not {len(pictures)}.", param="images")
    request.state.pictures = len(pictures)
    choose = partial(_chosen_recipe, service, request.app.state.recipe_of, chosen)
    recipe = choose() if chosen.run is None else await asyncio.to_thread(choose)  # a run is read from the database
    batch = service.captioner.caption(pictures, recipe.prompt)
    completions = await answers(request, batch, service.timeout)
    request.state.tokens = sum(completion.new_tokens for completion in completions)
    listed = [_listed(asked, completion) for asked, completion in zip(batch, completions, strict=True)]
    return Captions(captions=listed, model=service.model, recipe_hash=_hash_of(recipe))


def _read_json(body: bytes) -> tuple[list[bytes], CaptionsRequest]:
    try:
        chosen = CaptionsRequest.model_validate_json(body)
    except ValidationError as error:
        raise invalid(error.errors()[0]) from error
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
            if name in ("image", "images"):
                raise ApiError(
                    400, f"{name} is a text here. Pictures are sent as files, in the field image.", param=name
                )
            fields[name] = value
        elif name != "image":
            raise ApiError(400, "Pictures are sent in the field image.", param=name[:MAX_QUOTED])
        else:
            pictures.append(await value.read())
    await form.close()
    try:
        return pictures, CaptionsRequest.model_validate(fields)
    except ValidationError as error:
        raise invalid(error.errors()[0]) from error


def _chosen_recipe(service: Service, recipe_of: RecipeOf, chosen: CaptionsRequest) -> Recipe:
    """The recipe that is served, with the prompt that a request chooses. Raises ApiError."""
    named = {name: value for name in ("run", "preset", "prompt") if (value := getattr(chosen, name)) is not None}
    if len(named) > 1:
        raise ApiError(400, f"{' and '.join(named)} exclude one another: give only one of them.", param=min(named))
    recipe = service.captioner.recipe
    try:
        match named:
            # PostgreSQL has no texts with NUL.
            case {"run": name} | {"preset": name} if len(name) > MAX_QUOTED or "\0" in name:
                raise ApiError(400, f"A name has at most {MAX_QUOTED} characters, and no NUL.", param=next(iter(named)))
            case {"run": name}:
                return replace(recipe, prompt=_prompt_of(recipe_of(name), name, recipe))
            case {"preset": name}:
                return replace(recipe, prompt=prompts.find(name).prompt)
            case {"prompt": text}:
                check_text(text, "prompt")
                refuse_placeholders(text)
                return replace(recipe, prompt=text)
    except (ApiError, DatabaseError):
        raise
    except (RococapError, ValueError) as error:
        raise ApiError(400, str(error), param=next(iter(named))) from error
    return recipe


@lru_cache(maxsize=8)
def _hash_of(recipe: Recipe) -> str:
    return recipe.hash


def _prompt_of(run: Recipe, name: str, served: Recipe) -> str:
    if (run.model, run.adapter) != (served.model, served.adapter):
        raise ApiError(400, f"Run {name!r} has another model than the one served here.", param="run")
    return run.prompt


def _listed(asked: Asked, completion: Completion) -> Caption:
    """A caption in the answer. Its text and flags are those that a worker stores."""
    completion = flagged(asked, completion)
    failure = completion.failure
    flags = "" if failure else flags_of(completion.text, completion.finish_reason, completion.flags)
    return Caption(
        caption=None if failure else clean_text(completion.text),
        flags=[flag for flag in flags.split(",") if flag],
        finish_reason=None if failure else completion.finish_reason,
        prompt_tokens=completion.prompt_tokens,
        new_tokens=completion.new_tokens,
        failure=None if failure is None else CaptionFailure(code=failure.code, message=failure.message),
    )
