"""Measures how much threads that prepare pictures hold up the thread that launches kernels: they share Python's lock.

The launching thread takes turns between launching and waiting, as it does on a GPU that reads prompts. What it launches
are steps of a model with 28 layers, so narrow that its operators take next to no time: what takes time is Python and
PyTorch's dispatch. Pictures are prepared all the time in threads, in threads that begin no picture while kernels are
launched, as rococap does it, and in processes of their own, which compete for the cores, but not for the lock.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median

if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))  # moved to the end: queue.py here would shadow the standard library's
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import torch
from launches import write_deep_model
from PIL import Image

from rococap.engines import Options, Request
from rococap.engines.decoding import Row
from rococap.engines.hf import TransformersEngine
from rococap.recipe import Recipe

SIDE = 512
PREPARERS = (1, 2, 4)
YIELDS = threading.Event()
"""Set while the launching thread asks the others to yield."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds, in each of which all cases take a turn")
    parser.add_argument("--launches", type=int, default=8, help="times that kernels are launched in a turn")
    parser.add_argument("--wait", type=float, default=0.2, help="seconds for which the GPU works on them")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_preparers_") as folder:
        engine = _load(str(write_deep_model(Path(folder) / "deep")))
        _measure(engine, options)


def _measure(engine: TransformersEngine, options: argparse.Namespace) -> None:
    ways = {"threads": _threads, "threads that yield": _yielding, "processes": _processes}
    cases = [("", 0)] + [(way, n) for n in PREPARERS for way in ways]
    turns: dict[tuple[str, int], list[tuple[float, float]]] = {case: [] for case in cases}
    for _ in range(options.rounds):
        for way, n in cases:
            with ways[way](engine, n) if n else nullcontext(lambda: 0) as count:
                before, started = count(), time.perf_counter()
                ms = _turn(engine, options.launches, options.wait)
                turns[way, n].append((ms, (count() - before) / (time.perf_counter() - started)))
    alone = median(ms for ms, _ in turns["", 0])
    print("| preparing in | launching, ms | against alone | pictures/s prepared |\n| --- | ---: | ---: | ---: |")
    for (way, n), measured in turns.items():
        ms, rate = median(ms for ms, _ in measured), median(rate for _, rate in measured)
        print(f"| {n} {way} | {ms:.0f} | {ms / alone:.2f} | {rate:.0f} |")


def _load(model: str) -> TransformersEngine:
    engine = TransformersEngine(Recipe(model=model, dtype="float32"), Options(device="cpu", batch_size=1))
    engine.load()
    torch.set_num_threads(1)
    return engine


def _turn(engine: TransformersEngine, launches: int, wait: float) -> float:
    """Milliseconds that five steps take to launch, the median of so many times."""
    decoder = engine.decoder
    decoder._prefill([Row(engine.prepare(0, Request([Image.new("RGB", (56, 56))])), 0.0, [0])])
    width, took = decoder._slots.size[1], []
    for _ in range(launches):
        started = time.perf_counter()
        if YIELDS.is_set():
            decoder.may_prepare.clear()
        for _ in range(5):
            decoder._decode(1, width)
        decoder.may_prepare.set()
        took.append(time.perf_counter() - started)
        time.sleep(wait)
    decoder._clear()
    return 1000 * median(took)


@contextmanager
def _yielding(engine: TransformersEngine, n: int) -> Iterator[Callable[[], int]]:
    YIELDS.set()
    with _threads(engine, n) as count:
        yield count
    YIELDS.clear()


@contextmanager
def _threads(engine: TransformersEngine, n: int) -> Iterator[Callable[[], int]]:
    """Prepares pictures in threads until the end; yields a function that says how many so far."""
    done = [0] * n
    over = threading.Event()

    def prepare(number: int) -> None:
        request = Request([Image.effect_noise((SIDE, SIDE), 64).convert("RGB")])
        while not over.is_set():
            engine.prepare(0, request)
            done[number] += 1

    threads = [threading.Thread(target=prepare, args=(number,)) for number in range(n)]
    for thread in threads:
        thread.start()
    yield lambda: sum(done)
    over.set()
    for thread in threads:
        thread.join()


@contextmanager
def _processes(engine: TransformersEngine, n: int) -> Iterator[Callable[[], int]]:
    context = multiprocessing.get_context("spawn")
    done, over, ready = context.Array("q", n), context.Event(), context.Barrier(n + 1)
    arguments = (engine.recipe.model, done, over, ready)
    processes = [context.Process(target=_prepare, args=(number, *arguments)) for number in range(n)]
    for process in processes:
        process.start()
    ready.wait()
    yield lambda: sum(done)
    over.set()
    for process in processes:
        process.join()


def _prepare(number: int, model: str, done: list[int], over: threading.Event, ready: threading.Barrier) -> None:
    engine = _load(model)
    request = Request([Image.effect_noise((SIDE, SIDE), 64).convert("RGB")])
    ready.wait()
    while not over.is_set():
        engine.prepare(0, request)
        done[number] += 1


if __name__ == "__main__":
    main()
