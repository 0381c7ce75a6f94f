"""Every interleaving of two workers, whatever goes wrong in between: each step keeps the promises, and from wherever it
has led, workers that are left in peace finish everything.

`small_world` has the steps. States are equal up to the ids of leases and workers and a shift of time. They are visited
in order of misfortunes and then of steps, so that a broken promise is shown with the simplest way there.
"""

import hashlib
import heapq
import logging
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mutants
import pytest
from small_world import (
    CLAIM,
    FINISHED,
    MAX_ATTEMPTS,
    TICK_MS,
    TROUBLES,
    TTL_MS,
    VERBS,
    Mind,
    Rows,
    Saved,
    Step,
    World,
    controlled,
    in_memory,
    lane_of,
)
from sqlalchemy import Connection, Engine

from rococap import db, queue
from rococap.engines import Completion, Failure
from rococap.errors import DatabaseUnavailable, LeaseLost
from rococap.queue import NORMAL, SOLO, SUSPECTS, Lease

LARGEST = {NORMAL: CLAIM, SUSPECTS: 4, SOLO: 1}
"""How many jobs a claim takes at most."""
STORING = ("caption", "fail", "replay", "take_over")
"""Steps that store what a worker has made, now or before it died."""

CHANGES = {
    ("pending", "leased"): (["claim"], 1),
    ("leased", "done"): (["caption", "replay", "take_over"], 0),
    ("pending", "done"): (["replay", "take_over"], 1),
    ("waiting", "done"): (["replay", "take_over"], 1),
    ("leased", "waiting"): (["fail", "replay", "take_over"], 0),
    ("leased", "failed"): (["fail", "replay", "take_over", "reap", "give_up"], 0),
    ("leased", "pending"): (["give_back", "forget", "replay", "take_over", "reap", "give_up"], -1),
    ("waiting", "pending"): (["wake"], 0),
    ("pending", "cancelled"): (["cancel"], 0),
    ("waiting", "cancelled"): (["cancel"], 0),
    ("leased", "cancelled"): (["cancel"], 0),
    ("failed", "pending"): (["retry"], 0),
    ("cancelled", "pending"): (["retry"], 0),
}
"""What may become of a job, by which steps, and what that adds to its attempts. What is done is done for good."""

SCHEDULE = ("beat", "forget", "replay", "take_over", "take", "caption", "wake", "reap", "claim", "tick")
"""What workers that are left in peace do, the most urgent first."""


# --- The promises ----------------------------------------------------------------------------------------------


def check_state(world: World, rows: Rows) -> None:
    """What holds at any moment."""
    assert rows.tallies == Counter(job.status for job in rows.jobs.values()), "the tallies are wrong"
    done = {id for id, job in rows.jobs.items() if job.status == "done"}
    assert rows.captions.keys() == done, "a job is done without a caption, or has a caption without being done"
    made = Counter(lease_id for lease_id, _ in rows.captions.values())
    assert {id: lease.n_done for id, lease in rows.leases.items() if lease.n_done} == made, "a lease counts wrongly"
    assert rows.n_done == len(rows.captions), "the workers count wrongly"
    holding = {job.lease_id for job in rows.jobs.values() if job.lease_id is not None}
    assert holding == rows.open.keys(), "an ended lease holds jobs, or an open one holds none"
    assert all(0 <= job.attempts <= MAX_ATTEMPTS for job in rows.jobs.values()), "attempts beyond their bounds"
    failed = {id for id, job in rows.jobs.items() if job.status == "failed"}
    assert failed <= {id for id, *_ in rows.failures}, "a job failed without a reason"
    for mind in world.minds:
        known = mind.state.held.keys() | {entry.lease.id for entry in mind.entries}
        mine = {id for id, lease in rows.open.items() if lease.worker_id == mind.worker_id}
        assert mind.is_unsure or mine <= known, "a worker has forgotten a lease, which will be taken for a crash"
        lanes = [held.lease.lane for held in mind.state.held.values()]
        assert len(lanes) < 2 or set(lanes) == {NORMAL}, "a suspect has company"
        ready = {picture.job_id for picture in mind.state.ready}
        assert ready <= mind.state.lease_of.keys(), "a picture that was lost keeps the worker from claiming"
        for id, held in mind.state.held.items():
            lease = rows.leases[id]
            assert lease.state != "open" or held.expires_at * 1000 <= lease.expires_at, (
                "a worker takes its lease for longer than it is"
            )


def check_refusals(world: World, rows: Rows) -> None:
    """What nobody may do is refused, and changes nothing."""
    for id, lease in rows.leases.items():
        for worker_id in {lease.worker_id, *(mind.worker_id for mind in world.minds)}:
            is_held = lease.state == "open" and worker_id == lease.worker_id
            forged = Lease(id, worker_id, world.run.id, "train", lease.lane)
            refuse_beat(world, forged, is_held)
            for job_id, job in rows.jobs.items():
                if not (is_held and job.lease_id == id):
                    refuse_writes(world, forged, job_id, is_held)
    for mind in world.minds:
        with undone(world) as conn:
            mine = {id for id, lease in rows.open.items() if lease.worker_id == mind.worker_id}
            assert queue.release_forgotten(conn, mind.worker_id, mine) == 0, (
                "a worker gives back what it has not forgotten"
            )
    with undone(world) as conn:
        queue.pause(conn, world.run, True)
        for lane in LARGEST:
            claim = queue.claim(conn, mind.worker_id, world.run.id, "train", CLAIM, ttl_ms=TTL_MS, lane=lane)
            assert claim is None, "a paused run is claimed from"
    with undone(world) as conn:
        reaped = queue.reap(conn, contact_ms=TTL_MS - 1)
        assert not reaped, "leases are reaped that last longer than the contact with the database"
    assert world.look() == rows, "what was refused changed something"


def refuse_beat(world: World, lease: Lease, is_held: bool) -> None:
    with undone(world) as conn:
        kept = queue.heartbeat(conn, lease.worker_id, [lease.id], ttl_ms=TTL_MS)
        assert kept == ({lease.id} if is_held else set()), f"worker {lease.worker_id} extends lease {lease.id}"


def refuse_writes(world: World, lease: Lease, job_id: int, is_held: bool) -> None:
    """Tries to complete, fail and release a job that the lease does not hold, or not for this worker."""
    for write in (
        lambda conn: queue.complete(conn, lease, [Completion(job_id, "Forged.")]),
        lambda conn: queue.fail(conn, lease, {job_id: Failure("forged", "Forged.", transient=False)}),
        lambda conn: queue.release(conn, lease, [job_id]),
    ):
        try:
            with db.transaction(world.database, write=True) as conn:
                released = write(conn)
        except LeaseLost:
            continue
        assert (is_held, released) == (True, 0), f"worker {lease.worker_id} changes job {job_id} by lease {lease.id}"


@contextmanager
def undone(world: World) -> Iterator[Connection]:
    """A transaction that is rolled back."""
    with suppress(DatabaseUnavailable), db.transaction(world.database, write=True) as conn:
        yield conn
        raise DatabaseUnavailable("Undone.")


@dataclass(frozen=True)
class Move:
    """A step, and what was before and after it."""

    world: World
    step: Step
    saved: Saved
    after: Rows

    @property
    def before(self) -> Rows:
        return self.saved.rows

    @property
    def verb(self) -> str:
        return self.step.verb

    @property
    def mind(self) -> Mind:
        """The worker's, before the step."""
        return self.saved.minds[self.step.args[0]]

    def changed(self) -> dict[int, tuple[Any, Any]]:
        """The jobs that are not as they were."""
        return {id: (job, self.after.jobs[id]) for id, job in self.before.jobs.items() if job != self.after.jobs[id]}


def check_move(move: Move) -> None:
    """What any step may change."""
    check_jobs(move)
    check_leases(move)
    check_record(move)
    check_nothing_made_is_lost(move)
    if move.verb == "cancel":
        chosen = move.step.args or move.after.jobs
        assert all(move.after.jobs[id].status in FINISHED for id in chosen), "cancel left something out"
    if move.verb == "replay" and not move.step.answer:
        check_told(move)
    if move.verb == "claim":
        check_claim(move)
    if move.verb == "take":
        check_start(move)
    if move.verb == "beat" and not move.step.answer:
        check_beat(move)
    if move.verb == "caption" and not move.step.answer:
        check_stored(move)
    if move.verb == "reap":
        check_reap(move)


def check_jobs(move: Move) -> None:
    now = move.saved.now
    for id, (old, new) in move.changed().items():
        verbs, charge = CHANGES.get((old.status, new.status), ([], 0))
        assert move.verb in verbs, f"{move.verb} made job {id} {new.status}, which was {old.status}"
        crashed = solo = 0
        if old.status == "leased":
            lease = move.before.leases[old.lease_id]
            assert lease.state == "open", f"{move.verb} changed job {id} under a lease that had ended"
            check_right(move, id, old.lease_id)
            crashed = int(move.after.leases[old.lease_id].state == "expired")
            solo = crashed * (lease.lane == SOLO)
        if move.verb == "retry":
            assert (new.attempts, new.crashes, new.solo_crashes) == (0, 0, 0), f"job {id} keeps its record"
            continue
        charge = -1 if crashed else charge
        assert new.attempts == old.attempts + charge, (
            f"the attempts of job {id} go from {old.attempts} to {new.attempts}"
        )
        counted = (new.crashes - old.crashes, new.solo_crashes - old.solo_crashes)
        assert counted == (crashed, solo), f"job {id} is charged with {counted} crashes"
        if crashed:
            killers = new.solo_crashes == 2
            assert new.status == ("failed" if killers else "pending"), f"job {id} is {new.status} after a crash"
        elif new.status == "failed":
            assert old.attempts == MAX_ATTEMPTS, f"job {id} failed for good with attempts left"
        elif new.status == "waiting":
            assert old.attempts < MAX_ATTEMPTS, f"job {id} has more attempts than there are"
            assert new.not_before == now + TICK_MS, f"job {id} waits for {new.not_before - now} ms"
        elif move.verb == "wake":
            assert old.not_before <= now, f"job {id} is woken too early"


def check_right(move: Move, job_id: int, lease_id: int) -> None:
    """Whether who took the step may change a job of this lease."""
    lease = move.before.leases[lease_id]
    match move.verb:
        case "reap":
            assert lease.worker_id != move.mind.worker_id, "a worker reaped itself"
            assert lease.expires_at <= move.saved.now, f"lease {lease_id} was reaped too early"
        case "forget":
            assert lease.worker_id == move.mind.worker_id, f"job {job_id} was released by another worker"
            assert lease_id not in move.mind.state.held, f"job {job_id} was released although its worker has it"
        case "caption" | "fail" | "give_back" | "give_up":
            assert lease.worker_id == move.mind.worker_id, f"job {job_id} is another worker's"
        case "replay":
            assert lease_id == move.mind.entries[move.step.args[1]].lease.id, f"job {job_id} is under another lease"
        case "take_over":
            assert lease_id == move.saved.left[move.step.args[1]].lease.id, f"job {job_id} is under another lease"


def check_leases(move: Move) -> None:
    ends = {
        "closed": (*STORING, "cancel"),
        "released": ("give_back", "forget", "replay", "take_over", "give_up"),
        "expired": ("reap", "give_up"),
    }
    for id, new in move.after.leases.items():
        old = move.before.leases.get(id)
        if old is None:
            assert id > max(move.before.leases, default=0), f"the id of lease {id} was used again"
            assert move.verb in ("claim", "replay", "take_over"), f"{move.verb} made a lease"
        elif old.state != "open":
            assert new == old, f"{move.verb} changed lease {id}, which had ended"
        elif new.state != "open":
            assert move.verb in ends[new.state], f"lease {id} is {new.state} after {move.verb}"
        elif (new.beat_at, new.expires_at) != (old.beat_at, old.expires_at):
            assert move.verb == "beat", f"{move.verb} extended lease {id}"
            assert old.worker_id == move.mind.worker_id, f"lease {id} was extended by another worker"
    assert move.before.leases.keys() <= move.after.leases.keys(), "the record of a lease is gone"


def check_record(move: Move) -> None:
    """Captions and failures are only ever added, each with the change of its job."""
    before, after, changed = move.before, move.after, move.changed()
    assert before.captions.items() <= after.captions.items(), "a caption was changed"
    for id in after.captions.keys() - before.captions.keys():
        assert after.captions[id][1].startswith(f"Job {id} by"), f"job {id} has another's caption"
    new = after.failures[len(before.failures) :]
    assert after.failures[: len(before.failures)] == before.failures, "a failure was changed"
    assert sorted(id for id, *_ in new) == [
        id for id, (_, job) in changed.items() if job.status in ("waiting", "failed")
    ], "failures do not go with their jobs"


def check_nothing_made_is_lost(move: Move) -> None:
    """A caption is stored, or in a spool, until its job has another result."""
    made = set(move.step.args[1:]) if move.verb == "caption" else set()
    kept: set[int] = set()
    for entries, them in (
        (made, [*move.saved.left, *(entry for mind in move.saved.minds for entry in mind.entries)]),
        (kept, [*move.world.left, *(entry for mind in move.world.minds for entry in mind.entries)]),
    ):
        entries |= {one.job_id for entry in them for one in entry.completions if one.failure is None}
    for id in made - kept:
        status = move.after.jobs[id].status
        assert status in FINISHED, f"the caption of job {id}, which is {status}, is nowhere any more"


def check_told(move: Move) -> None:
    """A worker tells a caption that came too late from one that was stored before."""
    entry = move.mind.entries[move.step.args[1]]
    lost = {
        one.job_id
        for one in entry.completions
        if one.failure is None
        and move.after.jobs[one.job_id].status in FINISHED
        and move.after.captions.get(one.job_id, (0,))[0] != entry.lease.id
        and one.job_id not in move.after.captions.keys() - move.before.captions.keys()
    }
    assert move.world.n_lost == len(lost), f"{move.world.n_lost} captions were counted as lost, not {len(lost)}"


def check_claim(move: Move) -> None:
    _, lane = move.step.args
    claimed = [id for id, (_, job) in move.changed().items() if job.status == "leased"]
    free = [id for id, job in move.before.jobs.items() if job.status == "pending" and lane_of(job) == lane]
    free.sort(key=lambda id: (move.before.jobs[id].crashes, id))
    assert claimed == sorted(free[: min(CLAIM, LARGEST[lane])]), f"{claimed} were claimed while {free} were free"
    new = {id: lease for id, lease in move.after.leases.items() if id not in move.before.leases}
    assert len(new) == bool(claimed), "a claim is one lease"
    for lease in new.values():
        assert (lease.worker_id, lease.lane) == (move.mind.worker_id, lane)
        assert lease.expires_at == move.saved.now + TTL_MS


def check_start(move: Move) -> None:
    slot = move.step.args[0]
    state = move.world.minds[slot].state
    for id in state.running - move.mind.state.running:
        lease = move.before.leases[state.lease_of[id]]
        assert lease.expires_at > move.saved.now, f"job {id} was started after its lease had expired"


def check_beat(move: Move) -> None:
    """The worker knows which leases it holds, and those are extended."""
    mine = {id for id, lease in move.before.open.items() if lease.worker_id == move.mind.worker_id}
    kept = move.world.minds[move.step.args[0]].state.held.keys()
    assert kept == move.mind.state.held.keys() & mine, f"the worker takes {set(kept)} for its own"
    for id in kept:
        assert move.after.leases[id].expires_at == move.saved.now + TTL_MS, f"lease {id} was not extended"


def check_stored(move: Move) -> None:
    """Captions of an open lease are stored, however late they come, unless one of its jobs has left it."""
    jobs = [move.before.jobs[id] for id in move.step.args[1:]]
    (lease_id,) = {move.mind.state.lease_of[id] for id in move.step.args[1:]}
    if all(job.lease_id == lease_id for job in jobs):
        stored = [id for id in move.step.args[1:] if move.after.jobs[id].status == "done"]
        assert len(stored) == len(jobs), f"only {stored} were stored, although lease {lease_id} was open"


def check_reap(move: Move) -> None:
    """A lease is reaped as soon as one of another worker has expired, and one at a time."""
    expired = {
        id
        for id, lease in move.before.open.items()
        if lease.expires_at <= move.saved.now and lease.worker_id != move.mind.worker_id
    }
    n_reaped = len(expired - move.after.open.keys())
    assert n_reaped == min(len(expired), 1), f"{n_reaped} leases were reaped of {sorted(expired)}"


# --- The search ------------------------------------------------------------------------------------------------


def is_misfortune(step: Step, saved: Saved, rows: Rows) -> bool:
    """Whether this need not happen. To be reaped while alive is one; that the dead are reaped is not."""
    if step.answer or step.verb in TROUBLES:
        return True
    held = {id for mind in saved.minds for id in mind.state.held}
    return step.verb == "reap" and any(
        rows.leases[id].expires_at <= saved.now
        for id in rows.open.keys() & held - saved.minds[step.args[0]].state.held.keys()
    )


@dataclass
class Explored:
    """What was found: by state, how it is reached and what workers in peace do next."""

    cost: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    """The fewest misfortunes and steps to a state."""
    came: dict[bytes, tuple[bytes, Step]] = field(default_factory=dict)
    onward: dict[bytes, tuple[Step, bytes]] = field(default_factory=dict)
    over: set[bytes] = field(default_factory=set)
    n_steps: int = 0
    verbs: set[str] = field(default_factory=set)
    """The steps that led to another state."""

    def way(self, state: bytes) -> list[Step]:
        steps = []
        while state in self.came:
            state, step = self.came[state]
            steps.append(step)
        return steps[::-1]

    def states(self, state: bytes) -> list[bytes]:
        """The states after each step of the way."""
        states = []
        while state in self.came:
            states.append(state)
            state, _ = self.came[state]
        return states[::-1]

    def depth(self) -> int:
        return max(steps for _, steps in self.cost.values())


def explain(broken: object, steps: list[Step]) -> str:
    lines = "\n".join(f"    {step}" for step in steps)
    return f"{broken}\nThe simplest way there, from a new world:\n{lines}"


def digest(key: Any) -> bytes:
    return hashlib.blake2b(repr(key).encode(), digest_size=16).digest()


def explore(world: World, misfortunes: int) -> Explored:
    """All states that are reached with so many misfortunes. Raises AssertionError if one breaks a promise."""
    found = Explored()
    start = digest(world.key(world.look()))
    found.cost[start] = (0, 0)
    refused = set()
    n = 0
    heap: list[tuple[tuple[int, int], int, bytes, Saved]] = [((0, 0), 0, start, world.save())]
    while heap:
        cost, _, state, saved = heapq.heappop(heap)
        if cost > found.cost[state]:
            continue
        before = saved.rows
        world.restore(saved)
        if (held := repr(world.key(before)[:2])) not in refused:
            refused.add(held)
            try:
                check_refusals(world, before)
            except AssertionError as error:
                raise AssertionError(explain(error, found.way(state))) from error
        rank = len(SCHEDULE)
        if (
            before.is_over()
            and not before.open
            and not world.left
            and not any(m.state.held or m.entries for m in world.minds)
        ):
            found.over.add(state)
        for step in list(world.steps(before)):
            is_bad = is_misfortune(step, saved, before)
            if cost[0] + is_bad > misfortunes:
                continue
            world.restore(saved)
            try:
                world.do(step.verb, *step.args, answer=step.answer)
                after = world.look()
                check_move(Move(world, step, saved, after))
                check_state(world, after)
            except Exception as error:
                raise AssertionError(explain(repr(error), [*found.way(state), step])) from error
            found.n_steps += 1
            reached = digest(world.key(after))
            if reached == state:
                continue
            found.verbs.add(step.verb)
            if not is_bad and step.verb in SCHEDULE and SCHEDULE.index(step.verb) < rank:
                rank = SCHEDULE.index(step.verb)
                found.onward[state] = step, reached
            now = (cost[0] + is_bad, cost[1] + 1)
            if now < found.cost.get(reached, (misfortunes + 1, 0)):
                found.cost[reached] = now
                found.came[reached] = state, step
                n += 1
                heapq.heappush(heap, (now, n, reached, world.save()))
    check_everything_ends(found)
    return found


def check_everything_ends(found: Explored) -> None:
    """From every state, workers that are left in peace come to an end: nothing is stuck for ever."""
    ends = set(found.over)
    for state in found.cost:
        path = []
        seen = set()
        at = state
        while at not in ends:
            if at in seen or at not in found.onward:
                steps = [found.onward[one][0] for one in path]
                what = "nothing ever ends here" if at in seen else "nothing goes on here"
                raise AssertionError(explain(f"{what}, after workers were left in peace", [*found.way(state), *steps]))
            seen.add(at)
            path.append(at)
            at = found.onward[at][1]
        ends.update(path)


# --- The tests -------------------------------------------------------------------------------------------------


@contextmanager
def small_world(database: Engine | None = None, **size: Any) -> Iterator[World]:
    database = database or in_memory()
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        patch.setattr(logging.root.manager, "disable", logging.WARNING)
        yield World(database, Path(folder), controlled(patch), **size)


@cache
def explored(misfortunes: int, **size: Any) -> Explored:
    with small_world(**size) as world:
        return explore(world, misfortunes)


@pytest.mark.parametrize(
    ("misfortunes", "crashes", "verbs"),
    [
        (0, (0, 2, 2), {"claim", "take", "beat", "caption", "tick"}),
        (1, (0, 0), VERBS - {"take_over"}),
    ],
)
def test_two_workers_keep_every_promise_whatever_goes_wrong(misfortunes, crashes, verbs):
    assert explored(misfortunes, crashes=crashes).verbs == verbs


@pytest.mark.torture
@pytest.mark.parametrize(
    ("misfortunes", "crashes"), [(2, (0,)), (2, (2,)), (1, (0, 2)), (1, (0, 0, 2)), (2, (0, 0))], ids=str
)
def test_two_workers_keep_every_promise_in_larger_worlds(misfortunes, crashes):
    started = time.process_time()
    found = explored(misfortunes, crashes=crashes)
    seconds = time.process_time() - started
    print(
        f"{len(found.cost)} states, {found.n_steps} steps between them, depth {found.depth()}, {seconds:.0f} s of CPU"
    )


UNSEEN = {
    *("claim-without-lock", "claim-waits", "crash-though-extended", "worker-before-leases", "goodbye-out-of-order"),
    *("status-by-in", "splits-by-in"),
    *("deletes-what-is-held", "deleted-runs-keep-leases", "delete-what-people-did", "recover-takes-another-runs"),
    *("any-database-will-do", "lease-of-another-database"),
}
"""Mutants of transactions that run at once, of plans, of runs that are deleted, and of other databases: there is one
transaction at a time here, one run and one database."""


@pytest.mark.torture
def test_the_search_catches_the_mutants_of_the_queue(monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "-m ''")
    here = "queue/test_interleavings.py::test_two_workers_keep_every_promise"
    worlds = (
        f"{here}_whatever_goes_wrong",
        *(f"{here}_in_larger_worlds[{world}]" for world in ("1-(0, 2)", "2-(0,)", "2-(2,)")),
    )
    survivors = {}
    with mutants.copy() as place:
        modules = [place / "rococap" / "queue" / f"{name}.py" for name in ("leases", "recovery", "operate")]
        for mutant in mutants.MUTANTS:
            paths = {path for where, old, _ in mutant.edits for path, _, _ in mutants.find(place, where, old)}
            if mutant.name not in UNSEEN and paths & {*modules}:
                answer = mutants.try_out(place, replace(mutant, tests=worlds))
                print(f"{answer.verdict:<8}  {mutant.name:<32}  {answer.seconds:5.1f} s  {answer.by}", flush=True)
                if answer.verdict != "caught":
                    survivors[mutant.name] = answer.verdict
    assert not survivors


@pytest.mark.parametrize(
    ("crashes", "sample"),
    [pytest.param((0, 0), 20, marks=pytest.mark.slow), pytest.param((0, 0, 2), 500, marks=pytest.mark.torture)],
)
def test_a_sample_of_the_ways_leads_through_the_same_states_on_postgresql(postgres, crashes, sample):
    found = explored(1, crashes=crashes)
    database = db.connect(postgres.create(template="empty_queue"))
    with small_world(database, crashes=crashes) as world:
        start = world.save()
        for state in random.Random(sample).sample(sorted(found.cost), sample):
            world.restore(start)
            for step, expected in zip(found.way(state), found.states(state), strict=True):
                saved = world.save(to_restore=False)
                world.do(step.verb, *step.args, answer=step.answer)
                rows = world.look()
                check_move(Move(world, step, saved, rows))
                check_state(world, rows)
                same = digest(world.key(rows)) == expected
                assert same, explain(f"PostgreSQL is in another state after {step}.", found.way(state))
    database.dispose()
