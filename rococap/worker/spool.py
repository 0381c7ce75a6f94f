"""Captions whose database is away, on disk until they can be stored.

One file per worker process, a JSON object a line, fsynced, and locked (flock) for as long as the process lives. A file
whose lock is free was left by a worker that is gone: whoever comes next stores what it holds.
"""

import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from io import FileIO
from pathlib import Path
from typing import Any

from sqlalchemy.engine import URL

from rococap.engines import Completion, Failure
from rococap.queue import Lease

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """Completions of one lease, and jobs that its worker gave back when it stopped.

    `uuid` is the worker's, by which a database knows whether it gave the lease.
    """

    uuid: str
    lease: Lease
    completions: tuple[Completion, ...] = ()
    released: tuple[int, ...] = ()


def folder_of(url: URL) -> Path:
    """ROCOCAP_SPOOL, else a folder beside the SQLite file, or in the working directory for PostgreSQL."""
    if named := os.environ.get("ROCOCAP_SPOOL"):
        return Path(named)
    return Path(f"{url.database}.spool" if url.get_backend_name() == "sqlite" else "rococap.spool")


class Spool:
    """What one worker could not store, oldest first: in memory, and in a file for those who come after it."""

    def __init__(self, folder: Path, uuid: str) -> None:
        self.entries: list[Entry] = []
        self.folder = folder
        self._uuid = uuid
        self._unwritten: list[Entry] = []
        self._path = folder / f"{uuid}.jsonl"
        self._file: FileIO | None = None

    def add(self, lease: Lease, completions: Sequence[Completion] = (), released: Sequence[int] = ()) -> None:
        """Keeps them. Raises OSError if they cannot be written: they stay in memory, and the next call tries again."""
        entry = Entry(self._uuid, lease, tuple(completions), tuple(released))
        self.entries.append(entry)
        self._unwritten.append(entry)
        if self._file is None:
            self._file = _create(self._path)
        while self._unwritten:
            _append(self._file, _line(self._unwritten[0]))
            del self._unwritten[0]

    def n_written(self) -> int:
        """How many captions are on disk."""
        return sum(len(entry.completions) for entry in self.entries if entry not in self._unwritten)

    def clear(self) -> None:
        """All is stored: nothing is left on disk."""
        self.entries.clear()
        self._unwritten.clear()
        if self._file is not None:
            _remove(self._path)
        self.close()

    def close(self) -> None:
        """Leaves what is on disk to the next worker."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _create(path: Path) -> FileIO:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = FileIO(path, "a+")
        except FileNotFoundError:  # another worker has just removed the empty folder
            continue
        fcntl.flock(file, fcntl.LOCK_EX)
        if _is_at(file, path):  # else somebody took the new file for an abandoned one, and removed it
            return file
        file.close()


def _append(file: FileIO, line: bytes) -> None:
    """All of the line or nothing: the next one must not be glued to a torn one."""
    end = os.fstat(file.fileno()).st_size
    try:
        while line:
            line = line[file.write(line) :]
        os.fsync(file.fileno())
    except OSError:
        file.truncate(end)
        raise


def _is_at(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    try:
        path.parent.rmdir()
    except OSError:  # others are in it
        return


def waiting(folder: Path) -> dict[Path, int]:
    """How many completions each file holds."""
    return {path: sum(len(entry.completions) for entry in _read(path)[0]) for path in sorted(folder.glob("*.jsonl"))}


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether the file was left behind; then it is ours as long as the block runs."""
    try:
        file = FileIO(path, "r+")
    except OSError:
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield _is_at(file, path)


def abandoned(folder: Path) -> Iterator[tuple[list[Entry], Callable[[list[Entry]], None]]]:
    """What workers that are gone left behind, file by file: its entries, and what to call with those to be kept."""
    for path in sorted(folder.glob("*.jsonl")):
        with _locked(path) as is_ours:
            if is_ours:
                entries, is_read = _read(path)
                yield entries, partial(_keep, path) if is_read else lambda kept: None


def _keep(path: Path, entries: list[Entry]) -> None:
    if not entries:
        _remove(path)
        return
    new = path.with_suffix(".part")
    with new.open("wb") as file:
        file.writelines(map(_line, entries))
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _read(path: Path) -> tuple[list[Entry], bool]:
    """Its entries, and whether that is all of it: a line of another version is left to that."""
    *lines, _ = path.read_bytes().split(b"\n")  # what follows the last line was cut off before it was fsynced
    entries = []
    for line in lines:
        try:
            entries.append(_from_json(json.loads(line)))
        except (ValueError, TypeError, KeyError):
            _warn(path)
    return entries, len(entries) == len(lines)


@cache
def _warn(path: Path) -> None:
    log.warning("%s holds what this version of rococap cannot read, and is left as it is", path)


def _line(entry: Entry) -> bytes:
    lease = {name: getattr(entry.lease, name) for name in ("id", "worker_id", "run_id", "split", "lane")}
    completions = [asdict(one) for one in entry.completions]
    value = {"worker": entry.uuid, "lease": lease, "completions": completions, "released": entry.released}
    return json.dumps(value).encode() + b"\n"


def _from_json(value: dict[str, Any]) -> Entry:
    completions = (
        Completion(**{**one, "failure": Failure(**one["failure"]) if one["failure"] else None})
        for one in value["completions"]
    )
    lease = Lease(**value["lease"])
    return Entry(value["worker"], lease, tuple(completions), tuple(value["released"]))
