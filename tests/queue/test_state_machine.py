"""The queue against a plain model of it: whatever is done in whatever order, both agree after every step.

Time is passed in, nothing sleeps. The moves are also those of workers that died, forgot, came late or took what was
not theirs; the model, which is dicts and fields, says what each must do, and when a lease is lost.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from samples import fill, write_shard
from small_engine import INFO, SmallEngine, context_of
from sqlalchemy import Connection, Engine
from steps import TTL, claim, new_worker, select, writing

from rococap import db, queue
from rococap.data import Dataset, datasets
from rococap.engines import Completion, Failure
from rococap.errors import LeaseLost
from rococap.queue import NORMAL, SOLO, SUSPECTS, Lease, Run
from rococap.queue.enqueue import enqueue
from rococap.recipe import Recipe
from rococap.worker import clock as clocks
from rococap.worker import spool
from rococap.worker.fetcher import Fetcher
from rococap.worker.holdings import Holdings
from rococap.worker.spool import Entry, Spool

pytestmark = pytest.mark.every_database

MAX_ATTEMPTS = 2
IMAGES = {"train": 8, "test": 3}
LANES = {NORMAL: (range(0, 1), 100), SUSPECTS: (range(1, 2), 4), SOLO: (range(2, 100), 1)}
"""How often the jobs of a lane have crashed, and how many of them a claim takes at most."""
MOVES = ("complete", "fail", "release")
UNFINISHED = ("pending", "waiting", "leased")


# --- The model -------------------------------------------------------------------------------------------------


@dataclass
class ModelJob:
    id: int
    run: str
    split: str
    image_id: str
    status: str = "pending"
    attempts: int = 0
    crashes: int = 0
    solo_crashes: int = 0
    lease_id: int | None = None
    not_before: int | None = None
    finished_at: int | None = None

    def becomes(self, status: str, at: int | None = None, *, not_before: int | None = None) -> None:
        self.status, self.lease_id, self.finished_at, self.not_before = status, None, at, not_before


@dataclass
class ModelLease:
    lease: Lease
    job_ids: list[int]
    beat_at: int
    expires_at: int
    state: str = "open"
    n_done: int = 0
    closed_at: int | None = None


@dataclass
class Model:
    jobs: dict[int, ModelJob] = field(default_factory=dict)
    leases: dict[int, ModelLease] = field(default_factory=dict)
    captions: dict[int, tuple[int, str]] = field(default_factory=dict)
    failures: list[tuple[int, int, str, int]] = field(default_factory=list)
    workers: dict[int, int] = field(default_factory=dict)
    paused: dict[str, bool] = field(default_factory=dict)

    def held(self, lease_id: int) -> list[ModelJob]:
        return [job for job in self.jobs.values() if job.lease_id == lease_id]

    def open(self) -> list[ModelLease]:
        return [one for one in self.leases.values() if one.state == "open"]

    def taken_over(self) -> list[tuple[int, int]]:
        """Leases that ended, with a job of theirs that is under another now."""
        return [
            (one.lease.id, id)
            for one in self.leases.values()
            for id in one.job_ids
            if self.jobs[id].lease_id not in (None, one.lease.id)
        ]

    def is_lost(self, lease: Lease, job_ids: Iterable[int] = ()) -> bool:
        """Whether a worker may no longer do this with these jobs of a lease."""
        known = self.leases[lease.id]
        is_ours = known.state == "open" and known.lease.worker_id == lease.worker_id
        return not is_ours or any(self.jobs[id].lease_id != lease.id for id in job_ids)

    def claimable(self, run: Run, split: str, lane: int, most: int) -> list[ModelJob]:
        crashes, bound = LANES[lane]
        found = [
            job
            for job in self.jobs.values()
            if (job.run, job.split, job.status) == (run.name, split, "pending") and job.crashes in crashes
        ]
        found.sort(key=lambda job: (job.crashes, job.id))
        return [] if self.paused[run.name] else found[: min(most, bound)]

    def claim(self, lease: Lease, job_ids: Sequence[int], at: int, ttl_ms: int) -> None:
        assert lease.id > max(self.leases, default=0), "a lease's id was used again"
        self.leases[lease.id] = ModelLease(lease, list(job_ids), at, at + ttl_ms)
        for id in job_ids:
            job = self.jobs[id]
            assert job.status == "pending", "a job was claimed that was not free"
            job.status, job.lease_id = "leased", lease.id
            job.attempts += 1

    def close_if_empty(self, lease_id: int, state: str, at: int) -> None:
        known = self.leases[lease_id]
        if known.state == "open" and not self.held(lease_id):
            known.state, known.closed_at = state, at

    def complete(self, lease_id: int, texts: dict[int, str], at: int) -> None:
        known = self.leases[lease_id]
        for id, text in texts.items():
            assert id not in self.captions, "a caption would be changed"
            self.captions[id] = (lease_id, text)
            self.jobs[id].becomes("done", at)
        known.n_done += len(texts)
        self.workers[known.lease.worker_id] += len(texts)
        self.close_if_empty(lease_id, "closed", at)

    def fail(self, lease_id: int, failed: dict[int, Failure], waits: dict[int, int], at: int) -> None:
        """`waits` is what the queue chose, which has a share of chance."""
        for id, failure in sorted(failed.items()):
            job = self.jobs[id]
            if failure.transient and job.attempts < MAX_ATTEMPTS:
                most = 5_000 * 4 ** (job.attempts - 1)
                assert most * 3 // 4 <= waits[id] - at <= most
                job.becomes("waiting", not_before=waits[id])
            else:
                job.becomes("failed", at)
            self.failures.append((id, lease_id, failure.code, at))
        self.close_if_empty(lease_id, "closed", at)

    def release(self, lease_id: int, job_ids: Iterable[int], at: int) -> int:
        mine = [self.jobs[id] for id in job_ids if self.jobs[id].lease_id == lease_id]
        for job in mine:
            job.becomes("pending")
            job.attempts -= 1
        self.close_if_empty(lease_id, "released", at)
        return len(mine)

    def crash(self, lease_id: int, at: int) -> None:
        known = self.leases[lease_id]
        known.state, known.closed_at = "expired", at
        is_solo = known.lease.lane == SOLO
        for job in sorted(self.held(lease_id), key=lambda job: job.id):
            is_killer = is_solo and job.solo_crashes == 1
            job.attempts -= 1
            job.crashes += 1
            job.solo_crashes += is_solo
            if is_killer:
                job.becomes("failed", at)
                self.failures.append((job.id, lease_id, "crashed", at))
            else:
                job.becomes("pending")

    def latest_code(self, job_id: int) -> str | None:
        return next((code for id, _, code, _ in reversed(self.failures) if id == job_id), None)

    def tallies(self) -> Counter[tuple[str, str, str]]:
        return Counter((job.run, job.split, job.status) for job in self.jobs.values())


# --- The moves -------------------------------------------------------------------------------------------------


class QueueMachine(RuleBasedStateMachine):
    """Two runs, two splits, a few workers. `knows` is what each living worker remembers that it holds."""

    def __init__(self, database: Engine, dataset: Dataset) -> None:
        super().__init__()
        self.database = database
        self.dataset = dataset
        self.model = Model()
        self.at = 1_000_000
        self.numbers = count(1)
        self.living: list[int] = []
        self.knows: dict[int, set[int]] = {}
        self.runs: dict[str, Run] = {}
        with writing(database) as conn:  # a new database for each example would take ten times as long
            for table in ("captions", "failures", "tallies", "jobs", "leases", "workers", "runs"):
                db.execute(conn, f"DELETE FROM {table}")
        self.register("one", "train", 6, 0)
        self.register("one", "test", 2, 0)
        self.register("two", "train", 3, 2)
        for _ in range(2):
            self.start_worker()
        self.claim_for(self.living[0], "one", "train", NORMAL, 3)
        self.claim_for(self.living[1], "two", "train", NORMAL, 2)

    # --- what the rules share ---

    def register(self, name: str, split: str, limit: int, offset: int) -> None:
        images = [f"{split}_{n:05}" for n in range(IMAGES[split])][offset : offset + limit]
        known = {job.image_id for job in self.model.jobs.values() if job.run == name}
        recipe = Recipe(model="tests/small")
        (result,) = enqueue(self.database, self.dataset, [split], run=name, recipe=recipe, limit=limit, offset=offset)
        assert (result.new, result.known) == (len(set(images) - known), len(known & set(images)))
        with writing(self.database) as conn:
            db.execute(conn, "UPDATE runs SET max_attempts = ? WHERE name = ?", (MAX_ATTEMPTS, name))
            self.runs[name] = queue.get_run(conn, name)
            self.model.paused.setdefault(name, False)
            rows = db.execute(
                conn,
                "SELECT j.id, i.image_id FROM jobs j JOIN images i ON i.id = j.image_id WHERE j.run_id = ?",
                (self.runs[name].id,),
            ).fetchall()
        ids = {image_id: id for id, image_id in rows}
        for image_id in images:
            if image_id not in known:
                self.model.jobs[ids[image_id]] = ModelJob(ids[image_id], name, split, image_id)

    def start_worker(self) -> None:
        with writing(self.database) as conn:
            worker = queue.register_worker(conn, f"worker {next(self.numbers)}", "host", 1, INFO, now=self.at)
        self.living.append(worker)
        self.knows[worker] = set()
        self.model.workers[worker] = 0

    def write(self, is_lost: bool, action: Callable[[Connection], object]) -> bool:
        """Does it in a transaction; whether it was done. The lease is lost exactly when the model says so."""
        if is_lost:
            with pytest.raises(LeaseLost), writing(self.database) as conn:
                action(conn)
        else:
            with writing(self.database) as conn:
                action(conn)
        return not is_lost

    def some(self, data: st.DataObject, ids: Iterable[int], what: str = "jobs") -> list[int]:
        """A part of them or all, in any order."""
        return data.draw(st.lists(st.sampled_from(sorted(ids)), min_size=1, max_size=4, unique=True), label=what)

    def places(self) -> list[tuple[str, str, int]]:
        """The runs, splits and lanes where a claim finds something."""
        return [
            (name, split, lane)
            for name, run in self.runs.items()
            for split in IMAGES
            for lane in LANES
            if self.model.claimable(run, split, lane, 1)
        ]

    def claim_for(
        self, worker: int, name: str, split: str, lane: int, most: int, *, is_answered: bool = True
    ) -> ModelLease | None:
        run = self.runs[name]
        expected = self.model.claimable(run, split, lane, most)
        with writing(self.database) as conn:
            lease = queue.claim(conn, worker, run.id, split, most, ttl_ms=TTL, lane=lane, now=self.at)
        if lease is None:
            assert expected == []
            return None
        assert (lease.worker_id, lease.run_id, lease.split, lease.lane) == (worker, run.id, split, lane)
        assert [(job.id, job.lease_id) for job in lease.jobs] == [(job.id, lease.id) for job in expected]
        assert [job.place.image_id for job in lease.jobs] == [job.image_id for job in expected]
        self.model.claim(lease, [job.id for job in expected], self.at, TTL)
        if is_answered:
            self.knows[worker].add(lease.id)
        return self.model.leases[lease.id]

    def crash(self, known: ModelLease, expired_by: int = 1 << 62) -> None:
        ends = known.state == "open" and known.expires_at <= expired_by
        with writing(self.database) as conn:
            assert queue.crash(conn, known.lease.id, now=self.at, expired_by=expired_by) == ends
        if ends:
            self.model.crash(known.lease.id, self.at)

    def wake_at(self, at: int) -> None:
        self.at = at
        with writing(self.database) as conn:
            woken = queue.wake(conn, now=at)
        due = [job for job in self.model.jobs.values() if job.status == "waiting" and job.not_before <= at]
        assert woken == len(due)
        for job in due:
            job.becomes("pending")

    def one_worker(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(self.living), label="worker")

    def one_open(self, data: st.DataObject) -> ModelLease:
        return data.draw(st.sampled_from(self.model.open()), label="open lease")

    def any_lease(self, data: st.DataObject) -> ModelLease:
        return data.draw(st.sampled_from(list(self.model.leases.values())), label="lease")

    def caption(self, job_id: int) -> Completion:
        return Completion(job_id, f"Caption {next(self.numbers)} of job {job_id}.")

    def complete_with(self, lease: Lease, job_ids: list[int]) -> None:
        texts = {id: f"Caption {next(self.numbers)} of job {id}." for id in job_ids}
        captions = [Completion(id, text) for id, text in texts.items()]
        is_lost = self.model.is_lost(lease, job_ids)
        if self.write(is_lost, lambda conn: queue.complete(conn, lease, captions, now=self.at)):
            self.model.complete(lease.id, texts, self.at)

    def fail_with(self, lease: Lease, failed: dict[int, Failure]) -> None:
        is_lost = self.model.is_lost(lease, failed)
        if self.write(is_lost, lambda conn: queue.fail(conn, lease, failed, now=self.at)):
            self.model.fail(lease.id, failed, self.waits(), self.at)

    def release_with(self, lease: Lease, job_ids: list[int]) -> None:
        released = []
        is_lost = self.model.is_lost(lease)
        if self.write(is_lost, lambda conn: released.append(queue.release(conn, lease, job_ids, now=self.at))):
            assert released == [self.model.release(lease.id, job_ids, self.at)]

    def write_with(self, move: str, lease: Lease, job_ids: list[int]) -> None:
        if move == "complete":
            self.complete_with(lease, job_ids)
        elif move == "fail":
            self.fail_with(lease, {id: Failure("late", "no", transient=True) for id in job_ids})
        else:
            self.release_with(lease, job_ids)

    def waits(self) -> dict[int, int]:
        with db.transaction(self.database) as conn:
            rows = db.execute(conn, "SELECT id, not_before FROM jobs WHERE status = 'waiting'").fetchall()
        return {row[0]: row[1] for row in rows}

    # --- a worker that is well ---

    @rule(
        name=st.sampled_from(["one", "one", "two"]),
        split=st.sampled_from(["train", "train", "test"]),
        limit=st.integers(1, 4),
        offset=st.integers(0, 7),
    )
    def enqueue(self, name: str, split: str, limit: int, offset: int) -> None:
        self.register(name, split, limit, offset % IMAGES[split])

    @rule(
        data=st.data(),
        name=st.sampled_from(["one", "two"]),
        split=st.sampled_from(["train", "train", "test"]),
        lane=st.sampled_from(list(LANES)),
        most=st.integers(1, 5),
    )
    def claim(self, data: st.DataObject, name: str, split: str, lane: int, most: int) -> None:
        self.claim_for(self.one_worker(data), name, split, lane, most)

    @precondition(lambda self: self.places())
    @rule(data=st.data(), most=st.integers(1, 5), is_answered=st.booleans())
    def claim_what_there_is(self, data: st.DataObject, most: int, is_answered: bool) -> None:
        place = data.draw(st.sampled_from(self.places()), label="place")
        self.claim_for(self.one_worker(data), *place, most, is_answered=is_answered)

    @precondition(lambda self: self.model.leases)
    @rule(data=st.data())
    def beat(self, data: st.DataObject) -> None:
        worker = self.one_worker(data)
        lease_ids = self.some(data, self.model.leases, "leases")
        with writing(self.database) as conn:
            kept = queue.heartbeat(conn, worker, lease_ids, ttl_ms=TTL, now=self.at)
        mine = [one for one in self.model.open() if one.lease.id in lease_ids and one.lease.worker_id == worker]
        assert kept == {one.lease.id for one in mine}
        for one in mine:
            one.beat_at, one.expires_at = self.at, self.at + TTL

    @precondition(lambda self: self.model.open())
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        lease = self.one_open(data).lease
        self.complete_with(lease, self.some(data, (job.id for job in self.model.held(lease.id))))

    @precondition(lambda self: self.model.open())
    @rule(data=st.data())
    def complete_all(self, data: st.DataObject) -> None:
        lease = self.one_open(data).lease
        self.complete_with(lease, [job.id for job in self.model.held(lease.id)])

    @precondition(lambda self: self.model.open())
    @rule(data=st.data(), code=st.sampled_from(["bad", "odd"]), is_transient=st.booleans())
    def fail(self, data: st.DataObject, code: str, is_transient: bool) -> None:
        lease = self.one_open(data).lease
        first, *others = self.some(data, (job.id for job in self.model.held(lease.id)))
        failed = {first: Failure(code, "no", is_transient)} | {id: Failure("other", "no") for id in others}
        self.fail_with(lease, failed)

    @precondition(lambda self: self.model.open())
    @rule(data=st.data())
    def fail_for_now(self, data: st.DataObject) -> None:
        """All of a lease, and it is not waited for: what had its last attempt is failed for good."""
        lease = self.one_open(data).lease
        self.fail_with(lease, {job.id: Failure("busy", "no", transient=True) for job in self.model.held(lease.id)})
        self.wake_at(self.at + 20_000)

    @precondition(lambda self: self.model.open())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        known = self.one_open(data)
        self.release_with(known.lease, self.some(data, known.job_ids))  # also of what has left the lease meanwhile

    # --- a worker that is late, forgetful, or takes what is another's ---

    @precondition(lambda self: self.model.leases)
    @rule(data=st.data(), move=st.sampled_from(MOVES))
    def write_late(self, data: st.DataObject, move: str) -> None:
        known = self.any_lease(data)
        self.write_with(move, known.lease, self.some(data, known.job_ids))

    @precondition(lambda self: self.model.open())
    @rule(data=st.data(), move=st.sampled_from(MOVES))
    def write_with_the_lease_of_another(self, data: st.DataObject, move: str) -> None:
        known = self.one_open(data)
        thief = replace(known.lease, worker_id=self.one_worker(data))
        self.write_with(move, thief, [job.id for job in self.model.held(thief.id)])

    @precondition(lambda self: self.model.open())
    @rule(data=st.data(), moves=st.permutations(MOVES))
    def write_what_was_given_back(self, data: st.DataObject, moves: list[str]) -> None:
        """A job leaves a lease that stays open, if it had more, and goes to another worker."""
        lease = self.one_open(data).lease
        job = min(self.model.held(lease.id), key=lambda job: job.id)
        self.release_with(lease, [job.id])
        lane = next(lane for lane, (crashes, _) in LANES.items() if job.crashes in crashes)
        self.claim_for(self.one_worker(data), job.run, job.split, lane, 5)
        for move in moves:
            self.write_with(move, lease, [job.id])

    @precondition(lambda self: self.model.leases)
    @rule(data=st.data(), times=st.sampled_from([1, 1, 2]), has_failure=st.booleans())
    def recover(self, data: st.DataObject, times: int, has_failure: bool) -> None:
        worker = self.one_worker(data)
        known = self.any_lease(data)
        completions = [self.caption(id) for id in self.some(data, known.job_ids)]
        if has_failure:
            completions[0] = Completion(completions[0].job_id, failure=Failure("late", "no", transient=True))
        for _ in range(times):
            self.recover_once(worker, known, completions)

    @precondition(lambda self: self.model.taken_over())
    @rule(data=st.data())
    def recover_what_another_has(self, data: st.DataObject) -> None:
        lease_id, job_id = data.draw(st.sampled_from(self.model.taken_over()), label="lease and job")
        known = self.model.leases[lease_id]
        others = [id for id in known.job_ids if id != job_id]
        self.recover_once(self.one_worker(data), known, [self.caption(id) for id in (job_id, *others)])

    def recover_once(self, worker: int, known: ModelLease, completions: list[Completion]) -> None:
        model, lease = self.model, known.lease
        mine, free, stored, kept = [], [], set(), set()
        for one in completions:
            job = model.jobs[one.job_id]
            if job.lease_id == lease.id:
                mine.append(one)
            elif job.id in model.captions:
                stored |= {job.id} if model.captions[job.id][0] == lease.id else set()
            elif one.failure is None and job.status in ("pending", "waiting"):
                free.append(one)
            elif one.failure is None and job.status == "leased":
                kept.add(job.id)
        with writing(self.database) as conn:
            result = queue.recover(conn, worker, lease, completions, now=self.at)
            newest = db.execute(conn, "SELECT max(id) FROM leases").scalar()
        stored |= {one.job_id for one in (*mine, *free)}
        assert (result.stored, result.kept) == (stored, kept)
        assert result.dropped == {one.job_id for one in completions} - stored - kept
        if captions := {one.job_id: one.text for one in mine if one.failure is None}:
            model.complete(lease.id, captions, self.at)
        if failed := {one.job_id: one.failure for one in mine if one.failure is not None}:
            model.fail(lease.id, failed, self.waits(), self.at)
        if free:
            for one in free:
                model.jobs[one.job_id].becomes("pending")
            taken = Lease(newest, worker, lease.run_id, lease.split, lease.lane)
            model.claim(taken, [one.job_id for one in free], self.at, 0)
            model.complete(newest, {one.job_id: one.text for one in free}, self.at)

    @rule(data=st.data())
    def release_forgotten(self, data: st.DataObject) -> None:
        worker = self.one_worker(data)
        with writing(self.database) as conn:
            released = queue.release_forgotten(conn, worker, self.knows[worker], now=self.at)
        forgotten = [
            one.lease.id
            for one in self.model.open()
            if one.lease.worker_id == worker and one.lease.id not in self.knows[worker]
        ]
        assert released == sum(self.model.release(id, self.model.leases[id].job_ids, self.at) for id in forgotten)

    # --- crashes and time ---

    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        """A worker is gone and another starts; what it held stays leased until somebody notices."""
        worker = self.one_worker(data)
        self.living.remove(worker)
        del self.knows[worker]
        self.start_worker()

    @precondition(lambda self: self.model.leases)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        self.crash(self.any_lease(data))

    @precondition(lambda self: self.model.leases)
    @rule(data=st.data())
    def give_up_what_was_extended_meanwhile(self, data: st.DataObject) -> None:
        known = self.any_lease(data)
        self.crash(known, known.expires_at - 1)

    @precondition(lambda self: self.places())
    @rule(data=st.data(), most=st.integers(1, 5))
    def die_of_a_picture(self, data: st.DataObject, most: int) -> None:
        """A claim that ends in a crash, of what has crashed most often."""
        worst = max(self.places(), key=lambda place: LANES[place[2]][0].start)
        self.crash(self.claim_for(self.one_worker(data), *worst, most))

    @precondition(lambda self: self.model.open())
    @rule(data=st.data())
    def lose_to_another(self, data: st.DataObject) -> None:
        """A lease is reaped and its jobs, or others that crashed as often, go to another worker at once."""
        known = self.one_open(data)
        name = self.model.jobs[known.job_ids[0]].run
        self.crash(known)
        lane = SUSPECTS if known.lease.lane == NORMAL else SOLO
        self.claim_for(self.one_worker(data), name, known.lease.split, lane, 4)

    @rule(ms=st.sampled_from([1, 4_000, TTL - 1, TTL, 20 * TTL]))
    def let_time_pass(self, ms: int) -> None:
        self.at += ms

    @rule(data=st.data(), spares_itself=st.booleans(), ms=st.sampled_from([0, TTL]))
    def reap(self, data: st.DataObject, spares_itself: bool, ms: int) -> None:
        self.at += ms
        worker = self.one_worker(data) if spares_itself else 0
        with writing(self.database) as conn:
            reaped = queue.reap(conn, exclude_worker=worker, now=self.at)
        due = [one for one in self.model.open() if one.expires_at <= self.at and one.lease.worker_id != worker]
        assert reaped == [one.lease.id for one in due]
        for one in due:
            self.model.crash(one.lease.id, self.at)

    @precondition(lambda self: self.model.open())
    @rule()
    def let_every_worker_die(self) -> None:
        """The power goes: all that was leased expires and is reaped."""
        for worker in self.living[:]:
            self.living.remove(worker)
            self.start_worker()
        self.at = max(self.at, *(one.expires_at for one in self.model.open()))
        with writing(self.database) as conn:
            reaped = queue.reap(conn, now=self.at)
        assert reaped == [one.lease.id for one in self.model.open()]
        for lease_id in reaped:
            self.model.crash(lease_id, self.at)

    @rule(ms=st.sampled_from([0, 3_750, 5_000]))
    def wake(self, ms: int) -> None:
        self.wake_at(self.at + ms)

    @precondition(lambda self: self.model.open())
    @rule(data=st.data())
    def break_before_the_commit(self, data: st.DataObject) -> None:
        lease = self.one_open(data).lease
        captions = [self.caption(job.id) for job in self.model.held(lease.id)]
        run = self.runs["one"]

        def complete_claim_and_break() -> None:
            with writing(self.database) as conn:
                queue.complete(conn, lease, captions, now=self.at)
                queue.claim(conn, self.living[0], run.id, "train", 4, ttl_ms=TTL, now=self.at)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            complete_claim_and_break()

    # --- by hand ---

    def chosen(self, name: str, statuses: Sequence[str], splits: Sequence[str], images: Sequence[str]):
        return [
            job
            for job in self.model.jobs.values()
            if (job.run == name and job.status in statuses)
            and (not splits or job.split in splits)
            and (not images or job.image_id in images)
        ]

    @rule(
        name=st.sampled_from(["one", "two"]),
        splits=st.sampled_from([[], ["train"], ["test"]]),
        numbers=st.lists(st.integers(0, 7), max_size=4, unique=True),
    )
    def cancel(self, name: str, splits: list[str], numbers: list[int]) -> None:
        images = [f"train_{n:05}" for n in numbers] or ["train_00002", "train_00003"]
        with writing(self.database) as conn:
            n = queue.cancel(conn, self.runs[name], splits=splits, image_ids=images, now=self.at)
        jobs = self.chosen(name, UNFINISHED, splits, images)
        assert n == len(jobs)
        for job in jobs:
            job.becomes("cancelled", self.at)
        for one in self.model.open():
            self.model.close_if_empty(one.lease.id, "closed", self.at)

    @rule(
        name=st.sampled_from(["one", "two"]),
        splits=st.sampled_from([[], ["train"]]),
        codes=st.sampled_from([[], ["bad"], ["crashed", "late"]]),
        numbers=st.lists(st.integers(0, 7), max_size=3, unique=True),
        cancelled=st.booleans(),
    )
    def retry(self, name: str, splits: list[str], codes: list[str], numbers: list[int], cancelled: bool) -> None:
        images = [f"train_{n:05}" for n in numbers]
        with writing(self.database) as conn:
            n = queue.retry(conn, self.runs[name], splits=splits, image_ids=images, codes=codes, cancelled=cancelled)
        statuses = ("failed", "cancelled") if images else ("cancelled",) if cancelled else ("failed",)
        jobs = self.chosen(name, statuses, splits, images)
        jobs = [job for job in jobs if not codes or self.model.latest_code(job.id) in codes]
        assert n == len(jobs)
        for job in jobs:
            job.becomes("pending")
            job.attempts = job.crashes = job.solo_crashes = 0

    @rule(name=st.sampled_from(["one", "two"]), paused=st.booleans())
    def pause_or_resume(self, name: str, paused: bool) -> None:
        with writing(self.database) as conn:
            queue.pause(conn, self.runs[name], paused)
        self.model.paused[name] = paused

    @precondition(lambda self: self.model.failures)
    @rule(data=st.data())
    def prune(self, data: st.DataObject) -> None:
        before = data.draw(st.sampled_from(sorted({at for *_, at in self.model.failures})), label="before") + 1
        kept = [
            one
            for n, one in enumerate(self.model.failures)
            if one[3] >= before or all(later[0] != one[0] for later in self.model.failures[n + 1 :])
        ]
        with writing(self.database) as conn:
            assert queue.prune(conn, before=before) == len(self.model.failures) - len(kept)
        self.model.failures = kept

    # --- what must hold after each ---

    @invariant()
    def the_database_is_as_the_model_says(self) -> None:
        model, names = self.model, {run.id: name for name, run in self.runs.items()}
        with db.transaction(self.database) as conn:

            def rows(sql: str) -> list[tuple]:
                return [tuple(row) for row in db.execute(conn, sql).fetchall()]

            jobs = rows(
                "SELECT id, status, attempts, crashes, solo_crashes, lease_id, not_before, finished_at FROM jobs "
                "ORDER BY id"
            )
            leases = rows(
                "SELECT id, worker_id, run_id, split, lane, state, n_jobs, n_done, beat_at, expires_at, closed_at "
                "FROM leases ORDER BY id"
            )
            captions = {row[0]: row[1:] for row in rows("SELECT job_id, lease_id, text FROM captions")}
            failures = rows("SELECT job_id, lease_id, code, at FROM failures ORDER BY id")
            tallies = {
                row[:3]: int(row[3])
                for row in rows("SELECT run_id, split, status, sum(n) FROM tallies GROUP BY run_id, split, status")
            }
            n_done = dict(rows("SELECT id, n_done FROM workers"))
            is_overdue = queue.overdue(conn, now=self.at)
            has_suspects = {name: queue.has_suspects(conn, run, ["train", "test"]) for name, run in self.runs.items()}
        assert jobs == [
            (
                *(job.id, job.status, job.attempts, job.crashes, job.solo_crashes),
                *(job.lease_id, job.not_before, job.finished_at),
            )
            for job in sorted(model.jobs.values(), key=lambda job: job.id)
        ]
        assert leases == [
            (
                *(one.lease.id, one.lease.worker_id, one.lease.run_id, one.lease.split, one.lease.lane, one.state),
                *(len(one.job_ids), one.n_done, one.beat_at, one.expires_at, one.closed_at),
            )
            for one in model.leases.values()
        ]
        assert captions == model.captions
        assert failures == model.failures
        assert n_done == model.workers
        counted = {(names[run], split, status): n for (run, split, status), n in tallies.items() if n}
        assert counted == model.tallies()
        assert min(tallies.values()) >= 0
        assert is_overdue == (
            any(one.expires_at <= self.at for one in model.open())
            or any(job.status == "waiting" and job.not_before <= self.at for job in model.jobs.values())
        )
        for name, seen in has_suspects.items():
            pending = [job for job in model.jobs.values() if (job.run, job.status) == (name, "pending")]
            assert seen == any(job.crashes for job in pending)

    @invariant()
    def nothing_is_held_twice_or_lost(self) -> None:
        """Of the model, which the database equals: it is what must be true of any model."""
        model = self.model
        assert {job.id for job in model.jobs.values() if job.status == "done"} == model.captions.keys()
        is_open = {one.lease.id for one in model.open()}
        assert {job.lease_id for job in model.jobs.values() if job.status == "leased"} == is_open
        assert all((job.lease_id is None) == (job.status != "leased") for job in model.jobs.values())
        assert all(job.attempts >= 0 for job in model.jobs.values())
        for one in model.leases.values():
            assert one.n_done == sum(lease_id == one.lease.id for lease_id, _ in model.captions.values())


def run_machine(database: Engine, root: Path, *, examples: int, steps: int, derandomize: bool) -> None:
    for split, n in IMAGES.items():
        write_shard(root, split, range(n))
    located = datasets.locate(str(root), list(IMAGES))
    run_state_machine_as_test(
        lambda: QueueMachine(database, located),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=derandomize,
            database=None,
            print_blob=not derandomize,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.slow
def test_whatever_happens_in_whatever_order_the_queue_is_as_a_plain_model_says(database, tmp_path):
    run_machine(database, tmp_path / "set", examples=15, steps=40, derandomize=True)


@pytest.mark.torture
def test_whatever_happens_for_long_the_queue_is_as_a_plain_model_says(database, tmp_path):
    run_machine(database, tmp_path / "set", examples=500, steps=60, derandomize=False)


# --- Directed: chance finds these seldom or never -----------------------------------------------------------------


@pytest.fixture
def run(database: Engine, tmp_path: Path) -> Run:
    return fill(database, tmp_path / "set", 20)


def test_a_claim_beside_another_that_is_not_committed_takes_other_jobs(database, run):
    workers = [new_worker(database, name) for name in ("one", "two")]
    with ThreadPoolExecutor(1) as pool:
        with writing(database) as conn:
            first = queue.claim(conn, workers[0], run.id, "train", 4, ttl_ms=TTL, now=0)
            beside = pool.submit(claim, database, workers[1], run)
            is_sqlite = database.dialect.name == "sqlite"
            wait([beside], timeout=0.5 if is_sqlite else 30)
            assert beside.done() is not is_sqlite  # SQLite's second writer waits for the first, PostgreSQL's need not
        second = beside.result(timeout=30)
    assert second is not None
    assert [[job.id for job in lease.jobs] for lease in (first, second)] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert select(database, "SELECT lease_id, count(*) FROM jobs WHERE status = 'leased' GROUP BY 1 ORDER BY 1") == [
        (first.id, 4),
        (second.id, 4),
    ]


def test_a_job_that_went_to_another_is_not_completed_under_a_lease_that_is_open_still(database, run):
    # Neither the lease's state nor the number of attempts tells: retry sets it back to what the first worker saw.
    lease = claim(database, new_worker(database, "one"), run, 2)
    with writing(database) as conn:
        queue.fail(conn, lease, {1: Failure("bad", "no")}, now=0)
        queue.retry(conn, run)
    other = claim(database, new_worker(database, "two"), run, 1)
    assert [job.id for job in other.jobs] == [1]
    for job_ids in ([1], [1, 2]):
        with pytest.raises(LeaseLost), writing(database) as conn:
            queue.complete(conn, lease, [Completion(id, "Stale.") for id in job_ids], now=0)
    with pytest.raises(LeaseLost), writing(database) as conn:
        queue.fail(conn, lease, {1: Failure("stale", "no")}, now=0)
    with writing(database) as conn:
        assert queue.release(conn, lease, [1], now=0) == 0
    with writing(database) as conn:
        queue.complete(conn, other, [Completion(1, "The other's.")], now=0)
        queue.complete(conn, lease, [Completion(2, "Its own.")], now=0)
    stored = select(database, "SELECT job_id, text FROM captions ORDER BY job_id")
    assert stored == [(1, "The other's."), (2, "Its own.")]


def test_a_lease_that_was_extended_since_somebody_looked_is_not_ended(database, run):
    worker = new_worker(database, "one")
    lease = claim(database, worker, run)
    with writing(database) as conn:  # between a reaper's look and its update
        queue.heartbeat(conn, worker, [lease.id], ttl_ms=TTL, now=TTL)
        assert not queue.crash(conn, lease.id, now=TTL, expired_by=TTL)
    assert select(database, "SELECT state FROM leases") == [("open",)]
    assert select(database, "SELECT count(*) FROM jobs WHERE status = 'leased'") == [(4,)]


def test_a_late_failure_of_a_job_that_is_free_again_is_dropped(database, run):
    lease = claim(database, new_worker(database, "one"), run, 2)
    with writing(database) as conn:
        queue.crash(conn, lease.id, now=0)
        late = [Completion(job.id, failure=Failure("late", "no")) for job in lease.jobs]
        result = queue.recover(conn, lease.worker_id, lease, late, now=0)
    assert (result.stored, result.dropped, result.kept) == (set(), {1, 2}, set())
    assert select(database, "SELECT DISTINCT status FROM jobs") == [("pending",)]


# --- Directed: a worker's own clock, and its spool -----------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A worker's own clock, in lease times; it goes on when a test says so."""
    clock = SimpleNamespace(ttls=10.0)
    monkeypatch.setattr(clocks, "now", lambda: clock.ttls * TTL / 1000)
    return clock


@pytest.fixture
def source() -> Holdings:
    return Holdings()


@pytest.fixture
def fetcher(database: Engine, run: Run, clock: SimpleNamespace, source: Holdings) -> Iterator[Fetcher]:
    context = context_of(database, run, new_worker(database, "mine"), SmallEngine(batch_size=20), lease_ttl=TTL / 1000)
    fetcher = Fetcher(context, source, lambda completion: None)
    yield fetcher
    source.stop()
    if source.open_leases():
        fetcher.join(10)


def take(source: Holdings, n: int) -> list[int]:
    taken: list[int] = []
    while len(taken) < n:
        pictures = source.take(n - len(taken), 20)
        assert pictures, f"only {taken} within 20 s"
        taken += [picture.job_id for picture in pictures]
    return taken


def test_nothing_is_started_whose_lease_has_run_out_by_the_workers_own_clock(clock, source, fetcher):
    fetcher.start()
    assert take(source, 1) == [1]
    clock.ttls += 1
    assert source.take(4, 0.5) == []
    source.extend([lease.id for lease in source.open_leases()], clocks.now() + 1)
    assert take(source, 3) == [2, 3, 4]


def test_others_are_judged_only_after_a_lease_time_of_unbroken_contact(database, run, clock, fetcher):
    dead = claim(database, new_worker(database, "dead"), run)  # expired since 1970
    for ttls in (0, 0.4, 0.4, 0.6, 0.4, 0.4):  # the longest is a break
        clock.ttls += ttls
        fetcher._tidy()
        assert select(database, "SELECT state FROM leases") == [("open",)]
    fetcher._context.contact.lost(OSError("away"))
    for ttls in (0.4, 0.4):
        clock.ttls += ttls
        fetcher._tidy()
        assert select(database, "SELECT state FROM leases") == [("open",)]
    clock.ttls += 0.4
    fetcher._tidy()
    assert select(database, "SELECT id, state FROM leases") == [(dead.id, "expired")]


def test_suspects_are_claimed_when_nothing_else_is_held_and_nothing_is_claimed_beside_them(
    database, run, source, fetcher
):
    dead = claim(database, new_worker(database, "dead"), run, 2)
    with writing(database) as conn:
        queue.crash(conn, dead.id)
    fetcher.start()
    crowd = take(source, 18)
    assert crowd == list(range(3, 21))
    assert source.take(1, 0.5) == [], "suspects in company"
    (held,) = source.open_leases()
    source.settle(held, crowd)
    assert take(source, 1) == [1]
    with writing(database) as conn:
        queue.release(conn, held, [3, 4])  # before the fetcher looks again: the other suspect is not taken yet
    assert take(source, 1) == [2]
    assert source.take(1, 0.5) == [], "company for suspects"
    (held,) = source.open_leases()
    assert held.lane == SUSPECTS
    source.settle(held, [1, 2])
    assert take(source, 2) == [3, 4]


LEASE = Lease(7, 3, 1, "train", NORMAL)
COMPLETIONS = (Completion(1, "A caption."), Completion(2, failure=Failure("bad", "no")))


def test_a_living_workers_spool_is_left_alone_and_a_dead_ones_is_whole(tmp_path):
    kept = Spool(tmp_path, "one")
    kept.add(LEASE, COMPLETIONS)
    assert list(spool.abandoned(tmp_path)) == []
    kept.close()
    ((entries, keep),) = spool.abandoned(tmp_path)
    assert entries == [Entry("one", LEASE, COMPLETIONS)]
    keep([])
    assert list(spool.abandoned(tmp_path)) == []


def test_what_the_spool_keeps_is_on_the_disk_when_it_is_kept(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def fsync_and_tell(file: int) -> None:
        fsync(file)
        synced.append((os.fstat(file).st_ino, os.fstat(file).st_size))

    monkeypatch.setattr(os, "fsync", fsync_and_tell)
    kept = Spool(tmp_path, "one")
    kept.add(LEASE, COMPLETIONS)
    kept.close()
    found = (tmp_path / "one.jsonl").stat()
    assert synced == [(found.st_ino, found.st_size)]
