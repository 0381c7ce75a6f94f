"""The report: one HTML file, its structure as parsed, and what a browser makes of it."""

import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import steps
from PIL import Image
from samples import SCHEMA, caption, picture, register, texts
from small_engine import INFO
from sqlalchemy import Engine

from rococap import db, queue
from rococap.engines import Failure
from rococap.errors import RococapError, RunError
from rococap.queue import Failed, Run
from rococap.recipe import Recipe
from rococap.scores import evaluate, metrics, plots
from rococap.scores import gallery as gallery_module
from rococap.scores import report as reporting
from rococap.scores.evaluate import Evaluation, Scored
from rococap.scores.gallery import Gallery, choose
from rococap.scores.plots import Series
from rococap.scores.report import NOTICE, report

CT, XRAY, ULTRASOUND = "C0040405", "C1306645", "C0041618"
MODALITIES = {"CT": CT, "X-ray": XRAY, "ultrasound": ULTRASOUND}
HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "\"><svg onload=alert(1)>'",
    "one\u2028two\u2029three",
    "\u202eright to left\u2066 and \u200fback",
    "🦴 👩‍⚕️",
    "W" * 3_000,
    "{{ 7 * 7 }} {% raw %}",
    "<!-- </p></article></main>",
    "&lt;b&gt; &amp;",
    "two\nlines and  two blanks",
]

# --- A page, parsed --------------------------------------------------------------------------------------------

VOID = {"meta", "img", "input", "br", "hr", "link"}


@dataclass
class Node:
    name: str
    attributes: dict[str, str | None]
    children: list["Node | str"] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(one if isinstance(one, str) else one.text for one in self.children)

    def all(self, name: str = "", **attributes: str) -> Iterator["Node"]:
        for one in self.children:
            if isinstance(one, Node):
                wanted = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
                if name in ("", one.name) and wanted.items() <= one.attributes.items():
                    yield one
                yield from one.all(name, **attributes)

    def one(self, name: str = "", **attributes: str) -> "Node":
        (found,) = self.all(name, **attributes)
        return found


class Parser(HTMLParser):
    """Raises ValueError for a tag that is not closed, or closed where it was not opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open = [Node("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Node(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if (closed := self.open.pop().name) != tag:
            raise ValueError(f"</{tag}> closes <{closed}>")

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(path: Path) -> Node:
    parser = Parser()
    parser.feed(path.read_text("utf-8"))
    parser.close()
    (root,) = parser.open
    return root


def cards(page: Node) -> dict[str, Node]:
    """By the picture's id, in the page's order."""
    found = page.one(id="cards")
    return {card.one("h3").text: card for card in found.children if isinstance(card, Node)}


def captions_of(card: Node) -> list[str]:
    """The original one first."""
    return [node.text for node in card.all("p", class_="text")]


# --- Runs with captions ----------------------------------------------------------------------------------------


def noise(seed: int) -> bytes:
    """What compresses worst: colours at random."""
    file = BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def write_set(root: Path, originals: Sequence[str], pictures: dict[int, bytes] | None = None) -> None:
    """Pictures `train_00000` … of the three modalities in turn, in row groups of ten."""
    (root / "data").mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "image": {"bytes": (pictures or {}).get(n, picture(n)), "path": None},
            "image_id": f"train_{n:05}",
            "caption": original,
            "cui": [list(MODALITIES.values())[n % len(MODALITIES)]],
        }
        for n, original in enumerate(originals)
    ]
    path = root / "data" / "train-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, row_group_size=10)


def start(database: Engine, root: Path, run: str, model: str = "tests/small") -> Run:
    register(database, root, ["train"], run=run, recipe=Recipe(model=model))
    with db.transaction(database) as conn:
        return queue.get_run(conn, run)


def fail(database: Engine, run: Run, code: str, message: str) -> None:
    """Fails the next pending job."""
    with db.transaction(database, write=True) as conn:
        worker = queue.register_worker(conn, f"{run.name} {code}", "host", 1, INFO)
        lease = queue.claim(conn, worker, run.id, "train", 1, ttl_ms=60_000, now=3_000)
        queue.fail(conn, lease, {lease.jobs[0].id: Failure(code, message)}, now=3_000)


METRICS = evaluate.METRICS
ORIGINALS = [
    "CT of the chest.",
    "Chest X-ray.",
    "Ultrasound of the liver.",
    *(f"CT, X-ray or ultrasound number {n} of a series." for n in range(3, 27)),
]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer draws, and no WordNet, which takes a second to open."""
    monkeypatch.setattr(evaluate, "RESAMPLES", 20)
    monkeypatch.setattr(evaluate, "METRICS", tuple(one for one in evaluate.METRICS if one.name != "meteor_nltk"))


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what does not hang on them: drawing is most of a small report's time."""
    monkeypatch.setattr(reporting, "_plots", lambda *_: [])


@pytest.fixture
def run(database: Engine, tmp_path: Path, quick: None) -> Run:
    """Run a, nothing captioned."""
    write_set(tmp_path / "set", ORIGINALS)
    return start(database, tmp_path / "set", "a")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "report.html"


def two_runs(database: Engine, folder: Path) -> None:
    """Run a captions all but the 26th, which fails, in two seconds; run b five, one of them flagged, and no others.

    The picture of the 25th cannot be read. Among the captions are hostile ones.
    """
    write_set(folder / "set", ORIGINALS, {25: b"not a picture"})
    one, other = start(database, folder / "set", "a"), start(database, folder / "set", "b", "tests/<b>other</b>")
    said = [*ORIGINALS[:10], *HOSTILE, *ORIGINALS[10:15]]
    took = [{"text": text, "processing_ms": 100.0 + 10 * n, "new_tokens": 5} for n, text in enumerate(said)]
    for n in range(0, len(took), 6):
        caption(database, one, took[n : n + 6], now=1_000 + 100 * n)
    fail(database, one, "not_an_image", "Not a picture, <b>really</b>: replace it.")
    flagged = {"text": "la la la", "flags": "loop"}
    caption(database, other, [*texts("CT of the chest.", "An X-ray."), flagged, *texts("Words.", "")], now=2_000)


# --- Structure -------------------------------------------------------------------------------------------------


MAKE = """
import sys
from types import SimpleNamespace
from rococap.scores import metrics
from rococap.cli import cli

# The real one takes a second to open.
metrics.open_wordnet = lambda: SimpleNamespace(synsets=lambda word: [])
cli(sys.argv[1:], standalone_mode=False)
print(*sys.modules)
"""


@dataclass(frozen=True)
class Made:
    """A report, and what the process that made it imported."""

    database: Engine
    path: Path
    imported: set[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, empty_queue: Path) -> Iterator[Made]:
    """A database with `two_runs`, and their report."""
    folder = tmp_path_factory.mktemp("report")
    url = f"sqlite:///{shutil.copy(empty_queue, folder / 'queue.db')}"
    database = db.connect(url)
    two_runs(database, folder)
    path = folder / "report.html"
    options = ["--run", "a", "--run", "b", "--split", "train", "--output", str(path)]
    command = [sys.executable, "-c", MAKE, "--db", url, "report", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    yield Made(database, path, set(done.stdout.split()))
    database.dispose()


@pytest.fixture(scope="module")
def page(made: Made) -> Node:
    return parse(made.path)


def test_every_picture_has_one_card_in_data_set_order(page):
    assert list(cards(page)) == [f"train_{n:05}" for n in range(27)]
    assert [card.attributes["data-number"] for card in cards(page).values()] == [str(n) for n in range(27)]
    assert page.one(id="made-by").one("table").all("th")


def test_each_run_stands_beside_the_original(page):
    card = cards(page)["train_00001"]
    assert captions_of(card) == ["Chest X-ray.", "Chest X-ray.", "An X-ray."]
    assert [node.text for node in card.all("span", class_="run")] == ["a", "b"]
    assert [node.text for node in card.all(class_="equal")] == ["equals the original"]
    assert "ROUGE-L 1.00" in next(card.all(class_="marks")).text


def test_hostile_captions_are_shown_letter_by_letter_and_are_no_markup(page):
    shown = [captions_of(card)[1] for card in list(cards(page).values())[10 : 10 + len(HOSTILE)]]
    long = HOSTILE.index("W" * 3_000)
    assert shown[:long] + shown[long + 1 :] == HOSTILE[:long] + HOSTILE[long + 1 :]
    assert shown[long] == f"{'W' * 2_000} … (1000 more characters)"
    assert len(list(page.all("script"))) == 1
    assert not [name for node in page.all() for name in node.attributes if name.startswith("on")]
    assert "tests/<b>other</b>" in page.one(id="made-by").text


def test_nothing_is_fetched_from_anywhere(made, page):
    assert not re.search(r"(?<![\w:])(?:https?:)?//\w", made.path.read_text("utf-8").replace("\n//", ""))
    links = [node.attributes[name] for node in page.all() for name in ("src", "href") if name in node.attributes]
    assert {link[:5] for link in links if not link.startswith("#")} == {"data:"}
    ids = [node.attributes["id"] for node in page.all() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)


def test_the_policy_allows_this_script_and_no_network(page):
    policy = page.one("meta", http_equiv="Content-Security-Policy").attributes["content"].split("; ")
    digest = b64encode(hashlib.sha256(page.one("script").text.encode()).digest()).decode()
    assert policy[:2] == ["default-src 'none'", "img-src data:"]
    assert f"script-src 'sha256-{digest}'" in policy


def test_the_page_has_a_language_headings_in_order_and_a_text_for_every_picture(page):
    assert page.one("html").attributes["lang"] == "en-GB"
    levels = [int(node.name[1]) for node in page.all() if re.fullmatch("h[1-6]", node.name)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    alts = [node.attributes["alt"] for node in page.all("img")]
    assert alts[0] == "Radiology picture train_00000, CT; its original caption is next to it."
    assert len(alts) == 26
    described = {node.attributes["aria-describedby"] for node in page.all(role="img")}
    assert {node.attributes["id"] for node in page.all("figcaption")} >= described
    assert len(described) == len(reporting.BY_MODALITY) + 3


def test_it_says_what_made_the_captions_and_what_they_are_not(page):
    assert page.text.count(NOTICE) == 2
    header = page.one("header").text
    assert "b has not captioned 22 pictures of train" in header
    rows = [row for row in page.one(id="made-by").all("tr") if list(row.all("th", scope="row"))]
    facts = {row.one("th").text: [cell.text for cell in row.all("td")] for row in rows}
    assert facts["Model"] == ["tests/small", "tests/<b>other</b>"]
    assert facts["Decoding"] == ["greedy, at most 256 tokens"] * 2
    assert (facts["Captions"], facts["Missing"], facts["Split"]) == (["26", "5"], ["1", "22"], ["train"] * 2)


def test_the_scores_are_those_of_evaluate_with_intervals_differences_and_p(made, page):
    told = evaluate.to_json(evaluate.evaluate(made.database, ["a", "b"], ["train"]))
    (row,) = [row for row in page.one(id="scores").all("tr") if row.text.strip().startswith("ROUGE-L 0 to 1")]
    cells = [cell.text for cell in row.all("td")]
    low, high = told["runs"][0]["intervals"]["rouge_l"]
    assert cells[0] == f"{told['runs'][0]['metrics']['rouge_l']:.3f}{low:.3f} to {high:.3f}"
    (paired,) = told["paired"]
    assert cells[2:] == [f"{paired['differences']['rouge_l']:+.3f}", f"{paired['p']['rouge_l']:.3f}"]
    (modality,) = [body for body in page.one(id="modalities").all("tbody") if body.text.strip().startswith("CT")]
    assert f"{told['runs'][1]['by_modality']['CT']['metrics']['rouge_l']:.3f}" in modality.text


def test_flagged_and_failed_pictures_are_found_by_their_section(page):
    tags = {name: card.attributes["data-tags"].split() for name, card in cards(page).items()}
    assert [name for name, told in tags.items() if "failed" in told] == ["train_00026"]
    assert [name for name, told in tags.items() if "flagged" in told] == ["train_00002", "train_00004", "train_00016"]
    failed = cards(page)["train_00026"]
    assert captions_of(failed) == [ORIGINALS[26]]
    assert [node.text for node in failed.all(class_="why")] == [
        "Failed: not_an_image. Not a picture, <b>really</b>: replace it.",
        "Not captioned yet.",
    ]
    assert [node.text for node in cards(page)["train_00002"].all(class_="flag")] == ["loop"]


def test_a_picture_that_cannot_be_read_has_a_card_that_says_so(page):
    unreadable = cards(page)["train_00025"].one(class_="absent")
    assert unreadable.text.startswith("No picture. This is not a picture (it begins with b'not a pictur'")
    assert not list(cards(page)["train_00025"].all("img"))


def test_pictures_are_small_and_stand_in_the_page_once(page):
    sources = [node.attributes["src"] for node in page.all("img")]
    assert len(set(sources)) == len(sources)
    with Image.open(BytesIO(b64decode(sources[3].removeprefix("data:image/jpeg;base64,")))) as small:
        assert (small.format, small.size) == ("JPEG", (31, 31))


# --- Other runs and pictures -----------------------------------------------------------------------------------


@pytest.mark.every_database
def test_a_run_is_reported_on_every_database(database, run, out, no_plots):
    caption(database, run, texts(*ORIGINALS[:4]))
    made = report(database, [], "train", out)
    assert (made.path, made.captions, made.pictures, made.unreadable) == (out, 4, 4, 0)
    assert made.size == out.stat().st_size
    assert made.warnings == ["a has not captioned 23 pictures of train: the scores leave them out."]
    assert list(cards(parse(out))) == [f"train_{n:05}" for n in range(4)]


def test_a_report_of_any_pictures_is_under_10_megabytes(database, out, tmp_path, no_plots, quick):
    """Of 10 here: what 200 of the same kind take is twenty times as much, and less, since the rest is shared."""
    long = "W" * 3_000
    write_set(tmp_path / "set", [long] * 10, {n: noise(n) for n in range(10)})
    caption(database, start(database, tmp_path / "set", "a"), texts(*[long] * 10))
    made = report(database, [], "train", out)
    assert made.pictures == 10
    sources = [node.attributes["src"] for node in parse(out).all("img")]
    assert 20_000 < max(map(len, sources)) <= 4 * gallery_module.MAX_BYTES / 3 + 100
    assert 20 * made.size < 10_000_000


def test_no_more_pictures_than_were_asked_for(database, run, out, no_plots):
    caption(database, run, texts(*ORIGINALS[:20]))
    for most in (0, 1, 7):
        assert report(database, [], "train", out, pictures=most).pictures == most
        assert len(cards(parse(out))) == most


@pytest.mark.parametrize("strips", [False, True])
def test_reasoning_is_shown_unless_it_is_to_be_stripped_and_then_the_report_says_so(
    database, url, run, out, no_plots, strips
):
    caption(database, run, texts("<think>A lung?</think>\nA scan."))
    options = ["--strip-reasoning"] if strips else []
    done = steps.invoke("--db", url, "report", "--split", "train", "--output", str(out), *options)
    assert done.exit_code == 0, done.output
    page = parse(out)
    [card] = cards(page).values()
    assert captions_of(card)[1:] == ["A scan." if strips else "<think>A lung?</think>\nA scan."]
    assert ("removed from the captions" in page.text) == strips


def test_a_data_set_that_is_gone_leaves_cards_without_pictures(database, run, out, tmp_path, no_plots):
    caption(database, run, texts("A caption.", "Another."))
    shutil.rmtree(tmp_path / "set")
    made = report(database, [], "train", out)
    assert (made.pictures, made.unreadable) == (2, 2)
    why = [card.one(class_="absent").text for card in cards(parse(out)).values()]
    gone = f"{tmp_path.name}/set/data/train-00000-of-00001.parquet is gone: restore it or download it again."
    assert why == [f"No picture. {gone}"] * 2
    assert str(tmp_path) not in out.read_text("utf-8")


def test_pictures_are_read_from_where_they_are_on_this_machine(database, run, out, tmp_path, no_plots, monkeypatch):
    caption(database, run, texts("A caption.", "Another."))
    (tmp_path / "set").rename(tmp_path / "mounted")
    monkeypatch.setenv("ROCOCAP_DATASET_ROOT", str(tmp_path / "mounted"))
    assert report(database, [], "train", out).unreadable == 0


def test_a_data_set_of_the_hub_that_is_not_cached_is_not_downloaded(database, run, out, no_plots):
    caption(database, run, texts("A caption."))
    with db.transaction(database, write=True) as conn:
        db.execute(conn, "UPDATE datasets SET name = 'owner/name', revision = 'abc'")
    assert report(database, [], "train", out).unreadable == 1
    assert "hf download --repo-type dataset --revision abc owner/name" in parse(out).one(class_="absent").text


def test_a_score_that_is_not_computed_says_why(database, run, out, monkeypatch):
    monkeypatch.setattr(metrics, "open_wordnet", lambda: None)
    monkeypatch.setattr(evaluate, "METRICS", METRICS)
    caption(database, run, texts(*ORIGINALS[:4]))
    report(database, [], "train", out)
    page = parse(out)
    reasons = {node.text for node in page.one(id="scores").all(class_="reason")}
    assert {one for one in reasons if "WordNet" in one} == {
        f"not computed: WordNet is not installed. {metrics.WORDNET_COMMAND}"
    }
    assert reasons - {f"not computed: {evaluate.NO_FACTS}"} == {one for one in reasons if "WordNet" in one}
    assert "METEOR (nltk) by modality" not in [node.text for node in page.one(id="plots").all("h3")]


def test_what_became_what_is_counted_by_modality(database, out, tmp_path, quick, no_plots):
    originals = [
        "CT, left lung.",
        "X-ray, fracture.",
        "Ultrasound.",
        "CT, left kidney.",
        "X-ray, fracture.",
        "Ultrasound.",
        "CT, left arm.",
    ]
    write_set(tmp_path / "set", originals)
    runs = [start(database, tmp_path / "set", name) for name in "ab"]
    caption(
        database,
        runs[0],
        texts("CT, right lung.", "MRI, no fracture.", "Ultrasound.", "MRI, right kidney.", "X-ray, fracture."),
    )
    caption(
        database, runs[1], texts("CT, left lung.", "X-ray, fracture.", "Ultrasound.", "CT, right kidney."), now=2_000
    )
    report(database, ["a", "b"], "train", out)
    facts = parse(out).one(id="facts")
    tables = list(facts.all("table"))
    (side,) = (group for group in tables[0].all("tbody") if group.one("th").text == "side")
    assert [[cell.text for cell in row.all("td")][1:] for row in side.all("tr")] == [
        ["2", "0", "0", "0", "2"],
        ["2", "1", "0", "0", "1"],
    ]
    confusions = [
        [group.one("th").text, *([cell.text for cell in row.all("td")] for row in group.all("tr"))]
        for group in tables[1].all("tbody")
    ]
    assert confusions == [
        ["CT", ["side", "left", "right", "2of 2", "1of 2"], ["modality", "CT", "MRI", "1of 2", "0of 2"]],
        [
            "X-ray",
            ["modality", "X-ray", "MRI", "1of 2", "0of 1"],
            ["negation", "fracture", "no fracture", "1of 2", "0of 1"],
        ],
    ]


def test_without_originals_there_is_no_table_of_facts(database, out, tmp_path, quick, no_plots):
    write_set(tmp_path / "set", ["", "", ""])
    caption(database, start(database, tmp_path / "set", "a"), texts("CT, right lung."))
    report(database, [], "train", out)
    assert list(parse(out).all(id="facts")) == []


@pytest.mark.every_database
def test_captions_that_were_made_while_the_clock_ran_ahead_are_drawn_by_their_time(database, run):
    with db.transaction(database) as conn:
        future = db.now(conn) + 7_200_000
    caption(database, run, texts("one", "two"), now=future)
    (found,) = evaluate.evaluate(database, [run.name], ["train"]).scored
    _, made_at = reporting._times(database, found)
    assert made_at.tolist() == [future, future]


def test_captions_whose_time_is_not_known_are_said_not_to_be_drawn(database, run, out):
    caption(database, run, texts(*ORIGINALS[:4]))
    with db.transaction(database, write=True) as conn:
        db.execute(conn, "UPDATE captions SET processing_ms = NULL")
    report(database, [], "train", out)
    page = parse(out)
    assert page.one(id="durations-description").text == "Not drawn: a (their times are unknown)."
    assert page.one(id="throughput-description").text == "Not drawn: a (all captions have the same time)."


def test_nothing_is_computed_twice(database, run, out, monkeypatch, no_plots):
    caption(database, run, texts(*ORIGINALS[:4]))
    calls = []
    summarise = evaluate.summarise
    monkeypatch.setattr(evaluate, "summarise", lambda *given: calls.append(given[1:]) or summarise(*given))
    report(database, [], "train", out)
    assert sorted(calls) == [(), ("CT",), ("X-ray",), ("ultrasound",)]


def test_only_pictures_that_are_shown_are_read_one_after_the_other(database, run, out, monkeypatch, no_plots):
    caption(database, run, texts(*ORIGINALS[:20]))
    read = []
    thumbnail = gallery_module._thumbnail
    monkeypatch.setattr(
        gallery_module, "_thumbnail", lambda reader, place, *more: read.append(place) or thumbnail(reader, place, *more)
    )
    report(database, [], "train", out, pictures=6)
    assert len(read) == 6
    assert read == sorted(read, key=lambda place: (place.row_group, place.row_in_group))


def test_a_report_that_breaks_off_leaves_the_old_one_whole(database, run, out, no_plots):
    caption(database, run, texts(*ORIGINALS[:4]))
    report(database, [], "train", out)
    before = out.read_bytes()

    def break_off(what: str, done: int, total: int) -> None:
        if (what, done) == ("reading pictures", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report(database, [], "train", out, progress=break_off)
    assert (out.read_bytes(), list(out.parent.iterdir())) == (before, [out])


def test_folders_are_told_by_their_last_two_names(database, out, tmp_path, no_plots, quick):
    """Also in warnings and in what a worker said of a picture, and where a name has a blank."""
    model = tmp_path / "my models" / "mine"
    write_set(tmp_path / "set", ORIGINALS[:3])
    model.mkdir(parents=True)
    (model / evaluate.TRAINING).write_text(json.dumps({"dataset": str(tmp_path / "set"), "splits": ["train"]}))
    run = start(database, tmp_path / "set", "a", str(model))
    caption(database, run, texts("A."))
    fail(database, run, "unreadable_file", f"{tmp_path}/set/a b.png cannot be read (Is a directory): check the file.")
    fail(database, run, "vllm", "Cannot open '/somebody/elses/cache/file.bin', see https://example.org/a/b/c")
    report(database, [], "train", out)
    told = parse(out).text
    assert "Warning. my models/mine was trained on train" in told
    assert f"unreadable_file. {tmp_path.name}/set/a b.png cannot be read (Is a directory)" in told
    assert "Cannot open 'cache/file.bin', see https://example.org/a/b/c" in told
    assert str(tmp_path) not in out.read_text("utf-8")


# --- Which pictures are shown ----------------------------------------------------------------------------------


def scored(run: str, scores: dict[str, float], flagged: Sequence[str] = ()) -> Scored:
    pairs = [
        evaluate.Pair(n, name, "one", "", "another", "loop" if name in flagged else "") for n, name in enumerate(scores)
    ]
    values = dict.fromkeys(("cider_d", "rouge_l"), np.array(list(scores.values())))
    made_by = Run(1, run, 1, "", "", Recipe(), None, 5, False)
    return Scored(pairs, {}, values, run=made_by, split="train", modalities=[])


def test_best_and_worst_are_the_first_runs_and_among_equals_go_by_id():
    evaluated = Evaluation(
        [scored("a", dict(zip("dcba", (5.0, 1.0, 5.0, 1.0), strict=True))), scored("b", {"a": 9.0})], []
    )
    gallery = choose(evaluated, {}, 10)
    assert {name: tags[0] for name, tags in gallery.tags.items() if tags[0] != "random"} == {"b": "best", "c": "worst"}
    assert gallery.of == {"best": 4, "worst": 4, "random": 4, "flagged": 0, "failed": 0}


def test_a_caption_that_equals_the_original_is_none_of_the_worst():
    one = scored("a", dict.fromkeys("abcdefgh", 10.0))
    one.pairs[2:] = [replace(pair, text=pair.reference) for pair in one.pairs[2:]]
    gallery = choose(Evaluation([one], []), {}, 40)
    assert {name for name, tags in gallery.tags.items() if "worst" in tags} == {"a", "b"}


def by_section(gallery: Gallery) -> dict[str, set[str]]:
    return {one: {name for name, tags in gallery.tags.items() if one in tags} for one in gallery_module.SECTIONS}


def test_each_section_has_a_fifth_and_chance_the_rest_the_same_whenever_it_is_drawn():
    scores = {f"{n:03}": float(n) for n in range(400)}
    failures = {"a": [Failed("a", "train", f"f{n}", "x", "", 1) for n in range(90)]}
    evaluated = Evaluation([scored("a", scores, flagged=["007", "399"])], [])
    gallery = choose(evaluated, failures, 100)
    sections = by_section(gallery)
    assert {one: len(names) for one, names in sections.items() if one != "random"} == {
        "best": 20,
        "worst": 20,
        "flagged": 2,
        "failed": 20,
    }
    assert len(gallery.tags) == 100
    assert sections["best"] == {f"{n:03}" for n in range(380, 400)}
    assert sections["worst"] == {f"{n:03}" for n in range(20)}
    assert gallery.tags["399"][0] == "best"
    assert "flagged" in gallery.tags["399"]
    assert choose(evaluated, failures, 100) == gallery


def test_the_pictures_at_random_are_drawn_without_regard_to_the_other_sections():
    names = [f"{n:02}" for n in range(40)]
    gallery = choose(Evaluation([scored("a", dict(zip(names, np.arange(40.0), strict=True)))], []), {}, 20)
    at_random = by_section(gallery)["random"]
    assert at_random == set(random.Random(evaluate.SEED).sample(names, 40)[: len(at_random)])
    assert 4 <= len(at_random) < len(gallery.tags) == 20


@pytest.mark.parametrize(("n", "few"), [(1, 0), (2, 1), (3, 1), (4, 1), (9, 2), (40, 4)])
def test_best_and_worst_never_overlap_though_the_first_run_has_few_captions(n, few):
    scores = {f"{number:02}": float(number) for number in range(40)}
    runs = [scored("a", dict(list(scores.items())[:n])), scored("b", scores)]
    sections = by_section(choose(Evaluation(runs, []), {}, 20))
    assert [len(sections["best"]), len(sections["worst"])] == [few, few]
    assert not sections["best"] & sections["worst"]


def test_a_card_is_in_every_section_that_its_picture_belongs_to():
    names = [f"{n:02}" for n in range(20)]
    failures = {"b": [Failed("b", "train", name, "x", "", 1) for name in names[:15]]}
    evaluated = Evaluation([scored("a", dict.fromkeys(names, 1.0), flagged=names[:11])], [])
    sections = by_section(choose(evaluated, failures, 20))
    assert sections["flagged"] == set(names[:11])
    assert sections["failed"] == set(names[:15])


# --- Plots -----------------------------------------------------------------------------------------------------


def test_plots_take_the_colours_of_the_page_and_share_no_id():
    numbers = np.array([3.0, 5.0, 5.0, 9.0])
    drawn = plots.lengths([Series("originals", None, numbers), *(Series(f"r{n}", n, numbers + n) for n in range(8))])
    assert drawn.runs == tuple(range(8))
    assert not re.search(r"#[0-9a-f]{6}\b", drawn.svg)
    assert {"currentColor", "var(--soft)", "var(--run-0)", "var(--run-5)"} <= set(
        re.findall(r"(?:var\(.*?\)|currentColor)", drawn.svg)
    )
    assert all(id.startswith("lengths-") for id in re.findall(r' id="(.*?)"', drawn.svg))
    assert "xmlns" not in drawn.svg
    assert drawn.description.startswith("Words. originals: median 5, 95 % between 3.15 and 8.7; r0: median 5")


@pytest.mark.parametrize("numbers", [[0.02], [120.0, 120.0], [1.0, 90_000.0], [0.0, np.nan, 4.0], [4_000.0, 5_200.0]])
def test_durations_of_any_size_are_drawn(numbers):
    drawn = plots.durations([Series("a", 0, np.array(numbers))])
    assert drawn.runs == (0,)
    assert drawn.svg.count("</text>") >= 2


@pytest.mark.parametrize(("low", "high"), [(1_050, 1_300), (6_200, 7_800), (2_100, 2_800), (100, 100)])
def test_the_axis_of_times_has_numbers_however_close_they_are(low, high):
    drawn = plots.durations([Series("a", 0, np.linspace(low, high, 200))])
    assert drawn.svg.count('id="durations-xtick_') >= 2


def test_the_rate_is_captions_by_the_minutes_since_the_first():
    drawn = plots.throughput([Series("a", 0, np.array([0.0, 60_000.0, 120_000.0, 240_000.0]) + 1e12)])
    assert drawn.description == "a: 4 captions, 1 per minute on average."
    assert "minutes since the run&#39;s" in drawn.svg or "minutes since the run's" in drawn.svg


# --- The command -----------------------------------------------------------------------------------------------


@pytest.fixture
def here(database: Engine, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROCOCAP_DB", database.url.render_as_string(hide_password=False))
    return tmp_path


def invoke(*args: str) -> Any:
    return steps.invoke("report", "--split", "train", *args)


def test_the_command_says_where_the_report_is_and_what_it_lacks(database, run, here, no_plots):
    caption(database, run, texts(*ORIGINALS[:4]))
    shutil.rmtree(here / "set")
    result = invoke("--pictures", "3")
    size = (here / "results_medical" / "report_train_a.html").stat().st_size / 1e6
    assert result.stdout == (
        f"results_medical/report_train_a.html: 4 captions, 3 pictures shown, {size:.1f} MB\n"
        "  3 of the pictures could not be read: their cards give the reason\n"
    )
    assert result.stderr == "Warning: a has not captioned 23 pictures of train: the scores leave them out.\n"


def test_what_cannot_be_reported_is_refused_with_the_next_step(database, run, here, no_plots):
    result = invoke()
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: Run 'a' captioned nothing of train yet. Caption pictures: rococap worker --run a\n"
    with pytest.raises(RunError, match="There is no run 'x'"):
        report(database, ["x"], "train")
    with pytest.raises(RococapError, match=r"is a folder: name a file with --output, such as .*/report\.html"):
        report(database, [], "train", here)
    assert not (here / "results_medical").exists()
    assert steps.invoke("report").exit_code == 2


def test_a_report_imports_no_model_library(made):
    assert "matplotlib.figure" in made.imported
    assert not {"torch", "torchvision", "transformers"} & made.imported


# --- In a browser ----------------------------------------------------------------------------------------------


def listen(page: Any) -> list[str]:
    """To whatever a page complains of or asks for, but itself and the pictures in it."""
    trouble: list[str] = []

    def add(what: str) -> None:
        if not what.startswith(("file:///", "data:image/jpeg")):
            trouble.append(what[:200])

    page.on("console", lambda message: add(message.text))
    page.on("pageerror", lambda error: add(str(error)))
    page.on("dialog", lambda dialog: add(dialog.message))
    page.on("request", lambda request: add(request.url))
    return trouble


@pytest.fixture(scope="module")
def tab(browser: Any) -> tuple[Any, list[str]]:
    page = browser.new_page()
    return page, listen(page)


@pytest.fixture
def opened(tab: tuple[Any, list[str]], made: Made) -> Iterator[Any]:
    """The report, afresh, on a wide and light screen; what it complains of or asks for ends the test."""
    page, trouble = tab
    trouble.clear()
    page.set_viewport_size({"width": 1200, "height": 900})
    page.emulate_media(media="screen", color_scheme="light")
    page.goto(made.path.as_uri())
    yield page
    assert trouble == []


def shown(page: Any) -> list[str]:
    return page.locator(".card:visible").evaluate_all("cards => cards.map(card => card.dataset.number)")


def test_it_opens_from_disk_with_every_picture_and_a_text_for_each(opened):
    page = opened
    images = page.locator("img").evaluate_all("images => images.map(image => [image.naturalWidth, image.alt])")
    assert len(images) == 26
    assert all(width > 0 and alt for width, alt in images)
    assert page.locator("#count").inner_text() == "27 of 27 pictures"


def test_filters_show_what_they_say_and_give_back_all(opened):
    page = opened
    page.locator("[name=modality]").select_option("X-ray")
    assert shown(page) == [str(n) for n in range(1, 27, 3)]
    assert page.locator("#count").inner_text() == "9 of 27 pictures"
    page.get_by_label("flagged").check()
    assert shown(page) == ["4", "16"]
    page.locator("[name=modality]").select_option("all")
    page.get_by_label("failed").check()
    assert shown(page) == ["26"]
    page.locator("[name=order]").select_option("worst")
    page.get_by_role("button", name="Show all").click()
    page.locator("#count", has_text="27 of 27").wait_for()
    assert shown(page) == [str(n) for n in range(27)]


def test_cards_are_sorted_by_the_mean_of_the_scores_those_without_last(opened):
    page = opened
    mean = dict(page.locator(".card").evaluate_all("cards => cards.map(({dataset}) => [dataset.number, dataset.mean])"))
    for order, sign in (("best", -1), ("worst", 1)):
        page.locator("[name=order]").select_option(order)
        *numbers, last = shown(page)
        assert last == "26"
        assert numbers == sorted(numbers, key=lambda number: (sign * float(mean[number]), int(number)))


def test_cards_are_sorted_by_the_facts_in_which_runs_differ_those_of_one_run_last(opened):
    page = opened
    page.locator("[name=order]").select_option("facts")
    facts = dict(
        page.locator(".card").evaluate_all("cards => cards.map(({dataset}) => [dataset.number, dataset.facts])")
    )
    of_both = [number for number in shown(page) if facts[number]]
    assert shown(page)[: len(of_both)] == of_both
    assert set(of_both) == {"0", "1", "3", "4"}  # "la la la" is no English
    assert of_both == sorted(of_both, key=lambda number: (-float(facts[number]), int(number)))
    assert float(facts["3"]) > float(facts["0"]) == 0


def test_the_keyboard_reaches_every_control_and_works_the_filters(opened):
    page = opened
    controls = page.evaluate(
        "[...document.querySelectorAll('a, select, button, [tabindex=\\'0\\'], input:checked')].length"
    )
    seen = []
    for _ in range(controls):
        page.keyboard.press("Tab")
        focused, *ring = page.evaluate(
            "[document.activeElement.outerHTML.slice(0, 80), ...[document.activeElement, "
            "document.activeElement.parentElement].map(one => getComputedStyle(one).outlineStyle)]"
        )
        seen.append(focused)
        assert "solid" in ring
    assert len(set(seen)) == controls
    page.get_by_label("all 27").focus()
    page.keyboard.press("ArrowLeft")
    assert shown(page) == ["26"]
    page.keyboard.press("Tab")
    page.keyboard.type("CT")
    assert shown(page) == []
    assert page.locator("#count").inner_text() == "0 of 27 pictures"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowLeft")
    assert shown(page) == []
    page.keyboard.press("ArrowLeft")
    assert "0" in shown(page)


CONTRASTS = """() => {
  const rgb = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((one) => one / 255)
    .map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4))
    .reduce((sum, one, at) => sum + one * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = (node) => {
    for (let one = node; one; one = one.parentElement) {
      const colour = rgb(getComputedStyle(one).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const texts = [...document.querySelectorAll("body *")].filter((node) =>
    node.checkVisibility() && [...node.childNodes].some((one) => one.nodeType === 3 && one.data.trim()));
  return texts.map((node) => {
    const style = getComputedStyle(node);
    const colour = node.ownerSVGElement && style.fill !== "none" ? style.fill : style.color;
    const [one, other] = [light(rgb(colour)), light(behind(node))].sort((a, b) => b - a);
    return [(one + 0.05) / (other + 0.05), node.tagName, node.textContent.slice(0, 40)];
  });
}"""


def test_light_and_dark_differ_and_both_can_be_read(opened):
    page, pictures = opened, {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        pictures[scheme] = page.screenshot()
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 300
        assert min(contrasts)[0] >= 4.5, min(contrasts)
    assert pictures["light"] != pictures["dark"]


def test_nothing_is_wider_than_a_narrow_screen_but_tables_in_their_frames(opened):
    page = opened
    page.set_viewport_size({"width": 360, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.mouse.wheel(500, 0)
    assert page.evaluate("scrollX") == 0
    wide = page.evaluate(
        "[...document.querySelectorAll('main *')].filter(one => !one.closest('.scroll') && !one.closest('svg') && "
        "one.checkVisibility() && (one.getBoundingClientRect().right > 360 || one.clientWidth && "
        "one.scrollWidth > one.clientWidth + 1)).map(one => one.outerHTML.slice(0, 80))"
    )
    assert wide == []


def test_without_scripts_everything_is_shown(browser, made):
    page = browser.new_page(java_script_enabled=False)
    trouble = listen(page)
    page.goto(made.path.as_uri())
    assert len(shown(page)) == 27
    assert not page.locator("#filters").is_visible()
    page.close()
    assert trouble == []


def test_on_paper_every_card_is_dark_on_white_and_there_are_no_controls(opened):
    page = opened
    page.emulate_media(media="print", color_scheme="dark")
    assert min(page.evaluate(CONTRASTS))[0] >= 4.5
    assert not page.locator("#filters").is_visible()
    assert len(shown(page)) == 27
    assert page.pdf()[:4] == b"%PDF"
