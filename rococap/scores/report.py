"""One HTML file that shows runs beside the originals: scores, plots and pictures with their captions.

It needs no server and no network. Scores are evaluate's, as they are; pictures are read in data set order, one at a
time, and only those that are shown.
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

from rococap import __version__, queue
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
from rococap.scores.evaluate import BY_MODALITY, Evaluation, Scored
from rococap.scores.explained import SUMMARY, Explained, explained
from rococap.scores.gallery import SECTIONS, Captions, Card, Gallery, Row, cards_of, choose, rows_of
from rococap.scores.plots import Plot, Series
from rococap.scores.shown import folders_of, rounded, short, short_within

NOTICE: Final = "Machine-generated captions, not reviewed by clinicians. Not for clinical use."


# --- The report ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reported:
    """`pictures` are those shown, of which `unreadable` could not be."""

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
    pictures: int = 200,
    note: str = "",
    strip_reasoning: bool = False,
    progress: Progress = silent,
) -> Reported:
    """Writes what the runs captioned of a split to `path`, with at most so many pictures, and a note at the top.

    Raises RunError as `evaluate` does, RococapError if the file cannot be written; then an older file stays as it was.
    A picture that cannot be read has a card that says why.
    """
    if path is not None and path.is_dir():
        raise RococapError(f"{path} is a folder: name a file with --output, such as {path / 'report.html'}")
    evaluated = evaluation.evaluate(database, names, [split], strip_reasoning=strip_reasoning, progress=progress)
    path = path or evaluation.default_path(evaluated, "report", ".html")
    progress("resampling", 0, 1)
    told = evaluation.to_json(evaluated)
    progress("resampling", 1, 1)
    with transaction(database) as conn:
        failures = {one.run.name: queue.list_failures(conn, one.run.name, [split]) for one in evaluated.scored}
    gallery = choose(evaluated, failures, pictures)
    rows = rows_of(database, evaluated.scored[0].run, split, list(gallery.tags))
    unreadable: list[str] = []
    cards = cards_of(gallery, Captions(evaluated, failures), rows, evaluated.scored[0].run, unreadable, progress)
    page = _page(told, evaluated, _plots(database, evaluated, told), gallery, rows, cards, note)
    with replacing(path) as hidden, hidden.open("w", encoding="utf-8") as file:
        file.writelines(page)
    captions = sum(run["n"] for run in told["runs"])
    return Reported(path, captions, len(rows), len(unreadable), path.stat().st_size, _warnings(told))


# --- Plots -----------------------------------------------------------------------------------------------------


def _plots(database: Database, evaluated: Evaluation, told: Mapping[str, Any]) -> list[Plot]:
    scored = evaluated.scored
    names = [name for name in BY_MODALITY if any(run["metrics"].get(name) is not None for run in told["runs"])]
    times = [_times(database, one) for one in scored]
    originals = {pair.image_id: _words(pair.reference) for one in scored for pair in one.pairs if pair.reference}
    lengths = [
        *([Series("originals", None, np.array(list(originals.values())))] if originals else []),
        *_series(scored, [np.array([_words(pair.text) for pair in one.pairs]) for one in scored]),
    ]
    return [
        *(plots.by_modality(name, explained(name).title, explained(name).top, told["runs"]) for name in names),
        plots.lengths(lengths),
        plots.durations(_series(scored, [took for took, _ in times])),
        plots.throughput(_series(scored, [made_at for _, made_at in times])),
    ]


def _series(scored: Sequence[Scored], values: Sequence[plots.Values]) -> list[Series]:
    return [Series(one.run.name, at, mine) for at, (one, mine) in enumerate(zip(scored, values, strict=True))]


def _words(text: str) -> float:
    return float(len(text.split()))


def _times(database: Database, scored: Scored) -> tuple[plots.Values, plots.Values]:
    """Of the captions that were scored, in ms: how long each took, NaN if unknown, and when it was made."""
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
    told: Mapping[str, Any],
    evaluated: Evaluation,
    drawn: Sequence[Plot],
    gallery: Gallery,
    rows: Sequence[Row],
    cards: Iterator[Card],
    note: str,
) -> Iterator[str]:
    here = Path(__file__).parent
    style, script = ((here / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    folders = [folder for one in evaluated.scored for folder in folders_of(one.run)]
    counts = Counter(tag for tags in gallery.tags.values() for tag in tags)
    return environment.get_template("report.html.jinja").generate(
        runs=told["runs"],
        split=told["runs"][0]["split"],
        version=__version__,
        made_at=datetime.now(UTC),
        notice=NOTICE,
        scored_by=", ".join(
            [*(f"{name} {of}" for name, of in told["packages"].items()), f"concepts {told['concepts']}"]
        ),
        note=note,
        warnings=[short_within(text, folders) for text in _warnings(told)],
        facts=_facts(evaluated),
        made_by=[_made_by(one) for one in evaluated.scored],
        summary=[(explained(name), name) for name in SUMMARY],
        scores=_score_rows(told),
        paired=told["paired"],
        by_modality=_modality_rows(told),
        modality_scores=[explained(name) for name in BY_MODALITY],
        plots=[(plot, Markup(plot.svg)) for plot in drawn],
        dashes=plots.DASHES,
        colours=plots.COLOURS,
        sections=[(section, counts[section], gallery.of[section]) for section in SECTIONS],
        modalities=sorted({row.modality for row in rows}),
        n_cards=len(rows),
        has_originals=any(pair.reference for one in evaluated.scored for pair in one.pairs),
        cards=cards,
        number=rounded,
        style=Markup(style),
        script=Markup(script),
        script_digest=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _warnings(told: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(text for run in told["runs"] for text in run["warnings"]))


def _facts(evaluated: Evaluation) -> list[tuple[str, list[str]]]:
    """What made each run's captions: a row for each fact, a cell for each run."""
    stripped = {"Reasoning": "left out of the captions"} if evaluated.strip_reasoning else {}
    of_runs = [_facts_of(one) | stripped for one in evaluated.scored]
    return [(name, [facts[name] for facts in of_runs]) for name in of_runs[0]]


def _facts_of(scored: Scored) -> dict[str, str]:
    run, recipe = scored.run, scored.run.recipe
    resolved = run.resolved or {}
    return {
        "Model": short(recipe.model),
        "Revision": " = ".join(filter(None, (recipe.revision, resolved.get("revision", "")))),
        "Digest of its files": resolved.get("digest", "")[:16] or "not known",
        "Adapter": short(recipe.adapter) if recipe.adapter else "none",
        "Prompt": recipe.prompt,
        "Decoding": _decoding(recipe),
        "Pixels": f"{recipe.min_pixels:,} to {recipe.max_pixels:,}",
        "Precision": " ".join(filter(None, (resolved.get("dtype") or recipe.dtype, recipe.load_in))),
        "Engine": resolved.get("engine", "not known"),
        "Rules": _rules(resolved),
        "Data set": at_revision(short(run.dataset), run.dataset_revision),
        "Split": scored.split,
        "Captions": f"{len(scored.pairs):,}",
        "Missing": f"{scored.missing:,}",
    }


def _rules(resolved: Mapping[str, Any]) -> str:
    """Of opening pictures and ending captions; of a run that accepted new ones, from which caption on."""
    accepted = "".join(
        f" (under {one['from']} up to caption {one['captions_before']:,})" for one in resolved.get("accepted_rules", [])
    )
    return f"{rules_of(resolved)}{accepted}" if resolved else "not known"


def _made_by(scored: Scored) -> list[tuple[str, str]]:
    """The facts in brief."""
    facts = _facts_of(scored)
    digest = [facts["Digest of its files"]] if scored.run.resolved else []
    model = f"{facts['Model']} ({', '.join([facts['Revision'], *digest])})"
    adapter = [("Adapter", facts["Adapter"])] if scored.run.recipe.adapter else []
    rest = [(name, facts[name]) for name in ("Prompt", "Decoding", "Data set", "Split")]
    return [("Model", model), *adapter, *rest]


def _decoding(recipe: Recipe) -> str:
    how = "sampled" if recipe.do_sample else f"{recipe.num_beams} beams" if recipe.num_beams > 1 else "greedy"
    told = [how, f"at most {recipe.max_new_tokens} tokens"]
    if recipe.repetition_penalty != 1:
        told.append(f"repetition penalty {recipe.repetition_penalty:g}")
    fields = (("temperature", recipe.temperature), ("top-p", recipe.top_p), ("top-k", recipe.top_k))
    return ", ".join([*told, *(f"{name} {value:g}" for name, value in fields if value is not None)])


# --- Tables ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """A score, of each run its value and interval, or why there is none, and of each further run its difference from
    the first and p.
    """

    score: Explained
    cells: list[tuple[str, str]]
    differences: list[tuple[str, str]]


def _score_rows(told: Mapping[str, Any]) -> list[ScoreRow]:
    names = dict.fromkeys(name for run in told["runs"] for name in (*run["metrics"], *run["not_computed"]))
    return [
        ScoreRow(
            explained(name),
            [_cell(run, name) for run in told["runs"]],
            [(rounded(one["differences"].get(name), 3, "+"), rounded(one["p"].get(name))) for one in told["paired"]],
        )
        for name in names
    ]


def _cell(run: Mapping[str, Any], name: str) -> tuple[str, str]:
    if why := run["not_computed"].get(name):
        return "", f"not computed: {short_within(why)}"
    interval = run["intervals"].get(name)
    return rounded(run["metrics"].get(name)), f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""


def _modality_rows(told: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, int, int, list[str]]]]]:
    """Of each modality: the runs that have it, with their number, how many captions, and the scores."""
    names = dict.fromkeys(name for run in told["runs"] for name in run["by_modality"])
    return [
        (
            modality,
            [
                (run["run"], at, of["n"], [rounded(of["metrics"].get(name)) for name in BY_MODALITY])
                for at, run in enumerate(told["runs"])
                if (of := run["by_modality"].get(modality))
            ],
        )
        for modality in names
    ]
