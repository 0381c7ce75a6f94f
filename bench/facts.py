"""Evaluates the fact lexicons: precision and recall against labelled captions, the time that fact scores take, and what
unrelated captions score, the floor of each score.

The labels are those of tests/scores/facts_labelled.json. The captions are a CSV with a column `caption`.
"""

import argparse
import csv
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))  # moved to the end: queue.py here would shadow the standard library's
    sys.path.append(str(Path(__file__).parents[1] / "tests"))

import numpy as np
from labelled import ROCOV2, counts_of, read_labelled, read_labelled_negations, read_labelled_rocov2

from rococap.scores import facts

N = 9_927  # captions of ROCOv2's test split


def scores(captions: list[str], references: list[str]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {kind: [] for kind in facts.KINDS}
    for caption, reference in zip(captions, references, strict=True):
        ours, theirs = facts.facts_of(caption), facts.facts_of(reference)
        if ours and theirs:
            for kind, agreement in facts.agreements(ours, theirs).items():
                f1 = float(facts.f1(np.array(agreement.counts, dtype=np.float64)))
                if not np.isnan(f1):
                    found[kind].append(f1)
    return found


def print_labelled(labelled: list[dict[str, Any]], kinds: Sequence[str] = facts.KINDS) -> None:
    print(f"\n{len(labelled)} captions\n\n| kind | captions | precision | recall |\n| --- | --- | --- | --- |")
    for kind, (n, correct, n_found, n_labelled) in counts_of(labelled).items():
        if kind not in kinds:
            continue
        precision, recall = (f"{correct}/{whole} = {correct / whole:.2f}" for whole in (n_found, n_labelled))
        print(f"| {kind} | {n} | {precision} | {recall} |")


def print_time(captions: list[str]) -> None:
    many = (captions * (N // len(captions) + 1))[:N]
    shuffled = random.Random(1).sample(many, len(many))
    read = facts.facts_of.__wrapped__
    start = time.process_time()
    for caption, reference in zip(many, shuffled, strict=True):
        ours, theirs = read(caption), read(reference)  # nothing is remembered
        if ours and theirs:
            facts.agreements(ours, theirs)
    print(f"\n{N} captions against as many originals: {time.process_time() - start:.1f} s")


def print_floors(captions: list[str]) -> None:
    print("\n| kind | n | identical | shuffled | shuffled again |\n| --- | --- | --- | --- | --- |")
    identical = scores(captions, captions)
    others = [scores(random.Random(seed).sample(captions, len(captions)), captions) for seed in (1, 2)]
    for kind in facts.KINDS:
        means = [f"{statistics.fmean(one[kind]):.3f}" for one in (identical, *others)]
        print(f"| {kind} | {len(identical[kind])} | {' | '.join(means)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    path = parser.parse_args().file
    with path.open(newline="", encoding="utf-8-sig") as file:
        captions = [row["caption"] for row in csv.DictReader(file)]
    print(f"facts {facts.DIGEST}")
    print_labelled(read_labelled())
    print_labelled(read_labelled_negations(), ["negation"])
    if ROCOV2.exists():
        print_labelled(read_labelled_rocov2())
    print_time(captions)
    print_floors(captions)


if __name__ == "__main__":
    main()
