"""Scores of captions against the original ones, by run, split and modality.

A score is computed once and kept beside its caption, with a digest of all that it hangs on; what is absent or stale is
computed anew. Corpus scores, intervals and tests are made of sums over captions, and so of what is kept.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from rococap import __version__, queue
from rococap.db import execute, transaction
from rococap.errors import RococapError, RunError
from rococap.files import ending, replacing, write_json
from rococap.progress import Progress, silent
from rococap.queue import Run, find_runs
from rococap.results import formats
from rococap.results.export import FOLDER
from rococap.results.formats import write_frames
from rococap.results.manifest import manifest_path, stripped
from rococap.results.snapshot import PAGE, Read, done_pages, finished_until, short_reads
from rococap.scores import concepts, metrics
from rococap.scores.metrics import ORDERS, Vector

BLEUS = tuple(f"bleu_{order}" for order in range(1, ORDERS + 1))
BY_MODALITY = ("bleu_4", "rouge_l", "meteor_nltk", "cider_d", "concept_f1")
"""What is shown of each modality."""
RESAMPLES = 1_000
SEED = 20_411  # intervals and tests are the same whenever they are computed
STORE = 500  # captions whose scores are stored at once, and lost at most where evaluating is killed
LONGEST_NAME = 150  # bytes of the runs' names in a file's, which file systems hold to 255
NO_ORIGINALS = "There are no originals: the data set has no captions of its own for these pictures."
NO_CONCEPTS = "There are no originals and no concepts: the data set has none for these pictures."
TRAINING = "rococap_training.json"
"""Beside an adapter or model that rococap trained: {"dataset": name, "splits": [what it was trained on]}."""

Matrix = npt.NDArray[np.float64]


class NotComputed(RococapError):
    """A score cannot be had here; the message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A caption and the original one."""

    job_id: int
    image_id: str
    reference: str
    cui: str
    text: str
    flags: str


# --- Kinds of scores -------------------------------------------------------------------------------------------

Scores = dict[str, Any]
"""Of one caption: name -> number, None where it is not defined; what is in COUNTED, a list of counts."""


def _bleus_and_length_ratio(counts: Matrix) -> Matrix:
    return np.concatenate([metrics.bleu(counts), _ratio(counts[..., -2], counts[..., -1])[..., None]], axis=-1)


def _ratio(part: Vector, whole: Vector) -> Vector:
    ratio: Vector = np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)
    return ratio


COUNTED: dict[str, tuple[tuple[str, ...], Callable[[Matrix], Matrix]]] = {
    "bleu": ((*BLEUS, "length_ratio"), _bleus_and_length_ratio),
    "meteor_1_5": (("meteor_1_5",), metrics.meteor_1_5),
}
"""Scores of a corpus that are no means of its captions': their names, and what makes them of summed counts."""


def _of_counts(kind: str, counts: Matrix) -> Matrix:
    """NaN where nothing was counted: there is no original."""
    _, score = COUNTED[kind]
    scores: Matrix = np.where(np.any(counts, axis=-1, keepdims=True), score(counts), np.nan)
    return scores


@dataclass(frozen=True, slots=True)
class Metric:
    """`score` takes all pairs and the places of those that are wanted, and yields a Scores for each of these, or raises
    NotComputed. `packages`: whose versions decide the numbers; `edition` changes with our own code. A metric
    `of_corpus` hangs on all references of the evaluation; an `extra` one takes long, or a package that rococap does not
    bring, and is computed where it is asked for. Of scores, those `of_concepts` need no original.
    """

    name: str
    scores: tuple[str, ...]
    score: Callable[[Sequence[Pair], Sequence[int]], Iterator[Scores]]
    packages: tuple[str, ...] = ()
    edition: str = "1"
    of_corpus: bool = False
    extra: bool = False
    of_concepts: tuple[str, ...] = ()

    def digests(self, pairs: Sequence[Pair]) -> list[str]:
        """What the score of each pair hangs on."""
        made_by = " ".join([self.name, self.edition, *(f"{name} {_version(name)}" for name in self.packages)])
        if self.of_corpus:
            made_by += _digest(*sorted(pair.reference for pair in pairs))
        return [_digest(made_by, pair.text, pair.reference, pair.cui) for pair in pairs]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _digest(*texts: str) -> str:
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=8).hexdigest()


def _overlap(pairs: Sequence[Pair], wanted: Sequence[int]) -> Iterator[Scores]:
    for at in wanted:
        text, reference = formats.fold(pairs[at].text), formats.fold(pairs[at].reference)
        hypothesis, words = metrics.tokens(text), metrics.tokens(reference)
        yield {
            "bleu": metrics.bleu_statistics(hypothesis, [words]),
            **metrics.rouge(text, reference),
            "rouge_l_coco": metrics.rouge_l_coco(hypothesis, [words]),
            "rouge1_imageclef": metrics.rouge1_imageclef(text, reference),
        }


def _meteor(pairs: Sequence[Pair], wanted: Sequence[int]) -> Iterator[Scores]:
    wordnet = metrics.open_wordnet()
    if wordnet is None:
        raise NotComputed(f"WordNet is not installed. {metrics.WORDNET_COMMAND}")
    score = metrics.meteor(wordnet)
    for at in wanted:
        yield {"meteor_nltk": score(metrics.tokens(pairs[at].text), metrics.tokens(pairs[at].reference))}


def _cider_d(pairs: Sequence[Pair], wanted: Sequence[int]) -> Iterator[Scores]:
    if len(pairs) < 2:
        raise NotComputed("It weighs words by how rare they are, and there is one caption.")
    references = [[metrics.tokens(pair.reference)] for pair in pairs]
    scores = metrics.cider_d([metrics.tokens(pair.text) for pair in pairs], references)
    for at in wanted:
        yield {"cider_d": float(scores[at])}


def _concepts(pairs: Sequence[Pair], wanted: Sequence[int]) -> Iterator[Scores]:
    """Against the curated ones, which are those that the matcher knows; and the same of the original caption."""
    for at in wanted:
        found, reference = concepts.found(pairs[at].text), concepts.curated(concepts.parse(pairs[at].cui))
        yield {
            "concept_f1": concepts.f1(found, reference),
            "concept_recall": concepts.recall(found, reference),
            "concept_f1_ref": concepts.f1(concepts.found(pairs[at].reference), reference),
        }


def _bertscore(pairs: Sequence[Pair], wanted: Sequence[int]) -> Iterator[Scores]:
    references = [formats.fold(pair.reference) for pair in pairs]
    texts = [(formats.fold(pairs[at].text), references[at]) for at in wanted]
    try:
        for score in metrics.bertscore(texts, references):
            yield {"bertscore_f1": score}
    except ImportError as error:
        raise NotComputed(f"It needs bert-score ({error}): pip install 'rococap[bertscore]'") from error
    except OSError as error:
        raise NotComputed(f"Its model {metrics.BERT} is not here, and cannot be fetched: {error}") from error


def _meteor_1_5(pairs: Sequence[Pair], wanted: Sequence[int]) -> Iterator[Scores]:
    words = ((metrics.tokens(pairs[at].text), metrics.tokens(pairs[at].reference)) for at in wanted)
    try:
        for counts in metrics.meteor_1_5_statistics(words):
            yield {"meteor_1_5": counts}
    except ImportError as error:
        raise NotComputed(f"It needs pycocoevalcap ({error}): pip install 'rococap[coco]'") from error
    except OSError as error:
        raise NotComputed(f"It needs Java that runs ({error}): apt-get install default-jre-headless") from error


METRICS = (
    Metric(
        "overlap",
        (*BLEUS, "rouge_1", "rouge_l", "rouge_l_coco", "rouge1_imageclef"),
        _overlap,
        ("sacrebleu", "rouge-score"),
    ),
    Metric("meteor_nltk", ("meteor_nltk",), _meteor, ("nltk",)),
    Metric("cider_d", ("cider_d",), _cider_d, of_corpus=True),
    Metric(
        "concepts",
        ("concept_f1", "concept_recall", "concept_f1_ref"),
        _concepts,
        edition=concepts.DIGEST,
        of_concepts=("concept_f1", "concept_recall"),
    ),
    Metric(
        "bertscore_f1",
        ("bertscore_f1",),
        _bertscore,
        ("bert-score",),
        edition=metrics.BERT,
        of_corpus=True,
        extra=True,
    ),
    Metric("meteor_1_5", ("meteor_1_5",), _meteor_1_5, ("pycocoevalcap",), extra=True),
)

# --- What is kept ----------------------------------------------------------------------------------------------

Kept = dict[tuple[int, str], tuple[str, str]]
"""(job, metric) -> digest and scores, as JSON."""


_PAIR = "j.image_id, j.id, i.image_id, i.caption, i.cui, c.text, c.flags"


def _read(read: Read, run: Run, split: str, cutoff: int, *, strip_reasoning: bool) -> tuple[list[Pair], Kept]:
    pairs: list[Pair] = []
    kept: Kept = {}
    for rows in done_pages(read, run, split, cutoff, _PAIR, strip_reasoning=strip_reasoning):
        page = [Pair(*row[1:]) for row in rows]
        pairs += page
        sql = "SELECT job_id, metric, digest, value FROM scores WHERE job_id IN ({})".format(", ".join("?" * len(page)))
        with read() as conn:
            found = execute(conn, sql, tuple(pair.job_id for pair in page)).fetchall()
        kept |= {(job_id, metric): (digest, value) for job_id, metric, digest, value in found}
    return pairs, kept


def _scores(
    database: Database, metric: Metric, pairs: Sequence[Pair], kept: Kept, asked: bool, progress: Progress
) -> list[Scores]:
    """Of each pair, computed now or before. Raises NotComputed."""
    digests = metric.digests(pairs)
    found = [kept.get((pair.job_id, metric.name), ("", "")) for pair in pairs]
    is_fresh = [known == digest for (known, _), digest in zip(found, digests, strict=True)]
    # Parsed together, which takes half the time.
    values = ",".join(value if fresh else "{}" for (_, value), fresh in zip(found, is_fresh, strict=True))
    scores: list[Scores] = json.loads(f"[{values}]")
    stale = [at for at, fresh in enumerate(is_fresh) if not fresh]
    if metric.extra and stale and not asked:
        raise NotComputed(f"Not for all captions yet: --also {metric.name}")
    made = zip(stale, metric.score(pairs, stale), strict=True) if stale else iter(())
    done = 0
    while some := list(islice(made, STORE)):
        _keep(database, metric, [(pairs[at].job_id, digests[at], one) for at, one in some])
        for at, one in some:
            scores[at] = one
        done += len(some)
        progress(metric.name, done, len(stale))
    return scores


def _keep(database: Database, metric: Metric, rows: Sequence[tuple[int, str, Scores]]) -> None:
    """In order of the image, as all who evaluate do: two at once wait for each other, and never in a circle."""
    sql = (
        "INSERT INTO scores (job_id, metric, digest, value) VALUES (?, ?, ?, ?) ON CONFLICT (job_id, metric) "
        "DO UPDATE SET digest = excluded.digest, value = excluded.value"
    )
    with transaction(database, write=True) as conn:
        execute(conn, sql, [(job_id, metric.name, digest, json.dumps(one)) for job_id, digest, one in rows])


# --- Sums ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Scored:
    """The captions of one run and split, with their scores.

    `counts` are those of COUNTED, shape (n, how many it counts); `values` each other score's, shape (n,), NaN where it
    is not defined. `missing` counts the jobs of the split that are not done.
    """

    run: Run
    split: str
    pairs: list[Pair]
    modalities: list[str]
    counts: dict[str, Matrix]
    values: dict[str, Vector]
    not_computed: dict[str, str]
    missing: int = 0
    warnings: list[str] = field(default_factory=list)

    def statistics(self) -> Matrix:
        """One row a caption: counts, and for each other score its value and whether it has one. Their sums, over any
        captions, give the scores of these: see `totals`.
        """
        values = [column for value in self.values.values() for column in (np.nan_to_num(value), ~np.isnan(value))]
        return np.column_stack([*self.counts.values(), *values]).astype(np.float64)

    def totals(self, sums: Matrix) -> dict[str, Vector]:
        """Scores from sums of `statistics`, shape (..., columns) -> (...); NaN where nothing has a score."""
        found: dict[str, Vector] = {}
        at = 0
        for kind, counts in self.counts.items():
            names, _ = COUNTED[kind]
            found |= zip(names, np.moveaxis(_of_counts(kind, sums[..., at : at + counts.shape[1]]), -1, 0), strict=True)
            at += counts.shape[1]
        for name in self.values:
            found[name] = _ratio(sums[..., at], sums[..., at + 1])
            at += 2
        return found


@dataclass(frozen=True, slots=True)
class Summary:
    """Scores of n captions: overall values, and the 95 % intervals that the bootstrap gives them."""

    n: int
    metrics: dict[str, float | None]
    intervals: dict[str, tuple[float, float] | None]


def summarise(scored: Scored, modality: str | None = None) -> Summary:
    """Of all captions, or of one modality's.

    The interval is the percentile bootstrap's (Efron and Tibshirani, 1993): captions are drawn with replacement. One
    caption has none.
    """
    statistics = scored.statistics()
    if modality is not None:
        statistics = statistics[np.array(scored.modalities) == modality]
    n = len(statistics)
    rng = np.random.default_rng(SEED)
    drawn = np.array([np.bincount(rng.integers(n, size=n), minlength=n) @ statistics for _ in range(RESAMPLES)])
    overall, resampled = scored.totals(statistics.sum(axis=0)), scored.totals(drawn)
    return Summary(
        n,
        {name: _number(value) for name, value in overall.items()},
        {name: _interval(resampled[name]) if n > 1 else None for name in overall},
    )


def _interval(values: Vector) -> tuple[float, float] | None:
    known = values[~np.isnan(values)]
    low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (np.nan, np.nan)
    return None if np.isnan(low) else (float(low), float(high))


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


@dataclass(frozen=True, slots=True)
class Paired:
    """Two runs on the pictures that both captioned. `differences` are the second's score less the first's; `p` is how
    often captions that are swapped at random between the runs differ as much.
    """

    split: str
    runs: tuple[str, str]
    n: int
    differences: dict[str, float | None]
    p: dict[str, float | None]


def pair_up(one: Scored, other: Scored) -> Paired:
    """Approximate randomisation (Noreen, 1989; Riezler and Maxwell, 2005), two-sided, of the scores that both have.
    Scores that hang on all originals are computed over those of the shared pictures, or else left out.
    """
    places = {pair.image_id: at for at, pair in enumerate(other.pairs)}
    shared = [(at, places[pair.image_id]) for at, pair in enumerate(one.pairs) if pair.image_id in places]
    runs = (one.run.name, other.run.name)
    if not shared:
        return Paired(one.split, runs, 0, {}, {})
    ours, theirs = np.array(shared).T
    is_part = len(shared) < max(len(one.pairs), len(other.pairs))
    one, other = _only(one, ours, other, is_part), _only(other, theirs, one, is_part)
    first, second = one.statistics(), other.statistics()
    rng = np.random.default_rng(SEED)
    swapped = np.array([(rng.random(len(shared)) < 0.5) @ (second - first) for _ in range(RESAMPLES)])
    before, after = one.totals(first.sum(axis=0)), one.totals(second.sum(axis=0))
    trial_before, trial_after = one.totals(first.sum(axis=0) + swapped), one.totals(second.sum(axis=0) - swapped)
    differences = {name: _number(after[name] - before[name]) for name in before}
    p = {name: _p(differences[name], trial_after[name] - trial_before[name]) for name in before}
    return Paired(one.split, runs, len(shared), differences, p)


def _only(scored: Scored, rows: npt.NDArray[np.int64], like: Scored, is_part: bool) -> Scored:
    """Of these captions, the scores that the other has too."""
    counts = {name: value[rows] for name, value in scored.counts.items() if name in like.counts}
    values = {name: value[rows] for name, value in scored.values.items() if name in like.values}
    part = Scored(scored.run, scored.split, [scored.pairs[at] for at in rows], [], counts, values, {})
    for metric in METRICS if is_part else ():
        if metric.of_corpus and metric.name in values:
            del values[metric.name]
            labelled = _labelled(part.pairs)
            if not metric.extra and len(labelled) > 1:
                _add(part, list(metric.score([part.pairs[at] for at in labelled], range(len(labelled)))), labelled)
    return part


def _p(difference: float | None, trials: Vector) -> float | None:
    if difference is None:
        return None
    # Less a rounding error: the sums of a trial that swaps everything come in another order.
    as_large = np.count_nonzero(np.abs(trials) >= abs(difference) - 1e-12)
    return float(as_large + 1) / (len(trials) + 1)


# --- Evaluating ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Runs side by side on each split, and each further run against the first."""

    scored: list[Scored]
    paired: list[Paired]
    strip_reasoning: bool = False


def evaluate(
    database: Database,
    names: Sequence[str],
    splits: Sequence[str],
    *,
    also: Sequence[str] = (),
    strip_reasoning: bool = False,
    progress: Progress = silent,
) -> Evaluation:
    """Scores what the runs have captioned of the splits up to now; without names, the default run or the only one.
    `also` names the extra metrics to compute; `strip_reasoning` leaves out what a model thought aloud.

    Raises RunError for runs that do not exist, are of different data sets, or captioned nothing of any of the splits.
    """
    with transaction(database) as conn:
        runs = find_runs(conn, names or [queue.find_run(conn, None).name])
        counts = {(run.name, one.split): one for run in runs for one in queue.counts_of(conn, run, splits)}
        n_images = _images(conn, runs[0])
        cutoff = finished_until(conn, runs, splits)
    scored = []
    for run in runs:
        captioned = [split for split in splits if (run.name, split) in counts and counts[run.name, split].done]
        if not captioned:
            raise RunError(
                f"Run {run.name!r} captioned nothing of {', '.join(splits)} yet. "
                f"Caption pictures: rococap worker --run {run.name}"
            )
        for split in captioned:
            one = _evaluate(database, run, split, cutoff, also, strip_reasoning, progress)
            one.missing = counts[run.name, split].total - len(one.pairs)
            one.warnings = list(_warnings(one, n_images[split]))
            scored.append(one)
    by_split = [[one for one in scored if one.split == split] for split in splits]
    paired = [pair_up(several[0], other) for several in by_split for other in several[1:]]
    return Evaluation(list(chain.from_iterable(by_split)), paired, strip_reasoning)


def _images(conn: Connection, run: Run) -> dict[str, int]:
    """How many pictures of each split the run's data set has."""
    sql = "SELECT split, count(*) FROM images WHERE dataset_id = ? GROUP BY split"
    return dict(map(tuple, execute(conn, sql, (run.dataset_id,))))


def _evaluate(
    database: Database,
    run: Run,
    split: str,
    cutoff: int,
    also: Sequence[str],
    strip_reasoning: bool,
    progress: Progress,
) -> Scored:
    with short_reads(database) as read:
        pairs, kept = _read(read, run, split, cutoff, strip_reasoning=strip_reasoning)
    modalities = [concepts.modality(concepts.parse(pair.cui)) for pair in pairs]
    scored = Scored(run, split, pairs, modalities, {}, {}, {})

    def told(what: str, done: int, total: int) -> None:
        progress(f"{run.name}, {split}: {what}", done, total)

    was_computed = {name for _, name in kept}
    labelled = _labelled(pairs)
    for metric in METRICS:
        if metric.extra and metric.name not in {*also, *was_computed}:
            continue
        rows = range(len(pairs)) if metric.of_concepts else labelled
        scored.not_computed |= _not_to_be_had(metric, pairs, labelled)
        if scored.not_computed.keys() >= set(metric.scores):
            continue
        try:
            scores = _scores(database, metric, [pairs[at] for at in rows], kept, metric.name in also, told)
        except NotComputed as why:
            scored.not_computed |= dict.fromkeys(metric.scores, str(why))
        else:
            _add(scored, scores, rows)
    _drop_unlabelled(scored, labelled)
    scored.values["flagged"] = np.array([float(bool(pair.flags)) for pair in pairs])
    return scored


def _labelled(pairs: Sequence[Pair]) -> list[int]:
    """The places of those that have an original."""
    return [at for at, pair in enumerate(pairs) if pair.reference.strip()]


def _not_to_be_had(metric: Metric, pairs: Sequence[Pair], labelled: Sequence[int]) -> dict[str, str]:
    """The scores that need originals where there are none, and why."""
    if labelled:
        return {}
    if metric.of_concepts and not any(pair.cui for pair in pairs):
        return dict.fromkeys(metric.scores, NO_CONCEPTS)
    return {name: NO_ORIGINALS for name in metric.scores if name not in metric.of_concepts}


def _drop_unlabelled(scored: Scored, labelled: Sequence[int]) -> None:
    """Takes away what a metric of concepts says of originals that are not there."""
    for metric in METRICS:
        for name in metric.scores if metric.of_concepts else ():
            if name in scored.not_computed:
                scored.values.pop(name, None)
            elif name not in metric.of_concepts and name in scored.values:
                scored.values[name][np.setdiff1d(np.arange(len(scored.pairs)), labelled)] = np.nan


def _add(scored: Scored, scores: Sequence[Scores], rows: Sequence[int]) -> None:
    """Enters the scores of some captions; the others have none."""
    for name in scores[0]:
        told = np.array([one[name] for one in scores], dtype=np.float64)
        column = np.full((len(scored.pairs), *told.shape[1:]), 0.0 if name in COUNTED else np.nan)
        column[list(rows)] = told
        if name in COUNTED:
            scored.counts[name] = column
        else:
            scored.values[name] = column


def _warnings(scored: Scored, n_images: int) -> Iterator[str]:
    run, split = scored.run, scored.split
    n = len(scored.pairs)
    if n_labelled := len(_labelled(scored.pairs)):
        if n_labelled < n:
            yield f"{n - n_labelled} captions of {split} have no original: scores against originals are of the others."
    else:
        yield f"{run.name} has no originals for {split}: scores against them are not computed."
    if scored.missing:
        yield f"{scored.missing} pictures of {split} are not captioned by {run.name}: these scores are of the others."
    if n + scored.missing < n_images:
        yield f"{run.name} was enqueued with {n + scored.missing} of the {n_images} pictures of {split}."
    for name in filter(None, (run.recipe.adapter, run.recipe.model)):
        trained = _training(Path(name) / TRAINING)
        if trained.get("dataset") == run.dataset and split in (trained.get("splits") or ()):
            yield (
                f"{name} was trained on {split} of this data set: the scores of {run.name} there say how well "
                "it remembers. Evaluate a split that it has not seen."
            )


def _training(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # absent, or not ours
        return {}


# --- What is written -------------------------------------------------------------------------------------------


def default_path(evaluation: Evaluation, kind: str, suffix: str) -> Path:
    """`results_medical/scores_test_a+b.parquet`: what was evaluated stands in the name, but for many runs."""
    splits = dict.fromkeys(one.split for one in evaluation.scored)
    runs = list(dict.fromkeys(one.run.name for one in evaluation.scored))
    named = "+".join(runs)
    if len(named.encode()) > LONGEST_NAME:
        named = f"{len(runs)}-runs-{_digest(*runs)}"
    return FOLDER / f"{kind}_{'_'.join(splits)}_{named}{suffix}"


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """Everything but the captions, and what made the numbers: what --json prints."""
    computed = {name for one in evaluation.scored for name in _by_caption(one)}
    packages = dict.fromkeys(
        name for metric in METRICS if computed.intersection(metric.scores) for name in metric.packages
    )
    return {
        "rococap": __version__,
        "packages": {name: _version(name) for name in packages},
        "concepts": concepts.DIGEST,
        "resamples": RESAMPLES,
        "seed": SEED,
        **stripped(evaluation.strip_reasoning),
        "runs": [_run_json(one) for one in evaluation.scored],
        "paired": [
            {"split": one.split, "runs": list(one.runs), "n": one.n, "differences": one.differences, "p": one.p}
            for one in evaluation.paired
        ],
    }


def _run_json(scored: Scored) -> dict[str, Any]:
    of = {name: summarise(scored, name) for name, _ in Counter(scored.modalities).most_common()}
    overall = summarise(scored)
    return {
        "run": scored.run.name,
        "model": scored.run.recipe.model,
        "recipe_hash": scored.run.recipe.hash,
        "dataset": scored.run.dataset,
        "split": scored.split,
        "n": overall.n,
        "missing": scored.missing,
        "metrics": overall.metrics,
        "intervals": overall.intervals,
        "not_computed": scored.not_computed,
        "by_modality": {
            name: {"n": one.n, "metrics": one.metrics, "intervals": one.intervals} for name, one in of.items()
        },
        "warnings": scored.warnings,
    }


TEXTS = ("run", "split", "image_id", "modality", "original_caption", "generated_caption", "flags")


def write(evaluation: Evaluation, path: Path, told: dict[str, Any]) -> int:
    """One row a run and picture, to a .parquet, .csv or .jsonl file; returns how many. What `to_json` told goes beside
    it. BLEU of one caption has no smoothing: it is 0 unless n-grams of each length match.
    """
    scored = evaluation.scored
    names = dict.fromkeys(name for one in scored for name in _by_caption(one))
    schema = pa.schema([*((name, pa.string()) for name in TEXTS), *((name, pa.float64()) for name in names)])
    with replacing(path) as partial:
        pages = chain.from_iterable(_frames(one) for one in scored)
        rows = write_frames((page.reindex(columns=schema.names) for page in pages), partial, ending(path), schema)
        manifest_path(path).unlink(
            missing_ok=True
        )  # killed before the next line, the file has none rather than another's
    write_json(manifest_path(path), told)
    return rows


def _frames(scored: Scored) -> Iterator[pd.DataFrame]:
    """A row a caption, a page at a time: TEXTS and the scores."""
    scores = _by_caption(scored)
    for start in range(0, len(scored.pairs), PAGE):
        page = slice(start, start + PAGE)
        rows = [
            (scored.run.name, scored.split, pair.image_id, modality, pair.reference, pair.text, pair.flags)
            for pair, modality in zip(scored.pairs[page], scored.modalities[page], strict=True)
        ]
        texts = pd.DataFrame(rows, columns=list(TEXTS), dtype=object)
        yield texts.assign(**{name: value[page] for name, value in scores.items()})


def _by_caption(scored: Scored) -> dict[str, Vector]:
    counted: dict[str, Vector] = {}
    for kind, counts in scored.counts.items():
        names, _ = COUNTED[kind]
        counted |= zip(names, _of_counts(kind, counts).T, strict=True)
    return counted | {name: value for name, value in scored.values.items() if name != "flagged"}
