"""Recovery after a crash, an outage or a wait: late completions, expired leases, waiting jobs that are due."""

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass

from sqlalchemy import Connection

from rococap import db
from rococap.db import execute
from rococap.engines import Completion, Failure
from rococap.queue.leases import MAX_BACKOFF_MS, SKIP_LOCKED, complete, fail, new_lease, record, release
from rococap.queue.records import SOLO, Lease, tally, time_of
from rococap.tables import JobState

# --- After a lost answer ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recovered:
    """Job ids by what became of their completions. `kept`: not stored, because another worker holds the job for now."""

    stored: frozenset[int]
    dropped: frozenset[int]
    kept: frozenset[int]


def recover(
    conn: Connection, worker_id: int, lease: Lease, completions: Sequence[Completion], *, now: int | None = None
) -> Recovered:
    """Stores completions that `complete` and `fail` may or may not have stored before; none is stored twice.

    Jobs that the lease still holds are completed, and those that it has completed are recognised. Captions of jobs that
    are pending or waiting again are stored under a new lease of `worker_id`. Captions of jobs that have another result
    are dropped, and so are those of a deleted run, whose job ids may have been reused by another run.
    """
    execute(conn, "SELECT id FROM leases WHERE id = ?" + db.for_update(conn, "leases"), (lease.id,))
    at = time_of(conn, now)
    jobs = _jobs_and_captions(conn, lease.run_id, [completion.job_id for completion in completions])
    held, free, stored, kept = [], [], set(), set()
    for completion in completions:
        job_id = completion.job_id
        status, lease_id, caption_lease_id = jobs.get(job_id, ("", None, None))
        if lease_id == lease.id:
            held.append(completion)
        elif status == JobState.DONE and caption_lease_id == lease.id:
            stored.add(job_id)
        elif completion.failure is None and status in (JobState.PENDING, JobState.WAITING):
            free.append(completion)
        elif completion.failure is None and status == JobState.LEASED:
            kept.add(job_id)
    _store(conn, lease, held, at)
    if free:
        _store(conn, _take(conn, worker_id, lease, [(c.job_id, jobs[c.job_id][0]) for c in free], at), free, at)
    stored |= {completion.job_id for completion in (*held, *free)}
    dropped = {completion.job_id for completion in completions} - stored - kept
    return Recovered(frozenset(stored), frozenset(dropped), frozenset(kept))


def _jobs_and_captions(
    conn: Connection, run_id: int, job_ids: Sequence[int]
) -> dict[int, tuple[str, int | None, int | None]]:
    """Locks the jobs of the run in order of id; returns id -> (status, lease id, lease id of its caption)."""
    found = {}
    for job_id in sorted(job_ids):
        sql = "SELECT status, lease_id FROM jobs j WHERE id = ? AND run_id = ?" + db.for_update(conn, "j")
        if row := execute(conn, sql, (job_id, run_id)).one_or_none():
            caption_lease_id = execute(conn, "SELECT lease_id FROM captions WHERE job_id = ?", (job_id,)).scalar()
            found[job_id] = (row[0], row[1], caption_lease_id)
    return found


def _store(conn: Connection, lease: Lease, completions: Sequence[Completion], at: int) -> None:
    if captions := [c for c in completions if c.failure is None]:
        complete(conn, lease, captions, now=at)
    if failed := {c.job_id: c.failure for c in completions if c.failure is not None}:
        fail(conn, lease, failed, now=at)


def _take(conn: Connection, worker_id: int, lost: Lease, jobs: Sequence[tuple[int, str]], at: int) -> Lease:
    """A new lease on pending or waiting jobs, as (id, status), that the lease `lost` no longer holds."""
    waiting = [(id,) for id, status in jobs if status == JobState.WAITING]
    if waiting:
        execute(conn, "UPDATE jobs SET status = 'pending', not_before = NULL WHERE id = ?", waiting)
        changes: dict[str, int] = {JobState.WAITING: -len(waiting), JobState.PENDING: len(waiting)}
        tally(conn, lost.run_id, lost.split, 0, changes)
    lease_id = new_lease(conn, worker_id, lost.run_id, lost.split, lost.lane, [id for id, _ in jobs], 0, at)
    return Lease(lease_id, worker_id, lost.run_id, lost.split, lost.lane)


def belongs(conn: Connection, lease: Lease, uuid: str) -> bool:
    """Whether this database gave the lease to the worker with that uuid: in another database, the ids refer to other
    pictures. A merged lease has another id here than the one that its worker knows.
    """
    sql = (
        "SELECT 1 FROM leases l JOIN workers w ON w.id = l.worker_id WHERE l.id = ? AND w.uuid = ? "
        "AND l.origin_id IS NULL"
    )
    return execute(conn, sql, (lease.id, uuid)).one_or_none() is not None


def release_forgotten(conn: Connection, worker_id: int, held: Set[int], *, now: int | None = None) -> int:
    """Releases jobs that this worker leased without learning of it, because the answer to its claim was lost; returns
    how many.

    `held` are the leases that the worker knew of before this transaction began; its store thread may close some later.
    """
    open_leases = execute(
        conn,
        "SELECT id, run_id, split, lane FROM leases WHERE state = 'open' AND worker_id = ? ORDER BY id"
        + db.for_update(conn, "leases"),
        (worker_id,),
    ).fetchall()
    released = 0
    for lease_id, run_id, split, lane in open_leases:
        if lease_id not in held:
            lease = Lease(lease_id, worker_id, run_id, split, lane)
            rows = execute(conn, "SELECT id FROM jobs WHERE lease_id = ?", (lease_id,)).fetchall()
            released += release(conn, lease, [row[0] for row in rows], now=now)
    return released


# --- Expiry and crashes ----------------------------------------------------------------------------------------


# Ordered by time: ordered by id, SQLite would scan the table instead of using the index.
_EXPIRED = (
    "SELECT id FROM leases WHERE state = 'open' AND expires_at <= ? AND worker_id <> ? AND expires_at - beat_at <= ? "
    "ORDER BY expires_at, id"
)


def reap(
    conn: Connection,
    *,
    exclude_worker: int = 0,
    contact_ms: int = 1 << 62,
    limit: int | None = None,
    now: int | None = None,
) -> list[int]:
    """Ends up to `limit` expired leases as `crash` does, treating their workers as dead; returns their ids.

    A worker excludes its own leases with `exclude_worker`, since it knows that it is alive. `contact_ms` is how long it
    has been in contact with the database: leases that last longer are spared, because their workers may have been cut
    off too.
    """
    at = time_of(conn, now)
    _cap_future_leases(conn, at)
    expired = sorted(row[0] for row in execute(conn, _EXPIRED, (at, exclude_worker, contact_ms)).fetchall()[:limit])
    return [lease_id for lease_id in expired if crash(conn, lease_id, now=at, expired_by=at)]


def _cap_future_leases(conn: Connection, at: int) -> None:
    """Makes leases whose last heartbeat lies in the future, because the clock was set back, expire one lease time from
    now: a living worker extends its lease before, and a dead one does not keep its jobs any longer than usual.
    """
    found = execute(conn, f"{_IN_FUTURE} ORDER BY id{db.for_update(conn, 'leases')}", (at,)).fetchall()
    if found:
        sql = "UPDATE leases SET beat_at = ?, expires_at = ? + expires_at - beat_at WHERE id = ? AND beat_at > ?"
        execute(conn, sql, [(at, at, row[0], at) for row in found])


_IN_FUTURE = "SELECT id FROM leases WHERE state = 'open' AND beat_at > ?"


def crash(conn: Connection, lease_id: int, *, now: int | None = None, expired_by: int = 1 << 62) -> bool:
    """Ends a lease whose worker has died or is about to: its jobs become pending suspects, and the attempt is not
    counted.

    A job that was alone in two such leases fails. Returns False, changing nothing, if the lease was not open or was
    extended beyond `expired_by` in the meantime.
    """
    at = time_of(conn, now)
    row = execute(
        conn,
        "UPDATE leases SET state = 'expired', closed_at = ? WHERE id = ? AND state = 'open' AND expires_at <= ? "
        "RETURNING run_id, split, lane",
        (at, lease_id, expired_by),
    ).one_or_none()
    if row is None:
        return False
    run_id, split, lane = row
    solo = int(lane == SOLO)
    jobs = execute(conn, "SELECT id, solo_crashes FROM jobs WHERE lease_id = ? ORDER BY id", (lease_id,)).fetchall()
    killers = [id for id, solo_crashes in jobs if solo and solo_crashes >= 1]
    execute(
        conn,
        "UPDATE jobs SET status = 'pending', lease_id = NULL, attempts = attempts - 1, crashes = crashes + 1, "
        "solo_crashes = solo_crashes + ? WHERE lease_id = ? AND status = 'leased'",
        (solo, lease_id),
    )
    if killers:
        failing = "UPDATE jobs SET status = 'failed', finished_at = ? WHERE id = ? AND status = 'pending'"
        execute(conn, failing, [(at, id) for id in killers])
        reason = Failure("crashed", "Two workers died while captioning this picture alone.")
        record(conn, lease_id, at, dict.fromkeys(killers, reason))
    freed = len(jobs) - len(killers)
    tally(
        conn,
        run_id,
        split,
        lease_id,
        {JobState.LEASED: -len(jobs), JobState.PENDING: freed, JobState.FAILED: len(killers)},
    )
    return True


_WAKE = (
    "UPDATE jobs SET status = 'pending', not_before = NULL WHERE id IN ("
    "SELECT j.id FROM jobs j WHERE j.status = 'waiting' AND (j.not_before <= ? OR j.not_before > ?) "
    "ORDER BY j.not_before{skip_locked}) RETURNING run_id, split"
)


def wake(conn: Connection, *, now: int | None = None) -> int:
    """Makes waiting jobs pending once they are due; returns how many.

    Jobs due later than the longest backoff are included: the clock has been set back since they failed.
    """
    at = time_of(conn, now)
    sql = _WAKE.format(skip_locked=SKIP_LOCKED[conn.dialect.name])
    rows = execute(conn, sql, (at, at + MAX_BACKOFF_MS)).fetchall()
    for (run_id, split), n in sorted(Counter((row[0], row[1]) for row in rows).items()):
        tally(conn, run_id, split, 0, {JobState.WAITING: -n, JobState.PENDING: n})
    return len(rows)


def overdue(conn: Connection, *, now: int | None = None) -> bool:
    """Whether `reap` or `wake` may have something to do. Only reads, so that idle workers take no write lock."""
    at = time_of(conn, now)
    row = execute(
        conn,
        "SELECT EXISTS (SELECT 1 FROM leases WHERE state = 'open' AND (expires_at <= ? OR beat_at > ?)) "
        "OR EXISTS (SELECT 1 FROM jobs WHERE status = 'waiting' AND (not_before <= ? OR not_before > ?))",
        (at, at, at, at + MAX_BACKOFF_MS),
    )
    return bool(row.scalar_one())
