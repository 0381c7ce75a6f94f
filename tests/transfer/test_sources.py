"""What is merged or copied is only read, and what is wrong with it is told by its name."""

import os
import shlex
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from postgres import outside
from samples import caption, fill, texts
from sqlalchemy import Engine
from steps import column, downgrade, refusal, refused

from rococap import db, queue
from rococap.errors import DatabaseUnavailable
from rococap.transfer import copy, merge
from rococap.urls import shown

Transfer = Callable[..., object]
"""Transfers from a URL; takes a callback for progress."""


@pytest.fixture(params=["merge", "copy"])
def transfer(request: pytest.FixtureRequest, tmp_path: Path, empty_queue: Path) -> Iterator[Transfer]:
    """Into a database of its own, which has not changed at the end."""
    target = db.connect(f"sqlite:///{shutil.copy(empty_queue, tmp_path / 'target.db')}")
    if request.param == "merge":
        yield lambda source, *progress: merge(target, source, *progress)
    else:
        yield lambda source, *progress: copy(source, str(target.url), *progress)
    target.dispose()


@pytest.fixture
def source(database: Engine, tmp_path: Path) -> Engine:
    """A queue with a few pages of rows."""
    caption(database, fill(database, tmp_path / "set", 600), texts(*["A caption."] * 20))
    return database


def url_of(database: Engine) -> str:
    return database.url.render_as_string(hide_password=False)


# --- Without a queue -------------------------------------------------------------------------------------------

NO_QUEUE = (
    "{} holds no queue: it is empty, perhaps because the copy of a file was interrupted. Copy it again, "
    "or name another."
)


@pytest.mark.parametrize("pages", [0, 1])
def test_an_empty_file_is_no_source_and_stays_as_it_is(tmp_path, transfer, pages):
    path = tmp_path / "part.db"
    path.touch()
    if pages:
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript("CREATE TABLE t (x); DROP TABLE t; VACUUM;")
    content = path.read_bytes()
    assert bool(content) == bool(pages)
    assert refusal(transfer, str(path)) == NO_QUEUE.format(f"sqlite:///{path}")
    assert path.read_bytes() == content
    assert [*tmp_path.glob("part.db*")] == [path]


@pytest.mark.slow
def test_an_empty_database_of_a_server_is_no_source_and_stays_as_it_is(postgres, transfer):
    url = postgres.create()
    engine = db.connect(url, create=False)
    assert refusal(transfer, url) == NO_QUEUE.format(shown(engine.url))
    assert column(engine, "SELECT count(*) FROM information_schema.tables WHERE table_schema = 'public'") == [0]
    engine.dispose()


@pytest.mark.parametrize("command", ["merge", "copy-db"])
def test_the_commands_refuse_an_empty_file_before_they_make_a_database(tmp_path, command):
    part, target = tmp_path / "part.db", tmp_path / "all.db"
    part.touch()
    arguments = ("--db", target, "merge", part) if command == "merge" else ("copy-db", part, target)
    assert refused(*map(str, arguments)) == NO_QUEUE.format(f"sqlite:///{part}")
    assert (part.stat().st_size, target.exists()) == (0, False)


@pytest.mark.every_database
def test_an_older_source_is_left_to_migrate(source, transfer):
    downgrade(source, "-1")
    told = refusal(transfer, url_of(source))
    assert told.endswith(f"Upgrade it (a backup copy is made): rococap --db {shlex.quote(shown(source.url))} migrate")
    assert column(source, "SELECT version_num FROM alembic_version") != [db.SCHEMA]
    db.upgrade(source)


# --- What cannot be read ---------------------------------------------------------------------------------------


def test_a_source_with_a_damaged_page_is_named(source, transfer, tmp_path):
    page = column(source, "SELECT rootpage FROM sqlite_master WHERE name = 'captions'")[0]
    (size,) = column(source, "SELECT page_size FROM pragma_page_size")
    part = Path(shutil.copy(source.url.database, tmp_path / "part.db"))
    with part.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    assert refusal(transfer, str(part)) == (
        f"sqlite:///{part} is not an SQLite database, or is damaged (database disk image is malformed). Copy it again "
        "from where it was made, or name another."
    )


@pytest.mark.slow
@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_a_source_whose_server_ends_the_connection_is_named(source, transfer):
    ended = []

    def progress(step: str, done: int, total: int) -> None:
        if not ended:
            sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"
            with outside(url_of(source)) as outsider:
                ended.extend(outsider.execute(sql).fetchall())

    with pytest.raises(DatabaseUnavailable) as caught:
        transfer(url_of(source), progress)
    assert ended == [(True,)]
    assert str(caught.value) == (
        f"{shown(source.url)} cannot be reached (terminating connection due to administrator command). Start the "
        "server, or check the URL's host, port, user and name."
    )


# --- A folder that cannot be written ---------------------------------------------------------------------------


def read_only(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A command in a namespace of its own, where this folder is mounted so that nobody can write to it."""
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, str(folder)]
    if shutil.which("unshare") is None or subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a folder")
    command = [sys.executable, "-m", "rococap", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([*namespace, *command], env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def part(source: Engine, tmp_path: Path) -> Path:
    """A copy of the queue in a folder of its own."""
    (tmp_path / "input?").mkdir()
    source.dispose()  # the last connection takes the files beside it along
    return Path(shutil.copy(source.url.database, tmp_path / "input?" / "part #1.db"))


@pytest.mark.slow
@pytest.mark.parametrize("wal", ["none", "empty"])
@pytest.mark.parametrize("url", ["delete", "wal"], indirect=True)
@pytest.mark.parametrize("command", ["merge", "copy-db"])
def test_a_source_in_a_folder_that_cannot_be_written_is_read(part, tmp_path, command, wal):
    if wal == "empty":
        Path(f"{part}-wal").touch()
    target = tmp_path / "all.db"
    arguments = ("--db", target, "merge", part) if command == "merge" else ("copy-db", part, target)
    done = read_only(part.parent, *arguments)
    assert done.returncode == 0, done.stderr
    there = db.connect(str(target))
    assert column(there, "SELECT count(*) FROM captions") == [20]
    there.dispose()


@pytest.mark.slow
@pytest.mark.parametrize("url", ["wal"], indirect=True)
def test_a_source_of_which_a_part_is_in_a_file_beside_it_is_to_be_copied_first(source, part, tmp_path):
    with db.transaction(source, write=True) as conn:
        queue.pause(conn, queue.get_run(conn, "default"), True)
    shutil.copy(source.url.database, part)
    shutil.copy(f"{source.url.database}-wal", f"{part}-wal")
    done = read_only(part.parent, "--db", tmp_path / "all.db", "merge", part)
    assert (done.returncode, done.stderr) == (
        1,
        f"Error: {shown(db.sqlite_url(str(part)))} cannot be read (unable to open database file). Check its "
        "permissions. If its folder cannot be written, copy it to one that can, with the files beside it whose names "
        "end in -wal or -journal, and name the copy.\n",
    )
    assert not (tmp_path / "all.db").exists()
