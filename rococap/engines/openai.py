"""Any server that speaks OpenAI's chat interface: vLLM, SGLang, llama.cpp, Ollama, LM Studio. Imports no torch.

Requests are kept in flight, as many as the batch size says. A server that is away is waited for: its pictures stay
where they are, so that no attempt is charged, and one request at a time finds out whether it is back.
"""

import base64
import json
import logging
import math
import queue as fifo
import random
import time
from collections import deque
from collections.abc import Collection, Iterator, Set
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

from PIL.Image import Image

from rococap import images
from rococap.engines import Completion, EngineInfo, Failure, Options, Prepared, Source
from rococap.engines.chat import Answer, Away, Refused, Server
from rococap.errors import ModelError
from rococap.recipe import Recipe

log = logging.getLogger(__name__)

IN_FLIGHT = 16
POLL_SEC = 0.05
"""How often it looks, while requests are in flight, for pictures that have come and rows that were given up."""
FIRST_WAIT_SEC = 0.5
MOST_WAIT_SEC = 60.0
STRIKES = 5
"""So many failures on one picture, while the server answers others, are the picture's."""
TOKEN_PIXELS = 784


class OpenAIEngine:
    def __init__(self, recipe: Recipe, options: Options) -> None:
        self.recipe = recipe
        self.options = options
        self.batch_size = options.batch_size or IN_FLIGHT
        self._server: Server | None = None

    def load(self) -> None:
        for name in ("httpx", "httpcore", "asyncio"):  # one line for every request
            logging.getLogger(name).setLevel(logging.WARNING)
        self._model = _served_model(self.recipe, self.options)
        _refuse_what_it_cannot(self.recipe)
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

    def prepare(self, job_id: int, picture: Image) -> Prepared:
        picture = images.reduced(picture, self.recipe.max_pixels)
        n_tokens = math.ceil(picture.width * picture.height / TOKEN_PIXELS)
        return Prepared(job_id, self._body(_data_url(picture)), n_tokens)

    def _body(self, picture_url: str) -> bytes:
        recipe = self.recipe
        content = [{"type": "image_url", "image_url": {"url": picture_url}}, {"type": "text", "text": recipe.prompt}]
        body: dict[str, object] = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": recipe.max_new_tokens,
            "temperature": 0,
            "stream": False,
        }
        if recipe.do_sample:  # stated, since a server's own defaults apply where they are not
            body["temperature"] = 1.0 if recipe.temperature is None else recipe.temperature
            body["top_p"] = 1.0 if recipe.top_p is None else recipe.top_p
        return json.dumps(body).encode()

    def run(self, source: Source) -> Iterator[Completion]:
        assert self._server is not None, "not loaded"
        flight = _Flight(self._server, source, self.batch_size)
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
    """A picture under way. Times in seconds by the flight's clock, and milliseconds."""

    picture: Prepared
    taken_at: float
    request: Future[Answer] | None = None
    sent_at: float = 0.0
    not_before: float = 0.0
    strikes: int = 0
    failed_after: int | None = None
    """How many answers the server had given when it failed on this picture first."""
    share_ms: float = 0.0
    batch_size: int = 1


class _Flight:
    """The pictures that one `run` holds: `_waiting` to be sent, for the first time or again, and `_asked`."""

    def __init__(self, server: Server, source: Source, limit: int) -> None:
        self._server = server
        self._source = source
        self._limit = limit
        self._waiting: deque[_Row] = deque()
        self._asked: dict[_Row, None] = {}
        self._landed: fifo.SimpleQueue[_Row] = fifo.SimpleQueue()
        self._gate = _Gate(server.url)
        self._n_answers = 0
        self._clock = time.monotonic()
        self._lost: Set[int] = frozenset()

    def take(self) -> bool:
        """Whether there is something to do: waits for it only if nothing is held."""
        held = len(self._waiting) + len(self._asked)
        taken: list[Prepared] = []
        if held < self._limit:
            taken = self._source.take(self._limit - held, 0 if held else None)
        now = time.monotonic()
        self._waiting.extend(_Row(picture, now) for picture in taken)
        if taken:
            self._lost = self._source.step(0)
        return bool(held or taken)

    def send(self) -> None:
        now = self._tick()
        for row in [row for row in self._waiting if row.not_before <= now]:
            if not self._gate.lets(now, self._asked):
                break
            self._waiting.remove(row)
            self._asked[row] = None
            row.sent_at = now
            row.request = self._server.ask(row.picture.inputs)
            row.request.add_done_callback(lambda _, row=row: self._landed.put(row))  # type: ignore[misc]

    def land(self) -> Iterator[Completion]:
        """What the server answered, or becomes of its errors; waits a moment for the first."""
        landed = self._next_landed()
        now = self._tick()
        self._drop()
        n_asked = len(self._asked)
        for row in [row for row in landed if row in self._asked]:
            del self._asked[row]
            if (completion := self._outcome(row, now)) is not None:
                yield completion
        if landed:
            self._lost = self._source.step(n_asked)
        elif not self._asked or now < self._gate.opens_at:  # a server that hangs gets no one's word for it
            self._lost = self._source.step(0)

    def _drop(self) -> None:
        """Rows of jobs that are another's by now."""
        for row in [row for row in (*self._waiting, *self._asked) if row.picture.job_id in self._lost]:
            self._forget(row)

    def cancel(self) -> None:
        for row in (*self._waiting, *self._asked):
            self._forget(row)

    def _forget(self, row: _Row) -> None:
        if row in self._asked:
            del self._asked[row]
            assert row.request is not None
            row.request.cancel()
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
        """Shares the time since the last tick over the requests that were in flight in it."""
        now = time.monotonic()
        n = len(self._asked)
        for row in self._asked:
            row.share_ms += (now - self._clock) * 1000 / n
            row.batch_size = max(row.batch_size, n)
        self._clock = now
        return now

    def _outcome(self, row: _Row, now: float) -> Completion | None:
        """None if it is to be asked again."""
        assert row.request is not None
        try:
            answer = row.request.result()
        except Refused as error:
            self._heard()
            return Completion(row.picture.job_id, failure=Failure("refused_by_server", str(error)))
        except Away as error:
            return self._put_off(row, error, now)
        self._heard()
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

    def _heard(self) -> None:
        self._n_answers += 1
        self._gate.answered()

    def _put_off(self, row: _Row, error: Away, now: float) -> Completion | None:
        """It waits for its next turn, behind the others; or fails, once the server answers others and never this."""
        self._gate.failed(row.sent_at, error, now)
        if error.code:
            if row.failed_after is None:
                row.failed_after = self._n_answers
            row.strikes += row.failed_after < self._n_answers
        if row.strikes == STRIKES:
            return Completion(row.picture.job_id, failure=_given_up(error))
        row.not_before = now + (_backoff(row.strikes) if row.strikes else 0.0)
        self._waiting.append(row)
        return None


def _given_up(error: Away) -> Failure:
    message = f"The server failed on this picture {STRIKES} times while it answered others. The last time: {error}"
    return Failure(error.code, message, transient=error.code != "garbage_answer")


class _Gate:
    """Whether the server may be asked: not for a while after it failed, and then by one request at a time until one
    is answered."""

    def __init__(self, url: str) -> None:
        self.is_away = False
        self._url = url
        self._n_failed = 0
        self._closed_at = self.opens_at = -math.inf

    def lets(self, now: float, asked: Collection[_Row]) -> bool:
        return now >= self.opens_at and not (self.is_away and self.is_probing(asked))

    def is_probing(self, asked: Collection[_Row]) -> bool:
        return any(row.sent_at > self._closed_at for row in asked)

    def failed(self, sent_at: float, error: Away, now: float) -> None:
        if not self.is_away:
            self.is_away = True
            log.warning("%s is away: waiting until it answers again (%s)", self._url, error)
        wait = error.wait
        if sent_at > self._closed_at:  # else it was in flight when another told the same
            self._closed_at = now
            wait = max(wait, _backoff(self._n_failed))
            self._n_failed += 1
        self.opens_at = max(self.opens_at, now + wait)

    def answered(self) -> None:
        self._n_failed = 0
        if self.is_away:
            self.is_away = False
            log.info("%s answers again", self._url)


def _backoff(n: int) -> float:
    """Seconds before the (n+1)th try. Jitter keeps workers apart that met the same failure."""
    return min(MOST_WAIT_SEC, FIRST_WAIT_SEC * 2.0 ** min(n, 30)) * random.uniform(0.5, 1.0)


# --- recipe and picture ----------------------------------------------------------------------------------------


def _served_model(recipe: Recipe, options: Options) -> str:
    if options.served_model:
        return options.served_model
    if recipe.model.startswith((".", "/", "~")) or Path(recipe.model).is_dir():
        raise ModelError(
            f"The run's model is the folder {recipe.model}, which a server knows by another name: --served-model NAME"
        )
    return recipe.model


def _refuse_what_it_cannot(recipe: Recipe) -> None:
    """The interface has no field for it, and a caption made otherwise is not the recipe's."""
    only = Recipe(recipe.model)
    fields = (
        "revision",
        "adapter",
        "dtype",
        "load_in",
        "trust_remote_code",
        "num_beams",
        "repetition_penalty",
        "top_k",
    )
    for name in fields:
        if (value := getattr(recipe, name)) != getattr(only, name):
            raise ModelError(
                f"The engine openai cannot honour {name} = {value}: the server decides it. "
                f"Enqueue a run that leaves it at {getattr(only, name)}, or use --engine transformers."
            )


def _data_url(picture: Image) -> str:
    red, green, blue = (band.tobytes() for band in picture.split())
    if red == green == blue:  # as most scans are: the same pixels in fewer bytes
        picture = picture.getchannel(0)
    file = BytesIO()
    picture.save(file, "PNG", compress_level=1)  # five times as fast as the default, a tenth larger
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
