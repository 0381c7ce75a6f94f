"""The engine openai against the same model in this process: whole workers, and a server process on loopback."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":
    # Last, for queue.py and http.py here would stand in for the standard library's.
    sys.path.append(sys.path.pop(0))
    os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}

import ways
from report import alternate, ratio_line, show
from transformers.utils import logging as transformers_logging

from rococap.demo import MODEL
from rococap.demo.phantoms import write_dataset
from rococap.engines import Engine, Options
from rococap.engines.openai import OpenAIEngine
from rococap.recipe import Recipe

BENCH = Path(__file__).resolve().parent
TESTS = BENCH.parent / "tests"
MEAN, MOST = 33, 128
"""Tokens of a caption."""


def main() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    options, load = _options(), os.getloadavg()[0]
    n, size = options.pictures, options.in_flight
    lengths = ways.uneven_lengths(n, MEAN, MOST)
    with tempfile.TemporaryDirectory(prefix="bench_http_") as folder, _server(size, lengths) as url:
        root = Path(folder) / "pictures"
        write_dataset(root, {"train": n})
        local = Recipe(model=str(MODEL), max_new_tokens=MOST, dtype="float32")
        ours = ways.load(local, Options(device="cpu", batch_size=size), lengths)
        remote = OpenAIEngine(
            Recipe(model=str(MODEL), max_new_tokens=MOST),
            Options(engine="openai", base_url=url, served_model="demo", batch_size=size),
        )
        remote.load()
        works = [_worker(engine, root) for engine in (ours, remote)]
        for work in works:  # what is done once is done now
            work()
        rounds = alternate(options.rounds, *works)
        remote.close()
    rates = [[n / seconds for seconds in column] for column in zip(*rounds, strict=True)]
    what = f"whole worker, {size} in flight, demo model, uneven lengths: over HTTP against in process"
    show([ratio_line(what, *rates, "pictures/s", ">= 0.9")], f"load {load:.1f} before; {options.rounds} rounds")


def _worker(engine: Engine, root: Path) -> Callable[[], float]:
    def run() -> float:
        with tempfile.TemporaryDirectory(prefix="bench_queue_") as folder:
            return ways.whole_worker(engine, root, Path(folder), engine.recipe)[0]

    return run


@contextmanager
def _server(size: int, lengths: list[int]) -> Iterator[str]:
    """The URL of a process that batches what is asked through the continuous engine."""
    path = os.pathsep.join([str(BENCH.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    code = (
        f"import sys; sys.path.append({str(BENCH)!r}); "
        "from openai_server import serve_demo_model; import json; serve_demo_model(**json.loads(sys.argv[1]))"
    )
    options = json.dumps({"batch_size": size, "max_new_tokens": MOST, "lengths": lengths})
    with subprocess.Popen(
        [sys.executable, "-c", code, options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="in which the two take turns")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--in-flight", type=int, default=16)
    return parser.parse_args()


if __name__ == "__main__":
    main()
