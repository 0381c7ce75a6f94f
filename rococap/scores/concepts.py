"""Concepts that a caption names: the manually curated ones of ROCOv2, found by the terms in concepts.toml.

It knows no pictures and no models: text in, UMLS CUIs out.
"""

import hashlib
import re
import tomllib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

from rococap.results.formats import fold

_SOURCE: Final = (Path(__file__).parent / "concepts.toml").read_bytes()
_XRAY: Final = "C1306645"

DIGEST: Final = hashlib.sha256(_SOURCE).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Concept:
    """A UMLS concept and what names it: terms in any case, abbreviations as they are written."""

    cui: str
    name: str
    kind: str
    terms: tuple[str, ...]
    abbreviations: tuple[str, ...] = ()


def found(text: str) -> frozenset[str]:
    """The CUIs that a text names: the first modality and, of an X-ray, the first body region and direction.

    ROCOv2 gives a picture no more than one of each, and the last two to X-rays only.
    """
    folded = fold(text)
    named = _first("modality", folded)
    if _XRAY in named:
        named |= _first("region", folded) | _first("direction", folded)
    return named


def modality(cuis: Collection[str]) -> str:
    """The modality's name, or "unknown"; of several, the one that comes first in concepts.toml."""
    return next((concept.name for concept in CONCEPTS if concept.kind == "modality" and concept.cui in cuis), "unknown")


def parse(cui: str) -> frozenset[str]:
    """The CUIs of the `cui` column, which joins them by ";"."""
    return frozenset(cui.replace(";", " ").split())


def curated(cuis: Collection[str]) -> frozenset[str]:
    """Those of a picture's CUIs that `found` can give: its modality and, of an X-ray, region and direction. The rest
    a program read from the original caption, or is of a kind that ROCOv2 curates of X-rays only.
    """
    kinds = ("modality", "region", "direction") if _XRAY in cuis else ("modality",)
    return frozenset(one.cui for one in CONCEPTS if one.kind in kinds and one.cui in cuis)


def f1(found: Collection[str], reference: Collection[str]) -> float:
    """Binary F1 over the union of both, as ImageCLEF scores the concepts of a picture; 1.0 if both are empty.

    A picture whose reference is empty has no part in ImageCLEF's mean over manual concepts.
    """
    ours, theirs = set(found), set(reference)
    if not ours and not theirs:
        return 1.0
    return 2 * len(ours & theirs) / (len(ours) + len(theirs))


def recall(found: Collection[str], reference: Collection[str]) -> float | None:
    """The part of the reference that was found, or None if the reference is empty."""
    theirs = set(reference)
    return len(theirs.intersection(found)) / len(theirs) if theirs else None


def _first(kind: str, folded: str) -> frozenset[str]:
    cuis = (match.lastgroup for match in _matcher(kind).finditer(folded))
    return frozenset(islice(filter(None, cuis), 1))


@cache
def _matcher(kind: str) -> re.Pattern[str]:
    """A group for each concept, named by its CUI; traps come first and have none."""
    traps = [_alternatives(*_terms(table)) for table in _TABLES["trap"] if table["kind"] == kind]
    concepts = [f"(?P<{one.cui}>{_alternatives(one.terms, one.abbreviations)})" for one in CONCEPTS if one.kind == kind]
    return re.compile(rf"(?<!\w)(?:{'|'.join(traps + concepts)})(?!\w)")


def _alternatives(terms: tuple[str, ...], abbreviations: tuple[str, ...]) -> str:
    return "|".join([*_by_first(terms, _any_case), *_by_first(abbreviations, re.escape)])


def _by_first(terms: tuple[str, ...], cased: Callable[[str], str]) -> Iterator[str]:
    """Those of one first character together, which a regular expression tries at once."""
    for first, same in groupby(sorted(terms), itemgetter(0)):
        yield f"{cased(first)}(?:{'|'.join(_pattern(term[1:], cased) for term in same)})s?"


def _pattern(term: str, cased: Callable[[str], str]) -> str:
    return "".join(_WILD.get(part, cased(part)) for part in re.split("(… |-)", term))


def _any_case(text: str) -> str:
    """Letter by letter, for the flag for it costs twice the time."""
    return "".join(f"[{one}{one.upper()}]" if one.isalpha() else re.escape(one) for one in text)


def _terms(table: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(table.get("terms", ())), tuple(table.get("abbreviations", ()))


def _concept(table: dict[str, Any]) -> Concept:
    return Concept(table["cui"], table["name"], table["kind"], *_terms(table))


_WILD: Final = {"-": "[-‐‑–—−/ ]{0,3}", "… ": r"(?:[^ .;]+ ){0,3}?"}
_TABLES: Final = tomllib.loads(_SOURCE.decode())
CONCEPTS: Final = tuple(map(_concept, _TABLES["concept"]))
