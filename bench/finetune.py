"""Measures fine-tuning: rococap against TRL's SFTTrainer, with the same weights, pictures, batches and steps.

Each training runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))  # moved to the end: queue.py here would shadow the standard library's
    os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}

import pyarrow as pa
import pyarrow.parquet as pq
import small_models
import ways
from report import Line, alternate, ratio_line, show, value_line
from trainings import Case, Trained
from transformers import AutoProcessor

from rococap.demo import MODEL
from rococap.demo.phantoms import write_dataset
from rococap.training.settings import Method

CASES: dict[str, tuple[str, Path | None, Method]] = {
    "demo": ("demo, LoRA", MODEL, "lora"),
    "lora": ("106 M, LoRA", None, "lora"),
    "full": ("106 M, all weights", None, "full"),
}
TRAININGS = str(Path(__file__).with_name("trainings.py"))
MEAN, LONGEST = 33, 128
"""Length of the longer captions in tokens, distributed as in ROCOv2."""


def main() -> None:
    options = _options()
    lines: list[Line] = []
    began, load = time.perf_counter(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bench_finetune_") as folder:
        try:
            for part in options.only:
                lines += compare(case_of(part, Path(folder), options), options.rounds)
                print(f"{part}: measured after {time.perf_counter() - began:.0f} s", file=sys.stderr)
        finally:  # also after an error: the results so far are worth having
            show(lines, f"load {load:.1f} before; {options.rounds} rounds of {options.steps} steps")
    print("Missed: " + ("; ".join(line.what for line in lines if line.missed) or "none"))


def case_of(part: str, folder: Path, options: argparse.Namespace) -> Case:
    """The cases share one data set, in which captions are as long as ROCOv2's."""
    n, root, large = options.batch_size * options.steps, folder / "uneven", folder / "model_106m"
    if not root.exists():
        write_dataset(root, {"train": n})
        lengthen_captions(root, ways.uneven_lengths(n, MEAN, LONGEST))
    if part != "demo" and not large.exists():
        small_models.write_105m(large)
    name, model, method = CASES[part]
    return Case(name, str(model or large), str(root), method, options.batch_size, options.steps)


def lengthen_captions(root: Path, lengths: Sequence[int]) -> None:
    """Makes the captions of a data set this long, in tokens of the demo model, by repeating and cutting them."""
    tokenizer = AutoProcessor.from_pretrained(MODEL).tokenizer
    left = iter(lengths)
    for path in sorted((root / "data").glob("*.parquet")):
        table = pq.read_table(path)
        column = table.schema.get_field_index("caption")
        made = [
            tokenizer.decode(tokenizer(" ".join([caption] * length))["input_ids"][:length]).strip()
            for caption, length in zip(table["caption"].to_pylist(), islice(left, len(table)), strict=True)
        ]
        pq.write_table(table.set_column(column, "caption", pa.array(made)), path, row_group_size=100)


def compare(case: Case, n_rounds: int) -> list[Line]:
    rounds = alternate(n_rounds, lambda: train("peer", case), lambda: train("ours", case))
    peers, ours = zip(*rounds, strict=True)

    def ratio(what: str, figure: Callable[[Trained], float], unit: str, target: str) -> Line:
        return ratio_line(f"{case.name}: {what}", [*map(figure, peers)], [*map(figure, ours)], unit, target)

    apart = [_apart(its.losses, mine.losses) for its, mine in rounds]
    losses = f"loss of each of {case.steps} steps, from {ours[0].losses[0]:.3f} to {ours[0].losses[-1]:.3f}"
    busy = [one.busy for one in ours]
    return [
        ratio("training", lambda one: case.n / one.seconds, "pictures/s", ">= 1.0"),
        ratio("peak memory", lambda one: one.peak_mb, "MB", "<= 1.0"),
        Line(f"{case.name}: {losses}, differs by at most", "", f"{max(apart):.0e} of it", (max(apart),), "<= 0.0001"),
        value_line(f"{case.name}: share of the time in which the model works", busy, "", ">= 0.9"),
    ]


def _apart(its: Sequence[float], mine: Sequence[float]) -> float:
    """The largest difference between two losses of a step, as a share of the loss."""
    return max(abs(b - a) / a for a, b in zip(its, mine, strict=True))


def train(who: str, case: Case) -> Trained:
    command = [sys.executable, TRAININGS, who, json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case.name}, {who}: {done.stderr}")
    return Trained(**json.loads(done.stdout.splitlines()[-1]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add(
        "--only",
        type=lambda text: text.split(","),
        default=[*CASES],
        help=f"parts to measure, separated by commas: {','.join(CASES)}",
    )
    add("--rounds", type=int, default=3, help="rounds, in each of which both take a turn")
    add("--batch-size", type=int, default=8, help="pictures at a time")
    add("--steps", type=int, default=16, help="steps of a training")
    options = parser.parse_args()
    if unknown := set(options.only) - set(CASES):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    main()
