"""Profiles captioning with torch.profiler: shares of matrix products, attention, copies, other operators and Python."""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))  # moved to the end: queue.py here would shadow the standard library's
    os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}

import small_models
import ways
from torch.profiler import ProfilerActivity, profile

from rococap.demo import MODEL
from rococap.demo.phantoms import write_dataset
from rococap.engines import Options, Request
from rococap.recipe import Recipe
from rococap.worker.dry_run import from_memory

KINDS = {
    "matrix products": ("aten::addmm", "aten::mm", "aten::bmm", "aten::linear", "mkldnn"),
    "attention": ("scaled_dot_product",),
    "copies": ("aten::copy_", "aten::cat", "aten::index", "aten::_index_put", "aten::clone"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--pictures", type=int, default=128, help="pictures for the demo model")
    parser.add_argument("--large-pictures", type=int, default=32, help="pictures for the larger model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_profile_") as folder:
        large = str(small_models.write_105m(Path(folder) / "large"))
        cases = [
            ("demo, uneven lengths", str(MODEL), "float32", options.pictures),
            ("105 M float32", large, "float32", options.large_pictures),
            ("105 M bfloat16", large, "bfloat16", options.large_pictures),
        ]
        root = Path(folder) / "phantoms"
        write_dataset(root, {"train": max(options.pictures, options.large_pictures)})
        print("| case | " + " | ".join([*KINDS, "other operators", "Python and waiting"]) + " |")
        print("| --- |" + " ---: |" * (len(KINDS) + 2))
        for name, model, dtype, n in cases:
            shares = _shares(Recipe(model=model, dtype=dtype, max_new_tokens=128), root, n)
            print(f"| {name} | " + " | ".join(f"{100 * share:.0f} %" for share in shares) + " |")


def _shares(recipe: Recipe, root: Path, n: int) -> list[float]:
    """The share of each kind in the wall time of the main thread, which calls all operators."""
    engine = ways.load(recipe, Options(device="cpu", batch_size=16), ways.uneven_lengths(n, 33, 128))
    pictures = zip(range(1, n + 1), ways.pictures_of(root), strict=False)
    prepared = [engine.prepare(number, Request([picture])) for number, picture in pictures]
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        started = time.perf_counter()
        from_memory(engine, prepared)
        wall = time.perf_counter() - started
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        spent[_kind(event.key)] += event.self_cpu_time_total / 1e6
    shares = [spent[kind] / wall for kind in [*KINDS, "other"]]
    return [*shares, 1 - sum(shares)]


def _kind(operator: str) -> str:
    return next((kind for kind, names in KINDS.items() if any(name in operator for name in names)), "other")


if __name__ == "__main__":
    main()
