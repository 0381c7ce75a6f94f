"""Captions whose facts were labelled by reading, and how many of them the lexicons find."""

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from places import SHARED

from rococap.scores import facts
from rococap.scores.facts import Facts, measurements

LABELLED = Path(__file__).parent / "scores" / "facts_labelled.json"


ROCOV2 = SHARED / "captions" / "rocov2_test_sample_39.csv"
"""Captions that the project may not contain."""


def read_labelled() -> list[dict[str, Any]]:
    captions: list[dict[str, Any]] = json.loads(LABELLED.read_text(encoding="utf-8"))["captions"]
    return captions


def read_labelled_negations() -> list[dict[str, Any]]:
    """Captions of which only the denied findings were labelled."""
    captions: list[dict[str, Any]] = json.loads(LABELLED.read_text(encoding="utf-8"))["negations"]
    return captions


def read_labelled_rocov2() -> list[dict[str, Any]]:
    with ROCOV2.open(newline="", encoding="utf-8-sig") as file:
        texts = {row["ID"]: row["Caption"] for row in csv.DictReader(file)}
    return [one | {"caption": texts[one["id"]]} for one in json.loads(LABELLED.read_text(encoding="utf-8"))["rocov2"]]


def counts_of(labelled: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int, int, int]]:
    """Kind -> captions where either has a fact of the kind; facts that both have, found facts, labelled facts. Of the
    captions that are labelled and read as English.
    """
    counts = {kind: [0, 0, 0, 0] for kind in facts.KINDS}
    for one in labelled:
        read = facts.facts_of(one["caption"])
        if read is None or one["facts"] is None:
            continue
        for kind, of in counts.items():
            found, wanted = _found(read, kind), _wanted(one["facts"].get(kind, []), kind)
            both = (found & wanted).total()
            for at, n in enumerate((bool(found or wanted), both, found.total(), wanted.total())):
                of[at] += n
    return {kind: (n, both, found, wanted) for kind, (n, both, found, wanted) in counts.items()}


def _found(read: Facts, kind: str) -> Counter[Any]:
    match kind:
        case "side":
            return Counter(one.side for one in read.sides)
        case "negation":
            return Counter(read.denied)
        case "measurement":
            return Counter({(one.dimension, round(one.value, 6)) for one in read.measurements})
        case _:
            return Counter(read.named[kind])


def _wanted(labels: Sequence[str], kind: str) -> Counter[Any]:
    if kind != "measurement":
        return Counter(labels)
    values = [list(measurements.find(label)) for label in labels]
    # A label that cannot be parsed is a measurement that is missed.
    pairs = zip(labels, values, strict=True)
    return Counter({(one[0].dimension, round(one[0].value, 6)) if one else label for label, one in pairs})
