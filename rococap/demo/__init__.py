"""The demo: runs the whole workflow on drawn phantoms, from the queue and its workers to the exports and a report.

It uses the same commands and functions as a user of ROCOv2; only the pictures and the model are small. The pictures are
drawn from seeds that the model was not trained on.
"""

import csv
import os
import random
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from sqlalchemy import Engine as Database

from rococap import db, queue
from rococap.data import SPLITS, STANDARD, PictureReader, datasets
from rococap.data.images import open_picture
from rococap.errors import RococapError
from rococap.progress import Progress
from rococap.queue.enqueue import enqueue, enqueue_from
from rococap.recipe import Recipe
from rococap.results import checkpoints, export, restore, snapshot
from rococap.worker.children import program, shared_threads

MODEL = Path(__file__).parent / "model"
SHUFFLED = "captions of run default, shuffled"
MADE = ("dataset", export.FOLDER.name, "captions.png", "report.html")
SHOWN = 12
SEED = 20_411
NOTE = (
    "Drawings made by a program, captioned by a small demonstration model. Run shuffled has the same captions, each "
    "assigned to another drawing: its scores are what captions of this kind reach by chance."
)


@dataclass(frozen=True, slots=True)
class Shown:
    image_id: str
    original: str
    generated: str


@dataclass(frozen=True, slots=True)
class Demo:
    """The results of the demo: the number of captions, how many of them an earlier demo had already made (`before`) and
    how many equal the original exactly, the time that captioning took, some examples, and the files.
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
    # float32 on every device, so that the captions do not depend on a GPU's precision.
    return Recipe(model=str(MODEL), max_new_tokens=64, dtype="float32")


def run(folder: Path, n_images: int, n_workers: int, progress: Progress) -> Demo:
    """Draws `n_images` phantoms into `folder`, captions them, exports the captions and writes a report. Run again after
    an interruption, it continues.

    Raises RococapError with the last lines of the log if a worker fails; and if the folder holds the results of another
    demo, or files that no demo made, which are never overwritten.
    """
    from rococap.demo.phantoms import write_dataset

    counts = _counts(n_images)
    folder.mkdir(parents=True, exist_ok=True)
    url = str(folder.resolve() / "rococap.db")  # a path, since the folder's name may be special in a URL
    check_folder(folder, Path(url))
    database = db.connect(url)  # created before the phantoms, so that an interrupted demo is recognised by it
    before = check_same(database, folder, counts)
    progress("drawing phantoms", 0, n_images)
    write_dataset(folder / "dataset", counts)
    enqueue(database, datasets.locate(str(folder / "dataset"), SPLITS), SPLITS, run="default", recipe=recipe())
    started = time.monotonic()
    run_workers(database, folder, "default", SPLITS, n_workers, progress)
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


# --- Existing files --------------------------------------------------------------------------------------------


def check_folder(folder: Path, queue_file: Path) -> None:
    """Raises RococapError if the folder holds files that no demo made."""
    existing = [name for name in MADE if (folder / name).exists()]
    if existing and not queue_file.exists():
        raise RococapError(
            f"{folder} holds {', '.join(existing)} but no queue of a demo, and was left unchanged. Choose another "
            "folder: rococap demo --dir FOLDER"
        )


def check_same(database: Database, folder: Path, counts: Mapping[str, int]) -> int:
    """The number of pictures that an earlier demo in this folder has captioned. Raises RococapError if the queue is not
    that of a demo of the same phantoms.
    """
    with db.transaction(database) as conn:
        runs = queue.list_runs(conn)
        existing = {count.split: count for count in queue.counts(conn) if count.run == "default"}
    dataset = str((folder / "dataset").resolve())  # as enqueue names it
    if not all(run.dataset == dataset and _is_own(run, folder) for run in runs):
        raise RococapError(
            f"{folder} holds a queue that no demo made in this folder, and was left unchanged. Choose another folder: "
            "rococap demo --dir FOLDER"
        )
    if any(count.total != counts[split] for split, count in existing.items() if count.total):
        total = sum(count.total for count in existing.values())
        raise RococapError(
            f"{folder} holds the results of a demo of {total} pictures, which one of {sum(counts.values())} would "
            f"overwrite. See them again with --images {total}, or choose another folder: rococap demo --dir FOLDER"
        )
    return sum(count.done for count in existing.values())


def _is_own(run: queue.Run, folder: Path) -> bool:
    if run.name in ("default", "shuffled"):
        return run.name == "shuffled" or run.recipe == recipe()
    return (folder.resolve() / run.name).as_posix() in (run.recipe.model, run.recipe.adapter)  # tuned in this folder


# --- Workers ---------------------------------------------------------------------------------------------------


def run_workers(
    database: Database, folder: Path, run: str, splits: Sequence[str], n_workers: int, progress: Progress
) -> None:
    """Captions what is left of these splits. Raises RococapError with the last lines of the log if a worker fails."""
    if not any(count.unfinished for count in _counts_of(database, run, splits)):
        return
    environment = shared_threads(n_workers, os.environ) | {"HF_HUB_OFFLINE": "1"}
    url = str(folder.resolve() / "rococap.db")
    chosen = [option for split in splits for option in ("--split", split)]
    command = [*program(), "--db", url, "worker", "--run", run, *chosen, "--batch-size", "32"]
    logs = [folder / f"worker-{number}.log" for number in range(1, n_workers + 1)]
    with ExitStack() as stack:
        files = [stack.enter_context(log.open("w")) for log in logs]
        workers = [subprocess.Popen(command, env=environment, stdout=file, stderr=file) for file in files]
        try:
            while any(worker.poll() is None for worker in workers):
                _show_progress(database, run, splits, progress)
                time.sleep(0.2)
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.terminate()
            codes = [worker.wait() for worker in workers]
    _show_progress(database, run, splits, progress)
    for code, log in zip(codes, logs, strict=True):
        if code:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
            raise RococapError(f"A worker exited with code {code}. The last lines of its log {log}:\n{tail}")


def _show_progress(database: Database, run: str, splits: Sequence[str], progress: Progress) -> None:
    counts = _counts_of(database, run, splits)
    done, total = sum(count.done for count in counts), sum(count.total for count in counts)
    captioning = "captioning" if run == "default" else f"captioning with {run}"
    progress(captioning if done else "loading the model", done, total)


def _counts_of(database: Database, run: str, splits: Sequence[str]) -> list[queue.Counts]:
    with db.transaction(database) as conn:
        return queue.counts_of(conn, queue.get_run(conn, run), splits)


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


# --- The report ------------------------------------------------------------------------------------------------


def _report(database: Database, folder: Path, exports: Sequence[Path], progress: Progress) -> Path:
    """Writes a report on the test split, which compares the captions with the same captions shuffled: the scores of run
    `shuffled` are those that captions reach by chance.
    """
    from rococap.scores.report import report

    _shuffle(database, exports)
    progress("writing the report", 0, 1)
    reported = report(database, ["default", "shuffled"], "test", folder / "report.html", note=NOTE)
    progress("writing the report", 1, 1)
    return reported.path


def _shuffle(database: Database, exports: Sequence[Path]) -> None:
    """Fills run `shuffled` with the captions of run `default`, each assigned to another picture. Captions that the run
    already has are kept.
    """
    with db.transaction(database) as conn:
        old = queue.get_run(conn, "default")
    enqueue_from(database, old, SPLITS, run="shuffled", recipe=replace(old.recipe, model=SHUFFLED))
    with db.transaction(database) as conn:
        run = queue.get_run(conn, "shuffled")
    rows = _shuffled([row for path in exports for row in _read(path)])
    with TemporaryDirectory() as temporary:
        path = Path(temporary) / "shuffled.csv"
        _write(rows, path)
        restore.restore(database, run, path)


def _shuffled(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows in random order, each with the caption of the next row, so that none keeps its own."""
    random.Random(SEED).shuffle(rows)
    others = [row["generated_caption"] for row in rows[1:] + rows[:1]]
    # The processing time is empty, since no model made these captions.
    common = {"model": SHUFFLED, "processing_time_sec": "", "timestamp": datetime.now(UTC).isoformat()}
    return [row | {"generated_caption": other} | common for row, other in zip(rows, others, strict=True)]


def _write(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, snapshot.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
