"""Measures rococap against Ray Data on the same Ray cluster of two nodes: speed, and the work that is repeated after a
node has died.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))  # moved to the end: queue.py here would shadow the standard library's
    # For both, through Ray: a thread for each of two workers on two cores, as with `shared_threads`.
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}

import pyarrow.parquet as pq
import server  # which makes the tests' modules importable
from postgres import Server
from ray_cluster import Nodes, nodes
from ray_ways import BLOCK, N_WORKERS, Task
from report import Line, alternate, ratio_line, show, value_line

from rococap import db
from rococap.data.datasets import locate
from rococap.demo.phantoms import write_dataset
from rococap.queue.enqueue import enqueue

PARTS = ("natural", "uneven", "killed")
PROGRAM = Path(__file__).with_name("ray_ways.py")
OUR_BATCH = 64
"""Pictures at a time where a node is killed. It is what a worker chooses by itself for the demo model on two cores."""
LEASE_TTL_SEC = 10.0
"""Where a node is killed. Ray notices that a node is gone after 2 s here, instead of 15."""
TIMEOUT_SEC = 420
MAX_DIFFERENT = 0.01
"""Share of captions that may differ: padding may decide between two tokens that are equally likely."""


@dataclass(frozen=True, slots=True)
class Done:
    """What a program did: the seconds from its first picture to the last stored caption, those of the whole program,
    the captions by picture, how many rows were stored, how often a model began a picture that one had begun before, and
    the seconds from the death of a node to the end.
    """

    steady: float
    whole: float
    captions: dict[str, str]
    n_rows: int
    n_again: int
    after: float


@dataclass(frozen=True, slots=True)
class Bench:
    """A data set of `n` pictures in `folder`, and where it is captioned."""

    folder: Path
    n: int
    server: Server
    cluster: Nodes

    def rococap(self, *, is_uneven: bool = False, is_killed: bool = False, **settings: Any) -> Done:
        task = self._task(self.server.create(), is_uneven, **settings)
        database = db.connect(task.target)
        enqueue(database, locate(task.root, ["train"]), ["train"], run="default", recipe=task.recipe())
        command = ["-m", "rococap", "--db", task.target, "launch", "ray", "--cpus", str(N_WORKERS)]
        command += ["--address", task.address]
        whole, after = self._run(_program("rococap", task) if is_uneven or is_killed else command, task, is_killed)
        with db.transaction(database) as conn:
            sql = "SELECT (max(closed_at) - min(claimed_at)) / 1000.0 FROM leases"
            steady = float(db.execute(conn, sql).scalar_one())
            sql = (
                "SELECT i.image_id, text FROM captions JOIN jobs j ON j.id = job_id JOIN images i ON i.id = j.image_id"
            )
            rows = [(image_id, text) for image_id, text in db.execute(conn, sql)]
        database.dispose()
        return Done(steady, whole, dict(rows), len(rows), _n_again(task), after)

    def ray_data(self, *, is_uneven: bool = False, is_killed: bool = False, **settings: Any) -> Done:
        task = self._task(tempfile.mkdtemp(prefix="captions_", dir=self.folder), is_uneven, **settings)
        whole, after = self._run(_program("ray_data", task), task, is_killed)
        written = max(path.stat().st_mtime for path in Path(task.target).glob("*.parquet"))
        rows = [(row["image_id"], row["caption"]) for row in pq.read_table(task.target).to_pylist()]
        began = float(Path(task.log).read_text().split(maxsplit=1)[0])
        return Done(written - began, whole, dict(rows), len(rows), _n_again(task), after)

    def _task(self, target: str, is_uneven: bool, **settings: Any) -> Task:
        log = tempfile.mkstemp(prefix="log_", dir=self.folder)[1]
        return Task(self.cluster.address, str(self.folder / "dataset"), self.n, is_uneven, target, log, **settings)

    def _run(self, arguments: list[str], task: Task, is_killed: bool) -> tuple[float, float]:
        """The seconds that a program takes, and those after a node was killed in the middle of its work."""
        began = killed = time.perf_counter()
        with (
            tempfile.TemporaryFile("w+") as err,
            subprocess.Popen([sys.executable, *arguments], cwd=PROGRAM.parents[1], stdout=err, stderr=err) as process,
        ):
            try:
                if is_killed:
                    killed = self._kill(task, process)
                process.wait(TIMEOUT_SEC)
            except BaseException:
                process.kill()
                raise
            err.seek(0)
            if process.returncode:
                raise SystemExit(err.read())
        ended = time.perf_counter()
        return ended - began, ended - killed

    def _kill(self, task: Task, process: Any) -> float:
        """Kills a node some moment after half of the pictures were begun, and adds another in its place. Returns when
        that was.
        """
        while len(_begun(task)) < task.n / 2:
            assert process.poll() is None, "it ended too early"
            time.sleep(0.05)
        time.sleep(random.random())  # else it would always be just after a model has begun the next pictures
        self.cluster.kill(self.cluster.running[0])
        killed = time.perf_counter()
        self.cluster.add()
        return killed


def _program(way: str, task: Task) -> list[str]:
    return [str(PROGRAM), way, json.dumps(asdict(task))]


def _begun(task: Task) -> list[str]:
    """The pictures that models have begun to caption, in order."""
    return [number for line in Path(task.log).read_text().splitlines() for number in line.split()[1:]]


def _n_again(task: Task) -> int:
    return sum(times - 1 for times in Counter(_begun(task)).values())


# --- parts -----------------------------------------------------------------------------------------------------


def speed(bench: Bench, options: argparse.Namespace, *, is_uneven: bool) -> list[Line]:
    once = {size: bench.ray_data(is_uneven=is_uneven, batch=size).steady for size in options.batches}
    best = min(once, key=lambda size: once[size])
    _say({size: f"{bench.n / seconds:.1f} pictures/s" for size, seconds in once.items()})
    rounds = alternate(
        options.rounds,
        lambda: bench.ray_data(is_uneven=is_uneven, batch=best),
        lambda: bench.rococap(is_uneven=is_uneven),
    )
    n_different = max(_n_different(theirs, ours, bench.n) for theirs, ours in rounds)
    case = f"demo, {'uneven lengths' if is_uneven else 'its own captions'}"
    lines = [value_line(f"{case}: captions of {bench.n:,} that differ, in the worst round", [n_different], "", "")]
    for what, clock, target in (
        ("first picture to last caption", "steady", ">= 1.3"),
        ("whole command, with loading", "whole", ""),
    ):
        peers, ours = ([bench.n / getattr(done, clock) for done in column] for column in zip(*rounds, strict=True))
        lines.append(ratio_line(f"{case}: {what}; Ray Data's batch {best}", peers, ours, "pictures/s", target))
    return lines


def _n_different(theirs: Done, ours: Done, n: int) -> int:
    """How many captions differ. Exits if they are too many, or not all there."""
    if not theirs.captions.keys() == ours.captions.keys() or not theirs.n_rows == ours.n_rows == n:
        raise SystemExit(f"{theirs.n_rows} and {ours.n_rows} captions were stored of {n} pictures")
    different = [image_id for image_id, text in ours.captions.items() if theirs.captions[image_id] != text]
    if len(different) > MAX_DIFFERENT * n:
        texts = "\n".join(f"{theirs.captions[one]!r}\n{ours.captions[one]!r}" for one in different[:5])
        raise SystemExit(f"{len(different)} of {n} captions differ:\n{texts}")
    return len(different)


def killed(bench: Bench, options: argparse.Namespace) -> list[Line]:
    batch = options.batches[0]
    rounds = alternate(
        options.rounds,
        lambda: bench.ray_data(is_killed=True, batch=batch),
        lambda: bench.rococap(is_killed=True, batch=OUR_BATCH, lease_ttl=LEASE_TTL_SEC),
    )
    lines = []
    names = (f"Ray Data, blocks of {BLOCK}, batch {batch}", f"rococap, batch {OUR_BATCH}, lease {LEASE_TTL_SEC:.0f} s")
    for name, column, target in zip(names, zip(*rounds, strict=True), ("", f"<= {OUR_BATCH}"), strict=True):
        lost = [bench.n - len(done.captions) for done in column]
        doubled = [done.n_rows - len(done.captions) for done in column]
        case = f"a node is killed: {name}"
        lines += [
            value_line(f"{case}: pictures begun again", [float(done.n_again) for done in column], "", target),
            value_line(f"{case}: pictures lost", lost, "", "<= 0"),
            value_line(f"{case}: pictures stored twice", doubled, "", "<= 0"),
            value_line(f"{case}: from its death to the end", [done.after for done in column], "s", ""),
        ]
    return lines


def _say(what: object) -> None:
    print(what, file=sys.stderr, flush=True)


def main() -> None:
    options = _options()
    lines: list[Line] = []
    load = os.getloadavg()[0]
    with (
        tempfile.TemporaryDirectory(prefix="bench_ray_") as folder,
        server.started() as postgres,
        nodes(N_WORKERS) as cluster,
    ):
        write_dataset(Path(folder) / "dataset", {"train": options.pictures}, rows_per_shard=BLOCK)
        bench = Bench(Path(folder), options.pictures, postgres, cluster)
        try:
            for part in options.only:
                lines += (
                    killed(bench, options) if part == "killed" else speed(bench, options, is_uneven=part == "uneven")
                )
                _say(f"{part}: measured")
        finally:  # also after an error: the results so far are worth having
            if lines:
                show(lines, f"{options.pictures} pictures, load {load:.1f} before; {options.rounds} rounds")
    print("Missed: " + ("; ".join(line.what for line in lines if line.missed) or "none"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--only", type=lambda text: text.split(","), default=PARTS, help=f"parts to measure: {','.join(PARTS)}")
    add("--rounds", type=int, default=3, help="rounds, in each of which both take a turn")
    add("--pictures", type=int, default=2_048, help=f"pictures, a multiple of {BLOCK}")
    sizes: Any = lambda text: [int(size) for size in text.split(",")]  # noqa: E731
    add(
        "--batches",
        type=sizes,
        default=[32, 64, 128],
        help="batch sizes to try with Ray Data; `killed` takes the first",
    )
    options = parser.parse_args()
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if options.pictures % BLOCK:
        parser.error(f"--pictures must be a multiple of {BLOCK}")
    return options


if __name__ == "__main__":
    main()
