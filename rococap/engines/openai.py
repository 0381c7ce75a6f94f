"""The openai engine: any server with OpenAI's chat API, such as vLLM, SGLang, llama.cpp, Ollama or LM Studio.

Does not import torch. Keeps up to `batch_size` requests in flight. If the server is away, the engine waits: it keeps
its pictures, so that no attempt is charged, and sends one request at a time until one is answered. A picture fails only
if the server captions others. If there are no others left, the engine probes the server with a picture that it has
captioned before. Knows no queue and no HTTP, which is in `chat`.
"""

import base64
import json
import logging
import math
import queue as fifo
import random
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL.Image import Image

from rococap import open_files
from rococap.data import images
from rococap.engines import LINGER_SEC, Completion, EngineInfo, Failure, Message, Options, Prepared, Request, Source
from rococap.engines.chat import Answer, Away, NoCaption, Refused, Server
from rococap.engines.template import question
from rococap.errors import ModelError, ServerRefuses
from rococap.recipe import Recipe

log = logging.getLogger(__name__)

IN_FLIGHT = 16
"""Requests in flight, unless the user chose a number."""
POLL_SEC = 0.05
"""How often the engine checks for new pictures and abandoned rows while requests are in flight."""
FIRST_WAIT_SEC = 0.5
MAX_WAIT_SEC = 60.0
"""The first and the longest wait before a server that is away is asked again."""
STRIKES = 5
"""After this many failures on one picture, while the server answers others, the picture is at fault."""
HOPELESS = 16
"""After this many refusals in a row, or answers without a caption, the server is at fault."""
SHORT_WAIT_SEC = 1.0
"""The longest wait for a server that answers, but without a caption: it is not away."""
QUIET_SEC = 10.0
"""How long a refused picture waits for another one that could be tried, while none has been captioned."""
PROBE = 0
"""The job id of a probe: a picture that was captioned before is sent again. No job has this id."""
TOKEN_PIXELS = 784
"""Pixels per visual token (28 x 28 in Qwen2-VL), for an estimate of a prompt's length."""
OTHER_FILES = 32
"""How many files a worker has open besides its requests: the database in several threads, shards, the spool."""


class OpenAIEngine:
    """An Engine whose model runs on a server."""

    def __init__(self, recipe: Recipe, options: Options) -> None:
        self.recipe = recipe
        self.options = options
        self.batch_size = options.batch_size or IN_FLIGHT
        self._server: Server | None = None
        self._captioned: deque[Prepared] = deque(maxlen=1)
        """The picture captioned last, in the self-check or later."""

    def load(self) -> None:
        for name in ("httpx", "httpcore", "asyncio"):  # they log a line for every request
            logging.getLogger(name).setLevel(logging.WARNING)
        self._model = _served_model(self.recipe, self.options)
        _refuse_unsupported(self.recipe)
        self.batch_size = _fitting(self.batch_size)
        server = Server(self.options.base_url)
        served = server.open(self._model)
        self._server = server
        packages = {package: version(package) for package in ("rococap", "httpx", "pillow")}
        self._info = EngineInfo(
            name="openai",
            versions=packages | ({"server": served.version} if served.version else {}),
            model=self.recipe.model,
            revision="",
            dtype="server",
            device=server.place,
            digest=served.about,
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    def prepare(self, job_id: int, request: Request) -> Prepared:
        recipe = self.recipe
        limit = request.limit(recipe)
        pictures = [images.reduced(picture, recipe.max_pixels) for picture in request.pictures]
        messages = [question(recipe.prompt)] if request.messages is None else request.messages
        body: dict[str, object] = {
            "model": self._model,
            "messages": _with_pictures(messages, pictures),
            "max_tokens": limit,
            "temperature": 0,
            "stream": False,
        }
        n_tokens = sum(math.ceil(picture.width * picture.height / TOKEN_PIXELS) for picture in pictures)
        return Prepared(job_id, json.dumps(body).encode(), n_tokens)

    def run(self, source: Source) -> Iterator[Completion]:
        assert self._server is not None, "not loaded"
        flight = _Flight(self._server, source, self.batch_size, self._captioned)
        try:
            while flight.take():
                flight.send()
                yield from flight.land()
        finally:
            flight.cancel()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None


# --- requests in flight ----------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Row:
    """A picture in progress. Times are in seconds of time.monotonic(), except for `share_ms`."""

    picture: Prepared
    taken_at: float
    request: Future[Answer] | None = None
    sent_at: float = 0.0
    landed_at: float = 0.0
    not_before: float = 0.0
    strikes: int = 0
    failed_after: int | None = None
    """How many answers the server had given when it first failed on this picture."""
    share_ms: float = 0.0
    batch_size: int = 1


@dataclass(slots=True)
class _Doubts:
    """The evidence against the server since it last captioned a picture, and the pictures refused in that time."""

    refused: dict[_Row, Refused] = field(default_factory=dict)
    n_refusals: int = 0
    n_no_captions: int = 0
    last_refusal: Refused | None = None
    last_no_caption: NoCaption | None = None
    had_probe: bool = False
    """Whether a picture that the server had captioned before got no caption this time."""
    refused_probe: bool = False

    @property
    def are_grave(self) -> bool:
        return self.refused_probe or max(self.n_refusals, self.n_no_captions) >= HOPELESS

    def answered(self, sent_at: float) -> dict[_Row, Refused]:
        """Clears the doubts, and returns the pictures refused before the answered one was sent: these are at fault."""
        alone = {row: error for row, error in self.refused.items() if row.landed_at < sent_at}
        self.refused = {row: error for row, error in self.refused.items() if row not in alone}
        self.n_refusals = self.n_no_captions = 0
        self.had_probe = self.refused_probe = False
        return alone


class _Flight:
    """The pictures held by one `run`: `_waiting` to be sent or sent again, `_asked`, and refused but not failed yet.

    `_probe` is not one of them: it was captioned before, and shows whether the server still captions.
    """

    def __init__(self, server: Server, source: Source, limit: int, captioned: deque[Prepared]) -> None:
        self._server = server
        self._source = source
        self._limit = limit
        self._captioned = captioned
        self._waiting: deque[_Row] = deque()
        self._asked: dict[_Row, None] = {}
        self._landed: fifo.SimpleQueue[_Row] = fifo.SimpleQueue()
        self._gate = _Gate(server.url)
        self._doubts = _Doubts()
        self._probe: _Row | None = None
        self._n_answers = 0
        self._clock = time.monotonic()
        self._lost: Set[int] = frozenset()

    def take(self) -> bool:
        """Takes pictures from the source, waiting only if none are in progress. Returns whether there is any work."""
        held = len(self._waiting) + len(self._asked)
        taken: list[Prepared] = []
        if held < self._limit and self._probe is None:
            taken = self._source.take(self._limit - held, 0 if held else self._patience())
        now = time.monotonic()
        self._waiting.extend(_Row(picture, now) for picture in taken)
        if taken:
            self._lost = self._source.step(0)
        elif self._needs_another():
            self._ask_for_captioned()
        return bool(self._waiting or self._asked or self._doubts.refused)

    def _patience(self) -> float | None:
        if not self._doubts.refused:
            return None
        return LINGER_SEC if self._captioned else QUIET_SEC

    def _needs_another(self) -> bool:
        """Whether all pictures left have failed, so that only the answer to another one can show what is at fault."""
        if self._asked or self._probe is not None:
            return False
        if not self._waiting:
            return bool(self._doubts.refused)
        return bool(self._captioned) and all(row.failed_after == self._n_answers for row in self._waiting)

    def _ask_for_captioned(self) -> None:
        """Sends a picture that was captioned before as a probe. Raises ModelError if there is none."""
        if not self._captioned:
            raise self._hopeless()
        self._probe = _Row(replace(self._captioned[0], job_id=PROBE), time.monotonic())
        self._waiting.appendleft(self._probe)

    def send(self) -> None:
        now = self._tick()
        due = self._waiting if self._probe is None else [self._probe] if self._probe not in self._asked else []
        for row in [row for row in due if row.not_before <= now]:
            if not self._gate.lets(now, self._asked):
                break
            self._waiting.remove(row)
            self._asked[row] = None
            row.sent_at = now
            row.request = self._server.ask(row.picture.inputs)
            row.request.add_done_callback(lambda _, row=row: self._landed.put(row))  # type: ignore[misc]

    def land(self) -> Iterator[Completion]:
        """Yields completions for the answers and errors that have arrived; waits up to POLL_SEC for the first."""
        landed = self._next_landed()
        now = self._tick()
        self._drop()
        n_asked = len(self._asked)
        for row in [row for row in landed if row in self._asked]:
            del self._asked[row]
            row.landed_at = now
            yield from self._outcome(row, now)
        self._judge()
        if landed:
            self._lost = self._source.step(n_asked)
        elif not self._asked or now < self._gate.opens_at:  # a hanging server is no progress
            self._lost = self._source.step(0)

    def _drop(self) -> None:
        """Drops the rows of jobs that now belong to another worker."""
        held = (*self._waiting, *self._asked, *self._doubts.refused)
        for row in [row for row in held if row.picture.job_id in self._lost]:
            self._forget(row)

    def cancel(self) -> None:
        for row in (*self._waiting, *self._asked):
            self._forget(row)

    def _forget(self, row: _Row) -> None:
        if row in self._asked:
            del self._asked[row]
            assert row.request is not None
            row.request.cancel()
        elif row in self._doubts.refused:
            del self._doubts.refused[row]
        else:
            self._waiting.remove(row)

    def _next_landed(self) -> list[_Row]:
        landed: list[_Row] = []
        try:
            landed.append(self._landed.get(timeout=POLL_SEC))
            while True:
                landed.append(self._landed.get_nowait())
        except fifo.Empty:
            return landed

    def _tick(self) -> float:
        """Divides the time since the last tick among the requests that were in flight. Returns the current time."""
        now = time.monotonic()
        n = len(self._asked)
        for row in self._asked:
            row.share_ms += (now - self._clock) * 1000 / n
            row.batch_size = max(row.batch_size, n)
        self._clock = now
        return now

    def _outcome(self, row: _Row, now: float) -> Iterator[Completion]:
        """Yields nothing if the picture is to be sent again, or if it is not known yet what is at fault."""
        assert row.request is not None
        try:
            answer = row.request.result()
        except Refused as error:
            self._doubt(row, error)
        except Away as error:
            yield from self._put_off(row, error, now)
        else:
            yield from self._answered(row)
            if row is self._probe:
                self._probe = None
            else:
                self._captioned.append(row.picture)
                yield _captioned(row, answer, now)

    def _answered(self, row: _Row) -> Iterator[Completion]:
        self._n_answers += 1
        self._gate.answered()
        for refused, error in self._doubts.answered(row.sent_at).items():
            yield Completion(refused.picture.job_id, failure=Failure("refused_by_server", _refused(error)))

    def _doubt(self, row: _Row, error: Refused) -> None:
        self._gate.answered()
        self._doubts.n_refusals += 1
        self._doubts.last_refusal = error
        if row is self._probe:
            self._probe = None
            self._doubts.had_probe = self._doubts.refused_probe = True
        else:
            self._doubts.refused[row] = error

    def _put_off(self, row: _Row, error: Away, now: float) -> Iterator[Completion]:
        """Queues a picture behind the others, or fails it if the server keeps answering others but not this one."""
        is_news = self._gate.failed(row.sent_at, error, now)
        if isinstance(error, NoCaption):
            self._doubts.n_no_captions += is_news
            self._doubts.last_no_caption = error
            self._doubts.had_probe |= row is self._probe
        if row is self._probe:
            self._probe = None
            return
        if error.code:
            if row.failed_after is None:
                row.failed_after = self._n_answers
            row.strikes += row.failed_after < self._n_answers
        if row.strikes == STRIKES:
            yield Completion(row.picture.job_id, failure=_given_up(error))
            return
        row.not_before = now + (_backoff(row.strikes) if row.strikes else 0.0)
        self._waiting.append(row)

    def _judge(self) -> None:
        """Raises ModelError once it is clear that the server captions nothing."""
        if self._probe is not None or not self._doubts.are_grave:
            return
        if self._doubts.had_probe:
            raise self._hopeless()
        self._ask_for_captioned()

    def _hopeless(self) -> ModelError:
        """The error for a server that captions nothing."""
        doubts, url = self._doubts, self._server.url
        if doubts.n_no_captions >= HOPELESS:
            return ModelError(
                f"{url} answered {HOPELESS} times in a row with something other than a caption "
                f"({doubts.last_no_caption}). No attempt was charged to a picture. "
                "Fix the server or --base-url, then start the worker again."
            )
        return ServerRefuses(
            f"{url} refuses every picture ({doubts.last_refusal}). No attempt was charged to a picture. "
            "Fix the server, then start the worker again.",
            _refused(doubts.last_refusal),
        )


def _refused(error: Refused | None) -> str:
    return f"The server refused this picture with {error}"


def _captioned(row: _Row, answer: Answer, now: float) -> Completion:
    return Completion(
        row.picture.job_id,
        text=answer.text,
        finish_reason=answer.finish_reason,
        prompt_tokens=answer.prompt_tokens,
        new_tokens=answer.new_tokens,
        processing_ms=row.share_ms,
        latency_ms=(now - row.taken_at) * 1000,
        batch_size=row.batch_size,
    )


def _given_up(error: Away) -> Failure:
    message = f"The server failed on this picture {STRIKES} times while it answered others. The last error: {error}"
    return Failure(error.code, message, transient=error.code != "garbage_answer")


class _Gate:
    """Whether the server may be asked: after a failure, not for a while, and then with one request at a time until one
    is answered.
    """

    def __init__(self, url: str) -> None:
        self.is_away = False
        self._url = url
        self._n_failed = 0
        self._closed_at = self.opens_at = -math.inf

    def lets(self, now: float, asked: Collection[_Row]) -> bool:
        return now >= self.opens_at and not (self.is_away and self.is_probing(asked))

    def is_probing(self, asked: Collection[_Row]) -> bool:
        return any(row.sent_at > self._closed_at for row in asked)

    def failed(self, sent_at: float, error: Away, now: float) -> bool:
        """Closes the gate for a while. Returns False if the request was already in flight at the last failure."""
        if not self.is_away:
            self.is_away = True
            log.warning("%s is not available: waiting until it answers again (%s)", self._url, error)
        wait = error.wait
        is_news = sent_at > self._closed_at
        if is_news:
            self._closed_at = now
            wait = max(wait, _backoff(self._n_failed, SHORT_WAIT_SEC if isinstance(error, NoCaption) else MAX_WAIT_SEC))
            self._n_failed += 1
        self.opens_at = max(self.opens_at, now + wait)
        return is_news

    def answered(self) -> None:
        self._n_failed = 0
        if self.is_away:
            self.is_away = False
            log.info("%s answers again", self._url)


def _backoff(n: int, longest: float = MAX_WAIT_SEC) -> float:
    """Seconds to wait after n failed attempts. Jitter separates workers that met the same failure."""
    return min(longest, FIRST_WAIT_SEC * 2.0 ** min(n, 30)) * random.uniform(0.5, 1.0)


# --- recipe and picture ----------------------------------------------------------------------------------------


def _served_model(recipe: Recipe, options: Options) -> str:
    if options.served_model:
        return options.served_model
    if recipe.model.startswith((".", "/", "~")) or Path(recipe.model).is_dir():
        raise ModelError(
            f"The run's model is the folder {recipe.model}, which the server knows by another name: give it with "
            "--served-model NAME"
        )
    return recipe.model


def _fitting(n_requests: int) -> int:
    """How many of these requests may be in flight at once, since each needs an open connection."""
    if (n := open_files.room_for(n_requests + OTHER_FILES) - OTHER_FILES) < 1:
        raise ModelError(f"This process may open only {open_files.limit()} files, too few to work. {open_files.ADVICE}")
    if n < n_requests:
        log.warning(
            "%d requests are in flight instead of %d, since this process may open %d files: raise that with ulimit -n",
            *(n, n_requests, open_files.limit()),
        )
    return n


def _refuse_unsupported(recipe: Recipe) -> None:
    """Raises ModelError for settings that the API has no field for: the server would not follow the recipe."""
    default = Recipe(recipe.model)
    fields = (
        "revision",
        "adapter",
        "dtype",
        "load_in",
        "trust_remote_code",
        "repetition_penalty",
    )
    for name in fields:
        if (value := getattr(recipe, name)) != getattr(default, name):
            raise ModelError(
                f"The engine openai cannot honour {name} = {value}: the server decides it. "
                f"Enqueue a run that leaves it at {getattr(default, name)}, or use --engine transformers."
            )


def _with_pictures(messages: Sequence[Message], pictures: Sequence[Image]) -> list[Message]:
    """The messages as chat completions take them, with the pictures in their places."""
    left = iter(pictures)

    def part(given: Mapping[str, Any]) -> Mapping[str, Any]:
        if given["type"] == "text":
            return given
        return {"type": "image_url", "image_url": {"url": _data_url(next(left))}}

    return [{**message, "content": [part(given) for given in message["content"]]} for message in messages]


def _data_url(picture: Image) -> str:
    red, green, blue = (band.tobytes() for band in picture.split())
    if red == green == blue:  # like most scans: the same pixels in fewer bytes
        picture = picture.getchannel(0)
    file = BytesIO()
    picture.save(file, "PNG", compress_level=1)  # five times as fast as the default, and 10 % larger
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
