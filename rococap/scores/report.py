"""Writes one HTML file that compares runs with the originals: scores, plots, and pictures with their captions.

The file needs neither a server nor a network. Scores come from `evaluate` unchanged. Pictures are read in data set
order, one at a time, and only those that are shown.
"""

import hashlib
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import jinja2
import numpy as np
from markupsafe import Markup
from sqlalchemy import Engine as Database

from rococap import __version__, queue, review
from rococap.data import at_revision
from rococap.db import transaction
from rococap.errors import RococapError
from rococap.files import replacing
from rococap.progress import Progress, silent
from rococap.queue import rules_of
from rococap.recipe import Recipe
from rococap.results.snapshot import done_pages, finished_until, short_reads
from rococap.scores import evaluate as evaluation
from rococap.scores import plots
from rococap.scores.confusions import Confused, confusions
from rococap.scores.evaluate import BY_MODALITY, COUNTS, FACTS, Evaluation, Metric, Scored
from rococap.scores.explained import SUMMARY, Explained, explained
from rococap.scores.gallery import SECTIONS, Captions, Card, Gallery, Row, cards_of, choose, rows_of
from rococap.scores.plots import Plot, Series
from rococap.scores.shown import folders_of, rounded, short, short_within

NOTICE: Final = "Machine-generated captions, not reviewed by clinicians. Not for clinical use."


# --- The report ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reported:
    """A written report: the numbers of captions and pictures in it, and the size of the file in bytes.

    `unreadable` counts the pictures that are shown without a thumbnail, because they cannot be read.
    """

    path: Path
    captions: int
    pictures: int
    unreadable: int
    size: int
    warnings: list[str]


def report(
    database: Database,
    names: Sequence[str],
    split: str,
    path: Path | None = None,
    *,
    also: Sequence[str] = (),
    plugins: Sequence[Metric] = (),
    pictures: int = 200,
    note: str = "",
    strip_reasoning: bool = False,
    progress: Progress = silent,
) -> Reported:
    """Writes a report on the runs' captions of a split to `path`, with at most `pictures` pictures and a note on top.

    `also` and `plugins` are further scores, as for `evaluate`. The card of a picture that cannot be read says why.

    Raises RunError as `evaluate` does, RococapError if the file cannot be written. On failure an older file stays as it
    was.
    """
    if path is not None and path.is_dir():
        raise RococapError(f"{path} is a folder: name a file with --output, such as {path / 'report.html'}")
    evaluated = evaluation.evaluate(
        *(database, names, [split]), also=also, plugins=plugins, strip_reasoning=strip_reasoning, progress=progress
    )
    path = path or evaluation.default_path(evaluated, "report", ".html")
    progress("resampling", 0, 1)
    results = evaluation.to_json(evaluated)
    progress("resampling", 1, 1)
    with transaction(database) as conn:
        failures = {one.run.name: queue.list_failures(conn, one.run.name, [split]) for one in evaluated.scored}
        studies = review.open_studies(conn, split, [one.run.name for one in evaluated.scored])
    gallery = choose(evaluated, failures, pictures)
    rows = rows_of(database, evaluated.scored[0].run, split, list(gallery.tags))
    unreadable: list[str] = []
    cards = cards_of(gallery, Captions(evaluated, failures), rows, evaluated.scored[0].run, unreadable, progress)
    confused = confusions(evaluated.scored, progress)
    page = _page(
        results, evaluated, confused, _plots(database, evaluated, results), gallery, rows, cards, studies, note
    )
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(page)
    captions = sum(run["n"] for run in results["runs"])
    return Reported(path, captions, len(rows), len(unreadable), path.stat().st_size, _warnings(results))


# --- Plots -----------------------------------------------------------------------------------------------------


def _plots(database: Database, evaluated: Evaluation, results: Mapping[str, Any]) -> list[Plot]:
    scored = evaluated.scored
    names = [name for name in BY_MODALITY if any(run["metrics"].get(name) is not None for run in results["runs"])]
    times = [_times(database, one) for one in scored]
    originals = {pair.image_id: _words(pair.reference) for one in scored for pair in one.pairs if pair.reference}
    lengths = [
        *([Series("originals", None, np.array(list(originals.values())))] if originals else []),
        *_series(scored, [np.array([_words(pair.text) for pair in one.pairs]) for one in scored]),
    ]
    return [
        *(plots.by_modality(name, explained(name).title, explained(name).top, results["runs"]) for name in names),
        plots.lengths(lengths),
        plots.durations(_series(scored, [took for took, _ in times])),
        plots.throughput(_series(scored, [made_at for _, made_at in times])),
    ]


def _series(scored: Sequence[Scored], values: Sequence[plots.Values]) -> list[Series]:
    return [Series(one.run.name, at, mine) for at, (one, mine) in enumerate(zip(scored, values, strict=True))]


def _words(text: str) -> float:
    return float(len(text.split()))


def _times(database: Database, scored: Scored) -> tuple[plots.Values, plots.Values]:
    """For the captions that were scored, in ms: the processing time, NaN if unknown, and the time of generation."""
    wanted = {pair.job_id for pair in scored.pairs}
    with transaction(database) as conn:
        cutoff = finished_until(conn, [scored.run], [scored.split])
    with short_reads(database) as read:
        pages = done_pages(read, scored.run, scored.split, cutoff, "j.image_id, j.id, c.processing_ms, c.generated_at")
        rows = [(row[2], row[3]) for page in pages for row in page if row[1] in wanted]
    times = np.array(rows, dtype=np.float64).reshape(-1, 2)
    return times[:, 0], times[:, 1]


# --- The page --------------------------------------------------------------------------------------------------


def _page(
    results: Mapping[str, Any],
    evaluated: Evaluation,
    confused: Sequence[Confused],
    drawn: Sequence[Plot],
    gallery: Gallery,
    rows: Sequence[Row],
    cards: Iterator[Card],
    studies: Sequence[Mapping[str, Any]],
    note: str,
) -> Iterator[str]:
    folder = Path(__file__).parent
    files = (folder.parent / "theme.css", folder / "report.css", folder / "report.js")
    theme, style, script = (file.read_text(encoding="utf-8") for file in files)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    paths = [path for scored in evaluated.scored for path in folders_of(scored.run)]
    counts = Counter(tag for tags in gallery.tags.values() for tag in tags)
    return environment.get_template("report.html.jinja").generate(
        runs=results["runs"],
        split=results["runs"][0]["split"],
        version=__version__,
        made_at=datetime.now(UTC),
        notice=NOTICE,
        scored_by=", ".join(_scored_by(results)),
        note=note,
        warnings=[short_within(text, paths) for text in _warnings(results)],
        settings=_settings(evaluated),
        made_by=[_made_by(one) for one in evaluated.scored],
        summary=[(explained(name), name) for name in SUMMARY],
        scores=_score_rows(results),
        without=_without_near_duplicates(results),
        paired=results["paired"],
        by_modality=_modality_rows(results),
        modality_scores=[explained(name) for name in BY_MODALITY],
        fact_rows=_fact_rows(results),
        confused=confused,
        studies=[(review.heading_of(found), review.tables_of(found)) for found in studies],
        plots=[(plot, Markup(plot.svg)) for plot in drawn],
        dashes=plots.DASHES,
        colours=plots.COLOURS,
        sections=[(section, counts[section], gallery.of[section]) for section in SECTIONS],
        modalities=sorted({row.modality for row in rows}),
        n_cards=len(rows),
        has_originals=any(pair.reference for one in evaluated.scored for pair in one.pairs),
        cards=cards,
        number=rounded,
        style=Markup(theme + style),
        script=Markup(script),
        script_digest=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _scored_by(results: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"{name} {version}" for name, version in results["packages"].items())
    yield from (f"{name} {results[name]}" for name in ("concepts", "facts"))
    yield from (f"{name} ({short_within(edition)})" for name, edition in results.get("plugins", {}).items())


def _warnings(results: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(text for run in results["runs"] for text in run["warnings"]))


def _settings(evaluated: Evaluation) -> list[tuple[str, list[str]]]:
    """How each run's captions were made: a row for each fact, with a cell for each run."""
    stripped = {"Reasoning": "removed from the captions"} if evaluated.strip_reasoning else {}
    of_runs = [_settings_of(one) | stripped for one in evaluated.scored]
    return [(name, [settings[name] for settings in of_runs]) for name in of_runs[0]]


def _settings_of(scored: Scored) -> dict[str, str]:
    run, recipe = scored.run, scored.run.recipe
    resolved = run.resolved or {}
    return {
        "Model": short(recipe.model),
        "Revision": " = ".join(filter(None, (recipe.revision, resolved.get("revision", "")))),
        "Digest of its files": resolved.get("digest", "")[:16] or "unknown",
        "Adapter": short(recipe.adapter) if recipe.adapter else "none",
        "Prompt": recipe.prompt,
        "Decoding": _decoding(recipe),
        "Pixels": f"{recipe.min_pixels:,} to {recipe.max_pixels:,}",
        "Precision": " ".join(filter(None, (resolved.get("dtype") or recipe.dtype, recipe.load_in))),
        "Engine": resolved.get("engine", "unknown"),
        "Rules": _rules(resolved),
        "Data set": at_revision(short(run.dataset), run.dataset_revision),
        "Split": scored.split,
        "Captions": f"{len(scored.pairs):,}",
        "Missing": f"{scored.missing:,}",
    }


def _rules(resolved: Mapping[str, Any]) -> str:
    """The version of the rules (`Recipe.rules`), and any earlier ones that the run had."""
    accepted = "".join(
        f" ({earlier['from']} for the first {earlier['captions_before']:,} captions)"
        for earlier in resolved.get("accepted_rules", [])
    )
    return f"{rules_of(resolved)}{accepted}" if resolved else "unknown"


def _made_by(scored: Scored) -> list[tuple[str, str]]:
    """The settings that the summary of a run shows."""
    settings = _settings_of(scored)
    digest = [settings["Digest of its files"]] if scored.run.resolved else []
    model = f"{settings['Model']} ({', '.join([settings['Revision'], *digest])})"
    adapter = [("Adapter", settings["Adapter"])] if scored.run.recipe.adapter else []
    rest = [(name, settings[name]) for name in ("Prompt", "Decoding", "Data set", "Split")]
    return [("Model", model), *adapter, *rest]


def _decoding(recipe: Recipe) -> str:
    parts = ["greedy", f"at most {recipe.max_new_tokens} tokens"]
    if recipe.repetition_penalty != 1:
        parts.append(f"repetition penalty {recipe.repetition_penalty:g}")
    return ", ".join(parts)


# --- Tables ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """A score: for each run its value and interval, or the reason why there is none; its value for each of the
    `_without_near_duplicates`; and for each further run the difference from the first run and p.
    """

    score: Explained
    cells: list[tuple[str, str]]
    without: list[str]
    differences: list[tuple[str, str]]


def _score_rows(results: Mapping[str, Any]) -> list[ScoreRow]:
    names = dict.fromkeys(name for run in results["runs"] for name in (*run["metrics"], *run["not_computed"]))
    return [
        ScoreRow(
            explained(name),
            [_cell(run, name) for run in results["runs"]],
            [rounded(found["metrics"].get(name)) for _, found in _without_near_duplicates(results)],
            [(rounded(one["differences"].get(name), 3, "+"), rounded(one["p"].get(name))) for one in results["paired"]],
        )
        for name in names
    ]


def _without_near_duplicates(results: Mapping[str, Any]) -> list[tuple[int, Mapping[str, Any]]]:
    """(index, results) of the runs that have captions of pictures with near-duplicates, without those captions."""
    known = [(at, run["without_near_duplicates"]) for at, run in enumerate(results["runs"])]
    return [(at, found) for at, found in known if found and found["left_out"]]


def _cell(run: Mapping[str, Any], name: str) -> tuple[str, str]:
    if why := run["not_computed"].get(name):
        return "", f"not computed: {short_within(why)}"
    interval = run["intervals"].get(name)
    return rounded(run["metrics"].get(name)), f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""


def _modality_rows(results: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, int, int, list[str]]]]]:
    """For each modality, the runs that have captions of it: (name, index, number of captions, scores)."""
    names = dict.fromkeys(name for run in results["runs"] for name in run["by_modality"])
    return [
        (
            modality,
            [
                (run["run"], at, of["n"], [rounded(of["metrics"].get(name)) for name in BY_MODALITY])
                for at, run in enumerate(results["runs"])
                if (of := run["by_modality"].get(modality))
            ],
        )
        for modality in names
    ]


def _fact_rows(results: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, int, list[int]]]]]:
    """For each kind of facts, the runs in which a text has one: (name, index, captions and numbers of facts)."""
    return [
        (
            kind,
            [
                (run["run"], at, [run["facts"][name][key] for key in ("n", *COUNTS)])
                for at, run in enumerate(results["runs"])
                if run["facts"].get(name, {}).get("n")
            ],
        )
        for name, kind in FACTS.items()
        if any(run["facts"].get(name, {}).get("n") for run in results["runs"])
    ]
