"""Fixtures: real databases of three kinds, and the environment of every test."""

import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is imported: spinning OpenMP threads starve the other processes of a test.
os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}
os.environ.pop("ROCOCAP_DB", None)
os.environ.pop("ROCOCAP_DATASET", None)
os.environ.pop("ROCOCAP_PROMPTS", None)
os.environ.pop("ROCOCAP_SPOOL", None)

import hypothesis
import pytest
from databases import DATABASES, new_queue, sound
from postgres import Server
from small_engine import QUICK
from sqlalchemy import Engine

from rococap import db

hypothesis.settings.register_profile(
    "rococap",
    derandomize=True,  # a run of CI that fails by chance says nothing of the change that it tests
    deadline=None,  # on a busy machine any example may take long
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("rococap")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "url" in metafunc.fixturenames and metafunc.definition.get_closest_marker("every_database"):
        metafunc.parametrize("url", DATABASES, indirect=True)


@pytest.fixture(autouse=True)
def less_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes workers in this process poll and store more often than by default, so that they end sooner."""
    for name, seconds in QUICK.items():
        monkeypatch.setattr(name, seconds)


@pytest.fixture(autouse=True)
def less_fsync(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite does not wait for the disk in this process, since nobody pulls the plug."""
    if request.node.get_closest_marker("durable"):
        return
    set_pragmas = db._set_pragmas

    def set_fewer(connection: sqlite3.Connection, record: object) -> None:
        set_pragmas(connection, record)
        connection.execute("PRAGMA synchronous = OFF")

    monkeypatch.setattr(db, "_set_pragmas", set_fewer)


@pytest.fixture(scope="session")
def empty_queue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("empty") / "queue.db"
    db.connect(f"sqlite:///{path}").dispose()
    return path


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A server of this process's own, with a template database that has our tables: it starts in a second."""
    server = Server()
    db.connect(server.create("empty_queue")).dispose()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium. For one module, because Playwright's event loop runs meanwhile."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty queue for one test.

    It is an SQLite file in DELETE journal mode; a test marked `every_database` runs once for each of DATABASES.
    """
    with new_queue(request, getattr(request, "param", "delete"), tmp_path) as url:
        yield url


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_queue: Path) -> Path:
    """A folder of the test's own, with an empty queue where the default URL points."""
    shutil.copy(empty_queue, tmp_path / "rococap.db")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    """The test's queue, opened; it need not be sound at the end."""
    engine = db.connect(url)
    yield engine
    engine.dispose()


@pytest.fixture
def database(url: str) -> Iterator[Engine]:
    with sound(url) as engine:
        yield engine
