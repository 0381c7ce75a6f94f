"""Verdicts of readers on captions."""

from collections.abc import Sequence
from uuid import uuid4

from sqlalchemy import Connection

from rococap.db import execute
from rococap.queue import Run
from rococap.queue.records import time_of
from rococap.review.records import MAX_NOTE, Review, checked_errors, checked_name, checked_text, lock, machine_text


def add_review(
    conn: Connection,
    run: Run,
    job_id: int,
    reader: str,
    verdict: str,
    *,
    errors: Sequence[str] = (),
    note: str = "",
    now: int | None = None,
) -> Review:
    """Records a verdict on a caption. A reader who changes their mind adds another, and the latest counts.

    Raises RunError if the run has no caption of this job, RococapError for an unknown verdict or kind of error.
    """
    checked = checked_errors(verdict, errors)
    name, note = checked_name(reader), checked_text(note, "note", MAX_NOTE)
    lock(conn, run)
    machine_text(conn, run, job_id)
    row = (uuid4().hex, job_id, name, verdict, ",".join(checked), note, time_of(conn, now))
    sql = "INSERT INTO reviews (uuid, job_id, reader, verdict, errors, note, at) VALUES (?, ?, ?, ?, ?, ?, ?)"
    id = execute(conn, f"{sql} RETURNING id", row).scalar_one()
    return Review(id, row[0], job_id, name, verdict, checked, note, row[-1])
