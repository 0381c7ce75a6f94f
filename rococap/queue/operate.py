"""Transitions that the user asks for: retry, cancel, pause, prune, delete."""

from collections import Counter
from collections.abc import Iterable, Sequence

from sqlalchemy import Connection

from rococap import db
from rococap.db import execute
from rococap.errors import RunError
from rococap.queue.leases import close_if_empty
from rococap.queue.records import tally, time_of
from rococap.queue.runs import Run, refuse_deleted
from rococap.tables import JobState


def _selected(
    conn: Connection, run: Run, statuses: str, splits: Sequence[str], image_ids: Sequence[str], codes: Sequence[str]
) -> list[tuple[int, str, str]]:
    """Locks the run's jobs in these statuses, an SQL list of literals; returns (id, split, status) of each.

    Each of `splits`, `image_ids` and `codes` (of the latest failure) narrows the selection unless it is empty.
    """

    def within(column: str, values: Sequence[str]) -> str:
        return f"AND {column} IN ({', '.join('?' * len(values))}) " if values else ""

    latest = "(SELECT f.code FROM failures f WHERE f.job_id = j.id ORDER BY f.id DESC LIMIT 1)"
    sql = (
        "SELECT j.id, j.split, j.status FROM jobs j JOIN images i ON i.id = j.image_id "
        f"WHERE j.run_id = ? AND j.status IN ({statuses}) "
        + within("j.split", splits)
        + within("i.image_id", image_ids)
        + within(latest, codes)
        + "ORDER BY j.id"
        + db.for_update(conn, "j")
    )
    return [(row[0], row[1], row[2]) for row in execute(conn, sql, (run.id, *splits, *image_ids, *codes)).fetchall()]


def _count(conn: Connection, run: Run, jobs: Iterable[tuple[int, str, str]], to: str) -> None:
    """Updates the tallies for jobs, as (id, split, status), that moved to the status `to`."""
    for (split, status), n in sorted(Counter((split, status) for _, split, status in jobs).items()):
        tally(conn, run.id, split, 0, {status: -n, to: n})


def retry(
    conn: Connection,
    run: Run,
    *,
    splits: Sequence[str] = (),
    image_ids: Sequence[str] = (),
    codes: Sequence[str] = (),
    cancelled: bool = False,
) -> int:
    """Makes failed (or, if `cancelled`, cancelled) jobs pending, their attempts and crashes reset; returns how many.

    Jobs selected by `image_ids` are retried in either state.
    """
    statuses = "'failed', 'cancelled'" if image_ids else "'cancelled'" if cancelled else "'failed'"
    jobs = _selected(conn, run, statuses, splits, image_ids, codes)
    if jobs:
        sql = (
            "UPDATE jobs SET status = 'pending', attempts = 0, crashes = 0, solo_crashes = 0, finished_at = NULL "
            "WHERE id = ?"
        )
        execute(conn, sql, [(id,) for id, _, _ in jobs])
    _count(conn, run, jobs, JobState.PENDING)
    return len(jobs)


def unknown_images(conn: Connection, run: Run, image_ids: Sequence[str]) -> list[str]:
    """Those of `image_ids` that no picture of the run has."""
    sql = "SELECT 1 FROM jobs j JOIN images i ON i.id = j.image_id WHERE j.run_id = ? AND i.image_id = ? LIMIT 1"
    return [image_id for image_id in image_ids if execute(conn, sql, (run.id, image_id)).one_or_none() is None]


def unknown_codes(conn: Connection, run: Run, codes: Sequence[str]) -> list[str]:
    """Those of `codes` that no failure of the run has, including failures of pictures retried since."""
    sql = "SELECT 1 FROM failures f JOIN jobs j ON j.id = f.job_id WHERE j.run_id = ? AND f.code = ? LIMIT 1"
    return [code for code in codes if execute(conn, sql, (run.id, code)).one_or_none() is None]


def cancel(
    conn: Connection,
    run: Run,
    *,
    splits: Sequence[str] = (),
    image_ids: Sequence[str] = (),
    now: int | None = None,
) -> int:
    """Cancels jobs that are not finished; returns how many. A worker that holds some of them drops their captions."""
    at = time_of(conn, now)
    sql = "UPDATE jobs SET status = 'cancelled', lease_id = NULL, not_before = NULL, finished_at = ? WHERE id = ?"
    # First the jobs that no worker holds, so that no claim can lease any of them; then leases before their jobs, in
    # the package's lock order.
    free = _selected(conn, run, "'pending', 'waiting'", splits, image_ids, ())
    if free:
        execute(conn, sql, [(at, id) for id, _, _ in free])
    leases = execute(
        conn,
        "SELECT id FROM leases WHERE state = 'open' AND run_id = ? ORDER BY id" + db.for_update(conn, "leases"),
        (run.id,),
    ).fetchall()
    # Includes free jobs, because some may have been released since.
    held = _selected(conn, run, "'pending', 'waiting', 'leased'", splits, image_ids, ())
    if held:
        execute(conn, sql, [(at, id) for id, _, _ in held])
    for row in leases:
        close_if_empty(conn, row[0], "closed", at)
    _count(conn, run, (*free, *held), JobState.CANCELLED)
    return len(free) + len(held)


def pause(conn: Connection, run: Run, paused: bool) -> None:
    """Forbids or allows claims from the run. Leased jobs are not affected."""
    execute(conn, "UPDATE runs SET paused = ? WHERE id = ?", (int(paused), run.id))


def prune(conn: Connection, *, before: int, limit: int = 1_000) -> int:
    """Deletes up to `limit` failures from before a time that a later failure of the same job has superseded; returns
    how many.

    Each job's latest failure, the leases and the captions stay, as the record of what happened.
    """
    rows = execute(
        conn,
        "SELECT f.id FROM failures f WHERE f.at < ? "
        "AND EXISTS (SELECT 1 FROM failures g WHERE g.job_id = f.job_id AND g.id > f.id) LIMIT ?",
        (before, limit),
    ).fetchall()
    if rows:
        execute(conn, "DELETE FROM failures WHERE id = ?", [(row[0],) for row in rows])
    return len(rows)


def delete_run(conn: Connection, run: Run, *, now: int | None = None) -> None:
    """Removes a run from the queue: no query finds it any more, and its name is free. `clear_deleted` removes its rows.

    Raises RunError while workers hold pictures of it, if people reviewed or edited its captions or a reader study uses
    them, and if it was deleted before.
    """
    db.lock(conn, "runs", run.id)
    refuse_deleted(conn, run)
    _refuse_used(conn, run)
    sql = "UPDATE runs SET deleted_at = ?, paused = 1, name = ? WHERE id = ?"
    execute(conn, sql, (time_of(conn, now), f"{run.name} (deleted {run.id})", run.id))
    # Counted only now: on PostgreSQL the update has waited for claims whose lease was there.
    # A lease that comes later, of a claim that was under way, is ended by `clear_deleted`.
    is_open = "SELECT count(*) FROM leases WHERE state = 'open' AND run_id = ?"
    if n := execute(conn, is_open, (run.id,)).scalar_one():
        raise RunError(
            f"Workers hold pictures of run {run.name!r} ({n} leases are open), so it was not deleted. Stop them, or "
            f"cancel the pictures first: rococap cancel --run {run.name} --all"
        )


def _refuse_used(conn: Connection, run: Run) -> None:
    """Raises RunError if people have worked on the run's captions: what they did is kept for good."""
    using = {"reviews": "reviews", "edits": "edits", "study_items": "reader studies"}
    exists = "SELECT 1 FROM {} x JOIN jobs j ON j.id = x.job_id WHERE j.run_id = ? LIMIT 1"
    if found := [what for table, what in using.items() if execute(conn, exists.format(table), (run.id,)).fetchall()]:
        raise RunError(
            f"Run {run.name!r} has {' and '.join(found)}, which are kept for good, so it was not deleted. To stop its "
            f"workers instead: rococap cancel --run {run.name} --all"
        )


def clear_deleted(conn: Connection, *, limit: int = 1_000) -> int:
    """Deletes up to `limit` jobs of deleted runs, with their captions, scores and failures; returns how many.

    Leases stay, as the record of how workers spent their time.
    """
    deleted = "SELECT id FROM runs WHERE deleted_at IS NOT NULL"
    sql = f"SELECT j.id FROM jobs j WHERE j.run_id IN ({deleted}) ORDER BY j.id LIMIT ?" + db.for_update(conn, "j")
    ids = [(row[0],) for row in execute(conn, sql, (limit,)).fetchall()]
    if not ids:
        ending = f"UPDATE leases SET state = 'released', closed_at = ? WHERE state = 'open' AND run_id IN ({deleted})"
        execute(conn, ending, (db.now(conn),))
        execute(conn, f"DELETE FROM tallies WHERE run_id IN ({deleted})")
        return 0
    for table, key in (("scores", "job_id"), ("captions", "job_id"), ("failures", "job_id"), ("jobs", "id")):
        execute(conn, f"DELETE FROM {table} WHERE {key} = ?", ids)
    return len(ids)
