"""Measures scoring a whole test split: the commands `rococap evaluate` and `report`, and rococap's scores against those
of pycocoevalcap.

The references are real captions; each generated caption is its reference with some words replaced by those of another.
"""

import argparse
import csv
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

sys.path.append(sys.path.pop(0))  # moved to the end: queue.py here would shadow the standard library's

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from report import Line, alternate, compare, show, timed, value_line
from sqlalchemy import Engine

from rococap import db, queue
from rococap.data import datasets
from rococap.engines import Completion, EngineInfo
from rococap.queue.enqueue import enqueue
from rococap.recipe import Recipe
from rococap.results import formats
from rococap.scores import metrics

CAPTIONS = Path(__file__).resolve().parents[2] / "shared" / "data" / "captions" / "roco_v1_2000.csv"
MODALITIES = ("C0040405", "C0024485", "C1306645", "C0041618")
SPLIT = "test"
TEST_SPLIT = 9_927


def pairs(file: Path, n: int) -> list[tuple[str, str]]:
    """`n` pairs of a generated caption and its reference."""
    with file.open(encoding="utf-8", newline="") as lines:
        references = [formats.fold(row["caption"]) for row in csv.DictReader(lines)]
    rng = random.Random(6)
    made = []
    for _ in range(n):
        reference, other = rng.choice(references), rng.choice(references).split()
        kept = rng.random()
        words = (word if rng.random() < kept else rng.choice(other) for word in reference.split())
        made.append((" ".join(words), reference))
    return made


# --- The commands ----------------------------------------------------------------------------------------------


def fill(folder: Path, made: list[tuple[str, str]]) -> Path:
    """Makes a data set and a database with two captioned runs of it; returns the path of the database."""
    write_shards(folder / "set" / "data", [reference for _, reference in made])
    path = folder / "bench.db"
    database = db.connect(f"sqlite:///{path}")
    located = datasets.locate(str(folder / "set"), [SPLIT])
    for run in ("one", "other"):
        enqueue(database, located, [SPLIT], run=run, recipe=Recipe(model=f"bench/{run}"))
        complete(database, run, [caption for caption, _ in made])
    database.dispose()
    return path


def write_shards(folder: Path, references: list[str]) -> None:
    folder.mkdir(parents=True)
    pictures = [noise(number) for number in range(16)]
    size = 2_500
    n_shards = -(-len(references) // size)
    for number in range(n_shards):
        rows = [
            {
                "image": {"bytes": pictures[at % len(pictures)], "path": None},
                "image_id": f"{SPLIT}_{at:06}",
                "caption": reference,
                "cui": [MODALITIES[at % len(MODALITIES)]],
            }
            for at, reference in enumerate(references)
            if at // size == number
        ]
        path = folder / f"{SPLIT}-{number:05}-of-{n_shards:05}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)


def noise(number: int) -> bytes:
    """A JPEG of noise with the typical size of ROCOv2's pictures, 700 by 600 pixels and about 60 kB. Thumbnails of
    noise do not compress well, so the report is as large as it can get.
    """
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (150, 175), dtype=np.uint8))
    file = BytesIO()
    small.resize((700, 600)).save(file, "JPEG", quality=85)
    return file.getvalue()


def complete(database: Engine, run_name: str, captions: list[str]) -> None:
    texts = iter(captions)
    with db.transaction(database, write=True) as conn:
        run = queue.get_run(conn, run_name)
        info = EngineInfo("bench", {}, run.recipe.model, "", "none", "cpu", "")
        worker = queue.register_worker(conn, f"bench {run_name}", "host", 1, info)
    while True:
        with db.transaction(database, write=True) as conn:
            lease = queue.claim(conn, worker, run.id, SPLIT, 500, ttl_ms=600_000)
            if lease is None:
                return
            queue.complete(conn, lease, [Completion(job.id, next(texts)) for job in lease.jobs])


def command(database: Path, *args: str) -> tuple[float, float]:
    """The time of a command in seconds, and its peak resident memory in MB. It runs in the folder of the database."""
    peak_file = database.with_name("peak")
    code = (
        "import sys; from rococap.cli import cli\n"
        "cli(sys.argv[2:], standalone_mode=False)\n"
        "lines = open('/proc/self/status').read().splitlines()\n"
        "open(sys.argv[1], 'w').write(next(line.split()[1] for line in lines if line.startswith('VmHWM:')))"
    )
    argv = [sys.executable, "-c", code, str(peak_file), "--db", f"sqlite:///{database}", *args]
    started = time.monotonic()
    subprocess.run(argv, check=True, cwd=database.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - started, float(peak_file.read_text()) / 1024


def measure_commands(folder: Path, made: list[tuple[str, str]], n_rounds: int) -> list[Line]:
    database = fill(folder, made)
    empty = shutil.copy(database, folder / "empty.db")
    rounds = []
    for _ in range(n_rounds):
        shutil.copy(empty, database)
        evaluate = ("evaluate", "--split", SPLIT, "--run", "one")
        report = ("report", "--split", SPLIT, "--run", "one", "--run", "other", "--pictures", "200")
        rounds.append((command(database, *evaluate), command(database, *evaluate), command(database, *report)))
    size = max(path.stat().st_size for path in folder.glob("results_medical/report*.html")) / 1e6
    lines = []
    for n, (what, target) in enumerate(
        (("evaluate", "<= 60"), ("evaluate again", "<= 2"), ("report of two runs", "<= 60"))
    ):
        seconds, peaks = zip(*(results[n] for results in rounds), strict=True)
        lines += [value_line(what, list(seconds), "s", target), value_line(f"{what}, peak", list(peaks), "MB", "")]
    return [*lines, value_line("report, its size", [size], "MB", "<= 10")]


# --- Against pycocoevalcap -------------------------------------------------------------------------------------


def ours(made: list[tuple[str, str]]) -> dict[str, float]:
    hypotheses, references = ([metrics.tokens(text) for text in side] for side in zip(*made, strict=True))
    several = [[reference] for reference in references]
    counts = [metrics.bleu_statistics(*pair) for pair in zip(hypotheses, several, strict=True)]
    return {
        "bleu_4": metrics.bleu(np.sum(counts, axis=0))[3],
        "rouge_l_coco": float(np.mean([metrics.rouge_l_coco(*pair) for pair in zip(hypotheses, several, strict=True)])),
        "cider_d": metrics.cider_d(hypotheses, several).mean(),
    }


def theirs(made: list[tuple[str, str]]) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    hypotheses, references = (
        PTBTokenizer().tokenize({at: [{"caption": text}] for at, text in enumerate(side)})
        for side in zip(*made, strict=True)
    )
    return {
        "bleu_4": Bleu(4).compute_score(references, hypotheses, verbose=0)[0][3],
        "rouge_l_coco": Rouge().compute_score(references, hypotheses)[0],
        "cider_d": Cider().compute_score(references, hypotheses)[0],
    }


def measure_scores(made: list[tuple[str, str]], n_rounds: int) -> list[Line]:
    found: dict[str, dict[str, float]] = {}

    def run(name: str, score: Callable[[list[tuple[str, str]]], dict[str, float]]) -> None:
        found[name] = score(made)

    rounds = alternate(n_rounds, lambda: timed(lambda: run("peer", theirs)), lambda: timed(lambda: run("ours", ours)))
    print({name: {metric: round(score, 4) for metric, score in scores.items()} for name, scores in found.items()})
    return [compare("tokens, BLEU, ROUGE-L and CIDEr-D, per caption", rounds, "wall", "<= 0.2", rows=len(made))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=TEST_SPLIT, help="captions to score")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, in each of which both take a turn")
    parser.add_argument(
        "--captions",
        type=Path,
        default=CAPTIONS,
        help="a CSV with a column `caption` [default: 2,000 real captions in a folder beside the checkout]",
    )
    options = parser.parse_args()
    if not options.captions.exists():
        parser.error(f"{options.captions} does not exist: give --captions a CSV of real captions, such as ROCOv2's")
    made = pairs(options.captions, options.pairs)
    lines = []
    if find_spec("pycocoevalcap") and shutil.which("java"):
        lines += measure_scores(made, options.rounds)
    else:
        print("Not compared with pycocoevalcap, which needs Java and: pip install 'rococap[coco]'")
    with tempfile.TemporaryDirectory() as folder:
        lines += measure_commands(Path(folder), made, options.rounds)
    show(lines, f"{options.pairs} captions, {options.rounds} rounds, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
