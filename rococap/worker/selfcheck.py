"""The self-check before a worker's first claim: does the engine see pictures, alone and in batches?

With a wrong chat template, wrong padding, overflowing weights or a server that lost its vision part, an engine produces
fluent but wrong captions.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from itertools import chain
from pathlib import Path
from typing import Self

import numpy as np
import psutil
from PIL.Image import Image, fromarray
from sqlalchemy import Connection

from rococap.data import Place
from rococap.engines import Completion, Engine, Failure, Prepared, Request
from rococap.errors import PictureError, ServerRefuses
from rococap.queue import Run
from rococap.recipe import Recipe
from rococap.worker import dry_run
from rococap.worker.dry_run import Read, from_memory, prepare

BATCH = 4
N_OTHERS = 8
"""Further pictures, from all over the run, that are tried before the model is blamed for its captions of the first."""
MAX_PICTURES = BATCH + N_OTHERS
MIN_PICTURES = 4
"""Fewer pictures prove nothing: they may all be damaged, or of the same scene, by chance."""
UNPROCESSABLE = "unprocessable"
"""The code of a picture that the engine refused while preparing it."""
MIN_SIMILARITY = 0.5
"""difflib's ratio between the captions of a picture alone and in a batch, where rounding may change how it goes on."""


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """The outcome of a self-check, as the database stores it.

    `way` is `Settings.engine_mode`. `pictures` counts the pictures tried; `compared` those captioned both alone and in
    a batch, of which `equal_in_batch` got the same caption. `reason` explains why the check failed, or what it could
    not determine. An `inconclusive` check neither passed nor failed: the worker continues, and the next one repeats it.
    While a check is under way, `process_started` is when its process started, in seconds since the machine booted.
    """

    run: str
    way: str
    passed: bool
    pictures: int
    equal_in_batch: int
    compared: int
    reason: str = ""
    inconclusive: bool = False
    process_started: float | None = None

    def to_json(self) -> str:
        stated = asdict(self)
        for name in ("inconclusive", "process_started"):
            if not stated[name]:
                del stated[name]  # the first releases do not know these fields
        return json.dumps(stated, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


UNDER_WAY = "under way"


def under_way(run: str, engine_mode: str) -> SelfCheck:
    """What is recorded until the outcome is known; it stays if a picture kills the worker before that."""
    return SelfCheck(run, engine_mode, False, 0, 0, 0, UNDER_WAY, process_started=_started(os.getpid()))


def was_survived(check: SelfCheck, pid: int) -> bool:
    """Whether a recorded self-check has an outcome, or its process, `pid`, is still running.

    The start time is compared too, because ids are reused: in a container, the first process always has the id 1.
    """
    if check.reason != UNDER_WAY:
        return True
    try:
        return check.process_started in (None, _started(pid))
    except psutil.NoSuchProcess:
        return False


def _started(pid: int) -> float:
    """Seconds from boot to the start of a process, to the kernel's hundredth of a second. Counted from 1970, it would
    change when the clock is set.
    """
    booted: float = psutil.boot_time()
    created: float = psutil.Process(pid).create_time()
    return round(created - booted, 2)


def pictures(conn: Connection, run: Run, splits: Sequence[str]) -> list[Place]:
    """The pictures to check: the first ones of the run, followed by others from all over it."""
    present = [split for split in splits if dry_run.places(conn, run, split, 1)]
    if not present:
        return []
    n = math.ceil(N_OTHERS / len(present))
    others = [dry_run.spread(conn, run, split, n, 0 if number else BATCH) for number, split in enumerate(present)]
    return [*dry_run.places(conn, run, present[0], BATCH), *chain.from_iterable(others)][:MAX_PICTURES]


@dataclass(frozen=True, slots=True)
class Look:
    """The result of captioning some pictures together. `texts` are the captions by job id."""

    read: Read
    texts: dict[int, str]
    failures: list[Failure]

    @property
    def reasons(self) -> list[tuple[str, str]]:
        """Code and message of every permanent failure."""
        unread = [(error.code, str(error)) for error in self.read.errors if not error.transient]
        return unread + [(failure.code, failure.message) for failure in self.failures if not failure.transient]


def check(
    engine: Engine,
    recipe: Recipe,
    run: str,
    engine_mode: str,
    root: Path,
    places: Sequence[Place],
    is_over: Callable[[], bool] = lambda: False,
) -> SelfCheck:
    """Captions a few of the run's own pictures together, and two of them alone; ends early once `is_over`.

    `run` and `engine_mode` are recorded in the outcome. Whatever ends the engine is raised.
    """

    def captions(pictures: Sequence[Prepared]) -> list[Completion]:
        return from_memory(engine, pictures, is_over=is_over)[1]

    def look(places: Sequence[Place]) -> Look:
        read = prepare(engine, root, places, recipe.frame)
        try:
            done = captions(read.prepared)
        except ServerRefuses as error:  # it may accept other pictures
            refusal = Failure("refused_by_server", error.reason)
            return Look(read, {}, [refusal] * len(read.prepared))
        texts = {completion.job_id: completion.text for completion in done if completion.failure is None}
        return Look(read, texts, [completion.failure for completion in done if completion.failure is not None])

    looks = [look(places[:BATCH])]
    if len(_distinct(looks)) < 2 and not _overflowed(looks) and places[BATCH:MAX_PICTURES]:
        looks.append(look(places[BATCH:MAX_PICTURES]))

    def ended(passed: bool, reason: str, equal: int = 0, compared: int = 0, *, inconclusive: bool = False) -> SelfCheck:
        n_tried = sum(len(tried.read.prepared) for tried in looks)
        return SelfCheck(run, engine_mode, passed, n_tried, equal, compared, reason, inconclusive)

    if overflowed := _overflowed(looks):
        return ended(False, overflowed[0].message)
    largest = max(looks, key=lambda tried: len(tried.texts))
    sees = len(_distinct(looks)) > 1
    if not sees and _n_captioned(looks) >= MIN_PICTURES:
        # The run's pictures may all be of the same scene.
        sees = len({*_distinct(looks), *_captions_of_drawings(engine, largest.read.size, captions)}) > 1
    if not sees and (reason := _why_blind(looks)):
        return ended(False, reason)
    if not sees or len(largest.texts) < 2:
        return ended(False, _too_few(looks), inconclusive=True)
    return _compared(
        ended, engine, largest.texts, _shortest_and_longest(largest.read.prepared, largest.texts), captions
    )


def _captions_of_drawings(
    engine: Engine, size: tuple[int, int], captions: Callable[[Sequence[Prepared]], list[Completion]]
) -> set[str]:
    """The distinct captions of unmistakably different drawings. They have the size of a captioned picture, because even
    a blind model may respond to the number of visual tokens.
    """
    try:
        prepared = [engine.prepare(number, Request([drawing])) for number, drawing in enumerate(_drawings(*size))]
    except PictureError:
        return set()
    return {completion.text for completion in captions(prepared) if completion.failure is None}


def _drawings(width: int, height: int) -> Iterator[Image]:
    """A disc, a ramp, a chequerboard and noise, of so many pixels."""
    rows, columns = np.ogrid[:height, :width]
    disc = (rows - height / 2) ** 2 + (columns - width / 2) ** 2 < (min(width, height) / 3) ** 2
    ramp = np.broadcast_to(columns / max(1, width - 1), (height, width))
    squares = (rows * 8 // height + columns * 8 // width) % 2
    noise = np.random.default_rng(0).random((height, width))
    for shades in (disc, 1 - ramp, squares, noise):
        yield fromarray(np.rint(255 * shades).astype(np.uint8)).convert("RGB")


def _distinct(looks: Sequence[Look]) -> set[str]:
    """The distinct captions."""
    return {text for look in looks for text in look.texts.values()}


def _overflowed(looks: Sequence[Look]) -> list[Failure]:
    return [failure for look in looks for failure in look.failures if failure.code == "non_finite"]


def _why_blind(looks: Sequence[Look]) -> str:
    """The reason to conclude that the model does not see pictures; empty if it may."""
    reasons = [reason for look in looks for reason in look.reasons]
    texts = _distinct(looks)
    if len(texts) == 1 and _n_captioned(looks) >= MIN_PICTURES:
        return _same_for_all(next(iter(texts)), sum(len(look.texts) for look in looks))
    n_tried = sum(len(look.read.errors) + len(look.read.prepared) for look in looks)
    is_engines = any(look.failures for look in looks) or any(code == UNPROCESSABLE for code, _ in reasons)
    # A few unreadable pictures are the data set's fault, and fail one by one when the worker gets to them.
    if not texts and len(reasons) == n_tried > 0 and (is_engines or n_tried >= MIN_PICTURES):
        return f"none of {n_tried} pictures was captioned. The first: {reasons[0][1]}"
    return ""


def _n_captioned(looks: Sequence[Look]) -> int:
    """How many different pictures were captioned: equal captions of copies prove nothing."""
    return len({look.read.digests[id] for look in looks for id in look.texts})


def _too_few(looks: Sequence[Look]) -> str:
    n, texts = _n_captioned(looks), _distinct(looks)
    if len(texts) == 1 and n > 1:
        return f"too few pictures to compare: {n} were captioned, all {_quoted(next(iter(texts)))}."
    reasons = [reason for look in looks for reason in look.reasons]
    return f"too few pictures to compare. {reasons[0][1] if reasons else ''}".rstrip()


def _shortest_and_longest(prepared: Sequence[Prepared], texts: dict[int, str]) -> list[Prepared]:
    """The captioned pictures with the fewest and the most tokens, in which wrong padding has the largest effect."""
    ordered = sorted((picture for picture in prepared if picture.job_id in texts), key=lambda picture: picture.n_tokens)
    return [ordered[0], ordered[-1]]


def _compared(
    ended: Callable[[bool, str, int, int], SelfCheck],
    engine: Engine,
    texts: dict[int, str],
    chosen: Sequence[Prepared],
    captions: Callable[[Sequence[Prepared]], list[Completion]],
) -> SelfCheck:
    """Captions the `chosen` pictures alone and compares the texts with those from the batch."""
    alone = {c.job_id: c.text for picture in chosen for c in captions([picture]) if c.failure is None}
    equal = sum(text == texts[id] for id, text in alone.items())
    required = 1.0 if engine.info.dtype == "float32" else MIN_SIMILARITY
    for id, text in alone.items():
        if SequenceMatcher(None, text, texts[id], autojunk=False).ratio() < required:
            return ended(False, _different_in_batch(text, texts[id], engine.info.name), equal, len(alone))
    return ended(True, "", equal, len(alone))


def _same_for_all(text: str, n: int) -> str:
    return (
        f"{n} pictures were all captioned {_quoted(text)}: the model does not look at them. Check that --model names a "
        "vision-language model with its own processor and chat template."
    )


def _different_in_batch(alone: str, together: str, engine: str) -> str:
    static = ", or with --decode static" if engine == "transformers" else ""
    return (
        f"a picture is captioned {_quoted(alone)} alone and {_quoted(together)} in a batch. "
        f"Start the worker with --batch-size 1{static}."
    )


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:59] + "…")
