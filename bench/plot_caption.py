"""Pictures a second by batch size, for each way of captioning."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

COLOURS = {"rococap": "#1f77b4", "generate in static batches": "#9aa5b1", "pipeline": "#c0392b"}

Curves = dict[str, dict[str, list[tuple[int, float]]]]
"""Case -> way -> (batch size, pictures a second)."""


def draw(path: Path, curves: Curves) -> None:
    figure, axes = pyplot.subplots(1, len(curves), figsize=(6 * len(curves), 4.5), squeeze=False)
    for one, (case, ways) in zip(axes[0], curves.items(), strict=True):
        for way, points in ways.items():
            one.plot(*zip(*points, strict=True), "o-", color=COLOURS[way], label=way)
        one.set_xscale("log", base=2)
        one.set_xticks([size for size, _ in next(iter(ways.values()))])
        one.xaxis.set_major_formatter("{x:.0f}")
        one.set(xlabel="batch size", ylabel="pictures a second", title=case)
        one.set_ylim(bottom=0)
        one.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
