"""Claims, reads, decodes and prepares pictures ahead of the engine.

One thread claims and reads; a few more decode and prepare. The number of leased jobs is bounded by the rows that are
running plus one claim. Jobs that have been in a crash are claimed only while nothing else is held, so that a picture
that kills its worker does not charge others with a crash.
"""

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor

from rococap import db, queue
from rococap.data import PictureReader
from rococap.data.images import is_blank, open_picture
from rococap.db import transaction
from rococap.engines import Completion, Failure, Request
from rococap.errors import DatabaseError, DatabaseUnavailable, PictureError
from rococap.queue import NORMAL, SOLO, SUSPECTS, Claim, Job
from rococap.worker import clock
from rococap.worker.context import Context
from rococap.worker.holdings import Holdings

log = logging.getLogger(__name__)

POLL_SEC = 1.0
"""How often an idle worker looks for work, if there are few workers."""
LOOKS_PER_SEC = 50
"""How often many idle workers look for work, all of them together: whoever looks next finds what there is."""
SUSPECTS_EVERY = 8
"""Every so many claims, jobs that have been in a crash get a turn, if there are any."""
FROM_START_EVERY = 8
"""Every so many claims, jobs get a turn that are pending again, before those that this worker has claimed."""


def n_preparers(device: str) -> int:
    """How many threads decode and prepare: enough to keep a GPU busy, but one on the CPU, where the model needs the
    cores.
    """
    return 1 if device == "cpu" else min(8, max(1, (os.cpu_count() or 1) // 2))


class Fetcher:
    """Fills the holdings of a worker. `report` gets the failures of pictures that never reached the engine."""

    def __init__(self, context: Context, holdings: Holdings, report: Callable[[Completion], None]) -> None:
        self._context = context
        self._database = context.database
        self._holdings = holdings
        self._report = report
        self._claim_size = context.engine.batch_size
        self._left = context.settings.limit
        self._n_claims = 0
        self._last_lease_id = 0
        self._last_job_ids: dict[str, int] = {}
        """By split, the last job claimed in the normal lane."""
        self._pause_sec = POLL_SEC
        self._is_unsure = False
        self._has_logged = False
        self._thread = threading.Thread(target=self._fetch, name="fetcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _fetch(self) -> None:
        preparers = n_preparers(self._context.engine.info.device)
        try:
            with (
                PictureReader(self._context.dataset.root) as reader,
                ThreadPoolExecutor(preparers, "prepare") as pool,
            ):
                while (claim := self._next_claim()) is not None:
                    self._load(claim, reader, pool)
        except BaseException as error:
            self._holdings.break_off(error)
        else:
            self._holdings.end()

    # --- claiming ---

    def _next_claim(self) -> Claim | None:
        """Blocks until it has claimed jobs. None if the worker is stopping or at its limit, or if no work is left."""
        while self._holdings.wait_until_taken() and self._left != 0:
            try:
                self._tidy()
                is_pending = self._unfinished()["pending"] > 0
                if is_pending and not self._is_suspects_turn() and (claim := self._claim(NORMAL)):
                    return claim
                if not self._holdings.wait_until_empty():
                    return None
                left = self._unfinished()
                if left["pending"] and (claim := self._claim(SUSPECTS) or self._claim(SOLO)):
                    return claim
                if not (self._context.settings.wait or any(left.values())):
                    return None
                self._log_why_idle(left)
                self._pause_sec = self._idle_sec()
            except DatabaseUnavailable as error:
                self._is_unsure = True  # a claim may have been committed
                self._context.contact.lost(error)
            self._holdings.pause(self._pause_sec * random.uniform(0.5, 1.0))
        return None

    def _idle_sec(self) -> float:
        """The longest pause before the next look for work: the more workers, the longer."""
        with transaction(self._database) as conn:
            return max(POLL_SEC, queue.count_workers(conn, self._context.settings.ttl_ms) / LOOKS_PER_SEC)

    def _is_suspects_turn(self) -> bool:
        if (self._n_claims + 1) % SUSPECTS_EVERY:
            return False
        with transaction(self._database) as conn:
            return queue.has_suspects(conn, self._context.run, self._context.splits)

    def _claim(self, lane: int) -> Claim | None:
        """A claim from the first split that has work in the lane; None if none has."""
        context, ttl_ms = self._context, self._context.settings.ttl_ms
        limit = self._claim_size if self._left is None else min(self._claim_size, self._left)
        for split in context.splits:
            if self._holdings.is_stopping:
                return None
            expires_at = clock.now() + ttl_ms / 1000
            is_onward = lane == NORMAL and self._n_claims % FROM_START_EVERY
            after = self._last_job_ids.get(split, 0) if is_onward else 0
            with transaction(self._database, write=True) as conn:
                claim = queue.claim(
                    conn, context.worker_id, context.run.id, split, limit, ttl_ms=ttl_ms, lane=lane, after=after
                )
                self._refuse_repeated(claim)
            if claim is not None:
                self._n_claims += 1
                if lane == NORMAL:
                    self._last_job_ids[split] = claim.jobs[-1].id
                self._last_lease_id = claim.id
                if self._left is not None:
                    self._left -= len(claim.jobs)
                self._holdings.enter(claim, expires_at)
                return claim
        return None

    def _refuse_repeated(self, claim: Claim | None) -> None:
        """Raises DatabaseError, which rolls the claim back, if the database has handed out the id of a lease before."""
        if claim is not None and claim.id <= self._last_lease_id:
            raise DatabaseError(
                f"The database handed out lease {claim.id} after lease {self._last_lease_id}: it has lost what it had "
                "committed, as after a failover to an asynchronous standby. Nothing was claimed. Stop all workers that "
                "ran before, then start them again."
            )

    def _unfinished(self) -> dict[str, int]:
        """How many jobs are pending, leased and waiting. Only reads, so that a worker with nothing to claim takes no
        write lock. Raises RunError if the run was deleted or continues under newer rules, DatabaseError if the database
        was migrated: other workers of another version did so meanwhile.
        """
        with transaction(self._database) as conn:
            db.refuse_other_schema(conn)
            queue.refuse_deleted(conn, self._context.run)
            queue.check_rules(conn, self._context.run)
            return queue.unfinished(conn, self._context.run, self._context.splits)

    def _log_why_idle(self, left: dict[str, int]) -> None:
        """Logs, once per wait, why there is nothing to claim."""
        run = self._context.run.name
        if left["pending"] and self._is_paused():
            why = f"run {run} is paused; to continue: rococap resume --run {run}"
        elif left["leased"]:
            why = (
                f"{left['leased']} pictures are held by other workers: waiting for them, or for their leases to expire"
            )
        elif left["waiting"]:
            why = f"{left['waiting']} pictures failed for now and will be retried later"
        else:
            why = ""
        if why and not self._has_logged:
            log.info("%s", why)
        self._has_logged = bool(why)

    def _is_paused(self) -> bool:
        with transaction(self._database) as conn:
            return queue.get_run(conn, self._context.run.name).paused

    # --- maintenance of the queue ---

    def _tidy(self) -> None:
        """Releases jobs claimed without learning of it, wakes jobs that are due, and reaps dead workers' leases."""
        with transaction(self._database) as conn:
            at = db.now(conn)
            is_overdue = queue.overdue(conn, now=at)
        self._context.contact.made(at)
        if self._is_unsure:
            held = {lease.id for lease in self._holdings.open_leases()}
            with transaction(self._database, write=True) as conn:
                queue.release_forgotten(conn, self._context.worker_id, held)
            self._is_unsure = False
        if is_overdue:
            with transaction(self._database, write=True) as conn:
                queue.wake(conn)
            while self._reap():
                pass

    def _reap(self) -> bool:
        """Ends the lease of one dead worker and returns whether there was one: ending several in a transaction would
        make completions wait.
        """
        with transaction(self._database, write=True) as conn:
            at = db.now(conn)  # before our own clock: if the machine is suspended in between, no lease looks expired
            contact_ms = int(self._context.contact.unbroken_sec() * 1000)
            reaped = queue.reap(conn, exclude_worker=self._context.worker_id, contact_ms=contact_ms, limit=1, now=at)
        return bool(reaped)

    # --- reading and preparing ---

    def _load(self, claim: Claim, reader: PictureReader, pool: Executor) -> None:
        """Reads and prepares the pictures of a claim. Returns once all that are still held are ready, so that the next
        claim waits for them.
        """
        pictures = reader.read([job.place for job in claim.jobs])
        preparing: list[Future[None]] = []
        for job in claim.jobs:
            started = time.perf_counter()
            _, data = next(pictures)
            if self._holdings.is_stopping:
                break
            preparing.append(pool.submit(self._prepare, job, data, time.perf_counter() - started))
        for future in preparing:
            future.result()

    def _prepare(self, job: Job, data: bytes | PictureError, read_sec: float) -> None:
        if self._holdings.is_stopping or self._holdings.is_abandoned(job.id):
            return
        started = time.perf_counter()
        try:
            if isinstance(data, PictureError):
                raise data
            picture = open_picture(data, self._context.run.recipe.frame)
            loaded = time.perf_counter()
            prepared = self._context.engine.prepare(job.id, Request([picture]))
        except PictureError as error:
            self._report(Completion(job.id, failure=Failure(error.code, str(error), error.transient)))
            return
        prepare_sec = time.perf_counter() - loaded
        load_sec = read_sec + loaded - started
        self._holdings.offer(job, prepared, load_sec, prepare_sec, is_blank=is_blank(picture))
