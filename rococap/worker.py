"""One worker process's life: model, heartbeats, storing, draining. Claim -> load -> caption -> complete.

Threads: the main one runs the engine; the pipeline's fetcher works ahead of it; one stores what it finishes; one
beats for the open leases as long as the engine steps; one waits for a signal and drains. The engine never
waits for SQL.
"""

import logging
import math
import os
import queue as fifo
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import FrameType

from sqlalchemy import Connection
from sqlalchemy import Engine as Database
from sqlalchemy.exc import DatabaseError as DriverError

from rococap import datasets, db, queue, selfcheck, spool
from rococap.datasets import Dataset, Place
from rococap.db import transaction
from rococap.engines import Completion, Decode, DeviceMap, Engine, EngineName, Options, load_engine
from rococap.errors import DatabaseError, DatabaseUnavailable, LeaseLost, ModelError, RococapError, RunError
from rococap.pipeline import Claims, Pipeline, clock
from rococap.queue import Lease, Run
from rococap.recipe import Recipe
from rococap.selfcheck import SelfCheck
from rococap.spool import Entry, Spool
from rococap.telemetry import Meter

log = logging.getLogger(__name__)

STORE_EVERY_SEC = 1.0
STORE_PATIENCE_SEC = 5.0
"""How long captions wait for a database that is locked before they are written to the spool."""
STOP_PATIENCE_SEC = 1.0
"""The same, once it was asked to stop."""
STOP_SLACK_SEC = 15.0
"""How long after the drain timeout a worker whose database does not even answer leaves hard."""
REPLAY_EVERY_SEC = 1.0
LOOK_EVERY_SEC = 60.0
"""How often an idle store looks for what workers that are gone have left in the spool."""
MIN_LEASE_SEC = 2.0
FIRST_BEAT_SEC = 2.0
"""When `status` shows what a worker measures first; each wait is twice as long as the one before it."""
MAX_BEAT_SEC = 30.0
EXIT_STALLED = 70
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ONE_REQUEST_SEC = 1.0
"""Signals within it are one request to stop: Slurm and systemd send one to every process of a job, whose parent passes
on its own, and wrappers pass on a Ctrl-C that the terminal has sent to all.
"""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a worker works; what it says is the run's recipe. Times in seconds.

    Raises ValueError for a lease time that a busy machine could not keep up.
    """

    run: str | None = None
    splits: Sequence[str] = ()
    engine: EngineName = "transformers"
    base_url: str | None = None
    served_model: str | None = None
    device: str = "auto"
    batch_size: int | None = None
    decode: Decode = "auto"
    device_map: DeviceMap | None = None
    limit: int | None = None
    wait: bool = False
    self_check: bool = True
    lease_ttl: float = 120.0
    drain_timeout: float = 25.0
    stall_timeout: float = 600.0
    accept_new_rules: bool = False

    def __post_init__(self) -> None:
        if not self.lease_ttl >= MIN_LEASE_SEC:
            raise ValueError(f"A lease lasts {MIN_LEASE_SEC:.0f} s at least, not {self.lease_ttl} s.")

    @property
    def beat_sec(self) -> float:
        """Between heartbeats: four in a lease time, so that a late one loses nothing."""
        return min(self.lease_ttl / 4, MAX_BEAT_SEC)

    @property
    def ttl_ms(self) -> int:
        return int(self.lease_ttl * 1000)

    @property
    def way(self) -> str:
        """What of it may change how an engine works, and so whether an earlier self-check counts."""
        size = "auto" if self.batch_size is None else self.batch_size
        return f"decode {self.decode}, batch size {size}" + (", spread" if self.device_map else "")

    def options(self) -> Options:
        """The engine's."""
        return Options(**{field.name: getattr(self, field.name) for field in fields(Options)})


@dataclass(slots=True)
class Outcome:
    """What a worker did. `lost`: captions that came too late, when another worker had the picture or it was cancelled.
    `recovered`: of them that workers before it had left in the spool. `spooled`: captions that are there now.
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


Completions = fifo.SimpleQueue[Completion | None]
"""What is finished and not stored; None is the end."""

Report = Callable[[Outcome, Sequence[queue.Counts]], None]
"""Called after each group of stored captions, from the store thread."""


def work(
    database: Database,
    settings: Settings,
    report: Report = lambda outcome, counts: None,
    load: Callable[[Recipe, Options], Engine] = load_engine,
    spool_folder: Path | None = None,
) -> Outcome:
    """Captions until nothing is left (or for ever, with `wait`), or until SIGTERM, SIGINT or SIGUSR1 asks to stop.

    `spool_folder` None: where the environment says, or beside the database.
    Raises RunError if there is nothing to work on, ModelError or DatasetError if the run's cannot be had.
    """
    with transaction(database) as conn:
        run = choose_run(conn, settings.run, settings.splits)
        splits = settings.splits or datasets.SPLITS
        present = [counts.split for counts in queue.counts_of(conn, run, splits)]
        left = queue.unfinished(conn, run, splits)
        if not (settings.wait or any(left.values())):
            return Outcome(run.name)
        queue.check_rules(conn, run, accept_new_rules=settings.accept_new_rules)
    dataset = datasets.locate(run.dataset, present, run.dataset_revision or None)
    stop = threading.Event()
    with _signals(stop):
        engine = load(run.recipe, settings.options())
        engine.load()
        try:
            if stop.is_set():
                return Outcome(run.name, drained=True)
            folder = spool_folder or spool.folder_of(database.url)
            return _work(database, settings, report, run, splits, dataset, engine, folder, stop)
        finally:
            engine.close()


def _work(
    database: Database,
    settings: Settings,
    report: Report,
    run: Run,
    splits: Sequence[str],
    dataset: Dataset,
    engine: Engine,
    spool_folder: Path,
    stop: threading.Event,
) -> Outcome:
    name = uuid.uuid4().hex
    worker_id = _register(database, run, splits, dataset, engine, name, settings, stop)
    if worker_id is None:
        return Outcome(run.name, drained=True)
    db.stay(database, "SELECT 1 FROM workers WHERE id = ? AND uuid = ?", (worker_id, name))
    log.info("captioning run %s with %s on %s (%s)", run.name, run.recipe.model, engine.info.device, engine.info.dtype)
    claims = Claims(
        worker_id=worker_id,
        uuid=name,
        run=run,
        splits=splits,
        size=engine.batch_size,
        ttl_ms=settings.ttl_ms,
        limit=settings.limit,
        wait=settings.wait,
        preparers=n_preparers(engine.info.device),
    )
    outcome = Outcome(run.name, engine.info.device)
    completions: Completions = fifo.SimpleQueue()
    pipeline = Pipeline(database, claims, dataset.root, engine, lambda completion: store.put(completion))
    kept = Spool(spool_folder, name)
    meter = Meter(engine, pipeline.usage)
    store = Store(database, claims, outcome, pipeline, kept, completions, report, stop, meter)
    try:
        _caption(database, engine, pipeline, store, worker_id, settings, stop)
    finally:
        _say_goodbye(database, pipeline, meter, worker_id)
        kept.close()
    return outcome


def n_preparers(device: str) -> int:
    """Threads that decode and prepare: beside a GPU as many as keep it busy, on the CPU the model needs the cores."""
    return 1 if device == "cpu" else min(8, max(1, (os.cpu_count() or 1) // 2))


def _register(
    database: Database,
    run: Run,
    splits: Sequence[str],
    dataset: Dataset,
    engine: Engine,
    name: str,
    settings: Settings,
    stop: threading.Event,
) -> int | None:
    """The new worker's id, once it has checked itself; None if it was asked to stop meanwhile.

    Raises ModelError if the check fails, RunError if the run was started with another model state.
    """
    worker_id = 0
    places: list[Place] = []

    def register(conn: Connection) -> None:
        nonlocal worker_id, places
        queue.check_pinned(conn, run, engine.info, accept_new_rules=settings.accept_new_rules)
        host = socket.gethostname()
        places = _to_check(conn, run, splits, engine, host, settings.way) if settings.self_check else []
        told = selfcheck.under_way(run.name, settings.way).to_json() if places else None
        worker_id = queue.register_worker(
            conn, name, host, os.getpid(), engine.info, self_check=told, lease_ttl_ms=settings.ttl_ms
        )

    def pin(conn: Connection) -> None:
        queue.pin(conn, run, engine.info, accept_new_rules=settings.accept_new_rules)

    if not _insist(database, stop, register):
        return None
    try:
        if places:
            with _seen(database, worker_id, settings):
                _check(database, run, settings.way, dataset, engine, worker_id, places, stop)
        if not stop.is_set() and _insist(database, stop, pin):
            return worker_id
    except RococapError:
        _withdraw(database, worker_id)
        raise
    _withdraw(database, worker_id)
    return None


@contextmanager
def _seen(database: Database, worker_id: int, settings: Settings) -> Iterator[None]:
    """Meanwhile a worker that holds nothing yet does not look lost."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(settings.beat_sec):
            with suppress(DatabaseError, DriverError), transaction(database, write=True) as conn:
                queue.heartbeat(conn, worker_id, (), ttl_ms=settings.ttl_ms)

    thread = threading.Thread(target=beat, name="seen", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(STORE_PATIENCE_SEC)


def _withdraw(database: Database, worker_id: int) -> None:
    """A goodbye before the first claim."""
    try:
        with transaction(database, write=True, patience=STOP_PATIENCE_SEC) as conn:
            queue.stop_worker(conn, worker_id)
    except (DatabaseError, DriverError) as error:
        log.warning("left without telling the database: %s", error)


def _insist(database: Database, stop: threading.Event, write: Callable[[Connection], None]) -> bool:
    """Writes as soon as the database lets it; False if it was asked to stop while it waited."""
    while True:
        try:
            with transaction(database, write=True) as conn:
                write(conn)
            return True
        except DatabaseUnavailable as error:
            log.warning("waiting for the database: %s", error)
            if stop.wait(REPLAY_EVERY_SEC):
                return False


def _to_check(conn: Connection, run: Run, splits: Sequence[str], engine: Engine, host: str, way: str) -> list[Place]:
    """Pictures for the self-check; none if a worker like this one has passed it, or did not survive it."""
    if (last := queue.last_self_check(conn, host, engine.info, run.name)) is not None:
        pid, told = last[0], SelfCheck.from_json(last[1])
        if told.passed and told.way == way:
            return []
        if not selfcheck.was_survived(told, pid):
            log.warning("the worker before did not survive its self-check: going on without it")
            return []
    return selfcheck.pictures(conn, run, splits)


def _check(
    database: Database,
    run: Run,
    way: str,
    dataset: Dataset,
    engine: Engine,
    worker_id: int,
    places: Sequence[Place],
    stop: threading.Event,
) -> None:
    log.info("checking the engine on pictures of the run")
    checked = selfcheck.check(engine, run.recipe, run.name, way, dataset.root, places, stop.is_set)
    told = None if stop.is_set() else checked.to_json()  # it was broken off: nothing is known
    _insist(database, stop, lambda conn: queue.store_self_check(conn, worker_id, told))
    if stop.is_set():
        return
    if checked.inconclusive:
        log.warning("the self-check is inconclusive, and the next worker looks again: %s", checked.reason)
    elif not checked.passed:
        raise ModelError(
            f"The self-check failed, and nothing was claimed: {checked.reason} To go on all the same: --no-self-check"
        )


def _say_goodbye(database: Database, pipeline: Pipeline, meter: Meter, worker_id: int) -> None:
    """Gives back what a claim may have taken unknowingly; what waits in the spool keeps its lease."""
    held = {lease.id for lease in pipeline.open_leases()}
    store_ms, telemetry = meter.unbooked(), meter.overall()
    try:
        with transaction(database, write=True, patience=STOP_PATIENCE_SEC) as conn:
            queue.lock_leases(conn, worker_id, store_ms)
            queue.release_forgotten(conn, worker_id, held)
            queue.stop_worker(conn, worker_id, store_ms=store_ms, telemetry=telemetry)
    except (DatabaseError, DriverError) as error:
        log.warning("left without telling the database: %s", error)


def choose_run(conn: Connection, name: str | None, splits: Sequence[str], command: str = "worker") -> Run:
    """The run of that name; without one, `default`, or the only run that has work.

    Raises RunError, naming them; `command` is the one to choose with.
    """
    if name is not None:
        return queue.get_run(conn, name)
    runs = queue.list_runs(conn)
    if not runs:
        raise RunError("Nothing is registered here yet. Register pictures first: rococap enqueue --split train")
    busy = [run for run in runs if any(queue.unfinished(conn, run, splits or datasets.SPLITS).values())]
    for run in busy or runs:
        if run.name == "default":
            return run
    if len(busy) > 1:
        names = ", ".join(run.name for run in busy)
        raise RunError(f"Several runs have work ({names}). Choose one: rococap {command} --run NAME")
    return busy[0] if busy else runs[-1]


def _caption(
    database: Database,
    engine: Engine,
    pipeline: Pipeline,
    store: "Store",
    worker_id: int,
    settings: Settings,
    stop: threading.Event,
) -> None:
    started = time.monotonic()
    done = threading.Event()
    threads = [
        threading.Thread(
            target=_beat, args=(database, pipeline, store.meter, worker_id, settings, done), name="heartbeat"
        ),
        threading.Thread(target=_drain, args=(pipeline, store, settings, stop, done), name="drain"),
    ]
    store.start()
    pipeline.start()
    for thread in threads:
        thread.daemon = True
        thread.start()
    try:
        for completion in engine.run(pipeline):
            store.put(completion)
    except BaseException as error:
        pipeline.stop()
        store.close(is_patient=False)
        _give_up(database, pipeline, store, error)
        raise
    else:
        pipeline.stop()
        store.close(is_patient=True)
        pipeline.join(timeout=5)
        store.release(running=True)
    finally:
        done.set()
        for thread in threads:
            thread.join(STORE_PATIENCE_SEC)
    store.raise_error()
    store.outcome.seconds = time.monotonic() - started
    store.outcome.drained = stop.is_set()


# --- Storing ---------------------------------------------------------------------------------------------------


class Store:
    """Stores completions in a thread of its own, together: every batch or every second, whichever comes first.

    While the database is away they go to the spool, and from there into the database when it is back.
    """

    def __init__(
        self,
        database: Database,
        claims: Claims,
        outcome: Outcome,
        pipeline: Pipeline,
        kept: Spool,
        completions: Completions,
        report: Report,
        stop: threading.Event,
        meter: Meter,
    ) -> None:
        self.outcome = outcome
        self.meter = meter
        self._database = database
        self._claims = claims
        self._pipeline = pipeline
        self._spool = kept
        self._completions = completions
        self._report = report
        self._stop = stop
        self._is_patient = True
        self._looks_at = 0.0
        self._group: list[Completion] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run_thread, name="store", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, completion: Completion) -> None:
        self._pipeline.finish(completion.job_id)
        completion = self._pipeline.flagged(completion)
        self.meter.count(completion)
        self._completions.put(completion)

    def close(self, *, is_patient: bool) -> None:
        """Returns when all that was put is stored; in the spool, if not `is_patient` or asked to stop meanwhile."""
        self._is_patient = is_patient
        self._completions.put(None)
        self._thread.join()
        if self._error is not None:
            self.save()  # what came after it
        self.outcome.spooled = self._spool.n_written()
        self.outcome.spool = str(self._spool.folder)

    def raise_error(self) -> None:
        """What ended the thread before its time, if anything did."""
        if self._error is not None:
            raise self._error

    def save(self) -> None:
        """Writes to the spool what is not stored, without the database."""
        while not self._completions.empty():
            if (completion := self._completions.get()) is not None:
                self._group.append(completion)
        for lease, completions in self._by_lease(self._group):
            self._put_off(lease, completions)
        self._group = []

    def _run_thread(self) -> None:
        try:
            self._mend()
            for group in self._groups():
                self._group = group
                self._store(group)
                self._group = []
                self._mend()
            # Until the database has answered once more: what is then left is another worker's for now.
            while (
                self._spool.entries and self._is_patient and not self._stop.wait(REPLAY_EVERY_SEC) and not self._mend()
            ):
                pass
        except BaseException as error:
            self._error = error
            self.save()
            self._pipeline.break_off(error)

    def _groups(self) -> Iterator[list[Completion]]:
        """Groups to store; an empty one now and then, when nothing comes."""
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
            while len(group) < self._claims.size and (left := deadline - time.monotonic()) > 0:
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
        """Those whose leases are still ours."""
        found: dict[int, tuple[Lease, list[Completion]]] = {}
        for completion in group:
            if (lease := self._pipeline.lease_of(completion.job_id)) is not None:
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
                    counts = queue.counts_of(conn, self._claims.run)
            except DatabaseUnavailable as error:
                self._pipeline.contact.lost(error)
            else:
                self._report(self.outcome, counts)

    def _store_lease(self, lease: Lease, completions: list[Completion]) -> bool:
        """Whether it is stored; else it was put off."""
        captions = [completion for completion in completions if completion.failure is None]
        failed = {c.job_id: c.failure for c in completions if c.failure is not None}
        left = completions
        try:
            if captions:
                with self._writing(lease) as conn:
                    queue.complete(conn, lease, captions, timing=self._timing(lease, captions))
                self.outcome.done += len(captions)
                self._pipeline.settle(lease, [completion.job_id for completion in captions])
                left = [completion for completion in completions if completion.failure is not None]
            if failed:
                with self._writing(lease) as conn:
                    queue.fail(conn, lease, failed)
                self.outcome.failed += len(failed)
                self._pipeline.settle(lease, failed)
        except (LeaseLost, DatabaseUnavailable) as error:
            # LeaseLost also when a commit succeeded whose answer was lost, or a picture of the lease was cancelled.
            log.debug("%s", error)
            self._put_off(lease, left)
            return False
        return True

    def _put_off(self, lease: Lease, completions: Sequence[Completion] = (), released: Sequence[int] = ()) -> None:
        try:
            self._spool.add(lease, completions, released)
        except OSError as error:
            log.warning("what cannot be stored cannot be written to %s either (%s)", self._spool.folder, error)

    def release(self, *, running: bool) -> None:
        """Gives back what is held and has not started, or, if `running`, all that has no result."""
        for lease, job_ids in self._pipeline.withdraw(running=running):
            try:
                with transaction(self._database, write=True, patience=STOP_PATIENCE_SEC) as conn:
                    queue.release(conn, lease, job_ids)
            except LeaseLost as error:
                log.debug("%s", error)
            except DatabaseUnavailable as error:
                self._pipeline.contact.lost(error)
                self._put_off(lease, released=job_ids)
            self._pipeline.settle(lease, job_ids)

    def _mend(self) -> bool:
        """Stores what is in the spool: our own as soon as the database is back, now and then what others left.

        Returns False while the database is away.
        """
        try:
            self._replay()
            if self._looks_at <= clock():
                self._looks_at = clock() + LOOK_EVERY_SEC
                self._take_over()
        except DatabaseUnavailable as error:
            self._pipeline.contact.lost(error)
            return False
        except OSError as error:
            log.warning("the spool %s: %s", self._spool.folder, error)
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
        for entries, keep in spool.abandoned(self._spool.folder):
            before = self.outcome.done
            keep([left for entry in entries for left in self._recover(entry)])
            if n := self.outcome.done - before:
                self.outcome.recovered += n
                log.info("stored %d captions that another worker had left in %s", n, self._spool.folder)

    def _recover(self, entry: Entry) -> list[Entry]:
        """What of it must be kept: another worker has the picture, or another database gave the lease."""
        with transaction(self._database, patience=self._patience()) as conn:
            is_ours = queue.belongs(conn, entry.lease, entry.uuid)
        if not is_ours:
            return [entry]
        with self._writing(entry.lease) as conn:
            result = queue.recover(conn, self._claims.worker_id, entry.lease, entry.completions)
            with suppress(LeaseLost):  # it has run out meanwhile
                queue.release(conn, entry.lease, entry.released)
        captions = {one.job_id for one in entry.completions if one.failure is None}
        self.outcome.done += len(captions & result.stored)
        self.outcome.failed += len(result.stored - captions)
        self.outcome.lost += len(captions & result.dropped)
        if entry.uuid == self._claims.uuid:
            self._pipeline.settle(entry.lease, result.stored | result.dropped)
        kept = tuple(one for one in entry.completions if one.job_id in result.kept)
        return [replace(entry, completions=kept, released=())] if kept else []

    def _patience(self) -> float:
        return STOP_PATIENCE_SEC if self._stop.is_set() else STORE_PATIENCE_SEC

    @contextmanager
    def _writing(self, lease: Lease) -> Iterator[Connection]:
        """What it takes is the lease's time of storing, the wait for the lock and the commit included."""
        started = time.perf_counter()
        try:
            with transaction(self._database, write=True, patience=self._patience()) as conn:
                yield conn
        finally:
            self.meter.stored(lease.id, (time.perf_counter() - started) * 1000)

    def _timing(self, lease: Lease, captions: Sequence[Completion]) -> queue.Timing:
        timing = self._pipeline.take_timing(lease)
        prefill = sum(caption.prefill_ms for caption in captions)
        decode = sum(caption.processing_ms for caption in captions) - prefill
        return queue.Timing(timing.load_ms, timing.prepare_ms, prefill, decode)


# --- Heartbeats, signals, endings ------------------------------------------------------------------------------


def _beat(
    database: Database, pipeline: Pipeline, meter: Meter, worker_id: int, settings: Settings, done: threading.Event
) -> None:
    """Extends the open leases as long as the engine steps; a hung process must lose them, and end."""
    try:
        _beat_until(database, pipeline, meter, worker_id, settings, done)
    except BaseException as error:
        pipeline.break_off(error)


def _beat_until(
    database: Database, pipeline: Pipeline, meter: Meter, worker_id: int, settings: Settings, done: threading.Event
) -> None:
    pause = FIRST_BEAT_SEC
    while not done.wait(min(pause, settings.beat_sec)):
        pause *= 2
        if pipeline.stalled_sec() > settings.stall_timeout:
            log.critical(
                "no step for %.0f s: the model hangs. Ending hard, so that others take over.", settings.stall_timeout
            )
            os._exit(EXIT_STALLED)
        leases = [lease.id for lease in pipeline.open_leases()]
        store_ms, telemetry = meter.unbooked(), meter.recent()
        runs_out_at = clock() + settings.lease_ttl
        try:
            with transaction(database, write=True, patience=min(settings.lease_ttl / 4, STORE_PATIENCE_SEC)) as conn:
                kept = queue.heartbeat(
                    conn, worker_id, leases, ttl_ms=settings.ttl_ms, store_ms=store_ms, telemetry=telemetry
                )
        except (RococapError, DriverError) as error:
            pipeline.contact.lost(error)
            continue
        meter.booked(store_ms)
        pipeline.contact.made()
        pipeline.extend(kept, runs_out_at)
        still_held = {lease.id for lease in pipeline.open_leases()}
        if lost := set(leases) & still_held - kept:
            log.warning("lost leases %s: their pictures were given to other workers, or cancelled", sorted(lost))
            pipeline.lose(lost)


@contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """The first request to stop drains, the second leaves at once."""

    def hear(signum: int) -> None:
        if stop.is_set():
            os._exit(128 + signum)
        log.info("asked to stop; ask again in a second or later to leave at once")
        stop.set()

    with stop_requests(hear):
        yield


@contextmanager
def stop_requests(hear: Callable[[int], None]) -> Iterator[None]:
    """Calls `hear`, in a thread, with the signal of each request to stop.

    The thread knows when a signal came. Python's own handlers do not: they wait for the main thread, which may be in a
    step of the model for seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    arrivals, arrived = os.pipe()
    os.set_blocking(arrived, False)
    listener = threading.Thread(target=_listen, args=(arrivals, hear), name="signals", daemon=True)
    listener.start()
    wakeup = signal.set_wakeup_fd(arrived, warn_on_full_buffer=False)
    before = {signum: signal.signal(signum, _ignore) for signum in STOP_SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(arrived)
        listener.join()
        os.close(arrivals)


def _ignore(signum: int, frame: FrameType | None) -> None:
    """A handler, so that the signal neither ends the process nor is lost: what came is in the pipe."""


def _listen(arrivals: int, hear: Callable[[int], None]) -> None:
    heard_at = -math.inf
    while came := os.read(arrivals, 1):
        at = time.monotonic()
        if came[0] in STOP_SIGNALS and at - heard_at > ONE_REQUEST_SEC:
            heard_at = at
            hear(came[0])


def _drain(pipeline: Pipeline, store: Store, settings: Settings, stop: threading.Event, done: threading.Event) -> None:
    """Once asked: gives back what has not started, and what does not finish within the drain timeout."""
    while not stop.wait(0.1):
        if done.is_set():
            return
    log.info("finishing what runs, for at most %.0f s", settings.drain_timeout)
    threading.Thread(target=_leave_hard, args=(store, settings, done), name="leave", daemon=True).start()
    pipeline.stop()
    store.release(running=False)
    if not done.wait(settings.drain_timeout):
        store.release(running=True)


def _leave_hard(store: Store, settings: Settings, done: threading.Event) -> None:
    """When a thread hangs in a database that does not even answer, or in the model: nobody waits for ever."""
    if not done.wait(settings.drain_timeout + STOP_SLACK_SEC):
        store.save()
        log.critical("the model or the database does not answer: leaving without them")
        os._exit(EXIT_STALLED)


def _give_up(database: Database, pipeline: Pipeline, store: Store, error: BaseException) -> None:
    """After an error that ends the worker: what ran is suspect of having broken the engine, the rest is given back."""
    pipeline.join(timeout=5)
    store.release(running=isinstance(error, RococapError | DriverError | OSError))
    try:
        for lease in pipeline.unfinished_leases():
            with transaction(database, write=True, patience=STOP_PATIENCE_SEC) as conn:
                queue.crash(conn, lease.id)
    except (DatabaseError, DriverError) as away:
        log.warning("left without telling the database: %s", away)
