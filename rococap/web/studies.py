"""Pages of blinded reader studies: progress, reading one picture at a time, and results once the key is open.

Until then no answer of these routes says which run wrote a text: texts are called A, B, C in the order drawn for the
reader, and pictures are asked for by their position.
"""

from string import ascii_uppercase
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Path
from pydantic import BaseModel, Field
from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from rococap import review
from rococap.errors import RococapError
from rococap.review import Answers, Progress, Study
from rococap.web.access import Refused
from rococap.web.actions import Told
from rococap.web.pictures import PictureGone, Pictures, source_of
from rococap.web.reader import MaybeReader, Reader
from rococap.web.site import Here, Site

router = APIRouter(prefix="/studies")

Position = Annotated[int, Path(ge=1, le=10_000)]


class Given(BaseModel):
    """A reader's answers on a picture. `shown_at` is when it was displayed, in ms since 1970 by the server's clock."""

    shown_at: int
    preference: int | None = None
    ratings: Annotated[list[dict[str, int]], Field(max_length=100)] = []


@router.get("")
def page_of_all(request: Request, site: Here, reader: MaybeReader) -> HTMLResponse:
    with site.read() as conn:
        known = [review.progress(conn, study) for study in review.list_studies(conn)]
    return site.page(request, "studies.html", known=known[::-1], reader=reader)


@router.get("/{name}")
def page(request: Request, site: Here, name: str, reader: MaybeReader) -> HTMLResponse:
    with site.read() as conn:
        known = review.progress(conn, _study(conn, name))
        read = review.readings(conn, known.study) if known.is_open else []
    found, problem = None, ""
    if known.is_open:
        try:
            found = review.outcome(known, read)
        except RococapError as error:  # a library for the statistics is missing
            problem = str(error)
    return site.page(
        *(request, "study.html"),
        known=known,
        reader=reader,
        found=found,
        problem=problem,
        tables=review.tables_of(found) if found else [],
    )


@router.get("/{name}/results")
def results(site: Here, name: str) -> Response:
    """What `rococap study results --json` prints."""
    with site.read() as conn:
        known = review.progress(conn, _study(conn, name))
        read = review.readings(conn, known.study)
    return JSONResponse(review.outcome(known, read))


@router.post("/{name}/unblind")
def unblind(site: Here, name: str, reader: Reader) -> Told:
    with site.write() as conn:
        opened = review.unblind(conn, _study(conn, name), reader)
    return Told(message=f"{name}: unblinded, with {opened.n_missing} readings missing.")


# --- Reading -----------------------------------------------------------------------------------------------------


@router.post("/{name}/read")
def join(site: Here, name: str, reader: Reader) -> RedirectResponse:
    with site.write() as conn:
        study = _study(conn, name)
        review.join(conn, study, reader)
    return RedirectResponse(_path(study, "read"), status_code=303)


@router.get("/{name}/read")
def read(request: Request, site: Here, name: str, reader: Reader) -> Response:
    """The reader's next picture; thanks if there is none left."""
    _refuse_read_only(site)
    with site.read() as conn:
        study = _study(conn, name)
        known = review.progress(conn, study)
        if reader not in dict(known.read):
            return RedirectResponse(_path(study), status_code=303)
        shown = review.next_item(conn, study, reader)
    if shown is None:
        return site.page(request, "study_read.html", known=known, reader=reader)
    return _reading(request, site, known, reader, shown)


@router.get("/{name}/read/{position}")
def read_again(request: Request, site: Here, name: str, position: Position, reader: Reader) -> Response:
    """One of the reader's pictures, with the answers given before, which can be changed until the key is open."""
    _refuse_read_only(site)
    with site.read() as conn:
        study = _study(conn, name)
        known = review.progress(conn, study)
        shown = review.item(conn, study, reader, position)
    if known.is_open:
        return RedirectResponse(_path(study, "read"), status_code=303)
    return _reading(request, site, known, reader, shown)


@router.post("/{name}/read/{position}")
def rate(site: Here, name: str, position: Position, reader: Reader, given: Given) -> Told:
    answers = Answers(given.preference, tuple(given.ratings))
    with site.write() as conn:
        review.rate(conn, _study(conn, name), reader, position, answers, shown_at=given.shown_at)
    return Told(message="Saved.")


@router.get("/{name}/items/{position}/picture")
def picture(request: Request, site: Here, name: str, position: Position, reader: Reader) -> Response:
    """The picture in all its pixels. All pictures of a study are read in the same way, whoever wrote the texts."""
    _refuse_read_only(site)
    pictures: Pictures = request.app.state.pictures
    with site.read() as conn:
        study = _study(conn, name)
        shown = review.item(conn, study, reader, position)
        run = review.run_for_pictures(conn, study)
        source = source_of(conn, run, shown.image)
    try:
        if source is None:
            raise PictureGone("gone", "")
        return Response(pictures.full(run, source), media_type="image/png")
    except PictureGone as error:
        raise Refused(404, f"This picture cannot be shown ({error.code}).") from error


def _reading(request: Request, site: Site, known: Progress, reader: str, shown: review.Shown) -> HTMLResponse:
    texts = list(zip(_letters(len(shown.texts)), shown.texts, strict=True))
    return site.page(request, "study_item.html", known=known, reader=reader, shown=shown, texts=texts)


def _letters(n: int) -> list[str]:
    """Names of texts: A to Z, then numbers."""
    return [ascii_uppercase[at] if at < len(ascii_uppercase) else str(at + 1) for at in range(n)]


def _study(conn: Connection, name: str) -> Study:
    try:
        return review.get_study(conn, name)
    except RococapError as error:
        raise Refused(404, str(error)) from error


def _refuse_read_only(site: Site) -> None:
    if site.access.read_only:
        raise Refused(403, "Nobody can read here: the server was started with --read-only, and keeps no answers.")


def _path(study: Study, *more: str) -> str:
    return "/".join(["/studies", quote(study.name, safe=""), *more])
