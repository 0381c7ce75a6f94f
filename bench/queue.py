"""Measures the queue: cost per job against other queues, many rows, many processes, PostgreSQL, crashes."""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # spawned processes inherit the path with this change
    sys.path.append(sys.path.pop(0))  # moved to the end: queue.py here would shadow the standard library's

import contenders
import contention
import cost
import crash
import server
import sizes
from report import Line, show

Found = tuple[Any, list[Line]]
"""The measurements of a part, for the plot, and its lines of the table."""

PARTS = ("cost", "sizes", "fairness", "postgres", "crash")
PLOT = Path(__file__).resolve().parents[1] / "docs" / "queue.png"


def main() -> None:
    options = _options()
    lines: list[Line] = []
    found: dict[str, Any] = {}
    began, load = time.perf_counter(), os.getloadavg()[0]
    try:
        for part in options.only:
            with tempfile.TemporaryDirectory(prefix=f"bench_{part}_") as folder:
                found[part], more = MEASURES[part](Path(folder), options)
            lines += more
            print(f"{part}: measured after {time.perf_counter() - began:.0f} s", file=sys.stderr)
    finally:  # also after an error: the results so far are worth having
        if lines:
            show(lines, f"load {load:.1f} before; {_sizes(options)}")
    print("Missed: " + ("; ".join(line.what for line in lines if line.missed) or "none"))
    if {"cost", "sizes", "fairness"} <= found.keys():
        import plot  # imports matplotlib, which spawned processes do not need

        plot.draw(options.plot, found["cost"], found["sizes"], found["fairness"])
        print(f"Plot written to {options.plot}")


def _cost(folder: Path, options: argparse.Namespace) -> Found:
    with server.started() as running:
        found = cost.measure(folder, running, options.rows, options.peer_jobs, options.rounds)
    return found, cost.lines(found)


def _many_rows(folder: Path, options: argparse.Namespace) -> Found:
    found = sizes.measure(folder, options.sizes, options.rounds)
    return found, sizes.lines(found)


def _fairness(folder: Path, options: argparse.Namespace) -> Found:
    found = contention.measure(folder, options.seconds, options.rounds, options.export_rows)
    return found, contention.lines(found)


def _postgres(folder: Path, options: argparse.Namespace) -> Found:
    seconds = options.seconds / 2
    with server.started() as running:
        found = contention.measure_postgres(folder, running, seconds, options.rounds)
    return found, contention.lines_postgres(found, seconds)


def _crash(folder: Path, options: argparse.Namespace) -> Found:
    found = crash.measure(folder, options.crashes)
    return found, crash.lines(found)


MEASURES = dict(zip(PARTS, (_cost, _many_rows, _fairness, _postgres, _crash), strict=True))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add(
        "--only",
        type=lambda text: text.split(","),
        default=PARTS,
        help=f"parts to measure, separated by commas: {','.join(PARTS)}",
    )
    add("--rounds", type=int, default=5, help="rounds, in each of which all queues take a turn")
    add("--rows", type=int, default=20_480, help="jobs from which rococap's cost per job is measured")
    add("--peer-jobs", type=int, default=1_000, help="the same for the other queues, which take longer")
    add("--sizes", type=_numbers, default=[60_000, 10_000_000], help="database sizes in rows, separated by commas")
    add("--seconds", type=float, default=10, help="time for which several processes work without pause")
    add("--export-rows", type=int, default=1_000_000, help="done rows that are exported at the same time")
    add("--crashes", type=int, default=50, help="workers to kill")
    add("--plot", type=Path, default=PLOT, help="file for the plot, which needs cost, sizes and fairness")
    options = parser.parse_args()
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    return options


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _sizes(options: argparse.Namespace) -> str:
    return (
        f"{options.rows:,} jobs of ours and {options.peer_jobs:,} of each other queue, {contenders.BATCH} a claim; "
        f"{cost.DRAINERS} processes look for duplicates; {options.seconds:g} s without pause; "
        f"{options.rounds} rounds; PostgreSQL with fsync"
    )


if __name__ == "__main__":
    main()
