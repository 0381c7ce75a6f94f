"""The dashboard in a real browser, of a queue that changes meanwhile."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from samples import caption, fill, texts
from small_engine import INFO
from sqlalchemy import Engine
from steps import select
from web_server import Served, serving, violations

from rococap import db, queue
from rococap.engines import Failure

HOSTILE = "</li><script>document.title = 'hacked'</script><img src=x onerror=document.title='hacked'>"
MINUTE_MS = 60_000


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A run under way: 30 pictures, some captioned minutes ago, two failed, one lease that is about to expire."""
    folder = tmp_path_factory.mktemp("queue")
    database = db.connect(f"sqlite:///{folder}/queue.db")
    run = fill(database, folder / "set", 30)
    with db.transaction(database, write=True) as conn:
        now = db.now(conn)
        worker = queue.register_worker(conn, "one", "gpu-1", 7, INFO)
        lease = queue.claim(conn, worker, run.id, "train", 2, ttl_ms=MINUTE_MS)
        queue.fail(conn, lease, {job.id: Failure("corrupt", HOSTILE) for job in lease.jobs})
        queue.claim(conn, worker, run.id, "train", 3, ttl_ms=MINUTE_MS, now=now - 50_000)
        telemetry = queue.Telemetry(60.0, 2.5, 80.0, 0.9, 0.95, 1.0, 4, 800.0)
        queue.heartbeat(conn, worker, [], ttl_ms=60 * MINUTE_MS, telemetry=telemetry)  # not lost while the tests run
    caption(database, run, texts("a chest", "a knee"), now=now - 10 * MINUTE_MS)
    yield database
    database.dispose()


@pytest.fixture(scope="module")
def served(busy: Engine) -> Iterator[Served]:
    with serving(str(busy.url)) as served:
        yield served


@pytest.fixture(scope="module")
def tab(browser: Any) -> Any:
    return browser.new_page()


@pytest.fixture
def opened(tab: Any, served: Served) -> Iterator[Any]:
    """The dashboard, afresh. It is to complain of nothing, and to ask nobody else for anything."""
    trouble: list[str] = []
    tab.on("console", lambda message: trouble.append(message.text))
    tab.on("pageerror", lambda error: trouble.append(str(error)))
    tab.on("request", lambda asked: asked.url.startswith(served.address + "/") or trouble.append(asked.url))
    tab.set_viewport_size({"width": 1280, "height": 900})
    tab.emulate_media(color_scheme="light")
    tab.goto(served.address + "/")
    tab.locator("#throughput path").first.wait_for()
    yield tab
    assert tab.title() == "Dashboard · rococap"
    tab.goto("about:blank")
    assert [one for one in trouble if "409 (Conflict)" not in one] == []


def press(page: Any, name: str, answer: str) -> None:
    """Presses a button, and one in the dialog that asks whether that is meant."""
    page.get_by_role("button", name=name, exact=True).first.click()
    page.get_by_role("dialog").get_by_role("button", name=answer, exact=True).click()


def test_it_shows_runs_workers_leases_and_failures(opened):
    assert opened.locator("#summary dd").all_inner_texts() == [
        "2\nof 30 pictures",
        "2.5\nin the last minute",
        "80\nin the last minute",
        "–\nno rate yet",
        "1\n1 lost",
    ]
    assert opened.locator(".split .legend li").all_inner_texts() == [
        "2 done",
        "3 leased",
        "2 failed",
        "23 pending",
    ]
    row = opened.locator(".workers tbody tr").first.inner_text().split("\n")
    assert [cell.strip() for cell in row if cell.strip()][:2] == ["gpu-1", "process 7 on cpu"]
    assert "0.8 GB" in " ".join(row)
    assert "The model" in " ".join(row)
    lease = opened.locator("#leases li").inner_text()
    assert "gpu-1:7 default train, 0 of 3 done" in lease
    assert "reap --lease 2" in lease
    failures = opened.locator("#failures li").first.inner_text()
    assert "2 corrupt" in failures
    assert HOSTILE in failures
    assert "retry --code corrupt" in failures


def test_the_charts_show_what_was_captioned_and_tell_it_in_words(opened):
    for name, axis in (("captions", ["0", "0.03", "0.05"]), ("tokens", ["0", "0.01", "0.01"])):
        chart = opened.locator(f"[data-values={name}]")
        label = chart.get_attribute("aria-label")
        assert "default train 0.00." in label
        assert chart.locator("text").all_text_contents()[:3] == axis
    chart = opened.locator("[data-values=captions]")
    box = chart.bounding_box()
    found = set()
    for step in range(30):
        opened.mouse.move(box["x"] + 44 + (box["width"] - 44) * (step + 0.5) / 30, box["y"] + 50)
        found |= set(opened.locator(".tip p").all_inner_texts()[1:])
    assert found == {"default train: 0.03", "default train: 0.00"}


def test_what_workers_store_appears_without_a_reload_and_moves_nothing(opened, busy):
    opened.evaluate(
        "window.shift = 0; new PerformanceObserver((list) => list.getEntries().forEach((e) => window.shift += e.value))"
        ".observe({type: 'layout-shift', buffered: true})"
    )
    before = select(busy, "SELECT count(*) FROM captions")[0][0]
    with db.transaction(busy) as conn:
        run, now = queue.get_run(conn, "default"), db.now(conn)
    bar = opened.locator("rect.done").first
    bar.evaluate("rect => { window.kept = rect }")
    opened.get_by_role("button", name="Pause").focus()
    caption(busy, run, texts("one", "two", "three"), now=now)
    opened.locator(".split .legend li", has_text=f"{before + 3} done").wait_for()
    opened.locator("#summary dd", has_text=f"{before + 3}\n").first.wait_for()
    assert bar.evaluate("rect => rect === window.kept"), "parts that stay are changed, not replaced"
    assert opened.evaluate("document.activeElement.textContent") == "Pause"
    assert opened.evaluate("window.shift") < 0.01


def test_pausing_asks_first_and_resuming_undoes_it(opened, busy):
    paused = "SELECT paused FROM runs"
    press(opened, "Pause", "Keep things as they are")
    opened.get_by_role("button", name="Pause").click()
    opened.keyboard.press("Escape")
    assert not opened.get_by_role("dialog").is_visible()
    assert select(busy, paused) == [(0,)]
    press(opened, "Pause", "Pause")
    opened.locator("#told", has_text="default: paused. Workers finish what they hold.").wait_for()
    opened.locator(".run .badge", has_text="paused").wait_for()
    assert select(busy, paused) == [(1,)]
    press(opened, "Resume", "Resume")
    opened.locator(".run .badge", has_text="running").wait_for()
    assert select(busy, paused) == [(0,)]


def test_by_keyboard_alone_a_command_is_copied_and_failures_are_retried(opened, busy):
    opened.context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened.evaluate(  # it says so for a second and a half, in which this process may not look
        "window.labels = []; new MutationObserver((all) => all.forEach((one) => labels.push(one.target.textContent)))"
        ".observe(document.body, {childList: true, subtree: true})"
    )
    opened.get_by_role("button", name="Copy").first.focus()
    opened.keyboard.press("Enter")
    opened.wait_for_function("window.labels.includes('Copied')")
    assert opened.evaluate("navigator.clipboard.readText()").endswith("retry --code corrupt")
    opened.get_by_role("button", name="Retry").focus()
    opened.keyboard.press("Enter")
    opened.keyboard.press("Tab")
    opened.keyboard.press("Enter")
    opened.locator("#told", has_text="default: 2 pending again.").wait_for()
    opened.locator("#failures", has_text="Nothing has failed.").wait_for()
    assert select(busy, "SELECT count(*) FROM jobs WHERE status = 'failed'") == [(0,)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1280])
def test_nothing_is_wrong_for_readers_of_any_kind(opened, served, scheme, width):
    opened.set_viewport_size({"width": width, "height": 800})
    opened.emulate_media(color_scheme=scheme)
    assert violations(opened) == []
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    opened.get_by_role("button", name="Cancel…").click()
    assert violations(opened) == []


def test_cancelling_withdraws_what_is_left(opened, busy):
    press(opened, "Cancel…", "Cancel the pictures")
    opened.locator("#told", has_text="Undo: rococap --db").wait_for()
    opened.locator(".run .badge", has_text="finished").wait_for()
    assert select(busy, "SELECT count(*) FROM jobs WHERE status IN ('pending', 'leased')") == [(0,)]


def test_an_error_is_shown_in_the_dialog_and_nothing_else_happens(opened):
    button = (
        """<button data-post="/actions/pause" data-body='{"run": "gone"}' data-title="?" data-text="" """
        'data-yes="Try">Try</button>'
    )
    opened.locator("footer").evaluate("(footer, html) => { footer.innerHTML = html }", button)
    press(opened, "Try", "Try")
    opened.locator("#confirm-error", has_text="There is no run 'gone'.").wait_for()
    assert opened.get_by_role("dialog").is_visible()


def test_a_new_queue_says_what_to_do_and_a_lost_server_is_noticed(browser, tmp_path: Path):
    url = f"sqlite:///{tmp_path}/queue.db"
    db.connect(url).dispose()
    page = browser.new_page(color_scheme="dark", viewport={"width": 380, "height": 800})
    with serving(url, "--host", "0.0.0.0") as served:
        page.goto(served.address + "/")
        assert violations(page) == []
        page.get_by_label("Token").fill(served.said.partition("token=")[2].split(" ")[0])
        page.keyboard.press("Enter")
        page.get_by_text("Nothing is registered here yet.").wait_for()
        assert page.url == served.address + "/"
        page.locator(".none", has_text="Nothing was captioned in the last six hours.").first.wait_for()
        assert "enqueue --split train" in page.locator("#runs .empty").inner_text()
        assert "rococap --db" in page.locator("#workers .empty").inner_text()
        assert violations(page) == []
        page.goto(served.address + "/nothing")
        assert violations(page) == []
        assert page.get_by_role("heading", level=1).inner_text() == "There is no such page"
        page.get_by_role("link", name="To the dashboard").click()
        page.get_by_text("No worker is running.").wait_for()
    page.locator("#trouble", has_text="The server cannot be reached. This page tries again by itself.").wait_for()
    assert violations(page) == []
    page.close()
