"""Concepts that a caption names: the manually curated ones of ROCOv2, found by the terms in concepts.toml.

It knows no pictures and no models: text in, UMLS CUIs out.
"""

import hashlib
import re
import tomllib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

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
    """The CUIs that a text names; body regions and directions only of an X-ray, as ROCOv2 has them."""
    folded = " ".join(text.split())
    modalities = _named("modality", folded)
    if _XRAY not in modalities:
        return modalities
    return modalities | _named("region", folded) | _named("direction", folded)


def modality(cuis: Collection[str]) -> str:
    """The modality's name, or "unknown"; of several, the one that comes first in concepts.toml."""
    return next((concept.name for concept in _of("modality") if concept.cui in cuis), "unknown")


def parse(cui: str) -> frozenset[str]:
    """The CUIs of a column that joins them by ";"."""
    return frozenset(cui.replace(";", " ").split())


def f1(found: Collection[str], reference: Collection[str]) -> float:
    """Binary F1 over the union of both, as ImageCLEF scores the concepts of a picture; 1.0 if both are empty."""
    ours, theirs = set(found), set(reference)
    if not ours and not theirs:
        return 1.0
    return 2 * len(ours & theirs) / (len(ours) + len(theirs))


def recall(found: Collection[str], reference: Collection[str]) -> float | None:
    """The part of the reference that was found, or None if the reference is empty."""
    theirs = set(reference)
    return len(theirs.intersection(found)) / len(theirs) if theirs else None


def _of(kind: str) -> Iterator[Concept]:
    return (concept for concept in CONCEPTS if concept.kind == kind)


def _named(kind: str, folded: str) -> frozenset[str]:
    return frozenset(match.lastgroup for match in _MATCHERS[kind].finditer(folded) if match.lastgroup)


def _concept(table: dict[str, Any]) -> Concept:
    abbreviations = tuple(table.get("abbreviations", ()))
    return Concept(table["cui"], table["name"], table["kind"], tuple(table["terms"]), abbreviations)


def _pattern(term: str) -> str:
    """ "…" stands for up to three words; a hyphen also for a dash, a space or nothing."""
    words = re.escape(term).replace(r"\ …\ ", r" (?:\S+ ){0,3}?").replace(r"\ ", " ")
    return words.replace(r"\-", "[-‐‑–— ]?") + "s?"


def _matcher(kind: str) -> re.Pattern[str]:
    """One group for each concept, named by its CUI."""
    groups = "|".join(f"(?P<{concept.cui}>{_alternatives(concept)})" for concept in _of(kind))
    return re.compile(rf"(?<!\w)(?:{groups})(?!\w)")


def _alternatives(concept: Concept) -> str:
    terms = "|".join(map(_pattern, concept.terms))
    return "|".join([f"(?i:{terms})", *map(_pattern, concept.abbreviations)])


CONCEPTS: Final = tuple(map(_concept, tomllib.loads(_SOURCE.decode())["concept"]))
MANUAL: Final = frozenset(concept.cui for concept in CONCEPTS)
_MATCHERS: Final = {kind: _matcher(kind) for kind in ("modality", "region", "direction")}
