"""The page of one picture: looked at closely, judged and corrected, with all that is known of its captions."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final
from urllib.parse import urlencode

from fastapi import APIRouter, Query
from pydantic import BaseModel
from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from rococap import queue, review
from rococap.queue import History, Run
from rococap.results import current
from rococap.review import Caption, Conflict, Edit, Review
from rococap.scores.concepts import CONCEPTS
from rococap.scores.explained import explained
from rococap.web import gallery
from rococap.web.access import Refused
from rococap.web.actions import Name, Told
from rococap.web.gallery import Picture, Said
from rococap.web.images import Image
from rococap.web.reader import MaybeReader, Reader
from rococap.web.site import Here

CONCEPT_NAMES: Final = {concept.cui: concept.name for concept in CONCEPTS}
ERROR_KEYS: Final = dict(zip(review.ERRORS, "mbsixu", strict=True))
"""The keys that tick the kinds of error."""
RunNames = Annotated[list[Name], Query(alias="run", min_length=1, max_length=50)]

router = APIRouter(prefix="/picture/{image}")


@dataclass(frozen=True, slots=True)
class Side:
    """What one run has for the picture. `caption` is None without a caption, `history` without a job."""

    run: Run
    said: Said
    history: History | None
    caption: Caption | None
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
        return stated | (self.run.resolved or {})


@router.get("")
def page(request: Request, site: Here, reader: MaybeReader, image: Image, names: RunNames) -> HTMLResponse:
    with site.read() as conn:
        runs = _runs(conn, names)
        picture, sides = _look(conn, runs, image)
        steps = _steps(conn, runs[0], picture)
    return site.page(
        request,
        "picture.html",
        reader=reader,
        picture=picture,
        first=sides[0],
        sides=sides,
        concept_names=CONCEPT_NAMES,
        verdicts=review.VERDICTS,
        errors=review.ERRORS,
        error_keys=ERROR_KEYS,
        explained=explained,
        steps={name: step and f"/picture/{step}?{request.url.query}" for name, step in steps.items()},
        step_images=steps,
        query=request.url.query,
        others_first={side.run.name: _query(request, side.run.name) for side in sides},
    )


def _runs(conn: Connection, names: Sequence[str]) -> list[Run]:
    """The runs asked for, and then all others on their data set."""
    asked = queue.find_runs(conn, names)
    others = [run for run in queue.list_runs(conn) if run.dataset_id == asked[0].dataset_id and run.name not in names]
    return [*asked, *others]


def _look(conn: Connection, runs: Sequence[Run], image: int) -> tuple[Picture, list[Side]]:
    details = gallery.details(conn, runs, image)
    if details is None:
        raise Refused(404, f"The data set of run {runs[0].name!r} has no picture number {image}.")
    place = details.picture.source.place
    captions = [review.caption_of(conn, run, place.split, place.image_id) for run in runs]
    return details.picture, [
        Side(run, said, history, caption, review.history(conn, history.job) if history else ())
        for run, said, history, caption in zip(runs, details.picture.said, details.histories, captions, strict=True)
    ]


def _steps(conn: Connection, run: Run, picture: Picture) -> dict[str, int | None]:
    split = picture.source.place.split
    found = {
        name: current.image_ids(conn, run, split, picture.id, 1, backwards=name == "previous")
        for name in ("previous", "next")
    }
    return {name: next(iter(images), None) for name, images in found.items()}


def _query(request: Request, first: str) -> str:
    """The query of this page with another run in the first place."""
    given = request.query_params.multi_items()
    rest = [item for item in given if item != ("run", first)]
    return urlencode([("run", first), *rest])


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
    edit: int


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
