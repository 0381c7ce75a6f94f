"""Supervises the worker processes of one machine, one per GPU or several on the CPU.

The parent captions nothing itself. Each child is the `worker` command with `--member`, and reports its outcome as JSON.
"""

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from sqlalchemy import Engine as Database

from rococap import queue
from rococap.data import SPLITS
from rococap.db import transaction
from rococap.errors import DatabaseError
from rococap.queue import Run, choose_run
from rococap.worker.children import (
    Child,
    Echo,
    Process,
    Tended,
    environment,
    labels_of,
    member_command,
    report_to_parent,
    tend,
)
from rococap.worker.settings import Settings
from rococap.worker.signals import stop_requests
from rococap.worker.store import Outcome, Report

log = logging.getLogger(__name__)

LOOK_EVERY_SEC = 2.0
"""How often the progress of the run is read from the database."""

Command = Callable[[Settings], list[str]]
"""Returns the command line of a child with these settings."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The result of all children: the sum of their outcomes, an error for each device that was given up or failed to
    stop properly, and the signal of each request to stop.
    """

    outcome: Outcome
    errors: tuple[str, ...]
    signals: tuple[int, ...]


def work(
    database: Database,
    url: str,
    settings: Settings,
    devices: Sequence[str],
    command: Command,
    report: Report = lambda outcome, left: None,
    echo: Echo = lambda line: None,
) -> Ended:
    """Captions on all `devices` until no work is left (or for ever, with `wait`), or until SIGTERM, SIGINT or SIGUSR1
    asks it to stop; a second request makes the children exit at once.

    `url` is that of `database`, for the children. `report` is called every few seconds, from a thread, once there are
    results. Raises RunError if there is nothing to work on.
    """
    run, is_work_left = find_run(database, settings)
    if not is_work_left:
        return Ended(Outcome(run.name), (), ())
    child_env = worker_environment(url, devices)
    shares = share_out(replace(settings, run=run.name), devices)
    children = [WorkerChild(label, share, command, child_env, echo) for label, share in shares]
    return see_through(database, run, children, report)


def see_through(database: Database, run: Run, children: Sequence["Worker"], report: Report) -> Ended:
    """Supervises the children, and reports the progress of their run meanwhile."""
    with _reporting(database, run, children, report):
        ended = supervise(children)
    return replace(ended, outcome=replace(ended.outcome, run=run.name))


def find_run(database: Database, settings: Settings) -> tuple[Run, bool]:
    """The run to work on, and whether there is anything to wait for or to do.

    Raises RunError, here rather than in every child, if there is no such run or it has no pictures of these splits.
    """
    with transaction(database) as conn:
        run = choose_run(conn, settings.run, settings.splits)
        splits = settings.splits or SPLITS
        queue.counts_of(conn, run, splits)
        return run, settings.wait or any(queue.unfinished(conn, run, splits).values())


# --- Settings and command lines --------------------------------------------------------------------------------


def share_out(settings: Settings, devices: Sequence[str]) -> list[tuple[str, Settings]]:
    """A label and settings for each process. A limit is divided among them; processes whose share would be 0 are left
    out.
    """
    n = len(devices)
    shares = [replace(settings, options=replace(settings.options, device=device)) for device in devices]
    if (limit := settings.limit) is not None:
        limits = [limit // n + (number < limit % n) for number in range(n)]
        shares = [replace(share, limit=limit) for share, limit in zip(shares, limits, strict=True) if limit]
    return list(zip(labels_of(devices), shares, strict=False))


def worker_environment(url: str, devices: Sequence[str]) -> dict[str, str]:
    """The environment of the children, with the queue's URL, because `ps` would show its password on a command line."""
    return environment(devices) | {"ROCOCAP_DB": url}


def worker_command(*, force: bool = False, debug: bool = False) -> Command:
    """The command line of a child: the `worker` command with `--member`. The environment names the database."""
    return lambda settings: member_command("worker", settings.to_json(), force=force, debug=debug)


def report_outcome(outcome: Outcome, left: int = 0) -> None:
    """Reports the outcome so far to the parent; pictures in progress are stored even if it was killed. A `Report`."""
    report_to_parent(asdict(outcome))


# --- The parent's side -----------------------------------------------------------------------------------------


class Worker(Tended, Protocol):
    """The worker of one device, on this machine or elsewhere."""

    def outcome(self) -> Outcome:
        """The sum of what its processes have reported so far."""


def supervise(children: Sequence[Worker]) -> Ended:
    """Starts the children, restarts those that die, and returns when all have ended."""
    with _signals() as received:
        tend(children, received)
    outcome = replace(total(children), drained=bool(received))
    return Ended(outcome, tuple(child.error for child in children if child.error), tuple(received))


def total(children: Sequence[Worker]) -> Outcome:
    """The sum of the outcomes reported so far. `seconds` is the longest time that one device has worked."""
    outcomes = [child.outcome() for child in children]
    return replace(added(outcomes), seconds=max((outcome.seconds for outcome in outcomes), default=0.0))


def added(outcomes: Sequence[Outcome]) -> Outcome:
    """The sum of the outcomes."""
    names = ("done", "failed", "lost", "recovered", "spooled", "seconds")
    spool = next((outcome.spool for outcome in outcomes if outcome.spooled), "")
    return Outcome(spool=spool, **{name: sum(getattr(outcome, name) for outcome in outcomes) for name in names})


def left_of(limit: int | None, outcome: Outcome) -> int | None:
    """How many of so many pictures are left after this outcome; None without a limit."""
    if limit is None:
        return None
    return max(0, limit - (outcome.done - outcome.recovered) - outcome.failed - outcome.lost)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Yields a list to which the signal of each request to stop is appended."""
    received: list[int] = []

    def on_request(signum: int) -> None:
        received.append(signum)
        if len(received) == 1:
            log.info(
                "asked to stop: waiting for all workers to finish the pictures in progress; ask again after a second "
                "to exit at once"
            )

    with stop_requests(on_request):
        yield received


@contextmanager
def _reporting(database: Database, run: Run, children: Sequence[Worker], report: Report) -> Iterator[None]:
    """Calls `report` while the block runs. It does so in a thread, so that a database that does not answer cannot delay
    stopping.
    """
    done = threading.Event()

    def look() -> None:
        while not done.wait(LOOK_EVERY_SEC):
            outcome = total(children)
            if not (outcome.done or outcome.failed):
                continue
            try:
                with transaction(database) as conn:
                    left = sum(queue.unfinished(conn, run, SPLITS).values())
            except DatabaseError as error:
                log.debug("%s", error)  # the children log it as a warning
            else:
                report(outcome, left)

    thread = threading.Thread(target=look, name="look", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(1)


class WorkerChild(Child[Outcome]):
    """The worker of one device."""

    def __init__(self, label: str, settings: Settings, command: Command, env: Mapping[str, str], echo: Echo) -> None:
        super().__init__(label)
        self._settings = settings
        self._command = command
        self._env = env
        self._echo = echo
        self._ended: list[Outcome] = []

    def outcome(self) -> Outcome:
        process = self._process
        return added([*self._ended, process.reported] if process else self._ended)

    def _start(self) -> Process[Outcome]:
        settings = replace(self._settings, limit=self._left())
        return Process(self.label, self._command(settings), self._env, self._echo, _parse_outcome, Outcome())

    def _has_finished(self, process: Process[Outcome]) -> bool:
        self._ended.append(_outcome_of(process))
        return process.code == 0 or self._left() == 0

    def _left(self) -> int | None:
        """How much of its share of the limit is left; None without a limit."""
        return left_of(self._settings.limit, self.outcome())


def _outcome_of(process: Process[Outcome]) -> Outcome:
    """The last outcome that a process has reported. One that was killed did not report its time: the seconds that it
    lived are taken instead, which include loading the model.
    """
    outcome = process.reported
    has_worked = outcome.done or outcome.failed
    return replace(outcome, seconds=outcome.seconds or (process.lived() if has_worked else 0.0))


def _parse_outcome(line: str) -> Outcome | None:
    try:
        return Outcome(**json.loads(line))
    except (ValueError, TypeError):
        return None
