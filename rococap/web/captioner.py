"""The server's model: one thread runs the engine, and a few prepare pictures for it. Knows no HTTP and no database."""

import gc
import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from rococap.data.images import is_blank, open_picture
from rococap.engines import (
    Completion,
    Detokenizing,
    Engine,
    EngineInfo,
    Failure,
    Message,
    Options,
    Prepared,
    Request,
    load_engine,
)
from rococap.engines.template import question
from rococap.errors import PictureError, RococapError
from rococap.flags import BLANK
from rococap.recipe import Recipe
from rococap.web.meter import Meter
from rococap.web.requests import Asked, Requests, Tell, Unavailable
from rococap.worker.fetcher import n_preparers

log = logging.getLogger(__name__)

Check = Callable[[EngineInfo], None]

LOADING = "The model is still loading. Try again later."
STOPPING = "The server is stopping. Try again later."
STALLED = "The model has stopped answering. Try again later, or restart the server."
MAX_PROMPT_TOKENS = 8_192
"""Longer prompts are refused: every row of a batch has as much memory as the longest."""
CLOSE_SEC = 5.0
"""How long the engine may take to end after its last step."""


class Captioner:
    """Answers requests with a recipe's model, all in one engine. `error` is what the engine failed with.

    `check` is called with what was loaded, and raises RococapError if that must not answer. `on_state` is told each new
    state, in any thread. The engine is stalled when it has not made a step for `stall_timeout` seconds.
    """

    def __init__(
        self,
        recipe: Recipe,
        options: Options,
        max_waiting: int,
        check: Check = lambda info: None,
        on_state: Callable[[str], None] = lambda state: None,
        stall_timeout: float = math.inf,
    ) -> None:
        self.recipe = recipe
        self.stall_timeout = stall_timeout
        self.meter = Meter()
        self.requests = Requests(max_waiting, self.meter.count)
        self.error: BaseException | None = None
        self.is_loaded = False
        self.is_stopping = False
        self._options = options
        self._check = check
        self._on_state = on_state
        self._reported = "loading"
        self._engine: Engine

    def start(self, on_end: Callable[[], None]) -> None:
        """Begins to load the model. `on_end` is called, in another thread, when the engine has ended or failed."""
        self._thread = threading.Thread(target=self._work, args=(on_end,), name="engine", daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo | None:
        """What answers; None until it is loaded."""
        return self._engine.info if self.is_loaded else None

    @property
    def batch_size(self) -> int:
        """How many requests are answered at a time, at most; 0 until the model is loaded."""
        return self._engine.batch_size if self.is_loaded else 0

    @property
    def state(self) -> str:
        """`ok` if requests are answered; else `loading`, `stopping`, `stalled` or `failed`."""
        if self.error is not None:
            return "failed"
        if self.is_stopping:
            return "stopping"
        if not self.is_loaded:
            return "loading"
        return "stalled" if self.is_stalled else "ok"

    def report(self) -> None:
        """Tells `on_state` a state that is new. To be called now and then, since an engine stalls without a word."""
        if (state := self.state) != self._reported:
            self._reported = state
            self._on_state(state)

    @property
    def is_stalled(self) -> bool:
        return self.requests.since_step > self.stall_timeout

    def ask(
        self,
        pictures: Sequence[bytes],
        messages: Sequence[Message],
        max_new_tokens: int | None = None,
        tell: Tell | None = None,
    ) -> Asked:
        """Asks for an answer to messages with pictures, given as the bytes of their files. Raises as `ask_all` does."""
        asked = Asked(pictures, self._unless_own(messages), max_new_tokens, tell)
        self.ask_all([asked])
        return asked

    def ask_all(self, batch: Sequence[Asked]) -> None:
        """Accepts requests, all or none.

        Raises Busy if too many are waiting, and Unavailable while the model is loading or stalled, or once the server
        stops.
        """
        self._check_answers()
        self.requests.ask(batch)

    def check_room(self) -> None:
        """Raises as `ask_all` would for one request, which has not been read yet."""
        self._check_answers()
        self.requests.check_room(1)

    def _check_answers(self) -> None:
        if not self.is_loaded and self.error is None:
            raise Unavailable(LOADING)
        if self.is_stalled:
            raise Unavailable(STALLED)

    def caption(self, pictures: Sequence[bytes], prompt: str) -> list[Asked]:
        """Asks for a caption of each picture. Raises as `ask_all` does."""
        messages = self._unless_own([question(prompt)])
        batch = [Asked([picture], messages) for picture in pictures]
        self.ask_all(batch)
        return batch

    def _unless_own(self, messages: Sequence[Message]) -> Sequence[Message] | None:
        """None for the recipe's own question, whose tokens the engine keeps."""
        return None if messages == [question(self.recipe.prompt)] else messages

    def text_of(self, ids: Sequence[int]) -> str:
        """What the tokens of an answer say, for which the engine has to be Detokenizing."""
        assert isinstance(self._engine, Detokenizing)
        return self._engine.text_of(ids)

    # --- stopping ---

    def drain(self, timeout: float) -> None:
        """Accepts no more requests, and returns once all are answered, or have failed after `timeout` seconds."""
        why = Unavailable(STOPPING)
        self.is_stopping = True
        self.report()
        self.requests.close(why)
        if self.is_loaded and not self.requests.wait_until_idle(timeout):
            log.warning("some requests were not answered within %g s", timeout)
        self.requests.end(why)

    def close(self) -> bool:
        """Waits for an engine that is loaded to end. Returns whether it did."""
        self._thread.join(CLOSE_SEC if self.is_loaded and not self.is_stalled else 0)
        return not self._thread.is_alive()

    # --- threads ---

    def _work(self, on_end: Callable[[], None]) -> None:
        try:
            self._engine = load_engine(self.recipe, self._options)  # here, because importing torch takes seconds
            self._engine.load()
            self._check(self._engine.info)
            # A million objects live as long as the process: the collector would go through them again and again.
            gc.freeze()
            self._start_preparing()
            self.is_loaded = True
            self.report()
            for completion in self._engine.run(self.requests):
                self.requests.answer(completion)
            self._engine.close()
        except BaseException as error:
            self.error = error
            self.report()
            reason = str(error) if isinstance(error, RococapError) else type(error).__name__
            self.requests.end(Unavailable(f"The model has failed, and the server ends: {reason}"))
        on_end()

    def _start_preparing(self) -> None:
        n = n_preparers(self._engine.info.device)
        for number in range(n):
            threading.Thread(target=self._prepare_all, args=(n,), name=f"prepare {number}", daemon=True).start()

    def _prepare_all(self, n_threads: int) -> None:
        while (asked := self.requests.next(max(n_threads, self._engine.batch_size))) is not None:
            prepared: Prepared | None = None
            try:
                prepared = self._prepare(asked)
            except PictureError as error:
                _give(asked, Completion(asked.id, failure=Failure(error.code, str(error), error.transient)))
            except Exception as error:
                if asked.answer.set_running_or_notify_cancel():
                    asked.answer.set_exception(error)
            self.requests.offer(asked, prepared)

    def _prepare(self, asked: Asked) -> Prepared:
        pictures = [open_picture(data, self.recipe.frame) for data in asked.pictures]
        asked.pictures = ()
        asked.is_blank = len(pictures) == 1 and is_blank(pictures[0])
        prepared = self._engine.prepare(asked.id, Request(pictures, asked.messages, asked.max_new_tokens))
        if prepared.n_tokens > MAX_PROMPT_TOKENS:
            message = f"The prompt may have {MAX_PROMPT_TOKENS:,} tokens with its pictures, not {prepared.n_tokens:,}."
            raise PictureError("unprocessable", message)
        return prepared


def _give(asked: Asked, completion: Completion) -> None:
    if asked.answer.set_running_or_notify_cancel():
        asked.answer.set_result(completion)


def flagged(asked: Asked, completion: Completion) -> Completion:
    """The completion, flagged BLANK if its picture is a single colour, which the engine does not check."""
    if not asked.is_blank:
        return completion
    return replace(completion, flags=",".join(filter(None, (completion.flags, BLANK))))
