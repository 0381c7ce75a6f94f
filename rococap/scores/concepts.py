"""Finds the concepts that a caption names: the manually curated concepts of ROCOv2, by the terms in concepts.toml.

Text in, UMLS CUIs out: knows nothing of pictures, models or the database.
"""

import hashlib
import tomllib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Final

from rococap.results.formats import fold
from rococap.scores import lexicon
from rococap.scores.lexicon import Entry, Found, Lexicon

_SOURCE: Final = (Path(__file__).parent / "concepts.toml").read_bytes()
_XRAY: Final = "C1306645"

DIGEST: Final = hashlib.sha256(_SOURCE).hexdigest()[:12]
"""Identifies the version of concepts.toml: any change to the file makes stored concept scores stale."""


@dataclass(frozen=True, slots=True)
class Concept:
    """A UMLS concept and the words that name it: terms match in any case, abbreviations only as written."""

    cui: str
    name: str
    kind: str
    terms: tuple[str, ...]
    abbreviations: tuple[str, ...] = ()


def found(text: str) -> frozenset[str]:
    """The CUIs that a text names: the first modality and, for an X-ray, the first body region and the first direction.

    In ROCOv2 a picture has at most one of each, and only X-rays have a body region and a direction.
    """
    folded = fold(text)
    named = _first("modality", folded)
    if _XRAY in named:
        named |= _first("region", folded) | _first("direction", folded)
    return named


def modalities(folded: str) -> Iterator[Found]:
    """Every modality that a text names, as its name in concepts.toml. White space in the text must be folded."""
    for one in _lexicon("modality").finditer(folded):
        yield Found(_NAMES[one.name], one.start, one.end)


def modality(cuis: Collection[str]) -> str:
    """The name of the modality among the CUIs, or "unknown"; of several, the one that comes first in concepts.toml."""
    return next((concept.name for concept in CONCEPTS if concept.kind == "modality" and concept.cui in cuis), "unknown")


def parse(cui: str) -> frozenset[str]:
    """The CUIs in a value of the `cui` column, which separates them by ";"."""
    return frozenset(cui.replace(";", " ").split())


def curated(cuis: Collection[str]) -> frozenset[str]:
    """Those of a picture's CUIs that `found` can return: the modality and, for an X-ray, body region and direction.

    All others were extracted from the original caption by a program, or are of a kind that ROCOv2 curates for X-rays
    only.
    """
    kinds = ("modality", "region", "direction") if _XRAY in cuis else ("modality",)
    return frozenset(one.cui for one in CONCEPTS if one.kind in kinds and one.cui in cuis)


def f1(found: Collection[str], reference: Collection[str]) -> float:
    """F1 of two sets of CUIs, 0 to 1, as ImageCLEF scores the concepts of one picture; 1 if both are empty.

    ImageCLEF's mean over manual concepts leaves out pictures whose reference is empty.
    """
    ours, theirs = set(found), set(reference)
    if not ours and not theirs:
        return 1.0
    return 2 * len(ours & theirs) / (len(ours) + len(theirs))


def recall(found: Collection[str], reference: Collection[str]) -> float | None:
    """The share of the reference that was found, 0 to 1, or None if the reference is empty."""
    theirs = set(reference)
    return len(theirs.intersection(found)) / len(theirs) if theirs else None


def _first(kind: str, folded: str) -> frozenset[str]:
    return frozenset(one.name for one in islice(_lexicon(kind).finditer(folded), 1))


@cache
def _lexicon(kind: str) -> Lexicon:
    traps = [lexicon.entry(table, "") for table in _TABLES["trap"] if table["kind"] == kind]
    return Lexicon([Entry(one.cui, one.terms, one.abbreviations) for one in CONCEPTS if one.kind == kind], traps)


def _concept(table: dict[str, Any]) -> Concept:
    words = lexicon.entry(table, table["name"])
    return Concept(table["cui"], words.name, table["kind"], words.terms, words.abbreviations)


_TABLES: Final = tomllib.loads(_SOURCE.decode())
CONCEPTS: Final = tuple(map(_concept, _TABLES["concept"]))
_NAMES: Final = {concept.cui: concept.name for concept in CONCEPTS}
