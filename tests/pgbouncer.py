"""A real PgBouncer in front of a test's PostgreSQL server. Install it with apt-get install pgbouncer."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from postgres import Server
from sqlalchemy.engine import make_url

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
PORT = 6432  # names the socket in a private folder; nothing listens on the network


class Bouncer:
    """PgBouncer in transaction mode, with fewer server connections than its clients want."""

    def __init__(self, server: Server, folder: Path, size: int) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [str(PROGRAM), str(_write_settings(server, folder, size))],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            user=server.system_user,  # it refuses root
        )
        deadline = time.monotonic() + 30
        while not (folder / f".s.PGSQL.{PORT}").exists():
            assert self._process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, "PgBouncer did not begin to listen"
            time.sleep(0.02)

    def in_front_of(self, url: str) -> str:
        """The URL of the same database through PgBouncer."""
        query = {"host": str(self.folder), "port": str(PORT)}
        return make_url(url).set(query=query).render_as_string(hide_password=False)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)


def _write_settings(server: Server, folder: Path, size: int) -> Path:
    path = folder / "pgbouncer.ini"
    path.write_text(
        f"[databases]\n* = host={server.socket_folder} user=postgres\n"
        f"[pgbouncer]\npool_mode = transaction\ndefault_pool_size = {size}\nauth_type = any\n"
        f"unix_socket_dir = {folder}\nlisten_port = {PORT}\nlogfile = {folder}/log\n"
        "max_client_conn = 100\nserver_login_retry = 1\n"
    )
    if server.system_user is not None:
        shutil.chown(folder, server.system_user)
    return path


@contextmanager
def bouncing(server: Server, size: int = 3) -> Iterator[Bouncer]:
    # Not in pytest's folder, which only its owner may enter: PgBouncer may run as another user.
    with tempfile.TemporaryDirectory(prefix="rococap-bouncer-") as folder:
        bouncer = Bouncer(server, Path(folder), size)
        try:
            yield bouncer
        finally:
            bouncer.stop()
