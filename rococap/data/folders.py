"""Reads data sets of pictures in folders with their captions in a CSV, as on Zenodo and in ImageCLEF.

Lists rows and picture files. Opens no picture, and knows nothing of Parquet.
"""

import csv
import hashlib
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rococap.data.layout import ALIASES, CAPTIONS
from rococap.data.places import STANDARD, Columns, Sample, Shard, concepts, listed
from rococap.errors import DatasetError

SUFFIXES = (".jpg", ".jpeg", ".png")
"""Suffixes tried, in this order, by opening the file before any folder is listed."""
ALL_SUFFIXES = (*SUFFIXES, ".tif", ".tiff", ".webp", ".bmp", ".dcm", ".gif", ".jp2", ".avif")
FOLDER_ENDS = ("", "_images")


def shard(root: Path, path: str, split: str, columns: Columns = STANDARD) -> Shard:
    """Describes the captions CSV at `path`, relative to `root`. Raises DatasetError if it cannot be read."""
    captions = root / path
    rows = sum(1 for _ in _captions(captions, columns))
    digest = hashlib.sha256(captions.read_bytes())
    if concepts_file := _concepts_file(captions):
        digest.update(concepts_file.read_bytes())
    return Shard(path, split, rows, 1, captions.stat().st_size, digest.hexdigest())


def samples(root: Path, shard: Shard, columns: Columns = STANDARD) -> Iterator[Sample]:
    """Yields the rows of a captions CSV with their concepts. Raises DatasetError if a CSV cannot be read."""
    captions = root / shard.path
    concepts_by_id = _concepts(captions, columns)
    for row, (image_id, caption) in enumerate(_captions(captions, columns)):
        yield Sample(image_id, caption, concepts_by_id.get(composed(image_id), ()), 0, row)


def composed(name: str) -> str:
    """Normalises a name to NFC: file names from macOS may hold ö as o and a combining mark, the CSV as one letter."""
    return unicodedata.normalize("NFC", name)


def _captions(path: Path, columns: Columns) -> Iterator[tuple[str, str]]:
    if columns.image is not None:
        raise DatasetError(
            f"{path} is a CSV, and its pictures are separate files: leave image={columns.image} out of --columns."
        )
    return _rows(path, (columns.image_id or "ID", columns.caption or "Caption"), columns.caption is None)


def _concepts_file(captions: Path) -> Path | None:
    infix = captions.name[: -len(CAPTIONS)]
    candidates = (captions.with_name(f"{infix}_{kind}.csv") for kind in ("concepts_manual", "concepts"))
    return next((path for path in candidates if path.is_file()), None)


def _concepts(captions: Path, columns: Columns) -> dict[str, tuple[str, ...]]:
    path = _concepts_file(captions)
    found: dict[str, tuple[str, ...]] = {}
    for image_id, cuis in _rows(path, (columns.image_id or "ID", columns.cui or "CUIs")) if path else ():
        image_id = composed(image_id)
        new = concepts(cuis.split(";"))
        found[image_id] = tuple(dict.fromkeys((*found[image_id], *new))) if image_id in found else new
    return found


def _rows(path: Path, columns: tuple[str, str], may_lack_second: bool = False) -> Iterator[tuple[str, str]]:
    """Yields the cells of two columns; "" for the second if the file has only the first and `may_lack_second`."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            # Strict, because a file truncated inside a quoted cell would otherwise end without an error.
            rows = csv.reader(file, strict=True)
            header = next(rows, [])
            has_one_column = may_lack_second and header == [columns[0]]
            first, second = (0, None) if has_one_column else _positions(path, header, columns)
            for row in rows:
                if len(row) == len(header):
                    yield row[first], "" if second is None else row[second]
                elif row:
                    raise DatasetError(
                        f"{path}, line {rows.line_num}: {len(row)} cells, but the header has {len(header)}. "
                        "Correct the line, or download the file again."
                    )
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is gone: restore it or download it again.") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path} cannot be read as UTF-8 CSV ({error}): download it again.") from error


def _positions(path: Path, header: list[str], columns: tuple[str, str]) -> tuple[int, int]:
    if missing := [name for name in columns if name not in header]:
        raise DatasetError(
            f"{path} lacks {listed(missing)}; it has {listed(header)}. Rename its columns to {' and '.join(columns)}."
        )
    if repeated := [name for name in columns if header.count(name) > 1]:
        raise DatasetError(f"{path} has the column {repeated[0]} {header.count(repeated[0])} times: drop all but one.")
    return header.index(columns[0]), header.index(columns[1])


# ---- finding pictures


def top_folders(root: Path, split: str) -> list[Path]:
    """Lists the folders `train` and `train_images`, under any name of the split. Raises DatasetError if none exists."""
    names = sorted(os.listdir(root) if root.is_dir() else (), key=lambda name: (name != name.lower(), name))
    entries = {name: root / name for name in names}
    in_order = [
        name
        for end in FOLDER_ENDS
        for alias in ALIASES.get(split, (split,))
        for name in entries
        if name.lower() == alias + end and entries[name].is_dir()
    ]
    if not in_order:
        infix = infix_of(split)
        raise DatasetError(
            f"{root} has no pictures of the split {split!r}: unpack them as {infix}/ID.jpg or {infix}_images/ID.jpg."
        )
    return [entries[name] for name in in_order]


def infix_of(split: str) -> str:
    """The split's name in files and folders from Zenodo and ImageCLEF: `valid` for the split validation."""
    return ALIASES.get(split, (split,))[0]


def inner_folders(tops: Sequence[Path]) -> list[Path]:
    """Lists the folders directly inside these: unzipping often adds a level."""
    return sorted(Path(entry.path) for top in tops for entry in os.scandir(top) if entry.is_dir())


def suffix_of(name: str) -> str:
    """The suffix of a picture's file name, case preserved; "" if it has none."""
    dot = name.rfind(".")
    return name[dot:] if dot > 0 and name[dot:].lower() in ALL_SUFFIXES else ""


class Index:
    """The picture files of some folders, indexed by their names without suffix, in NFC."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._by_stem: dict[str, list[tuple[int, str, Path]]] = {}
        for number, folder in enumerate(folders):
            for name in _files(folder):
                suffix = suffix_of(name)
                stem = composed(name[: len(name) - len(suffix)])
                self._by_stem.setdefault(stem, []).append((number, name, folder))

    def find(self, name: str) -> list[Path]:
        """Returns files of that name, with its own suffix or another, the most likely first."""
        suffix = suffix_of(name)
        stems = [name, name[: len(name) - len(suffix)]] if suffix else [name]
        found = [
            (rank, number, *_unlikeness(candidate, stem, suffix), candidate, folder)
            for rank, stem in enumerate(stems)
            for number, candidate, folder in self._by_stem.get(composed(stem), ())
        ]
        return [folder / candidate for *_, candidate, folder in sorted(found)]


def _unlikeness(candidate: str, stem: str, suffix: str) -> tuple[bool, int, bool, bool]:
    """Sort key, lower is likelier: the suffix that was asked for, the order of suffixes, lower case, Unicode form."""
    own = suffix_of(candidate)
    order = ALL_SUFFIXES.index(own.lower()) if own else len(ALL_SUFFIXES)
    return own.lower() != suffix.lower(), order, own != own.lower(), not candidate.startswith(stem)


def _files(folder: Path) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if suffix_of(entry.name) and not entry.is_dir():
                    yield entry.name
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        return
