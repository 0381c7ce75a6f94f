"""Measures whole workers with the engine openai and a server on loopback, against the same model in this process."""

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
    # Moved to the end: queue.py and http.py here would shadow the standard library's.
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
MEAN, LONGEST = 33, 128
"""Length of the captions in tokens."""


def main() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    options, load = _options(), os.getloadavg()[0]
    n, size = options.pictures, options.in_flight
    lengths = ways.uneven_lengths(n, MEAN, LONGEST)
    with tempfile.TemporaryDirectory(prefix="bench_http_") as folder, _server(size, lengths) as url:
        root = Path(folder) / "pictures"
        write_dataset(root, {"train": n})
        local = Recipe(model=str(MODEL), max_new_tokens=LONGEST, dtype="float32")
        ours = ways.load(local, Options(device="cpu", batch_size=size), lengths)
        remote = OpenAIEngine(
            Recipe(model=str(MODEL), max_new_tokens=LONGEST),
            Options(engine="openai", base_url=url, served_model="demo", batch_size=size),
        )
        remote.load()
        workers = [_worker(engine, root) for engine in (ours, remote)]
        for work in workers:  # a first turn that does not count, for whatever happens only once
            work()
        rounds = alternate(options.rounds, *workers)
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
    """Starts a server process that answers requests in batches with the continuous engine; yields its URL."""
    path = os.pathsep.join([str(BENCH.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    code = (
        f"import sys; sys.path.append({str(BENCH)!r}); "
        "from openai_server import serve_demo_model; import json; serve_demo_model(**json.loads(sys.argv[1]))"
    )
    options = json.dumps({"batch_size": size, "max_new_tokens": LONGEST, "lengths": lengths})
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
    parser.add_argument("--rounds", type=int, default=5, help="rounds, in each of which both take a turn")
    parser.add_argument("--pictures", type=int, default=256, help="pictures to caption")
    parser.add_argument("--in-flight", type=int, default=16, help="pictures captioned at the same time")
    return parser.parse_args()


if __name__ == "__main__":
    main()
