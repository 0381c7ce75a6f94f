"""One HTML file that shows runs beside the originals: scores, plots and pictures with their captions.

It needs no server and no network. Scores are evaluate's, as they are; pictures are read in data set order, one at a
time, and only those that are shown.
"""

import hashlib
import os
import random
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, Final

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image
from sqlalchemy import Engine as Database

from rococap import __version__, concepts, datasets, plots, queue
from rococap import evaluate as evaluation
from rococap.datasets import PictureReader, Place
from rococap.db import execute, transaction
from rococap.errors import DatasetError, PictureError, RococapError
from rococap.evaluate import BY_MODALITY, SEED, Evaluation, Scored
from rococap.export import Progress, done_pages, finished_until, replacing, short_reads
from rococap.images import open_picture
from rococap.plots import Plot, Series
from rococap.queue import Failed, Run, rules_of
from rococap.recipe import Recipe

NOTICE: Final = "Machine-generated captions, not reviewed by clinicians. Not for clinical use."
EDGE: Final = 256
"""Longest side of a picture in the report, in pixels."""
QUALITIES: Final = (75, 60, 45, 30, 15, 5)
MOST_BYTES: Final = 24_000
"""Of a picture in the report, as JPEG: noise, which no radiology picture is, comes in a lower quality."""
MOST_TEXT: Final = 2_000
"""Characters of a text that a card shows."""
SECTIONS: Final = ("best", "worst", "random", "flagged", "failed")
_ROWS_AT_ONCE: Final = 500
_ABSOLUTE: Final = re.compile(r"(?<![\w.:/-])/[^\s/:,;'\"()]+(?:/[^\s/:,;'\"()]+)+")
"""A file or folder in a message; no part of an address on the web."""

# --- What scores are -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Explained:
    title: str
    scale: str
    says: str
    top: float = 1.0


_BLEU = "Runs of up to {} words in common with the original, over all captions; shorter captions than originals cost."
EXPLAINED: Final = {
    "bleu_1": Explained("BLEU-1", "0 to 1", "Words in common with the original, over all captions; short ones cost."),
    **{f"bleu_{n}": Explained(f"BLEU-{n}", "0 to 1", _BLEU.format(n)) for n in (2, 3, 4)},
    "rouge_1": Explained("ROUGE-1", "0 to 1", "F of the words in common with the original, mean of captions."),
    "rouge_l": Explained("ROUGE-L", "0 to 1", "F of the longest sequence of words in common, mean of captions."),
    "rouge_l_coco": Explained(
        "ROUGE-L (COCO)", "0 to 1", "The same as the COCO caption evaluation has it, where recall weighs more."
    ),
    "rouge1_imageclef": Explained(
        "ROUGE-1 (ImageCLEF)", "0 to 1", "ROUGE-1 of texts prepared as ImageCLEFmedical Caption does it."
    ),
    "meteor_nltk": Explained(
        "METEOR (nltk)", "0 to 1", "Words in common by form, stem or synonym, and whether they stand in order."
    ),
    "cider_d": Explained(
        "CIDEr-D", "0 to 10", "Runs of words in common, weighted by how rare they are in all originals.", 10.0
    ),
    "concept_f1": Explained(
        "Concept F1", "0 to 1", "Modality, and of X-rays region and direction: what the caption names and what is true."
    ),
    "concept_recall": Explained("Concept recall", "0 to 1", "The part of the true concepts that the caption names."),
    "concept_f1_ref": Explained(
        "Concept F1 of the originals",
        "0 to 1",
        "The same of the original captions themselves: what to compare it with.",
    ),
    "flagged": Explained(
        "Flagged", "0 to 1", "Share of captions that say nothing or are otherwise odd: lower is better."
    ),
    "bertscore_f1": Explained("BERTScore F1", "up to 1", "Words of like meaning, by a language model."),
    "meteor_1_5": Explained("METEOR 1.5", "0 to 1", "As METEOR, by its own program, which also knows paraphrases."),
    "length_ratio": Explained("Length ratio", "around 1", "Words of the captions by words of the originals.", 2.0),
}
SUMMARY: Final = ("bleu_4", "rouge_l", "cider_d", "concept_f1")
OF_A_CARD: Final = ("rouge_l", "cider_d", "concept_f1")


def explained(name: str) -> Explained:
    return EXPLAINED.get(name, Explained(name, "", ""))


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
    progress: Progress = lambda what, done, total: None,
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
    rows = _rows(database, evaluated.scored[0].run, split, list(gallery.tags))
    unreadable: list[str] = []
    cards = _cards(gallery, _Captions(evaluated, failures), rows, evaluated.scored[0].run, unreadable, progress)
    page = _page(told, evaluated, _plots(database, evaluated, told), gallery, rows, cards, note)
    with replacing(path) as hidden, hidden.open("w", encoding="utf-8") as file:
        file.writelines(page)
    captions = sum(run["n"] for run in told["runs"])
    return Reported(path, captions, len(rows), len(unreadable), path.stat().st_size, _warnings(told))


# --- Which pictures --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gallery:
    """image_id -> the sections that it is in; and how many pictures there are that belong to each section."""

    tags: dict[str, list[str]]
    of: dict[str, int]


def choose(evaluated: Evaluation, failures: Mapping[str, Sequence[Failed]], most: int) -> Gallery:
    """A fifth of the pictures at random, at most a fifth for each other section, and what is left at random again.

    Best and worst go by the first run's CIDEr-D, and among equals by the image's id; each is at most a quarter of that
    run's captions, so that they never overlap. Those at random are drawn without regard to the other sections.
    """
    candidates = _candidates(evaluated, failures)
    fifth = max(1, most // len(SECTIONS))
    n_ranked = len(candidates["best"])
    of_ranked = min(fifth, max(1, n_ranked // 4) if n_ranked > 1 else 0)
    sections = {
        "random": candidates["random"][:fifth],
        "failed": candidates["failed"][:fifth],
        "flagged": candidates["flagged"][:fifth],
        "worst": candidates["worst"][:of_ranked],
        "best": candidates["best"][:of_ranked],
    }
    chosen = list(dict.fromkeys(chain.from_iterable(sections.values())))[:most]
    sections["random"] = _fitting(candidates["random"], chosen, most)
    # A picture that was chosen for another section may be flagged or failed too.
    sections |= {name: candidates[name] for name in ("flagged", "failed")}
    members = {section: set(sections[section]) for section in SECTIONS}
    tags = {
        image_id: [section for section in SECTIONS if image_id in members[section]]
        for image_id in dict.fromkeys([*chosen, *sections["random"]])
    }
    return Gallery(tags, {section: len(candidates[section]) for section in SECTIONS})


def _fitting(drawn: Sequence[str], chosen: Sequence[str], most: int) -> Sequence[str]:
    """The first of those drawn, as many as fit beside the chosen ones. None is left out: it stays a fair sample."""
    shown = set(chosen)
    for at, image_id in enumerate(drawn):
        if image_id not in shown and len(shown) == most:
            return drawn[:at]
        shown.add(image_id)
    return drawn


def _candidates(evaluated: Evaluation, failures: Mapping[str, Sequence[Failed]]) -> dict[str, Sequence[str]]:
    """Of each section, the first to be taken first."""
    first = evaluated.scored[0]
    # One caption has no CIDEr-D, and one without an original no score at all.
    values: Iterable[float] = next((first.values[name] for name in ("cider_d", "rouge_l") if name in first.values), [])
    scores = [(value, pair.image_id) for value, pair in zip(values, first.pairs, strict=False) if not np.isnan(value)]
    ranked = [image_id for _, image_id in sorted(scores, key=lambda one: (-one[0], one[1]))]
    equal = {pair.image_id for pair in first.pairs if pair.text == pair.reference}
    everything = list(dict.fromkeys(pair.image_id for one in evaluated.scored for pair in one.pairs))
    return {
        "best": ranked,
        "worst": [image_id for image_id in ranked[::-1] if image_id not in equal],
        "random": random.Random(SEED).sample(everything, len(everything)),
        "flagged": list(dict.fromkeys(pair.image_id for one in evaluated.scored for pair in one.pairs if pair.flags)),
        "failed": list(dict.fromkeys(one.image_id for several in failures.values() for one in several)),
    }


@dataclass(frozen=True, slots=True)
class _Row:
    """A picture of the data set."""

    place: Place
    original: str
    modality: str


def _rows(database: Database, run: Run, split: str, image_ids: Sequence[str]) -> list[_Row]:
    """In data set order."""
    found: list[tuple[int, _Row]] = []
    for start in range(0, len(image_ids), _ROWS_AT_ONCE):
        some = image_ids[start : start + _ROWS_AT_ONCE]
        sql = (
            "SELECT i.id, s.path, i.split, i.row_group, i.row_in_group, i.image_id, i.caption, i.cui FROM images i "
            "JOIN shards s ON s.id = i.shard_id WHERE i.dataset_id = ? AND i.split = ? "
            f"AND i.image_id IN ({', '.join('?' * len(some))})"
        )
        with transaction(database) as conn:
            rows = execute(conn, sql, (run.dataset_id, split, *some)).fetchall()
        found += [
            (row[0], _Row(Place(*(*row[1:6], run.columns)), row[6], concepts.modality(concepts.parse(row[7]))))
            for row in rows
        ]
    return [row for _, row in sorted(found, key=lambda one: one[0])]


# --- Cards -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Said:
    """What a run said of a picture: a caption with its scores, or why there is none."""

    run: str
    number: int
    text: str | None = None
    is_equal: bool = False
    scores: list[tuple[str, str]] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    why: str = ""


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A data URI and its size in pixels; or why there is none."""

    source: str = ""
    width: int = 0
    height: int = 0
    why: str = ""


@dataclass(frozen=True, slots=True)
class Card:
    """`number` counts in data set order; `mean` is the mean of the runs' ROUGE-L."""

    number: int
    image_id: str
    modality: str
    original: str
    tags: list[str]
    said: list[Said]
    mean: float | None
    thumbnail: Thumbnail


class _Captions:
    """What each run said, by image."""

    def __init__(self, evaluated: Evaluation, failures: Mapping[str, Sequence[Failed]]) -> None:
        self._scored = evaluated.scored
        self._at = [{pair.image_id: at for at, pair in enumerate(one.pairs)} for one in evaluated.scored]
        self._failed = [{one.image_id: one for one in failures[scored.run.name]} for scored in evaluated.scored]

    def of(self, image_id: str) -> list[Said]:
        return [self._said(number, one, image_id) for number, one in enumerate(self._scored)]

    def mean(self, image_id: str) -> float | None:
        places = [(one, at[image_id]) for one, at in zip(self._scored, self._at, strict=True) if image_id in at]
        values = [float(one.values["rouge_l"][at]) for one, at in places if "rouge_l" in one.values]
        known = [value for value in values if not np.isnan(value)]
        return sum(known) / len(known) if known else None

    def _said(self, number: int, scored: Scored, image_id: str) -> Said:
        at = self._at[number].get(image_id)
        if at is not None:
            pair = scored.pairs[at]
            names = [name for name in OF_A_CARD if name in scored.values]
            scores = [(explained(name).title, _number(scored.values[name][at], 2)) for name in names]
            flags = [flag for flag in pair.flags.split(",") if flag]
            is_equal = bool(pair.reference) and pair.text == pair.reference
            return Said(scored.run.name, number, _cut(pair.text), is_equal, scores, flags)
        if failed := self._failed[number].get(image_id):
            return Said(
                scored.run.name,
                number,
                why=f"Failed: {failed.code}. {_short_within(failed.message, _folders(scored.run))}",
            )
        return Said(scored.run.name, number, why="Not captioned yet.")


def _cut(text: str) -> str:
    left = len(text) - MOST_TEXT
    return text if left <= 0 else f"{text[:MOST_TEXT]} … ({left} more characters)"


def _cards(
    gallery: Gallery, captions: _Captions, rows: Sequence[_Row], run: Run, unreadable: list[str], progress: Progress
) -> Iterator[Card]:
    """Made as they are asked for. Pictures that cannot be read are noted in `unreadable`."""
    root, absent = _root(run, [row.place.shard for row in rows])
    with PictureReader(root) as reader:
        for number, row in enumerate(rows):
            progress("reading pictures", number, len(rows))
            image_id = row.place.image_id
            thumbnail = Thumbnail(why=absent) if absent else _thumbnail(reader, row.place, root, run.recipe.frame)
            if thumbnail.why:
                unreadable.append(image_id)
            yield Card(
                *(number, image_id, row.modality, _cut(row.original), gallery.tags[image_id]),
                *(captions.of(image_id), captions.mean(image_id), thumbnail),
            )
    progress("reading pictures", len(rows), len(rows))


def _root(run: Run, shards: Sequence[str]) -> tuple[Path, str]:
    """Where the data set is, or why it is not here. Nothing is downloaded: a look at captions is no reason to."""
    name, _ = datasets.parse_name(run.dataset)
    if not run.dataset_revision:
        return Path(name), ""
    for shard in dict.fromkeys(shards):
        if file := datasets.cached(name, shard, run.dataset_revision, "dataset"):
            return Path(file.removesuffix(shard)), ""
    command = f"hf download --repo-type dataset --revision {run.dataset_revision} {name}"
    return Path(), f"The data set is not in the hub's cache here. To have it: {command}"


def _thumbnail(reader: PictureReader, place: Place, root: Path, frame: int) -> Thumbnail:
    try:
        # One at a time: the reader's generator ends where it raises.
        ((_, data),) = reader.read([place])
        if isinstance(data, PictureError):
            raise data
        return _reduced(open_picture(data, frame))
    except (DatasetError, PictureError, OSError) as error:
        return Thumbnail(why=_short_within(str(error), [str(root)]))


def _reduced(picture: Image.Image) -> Thumbnail:
    picture.thumbnail((EDGE, EDGE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    for quality in QUALITIES:
        data = _jpeg(picture, quality)
        if len(data) <= MOST_BYTES:
            break
    return Thumbnail(f"data:image/jpeg;base64,{b64encode(data).decode()}", *picture.size)


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    file = BytesIO()
    picture.save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()


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
    rows: Sequence[_Row],
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
    folders = [folder for one in evaluated.scored for folder in _folders(one.run)]
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
        warnings=[_short_within(text, folders) for text in _warnings(told)],
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
        number=_number,
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
        "Model": _short(recipe.model),
        "Revision": " = ".join(filter(None, (recipe.revision, resolved.get("revision", "")))),
        "Digest of its files": resolved.get("digest", "")[:16] or "not known",
        "Adapter": _short(recipe.adapter) if recipe.adapter else "none",
        "Prompt": recipe.prompt,
        "Decoding": _decoding(recipe),
        "Pixels": f"{recipe.min_pixels:,} to {recipe.max_pixels:,}",
        "Precision": " ".join(filter(None, (resolved.get("dtype") or recipe.dtype, recipe.load_in))),
        "Engine": resolved.get("engine", "not known"),
        "Rules": _rules(resolved),
        "Data set": " at ".join(filter(None, (_short(run.dataset), run.dataset_revision))),
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


def _short(name: str) -> str:
    """A folder by its last two names: a report is sent to people whom the rest does not concern."""
    path = Path(name)
    return "/".join(path.parts[1:][-2:]) or name if path.is_absolute() else name


def _short_within(message: str, folders: Iterable[str] = ()) -> str:
    """With every file and folder so. `folders` are those that are known: their names may have blanks."""
    for folder in sorted(filter(os.path.isabs, folders), key=len, reverse=True):
        message = re.sub(rf"(?<![\w.-]){re.escape(folder)}", lambda match: _short(match[0]), message)
    return _ABSOLUTE.sub(lambda match: _short(match[0]), message)


def _folders(run: Run) -> list[str]:
    return [run.dataset, run.recipe.model, run.recipe.adapter or ""]


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
            [(_number(one["differences"].get(name), 3, "+"), _number(one["p"].get(name))) for one in told["paired"]],
        )
        for name in names
    ]


def _cell(run: Mapping[str, Any], name: str) -> tuple[str, str]:
    if why := run["not_computed"].get(name):
        return "", f"not computed: {_short_within(why)}"
    interval = run["intervals"].get(name)
    return _number(run["metrics"].get(name)), f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""


def _modality_rows(told: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, int, int, list[str]]]]]:
    """Of each modality: the runs that have it, with their number, how many captions, and the scores."""
    names = dict.fromkeys(name for run in told["runs"] for name in run["by_modality"])
    return [
        (
            modality,
            [
                (run["run"], at, of["n"], [_number(of["metrics"].get(name)) for name in BY_MODALITY])
                for at, run in enumerate(told["runs"])
                if (of := run["by_modality"].get(modality))
            ],
        )
        for modality in names
    ]


def _number(value: float | None, digits: int = 3, sign: str = "") -> str:
    return "-" if value is None or np.isnan(value) else f"{value:{sign}.{digits}f}"
