"""The parts of a data set: columns, shards, rows, and the places of pictures. Reads no file."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, Self

from rococap.errors import DatasetError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w][\w.-]*")

Ids = Literal["column", "file", "row"]


@dataclass(frozen=True, slots=True)
class Columns:
    """What the columns of a data set's files are called. None stands for the standard name, under which only the
    pictures of a Parquet file are required.
    """

    image: str | None = None
    image_id: str | None = None
    caption: str | None = None
    cui: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parses `image=IMG,caption=TEXT`. Raises DatasetError, listing the valid keys."""
        keys = [key.name for key in fields(cls)]
        given: dict[str, str] = {}
        for piece in text.split(","):
            key, equals, name = piece.partition("=")
            key, name = key.strip(), name.strip()
            if key not in keys or not equals or not name or key in given:
                raise DatasetError(
                    f"--columns takes {', '.join(keys[:-1])} and {keys[-1]}, each at most once and with the name of a "
                    f"column, not {piece!r}: for example --columns image=IMG,caption=TEXT"
                )
            given[key] = name
        return cls(**given)

    @classmethod
    def from_json(cls, text: str | None) -> Self:
        """The reverse of `to_json`."""
        return cls(**json.loads(text)) if text else cls()

    def to_json(self) -> str | None:
        """Returns the names as JSON, or None if every column has its standard name."""
        return json.dumps(self.given(), ensure_ascii=False) if self.given() else None

    def given(self) -> dict[str, str]:
        """The names that were given explicitly, by key."""
        named = {key.name: getattr(self, key.name) for key in fields(self)}
        return {key: name for key, name in named.items() if name is not None}

    def name(self, key: str) -> str:
        """The name of the column for a key such as "image"."""
        return self.given().get(key, key)

    def differs(self, other: "Columns") -> bool:
        """Whether any column has another name, however it was given."""
        return any(self.name(key.name) != other.name(key.name) for key in fields(self))

    def __str__(self) -> str:
        return ",".join(f"{key}={name}" for key, name in self.given().items()) or "the standard names"


STANDARD = Columns()


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a split. `path` is relative to the data set's root, with forward slashes; `size` is in bytes."""

    path: str
    split: str
    rows: int
    row_groups: int
    size: int
    digest: str
    """SHA-256, in hex, of the Parquet footer, or of the captions CSV and its concepts: it changes with the file."""
    first_row: int = field(default=0, compare=False)
    """The number of rows in the split's earlier shards."""
    ids: Ids = field(default="column", compare=False)
    """What identifies its rows: a column, or else the picture's file name or the row's number in the split."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One row without its picture: its id, caption and concepts, and its position in the shard."""

    image_id: str
    caption: str
    cui: tuple[str, ...]
    row_group: int
    row_in_group: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a picture was, and under which id, when it was enqueued."""

    shard: str
    split: str
    row_group: int
    row_in_group: int
    image_id: str
    columns: Columns = STANDARD


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set on this machine. `revision` is its commit on the hub, or "" for a folder.

    `name` includes the configuration, after a colon; `columns` holds the names that the user gave, if any.
    """

    name: str
    root: Path
    revision: str
    config: str = ""
    columns: Columns = STANDARD


def parse_name(name: str) -> tuple[str, str]:
    """Splits a data set's name into its folder or hub id, and its configuration or "".

    A folder's own name may contain colons.
    """
    parts = name.split(":")
    for n in range(len(parts), 0, -1):
        source = ":".join(parts[:n])
        if Path(source).expanduser().is_dir() or (n == 1 and HUB_ID.fullmatch(source)):
            return source, ":".join(parts[n:])
    # There is no such folder. The name of a configuration contains no slash.
    source, colon, config = name.rpartition(":")
    return (source, config) if colon and "/" not in config else (name, "")


def full_name(source: str, config: str) -> str:
    """Joins what `parse_name` splits."""
    return f"{source}:{config}" if config else source


def row_id(split: str, row: int) -> str:
    """The id of a row that has none of its own: the split and the row's number in it, counted from 0."""
    return f"{split}_{row:06d}"


def is_row_id(image_id: str, split: str) -> bool:
    """Whether an id has the form that `row_id` makes."""
    number = image_id.removeprefix(f"{split}_")
    return number != image_id and number.isdecimal() and len(number) >= 6


def file_name(path: str | None) -> str:
    """The last part of a path stored in the data set; "" if there is no path."""
    return path.rpartition("/")[2] if path else ""


def listed(names: Sequence[str]) -> str:
    """Lists columns in a message: `the columns a, b`."""
    return f"the column{'s' if len(names) > 1 else ''} {', '.join(names)}" if names else "no columns"


def concepts(cui: Iterable[str | None] | None) -> tuple[str, ...]:
    """The concepts of a row (UMLS CUIs), without empty ones."""
    # On the hub, the empty cells of ROCOv2 have become a single concept "nan".
    return tuple([concept for concept in cui if concept and concept != "nan"]) if cui else ()


def at_revision(name: str, revision: str) -> str:
    """Names a data set or model with its revision: `owner/name at COMMIT`. A folder has none, and `revision` is ""."""
    return f"{name} at {revision}" if revision else name
