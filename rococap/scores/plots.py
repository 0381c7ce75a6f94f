"""Plots of captions and their scores as SVG for embedding in a page, in the page's own colours.

Numbers in, SVG out: knows nothing of runs or the database. A plot has no legend; the page shows the names of the runs
beside their colours.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

COLOURS: Final = 6
"""The page defines --run-0 to --run-5; a seventh run gets the colour of the first again."""
DASHES: Final = ("solid", "dashed", "dotted")

_INCHES: Final = (4.0, 2.5)
_BINS: Final = 40
_TICKS: Final = 4

# Placeholder colours: `_svg` replaces them with the page's colours in matplotlib's output.
_INK: Final = "#010203"
_SOFT: Final = "#010204"
_FIRST_RUN: Final = 16
_PLACEHOLDER: Final = re.compile(r"#0102([0-9a-f]{2})")


@dataclass(frozen=True, slots=True)
class Plot:
    """`description` gives the main numbers in words, for readers who cannot see the plot. `runs` are the indices of the
    runs that are drawn; if there are none, `svg` is empty.
    """

    name: str
    title: str
    description: str
    svg: str = ""
    runs: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Series:
    """Values of one run, whose index is `run`, or of the originals, for which it is None."""

    name: str
    run: int | None
    values: Values


# --- Plots -----------------------------------------------------------------------------------------------------


def by_modality(score: str, title: str, top: float, runs: Sequence[Mapping[str, Any]]) -> Plot:
    """A score by run and modality, as dots with 95 % intervals on an axis from 0 to `top`.

    `runs` are the entries of `runs` in `evaluate.to_json`.
    """
    modalities = list(dict.fromkeys(name for run in runs for name in run["by_modality"]))
    name = f"modality-{score.replace('_', '-')}"
    axes, figure = _axes((_INCHES[0], 0.75 + len(modalities) * (0.16 + 0.16 * len(runs))))
    for at, run in enumerate(runs):
        for row, modality in enumerate(modalities):
            _dot(axes, run["by_modality"].get(modality), score, row + (at + 1) / (len(runs) + 1) - 0.5, at)
    axes.set_yticks(range(len(modalities)), labels=modalities)
    axes.set_ylim(len(modalities) - 0.5, -0.5)
    axes.set_xlim(-0.02 * top, 1.02 * top)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    for edge in range(1, len(modalities)):
        axes.axhline(edge - 0.5, color=_SOFT, linewidth=0.4, alpha=0.6)
    scores = (f"{run['run']}: {_described(run, score, modalities)}" for run in runs)
    description = f"{'; '.join(scores)}. Lines are 95 % intervals."
    return Plot(name, f"{title} by modality", description, _svg(figure, name), tuple(range(len(runs))))


def _dot(axes: Any, summary: Mapping[str, Any] | None, score: str, y: float, run: int) -> None:
    value = summary["metrics"].get(score) if summary else None
    if summary is None or value is None:
        return
    low, high = summary["intervals"].get(score) or (value, value)
    axes.plot([low, high], [y, y], color=_colour(run), linewidth=1.6, solid_capstyle="round")
    axes.plot([value], [y], marker="osD"[run % 3], color=_colour(run), markersize=5.5)


def _described(run: Mapping[str, Any], score: str, modalities: Sequence[str]) -> str:
    scored = ((name, run["by_modality"].get(name, {}).get("metrics", {}).get(score)) for name in modalities)
    return ", ".join(f"{name} {'-' if value is None else f'{value:.2f}'}" for name, value in scored)


def lengths(series: Sequence[Series]) -> Plot:
    """A histogram of captions by their number of words."""
    from matplotlib.ticker import MaxNLocator

    longest = max(float(np.percentile(one.values, 99.5)) for one in series)
    step = max(1, int(np.ceil((longest + 1) / _BINS)))
    edges = np.arange(0, longest + 1 + step, step) - 0.5
    axes, figure = _axes()
    _histogram(axes, series, edges, "words")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    return Plot("lengths", "Words in a caption", _medians(series, "words"), _svg(figure, "lengths"), _runs(series))


def durations(series: Sequence[Series]) -> Plot:
    """A histogram of captions by the model's time for each, on a logarithmic axis; the values are milliseconds."""
    known = [Series(one.name, one.run, one.values[one.values > 0]) for one in series]
    known = [one for one in known if len(one.values)]
    title = "Model time per caption"
    absent = _absent(series, known, "their times are unknown")
    if not known:
        return Plot("durations", title, absent)
    unit, ms = _unit(float(np.median(np.concatenate([one.values for one in known]))))
    known = [Series(one.name, one.run, one.values / ms) for one in known]
    pooled = np.concatenate([one.values for one in known])
    edges = np.geomspace(*_apart(*np.percentile(pooled, [0.2, 99.8])), _bins(len(pooled)) + 1)
    axes, figure = _axes()
    _histogram(axes, known, edges, unit)
    _logarithmic(axes, edges)
    description = f"{_medians(known, unit)} {absent}".strip()
    return Plot("durations", title, description, _svg(figure, "durations"), _runs(known))


def throughput(series: Sequence[Series]) -> Plot:
    """Captions per minute against the time since the run's first caption; the values are timestamps in milliseconds."""
    over_time = [one for one in series if np.ptp(one.values) > 0]
    title = "Captions per minute"
    absent = _absent(series, over_time, "all captions have the same time")
    if not over_time:
        return Plot("throughput", title, absent)
    unit, ms = _unit(max(float(np.ptp(one.values)) for one in over_time))
    axes, figure = _axes()
    rates = [_rate(axes, one, ms) for one in over_time]
    axes.set(xlabel=f"{unit} since the run's first caption", ylabel="captions per minute")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    description = f"{'; '.join(rates)}. {absent}".strip()
    return Plot("throughput", title, description, _svg(figure, "throughput"), _runs(over_time))


def _rate(axes: Any, one: Series, unit_ms: float) -> str:
    since = one.values - one.values.min()
    # Captions are stored in batches: narrower bins would show the batches rather than the rate.
    counts, edges = np.histogram(since, bins=_bins(len(since)))
    per_minute = counts / (np.diff(edges) / 60_000)
    axes.stairs(per_minute, edges / unit_ms, **_line(one))
    mean = len(since) / (float(since.max()) / 60_000)
    return f"{one.name}: {len(since)} captions, {_plain(mean)} per minute on average"


def _bins(n: int) -> int:
    """The number of bins for n values: about the square root of n."""
    return int(np.clip(np.sqrt(n), 4, _BINS))


def _unit(span_ms: float) -> tuple[str, float]:
    """The largest unit that fits at least three times into the span, and its length in milliseconds."""
    units = (("days", 86_400_000.0), ("hours", 3_600_000.0), ("minutes", 60_000.0), ("seconds", 1_000.0))
    return next((one for one in units if span_ms >= 3 * one[1]), ("milliseconds", 1.0))


# --- Parts -----------------------------------------------------------------------------------------------------


def _histogram(axes: Any, series: Sequence[Series], edges: Values, what: str) -> None:
    """Draws each series as a share of its captions. Values beyond the edges are counted in the outermost bins."""
    for one in series:
        counts, _ = np.histogram(np.clip(one.values, edges[0], np.nextafter(edges[-1], 0)), edges)
        shares = 100 * counts / max(1, len(one.values))
        if one.run is None:
            axes.stairs(shares, edges, fill=True, color=_SOFT, alpha=0.3)
        else:
            axes.stairs(shares, edges, **_line(one))
    axes.set(xlabel=what, ylabel="share of captions (%)")
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)


def _line(one: Series) -> dict[str, Any]:
    run = one.run or 0
    return {"color": _colour(run), "linewidth": 1.7, "linestyle": DASHES[run % len(DASHES)]}


def _colour(run: int) -> str:
    return f"#0102{_FIRST_RUN + run % COLOURS:02x}"


def _apart(low: float, high: float) -> tuple[float, float]:
    """The ends of a logarithmic axis, moved apart if the values between are nearly equal."""
    return (low, high) if high > 1.2 * low else (low / 1.5, high * 1.5)


def _logarithmic(axes: Any, edges: Values) -> None:
    """Makes the x axis logarithmic, with a few ticks labelled in plain numbers."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    axes.set_xscale("log")
    powers = range(int(np.floor(np.log10(edges[0]))), int(np.ceil(np.log10(edges[-1]))))
    steps = ((1, 10), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8))
    ticks = [[step * 10.0**power for power in powers for step in several] for several in steps]
    inside = [[tick for tick in several if edges[0] <= tick <= edges[-1]] for several in ticks]
    shown = next((several for several in inside if len(set(several)) >= _TICKS), inside[-1])
    if len(set(shown)) < 2:
        # The ends are so close that the axis is nearly linear.
        found = MaxNLocator(_TICKS).tick_values(edges[0], edges[-1])
        shown = [float(tick) for tick in found if edges[0] <= tick <= edges[-1]]
    axes.set_xticks(shown, labels=[f"{tick:,g}" for tick in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def _runs(series: Sequence[Series]) -> tuple[int, ...]:
    return tuple(one.run for one in series if one.run is not None)


def _medians(series: Sequence[Series], what: str) -> str:
    medians = (
        f"{one.name}: median {_plain(np.median(one.values))}, 95 % between {_plain(low)} and {_plain(high)}"
        for one in series
        for low, high in [np.percentile(one.values, [2.5, 97.5])]
    )
    return f"{what.capitalize()}. {'; '.join(medians)}."


def _plain(number: Any) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _absent(all: Sequence[Series], drawn: Sequence[Series], why: str) -> str:
    names = [one.name for one in all if one.run not in {other.run for other in drawn}]
    return f"Not drawn: {', '.join(names)} ({why})." if names else ""


# --- SVG -------------------------------------------------------------------------------------------------------


def _axes(inches: tuple[float, float] = _INCHES) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    axes = figure.subplots()
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_SOFT)
    axes.tick_params(color=_SOFT, labelcolor=_INK, labelsize=9.5)
    axes.xaxis.label.set(color=_INK, size=9.5)
    axes.yaxis.label.set(color=_INK, size=9.5)
    return axes, figure


def _svg(figure: Any, name: str) -> str:
    """The figure as an SVG element, without what only a standalone file needs. Its ids begin with the name of the plot,
    so that they are unique in a page with several plots.
    """
    from matplotlib import rc_context

    file = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:xmlns(?::xlink)?|version)="[^"]*"', "", text)
    text = re.sub(r'((?<= id=")|(?<=href="#)|(?<=url\(#))', f"{name}-", text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    return _PLACEHOLDER.sub(lambda match: _page_colour(int(match[1], 16)), text)


def _page_colour(number: int) -> str:
    match number:
        case 3:
            return "currentColor"
        case 4:
            return "var(--soft)"
    return f"var(--run-{number - _FIRST_RUN})"
