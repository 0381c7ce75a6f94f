"""The pictures as files for browsers: thumbnails, and full pictures with all their pixels."""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Path, Query
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from rococap import queue
from rococap.queue import Run
from rococap.web.pictures import Pictures, Source, source_of, version_of
from rococap.web.asked import PLAIN
from rococap.web.site import Here, Site

router = APIRouter()

Image = Annotated[int, Path(ge=0, lt=1 << 42)]
"""The id of a picture in the database."""
RunName = Annotated[str, Query(alias="run", min_length=1, max_length=200, pattern=PLAIN)]


@router.get("/picture/{image}/thumbnail")
def thumbnail(request: Request, site: Here, image: Image, run: RunName) -> Response:
    """A JPEG of at most 256 pixels on each side. Status 404 says why a picture cannot be shown."""
    return _answer(request, site, image, run, "image/jpeg", pictures_of(request).thumbnail)


@router.get("/picture/{image}/full.png")
def full(request: Request, site: Here, image: Image, run: RunName) -> Response:
    """The picture as the model saw it before its size was limited. Status 404 says why it cannot be shown."""
    return _answer(request, site, image, run, "image/png", pictures_of(request).full)


def pictures_of(request: Request) -> Pictures:
    pictures: Pictures = request.app.state.pictures
    return pictures


def _answer(
    request: Request, site: Site, image: int, name: str, media_type: str, read: Callable[[Run, Source], bytes]
) -> Response:
    """The bytes, which the browser keeps and asks about: a page must never show the picture of another data set."""
    with site.read() as conn:
        run = queue.get_run(conn, name)
        source = source_of(conn, run, image)
    if source is None:
        raise HTTPException(404)
    tag = f'"{version_of(run, source)}"'
    headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(read(run, source), media_type=media_type, headers=headers)
