"""Child processes of one command, one per GPU or several on the CPU: starts, restarts and stops them.

A child is the same command again, with `--member`: it reports how it does on stdout, logs to stderr, and stops when its
stdin is closed, so that no child outlives its parent. Subclasses of `Child` decide what a process does and what it
reports.
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
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Generic, Protocol, TypeVar

from rococap.worker.signals import STOP_SIGNALS

log = logging.getLogger(__name__)

MAX_PROCESSES = 256
POLL_SEC = 0.1
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

R = TypeVar("R")
"""What a process reports of itself."""

Echo = Callable[[str], None]
"""Called, from threads, with each line of a child's log, prefixed by its device."""


# --- Devices and command lines ---------------------------------------------------------------------------------


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


def labels_of(devices: Sequence[str]) -> list[str]:
    """A label for the process on each device."""
    if len(devices) > 1 and devices[0] == "cpu":
        return [f"cpu {number}" for number in range(1, len(devices) + 1)]
    return list(devices)


def environment(devices: Sequence[str]) -> dict[str, str]:
    """The environment of the children: ours. They log in UTF-8, whatever the terminal's encoding is."""
    env = os.environ | {"PYTHONIOENCODING": "utf-8"}
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


def member_command(command: str, settings: str, *, force: bool = False, debug: bool = False) -> list[str]:
    """The command line of a child: `rococap COMMAND --member SETTINGS`."""
    return [*program(), *flags(force=force, debug=debug), command, "--member", settings]


# --- The child's side ------------------------------------------------------------------------------------------


def leave_with_parent() -> None:
    """Sends this process SIGTERM when its stdin is closed, which happens when the parent exits."""
    threading.Thread(target=_wait_for_end, name="parent", daemon=True).start()


def _wait_for_end() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def report_to_parent(report: object) -> None:
    """Writes a report to stdout, for the parent, as a line of JSON."""
    with suppress(BrokenPipeError):  # the parent was killed
        os.write(1, json.dumps(report).encode() + b"\n")


# --- The parent's side -----------------------------------------------------------------------------------------


class Tended(Protocol):
    """What runs on one device, on this machine or elsewhere. `error` is why it was given up or did not stop properly;
    empty if neither happened.
    """

    is_over: bool
    error: str

    def tend(self, *, is_stopping: bool) -> None:
        """Starts what is due, and notices what has ended. Called again and again; never waits."""

    def ask_to_stop(self) -> None: ...

    def kill(self) -> None: ...

    def leave(self) -> None:
        """Asks what still runs to stop, and waits for it; needed if the parent itself fails."""


def tend(children: Sequence[Tended], stops: Sequence[int]) -> None:
    """Starts the children, restarts those that die, and returns when all have ended.

    Each item that is added to `stops` meanwhile is a request to stop; the second makes the children exit at once.
    """
    n_passed_on, kills_at = 0, math.inf
    try:
        while not all(child.is_over for child in children):
            is_urgent = len(stops) > 1
            # An urgent request is repeated: sent too soon, the child would count it as part of the first.
            if len(stops) > n_passed_on or is_urgent:
                n_passed_on = len(stops)
                for child in children:
                    child.ask_to_stop()
            if is_urgent:
                kills_at = min(kills_at, time.monotonic() + KILL_AFTER_SEC)
            if time.monotonic() >= kills_at:
                for child in children:
                    child.kill()
            for child in children:
                child.tend(is_stopping=bool(stops))
            time.sleep(POLL_SEC)
    finally:
        for child in children:
            child.leave()


class Child(ABC, Generic[R]):
    """The process of a device on this machine, and the processes that replace it when it dies."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.is_over = False
        self.error = ""
        self._process: Process[R] | None = None
        self._next_start = 0.0
        self._pause = FIRST_PAUSE_SEC
        self._n_quick = 0

    @abstractmethod
    def _start(self) -> "Process[R]":
        """Starts a process."""

    @abstractmethod
    def _has_finished(self, process: "Process[R]") -> bool:
        """Called once for each process that has ended. Returns whether nothing is left to do on its device."""

    def _cannot_start(self, process: "Process[R]") -> bool:
        """Whether a process ended in a way that points to a wrong configuration. A signal may come from outside, and a
        stall may be temporary.
        """
        return process.code in (1, 2) and process.lived() < QUICK_SEC

    def tend(self, *, is_stopping: bool) -> None:
        """Starts its process when that is due; if the process has ended, decides whether to start another."""
        if self.is_over:
            return
        if self._process is None:
            if is_stopping:
                self.is_over = True
            elif time.monotonic() >= self._next_start:
                self._process = self._start()
        elif self._process.has_ended():
            process, self._process = self._process, None
            self._decide_restart(process, is_stopping)

    def ask_to_stop(self) -> None:
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def leave(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def _decide_restart(self, process: "Process[R]", is_stopping: bool) -> None:
        if self._has_finished(process):
            self.is_over = True
        elif is_stopping:
            self.is_over = True
            # A process killed by the signal itself was still starting, and so held nothing.
            if process.code != 0 and -process.code not in STOP_SIGNALS:
                self.error = f"{self.label} was asked to stop and {process.ending()}"
        elif self._is_hopeless(process):
            self.is_over = True
            self.error = f"{self.label} failed {TRIES} times in a row and was given up: it {process.ending()}"
            log.error("%s", self.error)
        else:
            self._put_off(process)

    def _is_hopeless(self, process: "Process[R]") -> bool:
        self._n_quick = self._n_quick + 1 if self._cannot_start(process) else 0
        return self._n_quick == TRIES

    def _put_off(self, process: "Process[R]") -> None:
        if process.lived() >= SETTLED_SEC:
            self._pause = FIRST_PAUSE_SEC
        log.warning("%s %s; restarting it in %.0f s", self.label, process.ending(), self._pause)
        self._next_start = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SEC)


class Process(Generic[R]):
    """A child process, with threads that read its output.

    `reported` is what it reported last: `parse` returns that for a line of its stdout, and None for any other line,
    such as one printed by a library, which is passed on to `echo` like those of its log.
    """

    def __init__(
        self,
        label: str,
        command: Sequence[str],
        env: Mapping[str, str],
        echo: Echo,
        parse: Callable[[str], R | None],
        reported: R,
    ) -> None:
        self.reported = reported
        self._label = label
        self._echo = echo
        self._parse = parse
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
            # Not for ever, since a process that the child started may keep the pipe open; and not in one piece, which
            # would be over when a machine that slept wakes up, before the last report is read.
            for _ in range(10):
                reader.join(0.1)
        if self._popen.stdin is not None:
            self._popen.stdin.close()

    def terminate(self) -> None:
        self._popen.terminate()

    def kill(self) -> None:
        self._popen.kill()

    def lived(self) -> float:
        """Seconds from its start until it ended, or until now."""
        return min(self._ended, time.monotonic()) - self._started

    def ending(self) -> str:
        """How the process ended, as a predicate, with the last line of its log."""
        how = f"was killed by {_name(-self.code)}" if self.code < 0 else f"ended with code {self.code}"
        return f"{how} ({self._last_line})" if self._last_line else how

    def _on_stdout(self, line: str) -> None:
        report = self._parse(line)
        if report is None:
            self._pass_on(line)
        else:
            self.reported = report

    def _pass_on(self, line: str) -> None:
        if line.strip():
            self._last_line = line.strip().removeprefix("Error: ")
        self._echo(f"{self._label}  {line.rstrip()}")


def _read_lines(stream: IO[str], on_line: Callable[[str], None]) -> None:
    with stream:
        for line in stream:
            on_line(line)


def _name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:  # a real-time signal
        return f"signal {signum}"
