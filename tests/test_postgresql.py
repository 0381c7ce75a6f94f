"""What is PostgreSQL's own: first use, schema and migrations, connections that break."""

import json
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from places import ROOT
from postgres import Server, lock_tables, of_encoding, outside
from samples import fill
from small_engine import INFO
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import make_url
from steps import at_once, downgrade, select, start, statuses, until, wait_too_long_for_a_row

from rococap import db, queue
from rococap.engines import Completion, Failure
from rococap.errors import DatabaseError, DatabaseUnavailable
from rococap.tables import SCHEMA, metadata


@pytest.fixture
def url(postgres: Server) -> str:
    return postgres.create()


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    engine = db.connect(url, create=False)
    yield engine
    engine.dispose()


def schema_of(engine: Engine) -> list[tuple]:
    """Columns, constraints and indexes of all tables but alembic's own, as the server words them."""
    columns = select(
        engine,
        "SELECT table_name, ordinal_position, column_name, data_type, is_nullable, column_default "
        "FROM information_schema.columns WHERE table_schema = 'public' AND table_name <> 'alembic_version' "
        "ORDER BY 1, 2",
    )
    constraints = select(
        engine,
        "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint "
        "WHERE connamespace = 'public'::regnamespace AND conrelid::regclass::text <> 'alembic_version' ORDER BY 1, 2",
    )
    indexes = select(
        engine,
        "SELECT tablename, indexname, indexdef FROM pg_indexes "
        "WHERE schemaname = 'public' AND tablename <> 'alembic_version' ORDER BY 1, 2",
    )
    return columns + constraints + indexes


# --- first use, schema -----------------------------------------------------------------------------------------


def test_workers_that_first_use_a_database_at_once_make_its_schema_once(url):
    at_once(8, lambda: db.connect(url).dispose())
    engine = db.connect(url)
    assert select(engine, "SELECT version_num FROM alembic_version") == [(SCHEMA,)]
    engine.dispose()


def test_the_migrations_make_what_the_models_say(engine, postgres):
    db.upgrade(engine)
    by_models = db.connect(postgres.create(), create=False)
    metadata.create_all(by_models)
    assert schema_of(engine) == schema_of(by_models)
    assert len(schema_of(engine)) > 100
    by_models.dispose()


def test_up_down_and_up_again_gives_the_same_schema(engine):
    db.upgrade(engine)
    before = schema_of(engine)
    downgrade(engine, "base")
    assert schema_of(engine) == []
    db.upgrade(engine)
    assert schema_of(engine) == before


def settings_of(engine: Engine) -> dict[str, list[str]]:
    """The storage parameters of the tables that have any."""
    sql = "SELECT relname, reloptions FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace "
    return dict(select(engine, sql + "AND reloptions IS NOT NULL ORDER BY relname"))


def test_the_tables_that_change_most_are_vacuumed_in_time_also_if_they_are_older(url, engine):
    db.upgrade(engine, "0008")
    assert settings_of(engine) == {}
    assert db.migrate(url) == db.Migrated(True)
    sooner = [f"autovacuum_{name}" for name in ("vacuum_scale_factor=0.05", "analyze_scale_factor=0.05")]
    settings = [*sooner, "autovacuum_vacuum_cost_delay=0"]
    assert settings_of(engine) == dict.fromkeys(["jobs", "leases", "tallies", "workers"], settings)
    downgrade(engine, "0008")
    assert settings_of(engine) == {}


def test_an_older_database_is_upgraded_with_its_rows(url, tmp_path, monkeypatch):
    engine = db.connect(url)
    fill(engine, tmp_path / "set", 12)
    before = select(engine, "SELECT * FROM jobs ORDER BY id")
    engine.dispose()
    folder = tmp_path / "migrations"
    shutil.copytree(ROOT / "migrations", folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "versions" / "9999_the_next.py").write_text(
        "import sqlalchemy as sa\nfrom alembic import op\nrevision = '9999'\n"
        f"down_revision = '{SCHEMA}'\n"
        "def upgrade():\n    op.add_column('jobs', sa.Column('priority', sa.Integer()))\n"
    )
    monkeypatch.setattr(db, "migrations_dir", lambda: folder)
    monkeypatch.setattr(db, "SCHEMA", "9999")
    with pytest.raises(DatabaseError, match="needs 9999"):
        db.connect(url)
    assert db.migrate(url) == db.Migrated(True)
    assert db.migrate(url) == db.Migrated(False)
    engine = db.connect(url)
    assert select(engine, "SELECT * FROM jobs ORDER BY id") == [(*row, None) for row in before]
    engine.dispose()


def test_somebody_elses_database_is_refused(url, engine):
    with db.transaction(engine, write=True) as conn:
        db.execute(conn, "CREATE TABLE patients (id integer)")
    with pytest.raises(DatabaseError, match=r"contains other tables \(patients\) and is not a rococap database"):
        db.connect(url)


def test_the_first_release_is_upgraded_with_its_rows(url, engine):
    db.upgrade(engine, "0001")
    with db.transaction(engine, write=True) as conn:
        sql = "INSERT INTO workers (uuid, host, pid, device, engine, versions, started_at, seen_at) "
        db.execute(conn, sql + "VALUES ('aa', 'host', 1, 'cpu', 'small', '{}', 5, 5)")
    before = select(engine, "SELECT * FROM workers")
    with pytest.raises(DatabaseError, match=f"has schema 0001; this version of rococap needs {SCHEMA}"):
        db.connect(url)
    assert db.migrate(url) == db.Migrated(True)
    assert select(engine, "SELECT * FROM workers") == [(*row, None, 120_000) for row in before]
    db.connect(url).dispose()


# --- encodings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1", "WIN1252", "EUC_JP"])
@pytest.mark.parametrize("create", [True, False])
def test_a_database_whose_encoding_cannot_hold_captions_is_refused_with_the_command_that_makes_another(
    postgres, encoding, create
):
    url = postgres.create(more=of_encoding(encoding))
    with pytest.raises(DatabaseError) as error:
        select(db.connect(url, create=create), "SELECT 1")
    told = str(error.value)
    assert f"has the encoding {encoding}" in told
    assert "createdb --encoding=UTF8 --template=template0 " in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_the_command_that_a_refused_encoding_is_answered_with_makes_a_database_that_opens(postgres, encoding):
    url = postgres.create(more=of_encoding(encoding))
    with pytest.raises(DatabaseError) as error:
        db.connect(url)
    command = str(error.value).partition("name it with --db: ")[2]
    name = f"made_for_{encoding.lower()}"
    postgres.command(*shlex.split(command.replace("NAME", name)))
    db.connect(make_url(url).set(database=name).render_as_string(False)).dispose()


def test_a_refused_encoding_leaves_the_database_empty_and_no_connection_open(postgres):
    url = postgres.create(more=of_encoding("SQL_ASCII"))
    with pytest.raises(DatabaseError):
        db.connect(url)
    with psycopg.connect(make_url(url).set(drivername="postgresql").render_as_string(False)) as outsider:
        assert outsider.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone() == (0,)
    until_connected(url, 1, "this one is alone, once the server has noticed")


@pytest.mark.parametrize("told", ["client_encoding=LATIN1", "options=-c client_encoding=LATIN1"])
def test_what_a_client_is_told_of_encodings_does_not_keep_captions_from_being_stored(url, monkeypatch, told):
    monkeypatch.setenv("PGCLIENTENCODING", "SQL_ASCII")
    engine = db.connect(f"{url}&{told}")
    name = "ödem, 肺炎, 🫁"
    with db.transaction(engine, write=True) as conn:
        db.execute(conn, "INSERT INTO datasets (name, revision) VALUES (?, '')", (name,))
    assert select(engine, "SELECT name, octet_length(name) FROM datasets") == [(name, len(name.encode()))]
    engine.dispose()


# --- connections -----------------------------------------------------------------------------------------------


def until_connected(url: str, n: int, what: str) -> None:
    """Until the database has so many connections, the one to look among them. Autovacuum's may come at any time."""
    mine = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend'"
    )
    with outside(url, autocommit=True) as outsider:
        until(lambda: outsider.execute(mine).fetchone() == (n,), what)


def test_a_server_that_is_not_there_is_named_without_the_password():
    with pytest.raises(DatabaseUnavailable) as error:
        db.connect("postgresql://me:secret@127.0.0.1:9/queue")
    assert "postgresql+psycopg://me:***@127.0.0.1:9/queue cannot be reached" in str(error.value)
    assert "Start the server, or check the URL's host" in str(error.value)


def test_a_reader_cannot_write(engine):
    db.upgrade(engine)
    with pytest.raises(Exception, match="read-only transaction"), db.transaction(engine) as conn:
        db.execute(conn, "DELETE FROM jobs")


def test_a_connection_that_breaks_in_a_transaction_leaves_nothing_and_the_next_one_works(engine):
    db.upgrade(engine)

    def broken() -> None:
        with db.transaction(engine, write=True) as conn:
            db.execute(conn, "INSERT INTO datasets (name, revision) VALUES ('half', '')")
            pid = db.execute(conn, "SELECT pg_backend_pid()").scalar_one()
            with db.transaction(engine, write=True) as other:
                db.execute(other, "SELECT pg_terminate_backend(?)", (pid,))
            db.execute(conn, "SELECT 1")

    with pytest.raises(DatabaseUnavailable):
        broken()
    assert select(engine, "SELECT * FROM datasets") == []


def test_who_waits_too_long_for_a_row_is_told_so_and_can_go_on(url):
    engine = db.connect(url)
    wait_too_long_for_a_row(engine)
    engine.dispose()


def test_threads_share_two_connections_and_none_waits_for_ever(url, monkeypatch):
    monkeypatch.setattr(db, "CONNECTION_PATIENCE_SEC", 0.2)
    engine = db.connect(url)
    with db.transaction(engine), db.transaction(engine):
        with (
            pytest.raises(DatabaseUnavailable, match="became free within 0 s, because other threads"),
            db.transaction(engine),
        ):
            pass
        until_connected(url, 2 + 1, "no others, once the server has noticed the end of earlier ones")
    with db.transaction(engine):
        pass
    engine.dispose()


def test_a_worker_whose_threads_wait_for_the_same_tables_has_two_connections(url, tmp_path):
    database = db.connect(url)
    fill(database, tmp_path / "set", 40)
    process = start(url, engine={"step_sec": 0.5}, batch_size=4, lease_ttl=2.0)
    until(lambda: statuses(database).get("done", 0) > 0, "a first caption")
    with lock_tables(url, "LOCK TABLE leases, jobs IN ACCESS EXCLUSIVE MODE"):
        time.sleep(3)  # the worker claims, stores and beats meanwhile
        until_connected(url, 2 + 3, "the worker's two, and this test's own three")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert json.loads(out)["done"] == 40
    database.dispose()


def test_options_of_the_url_win_over_ours(url):
    engine = db.connect(f"{url}&options=-c idle_in_transaction_session_timeout=123s")
    assert select(engine, "SHOW idle_in_transaction_session_timeout") == [("123s",)]
    engine.dispose()


def test_options_from_the_environment_win_over_ours(url, monkeypatch):
    monkeypatch.setenv("PGOPTIONS", "-c idle_in_transaction_session_timeout=123s -c work_mem=77MB")
    engine = db.connect(url)
    assert select(engine, "SHOW idle_in_transaction_session_timeout") == [("123s",)]
    assert select(engine, "SHOW work_mem") == [("77MB",)]
    engine.dispose()


def test_options_of_libpq_in_the_url_reach_it_as_they_are(url):
    engine = db.connect(f"{url}&application_name=night shift&sslmode=prefer&target_session_attrs=read-write")
    assert select(engine, "SHOW application_name") == [("night shift",)]
    engine.dispose()
    with pytest.raises(DatabaseUnavailable, match="session is not read-only"):
        db.connect(f"{url}&target_session_attrs=read-only")


@pytest.mark.parametrize(
    ("hosts", "options"),
    [
        ("", "?host=/nowhere,{folder}"),
        ("", "?host=/nowhere:5432&host={folder}:5432"),
        ("%2Fnowhere,{quoted}", ""),
        ("%2Fnowhere:5432,{quoted}:5432", "?target_session_attrs=any"),
        ("127.0.0.1:1,[::1]:1,{quoted}", "?connect_timeout=5"),
        ("{quoted}", ""),
    ],
)
def test_a_url_of_several_hosts_or_a_socket_written_as_libpq_takes_it_opens_the_one_that_is_there(
    postgres, url, hosts, options
):
    folder = postgres.socket_folder
    template = f"postgresql://postgres@{hosts}/{make_url(url).database}{options}"
    engine = db.connect(template.format(folder=folder, quoted=folder.replace("/", "%2F")))
    assert select(engine, "SELECT current_database()") == [(make_url(url).database,)]
    engine.dispose()
    db.connect(engine.url.render_as_string(hide_password=False)).dispose()  # as messages show it


def test_several_hosts_reach_the_driver_with_their_ports_user_and_password():
    engine = db.connect("postgres://me:p,ss@one:1,[::1]:2,three/queue?sslmode=require", create=False)
    expected = {
        "host": "one,::1,three",
        "port": "1,2,",
        "user": "me",
        "password": "p,ss",
        "dbname": "queue",
        "sslmode": "require",
    }
    assert expected.items() <= engine.dialect.create_connect_args(engine.url)[1].items()


def test_a_transaction_that_the_server_ended_since_it_idled_is_an_outage(url):
    engine = db.connect(url)

    def frozen() -> None:
        with db.transaction(engine, write=True) as conn:
            db.execute(conn, "SET idle_in_transaction_session_timeout = '200ms'")  # else connecting might take as long
            until_connected(url, 1, "the server has ended it")
            db.execute(conn, "SELECT 1")

    with pytest.raises(DatabaseUnavailable):
        frozen()
    assert select(engine, "SELECT 1") == [(1,)]
    engine.dispose()


def test_two_claims_at_once_pass_each_other_by(url, tmp_path):
    engine = db.connect(url)
    run = fill(engine, tmp_path / "set", 8)
    with db.transaction(engine, write=True) as one, db.transaction(engine, write=True) as two:
        claims = [queue.claim(conn, worker, run.id, "train", 4, ttl_ms=9) for conn, worker in workers(one, two)]
    assert [[job.id for job in lease.jobs] for lease in claims] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    engine.dispose()


def test_what_every_heartbeat_and_every_group_of_captions_updates_is_in_no_index(url, tmp_path):
    """Each of these updates would add to every index of its table, and be left for vacuum."""
    engine = db.connect(url)
    run = fill(engine, tmp_path / "set", 4)
    with db.transaction(engine, write=True) as conn:
        ((_, worker),) = workers(conn)
        lease = queue.claim(conn, worker, run.id, "train", 4, ttl_ms=60_000)
    told = queue.Telemetry(60.0, 2.5, 80.0, 0.9, 0.95, 1.0, 4, 800.0)
    hot = "SELECT pg_stat_get_xact_tuples_updated(?::regclass), pg_stat_get_xact_tuples_hot_updated(?::regclass)"
    with db.transaction(engine, write=True) as conn:
        queue.complete(conn, lease, [Completion(job.id, "A caption.") for job in lease.jobs[:2]])
        queue.heartbeat(conn, worker, [], ttl_ms=60_000, store_ms={lease.id: 5.0}, telemetry=told)
        updates = {name: tuple(db.execute(conn, hot, (name, name)).one()) for name in ("workers", "leases", "tallies")}
    assert updates == {"workers": (2, 2), "leases": (2, 2), "tallies": (1, 1)}
    engine.dispose()


def workers(*connections):
    for number, conn in enumerate(connections):
        yield conn, queue.register_worker(conn, f"worker {number}", "host", 1, INFO)


def test_what_a_claim_in_progress_took_is_not_cancelled_under_it(url, tmp_path):
    engine = db.connect(url)
    run = fill(engine, tmp_path / "set", 4)
    cancelled = []

    def cancel() -> None:
        with db.transaction(engine, write=True) as conn:
            cancelled.append(queue.cancel(conn, run))

    thread = threading.Thread(target=cancel)
    with db.transaction(engine, write=True) as conn:
        ((_, worker),) = workers(conn)
        lease = queue.claim(conn, worker, run.id, "train", 2, ttl_ms=60_000)
        thread.start()
        thread.join(0.5)
        assert thread.is_alive(), "cancel did not wait for the claim"
    thread.join(60)
    assert cancelled == [4]
    assert select(engine, "SELECT DISTINCT status FROM jobs") == [("cancelled",)]
    assert select(engine, f"SELECT state FROM leases WHERE id = {lease.id}") == [("closed",)]
    engine.dispose()


def test_a_heartbeat_and_a_complete_of_one_worker_do_not_wait_for_each_other(url, tmp_path):
    engine, other = db.connect(url), db.connect(url)
    run = fill(engine, tmp_path / "set", 2)
    with db.transaction(engine, write=True) as conn:
        ((_, worker),) = workers(conn)
        lease = queue.claim(conn, worker, run.id, "train", 2, ttl_ms=60_000)
    is_holding, is_beating = threading.Event(), threading.Event()

    def pause(conn: Connection, cursor: object, statement: str, *rest: object) -> None:
        if statement.startswith("UPDATE leases SET n_done"):
            is_holding.set()
            is_beating.wait(1)
        elif statement.startswith("UPDATE workers SET seen_at"):
            is_beating.set()
            is_holding.wait(1)

    def beat() -> set[int]:
        with db.transaction(other, write=True) as conn:
            return queue.heartbeat(conn, worker, [lease.id], ttl_ms=60_000)

    for one in (engine, other):
        event.listen(one, "after_cursor_execute", pause)
    with ThreadPoolExecutor(1) as pool:
        beating = pool.submit(beat)
        with db.transaction(engine, write=True) as conn:
            queue.complete(conn, lease, [Completion(job.id, "A caption.") for job in lease.jobs])
        beating.result(timeout=30)  # a deadlock would have made one of them raise
    engine.dispose()
    other.dispose()


def test_every_transaction_changes_the_tallies_last(url, tmp_path):
    """All workers change the same rows: what came after would hold them up."""
    engine = db.connect(url)
    run = fill(engine, tmp_path / "set", 8)
    with db.transaction(engine, write=True) as conn:
        ((_, worker),) = workers(conn)
    writes: list[str] = []

    def note(conn: Connection, cursor: object, statement: str, *rest: object) -> None:
        if statement.startswith(("INSERT", "UPDATE", "DELETE")):
            writes.append(statement)

    event.listen(engine, "after_cursor_execute", note)

    def last_change(*actions: Callable[[Connection], object]) -> list[object]:
        made = []
        for action in actions:
            with db.transaction(engine, write=True) as conn:
                made.append(action(conn))
            n_tallies = sum("INTO tallies" in write for write in writes)
            assert n_tallies > 0
            assert all("INTO tallies" in write for write in writes[-n_tallies:])
            writes.clear()
        return made

    (lease,) = last_change(lambda conn: queue.claim(conn, worker, run.id, "train", 8, ttl_ms=60_000))
    jobs = [job.id for job in lease.jobs]
    last_change(
        lambda conn: queue.complete(conn, lease, [Completion(job, "A caption.") for job in jobs[:2]]),
        lambda conn: queue.fail(conn, lease, {jobs[2]: Failure("truncated", "It ends early.")}),
        lambda conn: queue.release(conn, lease, jobs[3:5]),
        lambda conn: queue.crash(conn, lease.id),
        lambda conn: queue.retry(conn, run),
        lambda conn: queue.cancel(conn, run),
    )
    engine.dispose()


def test_a_goodbye_locks_leases_in_order_also_those_that_have_ended(url, tmp_path):
    engine, other = db.connect(url), db.connect(url)
    run = fill(engine, tmp_path / "set", 2)
    with db.transaction(engine, write=True) as conn:
        ((_, worker),) = workers(conn)
        ended, forgotten = (queue.claim(conn, worker, run.id, "train", 1, ttl_ms=60_000) for _ in range(2))
        queue.complete(conn, ended, [Completion(ended.jobs[0].id, "A caption.")])

    def say_goodbye() -> None:
        with db.transaction(other, write=True) as conn:
            queue.lock_leases(conn, worker, [ended.id])
            queue.release_forgotten(conn, worker, set())
            queue.stop_worker(conn, worker, store_ms={ended.id: 5.0})

    with ThreadPoolExecutor(1) as pool:
        with db.transaction(engine, write=True) as conn:
            db.execute(conn, "SELECT id FROM leases WHERE id = ? FOR UPDATE", (ended.id,))
            leaving = pool.submit(say_goodbye)
            time.sleep(0.3)
            db.execute(conn, "SELECT id FROM leases WHERE id = ? FOR UPDATE", (forgotten.id,))
        leaving.result(timeout=30)  # a deadlock would have made one of them raise
    assert select(engine, "SELECT state, store_ms FROM leases ORDER BY id") == [("closed", 5.0), ("released", 0.0)]
    engine.dispose()
    other.dispose()


def test_cancel_misses_nothing_that_is_given_back_meanwhile(url, tmp_path):
    engine, other = db.connect(url), db.connect(url)
    run = fill(engine, tmp_path / "set", 20)
    with db.transaction(engine, write=True) as conn:
        ((_, worker),) = workers(conn)
        lease = queue.claim(conn, worker, run.id, "train", 2, ttl_ms=60_000)
    has_looked, is_released = threading.Event(), threading.Event()

    def pause(conn: Connection, cursor: object, statement: str, *rest: object) -> None:
        if "j.status IN ('pending', 'waiting')" in statement:
            has_looked.set()
            is_released.wait(60)

    def cancel() -> int:
        with db.transaction(other, write=True) as conn:
            return queue.cancel(conn, run)

    event.listen(other, "after_cursor_execute", pause)
    with ThreadPoolExecutor(1) as pool:
        cancelling = pool.submit(cancel)
        assert has_looked.wait(60)
        with db.transaction(engine, write=True) as conn:
            queue.release(conn, lease, [job.id for job in lease.jobs])
        is_released.set()
        assert cancelling.result(timeout=30) == 20
    assert select(engine, "SELECT DISTINCT status FROM jobs") == [("cancelled",)]
    engine.dispose()
    other.dispose()
