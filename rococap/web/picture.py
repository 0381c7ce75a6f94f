"""The page of one picture: looked at closely, judged and corrected, with all that is known of its captions."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from rococap import queue, review
from rococap.queue import History, Run
from rococap.results import current
from rococap.review import Caption, Conflict, Edit, Review
from rococap.scores.explained import explained
from rococap.web import gallery
from rococap.web.access import Refused
from rococap.web.actions import Told
from rococap.web.asked import Asked, Name
from rococap.web.browse import NAMES, Chosen, search_of
from rococap.web.gallery import Picture, Said
from rococap.web.images import Image
from rococap.web.index import SearchUnavailable
from rococap.web.pieces import Piece, pieces
from rococap.web.reader import MaybeReader, Reader
from rococap.web.site import Here, Site

ERROR_KEYS: Final = dict(zip(review.ERRORS, "mbsixu", strict=True))
"""The keys that tick the kinds of error."""
KEYS: Final = (
    [(["1", "…", "4"], "Verdict")]
    + [([key], review.ERRORS[error]) for error, key in ERROR_KEYS.items()]
    + [
        (["n"], "Write a note"),
        (["e"], "Edit the caption"),
        (["Esc"], "Leave the field"),
        (["Enter"], "Save the verdict and go on"),
        (["Shift", "Enter"], "Save the verdict and stay"),
        (["Ctrl", "Enter"], "In a field: save"),
        (["←", "→"], "Previous, next; move an enlarged picture that has the focus"),
        (["+", "−"], "Zoom; or turn the wheel, drag, click twice"),
        (["d", "l"], "Darker, lighter"),
        (["c", "v"], "Less, more contrast"),
        (["0"], "The picture as it was"),
    ]
)

router = APIRouter(prefix="/picture/{image}")


@dataclass(frozen=True, slots=True)
class Side:
    """What one run has for the picture. `caption` is None without a caption, `history` without a job.

    `pieces` are the current text, marked where it differs from another; `past` is what people did, oldest first.
    """

    run: Run
    said: Said
    history: History | None
    caption: Caption | None
    pieces: list[Piece]
    past: Sequence[Edit | Review]

    @property
    def edits(self) -> list[Edit]:
        """Latest first."""
        return [one for one in reversed(self.past) if isinstance(one, Edit)]

    @property
    def reviews(self) -> list[Review]:
        """Latest first."""
        return [one for one in reversed(self.past) if isinstance(one, Review)]

    def latest_of(self, reader: str) -> Review | None:
        """The verdict of this reader that counts."""
        return next((one for one in self.reviews if one.reader == reader), None)

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings that the run states, and what they were resolved to."""
        stated: dict[str, Any] = json.loads(self.run.recipe.to_json())
        known = stated | (self.run.resolved or {})
        return {name: value for name, value in known.items() if value is not None}


@router.get("")
def page(
    request: Request, site: Here, reader: MaybeReader, image: Image, asked: Annotated[Asked, Query()]
) -> HTMLResponse:
    """The page. Its query string is that of the gallery, through which `previous` and `next` lead."""
    with site.read() as conn:
        runs = _runs(conn, asked)
        picture, sides = _look(conn, runs, image, asked.compare or "original")
    steps = _steps(request, site, runs[: len(asked.run) or 1], picture, asked)

    def address(**changes: Any) -> str:
        return f"/picture/{image}?{asked.string(**{'after': asked.after, 'before': asked.before} | changes)}"

    values: dict[str, Any] = {"picture": picture, "first": sides[0], "sides": sides, "reader": reader, "steps": steps}
    values |= {"address": address, "query": request.url.query, "compare": asked.compare or "original"}
    values |= {"verdicts": review.VERDICTS, "errors": review.ERRORS, "error_keys": ERROR_KEYS, "key_help": KEYS}
    values |= {"concept_names": NAMES, "explained": explained}
    return site.page(request, "picture.html", **values)


def _runs(conn: Connection, asked: Asked) -> list[Run]:
    """The runs asked for, as the gallery chooses them, and then all others on their data set."""
    chosen = Chosen.of(conn, asked)
    if not chosen.runs:
        raise Refused(404, "There are no runs yet, and so no pictures.")
    return [*chosen.runs, *(run for run in chosen.comparable if run not in chosen.runs)]


def _look(conn: Connection, runs: Sequence[Run], image: int, compare: str) -> tuple[Picture, list[Side]]:
    details = gallery.details(conn, runs, image)
    if details is None:
        raise Refused(404, f"The data set of run {runs[0].name!r} has no picture number {image}.")
    picture, place = details.picture, details.picture.source.place
    captions = [review.caption_of(conn, run, place.split, place.image_id) for run in runs]
    sides: list[Side] = []
    for run, said, history, caption in zip(runs, picture.said, details.histories, captions, strict=True):
        others = {"original": picture.original, "run": captions[0].text if captions[0] and sides else None}
        shown = pieces(caption.text, before=others.get(compare), removed=False) if caption else []
        past = review.history(conn, history.job) if history else []
        sides.append(Side(run, said, history, caption, shown, past))
    return picture, sides


def _steps(request: Request, site: Site, runs: Sequence[Run], picture: Picture, asked: Asked) -> dict[str, int | None]:
    """The pictures before and after this one in the gallery; none if that needs an index which is not there."""
    query = asked.query(picture.source.place.split)
    try:
        before, after = gallery.neighbours(site.database, search_of(request).begin(), runs, query, picture.id)
    except SearchUnavailable:
        before = after = None
    return {"previous": before, "next": after}


# --- What people do --------------------------------------------------------------------------------------------


class Judged(BaseModel):
    """A verdict on the caption of a run."""

    run: Name
    verdict: str
    errors: list[str] = []
    note: str = ""


class Edited(BaseModel):
    """A new text for the caption of a run. `seen` is the id of the edit whose text the reader saw, None for the
    machine's.
    """

    run: Name
    text: str
    seen: int | None


class Undone(BaseModel):
    """The edit to take back."""

    run: Name
    edit: Annotated[int, Field(ge=0, lt=1 << 62)]


@router.post("/reviews")
def judge(site: Here, reader: Reader, image: Image, judged: Judged) -> Told:
    with site.write() as conn:
        run = queue.get_run(conn, judged.run)
        job = _job(conn, run, image)
        review.add_review(conn, run, job, reader, judged.verdict, errors=judged.errors, note=judged.note)
    return Told(message=f"Saved: {review.VERDICTS[judged.verdict]}.")


@router.post("/edits")
def change(site: Here, reader: Reader, image: Image, edited: Edited) -> Response:
    """Stores an edit. If somebody else was faster, answers 409 with their edit, and with both texts as HTML."""
    try:
        with site.write() as conn:
            run = queue.get_run(conn, edited.run)
            review.edit(conn, run, _job(conn, run, image), reader, edited.text, seen=edited.seen)
    except Conflict as conflict:
        html = site.render("picture/conflict.html", theirs=conflict.edit, mine=edited.text)
        theirs = {"id": conflict.edit.id, "text": conflict.edit.text}
        return JSONResponse({"error": {"message": str(conflict)}, "theirs": theirs, "html": html}, 409)
    return JSONResponse({"message": "Saved as an edit. The machine's caption is kept."})


@router.post("/undo")
def undo(site: Here, reader: Reader, image: Image, undone: Undone) -> Told:
    with site.write() as conn:
        review.undo(conn, queue.get_run(conn, undone.run), undone.edit, reader)
    return Told(message="Undone, by another edit.")


def _job(conn: Connection, run: Run, image: int) -> int:
    rows = current.jobs_of_images(conn, run, [image], "j.id")
    if not rows:
        raise Refused(404, f"Run {run.name!r} has no picture number {image}.")
    return int(rows[0][0])
