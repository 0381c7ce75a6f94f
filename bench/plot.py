"""Plots the measurements of the queue: cost per job, sizes, waits for the write lock, and shares of the processes."""

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from contenders import BATCH
from contention import Fairness, rows_of, spread
from cost import RAW, Cost
from matplotlib import pyplot
from matplotlib.axes import Axes
from sizes import Sized

OURS, OTHERS, BOUND = "#1f77b4", "#9aa5b1", "#c0392b"


def draw(path: Path, cost: Cost, sized: list[Sized], fair: Fairness) -> None:
    figure, ((top_left, top_right), (bottom_left, bottom_right)) = pyplot.subplots(2, 2, figsize=(12, 8))
    _draw_cost(top_left, cost)
    _draw_sizes(top_right, sized)
    _draw_waits(bottom_left, fair)
    _draw_shares(bottom_right, fair)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_cost(axes: Axes, cost: Cost) -> None:
    names = sorted(cost.took, key=lambda name: -_wall(cost, name))
    bars = axes.barh(names, [_wall(cost, name) for name in names], color=[_colour(name) for name in names])
    labels = [f"{_wall(cost, name):,.0f} µs{_duplicates(cost, name)}" for name in names]
    axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(10, 60 * max(_wall(cost, name) for name in names))
    axes.set_xlabel("µs per job, wall")
    axes.set_title(f"Claim and complete one job (ours: {BATCH} at a time)")


def _wall(cost: Cost, name: str) -> float:
    return 1e6 * statistics.median(took.wall for took in cost.took[name])


def _colour(name: str) -> str:
    return OURS if name.startswith("rococap") else OTHERS


def _duplicates(cost: Cost, name: str) -> str:
    if name == RAW:
        return ""
    drained = cost.drained[name]
    return f"; {100 * drained.duplicates / drained.jobs:.3g} % done twice"


def _draw_sizes(axes: Axes, sized: list[Sized]) -> None:
    rows = [one.rows for one in sized]
    for what, colour in (("claim", OURS), ("complete", "#2ca02c"), ("status", "#8e6bbf")):
        axes.plot(rows, [one.p50(what) for one in sized], "o-", color=colour, label=what)
    axes.axhline(5, color=BOUND, linestyle=":", label="bound of status")
    axes.set(xscale="log", xlabel="rows in the database", ylabel="p50, ms, begin and commit included")
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.set_title(f"{BATCH} jobs: few rows and many")


def _draw_waits(axes: Axes, fair: Fairness) -> None:
    waits = sorted(1000 * wait for crew in fair.alone for one in crew for wait in one.waits)
    longer = [1 - n / len(waits) for n in range(len(waits))]
    axes.step(waits, longer, where="post", color=OURS)
    axes.axvline(500, color=BOUND, linestyle=":", label="bound, 500 ms")
    axes.set(xscale="log", yscale="log", xlabel="wait for the write lock, ms", ylabel="share of waits that are longer")
    axes.legend()
    axes.set_title(f"{len(fair.alone[0])} processes without pause, longest wait {waits[-1]:.0f} ms")


def _draw_shares(axes: Axes, fair: Fairness) -> None:
    width = 0.8 / len(fair.alone)
    for turn, crew in enumerate(fair.alone):
        shares = sorted((len(one.ids) * len(crew) / rows_of(crew) for one in crew), reverse=True)
        at = [n - 0.4 + turn * width for n in range(1, len(shares) + 1)]
        axes.bar(at, shares, width, align="edge", label=f"round {turn + 1}: most / fewest {spread(crew):.1f}")
    axes.set(xlabel="process, the busiest first", ylabel=f"rows in {fair.seconds:.0f} s, 1 = even share")
    axes.set_ylim(top=1.4 * axes.get_ylim()[1])
    axes.legend(ncols=2, fontsize=8)
    axes.set_title("Shares of the same processes (bound: 3)")
