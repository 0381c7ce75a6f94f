"""Reads facts from captions, and compares those of two: modality, plane, region, side, negation, measurement, contrast
and sequence.

Text in, facts out: knows nothing of pictures, models or the database. The words are in facts.toml, concepts.toml,
sides.py, negation.py, measurements.py and language.py.
"""

import hashlib
import re
import tomllib
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from rococap.results.formats import fold
from rococap.scores import concepts, lexicon
from rococap.scores.facts import measurements, negation, sides
from rococap.scores.facts.language import is_english
from rococap.scores.facts.measurements import Measurement
from rococap.scores.facts.sides import LEFT, RIGHT, Side
from rococap.scores.lexicon import Lexicon

KINDS: Final = ("modality", "plane", "region", "side", "negation", "measurement", "contrast", "sequence")
NAMED: Final = ("modality", "plane", "region", "contrast", "sequence")
"""Kinds whose facts are names from facts.toml; those of modality are also from concepts.toml."""
_FOLDER: Final = Path(__file__).parent
_SOURCE: Final = (_FOLDER / "facts.toml").read_bytes()
_RULES: Final = (*sorted(_FOLDER.glob("*.py")), Path(lexicon.__file__))
DIGEST: Final = hashlib.sha256(
    b"".join([_SOURCE, concepts.DIGEST.encode(), *(file.read_bytes() for file in _RULES)])
).hexdigest()[:12]
"""Identifies the version of the words and rules: any change makes stored fact scores stale."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a caption states. `named` maps each kind in NAMED to the names that the text has words for."""

    named: Mapping[str, frozenset[str]]
    sides: tuple[Side, ...] = ()
    denied: frozenset[str] = frozenset()
    affirmed: frozenset[str] = frozenset()
    measurements: tuple[Measurement, ...] = ()


@dataclass(frozen=True, slots=True)
class Agreement:
    """Facts of one kind in a caption and its reference, each counted once.

    `agreeing` are in both, `invented` only in the caption, `missed` only in the reference. `opposite` are pairs of what
    the reference states and what the caption states in its place, such as ("left lung", "right lung").
    """

    agreeing: Sequence[str] = ()
    invented: Sequence[str] = ()
    missed: Sequence[str] = ()
    opposite: Sequence[tuple[str, str]] = ()

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """How many are agreeing, invented, missed and opposite."""
        return len(self.agreeing), len(self.invented), len(self.missed), len(self.opposite)


@lru_cache(maxsize=4_096)
def facts_of(text: str) -> Facts | None:
    """The facts of a caption; None if it is not in English. A text without words has no facts."""
    if not is_english(text):
        return None
    folded = fold(text)
    named = {kind: frozenset(one.name for one in _lexicon(kind).finditer(folded)) for kind in NAMED}
    named["modality"] |= _modalities(folded)
    if not named["modality"] and named["sequence"] - {"cine"}:  # X-rays have cine images, too
        named["modality"] = frozenset({"MRI"})
    if _WITH_AND_WITHOUT.search(folded):
        named["contrast"] |= {"contrast", "no contrast"}
    apart = negation.apart(folded)
    denied, affirmed = negation.split(apart, _lexicon("finding").finditer(apart))
    return Facts(named, tuple(sides.find(folded)), denied, affirmed, tuple(measurements.find(folded)))


def agreements(caption: Facts, reference: Facts) -> dict[str, Agreement]:
    """How the facts of a caption agree with those of its reference: kind -> Agreement, for all KINDS.

    - A name of any kind in NAMED that only one of the texts has is opposite to one that only the other has, since it
      stands in its place: one CT and one MRI are one opposite pair.
    - A finding that one text denies and the other names without denying it is opposite.
    - Sides agree or are opposite where the same words follow them, see `_sides`.
    - Measurements of one dimension agree if they may be roundings of one value; those that are left are opposite.
    """
    return {
        **{kind: _named(caption.named[kind], reference.named[kind]) for kind in NAMED},
        "side": _sides(caption.sides, reference.sides),
        "negation": _negations(caption, reference),
        "measurement": _measurements(caption.measurements, reference.measurements),
    }


def f1(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """F1 from counts of agreeing, invented, missed and opposite facts, shape (..., 4) -> (...); NaN without facts.

    An opposite fact is both invented and missed, so that precision is agreeing / (agreeing + invented + opposite), and
    recall is agreeing / (agreeing + missed + opposite).
    """
    agreeing, invented, missed, opposite = np.moveaxis(counts, -1, 0)
    whole = 2 * agreeing + invented + missed + 2 * opposite
    scores: npt.NDArray[np.float64] = np.divide(
        2 * agreeing, whole, out=np.full_like(whole, np.nan, dtype=np.float64), where=whole > 0
    )
    return scores


# --- Comparing -------------------------------------------------------------------------------------------------


def _named(caption: Collection[str], reference: Collection[str]) -> Agreement:
    ours, theirs = set(caption), set(reference)
    return _paired(sorted(ours & theirs), sorted(ours - theirs), sorted(theirs - ours))


def _paired(agreeing: Sequence[str], invented: Sequence[str], missed: Sequence[str]) -> Agreement:
    """Pairs up what only the caption has and what only the reference has as opposites."""
    n = min(len(invented), len(missed))
    return Agreement(agreeing, invented[n:], missed[n:], tuple(zip(missed[:n], invented[:n], strict=True)))


def _negations(caption: Facts, reference: Facts) -> Agreement:
    denied = caption.denied & reference.denied
    to_affirmed = (reference.denied - denied) & caption.affirmed
    to_denied = (caption.denied - denied) & reference.affirmed
    return Agreement(
        [f"no {name}" for name in sorted(denied)],
        [f"no {name}" for name in sorted(caption.denied - denied - to_denied)],
        [f"no {name}" for name in sorted(reference.denied - denied - to_affirmed)],
        [
            *((f"no {name}", name) for name in sorted(to_affirmed)),
            *((name, f"no {name}") for name in sorted(to_denied)),
        ],
    )


def _measurements(caption: Sequence[Measurement], reference: Sequence[Measurement]) -> Agreement:
    """Matches measurements of each dimension in the order of their values, so that long texts take no longer a word."""
    parts: list[Agreement] = []
    for dimension in sorted({one.dimension for one in (*caption, *reference)}):
        ours, theirs = (
            sorted({one for one in several if one.dimension == dimension}, key=lambda one: (-one.value, one.text))
            for several in (caption, reference)
        )
        agreeing: list[str] = []
        invented: list[str] = []
        missed: list[str] = []
        while ours and theirs:
            if ours[-1].equals(theirs[-1]):
                ours.pop()
                agreeing.append(str(theirs.pop()))
            elif ours[-1].value < theirs[-1].value:
                invented.append(str(ours.pop()))
            else:
                missed.append(str(theirs.pop()))
        parts.append(_paired(agreeing, [*invented, *map(str, ours)], [*missed, *map(str, theirs)]))
    return Agreement(
        [one for part in parts for one in part.agreeing],
        [one for part in parts for one in part.invented],
        [one for part in parts for one in part.missed],
        [one for part in parts for one in part.opposite],
    )


def _sides(caption: Sequence[Side], reference: Sequence[Side]) -> Agreement:
    """Compares sides by what they are the sides of, as far as both texts say it in the same words.

    First by the two words that follow each side, then by the first of them: the same side agrees, the other one is
    opposite. Where both texts name both sides of one thing, the word before decides: "nodule in the left lung, effusion
    in the right lung". Of the sides that are left, each counts once: one that both texts have left agrees, one that the
    other text has named already says nothing new, left in place of right is opposite, and any other is invented or
    missed.
    """
    agreeing: list[str] = []
    opposite: list[tuple[str, str]] = []
    ours, theirs = set(caption), set(reference)
    contested = _of_both_sides(ours) & _of_both_sides(theirs)
    for key_of in (
        lambda one: (one.before, *one.words) if one.words in contested else (),
        lambda one: one.words,
        lambda one: one.words[:1],
    ):
        mine, other = _by_key(ours, key_of), _by_key(theirs, key_of)
        for key in sorted(mine.keys() & other.keys()):
            for side in (LEFT, RIGHT):
                if side in mine[key] and side in other[key]:
                    agreeing.append(str(min(other[key][side], key=str)))
                    ours -= mine[key].pop(side)
                    theirs -= other[key].pop(side)
            for side, instead in zip(sorted(other[key]), sorted(mine[key]), strict=False):
                opposite.append((str(min(other[key][side], key=str)), str(min(mine[key][instead], key=str))))
                ours -= mine[key].pop(instead)
                theirs -= other[key].pop(side)
    mine_left, theirs_left = {one.side for one in ours}, {one.side for one in theirs}
    rest = _paired(
        [*agreeing, *sorted(mine_left & theirs_left)],
        sorted(mine_left - {one.side for one in reference}),
        sorted(theirs_left - {one.side for one in caption}),
    )
    return Agreement(rest.agreeing, rest.invented, rest.missed, (*opposite, *rest.opposite))


def _of_both_sides(found: Collection[Side]) -> set[tuple[str, ...]]:
    return {one.words for one in found if one.side == LEFT} & {one.words for one in found if one.side == RIGHT}


def _by_key(
    found: Collection[Side], key_of: Callable[[Side], tuple[str, ...]]
) -> dict[tuple[str, ...], dict[str, set[Side]]]:
    """Key -> side -> the mentions with this key; those whose key is empty are left out."""
    grouped: dict[tuple[str, ...], dict[str, set[Side]]] = defaultdict(lambda: defaultdict(set))
    for one in found:
        if key := key_of(one):
            grouped[key][one.side].add(one)
    return grouped


# --- Reading -----------------------------------------------------------------------------------------------


def _modalities(folded: str) -> frozenset[str]:
    """The modalities by the terms of concepts.toml. What directly follows another belongs to it: "computed tomography
    angiography". How something looks, such as "hyperintense", counts only if the text has no other word for a modality;
    PET/CT is not PET as well.
    """
    every = list(concepts.modalities(folded))
    follows = [folded[before.end : one.start] in ("", " ", "-") for before, one in pairwise(every)]
    found = [one for one, is_part in zip(every, [False, *follows], strict=False) if not is_part]
    said = {one.name for one in found if not _LOOK.match(folded, one.start)} or {one.name for one in found}
    return frozenset(said - {"PET"} if "PET/CT" in said else said)


_WITH_AND_WITHOUT: Final = re.compile(
    r"\b(?:with(?: and |/)without|without(?: and |/)with|pre[- ]*(?:and|&|/)[- ]*post|before and after)[- ]?"
    r"(?:\w+ ){0,3}(?:contrast|gadolinium)",
    re.IGNORECASE,
)
"""Names both, in words of which the lexicon sees only one: "pre- and postcontrast"."""
_LOOK: Final = re.compile(r"(?:hyper|hypo|iso|an)[-‐‑–— ]?(?:inten|den|echo)|echogen", re.IGNORECASE)


@cache
def _lexicon(kind: str) -> Lexicon:
    tables = tomllib.loads(_SOURCE.decode())
    named, traps = (
        [lexicon.entry(table, table.get("name", "")) for table in tables[group] if table["kind"] == kind]
        for group in ("fact", "trap")
    )
    return Lexicon(named, traps)
