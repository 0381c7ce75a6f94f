"""Near-duplicate pictures: found across splits whatever was done to the copy, hashed once, and left out of scores."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import steps
from PIL import Image
from samples import caption, register, texts, write_shard
from sqlalchemy import Engine

from rococap import db, queue
from rococap.demo import phantoms
from rococap.errors import RococapError
from rococap.queue import Run
from rococap.scores import evaluate, leaks, report

needs_imagehash = pytest.mark.skipif(find_spec("imagehash") is None, reason="needs ImageHash")


def as_png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def as_jpeg(image: Image.Image, quality: int) -> bytes:
    file = BytesIO()
    image.convert("L").save(file, "JPEG", quality=quality)
    return file.getvalue()


def scaled(image: Image.Image, factor: float) -> Image.Image:
    width, height = image.size
    return image.resize((round(width * factor), round(height * factor)), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def drawings() -> list[Image.Image]:
    return [phantoms.draw(seed).image for seed in range(40)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "set"


def write(root: Path, **splits: list[bytes]) -> None:
    for split, pictures in splits.items():
        write_shard(root, split, range(len(pictures)), pictures=dict(enumerate(pictures)))


def run_of(database: Engine, root: Path, *splits: str, name: str = "default", **options: Any) -> Run:
    register(database, root, splits, run=name, **options)
    with db.transaction(database) as conn:
        return queue.get_run(conn, name)


def kept_hashes(database: Engine) -> list[tuple[int, str, str]]:
    with db.transaction(database) as conn:
        return [tuple(row) for row in db.execute(conn, "SELECT * FROM image_hashes ORDER BY image_id")]


def ids_of(found: leaks.Leaks) -> list[tuple[str, str]]:
    return [pair.image_ids for pair in found.pairs]


# --- pairs -----------------------------------------------------------------------------------------------------


@needs_imagehash
@pytest.mark.every_database
def test_copies_are_found_across_splits_even_if_they_were_scaled_or_compressed(database, root, drawings):
    a, b, c, d, e, f, g = drawings[:7]
    write(
        root,
        train=[as_png(a), as_png(b), as_png(c), as_png(d), as_png(e), as_png(e)],
        validation=[as_jpeg(scaled(d, 2.5), 60), as_png(g), as_png(g)],
        test=[as_png(f), as_png(a), as_jpeg(b, 40), as_png(scaled(c, 0.5))],
    )
    run_of(database, root, "train", "validation", "test")
    [found] = leaks.find(database)
    assert sorted(ids_of(found)) == [
        ("train_00000", "test_00001"),
        ("train_00001", "test_00002"),
        ("train_00002", "test_00003"),
        ("train_00003", "validation_00000"),
    ]
    assert {pair.splits for pair in found.pairs} == {("train", "test"), ("train", "validation")}
    assert [pair.distance for pair in found.pairs if pair.image_ids == ("train_00000", "test_00001")] == [0]
    assert (found.hashed, found.new) == ({"train": 6, "validation": 3, "test": 4}, 13)
    assert (found.dataset, found.revision, found.unreadable) == (str(root), "", [])


@needs_imagehash
def test_different_drawings_are_no_pairs(database, root, drawings):
    write(root, train=list(map(as_png, drawings[:20])), test=list(map(as_png, drawings[20:])))
    run_of(database, root, "train", "test")
    assert leaks.find(database)[0].pairs == []


@needs_imagehash
def test_pictures_of_several_formats_of_one_real_scan_are_one_picture():
    scan = Image.open(Path(__file__).parents[1] / "pictures" / "CT_small.png")
    one, *others = leaks.words_of(
        [leaks.hash_of(data) for data in (as_png(scan), as_jpeg(scan, 75), as_png(scaled(scan, 3)))]
    )
    assert all(int(np.bitwise_count(one ^ other).sum()) <= leaks.DISTANCE for other in others)


@needs_imagehash
def test_pictures_that_are_nearly_black_are_not_all_alike():
    def black_with_a_spot(x: int) -> bytes:
        picture = Image.new("L", (340, 340))
        picture.paste(255, (x, 100, x + 12, 112))
        return as_png(picture)

    one, same, other = (leaks.words_of([leaks.hash_of(black_with_a_spot(x))]) for x in (100, 100, 180))
    assert leaks._close(one, same) == [(0, 0, 0)]
    assert leaks._close(one, other) == []
    assert 0 < int(np.bitwise_count(one ^ other).sum()) <= leaks.DISTANCE


@pytest.mark.parametrize("block", [(3, 5), (128, 4_096)])
def test_hashes_are_compared_in_blocks_as_one_by_one(monkeypatch, block):
    monkeypatch.setattr(leaks, "BLOCK", block)
    rng = np.random.default_rng(5)
    ours = rng.integers(0, 2**64, (40, leaks.WORDS), np.uint64)
    theirs = rng.integers(0, 2**64, (60, leaks.WORDS), np.uint64)
    for row, bits in enumerate([0, 1, leaks.DISTANCE - 1, leaks.DISTANCE, leaks.DISTANCE + 1]):
        changed = rng.permutation(leaks.BITS)[:bits]
        theirs[10 * row] = ours[7 * row]
        for bit in changed:
            theirs[10 * row, bit // 64] ^= np.uint64(1 << int(bit % 64))
    one_by_one = [
        (at, to, distance)
        for at, one in enumerate(ours)
        for to, other in enumerate(theirs)
        if (distance := int(np.bitwise_count(one ^ other).sum())) <= leaks.DISTANCE
    ]
    assert sorted(leaks._close(ours, theirs)) == one_by_one
    assert [distance for _, _, distance in one_by_one] == [0, 1, leaks.DISTANCE - 1, leaks.DISTANCE]


# --- hashing ---------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from rococap import db
from rococap.scores import leaks

leaks.PAGE = 2

def kill(what, done, total):
    if done == 4:
        os.kill(os.getpid(), signal.SIGKILL)

leaks.find(db.connect(sys.argv[1]), kill)
"""


@needs_imagehash
def test_a_killed_search_goes_on_where_it_was(database, url, root, drawings, monkeypatch):
    pictures = list(map(as_png, drawings[:5]))
    write(root, train=pictures, test=pictures[:2])
    run_of(database, root, "train", "test")
    done = subprocess.run([sys.executable, "-c", KILLED, url], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    before = kept_hashes(database)
    assert len(before) == 4
    told = []
    [found] = leaks.find(database, lambda *step: told.append(step))
    assert (found.hashed, found.new) == ({"train": 5, "test": 2}, 3)
    assert told == [(f"{root}: hashing", 3, 3)]
    assert kept_hashes(database)[:4] == before
    assert ids_of(found) == [("train_00000", "test_00000"), ("train_00001", "test_00001")]

    def hashed_again(data: bytes, frame: int) -> str:
        raise AssertionError

    monkeypatch.setattr(leaks, "hash_of", hashed_again)
    [again] = leaks.find(database)
    assert (again.new, again.pairs) == (0, found.pairs)


@needs_imagehash
@pytest.mark.every_database
def test_of_files_that_hold_several_frames_those_that_runs_caption_are_hashed(database, root, drawings, monkeypatch):
    monkeypatch.setattr(leaks, "ROWS_PER_READ", 1)
    a, b, c = drawings[:3]
    file = BytesIO()
    a.copy().save(file, "TIFF", save_all=True, append_images=[b.copy()])
    write(root, train=[file.getvalue(), as_png(c)], test=[as_png(b), as_png(c)])
    first = run_of(database, root, "train", "test")
    [found] = leaks.find(database)
    assert ids_of(found) == [("train_00001", "test_00001")]

    second = run_of(database, root, "train", name="second", limit=1, recipe=replace(first.recipe, frame=2))
    assert leaks.known(database, second, ["train"]) == {}
    [found] = leaks.find(database)
    assert (found.hashed, found.new) == ({"train": 2, "test": 2}, 1)
    assert ids_of(found) == [("train_00000", "test_00000"), ("train_00001", "test_00001")]
    assert leaks.known(database, first, ["train"])["train"].near == {"train_00001"}
    assert leaks.known(database, second, ["train"])["train"] == leaks.Known(*[frozenset({"train_00000"})] * 2)
    assert leaks.known(database, first, ["test"])["test"].near == {"test_00000", "test_00001"}


@needs_imagehash
def test_pictures_that_cannot_be_read_are_told_and_tried_again(database, root, drawings):
    write(root, train=[as_png(drawings[0]), b"", as_png(drawings[1]), b"no picture"], test=[as_png(drawings[1])])
    run_of(database, root, "train", "test")
    for new in (3, 0):
        [found] = leaks.find(database)
        assert (found.hashed, found.new) == ({"train": 2, "test": 1}, new)
        assert [(one.split, one.image_id) for one in found.unreadable] == [
            ("train", "train_00001"),
            ("train", "train_00003"),
        ]
        assert "zero bytes" in found.unreadable[0].reason
    assert ids_of(found) == [("train_00002", "test_00000")]


@needs_imagehash
@pytest.mark.every_database
def test_only_what_a_run_was_given_is_hashed_and_once_for_all_runs(database, root, drawings, monkeypatch):
    monkeypatch.setattr(leaks, "PAGE", 2)
    write(root, train=list(map(as_png, drawings[:8])))
    run_of(database, root, "train", limit=3)
    run_of(database, root, "train", name="other", offset=2, limit=3)
    run_of(database, root, "train", name="deleted", offset=6)
    with db.transaction(database, write=True) as conn:
        queue.delete_run(conn, queue.get_run(conn, "deleted"))
    [found] = leaks.find(database)
    assert (found.hashed, found.new) == ({"train": 5}, 5)
    assert [row[:2] for row in kept_hashes(database)] == [(n, leaks.ALGORITHM) for n in range(1, 6)]


def test_a_page_of_pictures_to_hash_neither_scans_nor_sorts_the_data_set(database, root):
    write_shard(root, "train", range(3))
    run = run_of(database, root, "train")
    with db.transaction(database) as conn:
        sql = f"EXPLAIN QUERY PLAN SELECT i.id FROM images i WHERE {leaks._condition([run])} AND i.id > 0 ORDER BY i.id"
        plan = [row[3] for row in db.execute(conn, sql, leaks._values([run]))]
    assert plan[0] == "SEARCH i USING INTEGER PRIMARY KEY (rowid>?)"
    assert not [step for step in plan if step.startswith("SCAN") or "TEMP B-TREE" in step]


@needs_imagehash
def test_data_sets_are_not_compared_with_one_another(database, root, drawings):
    other = root.with_name("other")
    write(root, train=[as_png(drawings[0])])
    write(other, test=[as_png(drawings[0])])
    run_of(database, root, "train")
    run_of(database, other, "test", name="other")
    found = leaks.find(database)
    assert [(one.dataset, one.pairs) for one in found] == [(str(root), []), (str(other), [])]


def test_without_the_library_the_extra_is_named(database, root, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    write_shard(root, "train", range(2))
    run_of(database, root, "train")
    with pytest.raises(RococapError, match=r"needs ImageHash \(.*\): pip install 'rococap\[leaks\]'"):
        leaks.find(database)


# --- the command -----------------------------------------------------------------------------------------------


def doctor(url: str, *options: str):
    return steps.invoke("--db", url, "doctor", *options)


@needs_imagehash
def test_the_command_lists_the_pairs_and_exits_with_1_if_there_are_any(database, url, root, drawings):
    write(root, train=[as_png(drawings[0]), as_png(drawings[1]), b""])
    run_of(database, root, "train")
    alone = doctor(url, "--leaks")
    assert (alone.exit_code, alone.stdout) == (
        0,
        f"{root}: pictures with a hash: 2 of train; 2 of them new\n"
        "  1 picture cannot be read:\n"
        "  train train_00002: The picture has zero bytes: replace it at its source, then retry.\n"
        "  There is no other split to compare with: enqueue one, then run this again.\n",
    )
    write(root, test=[as_png(drawings[2]), as_png(drawings[1])])
    run_of(database, root, "train", "test")
    both = doctor(url, "--leaks")
    assert (both.exit_code, both.stdout.splitlines()[-2:]) == (
        1,
        [
            "  Near-duplicates in different splits: 1",
            "  train train_00001 = test test_00001 (0 bits differ)",
        ],
    )
    as_json = doctor(url, "--leaks", "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout) == {
        "algorithm": "dhash-16",
        "bits": 512,
        "distance": leaks.DISTANCE,
        "datasets": [
            {
                "dataset": str(root),
                "revision": "",
                "hashed": {"train": 2, "test": 2},
                "new": 0,
                "unreadable": [
                    {
                        "split": "train",
                        "image_id": "train_00002",
                        "reason": "The picture has zero bytes: replace it at its source, then retry.",
                    }
                ],
                "pairs": [
                    {"splits": ["train", "test"], "image_ids": ["train_00001", "test_00001"], "distance": 0},
                ],
            }
        ],
    }


def test_doctor_without_the_option_hashes_nothing(database, url, root):
    write_shard(root, "train", range(2))
    run_of(database, root, "train")
    checks = json.loads(doctor(url, "--json").stdout)
    assert "leaks" not in [check["name"] for check in checks]
    assert kept_hashes(database) == []


def test_without_a_run_there_is_nothing_to_look_at(database, url):
    refused = doctor(url, "--leaks")
    assert refused.exit_code == 1
    assert "There is no run yet. Register pictures first: rococap" in refused.stderr


# --- scores ----------------------------------------------------------------------------------------------------

ORIGINALS = [
    "CT of the chest with a mass in the left lung.",
    "MRI of the brain showing a lesion (arrow).",
    "Chest X-ray, PA view, of a man with pneumonia.",
    "Ultrasound of the liver with a stone.",
    "CT of the abdomen: a cyst in the right kidney.",
]
CAPTIONS = [*ORIGINALS[:2], "Chest X-ray of a man.", "Ultrasound of a kidney.", "nothing"]


@pytest.fixture
def scored(database: Engine, root: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run with five captions of train, of which the first two are right, and one picture of test."""
    monkeypatch.setattr(evaluate.metrics, "open_wordnet", lambda: None)
    write_shard(root, "train", range(5), captions=dict(enumerate(ORIGINALS)))
    write_shard(root, "test", range(1))
    run = run_of(database, root, "train", "test")
    caption(database, run, texts(*CAPTIONS))
    return run


def keep(database: Engine, **hashes: int) -> None:
    """Stores the hashes of pictures, by image_id."""
    with db.transaction(database, write=True) as conn:
        for image_id, value in hashes.items():
            [number] = db.execute(conn, "SELECT id FROM images WHERE image_id = ?", (image_id,)).one()
            row = (number, leaks.ALGORITHM, f"{value:0{leaks.BITS // 4}x}")
            db.execute(conn, "INSERT INTO image_hashes VALUES (?, ?, ?)", row)


HASH = int("a5" * (leaks.BITS // 8), 16)
NEAR = HASH ^ ((1 << leaks.DISTANCE) - 1)
FAR = HASH ^ ((1 << leaks.BITS) - 1)


def of_train(database: Engine, *names: str) -> dict:
    return evaluate.to_json(evaluate.evaluate(database, names, ["train"]))["runs"][0]


def test_scores_without_near_duplicates_are_unknown_until_two_splits_are_hashed(database, scored):
    assert of_train(database)["without_near_duplicates"] is None
    keep(database, train_00000=HASH)
    assert of_train(database)["without_near_duplicates"] is None
    keep(database, test_00000=FAR)
    found = of_train(database)
    assert found["without_near_duplicates"] == {
        "n": 5,
        "left_out": 0,
        "not_hashed": 4,
        "metrics": found["metrics"],
        "intervals": found["intervals"],
    }


@pytest.mark.every_database
def test_scores_without_near_duplicates_are_those_of_the_other_pictures_alone(database, root, scored):
    keep(database, train_00000=HASH, train_00001=NEAR, train_00002=FAR, train_00003=FAR, test_00000=HASH)
    found = of_train(database)
    without = found["without_near_duplicates"]
    others = run_of(database, root, "train", "test", name="others")
    caption(database, others, texts(*CAPTIONS[2:]), skip=2)
    expected = of_train(database, "others")
    assert (without["n"], without["left_out"], without["not_hashed"]) == (3, 2, 1)
    assert without["metrics"] == expected["metrics"]
    assert without["intervals"] == expected["intervals"]
    assert without["metrics"]["bleu_1"] < found["metrics"]["bleu_1"]
    assert without["metrics"]["cider_d"] != found["metrics"]["cider_d"]


def test_where_every_picture_has_a_near_duplicate_no_score_is_left(database, scored):
    keep(database, test_00000=HASH, **{f"train_{n:05}": HASH for n in range(5)})
    assert of_train(database)["without_near_duplicates"] == {
        "n": 0,
        "left_out": 5,
        "not_hashed": 0,
        "metrics": {},
        "intervals": {},
    }


def test_evaluate_shows_the_scores_without_near_duplicates_beside_the_others(database, url, scored, tmp_path):
    command = ("--db", url, "evaluate", "--split", "train", "--output", str(tmp_path / "scores.csv"))
    assert "near-duplicate" not in steps.invoke(*command).stdout
    keep(database, train_00000=FAR, test_00000=HASH)
    assert "No picture is known to have a near-duplicate in another split." in steps.invoke(*command).stdout
    keep(database, train_00001=NEAR)
    told = steps.invoke(*command).stdout
    heading = "Without captions whose picture has a near-duplicate in another split (1 of\ndefault):\nscore"
    assert heading in told
    without = json.loads((tmp_path / "scores.json").read_text())["runs"][0]["without_near_duplicates"]
    [line] = [line for line in told.split(heading)[1].splitlines() if line.startswith("bleu_1 ")]
    assert line.split() == ["bleu_1", f"{without['metrics']['bleu_1']:.3f}"]


def test_a_report_shows_the_scores_without_near_duplicates_beside_the_others(database, scored, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_plots", lambda *_: [])

    def made() -> str:
        report.report(database, [], "train", tmp_path / "report.html", pictures=0)
        return " ".join((tmp_path / "report.html").read_text().split())

    assert "near-duplicates" not in made()
    keep(database, train_00000=FAR, train_00001=NEAR, test_00000=HASH)
    told, scores = made(), of_train(database)
    assert "default</span> without near-duplicates</th>" in told
    assert "in another split too, exactly or nearly (1 of default)" in told
    assert "Not all pictures were examined" in told
    row = told[told.index(">ROUGE-L <") :]
    cells = [cell.partition("<")[0] for cell in row[: row.index("</tr>")].split('<td class="n">')[1:]]
    found = [scores["metrics"]["rouge_l"], scores["without_near_duplicates"]["metrics"]["rouge_l"]]
    assert cells == [f"{value:.3f}" for value in found]
    assert cells[0] != cells[1]
