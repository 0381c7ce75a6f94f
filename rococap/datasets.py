"""Where captions and pictures come from: a folder, or a data set of the hub. Knows no database and no model.

Two layouts are read. Parquet, as on the hub: `data/{split}-000NN-of-000MM.parquet`, or the same without
`data/`, with the columns image (a struct of bytes and path), image_id, caption and, if there, cui. And folders
of pictures, as on Zenodo and in ImageCLEF: `{split}/{ID}.jpg`, `{split}_captions.csv` and, if there,
`{split}_concepts_manual.csv` or `{split}_concepts.csv`.

`samples` never reads a picture. `PictureReader` reads them by their place, and compares the id beside each one.
"""

import csv
import errno
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from rococap.errors import DatasetError, PictureError

SPLITS = ("train", "validation", "test")

# Zenodo and ImageCLEF call their files valid_*, while the split is named validation.
INFIXES = {"validation": ("valid", "validation")}

SHARD_NAME = re.compile(r"(?P<split>.+)-(?P<number>\d{5,})-of-(?P<total>\d{5,})(-[0-9a-f]+)?\.parquet")
CAPTIONS_NAME = re.compile(r"(?P<infix>.+)_captions\.csv")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w][\w.-]*")

SUFFIXES = (".jpg", ".jpeg", ".png")
ROWS_PER_TEXT_BATCH = 8192
ROWS_PER_PICTURE_BATCH = 32
NAMES_IN_A_MESSAGE = 5


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a split. `path` is relative to the data set's root, with forward slashes."""

    path: str
    split: str
    rows: int
    row_groups: int
    size: int
    digest: str
    """Of the Parquet footer, or of the captions CSV and its concepts: a file that was changed has another one."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One row without its picture: what the data set says, and the place in its shard."""

    image_id: str
    caption: str
    cui: tuple[str, ...]
    row_group: int
    row_in_group: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a picture was when it was enqueued."""

    shard: str
    split: str
    row_group: int
    row_in_group: int
    image_id: str


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set that is on this machine. `revision` is the commit on the hub, or "" for a folder."""

    name: str
    root: Path
    revision: str


def locate(name: str, splits: Sequence[str], revision: str | None = None) -> Dataset:
    """A folder as it is; of a hub data set the Parquet files of `splits`, downloaded where they are not cached."""
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        if revision is not None:
            raise DatasetError(f"{name} is a folder, and folders have no revisions: leave the revision out.")
        root = folder.resolve()
        return Dataset(str(root), root, "")
    if folder.exists():
        raise DatasetError(f"{name} is a file: give the folder that holds it.")
    if not HUB_ID.fullmatch(name):
        raise DatasetError(f"There is no folder {name}: check the path, or name a data set of the hub as owner/name.")
    return _download(name, splits, revision)


def find_shards(root: Path, split: str) -> list[Shard]:
    """The files of a split, in data set order."""
    if not root.is_dir():
        raise DatasetError(f"There is no folder {root}: check the path.")
    if files := _parquet_files(root, split):
        return [_parquet_shard(root, path, split) for path in files]
    if captions := _captions_file(root, split):
        return [_csv_shard(root, captions, split)]
    raise _no_such_split(root, split)


def samples(root: Path, shard: Shard) -> Iterator[Sample]:
    """The rows of a shard in their order, read as they are asked for."""
    if shard.path.endswith(".csv"):
        return _csv_samples(root, shard)
    return _parquet_samples(root, shard)


_PASSING = frozenset([errno.EAGAIN, errno.EIO, errno.EINTR, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT])
"""Errors of a disk or a network share that may be gone at the next try."""


class PictureReader:
    """Reads pictures by their place. For one thread; what it holds is one open shard and one batch of rows.

    Places come sorted. Reading goes on in an open row group across calls, so that a row group is read once
    however small the claims are; a place further back opens it again. How much is read ahead is bounded by the
    batch and by the size of a Parquet page, not by the row group.
    """

    def __init__(self, root: Path) -> None:
        self.row_groups_opened = 0
        self._root = Path(os.path.normpath(root))
        self._shard: str | None = None
        self._opened: tuple[int, ...] = ()
        self._file: Any = None
        self._cursor: _Cursor | None = None
        self._folders: dict[str, list[Path]] = {}

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
            if place.shard.endswith(".csv"):
                yield place, self._picture_in_folder(place)
            else:
                yield place, self._picture_in_shard(place)

    def _picture_in_shard(self, place: Place) -> bytes | PictureError:
        try:
            row = self._at(place).row(place.row_in_group)
        except DatasetError:
            # The file may be replaced by a whole one: the next read has to look at it afresh.
            self.close()
            raise
        if (row is None or row["image_id"] != place.image_id) and self._was_replaced():
            self.close()
            row = self._at(place).row(place.row_in_group)
        if row is None or row["image_id"] != place.image_id:
            return _moved(place, row)
        return self._picture(place, row["image"] or {})

    def _was_replaced(self) -> bool:
        """Whether the open shard is another file by now: what is read from it is then the old one."""
        try:
            return self._shard is not None and _identity(self._root / self._shard) != self._opened
        except OSError:
            return True

    def _at(self, place: Place) -> "_Cursor":
        if place.shard != self._shard:
            self.close()
            self._file = _open_parquet(self._root / place.shard)
            self._shard, self._opened = place.shard, _identity(self._root / place.shard)
        cursor = self._cursor
        if cursor is None or not cursor.reaches(place.row_group, place.row_in_group):
            cursor = _Cursor(self._file, self._root / place.shard, place.row_group)
            self.row_groups_opened += 1
        self._cursor = cursor
        return cursor

    def _picture(self, place: Place, image: dict[str, Any]) -> bytes | PictureError:
        data: bytes | None = image.get("bytes")
        if data is not None:
            return data
        if path := image.get("path"):
            return self._first_of(place, self._inside(path), path)
        return PictureError(
            "no_picture", f"{place.shard} holds no picture for {place.image_id}: replace the shard, then retry."
        )

    def _picture_in_folder(self, place: Place) -> bytes | PictureError:
        if "/" in place.image_id:
            return _missing(place, place.image_id)
        folders = self._folders.get(place.split)
        if folders is None:
            folders = self._folders[place.split] = _picture_folders(self._root, place.split)
        candidates = (folder / (place.image_id + suffix) for folder in folders for suffix in SUFFIXES)
        return self._first_of(place, candidates, f"{_infixes(place.split)[0]}/{place.image_id}{SUFFIXES[0]}")

    def _inside(self, path: str) -> Iterator[Path]:
        # A path comes from the data set: it may not lead out of it.
        absolute = Path(os.path.normpath(self._root / path))
        if absolute.is_relative_to(self._root):
            yield absolute

    def _first_of(self, place: Place, candidates: Iterable[Path], shown: str) -> bytes | PictureError:
        for candidate in candidates:
            try:
                return candidate.read_bytes()
            except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
                continue
            except OSError as error:
                _require_readable(self._root / place.shard)
                return PictureError(
                    "unreadable_file",
                    f"{candidate} cannot be read ({error.strerror}): check the file, then retry.",
                    transient=error.errno in _PASSING,
                )
        _require_readable(self._root / place.shard)
        return _missing(place, shown)


class _Cursor:
    """A position in one row group that only moves forward."""

    def __init__(self, file: Any, path: Path, row_group: int) -> None:
        self._row_group = row_group
        self._batch: Any = None
        self._start = self._stop = 0
        there = row_group < file.num_row_groups
        self._batches = (
            _batches(file, path, ["image", "image_id"], ROWS_PER_PICTURE_BATCH, [row_group]) if there else iter(())
        )

    def reaches(self, row_group: int, row: int) -> bool:
        return row_group == self._row_group and row >= self._start

    def row(self, row: int) -> dict[str, Any] | None:
        while row >= self._stop:
            batch = next(self._batches, None)
            if batch is None:
                return None
            self._start, self._stop, self._batch = self._stop, self._stop + batch.num_rows, batch
        return {name: self._batch.column(name)[row - self._start].as_py() for name in self._batch.schema.names}


def _identity(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _moved(place: Place, row: dict[str, Any] | None) -> PictureError:
    found = "nothing" if row is None else repr(row["image_id"])
    return PictureError(
        "moved",
        f"{place.shard} holds {found} in row group {place.row_group}, row {place.row_in_group}, where "
        f"{place.image_id!r} was enqueued: the file was changed, enqueue the data set again.",
    )


def _missing(place: Place, shown: str) -> PictureError:
    return PictureError("missing_file", f"There is no file {shown} for {place.image_id}: restore it, then retry.")


# ---- Parquet


def _parquet_files(root: Path, split: str) -> list[Path]:
    for folder in (root / "data", root):
        if files := [(path, name) for path, name in _shard_names(folder) if name["split"] == split]:
            _require_one_whole_set(folder, split, [name for _, name in files])
            return [path for path, _ in sorted(files, key=lambda file: int(file[1]["number"]))]
    return []


def _shard_names(folder: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    if folder.is_dir():
        for path in folder.iterdir():
            if name := SHARD_NAME.fullmatch(path.name):
                yield path, name


def _require_one_whole_set(folder: Path, split: str, names: Sequence[re.Match[str]]) -> None:
    totals = sorted({name["total"] for name in names})
    numbers = {int(name["number"]) for name in names}
    if len(totals) > 1 or len(numbers) < len(names) or max(numbers) >= int(totals[0]):
        raise DatasetError(
            f"{folder} holds shards of more than one set for the split {split!r} (of {', of '.join(totals)}): "
            "keep one set and move the others away."
        )
    if missing := sorted(set(range(int(totals[0]))) - numbers):
        listed = [f"{split}-{number:05d}-of-{totals[0]}.parquet" for number in missing[:NAMES_IN_A_MESSAGE]]
        more = len(missing) - len(listed)
        raise DatasetError(
            f"{folder} lacks {len(missing)} of the {int(totals[0])} shards of the split {split!r}: "
            f"{', '.join(listed)}{f' and {more} more' if more else ''}. Download them, then run this again."
        )


def _parquet_shard(root: Path, path: Path, split: str) -> Shard:
    with _open_parquet(path) as file:
        rows, row_groups = file.metadata.num_rows, file.num_row_groups
    relative = path.relative_to(root).as_posix()
    return Shard(relative, split, rows, row_groups, path.stat().st_size, _footer_digest(path))


def _footer_digest(path: Path) -> str:
    with path.open("rb") as file:
        # A Parquet file ends with its footer, four bytes that hold the footer's length, and PAR1.
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, os.SEEK_END)
        return hashlib.sha256(file.read(length)).hexdigest()


def _open_parquet(path: Path) -> Any:
    try:
        # With pre_buffer a whole row group is held in memory: measured 410 MB instead of 10.
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is gone: restore it or download it again.") from error
    except (OSError, pa.ArrowException) as error:
        raise _broken(path, error) from error
    _check_columns(path, file.schema_arrow)
    return file


def _broken(path: Path, error: Exception) -> DatasetError:
    if isinstance(error, OSError) and error.errno:
        return DatasetError(f"{path} cannot be read ({os.strerror(error.errno)}): check the disk and the file's mode.")
    return DatasetError(f"{path} is not a Parquet file, or it is truncated or damaged: download it again.")


def _check_columns(path: Path, schema: Any) -> None:
    if missing := [name for name in ("image", "image_id", "caption") if name not in schema.names]:
        raise DatasetError(
            f"{path} lacks {_columns(missing)}; it has {_columns(schema.names)}. "
            "Rename its columns to image, image_id, caption and cui."
        )
    image = schema.field("image").type
    if not (pa.types.is_struct(image) and image.get_field_index("bytes") >= 0):
        raise _wrong_type(path, "image", image, "a struct with bytes")
    for name in ("image_id", "caption"):
        if not _is_text(schema.field(name).type):
            raise _wrong_type(path, name, schema.field(name).type, "text")
    if "cui" in schema.names and not _is_list_or_null(schema.field("cui").type):
        raise _wrong_type(path, "cui", schema.field("cui").type, "a list of text")


def _columns(names: Sequence[str]) -> str:
    return f"the column{'s' if len(names) > 1 else ''} {', '.join(names)}" if names else "no columns"


def _wrong_type(path: Path, column: str, found: Any, wanted: str) -> DatasetError:
    return DatasetError(f"{path}: the column {column} is {found}, not {wanted}. Write the file again.")


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_list_or_null(kind: Any) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_text(kind.value_type) or bool(pa.types.is_null(kind.value_type))
    return bool(pa.types.is_null(kind))


def _batches(
    file: Any, path: Path, columns: list[str], rows: int, row_groups: list[int] | None = None
) -> Iterator[Any]:
    try:
        yield from file.iter_batches(batch_size=rows, row_groups=row_groups, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise _broken(path, error) from error


def _parquet_samples(root: Path, shard: Shard) -> Iterator[Sample]:
    path = root / shard.path
    with _open_parquet(path) as file:
        columns = [name for name in ("image_id", "caption", "cui") if name in file.schema_arrow.names]
        places = _places(file.metadata)
        for batch in _batches(file, path, columns, ROWS_PER_TEXT_BATCH):
            ids = batch.column("image_id")
            if ids.null_count:
                raise DatasetError(f"{path}: {ids.null_count} rows have no image_id. Write the file again.")
            captions = batch.column("caption").to_pylist()
            concepts = batch.column("cui").to_pylist() if "cui" in columns else repeat(None)
            # The places come last: zip stops at the first iterator that ends, and must not have taken one more.
            for image_id, caption, cui, place in zip(ids.to_pylist(), captions, concepts, places, strict=False):
                yield Sample(image_id, caption or "", _concepts(cui), *place)


def _places(metadata: Any) -> Iterator[tuple[int, int]]:
    for group in range(metadata.num_row_groups):
        for row in range(metadata.row_group(group).num_rows):
            yield group, row


def _concepts(cui: Iterable[str | None] | None) -> tuple[str, ...]:
    # An empty cell of ROCOv2 became the one concept "nan" on its way to the hub.
    return tuple([concept for concept in cui if concept and concept != "nan"]) if cui else ()


# ---- folders of pictures


def _infixes(split: str) -> tuple[str, ...]:
    return INFIXES.get(split, (split,))


def _captions_file(root: Path, split: str) -> Path | None:
    return _first_file(root / f"{infix}_captions.csv" for infix in _infixes(split))


def _first_file(candidates: Iterable[Path]) -> Path | None:
    return next((path for path in candidates if path.is_file()), None)


def _no_such_split(root: Path, split: str) -> DatasetError:
    there = ", ".join(_splits_there(root))
    return DatasetError(
        f"{root} holds no split {split!r}, neither {split}-00000-of-000NN.parquet "
        f"nor {_infixes(split)[0]}_captions.csv. "
        + (f"It holds: {there}. Choose one of these." if there else "It holds no split: choose another folder.")
    )


def _splits_there(root: Path) -> list[str]:
    found = {name["split"] for folder in (root / "data", root) for _, name in _shard_names(folder)}
    split_of = {infix: split for split, infixes in INFIXES.items() for infix in infixes}
    for path in root.iterdir():
        if name := CAPTIONS_NAME.fullmatch(path.name):
            found.add(split_of.get(name["infix"], name["infix"]))
    return sorted(found, key=lambda split: (SPLITS.index(split) if split in SPLITS else len(SPLITS), split))


def _csv_shard(root: Path, captions: Path, split: str) -> Shard:
    rows = sum(1 for _ in _csv_rows(captions, ("ID", "Caption")))
    digest = hashlib.sha256(captions.read_bytes())
    if concepts := _concepts_file(captions):
        digest.update(concepts.read_bytes())
    return Shard(captions.relative_to(root).as_posix(), split, rows, 1, captions.stat().st_size, digest.hexdigest())


def _csv_samples(root: Path, shard: Shard) -> Iterator[Sample]:
    captions = root / shard.path
    concepts = _csv_concepts(captions)
    for row, (image_id, caption) in enumerate(_csv_rows(captions, ("ID", "Caption"))):
        yield Sample(image_id, caption, concepts.get(image_id, ()), 0, row)


def _concepts_file(captions: Path) -> Path | None:
    infix = captions.name.removesuffix("_captions.csv")
    return _first_file(captions.with_name(f"{infix}_{kind}.csv") for kind in ("concepts_manual", "concepts"))


def _csv_concepts(captions: Path) -> dict[str, tuple[str, ...]]:
    path = _concepts_file(captions)
    if path is None:
        return {}
    return {image_id: _concepts(cuis.split(";")) for image_id, cuis in _csv_rows(path, ("ID", "CUIs"))}


def _csv_rows(path: Path, columns: tuple[str, str]) -> Iterator[tuple[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            # Strict, since a file that was cut inside a quoted cell would otherwise end in silence.
            rows = csv.reader(file, strict=True)
            header = next(rows, [])
            first, second = _positions(path, header, columns)
            for row in rows:
                if len(row) == len(header):
                    yield row[first], row[second]
                elif row:
                    raise DatasetError(
                        f"{path}, line {rows.line_num}: {len(row)} cells where the header has {len(header)}. "
                        "Correct the line, or download the file again."
                    )
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is gone: restore it or download it again.") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path} cannot be read as UTF-8 CSV ({error}): download it again.") from error


def _positions(path: Path, header: list[str], columns: tuple[str, str]) -> tuple[int, int]:
    if missing := [name for name in columns if name not in header]:
        raise DatasetError(
            f"{path} lacks {_columns(missing)}; it has {_columns(header)}. "
            f"Rename its columns to {' and '.join(columns)}."
        )
    return header.index(columns[0]), header.index(columns[1])


def _picture_folders(root: Path, split: str) -> list[Path]:
    """`train` and `train_images`, and what lies directly in them: unzipping often adds a level."""
    tops = [root / f"{infix}{end}" for end in ("", "_images") for infix in _infixes(split)]
    tops = [top for top in tops if top.is_dir()]
    inner = [Path(entry.path) for top in tops for entry in os.scandir(top) if entry.is_dir()]
    if not tops:
        infix = _infixes(split)[0]
        raise DatasetError(
            f"{root} holds no pictures of the split {split!r}: unpack them as {infix}/ID.jpg or {infix}_images/ID.jpg."
        )
    return tops + sorted(inner)


def _require_readable(path: Path) -> None:
    """Tells one missing picture from a disk that is not mounted."""
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be read ({error.strerror}): check that the disk is mounted, then run this again."
        ) from error


# ---- the hub


def _download(name: str, splits: Sequence[str], revision: str | None) -> Dataset:
    # Imported here, since it costs 0.3 s and a folder needs none of it.
    from huggingface_hub import snapshot_download

    patterns = [f"{folder}{split}-*.parquet" for split in splits for folder in ("data/", "")]
    try:
        snapshot = snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns)
    # Its errors have no base in common: OSError, ValueError, those of its HTTP client, RuntimeError from Xet.
    except Exception as error:
        raise DatasetError(_why(error, name, revision)) from error
    root = Path(snapshot)
    for split in splits:
        if not _parquet_files(root, split):
            raise DatasetError(
                f"The data set {name} at {root.name} has no Parquet files for the split {split!r}: "
                "choose another split or revision, or give a folder."
            )
    return Dataset(name, root, root.name)


def cached(repo: str, path: str, revision: str, kind: str) -> str | None:
    """The file in the hub's cache, without a word to the hub; a download that broke off is none. `kind` is "dataset"
    or "model".
    """
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(repo, path, revision=revision, repo_type=kind)
    return file if isinstance(file, str) else None


def _why(error: Exception, name: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    match error:
        case errors.GatedRepoError():
            return (
                f"The data set {name} is gated: accept its terms at {constants.ENDPOINT}/datasets/{name}, "
                "log in with `hf auth login`, then run this again."
            )
        case errors.RepositoryNotFoundError() | errors.HFValidationError():
            return (
                f"There is no data set {name} on the hub, nor a folder of that name here, or you have no access: "
                "check the name, or log in with `hf auth login`."
            )
        case errors.RevisionNotFoundError():
            return (
                f"The data set {name} has no revision {revision}: "
                f"choose one of {constants.ENDPOINT}/datasets/{name}/commits."
            )
        case errors.LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return (
                f"HF_HUB_OFFLINE is set, and the data set {name} is not whole in the cache {constants.HF_HUB_CACHE}: "
                "unset it and run this again, or give a folder."
            )
        case _ if _refused(error):
            return (
                f"The hub refuses access to the data set {name} ({_reason(error)}): "
                "log in with `hf auth login`, with a token that may read it."
            )
        case errors.LocalEntryNotFoundError():
            return (
                f"The hub at {constants.ENDPOINT} cannot be used ({_reason(error)}), and the data set {name} is not "
                f"whole in the cache {constants.HF_HUB_CACHE}: check the network, then run this again; "
                "whole files are kept."
            )
        case OSError(errno=int(number)):
            full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            return (
                f"The data set {name} cannot be written to the cache {constants.HF_HUB_CACHE} "
                f"({os.strerror(number)}): {'free some space' if full else 'check the folder'}, or set HF_HOME to "
                "another disk, then run this again; whole files are kept."
            )
    return f"The download of {name} broke off ({_reason(error)}): run this again; whole files are kept."


def _refused(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    return any(
        isinstance(each, HfHubHTTPError) and each.response.status_code in (401, 403)
        for each in (error, error.__cause__)
    )


def _reason(error: Exception) -> str:
    """One line, from where the trouble began."""
    origin = error.__cause__ or error
    return next(iter(str(origin).strip().splitlines()), type(origin).__name__)
