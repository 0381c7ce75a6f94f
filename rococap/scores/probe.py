"""Shows what each score notices: original captions, changed in one respect, are scored against themselves.

A score that falls as much when left becomes right as when two words change places measures words; one that does not
fall at all does not see the change. Nothing is stored.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from sqlalchemy import Engine as Database

from rococap import queue
from rococap.db import execute, transaction
from rococap.errors import RococapError, RunError
from rococap.files import read_json, replacing
from rococap.progress import Progress, silent, with_label
from rococap.results.export import FOLDER
from rococap.results.formats import armed
from rococap.results.manifest import manifest_path
from rococap.results.snapshot import PAGE
from rococap.scores import concepts
from rococap.scores.changes import Change, apply, changes
from rococap.scores.evaluate import METRICS, Computed, Metric, Pair, compute, interval, resampled_sums

ID_COLUMNS: Final = ("id", "image_id", "roco_id")
CAPTION_COLUMNS: Final = ("caption", "original_caption")
OF_THE_ORIGINAL: Final = "concept_f1_ref"
"""A score of the original alone, which no change of the caption can move."""
_ROUNDING: Final = 1e-9
SAME_MEANING: Final = "rephrase"
"""The change that a score should not notice."""


@dataclass(frozen=True, slots=True)
class Fall:
    """A score of the originals against themselves (`unchanged`) and of the changed captions, and their difference with
    its 95 % interval, which is None for a single caption.
    """

    unchanged: float
    changed: float
    fall: float
    ci: tuple[float, float] | None

    @property
    def is_seen(self) -> bool:
        """Whether the score can tell the change from none: the interval does not include 0."""
        return self.ci is not None and not self.ci[0] - _ROUNDING <= 0 <= self.ci[1] + _ROUNDING

    @property
    def share(self) -> tuple[float, float, float]:
        """The fall and the ends of its interval, as shares of the score of the originals."""
        low, high = self.ci or (self.fall, self.fall)
        return self.fall / self.unchanged, low / self.unchanged, high / self.unchanged


@dataclass(frozen=True, slots=True)
class Changed:
    """The scores under one change, which applies to `n` of the captions."""

    n: int
    scores: dict[str, Fall]


@dataclass(frozen=True, slots=True)
class Probed:
    """All changes by name, over `n` original captions; `not_computed` says why there is no such score."""

    n: int
    changes: dict[str, Changed]
    not_computed: dict[str, str]

    @property
    def names(self) -> list[str]:
        """The scores that at least one change has."""
        return list(dict.fromkeys(name for change in self.changes.values() for name in change.scores))


# --- Originals -------------------------------------------------------------------------------------------------


def of_split(database: Database, run_name: str | None, split: str) -> list[Pair]:
    """The originals of the split in the data set of a run, or of the default or only run, each as its own caption.

    Raises RunError if there is no such run, it has no pictures of the split, or none has an original caption.
    """
    with transaction(database) as conn:
        run = queue.find_run(conn, run_name)
        queue.counts_of(conn, run, [split])
    pairs: list[Pair] = []
    last = 0
    sql = (
        f"SELECT id, image_id, caption, cui FROM images WHERE dataset_id = ? AND split = ? AND id > ? ORDER BY id "
        f"LIMIT {PAGE}"
    )
    while True:
        with transaction(database) as conn:
            rows = execute(conn, sql, (run.dataset_id, split, last)).fetchall()
        if not rows:
            break
        last = rows[-1][0]
        pairs += [Pair(0, image_id, text, cui, text, "") for _, image_id, text, cui in rows if text.strip()]
    if not pairs:
        raise RunError(
            f"The pictures of {split} have no original captions, and a probe changes these. Probe another split, or "
            "the captions of a file: rococap probe --captions FILE.csv"
        )
    return pairs


def of_file(path: Path) -> list[Pair]:
    """The captions of a CSV file, each as its own reference, with the concepts that it names.

    The file has the columns ID and Caption, or is an export. Raises RococapError for anything else, for a file without
    captions, and for an ID that occurs twice.
    """
    try:
        frame = pd.read_csv(path, encoding="utf-8-sig", dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:  # pandas' and Unicode's errors are ValueErrors
        raise RococapError(f"{path} cannot be read as a CSV file in UTF-8 ({error}). Name another file.") from error
    columns = {str(name).strip().lower(): name for name in frame.columns}
    ids, captions = (
        next((frame[columns[name]] for name in names if name in columns), None)
        for names in (ID_COLUMNS, CAPTION_COLUMNS)
    )
    if ids is None or captions is None:
        raise RococapError(
            f"{path} has no columns ID and Caption: it has {', '.join(map(str, frame.columns))}. Rename them, or name "
            "a CSV file that rococap exported."
        )
    is_export = captions.name == CAPTION_COLUMNS[-1]
    if is_export and (read_json(manifest_path(path)) or {}).get("excel_safe"):
        captions = captions.map(armed)
    if repeated := [id for id, n in Counter(ids).items() if n > 1]:
        raise RococapError(f"{path} has several rows with the ID {repeated[0]!r}: leave one of each.")
    pairs = [Pair(0, id, text, _named(text), text, "") for id, text in zip(ids, captions, strict=True) if text.strip()]
    if not pairs:
        raise RococapError(f"{path} has no captions. Name a file that has some.")
    return pairs


def _named(text: str) -> str:
    return ";".join(sorted(concepts.found(text)))


# --- Probing ---------------------------------------------------------------------------------------------------


def probe(
    pairs: Sequence[Pair], *, also: Sequence[str] = (), plugins: Sequence[Metric] = (), progress: Progress = silent
) -> Probed:
    """Scores every change of the originals, and the originals themselves.

    `also` and `plugins` are further scores, as for `evaluate`. Intervals are from the percentile bootstrap over
    captions, which are drawn once for both scores. Raises RococapError if no change applies.
    """
    originals = list(pairs)
    metrics = [metric for metric in (*METRICS, *plugins) if not metric.extra or metric.name in also]
    same = compute(metrics, originals, range(len(originals)), with_label(progress, "unchanged"))
    found: dict[str, Changed] = {}
    not_computed = dict(same.not_computed)
    possible = [metric for metric in metrics if not not_computed.keys() >= set(metric.scores)]
    for name, change in changes([pair.reference for pair in originals]).items():
        rows, changed = _changed(name, change, originals)
        if not rows:
            found[name] = Changed(0, {})
            continue
        computed = compute(possible, changed, rows, with_label(progress, name))
        not_computed |= computed.not_computed
        found[name] = Changed(len(rows), _falls(same, computed, rows))
    probed = Probed(len(originals), found, not_computed)
    if not probed.names:
        raise RococapError("No change applies to these captions. Name a split, or a file with more of them.")
    return replace(probed, not_computed={name: why for name, why in not_computed.items() if name not in probed.names})


def _changed(name: str, change: Change, originals: Sequence[Pair]) -> tuple[list[int], list[Pair]]:
    """The rows to which the change applies, and all pairs, with the captions of these rows changed."""
    texts = [apply(name, change, pair.reference) for pair in originals]
    pairs = [pair if text is None else replace(pair, text=text) for pair, text in zip(originals, texts, strict=True)]
    return [at for at, text in enumerate(texts) if text is not None], pairs


def _falls(same: Computed, changed: Computed, rows: Sequence[int]) -> dict[str, Fall]:
    """The falls of the scores that both have."""
    before, after = _shared(same, changed, rows), _shared(changed, same, rows)
    statistics = np.hstack([before.statistics(), after.statistics()])
    half = statistics.shape[1] // 2
    sums, drawn = statistics.sum(axis=0), resampled_sums(statistics)
    unchanged, now = before.totals(sums[:half]), after.totals(sums[half:])
    drawn_unchanged, drawn_now = before.totals(drawn[:, :half]), after.totals(drawn[:, half:])
    return {
        name: Fall(
            *(float(unchanged[name]), float(now[name]), float(unchanged[name] - now[name])),
            interval(drawn_unchanged[name] - drawn_now[name]) if len(rows) > 1 else None,
        )
        for name in unchanged
        if name != OF_THE_ORIGINAL and not np.isnan(unchanged[name] - now[name])
    }


def _shared(computed: Computed, other: Computed, rows: Sequence[int]) -> Computed:
    """These rows, with the scores that the other also has."""
    at = list(rows)
    counts = {name: column[at] for name, column in computed.counts.items() if name in other.counts}
    values = {name: column[at] for name, column in computed.values.items() if name in other.values}
    return Computed([computed.pairs[row] for row in at], counts, values)


# --- Output ----------------------------------------------------------------------------------------------------


def to_json(probed: Probed) -> dict[str, Any]:
    """The object that --json prints."""
    return {
        "n": probed.n,
        "changes": {
            name: {
                "n": change.n,
                "scores": {
                    score: {"unchanged": fall.unchanged, "changed": fall.changed, "fall": fall.fall, "ci": fall.ci}
                    for score, fall in change.scores.items()
                },
            }
            for name, change in probed.changes.items()
        },
    }


def unseen(probed: Probed) -> Iterator[tuple[str, list[str]]]:
    """Each score with the changes that it cannot tell from none, except the one that keeps the meaning."""
    for score in probed.names:
        changes = [
            name
            for name, change in probed.changes.items()
            if name != SAME_MEANING and score in change.scores and not change.scores[score].is_seen
        ]
        if changes:
            yield score, changes


def below_rephrasing(probed: Probed) -> Iterator[tuple[str, list[str]]]:
    """Each score with the changes that lower it less than the change that keeps the meaning."""
    for score, same in probed.changes[SAME_MEANING].scores.items():
        changes = [
            name
            for name, change in probed.changes.items()
            if name != SAME_MEANING and score in change.scores and change.scores[score].fall < same.fall
        ]
        if changes:
            yield score, changes


def default_path(split: str | None, captions: Path | None) -> Path:
    """Where the plot is written unless a path is given."""
    return FOLDER / f"probe_{split or (captions or Path()).stem}.png"


def draw(probed: Probed, path: Path) -> None:
    """Plots how far each score falls, as a share of the score of the originals, with a panel for each change.

    Raises RococapError if the file cannot be written.
    """
    from matplotlib.figure import Figure

    drawn = {name: change for name, change in probed.changes.items() if change.scores}
    names = probed.names
    columns = 3
    figure = Figure(figsize=(11, 1 + -(-len(drawn) // columns) * (1 + 0.17 * len(names))), layout="constrained")
    panels = figure.subplots(-(-len(drawn) // columns), columns, sharex=True, sharey=True, squeeze=False)
    for panel in panels.flat[len(drawn) :]:
        panel.set_visible(False)
    for panel, (name, change) in zip(panels.flat, drawn.items(), strict=False):
        _draw(panel, names, change.scores)
        panel.set_title(f"{name} (n = {change.n:,})", fontsize=10)
    for panel in panels[:, 0]:
        panel.set_yticks(range(len(names)), labels=names, fontsize=8)
    panels[0, 0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel("share of the score that is lost, with its 95 % interval", fontsize=10)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _draw(panel: Any, names: Sequence[str], scores: Mapping[str, Fall]) -> None:
    panel.axvline(0, color="#999999", linewidth=0.8)
    for y, name in enumerate(names):
        if name in scores and scores[name].unchanged > 0:
            fall, low, high = scores[name].share
            colour = "#0067ad" if scores[name].is_seen else "#b84a00"
            panel.plot([low, high], [y, y], color=colour, linewidth=1.6)
            panel.plot([fall], [y], "o" if scores[name].is_seen else "x", color=colour, markersize=4.5)
