"""Captions that cannot be stored because the database is unavailable, kept on disk until they can be.

There is one file per worker process, with one JSON object per line; it is fsynced, and locked (flock) while the process
lives. A file that is not locked belongs to a worker that is gone, and any other worker may store its content.
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
    """Completions of one lease, and the ids of jobs that its worker released when it stopped.

    `uuid` is that of the worker, by which a database recognises whether it gave the lease.
    """

    uuid: str
    lease: Lease
    completions: tuple[Completion, ...] = ()
    released: tuple[int, ...] = ()


def folder_of(url: URL) -> Path:
    """ROCOCAP_SPOOL if it is set, else a folder beside the SQLite file, or in the working directory for PostgreSQL."""
    if named := os.environ.get("ROCOCAP_SPOOL"):
        return Path(named)
    return Path(f"{url.database}.spool" if url.get_backend_name() == "sqlite" else "rococap.spool")


class Spool:
    """What one worker could not store, oldest first, in memory and in a file that outlives the worker."""

    def __init__(self, folder: Path, uuid: str) -> None:
        self.entries: list[Entry] = []
        self.folder = folder
        self._uuid = uuid
        self._unwritten: list[Entry] = []
        self._path = folder / f"{uuid}.jsonl"
        self._file: FileIO | None = None

    def add(self, lease: Lease, completions: Sequence[Completion] = (), released: Sequence[int] = ()) -> None:
        """Keeps completions and releases. Raises OSError if they cannot be written; they stay in memory nevertheless,
        and the next call tries to write them again.
        """
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
        """Removes everything, after it has been stored."""
        self.entries.clear()
        self._unwritten.clear()
        if self._file is not None:
            _remove(self._path)
        self.close()

    def close(self) -> None:
        """Releases the lock, which leaves the file to other workers."""
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
        if _is_at(file, path):  # else another worker took the new file for an abandoned one, and removed it
            return file
        file.close()


def _append(file: FileIO, line: bytes) -> None:
    """Writes the whole line or nothing, so that the next line does not follow a torn one. Raises OSError."""
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
    except OSError:  # other workers have files in it
        return


def waiting(folder: Path) -> dict[Path, int]:
    """How many completions each file of the folder contains."""
    return {path: sum(len(entry.completions) for entry in _read(path)[0]) for path in sorted(folder.glob("*.jsonl"))}


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Yields whether the file belongs to no living worker; if so, it is locked until the block ends."""
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
    """What workers that are gone have left, file by file: the entries, and a function to call with those to keep.

    A file stays locked until the next one is requested.
    """
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
    """The entries of a file, and whether they are all of it: lines of another version are left to that version."""
    *lines, _ = path.read_bytes().split(b"\n")  # text after the last newline was cut off before it was fsynced
    entries = []
    for line in lines:
        try:
            entries.append(_from_json(json.loads(line)))
        except (ValueError, TypeError, KeyError):
            _warn(path)
    return entries, len(entries) == len(lines)


@cache
def _warn(path: Path) -> None:
    log.warning("%s contains lines that this version of rococap cannot read, and was left as it is", path)


def _line(entry: Entry) -> bytes:
    lease = {name: getattr(entry.lease, name) for name in ("id", "worker_id", "run_id", "split", "lane")}
    completions = [asdict(completion) for completion in entry.completions]
    value = {"worker": entry.uuid, "lease": lease, "completions": completions, "released": entry.released}
    return json.dumps(value).encode() + b"\n"


def _from_json(value: dict[str, Any]) -> Entry:
    completions = (
        Completion(**{**c, "failure": Failure(**c["failure"]) if c["failure"] else None}) for c in value["completions"]
    )
    lease = Lease(**value["lease"])
    return Entry(value["worker"], lease, tuple(completions), tuple(value["released"]))
