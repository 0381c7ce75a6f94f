"""Supervises the worker processes of one machine, one per GPU or several on the CPU: starts, restarts and stops them.

The parent captions nothing itself. Each child is the `worker` command with `--member`: it reports its outcome as JSON
on stdout, logs to stderr, and stops when its stdin is closed, so that no child outlives its parent.
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
from typing import IO, Protocol

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

MAX_PROCESSES = 256
POLL_SEC = 0.1
LOOK_EVERY_SEC = 2.0
"""How often the progress of the run is read from the database."""
FIRST_PAUSE_SEC = 1.0
"""Pause before a process that died is restarted; doubled after each further death, up to the longest."""
LONGEST_PAUSE_SEC = 60.0
SETTLED_SEC = 300.0
"""After a process has lived this long, the pause starts over at the first."""
QUICK_SEC = 60.0
TRIES = 3
"""A device is given up once its process has failed this often in a row, each time within QUICK_SEC."""
KILL_AFTER_SEC = 5.0
"""Time from the second request to stop until the remaining children are killed."""

Command = Callable[[Settings], list[str]]
"""Returns the command line of a child with these settings."""

Echo = Callable[[str], None]
"""Called, from threads, with each line of a child's log, prefixed by its device."""


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
    report: Report = lambda outcome, counts: None,
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
    child_env = environment(url, devices)
    shares = share_out(replace(settings, run=run.name), devices)
    children = [Child(label, share, command, child_env, echo) for label, share in shares]
    return see_through(database, run, children, report)


def see_through(database: Database, run: Run, children: Sequence["Supervised"], report: Report) -> Ended:
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


# --- Devices, settings and command lines -----------------------------------------------------------------------


def count_gpus() -> int:
    """How many GPUs this process may use, as limited by CUDA_VISIBLE_DEVICES."""
    import torch

    return torch.cuda.device_count()


def parse_devices(text: str, count_gpus: Callable[[], int]) -> list[str]:
    """The `--device` of each process, from `all` (every GPU), numbers of GPUs (`0,1`) or `cpu:N` (N times the CPU).

    `all` on a machine without a GPU means one process on the CPU. Raises ValueError, with the values that are allowed.
    """
    if text == "all":
        if n := count_gpus():
            return [f"cuda:{number}" for number in range(n)]
        log.info("this machine has no GPU: starting one process on the CPU")
        return ["cpu"]
    if match := re.fullmatch(r"cpu:([0-9]{1,9})", text):
        if not 1 <= (n := int(match[1])) <= MAX_PROCESSES:
            raise ValueError(f"{text} is out of range: cpu:N starts N processes, from 1 to {MAX_PROCESSES}.")
        return ["cpu"] * n
    if re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", text):
        return _gpus([int(number) for number in text.split(",")], count_gpus())
    raise ValueError(f"{text!r} names no devices. Use all, the numbers of GPUs as in 0,1, or cpu:N.")


def _gpus(numbers: Sequence[int], n_gpus: int) -> list[str]:
    for number, n in Counter(numbers).items():
        if n > 1:
            raise ValueError(f"GPU {number} is named more than once: each GPU gets one process.")
        if number >= n_gpus:
            available = f"It has 0 to {n_gpus - 1}: name one of them" if n_gpus else "It has none: use cpu:N"
            raise ValueError(f"There is no GPU {number} on this machine. {available}, or all.")
    return [f"cuda:{number}" for number in numbers]


def share_out(settings: Settings, devices: Sequence[str]) -> list[tuple[str, Settings]]:
    """A label and settings for each process. A limit is divided among them; processes whose share would be 0 are left
    out.
    """
    n = len(devices)
    labels = [f"cpu {number}" for number in range(1, n + 1)] if n > 1 and devices[0] == "cpu" else devices
    shares = [replace(settings, options=replace(settings.options, device=device)) for device in devices]
    if (limit := settings.limit) is not None:
        limits = [limit // n + (number < limit % n) for number in range(n)]
        shares = [replace(share, limit=limit) for share, limit in zip(shares, limits, strict=True) if limit]
    return list(zip(labels, shares, strict=False))


def environment(url: str, devices: Sequence[str]) -> dict[str, str]:
    """The environment of the children: ours, with the queue's URL, because `ps` would show its password on a command
    line. They log in UTF-8, whatever the terminal's encoding is.
    """
    env = os.environ | {"ROCOCAP_DB": url, "PYTHONIOENCODING": "utf-8"}
    return shared_threads(devices.count("cpu"), env) if "cpu" in devices else env


def shared_threads(n: int, env: Mapping[str, str]) -> dict[str, str]:
    """The environment `env` for one of `n` processes that share the CPU, with a share of the cores and without spinning
    OpenMP threads, which would make each process many times slower.
    """
    threads = str(max(1, _n_cores() // n))
    return {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", **env, "OMP_NUM_THREADS": threads}


def _n_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def program() -> list[str]:
    """The command line that starts rococap again with the same modules as this process.

    `-m` alone would search the working folder first, where a user's own random.py would hide the standard library's.
    `-P` prevents that; it is omitted in a checkout, where the package may be found in the working folder only.
    """
    is_checkout = Path(__file__).parents[2] == Path.cwd()
    return [sys.executable, *([] if is_checkout else ["-P"]), "-m", "rococap"]


def flags(*, force: bool, debug: bool) -> list[str]:
    """The options before the name of a command that another process needs as well."""
    return [flag for flag, is_set in (("--force", force), ("--debug", debug)) if is_set]


def worker_command(*, force: bool = False, debug: bool = False) -> Command:
    """The command line of a child: the `worker` command with `--member`. The environment names the database."""
    before = flags(force=force, debug=debug)

    def command(settings: Settings) -> list[str]:
        return [*program(), *before, "worker", "--member", settings.to_json()]

    return command


# --- The child's side ------------------------------------------------------------------------------------------


def leave_with_parent() -> None:
    """Sends this process SIGTERM when its stdin is closed, which happens when the parent exits."""
    threading.Thread(target=_wait_for_end, name="parent", daemon=True).start()


def _wait_for_end() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def report_to_parent(outcome: Outcome, counts: Sequence[Counts] = ()) -> None:
    """Writes the outcome so far to stdout, for the parent. Serves as a `Report`."""
    with suppress(BrokenPipeError):  # the parent was killed: pictures in progress are stored nevertheless
        os.write(1, json.dumps(asdict(outcome)).encode() + b"\n")


# --- The parent's side -----------------------------------------------------------------------------------------


class Supervised(Protocol):
    """What can be supervised: a child on this machine, or one elsewhere."""

    is_over: bool
    error: str

    def outcome(self) -> Outcome: ...

    def tend(self, *, is_stopping: bool) -> None: ...

    def ask_to_stop(self) -> None: ...

    def kill(self) -> None: ...

    def leave(self) -> None: ...


def supervise(children: Sequence[Supervised]) -> Ended:
    """Starts the children, restarts those that die, and returns when all have ended."""
    n_passed_on, kills_at = 0, math.inf
    with _signals() as received:
        try:
            while not all(child.is_over for child in children):
                is_urgent = len(received) > 1
                # An urgent request is repeated: sent too soon, the child would count it as part of the first.
                if len(received) > n_passed_on or is_urgent:
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


def total(children: Sequence[Supervised]) -> Outcome:
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
def _reporting(database: Database, run: Run, children: Sequence[Supervised], report: Report) -> Iterator[None]:
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
                    counts = queue.counts_of(conn, run)
            except DatabaseError as error:
                log.debug("%s", error)  # the children log it as a warning
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
    """The worker of one device: its process, and the processes that replace it when it dies.

    `error` is why the device was given up or its process did not stop properly; empty if neither happened.
    """

    def __init__(self, label: str, settings: Settings, command: Command, env: Mapping[str, str], echo: Echo) -> None:
        self.is_over = False
        self.error = ""
        self._label = label
        self._settings = settings
        self._command = command
        self._env = env
        self._echo = echo
        self._process: Process | None = None
        self._ended: list[Outcome] = []
        self._next_start = 0.0
        self._pause = FIRST_PAUSE_SEC
        self._n_quick = 0

    def outcome(self) -> Outcome:
        """The sum of what its processes have reported so far."""
        process = self._process
        return added([*self._ended, process.reported] if process else self._ended)

    def tend(self, *, is_stopping: bool) -> None:
        """Starts its process when that is due; if the process has ended, decides whether to start another."""
        if self.is_over:
            return
        if self._process is None:
            if is_stopping:
                self.is_over = True
            elif time.monotonic() >= self._next_start:
                settings = replace(self._settings, limit=self._left())
                self._process = Process(self._label, self._command(settings), self._env, self._echo)
        elif self._process.has_ended():
            process, self._process = self._process, None
            self._ended.append(process.outcome())
            self._decide_restart(process, is_stopping)

    def ask_to_stop(self) -> None:
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def leave(self) -> None:
        """Asks a process that still runs to stop, and waits for it; needed if the parent itself fails."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def _left(self) -> int | None:
        """How much of its share of the limit is left; None without a limit."""
        return left_of(self._settings.limit, self.outcome())

    def _decide_restart(self, process: "Process", is_stopping: bool) -> None:
        if process.code == 0 or self._left() == 0:
            self.is_over = True
        elif is_stopping:
            self.is_over = True
            # A process killed by the signal itself was still starting, and so held nothing.
            if -process.code not in STOP_SIGNALS:
                self.error = f"{self._label} was asked to stop and {process.ending()}"
        elif self._is_hopeless(process):
            self.is_over = True
            self.error = f"{self._label} failed {TRIES} times in a row and was given up: it {process.ending()}"
            log.error("%s", self.error)
        else:
            self._put_off(process)

    def _is_hopeless(self, process: "Process") -> bool:
        """Whether the process has failed TRIES times in a row in a way that points to a wrong configuration. A signal
        may come from outside, and a stall may be temporary.
        """
        is_quick = process.code in (1, 2) and process.lived() < QUICK_SEC
        self._n_quick = self._n_quick + 1 if is_quick else 0
        return self._n_quick == TRIES

    def _put_off(self, process: "Process") -> None:
        if process.lived() >= SETTLED_SEC:
            self._pause = FIRST_PAUSE_SEC
        log.warning("%s %s; restarting it in %.0f s", self._label, process.ending(), self._pause)
        self._next_start = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SEC)


class Process:
    """A child process, with threads that read its output. `reported` is the last outcome that it reported."""

    def __init__(self, label: str, command: Sequence[str], env: Mapping[str, str], echo: Echo) -> None:
        self.reported = Outcome()
        self._label = label
        self._echo = echo
        self._last_line = ""
        self._started = time.monotonic()
        self._ended = math.inf
        self._popen = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches only the parent, which passes it on once
        )
        streams = ((self._popen.stdout, self._on_stdout), (self._popen.stderr, self._pass_on))
        self._readers = [
            threading.Thread(target=_read_lines, args=(stream, on_line), name=label, daemon=True)
            for stream, on_line in streams
        ]
        for reader in self._readers:
            reader.start()

    @property
    def code(self) -> int:
        return self._popen.returncode

    def has_ended(self) -> bool:
        if self._popen.poll() is None:
            return False
        self.wait()
        return True

    def wait(self) -> None:
        """Waits until the process has ended and its output is read."""
        self._popen.wait()
        self._ended = min(self._ended, time.monotonic())
        for reader in self._readers:
            reader.join(1)  # a process that the child started may keep the pipe open
        if self._popen.stdin is not None:
            self._popen.stdin.close()

    def terminate(self) -> None:
        self._popen.terminate()

    def kill(self) -> None:
        self._popen.kill()

    def lived(self) -> float:
        """Seconds from its start until it ended, or until now."""
        return min(self._ended, time.monotonic()) - self._started

    def outcome(self) -> Outcome:
        """The last outcome reported. A process that was killed did not report its time: the seconds that it lived are
        taken instead, which include loading the model.
        """
        outcome = self.reported
        has_worked = outcome.done or outcome.failed
        return replace(outcome, seconds=outcome.seconds or (self.lived() if has_worked else 0.0))

    def ending(self) -> str:
        """How the process ended, as a predicate, with the last line of its log."""
        how = f"was killed by {_name(-self.code)}" if self.code < 0 else f"ended with code {self.code}"
        return f"{how} ({self._last_line})" if self._last_line else how

    def _on_stdout(self, line: str) -> None:
        outcome = _parse_outcome(line)
        if outcome is None:
            self._pass_on(line)
        else:
            self.reported = outcome

    def _pass_on(self, line: str) -> None:
        if line.strip():
            self._last_line = line.strip().removeprefix("Error: ")
        self._echo(f"{self._label}  {line.rstrip()}")


def _read_lines(stream: IO[str], on_line: Callable[[str], None]) -> None:
    with stream:
        for line in stream:
            on_line(line)


def _parse_outcome(line: str) -> Outcome | None:
    """The outcome that a child reported; None for any other line, such as one printed by a library."""
    try:
        return Outcome(**json.loads(line))
    except (ValueError, TypeError):
        return None


def _name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:  # a real-time signal
        return f"signal {signum}"
