"""The server's search index, and the thread that keeps it up to date once somebody has come to the gallery."""

import threading

from sqlalchemy import Engine as Database

from rococap.web.index import Index
from rococap.web.marks import MARKS

STOP_SEC = 5.0


class Search:
    """An index with a thread of its own."""

    def __init__(self, database: Database) -> None:
        self.index = Index(database, MARKS)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self) -> Index:
        """The index, which is kept up to date from now on."""
        with self._lock:
            if self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(
                    target=self.index.follow, args=(self._stop,), name="search index", daemon=True
                )
                self._thread.start()
        return self.index

    def close(self) -> None:
        """Ends the thread. A page of the index that is being written is written whole or not at all."""
        with self._lock:
            self._stop.set()
        if self._thread is not None:
            self._thread.join(STOP_SEC)
        self.index.close()
