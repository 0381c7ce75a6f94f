"""Measures this machine on a run's model and pictures: reading, preparing, captioning at several batch sizes, and the
whole worker.

Only reads the queue. The whole worker is measured on a queue of its own, in a temporary folder.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from rococap import __version__, db, queue
from rococap.data import SPLITS, Dataset, Place
from rococap.db import execute, transaction
from rococap.engines import Engine, Options, Prepared, load_engine
from rococap.errors import RococapError
from rococap.files import replacing
from rococap.progress import Progress, silent
from rococap.queue import Counts, Run, choose_run
from rococap.queue.enqueue import enqueue
from rococap.recipe import Recipe
from rococap.worker import dry_run
from rococap.worker.dry_run import Read, from_memory, prepare
from rococap.worker.fetcher import n_preparers
from rococap.worker.process import work
from rococap.worker.settings import Settings
from rococap.worker.store import Outcome

log = logging.getLogger(__name__)

CLOSE = 0.95
"""A batch size that reaches this share of the fastest rate is as good, and takes less memory."""
EFFICIENT = 0.9
"""A worker that reaches this share of the model's own rate needs no advice."""
ENOUGH_BATCHES = 4
"""With fewer batches, waiting for the first pictures is a large part of the worker's time."""
SMALL_SHARE = 0.05
"""Reading and preparing explain a slow worker only if they take at least this share of the model's time."""


@dataclass(frozen=True, slots=True)
class Rate:
    """The speed of the model alone, on pictures that are prepared in advance."""

    batch_size: int
    pictures_per_sec: float
    tokens_per_sec: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """Hours at the whole worker's rate, for all of the run's pictures in the split and for the unfinished ones."""

    split_hours: float
    unfinished_hours: float


@dataclass(frozen=True, slots=True)
class Measured:
    """The content of bench.json.

    `pictures` is how many were measured, and `failures` how many could not be read or prepared. `load_ms` (reading and
    decoding) and `prepare_ms` are milliseconds per picture on one thread. `efficiency` is the rate of the whole worker
    divided by that of the model alone, both at `automatic_batch_size`.
    """

    rococap: str
    engine: str
    versions: dict[str, str]
    model: str
    dtype: str
    device: str
    cpu_count: int
    run: str
    recipe_hash: str
    split: str
    split_pictures: int
    unfinished_pictures: int
    pictures: int
    failures: int
    load_ms: float
    prepare_ms: float
    automatic_batch_size: int
    batch_sizes: list[Rate]
    worker_pictures_per_sec: float
    efficiency: float
    estimate: Estimate
    recommendation: str


def measure(
    database: Database,
    options: Options,
    *,
    run_name: str | None = None,
    split: str | None = None,
    max_pictures: int = 64,
    sizes: Sequence[int] | None = None,
    progress: Progress = silent,
    load: Callable[[Recipe, Options], Engine] = load_engine,
) -> Measured:
    """Measures up to `max_pictures` pictures from one split of a run, by default the first split that the run has.

    `sizes` are batch sizes; None measures the powers of two up to the one that `options` resolve to, and that one.
    Raises RunError if there is nothing to measure, ModelError or DatasetError if the run's model or data set cannot be
    loaded, and RococapError if no picture is captioned.
    """
    with transaction(database) as conn:
        run = choose_run(conn, run_name, [split] if split else (), command="bench")
        counts = queue.counts_of(conn, run, [split] if split else SPLITS)[0]
        places = dry_run.places(conn, run, counts.split, max_pictures)
        offset = _offset(conn, run, places[0])
    if sizes is not None:
        _fitting(sizes, len(places))  # raises before the model is loaded in vain
    dataset = queue.dataset_of(database, run, [counts.split])
    progress("loading the model", 0, 1)
    engine = load(run.recipe, options)
    engine.load()
    progress("loading the model", 1, 1)
    try:
        return _measure(run, counts, dataset, places, offset, engine, sizes, progress)
    finally:
        engine.close()


def _offset(conn: Connection, run: Run, first: Place) -> int:
    """How many pictures the data set has before this one in its split."""
    n = execute(
        conn,
        "SELECT count(*) FROM images WHERE dataset_id = ? AND split = ? AND id < "
        "(SELECT id FROM images WHERE dataset_id = ? AND split = ? AND image_id = ?)",
        (run.dataset_id, first.split, run.dataset_id, first.split, first.image_id),
    ).scalar_one()
    return int(n)


def _measure(
    run: Run,
    counts: Counts,
    dataset: Dataset,
    places: Sequence[Place],
    offset: int,
    engine: Engine,
    sizes: Sequence[int] | None,
    progress: Progress,
) -> Measured:
    info, automatic = engine.info, engine.batch_size
    log.info("%s on %s (%s): the automatic batch size is %d", info.model, info.device, info.dtype, automatic)
    read = _read(engine, dataset.root, places, run.recipe.frame, progress)
    chosen = sizes_up_to(len(read.prepared), automatic) if sizes is None else _fitting(sizes, len(read.prepared))
    from_memory(engine, read.prepared[:1])  # warms up the device before anything is timed
    rates = _rates(engine, read.prepared, chosen, progress)
    alone = next((rate for rate in rates if rate.batch_size == automatic), None)
    if alone is None:
        alone = _rate(engine, read.prepared, automatic, progress)
    worker = _worker_rate(engine, dataset, run, counts.split, len(places), offset, progress)
    efficiency = worker / alone.pictures_per_sec
    costs = Costs(read.load_ms, read.prepare_ms, 1000 / alone.pictures_per_sec, n_preparers(info.device))
    return Measured(
        rococap=__version__,
        engine=info.name,
        versions=info.versions,
        model=info.model,
        dtype=info.dtype,
        device=info.device,
        cpu_count=os.cpu_count() or 1,
        run=run.name,
        recipe_hash=run.recipe.hash,
        split=counts.split,
        split_pictures=counts.total,
        unfinished_pictures=counts.unfinished,
        pictures=len(read.prepared),
        failures=len(read.errors),
        load_ms=read.load_ms,
        prepare_ms=read.prepare_ms,
        automatic_batch_size=automatic,
        batch_sizes=rates,
        worker_pictures_per_sec=worker,
        efficiency=efficiency,
        estimate=estimate(counts.total, counts.unfinished, worker),
        recommendation=recommend(rates, automatic, efficiency, costs, len(read.prepared)),
    )


# --- Reading ---------------------------------------------------------------------------------------------------


def _read(engine: Engine, root: Path, places: Sequence[Place], frame: int, progress: Progress) -> Read:
    """Raises RococapError if no picture can be read and prepared."""
    read = prepare(engine, root, places, frame, lambda done: progress("reading and preparing", done, len(places)))
    if not read.prepared:
        raise RococapError(f"None of the {len(places)} pictures can be measured. The first: {read.errors[0]}")
    log.info("reading a picture: %.1f ms, preparing it: %.1f ms", read.load_ms, read.prepare_ms)
    return read


# --- The model alone -------------------------------------------------------------------------------------------


def sizes_up_to(limit: int, automatic: int) -> list[int]:
    """Powers of two up to the automatic batch size, and that size itself; none above `limit`."""
    powers = (1 << n for n in range(automatic.bit_length()))
    return [size for size in sorted({*powers, automatic}) if size <= limit]


def _fitting(sizes: Iterable[int], n_pictures: int) -> list[int]:
    """The sizes that the pictures can fill, in order. Raises RococapError if there are none."""
    if fitting := sorted({size for size in sizes if size <= n_pictures}):
        return fitting
    raise RococapError(
        f"{n_pictures} pictures do not fill a batch of {min(sizes)}. Give a smaller --batch-size, or more --pictures."
    )


def _rates(engine: Engine, prepared: Sequence[Prepared], sizes: Sequence[int], progress: Progress) -> list[Rate]:
    """The rate at each size that fits into memory. Raises RococapError if none does."""
    rates = [_rate(engine, prepared, size, progress) for size in sizes]
    if fitting := [rate for rate, size in zip(rates, sizes, strict=True) if rate.batch_size == size]:
        return fitting
    raise RococapError(f"Out of memory with {min(sizes)} pictures at a time. Give a smaller --batch-size.")


def _rate(engine: Engine, prepared: Sequence[Prepared], size: int, progress: Progress) -> Rate:
    """The rate at a batch size, or at the smaller one that the engine fell back to when memory ran out.

    The engine's own batch size is restored. Raises RococapError if no picture is captioned.
    """
    before = engine.batch_size
    engine.batch_size = size
    try:
        seconds, completions = from_memory(
            engine, prepared, lambda done: progress(f"captioning, batch size {size}", done, len(prepared))
        )
        reached = engine.batch_size
    finally:
        engine.batch_size = before
    captions = [completion for completion in completions if completion.failure is None]
    if not captions:
        failure = completions[0].failure
        raise RococapError(f"The model captioned none of the pictures. The first: {failure and failure.message}")
    rate = Rate(reached, len(captions) / seconds, sum(caption.new_tokens for caption in captions) / seconds)
    log.info("batch size %d: %.3g pictures/s, %.3g tokens/s", reached, rate.pictures_per_sec, rate.tokens_per_sec)
    return rate


# --- The whole worker ------------------------------------------------------------------------------------------


class Ready:
    """Wraps an engine that is loaded already, and keeps it loaded."""

    def __init__(self, engine: Engine) -> None:
        self.info, self.batch_size = engine.info, engine.batch_size
        self.prepare, self.run = engine.prepare, engine.run

    def load(self) -> None: ...

    def close(self) -> None: ...


def _worker_rate(
    engine: Engine, dataset: Dataset, run: Run, split: str, n: int, offset: int, progress: Progress
) -> float:
    """Pictures per second from the first claim to the last stored caption, on a temporary queue."""
    with tempfile.TemporaryDirectory(prefix="rococap-bench-") as folder:
        database = db.connect(f"{folder}/queue.db", force=True)  # no other process opens it
        try:
            dataset = replace(dataset, columns=run.columns)
            enqueue(database, dataset, [split], run=run.name, recipe=run.recipe, limit=n, offset=offset)
            outcome = work(
                database,
                Settings(run=run.name, splits=[split], limit=n, self_check=False),
                lambda outcome, _: progress("the whole worker", outcome.done, n),
                lambda *_: Ready(engine),
                Path(folder) / "spool",
            )
        finally:
            database.dispose()
    return _rate_of(outcome)


def _rate_of(outcome: Outcome) -> float:
    if outcome.drained:
        raise KeyboardInterrupt
    if not outcome.done:
        raise RococapError("The whole worker captioned no picture. To find the reason: rococap doctor")
    log.info("the whole worker: %.3g pictures/s", outcome.done / outcome.seconds)
    return outcome.done / outcome.seconds


# --- Recommendations -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Costs:
    """Milliseconds per picture: reading and preparing on one of `threads` threads, captioning in full batches."""

    load_ms: float
    prepare_ms: float
    engine_ms: float
    threads: int = 1


def estimate(total: int, unfinished: int, pictures_per_sec: float) -> Estimate:
    """The hours for so many pictures at a rate."""
    return Estimate(total / pictures_per_sec / 3600, unfinished / pictures_per_sec / 3600)


def recommend(rates: Sequence[Rate], automatic: int, efficiency: float, costs: Costs, pictures: int) -> str:
    """Which batch size to use; and, if the worker is slower than the model alone, what limits it.

    `pictures` is how many were measured: too few do not show the reason.
    """
    sentences = [_recommend_size(rates, automatic)]
    if efficiency < EFFICIENT:
        sentences.append(_what_limits(efficiency, costs, pictures, ENOUGH_BATCHES * automatic))
    return " ".join(sentences)


def _recommend_size(rates: Sequence[Rate], automatic: int) -> str:
    best = max(rates, key=lambda rate: rate.pictures_per_sec)
    close = min(rate.batch_size for rate in rates if rate.pictures_per_sec >= CLOSE * best.pictures_per_sec)
    if automatic in (best.batch_size, close):
        return f"Leave --batch-size at auto, which is {automatic} here."
    if all(rate.batch_size != automatic for rate in rates):
        return f"Of the batch sizes measured, use --batch-size {close}; auto is {automatic}, which was not among them."
    return f"Use --batch-size {close}, the smallest within 5 % of the fastest."


def _what_limits(efficiency: float, costs: Costs, pictures: int, enough: int) -> str:
    reached = f"The whole worker reaches {100 * efficiency:.0f} % of the model's speed"
    if pictures < enough:
        return f"{reached}, but with so few pictures the start dominates: measure with --pictures {enough}."
    if (costs.load_ms + costs.prepare_ms) / costs.threads < SMALL_SHARE * costs.engine_ms:
        return f"{reached}, and neither reading nor preparing explains it: check what else is busy on this machine."
    what, ms = max(("reading", costs.load_ms), ("preparing", costs.prepare_ms), key=lambda cost: cost[1])
    threads = f" on each of {costs.threads} threads" if costs.threads > 1 else ""
    return f"{reached}: {what} limits it, at {ms:.1f} ms a picture{threads}; the model takes {costs.engine_ms:.1f} ms."


# --- A plot ----------------------------------------------------------------------------------------------------


def draw(measured: Measured, path: Path) -> None:
    """Plots pictures and tokens per second by batch size to a PNG file.

    Raises RococapError if the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    sizes = [rate.batch_size for rate in measured.batch_sizes]
    pictures, tokens = figure.subplots(1, 2)
    _plot(pictures, sizes, [rate.pictures_per_sec for rate in measured.batch_sizes], "pictures a second")
    _plot(tokens, sizes, [rate.tokens_per_sec for rate in measured.batch_sizes], "new tokens a second")
    pictures.axhline(measured.worker_pictures_per_sec, color="#c0392b", linestyle="--", label="the whole worker")
    pictures.legend(loc="lower right")
    figure.suptitle(f"{Path(measured.model).name} on {measured.device} ({measured.dtype})")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _plot(axes: Any, sizes: Sequence[int], rates: Sequence[float], what: str) -> None:
    axes.plot(sizes, rates, "o-", color="#1f77b4", label="the model alone")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, labels=[str(size) for size in sizes])
    axes.set(xlabel="batch size", ylabel=what)
    axes.set_ylim(bottom=0)
