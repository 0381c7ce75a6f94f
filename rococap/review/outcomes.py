"""What a reader study found: preferences and ratings with intervals, agreement and reading time, also by modality."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from sqlalchemy import Connection

from rococap.results.texts import iso
from rococap.review.agreement import agreement, mean_interval, share_interval
from rococap.review.forms import Scale
from rococap.review.studies import ORIGINAL, Progress, Reading, Study, list_studies, progress, readings

NONE = "(none)"
"""What results call it when a reader found no text best."""


def results_of(conn: Connection, study: Study) -> dict[str, Any]:
    """The results of a study, as `study results --json` prints them.

    Raises RococapError while the key is closed, or if a library for the statistics is not installed.
    """
    return outcome(progress(conn, study), readings(conn, study))


def outcome(known: Progress, read: Sequence[Reading]) -> dict[str, Any]:
    """The same from what was read, without a transaction that stays open meanwhile.

    Raises RococapError if a library for the statistics is not installed.
    """
    study = known.study
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


def open_studies(conn: Connection, split: str, runs: Sequence[str]) -> list[dict[str, Any]]:
    """The results of the studies of a split whose key is open, and in which captions of one of these runs were read."""

    def is_of_runs(study: Study) -> bool:
        return any(set(runs) & set(one.texts) for one in readings(conn, study))

    studies = [one for one in list_studies(conn) if one.split == split and progress(conn, one).is_open]
    return [results_of(conn, one) for one in studies if is_of_runs(one)]


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


# --- For people ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Table:
    """A table of results, whose first column names the rows, and what has to be known to read it."""

    header: tuple[str, ...]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()


def heading_of(found: Mapping[str, Any]) -> str:
    """What a study was, and whether it was unblinded. `found` are its results, as in the functions below."""
    heading = f"{found['study']}: {found['readings']} readings of {found['pictures']} pictures of {found['split']}"
    if opened := found["unblinding"]:
        missing = f"with {opened['n_missing']} readings missing"
        heading += f"; unblinded by {opened['reader']} at {iso(opened['at'])}, {missing}"
    return heading


def tables_of(found: Mapping[str, Any]) -> list[Table]:
    """The results in tables: preferences, each rating, reading times."""
    preference = [_preference_table(found["preference"])] if found["preference"] else []
    ratings = [_rating_table(rating, found["texts"]) for rating in found["ratings"]]
    times = [
        [name, str(of["n"]), f"{of['median']:.1f}", f"{of['total'] / 60:.1f}"]
        for of_kind in (found["reading_sec"]["by_reader"], found["reading_sec"]["by_modality"])
        for name, of in of_kind.items()
    ]
    return [*preference, *ratings, Table(("reading time", "readings", "median s", "total min"), times)]


def _preference_table(of_all: Mapping[str, Any]) -> Table:
    groups = {"all": of_all, **of_all["by_modality"]}
    rows = [[name, str(of["n"]), *map(_share_text, of["shares"].values())] for name, of in groups.items()]
    return Table(("best, in %", "readings", *of_all["shares"]), rows, (_agreement_text(of_all["agreement"]),))


def _rating_table(rating: Mapping[str, Any], texts: Sequence[str]) -> Table:
    groups = {"all": rating["by_text"], **rating["by_modality"]}
    rows = [[name, *(_rated_text(of[text]) for text in texts)] for name, of in groups.items()]
    levels = ", ".join(f"{at} {level}" for at, level in enumerate(rating["levels"], 1))
    return Table((rating["name"], *texts), rows, (levels, _agreement_text(rating["agreement"])))


def _share_text(of: Mapping[str, Any]) -> str:
    if of["share"] is None:
        return "-"
    low, high = of["interval"]
    return f"{100 * of['share']:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def _rated_text(of: Mapping[str, Any]) -> str:
    """The mean level with its interval; on a scale without order, how often each level was given."""
    if "mean" not in of:
        return "/".join(map(str, of["n"]))
    interval = f" [{', '.join(map(_number, of['interval']))}]" if of["interval"] else ""
    return _number(of["mean"]) + interval


def _agreement_text(of: Mapping[str, Any]) -> str:
    kappas = f"Cohen's kappa {_number(of['cohen_mean'])} (mean of pairs), Fleiss' kappa {_number(of['fleiss'])}"
    return f"agreement: {kappas}, Krippendorff's alpha {_number(of['krippendorff'])}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
