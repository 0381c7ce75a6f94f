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
RUN, OTHER, LEFT, SPLIT = "default", "shuffled", "one-sentence", "test"
PICTURES = 1_200
"""Drawn for the queue. A third run is left for a worker that is still at it."""
BEGUN = 150
"""Captions of the third run, after which its worker is photographed at work."""
COLOURS = 128
"""Of each PNG, so that it stays small."""


CHART = "#throughput path"


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
    Shot("pictures", f"/pictures?run={RUN}&run={OTHER}&split={SPLIT}&limit=12", (1280, 1000), wait="article"),
    Shot("picture", f"/picture/7?run={RUN}&run={OTHER}", (1280, 1100), reader="Dr. Lee"),
    Shot("studies", "/studies"),
    Shot("study_reading", "/studies/accuracy/read", (1280, 800), reader="Dr. Lee", wait="#reading", keys=("3",)),
    Shot("study_reading_narrow", "/studies/accuracy/read", (390, 844), "dark", "Dr. Lee", "#reading"),
    Shot("study_results", "/studies/preference", (1280, 1000)),
)
WORKING = (
    Shot("dashboard", "/", (1280, 2050), wait=CHART),
    Shot("dashboard_dark", "/", (1280, 1100), "dark", wait=CHART),
    Shot("dashboard_narrow", "/", (390, 844), wait=CHART),
)
"""Every page of the server: those in WORKING are taken while a worker is at work."""
SEEN = """picture => Promise.race([picture.decode().catch(() => null), new Promise((end) => setTimeout(end, 1000))])"""
"""Waits for a picture, and not long: those below the page that is seen are not loaded."""
SHORTEN = """pairs => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) for (const [from, to] of pairs) {
    walker.currentNode.nodeValue = walker.currentNode.nodeValue.replaceAll(from, to);
  }
}"""
READERS = ("Dr. Lee", "Dr. Novak", "Dr. Okafor")


def main() -> None:
    chosen = _options().only
    with tempfile.TemporaryDirectory(prefix="screenshots_") as folder, sync_playwright() as playwright:
        url = f"sqlite:///{_queue(Path(folder))}"
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        camera = Camera(browser, Path(folder), chosen)
        with _serving(url, Path(folder)) as address:
            for shot in SHOTS:
                camera.take(address, shot)
            camera.take(address, replace(WORKING[0], name=""))  # charts have whole minutes: waits for the first
            with _worker(url, Path(folder)):
                for shot in WORKING:
                    camera.take(address, shot)


# --- What is shown -----------------------------------------------------------------------------------------------


def _queue(folder: Path) -> Path:
    """A queue as people know it: some captions, two runs, a worker at it, failures, and two studies."""
    demo.run(folder, PICTURES, 2, lambda what, done, total: None)
    path = folder / "rococap.db"
    database = db.connect(f"sqlite:///{path}")
    with db.transaction(database) as conn:
        run = queue.get_run(conn, RUN)
    recipe = replace(run.recipe, prompt="Describe the picture in one sentence.")
    enqueue_from(database, run, SPLITS, run=LEFT, recipe=recipe)
    _studies(database)
    database.dispose()
    return path


def _studies(database: Any) -> None:
    with db.transaction(database) as conn:
        runs = [queue.get_run(conn, name) for name in (RUN, OTHER)]
    for name, form in (("preference", review.Form()), ("accuracy", _form())):
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
            _read(database, study, reader, at, study.n_pictures if name == "preference" else 5 + 8 * at)


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
    """A worker on the run that is left, once it has captioned some of it."""
    command = [sys.executable, "-m", "rococap", "--db", url, "worker", "--batch-size", "1"]
    with (folder / "worker.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as worker:
        try:
            while _done(url) < BEGUN:
                if worker.poll() is not None:
                    raise RuntimeError((folder / "worker.log").read_text())
                time.sleep(0.5)
            yield
        finally:
            worker.terminate()


def _done(url: str) -> int:
    database = db.connect(url)
    with db.transaction(database) as conn:
        done = sum(count.done for count in queue.counts_of(conn, queue.get_run(conn, LEFT)))
    database.dispose()
    return done


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


@dataclass(frozen=True, slots=True)
class Camera:
    """Takes the pictures that are `chosen`, or all. Paths of this machine are left out of them."""

    browser: Any
    folder: Path
    chosen: list[str] | None

    def take(self, address: str, shot: Shot) -> None:
        if self.chosen and shot.name and shot.name not in self.chosen:
            return
        width, height = shot.size
        context = self.browser.new_context(color_scheme=shot.scheme, viewport={"width": width, "height": height})
        page: Page = context.new_page()
        if shot.reader:
            context.request.post(f"{address}/reader", form={"name": shot.reader}, max_redirects=0)
        page.goto(address + shot.path)
        page.locator(shot.wait).first.wait_for(state="attached", timeout=100_000)
        for picture in page.locator("main img").all():
            picture.evaluate(SEEN)
        for key in shot.keys:
            page.keyboard.press(key)
        time.sleep(0.6)  # transitions of bars
        page.evaluate(SHORTEN, [[str(demo.MODEL), "demo-model"], [f"{self.folder}/", ""]])
        if shot.name:
            path = DOCS / f"web_{shot.name}.png"
            page.screenshot(path=path)
            _shrink(path)
            print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB", flush=True)
        context.close()


def _shrink(path: Path) -> None:
    picture = Image.open(path).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", action="append", choices=[shot.name for shot in (*SHOTS, *WORKING)], help="May be repeated."
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
