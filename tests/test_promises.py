"""The thirteen promises of the README, each on SQLite with DELETE journal, SQLite with WAL, and PostgreSQL."""

import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager

import pandas as pd
import pytest
from postgres import lock_tables
from samples import fill, register, write_shard
from small_engine import INFO, QUICK, SmallEngine
from sqlalchemy import Engine
from steps import (
    TTL,
    captions,
    claim,
    column,
    expected,
    members,
    reap,
    run_worker,
    select,
    small_crew,
    start,
    statuses,
    until,
    writing,
)

from rococap import db, queue
from rococap.engines import Completion, Failure
from rococap.errors import LeaseLost, RococapError, RunError
from rococap.queue import Lease
from rococap.recipe import RULES, Recipe
from rococap.results import export, snapshot
from rococap.worker import process as process_module
from rococap.worker import signals, spool, store

pytestmark = pytest.mark.every_database


def register_worker(database: Engine, name: str = "one") -> int:
    with writing(database) as conn:
        return queue.register_worker(conn, name, "host", 1, INFO)


def complete(database: Engine, lease: Lease, text: str = "A caption.", only: Sequence[int] = ()) -> None:
    with writing(database) as conn:
        queue.complete(
            conn, lease, [Completion(job.id, text) for job in lease.jobs if not only or job.id in only], now=0
        )


def together(n: int, url: str, action: Callable[[Engine, int], None]) -> None:
    """Runs it in n threads at once, each with an engine of its own; raises what one of them raised."""
    errors = []

    def guarded(number: int) -> None:
        try:
            mine = db.connect(url)
            action(mine, number)
            mine.dispose()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]


def test_promise_01_an_image_is_registered_once_per_run_however_often_and_by_however_many(database, url, tmp_path):
    write_shard(tmp_path / "set", "train", range(200))
    results = []
    together(4, url, lambda mine, _: results.extend(register(mine, tmp_path / "set", ["train"])))
    results += register(database, tmp_path / "set", ["train"])
    assert sum(result.new for result in results) == 200
    assert [result.new + result.known for result in results] == [200] * 5
    assert sum(result.duplicates for result in results) == 0
    assert column(database, "SELECT count(*) FROM images") == [200]
    assert statuses(database) == {"pending": 200}


def test_promise_02_a_job_is_leased_to_one_worker_at_a_time_and_a_claim_is_one_transaction(database, url, tmp_path):
    run = fill(database, tmp_path / "set", 200)
    claimed: list[Lease] = []

    def claim_all(mine: Engine, number: int) -> None:
        worker_id = register_worker(mine, f"worker {number}")
        while lease := claim(mine, worker_id, run, 3):
            claimed.append(lease)

    together(4, url, claim_all)
    taken = [job.id for lease in claimed for job in lease.jobs]
    assert len(taken) == len(set(taken)) == 200

    write_shard(tmp_path / "set", "test", range(4))
    register(database, tmp_path / "set", ["test"])

    def claim_and_break() -> None:
        with writing(database) as conn:
            queue.claim(conn, 1, run.id, "test", 4, ttl_ms=TTL)
            raise RuntimeError("after the claim")

    with pytest.raises(RuntimeError, match="after the claim"):
        claim_and_break()
    assert statuses(database) == {"leased": 200, "pending": 4}
    assert column(database, "SELECT count(*) FROM leases") == [len(claimed)]


def test_promise_03_a_caption_and_its_done_are_one_transaction_and_a_lease_is_completed_in_parts(database, tmp_path):
    run = fill(database, tmp_path / "set", 8)
    lease = claim(database, register_worker(database), run)

    def complete_and_break() -> None:
        with writing(database) as conn:
            queue.complete(conn, lease, [Completion(job.id, "Never.") for job in lease.jobs])
            raise RuntimeError("before the commit")

    with pytest.raises(RuntimeError, match="before the commit"):
        complete_and_break()
    assert statuses(database) == {"leased": 4, "pending": 4}
    assert captions(database) == {}
    complete(database, lease, only=[2, 3])
    assert column(database, "SELECT job_id FROM captions ORDER BY job_id") == [2, 3]
    assert column(database, "SELECT id FROM jobs WHERE status = 'done' ORDER BY id") == [2, 3]
    assert column(database, "SELECT state FROM leases") == ["open"]
    complete(database, lease, only=[1, 4])
    assert column(database, "SELECT state FROM leases") == ["closed"]


def test_promise_04_a_worker_that_lost_its_lease_can_change_nothing(database, tmp_path):
    run = fill(database, tmp_path / "set", 8)
    lease = claim(database, register_worker(database, "slow"), run)
    reap(database)
    other = claim(database, register_worker(database, "quick"), run, lane=queue.SUSPECTS, now=TTL)
    assert [job.id for job in other.jobs] == [job.id for job in lease.jobs] == [1, 2, 3, 4]

    def assert_harmless() -> None:
        before = select(database, "SELECT id, status, lease_id, attempts FROM jobs ORDER BY id")
        texts = captions(database)
        with writing(database) as conn:
            for write in (
                lambda: queue.complete(conn, lease, [Completion(job.id, "Stale.") for job in lease.jobs]),
                lambda: queue.fail(conn, lease, {1: Failure("stale", "stale")}),
                lambda: queue.release(conn, lease, [1, 2, 3, 4]),
            ):
                with pytest.raises(LeaseLost):
                    write()
            assert queue.heartbeat(conn, lease.worker_id, [lease.id], ttl_ms=TTL, now=TTL) == set()
            # the other's lease, by somebody who is not the other
            assert queue.heartbeat(conn, lease.worker_id, [other.id], ttl_ms=TTL, now=TTL) == set()
        assert select(database, "SELECT id, status, lease_id, attempts FROM jobs ORDER BY id") == before
        assert captions(database) == texts

    assert_harmless()
    complete(database, other, "The other's.", only=[1, 2])
    assert_harmless()
    with writing(database) as conn:
        queue.fail(conn, other, {3: Failure("bad", "bad"), 4: Failure("bad", "bad")})
        queue.retry(conn, run)  # attempts are again what the slow one saw: they are no fence
    assert_harmless()
    assert set(captions(database).values()) == {"The other's."}


def test_promise_05_a_lease_that_expired_but_was_not_reaped_may_still_complete(database, tmp_path):
    run = fill(database, tmp_path / "set", 4)
    lease = claim(database, register_worker(database), run)
    with writing(database) as conn:
        queue.complete(conn, lease, [Completion(job.id, "Late.") for job in lease.jobs], now=10 * TTL)
    assert reap(database, 10 * TTL) == []
    assert statuses(database) == {"done": 4}


def test_promise_06_a_dead_workers_jobs_are_claimable_again_and_nothing_is_stuck(database, tmp_path):
    run = fill(database, tmp_path / "set", 12)
    lease = claim(database, register_worker(database, "dead"), run)
    assert reap(database, TTL - 1) == []
    assert reap(database, TTL) == [lease.id]
    rows = select(database, "SELECT status, attempts, crashes FROM jobs WHERE id <= 4")
    assert rows == [("pending", 0, 1)] * 4
    # another one dies, by the database's clock: a worker without --wait ends only when its pictures are done too
    with writing(database) as conn:
        queue.claim(conn, register_worker_in(conn, "dead too"), run.id, "train", 4, ttl_ms=1_000)
    outcome = run_worker(database, lease_ttl=2.0)
    assert outcome.done == 12
    assert captions(database) == expected(12)
    assert set(column(database, "SELECT attempts FROM jobs")) == {1}


def register_worker_in(conn, name: str) -> int:
    return queue.register_worker(conn, name, "host", 1, INFO)


def test_promise_07_a_hung_worker_stops_beating_loses_its_leases_and_exits_hard(database, url, tmp_path):
    fill(database, tmp_path / "set", 4)
    hung = start(url, engine={"hangs": True}, batch_size=4, lease_ttl=2.0, stall_timeout=0.5)
    _, err = hung.communicate(timeout=30)
    assert hung.returncode == process_module.EXIT_STALLED, err
    assert statuses(database) == {"leased": 4}
    assert run_worker(database, lease_ttl=2.0).done == 4
    assert captions(database) == expected(4)


def test_promise_08_one_picture_that_kills_its_workers_fails_alone(database, tmp_path):
    fill(database, tmp_path / "set", 100)
    deaths = 0
    while True:
        try:
            run_worker(database, SmallEngine(breaks_on=(55,), step_sec=0.02))
        except RuntimeError:
            deaths += 1
            assert deaths < 10
        else:
            break
    assert captions(database) == expected(100, 55)
    with db.transaction(database) as conn:
        assert [(one.image_id, one.code) for one in queue.list_failures(conn)] == [("train_00055", "crashed")]
    assert deaths == 4  # in the crowd, among four, and twice alone
    for worker_id, claimed_at, closed_at in select(
        database, "SELECT worker_id, claimed_at, closed_at FROM leases WHERE lane <> 0"
    ):
        held = f"worker_id = {worker_id} AND claimed_at < {closed_at} AND closed_at > {claimed_at}"
        assert column(database, f"SELECT count(*) FROM leases WHERE {held}") == [1], "a suspect had company"


def test_promise_08_suspects_have_their_turn_every_eighth_claim_though_others_are_pending(database, tmp_path):
    run = fill(database, tmp_path / "set", 80)
    claim(database, register_worker(database, "dead"), run, 3)
    reap(database)
    run_worker(database)
    lanes = column(database, "SELECT lane FROM leases ORDER BY id")
    assert lanes[1:9] == [queue.NORMAL] * 7 + [queue.SUSPECTS]
    assert captions(database) == expected(80)


@pytest.mark.parametrize("signum", signals.STOP_SIGNALS)
def test_promise_09_a_worker_asked_to_stop_finishes_what_runs_and_gives_the_rest_back(database, url, tmp_path, signum):
    fill(database, tmp_path / "set", 80)
    process = start(url, engine={"step_sec": 0.2}, batch_size=4)
    until(lambda: statuses(database).get("done", 0) > 0, "a first caption")
    process.send_signal(signum)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert json.loads(out)["done"] == statuses(database)["done"] < 80
    assert statuses(database).keys() == {"done", "pending"}
    assert set(select(database, "SELECT attempts, crashes FROM jobs WHERE status = 'pending'")) == {(0, 0)}


def test_promise_09_signals_within_a_second_are_one_request_and_a_later_one_leaves_at_once(database, url, tmp_path):
    fill(database, tmp_path / "set", 80)
    assert signals.ONE_REQUEST_SEC == 1.0
    within = QUICK | {"rococap.worker.signals.ONE_REQUEST_SEC": 60.0}  # a busy machine may deliver them late
    draining = start(url, engine={"step_sec": 2.0}, constants=within, batch_size=4)
    until(lambda: statuses(database).get("leased", 0) == 8, "a running batch and a claim ahead")
    for signum in signals.STOP_SIGNALS:
        draining.send_signal(signum)
        time.sleep(0.2)
    out, err = draining.communicate()
    assert draining.returncode == 0, err
    n_done = json.loads(out)["done"]
    assert select(database, "SELECT status, attempts, crashes, count(*) FROM jobs GROUP BY 1, 2, 3 ORDER BY 1") == [
        ("done", 1, 0, n_done),
        ("pending", 0, 0, 80 - n_done),
    ]
    leaving = start(url, engine={"step_sec": 0.1, "steps": 10_000}, batch_size=4)
    until(lambda: statuses(database).get("leased", 0) == 8, "a running batch and a claim ahead")
    leaving.send_signal(signal.SIGTERM)
    until(lambda: statuses(database).get("leased", 0) == 4, "the claim ahead was given back: it has heard the first")
    time.sleep(1.1)
    leaving.send_signal(signal.SIGINT)
    leaving.communicate()
    assert leaving.returncode == 128 + signal.SIGINT


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_promise_09_a_signal_to_a_whole_group_drains_it_and_charges_nobody(
    database, url, tmp_path, monkeypatch, signum
):
    # On a busy machine, the parent may pass a signal on late.
    monkeypatch.setenv("ROCOCAP_TEST_CONSTANTS", json.dumps({"rococap.worker.signals.ONE_REQUEST_SEC": 60.0}))
    fill(database, tmp_path / "set", 60)
    for stops in (1, 2):  # a job is preempted again and again
        with small_crew(url, engine={"step_sec": 1.5}, batch_size=4, lease_ttl=2.0) as parent:
            until(lambda: statuses(database).get("leased", 0) == 16, "both at work")
            for process in (*members(parent), parent):
                process.send_signal(signum)
            out, err = parent.communicate(timeout=60)
        assert parent.returncode == 0, err
        assert json.loads(out)["errors"] == []
        assert statuses(database).keys() == {"done", "pending"}, f"at the stop number {stops}"
    assert column(database, "SELECT max(crashes) FROM jobs") == [0]
    assert set(select(database, "SELECT attempts FROM jobs WHERE status = 'pending'")) == {(0,)}


def test_promise_10_transient_errors_back_off_up_to_max_attempts_and_permanent_ones_fail_at_once(database, tmp_path):
    run = fill(database, tmp_path / "set", 2)
    worker_id = register_worker(database)
    waits = []
    for _ in range(run.max_attempts):
        lease = claim(database, worker_id, run, 1)
        with writing(database) as conn:
            queue.fail(conn, lease, {lease.jobs[0].id: Failure("network", "slow", transient=True)}, now=0)
        waits += column(database, "SELECT not_before FROM jobs WHERE status = 'waiting'")
        with writing(database) as conn:
            queue.wake(conn, now=1 << 50)
    assert len(waits) == run.max_attempts - 1
    assert all(0.75 * 5_000 * 4**n <= wait <= min(5_000 * 4**n, 900_000) for n, wait in enumerate(waits))
    lease = claim(database, worker_id, run, 1)
    with writing(database) as conn:
        queue.fail(conn, lease, {lease.jobs[0].id: Failure("truncated", "The file ends early.")})
        found = queue.list_failures(conn)
    assert statuses(database) == {"failed": 2}
    assert [(one.code, one.message, one.attempts) for one in found] == [
        ("network", "slow", 5),
        ("truncated", "The file ends early.", 1),
    ]


@contextmanager
def foreign_lock(database: Engine) -> Iterator[None]:
    """Another program holds the database."""
    if database.dialect.name == "sqlite":
        with closing(sqlite3.connect(database.url.database, isolation_level=None, check_same_thread=False)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
    else:
        with lock_tables(database.url.render_as_string(False), "LOCK TABLE leases, jobs IN ACCESS EXCLUSIVE MODE"):
            yield


def with_short_patience(url: str, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(db, "PATIENCE_SEC", 0.3)
    monkeypatch.setattr(store, "STORE_PATIENCE_SEC", 0.3)
    return db.connect(url)


def test_promise_11_a_locked_database_kills_no_worker_and_no_caption_is_lost_or_doubled(
    database, url, tmp_path, monkeypatch
):
    fill(database, tmp_path / "set", 24)
    folder = tmp_path / "spool"
    monkeypatch.setenv("ROCOCAP_SPOOL", str(folder))
    impatient = with_short_patience(url, monkeypatch)
    started, spooled = [], []
    lock = foreign_lock(database)

    class Watching(SmallEngine):
        """Locks the database while its second batch runs, and frees it after the leases' time."""

        def run(self, source):
            for completion in super().run(source):
                started.append(time.monotonic())
                if len(started) == 5:
                    lock.__enter__()
                    threading.Timer(3.0, free).start()
                yield completion

    def free() -> None:
        try:
            until(lambda: any(folder.glob("*.jsonl")), "captions on disk while the database is away")
        finally:
            spooled.extend(folder.glob("*.jsonl"))
            started.append("freed")
            lock.__exit__(None, None, None)

    outcome = run_worker(impatient, Watching(), lease_ttl=2.0)
    impatient.dispose()
    assert (outcome.done, outcome.lost, outcome.spooled) == (24, 0, 0)
    assert len(spooled) == 1, "captions were not on disk while the database was away"
    assert not folder.exists()
    assert captions(database) == expected(24)
    assert set(select(database, "SELECT attempts, crashes FROM jobs")) == {(1, 0)}, "an outage charged somebody"
    # what was leased before the lock ran on; nothing was started once the leases' time had run out
    freed = started.index("freed")
    assert 8 <= freed <= 16


def test_promise_11_captions_that_a_dead_worker_left_in_its_spool_are_stored_by_the_next(
    database, url, tmp_path, monkeypatch
):
    fill(database, tmp_path / "set", 8)
    monkeypatch.setenv("ROCOCAP_SPOOL", str(tmp_path / "spool"))
    impatient = QUICK | {"rococap.worker.store.STORE_PATIENCE_SEC": 0.3}
    process = start(url, engine={"step_sec": 1.0}, constants=impatient, batch_size=4, lease_ttl=2.0)
    until(lambda: statuses(database).get("leased", 0) > 0, "a claim")
    with foreign_lock(database):
        until(lambda: sum(spool.waiting(tmp_path / "spool").values()) == 4, "captions in the spool")
        process.kill()
        process.communicate()
    n_stored = len(captions(database))  # before the lock, by chance
    outcome = run_worker(database, lease_ttl=2.0)
    assert (outcome.recovered, outcome.done) == (4, 8 - n_stored)
    assert captions(database) == expected(8)
    assert not (tmp_path / "spool").exists()


def test_promise_12_a_run_whose_recipe_changed_is_refused(database, tmp_path):
    fill(database, tmp_path / "set", 4)
    with pytest.raises(RunError, match="Run 'default' has another recipe"):
        register(database, tmp_path / "set", ["train"], recipe=Recipe(model="tests/small", prompt="What is it?"))
    run_worker(database)

    class Other(SmallEngine):
        info = INFO.__class__(**{**vars_of(INFO), "digest": "another"})

    write_shard(tmp_path / "set", "test", range(4))
    register(database, tmp_path / "set", ["test"])
    with pytest.raises(RunError, match="a run never mixes"):
        run_worker(database, Other())
    assert statuses(database) == {"done": 4, "pending": 4}


def test_promise_12_rules_that_were_accepted_are_the_only_way_a_run_mixes(database, tmp_path):
    run = fill(database, tmp_path / "set", 8)
    run_worker(database, limit=4)
    with writing(database) as conn:
        db.execute(conn, "UPDATE runs SET resolved = ?", (json.dumps(INFO.resolved()),))
    with pytest.raises(RunError, match="a run never mixes"):
        run_worker(database)
    assert statuses(database) == {"done": 4, "pending": 4}
    assert run_worker(database, accept_new_rules=True).done == 4
    with db.transaction(database) as conn:
        run = queue.get_run(conn, run.name)
    export.export(database, run, "train", tmp_path / "captions.csv")
    (accepted,) = json.loads((tmp_path / "captions.json").read_text())["resolved"]["accepted_rules"]
    assert (accepted["from"], accepted["to"], accepted["captions_before"]) == (1, RULES, 4)


def vars_of(info) -> dict:
    return {name: getattr(info, name) for name in info.__slots__}


def test_promise_13_an_export_is_a_snapshot_that_appears_whole_and_stalls_no_worker(database, tmp_path, monkeypatch):
    run = fill(database, tmp_path / "set", 40)
    path = tmp_path / "captions.csv"
    monkeypatch.setattr(snapshot, "PAGE", 5)
    run_worker(database, limit=20)
    pages = []

    def caption_meanwhile(what: str, done: int, total: int) -> None:
        pages.append(done)
        monkeypatch.setattr(db, "PATIENCE_SEC", 0.2)  # a worker that had to wait for the export would give up
        lease = claim(database, worker_id, run, 2, now=None)
        with writing(database) as conn:
            at = db.now(conn) + 1_000
            queue.complete(conn, lease, [Completion(job.id, "Meanwhile.") for job in lease.jobs], now=at)

    worker_id = register_worker(database, "meanwhile")
    assert export.export(database, run, "train", path, progress=caption_meanwhile).rows == 20
    assert pages == [5, 10, 15, 20]
    first = pd.read_csv(path)
    assert dict(zip(first["image_id"], first["generated_caption"], strict=True)) == expected(20)
    before = path.read_bytes()

    def breaks(what: str, done: int, total: int) -> None:
        raise RococapError("killed")

    with pytest.raises(RococapError, match="killed"):
        export.export(database, run, "train", path, progress=breaks)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path).count("captions.csv") == 1
    assert not list(tmp_path.glob(".captions*"))
