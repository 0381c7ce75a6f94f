"""Publishes captions as a folder for other tools: a data set for the hub, or pictures with captions to train on.

Like an export, it reads what was done by one cutoff time, in short transactions. The folder appears complete or not at
all. It does not push: see `hub`.
"""

import hashlib
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
import pyarrow as pa
from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from rococap import queue
from rococap.data import PictureReader, Place
from rococap.data.images import as_file
from rococap.data.layout import MANIFEST
from rococap.db import transaction
from rococap.errors import PictureError, RococapError, RunError
from rococap.files import cannot_write, fsync, read_json, write_json
from rococap.progress import Progress, silent
from rococap.queue import Counts, Run, place_of
from rococap.queue.enqueue import LONGEST_ID
from rococap.results import messages
from rococap.results.card import Written, card
from rococap.results.formats import schema_with, write_frames
from rococap.results.manifest import as_options, is_another, is_ours, lost_splits, manifest_of, stripped
from rococap.results.snapshot import (
    PAGE,
    SELECTED,
    Read,
    check_complete,
    done_pages,
    enqueued_pages,
    finished_until,
    flags,
    frame_of,
    n_done,
    newest_job,
    short_reads,
    with_people,
)
from rococap.results.texts import MACHINE, Kind, Texts, people_of, texts_now


def publish(
    database: Database,
    run: Run,
    splits: Sequence[str],
    folder: Path,
    format: str,
    *,
    captions: Kind = "machine",
    require_complete: bool = False,
    strip_reasoning: bool = False,
    text: messages.Text = "generated",
    progress: Progress = silent,
) -> list[Written]:
    """Writes the done images of the splits, in data set order, to one folder; `format` is hf, webdataset, kohya or
    messages.

    `captions` says which texts to write, as for `export`; hf and webdataset also say who edited and judged them, and
    when. `text` is for the format messages. With "original" it writes the data set's own captions, of all images that
    the run was given, done or not.

    Raises RunError if the run lacks a split, has no captions, or has a prompt that the format cannot hold;
    IncompleteError if `require_complete` and some images are not done; DatasetError if the format includes pictures and
    the data set is not available; RococapError if the folder cannot be written or holds files that rococap did not
    write. On failure an older folder stays as it was.
    """
    with transaction(database) as conn:
        counts = [queue.counts_of(conn, run, [split])[0] for split in splits]
        cutoff = newest_job(conn) if text == "original" else finished_until(conn, [run], splits)
        source = _Source(database, run, cutoff, strip_reasoning, progress, text, texts_now(conn, captions))
        parts = [source.part(conn, count) for count in counts]
    if not any(part.n for part in parts):
        if captions == "reviewed":
            raise RunError(
                f"No picture of {', '.join(splits)} has a verdict in run {run.name!r} yet. Leave out --captions "
                "reviewed, or import verdicts: rococap reviews --import FILE"
            )
        raise RunError(
            f"Run {run.name!r} has captioned nothing of {', '.join(splits)} yet: start rococap worker --run {run.name}"
        )
    if require_complete:
        for part in parts:
            check_complete(run, part.split, part.n, part.total)
    folder = folder.resolve()
    new = {"run": run.name, "recipe_hash": run.recipe.hash, "format": format, "splits": splits}
    new |= {"text": text} if format == "messages" else {}
    new |= {"captions": captions} if captions != "machine" else {}
    _check_replaceable(folder, new)
    # Checked again at the end: an export may take hours, and somebody may edit the older folder meanwhile.
    with _replacing_folder(folder, lambda: _check_replaceable(folder, new)) as partial:
        written = _WRITERS[format](source, parts, partial)
        manifest = (
            manifest_of(run)
            | source.texts.in_manifest()
            | {
                "format": format,
                "splits": {entry.split: _manifest_entry(entry) for entry in written},
            }
        )
        manifest |= stripped(strip_reasoning)
        if format == "messages":
            manifest |= {"text": text}
        if text == "original":
            manifest |= {"note": messages.ORIGINALS_NOTE}
        if format == "hf":
            (partial / "README.md").write_text(card(run, written, manifest), encoding="utf-8")
        write_json(partial / MANIFEST, manifest | {"files": _listing(partial)})
        _set_one_mtime(partial)
    return written


@dataclass(frozen=True, slots=True)
class _Source:
    """Where the captions are read from, and which of them: those of a run that were done by the cutoff. If `text` is
    "original", the cutoff is the newest job instead, and the captions are the data set's own.
    """

    database: Database
    run: Run
    cutoff: int
    strip_reasoning: bool
    progress: Progress
    text: messages.Text = "generated"
    texts: Texts = MACHINE

    def pages(self, read: Read, split: str, columns: str) -> Iterator[Sequence[Sequence[Any]]]:
        """Pages of these columns and, at the end of each row, those of `texts.people`."""
        return done_pages(
            *(read, self.run, split, self.cutoff, ", ".join([columns, *self.texts.people.values()])),
            texts=self.texts,
            strip_reasoning=self.strip_reasoning,
        )

    def pages_for_pictures(self, split: str) -> Iterator[Sequence[Sequence[Any]]]:
        """Pages of `_SAMPLE_COLUMNS`. Each is a transaction of its own, on PostgreSQL too: there, a transaction that
        idles for a minute while pictures are read is terminated.
        """

        def read() -> AbstractContextManager[Connection]:
            return transaction(self.database)

        if self.text == "original":
            return enqueued_pages(read, self.run, split, self.cutoff, _ORIGINAL_COLUMNS)
        return self.pages(read, split, _SAMPLE_COLUMNS)

    def part(self, conn: Connection, counts: Counts) -> "_Part":
        if self.text == "original":  # flags are marks on generated captions
            return _Part(counts.split, counts.total, counts.total, {})
        if self.texts.kind == "machine":
            return _Part(counts.split, counts.done, counts.total, dict(counts.flags))
        n = n_done(conn, self.run, counts.split, self.cutoff, self.texts)
        return _Part(counts.split, n, counts.total, flags(conn, self.run, counts.split, self.cutoff, self.texts))


@dataclass(frozen=True, slots=True)
class _Part:
    """What is to be written of a split: `n` captions of its `total` jobs, and how many of them have each flag."""

    split: str
    n: int
    total: int
    flags: dict[str, int]

    def nothing_written(self) -> Written:
        """The entry of the split before its captions are written."""
        return Written(self.split, 0, self.total - self.n, self.flags)


def _manifest_entry(written: Written) -> dict[str, Any]:
    entry = asdict(written)
    del entry["split"]
    if not written.without_text:
        del entry["without_text"]
    return entry


@contextmanager
def _replacing_folder(folder: Path, check: Callable[[], None]) -> Iterator[Path]:
    """Yields a temporary folder that replaces `folder` when the block succeeds, as `replacing` does for a file.

    `check` is called right before the replacement and may raise to refuse it. Two renames replace an older folder, so
    for a moment there is none.
    """
    partial, older = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    try:
        # Left over from a killed process with the same pid: in containers, pids are reused.
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
    existing = read_json(folder / MANIFEST) if folder.is_dir() else None
    if not is_ours(existing):
        raise RococapError(f"{folder} exists and was not written by rococap: choose another folder with --output.")
    if is_another(existing, new):
        kind = f"run {existing.get('run')}, format {existing.get('format')}"
        kind += f", text {existing['text']}" if "text" in existing else ""
        raise RococapError(
            f"{folder} holds another export ({kind}). Move it away, or choose another folder with --output."
        )
    if others := lost_splits(existing, new):
        raise RococapError(
            f"{folder} also holds {', '.join(others)}, which would be lost. Export all of its splits "
            f"({as_options(others, new)}), or choose another folder with --output."
        )
    if existing.get("files") != _listing(folder) or not _have_one_mtime(folder):
        raise RococapError(
            f"{folder} was changed since rococap wrote it: files were added, removed or edited. Move it away, or "
            "choose another folder with --output."
        )


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)


def _listing(folder: Path) -> dict[str, Any]:
    """The number of files and a digest of their names and sizes: a train split has too many to list in a manifest."""
    files = [(path.relative_to(folder).as_posix(), path.lstat().st_size) for path in _files(folder)]
    files = sorted(file for file in files if file[0] != MANIFEST)
    return {"n": len(files), "sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest()}


def _set_one_mtime(folder: Path) -> None:
    """Gives all files the same modification time, so that a file edited later can be recognised by its own. Times in
    the manifest would do as well, but the same captions would then no longer give the same manifest.
    """
    now = time.time_ns()
    # Some mounts do not allow setting times. The folder is complete even so; the next export asks to move it away.
    with suppress(PermissionError):
        for path in _files(folder):
            os.utime(path, ns=(now, now))


def _have_one_mtime(folder: Path) -> bool:
    return len({path.lstat().st_mtime_ns for path in _files(folder)}) == 1


ROWS_PER_SHARD = 100_000
_TEXTS = pa.list_(pa.string())
_N_SELECTED = len(SELECTED.split(", "))


def _write_hub_layout(source: _Source, parts: Sequence[_Part], folder: Path) -> list[Written]:
    (folder / "data").mkdir()
    written = []
    schema = pa.schema([*schema_with(source.texts.people), ("flags", _TEXTS), ("cui", _TEXTS)])
    for part in parts:
        rows = _write_shards(_hub_frames(source, part), folder / "data", part.split, schema)
        written.append(Written(part.split, rows, part.total - rows, part.flags))
    return written


def _write_shards(frames: Iterator[pd.DataFrame], folder: Path, split: str, schema: pa.Schema) -> int:
    """Returns the number of rows. Shards are renamed at the end, since each name contains the number of shards."""
    rows, paths = 0, []
    for number, first in enumerate(frames):
        shard = chain([first], islice(frames, ROWS_PER_SHARD // PAGE - 1))
        paths.append(folder / f"{split}-{number:05}")
        rows += write_frames(shard, paths[-1], ".parquet", schema)
    for path in paths:
        path.rename(f"{path}-of-{len(paths):05}.parquet")
    return rows


def _hub_frames(source: _Source, part: _Part) -> Iterator[pd.DataFrame]:
    done = 0
    with short_reads(source.database) as read:
        for rows in source.pages(read, part.split, f"{SELECTED}, c.flags, i.cui"):
            done += len(rows)
            frame = with_people(frame_of(rows, source.run, part.split), rows, source.texts.people)
            frame["flags"] = [_split(row[_N_SELECTED], ",") for row in rows]
            frame["cui"] = [_split(row[_N_SELECTED + 1], ";") for row in rows]
            yield frame
            source.progress(f"{part.split}: exporting", done, part.n)


def _split(joined: str, separator: str) -> list[str]:
    return joined.split(separator) if joined else []


# --- Pictures and captions -------------------------------------------------------------------------------------

SAMPLES_PER_TAR = 1_000
LONGEST_KEY = LONGEST_ID
"""Bytes of a file name before its extension. Percent-encoding makes an id up to three times as long."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """The files of one picture: `key` is their common name, `files` maps extension to bytes, the picture first."""

    key: str
    files: dict[str, bytes]
    image_id: str


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
) -> Callable[[_Source, Sequence[_Part], Path], list[Written]]:
    def write_all(source: _Source, parts: Sequence[_Part], folder: Path) -> list[Written]:
        run = source.run
        splits = [part.split for part in parts if part.n]
        located = queue.dataset_of(source.database, run, splits)
        written = [part.nothing_written() for part in parts]
        with PictureReader(located.root) as reader:
            for part, entry in zip(parts, written, strict=True):
                entry.captions = write(_samples(source, part, reader, entry.without_picture), folder, part.split)
        return written

    return write_all


def _write_messages(source: _Source, parts: Sequence[_Part], folder: Path) -> list[Written]:
    run = source.run
    if control := messages.control_in(run.recipe.prompt):
        raise RunError(
            f"The prompt of run {run.name!r} contains {control}, which a trainer would not take for text. Export a run "
            f"with another prompt: rococap enqueue --run NAME --from {run.name} --prompt …"
        )
    without_text: dict[str, dict[str, str]] = {part.split: {} for part in parts}

    def write(samples: Iterator[_Sample], folder: Path, split: str) -> int:
        usable = _usable(samples, source.text, without_text[split])
        return _write_conversations(usable, run.recipe.prompt, folder, split)

    written = _with_pictures(write)(source, parts, folder)
    for entry in written:
        entry.without_text = without_text[entry.split]
    reasons = [reason for entry in written for reason in entry.without_text.values()]
    if reasons and not any(entry.captions for entry in written):
        raise RunError(f"Run {run.name!r} has no caption that can be written. For the first picture: {reasons[0]}")
    write_json(folder / messages.DATASET_INFO, messages.dataset_info([one.split for one in written if one.captions]))
    return written


def _usable(samples: Iterator[_Sample], text: messages.Text, without_text: dict[str, str]) -> Iterator[_Sample]:
    """The samples whose caption can be an answer. The reasons of the others are entered in `without_text`."""
    for sample in samples:
        if reason := messages.unusable(sample.files[".txt"].decode(), text):
            without_text[sample.image_id] = reason
        else:
            yield sample


def _write_conversations(samples: Iterator[_Sample], prompt: str, folder: Path, split: str) -> int:
    done = 0
    (folder / split).mkdir()
    with (folder / messages.file_name(split)).open("w", encoding="ascii") as file:
        for sample in samples:
            done += 1
            ending, data = next(iter(sample.files.items()))
            picture = f"{split}/{sample.key}{ending}"
            (folder / picture).write_bytes(data)
            file.write(messages.line_of(prompt, sample.files[".txt"].decode(), picture))
    return done


_SAMPLE_COLUMNS = (
    "j.image_id, (SELECT path FROM shards WHERE shards.id = i.shard_id), i.split, i.row_group, i.row_in_group, "
    "i.image_id, i.caption, c.text, c.flags, i.cui"
)
_ORIGINAL_COLUMNS = _SAMPLE_COLUMNS.replace("c.text, c.flags", "i.caption, ''")


def _samples(source: _Source, part: _Part, reader: PictureReader, without_picture: dict[str, str]) -> Iterator[_Sample]:
    for n, row in enumerate(chain.from_iterable(source.pages_for_pictures(part.split)), 1):
        place = place_of(row[1:6], source.run.columns)
        try:
            people = people_of(source.texts.people, row)
            yield _sample(source.run, place, reader.picture(place), people, *row[6:10])
        except PictureError as error:
            without_picture[place.image_id] = str(error)
        source.progress(f"{part.split}: exporting", n, part.n)


def _sample(
    run: Run,
    place: Place,
    picture: bytes,
    people: Mapping[str, str | None],
    original: str,
    caption: str,
    flags: str,
    cui: str,
) -> _Sample:
    metadata = {
        "image_id": place.image_id,
        "original_caption": original,
        "cui": _split(cui, ";"),
        "flags": _split(flags, ","),
        "model": run.recipe.model,
        "split": place.split,
        **people,
    }
    sidecar = json.dumps(metadata, ensure_ascii=False)
    ending, data = as_file(picture, run.recipe.frame)
    files = {ending: data, ".txt": caption.encode(), ".json": sidecar.encode()}
    return _Sample(_key(place.image_id), files, place.image_id)


def _key(image_id: str) -> str:
    """The image's id as a file name: all but letters, digits, `_`, `-` and `~` is percent-encoded. Dots are too, since
    WebDataset takes everything after the first dot for the extension. No two ids have the same key.
    """
    key = quote(image_id, safe="").replace(".", "%2E") or "%"
    if len(key) <= LONGEST_KEY:
        return key
    # Percent-encoding never produces "%-", so a shortened key cannot equal that of another picture.
    return f"{key[:200]}%-{hashlib.sha256(image_id.encode()).hexdigest()[:32]}"


_WRITERS = {
    "hf": _write_hub_layout,
    "webdataset": _with_pictures(_write_tars),
    "kohya": _with_pictures(_write_pairs),
    "messages": _write_messages,
}
