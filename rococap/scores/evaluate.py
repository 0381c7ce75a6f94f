"""Scores generated captions against the originals, by run, split and modality.

Each score is computed once and stored with its caption, together with a digest of everything that it depends on; a
missing or stale score is computed again. Corpus scores, confidence intervals and significance tests are computed from
sums over captions, and thus from the stored values. The scores themselves are in `metrics`, `concepts` and
`facts`.
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
from rococap.figures import counted
from rococap.files import ending, replacing, write_json
from rococap.progress import Progress, silent, with_label
from rococap.queue import Run, find_runs
from rococap.results import formats
from rococap.results.export import FOLDER
from rococap.results.formats import write_frames
from rococap.results.manifest import TRAINING, manifest_path, stripped
from rococap.results.snapshot import PAGE, Read, done_pages, finished_until, short_reads
from rococap.results.texts import MACHINE, Kind, Texts, texts_now
from rococap.scores import concepts, facts, imageclef, leaks, metrics
from rococap.scores.facts.language import is_english
from rococap.scores.metrics import ORDERS, Vector

BLEUS = tuple(f"bleu_{order}" for order in range(1, ORDERS + 1))
BY_MODALITY = ("bleu_4", "rouge_l", "meteor_nltk", "cider_d", "concept_f1")
"""Scores that are shown for each modality."""
RESAMPLES = 1_000
SEED = 20_411  # fixed, so that intervals and tests are reproducible
STORE = 500  # captions whose scores are stored in one transaction: no more are lost if the process is killed
LONGEST_NAME = 150  # bytes of a file name that run names may take; file systems limit the whole name to 255
NO_ORIGINALS = "There are no originals: the data set has no captions for these pictures."
NO_FACTS = "Neither the captions nor the originals state such a fact."
NO_CONCEPTS = "There are no originals and no concepts: the data set has neither for these pictures."

Matrix = npt.NDArray[np.float64]


class NotComputed(RococapError):
    """A score cannot be computed here; the message says why, and what to do about it."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A generated caption (`text`, `flags`) and its reference: the original caption and the picture's concepts."""

    job_id: int
    image_id: str
    reference: str
    cui: str
    text: str
    flags: str


# --- Kinds of scores -------------------------------------------------------------------------------------------

Scores = dict[str, Any]
"""The scores of one caption: name -> number, None if undefined; for a name in COUNTED, a list of counts; for one in
FACTS, counts of agreeing, invented, missed and opposite facts, None if a text could not be read.
"""
FACTS = {f"fact_{kind}": kind for kind in facts.KINDS}
"""The names of the fact scores, each with its kind of facts."""
COUNTS = ("agreeing", "invented", "missed", "opposite")


def _bleus_and_length_ratio(counts: Matrix) -> Matrix:
    return np.concatenate([metrics.bleu(counts), _ratio(counts[..., -2], counts[..., -1])[..., None]], axis=-1)


def _ratio(part: Vector, whole: Vector) -> Vector:
    ratio: Vector = np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)
    return ratio


COUNTED: dict[str, tuple[tuple[str, ...], Callable[[Matrix], Matrix]]] = {
    "bleu": ((*BLEUS, "length_ratio"), _bleus_and_length_ratio),
    "meteor_1_5": (("meteor_1_5",), metrics.meteor_1_5),
}
"""Corpus scores that are not means over captions: kind -> their names, and the function that computes them from summed
counts.
"""


def _of_counts(kind: str, counts: Matrix) -> Matrix:
    """The scores of this kind, shape (..., names); NaN where all counts are 0, since there is no original."""
    _, score = COUNTED[kind]
    scores: Matrix = np.where(np.any(counts, axis=-1, keepdims=True), score(counts), np.nan)
    return scores


@dataclass(frozen=True, slots=True)
class Metric:
    """A way of computing one or several scores.

    `score` takes all pairs and the indices of those to be scored, and yields a Scores for each, or raises NotComputed.
    The numbers depend on the versions of `packages` and on `edition`, which changes with rococap's own code. An
    `of_corpus` metric also depends on all references of the evaluation. An `extra` metric takes long or needs a package
    that rococap does not install, and is computed only on request. The scores `of_concepts` need no original.
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
        """For each pair, a digest of everything that its score depends on."""
        shared = " ".join([self.name, self.edition, *(f"{name} {_version(name)}" for name in self.packages)])
        if self.of_corpus:
            shared += _digest(*sorted(pair.reference for pair in pairs))
        return [_digest(shared, pair.text, pair.reference, pair.cui) for pair in pairs]


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
        raise NotComputed("It weights words by their rarity, which needs at least two captions.")
    references = [[metrics.tokens(pair.reference)] for pair in pairs]
    scores = metrics.cider_d([metrics.tokens(pair.text) for pair in pairs], references)
    for at in wanted:
        yield {"cider_d": float(scores[at])}


def _concepts(pairs: Sequence[Pair], wanted: Sequence[int]) -> Iterator[Scores]:
    """Scores the caption's concepts, and those of the original caption, against the picture's curated concepts."""
    for at in wanted:
        found, reference = concepts.found(pairs[at].text), concepts.curated(concepts.parse(pairs[at].cui))
        yield {
            "concept_f1": concepts.f1(found, reference),
            "concept_recall": concepts.recall(found, reference),
            "concept_f1_ref": concepts.f1(concepts.found(pairs[at].reference), reference),
        }


def _facts(pairs: Sequence[Pair], wanted: Sequence[int]) -> Iterator[Scores]:
    if not any(is_english(pair.text) and is_english(pair.reference) for pair in pairs):
        raise NotComputed(
            f"Facts are read from English texts, and in none of the {len(pairs)} pairs are both in English."
        )
    for at in wanted:
        caption, reference = facts.facts_of(pairs[at].text), facts.facts_of(pairs[at].reference)
        if caption is None or reference is None:
            yield dict.fromkeys(FACTS)
        else:
            found = facts.agreements(caption, reference)
            yield {name: found[kind].counts for name, kind in FACTS.items()}


def _bertscore(pairs: Sequence[Pair], wanted: Sequence[int]) -> Iterator[Scores]:
    references = [formats.fold(pair.reference) for pair in pairs]
    texts = [(formats.fold(pairs[at].text), references[at]) for at in wanted]
    try:
        for score in metrics.bertscore(texts, references):
            yield {"bertscore_f1": score}
    except ImportError as error:
        raise NotComputed(f"It needs bert-score ({error}): pip install 'rococap[bertscore]'") from error
    except OSError as error:
        raise NotComputed(f"Its model {metrics.BERT} is not in the cache and cannot be downloaded: {error}") from error


def _meteor_1_5(pairs: Sequence[Pair], wanted: Sequence[int]) -> Iterator[Scores]:
    words = ((metrics.tokens(pairs[at].text), metrics.tokens(pairs[at].reference)) for at in wanted)
    try:
        for counts in metrics.meteor_1_5_statistics(words):
            yield {"meteor_1_5": counts}
    except ImportError as error:
        raise NotComputed(f"It needs pycocoevalcap ({error}): pip install 'rococap[coco]'") from error
    except OSError as error:
        raise NotComputed(f"It needs a working Java ({error}): apt-get install default-jre-headless") from error


METRICS = (
    Metric(
        "overlap",
        (*BLEUS, "rouge_1", "rouge_l", "rouge_l_coco", "rouge1_imageclef"),
        _overlap,
        ("sacrebleu", "rouge-score"),
    ),
    Metric("meteor_nltk", ("meteor_nltk",), _meteor, ("nltk",)),
    Metric("cider_d", ("cider_d",), _cider_d, of_corpus=True),
    Metric("facts", tuple(FACTS), _facts, edition=facts.DIGEST),
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

# --- Stored scores ---------------------------------------------------------------------------------------------

Kept = dict[tuple[int, str], tuple[str, str]]
"""(job id, name of the metric) -> digest, and scores as JSON."""


_PAIR = "j.image_id, j.id, i.image_id, i.caption, i.cui, c.text, c.flags"


def _read(
    read: Read, run: Run, split: str, cutoff: int, texts: Texts, *, strip_reasoning: bool
) -> tuple[list[Pair], Kept]:
    pairs: list[Pair] = []
    kept: Kept = {}
    for rows in done_pages(read, run, split, cutoff, _PAIR, texts=texts, strip_reasoning=strip_reasoning):
        page = [Pair(*row[1:]) for row in rows]
        pairs += page
        sql = "SELECT job_id, metric, digest, value FROM scores WHERE job_id IN ({})".format(", ".join("?" * len(page)))
        with read() as conn:
            found = execute(conn, sql, tuple(pair.job_id for pair in page)).fetchall()
        kept |= {(job_id, metric): (digest, value) for job_id, metric, digest, value in found}
    return pairs, kept


def _scores(
    database: Database,
    metric: Metric,
    pairs: Sequence[Pair],
    kept: Kept,
    texts: Texts,
    requested: bool,
    progress: Progress,
) -> list[Scores]:
    """The scores of each pair: stored ones where they are up to date, else computed and stored. Raises NotComputed."""
    digests = metric.digests(pairs)
    key = _key(metric, texts)
    found = [kept.get((pair.job_id, key), ("", "")) for pair in pairs]
    is_fresh = [known == digest for (known, _), digest in zip(found, digests, strict=True)]
    # Parsed as one JSON list, which takes half the time.
    values = ",".join(value if fresh else "{}" for (_, value), fresh in zip(found, is_fresh, strict=True))
    scores: list[Scores] = json.loads(f"[{values}]")
    stale = [at for at, fresh in enumerate(is_fresh) if not fresh]
    if metric.extra and stale and not requested:
        raise NotComputed(f"Not all captions are scored yet: --also {metric.name}")
    computed = zip(stale, metric.score(pairs, stale), strict=True) if stale else iter(())
    done = 0
    while batch := list(islice(computed, STORE)):
        _keep(database, key, [(pairs[at].job_id, digests[at], score) for at, score in batch])
        for at, score in batch:
            scores[at] = score
        done += len(batch)
        progress(metric.name, done, len(stale))
    return scores


def _key(metric: Metric, texts: Texts) -> str:
    """The name under which scores are stored: those of edited texts beside those of the machine's."""
    return metric.name if texts.kind == "machine" else f"{texts.kind}:{metric.name}"


def _keep(database: Database, key: str, rows: Sequence[tuple[int, str, Scores]]) -> None:
    """Stores scores, in the order of the images: every evaluation locks rows in this order, so that two at once cannot
    deadlock.
    """
    sql = (
        "INSERT INTO scores (job_id, metric, digest, value) VALUES (?, ?, ?, ?) ON CONFLICT (job_id, metric) "
        "DO UPDATE SET digest = excluded.digest, value = excluded.value"
    )
    with transaction(database, write=True) as conn:
        execute(conn, sql, [(job_id, key, digest, json.dumps(one)) for job_id, digest, one in rows])


# --- Sums ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Computed:
    """Pairs with their scores.

    `counts` maps each kind in COUNTED to its counts, shape (pairs, counts); `values` every other score to its values,
    shape (pairs,), NaN where undefined. `facts` maps each score in FACTS to its COUNTS, shape (pairs, 4), NaN where a
    text could not be read or there is no original. `not_computed` maps a score to the reason why there is none.
    """

    pairs: list[Pair]
    counts: dict[str, Matrix] = field(default_factory=dict)
    values: dict[str, Vector] = field(default_factory=dict)
    not_computed: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Matrix] = field(default_factory=dict)

    def statistics(self) -> Matrix:
        """One row per caption, shape (captions, columns): all counts, and for every other score its value and whether
        it is defined. `totals` turns the sums over any set of captions into the scores of that set.
        """
        values = [column for value in self.values.values() for column in (np.nan_to_num(value), ~np.isnan(value))]
        return np.column_stack([*self.counts.values(), *values]).astype(np.float64)

    def totals(self, sums: Matrix) -> dict[str, Vector]:
        """Scores from sums of `statistics`, shape (..., columns) -> (...); NaN where no caption has the score."""
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


def compute(metrics: Sequence[Metric], pairs: list[Pair], rows: Sequence[int], progress: Progress = silent) -> Computed:
    """Scores the pairs in these rows, without storing anything; the scores of other rows are undefined."""
    computed = Computed(pairs)
    for done, metric in enumerate(metrics):
        progress("scoring", done, len(metrics))
        try:
            _add(computed, list(metric.score(pairs, rows)), rows)
        except NotComputed as reason:
            computed.not_computed |= dict.fromkeys(metric.scores, str(reason))
    progress("scoring", len(metrics), len(metrics))
    return computed


@dataclass(slots=True, kw_only=True)
class Scored(Computed):
    """The captions of one run and split, with their scores.

    `missing` counts the jobs of the split that are not done. `duplicates` says which pictures have near-duplicates in
    other splits; None if no pictures of the split or of any other were hashed.
    """

    run: Run
    split: str
    modalities: list[str]
    missing: int = 0
    warnings: list[str] = field(default_factory=list)
    duplicates: leaks.Known | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """Scores of n captions: overall values and their 95 % bootstrap intervals, None where undefined."""

    n: int
    metrics: dict[str, float | None]
    intervals: dict[str, tuple[float, float] | None]


def summarise(scored: Scored, modality: str | None = None) -> Summary:
    """Summarises the scores of all captions, or of those of one modality.

    Intervals are from the percentile bootstrap over captions (Efron and Tibshirani, 1993). A single caption has none.
    """
    statistics = scored.statistics()
    if modality is not None:
        statistics = statistics[np.array(scored.modalities) == modality]
    n = len(statistics)
    overall, resampled = scored.totals(statistics.sum(axis=0)), scored.totals(resampled_sums(statistics))
    return Summary(
        n,
        {name: _number(value) for name, value in overall.items()},
        {name: interval(resampled[name]) if n > 1 else None for name in overall},
    )


def resampled_sums(statistics: Matrix) -> Matrix:
    """Sums of as many rows as there are, drawn with replacement: shape (rows, columns) -> (RESAMPLES, columns)."""
    n = len(statistics)
    rng = np.random.default_rng(SEED)
    return np.array([np.bincount(rng.integers(n, size=n), minlength=n) @ statistics for _ in range(RESAMPLES)])


def interval(values: Vector) -> tuple[float, float] | None:
    """The 95 % interval of resampled scores; None if they are undefined."""
    known = values[~np.isnan(values)]
    low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (np.nan, np.nan)
    return None if np.isnan(low) else (float(low), float(high))


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


@dataclass(frozen=True, slots=True)
class WithoutNear:
    """The summary of the captions whose pictures have no near-duplicate in another split.

    `left_out` counts the others. `not_hashed` counts pictures that were never looked at, and are not left out.
    """

    left_out: int
    not_hashed: int
    summary: Summary


def without_near_duplicates(scored: Scored, overall: Summary) -> WithoutNear | None:
    """None while it is not known which pictures have near-duplicates. `overall` summarises all captions."""
    known = scored.duplicates
    if known is None:
        return None
    kept = np.array([pair.image_id not in known.near for pair in scored.pairs])
    not_hashed = sum(pair.image_id not in known.hashed for pair in scored.pairs)
    left_out = len(kept) - int(kept.sum())
    if not left_out:
        summary = overall
    elif left_out == len(kept):
        summary = Summary(0, {}, {})
    else:
        summary = summarise(_only(scored, np.flatnonzero(kept), scored, is_part=True))
    return WithoutNear(left_out, not_hashed, summary)


@dataclass(frozen=True, slots=True)
class Paired:
    """Two runs compared on the `n` pictures that both captioned.

    `differences` are the scores of the second run minus those of the first. `p` is the probability of a difference at
    least as large if captions are swapped between the runs at random.
    """

    split: str
    runs: tuple[str, str]
    n: int
    differences: dict[str, float | None]
    p: dict[str, float | None]


def pair_up(one: Scored, other: Scored) -> Paired:
    """Compares two runs by a two-sided approximate randomisation test (Noreen, 1989; Riezler and Maxwell, 2005).

    Only scores that both runs have are compared. A score that depends on all references is computed again over the
    shared pictures, or left out where that would take long.
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
    """The captions in these rows, with the scores that `like` also has."""
    counts = {name: value[rows] for name, value in scored.counts.items() if name in like.counts}
    values = {name: value[rows] for name, value in scored.values.items() if name in like.values}
    pairs = [scored.pairs[at] for at in rows]
    part = Scored(pairs, counts, values, run=scored.run, split=scored.split, modalities=[])
    for metric in METRICS if is_part else ():
        if metric.of_corpus and metric.name in values:
            del values[metric.name]
            labelled = _labelled(part.pairs)
            if not metric.extra and len(labelled) > 1:
                _add(part, list(metric.score([part.pairs[at] for at in labelled], range(len(labelled)))), labelled)
    for name in imageclef.PARTS:
        if imageclef.missing(name, values):
            values.pop(name, None)
    return part


def _p(difference: float | None, trials: Vector) -> float | None:
    if difference is None:
        return None
    # The tolerance is for rounding: a trial that swaps everything adds the same numbers in another order.
    as_large = np.count_nonzero(np.abs(trials) >= abs(difference) - 1e-12)
    return float(as_large + 1) / (len(trials) + 1)


# --- Evaluating ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The scored runs, split by split, and the comparison of every further run with the first."""

    scored: list[Scored]
    paired: list[Paired]
    strip_reasoning: bool = False
    texts: Texts = MACHINE
    plugins: Sequence[Metric] = ()


def evaluate(
    database: Database,
    names: Sequence[str],
    splits: Sequence[str],
    *,
    also: Sequence[str] = (),
    plugins: Sequence[Metric] = (),
    as_imageclef: bool = False,
    captions: Kind = "machine",
    strip_reasoning: bool = False,
    progress: Progress = silent,
) -> Evaluation:
    """Scores what the runs have captioned of the splits so far. Without `names`, scores the default or the only run.

    `captions`: the machine's texts, or "edited", with the edits of readers; both keep scores of their own. `also` names
    the extra metrics to compute, `plugins` are further ones, and `as_imageclef` adds ImageCLEF's combined scores;
    `strip_reasoning` removes a model's reasoning from the captions first.

    Raises RunError for runs that do not exist, are of different data sets, or have captioned nothing of the splits.
    """
    with transaction(database) as conn:
        runs = find_runs(conn, names or [queue.find_run(conn, None).name])
        counts = {(run.name, one.split): one for run in runs for one in queue.counts_of(conn, run, splits)}
        n_images = _images(conn, runs[0])
        cutoff = finished_until(conn, runs, splits)
        texts = texts_now(conn, captions)
    scored = []
    for run in runs:
        captioned = [split for split in splits if (run.name, split) in counts and counts[run.name, split].done]
        if not captioned:
            raise RunError(
                f"Run {run.name!r} captioned nothing of {', '.join(splits)} yet. "
                f"Caption pictures: rococap worker --run {run.name}"
            )
        for split in captioned:
            result = _evaluate(
                database, run, split, cutoff, texts, also, plugins, as_imageclef, strip_reasoning, progress
            )
            result.missing = counts[run.name, split].total - len(result.pairs)
            result.warnings = list(_warnings(result, n_images[split]))
            scored.append(result)
    _add_duplicates(database, scored)
    by_split = [[result for result in scored if result.split == split] for split in splits]
    paired = [pair_up(results[0], other) for results in by_split for other in results[1:]]
    return Evaluation(list(chain.from_iterable(by_split)), paired, strip_reasoning, texts, plugins)


def _add_duplicates(database: Database, scored: Sequence[Scored]) -> None:
    by_frame: dict[int, list[Scored]] = {}
    for one in scored:
        by_frame.setdefault(one.run.recipe.frame, []).append(one)
    for of_frame in by_frame.values():
        known = leaks.known(database, of_frame[0].run, list(dict.fromkeys(one.split for one in of_frame)))
        for one in of_frame:
            one.duplicates = known.get(one.split)


def _images(conn: Connection, run: Run) -> dict[str, int]:
    """The number of pictures in each split of the run's data set."""
    sql = "SELECT split, count(*) FROM images WHERE dataset_id = ? GROUP BY split"
    return dict(map(tuple, execute(conn, sql, (run.dataset_id,))))


def _evaluate(
    database: Database,
    run: Run,
    split: str,
    cutoff: int,
    texts: Texts,
    also: Sequence[str],
    plugins: Sequence[Metric],
    as_imageclef: bool,
    strip_reasoning: bool,
    progress: Progress,
) -> Scored:
    with short_reads(database) as read:
        pairs, kept = _read(read, run, split, cutoff, texts, strip_reasoning=strip_reasoning)
    modalities = [concepts.modality(concepts.parse(pair.cui)) for pair in pairs]
    scored = Scored(pairs, run=run, split=split, modalities=modalities)

    labelled_progress = with_label(progress, f"{run.name}, {split}")
    was_computed = {key for _, key in kept}
    labelled = _labelled(pairs)
    for metric in (*METRICS, *plugins):
        if metric.extra and metric.name not in also and _key(metric, texts) not in was_computed:
            continue
        rows = range(len(pairs)) if metric.of_concepts else labelled
        scored.not_computed |= _unavailable(metric, pairs, labelled)
        if scored.not_computed.keys() >= set(metric.scores):
            continue
        try:
            scores = _scores(
                *(database, metric, [pairs[at] for at in rows], kept, texts),
                requested=metric.name in also,
                progress=labelled_progress,
            )
            _add(scored, scores, rows)
        except NotComputed as reason:
            scored.not_computed |= dict.fromkeys(metric.scores, str(reason))
    _drop_unlabelled(scored, labelled)
    if as_imageclef:
        _add_imageclef(scored, labelled)
    scored.values["flagged"] = np.array([float(bool(pair.flags)) for pair in pairs])
    return scored


def _labelled(pairs: Sequence[Pair]) -> list[int]:
    """The indices of the pairs that have an original caption."""
    return [at for at, pair in enumerate(pairs) if pair.reference.strip()]


def _unavailable(metric: Metric, pairs: Sequence[Pair], labelled: Sequence[int]) -> dict[str, str]:
    """The scores of a metric that cannot be computed for lack of originals or concepts, with the reason."""
    if labelled:
        return {}
    if metric.of_concepts and not any(pair.cui for pair in pairs):
        return dict.fromkeys(metric.scores, NO_CONCEPTS)
    return {name: NO_ORIGINALS for name in metric.scores if name not in metric.of_concepts}


def _drop_unlabelled(scored: Scored, labelled: Sequence[int]) -> None:
    """Removes the scores of original captions where there are none: metrics of concepts run on all captions."""
    for metric in METRICS:
        for name in metric.scores if metric.of_concepts else ():
            if name in scored.not_computed:
                scored.values.pop(name, None)
            elif name not in metric.of_concepts and name in scored.values:
                scored.values[name][np.setdiff1d(np.arange(len(scored.pairs)), labelled)] = np.nan


def _add_imageclef(scored: Scored, labelled: Sequence[int]) -> None:
    complete = {name: values for name, values in scored.values.items() if not np.isnan(values[labelled]).any()}
    scored.values |= imageclef.combine(complete)
    for name in imageclef.PARTS:
        if parts := imageclef.missing(name, complete):
            scored.not_computed[name] = imageclef.why_not(parts)


def _add(scored: Computed, scores: Sequence[Scores], rows: Sequence[int]) -> None:
    """Adds the scores of the captions in these rows; the other captions have none.

    Raises NotComputed if some have scores of other names: a plug-in may do anything.
    """
    names = scores[0].keys()
    if any(score.keys() != names for score in scores):
        raise NotComputed(f"It returned other names than {', '.join(names)} for some captions.")
    for name in names:
        if name in FACTS:
            _add_facts(scored, name, [score[name] for score in scores], rows)
            continue
        known = np.array([score[name] for score in scores], dtype=np.float64)
        column = np.full((len(scored.pairs), *known.shape[1:]), 0.0 if name in COUNTED else np.nan)
        column[list(rows)] = known
        if name in COUNTED:
            scored.counts[name] = column
        else:
            scored.values[name] = column


def _add_facts(scored: Computed, name: str, counts: Sequence[Sequence[int] | None], rows: Sequence[int]) -> None:
    known = np.full((len(scored.pairs), len(COUNTS)), np.nan)
    known[list(rows)] = [(np.nan,) * len(COUNTS) if one is None else one for one in counts]
    scored.facts[name] = known
    if np.nansum(known):
        scored.values[name] = facts.f1(known)
    else:
        scored.not_computed[name] = NO_FACTS


def _warnings(scored: Scored, n_images: int) -> Iterator[str]:
    run, split = scored.run, scored.split
    n = len(scored.pairs)
    if n_labelled := len(_labelled(scored.pairs)):
        if n_labelled < n:
            yield f"{n - n_labelled} captions of {split} have no original: scores against originals leave them out."
    else:
        yield f"{run.name} has no originals for {split}: scores against originals are not computed."
    if unread := _not_read(scored):
        yield (
            f"{unread} of {n} captions of {run.name} for {split} ({unread / n:.0%}) or their originals are not in "
            "English: no facts are read from them, and the fact scores leave them out."
        )
    if scored.missing:
        missing = counted(scored.missing, "picture")
        yield f"{run.name} has not captioned {missing} of {split}: the scores leave them out."
    if n + scored.missing < n_images:
        yield f"{run.name} was enqueued with only {n + scored.missing} of the {n_images} pictures of {split}."
    for name in filter(None, (run.recipe.adapter, run.recipe.model)):
        trained = _training(Path(name) / TRAINING)
        if trained.get("dataset") == run.dataset and split in (trained.get("splits") or ()):
            yield (
                f"{name} was trained on {split} of this data set: the scores of {run.name} on it measure memorisation. "
                "Evaluate a split that it was not trained on."
            )


def _not_read(scored: Scored) -> int:
    """The number of captions with an original that no facts were read from."""
    labelled = _labelled(scored.pairs)
    return max((int(np.isnan(counts[labelled, 0]).sum()) for counts in scored.facts.values()), default=0)


def _training(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # absent, or written by another program
        return {}


# --- Output ----------------------------------------------------------------------------------------------------


def default_path(evaluation: Evaluation, kind: str, suffix: str) -> Path:
    """A path like `results_medical/scores_test_a+b.parquet`; a digest replaces run names that are too long together."""
    splits = dict.fromkeys(one.split for one in evaluation.scored)
    runs = list(dict.fromkeys(one.run.name for one in evaluation.scored))
    named = "+".join(runs)
    if len(named.encode()) > LONGEST_NAME:
        named = f"{len(runs)}-runs-{_digest(*runs)}"
    return FOLDER / f"{kind}_{'_'.join(splits)}_{named}{suffix}"


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """The object that --json prints: all results except those of single captions, and what they were computed with."""
    computed = {name for one in evaluation.scored for name in _by_caption(one)}
    packages = dict.fromkeys(
        name for metric in METRICS if computed.intersection(metric.scores) for name in metric.packages
    )
    return {
        "rococap": __version__,
        "packages": {name: _version(name) for name in packages},
        **({"plugins": {one.name: one.edition for one in evaluation.plugins}} if evaluation.plugins else {}),
        "concepts": concepts.DIGEST,
        "facts": facts.DIGEST,
        "resamples": RESAMPLES,
        "seed": SEED,
        **stripped(evaluation.strip_reasoning),
        **({} if evaluation.texts.kind == "machine" else {"captions": evaluation.texts.kind}),
        "runs": [_run_json(one) for one in evaluation.scored],
        "paired": [
            {"split": one.split, "runs": list(one.runs), "n": one.n, "differences": one.differences, "p": one.p}
            for one in evaluation.paired
        ],
    }


def _run_json(scored: Scored) -> dict[str, Any]:
    by_modality = {name: summarise(scored, name) for name, _ in Counter(scored.modalities).most_common()}
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
        "without_near_duplicates": _without_json(without_near_duplicates(scored, overall)),
        "not_computed": scored.not_computed,
        "facts": facts_json(scored),
        "by_modality": {
            name: {
                "n": summary.n,
                "metrics": summary.metrics,
                "intervals": summary.intervals,
                "facts": facts_json(scored, name),
            }
            for name, summary in by_modality.items()
        },
        "warnings": scored.warnings,
    }


def facts_json(scored: Scored, modality: str | None = None) -> dict[str, dict[str, int]]:
    """For each fact score, the number `n` of pairs in which at least one text has such a fact, and the facts by COUNTS;
    of all captions, or of those of one modality.
    """
    rows = np.ones(len(scored.pairs), dtype=bool) if modality is None else np.array(scored.modalities) == modality
    return {
        name: {
            "n": int(np.count_nonzero(np.nansum(counts[rows], axis=1))),
            **dict(zip(COUNTS, map(int, np.nansum(counts[rows], axis=0)), strict=True)),
        }
        for name, counts in scored.facts.items()
    }


def _without_json(without: WithoutNear | None) -> dict[str, Any] | None:
    if without is None:
        return None
    summary = without.summary
    return {
        "n": summary.n,
        "left_out": without.left_out,
        "not_hashed": without.not_hashed,
        "metrics": summary.metrics,
        "intervals": summary.intervals,
    }


TEXTS = ("run", "split", "image_id", "modality", "original_caption", "generated_caption", "flags")


def write(evaluation: Evaluation, path: Path, results: dict[str, Any]) -> int:
    """Writes one row per run and picture to a .parquet, .csv or .jsonl file; returns the number of rows.

    `results`, the object from `to_json`, is written beside it as the manifest. The BLEU score of a single caption is
    not smoothed: it is 0 unless n-grams of every length match.
    """
    scored = evaluation.scored
    names = dict.fromkeys(name for one in scored for name in _by_caption(one))
    schema = pa.schema([*((name, pa.string()) for name in TEXTS), *((name, pa.float64()) for name in names)])
    with replacing(path) as partial:
        pages = chain.from_iterable(_frames(one) for one in scored)
        rows = write_frames((page.reindex(columns=schema.names) for page in pages), partial, ending(path), schema)
        # If the process is killed before the new manifest is written, no manifest is better than the old file's.
        manifest_path(path).unlink(missing_ok=True)
    write_json(manifest_path(path), results)
    return rows


def _frames(scored: Scored) -> Iterator[pd.DataFrame]:
    """Frames of one page of captions each, with the columns TEXTS and the scores."""
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
    """The scores of single captions, name -> shape (captions,)."""
    counted: dict[str, Vector] = {}
    for kind, counts in scored.counts.items():
        names, _ = COUNTED[kind]
        counted |= zip(names, _of_counts(kind, counts).T, strict=True)
    of_facts = {
        f"{name}_{what}": values
        for name, counts in scored.facts.items()
        for what, values in zip(COUNTS, counts.T, strict=True)
    }
    return counted | {name: value for name, value in scored.values.items() if name != "flagged"} | of_facts
