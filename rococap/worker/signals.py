"""Signals that ask a process to stop; several that arrive within one second count as one request."""

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
"""Signals within this time are one request: Slurm and systemd signal every process of a job, and its parent then passes
on its own signal; wrappers likewise pass on a Ctrl-C that the terminal has already sent to all.
"""


@contextmanager
def stop_requests(on_request: Callable[[int], None]) -> Iterator[None]:
    """While the block runs, calls `on_request`, in a thread, with the signal of each request to stop.

    The thread sees a signal when it arrives. Python's own handlers would not: they run on the main thread, which a step
    of the model may occupy for seconds. Outside the main thread, no handlers can be set and nothing is called.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    arrivals, arrived = os.pipe()
    os.set_blocking(arrived, False)
    listener = threading.Thread(target=_listen, args=(arrivals, on_request), name="signals", daemon=True)
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
    """Keeps a signal from ending the process. The signal is not lost: Python has written it to the pipe."""


def _listen(arrivals: int, on_request: Callable[[int], None]) -> None:
    last_request = -math.inf
    while received := os.read(arrivals, 1):
        now = time.monotonic()
        if received[0] in STOP_SIGNALS and now - last_request > ONE_REQUEST_SEC:
            last_request = now
            on_request(received[0])
