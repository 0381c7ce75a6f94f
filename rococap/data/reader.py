"""Reads the bytes of pictures by their place, and verifies the id stored beside each. Decodes nothing."""

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

_TRANSIENT = frozenset([errno.EAGAIN, errno.EIO, errno.EINTR, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT])
"""Errors of a disk or a network share that may not occur again at the next attempt."""


def _data_or_raise(data: bytes | PictureError) -> bytes:
    if isinstance(data, PictureError):
        raise data
    return data


class PictureReader:
    """Reads pictures by their place, for one thread. Holds one open shard and one batch of rows.

    Places should come sorted. Reading continues in an open row group across calls, so that each row group is read once
    however small the claims are; a place further back opens it again. What is read ahead is bounded by the batch and by
    the size of a Parquet page, not by the row group. A folder of pictures is listed once, and only if a picture is not
    found under the usual names.
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
        """Closes the open shard. The reader may be used again."""
        if self._file is not None:
            self._file.close()
        self._shard = self._file = self._cursor = None

    def read(self, places: Sequence[Place]) -> Iterator[tuple[Place, bytes | PictureError]]:
        """Yields one (place, bytes or PictureError) for each place, in order.

        Raises DatasetError if a whole shard is missing or damaged.
        """
        for place in places:
            if place.shard.lower().endswith(CAPTIONS):
                yield place, self._picture_in_folder(place)
            else:
                yield place, self._picture_in_shard(place)

    def picture(self, place: Place) -> bytes:
        """Returns one picture. Raises PictureError if it cannot be read, DatasetError if its whole shard cannot."""
        ((_, data),) = self.read([place])
        return _data_or_raise(data)

    def look(self, place: Place) -> bytes:
        """Returns the picture at a place; in a Parquet shard, whatever its id. Raises the same errors as `picture`."""
        if place.shard.lower().endswith(CAPTIONS):
            return _data_or_raise(self._picture_in_folder(place))
        row = self._cursor_at(place).row(place.row_in_group)
        return _data_or_raise(_moved(place, None) if row is None else self._picture(place, row))

    def _picture_in_shard(self, place: Place) -> bytes | PictureError:
        try:
            row = self._cursor_at(place).row(place.row_in_group)
        except DatasetError:
            # The file may be replaced by an intact one, so the next read has to open it again.
            self.close()
            raise
        if (row is None or not row.is_of(place)) and self._was_replaced():
            self.close()
            row = self._cursor_at(place).row(place.row_in_group)
        if row is None or not row.is_of(place):
            return _moved(place, row)
        return self._picture(place, row)

    def _was_replaced(self) -> bool:
        """Whether the open shard was replaced on disk, so that its old content would be read."""
        try:
            return self._shard is not None and _identity(self._root / self._shard) != self._opened
        except OSError:
            return True

    def _cursor_at(self, place: Place) -> "_Cursor":
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
        return self._first_of(place, chain(_usual_paths(tops, name), self._indexed(tops, name, deep=True)), shown)

    def _by_path(self, path: str) -> Iterator[Path]:
        for form in dict.fromkeys((path, normalize("NFC", path), normalize("NFD", path))):
            yield from self._inside(form)
        for form in dict.fromkeys((path, normalize("NFC", path), normalize("NFD", path))):
            for candidate in self._inside(form):
                yield from self._indexed([candidate.parent], candidate.name, deep=False)

    def _inside(self, path: str) -> Iterator[Path]:
        # The path comes from the data set, and must not lead outside it.
        absolute = Path(os.path.normpath(self._root / path))
        if absolute.is_relative_to(self._root) and absolute != self._root:
            yield absolute

    def _indexed(self, folders: Sequence[Path], name: str, *, deep: bool) -> Iterator[Path]:
        """Yields files whose names are spelled differently. A generator, so that folders are listed only on a miss."""
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
        except OSError as error:  # raised by listing a folder
            return self._unreadable(place, Path(error.filename or self._root), error)
        _require_readable(self._root / place.shard)
        return _missing(place, shown)

    def _unreadable(self, place: Place, path: Path, error: OSError) -> PictureError:
        _require_readable(self._root / place.shard)
        return PictureError(
            "unreadable_file",
            f"{path} cannot be read ({error.strerror}): check the file, then retry.",
            transient=error.errno in _TRANSIENT,
        )


def _usual_paths(folders: Sequence[Path], name: str) -> Iterator[Path]:
    for folder in folders:
        for suffix in SUFFIXES:
            yield folder / (name + suffix)
    if suffix_of(name):
        yield from (folder / name for folder in folders)


class _Row:
    """What a shard holds for one picture. `image_id` is None if there is no column of ids."""

    def __init__(self, image: Any, image_id: str | None) -> None:
        fields = image if isinstance(image, dict) else {"bytes": image}
        self.data: bytes | None = fields.get("bytes")
        path = fields.get("path")
        self.path: str = path if isinstance(path, str) else ""
        self.image_id = image_id

    def is_of(self, place: Place) -> bool:
        if self.image_id is not None:
            return self.image_id == place.image_id
        # The number of a row is not stored beside its picture, so there is nothing to compare it with.
        return file_name(self.path) == place.image_id or is_row_id(place.image_id, place.split)

    def __repr__(self) -> str:
        return repr(self.image_id or file_name(self.path) or "a row without an id")


class _Cursor:
    """A position in one row group, which only moves forward."""

    def __init__(self, file: Any, path: Path, row_group: int, columns: Columns) -> None:
        self._row_group = row_group
        self._batch: Any = None
        self._start = self._stop = 0
        self._image, self._image_id = columns.name("image"), columns.name("image_id")
        exists = row_group < file.num_row_groups
        wanted = [name for name in (self._image, self._image_id) if name in file.schema_arrow.names]
        self._has_ids = self._image_id in wanted
        self._batches = batches(file, path, wanted, ROWS_PER_PICTURE_BATCH, [row_group]) if exists else iter(())

    def reaches(self, row_group: int, row: int) -> bool:
        return row_group == self._row_group and row >= self._start

    def row(self, row: int) -> _Row | None:
        while row >= self._stop:
            batch = next(self._batches, None)
            if batch is None:
                return None
            self._start, self._stop, self._batch = self._stop, self._stop + batch.num_rows, batch
        offset = row - self._start
        image_id = str(self._batch.column(self._image_id)[offset].as_py()) if self._has_ids else None
        return _Row(self._batch.column(self._image)[offset].as_py(), image_id)


def _identity(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _moved(place: Place, row: _Row | None) -> PictureError:
    found = "nothing" if row is None else repr(row)
    return PictureError(
        "moved",
        f"{place.shard} holds {found} in row group {place.row_group}, row {place.row_in_group}, where "
        f"{place.image_id!r} was enqueued: the file has changed, so enqueue the data set again.",
    )


def _missing(place: Place, shown: str) -> PictureError:
    return PictureError("missing_file", f"There is no file {shown} for {place.image_id}: restore it, then retry.")


def _require_readable(path: Path) -> None:
    """Raises DatasetError if the shard cannot be read: then the disk is missing, and not just one picture."""
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be read ({error.strerror}): check that the disk is mounted, then run this again."
        ) from error
