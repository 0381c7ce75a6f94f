"""Starts a PostgreSQL server for the benchmarks: that of the tests, but with durability enabled as in production."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from sqlalchemy.engine import make_url

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from postgres import Server


@contextmanager
def started(**settings: object) -> Iterator[Server]:
    """A server with these settings, such as `max_connections`."""
    server = Server()
    try:
        with psycopg.connect(libpq(server.create()), autocommit=True) as connection:
            for setting in ("fsync", "synchronous_commit", "full_page_writes"):
                connection.execute(f"ALTER SYSTEM RESET {setting}")
            for setting, value in settings.items():
                connection.execute(f"ALTER SYSTEM SET {setting} = {value}")
        server.control("restart")
        yield server
    finally:
        server.stop()


def libpq(url: str) -> str:
    """The URL in the form that libpq accepts, without SQLAlchemy's driver name."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
