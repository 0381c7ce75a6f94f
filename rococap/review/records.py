"""Verdicts and edits as records, and the rules for what people type."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from rococap import db, queue
from rococap.db import execute
from rococap.errors import RococapError, RunError
from rococap.queue import Run
from rococap.queue.records import MAX_TEXT

VERDICTS = {
    "correct": "Correct",
    "minor": "Minor error",
    "major": "Major error",
    "unusable": "Unusable",
}
"""The verdicts, from best to worst, with their names for people."""

ERRORS = {
    "modality": "Wrong modality",
    "body_part": "Wrong body part",
    "side": "Wrong side",
    "invented": "Invented finding",
    "missed": "Missed finding",
    "measurement": "Wrong measurement",
}
"""The kinds of error that a caption may have, with their names for people."""

MAX_NAME = 100
MAX_NOTE = 10_000
"""Characters of a reader's or study's name, and of a note."""


@dataclass(frozen=True, slots=True)
class Review:
    """A reader's verdict on the caption of a job. `errors` are keys of ERRORS; `at` is in ms since 1970."""

    id: int
    uuid: str
    job_id: int
    reader: str
    verdict: str
    errors: tuple[str, ...]
    note: str
    at: int


@dataclass(frozen=True, slots=True)
class Edit:
    """One change of a caption, from the text `previous` to `text`.

    `undoes` is the id of the edit that this one takes back. `act` is shared by all edits that a reader made at once.
    `at` is in ms since 1970, and later than that of any earlier edit of the caption.
    """

    id: int
    uuid: str
    job_id: int
    reader: str
    text: str
    previous: str
    undoes: int | None
    act: str | None
    at: int


REVIEW = "v.id, v.uuid, v.job_id, v.reader, v.verdict, v.errors, v.note, v.at"
EDIT = "e.id, e.uuid, e.job_id, e.reader, e.text, e.previous, e.undoes, e.act, e.at"
"""The SQL columns of the records, for the aliases `v` of reviews and `e` of edits."""


def review_of(row: Sequence[Any]) -> Review:
    id, uuid, job_id, reader, verdict, errors, note, at = row
    return Review(id, uuid, job_id, reader, verdict, tuple(filter(None, errors.split(","))), note, at)


class Conflict(RococapError):
    """Somebody else edited the caption in the meantime: `edit` is their edit, and nothing was written."""

    def __init__(self, edit: Edit) -> None:
        super().__init__(
            f"{edit.reader} edited this caption in the meantime, so nothing was changed. Look at the new text, then "
            "edit it again if needed."
        )
        self.edit = edit


def lock(conn: Connection, run: Run) -> None:
    """Lets one person at a time change what the run's reviews and edits are. Raises RunError if the run was deleted."""
    db.lock(conn, "runs", run.id)
    queue.refuse_deleted(conn, run)


def machine_text(conn: Connection, run: Run, job_id: int) -> str:
    """The caption that the machine wrote. Raises RunError if the run has no caption of this job."""
    sql = "SELECT c.text FROM captions c JOIN jobs j ON j.id = c.job_id WHERE j.id = ? AND j.run_id = ?"
    row = execute(conn, sql, (job_id, run.id)).one_or_none()
    if row is None:
        raise RunError(f"Run {run.name!r} has no caption number {job_id} yet: nothing was changed.")
    return str(row[0])


def checked_name(name: str, what: str = "reader") -> str:
    """The name without surrounding white space. Raises RococapError for one that is empty, too long or not one line."""
    stripped = name.strip()
    if not stripped or len(stripped) > MAX_NAME or not stripped.isprintable():
        raise RococapError(
            f"{name[:MAX_NAME]!r} is not the name of a {what}: give 1 to {MAX_NAME} characters, in one line."
        )
    return stripped


def checked_text(text: str, what: str = "caption", most: int = MAX_TEXT) -> str:
    """The text with NUL replaced, as captions have it. Raises RococapError if it is too long: what a person wrote is
    not cut.
    """
    if len(text) > most:
        raise RococapError(f"This {what} has {len(text):,} characters; at most {most:,} can be stored. Shorten it.")
    return queue.clean_text(text)


def checked_errors(verdict: str, errors: Sequence[str]) -> tuple[str, ...]:
    """The kinds of error in the order of ERRORS, each once.

    Raises RococapError for unknown verdicts and errors, and for errors of a caption that is called correct.
    """
    if verdict not in VERDICTS:
        raise RococapError(f"{verdict!r} is not a verdict: use one of {', '.join(VERDICTS)}.")
    if unknown := sorted(set(errors) - ERRORS.keys()):
        raise RococapError(f"{unknown[0]!r} is not a kind of error: use {', '.join(ERRORS)}.")
    if errors and verdict == "correct":
        raise RococapError("A correct caption has no errors: leave them out, or choose another verdict.")
    return tuple(error for error in ERRORS if error in errors)
