"""Runs beside one another: a file with a row for each picture, and what each run's captions took and came to.

Reads as an export does, below one time and in short transactions, a page of each run at a time: however many pictures
there are, it takes as much memory. Text is never edited.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import chain, groupby, islice, repeat
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from sqlalchemy import Engine as Database

from rococap import queue
from rococap.data import SPLITS
from rococap.db import transaction
from rococap.errors import RococapError, RunError
from rococap.files import ending, replacing
from rococap.progress import Progress, silent
from rococap.queue import Run
from rococap.queue.runs import find_runs
from rococap.results.export import FOLDER
from rococap.results.formats import FORMATS, write_frames
from rococap.results.snapshot import PAGE, Read, done_pages, finished_until, short_reads

SHARED = ("image_id", "split", "original_caption")
OF_RUN = {
    "generated_caption": pa.string(),
    "flags": pa.string(),
    "new_tokens": pa.int64(),
    "processing_time_sec": pa.float64(),
    "finish_reason": pa.string(),
}
"""Columns that each run has, as `flags_{run}`: all runs' captions stand side by side, then all flags, and so on."""

Captions = dict[int, Sequence[Any]]
"""One picture's captions: the run's place among the runs -> the row that was read."""

_COLUMNS = "j.image_id, i.image_id, i.caption, c.text, c.flags, c.new_tokens, c.processing_ms, c.finish_reason"


@dataclass(slots=True)
class Summary:
    """What a run's captions in the file took and came to. None: not known, as for captions restored from a CSV.

    `sec_per_picture` is the model's time, and `pictures_per_sec` what that makes in a second: of one worker.
    `flagged` and `cut` are shares of 1; a caption is cut if it ended at the recipe's max_new_tokens.
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
    """`shared` counts the pictures that every run has captioned, `originals` those that have an original caption."""

    path: Path
    rows: int
    shared: int
    runs: tuple[Summary, ...]
    originals: int


def default_path(names: Sequence[str]) -> Path:
    return FOLDER / f"compare_{'_'.join(names)}.csv"


def compare(
    database: Database,
    names: Sequence[str],
    path: Path,
    *,
    splits: Sequence[str] = (),
    all_done: bool = False,
    strip_reasoning: bool = False,
    progress: Progress = silent,
) -> Compared:
    """Writes a row for every picture that one of the runs has captioned, or with `all_done` that each has, in data set
    order, to a .csv, .parquet or .jsonl file. Without splits: all that the runs have.

    Raises RunError for runs that do not exist, cannot be compared or have no captions, RococapError if the file cannot
    be written; then an older file stays as it was.
    """
    check_suffix(path)
    with transaction(database) as conn:
        runs = find_runs(conn, names)
        counts = [one for run in runs for one in queue.counts_of(conn, run, splits or SPLITS)]
        cutoff = finished_until(conn, runs, splits or SPLITS)
    done = {split: sum(one.done for one in counts if one.split == split) for split in SPLITS}
    if not any(done.values()):
        of = ", ".join(split for split in SPLITS if any(one.split == split for one in counts))
        raise RunError(
            f"{_quoted(names)} captioned nothing of {of} yet. Caption pictures: rococap worker --run {names[0]}"
        )
    join = _Join(runs, [_Measure(run) for run in runs], all_done, strip_reasoning)
    with replacing(path) as partial, short_reads(database) as read:
        rows = write_frames(join.frames(read, cutoff, done, progress), partial, ending(path), _schema(runs))
        if not rows:
            raise RunError(
                f"{_quoted(names)} captioned no picture in common yet. Leave out --all-done, or go on: rococap worker"
            )
    return Compared(path, rows, join.shared, tuple(measure.summary() for measure in join.measures), join.originals)


def check_suffix(path: Path) -> None:
    if ending(path).removeprefix(".") not in FORMATS:
        known = [f".{format}" for format in FORMATS]
        raise RococapError(f"{path} ends in none of {', '.join(known)}: name it so with --output.")


def _quoted(names: Sequence[str]) -> str:
    quoted = [repr(name) for name in names]
    return f"Run {quoted[0]}" if len(quoted) == 1 else f"Runs {', '.join(quoted[:-1])} and {quoted[-1]}"


def _schema(runs: Sequence[Run]) -> pa.Schema:
    of_runs = [(f"{column}_{run.name}", type) for column, type in OF_RUN.items() for run in runs]
    return pa.schema([*((name, pa.string()) for name in SHARED), *of_runs])


# --- The join --------------------------------------------------------------------------------------------------


class _Measure:
    """Sums over one run's captions."""

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
    """Of the numbers that are known."""

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
    """The rows of the file, measured as they pass."""

    runs: Sequence[Run]
    measures: Sequence[_Measure]
    all_done: bool
    strip_reasoning: bool
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
            images, passed = _by_image(streams), 0
            while page := list(islice(images, PAGE)):
                passed += sum(map(len, page))
                progress(f"{split}: comparing", passed, done[split])
                rows = [self._row(split, of_run) for of_run in page if self._is_wanted(of_run)]
                if not rows:
                    continue
                # Objects, since pandas would turn every text into its own string type and back.
                yield pd.DataFrame(rows, columns=columns, dtype=object)

    def _is_wanted(self, of_run: Captions) -> bool:
        is_shared = len(of_run) == len(self.runs)
        self.shared += is_shared
        return is_shared or not self.all_done

    def _row(self, split: str, of_run: Captions) -> list[Any]:
        cells: list[tuple[Any, ...]] = [(None,) * len(OF_RUN)] * len(self.runs)
        _, image_id, original, *_ = next(iter(of_run.values()))
        self.originals += bool(original)
        for n, row in of_run.items():
            cells[n] = _cells(*row[3:])
            self.measures[n].add(*cells[n])
        return [image_id, split, original, *chain.from_iterable(zip(*cells, strict=True))]


def _by_image(streams: Sequence[Iterator[Sequence[Any]]]) -> Iterator[Captions]:
    """Merges streams that are each in order of the image's id, which a row begins with."""
    tagged = [zip(rows, repeat(n), strict=False) for n, rows in enumerate(streams)]
    for _, group in groupby(merge(*tagged, key=_image), key=_image):
        yield {n: row for row, n in group}


def _image(tagged: tuple[Sequence[Any], int]) -> int:
    return int(tagged[0][0])


def _cells(text: str, flags: str, tokens: int | None, processing_ms: float | None, end: str | None) -> tuple[Any, ...]:
    """In the order of OF_RUN."""
    return text, flags, tokens, None if processing_ms is None else round(processing_ms / 1000, 6), end
