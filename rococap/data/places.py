"""What a data set is made of, and where a row of it lies."""

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
    """What the columns of a data set's files are called; None is the standard name, which need not be there."""

    image: str | None = None
    image_id: str | None = None
    caption: str | None = None
    cui: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `image=IMG,caption=TEXT`. Raises DatasetError, naming the columns that can be named."""
        keys = [one.name for one in fields(cls)]
        given: dict[str, str] = {}
        for piece in text.split(","):
            key, equals, name = piece.partition("=")
            key, name = key.strip(), name.strip()
            if key not in keys or not equals or not name or key in given:
                raise DatasetError(
                    f"--columns takes {', '.join(keys[:-1])} and {keys[-1]}, each at most once with the name of a "
                    f"column, not {piece!r}: for example --columns image=IMG,caption=TEXT"
                )
            given[key] = name
        return cls(**given)

    @classmethod
    def from_json(cls, text: str | None) -> Self:
        return cls(**json.loads(text)) if text else cls()

    def to_json(self) -> str | None:
        """None where every column has its standard name."""
        return json.dumps(self.given(), ensure_ascii=False) if self.given() else None

    def given(self) -> dict[str, str]:
        named = {one.name: getattr(self, one.name) for one in fields(self)}
        return {key: name for key, name in named.items() if name is not None}

    def name(self, key: str) -> str:
        return self.given().get(key, key)

    def differs(self, other: "Columns") -> bool:
        return any(self.name(one.name) != other.name(one.name) for one in fields(self))

    def __str__(self) -> str:
        return ",".join(f"{key}={name}" for key, name in self.given().items()) or "the standard names"


STANDARD = Columns()


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
    first_row: int = field(default=0, compare=False)
    """How many rows of the split the shards before it hold."""
    ids: Ids = field(default="column", compare=False)
    """What names its rows: a column, or without one the picture's file name or the row's number in the split."""


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
    columns: Columns = STANDARD


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set that is on this machine. `revision` is the commit on the hub, or "" for a folder.

    `name` tells the configuration too, after a colon; `columns` are those that were asked for, if any were.
    """

    name: str
    root: Path
    revision: str
    config: str = ""
    columns: Columns = STANDARD


def parse_name(name: str) -> tuple[str, str]:
    """A data set's folder or hub id, and its configuration. A folder's own name may hold colons."""
    parts = name.split(":")
    for n in range(len(parts), 0, -1):
        place = ":".join(parts[:n])
        if Path(place).expanduser().is_dir() or (n == 1 and HUB_ID.fullmatch(place)):
            return place, ":".join(parts[n:])
    # Nothing of that name is here: a configuration's name holds no slash.
    place, colon, config = name.rpartition(":")
    return (place, config) if colon and "/" not in config else (name, "")


def full_name(place: str, config: str) -> str:
    return f"{place}:{config}" if config else place


def row_id(split: str, row: int) -> str:
    return f"{split}_{row:06d}"


def is_row_id(image_id: str, split: str) -> bool:
    number = image_id.removeprefix(f"{split}_")
    return number != image_id and number.isdecimal() and len(number) >= 6


def file_name(path: str | None) -> str:
    """The last part of a path as the data set has it."""
    return path.rpartition("/")[2] if path else ""


def listed(names: Sequence[str]) -> str:
    return f"the column{'s' if len(names) > 1 else ''} {', '.join(names)}" if names else "no columns"


def concepts(cui: Iterable[str | None] | None) -> tuple[str, ...]:
    # An empty cell of ROCOv2 became the one concept "nan" on its way to the hub.
    return tuple([concept for concept in cui if concept and concept != "nan"]) if cui else ()


def at_revision(name: str, revision: str) -> str:
    """How a data set or model is told: `owner/name at COMMIT`; a folder has no revision."""
    return f"{name} at {revision}" if revision else name
