"""What fine-tuning gains and loses: `rococap demo --finetune` with several numbers of steps, methods and seeds.

    python bench/gain.py --plot docs/finetuning.png

Prints a table of held-out captions that equal the original, and plots them over the number of steps. Run again in the
same folder, it goes on with what is missing.
"""

import os
import sys

if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))  # moved to the end: queue.py here would shadow the standard library's
    os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}

import argparse
import itertools
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from rococap.demo.finetune import IMAGES, Tuned, run

COLOURS = {"full": "#1f77b4", "lora": "#c0392b"}
KINDS = {"new": ("-", "kinds never seen before"), "old": ("--", "kinds known before")}

Results = dict[tuple[str, int], list[Tuned]]
"""(Method, steps) -> one result for each seed."""


def measure(folder: Path, options: argparse.Namespace) -> Results:
    results: Results = defaultdict(list)
    for method, steps, seed in itertools.product(options.methods, options.steps, options.seeds):
        tuned = run(folder, options.images, 2, method, steps, seed, _progress)
        results[method, steps].append(tuned)
        print(f"\r{tuned.run}: new {_share(tuned, 'new'):.1%}, old {_share(tuned, 'old'):.1%}", file=sys.stderr)
    return results


def _progress(step: str, done: int, total: int) -> None:
    print(f"\r{step}: {done} of {total}    ", end="", file=sys.stderr, flush=True)


def _share(tuned: Tuned, kinds: str) -> float:
    exact = getattr(tuned, kinds)
    return float(exact.after / exact.pictures)


def table(results: Results) -> str:
    first = next(iter(results.values()))[0]
    before = [f"{exact.before / exact.pictures:.1%}" for exact in (first.new, first.old)]
    lines = [
        f"| method | steps of 32 | never seen before ({first.new.pictures}) | known before ({first.old.pictures}) |",
        "| --- | --- | --- | --- |",
        f"| before | 0 | {before[0]} | {before[1]} |",
    ]
    for (method, steps), tuned in results.items():
        cells = [_spread([_share(one, kinds) for one in tuned]) for kinds in KINDS]
        lines.append(f"| {method} | {steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(shares: list[float]) -> str:
    if len(shares) == 1:
        return f"{shares[0]:.1%}"
    return f"{mean(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})"


def draw(path: Path, results: Results) -> None:
    """Lines through the means, bars from the lowest to the highest seed."""
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for method in dict.fromkeys(method for method, _ in results):
        found = {steps: tuned for (one, steps), tuned in results.items() if one == method}
        for kinds, (line, label) in KINDS.items():
            shares = {steps: [100 * _share(one, kinds) for one in tuned] for steps, tuned in found.items()}
            start = getattr(next(iter(found.values()))[0], kinds)
            means = [100 * start.before / start.pictures, *map(mean, shares.values())]
            low = [0, *(mean(one) - min(one) for one in shares.values())]
            high = [0, *(max(one) - mean(one) for one in shares.values())]
            style = {"fmt": f"o{line}", "markersize": 4, "capsize": 4, "color": COLOURS[method]}
            axes.errorbar([0, *shares], means, [low, high], **style, label=f"{method}: {label}")
    axes.set(xlabel="steps of 32 pictures", ylabel="held-out captions equal to the original, %", ylim=(-2, 102))
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8, handlelength=4)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[150, 300])
    parser.add_argument("--methods", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--images", type=int, default=IMAGES, help="phantoms, a quarter of them held out")
    parser.add_argument("--dir", type=Path, help="a folder to keep, and to go on in")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        results = measure(options.dir or Path(temporary), options)
    print(table(results))
    if options.plot:
        draw(options.plot, results)


if __name__ == "__main__":
    main()
