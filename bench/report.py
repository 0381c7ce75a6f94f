"""Times work in alternating rounds, and prints the table of a benchmark. Knows nothing of what is measured."""

import gc
import operator
import os
import platform
import resource
import sqlite3
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

Clock = Literal["wall", "cpu", "user"]


BOUNDS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Took:
    """Durations in seconds. `cpu` is the CPU time of all threads of the process; `user` is its share in user mode."""

    wall: float
    cpu: float
    user: float

    def per(self, n: int) -> "Took":
        """The durations divided by n."""
        return Took(self.wall / n, self.cpu / n, self.user / n)


Round = tuple[Took, ...]
"""The durations of the peer and of rococap, measured right after each other."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table, with formatted medians over the rounds and the ratio of every round.

    Without a peer, `ratios` are the values themselves. The target, if there is one, bounds their median, as in "<= 2".
    """

    what: str
    peer: str
    ours: str
    ratios: tuple[float, ...]
    target: str
    duplicates: str = ""

    @property
    def missed(self) -> bool:
        if not self.target:
            return False
        sign, bound = self.target.split()
        return not BOUNDS[sign](statistics.median(self.ratios), float(bound))

    def cells(self) -> tuple[str, ...]:
        ratio = ""
        if self.peer:
            spread = f" ({min(self.ratios):.2f} to {max(self.ratios):.2f})" if len(self.ratios) > 1 else ""
            ratio = f"{statistics.median(self.ratios):.2f}{spread}"
        target = f"{self.target}, **missed**" if self.missed else self.target
        return self.what, self.peer, self.ours, ratio, target, self.duplicates


def timed(work: Callable[[], object]) -> Took:
    """Runs the work once, after a garbage collection, and measures it."""
    gc.collect()
    wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    work()
    wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_SELF)
    user = after.ru_utime - before.ru_utime
    return Took(wall, user + after.ru_stime - before.ru_stime, user)


def memory_mb(field: str) -> float:
    """The memory of this process: `field` is VmRSS for what is resident now, or VmHWM for its peak."""
    # Not ru_maxrss from getrusage: a process inherits it from its parent, even across exec, and that may be larger.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def alternate(rounds: int, *works: Callable[[], T]) -> list[tuple[T, ...]]:
    """Runs all works in each round, in reverse order in every other one, so that a drift of the machine's speed affects
    all alike. Returns the results of each round in the order of `works`.
    """
    results = []
    for turn in range(rounds):
        order = range(len(works))
        done = {n: works[n]() for n in (reversed(order) if turn % 2 else order)}
        results.append(tuple(done[n] for n in order))
    return results


def compare(
    what: str,
    rounds: Sequence[Round],
    clock: Clock,
    target: str,
    *,
    times_faster: bool = False,
    rows: int | None = None,
    duplicates: str = "",
) -> Line:
    """A line for one clock. The ratio is rococap / peer, or peer / rococap if `times_faster`. With `rows`, shows the
    time per row.
    """
    pairs = [(getattr(peer, clock), getattr(ours, clock)) for peer, ours in rounds]
    ratios = tuple(peer / ours if times_faster else ours / peer for peer, ours in pairs)
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    peer, ours = (f"{median:.3f} s" if rows is None else f"{1e6 * median / rows:.1f} us" for median in medians)
    return Line(f"{what}, {clock}", peer, ours, ratios, target, duplicates)


def ratio_line(what: str, peers: list[float], ours: list[float], unit: str, target: str, duplicates: str = "") -> Line:
    """A line for figures that were measured in pairs; the ratio is rococap / peer."""
    ratios = tuple(mine / its for its, mine in zip(peers, ours, strict=True))
    return Line(
        what,
        _figure(statistics.median(peers), unit),
        _figure(statistics.median(ours), unit),
        ratios,
        target,
        duplicates,
    )


def value_line(what: str, values: list[float], unit: str, target: str, duplicates: str = "") -> Line:
    """A line for one figure of rococap's per round, without a peer."""
    figure = _figure(statistics.median(values), unit)
    if len(values) > 1:
        figure += f" ({_figure(min(values), '')} to {_figure(max(values), '')})"
    return Line(what, "", figure, tuple(values), target, duplicates)


def _figure(value: float, unit: str) -> str:
    digits = 0 if value == int(value) or value >= 1000 else 3
    return f"{value:,.{digits}f} {unit}".rstrip()


def show(lines: list[Line], sizes: str) -> None:
    """Prints the lines as a Markdown table, without columns that are empty in all lines, and a line on the machine."""
    table = [("what", "peer", "ours", "ratio", "target", "duplicates"), *(line.cells() for line in lines)]
    columns = [column for column in zip(*table, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    rows = list(zip(*columns, strict=True))
    print()
    for cells in (rows[0], tuple("-" * width for width in widths), *rows[1:]):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |")
    print(f"\n{os.cpu_count()} cores, Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}; {sizes}")
