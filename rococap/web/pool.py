"""The processes of a server that has several devices: one for each, at a Unix socket of its own. Knows no HTTP."""

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from rococap.errors import RococapError
from rococap.web.captioner import LOADING, STALLED, STOPPING
from rococap.web.requests import Unavailable
from rococap.worker.children import Child, Echo, Process, labels_of, tend

log = logging.getLogger(__name__)

LONGEST_PATH = 107
"""Bytes in the path of a Unix socket."""
LEAVE_SEC = 15.0
"""How long processes may take to end once their requests are answered, or have failed."""

Command = Callable[[str, Path], list[str]]
"""The command line of a process that serves with a device at a socket."""


class Replica(Child[str]):
    """The process of one device, which reports its state. `n_requests` are those that it has been sent and that are
    not answered yet.
    """

    def __init__(self, label: str, socket: Path, command: Sequence[str], env: Mapping[str, str], echo: Echo) -> None:
        super().__init__(label)
        self.socket = socket
        self.n_requests = 0
        self._command = command
        self._env = env
        self._echo = echo
        self._was_ready = False

    @property
    def state(self) -> str:
        """As `Captioner.state`. While there is no process, it is `loading` if another will be started."""
        process = self._process
        if process is None:
            return "failed" if self.error else "stopping" if self.is_over else "loading"
        return process.reported

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Counts a request while the block runs."""
        self.n_requests += 1
        try:
            yield
        finally:
            self.n_requests -= 1

    def _start(self) -> Process[str]:
        self._was_ready = False
        return Process(self.label, self._command, self._env, self._echo, self._parse, "loading")

    def _parse(self, line: str) -> str | None:
        try:
            state = str(json.loads(line)["state"])
        except (ValueError, TypeError, KeyError):
            return None
        if state == "ok":
            self._was_ready = True
            log.info("%s answers requests", self.label)
        return state

    def _has_finished(self, process: Process[str]) -> bool:
        return False

    def _cannot_start(self, process: Process[str]) -> bool:
        return process.code in (1, 2) and not self._was_ready  # however long the model took to load


class Pool:
    """A process for each of `devices`, which answers a request within `timeout` seconds. `error` is why there is none
    any more.
    """

    def __init__(
        self, devices: Sequence[str], command: Command, env: Mapping[str, str], echo: Echo, timeout: float
    ) -> None:
        self.timeout = timeout
        self.error: BaseException | None = None
        self.is_stopping = False
        self._folder = TemporaryDirectory(prefix="rococap-", ignore_cleanup_errors=True)  # only its owner may enter
        sockets = [Path(self._folder.name, str(number)) for number in range(len(devices))]
        if len(os.fsencode(sockets[-1])) > LONGEST_PATH:
            raise RococapError(
                f"{sockets[-1]} is too long for the path of a socket. Try again after: export TMPDIR=/tmp"
            )
        self._replicas = [
            Replica(label, socket, command(device, socket), env, echo)
            for label, device, socket in zip(labels_of(devices), devices, sockets, strict=True)
        ]
        self._stops: list[int] = []

    def children(self) -> list[Replica]:
        """All of them, in the order of the devices."""
        return self._replicas

    @property
    def state(self) -> str:
        """As `Captioner.state`: `ok` if one of the processes answers requests."""
        if self.error is not None:
            return "failed"
        if self.is_stopping:
            return "stopping"
        states = [one.state for one in self._replicas]
        return next((state for state in ("ok", "stalled") if state in states), "loading")

    def least_loaded(self, tried: Collection[Replica]) -> Replica:
        """The process with the fewest requests, among those that answer and were not tried.

        Raises Unavailable if there is none.
        """
        ready = [one for one in self._replicas if one.state == "ok" and one not in tried]
        if self.is_stopping or not ready:
            raise Unavailable({"stopping": STOPPING, "stalled": STALLED}.get(self.state, LOADING))
        return min(ready, key=lambda one: one.n_requests)

    def start(self, on_end: Callable[[], None]) -> None:
        """Starts the processes. `on_end` is called, in another thread, when all have ended, or were given up."""
        self._thread = threading.Thread(target=self._work, args=(on_end,), name="replicas", daemon=True)
        self._thread.start()

    def drain(self, timeout: float) -> None:
        """Accepts no more requests. Returns once the processes have answered theirs, for which they have `timeout`
        seconds, and have ended.
        """
        self.is_stopping = True
        self._stops.append(signal.SIGTERM)
        self._thread.join(timeout + LEAVE_SEC)

    def close(self) -> bool:
        """Ends what still runs. Returns whether it did."""
        if self._thread.is_alive():
            self.is_stopping = True
            self._stops += [signal.SIGTERM, signal.SIGTERM]
            self._thread.join()
        self._folder.cleanup()
        return True

    def _work(self, on_end: Callable[[], None]) -> None:
        try:
            tend(self._replicas, self._stops)
            errors = "\n".join(one.error for one in self._replicas if one.error)
            if not self._stops:
                self.error = RococapError(errors)
            elif errors:
                log.warning("%s", errors)
        except BaseException as error:
            self.error = error
        on_end()
