"""The whole job on drawings: phantoms, the queue, two workers, the small model that captions them, an export, a report.

Everything is what a user of ROCOv2 runs; only the pictures and the model are small. The pictures are drawn from seeds
that the model was never trained on.
"""

import csv
import os
import random
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from sqlalchemy import Engine as Database

from rococap.data import STANDARD
from rococap.progress import Progress
from rococap import db, queue
from rococap.data import SPLITS, PictureReader, Place, datasets
from rococap.data.images import open_picture
from rococap.errors import RococapError
from rococap.queue.enqueue import enqueue, enqueue_from
from rococap.recipe import Recipe
from rococap.results import checkpoints, export, restore, snapshot
from rococap.worker.supervisor import program, shared_threads

MODEL = Path(__file__).parent / "model"
SHUFFLED = "captions of run default, shuffled"
MADE = ("dataset", export.FOLDER.name, "captions.png", "report.html")
SHOWN = 12
SEED = 20_411
NOTE = (
    "Drawings made by a program, captioned by a small demonstration model. Run shuffled has the same captions, each "
    "given to another drawing: what it scores, captions of this kind score by chance."
)



@dataclass(frozen=True, slots=True)
class Shown:
    image_id: str
    original: str
    generated: str


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo made: how many captions, how many of them an earlier one made before, how many equal the original
    to the letter, some of them, and the files.
    """

    captioned: int
    before: int
    exact: int
    seconds: float
    examples: list[Shown]
    sheet: Path
    report: Path
    exports: list[Path]


def recipe() -> Recipe:
    # float32 wherever it runs, so that the captions do not hang on a GPU's precision.
    return Recipe(model=str(MODEL), max_new_tokens=64, dtype="float32")


def run(folder: Path, n_images: int, n_workers: int, progress: Progress) -> Demo:
    """Draws `n_images` phantoms into `folder`, captions, exports and reports them. Again, it goes on where it was.

    Raises RococapError with the log's last lines if a worker fails, and where the folder holds another demo's results,
    or something that no demo made: neither is overwritten.
    """
    from rococap.demo.phantoms import write_dataset

    counts = _counts(n_images)
    folder.mkdir(parents=True, exist_ok=True)
    url = str(folder.resolve() / "rococap.db")  # a folder's name may hold what means something else in a URL
    _check_unmixed(folder, Path(url))
    database = db.connect(url)  # before the phantoms, so that a demo that was killed is known by it
    before = _check_same(database, folder, counts)
    progress("drawing phantoms", 0, n_images)
    write_dataset(folder / "dataset", counts)
    enqueue(database, datasets.locate(str(folder / "dataset"), SPLITS), SPLITS, run="default", recipe=recipe())
    started = time.monotonic()
    if _unfinished(database):
        _run_workers(database, url, folder, n_workers, progress)
    seconds = time.monotonic() - started
    paths = _export(database, folder)
    rows = [row for path in paths for row in _rows(path)]
    sheet = _contact_sheet(database, folder, rows[-SHOWN:])
    exact = sum(row.original == row.generated for row in rows)
    page = _report(database, folder, paths, progress)
    return Demo(len(rows), before, exact, seconds, rows[-SHOWN:], sheet, page, paths)


def _counts(n_images: int) -> Mapping[str, int]:
    held_back = max(1, n_images // 5)
    return {"train": max(1, n_images - 2 * held_back), "validation": held_back, "test": held_back}


# --- What is there ---------------------------------------------------------------------------------------------


def _check_unmixed(folder: Path, queue_file: Path) -> None:
    there = [name for name in MADE if (folder / name).exists()]
    if there and not queue_file.exists():
        raise RococapError(
            f"{folder} holds {', '.join(there)}, and no demo's queue: what is there is left as it is. Name another "
            "folder: rococap demo --dir FOLDER"
        )


def _check_same(database: Database, folder: Path, counts: Mapping[str, int]) -> int:
    """How many pictures the demo in this folder has captioned; it is of these phantoms, if there is one."""
    with db.transaction(database) as conn:
        runs = queue.list_runs(conn)
        there = {one.split: one for one in queue.counts(conn) if one.run == "default"}
    dataset = str((folder / "dataset").resolve())  # as enqueue names it
    if not all(run.dataset == dataset and _is_own(run) for run in runs):
        raise RococapError(
            f"{folder} holds a queue that no demo made in this place, and is left as it is. Name another folder: "
            "rococap demo --dir FOLDER"
        )
    if any(one.total != counts[split] for split, one in there.items() if one.total):
        total = sum(one.total for one in there.values())
        raise RococapError(
            f"{folder} holds the results of a demo of {total} pictures, which one of {sum(counts.values())} would "
            f"overwrite. Look at them again with --images {total}, or name another folder: rococap demo --dir FOLDER"
        )
    return sum(one.done for one in there.values())


def _is_own(run: queue.Run) -> bool:
    return run.name == "shuffled" or (run.name == "default" and run.recipe == recipe())


def _unfinished(database: Database) -> int:
    with db.transaction(database) as conn:
        return sum(one.unfinished for one in queue.counts_of(conn, queue.get_run(conn, "default")))


# --- Workers ---------------------------------------------------------------------------------------------------


def _run_workers(database: Database, url: str, folder: Path, n_workers: int, progress: Progress) -> None:
    environment = shared_threads(n_workers, os.environ) | {"HF_HUB_OFFLINE": "1"}
    command = [*program(), "--db", url, "worker", "--batch-size", "32"]
    logs = [folder / f"worker-{number}.log" for number in range(1, n_workers + 1)]
    with ExitStack() as stack:
        files = [stack.enter_context(log.open("w")) for log in logs]
        workers = [subprocess.Popen(command, env=environment, stdout=file, stderr=file) for file in files]
        try:
            while any(worker.poll() is None for worker in workers):
                _show(database, progress)
                time.sleep(0.2)
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.terminate()
            codes = [worker.wait() for worker in workers]
    _show(database, progress)
    for code, log in zip(codes, logs, strict=True):
        if code:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
            raise RococapError(f"A worker ended with code {code}. Its log {log} ends with:\n{tail}")


def _show(database: Database, progress: Progress) -> None:
    with db.transaction(database) as conn:
        counts = queue.counts_of(conn, queue.get_run(conn, "default"))
    done, total = sum(one.done for one in counts), sum(one.total for one in counts)
    progress("captioning" if done else "loading the model", done, total)


# --- Results ---------------------------------------------------------------------------------------------------


def _export(database: Database, folder: Path) -> list[Path]:
    with db.transaction(database) as conn:
        run = queue.get_run(conn, "default")
    paths = []
    for split in SPLITS:
        path = folder / export.FOLDER / f"medical_captions_{split}.csv"
        export.export(database, run, split, path)
        checkpoints.write_checkpoints(database, run, split, path.parent, every=25)
        paths.append(path)
    return paths


def _rows(path: Path) -> list[Shown]:
    return [Shown(row["image_id"], row["original_caption"], row["generated_caption"]) for row in _read(path)]


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _contact_sheet(database: Database, folder: Path, rows: list[Shown]) -> Path:
    from rococap.demo.sheet import contact_sheet

    path = folder / "captions.png"
    pictures = _pictures(database, folder, [row.image_id for row in rows])
    contact_sheet([(pictures[row.image_id], row.original, row.generated) for row in rows], path)
    return path


def _pictures(database: Database, folder: Path, image_ids: list[str]) -> dict[str, Image.Image]:
    with db.transaction(database) as conn:
        sql = f"SELECT {queue.PLACE} FROM images i JOIN shards s ON s.id = i.shard_id ORDER BY i.id"
        places = [queue.place_of(row, STANDARD) for row in db.execute(conn, sql).fetchall()]
    places = [place for place in places if place.image_id in image_ids]
    with PictureReader(folder / "dataset") as reader:
        return {place.image_id: open_picture(data) for place, data in reader.read(places) if isinstance(data, bytes)}


# --- The floor -------------------------------------------------------------------------------------------------


def _report(database: Database, folder: Path, exports: Sequence[Path], progress: Progress) -> Path:
    """Of the test split: the captions that belong there and, for the floor of each score, those that do not."""
    from rococap.scores.report import report

    _shuffle(database, exports)
    progress("writing the report", 0, 1)
    made = report(database, ["default", "shuffled"], "test", folder / "report.html", note=NOTE)
    progress("writing the report", 1, 1)
    return made.path


def _shuffle(database: Database, exports: Sequence[Path]) -> None:
    """Run `shuffled`: what run `default` said, of other pictures. Its captions that are there already stay."""
    with db.transaction(database) as conn:
        old = queue.get_run(conn, "default")
    enqueue_from(database, old, SPLITS, run="shuffled", recipe=replace(old.recipe, model=SHUFFLED))
    with db.transaction(database) as conn:
        run = queue.get_run(conn, "shuffled")
    rows = _moved([row for path in exports for row in _read(path)])
    with TemporaryDirectory() as temporary:
        path = Path(temporary) / "shuffled.csv"
        _write(rows, path)
        restore.restore(database, run, path)


def _moved(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Each picture with the next one's caption, in an order that is drawn: so that none keeps its own."""
    random.Random(SEED).shuffle(rows)
    others = [row["generated_caption"] for row in rows[1:] + rows[:1]]
    # No model took any time, and none is claimed.
    same = {"model": SHUFFLED, "processing_time_sec": "", "timestamp": datetime.now(UTC).isoformat()}
    return [row | {"generated_caption": other} | same for row, other in zip(rows, others, strict=True)]


def _write(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, snapshot.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
