"""Find and replace in the captions of a run: a preview, one act, and how to undo it."""

from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, Final
from urllib.parse import urlencode

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field, StringConstraints, model_validator
from sqlalchemy import Engine as Database
from starlette.requests import Request
from starlette.responses import HTMLResponse

from rococap import queue, review
from rococap.queue import Run
from rococap.review import Change, Replaced, Replacement, Seen
from rococap.web.actions import Told
from rococap.web.asked import PLAIN, Name
from rococap.web.pieces import Piece, pieces
from rococap.web.reader import MaybeReader, Reader
from rococap.web.site import Here

PAGE: Final = 25
COUNTED: Final = 1_000
"""How many captions of a preview are counted."""

Text = Annotated[str, StringConstraints(max_length=1_000, pattern=PLAIN)]
Id = Annotated[int, Field(ge=0, lt=1 << 62)]

router = APIRouter(prefix="/replace")


class Asked(BaseModel):
    """What to replace in the captions of a run and split. `cutoff` and `last_edit` are the moment that is shown."""

    run: Name = ""
    split: Name = ""
    find: Text = ""
    replace: Text = ""
    any_case: bool = False
    part: bool = False
    after: Id = 0
    cutoff: Id = 0
    last_edit: Id = 0

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value != ""}

    @property
    def replacement(self) -> Replacement:
        return Replacement(self.find, self.replace, match_case=not self.any_case, whole_words=not self.part)

    @property
    def seen(self) -> Seen:
        return Seen(self.cutoff, self.last_edit)

    def link(self, **changes: Any) -> str:
        """The address of the page that asks for this, apart from these changes."""
        given = self.model_copy(update=changes).model_dump(exclude_defaults=True)
        return "/replace?" + urlencode({name: 1 if value is True else value for name, value in given.items()})


class Undone(BaseModel):
    """The act to undo."""

    run: Name
    act: Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[0-9a-f]+$")]


@dataclass(frozen=True, slots=True)
class Preview:
    """A page of the captions that would change, each with its key, image id and texts in pieces. `next` is the key that
    the next page begins after, 0 if this is the last; `total` is exact up to COUNTED.
    """

    changes: list[tuple[int, str, list[Piece]]]
    next: int
    total: int


@router.get("")
def page(request: Request, site: Here, reader: MaybeReader, asked: Annotated[Asked, Query()]) -> HTMLResponse:
    """The form, a preview of what it would change, and the latest acts."""
    with site.read() as conn:
        runs = queue.list_runs(conn)
        run = queue.get_run(conn, asked.run) if asked.run else runs[-1] if runs else None
        splits = [one.split for one in queue.counts(conn) if run and one.run == run.name]
        asked = asked.model_copy(update={"split": asked.split or (splits or [""])[0]})
        if run and asked.find and not asked.cutoff:
            seen = review.seen_now(conn, run, asked.split)
            asked = asked.model_copy(update={"cutoff": seen.cutoff, "last_edit": seen.last_edit})
        acts = review.list_acts(conn, run) if run else []
    preview = _preview(site.database, run, asked) if run and asked.find else None
    return site.page(
        request,
        "replace.html",
        reader=reader,
        runs=runs,
        run=run,
        splits=splits,
        asked=asked,
        fields={**asked.model_dump(exclude={"after"}), "run": run.name if run else ""},
        preview=preview,
        counted=COUNTED,
        acts=acts,
        next_page=asked.link(after=preview.next) if preview and preview.next else "",
    )


def _preview(database: Database, run: Run, asked: Asked) -> Preview:
    def changes(after: int, most: int) -> list[Change]:
        return list(
            islice(review.changes(database, run, asked.split, asked.replacement, asked.seen, after=after), most)
        )

    counted = changes(0, COUNTED + 1)
    found = changes(asked.after, PAGE + 1) if asked.after else counted[: PAGE + 1]
    shown = [(one.key, one.image_id, pieces(one.after, before=one.before)) for one in found[:PAGE]]
    return Preview(shown, shown[-1][0] if len(found) > PAGE else 0, len(counted))


@router.post("")
def apply(site: Here, reader: Reader, asked: Asked) -> Told:
    """Makes the changes that the preview showed, as one act."""
    with site.read() as conn:
        run = queue.get_run(conn, asked.run)
    return _told("changed", review.replace_all(site.database, run, asked.split, asked.replacement, asked.seen, reader))


@router.post("/undo")
def undo(site: Here, reader: Reader, undone: Undone) -> Told:
    """Takes back all edits of an act, as another act."""
    with site.write() as conn:
        return _told("restored", review.undo_act(conn, queue.get_run(conn, undone.run), undone.act, reader))


def _told(verb: str, done: Replaced) -> Told:
    captions = "caption" if done.n == 1 else "captions"
    left = f" {done.skipped:,} edited in the meantime were left as they are." if done.skipped else ""
    return Told(message=f"{done.n:,} {captions} {verb}.{left}")
