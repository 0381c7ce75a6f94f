"""After a crash, an outage or a wait: late completions, expired leases, jobs whose time has come."""

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

# --- When the answer did not come ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recovered:
    """Job ids by what became of their completions. `kept`: another worker holds the picture at the moment."""

    stored: frozenset[int]
    dropped: frozenset[int]
    kept: frozenset[int]


def recover(
    conn: Connection, worker_id: int, lease: Lease, completions: Sequence[Completion], *, now: int | None = None
) -> Recovered:
    """Stores what `complete` and `fail` could not, or could without the answer coming back; none is stored twice.

    What the lease still holds is completed, and what it had completed is recognised. Captions of jobs that are free
    again are completed under a new lease, of `worker_id`; where another result stands they are dropped, as are those of
    a run that was deleted, whose jobs' ids may be another run's by now.
    """
    execute(conn, "SELECT id FROM leases WHERE id = ?" + db.for_update(conn, "leases"), (lease.id,))
    at = time_of(conn, now)
    jobs = _jobs_and_captions(conn, lease.run_id, [completion.job_id for completion in completions])
    mine, free, stored, kept = [], [], set(), set()
    for one in completions:
        status, lease_id, caption_lease_id = jobs.get(one.job_id, ("", None, None))
        if lease_id == lease.id:
            mine.append(one)
        elif status == JobState.DONE and caption_lease_id == lease.id:
            stored.add(one.job_id)
        elif one.failure is None and status in (JobState.PENDING, JobState.WAITING):
            free.append(one)
        elif one.failure is None and status == JobState.LEASED:
            kept.add(one.job_id)
    _store(conn, lease, mine, at)
    if free:
        _store(conn, _take(conn, worker_id, lease, [(one.job_id, jobs[one.job_id][0]) for one in free], at), free, at)
    stored |= {one.job_id for one in (*mine, *free)}
    dropped = {one.job_id for one in completions} - stored - kept
    return Recovered(frozenset(stored), frozenset(dropped), frozenset(kept))


def _jobs_and_captions(
    conn: Connection, run_id: int, job_ids: Sequence[int]
) -> dict[int, tuple[str, int | None, int | None]]:
    """id -> (status, lease, the lease of its caption) of those that are the run's, locked in order of id."""
    found = {}
    for job_id in sorted(job_ids):
        sql = "SELECT status, lease_id FROM jobs j WHERE id = ? AND run_id = ?" + db.for_update(conn, "j")
        if row := execute(conn, sql, (job_id, run_id)).one_or_none():
            by = execute(conn, "SELECT lease_id FROM captions WHERE job_id = ?", (job_id,)).scalar()
            found[job_id] = (row[0], row[1], by)
    return found


def _store(conn: Connection, lease: Lease, completions: Sequence[Completion], at: int) -> None:
    if captions := [one for one in completions if one.failure is None]:
        complete(conn, lease, captions, now=at)
    if failed := {one.job_id: one.failure for one in completions if one.failure is not None}:
        fail(conn, lease, failed, now=at)


def _take(conn: Connection, worker_id: int, lost: Lease, jobs: Sequence[tuple[int, str]], at: int) -> Lease:
    """A lease on jobs that are pending or waiting, in place of one that is lost."""
    waiting = [(id,) for id, status in jobs if status == JobState.WAITING]
    if waiting:
        execute(conn, "UPDATE jobs SET status = 'pending', not_before = NULL WHERE id = ?", waiting)
        changes: dict[str, int] = {JobState.WAITING: -len(waiting), JobState.PENDING: len(waiting)}
        tally(conn, lost.run_id, lost.split, 0, changes)
    lease_id = new_lease(conn, worker_id, lost.run_id, lost.split, lost.lane, [id for id, _ in jobs], 0, at)
    return Lease(lease_id, worker_id, lost.run_id, lost.split, lost.lane)


def belongs(conn: Connection, lease: Lease, uuid: str) -> bool:
    """Whether this database gave the lease to that worker: another's ids mean other pictures."""
    sql = "SELECT 1 FROM leases l JOIN workers w ON w.id = l.worker_id WHERE l.id = ? AND w.uuid = ?"
    return execute(conn, sql, (lease.id, uuid)).one_or_none() is not None


def release_forgotten(conn: Connection, worker_id: int, held: Set[int], *, now: int | None = None) -> int:
    """Gives back what this worker leased without knowing, since the answer to its claim was lost; returns how many.

    `held` are the leases that it knew of before this transaction began: others' stores may close some meanwhile.
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


# --- Crashes and time ------------------------------------------------------------------------------------------


# In order of time: asked for in order of id, SQLite walks the table instead of the index.
_EXPIRED = (
    "SELECT id FROM leases WHERE state = 'open' AND expires_at <= ? AND worker_id <> ? AND expires_at - beat_at <= ? "
    "ORDER BY expires_at, id"
)


def reap(
    conn: Connection, *, but: int = 0, contact_ms: int = 1 << 62, most: int | None = None, now: int | None = None
) -> list[int]:
    """Frees the jobs of leases whose time ran out; returns the leases. Their workers are taken for dead.

    A worker passes its own id as `but`: it knows better than the clock that it lives. And for how long it has been in
    touch with the database: a lease that lasts longer may belong to one that was cut off as well.
    """
    at = time_of(conn, now)
    _bring_back(conn, at)
    expired = sorted(row[0] for row in execute(conn, _EXPIRED, (at, but, contact_ms)).fetchall()[:most])
    return [lease_id for lease_id in expired if crash(conn, lease_id, now=at, expired_by=at)]


def _bring_back(conn: Connection, at: int) -> None:
    """Lets leases that were extended in what is the future, since the clock was set back, run out one lease time from
    now: a worker that lives extends its own before, and one that died keeps its pictures no longer.
    """
    found = execute(conn, f"{_OF_THE_FUTURE} ORDER BY id{db.for_update(conn, 'leases')}", (at,)).fetchall()
    if found:
        sql = "UPDATE leases SET beat_at = ?, expires_at = ? + expires_at - beat_at WHERE id = ? AND beat_at > ?"
        execute(conn, sql, [(at, at, row[0], at) for row in found])


_OF_THE_FUTURE = "SELECT id FROM leases WHERE state = 'open' AND beat_at > ?"


def crash(conn: Connection, lease_id: int, *, now: int | None = None, expired_by: int = 1 << 62) -> bool:
    """Ends a lease whose worker died, or is about to: its jobs are suspects, the attempt refunded.

    A job that was alone in two such leases fails. Returns False, changing nothing, if the lease was not open, or was
    extended beyond `expired_by` meanwhile.
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
        reason = Failure("crashed", "Two workers died while they captioned this picture alone.")
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
    """Makes waiting jobs pending whose time has come; returns how many.

    So are those that would wait longer than anything does: the clock has been set back since.
    """
    at = time_of(conn, now)
    sql = _WAKE.format(skip_locked=SKIP_LOCKED[conn.dialect.name])
    rows = execute(conn, sql, (at, at + MAX_BACKOFF_MS)).fetchall()
    for (run_id, split), n in sorted(Counter((row[0], row[1]) for row in rows).items()):
        tally(conn, run_id, split, 0, {JobState.WAITING: -n, JobState.PENDING: n})
    return len(rows)


def overdue(conn: Connection, *, now: int | None = None) -> bool:
    """Whether `reap` or `wake` would do anything: a read, so that idle workers need no write lock."""
    at = time_of(conn, now)
    row = execute(
        conn,
        "SELECT EXISTS (SELECT 1 FROM leases WHERE state = 'open' AND (expires_at <= ? OR beat_at > ?)) "
        "OR EXISTS (SELECT 1 FROM jobs WHERE status = 'waiting' AND (not_before <= ? OR not_before > ?))",
        (at, at, at, at + MAX_BACKOFF_MS),
    )
    return bool(row.scalar_one())
