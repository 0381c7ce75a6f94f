import shlex
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import create_engine, event
from sqlalchemy.exc import DatabaseError as DriverError
from sqlalchemy.exc import IntegrityError
from steps import refusal

from rococap import db
from rococap.errors import DatabaseError, DatabaseUnavailable
from rococap.tables import SCHEMA
from rococap.urls import shown

TABLES = {
    "alembic_version",
    "captions",
    "datasets",
    "edits",
    "failures",
    "image_hashes",
    "images",
    "jobs",
    "leases",
    "parts",
    "ratings",
    "reviews",
    "runs",
    "scores",
    "shards",
    "studies",
    "study_items",
    "study_readers",
    "tallies",
    "unblindings",
    "workers",
}
WAL_BUILD, BROKEN_BUILD = (3, 51, 3), (3, 51, 2)
SHORT_SEC = 0.2
LONG_SEC = 60.0
"""For what happens at once unless the code is broken: a test that waits so long fails."""


def raw(path, **options):
    """A connection that owes nothing to the code under test, and never waits unless told to."""
    connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False, **options)
    return closing(connection)


def set_journal(path, mode):
    with raw(path) as connection:
        assert connection.execute(f"PRAGMA journal_mode = {mode}").fetchone() == (mode,)


def schema_version(path):
    """SQLite's own count of the changes to the schema."""
    with raw(path) as connection:
        return connection.execute("PRAGMA schema_version").fetchone()[0]


def tables(path):
    with raw(path) as connection:
        return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def journal_of(url):
    engine = db.connect(url)
    with engine.connect() as conn:
        mode = pragma(conn, "journal_mode")
    engine.dispose()
    return mode


def pragma(conn, name):
    return conn.exec_driver_sql(f"PRAGMA {name}").scalar_one()


def add(conn, name):
    db.execute(conn, "INSERT INTO datasets (name, revision) VALUES (?, '')", (name,))


def names(conn):
    return [name for (name,) in db.execute(conn, "SELECT name FROM datasets ORDER BY id").fetchall()]


def stored(engine):
    with db.transaction(engine) as conn:
        return names(conn)


@pytest.fixture
def path(tmp_path, url):
    return tmp_path / "queue.db"


@pytest.fixture
def other(url):
    """A second engine on the same file: another process, as far as SQLite's locks go."""
    engine = db.connect(url)
    yield engine
    engine.dispose()


@pytest.fixture
def wal(path):
    """Makes the file of the test a WAL one, whatever this SQLite's build."""
    set_journal(path, "wal")


@pytest.fixture
def in_thread():
    """Runs a function in a thread; calling what comes back waits for its result."""
    started = []

    def start(function, *args):
        results = []

        def run():
            try:
                results.append((function(*args), None))
            except BaseException as error:
                results.append((None, error))

        def finish():
            thread.join(LONG_SEC)
            assert results, "the thread still waits"
            value, error = results[0]
            if error:
                raise error
            return value

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        started.append(thread)
        return finish

    yield start
    for thread in started:
        thread.join(LONG_SEC)


# --- URLs ------------------------------------------------------------------------------------------------------

USE = "Use sqlite:///FILE, or postgresql+psycopg://USER@HOST/NAME with its driver installed."


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "oracel://host/queue",
            "'oracel://host/queue' is not a database URL that this machine can open "
            f"(Can't load plugin: sqlalchemy.dialects:oracel). {USE}",
        ),
        (
            "postgresql+nodriver://me@host/queue",
            "'postgresql+nodriver://me@host/queue' is not a database URL that this machine can open "
            f"(Can't load plugin: sqlalchemy.dialects:postgresql.nodriver). {USE}",
        ),
        (
            "://",
            "'://' is not a database URL that this machine can open "
            f"(Could not parse SQLAlchemy URL from given URL string). {USE}",
        ),
        (
            "postgresql+psycopg://me@host:port/queue",
            "'postgresql+psycopg://me@host:port/queue' is not a database URL that this machine can open "
            f"(invalid literal for int() with base 10: 'port'). {USE}",
        ),
        ("mysql://me@host/queue", "A queue is kept in SQLite or PostgreSQL, not in mysql."),
        ("mssql+pyodbc://host/queue", "A queue is kept in SQLite or PostgreSQL, not in mssql."),
    ],
)
def test_a_url_that_cannot_be_opened_says_what_can(url, message):
    assert refusal(db.connect, url) == message


@pytest.mark.parametrize(
    "url", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///file::memory:?uri=true", ":memory:", ""]
)
def test_a_queue_in_memory_is_refused(url):
    assert refusal(db.connect, url) == (
        "A queue in memory is lost when its process ends. Name a file: sqlite:///rococap.db"
    )


def test_a_postgresql_driver_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    for url in ("postgresql://me@host/queue", "postgresql+psycopg://me@host/queue"):
        assert "Install it: pip install 'rococap[postgres]'" in refusal(db.connect, url)


def test_another_driver_than_ours_is_refused_by_name():
    assert refusal(db.connect, "postgresql+asyncpg://me@host/queue") == (
        "The driver of postgresql+asyncpg is not supported. Use sqlite:// or postgresql+psycopg://"
    )


def test_the_password_of_a_refused_url_is_not_shown():
    assert "secret" not in refusal(db.connect, "postgresql+nodriver://me:secret@host/queue")


def test_a_missing_folder_is_named_with_the_command_that_makes_it(tmp_path):
    folder = tmp_path / "no" / "such"
    assert refusal(db.connect, f"sqlite:///{folder}/queue.db") == (
        f"The folder {folder} of the database does not exist. Create it: mkdir -p {folder}"
    )
    assert not (tmp_path / "no").exists()


def test_the_command_that_makes_a_missing_folder_can_be_pasted(tmp_path):
    folder = tmp_path / "my & her pictures"
    command = refusal(db.connect, f"{folder}/queue.db").partition("Create it: ")[2]
    assert shlex.split(command) == ["mkdir", "-p", str(folder)]


@pytest.mark.parametrize("name", ["queue.db", "my queue.db", "50%.db", "a%20b.db", "what?.db", "#1.db", "größe.db"])
def test_a_path_without_a_scheme_is_that_sqlite_file(tmp_path, name):
    db.connect(str(tmp_path / name)).dispose()
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert tables(tmp_path / name) - {"sqlite_sequence"} == TABLES


ODD_NAMES = ["my queue.db", "50%.db", "a%b.db", "#1.db", "größe.db", "a&b=c;d.db", "[x].db", "it's.db", 'q"q.db', "$H"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_url_names_the_file_that_is_written_in_it(tmp_path, name):
    engine = db.connect(f"sqlite:///{tmp_path}/{name}")
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert [shown(engine.url), engine.url.database] == [shown(db._parse(shown(engine.url))), f"{tmp_path}/{name}"]
    engine.dispose()


@pytest.mark.parametrize("name", [*ODD_NAMES, "what?.db", "?", "a%20b.db", "x%3Fy?z#.db", "~"])
def test_the_url_that_is_shown_of_a_path_opens_the_same_file(tmp_path, name):
    (tmp_path / name).mkdir()
    url = shown(db._parse(f"{tmp_path}/{name}/{name}"))
    db.connect(url).dispose()
    assert [file.name for file in (tmp_path / name).iterdir()] == [name]


@pytest.mark.parametrize("url", ["sqlite:///~/mine.db", "~/mine.db", "sqlite+pysqlite:///~/mine.db"])
def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, url):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    db.connect(url).dispose()
    assert tables(home / "mine.db") >= TABLES
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("name", ["what?/q.db", "what?.db", "what?", "a?b=c.db", "a?timeout=5/q.db", "what?&/q.db"])
def test_a_question_mark_in_a_url_is_refused_with_the_way_to_write_it(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / "a?timeout=5").mkdir(exist_ok=True)
    there = sorted(tmp_path.rglob("*"))
    message = refusal(db.connect, f"sqlite:///{tmp_path}/{name}")
    assert message.startswith(f"What follows the ? in sqlite:///{tmp_path}/{name} is not an SQLite option. ")
    assert sorted(tmp_path.rglob("*")) == there
    db.connect(shlex.split(message.partition("--db ")[2])[0]).dispose()
    assert tables(tmp_path / name) >= TABLES


def test_options_of_sqlite_are_taken_from_a_url(tmp_path):
    db.connect(f"sqlite:///{tmp_path}/queue.db?cached_statements=10&timeout=1").dispose()
    assert [file.name for file in tmp_path.iterdir()] == ["queue.db"]


def test_a_percent_sign_and_two_digits_are_one_character_of_a_url(tmp_path):
    db.connect(f"sqlite:///{tmp_path}/a%20b%3F.db").dispose()
    assert [file.name for file in tmp_path.iterdir()] == ["a b?.db"]


def test_a_folder_or_file_that_is_there_by_the_letters_of_a_url_is_refused_with_the_way_to_write_it(tmp_path):
    (tmp_path / "a%20b").mkdir()
    (tmp_path / "q%41.db").touch()
    for name in ("a%20b/q.db", "q%41.db"):
        message = refusal(db.connect, f"sqlite:///{tmp_path}/{name}")
        assert "write the % as %25: --db " in message
        db.connect(shlex.split(message.partition("--db ")[2])[0]).dispose()
        assert tables(tmp_path / name) >= TABLES
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a%20b", "q%41.db"]


@pytest.mark.parametrize("url", ["sqlite:x.db", "sqlite:/x.db", "sqlite://x.db", "sqlite+pysqlite://x.db"])
def test_a_url_without_its_three_slashes_is_refused_with_them(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    assert refusal(db.connect, url) == (f"{url} names no file: its path goes after three slashes: --db sqlite:///x.db")
    assert list(tmp_path.iterdir()) == []


def test_a_relative_path_is_beside_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    db.connect("sqlite:///queue.db").dispose()
    assert tables(tmp_path / "queue.db") >= TABLES


def test_the_default_url_comes_from_the_environment(monkeypatch):
    monkeypatch.delenv("ROCOCAP_DB", raising=False)
    assert db.default_url() == "sqlite:///rococap.db"
    monkeypatch.setenv("ROCOCAP_DB", "sqlite:///elsewhere.db")
    assert db.default_url() == "sqlite:///elsewhere.db"


# --- Files that are not ours -----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"hello", b"image_id,caption\n" * 1000])
def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "captions.csv"
    path.write_bytes(content)
    assert refusal(db.connect, f"sqlite:///{path}") == (
        f"sqlite:///{path} is not an SQLite database, or is damaged (file is not a database). Name another with --db."
    )
    assert path.read_bytes() == content


def test_a_database_with_other_tables_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "photos.db"
    with raw(path) as connection:
        for name in ("zebras", "albums", "tags", "people", "places", "jobs"):
            connection.execute(f"CREATE TABLE {name} (id INTEGER)")
    content = path.read_bytes()
    assert refusal(db.connect, f"sqlite:///{path}") == (
        f"{path} contains other tables (albums, jobs, people, places, tags) and is not a rococap database. "
        "Name another with --db."
    )
    assert path.read_bytes() == content


def test_another_projects_alembic_database_is_refused(tmp_path):
    path = tmp_path / "photos.db"
    with raw(path) as connection:
        connection.executescript("CREATE TABLE alembic_version (version_num); CREATE TABLE jobs (id INTEGER)")
    assert refusal(db.connect, f"sqlite:///{path}") == (
        f"{path} contains other tables (alembic_version, jobs) and is not a rococap database. Name another with --db."
    )


def test_a_folder_is_no_database(tmp_path):
    (tmp_path / "queue.db").mkdir()
    assert refusal(db.connect, f"sqlite:///{tmp_path}/queue.db") == (
        f"sqlite:///{tmp_path}/queue.db cannot be written (unable to open database file). "
        "Check its permissions, or name another with --db."
    )


def test_an_empty_file_is_given_its_tables(tmp_path):
    path = tmp_path / "queue.db"
    path.touch()
    db.connect(f"sqlite:///{path}").dispose()
    assert tables(path) - {"sqlite_sequence"} == TABLES


def test_a_database_opened_as_it_is_gets_no_tables(tmp_path):
    engine = db.connect(f"sqlite:///{tmp_path}/queue.db", create=False)
    with db.transaction(engine) as conn:
        assert db.execute(conn, "SELECT count(*) FROM sqlite_master").scalar_one() == 0
    engine.dispose()


# --- Schema ----------------------------------------------------------------------------------------------------


def test_an_older_schema_is_refused_with_the_command_that_upgrades_it(url, monkeypatch):
    monkeypatch.setattr(db, "SCHEMA", "9999")
    assert refusal(db.connect, url) == (
        f"{url} has schema {SCHEMA}; this version of rococap needs 9999. Upgrade it (a backup copy is made): "
        f"rococap --db {url} migrate"
    )


def test_the_command_that_upgrades_can_be_pasted(tmp_path, path, monkeypatch):
    moved = tmp_path / "it's my queue & hers.db"
    path.rename(moved)
    monkeypatch.setattr(db, "SCHEMA", "9999")
    command = shlex.split(refusal(db.connect, str(moved)).partition("(a backup copy is made): ")[2])
    assert (command[:2], command[3:]) == (["rococap", "--db"], ["migrate"])
    engine = db.connect(command[2], create=False)
    assert engine.url.database == str(moved)
    engine.dispose()


def test_a_newer_schema_is_refused(url, path):
    with raw(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0099'")
    assert refusal(db.connect, url) == (
        f"{url} has schema 0099, from a newer version of rococap than this one ({SCHEMA}). "
        "Upgrade rococap, or name another database with --db."
    )


def test_an_older_schema_may_be_opened_as_it_is(url, monkeypatch):
    monkeypatch.setattr(db, "SCHEMA", "9999")
    db.connect(url, create=False).dispose()


START = """
import sqlite3, sys
from rococap import db

sqlite3.sqlite_version_info = (3, 51, 3) if sys.argv[2] == "wal" else (3, 51, 2)
print("ready", flush=True)
sys.stdin.readline()
db.connect(sys.argv[1]).dispose()
"""


def made_once(path):
    assert tables(path) - {"sqlite_sequence"} == TABLES
    with raw(path) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(SCHEMA,)]
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    return schema_version(path)


@pytest.mark.slow
def test_processes_that_first_use_a_database_at_once_make_its_schema_once(tmp_path, monkeypatch):
    versions = {"delete": BROKEN_BUILD, "wal": WAL_BUILD}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", START, tmp_path / f"{journal}.db", journal],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for journal in versions
        for _ in range(4)
    ]
    assert [process.stdout.readline() for process in started] == ["ready\n"] * 8
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in started:
        process.communicate(timeout=60)
    assert [process.returncode for process in started] == [0] * 8
    for journal, version in versions.items():
        monkeypatch.setattr(sqlite3, "sqlite_version_info", version)
        assert journal_of(f"sqlite:///{tmp_path}/{journal}-alone.db") == journal
        assert made_once(tmp_path / f"{journal}.db") == schema_version(tmp_path / f"{journal}-alone.db")


def test_threads_that_first_use_a_database_at_once_make_its_schema_once(tmp_path, path, in_thread):
    set_journal(path, "delete")
    together = threading.Barrier(8, timeout=LONG_SEC)

    def first_use():
        together.wait()
        db.connect(f"sqlite:///{tmp_path}/new.db").dispose()

    for finish in [in_thread(first_use) for _ in range(8)]:
        finish()
    assert made_once(tmp_path / "new.db") == schema_version(path)


# --- Places and journals ---------------------------------------------------------------------------------------

MOUNTS = r"""
proc /proc proc rw,nosuid,nodev,noexec,relatime 0 0
/dev/sda1 / ext4 rw,relatime 0 0
server:/export /nowhere/share nfs4 rw,relatime,vers=4.2 0 0
/dev/sdb1 /nowhere/share/local xfs rw,relatime 0 0
//nas/pictures /nowhere/my\040pictures cifs rw,relatime 0 0
tmpfs /nowhere/tab\011and\134backslash tmpfs rw,relatime 0 0
/dev/sdc1 /nowhere/twice ext4 rw,relatime 0 0
tank /nowhere/twice lustre rw,relatime 0 0
""".lstrip()


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/", "ext4"),
        ("/nowhere", "ext4"),
        ("/nowhere/share", "nfs4"),
        ("/nowhere/share/deep/down", "nfs4"),
        ("/nowhere/share/local", "xfs"),
        ("/nowhere/share/local/deep", "xfs"),
        ("/nowhere/share/locality", "nfs4"),
        ("/nowhere/shared", "ext4"),
        ("/nowhere/share/../else", "ext4"),
        ("/nowhere/my pictures/2023", "cifs"),
        ("/nowhere/tab\tand\\backslash", "tmpfs"),
        ("/nowhere/twice", "lustre"),
    ],
)
def test_the_longest_matching_mount_tells_the_file_system(folder, kind):
    assert db.file_system(Path(folder), MOUNTS) == kind


def test_the_mounts_may_come_in_any_order():
    backwards = "\n".join(reversed(MOUNTS.splitlines()))
    assert db.file_system(Path("/nowhere/share/local/deep"), backwards) == "xfs"


def test_a_symlink_is_on_the_file_system_that_it_points_to(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    mounts = f"/dev/sda1 / ext4 rw 0 0\nserver:/ {tmp_path.resolve()}/target nfs rw 0 0\n"
    assert db.file_system(tmp_path / "link", mounts) == "nfs"


def test_without_mounts_the_file_system_is_unknown():
    assert db.file_system(Path("/nowhere"), "") is None
    assert db.file_system(Path("/nowhere"), "server:/ /elsewhere nfs rw 0 0") is None


@pytest.mark.parametrize("kind", sorted(db.NETWORK_FILE_SYSTEMS))
def test_a_network_file_system_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(db, "mounts", lambda: f"/dev/sda1 / ext4 rw 0 0\nserver:/ {tmp_path.resolve()} {kind} rw 0 0")
    path = tmp_path / "queue.db"
    assert refusal(db.connect, f"sqlite:///{path}") == (
        f"{path} is on a network file system ({kind}), where SQLite's locks are unreliable and captions could be lost. "
        "Put the database on a local disk, or use PostgreSQL: --db postgresql+psycopg://USER@HOST/NAME "
        "(or, at your own risk and with one process at a time: rococap --force …)"
    )
    assert not path.exists()
    db.connect(f"sqlite:///{path}", force=True).dispose()
    assert path.exists()


def test_nfs_smb_and_cluster_file_systems_are_known():
    assert {"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "lustre", "ceph", "gpfs"} <= db.NETWORK_FILE_SYSTEMS
    assert not {"ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "apfs"} & db.NETWORK_FILE_SYSTEMS


def test_a_database_that_is_a_link_to_a_network_file_system_is_refused(tmp_path, monkeypatch):
    (tmp_path / "share").mkdir()
    (tmp_path / "queue.db").symlink_to("share/queue.db")
    share = (tmp_path / "share").resolve()
    monkeypatch.setattr(db, "mounts", lambda: f"/dev/sda1 / ext4 rw 0 0\nserver:/ {share} nfs4 rw 0 0")
    assert refusal(db.connect, f"sqlite:///{tmp_path}/queue.db").startswith(
        f"{tmp_path}/queue.db is on a network file system (nfs4)"
    )


def test_a_mount_point_that_is_not_utf8_stops_nobody(tmp_path, monkeypatch):
    mounts = tmp_path / "mounts"
    mounts.write_bytes(b"/dev/sda1 / ext4 rw 0 0\n/dev/sdb1 /media/gr\xf6\xdfe vfat rw 0 0\n")
    monkeypatch.setattr(db, "Path", lambda name: mounts if name == "/proc/mounts" else Path(name))
    assert db.file_system(Path("/nowhere"), db.mounts()) == "ext4"


@pytest.mark.parametrize(
    ("version", "safe"),
    [
        ((3, 6, 23), False),
        ((3, 40, 1), False),
        ((3, 44, 5), False),
        ((3, 44, 6), True),
        ((3, 44, 9), True),
        ((3, 45, 0), False),
        ((3, 50, 6), False),
        ((3, 50, 7), True),
        ((3, 51, 0), False),
        ((3, 51, 2), False),
        ((3, 51, 3), True),
        ((3, 52, 0), True),
        ((4, 0, 0), True),
    ],
)
def test_wal_is_safe_from_the_fix_on(version, safe):
    assert db.wal_is_safe(version) is safe


def test_a_new_file_gets_the_journal_that_this_sqlite_deserves(tmp_path):
    expected = "wal" if db.wal_is_safe(sqlite3.sqlite_version_info) else "delete"
    assert journal_of(f"sqlite:///{tmp_path}/queue.db") == expected


@pytest.mark.parametrize(("version", "journal"), [(WAL_BUILD, "wal"), (BROKEN_BUILD, "delete")])
def test_a_new_files_journal_follows_the_version(tmp_path, monkeypatch, version, journal):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", version)
    assert journal_of(f"sqlite:///{tmp_path}/queue.db") == journal


@pytest.mark.usefixtures("wal")
def test_a_wal_file_stays_one_under_a_build_with_the_bug(url, monkeypatch):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", BROKEN_BUILD)
    assert journal_of(url) == "wal"


def test_an_existing_file_is_not_switched_to_wal(url, path, monkeypatch):
    set_journal(path, "delete")
    monkeypatch.setattr(sqlite3, "sqlite_version_info", WAL_BUILD)
    assert journal_of(url) == "delete"


@pytest.mark.durable
@pytest.mark.parametrize("version", [WAL_BUILD, BROKEN_BUILD])
def test_every_connection_is_durable_and_keeps_foreign_keys(tmp_path, monkeypatch, version):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", version)
    engine = db.connect(f"sqlite:///{tmp_path}/queue.db")
    with engine.connect() as one, engine.connect() as two:
        for conn in (one, two):
            assert [pragma(conn, name) for name in ("synchronous", "foreign_keys", "busy_timeout")] == [2, 1, 0]
    engine.dispose()


def test_a_row_without_its_parent_is_refused(engine):
    with (
        pytest.raises(IntegrityError, match=r"\(sqlite3\.IntegrityError\) FOREIGN KEY constraint failed"),
        db.transaction(engine, write=True) as conn,
    ):
        db.execute(conn, "INSERT INTO captions (job_id, text, generated_at) VALUES (7, 'A caption.', 0)")
    with db.transaction(engine) as conn:
        assert db.execute(conn, "SELECT count(*) FROM captions").scalar_one() == 0


# --- Transactions ----------------------------------------------------------------------------------------------


def test_a_transaction_is_committed_when_its_block_ends(engine, other):
    with db.transaction(engine, write=True) as conn:
        add(conn, "one")
        assert stored(other) == []
    assert stored(other) == ["one"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_raise_inside_rolls_back_everything_and_frees_the_lock(engine, other, error):
    def interrupted():
        with db.transaction(engine, write=True) as conn:
            add(conn, "one")
            add(conn, "two")
            raise error

    with pytest.raises(error):
        interrupted()
    with db.transaction(other, write=True) as conn:
        assert names(conn) == []
        add(conn, "three")
    assert stored(engine) == ["three"]


def test_a_statement_that_rolled_back_by_itself_raises_its_own_error(engine):
    with (
        pytest.raises(IntegrityError, match=r"UNIQUE constraint failed: datasets\.name, datasets\.revision"),
        db.transaction(engine, write=True) as conn,
    ):
        db.execute(conn, "INSERT OR ROLLBACK INTO datasets (name, revision) VALUES (?, '')", [("one",), ("one",)])
    assert stored(engine) == []


def test_a_writer_holds_the_lock_from_its_start(engine, path):
    with raw(path) as outsider:
        with db.transaction(engine, write=True), pytest.raises(sqlite3.OperationalError, match="database is locked"):
            outsider.execute("BEGIN IMMEDIATE")
        outsider.execute("BEGIN IMMEDIATE")


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_a_second_writer_waits_and_then_sees_what_the_first_wrote(engine, other, path, in_thread, journal):
    set_journal(path, journal)
    begun = threading.Event()

    def second():
        with db.transaction(other, write=True) as conn:
            begun.set()
            seen = names(conn)
            add(conn, "two")
            return seen

    with db.transaction(engine, write=True) as conn:
        finish = in_thread(second)
        add(conn, "one")
        assert not begun.wait(SHORT_SEC)
    assert finish() == ["one"]
    assert stored(engine) == ["one", "two"]


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_no_increment_is_lost_among_writers(url, path, in_thread, journal):
    """Reads, then writes what it read: with deferred transactions two of them read the same number."""
    set_journal(path, journal)
    with raw(path) as connection:
        connection.execute("INSERT INTO datasets (name, revision) VALUES ('0', '')")

    def count(times):
        engine = db.connect(url)
        for _ in range(times):
            with db.transaction(engine, write=True) as conn:
                value = int(names(conn)[0])
                db.execute(conn, "UPDATE datasets SET name = ?", (str(value + 1),))
        engine.dispose()

    for finish in [in_thread(count, 10) for _ in range(4)]:
        finish()
    with raw(path) as connection:
        assert connection.execute("SELECT name FROM datasets").fetchall() == [("40",)]


@pytest.mark.usefixtures("wal")
def test_a_reader_sees_the_database_as_it_was_at_its_start(engine, other):
    with db.transaction(engine) as reader:
        with db.transaction(other, write=True) as writer:
            add(writer, "one")
        assert names(reader) == []
        with db.transaction(other, write=True) as writer:
            add(writer, "two")
        assert names(reader) == []
    assert stored(engine) == ["one", "two"]


def test_without_wal_a_writer_begins_beside_a_reader_and_commits_after_it(engine, other, path, in_thread):
    set_journal(path, "delete")
    wrote, committed = threading.Event(), threading.Event()

    def write():
        with db.transaction(other, write=True) as conn:
            add(conn, "one")
            wrote.set()
        committed.set()

    with db.transaction(engine) as reader:
        finish = in_thread(write)
        assert wrote.wait(LONG_SEC)
        assert not committed.wait(SHORT_SEC)
        assert names(reader) == []
    finish()
    assert stored(engine) == ["one"]


def test_a_reader_cannot_write(engine):
    with pytest.raises(DatabaseError, match="attempt to write a readonly database"), db.transaction(engine) as conn:
        add(conn, "one")
    with db.transaction(engine, write=True) as conn:
        assert names(conn) == []
        add(conn, "two")
    assert stored(engine) == ["two"]


def locked_message(path, seconds):
    return (
        f"{path} has been locked by another process for {seconds} s. "
        "Close whatever holds it (a database browser, a backup), then run the command again."
    )


@pytest.mark.parametrize("write", [True, False])
def test_waiting_for_a_lock_ends_with_what_to_do(engine, path, monkeypatch, write):
    monkeypatch.setattr(db, "PATIENCE_SEC", 0.6)
    ran = False
    with raw(path) as outsider:
        with engine.connect():
            pass  # a connection that is open already
        outsider.execute("BEGIN EXCLUSIVE")
        start = time.monotonic()
        with pytest.raises(DatabaseError) as caught, db.transaction(engine, write=write):
            ran = True
        assert str(caught.value) == locked_message(path, 1)
        assert 0.6 <= time.monotonic() - start < LONG_SEC
        assert not ran
        outsider.execute("ROLLBACK")
    with db.transaction(engine, write=True) as conn:
        add(conn, "one")
    assert stored(engine) == ["one"]


def test_a_commit_that_waited_in_vain_leaves_nothing(engine, path, monkeypatch):
    monkeypatch.setattr(db, "PATIENCE_SEC", SHORT_SEC)
    set_journal(path, "delete")
    with raw(path) as outsider:
        outsider.execute("BEGIN")
        outsider.execute("SELECT count(*) FROM datasets").fetchall()
        with pytest.raises(DatabaseError) as caught, db.transaction(engine, write=True) as conn:
            add(conn, "one")
        assert str(caught.value) == locked_message(path, 0)
        outsider.execute("ROLLBACK")
    assert stored(engine) == []
    with db.transaction(engine, write=True) as conn:
        add(conn, "two")
    assert stored(engine) == ["two"]


@pytest.mark.parametrize("write", [True, False])
def test_a_new_connection_waits_for_a_database_that_is_locked(url, path, in_thread, write):
    """Its pragmas read the file, which a commit under way holds exclusively."""

    def use():
        engine = db.connect(url, create=False)
        with db.transaction(engine, write=write) as conn:
            seen = names(conn)
        engine.dispose()
        return seen

    with raw(path) as outsider:
        outsider.execute("BEGIN EXCLUSIVE")
        outsider.execute("INSERT INTO datasets (name, revision) VALUES ('one', '')")
        finish = in_thread(use)
        time.sleep(2 * SHORT_SEC)
        outsider.execute("COMMIT")
    assert finish() == ["one"]


def test_a_busy_database_that_then_fails_to_roll_back_is_away_for_now(engine):
    def fail(cursor, statement, parameters, context):
        if statement.startswith("SELECT 1 FROM sqlite_master") or statement == "ROLLBACK":
            error = sqlite3.OperationalError("locked" if statement != "ROLLBACK" else "disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_BUSY if statement != "ROLLBACK" else sqlite3.SQLITE_IOERR
            raise error

    event.listen(engine, "do_execute", fail)
    with pytest.raises(DatabaseUnavailable), db.transaction(engine):
        pass
    event.remove(engine, "do_execute", fail)
    with db.transaction(engine) as conn:
        assert db.execute(conn, "SELECT 1").scalar_one() == 1


def test_opening_a_locked_database_ends_with_what_to_do(url, path, monkeypatch):
    monkeypatch.setattr(db, "PATIENCE_SEC", SHORT_SEC)
    with raw(path) as outsider:
        outsider.execute("BEGIN EXCLUSIVE")
        assert refusal(db.connect, url) == locked_message(path, 0)


def test_a_file_without_tables_in_the_place_of_ours_is_another_database(engine, path):
    db.stay(engine, "SELECT 1 FROM workers WHERE id = ?", (1,))
    engine.dispose()
    path.unlink()
    path.touch()
    with (
        pytest.raises(DatabaseError, match="is not the database that this process started with"),
        db.transaction(engine),
    ):
        pass


def test_the_database_tells_the_time_in_milliseconds(engine):
    with db.transaction(engine) as conn:
        before = time.time() * 1000
        told = db.now(conn)
        after = time.time() * 1000
    assert type(told) is int
    assert before - 2000 < told < after + 2000


def test_the_time_has_fractions_of_a_second(engine):
    with db.transaction(engine) as conn:
        fractions = set()
        for _ in range(20):
            fractions.add(db.now(conn) % 1000)
            time.sleep(0.002)
    assert len(fractions) > 5


def test_execute_runs_a_list_of_rows_each(engine):
    with db.transaction(engine, write=True) as conn:
        sql = "INSERT INTO datasets (name, revision) VALUES (?, ?)"
        assert db.execute(conn, sql, [("one", "a"), ("two", "b"), ("three", "c")]).rowcount == 3
        assert db.execute(conn, sql, ("four", "d")).rowcount == 1
        assert [tuple(row) for row in db.execute(conn, "SELECT name, revision FROM datasets ORDER BY id")] == [
            ("one", "a"),
            ("two", "b"),
            ("three", "c"),
            ("four", "d"),
        ]


# --- Explanations ----------------------------------------------------------------------------------------------


def explained(engine, statement, before="SELECT 1"):
    with engine.connect() as conn:
        conn.exec_driver_sql("PRAGMA query_only = OFF")
        conn.exec_driver_sql(before)
        with pytest.raises(DriverError) as caught:
            conn.exec_driver_sql(statement)
    engine.dispose()
    return db.explain(caught.value, engine.url)


def test_a_full_disk_is_explained(engine, url):
    fill = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 9000) INSERT INTO datasets SELECT i, "
    assert explained(engine, fill + "hex(zeroblob(100)) || i, '', NULL FROM n", before="PRAGMA max_page_count = 1") == (
        f"{url}: the disk is full. Free some space, then run the command again."
    )


def test_a_database_that_may_not_be_written_is_explained(engine, url):
    assert explained(engine, "DELETE FROM datasets", before="PRAGMA query_only = ON") == (
        f"{url} cannot be written (attempt to write a readonly database). "
        "Check its permissions, or name another with --db."
    )


def test_a_damaged_database_is_explained(path, url):
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)
    assert refusal(db.connect, url) == (
        f"{url} is not an SQLite database, or is damaged (database disk image is malformed). Name another with --db."
    )


def test_anything_else_is_told_in_the_drivers_words(engine, url):
    assert explained(engine, "SELECT * FROM jbos") == f"{url} cannot be used: no such table: jbos"


def test_an_explanation_hides_the_password():
    engine = create_engine("sqlite://")
    with pytest.raises(DriverError) as caught, engine.connect() as conn:
        conn.exec_driver_sql("SELECT * FROM jbos")
    engine.dispose()
    where = db.make_url("postgresql://me:secret@host/queue")
    assert db.explain(caught.value, where) == "postgresql://me:***@host/queue cannot be used: no such table: jbos"
    assert db.explain(caught.value) == "The database cannot be used: no such table: jbos"
