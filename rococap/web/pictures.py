"""The pictures themselves: thumbnails and full pictures, as the model saw them, read from the shards on demand.

Thumbnails are kept in a folder of a limited size, which several processes may share. Nothing is downloaded.
"""

import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Final, Literal

from PIL import Image
from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from rococap.data import PictureReader, Place
from rococap.data.images import open_picture
from rococap.db import execute
from rococap.errors import DatasetError, PictureError, RococapError
from rococap.files import replacing
from rococap.queue import PLACE, Run, place_of
from rococap.scores.gallery import EDGE, reduced, root_of
from rococap.scores.shown import folders_of, short_within

MAX_BYTES: Final = 256_000_000
"""Default limit of the folder of thumbnails, which is about 13,000 of them."""
_KEPT: Final = 0.9
"""What stays when the folder is too large: so it is listed only now and then."""


class PictureGone(RococapError):
    """A picture cannot be shown, for the reason that the message gives. `code` is that of a PictureError, `shard` if
    its whole file cannot be read, or `not_downloaded`.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Source:
    """Where a picture is, and the digest of its shard, which changes with the file."""

    place: Place
    digest: str


def source_of(conn: Connection, run: Run, image: int) -> Source | None:
    """Where the picture with this id in the database is; None if the run's data set has no such picture."""
    sql = (
        f"SELECT {PLACE}, s.digest FROM images i JOIN shards s ON s.id = i.shard_id WHERE i.id = ? AND i.dataset_id = ?"
    )
    row = execute(conn, sql, (image, run.dataset_id)).one_or_none()
    return None if row is None else Source(place_of(row[:-1], run.columns), row[-1])


class Thumbnails:
    """A folder of small files, of which those that were read longest ago go first when they exceed `max_bytes`.

    A file is there whole or not at all; processes that share the folder may each exceed the limit by a tenth. A folder
    that cannot be written keeps nothing.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._lock = threading.Lock()
        self._n_bytes: int | None = None

    def get(self, key: str) -> bytes | None:
        """The file with this key, a digest."""
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with suppress(RococapError, OSError), self._lock:
            with replacing(path) as partial:
                partial.write_bytes(data)
            self._n_bytes = self._listed() if self._n_bytes is None else self._n_bytes + len(data)
            if self._n_bytes > self._max_bytes:
                self._n_bytes = self._shrink()

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.jpg"

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        for path in self._folder.glob("??/*"):
            with suppress(OSError):  # another process has just removed it
                stat = path.stat()
                yield stat.st_mtime, stat.st_size, path

    def _listed(self) -> int:
        return sum(size for _, size, _ in self._files())

    def _shrink(self) -> int:
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= _KEPT * self._max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total


def folder_of(database: Database) -> Path:
    """The folder of a queue's thumbnails: beside an SQLite file, else in the user's cache."""
    if database.dialect.name == "sqlite":
        return Path(f"{database.url.database}.thumbnails")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "rococap" / "thumbnails"


@dataclass(slots=True)
class _Reader:
    """A reader of one data set, with the digest of the shard that it has open."""

    reader: PictureReader
    digest: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


class Pictures:
    """Reads pictures of any run, for any number of threads. One at a time is read of a data set, since neighbours on a
    page are neighbours in a shard, which is read once for all of them.
    """

    def __init__(self, thumbnails: Thumbnails) -> None:
        self._thumbnails = thumbnails
        self._lock = threading.Lock()
        self._readers: dict[Path, _Reader] = {}

    def close(self) -> None:
        """Closes the open shards."""
        for one in self._readers.values():
            with one.lock:
                one.reader.close()

    def thumbnail(self, run: Run, source: Source) -> bytes:
        """A JPEG of at most 256 pixels on each side. Raises PictureGone if the picture cannot be shown."""
        key = version_of(run, source)
        if (data := self._thumbnails.get(key)) is not None:
            return data
        with self._reader(run, source) as (reader, root):
            if (data := self._thumbnails.get(key)) is not None:  # made while this one waited
                return data
            data = reduced(_picture(reader, run, source, root))
        self._thumbnails.put(key, data)
        return data

    def prepare(self, run: Run, sources: Sequence[Source]) -> None:
        """Makes the thumbnails of a page, in the order of the shards. Those that cannot be made are left out."""
        for source in sorted(sources, key=lambda one: (one.place.shard, one.place.row_group, one.place.row_in_group)):
            with suppress(PictureGone):
                self.thumbnail(run, source)

    def full(self, run: Run, source: Source, kind: Literal["png", "jpeg"] = "png") -> bytes:
        """The picture in all its pixels: upright RGB, as the model saw it before its size was limited. A PNG is exact.

        Raises PictureGone if the picture cannot be shown.
        """
        with self._reader(run, source) as (reader, root):
            picture = _picture(reader, run, source, root)
        file = BytesIO()
        if kind == "png":
            picture.save(file, "PNG", compress_level=1)
        else:
            picture.save(file, "JPEG", quality=92)
        return file.getvalue()

    @contextmanager
    def _reader(self, run: Run, source: Source) -> Iterator[tuple[PictureReader, Path]]:
        root, absent = root_of(run, [source.place.shard])
        if absent:
            raise PictureGone("not_downloaded", absent)
        with self._lock:
            found = self._readers.setdefault(root, _Reader(PictureReader(root)))
        with found.lock:
            if found.digest != source.digest:  # another shard, or this one was replaced and registered again
                found.reader.close()
                found.digest = source.digest
            yield found.reader, root


def version_of(run: Run, source: Source) -> str:
    """A digest of all that decides what the picture and its thumbnail look like."""
    place = source.place
    where = (run.dataset, run.dataset_revision, place.shard, source.digest, place.row_group, place.row_in_group)
    parts = (*where, place.image_id, place.columns, run.recipe.frame, run.recipe.rules, EDGE)
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def _picture(reader: PictureReader, run: Run, source: Source, root: Path) -> Image.Image:
    try:
        return open_picture(reader.picture(source.place), run.recipe.frame)
    except (DatasetError, PictureError, OSError) as error:
        code = error.code if isinstance(error, PictureError) else "shard"
        raise PictureGone(code, short_within(str(error), [str(root), *folders_of(run)])) from error
