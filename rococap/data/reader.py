"""Reads pictures by their place, and compares the id beside each one."""

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unicodedata import normalize

from rococap.data.folders import SUFFIXES, Index, inner_folders, suffix_of, top_folders
from rococap.data.layout import CAPTIONS
from rococap.data.parquet import batches, open_parquet
from rococap.data.places import Columns, Place, file_name, is_row_id
from rococap.errors import DatasetError, PictureError

ROWS_PER_PICTURE_BATCH = 32

_PASSING = frozenset([errno.EAGAIN, errno.EIO, errno.EINTR, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT])
"""Errors of a disk or a network share that may be gone at the next try."""


def _raised(data: bytes | PictureError) -> bytes:
    if isinstance(data, PictureError):
        raise data
    return data


class PictureReader:
    """Reads pictures by their place. For one thread; what it holds is one open shard and one batch of rows.

    Places come sorted. Reading goes on in an open row group across calls, so that a row group is read once
    however small the claims are; a place further back opens it again. How much is read ahead is bounded by the
    batch and by the size of a Parquet page, not by the row group. A folder of pictures is listed once, and only
    where a picture does not lie under the name that is tried first.
    """

    def __init__(self, root: Path) -> None:
        self.row_groups_opened = 0
        self._root = Path(os.path.normpath(root))
        self._shard: str | None = None
        self._opened: tuple[int, ...] = ()
        self._file: Any = None
        self._cursor: _Cursor | None = None
        self._tops: dict[str, list[Path]] = {}
        self._indexes: dict[tuple[Path, ...], Index] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._shard = self._file = self._cursor = None

    def read(self, places: Sequence[Place]) -> Iterator[tuple[Place, bytes | PictureError]]:
        """One item for each place, in that order. DatasetError where a whole shard is gone or broken."""
        for place in places:
            if place.shard.lower().endswith(CAPTIONS):
                yield place, self._picture_in_folder(place)
            else:
                yield place, self._picture_in_shard(place)

    def picture(self, place: Place) -> bytes:
        """One picture. Raises PictureError if it cannot be read, DatasetError where its whole shard is gone."""
        ((_, data),) = self.read([place])
        return _raised(data)

    def look(self, place: Place) -> bytes:
        """The picture at a place; of a Parquet shard whatever its id. Raises as `picture` does."""
        if place.shard.lower().endswith(CAPTIONS):
            return _raised(self._picture_in_folder(place))
        row = self._at(place).row(place.row_in_group)
        return _raised(_moved(place, None) if row is None else self._picture(place, row))

    def _picture_in_shard(self, place: Place) -> bytes | PictureError:
        try:
            row = self._at(place).row(place.row_in_group)
        except DatasetError:
            # The file may be replaced by a whole one: the next read has to look at it afresh.
            self.close()
            raise
        if (row is None or not row.is_of(place)) and self._was_replaced():
            self.close()
            row = self._at(place).row(place.row_in_group)
        if row is None or not row.is_of(place):
            return _moved(place, row)
        return self._picture(place, row)

    def _was_replaced(self) -> bool:
        """Whether the open shard is another file by now: what is read from it is then the old one."""
        try:
            return self._shard is not None and _identity(self._root / self._shard) != self._opened
        except OSError:
            return True

    def _at(self, place: Place) -> "_Cursor":
        if place.shard != self._shard:
            self.close()
            self._file = open_parquet(self._root / place.shard, place.columns)
            self._shard, self._opened = place.shard, _identity(self._root / place.shard)
        cursor = self._cursor
        if cursor is None or not cursor.reaches(place.row_group, place.row_in_group):
            cursor = _Cursor(self._file, self._root / place.shard, place.row_group, place.columns)
            self.row_groups_opened += 1
        self._cursor = cursor
        return cursor

    def _picture(self, place: Place, row: "_Row") -> bytes | PictureError:
        if row.data is not None:
            return row.data
        if row.path:
            return self._first_of(place, self._by_path(row.path), row.path)
        return PictureError(
            "no_picture", f"{place.shard} holds no picture for {place.image_id}: replace the shard, then retry."
        )

    def _picture_in_folder(self, place: Place) -> bytes | PictureError:
        name = place.image_id
        if "/" in name:
            return _missing(place, name)
        tops = self._tops.get(place.split)
        if tops is None:
            tops = self._tops[place.split] = top_folders(self._root, place.split)
        shown = f"{tops[0].name}/{name}" + ("" if suffix_of(name) else SUFFIXES[0])
        return self._first_of(place, chain(_usual(tops, name), self._indexed(tops, name, deep=True)), shown)

    def _by_path(self, path: str) -> Iterator[Path]:
        for form in dict.fromkeys((path, normalize("NFC", path), normalize("NFD", path))):
            yield from self._inside(form)
        for form in dict.fromkeys((path, normalize("NFC", path), normalize("NFD", path))):
            for there in self._inside(form):
                yield from self._indexed([there.parent], there.name, deep=False)

    def _inside(self, path: str) -> Iterator[Path]:
        # A path comes from the data set: it may not lead out of it.
        absolute = Path(os.path.normpath(self._root / path))
        if absolute.is_relative_to(self._root) and absolute != self._root:
            yield absolute

    def _indexed(self, folders: Sequence[Path], name: str, *, deep: bool) -> Iterator[Path]:
        """What lies there under a name that is written otherwise. A generator: only a miss comes here."""
        key = tuple(folders)
        index = self._indexes.get(key)
        if index is None:
            index = self._indexes[key] = Index([*folders, *inner_folders(folders)] if deep else folders)
        yield from index.find(name)

    def _first_of(self, place: Place, candidates: Iterable[Path], shown: str) -> bytes | PictureError:
        try:
            for candidate in candidates:
                try:
                    return candidate.read_bytes()
                except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
                    continue
                except OSError as error:
                    return self._unreadable(place, candidate, error)
        except OSError as error:  # of a folder that was to be listed
            return self._unreadable(place, Path(error.filename or self._root), error)
        _require_readable(self._root / place.shard)
        return _missing(place, shown)

    def _unreadable(self, place: Place, path: Path, error: OSError) -> PictureError:
        _require_readable(self._root / place.shard)
        return PictureError(
            "unreadable_file",
            f"{path} cannot be read ({error.strerror}): check the file, then retry.",
            transient=error.errno in _PASSING,
        )


def _usual(folders: Sequence[Path], name: str) -> Iterator[Path]:
    for folder in folders:
        for suffix in SUFFIXES:
            yield folder / (name + suffix)
    if suffix_of(name):
        yield from (folder / name for folder in folders)


class _Row:
    """What a shard holds of one picture. Without a column of ids `image_id` is None."""

    def __init__(self, image: Any, image_id: str | None) -> None:
        fields = image if isinstance(image, dict) else {"bytes": image}
        self.data: bytes | None = fields.get("bytes")
        path = fields.get("path")
        self.path: str = path if isinstance(path, str) else ""
        self.image_id = image_id

    def is_of(self, place: Place) -> bool:
        if self.image_id is not None:
            return self.image_id == place.image_id
        # The number of a row is not beside its picture: nothing is there to be compared.
        return file_name(self.path) == place.image_id or is_row_id(place.image_id, place.split)

    def __repr__(self) -> str:
        return repr(self.image_id or file_name(self.path) or "a row without an id")


class _Cursor:
    """A position in one row group that only moves forward."""

    def __init__(self, file: Any, path: Path, row_group: int, columns: Columns) -> None:
        self._row_group = row_group
        self._batch: Any = None
        self._start = self._stop = 0
        self._image, self._image_id = columns.name("image"), columns.name("image_id")
        there = row_group < file.num_row_groups
        wanted = [name for name in (self._image, self._image_id) if name in file.schema_arrow.names]
        self._has_ids = self._image_id in wanted
        self._batches = batches(file, path, wanted, ROWS_PER_PICTURE_BATCH, [row_group]) if there else iter(())

    def reaches(self, row_group: int, row: int) -> bool:
        return row_group == self._row_group and row >= self._start

    def row(self, row: int) -> _Row | None:
        while row >= self._stop:
            batch = next(self._batches, None)
            if batch is None:
                return None
            self._start, self._stop, self._batch = self._stop, self._stop + batch.num_rows, batch
        at = row - self._start
        image_id = str(self._batch.column(self._image_id)[at].as_py()) if self._has_ids else None
        return _Row(self._batch.column(self._image)[at].as_py(), image_id)


def _identity(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _moved(place: Place, row: _Row | None) -> PictureError:
    found = "nothing" if row is None else repr(row)
    return PictureError(
        "moved",
        f"{place.shard} holds {found} in row group {place.row_group}, row {place.row_in_group}, where "
        f"{place.image_id!r} was enqueued: the file was changed, enqueue the data set again.",
    )


def _missing(place: Place, shown: str) -> PictureError:
    return PictureError("missing_file", f"There is no file {shown} for {place.image_id}: restore it, then retry.")


def _require_readable(path: Path) -> None:
    """Tells one missing picture from a disk that is not mounted."""
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be read ({error.strerror}): check that the disk is mounted, then run this again."
        ) from error
