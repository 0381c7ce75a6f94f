"""What people have said of captions, as a gallery shows it and as the search index can be asked for it."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection

from rococap.db import execute, marks
from rococap.queue import Run
from rococap.results.current import Position
from rococap.results.snapshot import PAGE
from rococap.results.texts import EDITED, latest
from rococap.web.index import Mark

_EVERYTHING = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Opinion:
    """The latest verdict on a caption and the text that the latest edit gave it, each with its reader; None without."""

    verdict: str | None
    judge: str | None
    text: str | None
    editor: str | None


def opinions(conn: Connection, run: Run, images: Sequence[int]) -> dict[int, Opinion]:
    """What was said of a run's captions of these pictures, by the pictures' ids in the database."""
    if not images:
        return {}
    sql = (
        f"SELECT j.image_id, v.verdict, v.reader, e.text, e.reader FROM jobs j {EDITED}"
        f"LEFT JOIN reviews v ON v.id = {latest('reviews')} WHERE j.run_id = ? AND j.image_id IN ({marks(images)})"
    )
    rows = execute(conn, sql, (_EVERYTHING, _EVERYTHING, run.id, *images)).fetchall()
    return {image: Opinion(*said) for image, *said in rows if any(said)}


def _new_reviews(conn: Connection, after: int) -> Sequence[Position]:
    sql = "SELECT id, job_id FROM reviews WHERE id > ? ORDER BY id LIMIT ?"
    return [(row[0], row[1]) for row in execute(conn, sql, (after, PAGE)).fetchall()]


def _reviewed(conn: Connection, jobs: Sequence[int]) -> set[int]:
    if not jobs:
        return set()
    sql = f"SELECT DISTINCT job_id FROM reviews WHERE job_id IN ({marks(jobs)})"
    return {row[0] for row in execute(conn, sql, tuple(jobs)).fetchall()}


def _new_edits(conn: Connection, after: int) -> Sequence[Position]:
    sql = "SELECT id, job_id FROM edits WHERE id > ? ORDER BY id LIMIT ?"
    return [(row[0], row[1]) for row in execute(conn, sql, (after, PAGE)).fetchall()]


def _edited(conn: Connection, jobs: Sequence[int]) -> set[int]:
    """Those whose text is not the machine's: an edit that was undone no longer counts."""
    if not jobs:
        return set()
    sql = (
        f"SELECT j.id FROM jobs j JOIN captions c ON c.job_id = j.id {EDITED}"
        f"WHERE e.text <> c.text AND j.id IN ({marks(jobs)})"
    )
    return {row[0] for row in execute(conn, sql, (_EVERYTHING, *jobs)).fetchall()}


REVIEWED, EDITED_BY_HAND = "reviewed", "edited"
MARKS = (Mark(REVIEWED, _new_reviews, _reviewed), Mark(EDITED_BY_HAND, _new_edits, _edited))
