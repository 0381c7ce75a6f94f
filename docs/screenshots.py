"""Makes the pictures of pages in docs/web.md: `python docs/screenshots.py`, with `--only NAME` for some of them.

Captions drawn phantoms with the demo model, serves the queue and a study of it, and photographs pages in Debian's
Chromium. Needs the extras `web`, `demo` and `dev`.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from rococap import db, demo, queue, review
from rococap.data import SPLITS
from rococap.queue.enqueue import enqueue_from
from rococap.review import Answers
from rococap.scores import concepts

DOCS = Path(__file__).parent
RUN, OTHER, SPLIT = "default", "shuffled", "test"
PICTURES = 300
"""Drawn for the queue. Some of them are left for a worker that is still at it."""
WORK_SEC = 12
COLOURS = 128
"""Of each PNG, so that it stays small."""


@dataclass(frozen=True, slots=True)
class Shot:
    """One picture of a page. `reader` opens it under this name; `wait` is what must be there before."""

    name: str
    path: str
    size: tuple[int, int] = (1280, 900)
    scheme: Literal["light", "dark"] = "light"
    reader: str = ""
    wait: str = "main"
    keys: tuple[str, ...] = ()


SHOTS = (
    Shot("dashboard", "/", (1280, 1100), wait="#throughput path"),
    Shot("dashboard_dark", "/", (1280, 1100), "dark", wait="#throughput path"),
    Shot("dashboard_narrow", "/", (390, 844), wait="#throughput path"),
    Shot("pictures", f"/pictures?run={RUN}&run={OTHER}&split={SPLIT}&limit=12", (1280, 1000)),
    Shot("studies", "/studies"),
    Shot("study_reading", "/studies/closed/read", (1280, 800), reader="Dr. Lee", wait="#reading", keys=("3",)),
    Shot("study_reading_narrow", "/studies/closed/read", (390, 844), "dark", "Dr. Lee", "#reading"),
    Shot("study_results", "/studies/open", (1280, 1250)),
)
"""Every page of the server, in the order of docs/web.md."""
SEEN = """picture => Promise.race([picture.decode().catch(() => null), new Promise((end) => setTimeout(end, 1000))])"""
"""Waits for a picture, and not long: those below the page that is seen are not loaded."""
READERS = ("Dr. Lee", "Dr. Novak", "Dr. Okafor")


def main() -> None:
    chosen = _options().only
    shots = [shot for shot in SHOTS if not chosen or shot.name in chosen]
    with tempfile.TemporaryDirectory(prefix="screenshots_") as folder, sync_playwright() as playwright:
        url = f"sqlite:///{_queue(Path(folder))}"
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        with _serving(url, Path(folder)) as address, _worker(url, Path(folder)):
            for shot in shots:
                _shoot(browser, address, shot)
                _shrink(DOCS / f"web_{shot.name}.png")
                print(f"docs/web_{shot.name}.png: {(DOCS / f'web_{shot.name}.png').stat().st_size / 1000:.0f} kB")


# --- What is shown -----------------------------------------------------------------------------------------------


def _queue(folder: Path) -> Path:
    """A queue as people know it: some captions, two runs, a worker at it, failures, and two studies."""
    demo.run(folder, PICTURES, 2, lambda what, done, total: None)
    path = folder / "rococap.db"
    database = db.connect(f"sqlite:///{path}")
    with db.transaction(database) as conn:
        run = queue.get_run(conn, RUN)
    recipe = replace(run.recipe, prompt="Describe the picture in one sentence.")
    enqueue_from(database, run, SPLITS, run="one-sentence", recipe=recipe)
    _studies(database)
    database.dispose()
    return path


def _studies(database: Any) -> None:
    with db.transaction(database) as conn:
        runs = [queue.get_run(conn, name) for name in (RUN, OTHER)]
    for name, form in (("open", review.Form()), ("closed", _form())):
        with db.transaction(database, write=True) as conn:
            study = review.new_study(
                *(conn, name, runs, SPLIT),
                with_original=False,
                n_pictures=24,
                n_readers=len(READERS),
                seed=1,
                form=form,
                modality=lambda cui: concepts.modality(concepts.parse(cui)),
            )
            for reader in READERS:
                review.join(conn, study, reader)
        for at, reader in enumerate(READERS):
            _read(database, study, reader, at, study.n_pictures if name == "open" else 5 + 8 * at)


def _form() -> review.Form:
    levels = ("nothing", "some", "most", "all")
    return review.Form(True, (review.Scale("accuracy", "How much of the caption is true of the picture?", levels),))


def _read(database: Any, study: review.Study, reader: str, at: int, most: int) -> None:
    """Reads some pictures as the readers of an example do: they mostly prefer what is close to the original."""
    with db.transaction(database, write=True) as conn:
        for position in range(1, most + 1):
            shown = review.item(conn, study, reader, position)
            sql = "SELECT caption FROM images WHERE id = ?"
            original = set(db.execute(conn, sql, (shown.image,)).scalar_one().split())
            close = [len(original & set(text.split())) for text in shown.texts]
            best = 0 if (position * 7 + at) % 9 == 0 else 1 + close.index(max(close))
            ratings = tuple({"accuracy": min(3, n // 3)} for n in close) if study.form.ratings else ()
            spent = 9_000 + 1_700 * ((position * 5 + at * 3) % 8)
            answers = Answers(best, ratings)
            now = shown.shown_at + spent
            review.rate(conn, study, reader, position, answers, shown_at=shown.shown_at, now=now)


@contextmanager
def _worker(url: str, folder: Path) -> Iterator[None]:
    """A worker on the run that is left, some seconds after it began."""
    command = [sys.executable, "-m", "rococap", "--db", url, "worker", "--batch-size", "1"]
    with (folder / "worker.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as worker:
        try:
            time.sleep(WORK_SEC)
            yield
        finally:
            worker.terminate()


# --- Photographs -------------------------------------------------------------------------------------------------


@contextmanager
def _serving(url: str, folder: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "rococap", "--db", url, "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().split(" ")[4].rstrip("/")
        finally:
            server.terminate()


def _shoot(browser: Any, address: str, shot: Shot) -> None:
    width, height = shot.size
    context = browser.new_context(color_scheme=shot.scheme, viewport={"width": width, "height": height})
    page: Page = context.new_page()
    if shot.reader:
        context.request.post(f"{address}/reader", form={"name": shot.reader}, max_redirects=0)
    page.goto(address + shot.path)
    page.locator(shot.wait).first.wait_for(state="attached", timeout=100_000)  # charts have whole minutes
    for picture in page.locator("main img").all():
        picture.evaluate(SEEN)
    for key in shot.keys:
        page.keyboard.press(key)
    time.sleep(0.6)  # transitions of bars
    page.screenshot(path=DOCS / f"web_{shot.name}.png")
    context.close()


def _shrink(path: Path) -> None:
    picture = Image.open(path).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=[shot.name for shot in SHOTS], help="May be repeated.")
    return parser.parse_args()


if __name__ == "__main__":
    main()
