"""Reader studies in a real browser: read by keyboard alone, without a hint of who wrote which text."""

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from samples import caption, picture, register, texts, write_shard
from sqlalchemy import Engine
from steps import invoke, select, writing
from web_server import HTML, Served, serving, violations

from rococap import db, queue, review
from rococap.recipe import Recipe
from rococap.review import Form, Scale
from rococap.scores import concepts

RUNS = {"zebra": "First", "walrus": "Second"}
"""The beginning of the captions of each run."""
N = 3
HOSTILE = "</p><script>document.title = 'hacked'</script>"
FORM = Form(True, (Scale("accuracy", "How true is it?", ("not", "partly", "wholly")),))
MODALITIES = ["C0040405", "C0024485", "C0041618"]


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Two runs of three pictures, and two studies of them: `by three`, with ratings, and `early`, of one reader."""
    folder = tmp_path_factory.mktemp("studied")
    database = db.connect(f"sqlite:///{folder}/queue.db")
    cuis = {n: [MODALITIES[n]] for n in range(N)}
    write_shard(folder / "set", "test", range(N), captions={0: HOSTILE}, cuis=cuis)
    runs = []
    for name, begins in RUNS.items():
        register(database, folder / "set", ["test"], run=name, recipe=Recipe(model="tests/small", prompt=name))
        with db.transaction(database) as conn:
            runs.append(queue.get_run(conn, name))
        caption(database, runs[-1], texts(*(f"{begins} text of {n}." for n in range(N))), split="test")
    with writing(database) as conn:
        for name, n_readers, form in (("by three", 3, FORM), ("early", 1, Form())):
            review.new_study(
                *(conn, name, runs, "test"),
                with_original=True,
                n_pictures=N,
                n_readers=n_readers,
                seed=5,
                form=form,
                modality=lambda cui: concepts.modality(concepts.parse(cui)),
            )
    yield database
    database.dispose()


@pytest.fixture(scope="module")
def served(studied: Engine) -> Iterator[Served]:
    with serving(str(studied.url)) as served:
        yield served


class Reader:
    """A person with a browser of their own. `heard` is all that the server said to it: addresses, headers, bodies."""

    def __init__(self, browser: Any, served: Served, name: str, **options: Any) -> None:
        self.name, self.heard, self.trouble = name, [], []
        self._context = browser.new_context(**options)
        self._context.route("**/*", self._listen)
        self.page = self._context.new_page()
        self.page.on("console", lambda message: self.trouble.append(message.text))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.address = served.address

    def _listen(self, route: Any) -> None:
        answer = route.fetch(max_redirects=0)
        self.heard.append((answer.url, str(answer.headers), answer.body()))
        route.fulfill(response=answer)

    def join(self, study: str) -> None:
        self.page.goto(f"{self.address}/studies/{study}")
        self.page.get_by_label("Your name").focus()
        self.page.keyboard.type(self.name)
        self.page.keyboard.press("Enter")
        self.page.get_by_role("button", name=f"Join as {self.name}").focus()
        self.page.keyboard.press("Enter")
        self.at(1)

    def at(self, position: int) -> list[str]:
        """Waits for a picture, and returns its texts."""
        self.page.get_by_role("heading", name=f"Picture {position} of {N}").wait_for()
        self.page.wait_for_load_state()  # a key that is pressed before its script has run does nothing
        self.page.locator("#picture").evaluate("picture => picture.decode()")
        return self.page.locator(".text > p").all_inner_texts()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def answer(self, position: int, favourite: str) -> None:
        """Rates each text by its kind, and prefers the one that begins with `favourite`."""
        shown = self.at(position)
        self.press(*({"First": "3", "Secon": "2"}.get(text[:5], "1") for text in shown))
        chosen = [text.startswith(favourite) for text in shown]
        self.press(str(1 + chosen.index(True)) if any(chosen) else "0", "Enter")


def looks_right(page: Any) -> None:
    page.wait_for_load_state()
    for scheme, width in (("light", 1280), ("dark", 380)):
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=scheme)
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_three_readers_read_a_study_to_its_result_by_keyboard_and_learn_nothing_of_the_key(
    browser, served, studied, monkeypatch
):
    monkeypatch.setenv("ROCOCAP_DB", str(studied.url))
    readers = {name: Reader(browser, served, name) for name in ("ann", "bob", "cy")}
    ann, bob, cy = readers.values()
    for reader in readers.values():
        reader.join("by%20three")
    ann.press("1", "Enter")
    ann.page.get_by_text("Not answered yet: How true is it?").wait_for()
    assert select(studied, "SELECT count(*) FROM ratings") == [(0,)]
    looks_right(ann.page)
    ann.page.reload()
    shown_at = int(ann.page.locator("#reading").get_attribute("data-shown-at"))
    ann.answer(1, "Second")
    ann.at(2)
    assert select(studied, f"SELECT shown_at > {shown_at}, at >= shown_at FROM ratings") == [(1, 1)]
    ann.press("Backspace")
    ann.at(1)
    assert ann.page.get_by_role("radio", checked=True).count() == 4, "the answers given before"
    ann.answer(1, "First")
    ann.at(2)
    assert select(studied, "SELECT count(*) FROM ratings") == [(2,)], "another row, which counts from now on"
    for position in (2, 3):
        ann.answer(position, "First")
    ann.page.get_by_text("Thank you, ann").wait_for()
    looks_right(ann.page)
    for position in (1, 2, 3):
        bob.answer(position, "First" if position == 1 else "Second")
        cy.answer(position, "nothing")
    cy.page.get_by_text("So has everybody else, and the key is open.").wait_for()

    for reader in readers.values():
        assert len(reader.heard) > 15
        for name in (*RUNS, "test_0000"):
            assert [one for one in reader.heard if name in f"{one[0]} {one[1]}" or name.encode() in one[2]] == []
        assert reader.trouble == []

    found = json.loads(invoke("study", "results", "by three", "--json").stdout)
    assert served.client.get("/studies/by%20three/results").json() == found
    assert found["preference"]["shares"]["zebra"]["n"] == 4
    assert found["preference"]["shares"]["(none)"]["n"] == 3
    assert found["ratings"][0]["by_text"]["walrus"]["n"] == [0, 9, 0]
    cy.page.get_by_role("link", name="See the results").focus()
    cy.press("Enter")
    cy.page.get_by_role("heading", name="Results").wait_for()
    cy.page.wait_for_load_state()
    cells = [
        [row.split("\t") for row in table.split("\n")] for table in cy.page.locator(".result table").all_inner_texts()
    ]
    assert cells == [[list(table.header), *table.rows] for table in review.tables_of(found)]
    assert cy.page.locator(".shares").first.inner_text().split("\n")[:2] == ["walrus", "22 % [3, 73]"]
    kappa = found["preference"]["agreement"]["fleiss"]
    assert f"{kappa:.2f}" in cy.page.locator(".tiles dd").nth(1).inner_text()
    looks_right(cy.page)
    assert cy.page.title() == "by three · rococap"


def test_the_key_is_opened_early_only_after_a_question_and_ends_the_study(browser, served, studied):
    client = served.client
    assert "/studies/early" in client.get("/studies").text
    dora = Reader(browser, served, "dora")
    dora.join("early")
    dora.page.goto(f"{served.address}/studies/early")
    looks_right(dora.page)
    other = {"Cookie": f"{cookie_of(dora)}=eve"}
    full = client.post("/studies/early/read", headers=HTML | other)
    assert full.status_code == 400
    assert "has its 1 readers already: dora." in full.text
    assert "has its 1 readers already: dora." in client.get("/studies/early", headers=other).text
    dora.page.get_by_role("button", name="Unblind…").click()
    dora.page.get_by_role("button", name="Keep things as they are").click()
    assert select(studied, "SELECT count(*) FROM unblindings") == [(0,)]
    dora.page.get_by_role("button", name="Unblind…").click()
    assert violations(dora.page) == []
    dora.page.get_by_role("dialog").get_by_role("button", name="Unblind", exact=True).click()
    dora.page.get_by_text("dora opened the key on ").wait_for()
    assert select(studied, "SELECT reader, n_missing FROM unblindings") == [("dora", N)]
    hers = {"Cookie": f"{cookie_of(dora)}=dora"}
    for answer in (
        client.post("/studies/early/read/1", json={"shown_at": 0, "preference": 1}, headers=hers),
        client.post("/studies/early/read", headers=HTML | other),
    ):
        assert answer.status_code == 400
        assert "is open, so nobody can read in it any more." in answer.text
    assert "The key is open" in client.get("/studies/early/read", headers=hers).text
    assert client.post("/studies/early/unblind", headers=hers).status_code == 400


def cookie_of(reader: Reader) -> str:
    return f"rococap-{reader.address.rpartition(':')[2]}-reader"


def test_pictures_are_shown_in_all_their_pixels_to_those_who_read_them(served, studied, tmp_path):
    with db.transaction(studied, write=True) as conn:
        review.join(conn, review.get_study(conn, "early"), "dora")
    named = {"Cookie": f"rococap-{served.address.rpartition(':')[2]}-reader=dora"}
    shown = served.client.get("/studies/early/items/1/picture", headers=named)
    assert shown.headers["content-type"] == "image/png"
    with db.transaction(studied) as conn:
        item = review.item(conn, review.get_study(conn, "early"), "dora", 1)
    original = Image.open(BytesIO(picture(int(item.image_id[-1]))))
    assert Image.open(BytesIO(shown.content)).convert("L").tobytes() == original.tobytes()
    assert served.client.get("/studies/early/items/4/picture", headers=named).status_code == 400
    other = {"Cookie": named["Cookie"].replace("dora", "eve")}
    assert "'eve' has not joined" in served.client.get("/studies/early/items/1/picture", headers=other).text
    assert served.client.get("/studies/early/items/1/picture").status_code == 409, "who is asking?"


def test_a_study_that_does_not_exist_is_a_page_that_names_those_that_do(served):
    for path in ("/studies/gone", "/studies/gone/results", "/studies/gone/read"):
        named = {"Cookie": f"rococap-{served.address.rpartition(':')[2]}-reader=eve"}
        answer = served.client.get(path, headers=HTML | named)
        assert answer.status_code == 404
        assert "There is no study &#39;gone&#39;. Studies: by three, early." in answer.text


def test_without_a_study_the_page_says_how_to_make_one_and_read_only_lets_nobody_read(browser, studied, tmp_path: Path):
    url = f"sqlite:///{tmp_path}/queue.db"
    db.connect(url).dispose()
    with serving(url) as served:
        page = browser.new_page()
        page.goto(served.address + "/")
        page.get_by_role("link", name="Studies").click()
        page.get_by_text("There is no study yet.").wait_for()
        assert f"rococap --db {url} study new NAME --run A --run B" in page.locator(".shell code").inner_text()
        looks_right(page)
        page.close()
    with serving(str(studied.url), "--read-only") as served:
        named = {"Cookie": f"rococap-{served.address.rpartition(':')[2]}-reader=ann"}
        for path in ("/studies", "/studies/by%20three"):
            assert served.client.get(path, headers=named).status_code == 200
        for path in ("read", "read/1", "items/1/picture"):
            refused = served.client.get(f"/studies/by%20three/{path}", headers=HTML | named)
            assert refused.status_code == 403
            assert "--read-only" in refused.text
        assert served.client.post("/studies/by%20three/unblind", headers=named).status_code == 403
