"""Reads and prepares batches in a thread while the model works on an earlier one."""

import threading
from collections.abc import Iterator
from queue import Empty, Full, Queue
from typing import Any

BATCHES = 4
"""How many batches are ready at most. Random order costs a read per picture, so a step may have to wait for several."""
POLL_SEC = 0.1


class Ahead:
    """An iterator over what another one yields, which a thread of its own advances.

    Only the first item may depend on the global random state: the caller waits for it, and then goes on to use that
    state itself.
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self.source = source
        self._ready: Queue[tuple[Any, BaseException | None]] = Queue(BATCHES)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._advance, name="read ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while not self._is_closed.is_set():
            try:
                item, error = self._ready.get(timeout=POLL_SEC)
            except Empty:
                continue
            if error is not None:
                self._is_closed.set()
                raise error
            return item
        raise StopIteration

    def close(self) -> None:
        """Ends the thread."""
        self._is_closed.set()
        self._thread.join()

    def _advance(self) -> None:
        while not self._is_closed.is_set():
            try:
                entry: tuple[Any, BaseException | None] = (next(self.source), None)
            except BaseException as error:  # StopIteration, too, is for the thread that asks
                entry = (None, error)
            self._put(entry)
            if entry[1] is not None:
                return

    def _put(self, entry: tuple[Any, BaseException | None]) -> None:
        while not self._is_closed.is_set():
            try:
                self._ready.put(entry, timeout=POLL_SEC)
            except Full:
                continue
            return
