"""Compares runs side by side: a file with one row per picture, and totals for each run's captions.

Like an export, it reads what was done by one cutoff time, in short transactions. It reads one page of each run at a
time, so its memory does not grow with the number of pictures. Texts are never edited, and nothing is scored; where runs
state different facts is found on the way, and stored for the gallery to sort by.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import merge
from itertools import chain, groupby, islice, repeat
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from sqlalchemy import Engine as Database

from rococap import queue
from rococap.data import SPLITS
from rococap.db import execute, marks, transaction
from rococap.errors import DatabaseError, RococapError, RunError
from rococap.files import ending, replacing
from rococap.progress import Progress, silent
from rococap.queue import Run
from rococap.queue.runs import find_runs
from rococap.results.export import FOLDER
from rococap.results.formats import FORMATS, write_frames
from rococap.results.snapshot import PAGE, Read, done_pages, finished_until, short_reads
from rococap.scores.disagreement import DISAGREEMENT, Disagreements

log = logging.getLogger(__name__)

SHARED = ("image_id", "split", "original_caption")
RUN_COLUMNS = {
    "generated_caption": pa.string(),
    "flags": pa.string(),
    "new_tokens": pa.int64(),
    "processing_time_sec": pa.float64(),
    "finish_reason": pa.string(),
}
"""Columns that exist once per run, named like `flags_{run}`. They are grouped by kind: the captions of all runs, then
the flags of all runs, and so on.
"""

Captions = dict[int, Sequence[Any]]
"""One picture's captions: index of the run -> the row that was read."""

WORST = 20
"""How many pictures on which runs differ are named unless another number is asked for."""

_COLUMNS = "j.image_id, i.image_id, i.caption, c.text, c.flags, c.new_tokens, c.processing_ms, c.finish_reason"


@dataclass(slots=True)
class Summary:
    """Totals of one run's captions in the file. None means unknown, as for captions restored from a CSV.

    `sec_per_picture` is the mean of the model's time, and `pictures_per_sec` its reciprocal: the rate of one worker.
    `new_tokens`, `characters` and `words` are means per caption. `flagged` and `cut` are shares between 0 and 1; a
    caption is cut if it ended at the recipe's max_new_tokens.
    """

    run: str
    model: str
    captions: int
    sec_per_picture: float | None
    pictures_per_sec: float | None
    new_tokens: float | None
    characters: float | None
    words: float | None
    flagged: float | None
    flags: dict[str, int]
    cut: float | None


@dataclass(frozen=True, slots=True)
class Compared:
    """The file, the number of its rows, and a summary of each run.

    `shared` counts the pictures that every run has captioned, `originals` the rows that have an original caption.
    `disagreements` are the pictures on which runs state different facts; None for a single run.
    """

    path: Path
    rows: int
    shared: int
    runs: tuple[Summary, ...]
    originals: int
    disagreements: Disagreements | None = None


def default_path(names: Sequence[str]) -> Path:
    """Where a comparison of these runs is written unless a path is given."""
    return FOLDER / f"compare_{'_'.join(names)}.csv"


def compare(
    database: Database,
    names: Sequence[str],
    path: Path,
    *,
    splits: Sequence[str] = (),
    all_done: bool = False,
    strip_reasoning: bool = False,
    worst: int = WORST,
    progress: Progress = silent,
) -> Compared:
    """Writes one row for every picture that any of the runs has captioned, or with `all_done` that all have captioned,
    in data set order, to a .csv, .parquet or .jsonl file. Without `splits`, compares all splits of the runs. Finds the
    `worst` pictures on which runs state different facts, and stores with each caption how much the runs disagree if the
    database can be written.

    Raises RunError for runs that do not exist, cannot be compared or have no captions, RococapError if the file cannot
    be written. On failure an older file stays as it was.
    """
    check_suffix(path)
    with transaction(database) as conn:
        runs = find_runs(conn, names)
        counts = [count for run in runs for count in queue.counts_of(conn, run, splits or SPLITS)]
        cutoff = finished_until(conn, runs, splits or SPLITS)
    done = {split: sum(count.done for count in counts if count.split == split) for split in SPLITS}
    if not any(done.values()):
        compared = ", ".join(split for split in SPLITS if any(count.split == split for count in counts))
        raise RunError(
            f"{_quoted(names)} captioned nothing of {compared} yet. Caption pictures: rococap worker --run {names[0]}"
        )
    join = _Join(database, runs, [_Measure(run) for run in runs], all_done, strip_reasoning, Disagreements(worst))
    with replacing(path) as partial, short_reads(database) as read:
        rows = write_frames(join.frames(read, cutoff, done, progress), partial, ending(path), _schema(runs))
        if not rows:
            raise RunError(
                f"{_quoted(names)} have no captioned picture in common yet. Leave out --all-done, or caption more: "
                "rococap worker"
            )
    summaries = tuple(measure.summary() for measure in join.measures)
    disagreements = join.disagreements.done() if len(runs) > 1 else None
    return Compared(path, rows, join.shared, summaries, join.originals, disagreements)


def check_suffix(path: Path) -> None:
    """Raises RococapError unless the path names a format that can be written."""
    if ending(path).removeprefix(".") not in FORMATS:
        known = [f".{format}" for format in FORMATS]
        raise RococapError(f"{path} does not end in one of {', '.join(known)}: choose another name with --output.")


def _quoted(names: Sequence[str]) -> str:
    quoted = [repr(name) for name in names]
    return f"Run {quoted[0]}" if len(quoted) == 1 else f"Runs {', '.join(quoted[:-1])} and {quoted[-1]}"


def _schema(runs: Sequence[Run]) -> pa.Schema:
    of_runs = [(f"{column}_{run.name}", type) for column, type in RUN_COLUMNS.items() for run in runs]
    return pa.schema([*((name, pa.string()) for name in SHARED), *of_runs])


# --- The join --------------------------------------------------------------------------------------------------


class _Measure:
    """Accumulates the totals of one run's captions."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.captions = self.characters = self.words = self.flagged = 0
        self.flags: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.tokens = _Mean()
        self.seconds = _Mean()

    def add(self, text: str, flags: str, tokens: int | None, seconds: float | None, finish_reason: str | None) -> None:
        self.captions += 1
        self.characters += len(text)
        self.words += len(text.split())
        self.flagged += bool(flags)
        self.flags.update(filter(None, flags.split(",")))
        self.ends.update(filter(None, (finish_reason,)))
        self.tokens.add(tokens)
        self.seconds.add(seconds)

    def summary(self) -> Summary:
        seconds = self.seconds.value
        return Summary(
            *(self.run.name, self.run.recipe.model, self.captions),
            sec_per_picture=seconds,
            pictures_per_sec=1 / seconds if seconds else None,
            new_tokens=self.tokens.value,
            characters=_share(self.characters, self.captions),
            words=_share(self.words, self.captions),
            flagged=_share(self.flagged, self.captions),
            flags=dict(sorted(self.flags.items())),
            cut=_share(self.ends["length"], self.ends.total()),
        )


@dataclass(slots=True)
class _Mean:
    """The mean of the known numbers among those added."""

    n: int = 0
    total: float = 0.0

    def add(self, number: float | None) -> None:
        if number is not None:
            self.n += 1
            self.total += number

    @property
    def value(self) -> float | None:
        return _share(self.total, self.n)


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None


@dataclass(slots=True)
class _Join:
    """Joins the captions of several runs by picture, and updates the totals of each run on the way.

    `weights` are those of the current page's pictures, by their database keys.
    """

    database: Database
    runs: Sequence[Run]
    measures: Sequence[_Measure]
    all_done: bool
    strip_reasoning: bool
    disagreements: Disagreements
    weights: list[tuple[int, float]] = field(default_factory=list)
    is_writable: bool = True
    shared: int = 0
    originals: int = 0

    def frames(self, read: Read, cutoff: int, done: Mapping[str, int], progress: Progress) -> Iterator[pd.DataFrame]:
        columns = _schema(self.runs).names
        for split in (split for split in SPLITS if done[split]):
            streams = [
                chain.from_iterable(
                    done_pages(read, run, split, cutoff, _COLUMNS, strip_reasoning=self.strip_reasoning)
                )
                for run in self.runs
            ]
            images, n_read = _by_image(streams), 0
            while page := list(islice(images, PAGE)):
                n_read += sum(map(len, page))
                progress(f"{split}: comparing", n_read, done[split])
                rows = [self._row(split, captions) for captions in page if self._is_wanted(captions)]
                self._keep_weights()
                if not rows:
                    continue
                # dtype object: otherwise pandas would convert every text to its own string type and back.
                yield pd.DataFrame(rows, columns=columns, dtype=object)

    def _keep_weights(self) -> None:
        """Stores with each caption of a page how much the runs disagree on its picture."""
        sql = (
            f"INSERT INTO scores (job_id, metric, digest, value) SELECT j.id, '{DISAGREEMENT}', '', ? FROM jobs j "
            f"JOIN captions c ON c.job_id = j.id WHERE j.run_id IN ({marks(self.runs)}) AND j.image_id = ? "
            "ON CONFLICT (job_id, metric) DO UPDATE SET value = excluded.value"
        )
        ids = [run.id for run in self.runs]
        values = [(json.dumps({DISAGREEMENT: weight}), *ids, image) for image, weight in self.weights]
        self.weights = []
        if not values or not self.is_writable:
            return
        try:
            with transaction(self.database, write=True) as conn:
                execute(conn, sql, values)
        except DatabaseError as error:  # such as a standby, which can be compared all the same
            self.is_writable = False
            log.warning("the gallery cannot sort by this comparison: %s", error)

    def _is_wanted(self, captions: Captions) -> bool:
        is_shared = len(captions) == len(self.runs)
        self.shared += is_shared
        return is_shared or not self.all_done

    def _row(self, split: str, captions: Captions) -> list[Any]:
        cells: list[tuple[Any, ...]] = [(None,) * len(RUN_COLUMNS)] * len(self.runs)
        image, image_id, original, *_ = next(iter(captions.values()))
        self.originals += bool(original)
        for n, row in captions.items():
            cells[n] = _cells(*row[3:])
            self.measures[n].add(*cells[n])
        texts = {self.runs[n].name: row[3] for n, row in sorted(captions.items())}
        if (weight := self.disagreements.add(split, image_id, texts)) is not None:
            self.weights.append((image, weight))
        return [image_id, split, original, *chain.from_iterable(zip(*cells, strict=True))]


def _by_image(streams: Sequence[Iterator[Sequence[Any]]]) -> Iterator[Captions]:
    """Merges the runs' streams of rows, each in order of the image's database key, which is a row's first column."""
    tagged = [zip(rows, repeat(n), strict=False) for n, rows in enumerate(streams)]
    for _, group in groupby(merge(*tagged, key=_image), key=_image):
        yield {n: row for row, n in group}


def _image(tagged: tuple[Sequence[Any], int]) -> int:
    return int(tagged[0][0])


def _cells(
    text: str, flags: str, tokens: int | None, processing_ms: float | None, finish_reason: str | None
) -> tuple[Any, ...]:
    """In the order of RUN_COLUMNS."""
    return text, flags, tokens, None if processing_ms is None else round(processing_ms / 1000, 6), finish_reason
