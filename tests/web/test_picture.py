"""The page of one picture in a real browser: looked at, judged and corrected."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import samples
from samples import caption, texts
from small_engine import INFO
from sqlalchemy import Engine
from steps import select
from web_server import Served, serving

from rococap import db, queue, review
from rococap.demo.phantoms import draw
from rococap.engines import Failure
from rococap.recipe import Recipe

HOSTILE = "</p></textarea><script>document.title = 'hacked'</script><img src=x onerror=document.title='hacked'>"
N = 30
FAILED, PENDING, DAMAGED, LISTED = 26, 28, 27, 21
"""Numbers of pictures: without a caption, one that cannot be opened, and those that are reviewed one after another."""


def write_set(root: Path) -> None:
    pictures, captions, cuis = {}, {}, {}
    for n in range(N):
        phantom, file = draw(n), BytesIO()
        phantom.image.save(file, "PNG")
        pictures[n], captions[n], cuis[n] = file.getvalue(), phantom.caption, list(phantom.cui)
    pictures[DAMAGED - 1], captions[DAMAGED - 1] = b"no picture", HOSTILE
    samples.write_shard(root, "train", range(N), pictures=pictures, captions=captions, cuis=cuis)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Two runs on 30 drawings. In `default`, one failed and two have no caption yet."""
    folder = tmp_path_factory.mktemp("queue")
    database = db.connect(f"sqlite:///{folder}/queue.db")
    write_set(folder / "set")
    for name, prompt in (("default", "Describe."), ("tuned", "Say.")):
        samples.register(database, folder / "set", ["train"], run=name, recipe=Recipe(model="m", prompt=prompt))
    with db.transaction(database) as conn:
        default, tuned = queue.list_runs(conn)
    caption(database, default, texts(*(f"A drawing {n} of the chest with a nodule." for n in range(1, FAILED))))
    with db.transaction(database, write=True) as conn:
        worker = queue.register_worker(conn, "other", "gpu-1", 7, INFO)
        lease = queue.claim(conn, worker, default.id, "train", 1, ttl_ms=60_000)
        queue.fail(conn, lease, {job.id: Failure("corrupt", HOSTILE) for job in lease.jobs})
    caption(database, default, texts(HOSTILE), now=2_000)
    caption(database, tuned, texts(*(f"A drawing {n} of the left chest with two nodules." for n in range(1, N))))
    yield database
    database.dispose()


@pytest.fixture(scope="module")
def served(database: Engine) -> Iterator[Served]:
    with serving(str(database.url)) as served:
        yield served


@pytest.fixture(scope="module")
def tab(browser: Any, served: Served) -> Any:
    return known_as(browser, served, "Anna Ólafsdóttir")


def known_as(browser: Any, served: Served, name: str) -> Any:
    """A page of a browser of one's own, in which one has said who one is."""
    page = browser.new_context().new_page()
    page.set_viewport_size({"width": 1280, "height": 900})
    open_picture(page, served, 1)
    page.get_by_label("Your name").fill(name)
    page.keyboard.press("Enter")
    page.get_by_text("You are reading as").wait_for()
    return page


def open_picture(page: Any, served: Served, number: int, query: str = "run=default") -> None:
    page.goto(f"{served.address}/picture/{number}?{query}")


@pytest.fixture
def opened(tab: Any, served: Served) -> Iterator[Any]:
    """The page of the first picture, afresh. It is to complain of nothing, and to ask nobody else for anything."""
    trouble: list[str] = []
    tab.on("console", lambda message: trouble.append(message.text))
    tab.on("pageerror", lambda error: trouble.append(str(error)))
    tab.on("request", lambda asked: asked.url.startswith(served.address + "/") or trouble.append(asked.url))
    tab.set_viewport_size({"width": 1280, "height": 900})
    tab.emulate_media(color_scheme="light")
    open_picture(tab, served, 1)
    yield tab
    tab.goto("about:blank")
    assert [one for one in trouble if "409 (Conflict)" not in one and "404 (Not Found)" not in one] == []


def test_twenty_pictures_are_reviewed_by_keyboard_only(opened, database):
    keys = [*"1234"]
    for n in range(1, LISTED):
        opened.get_by_role("heading", level=1, name=f"train_{n - 1:05}").wait_for()
        opened.keyboard.press(keys[n % 4])
        if n % 4 > 1:
            opened.keyboard.press("m")
            opened.keyboard.press("x")
        if n == 5:
            opened.keyboard.press("n")
            opened.keyboard.type("1 note, with\nlines")
            opened.keyboard.press("Escape")
        opened.keyboard.press("Enter")
    opened.get_by_role("heading", level=1, name=f"train_{LISTED - 1:05}").wait_for()
    rows = select(database, "SELECT verdict, errors, note, reader FROM reviews ORDER BY id")
    verdicts = list(review.VERDICTS)
    assert rows == [
        (
            verdicts[n % 4],
            "modality,missed" if n % 4 > 1 else "",
            "1 note, with\nlines" if n == 5 else "",
            "Anna Ólafsdóttir",
        )
        for n in range(1, LISTED)
    ]
