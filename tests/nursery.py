"""Worker processes with the small engine that start at once, forked by one process that has imported everything."""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache
from itertools import count
from pathlib import Path

SMALL = Path(__file__).with_name("small_engine.py")
_asking = threading.Lock()
_numbers = count(1)


@cache
def _nurse() -> subprocess.Popen:
    nurse = subprocess.Popen(
        [sys.executable, str(SMALL)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # a fork copies no threads
    )
    atexit.register(nurse.communicate)
    return nurse


@cache
def _folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="rococap-nursery-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _ask(question: object) -> int | None:
    """Sends one request to `small_engine.nurse`, which describes it, and returns the reply."""
    with _asking:
        nurse = _nurse()
        nurse.stdin.write(json.dumps(question) + "\n")
        nurse.stdin.flush()
        return json.loads(nurse.stdout.readline())


class Worker:
    """A worker process, used like a Popen. Its output goes to files."""

    def __init__(self, url: str, options: dict) -> None:
        self._path = _folder() / str(next(_numbers))
        for suffix in (".out", ".err"):
            self._path.with_suffix(suffix).touch()  # they may be read before the worker has started
        if "ROCOCAP_SPOOL" in os.environ:  # the nurse may have started without it
            options = {"spool": os.environ["ROCOCAP_SPOOL"]} | options
        self.pid = _ask([url, options, str(self._path)])
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None:
            self.returncode = _ask(self.pid)
        return self.returncode

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """Standard output and standard error, once it has ended."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, f"still running after {timeout} s"
            time.sleep(0.02)
        return self._path.with_suffix(".out").read_text(), self.told()

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def told(self) -> str:
        return self._path.with_suffix(".err").read_text()
