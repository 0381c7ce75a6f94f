"""Timing in alternating rounds, and the table that each bench prints."""

import gc
import os
import platform
import resource
import sqlite3
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Clock = Literal["wall", "cpu", "user"]


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds. `cpu` is the process's, all threads together; `user` is its part outside the kernel."""

    wall: float
    cpu: float
    user: float


Round = tuple[Took, Took]
"""What the peer took and what ours took, one right after the other."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table: medians over the rounds, and the smallest and largest ratio among them."""

    what: str
    peer: str
    ours: str
    ratios: tuple[float, ...]
    target: str

    def cells(self) -> tuple[str, ...]:
        middle = statistics.median(self.ratios)
        spread = f" ({min(self.ratios):.2f}-{max(self.ratios):.2f})" if len(self.ratios) > 1 else ""
        return self.what, self.peer, self.ours, f"{middle:.2f}{spread}", f"{self.target}{self._verdict(middle)}"

    def _verdict(self, ratio: float) -> str:
        sign, bound = self.target.split()
        met = ratio >= float(bound) if sign == ">=" else ratio <= float(bound)
        return "" if met else "  missed"


def timed(work: Callable[[], object]) -> Took:
    gc.collect()
    wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    work()
    wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_SELF)
    user = after.ru_utime - before.ru_utime
    return Took(wall, user + after.ru_stime - before.ru_stime, user)


def alternate(rounds: int, peer: Callable[[], Took], ours: Callable[[], Took]) -> list[Round]:
    """Each round runs both, and every other round ours goes first: a drift of the machine hits both alike."""
    results = []
    for turn in range(rounds):
        if turn % 2:
            mine = ours()
            results.append((peer(), mine))
        else:
            results.append((peer(), ours()))
    return results


def compare(
    what: str, rounds: list[Round], clock: Clock, target: str, *, times_faster: bool = False, rows: int | None = None
) -> Line:
    """A line on one clock; the ratio is ours / peer, or peer / ours if `times_faster`. With `rows`, time per row."""
    pairs = [(getattr(peer, clock), getattr(ours, clock)) for peer, ours in rounds]
    ratios = tuple(peer / ours if times_faster else ours / peer for peer, ours in pairs)
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    peer, ours = (f"{median:.3f} s" if rows is None else f"{1e6 * median / rows:.1f} us" for median in medians)
    return Line(f"{what}, {clock}", peer, ours, ratios, target)


def show(lines: list[Line], sizes: str) -> None:
    table = [("what", "peer", "ours", "ratio", "target"), *(line.cells() for line in lines)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print()
    for cells in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    print(f"\n{os.cpu_count()} cores, Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}; {sizes}")
