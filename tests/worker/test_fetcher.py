"""The books on what is leased, with time passed in: what may start, who may judge others."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from samples import fill
from small_engine import INFO, SmallEngine, context_of
from steps import select

from rococap import db, queue
from rococap.data import PictureReader
from rococap.engines import Completion, Prepared
from rococap.errors import DatabaseError
from rococap.worker import clock as clocks
from rococap.worker import contact as contacts
from rococap.worker import fetcher
from rococap.worker.contact import Contact
from rococap.worker.fetcher import Fetcher
from rococap.worker.holdings import Holdings
from rococap.worker.process import work
from rococap.worker.settings import Settings


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """Our own clock, which a test sets."""

    class Clock:
        now = 1_000.0

        def __call__(self) -> float:
            return self.now

    made = Clock()
    monkeypatch.setattr(clocks, "now", made)
    return made


# --- contact ---------------------------------------------------------------------------------------------------


def contact_kept_until(clock, seconds: float) -> Contact:
    contact = Contact(ttl_sec=60)
    for _ in range(int(seconds // 15)):
        clock.now += 15
        contact.made()
    return contact


def test_others_are_judged_after_a_lease_time_of_contact_and_not_before(clock):
    assert contact_kept_until(clock, 45).unbroken_sec() == 0
    assert contact_kept_until(clock, 60).unbroken_sec() == 60


def test_an_error_breaks_the_contact_for_a_lease_time(clock, monkeypatch):
    told = []
    monkeypatch.setattr(contacts.log, "warning", lambda text, *values: told.append(text % values))
    contact = contact_kept_until(clock, 120)
    for _ in range(2):
        contact.lost(OSError("no route"))
    contact.made()
    assert contact.unbroken_sec() == 0
    assert told == ["waiting for the database, and keeping new captions until it is back: no route"]
    for _ in range(4):
        clock.now += 15
        contact.made()
    assert contact.unbroken_sec() == 60


@pytest.mark.parametrize("by_sec", [-7_200, -31, 31, 7_200])
def test_a_database_whose_clock_was_set_is_asked_about_others_after_a_lease_time(clock, by_sec):
    contact = contact_kept_until(clock, 120)
    contact.made(1_000_000 + 10)
    clock.now += 15
    contact.made(1_000_000 + 15_000)
    assert contact.unbroken_sec() == 135
    clock.now += 15
    contact.made(1_000_000 + 30_000 + 1_000 * by_sec)
    assert contact.unbroken_sec() == 0
    for second in range(15, 61, 15):
        clock.now += 15
        contact.made(1_000_000 + 30_000 + 1_000 * (by_sec + second))
    assert contact.unbroken_sec() == 60


def test_a_process_that_was_frozen_or_a_machine_that_slept_judges_nobody(clock):
    contact = contact_kept_until(clock, 120)
    clock.now += 31  # half a lease time without contact: whoever beats with us may have been frozen too
    assert contact.unbroken_sec() == 0
    contact.made()
    assert contact.unbroken_sec() == 0


# --- working ahead ---------------------------------------------------------------------------------------------


class Readers(list):
    """Every PictureReader that a fetcher opens."""

    def __call__(self, root: Path) -> PictureReader:
        self.append(PictureReader(root))
        return self[-1]


def test_what_is_leased_is_the_running_rows_and_one_claim_and_row_groups_are_read_once(database, tmp_path, monkeypatch):
    readers = Readers()
    monkeypatch.setattr(fetcher, "PictureReader", readers)
    run = fill(database, tmp_path / "set", 95)  # in row groups of ten
    with db.transaction(database, write=True) as conn:
        worker = queue.register_worker(conn, "one", "host", 1, INFO)
    source = Holdings()
    monkeypatch.setattr(fetcher, "n_preparers", lambda device: 3)
    Fetcher(context_of(database, run, worker, SmallEngine(batch_size=8)), source, lambda completion: None).start()
    running: list[Prepared] = []
    done = 0
    while batch := source.take(3, 0 if running else None) or running:
        running = [*running, *batch] if batch is not running else running
        time.sleep(0.005)  # the model's, while the fetcher claims and prepares
        with db.transaction(database) as conn:
            assert queue.unfinished(conn, run, ["train"])["leased"] <= len(running) + 8
        finished, running = running[:2], running[2:]
        for picture in finished:
            lease = source.lease_of(picture.job_id)
            with db.transaction(database, write=True) as conn:
                queue.complete(conn, lease, [Completion(picture.job_id, "A caption.")])
            source.settle(lease, [picture.job_id])
            done += 1
        assert len({picture.job_id for picture in running}) == len(running)
    assert done == 95
    assert [reader.row_groups_opened for reader in readers] == [10]


def test_pictures_with_a_like_number_of_tokens_meet(held):
    source, lease = held
    source.take(2, 0)
    for n_tokens, job in zip((10, 90), lease.jobs, strict=True):
        source._state.ready.append(Prepared(job.id, None, n_tokens))
    assert [picture.n_tokens for picture in source.take(1, 0)] == [90]
    assert [picture.n_tokens for picture in source.take(1, 0)] == [10]


def test_holdings_tell_how_full_the_steps_were_and_how_long_the_engine_waited(held):
    source, _ = held
    source.take(2, 0)
    for rows in (0, 2, 1):
        source.step(rows)
    assert (source.usage.steps, source.usage.rows) == (2, 3)
    began_at = time.monotonic()
    assert source.take(1, 0.05) == []
    assert 0.05 <= source.usage.waited_sec <= time.monotonic() - began_at


def test_whatever_breaks_while_preparing_ends_the_worker(database, tmp_path):
    class Broken(SmallEngine):
        def prepare(self, job_id, request):
            raise RuntimeError("not about this picture")

    fill(database, tmp_path / "set", 12)
    with pytest.raises(RuntimeError, match="not about this picture"):
        work(database, Settings(self_check=False), load=lambda *_: Broken())


@pytest.mark.parametrize(("others", "pause_sec"), [(40, 1.0), (499, 10.0)])
def test_the_more_workers_the_less_often_each_looks_for_work(database, tmp_path, monkeypatch, others, pause_sec):
    monkeypatch.setattr(fetcher, "POLL_SEC", 1.0)
    run = fill(database, tmp_path / "set", 1)
    with db.transaction(database, write=True) as conn:
        for number in range(others):
            queue.register_worker(conn, f"worker {number}", "host", 1, INFO)
        queue.register_worker(conn, "lost long ago", "host", 1, INFO, now=0)
        queue.stop_worker(conn, queue.register_worker(conn, "stopped", "host", 1, INFO))
        worker = queue.register_worker(conn, "mine", "host", 1, INFO)
    context = context_of(database, run, worker, SmallEngine())
    assert Fetcher(context, Holdings(), lambda completion: None)._idle_sec() == pause_sec


def test_an_idle_worker_looks_again_after_the_pause_that_suits_their_number(database, tmp_path, monkeypatch):
    run = fill(database, tmp_path / "set", 1)
    with db.transaction(database, write=True) as conn:
        worker = queue.register_worker(conn, "one", "host", 1, INFO)
        queue.pause(conn, run, True)
    source = Holdings()
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        source.stop()

    monkeypatch.setattr(source, "pause", pause)
    monkeypatch.setattr(fetcher, "LOOKS_PER_SEC", 0.02)  # as if there were many workers
    assert Fetcher(context_of(database, run, worker, SmallEngine()), source, print)._next_claim() is None
    assert len(pauses) == 1
    assert 25 <= pauses[0] <= 50


# --- fencing ---------------------------------------------------------------------------------------------------


@pytest.fixture
def held(database, tmp_path: Path, clock):
    """Holdings with a lease of two prepared pictures, claimed at 1,000 s for 60 s."""
    run = fill(database, tmp_path / "set", 4)
    with db.transaction(database, write=True) as conn:
        worker = queue.register_worker(conn, "one", "host", 1, INFO)
        lease = queue.claim(conn, worker, run.id, "train", 2, ttl_ms=60_000)
    made = Holdings()
    made.enter(lease, expires_at=1_060.0)
    for job in lease.jobs:
        made.offer(job, Prepared(job.id, None, 1), 0.0, 0.0, is_blank=False)
    return made, lease


def test_nothing_is_started_once_its_lease_has_run_out_by_our_own_clock(held, clock):
    source, lease = held
    clock.now = 1_059.0
    assert [picture.job_id for picture in source.take(1, 0)] == [lease.jobs[0].id]
    clock.now = 1_060.0
    assert source.take(2, 0) == []


def test_a_heartbeat_that_succeeds_lets_it_start_after_all(held, clock):
    source, lease = held
    clock.now = 1_100.0
    assert source.take(2, 0) == []
    source.extend([lease.id], expires_at=1_160.0)
    assert [picture.job_id for picture in source.take(2, 0)] == [job.id for job in lease.jobs]


def test_what_another_worker_got_meanwhile_is_never_started(held, clock):
    source, lease = held
    source.lose([lease.id])
    source.extend([lease.id], expires_at=1_160.0)
    assert source.take(2, 0) == []
    assert source.step(1) == {job.id for job in lease.jobs}


def test_what_is_finished_and_not_stored_yet_is_not_given_back(held):
    source, lease = held
    first, second = (job.id for job in lease.jobs)
    source.take(1, 0)
    source.finish(first)
    assert source.unfinished_leases() == [lease]
    assert source.withdraw(running=True) == [(lease, [second])]
    source.finish(second)
    assert source.unfinished_leases() == []


@pytest.mark.parametrize("ends", ["lost", "settled"])
def test_a_picture_that_is_claimed_again_before_the_loss_of_its_lease_is_known_belongs_to_the_new_one(held, ends):
    # A job that was cancelled and retried within seconds is free again, while its worker still holds the first lease.
    source, lease = held
    first, second = (job.id for job in lease.jobs)
    source.take(2, 0)
    again = replace(lease, id=lease.id + 1, jobs=lease.jobs[:1])
    source.enter(again, expires_at=1_060.0)
    source.offer(replace(again.jobs[0], lease_id=again.id), Prepared(first, None, 1), 0.0, 0.0, is_blank=False)
    if ends == "lost":
        source.lose([lease.id])
        assert source.step(1) == {second}
    else:
        source.settle(lease, [first, second])
    assert source.open_leases() == [again]
    assert source.lease_of(first) == again
    assert [picture.job_id for picture in source.take(2, 0)] == [first]
    source.settle(again, [first])
    assert source.open_leases() == []


def test_a_picture_that_is_stored_while_it_is_ready_once_more_is_not_waited_for(held):
    source, lease = held
    source.settle(lease, [job.id for job in lease.jobs])
    waiting = threading.Thread(target=source.wait_until_taken, daemon=True)
    waiting.start()
    waiting.join(60)
    assert not waiting.is_alive()


def test_a_worker_claims_onward_and_every_eighth_time_from_the_start(database, tmp_path):
    run = fill(database, tmp_path / "set", 20)
    with db.transaction(database, write=True) as conn:
        worker = queue.register_worker(conn, "one", "host", 1, INFO)
    claimer = Fetcher(context_of(database, run, worker, SmallEngine(batch_size=2)), Holdings(), print)
    first = claimer._claim(queue.NORMAL)
    with db.transaction(database, write=True) as conn:
        queue.release(conn, first, [job.id for job in first.jobs])
    claims = [claimer._claim(queue.NORMAL) for _ in range(9)]
    assert [claim.jobs[0].id for claim in claims] == [3, 5, 7, 9, 11, 13, 15, 1, 17]


@pytest.mark.every_database
def test_a_database_that_hands_out_a_lease_twice_is_not_worked_on(database, tmp_path):
    run = fill(database, tmp_path / "set", 4)
    with db.transaction(database, write=True) as conn:
        worker = queue.register_worker(conn, "one", "host", 1, INFO)
    claimer = Fetcher(context_of(database, run, worker, SmallEngine(batch_size=2)), Holdings(), print)
    first = claimer._claim(queue.NORMAL)
    is_sqlite = database.dialect.name == "sqlite"
    with db.transaction(database, write=True) as conn:  # what a standby does not know that follows asynchronously
        db.execute(conn, "UPDATE jobs SET status = 'pending', attempts = 0, lease_id = NULL")
        db.execute(conn, "UPDATE tallies SET n = CASE status WHEN 'pending' THEN 4 ELSE 0 END WHERE slot = 0")
        db.execute(conn, "DELETE FROM tallies WHERE slot <> 0")
        db.execute(conn, "DELETE FROM leases")
        db.execute(conn, "DELETE FROM sqlite_sequence" if is_sqlite else "SELECT setval('leases_id_seq', 1, false)")
    with pytest.raises(DatabaseError, match=f"handed out lease {first.id} after lease {first.id}"):
        claimer._claim(queue.NORMAL)
    assert select(database, "SELECT DISTINCT status FROM jobs") == [("pending",)]
    assert select(database, "SELECT count(*) FROM leases") == [(0,)]


# --- the engine's progress -------------------------------------------------------------------------------------


def test_an_engine_that_waits_for_pictures_does_not_stall_and_one_that_has_some_does(held, monkeypatch):
    source, lease = held
    now = time.monotonic()
    assert source.stalled_sec() == 0
    source.take(2, 0)
    monkeypatch.setattr(time, "monotonic", lambda: now + 101)
    assert source.stalled_sec() >= 100
    source.lose([lease.id])
    assert source.stalled_sec() >= 100, "a hung engine hangs also when its rows are another's"
    source.take(2, 0)
    monkeypatch.setattr(time, "monotonic", lambda: now + 202)
    assert source.stalled_sec() >= 100, "and when it had looked for more beside them"
    source.stop()
    source.take(2, None)
    assert source.stalled_sec() == 0


def test_a_claim_ahead_that_is_lost_makes_room_for_the_next(held):
    source, lease = held
    waiting = threading.Thread(target=source.wait_until_taken, daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    source.lose([lease.id])
    waiting.join(60)
    assert not waiting.is_alive()
