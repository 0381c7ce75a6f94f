"""Evaluates the concept matcher on real captions: how often each concept is named, and how well the concepts found
agree with the manual ones of ROCOv2.

The files are CSVs with captions (`Caption`), concepts (`CUIs`), or both, which are joined by `ID`: for example ROCOv2's
`test_captions.csv` and `test_concepts_manual.csv`. Without concepts, only the first table is printed.
"""

import argparse
import csv
import statistics
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))  # moved to the end: queue.py here would shadow the standard library's

from rococap.scores import concepts
from rococap.scores.concepts import CONCEPTS, DIGEST

KINDS = ("modality", "region", "direction")
OF_KIND = {kind: {concept.cui for concept in CONCEPTS if concept.kind == kind} for kind in KINDS}
Pair = tuple[frozenset[str], frozenset[str]]


def read(paths: list[Path]) -> list[dict[str, str]]:
    rows: dict[str, dict[str, str]] = defaultdict(dict)
    for path in paths:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.DictReader(file)):
                lower = {name.lower(): value for name, value in row.items()}
                rows[lower.get("id", f"{path} {number}")] |= lower
    return [row for row in rows.values() if "caption" in row]


def cuis(row: dict[str, str]) -> str | None:
    return row.get("cuis_manual", row.get("cuis"))


def share(part: int, whole: int) -> str:
    return f"{part}/{whole} = {part / whole:.3f}" if whole else "0/0"


def print_hits(captions: list[str]) -> None:
    start = time.perf_counter()
    found = [concepts.found(caption) for caption in captions]
    seconds = time.perf_counter() - start
    named = Counter(cui for cuis_found in found for cui in cuis_found)
    words = sum(len(caption.split()) for caption in captions)
    print(f"concepts.toml {DIGEST}: {len(captions)} captions of {words} words in {seconds:.3f} s\n")
    print("| concept | kind | captions |\n| --- | --- | --- |")
    for concept in CONCEPTS:
        print(f"| {concept.name} | {concept.kind} | {named[concept.cui]} |")
    print(f"| no modality | | {sum(concepts.modality(cuis_found) == 'unknown' for cuis_found in found)} |\n")


def print_scores(pairs: list[Pair]) -> None:
    print("| kind | precision | recall |\n| --- | --- | --- |")
    for kind, of_kind in OF_KIND.items():
        correct = sum(len(found & reference & of_kind) for found, reference in pairs)
        n_found = sum(len(found & of_kind) for found, _ in pairs)
        n_reference = sum(len(reference & of_kind) for _, reference in pairs)
        print(f"| {kind} | {share(correct, n_found)} | {share(correct, n_reference)} |")
    f1s = [concepts.f1(found, reference) for found, reference in pairs]
    print(f"\nmean F1 {statistics.fmean(f1s):.4f} of {len(pairs)} captions that have a concept")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument(
        "--hits-only",
        action="store_true",
        help="do not compare with the concepts in the files, if those are not manual ones",
    )
    options = parser.parse_args()
    rows = read(options.files)
    print_hits([row["caption"] for row in rows])
    joined = [(row["caption"], concepts.parse(cuis(row) or "")) for row in rows]
    pairs = [(concepts.found(caption), concepts.curated(named)) for caption, named in joined]
    pairs = [(found, reference) for found, reference in pairs if reference]
    if pairs and not options.hits_only:
        print_scores(pairs)


if __name__ == "__main__":
    main()
