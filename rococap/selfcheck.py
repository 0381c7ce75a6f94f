"""What a worker makes sure of before its first claim: that its engine sees pictures, alone and in batches.

A wrong template, wrong padding, weights that overflow or a server without its image part caption fluently, and wrong.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Self

from rococap.datasets import Place
from rococap.engines import Completion, Engine, Prepared
from rococap.recipe import Recipe
from rococap.trial import from_memory, prepare

BATCH = 4
MOST = 12
"""Pictures that are captioned at most, before they are all said to look the same to the model."""
LIKE = 0.5
"""How much of a caption must stay in a batch, where rounding may lead it elsewhere: difflib's ratio."""


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """`way` is how the engine was told to work; `reason` says why it failed, or, if it passed, what it could not
    find out.
    """

    run: str
    way: str
    passed: bool
    pictures: int
    equal_in_batch: int
    compared: int
    reason: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


def under_way(run: str, way: str) -> SelfCheck:
    """What stands there until the outcome is known, and for ever if a picture kills the worker meanwhile."""
    return SelfCheck(run, way, False, 0, 0, 0, "under way")


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
    prepared = prepare(engine, root, places[:BATCH]).prepared
    looked_at = len(prepared)

    def captions(pictures: Sequence[Prepared]) -> list[Completion]:
        return from_memory(engine, pictures, is_over=is_over)[1]

    def ended(passed: bool, reason: str, equal: int = 0, compared: int = 0) -> SelfCheck:
        return SelfCheck(run, way, passed, looked_at, equal, compared, reason)

    together = captions(prepared)
    failed = [one.failure for one in together if one.failure is not None]
    if overflowed := [failure for failure in failed if failure.code == "non_finite"]:
        return ended(False, overflowed[0].message)
    texts = {one.job_id: one.text for one in together if one.failure is None}
    if len(texts) < 2:
        return ended(True, f"too few pictures to compare. {failed[0].message if failed else ''}".rstrip())
    if len(set(texts.values())) == 1:
        others = prepare(engine, root, places[BATCH:MOST]).prepared  # numbered from 1 again
        looked_at += len(others)
        more = [one for one in captions(others) if one.failure is None]
        if len({*texts.values(), *(one.text for one in more)}) == 1:
            return ended(False, _one_for_all(next(iter(texts.values())), len(texts) + len(more)))
    if recipe.do_sample:
        return ended(True, "batch and single were not compared, since the recipe samples")
    return _compared(ended, engine, texts, _shortest_and_longest(prepared, texts), captions)


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
