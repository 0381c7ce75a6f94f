"""Engines from URLs, transactions that wait their turn, and the schema's version.

Transactions are begun and committed by name on an autocommit connection: SQLite's drivers otherwise begin deferred
ones, which ignore the busy timeout when they turn into writers. Both dialects run the same statements.
"""

import os
import random
import re
import shlex
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, create_engine, event, inspect
from sqlalchemy import Engine as Database
from sqlalchemy.engine import URL, CursorResult, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import DatabaseError as DriverError

from rococap import open_files
from rococap.errors import DatabaseError, DatabaseUnavailable
from rococap.tables import SCHEMA
from rococap.urls import shown, sqlite_url

DEFAULT_URL = "sqlite:///rococap.db"
PATIENCE_SEC = 60.0
"""How long a transaction waits for a lock before it gives up."""
COURTESY_SEC = 0.0005
"""A writer that has just committed lets those who wait go first: at once it would win nearly every time."""

POSTGRESQL_SETTINGS = {
    # Said by `libpq`: a server that is silently gone must not hold a thread for the kernel's fifteen minutes.
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
"""Unless the URL says otherwise: `?connect_timeout=3`."""

IDLE_SEC = 60
"""A worker that is frozen inside a transaction must not hold others' rows for longer."""

_WHATEVER_THE_URL_SAYS = {
    # Captions are Unicode, and the driver hands out bytes where the server's locale chose the encoding.
    "client_encoding": "UTF8",
    # PgBouncer gives each transaction another connection, which knows no statement that an earlier one prepared.
    "prepare_threshold": None,
}

_PREPARED_AFTER = 5
"""So often is a statement executed, as by the driver's default, before a server without a pooler prepares it, which
saves a third of the time that claiming and completing take.
"""

_AWAY = frozenset(
    [
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_READONLY,  # also of a file that was moved under us
    ]
)

_AWAY_SQLSTATES = frozenset(["25006", "25P03", "40P01"])
"""A server that fell back to reading, a transaction that idled too long, a deadlock: of no class that says so."""

_NO_SUCH_TABLE = "42P01"

_FIRST_USE_LOCK = 0x726F636F
"""The key of PostgreSQL's advisory lock on changes of the schema."""

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
    return os.environ.get("ROCOCAP_DB", DEFAULT_URL)


# --- Opening ---------------------------------------------------------------------------------------------------


def connect(url: str, *, create: bool = True, is_there: bool = False, force: bool = False) -> Database:
    """The database at `url`, with the schema checked; an empty or absent database is given its tables.

    With `is_there` an SQLite file that is absent is not made. With `create=False` the database is opened as it is,
    whatever its schema; with `force` also on a file system that SQLite cannot lock on. Raises DatabaseError for a URL
    that cannot be understood, such a file system, a file that is to be there and is not, a database that is not ours or
    has another schema.
    """
    database = _create(_parse(url), force)
    if is_there and database.dialect.name == "sqlite" and not os.path.exists(database.url.database or ""):
        raise DatabaseError(
            f"There is no database {database.url.database}. Name yours with --db, or make it by registering pictures: "
            "rococap enqueue --split train"
        )
    if create:
        try:
            _check_schema(database)
        except BaseException as error:
            database.dispose()
            if isinstance(error, DriverError):
                raise DatabaseError(explain(error, database.url)) from error
            if isinstance(error, TypeError | ValueError):  # options of the URL that the driver does not take
                raise _cannot_open(url, error) from error
            raise
        if database.dialect.name == "sqlite":
            event.listen(database, "do_connect", refuse_absent)
    return database


def _parse(url: str) -> URL:
    try:
        parsed = sqlite_url(url) or make_url(_with_hosts_as_options(url))
        if parsed.drivername in ("postgres", "postgresql"):  # as libpq writes it
            parsed = parsed.set(drivername="postgresql+psycopg")
        parsed.get_dialect()
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise _cannot_open(url, error) from error
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise DatabaseError(f"rococap runs on SQLite and PostgreSQL, not on {parsed.get_backend_name()}.")
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite", "postgresql+psycopg"):
        raise DatabaseError(
            f"The driver of {parsed.drivername} is not supported. Use sqlite:// or postgresql+psycopg://"
        )
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:", "file::memory:"):
        raise DatabaseError("A queue in memory would be lost with its process. Name a file: sqlite:///rococap.db")
    return parsed


def _with_hosts_as_options(url: str) -> str:
    """`//a:1,b:2/x` as `///x?host=a,b&port=1,2`: several hosts, or a socket, that SQLAlchemy reads only like this."""
    parts = re.fullmatch(r"(postgres[a-z+]*://(?:[^/?]*@)?)([^/?@]*)([^?]*)\??(.*)", url, re.DOTALL)
    if parts is None or not re.search(",|%2F", parts[2], re.IGNORECASE):
        return url
    hosts, ports = [], []
    for place in parts[2].split(","):
        found = re.fullmatch(r"(?:\[(.*)\]|([^:]*))(?::(\d*))?", place)
        if found is None:
            return url
        hosts.append(found[1] or found[2])
        ports.append(found[3] or "")
    options = [f"host={','.join(hosts)}", f"port={','.join(ports)}" if any(ports) else "", parts[4]]
    return f"{parts[1]}{parts[3]}?{'&'.join(filter(None, options))}"


def _cannot_open(url: str, error: Exception) -> DatabaseError:
    without_password = re.sub(r"(://[^:@/]*):[^@]*@", r"\1:***@", url)
    return DatabaseError(
        f"{without_password!r} is not a database URL that this machine can open ({error}). "
        "Use sqlite:///FILE, or postgresql+psycopg://USER@HOST/NAME with its driver installed."
    )


def _create(url: URL, force: bool) -> Database:
    if url.get_backend_name() == "sqlite":
        _check_place(Path(url.database or ""), force)
        database = create_engine(url, isolation_level="AUTOCOMMIT", connect_args={"timeout": 0})
        event.listen(database, "connect", _set_pragmas)
        return database
    settings = {name: value for name, value in POSTGRESQL_SETTINGS.items() if name not in url.query}
    try:
        database = create_engine(
            url,
            isolation_level="AUTOCOMMIT",
            pool_pre_ping=True,
            connect_args=settings | _WHATEVER_THE_URL_SAYS,
        )
    except ModuleNotFoundError as error:
        raise DatabaseError(
            f"PostgreSQL's driver is not installed ({error}). Install it: pip install 'rococap[postgres]'"
        ) from error
    _look_at_each_connection(database)
    return database


def _look_at_each_connection(database: Database) -> None:
    """A new one to a database that cannot hold every caption raises DatabaseError."""

    def look(connection: Any, _record: object) -> None:
        sql = "SELECT current_setting('server_encoding'), pg_backend_pid()"
        encoding, pid = connection.execute(sql).fetchone()
        if encoding != "UTF8":
            connection.close()
            raise _wrong_encoding(database.url, encoding)
        # A pooler hands out numbers of its own: where they agree, the server itself is at the other end.
        if pid == connection.info.backend_pid:
            connection.prepare_threshold = _PREPARED_AFTER

    event.listen(database, "connect", look)


def _wrong_encoding(url: URL, encoding: str) -> DatabaseError:
    locale = "" if encoding == "SQL_ASCII" else " --locale=C"  # one that was chosen may allow no other encoding
    return DatabaseError(
        f"{url.render_as_string()} has the encoding {encoding}, which cannot hold captions. Create one of UTF8 and "
        f"name it with --db: createdb --encoding=UTF8 --template=template0{locale} NAME"
    )


def refuse_absent(_dialect: object, _record: object, args: Sequence[Any], _options: object) -> None:
    """A file that was there and is gone must not be made anew, empty, by whoever connects next."""
    if not os.path.exists(args[0]):
        error = sqlite3.OperationalError("unable to open database file: it is gone")
        error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
        raise error


def _check_place(path: Path, force: bool) -> None:
    folder = path.absolute().parent
    if not folder.is_dir():
        raise DatabaseError(
            f"The folder {folder} of the database does not exist. Create it: mkdir -p {shlex.quote(str(folder))}"
        )
    kind = file_system(path.resolve().parent, mounts())
    if kind in NETWORK_FILE_SYSTEMS and not force:
        raise DatabaseError(
            f"{path} is on a network file system ({kind}), where SQLite's locks do not hold and captions could be "
            "lost. Put the database on a local disk, or use PostgreSQL: --db postgresql+psycopg://USER@HOST/NAME "
            "(or, at your own risk and with one process at a time: rococap --force …)"
        )


def mounts() -> str:
    try:
        return Path("/proc/mounts").read_text(errors="surrogateescape")
    except OSError:  # not Linux: nothing to go by
        return ""


def file_system(folder: Path, mounts: str) -> str | None:
    """The type of the file system that `folder` is on, by the longest matching line of `mounts` (/proc/mounts)."""
    kinds = {_unescape(point): kind for _, point, kind, *_ in (line.split() for line in mounts.splitlines())}
    resolved = folder.resolve()
    return next((kinds[str(at)] for at in (resolved, *resolved.parents) if str(at) in kinds), None)


def _unescape(mount_point: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), mount_point)


def wal_is_safe(version: tuple[int, ...]) -> bool:
    """Whether this SQLite has the fix for the WAL corruption of 3.7.0 to 3.51.2 (several writers, checkpointing)."""
    return version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)


def _set_pragmas(connection: sqlite3.Connection, _record: object) -> None:
    is_new = connection.execute("PRAGMA page_count").fetchone()[0] == 0
    if is_new and wal_is_safe(sqlite3.sqlite_version_info):
        connection.execute("PRAGMA journal_mode = WAL")  # may be refused: any journal is safe with FULL
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def stay(database: Database, sql: str, params: Row) -> None:
    """From now on a new connection must find a row by this query, or it raises DatabaseError; behind a pooler any one.

    For who goes on for long: should the file be replaced or the server restored, ids mean other rows there.
    """
    sql = sql if database.dialect.name == "sqlite" else sql.replace("?", "%s")

    def check(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        try:
            is_there = cursor.execute(sql, tuple(params)).fetchone() is not None
        except database.dialect.loaded_dbapi.Error as error:
            if "no such table" not in str(error) and getattr(error, "sqlstate", None) != _NO_SUCH_TABLE:
                raise
            is_there = False  # a new one that is being given its tables
        finally:
            cursor.close()
        if not is_there:
            raise DatabaseError(
                f"{shown(database.url)} is another database than when this process began: it was "
                "replaced. Start anew, with the one that you want."
            )

    def check_behind_a_pooler(connection: Any, record: object, _proxy: object) -> None:
        if connection.prepare_threshold is None:  # its own connections to the server come and go unseen
            check(connection, record)

    event.listen(database, "connect", check)
    if database.dialect.name == "postgresql":
        event.listen(database, "checkout", check_behind_a_pooler)


def explain(error: DBAPIError, url: URL | None = None) -> str:
    """A driver's error as one line that names the next step."""
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
            f"{where} is behind PgBouncer, which refuses options at the start ({reason}). Leave them out of the URL "
            "and of PGOPTIONS, or set them for the role: ALTER ROLE NAME SET …"
        )
    if url is not None and url.get_backend_name() == "postgresql" and "connect" in reason:
        return f"{where} cannot be reached ({reason}). Start the server, or check the URL's host, port, user and name."
    return f"{where} cannot be used: {reason}"


# --- Transactions ----------------------------------------------------------------------------------------------


@contextmanager
def transaction(database: Database, *, write: bool = False, patience: float | None = None) -> Iterator[Connection]:
    """One transaction, committed when the block ends and rolled back when it raises.

    A writer holds SQLite's write lock from the start (BEGIN IMMEDIATE). Both kinds wait for a busy database in our
    code: SQLite's own waiting starves the unlucky. Raises DatabaseUnavailable after `patience` seconds
    (PATIENCE_SEC), or if the database is full or away: a commit may have happened all the same. Raises DatabaseError
    where it cannot be used.
    """
    try:
        with _patiently(database.connect, database.url.database, patience) as conn:
            try:
                _begin(conn, write, patience)
                yield conn
                _commit(conn, patience)
                if write and database.dialect.name == "sqlite":
                    time.sleep(COURTESY_SEC)
            except BaseException as error:
                _roll_back(conn)
                if isinstance(error, DBAPIError) and _is_away(error):
                    conn.invalidate()  # a file that was moved or a server that went: the next one opens it anew
                raise
    except DBAPIError as error:
        if _is_away(error):
            raise DatabaseUnavailable(explain(error, database.url)) from error
        if isinstance(error, OperationalError):
            raise DatabaseError(explain(error, database.url)) from error
        raise


def _is_away(error: DBAPIError) -> bool:
    """Whether the same may succeed later: nobody's mistake in SQL."""
    if isinstance(error.orig, sqlite3.Error):
        return getattr(error.orig, "sqlite_errorcode", 0) & 0xFF in _AWAY
    is_broken = error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)
    return is_broken or getattr(error.orig, "sqlstate", None) in _AWAY_SQLSTATES


def _begin(conn: Connection, write: bool, patience: float | None = None) -> None:
    if conn.dialect.name != "sqlite":
        mode = "" if write else " ISOLATION LEVEL REPEATABLE READ READ ONLY"
        milliseconds = int(1000 * (PATIENCE_SEC if patience is None else patience))
        conn.exec_driver_sql(
            f"BEGIN{mode}; SET LOCAL lock_timeout = {milliseconds}{_set_idle(conn.engine.url)}",
            execution_options={"no_parameters": True},
        )
        return
    # A reader that writes would turn into a deferred writer. Its SELECT takes the read lock now, while it may wait,
    # rather than in the caller's first query.
    first = ("BEGIN IMMEDIATE",) if write else ("BEGIN", "SELECT 1 FROM sqlite_master LIMIT 1")

    def begin() -> None:
        try:
            for statement in (f"PRAGMA query_only = {'OFF' if write else 'ON'}", *first):
                conn.exec_driver_sql(statement)
        except OperationalError as error:
            _roll_back(conn)
            if conn.invalidated:  # busy, and then not even that: trying again would need another connection
                raise DatabaseUnavailable(explain(error, conn.engine.url)) from error
            raise

    _patiently(begin, conn.engine.url.database, patience)


def _set_idle(url: URL) -> str:
    """What limits how long this transaction may idle, unless the user's options do.

    Not an option of ours when the connection starts: PgBouncer refuses those, and gives it to others after this.
    """
    options = url.query.get("options", os.environ.get("PGOPTIONS", ""))
    name = "idle_in_transaction_session_timeout"
    return "" if name in str(options) else f"; SET LOCAL {name} = '{IDLE_SEC}s'"


def _commit(conn: Connection, patience: float | None = None) -> None:
    _patiently(lambda: conn.exec_driver_sql("COMMIT"), conn.engine.url.database, patience)


def _patiently(action: Callable[[], T], database: str | None, patience: float | None = None) -> T:
    """Does it again, with jitter, while another process has the database locked."""
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
                    "Close what holds it (a database browser, a backup), then run the command again."
                ) from error
            time.sleep(random.uniform(0.5, 1.0) * _pause_sec(waited))


def _pause_sec(waited: float) -> float:
    """How long until it asks again. The longer it has waited the sooner, so that the lock goes round among workers;
    after a second it is another program's.
    """
    return max(0.0003, 0.005 / (1 + waited / 0.05)) if waited < 1 else 0.02


def _is_busy(error: Exception) -> bool:
    code = getattr(getattr(error, "orig", error), "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _roll_back(conn: Connection) -> None:
    # SQLite rolls back by itself after some errors (a full disk), PostgreSQL when the connection breaks.
    driver = None if conn.invalidated else conn.connection.driver_connection
    if driver is not None and getattr(driver, "in_transaction", True):
        try:
            conn.exec_driver_sql("ROLLBACK")
        except OperationalError:  # nothing is left to roll back on
            conn.invalidate()


def lock(conn: Connection, table: str, id: int) -> None:
    """Lets one writer at a time go on with what hangs on this row, until its transaction ends.

    On SQLite a writer is alone anyway. On PostgreSQL rows that refer to this one may be added meanwhile.
    """
    if conn.dialect.name != "sqlite":
        execute(conn, f"SELECT id FROM {table} WHERE id = ? FOR NO KEY UPDATE", (id,))


def for_update(conn: Connection, alias: str) -> str:
    """The clause that locks the rows of a SELECT for the transaction; SQLite's writers need none."""
    return "" if conn.dialect.name == "sqlite" else f" FOR UPDATE OF {alias}"


def execute(conn: Connection, sql: str, params: Row | list[Row] = ()) -> "CursorResult[*tuple[Any, ...]]":
    """Runs one statement with `?` placeholders; a list of rows runs it for each.

    Straight to the driver: SQLAlchemy's compiled statements cost three times as much per row, and every row of a
    run passes here.
    """
    if conn.dialect.name != "sqlite":
        sql = sql.replace("?", "%s")
    return conn.exec_driver_sql(sql, params if isinstance(params, list) else tuple(params))


def now(conn: Connection) -> int:
    """The database's clock, in milliseconds since 1970 (UTC): workers on several machines share it."""
    if conn.dialect.name == "sqlite":
        # unixepoch('now', 'subsec') is silently NULL before SQLite 3.42.
        sql = "SELECT CAST(ROUND((julianday('now') - 2440587.5) * 86400000) AS INTEGER)"
    else:
        sql = "SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint)"
    return int(execute(conn, sql).scalar_one())


# --- Schema ----------------------------------------------------------------------------------------------------


def migrations_dir() -> Path:
    packaged = Path(__file__).parent / "migrations"  # installed wheel
    return packaged if packaged.is_dir() else packaged.parents[1] / "migrations"  # checkout


def _check_schema(database: Database) -> None:
    with transaction(database) as conn:
        found = found_schema(conn)
    if found is None:
        upgrade(database)
    elif found != SCHEMA:
        raise wrong_schema(database.url, found)


def found_schema(conn: Connection) -> str | None:
    """The schema's revision; None for an empty database. Raises DatabaseError for somebody else's."""
    tables = set(inspect(conn).get_table_names())
    if not tables:
        return None
    if "alembic_version" not in tables or not ({"jobs", "leases"} <= tables or tables == {"alembic_version"}):
        raise DatabaseError(
            f"{conn.engine.url.database} holds other tables ({', '.join(sorted(tables)[:5])}) and is not a rococap "
            "database. Name another file with --db."
        )
    return execute(conn, "SELECT version_num FROM alembic_version").scalar()


def wrong_schema(url: URL, found: str) -> DatabaseError:
    where = shown(url)
    if found in _known_revisions():
        return DatabaseError(
            f"{where} has schema {found}; this rococap needs {SCHEMA}. Upgrade it (a backup copy is made): "
            f"rococap --db {shlex.quote(where)} migrate"
        )
    return DatabaseError(
        f"{where} has schema {found}, made by a newer rococap than this one ({SCHEMA}). "
        "Upgrade rococap, or name another database with --db."
    )


def _known_revisions() -> set[str]:
    from alembic.script import ScriptDirectory

    return {script.revision for script in ScriptDirectory(str(migrations_dir())).walk_revisions()}


@contextmanager
def migration_connection(database: Database) -> Iterator[Connection]:
    """A write transaction with foreign keys off: alembic rebuilds tables, and a cascade would empty their children.

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
"""Alembic's context is one for the process."""


def upgrade(database: Database, revision: str = "head") -> None:
    """Brings the schema to `revision`, in one transaction; safe when several processes do it at once."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(migrations_dir()).replace("%", "%%"))
    with _ALEMBIC, migration_connection(database) as conn:
        config.attributes["connection"] = conn
        command.upgrade(config, revision)


@dataclass(frozen=True, slots=True)
class Migrated:
    """What `migrate` did. `backup` is the copy made before, of an SQLite file."""

    upgraded: bool
    backup: Path | None = None


def migrate(url: str, *, force: bool = False) -> Migrated:
    """Upgrades an older database, after a backup copy of an SQLite file.

    Raises DatabaseError while leases are open: a worker's statements must not meet another schema half-way.
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
            # An expired one's worker is dead, and no worker of this version could start here to reap it.
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
        # One that is there is of an upgrade that failed, and older than what it would be wanted for.
        backup = back_up(database, file.with_name(f"{file.name}.before-{SCHEMA}-from-{found}"), overwrite=True)
    upgrade(database)
    return Migrated(True, backup)


def back_up(database: Database, target: Path, *, overwrite: bool = False) -> Path:
    """Copies an SQLite database as it is at one moment to `target`, while workers run; whole or not at all.

    Raises DatabaseError where a file is there (but for `overwrite`) or the copy cannot be written, and for PostgreSQL,
    which has its own tool.
    """
    if database.dialect.name != "sqlite":
        raise DatabaseError("This copies SQLite files. For PostgreSQL: pg_dump --format=custom --file=FILE URL")
    if target.exists() and target.samefile(database.url.database or ""):
        raise DatabaseError(f"{target} is the database itself. Name another file.")
    if os.path.lexists(target) and not overwrite:
        raise DatabaseError(f"{target} is there already, and is left as it is. Name another file, or move it away.")
    partial = target.with_name(f".{target.name}.part")
    try:
        partial.unlink(missing_ok=True)  # of one that was killed
        # In one step: copied page by page, it would start anew whenever a worker commits.
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
    """Gives free space back, and brings PostgreSQL's statistics up to date. SQLite is locked meanwhile."""
    try:
        with database.connect() as conn:
            if database.dialect.name == "postgresql":
                conn.exec_driver_sql("VACUUM (ANALYZE)")
                return
            conn.exec_driver_sql("PRAGMA query_only = OFF")  # the last reader of this connection had it on
            _patiently(lambda: conn.exec_driver_sql("VACUUM"), database.url.database)
            conn.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    except DBAPIError as error:
        raise DatabaseError(explain(error, database.url)) from error
