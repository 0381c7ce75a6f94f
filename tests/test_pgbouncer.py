"""PgBouncer in transaction mode in front of PostgreSQL: each transaction may get another connection to the server."""

import time
from collections.abc import Iterator

import pytest
from pgbouncer import PROGRAM, Bouncer, bouncing
from postgres import Server, of_encoding
from samples import caption, fill, texts
from small_engine import INFO
from sqlalchemy import Engine
from sqlalchemy.engine import make_url
from steps import at_once, select, until, wait_too_long_for_a_row
from worlds import TTL_SEC, check, killed_at_any_moment, made

from rococap import db, doctor, queue
from rococap.errors import DatabaseError, DatabaseUnavailable
from rococap.tables import SCHEMA
from rococap.transfer import merge

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="PgBouncer is not installed: apt-get install pgbouncer")


@pytest.fixture(scope="module")
def bouncer(postgres: Server) -> Iterator[Bouncer]:
    with bouncing(postgres) as bouncer:
        yield bouncer


@pytest.fixture
def url(postgres: Server, bouncer: Bouncer) -> str:
    """An empty database behind PgBouncer."""
    return bouncer.in_front_of(postgres.create())


def test_processes_that_first_use_a_database_at_once_make_its_schema_once(url):
    at_once(6, lambda: db.connect(url).dispose())
    engine = db.connect(url)
    assert select(engine, "SELECT version_num FROM alembic_version") == [(SCHEMA,)]
    engine.dispose()


def test_clients_that_repeat_the_same_statements_share_the_connections_of_the_server(url):
    engines = [db.connect(url) for _ in range(6)]
    waiting = iter(engines)

    def repeat() -> None:
        engine = next(waiting)
        for number in range(30):
            with db.transaction(engine, write=True) as conn:
                rows = [(f"{id(engine)}-{number}-{row}",) for row in range(3)]
                db.execute(conn, "INSERT INTO datasets (name, revision) VALUES (?, '')", rows)
                db.execute(conn, "SELECT id FROM datasets WHERE name = ?", rows[0]).one()

    at_once(6, repeat)
    assert select(engines[0], "SELECT count(*) FROM datasets") == [(6 * 30 * 3,)]
    for engine in engines:
        engine.dispose()


def test_statements_are_prepared_only_where_no_pooler_stands_before_the_server(postgres, bouncer):
    direct = postgres.create(template="empty_queue")
    for url, are_prepared in ((direct, True), (bouncer.in_front_of(direct), False)):
        engine = db.connect(url)
        for _ in range(8):
            select(engine, "SELECT count(*) FROM datasets")
        sql = "SELECT count(*) > 0 FROM pg_prepared_statements WHERE position('datasets' IN statement) > 0"
        assert select(engine, sql) == [(are_prepared,)]
        engine.dispose()


def test_the_settings_of_a_transaction_end_with_it(engine):
    sql = "SELECT current_setting('lock_timeout'), current_setting('idle_in_transaction_session_timeout')"
    with db.transaction(engine, patience=0.25) as conn:
        assert tuple(db.execute(conn, sql).one()) == ("250ms", "1min")
    with engine.connect() as conn:
        assert tuple(conn.exec_driver_sql(sql).one()) == ("0", "0")


def test_who_waits_too_long_for_a_row_is_told_so_and_can_go_on(engine):
    wait_too_long_for_a_row(engine)


def test_an_encoding_that_cannot_hold_captions_is_refused(postgres, bouncer):
    url = bouncer.in_front_of(postgres.create(more=of_encoding("LATIN1")))
    with pytest.raises(DatabaseError, match="has the encoding LATIN1"):
        db.connect(url)


def test_start_up_options_in_the_url_are_refused_in_one_line_that_says_to_leave_them_out(url):
    with pytest.raises(DatabaseError) as error:
        db.connect(f"{url}&options=-c statement_timeout=5s")
    told = str(error.value)
    assert "unsupported startup parameter: options" in told
    assert "Remove them from the URL" in told
    assert len(told.splitlines()) == 1


def test_doctor_finds_nothing_wrong_and_a_vacuum_is_done(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(engine, tmp_path / "set", 12)
    db.vacuum(engine)
    assert [check for check in doctor.examine(engine) if check.verdict is doctor.FAIL and check.name != "model"] == []


@pytest.mark.parametrize("template", ["empty_queue", "template0"])
def test_a_database_that_took_the_place_of_ours_behind_it_is_noticed_by_who_stays(postgres, bouncer, template):
    direct = postgres.create(template="empty_queue")
    engine = db.connect(bouncer.in_front_of(direct))
    with db.transaction(engine, write=True) as conn:
        worker = queue.register_worker(conn, "worker", "host", 1, INFO)
    db.stay(engine, "SELECT 1 FROM workers WHERE id = ?", (worker,))
    assert select(engine, "SELECT count(*) FROM workers") == [(1,)]
    postgres.drop(direct)
    postgres.create(make_url(direct).database, template=template)
    with pytest.raises(DatabaseError, match="is not the database that this process started with"):
        until(lambda: is_reached(engine), "a connection to the new one")
    engine.dispose()


def is_reached(engine: Engine) -> bool:
    try:
        return select(engine, "SELECT 1") == [(1,)]
    except DatabaseUnavailable:  # what PgBouncer says of a connection that the server ended
        return False


def test_workers_killed_at_any_moment_lose_and_double_nothing(url, tmp_path):
    with made(url, tmp_path / "world") as world:
        killed_at_any_moment(world, n=320, seed=2, kills=4)


def test_merges_behind_it_take_turns(url, tmp_path):
    part = db.connect(f"sqlite:///{tmp_path}/part.db")
    caption(part, fill(part, tmp_path / "set", 30), texts("A caption."))
    engines = [db.connect(url) for _ in range(3)]
    waiting = iter(engines)
    results = at_once(3, lambda: merge(next(waiting), part.url.database))
    assert sorted((result.pictures, result.merged, result.known) for result in results) == [(0, 0, 1)] * 2 + [
        (30, 1, 0)
    ]
    for engine in (part, *engines):
        engine.dispose()


@pytest.fixture
def server() -> Iterator[Server]:
    """A server of the test's own, on which a commit is safe when the server dies."""
    server = Server(is_durable=True)
    yield server
    server.stop()


def test_a_server_that_restarts_behind_it_costs_nothing(server, tmp_path):
    n = 160
    with bouncing(server) as bouncer, made(bouncer.in_front_of(server.create()), tmp_path / "world") as world:
        world.fill(n)
        for _ in range(2):
            world.crew.start(engine={"step_sec": 0.2})
        world.until_busy(12)
        server.control("stop", "-m", "immediate")
        time.sleep(2 * TTL_SEC)
        assert world.all_live()
        server.control("start", "-o", f'-h "" -k {server.socket_folder}')
        assert sum(one["done"] for one in world.crew.finish_all(120)) == n
        assert not world.crew.spool.exists()
        check(world, n, charged=False)
