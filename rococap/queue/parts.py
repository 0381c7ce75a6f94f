"""Parts of a split, for machines that share no database: part i of n has every n-th row group, or block of rows.

The parts are disjoint and together the whole split, on every machine that has the same files.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from sqlalchemy import Connection

from rococap.data import Shard
from rococap.data.layout import PARQUET
from rococap.db import execute
from rococap.errors import RunError
from rococap.queue.runs import Run

BLOCK = 100
"""Rows of a captions CSV that stay together. The pictures of a Parquet file stay together by row group."""


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """Part `number` of `n_parts`, counted from 1."""

    number: int
    n_parts: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parses `2/4`. Raises ValueError."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"{text!r} is not a part: write its number and how many there are, such as 1/4 or 4/4.")
        return cls(int(match[1]), int(match[2]))

    def __contains__(self, unit: int) -> bool:
        """Whether the unit with this number, from 0, is in the part."""
        return unit % self.n_parts == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.n_parts}"


@dataclass(frozen=True, slots=True)
class Units:
    """The units of a split, row groups or blocks of rows, numbered from 0 in the order of its shards.

    `first` has the number of the first unit of each shard, by the shard's path.
    """

    first: Mapping[str, int]
    n: int

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> Self:
        first, n = {}, 0
        for shard in shards:
            first[shard.path] = n
            n += shard.row_groups if _is_parquet(shard.path) else -(-shard.rows // BLOCK)
        return cls(first, n)

    def at(self, path: str, row_group: int, row_in_group: int) -> int:
        return self.first[path] + (row_group if _is_parquet(path) else row_in_group // BLOCK)

    def check(self, part: Part, split: str) -> None:
        """Raises RunError if the part would be empty, and so would be others."""
        if part.n_parts > self.n:
            raise RunError(
                f"Split {split} cannot be divided into {part.n_parts} parts: it has {self.n} row groups or blocks of "
                f"{BLOCK} pictures, which stay together. Use --part i/{self.n} or fewer parts."
            )


def _is_parquet(path: str) -> bool:
    return path.lower().endswith(PARQUET)


def are_all(parts: Sequence[Part]) -> bool:
    """Whether these parts are together the whole split."""
    return any(len({part for part in parts if part.n_parts == n}) == n for n in {part.n_parts for part in parts})


def all_parts(conn: Connection) -> dict[tuple[str, str], list[Part]]:
    """The parts that runs have, by run and split."""
    found: dict[tuple[str, str], list[Part]] = {}
    sql = (
        "SELECT r.name, p.split, p.number, p.n_parts FROM parts p JOIN runs r ON r.id = p.run_id "
        "WHERE r.deleted_at IS NULL ORDER BY r.id, p.split, p.n_parts, p.number"
    )
    for run, split, number, n_parts in execute(conn, sql).fetchall():
        found.setdefault((run, split), []).append(Part(number, n_parts))
    return found


def parts_of(conn: Connection, run: Run, split: str) -> list[Part]:
    """The parts of a split that the run has, in order; none if it has the whole split, or a selection of its rows."""
    sql = "SELECT number, n_parts FROM parts WHERE run_id = ? AND split = ? ORDER BY n_parts, number"
    return [Part(*row) for row in execute(conn, sql, (run.id, split)).fetchall()]


def check_same_division(run: Run, split: str, has: Sequence[Part], part: Part) -> None:
    """Raises RunError if the run has parts of a division into another number of parts, which would overlap."""
    if others := [str(other) for other in has if other.n_parts != part.n_parts]:
        raise RunError(
            f"Run {run.name!r} has part {', '.join(others)} of {split}, which part {part} would overlap. Use the same "
            f"number of parts, --part i/{has[0].n_parts}, or another run: --run NAME"
        )


def record(conn: Connection, run_id: int, split: str, parts: Iterable[Part]) -> None:
    """Records that the run has these parts of a split, besides those that it has."""
    rows = [(run_id, split, part.number, part.n_parts) for part in parts]
    if rows:
        execute(conn, "INSERT INTO parts VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING", rows)


def forget(conn: Connection, run_id: int, split: str) -> None:
    """Records that the run has the whole split, or other pictures than those of its parts."""
    execute(conn, "DELETE FROM parts WHERE run_id = ? AND split = ?", (run_id, split))
