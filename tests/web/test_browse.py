"""The gallery in a real browser: finding, comparing and turning pages, and replacing in many captions at once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import galleries
import pytest
from galleries import FAILED, FLAGGED, SCORES, SECOND, N
from sqlalchemy import Engine
from steps import select, until
from web_server import HTML, Served, serving, violations

from rococap import db, queue, review

SCRIPT = "</script><script>document.title = 'hacked'</script><img src=x onerror=document.title='hacked'>"
RTL = "صورة أشعة للصدر\u202e effusion"
LONG = "lung " * 1_000
READER = "Dr <b>Ada</b>"


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The runs of `galleries`, with a verdict, an edit, texts and an id that are hostile, and a shard that is gone."""
    folder = tmp_path_factory.mktemp("queue")
    database = db.connect(f"sqlite:///{folder}/queue.db")
    one, _ = galleries.world(database, folder / "set")
    with db.transaction(database, write=True) as conn:
        for number, text in ((4, SCRIPT), (5, RTL), (6, LONG)):
            db.execute(conn, "UPDATE images SET caption = ? WHERE image_id = ?", (text, f"train_{number:05}"))
        db.execute(conn, "UPDATE images SET image_id = ? WHERE image_id = 'train_00007'", (SCRIPT,))
        jobs = dict(_jobs(conn, one))
        review.add_review(conn, one, jobs["train_00001"], READER, "major", errors=["side"])
        review.edit(conn, one, jobs["train_00002"], READER, f"Effusion and {SCRIPT}", seen=None)
        undone = review.edit(conn, one, jobs["train_00008"], READER, "Nothing", seen=None)
        review.undo(conn, one, undone.id, READER)
    (folder / "set" / "data" / "test-00000-of-00001.parquet").unlink()
    yield database
    database.dispose()


def _jobs(conn: Any, run: queue.Run) -> list[tuple[str, int]]:
    sql = "SELECT i.image_id, j.id FROM jobs j JOIN images i ON i.id = j.image_id WHERE j.run_id = ?"
    return [(row[0], row[1]) for row in db.execute(conn, sql, (run.id,)).fetchall()]


@pytest.fixture(scope="module")
def served(busy: Engine) -> Iterator[Served]:
    with serving(str(busy.url)) as served:
        filled(served)
        yield served


def filled(served: Served) -> None:
    """Waits until the search index is ready."""
    until(lambda: served.client.get("/pictures/index").json()["state"] == "ready", "the index is filled")


@pytest.fixture(scope="module")
def tab(browser: Any) -> Any:
    return browser.new_page(viewport={"width": 1280, "height": 900})


@pytest.fixture
def opened(tab: Any, served: Served) -> Iterator[Any]:
    """A page that is to complain of nothing but pictures that are gone, and to ask nobody else for anything."""
    trouble: list[str] = []
    tab.on("console", lambda message: trouble.append(message.text))
    tab.on("pageerror", lambda error: trouble.append(str(error)))
    tab.on("request", lambda asked: asked.url.startswith(served.address + "/") or trouble.append(asked.url))
    yield tab
    assert "hacked" not in tab.title()
    tab.goto("about:blank")
    assert [one for one in trouble if "404 (Not Found)" not in one] == []


def go(page: Any, served: Served, address: str) -> None:
    page.goto(served.address + address)


def ids(page: Any) -> list[str]:
    return page.locator(".card h2").all_inner_texts()


def named(*numbers: int) -> list[str]:
    return [SCRIPT if n == 7 else f"train_{n:05}" for n in numbers]


def test_filters_make_an_address_that_shows_the_same_to_others(opened, served):
    go(opened, served, "/pictures?run=one")
    assert opened.locator(".total").inner_text().startswith("25 pictures")
    opened.get_by_text("Filters").click()
    opened.get_by_label("Modality").select_option("X-ray")
    opened.get_by_label("from", exact=True).fill("0.3")
    opened.get_by_role("button", name="Show").click()
    opened.wait_for_url("**/pictures?run=one&split=train&modality=X-ray&least=0.3")
    expected = named(*(n for n in range(0, N, 3) if SCORES.get(n, 0) >= 0.3))
    assert ids(opened) == expected
    chips = [text.partition(" ✕")[0] for text in opened.locator(".chips a").all_inner_texts()]
    assert chips == ["modality X-ray", "ROUGE-L from 0.3", "Remove all"]
    assert opened.get_by_label("Modality").input_value() == "X-ray"
    opened.get_by_role("link", name="ROUGE-L from").click()
    opened.wait_for_url("**/pictures?run=one&split=train&modality=X-ray")  # a click waits for no more than its head
    assert ids(opened) == named(*range(0, N, 3))
    opened.get_by_role("link", name="modality").click()
    assert opened.url == f"{served.address}/pictures?run=one&split=train"


@pytest.mark.parametrize(
    ("asked", "numbers"),
    [
        ("flag=loop", sorted(FLAGGED)),
        ("failed=1", sorted(FAILED)),
        ("code=too_large", [11]),
        ("reviewed=yes", [1]),
        ("edited=yes", [2]),
        ("q=%22of+the+left%22&where=original", [n for n in range(1, N, 2) if n != 5]),
    ],
)
def test_each_filter_finds_its_pictures(served, asked, numbers):
    page = served.client.get(f"/pictures?run=one&limit=100&{asked}", headers=HTML).text
    shown = [n for n in range(N) if f'id="picture-{n + 1}"' in page]

    assert shown == numbers


def test_what_a_search_has_found_is_marked_and_what_it_cannot_mean_is_said(opened, served):
    go(opened, served, "/pictures?run=one")
    opened.keyboard.press("/")
    opened.keyboard.type("emphysema nod*")
    opened.keyboard.press("Enter")
    opened.wait_for_url("**q=emphysema+nod*")
    assert ids(opened) == named(*(n for n in range(0, N, 4) if n not in FAILED))
    marks = opened.locator(".card").first.locator("mark").all_inner_texts()
    assert marks == ["Émphysema", "nodule"]
    go(opened, served, "/pictures?run=one&q=%22")
    assert "A search takes one to 16 words" in opened.get_by_role("alert").first.inner_text()
    go(opened, served, "/pictures?run=one&q=nowhere")
    assert "No picture fulfils all of this." in opened.locator(".empty").inner_text()


def test_pages_are_turned_by_keyboard_in_both_directions(opened, served):
    go(opened, served, "/pictures?run=one&limit=10&sort=rouge_l&order=down")
    keyed = sorted(SCORES, key=lambda n: (SCORES[n], n), reverse=True)
    pages = [named(*keyed[:10]), named(*keyed[10:])]
    assert ids(opened) == pages[0]
    opened.keyboard.press("n")
    opened.wait_for_url("**after=*")
    assert ids(opened) == pages[1]
    opened.keyboard.press("p")
    opened.wait_for_url("**before=*")
    assert ids(opened) == pages[0]
    go(opened, served, "/pictures?run=one&limit=10")
    for first, address in ((10, "**after=10&**"), (20, "**after=20&**")):
        opened.get_by_role("link", name="Next page").click()
        opened.wait_for_url(address)
        assert ids(opened) == named(*range(first, min(first + 10, N)))
    opened.get_by_role("link", name="Previous page").click()
    opened.wait_for_url("**before=21&**")
    assert ids(opened) == named(*range(10, 20))
    go(opened, served, "/pictures?run=one&limit=10&before=6")
    assert ids(opened) == named(*range(10)), "the first page is a full one"
    assert not opened.get_by_role("link", name="Previous page").is_visible()


def test_runs_stand_side_by_side_and_their_differences_are_marked(opened, served):
    go(opened, served, "/pictures?run=one&run=two&limit=100")
    card = opened.locator(".card").nth(1)
    assert card.locator("h3").all_inner_texts() == ["Original", "one", "two"]
    other = card.locator("section").nth(2)
    assert other.locator("del").all_inner_texts() == ["nodule"]
    assert other.locator("ins").all_inner_texts() == ["mass"]
    assert (
        opened.locator(".card")
        .nth(SECOND)
        .locator("section")
        .nth(2)
        .inner_text()
        .endswith("Not captioned yet (pending).")
    )
    opened.get_by_label("Mark differences from").select_option("none")
    opened.get_by_role("button", name="Show").click()
    opened.wait_for_url("**compare=none**")
    assert opened.locator(".card").nth(1).locator("ins, del").count() == 0


def test_verdicts_edits_flags_scores_and_failures_are_shown(opened, served):
    go(opened, served, "/pictures?run=one&limit=100")
    cards = opened.locator(".card")
    assert f"Major error, {READER}" in cards.nth(1).inner_text()
    assert "loop" in cards.nth(1).inner_text()
    assert f"ROUGE-L {SCORES[1]:.3f}" in cards.nth(1).inner_text()
    assert f"edited by {READER}" in cards.nth(2).inner_text()
    assert "nodule" in " ".join(cards.nth(2).locator("del").all_inner_texts())
    assert "Failed: corrupt picture 3" in cards.nth(3).inner_text()


def test_hostile_texts_and_ids_are_text(opened, served):
    go(opened, served, "/pictures?run=one&limit=100&compare=none")
    texts = opened.locator(".card section:first-child .text")
    assert texts.nth(4).inner_text() == SCRIPT
    assert texts.nth(5).inner_text() == RTL
    assert texts.nth(5).evaluate("text => getComputedStyle(text).direction") == "rtl"
    assert len(texts.nth(6).text_content()) == 2_001
    assert opened.locator(".card").nth(6).bounding_box()["height"] < 600
    assert ids(opened)[7] == SCRIPT
    opened.locator(".card").nth(7).scroll_into_view_if_needed()
    opened.locator(".card .gone", has_text="train-00000-of-00001.parquet").wait_for()
    assert opened.locator(".card img").count() == N - 1


def test_a_picture_whose_shard_is_gone_has_its_reason_in_its_place_and_nothing_moves(opened, served):
    opened.add_init_script(
        "window.shift = 0; new PerformanceObserver((list) => list.getEntries().forEach((e) => window.shift += e.value))"
        ".observe({type: 'layout-shift', buffered: true})"
    )
    go(opened, served, "/pictures?run=one&split=test")
    for _ in range(3):
        opened.mouse.wheel(0, 400)
    opened.locator(".gone", has_text="is gone: restore it").nth(4).wait_for()
    assert opened.evaluate("window.shift") < 0.01
    assert served.client.get("/picture/26/thumbnail?run=one").status_code == 404


def test_browsers_ask_again_for_a_picture_and_get_it_only_if_it_changed(served):
    first = served.client.get("/picture/3/thumbnail?run=one")
    assert first.headers["content-type"] == "image/jpeg"
    again = served.client.get("/picture/3/thumbnail?run=one", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert served.client.get("/picture/3/full.png?run=one").content.startswith(b"\x89PNG")
    assert served.client.get("/picture/999/full.png?run=one").status_code == 404
    assert served.client.get("/picture/3/full.png?run=none").status_code == 409
    assert served.client.get("/picture/../3/full.png").status_code == 404


def test_pictures_are_walked_and_opened_by_keyboard(opened, served):
    go(opened, served, "/pictures?run=one&modality=CT")
    focused = "document.activeElement.closest('.card')?.querySelector('h2').innerText"
    opened.keyboard.press("j")
    opened.keyboard.press("j")
    assert opened.evaluate(focused) == "train_00002"
    opened.keyboard.press("ArrowDown")
    opened.keyboard.press("k")
    assert opened.evaluate(focused) == "train_00002"
    opened.keyboard.press("?")
    assert violations(opened) == []
    opened.get_by_label("Use these keys").uncheck()
    opened.keyboard.press("Escape")
    opened.keyboard.press("j")
    assert opened.evaluate(focused) == "train_00002"
    opened.get_by_role("button", name="Keys").click()
    opened.get_by_label("Use these keys").check()
    opened.keyboard.press("Escape")
    opened.keyboard.press("k")
    opened.keyboard.press("Enter")
    opened.wait_for_url("**/picture/2?run=one&split=train&modality=CT")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1280])
def test_nothing_is_wrong_for_readers_of_any_kind(opened, served, scheme, width):
    opened.set_viewport_size({"width": width, "height": 800})
    opened.emulate_media(color_scheme=scheme)
    for address in ("/pictures?run=one&run=two&flag=loop", "/replace?run=one&find=mass&replace=lump&part=1"):
        go(opened, served, address)
        assert violations(opened) == []
        assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    opened.set_viewport_size({"width": 1280, "height": 900})


def test_captions_are_replaced_and_restored_as_one_act(opened, served, busy):
    opened.context.clear_cookies()
    go(opened, served, "/pictures?run=one")
    opened.get_by_role("link", name="Find and replace").click()
    opened.get_by_label("Find", exact=True).fill("nodule")
    opened.get_by_label("Replace by").fill("<b>lump</b>")
    opened.get_by_role("button", name="Preview").click()
    n = N - len(FAILED) - 1  # one caption was edited, and has no nodule
    opened.get_by_role("heading", name=f"{n} captions would change").wait_for()
    opened.wait_for_load_state()
    assert opened.locator(".changes li").first.locator("del").all_inner_texts() == ["nodule"]
    assert "<b>lump</b>" in opened.locator(".changes li").first.inner_text()
    opened.get_by_label("Your name").fill(READER)
    opened.get_by_role("button", name="Continue").click()
    opened.get_by_text("You are reading as").wait_for()
    opened.wait_for_load_state()
    answer(opened, "Replace in all of them")
    opened.locator("#told", has_text=f"{n} captions changed.").wait_for()
    opened.locator(".acts li", has_text=f"{n} captions by {READER}").wait_for()
    assert "No caption would change." in opened.locator("#preview").inner_text()
    current = "SELECT count(*) FROM edits WHERE text LIKE '%<b>lump</b>%' AND act IS NOT NULL"
    assert select(busy, current) == [(n,)]
    answer(opened, "Undo")
    opened.locator("#told", has_text=f"{n} captions restored.").wait_for()
    opened.locator(".acts .badge", has_text="undone").wait_for()
    opened.get_by_role("heading", name=f"{n} captions would change").wait_for()
    assert violations(opened) == []


def answer(page: Any, name: str) -> None:
    """Presses a button, and the one of the same name in the dialog that asks."""
    page.get_by_role("button", name=name, exact=True).first.click()
    page.get_by_role("dialog").get_by_role("button", name=name, exact=True).click()


def test_long_previews_have_pages_of_one_moment(opened, served):
    go(opened, served, "/replace?run=one&find=and&replace=or")
    assert opened.locator(".changes li").count() <= 25
    page = served.client.get("/replace?run=one&find=and&replace=or&after=3", headers=HTML).text
    assert "train_00001" not in page
    assert "train_00004" in page


@pytest.fixture
def unsearchable(tmp_path: Path) -> Iterator[tuple[Engine, Path]]:
    database = db.connect(f"sqlite:///{tmp_path}/queue.db")
    (tmp_path / "queue.db.search").mkdir()
    yield database, tmp_path
    database.dispose()


def test_without_an_index_or_without_pictures_the_page_says_so_and_goes_on(unsearchable, tab):
    database, folder = unsearchable
    with serving(str(database.url), "--read-only") as served:
        assert "There are no pictures yet." in served.client.get("/pictures", headers=HTML).text
        assert "There are no captions yet." in served.client.get("/replace", headers=HTML).text
        galleries.world(database, folder / "set")
        until(lambda: served.client.get("/pictures/index").json()["state"] == "off", "the index is off")
        page = served.client.get("/pictures?run=one", headers=HTML).text
        assert page.count("<article") == 24
        assert "25 pictures" in page
        assert "search is off, all else works" in page
        page = served.client.get("/pictures?run=one&q=lung", headers=HTML).text
        assert "search is off, all else works" in page
        go(tab, served, "/pictures?run=one&q=lung")
        tab.get_by_text("This needs the search index.").wait_for()
        assert violations(tab) == []
        (folder / "queue.db.search").rmdir()
        tab.get_by_text("The search index is ready.").wait_for()
        tab.get_by_role("link", name="Show this page again").click()
        tab.locator(".total", has_text="25 pictures").wait_for()
        page = served.client.get("/replace?run=one&find=nodule", headers=HTML).text
        assert "would change" in page
        assert "Replace in all of them" not in page
