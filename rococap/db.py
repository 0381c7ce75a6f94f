"""Connections, transactions that wait for locks, and migrations of the schema, on SQLite and PostgreSQL.

Transactions are begun and committed explicitly on an autocommit connection: SQLite's driver would otherwise begin
deferred ones, which ignore the busy timeout when they are upgraded to writers. Both dialects run the same statements.
Knows the tables, but not what a job or a lease means.
"""

import json
import math
import os
import random
import re
import shlex
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from sqlalchemy import Connection, create_engine, event, inspect
from sqlalchemy import Engine as Database
from sqlalchemy.engine import URL, CursorResult, ExceptionContext, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import DatabaseError as DriverError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import NullPool

from rococap import open_files
from rococap.errors import DatabaseError, DatabaseUnavailable
from rococap.tables import SCHEMA
from rococap.urls import shown, sqlite_url

DEFAULT_URL = "sqlite:///rococap.db"
PATIENCE_SEC = 60.0
"""How long a transaction waits for a lock before it fails."""
MERGE_PATIENCE_SEC = 3600.0
"""How long a merge or an enqueue waits for a transaction of a merge, which may add the pictures of a whole split."""
CONNECTIONS = 2
"""How many connections to PostgreSQL a process has at most: hundreds of workers share one server."""
MORE_CONNECTIONS = 13
"""How many more a process has that answers many people at once, such as `serve`."""
CONNECTION_PATIENCE_SEC = 10.0
"""How long a thread waits for a connection that other threads of its process use."""
YIELD_SEC = 0.0005
"""Pause after a commit, so that waiting writers get the lock: without it the same writer would win nearly every time.
"""

POSTGRESQL_SETTINGS = {
    # libpq's options: a server that vanished silently must not block a thread for the kernel's fifteen minutes.
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
"""Defaults; the URL may override them, as in `?connect_timeout=3`."""

_OF_SILENCE = ("keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout")
"""Those that the server has too, all with `tcp_` before the name, unless it is older than PostgreSQL 12."""

IDLE_SEC = 60
"""A process that freezes inside a transaction must not hold the rows of others for longer than this."""
HURRIED_IDLE_SEC = 10
"""The same for processes that compute nothing inside a transaction: see `hurry`."""
SILENCE_SEC = 30.0
"""How long these wait for an answer, and how long their transactions last, beyond the time that the server may wait for
a lock: as long as a machine may be silent. Everybody waits so long for the answers that a new connection needs.
"""

_FIXED_SETTINGS = {
    # Captions are Unicode, and the driver would return bytes if the server's locale chose the encoding.
    "client_encoding": "UTF8",
    # PgBouncer may give each transaction another server connection, which lacks the statements prepared on an earlier.
    "prepare_threshold": None,
}

_PREPARE_AFTER = 5
"""Executions after which a statement is prepared on a server without a pooler, as is the driver's default. Preparing
saves a third of the time of claiming and completing.
"""

_UNAVAILABLE_CODES = frozenset(
    [
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_READONLY,  # also reported for a file that was moved while open
    ]
)

_UNAVAILABLE_SQLSTATES = frozenset(["25006", "25P03", "25P04", "40P01"])
"""A server that became read-only, a transaction that idled or took too long, a deadlock: the driver's exception classes
do not tell these from mistakes in SQL.
"""

_NO_SUCH_TABLE = "42P01"

_WAITED_TOO_LONG = frozenset(["55P03", "57014"])
"""Our lock_timeout, and a statement_timeout that somebody has set for the role or the database."""

_HAS_TRANSACTION_TIMEOUT = (17,)

_FIRST_USE_LOCK = 0x726F636F
"""Key of the PostgreSQL advisory lock that serialises schema changes."""

_MERGE_LOCK = 0x726F636D
"""Key of the one by which the transactions of merges take turns."""

NETWORK_FILE_SYSTEMS = frozenset(
    [
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "fuse.glusterfs",
        "fuse.sshfs",
        "gfs2",
        "glusterfs",
        "gpfs",
        "lustre",
        "ncpfs",
        "nfs",
        "nfs4",
        "ocfs2",
        "smb3",
        "smbfs",
    ]
)

Row = Sequence[Any]
T = TypeVar("T")


def default_url() -> str:
    """ROCOCAP_DB from the environment, or a file in the working directory."""
    return os.environ.get("ROCOCAP_DB", DEFAULT_URL)


# --- Opening ---------------------------------------------------------------------------------------------------


def connect(
    url: str, *, create: bool = True, must_exist: bool = False, force: bool = False, pooled: bool = True
) -> Database:
    """Opens the database at `url` and checks its schema; an empty or missing database gets its tables.

    With `must_exist`, a missing SQLite file is an error instead of being created. With `create=False` the database is
    opened as it is, whatever its schema. With `force` it may be on a file system where SQLite's locks do not work.
    There are at most CONNECTIONS to PostgreSQL, for which threads take turns. Unless `pooled`, there may be
    MORE_CONNECTIONS, and an SQLite file is opened anew for each transaction, which therefore notices a file that was
    removed or replaced.
    Raises DatabaseError for an invalid URL, a network file system without `force`, a missing file with `must_exist`, a
    database that is not rococap's, and one with another schema version.
    """
    database = _create(_parse(url), force, pooled)
    if must_exist:
        _refuse_missing(
            database.url,
            "Name yours with --db, or create it by registering pictures: rococap enqueue --split train",
        )
    if create:
        _check(_check_schema, database, url)
    return database


def connect_source(url: str) -> Database:
    """Opens a queue that is only read: tables are neither made in it nor upgraded, and whatever cannot be read while
    others are written is told with its URL.

    Raises DatabaseError as `connect` does, and for a database without tables.
    """
    database = _create(_parse(url), force=False, pooled=True)
    _refuse_missing(database.url, "Check its path.")
    _explain_reading(database)
    if database.dialect.name == "sqlite":
        file = Path(database.url.database or "")
        if file.is_file() and not file.stat().st_size:  # opening it could write to it
            raise _holds_no_queue(database.url)
        if _is_immutable(file):
            event.listen(database, "do_connect", _open_immutable)
    _check(_check_holds_queue, database, url)
    return database


def _refuse_missing(url: URL, step: str) -> None:
    if url.get_backend_name() == "sqlite" and not os.path.exists(url.database or ""):
        raise DatabaseError(f"There is no database {url.database}. {step}")


def _check(check: Callable[[Database], None], database: Database, url: str) -> None:
    """Opens a connection for the first time, to check what is there."""
    try:
        check(database)
    except BaseException as error:
        database.dispose()
        if isinstance(error, DriverError):
            raise DatabaseError(explain(error, database.url)) from error
        if isinstance(error, TypeError | ValueError):  # the URL has options that the driver does not accept
            raise _cannot_open(url, error) from error
        raise
    if database.dialect.name == "sqlite":
        event.listen(database, "do_connect", refuse_absent)


def _explain_reading(database: Database) -> None:
    """Makes errors of this database's driver DatabaseErrors that name it: while it is read, a transaction of another
    database is under way, which would take them for its own.
    """

    def explained(context: ExceptionContext) -> DatabaseError | None:
        error = context.sqlalchemy_exception
        if not isinstance(error, DBAPIError) or context.is_pre_ping or _is_busy(error):
            return None  # whoever pings or waits tries again
        kind = DatabaseUnavailable if _is_unavailable(error) else DatabaseError
        return kind(_explain_source(error, database.url))

    event.listen(database, "handle_error", explained)


def _is_immutable(file: Path) -> bool:
    """Whether SQLite has to be told that nobody writes to this file. Even to read one in WAL mode, it makes files
    beside it, which it cannot do in a folder such as an input of Kaggle. Without a -wal file, all is in the file.
    """
    wal = Path(f"{file.resolve()}-wal")
    try:
        with file.open("rb") as opened:
            is_wal = opened.read(20)[18:] == b"\2\2"  # the versions of the file format for writing and reading
        return is_wal and not os.access(wal.parent, os.W_OK) and not (wal.exists() and wal.stat().st_size)
    except OSError:
        return False  # SQLite says why it cannot be read


def _open_immutable(_dialect: object, _record: object, args: Sequence[Any], options: dict[str, Any]) -> Any:
    return sqlite3.connect(f"{Path(args[0]).absolute().as_uri()}?mode=ro&immutable=1", uri=True, **options)


def _parse(url: str) -> URL:
    try:
        parsed = sqlite_url(url) or make_url(_with_hosts_as_options(url))
        if parsed.drivername in ("postgres", "postgresql"):  # libpq's spelling
            parsed = parsed.set(drivername="postgresql+psycopg")
        parsed.get_dialect()
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise _cannot_open(url, error) from error
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise DatabaseError(f"A queue is kept in SQLite or PostgreSQL, not in {parsed.get_backend_name()}.")
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite", "postgresql+psycopg"):
        raise DatabaseError(
            f"The driver of {parsed.drivername} is not supported. Use sqlite:// or postgresql+psycopg://"
        )
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:", "file::memory:"):
        raise DatabaseError("A queue in memory is lost when its process ends. Name a file: sqlite:///rococap.db")
    return parsed


def _with_hosts_as_options(url: str) -> str:
    """Rewrites `//a:1,b:2/x` as `///x?host=a,b&port=1,2`, the only form in which SQLAlchemy accepts several hosts or a
    socket.
    """
    parts = re.fullmatch(r"(postgres[a-z+]*://(?:[^/?]*@)?)([^/?@]*)([^?]*)\??(.*)", url, re.DOTALL)
    if parts is None or not re.search(",|%2F", parts[2], re.IGNORECASE):
        return url
    hosts, ports = [], []
    for address in parts[2].split(","):
        match = re.fullmatch(r"(?:\[(.*)\]|([^:]*))(?::(\d*))?", address)
        if match is None:
            return url
        hosts.append(match[1] or match[2])
        ports.append(match[3] or "")
    options = [f"host={','.join(hosts)}", f"port={','.join(ports)}" if any(ports) else "", parts[4]]
    return f"{parts[1]}{parts[3]}?{'&'.join(filter(None, options))}"


def _cannot_open(url: str, error: Exception) -> DatabaseError:
    without_password = re.sub(r"(://[^:@/]*):[^@]*@", r"\1:***@", url)
    return DatabaseError(
        f"{without_password!r} is not a database URL that this machine can open ({error}). "
        "Use sqlite:///FILE, or postgresql+psycopg://USER@HOST/NAME with its driver installed."
    )


def _create(url: URL, force: bool, pooled: bool) -> Database:
    if url.get_backend_name() == "sqlite":
        _check_folder(Path(url.database or ""), force)
        database = create_engine(
            url, isolation_level="AUTOCOMMIT", connect_args={"timeout": 0}, poolclass=None if pooled else NullPool
        )
        event.listen(database, "connect", _set_pragmas)
        return database
    settings = {name: value for name, value in POSTGRESQL_SETTINGS.items() if name not in url.query}
    try:
        database = create_engine(
            url,
            isolation_level="AUTOCOMMIT",
            pool_pre_ping=True,
            pool_size=CONNECTIONS,
            max_overflow=0 if pooled else MORE_CONNECTIONS,
            pool_timeout=CONNECTION_PATIENCE_SEC,
            connect_args=settings | _FIXED_SETTINGS,
        )
    except ModuleNotFoundError as error:
        raise DatabaseError(
            f"PostgreSQL's driver is not installed ({error}). Install it: pip install 'rococap[postgres]'"
        ) from error
    event.listen(database, "do_connect", _open_expecting)
    _check_new_connections(database, settings | url.query)
    return database


def _open_expecting(_dialect: object, _record: object, args: Sequence[Any], options: dict[str, Any]) -> Any:
    """A connection that expects answers within SILENCE_SEC while it is being set up."""
    from rococap.answers import ExpectingConnection

    connection = ExpectingConnection.connect(*args, **options)
    connection.silence_sec = SILENCE_SEC
    return connection


def _check_new_connections(database: Database, settings: Mapping[str, Any]) -> None:
    """Makes a new connection raise DatabaseError if the database's encoding cannot hold every caption. If there is no
    pooler in between, it prepares statements, and the server gives up a client that vanished silently as soon as the
    client gives up the server, unless somebody has set these limits.
    """
    limits = json.dumps({f"tcp_{name.removeprefix('tcp_')}": settings[name] for name in _OF_SILENCE})
    set_limits = (
        "SELECT set_config(name, %s::json ->> name, false) FROM pg_settings "
        "WHERE name LIKE 'tcp%%' AND source = 'default' AND %s::json ->> name IS NOT NULL"
    )

    def check(connection: Any, _record: object) -> None:
        sql = "SELECT current_setting('server_encoding'), pg_backend_pid()"
        encoding, pid = connection.execute(sql).fetchone()
        if encoding != "UTF8":
            connection.close()
            raise _wrong_encoding(database.url, encoding)
        # A pooler reports process ids of its own: equal ids mean that the server itself is at the other end.
        if pid == connection.info.backend_pid:
            connection.prepare_threshold = _PREPARE_AFTER
            connection.execute(set_limits, (limits, limits))
        if not _is_hurried(database):
            connection.silence_sec = math.inf

    event.listen(database, "connect", check)


def _wrong_encoding(url: URL, encoding: str) -> DatabaseError:
    locale = "" if encoding == "SQL_ASCII" else " --locale=C"  # the server's locale may allow no other encoding
    return DatabaseError(
        f"{url.render_as_string()} has the encoding {encoding}, which cannot hold captions. Create one in UTF8 and "
        f"name it with --db: createdb --encoding=UTF8 --template=template0{locale} NAME"
    )


def refuse_absent(_dialect: object, _record: object, args: Sequence[Any], _options: object) -> None:
    """Keeps a new connection from recreating, empty, a database file that has disappeared since it was opened."""
    if not os.path.exists(args[0]):
        error = sqlite3.OperationalError("unable to open database file: it is gone")
        error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
        raise error


def _check_folder(path: Path, force: bool) -> None:
    folder = path.absolute().parent
    if not folder.is_dir():
        raise DatabaseError(
            f"The folder {folder} of the database does not exist. Create it: mkdir -p {shlex.quote(str(folder))}"
        )
    kind = file_system(path.resolve().parent, mounts())
    if kind in NETWORK_FILE_SYSTEMS and not force:
        raise DatabaseError(
            f"{path} is on a network file system ({kind}), where SQLite's locks are unreliable and captions could be "
            "lost. Put the database on a local disk, or use PostgreSQL: --db postgresql+psycopg://USER@HOST/NAME "
            "(or, at your own risk and with one process at a time: rococap --force …)"
        )


def mounts() -> str:
    """The content of /proc/mounts; empty on systems without it."""
    try:
        return Path("/proc/mounts").read_text(errors="surrogateescape")
    except OSError:
        return ""


def file_system(folder: Path, mounts: str) -> str | None:
    """The type of the file system that holds `folder`, from the longest mount point in `mounts` (/proc/mounts) that
    contains it; None if none does.
    """
    kinds = {_unescape(point): kind for _, point, kind, *_ in (line.split() for line in mounts.splitlines())}
    resolved = folder.resolve()
    return next((kinds[str(path)] for path in (resolved, *resolved.parents) if str(path) in kinds), None)


def _unescape(mount_point: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), mount_point)


def wal_is_safe(version: tuple[int, ...]) -> bool:
    """Whether this version of SQLite has the fix for the WAL corruption of 3.7.0 to 3.51.2, which several writers and a
    checkpoint at once can cause (https://www.sqlite.org/wal.html).
    """
    return version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)


def _set_pragmas(connection: sqlite3.Connection, _record: object) -> None:
    is_new = connection.execute("PRAGMA page_count").fetchone()[0] == 0
    if is_new and wal_is_safe(sqlite3.sqlite_version_info):
        connection.execute("PRAGMA journal_mode = WAL")  # if refused, any other journal is as safe with FULL
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def hurry(database: Database) -> None:
    """From now on, a transaction raises DatabaseUnavailable if PostgreSQL does not answer for SILENCE_SEC, and the
    server ends one that idles for HURRIED_IDLE_SEC. For processes that run short statements and compute nothing inside
    a transaction: wherever one of them stops, nobody waits for it for long, and it waits for nobody for ever.
    """
    if database.dialect.name == "sqlite":
        return
    database.update_execution_options(is_hurried=True)
    database.dispose()  # connections that are open would wait for ever


def _is_hurried(database: Database) -> bool:
    return "is_hurried" in database.get_execution_options()


def stay(database: Database, sql: str, params: Row) -> None:
    """From now on, a new connection raises DatabaseError unless this query finds a row; behind a pooler, every
    checkout does.

    For long-running processes: if the file is replaced or the server restored from a backup, ids refer to other rows.
    """
    sql = sql if database.dialect.name == "sqlite" else sql.replace("?", "%s")

    def check(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        try:
            is_same = cursor.execute(sql, tuple(params)).fetchone() is not None
        except database.dialect.loaded_dbapi.Error as error:
            if "no such table" not in str(error) and getattr(error, "sqlstate", None) != _NO_SUCH_TABLE:
                raise
            is_same = False  # a new database whose tables are being created
        finally:
            cursor.close()
        if not is_same:
            raise replaced(database.url)

    def check_behind_a_pooler(connection: Any, record: object, _proxy: object) -> None:
        if connection.prepare_threshold is None:  # a pooler may reconnect to the server without our noticing
            check(connection, record)

    event.listen(database, "connect", check)
    if database.dialect.name == "postgresql":
        event.listen(database, "checkout", check_behind_a_pooler)


def replaced(url: URL) -> DatabaseError:
    """The error for a database whose rows are not those that this process has seen."""
    return DatabaseError(
        f"{shown(url)} is not the database that this process started with: it was "
        "replaced. Start again, with the one that you want."
    )


def explain(error: DBAPIError, url: URL | None = None) -> str:
    """A driver's error as a one-line message that names the next step."""
    reason = str(error.orig).partition("\n")[0]
    where = shown(url) if url else "The database"
    if "not a database" in reason or "malformed" in reason:
        return f"{where} is not an SQLite database, or is damaged ({reason}). Name another with --db."
    if "unable to open" in reason and open_files.are_used_up():
        return f"{where} cannot be opened: this process may open {open_files.limit()} files. {open_files.ADVICE}"
    if "readonly" in reason or "unable to open" in reason:
        return f"{where} cannot be written ({reason}). Check its permissions, or name another with --db."
    if "full" in reason:
        return f"{where}: the disk is full. Free some space, then run the command again."
    if "unsupported startup parameter" in reason:
        return (
            f"{where} is behind PgBouncer, which refuses startup options ({reason}). Remove them from the URL "
            "and from PGOPTIONS, or set them for the role: ALTER ROLE NAME SET …"
        )
    if url is not None and url.get_backend_name() == "postgresql" and ("connect" in reason or "resolve" in reason):
        return f"{where} cannot be reached ({reason}). Start the server, or check the URL's host, port, user and name."
    return f"{where} cannot be used: {reason}"


def _explain_source(error: DBAPIError, url: URL) -> str:
    """The same for a database that is only read, which --db does not name."""
    reason = str(error.orig).partition("\n")[0]
    if "not a database" in reason or "malformed" in reason:
        return (
            f"{shown(url)} is not an SQLite database, or is damaged ({reason}). Copy it again from where it was made, "
            "or name another."
        )
    if ("readonly" in reason or "unable to open" in reason) and not open_files.are_used_up():
        return (
            f"{shown(url)} cannot be read ({reason}). Check its permissions. If its folder cannot be written, copy it "
            "to one that can, with the files beside it whose names end in -wal or -journal, and name the copy."
        )
    return explain(error, url)


# --- Transactions ----------------------------------------------------------------------------------------------


@contextmanager
def transaction(database: Database, *, write: bool = False, patience: float | None = None) -> Iterator[Connection]:
    """One transaction, committed when the block ends and rolled back when it raises.

    A writer holds SQLite's write lock from the start (BEGIN IMMEDIATE). Readers and writers both wait for a busy
    database in our own code, because SQLite's busy handler starves some of them. Raises DatabaseUnavailable after
    `patience` seconds (PATIENCE_SEC by default), or if the database is full or unreachable; a commit may have happened
    nevertheless. Raises DatabaseError if the database cannot be used.
    """
    try:
        with _patiently(database.connect, database.url.database, patience) as conn:
            try:
                _begin(conn, write, patience)
                yield conn
                _commit(conn, patience)
                if write and database.dialect.name == "sqlite":
                    time.sleep(YIELD_SEC)
            except BaseException as error:
                _roll_back(conn)
                if isinstance(error, DBAPIError) and _is_unavailable(error):
                    conn.invalidate()  # the file was moved or the server went down: the next connection opens it again
                raise
    except PoolTimeout as error:
        raise DatabaseUnavailable(
            f"No connection to {shown(database.url)} became free within {CONNECTION_PATIENCE_SEC:.0f} s, because other "
            "threads of this process use all of them. Try again."
        ) from error
    except DBAPIError as error:
        if _is_unavailable(error):
            raise DatabaseUnavailable(explain(error, database.url)) from error
        if isinstance(error, OperationalError):
            raise DatabaseError(explain(error, database.url)) from error
        raise


def _is_unavailable(error: DBAPIError) -> bool:
    """Whether the same statement may succeed later, as opposed to a mistake in the SQL."""
    if isinstance(error.orig, sqlite3.Error):
        return getattr(error.orig, "sqlite_errorcode", 0) & 0xFF in _UNAVAILABLE_CODES
    is_broken = error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)
    return is_broken or getattr(error.orig, "sqlstate", None) in _UNAVAILABLE_SQLSTATES


def _begin(conn: Connection, write: bool, patience: float | None = None) -> None:
    if conn.dialect.name != "sqlite":
        mode = "" if write else " ISOLATION LEVEL REPEATABLE READ READ ONLY"
        patience = PATIENCE_SEC if patience is None else patience
        if _is_hurried(conn.engine):
            cast(Any, conn.connection.driver_connection).silence_sec = patience + SILENCE_SEC
        limits = "".join(f"; SET LOCAL {name} = {int(1000 * sec)}" for name, sec in _limits(conn, patience).items())
        conn.exec_driver_sql(
            f"BEGIN{mode}{limits}",
            execution_options={"no_parameters": True},
        )
        return
    # query_only: a reader that wrote would be upgraded to a deferred writer. The SELECT takes the read lock here, where
    # waiting is possible, rather than in the caller's first query.
    first = ("BEGIN IMMEDIATE",) if write else ("BEGIN", "SELECT 1 FROM sqlite_master LIMIT 1")

    def begin() -> None:
        try:
            for statement in (f"PRAGMA query_only = {'OFF' if write else 'ON'}", *first):
                conn.exec_driver_sql(statement)
        except OperationalError as error:
            _roll_back(conn)
            if conn.invalidated:  # the rollback failed as well: another attempt would need another connection
                raise DatabaseUnavailable(explain(error, conn.engine.url)) from error
            raise

    _patiently(begin, conn.engine.url.database, patience)


def _limits(conn: Connection, patience: float) -> dict[str, float]:
    """PostgreSQL's settings that limit this transaction, in seconds, but for those that the user's options set.

    They are set per transaction rather than as startup options, because PgBouncer refuses those and hands the
    connection to other clients afterwards.
    """
    limits = {"lock_timeout": patience, "idle_in_transaction_session_timeout": IDLE_SEC}
    if _is_hurried(conn.engine):
        limits["idle_in_transaction_session_timeout"] = HURRIED_IDLE_SEC
        if (conn.dialect.server_version_info or ()) >= _HAS_TRANSACTION_TIMEOUT:
            # A transaction does not count as idle in the middle of `executemany`, nor after it: the driver flushes once
            # more after the last row, which stops that clock.
            limits["transaction_timeout"] = patience + SILENCE_SEC
    told = str(conn.engine.url.query.get("options", os.environ.get("PGOPTIONS", "")))
    return {name: seconds for name, seconds in limits.items() if name == "lock_timeout" or name not in told}


def _commit(conn: Connection, patience: float | None = None) -> None:
    _patiently(lambda: conn.exec_driver_sql("COMMIT"), conn.engine.url.database, patience)


def _patiently(action: Callable[[], T], database: str | None, patience: float | None = None) -> T:
    """Retries `action`, with jitter, while another process has the database locked.

    Raises DatabaseUnavailable after `patience` seconds (PATIENCE_SEC by default).
    """
    patience = PATIENCE_SEC if patience is None else patience
    started = time.monotonic()
    while True:
        try:
            return action()
        except (OperationalError, sqlite3.OperationalError) as error:
            if not _is_busy(error):
                raise
            waited = time.monotonic() - started
            if waited > patience:
                raise DatabaseUnavailable(
                    f"{database} has been locked by another process for {patience:.0f} s. "
                    "Close whatever holds it (a database browser, a backup), then run the command again."
                ) from error
            time.sleep(random.uniform(0.5, 1.0) * _pause_sec(waited))


def _pause_sec(waited: float) -> float:
    """Seconds until the next attempt. The longer a process has waited the sooner it tries again, so that workers take
    turns; after a second, the lock is probably held by another program and the pause is constant.
    """
    return max(0.0003, 0.005 / (1 + waited / 0.05)) if waited < 1 else 0.02


def _is_busy(error: Exception) -> bool:
    code = getattr(getattr(error, "orig", error), "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _roll_back(conn: Connection) -> None:
    # SQLite rolls back on its own after some errors (a full disk), PostgreSQL when the connection breaks.
    driver = None if conn.invalidated else conn.connection.driver_connection
    if driver is not None and getattr(driver, "in_transaction", True):
        try:
            conn.exec_driver_sql("ROLLBACK")
        except OperationalError:  # the connection is broken
            conn.invalidate()


def stay_idle(conn: Connection) -> None:
    """Lets this transaction idle as long as it likes: one that only reads holds nobody up."""
    if conn.dialect.name != "sqlite":
        execute(conn, "SET LOCAL idle_in_transaction_session_timeout = 0")


def lock(conn: Connection, table: str, id: int) -> None:
    """Locks a row until the transaction ends, so that one writer at a time changes what depends on it.

    SQLite allows only one writer anyway. On PostgreSQL, rows that refer to this one may still be added.
    """
    if conn.dialect.name != "sqlite":
        execute(conn, f"SELECT id FROM {table} WHERE id = ? FOR NO KEY UPDATE", (id,))


def take_turns(conn: Connection) -> None:
    """Lets no merge write to this database until the transaction ends, and no enqueue add a data set or run, so that
    what this one looks for and does not find may be inserted. To be called before any row is locked. SQLite allows only
    one writer anyway.

    Raises DatabaseUnavailable if the transaction of a merge has not ended after MERGE_PATIENCE_SEC.
    """
    if conn.dialect.name == "sqlite":
        return
    # A lock of the transaction rather than of the session, which behind PgBouncer belongs to others afterwards.
    sql = (
        f"SET LOCAL lock_timeout = {int(1000 * MERGE_PATIENCE_SEC)}; SELECT pg_advisory_xact_lock({_MERGE_LOCK}); "
        f"SET LOCAL lock_timeout = {int(1000 * PATIENCE_SEC)}"
    )
    try:
        conn.exec_driver_sql(sql, execution_options={"no_parameters": True})
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", None) not in _WAITED_TOO_LONG:
            raise
        raise DatabaseUnavailable(
            f"A merge into {shown(conn.engine.url)} is under way, and this command has waited too long for it. When it "
            "has ended, run the command again, which goes on where this one stopped."
        ) from error


def for_update(conn: Connection, alias: str) -> str:
    """The clause that locks the rows of a SELECT until the transaction ends; empty on SQLite, which has one writer."""
    return "" if conn.dialect.name == "sqlite" else f" FOR UPDATE OF {alias}"


def execute(conn: Connection, sql: str, params: Row | list[Row] = ()) -> "CursorResult[*tuple[Any, ...]]":
    """Runs one statement with `?` placeholders; if `params` is a list of rows, once for each.

    The statement goes straight to the driver: SQLAlchemy's compiled statements cost three times as much per row, and
    every row of a run passes through here.
    """
    if conn.dialect.name != "sqlite":
        sql = sql.replace("?", "%s")
    return conn.exec_driver_sql(sql, params if isinstance(params, list) else tuple(params))


def marks(values: Collection[Any]) -> str:
    """The placeholders of values in `IN (…)`, which finds nothing if there are none."""
    return ", ".join("?" * len(values)) or "NULL"


def now(conn: Connection) -> int:
    """The database's clock in milliseconds since 1970 (UTC), which workers on several machines share."""
    if conn.dialect.name == "sqlite":
        # unixepoch('now', 'subsec') returns NULL, without an error, before SQLite 3.42.
        sql = "SELECT CAST(ROUND((julianday('now') - 2440587.5) * 86400000) AS INTEGER)"
    else:
        sql = "SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint)"
    return int(execute(conn, sql).scalar_one())


# --- Schema ----------------------------------------------------------------------------------------------------


def migrations_dir() -> Path:
    """The folder of alembic's scripts: inside an installed package, or at the root of a checkout."""
    packaged = Path(__file__).parent / "migrations"
    return packaged if packaged.is_dir() else packaged.parents[1] / "migrations"


def _check_schema(database: Database) -> None:
    with transaction(database) as conn:
        found = found_schema(conn)
    if found is None:
        upgrade(database)
    elif found != SCHEMA:
        raise wrong_schema(database.url, found)


def _check_holds_queue(database: Database) -> None:
    with transaction(database) as conn:
        found = found_schema(conn)
    if found is None:
        raise _holds_no_queue(database.url)
    if found != SCHEMA:
        raise wrong_schema(database.url, found)


def _holds_no_queue(url: URL) -> DatabaseError:
    return DatabaseError(
        f"{shown(url)} holds no queue: it is empty, perhaps because the copy of a file was interrupted. Copy it again, "
        "or name another."
    )


def found_schema(conn: Connection) -> str | None:
    """The schema's revision; None for an empty database. Raises DatabaseError if another program's tables are in it."""
    tables = set(inspect(conn).get_table_names())
    if not tables:
        return None
    if "alembic_version" not in tables or not ({"jobs", "leases"} <= tables or tables == {"alembic_version"}):
        raise DatabaseError(
            f"{conn.engine.url.database} contains other tables ({', '.join(sorted(tables)[:5])}) and is not a rococap "
            "database. Name another with --db."
        )
    return execute(conn, "SELECT version_num FROM alembic_version").scalar()


def refuse_other_schema(conn: Connection) -> None:
    """Raises DatabaseError if the database has been migrated since this process opened it."""
    found = execute(conn, "SELECT version_num FROM alembic_version").scalar_one()
    if found != SCHEMA:
        raise wrong_schema(conn.engine.url, found)


def wrong_schema(url: URL, found: str) -> DatabaseError:
    """The error for a database with the revision `found`: it is older than this version of rococap, or newer."""
    where = shown(url)
    if found in _known_revisions():
        return DatabaseError(
            f"{where} has schema {found}; this version of rococap needs {SCHEMA}. Upgrade it (a backup copy is made): "
            f"rococap --db {shlex.quote(where)} migrate"
        )
    return DatabaseError(
        f"{where} has schema {found}, from a newer version of rococap than this one ({SCHEMA}). "
        "Upgrade rococap, or name another database with --db."
    )


def _known_revisions() -> set[str]:
    from alembic.script import ScriptDirectory

    return {script.revision for script in ScriptDirectory(str(migrations_dir())).walk_revisions()}


@contextmanager
def migration_connection(database: Database) -> Iterator[Connection]:
    """A write transaction with SQLite's foreign keys off, because alembic rebuilds tables and a cascade would empty
    their children.

    Raises DatabaseError, and rolls back, if a foreign key is broken at the end.
    """
    is_sqlite = database.dialect.name == "sqlite"
    with _patiently(database.connect, database.url.database) as conn:
        if is_sqlite:
            conn.exec_driver_sql("PRAGMA foreign_keys = OFF")  # ignored inside a transaction
        _begin(conn, write=True)
        try:
            if not is_sqlite:
                execute(conn, "SELECT pg_advisory_xact_lock(?)", (_FIRST_USE_LOCK,))
            yield conn
            if is_sqlite and (broken := execute(conn, "PRAGMA foreign_key_check").fetchall()):
                raise DatabaseError(f"The migration would break foreign keys of {broken[0][0]}: nothing was changed.")
            _commit(conn)
        except BaseException:
            _roll_back(conn)
            raise
        finally:
            if is_sqlite:
                conn.exec_driver_sql("PRAGMA foreign_keys = ON")


_ALEMBIC = threading.Lock()
"""Alembic keeps one context per process, so migrations take turns."""


def upgrade(database: Database, revision: str = "head") -> None:
    """Upgrades the schema to `revision` in one transaction; several processes may do so at once."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(migrations_dir()).replace("%", "%%"))
    with _ALEMBIC, migration_connection(database) as conn:
        config.attributes["connection"] = conn
        command.upgrade(config, revision)


@dataclass(frozen=True, slots=True)
class Migrated:
    """What `migrate` did. `backup` is the copy of an SQLite file that was made first; None if there is none."""

    upgraded: bool
    backup: Path | None = None


def migrate(url: str, *, force: bool = False) -> Migrated:
    """Upgrades an older database, after copying it if it is an SQLite file.

    Raises DatabaseError while leases are open, because a worker's statements must not meet a new schema half-way, and
    for a database that cannot be read or is newer than this version of rococap.
    """
    database = connect(url, create=False, force=force)
    try:
        return _migrate(database)
    except DriverError as error:
        raise DatabaseError(explain(error, database.url)) from error
    finally:
        database.dispose()


def _migrate(database: Database) -> Migrated:
    with transaction(database) as conn:
        found = found_schema(conn)
        n_open = 0
        if found is not None:
            # The worker of an expired lease is dead, and no worker of this version can start here to reap it.
            sql = "SELECT count(*) FROM leases WHERE state = 'open' AND expires_at > ?"
            n_open = execute(conn, sql, (now(conn),)).scalar_one()
    if found == SCHEMA:
        return Migrated(False)
    if found is not None and found not in _known_revisions():
        raise wrong_schema(database.url, found)
    if n_open:
        raise DatabaseError(
            f"Open leases: {n_open}. Stop the workers (or wait until their leases expire), then migrate."
        )
    backup = None
    if found is not None and database.dialect.name == "sqlite":
        file = Path(database.url.database or "")
        # An existing copy is from an upgrade that failed, and older than the database is now.
        backup = back_up(database, file.with_name(f"{file.name}.before-{SCHEMA}-from-{found}"), overwrite=True)
    upgrade(database)
    return Migrated(True, backup)


def back_up(database: Database, target: Path, *, overwrite: bool = False) -> Path:
    """Copies a consistent snapshot of an SQLite database to `target` while workers run; whole or not at all.

    Raises DatabaseError if `target` exists (unless `overwrite` is set) or the copy cannot be written, and for
    PostgreSQL, which has its own tool.
    """
    if database.dialect.name != "sqlite":
        raise DatabaseError("This copies SQLite files. For PostgreSQL: pg_dump --format=custom --file=FILE URL")
    if target.exists() and target.samefile(database.url.database or ""):
        raise DatabaseError(f"{target} is the database itself. Name another file.")
    if os.path.lexists(target) and not overwrite:
        raise DatabaseError(f"{target} exists already and was left as it is. Name another file, or move it away.")
    partial = target.with_name(f".{target.name}.part")
    try:
        partial.unlink(missing_ok=True)  # left by a copy that was killed
        # In one step: a copy page by page would start over whenever a worker commits.
        with closing(sqlite3.connect(database.url.database or "")) as read, closing(sqlite3.connect(partial)) as write:
            _patiently(lambda: read.backup(write), database.url.database)
        with partial.open("rb") as copy:
            os.fsync(copy.fileno())
        partial.replace(target)
    except (sqlite3.Error, OSError) as error:
        raise DatabaseError(
            f"The copy {target} cannot be written ({error}): nothing was changed. "
            "Check the folder's permissions and the disk, then run the command again."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return target


def vacuum(database: Database) -> None:
    """Returns free space to the file system, and updates PostgreSQL's statistics. SQLite is locked while it runs.

    Raises DatabaseError if the database cannot do it.
    """
    try:
        with database.connect() as conn:
            if database.dialect.name == "postgresql":
                conn.exec_driver_sql("VACUUM (ANALYZE)")
                return
            conn.exec_driver_sql("PRAGMA query_only = OFF")  # a reader may have left it on
            _patiently(lambda: conn.exec_driver_sql("VACUUM"), database.url.database)
            conn.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    except DBAPIError as error:
        raise DatabaseError(explain(error, database.url)) from error
