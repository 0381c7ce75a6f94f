"""A worker's life, with a small real engine in this process, and in processes that are stopped and killed."""

import ctypes
import errno
import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from nursery import Worker
from samples import fill, picture, register, write_shard
from small_engine import INFO, QUICK, SmallEngine
from sqlalchemy import Engine, event
from steps import captions, expected, run_worker, select, start, statuses, until, writing

from rococap import db, queue
from rococap.engines import Completion, Options, gather
from rococap.errors import DatasetError, RunError
from rococap.queue import choose_run
from rococap.worker import store as stores
from rococap.worker.process import work
from rococap.worker.settings import Settings
from rococap.worker.signals import STOP_SIGNALS, stop_requests
from rococap.worker.telemetry import Meter


def finish(process: Worker, code: int = 0) -> dict:
    out, err = process.communicate()
    assert process.returncode == code, err
    return json.loads(out) if out else {}


# --- captioning ------------------------------------------------------------------------------------------------


def test_a_worker_captions_every_picture_with_its_own_caption_and_ends(database, tmp_path):
    fill(database, tmp_path / "set", 45)
    outcome = run_worker(database)
    assert (outcome.done, outcome.failed, outcome.lost) == (45, 0, 0)
    assert captions(database) == expected(45)
    assert select(database, "SELECT state, count(*) FROM leases GROUP BY state") == [("closed", 12)]
    assert select(database, "SELECT n_done, stopped_at IS NOT NULL FROM workers") == [(45, 1)]


def test_a_worker_reads_the_data_set_from_where_it_is_on_its_machine(database, tmp_path):
    fill(database, tmp_path / "set", 5)
    (tmp_path / "set").rename(tmp_path / "mounted")
    run_worker(database, dataset_root=str(tmp_path / "mounted"))
    assert captions(database) == expected(5)


def test_a_worker_tells_how_much_is_left_without_reading_all_recent_leases_each_time(database, tmp_path):
    """Hundreds of workers tell it every second."""
    fill(database, tmp_path / "set", 45)
    statements, told = [], []
    event.listen(database, "before_cursor_execute", lambda *args: statements.append(args[2]))
    settings = Settings(options=Options(batch_size=4), self_check=False)
    work(database, settings, lambda outcome, left: told.append((outcome.done, left)), load=lambda *_: SmallEngine())
    assert len(told) >= 12
    assert {done + left for done, left in told} == {45}
    assert sum("closed_at BETWEEN" in statement for statement in statements) <= 1, "only once, as it starts"


@pytest.mark.every_database
def test_a_worker_that_was_not_told_of_its_registration_is_registered_once(database, url, tmp_path):
    fill(database, tmp_path / "set", 8)
    commit = {"thread": "MainThread", "nth": 4, "do": "error", "after": True}
    process = Worker(url, {"troubles": [commit]})
    assert finish(process)["done"] == 8
    assert "trouble: error after COMMIT" in process.told()
    assert select(database, "SELECT count(*) FROM workers") == [(1,)]


def test_what_is_captioned_is_stored_at_once_when_there_is_nothing_else_to_wait_for(database, url, tmp_path):
    """Pictures that have been in a crash are claimed a few at a time, and only when nothing else is held."""
    fill(database, tmp_path / "set", 9)
    with writing(database) as conn:
        db.execute(conn, "UPDATE jobs SET crashes = 1")
    process = start(url, constants=QUICK | {"rococap.worker.store.STORE_EVERY_SEC": 3600.0})
    assert finish(process)["done"] == 9


def test_a_quarter_of_a_batch_is_stored_while_the_rest_is_captioned(database, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "STORE_EVERY_SEC", 3600.0)

    class Waiting(SmallEngine):
        """Finishes a part of its batch, and goes on once that is stored."""

        def run(self, source):
            for done, completion in enumerate(super().run(source), start=1):
                yield completion
                if done == 4:
                    until(lambda: len(captions(database)) == 4, "four of sixteen are stored")

    fill(database, tmp_path / "set", 16)
    assert run_worker(database, Waiting(batch_size=16)).done == 16


def test_two_workers_at_once_caption_every_picture_once(database, url, tmp_path):
    fill(database, tmp_path / "set", 200)
    outcomes = []
    threads = [threading.Thread(target=lambda: outcomes.append(run_worker(db.connect(url)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(outcome.done for outcome in outcomes) == 200
    assert captions(database) == expected(200)


def test_a_bad_picture_fails_alone_with_its_code(database, tmp_path):
    bad = {3: b"", 5: b"<html></html>", 8: picture(8)[:60]}
    write_shard(tmp_path / "set", "train", range(12), pictures=bad)
    register(database, tmp_path / "set", ["train"])
    outcome = run_worker(database, SmallEngine(unprepared=(10,)))
    assert (outcome.done, outcome.failed) == (8, 4)
    assert captions(database) == expected(12, 3, 5, 8, 10)
    with db.transaction(database) as conn:
        codes = {failed.image_id: failed.code for failed in queue.list_failures(conn)}
    assert codes == {
        "train_00003": "empty",
        "train_00005": "not_an_image",
        "train_00008": "truncated",
        "train_00010": "unprocessable",
    }


def test_a_picture_that_is_not_where_it_was_is_not_captioned_for_another(database, tmp_path):
    fill(database, tmp_path / "set", 12)
    write_shard(tmp_path / "set", "train", [*range(1, 12), 0])  # the shard is replaced after enqueue
    outcome = run_worker(database)
    assert (outcome.done, outcome.failed) == (0, 12)
    with db.transaction(database) as conn:
        assert {failed.code for failed in queue.list_failures(conn)} == {"moved"}
    (result,) = register(database, tmp_path / "set", ["train"])
    assert (result.changed, result.altered_shards) == (12, ["data/train-00000-of-00001.parquet"])
    with db.transaction(database, write=True) as conn:
        queue.retry(conn, queue.get_run(conn, "default"))
    run_worker(database)
    assert captions(database) == expected(12)


def test_a_limit_stops_after_so_many_pictures(database, tmp_path):
    fill(database, tmp_path / "set", 20)
    assert run_worker(database, limit=6).done == 6
    assert statuses(database) == {"done": 6, "pending": 14}


def test_what_is_leased_is_at_most_the_running_batch_and_one_claim_ahead(database, tmp_path):
    fill(database, tmp_path / "set", 60)
    seen = []

    class Watching(SmallEngine):
        def run(self, source):
            self.source = source
            yield from super().run(source)

        def _completion(self, taken):
            finished = len(self.source._state.finished)  # and not stored yet, so that they are still leased
            seen.append(statuses(database).get("leased", 0) - finished)
            return super()._completion(taken)

    run_worker(database, Watching(steps=2, step_sec=0.05))
    assert max(seen) <= 2 * 4
    assert captions(database) == expected(60)


def test_a_transient_failure_is_put_off(database, tmp_path):
    fill(database, tmp_path / "set", 8)

    def stop() -> None:
        until(lambda: statuses(database) == {"done": 7, "waiting": 1}, "all had their turn")
        os.kill(os.getpid(), signal.SIGTERM)  # to the process: a signal raised here would not wake the main thread

    thread = threading.Thread(target=stop)
    thread.start()
    outcome = run_worker(database, SmallEngine(transient=(2,)))
    thread.join()
    assert statuses(database) == {"done": 7, "waiting": 1}
    assert (outcome.done, outcome.drained) == (7, True)


def test_a_picture_on_a_disk_that_does_not_answer_for_now_is_tried_again(database, tmp_path, monkeypatch):
    root = tmp_path / "set"
    (root / "train").mkdir(parents=True)
    (root / "train_captions.csv").write_text("ID,Caption\na,A.\nb,B.\n")
    for n, name in enumerate("ab"):
        (root / "train" / f"{name}.jpg").write_bytes(picture(n))
    register(database, root, ["train"])
    read_bytes, errors = Path.read_bytes, [errno.EIO]

    def stumbles(path: Path) -> bytes:
        if path.name == "a.jpg" and errors:
            raise OSError(errors.pop(), "Input/output error", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", stumbles)
    monkeypatch.setattr("rococap.queue.leases.backoff_ms", lambda attempts: 100)
    assert run_worker(database).done == 2
    assert select(database, "SELECT code FROM failures") == [("unreadable_file",)]
    assert select(database, "SELECT attempts FROM jobs ORDER BY id") == [(2,), (1,)]


def test_a_worker_without_work_ends_at_once_and_loads_nothing(database, tmp_path):
    fill(database, tmp_path / "set", 4)
    run_worker(database)
    outcome = work(database, Settings(), load=lambda *_: pytest.fail("loaded a model for nothing"))
    assert outcome.done == 0


# --- what it measures ------------------------------------------------------------------------------------------


def running_workers(database: Engine) -> list[queue.WorkerSeen]:
    with db.transaction(database) as conn:
        return [one for one in queue.list_workers(conn) if one.state == "running"]


@pytest.mark.every_database
def test_a_worker_tells_what_it_measures_while_it_runs_and_what_storing_took_of_each_lease(database, url, tmp_path):
    fill(database, tmp_path / "set", 40)
    process = start(url, engine={"step_sec": 0.2}, batch_size=4, lease_ttl=2.0, wait=True)
    beating: list[queue.WorkerSeen] = []
    until(lambda: beating.extend(one for one in running_workers(database) if one.telemetry) or beating, "a heartbeat")
    running = beating[0]
    assert running.telemetry.batch_size == 4
    until(lambda: statuses(database) == {"done": 40}, "all captions")
    process.send_signal(signal.SIGTERM)
    assert finish(process)["done"] == 40
    with db.transaction(database) as conn:
        (stopped,) = queue.list_workers(conn)
        leases = queue.list_leases(conn, closed=99)
    told = stopped.telemetry
    assert 0 < running.telemetry.captioning_sec <= told.captioning_sec
    assert told.pictures_per_sec == pytest.approx(40 / told.captioning_sec, rel=0.15)
    assert told.new_tokens_per_sec == pytest.approx(3 * told.pictures_per_sec, rel=0.15)
    assert 0.5 < told.fill <= 1.0
    assert told.gpu_memory_mb is None
    assert 0 <= told.waited_sec < told.captioning_sec
    assert 30 < told.memory_mb < 2_000
    assert len(leases) == 10
    assert all(one.timing.store_ms > 0 for one in leases)
    assert sum(one.timing.store_ms for one in leases) < 1_000 * told.captioning_sec


def test_what_a_worker_measures_is_told_within_its_first_seconds_whatever_its_lease_time(database, url, tmp_path):
    fill(database, tmp_path / "set", 200)
    process = start(url, engine={"step_sec": 0.5}, batch_size=4, lease_ttl=3_600.0)
    until(lambda: select(database, "SELECT 1 FROM workers"), "a worker")
    until(
        lambda: any(one.telemetry and one.telemetry.pictures_per_sec > 0 for one in running_workers(database)),
        "a heartbeat long before a quarter of the lease time is over",
        30,
    )
    assert select(database, "SELECT lease_ttl_ms FROM workers") == [(3_600_000,)]
    process.send_signal(signal.SIGTERM)
    finish(process)


def test_the_wait_for_the_lock_is_time_of_storing_and_is_booked_once(database, tmp_path, monkeypatch):
    fill(database, tmp_path / "set", 4)
    waits, measured = threading.Event(), []
    stored = Meter.stored

    def measure(meter, lease_id, store_ms):
        measured.append(store_ms)
        stored(meter, lease_id, store_ms)

    def watch(conn, cursor, statement, *_):
        if statement.startswith("BEGIN IMMEDIATE") and threading.current_thread().name == "store":
            waits.set()

    class Waiting(SmallEngine):
        """Its captions come while another process holds the lock, for a second; it goes on for some heartbeats."""

        def run(self, source):
            completions = list(super().run(source))
            with closing(sqlite3.connect(database.url.database, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                yield from completions
                assert waits.wait(60)
                time.sleep(1)
            time.sleep(2.5)

    monkeypatch.setattr(Meter, "stored", measure)
    event.listen(database, "before_cursor_execute", watch)
    run_worker(database, Waiting(), limit=4, lease_ttl=2.0)
    ((store_ms,),) = select(database, "SELECT store_ms FROM leases")
    assert sum(measured) > 900
    assert store_ms == pytest.approx(sum(measured))


def test_a_gpu_that_cannot_be_measured_does_not_end_a_worker(database, tmp_path):
    fill(database, tmp_path / "set", 4)

    class Elsewhere(SmallEngine):
        info = replace(INFO, device="cuda:99")

    assert run_worker(database, Elsewhere()).done == 4


# --- which run -------------------------------------------------------------------------------------------------


def test_without_a_name_the_worker_takes_default_or_the_only_run_with_work(database, tmp_path):
    with db.transaction(database) as conn, pytest.raises(RunError, match="Nothing is registered here yet"):
        choose_run(conn, None, ())
    fill(database, tmp_path / "set", 4, run="a")
    with db.transaction(database) as conn:
        assert choose_run(conn, None, ()).name == "a"
    register(database, tmp_path / "set", ["train"], run="b")
    with db.transaction(database) as conn, pytest.raises(RunError) as error:
        choose_run(conn, None, ())
    assert str(error.value) == "Several runs have work (a, b). Choose one: rococap worker --run NAME"
    run_worker(database, run="a")
    with db.transaction(database) as conn:
        assert choose_run(conn, None, ()).name == "b"
    register(database, tmp_path / "set", ["train"], run="default")
    with db.transaction(database) as conn:
        assert choose_run(conn, None, ()).name == "default"


def test_a_split_that_the_run_does_not_have_is_refused(database, tmp_path):
    fill(database, tmp_path / "set", 4)
    with pytest.raises(
        RunError,
        match=r"Run 'default' has no pictures of test\. Register them, with the run's own data set and recipe: ",
    ):
        run_worker(database, splits=("test",))


# --- trouble ---------------------------------------------------------------------------------------------------


def test_an_engine_that_breaks_makes_what_ran_suspect_and_gives_the_rest_back(database, tmp_path, monkeypatch):
    monkeypatch.setattr("rococap.engines.LINGER_SEC", 60.0)  # no batch begins before its four pictures are there
    fill(database, tmp_path / "set", 12)
    with pytest.raises(RuntimeError, match="the small engine broke"):
        run_worker(database, SmallEngine(breaks_on=(5,)))
    assert statuses(database) == {"done": 4, "pending": 8}
    assert select(database, "SELECT id FROM jobs WHERE crashes = 1") == [(5,), (6,), (7,), (8,)]
    assert select(database, "SELECT DISTINCT attempts FROM jobs WHERE status = 'pending'") == [(0,)]


def test_one_picture_that_breaks_every_engine_costs_one_failure(database, tmp_path):
    fill(database, tmp_path / "set", 12)
    for _ in range(10):
        try:
            run_worker(database, SmallEngine(breaks_on=(5,)))
        except RuntimeError:
            continue
        break
    assert captions(database) == expected(12, 5)
    with db.transaction(database) as conn:
        assert [(failed.image_id, failed.code) for failed in queue.list_failures(conn)] == [("train_00005", "crashed")]


def test_a_shard_that_is_gone_ends_the_worker_and_charges_no_picture(database, tmp_path):
    fill(database, tmp_path / "set", 12)
    (tmp_path / "set" / "data" / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(DatasetError):
        run_worker(database)
    assert select(database, "SELECT DISTINCT status, attempts, crashes FROM jobs") == [("pending", 0, 0)]


def test_a_caption_that_comes_after_its_lease_was_lost_is_dropped_and_counted(database, tmp_path):
    fill(database, tmp_path / "set", 4)

    class Late(SmallEngine):
        def run(self, source):
            *completions, last = super().run(source)
            with db.transaction(database, write=True) as conn:
                (lease,) = queue.list_leases(conn)
                queue.crash(conn, lease.id)
                other = queue.register_worker(conn, "another", "host", 1, INFO)
                run = queue.get_run(conn, "default")
                taken = queue.claim(conn, other, run.id, "train", 4, ttl_ms=60_000, lane=queue.SUSPECTS)
                queue.complete(conn, taken, [Completion(job.id, "The other's.") for job in taken.jobs])
            yield from (*completions, last)

    outcome = run_worker(database, Late(), limit=4)
    assert (outcome.done, outcome.lost) == (0, 4)
    assert set(captions(database).values()) == {"The other's."}


def test_a_caption_whose_lease_was_lost_while_nobody_took_its_picture_is_stored_all_the_same(database, tmp_path):
    fill(database, tmp_path / "set", 4)

    class Late(SmallEngine):
        def run(self, source):
            completions = list(super().run(source))
            with db.transaction(database, write=True) as conn:
                queue.reap(conn, now=db.now(conn) + 3_600_000)
            yield from completions

    outcome = run_worker(database, Late(), limit=4)
    assert (outcome.done, outcome.lost) == (4, 0)
    assert captions(database) == expected(4)
    assert select(database, "SELECT state FROM leases ORDER BY id") == [("expired",), ("closed",)]


# --- processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_a_worker_asked_to_stop_finishes_its_batch_gives_the_rest_back_and_exits_0(database, url, tmp_path, signum):
    fill(database, tmp_path / "set", 80)
    process = start(url, engine={"step_sec": 0.2}, batch_size=4)
    until(lambda: statuses(database).get("done", 0) > 0, "a first caption")
    process.send_signal(signum)
    outcome = finish(process)
    assert outcome["drained"]
    assert outcome["done"] == statuses(database)["done"] < 80
    assert outcome["lost"] == 0, "it captioned what it had given back"
    assert statuses(database).keys() == {"done", "pending"}
    assert select(database, "SELECT DISTINCT attempts, crashes FROM jobs WHERE status = 'pending'") == [(0, 0)]
    run_worker(database)
    assert captions(database) == expected(80)


def test_what_does_not_finish_within_the_drain_timeout_is_given_back(database, url, tmp_path):
    fill(database, tmp_path / "set", 8)
    process = start(url, engine={"step_sec": 0.1, "steps": 10_000}, batch_size=4, drain_timeout=0.5)
    until(lambda: statuses(database).get("leased", 0) == 8, "a running batch and a claim ahead")
    process.send_signal(signal.SIGTERM)
    assert finish(process)["done"] == 0
    assert select(database, "SELECT DISTINCT status, attempts, crashes FROM jobs") == [("pending", 0, 0)]


def test_a_worker_whose_reading_hangs_still_stops_when_asked(database, url, tmp_path):
    root = tmp_path / "set"
    (root / "train").mkdir(parents=True)
    (root / "train_captions.csv").write_text("ID,Caption\na,A.\n")
    (root / "train" / "a.jpg").write_bytes(picture(0))
    register(database, root, ["train"])
    (root / "train" / "a.jpg").unlink()
    os.mkfifo(root / "train" / "a.jpg")  # like a disk that does not answer
    process = start(url, batch_size=4, drain_timeout=0.5)
    until(lambda: statuses(database).get("leased", 0) == 1, "a claim")
    process.send_signal(signal.SIGTERM)
    assert finish(process)["done"] == 0
    assert select(database, "SELECT status, attempts, crashes FROM jobs") == [("pending", 0, 0)]


@pytest.mark.parametrize(
    "signums",
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGUSR1), (signal.SIGUSR1, signal.SIGTERM)],
)
def test_a_second_signal_leaves_at_once(database, url, tmp_path, signums):
    fill(database, tmp_path / "set", 8)
    process = start(url, engine={"step_sec": 0.1, "steps": 10_000}, batch_size=4)
    until(lambda: statuses(database).get("leased", 0) == 8, "a running batch and a claim ahead")
    process.send_signal(signums[0])
    until(lambda: statuses(database).get("leased", 0) == 4, "the claim ahead was given back: it has heard the first")
    time.sleep(1.1)
    process.send_signal(signums[1])
    finish(process, code=128 + signums[1])


@pytest.mark.parametrize("gap_sec", [0.0, 0.1, 0.4])
def test_signals_of_any_kind_within_a_second_are_one_request(database, url, tmp_path, gap_sec):
    fill(database, tmp_path / "set", 80)
    # A machine that is busy may deliver them late: that a second is the limit is for the test above to show.
    constants = QUICK | {"rococap.worker.signals.ONE_REQUEST_SEC": 60.0}
    process = start(url, engine={"step_sec": 2.0}, constants=constants, batch_size=4)
    until(lambda: statuses(database).get("leased", 0) == 8, "a running batch and a claim ahead")
    for signum in STOP_SIGNALS:
        process.send_signal(signum)
        time.sleep(gap_sec)
    outcome = finish(process)
    assert outcome["drained"]
    assert outcome["done"] == statuses(database)["done"] < 80
    assert select(database, "SELECT DISTINCT status, attempts, crashes FROM jobs WHERE status <> 'done'") == [
        ("pending", 0, 0)
    ]


@pytest.mark.parametrize(
    ("gap_sec", "one_request_sec", "heard"),
    [(0.0, 60.0, [signal.SIGTERM]), (0.1, 0.05, [signal.SIGTERM, signal.SIGUSR1])],
    ids=["soon", "later"],
)
def test_signals_are_told_apart_by_when_they_came_though_the_main_thread_is_busy(
    gap_sec, one_request_sec, heard, monkeypatch
):
    monkeypatch.setattr("rococap.worker.signals.ONE_REQUEST_SEC", one_request_sec)
    told: list[int] = []
    libc, mutex, is_held = ctypes.CDLL(None), ctypes.create_string_buffer(64), threading.Event()

    def send() -> None:
        libc.pthread_mutex_lock(mutex)
        is_held.set()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: told == [signal.SIGTERM], "the first")
            time.sleep(gap_sec)
            os.kill(os.getpid(), signal.SIGUSR1)
            until(lambda: told == heard, "the second, if it is one")
        finally:
            libc.pthread_mutex_unlock(mutex)

    with stop_requests(told.append), ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send)
        is_held.wait()
        libc.pthread_mutex_lock(mutex)  # no handler of Python's runs before this has returned
        sent.result()
    assert told == heard


def test_handlers_are_as_they_were_once_a_worker_has_ended():
    before = [signal.getsignal(signum) for signum in STOP_SIGNALS]
    with stop_requests(lambda signum: None):
        assert signal.getsignal(signal.SIGUSR1) not in before
    assert [signal.getsignal(signum) for signum in STOP_SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_killed_workers_pictures_are_captioned_by_the_next_and_none_is_lost_or_doubled(database, url, tmp_path):
    fill(database, tmp_path / "set", 60)
    process = start(url, engine={"step_sec": 0.2}, batch_size=4, lease_ttl=2.0)
    until(lambda: statuses(database).get("done", 0) >= 8, "some captions")
    process.kill()
    process.communicate()
    before = captions(database)
    assert statuses(database)["leased"] > 0
    outcome = run_worker(database, lease_ttl=2.0)
    assert outcome.done == 60 - len(before)
    assert captions(database) == expected(60)
    assert select(database, "SELECT DISTINCT attempts FROM jobs") == [(1,)]


def test_heartbeats_keep_a_lease_whose_batch_takes_longer_than_its_time(database, url, tmp_path):
    fill(database, tmp_path / "set", 4)
    process = start(url, engine={"step_sec": 0.1, "steps": 35}, batch_size=4, lease_ttl=2.0)
    until(lambda: statuses(database).get("leased", 0) == 4, "a claim")
    expires_at = "SELECT expires_at FROM leases"
    ((first,),) = select(database, expires_at)
    until(lambda: select(database, expires_at) > [(first + 500,)], "heartbeats")
    with db.transaction(database, write=True) as conn:
        assert queue.reap(conn, now=first + 500) == []
    assert finish(process)["done"] == 4


def test_a_waiting_worker_takes_up_new_work_until_it_is_stopped(database, url, tmp_path):
    fill(database, tmp_path / "set", 4)
    process = start(url, batch_size=4, wait=True)
    until(lambda: statuses(database) == {"done": 4}, "the first four")
    write_shard(tmp_path / "set", "test", range(4))
    register(database, tmp_path / "set", ["test"])
    until(lambda: statuses(database) == {"done": 8}, "four more, of another split")
    process.send_signal(signal.SIGTERM)
    assert finish(process)["done"] == 8


def test_a_worker_waits_for_what_others_hold_before_it_ends(database, url, tmp_path):
    fill(database, tmp_path / "set", 8)
    slow = start(url, engine={"step_sec": 0.1, "steps": 20}, batch_size=4, limit=4)
    until(lambda: statuses(database).get("leased", 0) == 4, "the slow one's claim")
    quick = run_worker(database)
    assert quick.done == 4
    assert statuses(database) == {"done": 8}
    assert finish(slow)["done"] == 4


# --- a database that is away, replaced or wrong ----------------------------------------------------------------


@contextmanager
def locked(database: Engine, mode: str = "IMMEDIATE") -> Iterator[None]:
    with closing(sqlite3.connect(database.url.database, isolation_level=None)) as other:
        other.execute(f"BEGIN {mode}")
        yield


def test_a_claim_ahead_that_another_got_or_somebody_cancelled_does_not_stop_the_worker(database, tmp_path):
    run = fill(database, tmp_path / "set", 24)

    class Watching(SmallEngine):
        """While its first batch runs, the claim ahead of it is withdrawn."""

        def run(self, source):
            batch = gather(source, 4)
            until(lambda: statuses(database).get("leased", 0) == 8, "a claim ahead")
            until(lambda: len(source._state.ready) == 4, "its pictures")
            with db.transaction(database, write=True) as conn:
                queue.cancel(conn, run, image_ids=[f"train_{n:05}" for n in range(4, 8)])
            until(lambda: min((one.job_id for one in list(source._state.ready)), default=0) > 8, "the claim after it")
            yield from (self._completion(picture) for picture in batch)
            yield from super().run(source)

    assert run_worker(database, Watching(), lease_ttl=2.0).done == 20
    assert statuses(database) == {"done": 20, "cancelled": 4}


@pytest.mark.parametrize("mode", ["IMMEDIATE", "EXCLUSIVE"])
def test_a_worker_that_is_stopped_while_the_database_is_locked_leaves_soon_and_charges_nobody(
    database, url, tmp_path, mode
):
    fill(database, tmp_path / "set", 16)
    impatient = QUICK | {"rococap.worker.store.STOP_PATIENCE_SEC": 0.3}
    process = start(
        url, engine={"step_sec": 0.5, "steps": 4}, constants=impatient, batch_size=4, lease_ttl=2.0, drain_timeout=30.0
    )
    until(lambda: statuses(database).get("leased", 0) == 8, "a running batch and a claim ahead")
    with locked(database, mode):
        process.send_signal(signal.SIGTERM)
        outcome = finish(process)
    assert outcome["drained"]
    assert outcome["done"] == statuses(database).get("done", 0)
    assert run_worker(database).recovered == outcome["spooled"] > 0
    assert captions(database) == expected(16)
    assert select(database, "SELECT DISTINCT crashes FROM jobs") == [(0,)]


def test_a_worker_at_its_limit_waits_for_the_database_and_is_not_taken_for_hung(database, url, tmp_path):
    fill(database, tmp_path / "set", 8)
    impatient = QUICK | {"rococap.worker.store.STORE_PATIENCE_SEC": 1.0}
    process = start(
        url, engine={"step_sec": 1.0}, constants=impatient, batch_size=4, limit=4, lease_ttl=2.0, stall_timeout=4.0
    )
    until(lambda: statuses(database).get("leased", 0) == 4, "a claim")
    with locked(database):
        time.sleep(7)
        assert process.poll() is None
    assert finish(process)["done"] == 4


def test_a_hung_model_ends_also_when_its_pictures_were_given_back(database, url, tmp_path):
    fill(database, tmp_path / "set", 4)
    process = start(url, engine={"hangs": True}, batch_size=4, lease_ttl=2.0, stall_timeout=3.0, drain_timeout=0.5)
    until(lambda: "the small engine hangs" in process.told(), "the model has them")
    process.send_signal(signal.SIGTERM)
    finish(process, code=70)
    assert statuses(database) == {"pending": 4}


def test_a_worker_stores_nothing_in_a_database_that_took_the_place_of_its_own(database, url, tmp_path):
    fill(database, tmp_path / "set", 40)
    path, aside, new = tmp_path / "queue.db", tmp_path / "aside.db", tmp_path / "new.db"
    other = db.connect(f"sqlite:///{new}")
    write_shard(tmp_path / "other", "train", range(100, 140))
    register(other, tmp_path / "other", ["train"])
    with db.transaction(other, write=True) as conn:
        worker = queue.register_worker(conn, "of the other", "host", 1, INFO)
        for _ in range(3):
            queue.claim(conn, worker, 1, "train", 4, ttl_ms=60_000)
    other.dispose()
    process = start(url, engine={"step_sec": 0.3}, batch_size=4)
    until(lambda: statuses(database).get("done", 0) >= 4, "a first batch")
    with locked(database):  # not in a transaction of the worker's, whose journal would go with the new file
        path.rename(aside)
        new.rename(path)
    database.dispose()
    other = db.connect(url)
    _, err = process.communicate()
    assert process.returncode == 1
    assert "is not the database that this process started with" in err
    assert statuses(other) == {"leased": 12, "pending": 28}
    other.dispose()
    path.unlink()
    aside.rename(path)
    run_worker(database)
    assert captions(database) == expected(40)


def test_an_error_that_ends_the_store_ends_the_worker_and_what_was_captioned_is_kept(database, tmp_path, monkeypatch):
    fill(database, tmp_path / "set", 4)

    def broken(*args, **kwargs):
        raise RuntimeError("the store broke")

    with monkeypatch.context() as patch:
        patch.setattr(queue, "complete", broken)
        with pytest.raises(RuntimeError, match="the store broke"):
            run_worker(database, limit=4)
    assert captions(database) == {}
    assert run_worker(database).recovered == 4
    assert captions(database) == expected(4)
