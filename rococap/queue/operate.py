"""Transitions that a person asks for: retry, cancel, pause, prune, delete."""

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
    """(id, split, status) of the run's jobs in these statuses (a literal list), narrowed by what is not empty."""

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
    """Tallies the move of jobs (id, split, status) to another state."""
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
    """Makes failed (or, if `cancelled`, cancelled) jobs pending with a clean record; returns how many.

    Named image_ids are retried in either state.
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
    """Those that no picture of the run has."""
    sql = "SELECT 1 FROM jobs j JOIN images i ON i.id = j.image_id WHERE j.run_id = ? AND i.image_id = ? LIMIT 1"
    return [image_id for image_id in image_ids if execute(conn, sql, (run.id, image_id)).one_or_none() is None]


def unknown_codes(conn: Connection, run: Run, codes: Sequence[str]) -> list[str]:
    """Those that no failure of the run has, also of pictures that were tried again since."""
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
    """Withdraws jobs that are not finished; returns how many. A worker that holds some drops their captions."""
    at = time_of(conn, now)
    sql = "UPDATE jobs SET status = 'cancelled', lease_id = NULL, not_before = NULL, finished_at = ? WHERE id = ?"
    # First what is free: after that no claim can put any of it under a lease. Then leases before their jobs, as always.
    free = _selected(conn, run, "'pending', 'waiting'", splits, image_ids, ())
    if free:
        execute(conn, sql, [(at, id) for id, _, _ in free])
    leases = execute(
        conn,
        "SELECT id FROM leases WHERE state = 'open' AND run_id = ? ORDER BY id" + db.for_update(conn, "leases"),
        (run.id,),
    ).fetchall()
    held = _selected(conn, run, "'pending', 'waiting', 'leased'", splits, image_ids, ())  # some given back meanwhile
    if held:
        execute(conn, sql, [(at, id) for id, _, _ in held])
    for row in leases:
        close_if_empty(conn, row[0], "closed", at)
    _count(conn, run, (*free, *held), JobState.CANCELLED)
    return len(free) + len(held)


def pause(conn: Connection, run: Run, paused: bool) -> None:
    """Stops or allows claims of the run. What is leased goes on."""
    execute(conn, "UPDATE runs SET paused = ? WHERE id = ?", (int(paused), run.id))


def prune(conn: Connection, *, before: int, most: int = 1_000) -> int:
    """Deletes up to `most` failures from before a time, each followed by a later one of the same job; returns how many.

    The latest of each job, leases and captions stay: they say what happened and what made it.
    """
    rows = execute(
        conn,
        "SELECT f.id FROM failures f WHERE f.at < ? "
        "AND EXISTS (SELECT 1 FROM failures g WHERE g.job_id = f.job_id AND g.id > f.id) LIMIT ?",
        (before, most),
    ).fetchall()
    if rows:
        execute(conn, "DELETE FROM failures WHERE id = ?", [(row[0],) for row in rows])
    return len(rows)


def delete_run(conn: Connection, run: Run, *, now: int | None = None) -> None:
    """Takes a run out of the queue: nothing finds it any more, and its name is free. Its rows go by `clear_deleted`.

    Raises RunError while workers hold pictures of it.
    """
    db.lock(conn, "runs", run.id)
    refuse_deleted(conn, run)
    sql = "UPDATE runs SET deleted_at = ?, paused = 1, name = ? WHERE id = ?"
    execute(conn, sql, (time_of(conn, now), f"{run.name} (deleted {run.id})", run.id))
    # Only now: on PostgreSQL the change has waited for claims that were under way, and whoever claims next is refused.
    is_open = "SELECT count(*) FROM leases WHERE state = 'open' AND run_id = ?"
    if n := execute(conn, is_open, (run.id,)).scalar_one():
        raise RunError(
            f"Workers hold pictures of run {run.name!r} ({n} leases are open), so it stays. Stop them, or withdraw the "
            f"pictures first: rococap cancel --run {run.name} --all"
        )


def clear_deleted(conn: Connection, *, most: int = 1_000) -> int:
    """Removes up to `most` jobs of deleted runs, with their captions, scores and failures; returns how many.

    Leases stay: they say what workers did with their time.
    """
    deleted = "SELECT id FROM runs WHERE deleted_at IS NOT NULL"
    sql = f"SELECT j.id FROM jobs j WHERE j.run_id IN ({deleted}) ORDER BY j.id LIMIT ?" + db.for_update(conn, "j")
    ids = [(row[0],) for row in execute(conn, sql, (most,)).fetchall()]
    if not ids:
        execute(conn, f"DELETE FROM tallies WHERE run_id IN ({deleted})")
        return 0
    for table, key in (("scores", "job_id"), ("captions", "job_id"), ("failures", "job_id"), ("jobs", "id")):
        execute(conn, f"DELETE FROM {table} WHERE {key} = ?", ids)
    return len(ids)
