"""What a worker makes sure of before its first claim: that its engine sees pictures, alone and in batches.

A wrong template, wrong padding, weights that overflow or a server without its image part caption fluently, and wrong.
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
from rococap.engines import Completion, Engine, Failure, Prepared
from rococap.errors import PictureError, ServerRefuses
from rococap.queue import Run
from rococap.recipe import Recipe
from rococap.worker import dry_run
from rococap.worker.dry_run import Read, from_memory, prepare

BATCH = 4
OTHERS = 8
"""Pictures that are tried besides, from all over the run, before the model is blamed for what it said of the first."""
MOST = BATCH + OTHERS
FEW = 4
"""Fewer pictures than that may be of one scene, or damaged, by chance."""
UNPROCESSABLE = "unprocessable"
"""The code of a picture that the engine did not take, as it was prepared."""
LIKE = 0.5
"""How much of a caption must stay in a batch, where rounding may lead it elsewhere: difflib's ratio."""


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """`way` is how the engine was told to work; `reason` says why it failed, or what it could not find out.

    One that is `inconclusive` has neither passed nor failed: the worker goes on, and the next one looks again. Of one
    that is under way, `process_started` says when its process began, in seconds since the machine was booted.
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
                del stated[name]  # as in the first releases
        return json.dumps(stated, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


UNDER_WAY = "under way"


def under_way(run: str, way: str) -> SelfCheck:
    """What stands there until the outcome is known, and for ever if a picture kills the worker meanwhile."""
    return SelfCheck(run, way, False, 0, 0, 0, UNDER_WAY, process_started=_started(os.getpid()))


def was_survived(told: SelfCheck, pid: int) -> bool:
    """Whether the process that told it has an outcome, or may still come to one.

    A process of the same id may be another, begun later: in a container the first one is always 1.
    """
    if told.reason != UNDER_WAY:
        return True
    try:
        return told.process_started in (None, _started(pid))
    except psutil.NoSuchProcess:
        return False


def _started(pid: int) -> float:
    """To the hundredth of a second, as the kernel counts. Since 1970 it would change when the clock is set."""
    booted: float = psutil.boot_time()
    created: float = psutil.Process(pid).create_time()
    return round(created - booted, 2)


def pictures(conn: Connection, run: Run, splits: Sequence[str]) -> list[Place]:
    """What to look at: the first pictures of the run, then others from all over it."""
    present = [split for split in splits if dry_run.places(conn, run, split, 1)]
    if not present:
        return []
    n = math.ceil(OTHERS / len(present))
    others = [dry_run.spread(conn, run, split, n, 0 if at else BATCH) for at, split in enumerate(present)]
    return [*dry_run.places(conn, run, present[0], BATCH), *chain.from_iterable(others)][:MOST]


@dataclass(frozen=True, slots=True)
class Look:
    """What became of some pictures that the engine was given together."""

    read: Read
    texts: dict[int, str]
    failures: list[Failure]

    @property
    def reasons(self) -> list[tuple[str, str]]:
        """Why pictures have no caption and never will: code and message."""
        refused = [(error.code, str(error)) for error in self.read.errors if not error.transient]
        return refused + [(failure.code, failure.message) for failure in self.failures if not failure.transient]


def check(
    engine: Engine,
    recipe: Recipe,
    run: str,
    way: str,
    root: Path,
    places: Sequence[Place],
    is_over: Callable[[], bool] = lambda: False,
) -> SelfCheck:
    """Captions a handful of the run's own pictures, together and two of them alone; ends early once `is_over`."""

    def captions(pictures: Sequence[Prepared]) -> list[Completion]:
        return from_memory(engine, pictures, is_over=is_over)[1]

    def look(places: Sequence[Place]) -> Look:
        read = prepare(engine, root, places, recipe.frame)
        try:
            done = captions(read.prepared)
        except ServerRefuses as error:  # others may be captioned
            refusal = Failure("refused_by_server", error.reason)
            return Look(read, {}, [refusal] * len(read.prepared))
        texts = {one.job_id: one.text for one in done if one.failure is None}
        return Look(read, texts, [one.failure for one in done if one.failure is not None])

    looks = [look(places[:BATCH])]
    if len(_said(looks)) < 2 and not _overflowed(looks) and places[BATCH:MOST]:
        looks.append(look(places[BATCH:MOST]))

    def ended(passed: bool, reason: str, equal: int = 0, compared: int = 0, *, inconclusive: bool = False) -> SelfCheck:
        looked_at = sum(len(one.read.prepared) for one in looks)
        return SelfCheck(run, way, passed, looked_at, equal, compared, reason, inconclusive)

    if overflowed := _overflowed(looks):
        return ended(False, overflowed[0].message)
    largest = max(looks, key=lambda one: len(one.texts))
    sees = len(_said(looks)) > 1
    if not sees and _n_captioned(looks) >= FEW:
        # They may all be of one scene.
        sees = len({*_said(looks), *_said_of_drawings(engine, largest.read.size, captions)}) > 1
    if not sees and (reason := _why_blind(looks)):
        return ended(False, reason)
    if not sees or len(largest.texts) < 2:
        return ended(False, _too_few(looks), inconclusive=True)
    if recipe.do_sample:
        return ended(True, "batch and single were not compared, since the recipe samples")
    return _compared(
        ended, engine, largest.texts, _shortest_and_longest(largest.read.prepared, largest.texts), captions
    )


def _said_of_drawings(
    engine: Engine, size: tuple[int, int], captions: Callable[[Sequence[Prepared]], list[Completion]]
) -> set[str]:
    """What is said of drawings that nobody takes for one another. They have the size of a picture that was captioned:
    a model that is blind still counts its tokens.
    """
    try:
        prepared = [engine.prepare(number, drawing) for number, drawing in enumerate(_drawings(*size))]
    except PictureError:
        return set()
    return {one.text for one in captions(prepared) if one.failure is None}


def _drawings(width: int, height: int) -> Iterator[Image]:
    """A disc, a ramp, a chequerboard and noise."""
    rows, columns = np.ogrid[:height, :width]
    disc = (rows - height / 2) ** 2 + (columns - width / 2) ** 2 < (min(width, height) / 3) ** 2
    ramp = np.broadcast_to(columns / max(1, width - 1), (height, width))
    squares = (rows * 8 // height + columns * 8 // width) % 2
    noise = np.random.default_rng(0).random((height, width))
    for shades in (disc, 1 - ramp, squares, noise):
        yield fromarray(np.rint(255 * shades).astype(np.uint8)).convert("RGB")


def _said(looks: Sequence[Look]) -> set[str]:
    return {text for look in looks for text in look.texts.values()}


def _overflowed(looks: Sequence[Look]) -> list[Failure]:
    return [failure for look in looks for failure in look.failures if failure.code == "non_finite"]


def _why_blind(looks: Sequence[Look]) -> str:
    """Why the model does not see pictures; empty if it may."""
    reasons = [reason for look in looks for reason in look.reasons]
    said, n = _said(looks), _n_captioned(looks)
    if len(said) == 1 and n >= FEW:
        return _one_for_all(next(iter(said)), sum(len(look.texts) for look in looks))
    n_tried = sum(len(look.read.errors) + len(look.read.prepared) for look in looks)
    is_engines = any(look.failures for look in looks) or any(code == UNPROCESSABLE for code, _ in reasons)
    # A few that cannot be read are the data set's fault, and fail as the worker comes to them.
    if not said and len(reasons) == n_tried > 0 and (is_engines or n_tried >= FEW):
        return f"none of {n_tried} pictures was captioned. The first: {reasons[0][1]}"
    return ""


def _n_captioned(looks: Sequence[Look]) -> int:
    """Different pictures: what is said of copies of one proves nothing."""
    return len({look.read.digests[id] for look in looks for id in look.texts})


def _too_few(looks: Sequence[Look]) -> str:
    n, said = _n_captioned(looks), _said(looks)
    if len(said) == 1 and n > 1:
        return f"too few pictures to compare: {n} were captioned, all {_quoted(next(iter(said)))}."
    reasons = [reason for look in looks for reason in look.reasons]
    return f"too few pictures to compare. {reasons[0][1] if reasons else ''}".rstrip()


def _shortest_and_longest(prepared: Sequence[Prepared], texts: dict[int, str]) -> list[Prepared]:
    """Where padding would tell."""
    ordered = sorted((one for one in prepared if one.job_id in texts), key=lambda one: one.n_tokens)
    return [ordered[0], ordered[-1]]


def _compared(
    ended: Callable[[bool, str, int, int], SelfCheck],
    engine: Engine,
    texts: dict[int, str],
    chosen: Sequence[Prepared],
    captions: Callable[[Sequence[Prepared]], list[Completion]],
) -> SelfCheck:
    alone = {one.job_id: one.text for picture in chosen for one in captions([picture]) if one.failure is None}
    equal = sum(text == texts[id] for id, text in alone.items())
    least = 1.0 if engine.info.dtype == "float32" else LIKE
    for id, text in alone.items():
        if SequenceMatcher(None, text, texts[id], autojunk=False).ratio() < least:
            return ended(False, _another_in_batch(text, texts[id], engine.info.name), equal, len(alone))
    return ended(True, "", equal, len(alone))


def _one_for_all(text: str, n: int) -> str:
    return (
        f"{n} pictures were all captioned {_quoted(text)}: the model does not look at them. Check that --model names a "
        "vision-language model with its own processor and chat template."
    )


def _another_in_batch(alone: str, together: str, engine: str) -> str:
    static = ", or with --decode static" if engine == "transformers" else ""
    return (
        f"a picture is captioned {_quoted(alone)} alone and {_quoted(together)} in a batch. "
        f"Start it with --batch-size 1{static}."
    )


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:59] + "…")
