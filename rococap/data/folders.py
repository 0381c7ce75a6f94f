"""Pictures in folders, with their captions in a CSV, as on Zenodo and in ImageCLEF."""

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
"""Tried by opening them, before a folder is listed."""
ALL_SUFFIXES = (*SUFFIXES, ".tif", ".tiff", ".webp", ".bmp", ".dcm", ".gif", ".jp2", ".avif")
FOLDER_ENDS = ("", "_images")


def shard(root: Path, path: str, split: str, columns: Columns = STANDARD) -> Shard:
    captions = root / path
    rows = sum(1 for _ in _captions(captions, columns))
    digest = hashlib.sha256(captions.read_bytes())
    if concepts_file := _concepts_file(captions):
        digest.update(concepts_file.read_bytes())
    return Shard(path, split, rows, 1, captions.stat().st_size, digest.hexdigest())


def samples(root: Path, shard: Shard, columns: Columns = STANDARD) -> Iterator[Sample]:
    captions = root / shard.path
    of_id = _concepts(captions, columns)
    for row, (image_id, caption) in enumerate(_captions(captions, columns)):
        yield Sample(image_id, caption, of_id.get(composed(image_id), ()), 0, row)


def composed(name: str) -> str:
    """One form for the names that look alike: a Mac writes ö as o and dots, whoever made the CSV as one letter."""
    return unicodedata.normalize("NFC", name)


def _captions(path: Path, columns: Columns) -> Iterator[tuple[str, str]]:
    if columns.image is not None:
        raise DatasetError(f"{path} is a CSV, whose pictures are files: leave image={columns.image} out of --columns.")
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
        told = concepts(cuis.split(";"))
        found[image_id] = tuple(dict.fromkeys((*found[image_id], *told))) if image_id in found else told
    return found


def _rows(path: Path, columns: tuple[str, str], may_lack_second: bool = False) -> Iterator[tuple[str, str]]:
    """The cells of two columns; of a file that holds nothing but the first, it and an empty text."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            # Strict, since a file that was cut inside a quoted cell would otherwise end in silence.
            rows = csv.reader(file, strict=True)
            header = next(rows, [])
            is_alone = may_lack_second and header == [columns[0]]
            first, second = (0, None) if is_alone else _positions(path, header, columns)
            for row in rows:
                if len(row) == len(header):
                    yield row[first], "" if second is None else row[second]
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
            f"{path} lacks {listed(missing)}; it has {listed(header)}. Rename its columns to {' and '.join(columns)}."
        )
    if twice := [name for name in columns if header.count(name) > 1]:
        raise DatasetError(f"{path} has the column {twice[0]} {header.count(twice[0])} times: drop all but one.")
    return header.index(columns[0]), header.index(columns[1])


# ---- where the pictures are


def top_folders(root: Path, split: str) -> list[Path]:
    """`train` and `train_images`, by any name of the split. Raises DatasetError if there is none."""
    there = sorted(os.listdir(root) if root.is_dir() else (), key=lambda name: (name != name.lower(), name))
    names = {name: root / name for name in there}
    in_order = [
        name
        for end in FOLDER_ENDS
        for alias in ALIASES.get(split, (split,))
        for name in names
        if name.lower() == alias + end and names[name].is_dir()
    ]
    if not in_order:
        infix = infix_of(split)
        raise DatasetError(
            f"{root} holds no pictures of the split {split!r}: unpack them as {infix}/ID.jpg or {infix}_images/ID.jpg."
        )
    return [names[name] for name in in_order]


def infix_of(split: str) -> str:
    return ALIASES.get(split, (split,))[0]


def inner_folders(tops: Sequence[Path]) -> list[Path]:
    """What lies directly in them: unzipping often adds a level."""
    return sorted(Path(entry.path) for top in tops for entry in os.scandir(top) if entry.is_dir())


def suffix_of(name: str) -> str:
    """The ending of a picture's file name as it is there, or nothing."""
    dot = name.rfind(".")
    return name[dot:] if dot > 0 and name[dot:].lower() in ALL_SUFFIXES else ""


class Index:
    """The picture files of some folders, by their names without the ending, in one form of Unicode."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._of: dict[str, list[tuple[int, str, Path]]] = {}
        for number, folder in enumerate(folders):
            for name in _files(folder):
                suffix = suffix_of(name)
                stem = composed(name[: len(name) - len(suffix)])
                self._of.setdefault(stem, []).append((number, name, folder))

    def find(self, name: str) -> list[Path]:
        """Files of that name, with an ending or with another than its own; of several, the likeliest first."""
        suffix = suffix_of(name)
        stems = [name, name[: len(name) - len(suffix)]] if suffix else [name]
        found = [
            (at, number, *_likeness(there, stem, suffix), there, folder)
            for at, stem in enumerate(stems)
            for number, there, folder in self._of.get(composed(stem), ())
        ]
        return [folder / there for *_, there, folder in sorted(found)]


def _likeness(there: str, stem: str, suffix: str) -> tuple[bool, int, bool, bool]:
    """Lower is likelier: the ending that was asked for, the order of endings, the case, the form of Unicode."""
    own = suffix_of(there)
    order = ALL_SUFFIXES.index(own.lower()) if own else len(ALL_SUFFIXES)
    return own.lower() != suffix.lower(), order, own != own.lower(), not there.startswith(stem)


def _files(folder: Path) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if suffix_of(entry.name) and not entry.is_dir():
                    yield entry.name
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        return
