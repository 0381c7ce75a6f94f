"""What a reader study found: preferences and ratings with intervals, agreement and reading time, also by modality."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

from sqlalchemy import Connection

from rococap.review.agreement import agreement, mean_interval, share_interval
from rococap.review.forms import Scale
from rococap.review.studies import ORIGINAL, Reading, Study, progress, readings

NONE = "(none)"
"""What results call it when a reader found no text best."""


def results_of(conn: Connection, study: Study) -> dict[str, Any]:
    """The results of a study, as `study results --json` prints them.

    Raises RococapError while the key is closed, or if a library for the statistics is not installed.
    """
    read = readings(conn, study)
    known = progress(conn, study)
    texts = sorted({text for one in read for text in one.texts}, key=lambda text: (text == ORIGINAL, text))
    return {
        "study": study.name,
        "split": study.split,
        "pictures": study.n_pictures,
        "readers": [reader for reader, _ in known.read],
        "seed": study.seed,
        "texts": texts,
        "readings": len(read),
        "missing": known.n_missing,
        "unblinding": asdict(known.unblinding) if known.unblinding else None,
        "preference": _preference(read, texts) if study.form.preference else None,
        "ratings": [_rating(read, texts, scale) for scale in study.form.ratings],
        "reading_sec": {
            "by_reader": _by(read, lambda one: one.reader, _time),
            "by_modality": _by(read, lambda one: one.modality, _time),
        },
    }


def _by(read: Iterable[Reading], key: Callable[[Reading], str], what: Callable[[list[Reading]], Any]) -> dict[str, Any]:
    groups: dict[str, list[Reading]] = {}
    for one in read:
        groups.setdefault(key(one), []).append(one)
    return {name: what(groups[name]) for name in sorted(groups)}


def _time(read: Sequence[Reading]) -> dict[str, float]:
    seconds = [one.seconds for one in read]
    return {"n": len(seconds), "median": median(seconds), "total": sum(seconds)}


# --- Preferences -----------------------------------------------------------------------------------------------


def _preferred(one: Reading) -> str:
    return one.texts[one.answers.preference - 1] if one.answers.preference else NONE


def _preference(read: Sequence[Reading], texts: Sequence[str]) -> dict[str, Any]:
    choices = (*texts, NONE)

    def shares(some: Sequence[Reading]) -> dict[str, Any]:
        return {"n": len(some), "shares": {choice: _share(some, choice) for choice in choices}}

    codings = _codings((one.image_id, one.reader, choices.index(_preferred(one))) for one in read)
    return {
        **shares(read),
        "by_modality": _by(read, lambda one: one.modality, shares),
        "agreement": asdict(agreement(codings, len(choices))),
    }


def _share(read: Sequence[Reading], choice: str) -> dict[str, Any]:
    """The share of readings that chose it. Each picture counts once, as the share of its readers."""
    of_pictures = _by(read, lambda one: one.image_id, lambda some: fmean(_preferred(one) == choice for one in some))
    return {
        "n": sum(_preferred(one) == choice for one in read),
        "share": fmean(of_pictures.values()) if of_pictures else None,
        "interval": share_interval(list(of_pictures.values())),
    }


def _codings(coded: Iterable[tuple[object, str, int]]) -> list[Mapping[str, int]]:
    """For each item, the category that each reader chose, from (item, reader, category)."""
    found: dict[object, dict[str, int]] = {}
    for item, reader, category in coded:
        found.setdefault(item, {})[reader] = category
    return list(found.values())


# --- Ratings ---------------------------------------------------------------------------------------------------


def _rating(read: Sequence[Reading], texts: Sequence[str], scale: Scale) -> dict[str, Any]:
    def by_text(some: Sequence[Reading]) -> dict[str, Any]:
        return {text: _rated(some, text, scale) for text in texts}

    codings = _codings(
        ((one.image_id, text), one.reader, given[scale.name])
        for one in read
        for text, given in zip(one.texts, one.answers.ratings, strict=True)
    )
    return {
        "name": scale.name,
        "question": scale.question,
        "levels": list(scale.levels),
        "ordered": scale.ordered,
        "by_text": by_text(read),
        "by_modality": _by(read, lambda one: one.modality, by_text),
        "agreement": asdict(agreement(codings, len(scale.levels), ordered=scale.ordered)),
    }


def _rated(read: Sequence[Reading], text: str, scale: Scale) -> dict[str, Any]:
    """How often the text was given each level and, on an ordered scale, its mean level, counted from 1: the mean over
    pictures of the mean over readers.
    """

    def level(one: Reading) -> int:
        return one.answers.ratings[one.texts.index(text)][scale.name]

    counts = Counter(map(level, read))
    found: dict[str, Any] = {"n": [counts[at] for at in range(len(scale.levels))]}
    if scale.ordered:
        of_pictures = _by(read, lambda one: one.image_id, lambda some: 1 + fmean(map(level, some)))
        means = list(of_pictures.values())
        found |= {"mean": fmean(means) if means else None, "interval": mean_interval(means)}
    return found
