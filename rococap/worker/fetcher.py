"""Claims ahead, reads, decodes and prepares: the Source that an engine pulls from, and the books on what is leased.

One fetcher thread claims and reads ahead of the engine, a few more decode and prepare. What is leased stays bounded:
the rows that are running and one claim ahead. Jobs that were in a crash are claimed only while nothing else is held, so
that a killer takes no neighbour along.
"""

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Set
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from sqlalchemy import Engine as Database

from rococap import db, queue
from rococap.data.datasets import PictureReader
from rococap.data.images import is_blank, open_picture
from rococap.db import transaction
from rococap.engines import Completion, Engine, Failure, Prepared
from rococap.errors import DatabaseUnavailable, PictureError
from rococap.flags import BLANK
from rococap.queue import NORMAL, SOLO, SUSPECTS, Job, Lease, Timing
from rococap.worker.holdings import Claims, Contact, Held, State, Usage, clock

log = logging.getLogger(__name__)

POLL_SEC = 1.0
"""How often an idle worker looks for work."""
SUSPECTS_EVERY = 8
"""Each so many claims, jobs that were in a crash have their turn, if there are some."""


class Pipeline:
    """Prepared pictures of leased jobs, for one engine. `report` is given the failures met before the engine."""

    def __init__(
        self,
        database: Database,
        claims: Claims,
        root: Path,
        engine: Engine,
        report: Callable[[Completion], None],
    ) -> None:
        self._database = database
        self._claims = claims
        self._root = root
        self._engine = engine
        self._report = report
        self._changed = threading.Condition()
        self._state = State()
        self._left = claims.limit
        self._stepped_at = time.monotonic()
        self._has_rows = False
        self._is_waiting = False
        self.usage = Usage()
        self.contact = Contact(claims.ttl_ms / 1000)
        self._n_claims = 0
        self._is_unsure = False
        self._told = False
        self._fetcher = threading.Thread(target=self._fetch, name="fetcher", daemon=True)

    def start(self) -> None:
        self._fetcher.start()

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
        return held is not None and job_id not in self._state.abandoned and clock() < held.runs_out_at

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

    def join(self, timeout: float) -> None:
        self._fetcher.join(timeout)

    def break_off(self, error: BaseException) -> None:
        """Makes the engine's next `take` raise."""
        with self._changed:
            self._state.error = self._state.error or error
            self._changed.notify_all()

    # --- the fetcher ---

    def _fetch(self) -> None:
        try:
            with PictureReader(self._root) as reader, ThreadPoolExecutor(self._claims.preparers, "prepare") as pool:
                while (lease := self._next_lease()) is not None:
                    self._load(lease, reader, pool)
        except BaseException as error:
            self.break_off(error)
        else:
            with self._changed:
                self._state.ended = True
                self._changed.notify_all()

    def _next_lease(self) -> Lease | None:
        """Blocks until there is something to claim. None: stopping, the limit is reached, or all work is done."""
        while self._wait_until(self._may_claim) and self._left != 0:
            try:
                self._tidy()
                is_pending = self._unfinished()["pending"] > 0
                if is_pending and not self._is_suspects_turn() and (lease := self._claim(NORMAL)):
                    return lease
                if not self._wait_until(lambda: not self._state.held):
                    return None
                left = self._unfinished()
                if left["pending"] and (lease := self._claim(SUSPECTS) or self._claim(SOLO)):
                    return lease
                if not (self._claims.wait or any(left.values())):
                    return None
                self._tell(left)
            except DatabaseUnavailable as error:
                self._is_unsure = True  # a claim may have been committed
                self.contact.lost(error)
            self._pause()
        return None

    def _is_suspects_turn(self) -> bool:
        if (self._n_claims + 1) % SUSPECTS_EVERY:
            return False
        with transaction(self._database) as conn:
            return queue.has_suspects(conn, self._claims.run, self._claims.splits)

    def _may_claim(self) -> bool:
        held = self._state.held.values()
        return not self._state.ready and all(one.lease.lane == NORMAL for one in held)

    def _wait_until(self, condition: Callable[[], bool]) -> bool:
        """False if the pipeline is stopping."""
        with self._changed:
            self._changed.wait_for(lambda: condition() or self._state.stopping)
            return not self._state.stopping

    def _pause(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._state.stopping, timeout=POLL_SEC * random.uniform(0.5, 1.0))

    def _tell(self, left: dict[str, int]) -> None:
        """Once: why nothing happens."""
        if left["pending"] and self._is_paused():
            why = f"run {self._claims.run.name} is paused; go on with: rococap resume --run {self._claims.run.name}"
        elif left["leased"]:
            why = (
                f"{left['leased']} pictures are held by other workers: waiting for them, or for their leases to run out"
            )
        elif left["waiting"]:
            why = f"{left['waiting']} pictures failed for now and are tried again later"
        else:
            why = ""
        if why and not self._told:
            log.info("%s", why)
        self._told = bool(why)

    def _is_paused(self) -> bool:
        with transaction(self._database) as conn:
            return queue.get_run(conn, self._claims.run.name).paused

    def _unfinished(self) -> dict[str, int]:
        """A read, so that a worker with nothing to claim takes no write lock. Raises RunError if the run is
        deleted.
        """
        with transaction(self._database) as conn:
            queue.refuse_deleted(conn, self._claims.run)
            return queue.unfinished(conn, self._claims.run, self._claims.splits)

    def _tidy(self) -> None:
        """Gives back what was claimed unknowingly, wakes what has waited long enough, reaps dead workers' leases."""
        with transaction(self._database) as conn:
            at = db.now(conn)
            is_overdue = queue.overdue(conn, now=at)
        self.contact.made(at)
        if self._is_unsure:
            held = {lease.id for lease in self.open_leases()}
            with transaction(self._database, write=True) as conn:
                queue.release_forgotten(conn, self._claims.worker_id, held)
            self._is_unsure = False
        if is_overdue:
            with transaction(self._database, write=True) as conn:
                queue.wake(conn)
            while self._reap():
                pass

    def _reap(self) -> bool:
        """Ends one dead worker's lease, if there is one: several in a transaction would hold up who completes."""
        with transaction(self._database, write=True) as conn:
            at = db.now(conn)  # before the look at our own clock: should the machine sleep in between, nobody is judged
            contact_ms = int(self.contact.unbroken_sec() * 1000)
            reaped = queue.reap(conn, but=self._claims.worker_id, contact_ms=contact_ms, most=1, now=at)
        return bool(reaped)

    def _claim(self, lane: int) -> Lease | None:
        """A claim of the first split that has work in the lane."""
        claims = self._claims
        most = claims.size if self._left is None else min(claims.size, self._left)
        for split in claims.splits:
            if self._state.stopping:
                return None
            runs_out_at = clock() + claims.ttl_ms / 1000
            with transaction(self._database, write=True) as conn:
                lease = queue.claim(conn, claims.worker_id, claims.run.id, split, most, ttl_ms=claims.ttl_ms, lane=lane)
            if lease is not None:
                self._enter(lease, runs_out_at)
                return lease
        return None

    def _enter(self, lease: Lease, runs_out_at: float) -> None:
        self._n_claims += 1
        if self._left is not None:
            self._left -= len(lease.jobs)
        job_ids = {job.id for job in lease.jobs}
        with self._changed:
            self._state.held[lease.id] = Held(lease, set(job_ids), runs_out_at)
            self._state.lease_of.update(dict.fromkeys(job_ids, lease.id))
            self._state.abandoned -= job_ids  # lost once, and claimed again
            self._state.blank -= job_ids

    def _load(self, lease: Lease, reader: PictureReader, pool: Executor) -> None:
        """Returns when all that is not lost is ready, so that the next claim waits for it."""
        pictures = reader.read([job.place for job in lease.jobs])
        preparing: list[Future[None]] = []
        for job in lease.jobs:
            started = time.perf_counter()
            _, data = next(pictures)
            if self._state.stopping:
                break
            preparing.append(pool.submit(self._prepare, job, data, time.perf_counter() - started))
        for future in preparing:
            future.result()

    def _prepare(self, job: Job, data: bytes | PictureError, read_sec: float) -> None:
        if self._state.stopping or job.id in self._state.abandoned:
            return
        started = time.perf_counter()
        try:
            if isinstance(data, PictureError):
                raise data
            picture = open_picture(data, self._claims.run.recipe.frame)
            loaded = time.perf_counter()
            prepared = self._engine.prepare(job.id, picture)
        except PictureError as error:
            self._report(Completion(job.id, failure=Failure(error.code, str(error), error.transient)))
            return
        if is_blank(picture):
            with self._changed:
                self._state.blank.add(job.id)
        self._offer(job, prepared, read_sec + loaded - started, time.perf_counter() - loaded)

    def _offer(self, job: Job, prepared: Prepared, load_sec: float, prepare_sec: float) -> None:
        with self._changed:
            held = self._state.held.get(job.lease_id)
            if held is not None:
                held.load_ms += load_sec * 1000
                held.prepare_ms += prepare_sec * 1000
                self._state.ready.append(prepared)
                self._changed.notify_all()
