"""Folders of pictures and captions for other tools: a data set of the hub, and files to train on.

Read as an export is: below one time, in short transactions. A file or folder appears whole or not at all.
"""

import hashlib
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pandas as pd
import pyarrow as pa
from sqlalchemy import Engine as Database

from rococap import queue
from rococap.data import PictureReader, Place, datasets
from rococap.data.images import as_file
from rococap.db import transaction
from rococap.errors import PictureError, RococapError, RunError
from rococap.files import cannot_write, fsync, read_json, write_json
from rococap.progress import Progress, silent
from rococap.queue import Counts, Run, place_of
from rococap.queue.enqueue import LONGEST_ID
from rococap.results.formats import SCHEMA, write_frames
from rococap.results.manifest import MANIFEST, manifest_of, stripped
from rococap.results.snapshot import (
    PAGE,
    SELECTED,
    Read,
    check_complete,
    done_pages,
    finished_until,
    frame_of,
    short_reads,
)

if TYPE_CHECKING:
    pass
from rococap.results.card import Written, card
from rococap.results.manifest import as_options, is_another, is_ours, lost_splits


def publish(
    database: Database,
    run: Run,
    splits: Sequence[str],
    folder: Path,
    format: str,
    *,
    require_complete: bool = False,
    strip_reasoning: bool = False,
    progress: Progress = silent,
) -> list[Written]:
    """Writes the done images of the splits, in data set order, to one folder of the format: hf, webdataset or kohya.

    Raises RunError if the run lacks a split or has no captions, IncompleteError if some are not done and all were
    required, DatasetError if pictures are asked for and the data set is away, RococapError if the folder cannot be
    written or holds what rococap did not write. An older folder then stays as it was.
    """
    with transaction(database) as conn:
        counts = [queue.counts_of(conn, run, [split])[0] for split in splits]
        cutoff = finished_until(conn, [run], splits)
    if not any(one.done for one in counts):
        raise RunError(
            f"Run {run.name!r} captioned nothing of {', '.join(splits)} yet: rococap worker --run {run.name}"
        )
    if require_complete:
        for one in counts:
            check_complete(run, one.split, one.done, one.total)
    source = _Source(database, run, cutoff, strip_reasoning, progress)
    folder = folder.resolve()
    new = {"run": run.name, "recipe_hash": run.recipe.hash, "format": format, "splits": splits}
    _check_replaceable(folder, new)
    # Once more at the end: an export may take hours, and somebody may work in the older folder meanwhile.
    with _replacing_folder(folder, lambda: _check_replaceable(folder, new)) as partial:
        written = _WRITERS[format](source, counts, partial)
        manifest = manifest_of(run) | {"format": format, "splits": {one.split: _told(one) for one in written}}
        manifest |= stripped(strip_reasoning)
        if format == "hf":
            (partial / "README.md").write_text(card(run, written, manifest), encoding="utf-8")
        write_json(partial / MANIFEST, manifest | {"files": _listing(partial)})
        _give_one_time(partial)
    return written


@dataclass(frozen=True, slots=True)
class _Source:
    database: Database
    run: Run
    cutoff: int
    strip_reasoning: bool
    progress: Progress

    def pages(self, read: Read, split: str, columns: str) -> Iterator[Sequence[Sequence[Any]]]:
        return done_pages(read, self.run, split, self.cutoff, columns, strip_reasoning=self.strip_reasoning)


def _told(one: Written) -> dict[str, Any]:
    told = asdict(one)
    del told["split"]
    return told


@contextmanager
def _replacing_folder(folder: Path, check: Callable[[], None]) -> Iterator[Path]:
    """As `replacing` does for a file. An older folder steps aside for the moment of two renames, if the check, which
    comes right before, raises nothing.
    """
    partial, older = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    try:
        # A killed process may have had this pid: in containers they come again.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in partial.rglob("*"):
            fsync(path)
        fsync(partial)
        check()
        if folder.exists():
            shutil.rmtree(older, ignore_errors=True)
            folder.rename(older)
        try:
            partial.rename(folder)
        except OSError:
            if older.exists():
                older.rename(folder)
            raise
        fsync(folder.parent)
        shutil.rmtree(older, ignore_errors=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_replaceable(folder: Path, new: dict[str, Any]) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    there = read_json(folder / MANIFEST) if folder.is_dir() else None
    if not is_ours(there):
        raise RococapError(f"{folder} is there, and rococap did not write it: name another place with --output.")
    if is_another(there, new):
        raise RococapError(
            f"{folder} holds another export (run {there.get('run')}, format {there.get('format')}). Move it away, or "
            "write elsewhere with --output."
        )
    if others := lost_splits(there, new):
        raise RococapError(
            f"{folder} also holds {', '.join(others)}, which would be lost: name every split that it is to hold "
            f"({as_options(others, new)}), or write elsewhere with --output."
        )
    if there.get("files") != _listing(folder) or not _have_one_time(folder):
        raise RococapError(
            f"{folder} is not as rococap wrote it: files were added, taken away or edited. Move it away, or write "
            "elsewhere with --output."
        )


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)


def _listing(folder: Path) -> dict[str, Any]:
    """How many files, and a digest of names and sizes: a train split has more than a manifest should list."""
    files = [(path.relative_to(folder).as_posix(), path.lstat().st_size) for path in _files(folder)]
    files = sorted(file for file in files if file[0] != MANIFEST)
    return {"n": len(files), "sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest()}


def _give_one_time(folder: Path) -> None:
    """All files of one export were last changed at one moment: whatever has another time was edited since. Unlike
    times in the manifest, this leaves the manifest of the same captions the same.
    """
    at = time.time_ns()
    # Some mounts let nobody set a time. There the folder is whole too, and the next export asks to move it away.
    with suppress(PermissionError):
        for path in _files(folder):
            os.utime(path, ns=(at, at))


def _have_one_time(folder: Path) -> bool:
    return len({path.lstat().st_mtime_ns for path in _files(folder)}) == 1


ROWS_PER_SHARD = 100_000
_TEXTS = pa.list_(pa.string())
_HF_SCHEMA = pa.schema([*SCHEMA, ("flags", _TEXTS), ("cui", _TEXTS)])


def _write_hub_layout(source: _Source, counts: Sequence[Counts], folder: Path) -> list[Written]:
    (folder / "data").mkdir()
    written = []
    for one in counts:
        rows = _write_shards(_hub_frames(source, one), folder / "data", one.split)
        written.append(Written(one.split, rows, one.total - rows, dict(one.flags)))
    return written


def _write_shards(frames: Iterator[pd.DataFrame], folder: Path, split: str) -> int:
    """How many shards there are stands in each one's name, and is known at the end."""
    rows, paths = 0, []
    for number, first in enumerate(frames):
        shard = chain([first], islice(frames, ROWS_PER_SHARD // PAGE - 1))
        paths.append(folder / f"{split}-{number:05}")
        rows += write_frames(shard, paths[-1], ".parquet", _HF_SCHEMA)
    for path in paths:
        path.rename(f"{path}-of-{len(paths):05}.parquet")
    return rows


def _hub_frames(source: _Source, counts: Counts) -> Iterator[pd.DataFrame]:
    done = 0
    with short_reads(source.database) as read:
        for rows in source.pages(read, counts.split, f"{SELECTED}, c.flags, i.cui"):
            done += len(rows)
            frame = frame_of(rows, source.run, counts.split)
            frame["flags"] = [_split(row[-2], ",") for row in rows]
            frame["cui"] = [_split(row[-1], ";") for row in rows]
            yield frame
            source.progress(f"{counts.split}: exporting", done, counts.done)


def _split(joined: str, separator: str) -> list[str]:
    return joined.split(separator) if joined else []


# --- Pictures and captions -------------------------------------------------------------------------------------

SAMPLES_PER_TAR = 1_000
LONGEST_KEY = LONGEST_ID
"""Bytes before the ending. In percent an id is up to three times as long as in the data set."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """`key` names the files of one picture; `files` are their endings and bytes, the picture's first."""

    key: str
    files: dict[str, bytes]


def _write_tars(samples: Iterator[_Sample], folder: Path, split: str) -> int:
    done = 0
    for number, first in enumerate(samples):
        with tarfile.open(folder / f"{split}-{number:06}.tar", "w") as tar:
            for sample in chain([first], islice(samples, SAMPLES_PER_TAR - 1)):
                done += 1
                for ending, data in sample.files.items():
                    member = tarfile.TarInfo(sample.key + ending)
                    member.size = len(data)
                    tar.addfile(member, BytesIO(data))
    return done


def _write_pairs(samples: Iterator[_Sample], folder: Path, split: str) -> int:
    done = 0
    (folder / split).mkdir()
    for sample in samples:
        done += 1
        for ending, data in sample.files.items():
            if ending != ".json":
                (folder / split / (sample.key + ending)).write_bytes(data)
    return done


def _with_pictures(
    write: Callable[[Iterator[_Sample], Path, str], int],
) -> Callable[[_Source, Sequence[Counts], Path], list[Written]]:
    def write_all(source: _Source, counts: Sequence[Counts], folder: Path) -> list[Written]:
        run = source.run
        splits = [one.split for one in counts if one.done]
        located = datasets.locate(run.dataset, splits, run.dataset_revision or None)
        written = [Written(one.split, 0, one.total - one.done, dict(one.flags)) for one in counts]
        with PictureReader(located.root) as reader:
            for one, told in zip(counts, written, strict=True):
                told.captions = write(_samples(source, one, reader, told.without_picture), folder, one.split)
        return written

    return write_all


_OF_SAMPLE = (
    "j.image_id, (SELECT path FROM shards WHERE shards.id = i.shard_id), i.split, i.row_group, i.row_in_group, "
    "i.image_id, i.caption, c.text, c.flags, i.cui"
)


def _samples(
    source: _Source, counts: Counts, reader: PictureReader, without_picture: dict[str, str]
) -> Iterator[_Sample]:
    # Each page is a transaction of its own, also on PostgreSQL, which ends one that waits a minute for pictures.
    pages = source.pages(lambda: transaction(source.database), counts.split, _OF_SAMPLE)
    for n, row in enumerate(chain.from_iterable(pages), 1):
        place = place_of(row[1:6], source.run.columns)
        try:
            yield _sample(source.run, place, reader.picture(place), *row[6:])
        except PictureError as error:
            without_picture[place.image_id] = str(error)
        source.progress(f"{counts.split}: exporting", n, counts.done)


def _sample(run: Run, place: Place, picture: bytes, original: str, generated: str, flags: str, cui: str) -> _Sample:
    about = {
        "image_id": place.image_id,
        "original_caption": original,
        "cui": _split(cui, ";"),
        "flags": _split(flags, ","),
        "model": run.recipe.model,
        "split": place.split,
    }
    told = json.dumps(about, ensure_ascii=False)
    ending, shown = as_file(picture, run.recipe.frame)
    return _Sample(_key(place.image_id), {ending: shown, ".txt": generated.encode(), ".json": told.encode()})


def _key(image_id: str) -> str:
    """Letters, digits, `_`, `-`, `~`, the rest in percent: a dot would begin the ending, and no two ids share a key."""
    key = quote(image_id, safe="").replace(".", "%2E") or "%"
    if len(key) <= LONGEST_KEY:
        return key
    # No byte is written as %-, so that a key that was cut is no other picture's.
    return f"{key[:200]}%-{hashlib.sha256(image_id.encode()).hexdigest()[:32]}"


_WRITERS = {
    "hf": _write_hub_layout,
    "webdataset": _with_pictures(_write_tars),
    "kohya": _with_pictures(_write_pairs),
}
