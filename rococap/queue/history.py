"""What has happened to one picture in a run. Read only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from rococap.db import execute
from rococap.queue.runs import Run
from rococap.queue.status import LeaseSeen, leases_with


@dataclass(frozen=True, slots=True)
class FailureSeen:
    """A failed attempt. `lease` is None if its lease is not known; `at` is in milliseconds since 1970."""

    code: str
    message: str
    at: int
    lease: int | None


@dataclass(frozen=True, slots=True)
class CaptionMade:
    """How a caption was made. Times are in milliseconds; None for what a restored caption does not have.

    `device` and `engine` are those of the worker that made it.
    """

    lease: int | None
    finish_reason: str | None
    prompt_tokens: int | None
    new_tokens: int | None
    processing_ms: float | None
    latency_ms: float | None
    batch_size: int | None
    generated_at: int
    device: str | None
    engine: str | None


@dataclass(frozen=True, slots=True)
class History:
    """The job of one picture in one run, with its failures, oldest first, and the leases that its caption and failures
    name, and the one that it is under now.
    """

    job: int
    status: str
    attempts: int
    crashes: int
    not_before: int | None
    finished_at: int | None
    checkpoint: int | None
    made: CaptionMade | None
    failures: tuple[FailureSeen, ...]
    leases: tuple[LeaseSeen, ...]


def history(conn: Connection, run: Run, image: int) -> History | None:
    """What has happened to the picture with this id in the database; None if the run has no job for it."""
    job = execute(
        conn,
        "SELECT id, status, attempts, crashes, not_before, finished_at, checkpoint, lease_id FROM jobs "
        "WHERE run_id = ? AND image_id = ?",
        (run.id, image),
    ).one_or_none()
    if job is None:
        return None
    lease_id = job[7]
    made = execute(
        conn,
        "SELECT c.lease_id, c.finish_reason, c.prompt_tokens, c.new_tokens, c.processing_ms, c.latency_ms, "
        "c.batch_size, c.generated_at, w.device, w.engine FROM captions c LEFT JOIN leases l ON l.id = c.lease_id "
        "LEFT JOIN workers w ON w.id = l.worker_id WHERE c.job_id = ?",
        (job[0],),
    ).one_or_none()
    failures = _failures(conn, job[0])
    leases = {lease_id, made and made[0], *(one.lease for one in failures)} - {None}
    id, status, attempts, crashes, not_before, finished_at, checkpoint, _ = job
    return History(
        *(id, status, attempts, crashes, not_before, finished_at, checkpoint),
        made=CaptionMade(*made) if made else None,
        failures=tuple(failures),
        leases=tuple(leases_with(conn, sorted(leases))),
    )


def _failures(conn: Connection, job: int) -> list[FailureSeen]:
    sql = "SELECT code, message, at, lease_id FROM failures WHERE job_id = ? ORDER BY id"
    rows: Sequence[Sequence[Any]] = execute(conn, sql, (job,)).fetchall()
    return [FailureSeen(*row) for row in rows]
