"""The requests of clients: the Source of a server's engine.

A request waits, is prepared, is ready, runs, and is answered. Any thread may ask; preparing threads and the thread of
the engine do the rest. Few requests are prepared ahead of the engine, so that those that wait hold only the files of
their pictures. Knows no HTTP and no model.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

from rococap.engines import Completion, Message, Prepared
from rococap.errors import RococapError

STAGES: Final = ("waiting", "preparing", "ready", "running")
"""What a request goes through, in order."""
HOLD: Final = 4
"""Ready requests join a running batch once there is one for every HOLD of its rows, or once the first has waited for
HOLD steps: reading one picture takes almost as long as reading a few.
"""
Tell = Callable[[int, Sequence[int]], None]
"""Gets the position of the first of some new tokens in an answer, and the tokens, on the thread of the engine."""


class Busy(RococapError):
    """So many requests are waiting that no more are accepted for now."""


class Unavailable(RococapError):
    """The server takes no requests: it is loading its model, or stopping, or its model has failed."""


@dataclass(slots=True, eq=False)
class Asked:
    """One request. `pictures` are the bytes of their files; `messages` and `max_new_tokens` are those of
    `engines.Request`. `answer` is its result; cancelling it gives its place to another request.
    """

    pictures: Sequence[bytes]
    messages: Sequence[Message] | None = None
    max_new_tokens: int | None = None
    tell: Tell | None = None
    answer: "Future[Completion]" = field(default_factory=Future)
    is_blank: bool = False
    """Whether its only picture is a single colour, known once it is prepared."""
    id: int = 0
    times: list[float] = field(default_factory=list)
    """When it entered each of STAGES, in seconds of a monotonic clock."""
    n_pictures: int = field(init=False)

    def __post_init__(self) -> None:
        self.n_pictures = len(self.pictures)

    def enters(self) -> None:
        """It enters the next of STAGES."""
        self.times.append(time.monotonic())


class Requests:
    """The requests of all clients, which share batches. Thread-safe. `max_waiting` limits those that do not run yet.

    `on_end` is called, in any thread, with each request that was answered, has failed or was cancelled.
    """

    def __init__(self, max_waiting: int, on_end: Callable[[Asked], None] = lambda asked: None) -> None:
        self.max_waiting = max_waiting
        self.n_steps = self.n_rows = 0
        """Steps of the engine that decoded rows, and those rows, summed over the steps."""
        self._on_end = on_end
        self._changed = threading.Condition()
        self._last_id = 0
        self._waiting: deque[Asked] = deque()
        self._preparing: set[int] = set()
        self._ready: deque[tuple[Asked, Prepared, int]] = deque()
        """Each with the number of steps before it."""
        self._running: dict[int, Asked] = {}
        self._abandoned: set[int] = set()
        self._stepped: float | None = None
        self._closed: Unavailable | None = None
        self._ended = False

    # --- the clients' side ---

    def ask(self, batch: Sequence[Asked]) -> None:
        """Accepts requests, all or none. Raises Busy if too many are waiting, and Unavailable once it is closed."""
        with self._changed:
            self.check_room(len(batch))
            for asked in batch:
                self._last_id += 1
                asked.id = self._last_id
                asked.enters()
                self._waiting.append(asked)
            self._changed.notify_all()
        for asked in batch:
            asked.answer.add_done_callback(lambda _, asked=asked: self._finish(asked))  # type: ignore[misc]

    def check_room(self, n: int) -> None:
        """Raises as `ask` would for `n` requests."""
        with self._changed:
            if self._closed is not None:
                raise self._closed
            if self._n_waiting() + n > self.max_waiting:
                raise Busy(f"{self._n_waiting()} requests are waiting, and {self.max_waiting} may. Try again later.")

    def _finish(self, asked: Asked) -> None:
        if asked.answer.cancelled():
            self._drop(asked)
        self._on_end(asked)

    def _drop(self, asked: Asked) -> None:
        """Frees the place of a request that was cancelled."""
        with self._changed:
            if asked.id in self._running:
                del self._running[asked.id]
                self._abandoned.add(asked.id)
            elif asked in self._waiting:
                self._waiting.remove(asked)
            else:
                self._ready = deque(one for one in self._ready if one[0] is not asked)
            self._changed.notify_all()

    @property
    def n_waiting(self) -> int:
        with self._changed:
            return self._n_waiting()

    @property
    def n_running(self) -> int:
        return len(self._running)

    def _n_waiting(self) -> int:
        return len(self._waiting) + len(self._preparing) + len(self._ready)

    def close(self, why: Unavailable) -> None:
        """Accepts no more requests. The engine's source ends with the last one that was accepted."""
        with self._changed:
            self._closed = self._closed or why
            self._changed.notify_all()

    def wait_until_idle(self, timeout: float) -> bool:
        """Waits until every request is answered. Returns False if that takes longer than `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._n_waiting() or self._running), timeout)

    def end(self, why: Unavailable) -> None:
        """Ends the source at once: every request that is not answered yet fails with `why`."""
        with self._changed:
            self._closed = self._closed or why
            self._ended = True
            left = [*self._waiting, *(one[0] for one in self._ready), *self._running.values()]
            self._abandoned |= set(self._running)
            self._waiting.clear()
            self._ready.clear()
            self._running.clear()
            self._changed.notify_all()
        for asked in left:
            if asked.answer.set_running_or_notify_cancel():
                asked.answer.set_exception(why)

    # --- the preparing threads' side ---

    def next(self, ahead: int) -> Asked | None:
        """The next request to prepare, once fewer than `ahead` are ready or being prepared. None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over() or (self._waiting and self._n_ahead() < ahead))
            if not self._waiting:
                return None
            asked = self._waiting.popleft()
            self._preparing.add(asked.id)
            asked.enters()
            return asked

    def _n_ahead(self) -> int:
        return len(self._preparing) + len(self._ready)

    def _is_over(self) -> bool:
        return self._ended or (self._closed is not None and not self._waiting)

    def offer(self, asked: Asked, prepared: Prepared | None) -> None:
        """Makes a request available to the engine, unless it was cancelled, or answered by a failure (None)."""
        with self._changed:
            self._preparing.discard(asked.id)
            why = self._closed if self._ended else None
            if prepared is not None and why is None and not asked.answer.done():
                self._ready.append((asked, prepared, self.n_steps))
                asked.enters()
            self._changed.notify_all()
        if prepared is not None and why is not None and asked.answer.set_running_or_notify_cancel():
            asked.answer.set_exception(why)

    # --- the engine's side: Source and Streaming ---

    @property
    def since_step(self) -> float:
        """For how many seconds the engine has neither taken a step nor waited for requests. 0.0 before it begins."""
        stepped = self._stepped
        return 0.0 if stepped is None else time.monotonic() - stepped

    def take(self, limit: int, wait: float | None) -> list[Prepared]:
        """As `Source.take`. With a `wait` in seconds, it waits only if requests are waiting or being prepared."""
        with self._changed:
            self._stepped = None
            if wait is None:
                self._abandoned.clear()  # an engine that has rows never waits without a timeout
            self._changed.wait_for(lambda: self._ready or self._may_stop_waiting(wait), timeout=wait)
            if wait == 0 and self._are_few():
                return []
            taken = [self._ready.popleft() for _ in range(min(limit, len(self._ready)))]
            self._running |= {asked.id: asked for asked, _, _ in taken}
            self._stepped = time.monotonic()
            for asked, _, _ in taken:
                asked.enters()
            if taken:
                self._changed.notify_all()
            return [prepared for _, prepared, _ in taken]

    def _are_few(self) -> bool:
        is_recent = not self._ready or self.n_steps - self._ready[0][2] < HOLD
        return len(self._ready) < len(self._running) // HOLD and is_recent

    def _may_stop_waiting(self, wait: float | None) -> bool:
        is_coming = bool(self._waiting or self._preparing)
        return self._ended or (not is_coming and (wait is not None or self._closed is not None))

    def step(self, rows: int) -> Set[int]:
        self._stepped = time.monotonic()
        if rows:
            self.n_steps += 1
            self.n_rows += rows
        return self._abandoned

    def tokens(self, job_id: int, start: int, ids: Sequence[int]) -> None:
        asked = self._running.get(job_id)
        if asked is not None and asked.tell is not None:
            asked.tell(start, ids)

    def answer(self, completion: Completion) -> None:
        """Passes a completion on to whoever asked."""
        with self._changed:
            asked = self._running.pop(completion.job_id, None)
            self._changed.notify_all()
        if asked is not None and asked.answer.set_running_or_notify_cancel():
            asked.answer.set_result(completion)
