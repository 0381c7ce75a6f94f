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
from web_server import Served, serving, violations

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
        opened.wait_for_load_state()
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


def rows_of(database: Engine, number: int, columns: str = "verdict, errors, note, reader") -> list:
    return select(database, f"SELECT {columns} FROM reviews WHERE job_id = {number} ORDER BY id")


def test_a_verdict_is_saved_without_leaving_the_page_and_listed_with_reader_and_time(opened, served, database):
    open_picture(opened, served, 22)
    assert opened.locator("#reviews").inner_text() == "Nobody has reviewed this caption yet."
    opened.keyboard.press("Enter")
    opened.locator("#review .error", has_text="Choose a verdict first").wait_for()
    opened.keyboard.press("s")
    opened.keyboard.press("1")
    assert opened.locator("[name=errors]:checked").count() == 0
    opened.keyboard.press("s")
    assert opened.locator("[name=verdict]:checked").count() == 0
    opened.keyboard.press("3")
    opened.keyboard.press("n")
    opened.keyboard.type(HOSTILE)
    opened.keyboard.press("Escape")
    opened.keyboard.press("Shift+Enter")
    opened.locator("#told", has_text="Saved: Major error.").wait_for()
    said = opened.locator("#reviews li").inner_text()
    assert "Major error" in said
    assert "Wrong side" in said
    assert "Anna Ólafsdóttir, 20" in said
    assert HOSTILE in said
    expected = [("major", "side", HOSTILE, "Anna Ólafsdóttir")]
    assert rows_of(database, 22) == expected
    # What is left as it was is not saved again, and another mind is another row.
    opened.keyboard.press("Enter")
    opened.get_by_role("heading", level=1, name="train_00022").wait_for()
    open_picture(opened, served, 22)
    assert opened.locator("[name=verdict]:checked").get_attribute("value") == "major"
    opened.keyboard.press("2")
    opened.keyboard.press("Shift+Enter")
    opened.locator("#told", has_text="Saved: Minor error.").wait_for()
    assert opened.locator("#reviews li").count() == 2
    assert rows_of(database, 22) == [*expected, ("minor", "side", HOSTILE, "Anna Ólafsdóttir")]


def edit(page: Any, text: str) -> None:
    page.keyboard.press("e")
    page.locator("#text").fill(text)
    page.keyboard.press("Control+Enter")


def test_an_edit_keeps_the_machines_caption_and_is_undone_by_another(opened, served, database):
    open_picture(opened, served, 23)
    machine = "A drawing 23 of the chest with a nodule."
    edit(opened, "A drawing 23 of the left chest.")
    opened.locator("#told", has_text="The machine's caption is kept.").wait_for()
    assert opened.locator(".machine").inner_text() == machine
    change = opened.locator("#history li p")
    assert (change.locator("ins").inner_text(), change.locator("del").inner_text()) == ("left", "with a nodule")
    assert "Anna Ólafsdóttir, 20" in opened.locator("#history li").inner_text()
    opened.get_by_role("button", name="Undo").click()
    opened.locator("#told", has_text="Undone, by another edit.").wait_for()
    assert opened.locator("#text").input_value() == machine
    assert opened.locator("#history li b").all_inner_texts() == ["Undone", "Edited"]
    rows = select(database, "SELECT text, reader FROM edits ORDER BY id")
    assert rows == [("A drawing 23 of the left chest.", "Anna Ólafsdóttir"), (machine, "Anna Ólafsdóttir")]
    assert select(database, "SELECT text FROM captions WHERE job_id = 23") == [(machine,)]
    # A text that is not saved is not left behind by going on to the next picture.
    opened.locator("#text").fill("Half a sentence")
    opened.keyboard.press("Escape")
    opened.keyboard.press("1")
    opened.keyboard.press("Enter")
    opened.locator("#review .error", has_text="save it or start again").wait_for()
    assert rows_of(database, 23) == []
    opened.get_by_role("button", name="Start again").click()
    assert opened.locator("#text").input_value() == machine


def test_of_two_who_edit_one_caption_the_second_sees_the_first_ones_text_and_decides(opened, browser, served):
    ben = known_as(browser, served, "Ben <b>")
    for page in (opened, ben):
        open_picture(page, served, 24)
    edit(opened, "Anna's text.")
    opened.locator("#history li").wait_for()
    edit(ben, "Ben's words.")
    conflict = ben.locator(".conflict")
    conflict.wait_for()
    assert "Anna Ólafsdóttir edited this caption in the meantime" in conflict.inner_text()
    assert conflict.locator(".text").all_inner_texts() == ["Anna's text.", "AnnaBen's textwords."]
    assert violations(ben) == []
    assert ben.locator("#text").input_value() == "Ben's words."
    ben.get_by_role("button", name="Save mine over theirs").click()
    ben.locator("#told", has_text="Saved as an edit").wait_for()
    assert ben.locator("#history li p").first.inner_text() == "AnnaBen's textwords."
    edit(opened, "Anna's second text.")
    opened.get_by_role("button", name="Keep theirs").click()
    opened.locator(".conflict").wait_for(state="detached")
    assert opened.locator("#text").input_value() == "Ben's words."
    opened.locator("#history li").nth(1).wait_for()
    # Undoing what somebody has changed since is refused, and the newer text is shown.
    edit(opened, "Anna's third text.")
    opened.locator("#history li").nth(2).wait_for()
    ben.get_by_role("button", name="Undo").click()
    ben.locator("#edit .error", has_text="edited this caption in the meantime").wait_for()
    assert ben.locator("#text").input_value() == "Anna's third text."
    ben.context.close()


def shown(page: Any) -> tuple[str, str]:
    style = page.locator("#picture").evaluate("image => [image.style.transform, image.style.filter]")
    return style[0].partition("scale")[2], style[1]


def test_the_picture_is_enlarged_moved_and_brightened_by_keys_and_by_mouse(opened):
    usual = ("(1)", "brightness(100%) contrast(100%)")
    assert shown(opened) == usual
    for key in ("+", "=", "-", "l", "d", "d", "v"):
        opened.keyboard.press(key)
    assert shown(opened) == ("(1.25)", "brightness(90%) contrast(110%)")
    opened.locator("#viewer").focus()
    before = opened.locator("#picture").bounding_box()
    opened.keyboard.press("ArrowLeft")
    assert opened.locator("#picture").bounding_box()["x"] > before["x"]
    assert opened.url.endswith("/picture/1?run=default")
    opened.keyboard.press("0")
    assert shown(opened) == usual
    box = opened.locator("#viewer").bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    opened.mouse.move(*middle)
    opened.mouse.wheel(0, -100)
    opened.wait_for_function("document.getElementById('zoom-is').textContent === '125 %'")
    before = opened.locator("#picture").bounding_box()
    opened.mouse.down()
    opened.mouse.move(middle[0] + 30, middle[1] + 20)
    opened.mouse.up()
    after = opened.locator("#picture").bounding_box()
    assert (round(after["x"] - before["x"]), round(after["y"] - before["y"])) == (30, 20)
    opened.mouse.dblclick(*middle)
    assert shown(opened) == usual
    opened.get_by_label("Brightness", exact=True).focus()
    opened.keyboard.press("ArrowRight")
    assert shown(opened)[1] == "brightness(110%) contrast(100%)"


def test_single_keys_can_be_turned_off(opened, served):
    opened.keyboard.press("?")
    opened.get_by_label("Use these keys in this browser").uncheck()
    opened.keyboard.press("Escape")
    opened.keyboard.press("l")
    assert shown(opened)[1] == "brightness(100%) contrast(100%)"
    opened.get_by_role("button", name="Keys").click()
    opened.get_by_label("Use these keys in this browser").check()


def test_previous_and_next_lead_through_the_list_that_the_address_names(opened, served):
    query = "run=default&order=down&compare=none"
    open_picture(opened, served, 5, query)
    opened.keyboard.press("ArrowRight")
    opened.wait_for_url(f"**/picture/4?{query}")
    assert opened.locator(".texts ins").count() == 0
    opened.keyboard.press("ArrowLeft")
    opened.wait_for_url(f"**/picture/5?{query}")
    open_picture(opened, served, 1, query)
    assert opened.locator("#next").count() == 0
    assert opened.get_by_role("link", name="To the list").get_attribute("href") == f"/pictures?{query}"
    opened.get_by_role("link", name="Review this one").click()
    opened.wait_for_url("**/picture/1?run=tuned&order=down&compare=none")
    assert opened.locator("#text").input_value() == "A drawing 1 of the left chest with two nodules."


def test_everything_that_is_known_is_on_the_page_and_hostile_text_is_text(opened, served):
    open_picture(opened, served, DAMAGED)
    assert opened.locator(".texts .text").all_inner_texts()[:2] == [HOSTILE, HOSTILE]
    assert opened.locator("#text").input_value() == HOSTILE
    opened.locator(".gone", has_text="This is not a picture").wait_for()
    assert violations(opened) == []
    open_picture(opened, served, FAILED)
    assert f"It failed: corrupt, {HOSTILE}" in opened.locator(".texts").inner_text()
    assert "retry --image-id train_00025" in opened.locator(".texts").inner_text()
    assert opened.locator("#review, #edit").count() == 0
    assert violations(opened) == []
    opened.locator("#made summary").click()
    made = opened.locator("#made").inner_text()
    for part in (
        "row 5 of row group 2 in data/train-00000-of-00001.parquet",
        "Attempts\n1 of 5",
        "gpu-1:7",
        "Describe.",
    ):
        assert part in made
    assert HOSTILE in made
    open_picture(opened, served, FAILED)
    opened.keyboard.press("Enter")  # where there is nothing to judge, it goes on as well
    opened.get_by_role("heading", level=1, name="train_00026").wait_for()
    open_picture(opened, served, PENDING)
    assert "There is no caption yet: it is pending." in opened.locator(".texts").inner_text()
    assert opened.title() == "train_00027 · rococap"
    assert violations(opened) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1280])
def test_nothing_is_wrong_for_readers_of_any_kind(opened, served, scheme, width):
    opened.set_viewport_size({"width": width, "height": 800})
    opened.emulate_media(color_scheme=scheme)
    open_picture(opened, served, 23)
    opened.locator("#made summary").click()
    assert violations(opened) == []
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    opened.keyboard.press("?")
    assert violations(opened) == []


def test_what_is_not_there_is_said(served):
    client = served.client
    for path, status, message in (
        ("/picture/99?run=default", 404, "has no picture number 99"),
        ("/picture/1?run=gone", 409, "There is no run"),
        ("/picture/x?run=default", 422, "path.image"),
    ):
        answer = client.get(path)
        assert answer.status_code == status
        assert message in answer.json()["error"]["message"]
    judged = {"run": "default", "verdict": "minor"}
    assert client.post("/picture/1/reviews", json=judged).status_code == 409
    named = {"Cookie": f"rococap-{client.base_url.port}-reader=Cleo"}
    assert client.post("/picture/99/reviews", json=judged, headers=named).status_code == 404
    answer = client.post(f"/picture/{PENDING}/reviews", json=judged, headers=named)
    assert (answer.status_code, "no caption" in answer.json()["error"]["message"]) == (409, True)
    answer = client.post("/picture/1/reviews", json=judged | {"verdict": "fine"}, headers=named)
    assert (answer.status_code, "not a verdict" in answer.json()["error"]["message"]) == (400, True)


def test_a_server_that_only_shows_has_no_forms_but_all_that_was_said(database, browser):
    with serving(str(database.url), "--read-only") as served:
        page = browser.new_page()
        open_picture(page, served, 1)
        assert page.locator("form:not([method=dialog])").count() == 0
        assert page.locator("#reviews").inner_text() != ""
        page.keyboard.press("+")
        assert shown(page)[0] == "(1.25)"
        assert violations(page) == []
        page.close()
