"""What a worker holds: its leases, the pictures that are ready, and those that are running.

The fetcher fills it, the engine pulls pictures from it as its `Source`, and the store removes what is stored. It knows
no database.
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
    """The engine's activity: seconds without a picture to work on, decode steps, and the sum of rows over all steps."""

    waited_sec: float = 0.0
    steps: int = 0
    rows: int = 0


@dataclass(slots=True)
class _Held:
    lease: Lease
    outstanding: set[int]
    expires_at: float
    """By our own clock, read before the database extended the lease: no job of it is started later."""
    load_ms: float = 0.0
    prepare_ms: float = 0.0


@dataclass(slots=True)
class _State:
    """State that the threads share. It is changed under the condition; reading a single attribute needs no lock."""

    held: dict[int, _Held] = field(default_factory=dict)
    lease_of: dict[int, int] = field(default_factory=dict)
    ready: deque[Prepared] = field(default_factory=deque)
    running: set[int] = field(default_factory=set)
    abandoned: set[int] = field(default_factory=set)
    finished: set[int] = field(default_factory=set)
    """Captioned or failed, and waiting to be stored."""
    blank: set[int] = field(default_factory=set)
    """Their pictures are a single colour."""
    stopping: bool = False
    ended: bool = False
    error: BaseException | None = None


class Holdings:
    """The leases and jobs of one worker, and the Source of its engine. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._state = _State()
        self._stepped_at = time.monotonic()
        self._has_rows = False
        self._is_waiting = False
        self.usage = Usage()

    # --- the engine's side: Source ---

    def take(self, limit: int, wait: float | None) -> list[Prepared]:
        state = self._state
        with self._changed:
            if wait is None:
                self._has_rows = False  # an engine that has rows never waits without a timeout
            while True:
                self._wait_for_work(wait)
                if state.error is not None:
                    raise state.error
                batch = self._pop(limit)
                self._has_rows = self._has_rows or bool(batch)
                if batch or wait is not None or state.ended or state.stopping:  # else the lease expired just now
                    return batch

    def _wait_for_work(self, wait: float | None) -> None:
        state, started = self._state, time.monotonic()
        self._is_waiting = True
        self._changed.wait_for(lambda: self._may_start() or state.ended or state.stopping or state.error, timeout=wait)
        self._is_waiting = False
        self._stepped_at = time.monotonic()
        self.usage.waited_sec += self._stepped_at - started

    def _may_start(self) -> bool:
        """Whether a picture is ready whose lease has not expired by our own clock."""
        return any(self._is_live(picture.job_id) for picture in self._state.ready)

    def _is_live(self, job_id: int) -> bool:
        held = self._state.held.get(self._state.lease_of.get(job_id, 0))
        return held is not None and job_id not in self._state.abandoned and clock.now() < held.expires_at

    def _pop(self, limit: int) -> list[Prepared]:
        """Removes the largest pictures that are ready, so that pictures of similar length share a batch. None is
        starved, since nothing more is claimed until all are taken.
        """
        state = self._state
        live = [picture for picture in state.ready if self._is_live(picture.job_id)]
        batch = sorted(live, key=lambda picture: -picture.n_tokens)[:limit]
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
        """Seconds since the engine's last step while it has rows; 0 while it waits for pictures."""
        is_busy = self._has_rows and not self._is_waiting
        return time.monotonic() - self._stepped_at if is_busy else 0.0

    # --- leases and results ---

    def open_leases(self) -> list[Lease]:
        with self._changed:
            return [held.lease for held in self._state.held.values()]

    def unfinished_leases(self) -> list[Lease]:
        """The leases that hold a job without a result."""
        with self._changed:
            return [held.lease for held in self._state.held.values() if held.outstanding - self._state.finished]

    def lease_of(self, job_id: int) -> Lease | None:
        """The lease under which a job is held; None if it was lost."""
        with self._changed:
            lease_id = self._state.lease_of.get(job_id)
            return None if lease_id is None else self._state.held[lease_id].lease

    def extend(self, lease_ids: Iterable[int], expires_at: float) -> None:
        """Records a successful heartbeat for these leases: by our own clock they now expire at `expires_at`."""
        with self._changed:
            for lease_id in lease_ids:
                if lease_id in self._state.held:
                    self._state.held[lease_id].expires_at = expires_at
            self._changed.notify_all()

    def finish(self, job_id: int) -> None:
        """Marks a job as captioned or failed and waiting to be stored: its lease is kept, and it is not released."""
        with self._changed:
            self._state.running.discard(job_id)
            self._state.finished.add(job_id)

    def flagged(self, completion: Completion) -> Completion:
        """The completion, flagged BLANK if its picture is a single colour, which the engine does not check."""
        with self._changed:
            was_blank = completion.job_id in self._state.blank
            self._state.blank.discard(completion.job_id)
        if not was_blank:
            return completion
        return replace(completion, flags=",".join(filter(None, (completion.flags, BLANK))))

    def take_timing(self, lease: Lease) -> Timing:
        """The time spent on reading and preparing for this lease since the last call."""
        with self._changed:
            held = self._state.held.get(lease.id)
            if held is None:
                return Timing()
            timing = Timing(load_ms=held.load_ms, prepare_ms=held.prepare_ms)
            held.load_ms = held.prepare_ms = 0.0
            return timing

    def settle(self, lease: Lease, job_ids: Iterable[int]) -> None:
        """Forgets jobs that have left the lease: stored, failed or released."""
        with self._changed:
            held = self._state.held.get(lease.id)
            if held is not None:
                self._remove(held, held.outstanding & set(job_ids))
            self._changed.notify_all()

    def lose(self, lease_ids: Iterable[int]) -> None:
        """Forgets leases that the database no longer grants us, and abandons their jobs wherever they are."""
        with self._changed:
            for lease_id in lease_ids:
                held = self._state.held.get(lease_id)
                if held is not None:
                    self._state.abandoned |= held.outstanding
                    self._remove(held, set(held.outstanding))
            self._changed.notify_all()

    def _remove(self, held: _Held, job_ids: Set[int]) -> None:
        """Forgets jobs of a lease, and with the last of them the lease."""
        state = self._state
        for job_id in job_ids:
            del state.lease_of[job_id]
        state.running -= job_ids
        state.finished -= job_ids
        state.ready = deque(picture for picture in state.ready if picture.job_id not in job_ids)
        held.outstanding -= job_ids
        if not held.outstanding:
            del state.held[held.lease.id]

    def withdraw(self, *, running: bool) -> list[tuple[Lease, list[int]]]:
        """Abandons the jobs that have not started and, if `running`, those that have; returns them by lease, to be
        released. Jobs with a result are not included.
        """
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
        """Ends claiming; the engine still gets the pictures that are ready."""
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
        """Waits until the engine has taken every ready picture and no job that has been in a crash is held.

        Returns False if the worker is stopping.
        """
        leases = self._state.held
        return self._wait(lambda: not self._state.ready and all(h.lease.lane == NORMAL for h in leases.values()))

    def wait_until_empty(self) -> bool:
        """Waits until nothing is held. Returns False if the worker is stopping."""
        return self._wait(lambda: not self._state.held)

    def _wait(self, condition: Callable[[], bool]) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: condition() or self._state.stopping)
            return not self._state.stopping

    def pause(self, seconds: float) -> None:
        """Waits for so long, or until the worker is stopping."""
        with self._changed:
            self._changed.wait_for(lambda: self._state.stopping, timeout=seconds)

    def enter(self, claim: Claim, expires_at: float) -> None:
        """Adds a claim. No job of it is started after `expires_at` by our own clock."""
        job_ids = {job.id for job in claim.jobs}
        with self._changed:
            # A job that we claim again has left the lease under which we still hold it, as the next heartbeat will say.
            for held in list(self._state.held.values()):
                self._remove(held, held.outstanding & job_ids)
            self._state.held[claim.id] = _Held(claim, set(job_ids), expires_at)
            self._state.lease_of.update(dict.fromkeys(job_ids, claim.id))
            self._state.abandoned -= job_ids  # they may have been lost before, and claimed again
            self._state.blank -= job_ids

    def offer(self, job: Job, prepared: Prepared, load_sec: float, prepare_sec: float, *, is_blank: bool) -> None:
        """Makes a picture available to the engine, unless its lease has been lost."""
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
        """Ends the source after the pictures that are ready: no more will be claimed."""
        with self._changed:
            self._state.ended = True
            self._changed.notify_all()
