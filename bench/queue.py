"""Claiming and completing every job, 32 at a time: rococap.queue against sqlite3 replaying its very statements."""

import argparse
import gc
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(sys.path.pop(0))  # last, for queue.py here would stand in for the standard library's

from report import Took, alternate, compare, show, timed
from rows import SPLIT, connect, fill
from sqlalchemy import Engine, event

from rococap import db, queue
from rococap.engines import Completion

BATCH = 32
TEXT = "Axial computed tomography of the abdomen shows a hypodense lesion in the right lobe of the liver (arrow)."

Statement = tuple[str, Any, bool]
"""SQL, its parameters, and whether they are many rows."""


def drain(engine: Engine) -> None:
    while True:
        with db.transaction(engine, write=True) as conn:
            lease = queue.claim(conn, 1, 1, SPLIT, BATCH, ttl_ms=600_000)
        if lease is None:
            return
        done = [Completion(job.id, TEXT, "", "stop", 300, 24, 123.4, 60.1, 2000.5, BATCH) for job in lease.jobs]
        with db.transaction(engine, write=True) as conn:
            queue.complete(conn, lease, done, timing=queue.Timing(1.5, 2.5, 3.5, 4.5, 5.5))


def record(path: Path) -> list[Statement]:
    """All that ours sends to the driver, so that the peer does the same work, and none to find its parameters."""
    engine = db.connect(f"sqlite:///{path}")
    statements: list[Statement] = []

    @event.listens_for(engine, "before_cursor_execute")
    def note(conn: Any, cursor: Any, sql: str, parameters: Any, context: Any, many: bool) -> None:
        statements.append((sql, parameters, many))

    drain(engine)
    engine.dispose()
    return statements


def replay(connection: sqlite3.Connection, statements: list[Statement]) -> None:
    for sql, parameters, many in statements:
        if many:
            connection.executemany(sql, parameters)
        else:
            connection.execute(sql, parameters).fetchall()


def on_copy(base: Path, work: Callable[[Path], Took]) -> Took:
    copy = shutil.copy(base, base.with_name("copy.db"))
    took = work(copy)
    _require_all_done(copy)
    copy.unlink()
    return took


def _require_all_done(path: Path) -> None:
    connection = connect(path)
    left = connection.execute(
        "SELECT (SELECT count(*) FROM jobs WHERE status <> 'done') + (SELECT count(*) FROM jobs) "
        "- (SELECT count(*) FROM captions) + (SELECT count(*) FROM leases WHERE state <> 'closed')"
    ).fetchone()[0]
    connection.close()
    if left:
        raise SystemExit(f"{left} rows of {path} were not completed")


def time_ours(path: Path) -> Took:
    engine = db.connect(f"sqlite:///{path}")
    took = timed(lambda: drain(engine))
    engine.dispose()
    return took


def time_peer(path: Path, statements: list[Statement]) -> Took:
    connection = connect(path)
    took = timed(lambda: replay(connection, statements))
    connection.close()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_480)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base.db")
        fill(base, options.rows, done=False)
        statements = record(shutil.copy(base, base.with_name("recorded.db")))
        gc.freeze()  # else every collection walks the recording, in our time as well as in the peer's
        rounds = alternate(
            options.rounds,
            lambda: on_copy(base, lambda path: time_peer(path, statements)),
            lambda: on_copy(base, time_ours),
        )
    what = "claim + complete, per row"
    lines = [
        compare(what, rounds, "cpu", "<= 2.0", rows=options.rows),
        compare(what, rounds, "user", "<= 2.0", rows=options.rows),
        compare(what, rounds, "wall", "<= 2.0", rows=options.rows),
    ]
    show(lines, f"{options.rows} rows, {BATCH} a claim, {len(statements)} statements, {options.rounds} rounds")


if __name__ == "__main__":
    main()
