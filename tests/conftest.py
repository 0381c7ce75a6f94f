"""Fixtures: a real database file, and the environment that every test runs in."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: spinning OpenMP threads starve the other processes of a test.
os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}
os.environ.pop("ROCOCAP_DB", None)
os.environ.pop("ROCOCAP_DATASET", None)

import pytest
from sqlalchemy import Engine

from rococap import db


@pytest.fixture(scope="session")
def empty_queue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("empty") / "queue.db"
    db.connect(f"sqlite:///{path}").dispose()
    return path


@pytest.fixture
def url(tmp_path: Path, empty_queue: Path) -> str:
    """A queue of the test's own; copied, since migrating takes a quarter of a second."""
    return f"sqlite:///{shutil.copy(empty_queue, tmp_path / 'queue.db')}"


@pytest.fixture
def database(url: str) -> Iterator[Engine]:
    engine = db.connect(url)
    yield engine
    with db.transaction(engine) as conn:
        assert tallies(conn) == recount(conn), "the tallies drifted from the jobs"
        assert db.execute(conn, "PRAGMA integrity_check").scalar() == "ok"
        assert db.execute(conn, "PRAGMA foreign_key_check").fetchall() == []
    engine.dispose()


def tallies(conn) -> dict[tuple[int, str, str], int]:
    rows = db.execute(conn, "SELECT run_id, split, status, sum(n) FROM tallies GROUP BY 1, 2, 3").fetchall()
    return {(row[0], row[1], row[2]): row[3] for row in rows if row[3]}


def recount(conn) -> dict[tuple[int, str, str], int]:
    rows = db.execute(conn, "SELECT run_id, split, status, count(*) FROM jobs GROUP BY 1, 2, 3").fetchall()
    return {(row[0], row[1], row[2]): row[3] for row in rows}
