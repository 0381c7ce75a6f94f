"""Sides that a caption names: left, right or both, with the words that follow.

A side is read from "left", "right", "left-sided" and the like, from "bilateral" and "both", which name left and right,
and from abbreviations of the heart, the coronary and carotid arteries, the lobes of the lungs and quadrants. What is no
side of the body is left out: "was left in place", "right-angled", "right-handed", projections ("left anterior
oblique"), the direction of a shunt, and parts of the figure ("left panel").
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

LEFT: Final = "left"
RIGHT: Final = "right"


@dataclass(frozen=True, slots=True)
class Side:
    """A side, up to two words of what it is the side of, and the last word of meaning before it, "" if none is near."""

    side: str
    words: tuple[str, ...]
    before: str = ""

    def __str__(self) -> str:
        return " ".join([self.side, *self.words])


def find(folded: str) -> Iterator[Side]:
    """Every mention of a side; two for "bilateral"."""
    for match in _SIDE.finditer(folded):
        start, end = match.span()
        match match.lastgroup:
            case "side":
                yield Side(match["side"].lower(), _words(folded[end : end + _NEAR]), _before(folded, start))
            case "both":
                words, before = _words(folded[end : end + _NEAR]), _before(folded, start)
                yield from (Side(LEFT, words, before), Side(RIGHT, words, before))
            case "abbreviation" if not _explained_otherwise(match["abbreviation"], folded):
                yield replace(ABBREVIATIONS[match["abbreviation"]], before=_before(folded, start))


@lru_cache(maxsize=64)
def _explained_otherwise(abbreviation: str, folded: str) -> bool:
    """Whether the text gives another meaning: "LA = local anesthetics", "local anesthetics (LA)"."""
    first, *rest = list(abbreviation.lower())
    other = rf"(?!left|right){first}[a-z]+"
    full = other + "".join(rf"[ -]{letter}[a-z]+" for letter in rest)
    meaning = rf"\b{abbreviation} ?(?:=|:|,|-|–|indicates|is|denotes) ?(?i:{full})|\b(?i:{full}) \({abbreviation}\)"
    return re.search(meaning, folded) is not None


def _before(folded: str, end: int) -> str:
    sentence = _SENTENCE.split(folded[max(0, end - _NEAR) : end])[-1]
    return next((word for word in reversed(_WORD.findall(sentence.lower())) if word not in _LINKS), "")


def _words(text: str) -> tuple[str, ...]:
    """The next two words of the clause in the singular, without "and right", "side" and the like."""
    clause = _END.split(_OTHER.sub(" ", text, count=1), maxsplit=1)[0]
    words = (_PLURAL.sub("", word) for word in _WORD.findall(clause.lower()))
    return tuple(word for word in words if word not in _EMPTY)[:2]


ABBREVIATIONS: Final = {
    name: Side(side, tuple(words.split()))
    for name, side, words in (
        ("LV", LEFT, "ventricle"),
        ("RV", RIGHT, "ventricle"),
        ("LA", LEFT, "atrium"),
        ("RA", RIGHT, "atrium"),
        ("LVOT", LEFT, "ventricular outflow"),
        ("RVOT", RIGHT, "ventricular outflow"),
        ("LAD", LEFT, "anterior descending"),
        ("LCX", LEFT, "circumflex"),
        ("LCx", LEFT, "circumflex"),
        ("LMCA", LEFT, "main coronary"),
        ("LCA", LEFT, "coronary"),
        ("RCA", RIGHT, "coronary artery"),
        ("LPA", LEFT, "pulmonary artery"),
        ("RPA", RIGHT, "pulmonary artery"),
        ("LSVC", LEFT, "superior vena"),
        ("LCCA", LEFT, "common carotid"),
        ("RCCA", RIGHT, "common carotid"),
        ("LICA", LEFT, "internal carotid"),
        ("RICA", RIGHT, "internal carotid"),
        ("LUL", LEFT, "upper lobe"),
        ("LLL", LEFT, "lower lobe"),
        ("RUL", RIGHT, "upper lobe"),
        ("RML", RIGHT, "middle lobe"),
        ("RLL", RIGHT, "lower lobe"),
        ("LUQ", LEFT, "upper quadrant"),
        ("LLQ", LEFT, "lower quadrant"),
        ("RUQ", RIGHT, "upper quadrant"),
        ("RLQ", RIGHT, "lower quadrant"),
    )
}
"""Written as here only: "la" is also a French article."""

_NEAR: Final = 60  # characters in which the words of a side are looked for
_FIGURE: Final = "panel|image|picture|figure|photo(?:graph)?|column|row|inset|frame|plot|graph|bar"
_LEFT_BEHIND: Final = "in|on|to|out|open|untreated|alone|behind|unrepaired|inside"
_PAIRS: Final = (
    "figures|images|pictures|panels|views|cases|patients|groups|scans|axial|sagittal|coronal|t1|t2|anterior|posterior|"
    "superior|inferior|and|or"
)
_NO_SIDE: Final = (
    rf"(?:is|was|were|are|be|been|being|has|had|have|it|them|and) left (?:{_LEFT_BEHIND})",
    r"left (?:in[ -](?:place|situ)|untreated|behind|over|the (?:hospital|patient|study))",
    r"(?:left|right)[ -]+(?:(?:anterior|posterior|lateral)[ -]+)?oblique (?:view|projection|radiograph)s?",
    r"(?:left|right)[ -]+(?:anterior|posterior)[ -]+oblique",
    r"(?:left|right)[ -]to[ -](?:left|right)",
    r"(?:left|right)[ -]+handed(?:ness)?",
    r"(?:left|right)[ -]+(?:lateral[ -]+)?decubitus",
    r"(?:left|right)[ -]+lateral (?:position|recumbency)",
    r"(?:left|right)[ -]+(?:hand[ -]+)?(?:(?:side|half|part|edge|margin|border|third) )?of "
    rf"(?:the |this |each )?(?:{_FIGURE})s?",
    r"(?:left|right)[ -]+lateral (?:\w+ )?(?:view|projection|radiograph|x-ray)",
    rf"(?:left|right)[ -]+(?:hand[ -]+)?(?:{_FIGURE}|corner)s?",
    r"right[ -]+(?:angle[ds]?|away|after|before|here|now|diagnosis|treatment|decision|choice|time|way)",
    # "Both the femur and the tibia": two things, not two sides.
    rf"both (?:the )?(?:{_PAIRS})",
    r"both (?:(?:of|the|a|an) )*(?:\w+ ){1,2}and",
)
_SIDE: Final = re.compile(
    rf"\b(?:(?i:{'|'.join(_NO_SIDE)})|(?P<side>[Ll]eft|[Rr]ight|LEFT|RIGHT)(?:-?(?:sided|side|ward))?"
    rf"|(?P<both>[Bb]ilateral(?:ly)?|BILATERAL|[Bb]oth|B/L)"
    rf"|(?P<abbreviation>{'|'.join(sorted(ABBREVIATIONS, key=len, reverse=True))}))\b"
)
_OTHER: Final = re.compile(r"^ ?(?:and|or|/|,|&) ?(?:the )?(?:left|right)\b", re.IGNORECASE)
_END: Final = re.compile(r"[.;:,()\[\]=]")
_SENTENCE: Final = re.compile(r"[.;:] ")
_PLURAL: Final = re.compile(r"(?<=..)(?<![isu])s$")
_WORD: Final = re.compile(r"[^\W_]+")
_EMPTY: Final = {"side", "sided", "ward", "and", "of", "the", "a", "hand", "aspect"}
_LINKS: Final = _EMPTY | {
    *(
        "in",
        "on",
        "at",
        "to",
        "from",
        "with",
        "by",
        "for",
        "an",
        "is",
        "are",
        "was",
        "were",
        "it",
        "its",
        "this",
        "left",
    ),
    *("right", "or", "as", "into", "upper", "lower"),
}
