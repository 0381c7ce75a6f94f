"""What a worker holds: its leases, the pictures that are ready, and those that are running.

An engine pulls pictures from it, as its `Source`; the fetcher fills it, and the store takes out what is stored. It
knows no database.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field, replace

from rococap.engines import Completion, Prepared
from rococap.flags import BLANK
from rococap.queue import NORMAL, Claim, Job, Lease, Timing
from rococap.worker import clock


@dataclass(slots=True)
class Usage:
    """What the engine did: seconds without a picture to work on, decode steps, and the rows summed over them."""

    waited_sec: float = 0.0
    steps: int = 0
    rows: int = 0


@dataclass(slots=True)
class _Held:
    lease: Lease
    outstanding: set[int]
    runs_out_at: float
    """By our own clock, from before the database was asked: nothing of it is started later."""
    load_ms: float = 0.0
    prepare_ms: float = 0.0


@dataclass(slots=True)
class _State:
    """What the threads share: changed under the condition; a single look needs no lock."""

    held: dict[int, _Held] = field(default_factory=dict)
    lease_of: dict[int, int] = field(default_factory=dict)
    ready: deque[Prepared] = field(default_factory=deque)
    running: set[int] = field(default_factory=set)
    abandoned: set[int] = field(default_factory=set)
    finished: set[int] = field(default_factory=set)
    """Captioned, or failed: whoever stores it has it."""
    blank: set[int] = field(default_factory=set)
    """Their pictures show nothing."""
    stopping: bool = False
    ended: bool = False
    error: BaseException | None = None


class Holdings:
    """The books of one worker, and the Source of its engine. Any thread may call it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._state = _State()
        self._stepped_at = time.monotonic()
        self._has_rows = False
        self._is_waiting = False
        self.usage = Usage()

    # --- the engine's side: Source ---

    def take(self, most: int, wait: float | None) -> list[Prepared]:
        state = self._state
        with self._changed:
            if wait is None:
                self._has_rows = False  # an engine that has some never waits for ever
            while True:
                self._wait_for_work(wait)
                if state.error is not None:
                    raise state.error
                batch = self._pop(most)
                self._has_rows = self._has_rows or bool(batch)
                if batch or wait is not None or state.ended or state.stopping:  # else its time ran out just now
                    return batch

    def _wait_for_work(self, wait: float | None) -> None:
        state, started = self._state, time.monotonic()
        self._is_waiting = True
        self._changed.wait_for(lambda: self._may_start() or state.ended or state.stopping or state.error, timeout=wait)
        self._is_waiting = False
        self._stepped_at = time.monotonic()
        self.usage.waited_sec += self._stepped_at - started

    def _may_start(self) -> bool:
        """Whether something is ready whose lease has not run out by our own clock."""
        return any(self._is_live(picture.job_id) for picture in self._state.ready)

    def _is_live(self, job_id: int) -> bool:
        held = self._state.held.get(self._state.lease_of.get(job_id, 0))
        return held is not None and job_id not in self._state.abandoned and clock.now() < held.runs_out_at

    def _pop(self, most: int) -> list[Prepared]:
        """Pictures with a like number of tokens meet: the largest that are ready, all of which have their turn, since
        nothing is claimed until then."""
        state = self._state
        live = [picture for picture in state.ready if self._is_live(picture.job_id)]
        batch = sorted(live, key=lambda picture: -picture.n_tokens)[:most]
        taken = {picture.job_id for picture in batch}
        state.ready = deque(picture for picture in state.ready if picture.job_id not in taken)
        state.running |= taken
        self._changed.notify_all()
        return batch

    def step(self, rows: int) -> Set[int]:
        self._stepped_at = time.monotonic()
        self.usage.steps += rows > 0
        self.usage.rows += rows
        return self._state.abandoned

    def stalled_sec(self) -> float:
        """How long the engine has had rows without a step; 0 while it waits for pictures."""
        is_busy = self._has_rows and not self._is_waiting
        return time.monotonic() - self._stepped_at if is_busy else 0.0

    # --- the books ---

    def open_leases(self) -> list[Lease]:
        with self._changed:
            return [held.lease for held in self._state.held.values()]

    def unfinished_leases(self) -> list[Lease]:
        """Those that hold a picture without a result."""
        with self._changed:
            return [held.lease for held in self._state.held.values() if held.outstanding - self._state.finished]

    def lease_of(self, job_id: int) -> Lease | None:
        """The lease that a job is held under; None if it was lost."""
        with self._changed:
            lease_id = self._state.lease_of.get(job_id)
            return None if lease_id is None else self._state.held[lease_id].lease

    def extend(self, lease_ids: Iterable[int], runs_out_at: float) -> None:
        """A heartbeat succeeded for these."""
        with self._changed:
            for lease_id in lease_ids:
                if lease_id in self._state.held:
                    self._state.held[lease_id].runs_out_at = runs_out_at
            self._changed.notify_all()

    def finish(self, job_id: int) -> None:
        """It is captioned or failed, and to be stored: its lease goes on, and it is not given back."""
        with self._changed:
            self._state.running.discard(job_id)
            self._state.finished.add(job_id)

    def flagged(self, completion: Completion) -> Completion:
        """The completion with what is odd about its picture, which its engine need not see."""
        with self._changed:
            was_blank = completion.job_id in self._state.blank
            self._state.blank.discard(completion.job_id)
        if not was_blank:
            return completion
        return replace(completion, flags=",".join(filter(None, (completion.flags, BLANK))))

    def take_timing(self, lease: Lease) -> Timing:
        """What reading and preparing took since the last call."""
        with self._changed:
            held = self._state.held.get(lease.id)
            if held is None:
                return Timing()
            timing = Timing(load_ms=held.load_ms, prepare_ms=held.prepare_ms)
            held.load_ms = held.prepare_ms = 0.0
            return timing

    def settle(self, lease: Lease, job_ids: Iterable[int]) -> None:
        """These jobs left the lease: stored, failed or given back."""
        with self._changed:
            held = self._state.held.get(lease.id)
            for job_id in job_ids:
                self._state.lease_of.pop(job_id, None)
                self._state.running.discard(job_id)
                self._state.finished.discard(job_id)
                if held is not None:
                    held.outstanding.discard(job_id)
            if held is not None and not held.outstanding:
                del self._state.held[lease.id]
            self._changed.notify_all()

    def lose(self, lease_ids: Iterable[int]) -> None:
        """Another worker has these now, or they were cancelled: their rows are abandoned where they are."""
        state = self._state
        with self._changed:
            for lease_id in lease_ids:
                held = state.held.pop(lease_id, None)
                if held is not None:
                    state.abandoned |= held.outstanding
                    state.running -= held.outstanding
                    state.finished -= held.outstanding
                    for job_id in held.outstanding:
                        state.lease_of.pop(job_id, None)
            state.ready = deque(picture for picture in state.ready if picture.job_id not in state.abandoned)
            self._changed.notify_all()

    def withdraw(self, *, running: bool) -> list[tuple[Lease, list[int]]]:
        """Abandons what is held and not started, and, if `running`, the rows under way; returns it for release."""
        state = self._state
        with self._changed:
            found = [
                (held.lease, sorted(held.outstanding - state.finished - (set() if running else state.running)))
                for held in state.held.values()
            ]
            state.abandoned.update(*(job_ids for _, job_ids in found))
            state.ready = deque(picture for picture in state.ready if picture.job_id not in state.abandoned)
            return [(lease, job_ids) for lease, job_ids in found if job_ids]

    def stop(self) -> None:
        """No more claims; the source ends with what is ready."""
        with self._changed:
            self._state.stopping = True
            self._changed.notify_all()

    def break_off(self, error: BaseException) -> None:
        """Makes the engine's next `take` raise."""
        with self._changed:
            self._state.error = self._state.error or error
            self._changed.notify_all()

    # --- the fetcher's side ---

    @property
    def is_stopping(self) -> bool:
        return self._state.stopping

    def is_abandoned(self, job_id: int) -> bool:
        return job_id in self._state.abandoned

    def wait_until_taken(self) -> bool:
        """Until the engine has all that is ready, and nothing is held that was in a crash. False if it is stopping."""
        held = self._state.held
        return self._wait(lambda: not self._state.ready and all(one.lease.lane == NORMAL for one in held.values()))

    def wait_until_empty(self) -> bool:
        """Until nothing is held. False if it is stopping."""
        return self._wait(lambda: not self._state.held)

    def _wait(self, condition: Callable[[], bool]) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: condition() or self._state.stopping)
            return not self._state.stopping

    def pause(self, seconds: float) -> None:
        """Returns early if it is stopping."""
        with self._changed:
            self._changed.wait_for(lambda: self._state.stopping, timeout=seconds)

    def enter(self, claim: Claim, runs_out_at: float) -> None:
        """A claim: by our own clock nothing of it is started after `runs_out_at`."""
        job_ids = {job.id for job in claim.jobs}
        with self._changed:
            self._state.held[claim.id] = _Held(claim, set(job_ids), runs_out_at)
            self._state.lease_of.update(dict.fromkeys(job_ids, claim.id))
            self._state.abandoned -= job_ids  # lost once, and claimed again
            self._state.blank -= job_ids

    def offer(self, job: Job, prepared: Prepared, load_sec: float, prepare_sec: float, *, is_blank: bool) -> None:
        """A picture is ready, unless its lease was lost meanwhile."""
        with self._changed:
            held = self._state.held.get(job.lease_id)
            if held is not None:
                held.load_ms += load_sec * 1000
                held.prepare_ms += prepare_sec * 1000
                if is_blank:
                    self._state.blank.add(job.id)
                self._state.ready.append(prepared)
                self._changed.notify_all()

    def end(self) -> None:
        """Nothing more comes: the source ends with what is ready."""
        with self._changed:
            self._state.ended = True
            self._changed.notify_all()
