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
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

from sqlalchemy.engine import URL

from rococap.engines import Completion, Failure
from rococap.queue import Lease

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """Completions of one lease; `uuid` is its worker's, by which a database knows whether it gave the lease."""

    uuid: str
    lease: Lease
    completions: tuple[Completion, ...]


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
        self._path = folder / f"{uuid}.jsonl"
        self._file: FileIO | None = None

    def add(self, lease: Lease, completions: Sequence[Completion]) -> None:
        """Keeps completions. Raises OSError if they cannot be written: then they are kept in memory only."""
        entry = Entry(self._uuid, lease, tuple(completions))
        self.entries.append(entry)
        if self._file is None:
            self._file = _create(self._path)
        _append(self._file, json.dumps(_as_json(entry)).encode() + b"\n")

    def clear(self) -> None:
        """All is stored: nothing is left on disk."""
        self.entries.clear()
        if self._file is not None:
            _remove(self._path)
        self.close()

    def close(self) -> None:
        """Leaves what is on disk to the next worker."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _create(path: Path) -> FileIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = FileIO(path, "a+")
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
    return {path: sum(len(entry.completions) for entry in _read(path)) for path in sorted(folder.glob("*.jsonl"))}


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


def abandoned(folder: Path) -> Iterator[tuple[list[Entry], Callable[[], None]]]:
    """What workers that are gone left behind, file by file: its entries, and what to call when all are stored."""
    for path in sorted(folder.glob("*.jsonl")):
        with _locked(path) as is_ours:
            if is_ours:
                yield _read(path), partial(_remove, path)


def _read(path: Path) -> list[Entry]:
    entries = []
    for line in path.read_bytes().splitlines():
        try:
            entries.append(_from_json(json.loads(line)))
        except (ValueError, TypeError, KeyError):  # cut off while it was written, before it was fsynced
            log.warning("%s holds a line that is not whole: left out", path)
    return entries


def _as_json(entry: Entry) -> dict[str, Any]:
    lease = {name: getattr(entry.lease, name) for name in ("id", "worker_id", "run_id", "split", "lane")}
    return {"worker": entry.uuid, "lease": lease, "completions": [asdict(one) for one in entry.completions]}


def _from_json(value: dict[str, Any]) -> Entry:
    completions = (
        Completion(**{**one, "failure": Failure(**one["failure"]) if one["failure"] else None})
        for one in value["completions"]
    )
    return Entry(value["worker"], Lease(**value["lease"], jobs=()), tuple(completions))
