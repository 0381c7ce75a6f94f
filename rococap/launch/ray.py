"""Workers on a Ray cluster: one actor for each device, which runs `rococap worker` as a child process.

Ray places the actors, and starts one again elsewhere when its machine is lost. The driver asks each of them now and
then how its child is doing, so that `children.tend` tends them as it does processes on this machine.
"""

import logging
import math
import os
import socket
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from sqlalchemy import Engine as Database

from rococap import __version__
from rococap.launch import LaunchError, check_shared
from rococap.urls import shown
from rococap.worker import children, supervisor
from rococap.worker.children import Echo
from rococap.worker.process import STOP_SLACK_SEC
from rococap.worker.settings import Settings
from rococap.worker.store import Outcome, Report
from rococap.worker.supervisor import Command, Ended, WorkerChild

log = logging.getLogger(__name__)

Kind = Literal["gpu", "cpu"]

ASK_EVERY_SEC = 0.5
"""Pause between two questions to an actor."""
CONNECT_TIMEOUT_SEC = 10.0
MAX_LINES = 1_000
"""Lines of its child's log that an actor keeps until it is asked for them."""


@dataclass(frozen=True, slots=True)
class Answer:
    """How the child of an actor is doing. `start` differs after each start of the actor, when `outcome` begins anew."""

    start: str
    is_over: bool
    error: str
    outcome: Outcome
    lines: tuple[str, ...]


class Device:
    """The actor of a device. Ray runs it in a process on the machine that has the device."""

    def __init__(self, label: str, kind: Kind, url: str, command: Command) -> None:
        self._start = uuid.uuid4().hex
        self._label = f"{label} on {socket.gethostname()}"
        self._command = command
        self._env = supervisor.worker_environment(url, [])
        if kind == "gpu":
            self._env.pop("OMP_NUM_THREADS", None)  # Ray sets it to 1: it counts the CPU cores of an actor, here none
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self._child: WorkerChild | None = None

    def tend(self, settings: Settings, is_stopping: bool) -> Answer:
        """Starts the child when that is due, as `WorkerChild.tend` does. The settings are those of the first call."""
        if self._child is None:
            self._child = WorkerChild(self._label, settings, self._command, self._env, self._lines.append)
        self._child.tend(is_stopping=is_stopping)
        lines = tuple(self._lines.popleft() for _ in range(len(self._lines)))
        return Answer(self._start, self._child.is_over, self._child.error, self._child.outcome(), lines)

    def ask_to_stop(self) -> None:
        if self._child is not None:
            self._child.ask_to_stop()

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()


class Remote:
    """The driver's side of an actor: a `supervisor.Worker`."""

    def __init__(self, ray: Any, label: str, kind: Kind, url: str, settings: Settings, command: Command, echo: Echo):
        self.is_over = False
        self.error = ""
        self._ray = ray
        self._label = label
        self._settings = settings
        self._echo = echo
        self._before: list[Outcome] = []
        self._last = Answer("", False, "", Outcome(), ())
        self._pending: Any = None
        self._asks_at = 0.0
        self._gives_up_at = math.inf
        options = {
            f"num_{kind}s": 1,
            "max_restarts": -1,
            "max_task_retries": -1,  # else a restart would call the constructor only
            # When Ray ends an actor, its child drains, because its stdin is closed. Ray would kill it.
            "runtime_env": {"env_vars": {"RAY_kill_child_processes_on_worker_exit": "false"}},
        }
        self._actor = ray.remote(Device).options(**options).remote(label, kind, url, command)

    def outcome(self) -> Outcome:
        return supervisor.added([*self._before, self._last.outcome])

    def tend(self, *, is_stopping: bool) -> None:
        if self.is_over:
            return
        if is_stopping and self._gives_up_at == math.inf:
            patience = self._settings.drain_timeout + STOP_SLACK_SEC if self._last.start else 0.0
            self._gives_up_at = time.monotonic() + patience
        if self._pending is None:
            if time.monotonic() >= self._asks_at:
                settings = replace(self._settings, limit=supervisor.left_of(self._settings.limit, self.outcome()))
                self._pending = self._actor.tend.remote(settings, is_stopping)
        elif self._ray.wait([self._pending], timeout=0)[0]:
            self._asks_at = time.monotonic() + ASK_EVERY_SEC
            self._take(self._pending)
            self._pending = None
        if time.monotonic() >= self._gives_up_at and not self.is_over:
            self._end()  # it has no machine, or its machine does not answer

    def ask_to_stop(self) -> None:
        self._actor.ask_to_stop.remote()

    def kill(self) -> None:
        self._actor.kill.remote()
        self._gives_up_at = min(self._gives_up_at, time.monotonic() + children.KILL_AFTER_SEC)

    def leave(self) -> None:
        """Asks an actor that still runs to drain, and waits for it; needed if the driver itself fails."""
        if not self.is_over:
            self._actor.ask_to_stop.remote()
            deadline = time.monotonic() + self._settings.drain_timeout + STOP_SLACK_SEC
            while not self.is_over and time.monotonic() < deadline:
                self.tend(is_stopping=True)
                time.sleep(children.POLL_SEC)

    def _take(self, pending: Any) -> None:
        try:
            answer = self._ray.get(pending)
        except self._ray.exceptions.RayError as error:
            self.is_over = True
            reason = str(error).strip().splitlines()[-1]
            self.error = f"{self._label} could not be started: {reason}. Does each machine have rococap {__version__}?"
            return
        if self._last.start not in ("", answer.start):
            log.warning("%s was lost; Ray has started it again", self._label)
            self._before.append(self._last.outcome)
        self._last = answer
        for line in answer.lines:
            self._echo(line)
        if answer.is_over:
            self.error = answer.error
            self._end()

    def _end(self) -> None:
        self.is_over = True
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._actor)


def work(
    database: Database,
    url: str,
    settings: Settings,
    kind: Kind,
    n: int,
    address: str | None,
    command: Command,
    report: Report = lambda outcome, left: None,
    echo: Echo = lambda line: None,
) -> Ended:
    """Captions on `n` devices of the Ray cluster at `address` until no work is left, or until SIGTERM, SIGINT or
    SIGUSR1 asks it to stop, as `supervisor.work` does on this machine. None as the address leaves the choice to Ray:
    RAY_ADDRESS, a cluster that runs on this machine, or a new one.

    Raises LaunchError if there is no cluster or it has no such devices, DatabaseError if the queue is an SQLite file
    and the cluster has other machines, RunError if there is nothing to work on.
    """
    run, is_work_left = supervisor.find_run(database, settings)
    if not is_work_left:
        return Ended(Outcome(run.name), (), ())
    with _connected(address) as ray:
        _check_cluster(ray, database, kind, n)
        device = "cuda:0" if kind == "gpu" else "cpu"  # Ray shows an actor its own GPU only
        shares = supervisor.share_out(replace(settings, run=run.name), [device] * n)
        remotes = [
            Remote(ray, f"{kind} {number}", kind, _absolute(database, url), share, command, echo)
            for number, (_, share) in enumerate(shares, start=1)
        ]
        return supervisor.see_through(database, run, remotes, report)


def _absolute(database: Database, url: str) -> str:
    """The URL for processes in other folders."""
    if database.dialect.name != "sqlite":
        return url
    return shown(database.url.set(database=os.path.abspath(database.url.database or "")))


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise LaunchError(f"Ray is not installed ({error}). Install it: pip install 'rococap[ray]'") from error
    named = address or os.environ.get("RAY_ADDRESS")
    try:
        _check_listening(named)
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = str(error).splitlines()[0]
        if named is None:
            raise LaunchError(
                f"Ray could not be started on this machine ({reason}). Its logs are in /tmp/ray."
            ) from error
        raise LaunchError(
            f"There is no Ray cluster at {named} ({reason}). Start one with ray start --head, or "
            "leave out --address to use this machine alone."
        ) from error
    with redirect_stdout(sys.stderr):  # where Ray prints what it does about machines that are lost
        try:
            yield ray
        finally:
            ray.shutdown()


def _check_listening(address: str | None) -> None:
    """Raises OSError if nothing listens at HOST:PORT. Ray itself would try for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_SEC).close()


def _check_cluster(ray: Any, database: Database, kind: Kind, n: int) -> None:
    hosts = {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    if others := sorted(hosts - {socket.gethostname()}):
        check_shared(database, _listed(others))
    available = int(ray.cluster_resources().get(kind.upper(), 0))
    what = "GPUs" if kind == "gpu" else "CPU cores"
    if not available:
        step = (
            f"To caption on its CPU cores, use --cpus {n}."
            if kind == "gpu"
            else "Add a machine that has some: ray start."
        )
        raise LaunchError(f"The Ray cluster has no {what}. {step}")
    if available < n:
        log.warning(
            "the Ray cluster has %d %s; the other %d of %d workers wait for more", available, what, n - available, n
        )


def _listed(hosts: Sequence[str]) -> str:
    return ", ".join(hosts[:3]) + (f" and {len(hosts) - 3} more" if len(hosts) > 3 else "")
