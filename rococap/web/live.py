"""What all viewers share: one look at the queue a second for all of them together, and none while nobody watches."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Generic, TypeVar

from fastapi.sse import format_sse_event

from rococap.errors import RococapError

log = logging.getLogger(__name__)

EVERY_SEC = 1.0
RETRY_MS = 2_000
"""After how long a browser connects again when the server was away."""
TROUBLE = "trouble"
"""The event that says why there is nothing new to see. Its data is empty while all is well."""

Events = Mapping[str, str]
"""Data by the name of its event."""
T = TypeVar("T")


class Shared(Generic[T]):
    """What `look` returns, called at most once in `every_sec` seconds, whoever asks. Thread-safe.

    A RococapError that it raises is shared in the same way.
    """

    def __init__(self, look: Callable[[], T], every_sec: float) -> None:
        self._look = look
        self._every_sec = every_sec
        self._lock = threading.Lock()
        self._seen: tuple[float, T | RococapError] | None = None

    def now(self) -> T:
        with self._lock:
            if self._seen is None or time.monotonic() - self._seen[0] >= self._every_sec:
                try:
                    seen: T | RococapError = self._look()
                except RococapError as error:
                    seen = error
                self._seen = time.monotonic(), seen
            found = self._seen[1]
        if isinstance(found, RococapError):
            raise found
        return found

    def forget(self) -> None:
        """Makes the next call look again, because something was changed."""
        with self._lock:
            self._seen = None


class Live:
    """Streams what `shared` shows to any number of browsers."""

    def __init__(self, shared: Shared[Events]) -> None:
        self._shared = shared
        self._events: Events = {}
        self._changed = asyncio.Event()
        self._viewers = 0
        self._poller: asyncio.Task[None] | None = None
        self._closed = False

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events, each when its data has changed. A slow reader misses some, and holds up nobody."""
        self._viewers += 1
        if self._poller is None:
            self._events = {}  # nobody has watched for a while
            self._poller = asyncio.create_task(self._poll())
        sent: dict[str, str] = {}
        try:
            yield format_sse_event(retry=RETRY_MS)
            while not self._closed:
                changed = self._changed
                for name, data in self._events.items():
                    if sent.get(name) != data:
                        sent[name] = data
                        yield format_sse_event(event=name, data_str=data)
                await changed.wait()
        finally:
            self._viewers -= 1

    async def _poll(self) -> None:
        while self._viewers and not self._closed:
            try:
                self._events = {**await asyncio.to_thread(self._shared.now), TROUBLE: ""}
            except RococapError as error:
                self._events = {**self._events, TROUBLE: str(error)}
            except Exception:
                log.exception("The queue could not be looked at")
                self._events = {**self._events, TROUBLE: "The server could not look at the queue. Its log says why."}
            self._wake()
            await asyncio.sleep(EVERY_SEC)
        self._poller = None

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def close(self) -> None:
        """Ends every stream. Called in the event loop."""
        self._closed = True
        self._wake()
