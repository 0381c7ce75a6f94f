"""`POST /v1/captions`: pictures in, captions out, as a worker would store them."""

import asyncio
from dataclasses import replace
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from rococap import prompts
from rococap.engines import Completion
from rococap.errors import RococapError
from rococap.queue.records import clean_text, flags_of
from rococap.recipe import Recipe, refuse_placeholders
from rococap.web.access import MAX_REQUEST
from rococap.web.calls import MAX_TEXT, ApiError, RecipeOf, Service, Serving, answers, check_text, decoded, invalid
from rococap.web.captioner import flagged
from rococap.web.requests import Asked

MAX_PICTURES: Final = 64
"""Pictures in one request."""


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
        pictures, chosen = await asyncio.to_thread(_read_json, await request.body())
    most = min(MAX_PICTURES, service.captioner.requests.max_waiting)
    if not 1 <= len(pictures) <= most:
        raise ApiError(400, f"A request may have 1 to {most} pictures, not {len(pictures)}.", param="images")
    request.state.pictures = len(pictures)
    recipe = await asyncio.to_thread(_chosen_recipe, service, request.app.state.recipe_of, chosen)
    batch = service.captioner.caption(pictures, recipe.prompt)
    completions = await answers(request, batch, service.timeout)
    request.state.tokens = sum(completion.new_tokens for completion in completions)
    listed = [_listed(asked, completion) for asked, completion in zip(batch, completions, strict=True)]
    return {"captions": listed, "model": service.model, "recipe_hash": recipe.hash}


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
            fields[name] = value
        elif name != "image":
            raise ApiError(400, "Pictures are sent in the field image.", param=name)
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
