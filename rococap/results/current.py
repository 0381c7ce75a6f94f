"""Reads jobs with their pictures and captions as they are now, and what has changed since an earlier look. Writes
nothing.

`columns` is always a select list over j (the job), i (its image) and c (its caption; NULL if there is none).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from rococap.db import execute, marks
from rococap.queue import Run
from rococap.results.snapshot import PAGE

Rows = Sequence[Sequence[Any]]
Position = tuple[int, int]
"""A number that grows, and the id of a job, which orders those with the same number."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A job that is done: its position, the id of its picture in the database, and when it finished."""

    at: Position
    image_id: int
    finished_at: int


_JOBS = "FROM jobs j JOIN images i ON i.id = j.image_id LEFT JOIN captions c ON c.job_id = j.id WHERE"


def jobs_after(conn: Connection, after: int, columns: str) -> Rows:
    """The next page of the jobs of all runs, after the id `after`, in order of their ids."""
    return execute(conn, f"SELECT {columns} {_JOBS} j.id > ? ORDER BY j.id LIMIT ?", (after, PAGE)).fetchall()


def jobs_with(conn: Connection, ids: Sequence[int], columns: str) -> Rows:
    """The jobs with these ids, in any order."""
    return execute(conn, f"SELECT {columns} {_JOBS} j.id IN ({marks(ids)})", tuple(ids)).fetchall() if ids else []


def jobs_of_images(conn: Connection, run: Run, images: Sequence[int], columns: str) -> Rows:
    """A run's jobs for these images, by their ids in the database, in any order."""
    sql = f"SELECT {columns} {_JOBS} j.run_id = ? AND j.image_id IN ({marks(images)})"
    return execute(conn, sql, (run.id, *images)).fetchall() if images else []


def image_ids(conn: Connection, run: Run, split: str, after: int, limit: int, *, backwards: bool = False) -> list[int]:
    """The ids in the database of up to `limit` pictures of a run, in data set order, that come after the id `after`;
    or those before it, last first.
    """
    sign, order = ("<", "DESC") if backwards else (">", "ASC")
    sql = (
        f"SELECT image_id FROM jobs WHERE run_id = ? AND split = ? AND image_id {sign} ? "
        f"ORDER BY image_id {order} LIMIT ?"
    )
    return [row[0] for row in execute(conn, sql, (run.id, split, after, limit)).fetchall()]


# --- What has changed ------------------------------------------------------------------------------------------
# A job that is done is either due for a checkpoint segment, or in one. Each has an index, in order of time.


def due_after(conn: Connection, run: Run, split: str, after: Position) -> list[Finished]:
    """The next page of done jobs that are in no checkpoint segment, in order of the time at which they finished."""
    return _page(conn, "status = 'done' AND checkpoint IS NULL", "finished_at", run, split, after)


def in_segments_after(conn: Connection, run: Run, split: str, after: Position) -> list[Finished]:
    """The next page of done jobs in checkpoint segments, in order of the segments' numbers."""
    return _page(conn, "checkpoint IS NOT NULL", "checkpoint", run, split, after)


def last_segment(conn: Connection, run: Run, split: str) -> int:
    """The number of the last checkpoint segment, 0 if there is none."""
    sql = "SELECT COALESCE(max(checkpoint), 0) FROM jobs WHERE run_id = ? AND split = ? AND checkpoint IS NOT NULL"
    return int(execute(conn, sql, (run.id, split)).scalar_one())


def _page(conn: Connection, where: str, by: str, run: Run, split: str, after: Position) -> list[Finished]:
    sql = (
        f"SELECT {by}, id, image_id, finished_at FROM jobs WHERE run_id = ? AND split = ? AND {where} "
        f"AND {by} >= ? AND ({by}, id) > (?, ?) ORDER BY {by}, id LIMIT ?"
    )
    rows = execute(conn, sql, (run.id, split, after[0], *after, PAGE)).fetchall()
    return [Finished((row[0], row[1]), row[2], row[3]) for row in rows]


def failed_images(conn: Connection, run: Run, split: str) -> set[int]:
    """The ids in the database of the pictures whose jobs have failed."""
    sql = "SELECT image_id FROM jobs WHERE run_id = ? AND split = ? AND status = 'failed'"
    return {row[0] for row in execute(conn, sql, (run.id, split)).fetchall()}


def failures_after(conn: Connection, after: int) -> list[Position]:
    """The next page of the (failure id, job id) of failures, in order of their ids."""
    sql = "SELECT id, job_id FROM failures WHERE id > ? ORDER BY id LIMIT ?"
    return [(row[0], row[1]) for row in execute(conn, sql, (after, PAGE)).fetchall()]


def deleted_runs(conn: Connection) -> set[int]:
    """The ids of runs that have been deleted. No run gets such an id again."""
    return {row[0] for row in execute(conn, "SELECT id FROM runs WHERE deleted_at IS NOT NULL").fetchall()}


def shard_digests(conn: Connection) -> dict[int, str]:
    """The digests of all shards by their ids: with a shard, the original captions of its pictures may change."""
    return {row[0]: row[1] for row in execute(conn, "SELECT id, digest FROM shards").fetchall()}


def newest_failure(conn: Connection) -> int:
    """The highest id of a failure, 0 if there is none."""
    return int(execute(conn, "SELECT COALESCE(max(id), 0) FROM failures").scalar_one())


def last_failures(conn: Connection, jobs: Sequence[int]) -> dict[int, tuple[str, str]]:
    """The code and message of the latest failure of each of these jobs that has one."""
    if not jobs:
        return {}
    sql = (
        "SELECT job_id, code, message FROM failures WHERE id IN "
        f"(SELECT max(id) FROM failures WHERE job_id IN ({marks(jobs)}) GROUP BY job_id)"
    )
    return {row[0]: (row[1], row[2]) for row in execute(conn, sql, tuple(jobs)).fetchall()}


def stored_scores(conn: Connection, jobs: Sequence[int]) -> dict[int, list[str]]:
    """What `evaluate` has stored for these jobs: JSON objects from the names of scores to their values."""
    found: dict[int, list[str]] = {}
    if jobs:
        sql = f"SELECT job_id, value FROM scores WHERE job_id IN ({marks(jobs)})"
        for job_id, value in execute(conn, sql, tuple(jobs)).fetchall():
            found.setdefault(job_id, []).append(value)
    return found
