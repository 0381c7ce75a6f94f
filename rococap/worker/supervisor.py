"""Several worker processes of one machine: one per GPU, or some on the CPU, started, restarted and stopped together.

The parent captions nothing. Each child is the `worker` command as its `--member`: it tells what it has done as JSON on
its stdout, logs to its stderr, and stops when its stdin ends, so that none outlives its parent.
"""

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

from sqlalchemy import Engine as Database

from rococap import queue
from rococap.data import SPLITS
from rococap.db import transaction
from rococap.errors import DatabaseError
from rococap.queue import Counts, Run, choose_run
from rococap.worker.settings import Settings
from rococap.worker.signals import STOP_SIGNALS, stop_requests
from rococap.worker.store import Outcome, Report

log = logging.getLogger(__name__)

MOST_PROCESSES = 256
POLL_SEC = 0.1
LOOK_EVERY_SEC = 2.0
"""How often the database is asked where the run stands."""
FIRST_PAUSE_SEC = 1.0
"""How long a process that died waits for its first successor; doubled each time, up to the longest."""
LONGEST_PAUSE_SEC = 60.0
SETTLED_SEC = 300.0
"""One that has lived for so long is not to blame for those before it: the pause is the first again."""
QUICK_SEC = 60.0
TRIES = 3
"""A device whose process fails so often in a row, each time that quickly, is given up."""
KILL_AFTER_SEC = 5.0
"""From the second request to stop until what is still there is killed."""

Command = Callable[[Settings], list[str]]
"""The command line of a child that works so."""

Echo = Callable[[str], None]
"""Takes a line of a child's log, with its device before it; called from threads."""


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of all: the sum of what the processes did, what went wrong with some, and how often it was asked to
    stop by which signal.
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
    report: Report = lambda outcome, counts: None,
    echo: Echo = lambda line: None,
) -> Ended:
    """Captions on all `devices` until nothing is left (or for ever, with `wait`), or until SIGTERM, SIGINT or SIGUSR1.

    `report` is called every few seconds once there are captions, from a thread. A second request makes the children
    leave at once. Raises RunError if there is nothing to work on.
    """
    with transaction(database) as conn:
        run = choose_run(conn, settings.run, settings.splits)
        splits = settings.splits or SPLITS
        queue.counts_of(conn, run, splits)  # refuses what the run does not have, once for all
        left = queue.unfinished(conn, run, splits)
    if not (settings.wait or any(left.values())):
        return Ended(Outcome(run.name), (), ())
    around = environment(url, devices)
    shares = share_out(replace(settings, run=run.name), devices)
    children = [Child(label, share, command, around, echo) for label, share in shares]
    with _reporting(database, run, children, report):
        ended = supervise(children)
    return replace(ended, outcome=replace(ended.outcome, run=run.name))


# --- What to start ---------------------------------------------------------------------------------------------


def count_gpus() -> int:
    """Those that CUDA_VISIBLE_DEVICES leaves to this process."""
    import torch

    return torch.cuda.device_count()


def parse_devices(text: str, count_gpus: Callable[[], int]) -> list[str]:
    """The `--device` of each process: of all GPUs, of some (`0,1`), or N times the CPU (`cpu:N`).

    `all` without a GPU is one process on the CPU. Raises ValueError that says what would be right.
    """
    if text == "all":
        if n := count_gpus():
            return [f"cuda:{number}" for number in range(n)]
        log.info("there is no GPU here: one process on the CPU")
        return ["cpu"]
    if match := re.fullmatch(r"cpu:([0-9]{1,9})", text):
        if not 1 <= (n := int(match[1])) <= MOST_PROCESSES:
            raise ValueError(f"{text} is no number of processes: cpu:N starts N of them, 1 to {MOST_PROCESSES}.")
        return ["cpu"] * n
    if re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", text):
        return _gpus([int(number) for number in text.split(",")], count_gpus())
    raise ValueError(f"{text!r} names no devices. Use all, the numbers of GPUs as in 0,1, or cpu:N.")


def _gpus(numbers: Sequence[int], there_are: int) -> list[str]:
    for number, n in Counter(numbers).items():
        if n > 1:
            raise ValueError(f"GPU {number} is named twice: one process for each GPU.")
        if number >= there_are:
            have = f"Those here are 0 to {there_are - 1}" if there_are else "There is none here: use cpu:N"
            raise ValueError(f"There is no GPU {number}. {have}, or all.")
    return [f"cuda:{number}" for number in numbers]


def share_out(settings: Settings, devices: Sequence[str]) -> list[tuple[str, Settings]]:
    """A label and settings for each process; a limit is shared out, and who would get nothing of it is left out."""
    n = len(devices)
    labels = [f"cpu {number}" for number in range(1, n + 1)] if n > 1 and devices[0] == "cpu" else devices
    shares = [replace(settings, options=replace(settings.options, device=device)) for device in devices]
    if (limit := settings.limit) is not None:
        limits = [limit // n + (number < limit % n) for number in range(n)]
        shares = [replace(share, limit=limit) for share, limit in zip(shares, limits, strict=True) if limit]
    return list(zip(labels, shares, strict=False))


def environment(url: str, devices: Sequence[str]) -> dict[str, str]:
    """Ours, and the queue's URL, which may hold a password that `ps` would show on a command line; what is logged
    comes to us in UTF-8, whatever the terminal takes.
    """
    around = os.environ | {"ROCOCAP_DB": url, "PYTHONIOENCODING": "utf-8"}
    return shared_threads(devices.count("cpu"), around) if "cpu" in devices else around


def shared_threads(n: int, around: Mapping[str, str]) -> dict[str, str]:
    """`around` for one of `n` processes on the CPU: spinning OpenMP threads of several make each other many times
    slower.
    """
    threads = str(max(1, _n_cores() // n))
    return {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", **around, "OMP_NUM_THREADS": threads}


def _n_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def program() -> list[str]:
    """The command line that starts this program once more, and imports what this process did.

    `-m` alone would look into the working folder first, where a user's own random.py hides the library's. Only where
    this package lies there itself, in a checkout, may it be found nowhere else.
    """
    is_checkout = Path(__file__).parents[2] == Path.cwd()
    return [sys.executable, *([] if is_checkout else ["-P"]), "-m", "rococap"]


def worker_command(*, force: bool = False, debug: bool = False) -> Command:
    """How the `worker` command is started as a member; the database comes by the environment."""
    before = [flag for flag, is_set in (("--force", force), ("--debug", debug)) if is_set]

    def command(settings: Settings) -> list[str]:
        return [*program(), *before, "worker", "--member", settings.to_json()]

    return command


# --- The child's side ------------------------------------------------------------------------------------------


def leave_with_parent() -> None:
    """Asks this process to stop, as SIGTERM does, when its stdin ends."""
    threading.Thread(target=_wait_for_end, name="parent", daemon=True).start()


def _wait_for_end() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def tell(outcome: Outcome, counts: Sequence[Counts] = ()) -> None:
    """Tells the parent what this process has done so far; a `Report`."""
    with suppress(BrokenPipeError):  # the parent was killed: what runs is stored all the same
        os.write(1, json.dumps(asdict(outcome)).encode() + b"\n")


# --- The parent's side -----------------------------------------------------------------------------------------


def supervise(children: Sequence["Child"]) -> Ended:
    """Starts the children, restarts those that die, and returns when all have ended."""
    n_passed_on, kills_at = 0, math.inf
    with _signals() as received:
        try:
            while not all(child.is_over for child in children):
                is_urgent = len(received) > 1
                if len(received) > n_passed_on or is_urgent:  # again and again: too soon, it would count as the first
                    n_passed_on = len(received)
                    for child in children:
                        child.ask_to_stop()
                if is_urgent:
                    kills_at = min(kills_at, time.monotonic() + KILL_AFTER_SEC)
                if time.monotonic() >= kills_at:
                    for child in children:
                        child.kill()
                for child in children:
                    child.tend(is_stopping=bool(received))
                time.sleep(POLL_SEC)
        finally:
            for child in children:
                child.leave()
    outcome = replace(total(children), drained=bool(received))
    return Ended(outcome, tuple(child.error for child in children if child.error), tuple(received))


def total(children: Sequence["Child"]) -> Outcome:
    """What all have told so far. `seconds` is the longest time that one device has worked."""
    outcomes = [child.outcome() for child in children]
    return replace(_sum(outcomes), seconds=max((outcome.seconds for outcome in outcomes), default=0.0))


def _sum(outcomes: Sequence[Outcome]) -> Outcome:
    added = ("done", "failed", "lost", "recovered", "spooled", "seconds")
    spool = next((outcome.spool for outcome in outcomes if outcome.spooled), "")
    return Outcome(spool=spool, **{name: sum(getattr(outcome, name) for outcome in outcomes) for name in added})


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals of the requests to stop, in the order in which they came."""
    received: list[int] = []

    def hear(signum: int) -> None:
        received.append(signum)
        if len(received) == 1:
            log.info(
                "asked to stop: waiting for all to finish what runs; ask again in a second or later to leave at once"
            )

    with stop_requests(hear):
        yield received


@contextmanager
def _reporting(database: Database, run: Run, children: Sequence["Child"], report: Report) -> Iterator[None]:
    """In a thread, so that a database that does not answer keeps nobody from stopping."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(LOOK_EVERY_SEC):
            outcome = total(children)
            if not (outcome.done or outcome.failed):
                continue
            try:
                with transaction(database) as conn:
                    counts = queue.counts_of(conn, run)
            except DatabaseError as error:
                log.debug("%s", error)  # the children say it
            else:
                report(outcome, counts)

    thread = threading.Thread(target=look, name="look", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(1)


class Child:
    """One device's process, and its successors when it dies. `error` is why it was given up, if it was."""

    def __init__(self, label: str, settings: Settings, command: Command, around: Mapping[str, str], echo: Echo) -> None:
        self.is_over = False
        self.error = ""
        self._label = label
        self._settings = settings
        self._command = command
        self._around = around
        self._echo = echo
        self._process: Process | None = None
        self._ended: list[Outcome] = []
        self._starts_at = 0.0
        self._pause = FIRST_PAUSE_SEC
        self._n_quick = 0

    def outcome(self) -> Outcome:
        process = self._process
        return _sum([*self._ended, process.told] if process else self._ended)

    def tend(self, *, is_stopping: bool) -> None:
        """Starts it when its time has come; when it has ended, decides whether it has a successor."""
        if self.is_over:
            return
        if self._process is None:
            if is_stopping:
                self.is_over = True
            elif time.monotonic() >= self._starts_at:
                settings = replace(self._settings, limit=self._left())
                self._process = Process(self._label, self._command(settings), self._around, self._echo)
        elif self._process.has_ended():
            process, self._process = self._process, None
            self._ended.append(process.outcome())
            self._succeed(process, is_stopping)

    def ask_to_stop(self) -> None:
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def leave(self) -> None:
        """Asks what is left of it to stop, and waits for that: for when the parent itself fails."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def _left(self) -> int | None:
        """Of its share of the limit."""
        if self._settings.limit is None:
            return None
        told = self.outcome()
        return max(0, self._settings.limit - (told.done - told.recovered) - told.failed - told.lost)

    def _succeed(self, process: "Process", is_stopping: bool) -> None:
        if process.code == 0 or self._left() == 0:
            self.is_over = True
        elif is_stopping:
            self.is_over = True
            # One that was still starting, and so held nothing, has no handler yet.
            if -process.code not in STOP_SIGNALS:
                self.error = f"{self._label} was asked to stop and {process.ending()}"
        elif self._is_hopeless(process):
            self.is_over = True
            self.error = f"{self._label} failed {TRIES} times in a row and was given up: it {process.ending()}"
            log.error("%s", self.error)
        else:
            self._put_off(process)

    def _is_hopeless(self, process: "Process") -> bool:
        """A signal may come from outside and a stall may pass; what is configured wrongly fails again."""
        is_quick = process.code in (1, 2) and process.lived() < QUICK_SEC
        self._n_quick = self._n_quick + 1 if is_quick else 0
        return self._n_quick == TRIES

    def _put_off(self, process: "Process") -> None:
        if process.lived() >= SETTLED_SEC:
            self._pause = FIRST_PAUSE_SEC
        log.warning("%s %s; it is started again in %.0f s", self._label, process.ending(), self._pause)
        self._starts_at = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SEC)


class Process:
    """A child that runs, with threads that listen to it; `told` is the last it told of what it has done."""

    def __init__(self, label: str, command: Sequence[str], around: Mapping[str, str], echo: Echo) -> None:
        self.told = Outcome()
        self._label = label
        self._echo = echo
        self._last_line = ""
        self._started = time.monotonic()
        self._ended = math.inf
        self._popen = subprocess.Popen(
            command,
            env=around,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C is for the parent, who passes it on once
        )
        listened = ((self._popen.stdout, self._hear), (self._popen.stderr, self._pass_on))
        self._listeners = [
            threading.Thread(target=_listen, args=(stream, hear), name=label, daemon=True) for stream, hear in listened
        ]
        for listener in self._listeners:
            listener.start()

    @property
    def code(self) -> int:
        return self._popen.returncode

    def has_ended(self) -> bool:
        if self._popen.poll() is None:
            return False
        self.wait()
        return True

    def wait(self) -> None:
        """Until it has ended, and what it said was heard."""
        self._popen.wait()
        self._ended = min(self._ended, time.monotonic())
        for listener in self._listeners:
            listener.join(1)  # a process that it started may keep the pipe open
        if self._popen.stdin is not None:
            self._popen.stdin.close()

    def terminate(self) -> None:
        self._popen.terminate()

    def kill(self) -> None:
        self._popen.kill()

    def lived(self) -> float:
        """Seconds."""
        return min(self._ended, time.monotonic()) - self._started

    def outcome(self) -> Outcome:
        """What it told; one that was killed did not get to telling its time, loading the model included."""
        told = self.told
        worked = told.done or told.failed
        return replace(told, seconds=told.seconds or (self.lived() if worked else 0.0))

    def ending(self) -> str:
        how = f"was killed by {_name(-self.code)}" if self.code < 0 else f"ended with code {self.code}"
        return f"{how} ({self._last_line})" if self._last_line else how

    def _hear(self, line: str) -> None:
        told = _outcome(line)
        if told is None:
            self._pass_on(line)
        else:
            self.told = told

    def _pass_on(self, line: str) -> None:
        if line.strip():
            self._last_line = line.strip().removeprefix("Error: ")
        self._echo(f"{self._label}  {line.rstrip()}")


def _listen(stream: IO[str], hear: Callable[[str], None]) -> None:
    with stream:
        for line in stream:
            hear(line)


def _outcome(line: str) -> Outcome | None:
    """What a child told; None for a line that some library printed."""
    try:
        return Outcome(**json.loads(line))
    except (ValueError, TypeError):
        return None


def _name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:  # a real-time signal
        return f"signal {signum}"
