"""Measures captioning: rococap against a sequential script, static batches and transformers' pipeline."""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))  # moved to the end: queue.py here would shadow the standard library's
    # Threads that spin after one method's work would slow down the next, and two processes many times over.
    os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}

import small_models
import ways
from report import Line, alternate, ratio_line, show, value_line
from transformers.utils import logging as transformers_logging

from rococap import db
from rococap.data.datasets import locate
from rococap.demo import MODEL
from rococap.demo.phantoms import write_dataset
from rococap.engines import Options, Request
from rococap.engines.hf import TransformersEngine
from rococap.queue.enqueue import enqueue
from rococap.recipe import Recipe
from rococap.worker.dry_run import from_memory

PARTS = ("demo", "uneven", "bfloat16", "float32", "processes", "memory", "selfcheck")
PLOT = Path(__file__).resolve().parents[1] / "docs" / "caption.png"


@dataclass(slots=True)
class Case:
    """A model, `n` pictures under `root`, a batch size and, if they are forced, the caption lengths in tokens."""

    name: str
    recipe: Recipe
    root: Path
    n: int
    lengths: list[int] | None
    batch: int

    def engine(self, batch: int, decode: Any = "continuous") -> TransformersEngine:
        return ways.load(self.recipe, Options(device="cpu", batch_size=batch, decode=decode), self.lengths)

    def prepare(self, engine: TransformersEngine) -> list[Any]:
        pictures = ways.pictures_of(self.root)
        return [engine.prepare(number, Request([picture])) for number, picture in enumerate(pictures, 1)]


def main() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    options = _options()
    lines: list[Line] = []
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    began, load = time.perf_counter(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bench_caption_") as folder:
        try:
            for part in options.only:
                found = MEASURES[part](Path(folder), options, curves)
                lines += found
                print(f"{part}: measured after {time.perf_counter() - began:.0f} s", file=sys.stderr)
        finally:  # also after an error: the results so far are worth having
            show(lines, f"load {load:.1f} before; {options.rounds} rounds")
    print("Missed: " + ("; ".join(line.what for line in lines if line.missed) or "none"))
    if curves:
        import plot_caption  # imports matplotlib, which nothing else needs

        plot_caption.draw(options.plot, curves)
        print(f"Plot written to {options.plot}")


# --- the cases -------------------------------------------------------------------------------------------------


def _demo(folder: Path, options: argparse.Namespace, curves: Any) -> list[Line]:
    recipe = Recipe(model=str(MODEL), max_new_tokens=64, dtype="float32")
    case = Case("demo, its own captions", recipe, _phantoms(folder, options.pictures), options.pictures, None, 32)
    lines = _against_old(case, options, ">= 10") + _against_pipeline(case, options, (16, 32, 64))
    return lines + _of_the_worker(case, options, is_serial=True)


def _uneven(folder: Path, options: argparse.Namespace, curves: Any) -> list[Line]:
    recipe = Recipe(model=str(MODEL), max_new_tokens=128, dtype="float32")
    lengths = ways.uneven_lengths(options.pictures, 33, 128)
    root = _phantoms(folder, options.pictures)
    case = Case("demo, uneven lengths", recipe, root, options.pictures, lengths, 16)
    lines = [line for size in (16, 32) for line in _against_static(replace(case, batch=size), options, ">= 1.5")]
    lines += _against_pipeline(case, options, (16, 32, 64))
    curves[case.name] = _by_batch_size(case, (1, 2, 4, 8, 16, 32, 64))
    return lines


def _bfloat16(folder: Path, options: argparse.Namespace, curves: Any) -> list[Line]:
    return _large(folder, options, "bfloat16")[1]


def _float32(folder: Path, options: argparse.Namespace, curves: Any) -> list[Line]:
    """The same cases in float32, which is faster on CPUs without bfloat16 instructions."""
    case, lines = _large(folder, options, "float32")
    curves[case.name] = _by_batch_size(case, (1, 4, 16, 32))
    return lines + _against_pipeline(case, options, (8, 16))


def _large(folder: Path, options: argparse.Namespace, dtype: Any) -> tuple[Case, list[Line]]:
    model = folder / "model_105m"
    if not model.exists():
        small_models.write_105m(model)
    n = options.large_pictures
    recipe = Recipe(model=str(model), max_new_tokens=128, dtype=dtype)
    case = Case(f"105 M {dtype}, uneven lengths", recipe, _phantoms(folder, n), n, ways.uneven_lengths(n, 33, 128), 16)
    lines = _against_static(case, options, ">= 1.2") + _of_the_worker(case, options, is_serial=False)
    return case, lines + _against_old(case, options, ">= 6")


def _phantoms(folder: Path, n: int) -> Path:
    root = folder / f"phantoms_{n}"
    if not root.exists():
        write_dataset(root, {"train": n})
    return root


# --- comparisons -----------------------------------------------------------------------------------------------


def _rates(case: Case, seconds: Sequence[float]) -> list[float]:
    return [case.n / took for took in seconds]


def _against(case: Case, what: str, rounds: Sequence[tuple[float, float]], target: str) -> Line:
    peers, ours = zip(*rounds, strict=True)
    return ratio_line(f"{case.name}: {what}", _rates(case, peers), _rates(case, ours), "pictures/s", target)


def _timed(work: Callable[..., Any], *arguments: Any) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def _worker(case: Case, engine: TransformersEngine) -> Callable[[], float]:
    def run() -> float:
        with tempfile.TemporaryDirectory(prefix="bench_queue_") as folder:
            return ways.whole_worker(engine, case.root, Path(folder), case.recipe)[0]

    return run


def _against_old(case: Case, options: argparse.Namespace, target: str) -> list[Line]:
    """Against the script that rococap replaces, which captions one picture at a time."""
    model, engine = ways.stock(case.recipe), _auto(case)
    rounds = alternate(
        options.rounds, lambda: _timed(ways.old_script, model, case.root, case.lengths), _worker(case, engine)
    )
    return [_against(case, f"whole worker, batch {engine.batch_size}, against the old script's way", rounds, target)]


def _auto(case: Case) -> TransformersEngine:
    """The engine as a worker without options loads it."""
    return ways.load(case.recipe, Options(device="cpu"), case.lengths)


def _against_pipeline(case: Case, options: argparse.Namespace, sizes: Sequence[int]) -> list[Line]:
    model, engine = ways.stock(case.recipe), _auto(case)
    pipes = {size: ways.stock_pipeline(model, size, case.lengths) for size in sizes}
    once = {size: _timed(pipe, case.root) for size, pipe in pipes.items()}
    best = min(once, key=lambda size: once[size])
    rounds = alternate(options.rounds, lambda: _timed(pipes[best], case.root), _worker(case, engine))
    what = f"whole worker, batch {engine.batch_size}, against transformers' pipeline at its best, {best}"
    return [_against(case, what, rounds, ">= 1.5")]


def _against_static(case: Case, options: argparse.Namespace, target: str) -> list[Line]:
    model, engine = ways.stock(case.recipe), case.engine(case.batch)
    prepared = case.prepare(engine)
    rounds = alternate(
        options.rounds,
        lambda: _timed(ways.static_batches, model, prepared, case.batch, case.lengths),
        lambda: from_memory(engine, prepared)[0],
    )
    return [_against(case, f"against generate in static batches of {case.batch}", rounds, target)]


def _of_the_worker(case: Case, options: argparse.Namespace, *, is_serial: bool) -> list[Line]:
    """The whole worker against its engine alone or, if `is_serial`, against preparing all pictures and then captioning
    them: the fair comparison where both steps use all cores.
    """
    engine = _auto(case)
    prepared = case.prepare(engine)

    def serial() -> float:
        return _timed(case.prepare, engine) + from_memory(engine, prepared)[0]

    alone = serial if is_serial else lambda: from_memory(engine, prepared)[0]
    rounds = alternate(options.rounds, alone, _worker(case, engine))
    what = "whole worker against preparing, then captioning" if is_serial else "whole worker against its engine alone"
    lines = [_against(case, what, rounds, ">= 0.95")]
    if not is_serial:
        with tempfile.TemporaryDirectory(prefix="bench_queue_") as folder:
            _, busy = ways.whole_worker(engine, case.root, Path(folder), case.recipe)
        lines.append(value_line(f"{case.name}: share of a worker's time that the model works", [busy], "", ">= 0.95"))
    return lines


def _by_batch_size(case: Case, sizes: Sequence[int]) -> dict[str, list[tuple[int, float]]]:
    """Pictures per second of each method at each batch size, measured once."""
    model = ways.stock(case.recipe)
    curves: dict[str, list[tuple[int, float]]] = {"rococap": [], "generate in static batches": [], "pipeline": []}
    for size in sizes:
        engine = case.engine(size)
        prepared = case.prepare(engine)
        pipe = ways.stock_pipeline(model, size, case.lengths)
        took = {
            "rococap": from_memory(engine, prepared)[0],
            "generate in static batches": _timed(ways.static_batches, model, prepared, size, case.lengths),
            "pipeline": _timed(pipe, case.root),
        }
        for method, seconds in took.items():
            curves[method].append((size, case.n / seconds))
    return curves


# --- processes, memory -----------------------------------------------------------------------------------------


def _processes(folder: Path, options: argparse.Namespace, curves: Any) -> list[Line]:
    recipe = Recipe(model=str(MODEL), max_new_tokens=64, dtype="float32")
    n = 2 * options.pictures
    root = _phantoms(folder, n)
    case = Case("demo, its own captions", recipe, root, n, None, 32)
    rounds = alternate(options.rounds, lambda: _spawned(case, "cpu:1"), lambda: _spawned(case, "cpu:2"))
    return [_against(case, "two processes against one with two threads", rounds, ">= 1.0")]


def _spawned(case: Case, devices: str) -> float:
    """Seconds from the first claim to the last caption of `rococap worker --devices`."""
    with tempfile.TemporaryDirectory(prefix="bench_queue_") as folder:
        url = f"sqlite:///{Path(folder) / 'queue.db'}"
        database = db.connect(url)
        enqueue(database, locate(str(case.root), ["train"]), ["train"], run="default", recipe=case.recipe)
        command = [sys.executable, "-m", "rococap", "--db", url, "worker", "--devices", devices]
        subprocess.run([*command, "--batch-size", str(case.batch)], check=True, capture_output=True)
        with db.transaction(database) as conn:
            sql = "SELECT (max(closed_at) - min(claimed_at)) / 1000.0 FROM leases"
            return float(db.execute(conn, sql).scalar_one())


def _memory(folder: Path, options: argparse.Namespace, curves: Any) -> list[Line]:
    """The growth of a worker's resident memory after the first tenth of the pictures."""
    recipe = Recipe(model=str(MODEL), max_new_tokens=64, dtype="float32")
    n = options.memory_pictures
    case = Case("demo", recipe, _phantoms(folder, n), n, None, 32)
    with tempfile.TemporaryDirectory(prefix="bench_queue_") as queue_folder:
        sizes = ways.resident(case.engine(case.batch), case.root, Path(queue_folder), recipe)
    warm = max(size for done, size in sizes if done <= n / 10)
    growth = max(size for _, size in sizes) / warm - 1
    return [
        value_line(
            f"{case.name}: growth of resident memory over {n:,} pictures, from {warm:.0f} MB", [growth], "", "< 0.05"
        )
    ]


def _selfcheck(folder: Path, options: argparse.Namespace, curves: Any) -> list[Line]:
    """The time of a worker's self-check, as a share of the time to caption 1,000 pictures."""
    recipe = Recipe(model=str(MODEL), max_new_tokens=64, dtype="float32")
    case = Case("demo, its own captions", recipe, _phantoms(folder, 1_000), 1_000, None, 32)
    engine = case.engine(case.batch)
    checks, runs = [], []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="bench_queue_") as queue_folder:
            runs.append(ways.whole_worker(engine, case.root, Path(queue_folder), recipe)[0])
            checks.append(ways.self_check(engine, case.root, Path(queue_folder), recipe))
    shares = [check / run for check, run in zip(checks, runs, strict=True)]
    return [value_line("demo: self-check, as a share of captioning 1,000 pictures", shares, "", "<= 0.05")]


MEASURES = dict(zip(PARTS, (_demo, _uneven, _bfloat16, _float32, _processes, _memory, _selfcheck), strict=True))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add(
        "--only",
        type=lambda text: text.split(","),
        default=PARTS,
        help=f"parts to measure, separated by commas: {','.join(PARTS)}",
    )
    add("--rounds", type=int, default=5, help="rounds, in each of which all methods take a turn")
    add("--pictures", type=int, default=256, help="pictures for the demo model")
    add("--large-pictures", type=int, default=64, help="pictures for the model of 105 million parameters")
    add("--memory-pictures", type=int, default=20_000, help="pictures captioned by the worker whose memory is measured")
    add("--plot", type=Path, default=PLOT, help="file for the plot, which needs the part uneven or float32")
    options = parser.parse_args()
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    main()
