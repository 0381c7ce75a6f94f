"""A database that is locked, gone, older or another one; clients that are slow or broken; a server that is to stop."""

import shutil
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest
from samples import fill
from steps import downgrade, until
from web_server import HTML, Served, serving

from rococap import db


def new_queue(folder: Path, n: int = 5) -> Path:
    path = folder / "queue.db"
    folder.mkdir(exist_ok=True)
    database = db.connect(f"sqlite:///{path}")
    fill(database, folder / "set", n)
    database.dispose()
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_queue(tmp_path_factory.mktemp("queue"))


@pytest.fixture(scope="module")
def served(path: Path) -> Iterator[Served]:
    with serving(f"sqlite:///{path}") as served:
        yield served


@contextmanager
def instead(path: Path, other: Path | None) -> Iterator[None]:
    """Puts another file, or none, in the database's place for a while."""
    aside = path.with_suffix(".aside")
    path.rename(aside)
    if other:
        shutil.copy(other, path.with_suffix(".other")).replace(path)  # the server is not to see a part of it
    try:
        yield
    finally:
        aside.replace(path)


def wait_for(served: Served, message: str) -> None:
    """What was seen is shown for a second."""
    until(lambda: message in served.client.get("/").text, message)


def check_trouble(served: Served, message: str) -> None:
    """A page for people and JSON for programs say so, and a page that is open shows it."""
    with served.client.stream("GET", "/live") as live:
        wait_for(served, message)
        for asked, headers in (("get", HTML), ("get", {}), ("post", {})):
            path, body = ("/", {}) if asked == "get" else ("/actions/pause", {"json": {"run": "default"}})
            answer = getattr(served.client, asked)(path, headers=headers, **body)
            assert answer.status_code == 503
            assert answer.headers["Retry-After"] == "5"
            assert message in (answer.text if headers else answer.json()["error"]["message"])
            assert answer.headers["Content-Type"].startswith("text/html" if headers else "application/json")
        assert served.client.get("/healthz").status_code == 503
        assert next(line for line in live.iter_lines() if line.startswith("data: ") and message in line)


def check_well(served: Served) -> None:
    until(lambda: served.client.get("/", headers=HTML).status_code == 200, "it shows the queue again")
    assert served.client.get("/healthz").json() == {"status": "ok"}


def test_a_database_that_is_gone(served, path):
    check_well(served)
    with instead(path, None):
        check_trouble(served, "it is gone")
        assert not path.exists()
    check_well(served)


def test_a_database_that_was_replaced(served, path, tmp_path):
    check_well(served)
    with instead(path, new_queue(tmp_path / "other")):
        check_trouble(served, "is not the database that this process started with: it was replaced.")
    check_well(served)


def test_a_database_that_is_older(served, path, tmp_path):
    older = shutil.copy(path, tmp_path / "older.db")
    database = db.connect(f"sqlite:///{older}")
    downgrade(database, "0003")
    database.dispose()
    with instead(path, older):
        check_trouble(served, "has schema 0003; this version of rococap needs")
    check_well(served)


def test_a_file_that_is_no_database(served, path, tmp_path):
    other = tmp_path / "text.db"
    other.write_text("This is a text, and longer than the header of a database would be. " * 99)
    with instead(path, other):
        check_trouble(served, "is not an SQLite database, or is damaged")
    check_well(served)


def test_a_database_that_is_locked(served, path):
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        wait_for(served, "has been locked by another process")
        assert served.client.get("/nothing").status_code == 404, "what needs no database is answered"
    check_well(served)


def test_looking_waits_for_no_writer_and_holds_none_up(served, path):
    with (
        closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as writer,
        served.client.stream("GET", "/live"),
    ):
        writer.execute("BEGIN IMMEDIATE")
        assert served.client.get("/", headers=HTML).status_code == 200
        assert served.client.get("/throughput").status_code == 200
        writer.execute("ROLLBACK")


def test_clients_that_are_slow_or_broken_delay_nobody(served):
    port = int(served.address.rpartition(":")[2])
    host = f"Host: 127.0.0.1:{port}\r\n".encode()
    beginnings = [
        b"",
        b"GET / HTT",
        b"GET /live HTTP/1.1\r\n" + host + b"\r\n",  # and never reads
        b"POST /actions/pause HTTP/1.1\r\n" + host + b"Content-Length: 500\r\n\r\n{",
        b"\x16\x03\x01\x02\x00\x01\x00",  # TLS
        b"GET / HTTP/1.1\r\n" + host + b"Content-Length: -1\r\n\r\n",
    ]
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(5) for _ in beginnings]
    for client, beginning in zip(clients, beginnings * 5, strict=True):
        client.sendall(beginning)
    check_well(served)
    for client in clients:
        client.close()
    check_well(served)


def test_it_stops_at_once_though_pages_are_open(tmp_path):
    with serving(f"sqlite:///{new_queue(tmp_path)}") as served, httpx.stream("GET", f"{served.address}/live") as live:
        lines = live.iter_lines()
        assert next(line for line in lines if line == "event: runs")
        assert served.stop() == 0
        assert "event: trouble" in [*lines], "what was under way is sent, and the stream ends as it should"
