"""Requests to stop: signals that arrive within one second count as one."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ONE_REQUEST_SEC = 1.0
"""Signals within it are one request to stop: Slurm and systemd send one to every process of a job, whose parent passes
on its own, and wrappers pass on a Ctrl-C that the terminal has sent to all.
"""


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
