"""A PostgreSQL server for the benches: the tests' one, but with its durability on, as in earnest."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from sqlalchemy.engine import make_url

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from postgres import Server


@contextmanager
def started() -> Iterator[Server]:
    server = Server()
    try:
        with psycopg.connect(libpq(server.create()), autocommit=True) as connection:
            for setting in ("fsync", "synchronous_commit", "full_page_writes"):
                connection.execute(f"ALTER SYSTEM RESET {setting}")
            connection.execute("SELECT pg_reload_conf()")
        yield server
    finally:
        server.stop()


def libpq(url: str) -> str:
    """The URL without SQLAlchemy's driver name."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
