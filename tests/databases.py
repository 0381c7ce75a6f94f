"""Real databases of three kinds, and what holds in each of them."""

import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Engine

from rococap import db

DATABASES = ("delete", "wal", pytest.param("postgresql", marks=pytest.mark.slow))


@contextmanager
def new_queue(request: pytest.FixtureRequest, kind: str, folder: Path) -> Iterator[str]:
    """A queue of this kind; copied, since migrating takes a quarter of a second."""
    if kind == "postgresql":
        server = request.getfixturevalue("postgres")
        url = server.create(template="empty_queue")
        yield url
        server.drop(url)
        return
    path = shutil.copy(request.getfixturevalue("empty_queue"), folder / "queue.db")
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute(f"PRAGMA journal_mode = {kind}").fetchone()[0] == kind
    yield f"sqlite:///{path}"


@contextmanager
def sound(url: str) -> Iterator[Engine]:
    """A queue that is to be sound at the end."""
    engine = db.connect(url)
    yield engine
    with db.transaction(engine) as conn:
        assert tallies(conn) == recount(conn), "the tallies drifted from the jobs"
        if engine.dialect.name == "sqlite":
            assert db.execute(conn, "PRAGMA integrity_check").scalar() == "ok"
            assert db.execute(conn, "PRAGMA foreign_key_check").fetchall() == []
    engine.dispose()


def tallies(conn) -> dict[tuple[int, str, str], int]:
    rows = db.execute(conn, "SELECT run_id, split, status, sum(n) FROM tallies GROUP BY 1, 2, 3").fetchall()
    return {(row[0], row[1], row[2]): int(row[3]) for row in rows if row[3]}


def recount(conn) -> dict[tuple[int, str, str], int]:
    rows = db.execute(conn, "SELECT run_id, split, status, count(*) FROM jobs GROUP BY 1, 2, 3").fetchall()
    flagged = db.execute(
        conn,
        "SELECT j.run_id, j.split, c.flags FROM captions c JOIN jobs j ON j.id = c.job_id WHERE c.flags <> ''",
    ).fetchall()
    flags = Counter((run, split, f"flag:{flag}") for run, split, told in flagged for flag in told.split(","))
    return {(row[0], row[1], row[2]): row[3] for row in rows} | flags
