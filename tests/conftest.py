"""Fixtures: real databases of three kinds, and the environment of every test."""

import os
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

# Before torch is imported: spinning OpenMP threads starve the other processes of a test.
os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}
os.environ.pop("ROCOCAP_DB", None)
os.environ.pop("ROCOCAP_DATASET", None)
os.environ.pop("ROCOCAP_PROMPTS", None)
os.environ.pop("ROCOCAP_SPOOL", None)

import pytest
from postgres import Server
from small_engine import QUICK
from sqlalchemy import Engine

from rococap import db

DATABASES = ("delete", "wal", "postgresql")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "url" in metafunc.fixturenames and metafunc.definition.get_closest_marker("every_database"):
        metafunc.parametrize("url", DATABASES, indirect=True)


@pytest.fixture(autouse=True)
def less_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes workers in this process poll and store more often than by default, so that they end sooner."""
    for name, seconds in QUICK.items():
        monkeypatch.setattr(name, seconds)


@pytest.fixture(scope="session")
def empty_queue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("empty") / "queue.db"
    db.connect(f"sqlite:///{path}").dispose()
    return path


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A server for this session, with a template database that has the schema."""
    server = Server()
    db.connect(server.create("empty_queue")).dispose()
    yield server
    server.stop()


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty queue for one test.

    It is an SQLite file in DELETE journal mode; a test marked `every_database` runs once for each of DATABASES.
    """
    with new_queue(request, getattr(request, "param", "delete"), tmp_path) as url:
        yield url


@contextmanager
def new_queue(request: pytest.FixtureRequest, kind: str, folder: Path) -> Iterator[str]:
    """The URL of an empty queue of this kind. It is a copy, because migrating takes a quarter of a second."""
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


@pytest.fixture
def database(url: str) -> Iterator[Engine]:
    with sound(url) as engine:
        yield engine


@contextmanager
def sound(url: str) -> Iterator[Engine]:
    """A queue that must be consistent when the test ends."""
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
    flags = Counter((run, split, f"flag:{flag}") for run, split, names in flagged for flag in names.split(","))
    return {(row[0], row[1], row[2]): row[3] for row in rows} | flags
