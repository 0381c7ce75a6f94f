"""Plots pictures per second against batch size, for each method of captioning."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

COLOURS = {"rococap": "#1f77b4", "generate in static batches": "#9aa5b1", "pipeline": "#c0392b"}

Curves = dict[str, dict[str, list[tuple[int, float]]]]
"""Case -> method -> [(batch size, pictures per second)]."""


def draw(path: Path, curves: Curves) -> None:
    figure, axes = pyplot.subplots(1, len(curves), figsize=(6 * len(curves), 4.5), squeeze=False)
    for panel, (case, methods) in zip(axes[0], curves.items(), strict=True):
        for method, points in methods.items():
            panel.plot(*zip(*points, strict=True), "o-", color=COLOURS[method], label=method)
        panel.set_xscale("log", base=2)
        panel.set_xticks([size for size, _ in next(iter(methods.values()))])
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.set(xlabel="batch size", ylabel="pictures per second", title=case)
        panel.set_ylim(bottom=0)
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
