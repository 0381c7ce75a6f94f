"""The store thread of a worker: writes completions to the database, or to the spool while it is unavailable."""

import logging
import queue as fifo
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from sqlalchemy import Connection

from rococap import queue
from rococap.data import SPLITS
from rococap.db import transaction
from rococap.engines import Completion
from rococap.errors import DatabaseUnavailable, LeaseLost
from rococap.figures import counted
from rococap.queue import Lease
from rococap.worker import clock
from rococap.worker import spool as spools
from rococap.worker.context import Context
from rococap.worker.holdings import Holdings
from rococap.worker.spool import Entry, Spool
from rococap.worker.telemetry import Meter

log = logging.getLogger(__name__)

STORE_EVERY_SEC = 1.0
PARTS = 4
"""In how many groups a batch is stored at least. The engine refills its rows in as many, so that what they held before
is being stored by then: of a machine that dies, hardly more than a batch of pictures is captioned again."""
STORE_PATIENCE_SEC = 5.0
"""How long captions wait for a locked database before they are written to the spool."""
STOP_PATIENCE_SEC = 1.0
"""The same, once the worker was asked to stop."""
REPLAY_EVERY_SEC = 1.0
"""How often a worker with captions in the spool tries the database again."""
LOOK_EVERY_SEC = 60.0
"""How often a worker looks in the spool for captions that workers that are gone have left."""


@dataclass(slots=True)
class Outcome:
    """What a worker has done; counts are of pictures.

    `lost`: captions that came too late, after another worker had taken over the picture or it was cancelled.
    `recovered`: those of `done` that earlier workers had left in the spool. `spooled`: captions that are in the folder
    `spool` now. `seconds`: time spent captioning. `drained`: it stopped because it was asked to.
    """

    run: str = ""
    device: str = ""
    done: int = 0
    failed: int = 0
    lost: int = 0
    recovered: int = 0
    spooled: int = 0
    spool: str = ""
    seconds: float = 0.0
    drained: bool = False


Report = Callable[[Outcome, int], None]
"""Called with what is done here, and how many pictures of the run are unfinished, after each group of stored captions,
from the store thread."""


class Store:
    """Stores completions in groups, on a thread of its own: 1 in PARTS of a batch or those of a second, and up to a
    batch if the database is slow.

    While the database is unavailable they go to the spool, and from there to the database when it is back.
    """

    def __init__(
        self, context: Context, holdings: Holdings, spool: Spool, meter: Meter, report: Report = lambda *_: None
    ) -> None:
        self.outcome = Outcome(context.run.name, context.engine.info.device)
        self.meter = meter
        self._context = context
        self._database = context.database
        self._holdings = holdings
        self._spool = spool
        self._report = report
        self._completions: fifo.SimpleQueue[Completion | None] = fifo.SimpleQueue()
        """Completions to store; None marks the end."""
        self._largest_group = context.engine.batch_size
        self._is_patient = True
        self._next_look = 0.0
        self._group: list[Completion] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run_thread, name="store", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, completion: Completion) -> None:
        """Queues a completion to be stored. Thread-safe; never waits for the database."""
        self._holdings.finish(completion.job_id)
        completion = self._holdings.flagged(completion)
        self.meter.count(completion)
        self._completions.put(completion)

    def close(self, *, is_patient: bool) -> None:
        """Returns when everything that was put is stored: in the database, or in the spool if that is unavailable and
        the store is not `is_patient` or the worker is asked to stop.
        """
        self._is_patient = is_patient
        self._completions.put(None)
        self._thread.join()
        if self._error is not None:
            self.save()  # completions that came after the error
        self.outcome.spooled = self._spool.n_written()
        self.outcome.spool = str(self._spool.folder)

    def raise_error(self) -> None:
        """Raises the error that ended the thread early, if there was one."""
        if self._error is not None:
            raise self._error

    def save(self) -> None:
        """Writes everything that is not stored to the spool, without using the database."""
        while not self._completions.empty():
            if (completion := self._completions.get()) is not None:
                self._group.append(completion)
        for lease, completions in self._by_lease(self._group):
            self._put_off(lease, completions)
        self._group = []

    def _run_thread(self) -> None:
        try:
            self._empty_spool()
            for group in self._groups():
                self._group = group
                self._store(group)
                self._group = []
                self._empty_spool()
            # Until the database has answered once: entries that are left then belong to jobs that others hold.
            while (
                self._spool.entries
                and self._is_patient
                and not self._context.stop.wait(REPLAY_EVERY_SEC)
                and not self._empty_spool()
            ):
                pass
        except BaseException as error:
            self._error = error
            self.save()
            self._holdings.break_off(error)

    def _groups(self) -> Iterator[list[Completion]]:
        """The groups to store; an empty one now and then while no completions come, so that the spool is checked."""
        while True:
            idle = REPLAY_EVERY_SEC if self._spool.entries else LOOK_EVERY_SEC
            try:
                first = self._completions.get(timeout=idle)
            except fifo.Empty:
                yield []
                continue
            if first is None:
                return
            group = [first]
            deadline = time.monotonic() + STORE_EVERY_SEC
            while len(group) < self._largest_group:
                # Once everything that is held has a result, no more comes until it is stored.
                is_enough = len(group) * PARTS >= self._largest_group or not self._holdings.unfinished_leases()
                left = 0.0 if is_enough else max(0.0, deadline - time.monotonic())
                try:
                    completion = self._completions.get(timeout=left)
                except fifo.Empty:
                    break
                if completion is None:
                    yield group
                    return
                group.append(completion)
            yield group

    def _by_lease(self, group: list[Completion]) -> list[tuple[Lease, list[Completion]]]:
        """The completions by lease, without those whose lease was lost."""
        found: dict[int, tuple[Lease, list[Completion]]] = {}
        for completion in group:
            if (lease := self._holdings.lease_of(completion.job_id)) is not None:
                found.setdefault(lease.id, (lease, []))[1].append(completion)
        return list(found.values())

    def _store(self, group: list[Completion]) -> None:
        if not group:
            return
        by_lease = self._by_lease(group)
        self.outcome.lost += len(group) - sum(len(completions) for _, completions in by_lease)
        are_stored = [self._store_lease(lease, completions) for lease, completions in by_lease]
        if all(are_stored):
            try:
                with transaction(self._database, patience=self._patience()) as conn:
                    # Without rates, which are made from all recent leases: hundreds of workers ask this every second.
                    left = sum(queue.unfinished(conn, self._context.run, SPLITS).values())
            except DatabaseUnavailable as error:
                self._context.contact.lost(error)
            else:
                self._report(self.outcome, left)

    def _store_lease(self, lease: Lease, completions: list[Completion]) -> bool:
        """Stores completions of one lease; returns False if some had to go to the spool instead."""
        captions = [completion for completion in completions if completion.failure is None]
        failed = {c.job_id: c.failure for c in completions if c.failure is not None}
        left = completions
        try:
            if captions:
                with self._writing(lease) as conn:
                    queue.complete(conn, lease, captions, timing=self._timing(lease, captions))
                self.outcome.done += len(captions)
                self._holdings.settle(lease, [completion.job_id for completion in captions])
                left = [completion for completion in completions if completion.failure is not None]
            if failed:
                with self._writing(lease) as conn:
                    queue.fail(conn, lease, failed)
                self.outcome.failed += len(failed)
                self._holdings.settle(lease, failed)
        except (LeaseLost, DatabaseUnavailable) as error:
            # LeaseLost is also raised after a commit whose answer was lost, or if a job of the lease was cancelled.
            log.debug("%s", error)
            self._put_off(lease, left)
            return False
        return True

    def _put_off(self, lease: Lease, completions: Sequence[Completion] = (), released: Sequence[int] = ()) -> None:
        try:
            self._spool.add(lease, completions, released)
        except OSError as error:
            log.warning("captions cannot be stored, and cannot be written to %s either (%s)", self._spool.folder, error)

    def release(self, *, running: bool) -> None:
        """Releases the jobs that have not started or, if `running`, all jobs without a result."""
        for lease, job_ids in self._holdings.withdraw(running=running):
            try:
                with transaction(self._database, write=True, patience=STOP_PATIENCE_SEC) as conn:
                    queue.release(conn, lease, job_ids)
            except LeaseLost as error:
                log.debug("%s", error)
            except DatabaseUnavailable as error:
                self._context.contact.lost(error)
                self._put_off(lease, released=job_ids)
            self._holdings.settle(lease, job_ids)

    def _empty_spool(self) -> bool:
        """Stores what is in the spool: this worker's own entries, and now and then those of workers that are gone.

        Returns False while the database is unavailable.
        """
        try:
            self._replay()
            if self._next_look <= clock.now():
                self._next_look = clock.now() + LOOK_EVERY_SEC
                self._take_over()
        except DatabaseUnavailable as error:
            self._context.contact.lost(error)
            return False
        except OSError as error:
            log.warning("the spool %s cannot be read or written: %s", self._spool.folder, error)
        return True

    def _replay(self) -> None:
        kept: list[Entry] = []
        try:
            while self._spool.entries:
                kept += self._recover(self._spool.entries[0])
                del self._spool.entries[0]
        finally:
            self._spool.entries[:0] = kept
        if not kept:
            self._spool.clear()

    def _take_over(self) -> None:
        for entries, keep in spools.abandoned(self._spool.folder):
            before = self.outcome.done
            keep([left for entry in entries for left in self._recover(entry)])
            if n := self.outcome.done - before:
                self.outcome.recovered += n
                log.info("stored %s that an earlier worker had left in %s", counted(n, "caption"), self._spool.folder)

    def _recover(self, entry: Entry) -> list[Entry]:
        """Stores an entry of the spool; returns what must stay in it, because another worker holds the job or another
        database gave the lease.
        """
        with transaction(self._database, patience=self._patience()) as conn:
            is_ours = queue.belongs(conn, entry.lease, entry.uuid)
        if not is_ours:
            return [entry]
        with self._writing(entry.lease) as conn:
            result = queue.recover(conn, self._context.worker_id, entry.lease, entry.completions)
            with suppress(LeaseLost):  # it has expired since
                queue.release(conn, entry.lease, entry.released)
        captions = {completion.job_id for completion in entry.completions if completion.failure is None}
        self.outcome.done += len(captions & result.stored)
        self.outcome.failed += len(result.stored - captions)
        self.outcome.lost += len(captions & result.dropped)
        if entry.uuid == self._context.uuid:
            self._holdings.settle(entry.lease, result.stored | result.dropped)
        kept = tuple(completion for completion in entry.completions if completion.job_id in result.kept)
        return [replace(entry, completions=kept, released=())] if kept else []

    def _patience(self) -> float:
        return STOP_PATIENCE_SEC if self._context.stop.is_set() else STORE_PATIENCE_SEC

    @contextmanager
    def _writing(self, lease: Lease) -> Iterator[Connection]:
        """A write transaction that is timed as the lease's storing, including the wait for the lock and the commit."""
        started = time.perf_counter()
        try:
            with transaction(self._database, write=True, patience=self._patience()) as conn:
                yield conn
        finally:
            self.meter.stored(lease.id, (time.perf_counter() - started) * 1000)

    def _timing(self, lease: Lease, captions: Sequence[Completion]) -> queue.Timing:
        timing = self._holdings.take_timing(lease)
        prefill = sum(caption.prefill_ms for caption in captions)
        decode = sum(caption.processing_ms for caption in captions) - prefill
        return queue.Timing(timing.load_ms, timing.prepare_ms, prefill, decode)
