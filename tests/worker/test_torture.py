"""Workers that are killed, frozen and cut off from their database: no caption is lost, doubled or another picture's.

Real processes with the small engine. What happens is a function over a world, a queue with its crew; `make test` has
a short size of each, on SQLite and PostgreSQL at once since most of it is waiting, and the mark `torture` the full one.
"""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from nursery import Worker
from postgres import Server, lock_tables
from small_engine import INFO, caption_of
from sqlalchemy import Engine, event
from sqlalchemy.engine import make_url
from steps import until
from worlds import TTL_SEC, Crew, World, check, check_books, kill_one, killed_at_any_moment, made

from rococap import db, queue
from rococap.engines import Completion

torture = pytest.mark.torture
both = pytest.mark.parametrize("url", ["delete", "postgresql"], indirect=True)


# --- Worlds ----------------------------------------------------------------------------------------------------


@pytest.fixture
def world(url: str, tmp_path: Path) -> Iterator[World]:
    with made(url, tmp_path) as world:
        yield world


@pytest.fixture
def worlds(url: str, postgres: Server, tmp_path: Path) -> Iterator[list[World]]:
    """One on SQLite and one on PostgreSQL."""
    with (
        made(url, tmp_path / "sqlite") as on_sqlite,
        made(postgres.create(template="empty_queue"), tmp_path / "postgresql") as on_postgresql,
    ):
        yield [on_sqlite, on_postgresql]


def at_once(worlds: Sequence[World], happen: Callable[..., None], **options) -> None:
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(happen, world, **options) for world in worlds]
    if errors := [error for run in runs if (error := run.exception())]:
        raise errors[0] if len(errors) == 1 else ExceptionGroup("on both databases", errors)


def impatient(url: str, **settings: str) -> str:
    """With these settings of PostgreSQL instead of the default."""
    if url.startswith("sqlite"):
        return url
    told = " ".join(f"-c {name}={value}" for name, value in settings.items())
    return make_url(url).update_query_dict({"options": told}).render_as_string(False)


# --- What must hold --------------------------------------------------------------------------------------------


# --- Killed at random ------------------------------------------------------------------------------------------


def test_workers_killed_at_any_moment_lose_and_double_nothing(worlds):
    at_once(worlds, killed_at_any_moment, n=240, seed=1, kills=6)


@torture
@pytest.mark.parametrize(
    ("url", "seed"),
    [*(("delete", seed) for seed in (2, 3, 4)), *(("postgresql", seed) for seed in (5, 6, 7)), ("wal", 8)],
    indirect=["url"],
)
def test_workers_killed_by_the_hundred_lose_and_double_nothing(world, seed):
    killed_at_any_moment(world, 2_000, seed, kills=50)


# --- At each statement -----------------------------------------------------------------------------------------


def statements(database: Engine, act: Callable) -> list[str]:
    """What a writing transaction executes, from BEGIN to COMMIT."""
    seen: list[str] = []

    def note(_conn, _cursor, statement, *_):
        seen.append(statement)

    event.listen(database, "before_cursor_execute", note)
    with db.transaction(database, write=True) as conn:
        act(conn)
    event.remove(database, "before_cursor_execute", note)
    return seen[next(n for n, statement in enumerate(seen) if statement.startswith("BEGIN")) :]


def of_claim_and_complete(database: Engine) -> dict[str, list[str]]:
    """Their statements, by the thread of a worker that executes them; four pictures are done."""
    with db.transaction(database, write=True) as conn:
        run = queue.get_run(conn, "default")
        worker = queue.register_worker(conn, "a" * 32, "host", 1, INFO)
    taken: list[queue.Lease] = []

    def claim(conn):
        taken.append(queue.claim(conn, worker, run.id, "train", 4, ttl_ms=60_000))

    def complete(conn):
        queue.complete(conn, taken[0], [Completion(job.id, caption_of(job.id - 1)) for job in taken[0].jobs])

    return {"fetcher": statements(database, claim), "store": statements(database, complete)}


def at_each(of: dict[str, list[str]], do: str) -> list[dict]:
    """Troubles before each statement of these transactions, and after COMMIT."""
    return [
        {"thread": thread, "nth": nth, "do": do, "first": of[thread][1][:11], "after": after}
        for thread in of
        for nth, statement in enumerate(of[thread])
        for after in ((False, True) if statement == "COMMIT" else (False,))
    ]


def as_told(of: dict[str, list[str]], do: str) -> list[str]:
    """What workers tell that met these troubles."""
    when = {False: "before", True: "after"}
    return [
        f"trouble: {do} {when[one['after']]} {of[one['thread']][one['nth']].partition(';')[0]}"
        for one in at_each(of, do)
    ]


def troubles_told(crew: Crew) -> list[str]:
    return [line for worker in crew.ended for line in worker.told().splitlines() if line.startswith("trouble: ")]


def killed_at_each_statement(world: World) -> None:
    n, crew = 200, world.crew
    world.fill(n)
    of = of_claim_and_complete(world.database)
    for trouble in at_each(of, "kill"):
        until(lambda: crew.n_running() < 2, "one more was killed")
        crew.start(troubles=[trouble])
    until(lambda: crew.n_running() == 0, "all were killed")
    check_books(world)
    assert {worker.returncode for worker in crew.ended} == {-signal.SIGKILL}
    assert sorted(troubles_told(crew)) == sorted(as_told(of, "kill"))
    for _ in range(2):
        crew.start()
    crew.finish_all()
    check(world, n)


def test_a_worker_killed_at_any_statement_of_claim_or_complete_leaves_all_or_nothing(worlds):
    at_once(worlds, killed_at_each_statement)


def errors_at_each_statement(world: World) -> None:
    n = 320
    world.fill(n)
    of = of_claim_and_complete(world.database)
    kinds = ["error"] if world.database.dialect.name == "sqlite" else ["error", "drop"]
    worker = world.crew.start(troubles=[trouble for do in kinds for trouble in at_each(of, do)])
    outcome = world.crew.finish(worker)
    assert sorted(troubles_told(world.crew)) == sorted(told for do in kinds for told in as_told(of, do))
    assert (outcome["done"], outcome["lost"], outcome["spooled"]) == (n - 4, 0, 0)
    assert not world.crew.spool.exists()
    check(world, n, charged=False)


def test_an_error_at_any_statement_of_claim_or_complete_costs_nothing(worlds):
    """Also where the commit succeeded and its answer was lost: then it is recognised."""
    at_once(worlds, errors_at_each_statement)


@torture
@both
@pytest.mark.parametrize("seed", range(1, 7))
def test_errors_at_random_statements_of_every_thread_cost_nothing(world, seed):
    n = 400
    world.fill(n)
    for worker in range(2):
        world.crew.start(flaky=[10 * seed + worker, 0.03])
    outcomes = world.crew.finish_all(120)
    assert len(troubles_told(world.crew)) > 20
    assert (sum(one["done"] for one in outcomes), sum(one["lost"] for one in outcomes)) == (n, 0)
    check(world, n, charged=False)


# --- Locked, full, moved away ----------------------------------------------------------------------------------


@contextmanager
def locked(url: str, sql: str = "") -> Iterator[None]:
    """Somebody holds SQLite's write lock, or PostgreSQL's on the jobs."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(make_url(url).database, isolation_level=None, timeout=30)) as outsider:
            outsider.execute(sql or "BEGIN IMMEDIATE")
            yield
            outsider.execute("ROLLBACK")
    else:
        with lock_tables(url, sql or "LOCK TABLE jobs"):
            yield


def locked_for(world: World, seconds: float, sql: str = "") -> None:
    n = 80
    world.fill(n)
    for _ in range(2):
        world.crew.start(engine={"step_sec": 0.3})
    world.until_busy()
    with locked(world.url, sql):
        time.sleep(seconds)
        assert world.all_live()
        assert world.n_spooled() > 0
    outcomes = world.crew.finish_all()
    assert sum(one["done"] for one in outcomes) == n
    assert not world.crew.spool.exists()
    check(world, n, charged=False)


def test_a_database_locked_by_another_for_longer_than_a_lease_costs_nothing(worlds):
    for world in worlds:
        world.crew.url = impatient(world.url, lock_timeout="1s")  # else it waits for ten
        world.crew.constants = world.crew.constants | {"rococap.worker.store.STORE_PATIENCE_SEC": 1.0}
    at_once(worlds, locked_for, seconds=2 * TTL_SEC)


@torture
@pytest.mark.parametrize(
    ("url", "sql"),
    [
        ("delete", "BEGIN IMMEDIATE"),
        ("delete", "BEGIN EXCLUSIVE"),
        ("wal", "BEGIN IMMEDIATE"),
        ("postgresql", "LOCK TABLE jobs"),
        ("postgresql", "LOCK TABLE leases"),
        ("postgresql", "LOCK TABLE workers, leases, jobs, captions, tallies"),
    ],
    indirect=["url"],
)
def test_a_database_locked_for_longer_than_anyone_waits_costs_nothing(world, sql):
    locked_for(world, db.PATIENCE_SEC + 10, sql)


def test_a_disk_that_is_full_for_a_while_costs_nothing(world):
    n, full = 400, world.folder / "full"
    world.fill(n)
    workers = [world.crew.start(engine={"step_sec": 0.02}, full_while=str(full)) for _ in range(2)]
    world.until_busy()
    full.touch()
    until(lambda: all("the disk is full" in worker.told() for worker in workers), "no space for captions")
    until(lambda: world.n_spooled() > 0, "captions in the spool")
    time.sleep(1.5 * TTL_SEC)
    assert world.all_live()
    full.unlink()
    outcomes = world.crew.finish_all()
    assert sum(one["done"] for one in outcomes) == n
    assert not world.crew.spool.exists()
    check(world, n, charged=False)


@contextmanager
def mounted(folder: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill_up(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            return


@torture
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount; the test above needs no privilege")
@pytest.mark.parametrize("spools_there", [True, False])
def test_a_file_system_that_is_full_for_a_while_costs_nothing(empty_queue, tmp_path, spools_there):
    n = 400
    with (
        mounted(tmp_path / "disk") as disk,
        made(f"sqlite:///{shutil.copy(empty_queue, disk / 'queue.db')}", tmp_path / "world") as world,
    ):
        if spools_there:
            world.crew.spool = disk / "spool"
        world.fill(n)
        workers = [world.crew.start(engine={"step_sec": 0.02}) for _ in range(2)]
        world.until_busy()
        fill_up(disk / "filler")
        until(lambda: all("the disk is full" in worker.told() for worker in workers), "no space")
        if spools_there:
            until(lambda: any("cannot be written to" in worker.told() for worker in workers), "none to spool")
        else:
            until(lambda: world.n_spooled() > 0, "captions in the spool")
        time.sleep(2 * TTL_SEC)
        assert world.all_live()
        (disk / "filler").unlink()
        outcomes = world.crew.finish_all()
        assert sum(one["done"] for one in outcomes) == n
        assert not world.crew.spool.exists()
        check(world, n, charged=False)


def test_a_file_that_is_moved_away_and_back_costs_nothing(world):
    n = 240
    world.fill(n)
    path, elsewhere = Path(make_url(world.url).database), world.folder / "elsewhere.db"
    for _ in range(2):
        world.crew.start(engine={"step_sec": 0.05})
    world.until_busy()
    path.rename(elsewhere)
    until(lambda: world.n_spooled() > 0, "captions in the spool")
    back_at = time.monotonic() + 1.5 * TTL_SEC
    while time.monotonic() < back_at:
        assert not path.exists(), "an empty file was made at the old place"
        time.sleep(0.01)
    assert world.all_live()
    elsewhere.rename(path)
    outcomes = world.crew.finish_all()
    assert sum(one["done"] for one in outcomes) == n
    assert not world.crew.spool.exists()
    check(world, n, charged=False)


# --- A server that goes ----------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[Server]:
    """A server of the test's own, on which a commit is safe when the server dies."""
    server = Server(is_durable=True)
    yield server
    server.stop()


@pytest.mark.parametrize(("rounds", "away_sec"), [(1, 2 * TTL_SEC), pytest.param(6, 20.0, marks=torture)])
def test_a_server_that_restarts_and_stops_costs_nothing(server, tmp_path, rounds, away_sec):
    n = 40 + 120 * rounds
    with made(server.create("queue"), tmp_path / "world") as world:
        world.fill(n)
        for _ in range(2):
            world.crew.start(engine={"step_sec": 0.1})
        for _ in range(rounds):
            world.until_busy(12)
            server.control("restart", "-m", "immediate")
            world.until_busy(12)
            server.control("stop", "-m", "immediate")
            time.sleep(away_sec)
            assert world.all_live()
            assert world.n_spooled() > 0
            server.control("start", "-o", f'-h "" -k {make_url(world.url).query["host"]}')
        outcomes = world.crew.finish_all(120)
        assert sum(one["done"] for one in outcomes) == n
        assert not world.crew.spool.exists()
        check(world, n, charged=False)


# --- Frozen ----------------------------------------------------------------------------------------------------


def freeze(world: World, worker: Worker) -> None:
    """SIGSTOP, outside of its transactions: one that is frozen inside holds locks."""
    while True:
        worker.send_signal(signal.SIGSTOP)
        time.sleep(0.02)
        if not is_in_transaction(world):
            return
        worker.send_signal(signal.SIGCONT)
        time.sleep(0.05)


def is_in_transaction(world: World) -> bool:
    """Whether somebody is."""
    if world.database.dialect.name == "postgresql":
        sql = (
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE datname = current_database() AND state <> 'idle' AND pid <> pg_backend_pid()"
        )
        return world.select(sql) != [(0,)]
    with closing(sqlite3.connect(make_url(world.url).database, isolation_level=None, timeout=0.2)) as connection:
        try:
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError:
            return True
        connection.execute("ROLLBACK")
        return False


def frozen_beyond_its_lease(world: World) -> None:
    n = 40
    world.fill(n)
    stale = world.crew.start(engine={"step_sec": 1.0, "adds": ", says the stale one"})
    until(lambda: world.statuses().get("leased", 0) == 8, "a batch that runs and a claim ahead")
    freeze(world, stale)
    assert world.n_done() == 0
    other = world.crew.start()
    until(lambda: world.n_done() == n, "all is done by the other")
    before = world.as_stored()
    stale.send_signal(signal.SIGCONT)
    assert world.crew.finish(stale)["done"] == 0
    assert world.crew.finish(other)["done"] == n
    assert world.as_stored() == before
    assert not world.crew.spool.exists()
    check(world, n)


def test_a_worker_frozen_beyond_its_lease_stores_nothing_over_the_one_that_took_over(worlds):
    at_once(worlds, frozen_beyond_its_lease)


def frozen_inside_a_transaction(world: World, nth: int, **limits: float) -> None:
    """PostgreSQL ends its session, and others go on; on SQLite all wait until it goes on itself."""
    n = 8  # all of which it has claimed by then: in the middle of a claim, it would hold them up too
    world.fill(n)
    world.crew.constants |= {"rococap.worker.store.STORE_PATIENCE_SEC": 0.5}
    usual = world.crew.constants
    world.crew.constants = usual | {f"rococap.db.{name}": seconds for name, seconds in limits.items()}
    trouble = {"thread": "store", "nth": nth, "do": "stop", "first": "SELECT CAST"}
    stale = world.crew.start(engine={"step_sec": 1.0}, troubles=[trouble])
    until(lambda: "trouble" in stale.told(), "frozen inside complete")
    world.crew.constants = usual  # on a busy machine, a server may be silent for longer than the short limits
    other = world.crew.start()
    if world.url.startswith("sqlite"):
        time.sleep(3 * TTL_SEC)
        assert world.n_done() == 0
    else:
        until(lambda: world.n_done() == n, "all is done by the other")
    stale.send_signal(signal.SIGCONT)
    done = [world.crew.finish(worker)["done"] for worker in (stale, other)]
    assert sum(done) == n
    check(world, n, charged=world.url.startswith("postgresql"))


@pytest.mark.slow
@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
@pytest.mark.parametrize(
    ("nth", "limits"),
    [
        pytest.param(3, {"HURRIED_IDLE_SEC": 1, "SILENCE_SEC": 3600.0}, id="it idles"),
        pytest.param(4, {"HURRIED_IDLE_SEC": 3600, "SILENCE_SEC": 1.0}, id="it does not count as idle"),
    ],
)
def test_a_worker_frozen_inside_a_transaction_holds_up_no_other(world, nth, limits):
    """After `executemany`, a transaction does not count as idle: the driver flushes once more."""
    frozen_inside_a_transaction(world, nth, **limits)


@torture
@both
@pytest.mark.parametrize("nth", range(1, 9))  # the last is COMMIT
def test_a_worker_frozen_before_any_statement_of_a_transaction_costs_nothing(world, nth):
    frozen_inside_a_transaction(world, nth)


def asleep(world: World, times: int) -> None:
    n = 120 * times
    world.fill(n)
    chance = random.Random(times)
    workers = [world.crew.start(engine={"step_sec": 0.15}) for _ in range(2)]
    for _ in range(times):
        world.until_busy()
        time.sleep(chance.uniform(0, 0.5))
        for worker in workers:
            worker.send_signal(signal.SIGSTOP)
        time.sleep(1.5 * TTL_SEC)
        for worker in workers:
            worker.send_signal(signal.SIGCONT)
            time.sleep(chance.uniform(0, 0.2))
    outcomes = world.crew.finish_all()
    assert sum(one["done"] for one in outcomes) == n
    check(world, n, charged=False)


def test_a_machine_that_sleeps_beyond_all_leases_costs_nothing(worlds):
    at_once(worlds, asleep, times=1)


@torture
@both
def test_a_machine_that_sleeps_again_and_again_costs_nothing(world):
    asleep(world, times=6)


# --- Pictures that kill ----------------------------------------------------------------------------------------


def captioned_with_killers(world: World, n: int, killers: Sequence[int], kills: int = 0) -> None:
    world.fill(n)
    crew, chance = world.crew, random.Random(kills)
    options = {"engine": {"kills_on": killers, "step_sec": 0.3 if kills else 0.0}}
    for _ in range(2):
        crew.start(**options)
    for _ in range(kills):
        if chance.random() < 0.1:
            time.sleep(2 * TTL_SEC)  # some live long enough to reap others
        respawn(crew, **options)
        kill_one(world, chance, **options)
    assert all(worker.returncode == -signal.SIGKILL for worker in crew.ended), "all was done too early"
    options["engine"]["step_sec"] = 0.0
    crew.start(**options)
    while crew.running:
        respawn(crew, **options)
        time.sleep(0.02)
    check(world, n, killers=killers)


def respawn(crew: Crew, **options) -> None:
    """Another in the place of each that was killed; those that ended well are gone."""
    for worker in list(crew.running):
        code = worker.poll()  # once: it may be killed between two looks
        if code == -signal.SIGKILL:
            crew.dismiss(worker)
            crew.start(**options)
        elif code is not None:
            crew.finish(worker)


def test_a_picture_that_kills_its_worker_fails_alone(worlds):
    at_once(worlds, captioned_with_killers, n=200, killers=[17])


@torture
@both
@pytest.mark.parametrize(("killers", "kills"), [([777], 0), ([777, 778, 1500], 0), ([777], 40)])
def test_pictures_that_kill_their_worker_fail_alone_among_thousands(world, killers, kills):
    captioned_with_killers(world, 2_000, killers, kills)


# --- The spool of a worker that is gone ------------------------------------------------------------------------


def killed_with_a_spool(world: World) -> None:
    n, crew = 40, world.crew
    world.fill(n)
    crew.url = impatient(world.url, lock_timeout="500ms")
    crew.constants = crew.constants | {"rococap.worker.store.STORE_PATIENCE_SEC": 0.3}
    first = crew.start(engine={"step_sec": 0.1})
    world.until_busy(4)
    with locked(world.url):
        until(lambda: world.n_spooled() >= 4, "captions in the spool")
        crew.kill(first)
    left = world.n_spooled()
    (file,) = crew.spool.iterdir()
    whole = file.read_bytes()
    others = crew.spool / f"{'f' * 32}.jsonl"
    others.write_bytes(whole.replace(file.stem.encode(), others.stem.encode()).replace(b"grey", b"another's"))
    theirs = others.read_bytes()
    file.write_bytes(whole + whole[: whole.index(b"\n") // 2])  # cut off while it was written
    outcome = crew.finish(crew.start())
    assert outcome["recovered"] == left
    assert [path.name for path in crew.spool.iterdir()] == [others.name]
    assert others.read_bytes() == theirs
    check(world, n)


def test_captions_that_a_killed_worker_had_spooled_are_stored_once_by_the_next(worlds):
    """But not those of another database."""
    at_once(worlds, killed_with_a_spool)


def killed_before_it_could_look(world: World) -> None:
    n, crew = 40, world.crew
    world.fill(n)
    of = of_claim_and_complete(world.database)
    commit = {"thread": "store", "nth": len(of["store"]) - 1, "first": of["store"][1][:11]}
    worker = crew.start(troubles=[commit | {"do": "error", "after": True}, {"thread": "store", "nth": 0, "do": "kill"}])
    until(lambda: worker.poll() is not None, "killed before it could look")
    assert (world.n_done(), world.n_spooled()) == (8, 4)
    outcome = crew.finish(crew.start())
    assert outcome["recovered"] == 4
    assert not crew.spool.exists()
    check(world, n)


def test_captions_that_were_stored_and_spooled_since_the_answer_was_lost_are_recognised(worlds):
    at_once(worlds, killed_before_it_could_look)
