"""What other tools take, read back as they read it: ImageCLEF's checker, load_dataset, tar, folders, the hub."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import steps
import yaml
from click.testing import Result
from hub_server import CUT, TOKEN, Hub, Repo
from hypothesis import given
from hypothesis import strategies as st
from places import SHARED
from samples import SCHEMA, picture, register
from sqlalchemy import Engine

from rococap import db, files, queue
from rococap.engines import Completion, EngineInfo, Failure
from rococap.errors import RococapError, RunError
from rococap.queue import Run
from rococap.recipe import RULES, Recipe
from rococap.results import card as card_module
from rococap.results import checkpoints, export, formats, imageclef, publish, restore, snapshot
from rococap.results.formats import fold
from rococap.results.snapshot import IncompleteError

INFO = EngineInfo("small", {}, "tests/small", "c0ffee", "float32", "cpu", "d19e57")
CAPTIONS = SHARED / "captions"

AWKWARD = [
    'He said "no", twice, and left.',
    "two\nlines, and a tab\t.",
    "a bare carriage return \r in the middle",
    "\r\n starts with one \n",
    "=1+1 and -2, +3, @x",
    "'=1",
    "curly “quotes”, dashes – and arrows →, 𝛼 and 🦴",
    "\v\f\x1c\x1d\x1e\x1f\x85\u2028\u2029 every end of a line, and one more \u2028\x85",
    "\x07 a bell and \x9b a control sequence",
    '"',
    '","',
    "",
    " \t\n",
    "NA",
    "nan",
    "\ufeffa mark",
]


def write_data_set(
    root: Path,
    captions: Sequence[str],
    *,
    split: str = "train",
    ids: Sequence[str] = (),
    pictures: Sequence[bytes | None] = (),
) -> None:
    (root / "data").mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "image": {"bytes": pictures[n] if pictures else picture(n), "path": None},
            "image_id": ids[n] if ids else f"{split}_{n:05}",
            "caption": caption,
            "cui": ["C0040405", "C1306645"],
        }
        for n, caption in enumerate(captions)
    ]
    path = root / "data" / f"{split}-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, row_group_size=10)


def enqueue(database: Engine, root: Path, splits: Sequence[str] = ("train",), **options) -> Run:
    register(database, root, splits, **options)
    with db.transaction(database) as conn:
        return queue.get_run(conn, "default")


NUMBERS = count()


def caption(database: Engine, run: Run, texts: Sequence[str], split: str = "train", *, now: int | None = None) -> None:
    """Captions the next pending jobs with these texts."""
    with db.transaction(database, write=True) as conn:
        worker_id = queue.register_worker(conn, f"worker {next(NUMBERS)}", "host", 1, INFO)
        lease = queue.claim(conn, worker_id, run.id, split, len(texts), ttl_ms=60_000)
        done = [Completion(job.id, text, processing_ms=10.5) for job, text in zip(lease.jobs, texts, strict=True)]
        queue.complete(conn, lease, done, now=now)


def filled(database: Engine, root: Path, n: int = 12, **options) -> Run:
    """A run with n captioned pictures."""
    write_data_set(root, [f"Original {n}." for n in range(n)], **options)
    run = enqueue(database, root)
    caption(database, run, [f"Caption {n}." for n in range(n)])
    return run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "set"


# --- awkward captions in every format --------------------------------------------------------------------------

Row = tuple[str, str | None, str]
"""Id, original caption where the format has it, generated caption."""


def table_rows(path: Path) -> list[Row]:
    frames = (frame.itertuples(index=False) for frame in restore._read(path))
    return [(row.image_id, row.original_caption, row.generated_caption) for rows in frames for row in rows]


def hub_rows(folder: Path) -> list[Row]:
    from datasets import load_dataset

    data = load_dataset(str(folder), cache_dir=str(folder.parent / "cache"))
    assert list(data) == ["train"]
    return list(
        zip(
            data["train"]["image_id"],
            data["train"]["original_caption"],
            data["train"]["generated_caption"],
            strict=True,
        )
    )


def tar_samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """As webdataset groups them: a key is what comes before the first dot."""
    samples: dict[str, dict[str, bytes]] = defaultdict(dict)
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, ending = member.name.split(".", 1)
                samples[key][ending] = tar.extractfile(member).read()
    return samples


def tar_rows(folder: Path) -> list[Row]:
    samples = [(json.loads(one["json"]), one["txt"].decode()) for one in tar_samples(folder).values()]
    return [(about["image_id"], about["original_caption"], text) for about, text in samples]


def pair_rows(folder: Path) -> list[Row]:
    return [(path.stem, None, path.read_bytes().decode()) for path in sorted((folder / "train").glob("*.txt"))]


def conversations(folder: Path, split: str = "train") -> list[tuple[str, str, str]]:
    """The question, the answer and the path of the picture of each line."""
    lines = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text("utf-8").splitlines()]
    assert [list(line) for line in lines] == [["messages", "images"]] * len(lines)
    roles = [[message["role"] for message in line["messages"]] for line in lines]
    assert roles == [["user", "assistant"]] * len(lines)
    texts = [[message["content"] for message in line["messages"]] for line in lines]
    pictures = [line["images"] for line in lines]
    return [(question, answer, picture) for (question, answer), [picture] in zip(texts, pictures, strict=True)]


def message_rows(folder: Path) -> list[Row]:
    rows = conversations(folder)
    assert all((folder / path).is_file() for _, _, path in rows)
    return [(Path(path).stem, None, answer) for _, answer, path in rows]


READERS: dict[str, Callable[[Path], list[Row]]] = {
    "parquet": table_rows,
    "jsonl": table_rows,
    "csv": table_rows,
    "hf": hub_rows,
    "webdataset": tar_rows,
    "kohya": pair_rows,
    "messages": message_rows,
}


@pytest.fixture(params=["written here", "real"])
def texts(request) -> list[str]:
    if request.param == "written here":
        return AWKWARD
    if not CAPTIONS.exists():
        pytest.skip("needs the real captions beside the checkout")
    with (CAPTIONS / "roco_v1_awkward_200.csv").open(newline="", encoding="utf-8") as file:
        return [row["caption"] for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.parametrize("format", READERS)
def test_captions_that_are_awkward_come_out_as_they_went_in(database, root, out, texts, format):
    write_data_set(root, texts)
    run = enqueue(database, root)
    generated = texts[::-1]
    caption(database, run, generated)
    if format in formats.FORMATS:
        export.export(database, run, "train", out / f"x.{format}")
        rows = READERS[format](out / f"x.{format}")
    else:
        publish.publish(database, run, ["train"], out, format)
        rows = READERS[format](out)
    assert [row[0] for row in rows] == [f"train_{n:05}" for n in range(len(texts))]
    assert [row[2] for row in rows] == generated
    assert [row[1] for row in rows] == (texts if format not in ("kohya", "messages") else [None] * len(texts))


@pytest.mark.every_database
@pytest.mark.parametrize("format", ["hf", "webdataset", "kohya", "messages", "imageclef"])
def test_what_was_captioned_while_the_clock_ran_ahead_is_published(database, root, out, format):
    write_data_set(root, [f"Original {n}." for n in range(12)])
    run = enqueue(database, root)
    with db.transaction(database) as conn:
        future = db.now(conn) + 7_200_000
    caption(database, run, [f"Caption {n}." for n in range(5)], now=future)
    caption(database, run, [f"Caption {n}." for n in range(5, 12)])
    if format == "imageclef":
        found = submitted(imageclef.submit(database, run, "train", out / "submission.csv").path)
    else:
        publish.publish(database, run, ["train"], out, format)
        found = [row[2] for row in READERS[format](out)]
    assert found == [f"Caption {n}." for n in range(12)]


# --- ImageCLEF -------------------------------------------------------------------------------------------------


def refusal(path: Path, ids: Sequence[str]) -> str | None:
    """Why the checker of ImageCLEFmedical 2026 would refuse a submission: its rules, written from reading it."""
    text = path.read_bytes().decode("utf-8")
    lines = text.splitlines()
    if not all(line.strip() for line in lines):
        return "a line is blank"
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    if header != ["ID", "Caption"]:
        return f"the header is {header}"
    if any(len(row) != 2 for row in rows):
        return "a row has not two cells"
    if [row[0] for row in rows] != [image_id.strip() for image_id in ids]:
        return "the IDs are not those of the ground truth in its order"
    # It takes the nth line for the nth row, and cuts it at its first comma, wherever that stands.
    after = [line.partition(",")[2] for line in lines[1:]]
    if len(lines) != len(rows) + 1 or any("," in cell and not cell[0] == cell[-1] == '"' for cell in after):
        return "a caption with a comma is not in quotes"
    return None


def submitted(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        return [row["Caption"] for row in csv.DictReader(file)]


def test_a_submission_passes_the_checker_whatever_the_captions_hold(database, root, out, texts):
    write_data_set(root, texts)
    run = enqueue(database, root)
    caption(database, run, texts)
    told = imageclef.submit(database, run, "train", out / "submission.csv")
    ids = [f"train_{n:05}" for n in range(len(texts))]
    assert refusal(told.path, ids) is None
    assert submitted(told.path) == [fold(text) for text in texts]
    assert (told.rows, told.missing) == (len(texts), 0)
    assert told.empty == sum(not text.strip() for text in texts)
    content = told.path.read_bytes()
    assert content.startswith(b'ID,Caption\n"train_00000","')
    assert b"\r" not in content
    assert content.endswith(b'"\n')


def test_white_space_and_control_characters_are_one_space_and_the_rest_stays():
    assert fold("\n a\r\n\tb\v\f\x1c\x1d\x1e\x1f\x85\u2028\u2029c\0d\xa0\u3000 e\x7f") == "a b c d e"
    assert fold("“é” – 𝛼\u200bβ") == "“é” – 𝛼\u200bβ"


@given(st.text())
def test_no_text_has_a_second_line_once_it_is_folded(text):
    once = fold(text)
    assert once.splitlines() in ([once], [])
    assert fold(once) == once


def test_a_submission_needs_every_picture_of_the_split_also_those_that_the_run_was_not_given(database, root, out):
    path = out / "submission.csv"
    write_data_set(root, ["o"] * 12)
    run = enqueue(database, root, limit=9)
    caption(database, run, ["first"] * 7)
    path.parent.mkdir()
    path.write_text("old")
    with pytest.raises(IncompleteError) as error:
        imageclef.submit(database, run, "train", path)
    assert str(error.value) == (
        "5 of 12 pictures of train have no caption, and ImageCLEF rejects a submission that lacks an ID. Caption them: "
        "rococap enqueue --run default --split train …, then rococap worker --run default (see rococap failures for "
        "those that failed). Or leave their captions empty with --allow-missing."
    )
    assert [file.name for file in out.iterdir()] == ["submission.csv"]
    assert path.read_text() == "old"
    caption(database, run, ["last", ""])
    told = imageclef.submit(database, run, "train", path, allow_missing=True)
    assert (told.rows, told.missing, told.empty) == (12, 3, 4)
    assert submitted(path) == ["first"] * 7 + ["last"] + [""] * 4
    assert refusal(path, [f"train_{n:05}" for n in range(12)]) is None
    about = json.loads(path.with_suffix(".json").read_text())
    assert {"split": "train", "rows": 12, "missing": 3, "empty": 4}.items() <= about.items()
    assert about["sha256"] == files.sha256_of(path)


def test_a_submission_has_its_own_manifest_or_none(database, root, out, monkeypatch):
    run = filled(database, root, 2)
    imageclef.submit(database, run, "train", out / "x.csv")

    def killed(path: Path, value: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(imageclef, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        imageclef.submit(database, run, "train", out / "x.csv")
    assert [path.name for path in out.iterdir()] == ["x.csv"]


def test_pictures_that_have_no_caption_are_left_empty_in_their_place(database, root, out, monkeypatch):
    monkeypatch.setattr(snapshot, "PAGE", 2)
    monkeypatch.setattr(publish, "PAGE", 3)
    write_data_set(root, ["o"] * 6)
    run = enqueue(database, root)
    with db.transaction(database, write=True) as conn:
        lease = queue.claim(conn, queue.register_worker(conn, "w", "h", 1, INFO), run.id, "train", 6, ttl_ms=60_000)
        failed = {lease.jobs[n].id: Failure("empty", "") for n in (0, 3, 5)}
        queue.fail(conn, lease, failed)
        queue.complete(
            conn, lease, [Completion(job.id, job.place.image_id) for job in lease.jobs if job.id not in failed]
        )
    imageclef.submit(database, run, "train", out / "x.csv", allow_missing=True)
    assert submitted(out / "x.csv") == ["", "train_00001", "train_00002", "", "train_00004", ""]


@pytest.mark.parametrize("image_id", ["a,b", "a\nb", "a\u2028b", " "])
def test_an_id_that_the_checker_cannot_read_is_refused(database, root, out, image_id):
    run = filled(database, root, 2, ids=["x", image_id])
    with pytest.raises(RococapError) as error:
        imageclef.submit(database, run, "train", out / "x.csv")
    assert str(error.value) == (
        f"The ID {image_id!r} cannot be submitted: an ImageCLEF ID is one line of text without commas. Use ImageCLEF's "
        "own data set, or another --format."
    )


def test_ids_are_stripped_as_those_of_the_ground_truth_are_and_stay_different(database, root, out):
    ids = [" b ", 'a"', "c"]
    run = filled(database, root, 3, ids=ids)
    assert refusal(imageclef.submit(database, run, "train", out / "x.csv").path, ids) is None
    other = root.with_name("other")
    write_data_set(other, ["o", "o"], ids=["b", "b "], split="test")
    register(database, other, ["test"], run="other")
    with db.transaction(database) as conn:
        run = queue.get_run(conn, "other")
    with pytest.raises(RococapError, match="IDs of test differ only in white space, which ImageCLEF ignores: fix"):
        imageclef.submit(database, run, "test", out / "y.csv")


# --- folders ---------------------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names(folder)}


def put(path: Path, text: str = "mine") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.every_database
def test_several_splits_make_one_folder_whose_files_name_them(database, root, out):
    write_data_set(root, ["o"] * 3, split="validation")
    write_data_set(root, ["o"] * 2)
    run = enqueue(database, root, ["train", "validation"])
    caption(database, run, ["a"] * 2)
    caption(database, run, ["!!!!!!!!!!!!", "b"], "validation")
    for format, expected in {
        "hf": ["data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet", "README.md"],
        "webdataset": ["train-000000.tar", "validation-000000.tar"],
        "kohya": [f"{one}.{end}" for one in ("train/train_00000", "train/train_00001") for end in ("png", "txt")]
        + [
            f"{one}.{end}"
            for one in ("validation/validation_00000", "validation/validation_00001")
            for end in ("png", "txt")
        ],
        "messages": [
            *("dataset_info.json", "train.jsonl", "train/train_00000.png", "train/train_00001.png"),
            *("validation.jsonl", "validation/validation_00000.png", "validation/validation_00001.png"),
        ],
    }.items():
        written = publish.publish(database, run, ["train", "validation"], out / format, format)
        assert [(one.split, one.captions, one.missing, one.flags) for one in written] == [
            ("train", 2, 0, {}),
            ("validation", 2, 1, {"one_token": 1}),
        ]
        assert names(out / format) == sorted([*expected, "rococap.json"])
        about = json.loads((out / format / "rococap.json").read_text())
        assert (about["format"], about["run"], about["recipe_hash"]) == (format, "default", run.recipe.hash)
        assert about["splits"]["validation"] == {
            "captions": 2,
            "missing": 1,
            "flags": {"one_token": 1},
            "without_picture": {},
        }


@pytest.mark.parametrize("format", ["hf", "webdataset", "kohya", "messages"])
def test_a_folder_is_replaced_by_a_whole_one_or_stays_as_it_was(database, root, out, monkeypatch, format):
    write_data_set(root, ["o"] * 12)
    run = enqueue(database, root)
    caption(database, run, ["a"] * 6)
    publish.publish(database, run, ["train"], out, format)
    before = content(out)

    def break_off(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    def no_space(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    caption(database, run, ["b"] * 6)
    with pytest.raises(KeyboardInterrupt):
        publish.publish(database, run, ["train"], out, format, progress=break_off)
    with monkeypatch.context() as full:
        full.setattr(publish, "fsync", no_space)
        with pytest.raises(RococapError) as error:
            publish.publish(database, run, ["train"], out, format)
    assert str(error.value) == (
        f"No space left for {out}: nothing was changed there. Free some space, or write elsewhere with --output."
    )
    assert content(out) == before
    [written] = publish.publish(database, run, ["train"], out, format)
    assert written.captions == 12
    assert content(out) != before
    assert sorted(path.name for path in out.parent.iterdir() if path.name.startswith(".")) == []


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one_there(database, root, out, monkeypatch):
    run = filled(database, root)
    publish.publish(database, run, ["train"], out, "hf")
    before = content(out)
    rename = Path.rename

    def fails_for_the_new(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new)
    with pytest.raises(RococapError, match="cannot be written"):
        publish.publish(database, run, ["train"], out, "hf")
    assert content(out) == before


def test_what_a_killed_export_left_is_in_nobodys_way(database, root, out):
    run = filled(database, root)
    publish.publish(database, run, ["train"], out, "hf")
    for end in ("part", "old"):
        put(out.with_name(f".out.{os.getpid()}.{end}") / "data" / "x")
    publish.publish(database, run, ["train"], out, "hf")
    assert names(out) == ["README.md", "data/train-00000-of-00001.parquet", "rococap.json"]
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []


def test_the_same_captions_make_the_same_folder(database, root, out):
    run = filled(database, root)
    for format in ("hf", "webdataset", "kohya", "messages"):
        publish.publish(database, run, ["train"], out / format, format)
        publish.publish(database, run, ["train"], out / "again" / format, format)
        assert content(out / format) == content(out / "again" / format)


def test_a_folder_that_rococap_did_not_write_is_never_touched(database, root, out):
    run = filled(database, root)
    put(out / "data" / "train-00000-of-00001.parquet")
    put(out.with_name("file"))
    for path in (out, out.with_name("file")):
        with pytest.raises(RococapError) as error:
            publish.publish(database, run, ["train"], path, "hf")
        assert str(error.value) == f"{path} exists and was not written by rococap: choose another folder with --output."
    assert content(out) == {"data/train-00000-of-00001.parquet": b"mine"}
    empty = out.with_name("empty")
    empty.mkdir()
    publish.publish(database, run, ["train"], empty, "hf")
    assert "README.md" in names(empty)


def test_a_folder_with_more_in_it_than_would_come_again_is_not_replaced(database, root, out):
    write_data_set(root, ["o"] * 2, split="test")
    write_data_set(root, ["o"] * 2)
    run = enqueue(database, root, ["train", "test"])
    caption(database, run, ["a", "b"])
    publish.publish(database, run, ["train", "test"], out, "kohya")
    before = content(out)
    with pytest.raises(RococapError) as error:
        publish.publish(database, run, ["train"], out, "kohya")
    assert str(error.value) == (
        f"{out} also holds test, which would be lost. Export all of its splits (--split test --split train), or choose "
        "another folder with --output."
    )
    with pytest.raises(RococapError, match=r"holds another export \(run default, format kohya\)\. Move it away, or"):
        publish.publish(database, run, ["train", "test"], out, "webdataset")
    register(database, root, ["train", "test"], run="other")
    with db.transaction(database) as conn:
        other = queue.get_run(conn, "other")
    caption(database, other, ["c", "d"])
    with pytest.raises(RococapError, match="holds another export"):
        publish.publish(database, other, ["train", "test"], out, "kohya")
    assert content(out) == before
    put(out / "train" / "train_00000.npz")
    with pytest.raises(RococapError, match="was changed since rococap wrote it: files were added, removed or edited"):
        publish.publish(database, run, ["train", "test"], out, "kohya")
    assert content(out) == before | {"train/train_00000.npz": b"mine"}


@pytest.mark.parametrize(
    ("format", "name"),
    [("kohya", "train/train_00000.txt"), ("messages", "train.jsonl"), ("hf", "README.md"), ("hf", "rococap.json")],
)
@pytest.mark.parametrize("edit", ["longer", "same length", "older file"])
def test_a_file_that_was_edited_is_kept(database, root, out, format, name, edit):
    run = filled(database, root, 2)
    publish.publish(database, run, ["train"], out, format)
    publish.publish(database, run, ["train"], out, format)
    text = (out / name).read_text()
    mine = text + "\n" if edit == "longer" else text.replace("Caption", "CAPTION").replace("note", "NOTE")
    put(out / name, mine)
    if edit == "older file":
        os.utime(out / name, (1e9, 1e9))
    with pytest.raises(RococapError) as error:
        publish.publish(database, run, ["train"], out, format)
    assert str(error.value) == (
        f"{out} was changed since rococap wrote it: files were added, removed or edited. Move it away, or choose "
        "another folder with --output."
    )
    assert (out / name).read_text() == mine != text


def test_a_folder_that_was_moved_with_its_times_is_replaced(database, root, out):
    run = filled(database, root, 2)
    publish.publish(database, run, ["train"], out, "kohya")
    shutil.copytree(out, out.with_name("copy"))
    publish.publish(database, run, ["train"], out.with_name("copy"), "kohya")
    assert content(out.with_name("copy")) == content(out)


@pytest.mark.parametrize("name", ["train/train_00000.npz", "train/train_00001.txt"])
def test_what_is_put_into_a_folder_during_the_export_is_kept(database, root, out, name):
    run = filled(database, root, 2)
    publish.publish(database, run, ["train"], out, "kohya")
    with pytest.raises(RococapError, match="was changed since rococap wrote it"):
        publish.publish(database, run, ["train"], out, "kohya", progress=lambda *_: put(out / name))
    assert (out / name).read_text() == "mine"
    new = out.with_name("new")
    with pytest.raises(RococapError, match="exists and was not written by rococap"):
        publish.publish(database, run, ["train"], new, "kohya", progress=lambda *_: put(new / name))
    assert names(new) == [name]
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("splits", ["nothing", None, "train"])
def test_a_manifest_of_something_else_makes_no_folder_ours(database, root, out, splits):
    run = filled(database, root, 2)
    about = {"run": "default", "recipe_hash": run.recipe.hash, "format": "hf", "splits": splits}
    put(out / "rococap.json", json.dumps({key: value for key, value in about.items() if value != "nothing"}))
    with pytest.raises(
        RococapError, match="exists and was not written by rococap: choose another folder with --output"
    ):
        publish.publish(database, run, ["train"], out, "hf")
    assert names(out) == ["rococap.json"]


def test_all_of_the_split_or_nothing_where_that_is_asked(database, root, out):
    write_data_set(root, ["o"] * 2)
    run = enqueue(database, root)
    with pytest.raises(RunError) as error:
        publish.publish(database, run, ["train"], out, "hf")
    assert str(error.value) == "Run 'default' has captioned nothing of train yet: start rococap worker --run default"
    caption(database, run, ["a"])
    with pytest.raises(IncompleteError, match="1 of 2 images of train are not captioned"):
        publish.publish(database, run, ["train"], out, "hf", require_complete=True)
    with pytest.raises(RunError, match="has no pictures of test"):
        publish.publish(database, run, ["train", "test"], out, "hf")
    assert not out.exists()


# --- a data set of the hub -------------------------------------------------------------------------------------


def test_many_captions_are_several_shards_that_know_how_many_they_are(database, root, out, monkeypatch):
    monkeypatch.setattr(snapshot, "PAGE", 2)
    monkeypatch.setattr(publish, "PAGE", 2)
    monkeypatch.setattr(publish, "ROWS_PER_SHARD", 4)
    run = filled(database, root, 10)
    publish.publish(database, run, ["train"], out, "hf")
    shards = [out / "data" / f"train-{n:05}-of-00003.parquet" for n in range(3)]
    assert sorted((out / "data").iterdir()) == shards
    assert [pq.read_metadata(shard).num_rows for shard in shards] == [4, 4, 2]
    assert hub_rows(out)[7] == ("train_00007", "Original 7.", "Caption 7.")


def card(folder: Path) -> tuple[dict, str]:
    _, front, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_says_what_made_the_captions_and_what_they_are_not_for(database, root, out):
    prompt = "Describe ```it```.\nBriefly: {{ x }}"
    write_data_set(root, ["o"], split="validation")
    write_data_set(root, ["o"] * 3)
    recipe = Recipe(
        model="Qwen/Qwen2-VL-2B-Instruct", prompt=prompt, max_new_tokens=99, max_pixels=784_000, adapter="a/b"
    )
    run = enqueue(database, root, ["train", "validation"], recipe=recipe)
    caption(database, run, ["", "a caption"])
    with db.transaction(database, write=True) as conn:
        queue.pin(conn, run, INFO)
        run = queue.get_run(conn, "default")
    publish.publish(database, run, ["train", "validation"], out, "hf")
    front, body = card(out)
    assert front == {
        "license": "cc-by-nc-sa-4.0",
        "task_categories": ["image-to-text"],
        "language": ["en"],
        "size_categories": ["n<1K"],
        "annotations_creators": ["machine-generated"],
        "pretty_name": "Captions of radiology pictures by Qwen2-VL-2B-Instruct",
        "tags": ["medical", "radiology", "image-captioning", "synthetic", "rococap"],
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]},
        ],
    }
    for said in (
        "not reviewed by clinicians, not for clinical use",
        "| train | 2 | 1 | 1 empty |\n| validation | 0 | 1 | 0 |\n",
        "- Model: `Qwen/Qwen2-VL-2B-Instruct`, revision `main`, resolved to commit `c0ffee`, digest of its files "
        "`d19e57`\n",
        "- Adapter: `a/b`\n",
        "- Weights: auto, resolved to float32\n",
        "- Decoding: greedy, 1 beam, repetition penalty 1.0, at most 99 new tokens\n",
        "- Pixels: 3136 to 784000 per picture\n",
        f"\n````\n{prompt}\n````\n",
        'load_dataset("FOLDER")',
        "doi 10.1038/s41597-024-03496-6",
        "arXiv:2409.12191",
    ):
        assert said in body
    about = json.loads(body.split("````json\n")[1].split("````")[0])
    assert about == {
        key: value for key, value in json.loads((out / "rococap.json").read_text()).items() if key != "files"
    }
    assert about["resolved"] == INFO.resolved() | {"rules": RULES}


@pytest.mark.parametrize(
    ("model", "is_qwen2_vl"),
    [("Qwen/Qwen2-VL-7B-Instruct", True), ("Qwen/Qwen2.5-VL-3B-Instruct", False), ("folder", True), ("other", False)],
)
def test_the_model_is_cited_only_where_it_is_one_of_that_paper(tmp_path, monkeypatch, model, is_qwen2_vl):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "folder" / "config.json", '{"model_type": "qwen2_vl"}')
    put(tmp_path / "other" / "config.json", '{"model_type": "smolvlm"}')
    run = Run(1, "default", 1, "eltorio/ROCOv2-radiology", "", Recipe(model=model), None, 5, False)
    text = card_module.card(run, [card_module.Written("train", 123_456, 0, {})], {})
    assert ("arXiv:2409.12191" in text) == is_qwen2_vl
    assert "\n- 100K<n<1M\n" in text
    assert "\nsource_datasets:\n- eltorio/ROCOv2-radiology\npretty_name: " in text


@pytest.mark.parametrize(
    ("name", "written"),
    [("a`b", "``/x/a`b``"), ("a``b`c`", "``` /x/a``b`c` ```"), ("plain 🦴", "`/x/plain 🦴`")],
)
def test_names_of_folders_stay_one_piece_of_code_in_the_card(tmp_path, name, written):
    recipe = Recipe(model=f"/x/{name}", adapter=f"/x/{name}")
    run = Run(1, name, 1, f"/x/{name}", "", recipe, None, 5, False)
    put(tmp_path / "README.md", card_module.card(run, [card_module.Written("train", 1, 0, {})], {}))
    front, body = card(tmp_path)
    assert front["pretty_name"] == f"Captions of radiology pictures by {name}"
    for said in (f"Captions for the pictures of {written}, one", f"- Model: {written}, rev", f"- Adapter: {written}\n"):
        assert said in body


# --- pictures and captions -------------------------------------------------------------------------------------


def test_a_sample_is_the_pictures_own_bytes_its_caption_and_its_facts(database, root, out, monkeypatch):
    monkeypatch.setattr(publish, "SAMPLES_PER_TAR", 5)
    run = filled(database, root)
    publish.publish(database, run, ["train"], out, "webdataset")
    assert names(out) == ["rococap.json", *(f"train-{n:06}.tar" for n in range(3))]
    samples = tar_samples(out)
    assert list(samples) == [f"train_{n:05}" for n in range(12)]
    assert [one["png"] for one in samples.values()] == [picture(n) for n in range(12)]
    assert list(samples["train_00011"]) == ["png", "txt", "json"]
    assert json.loads(samples["train_00011"]["json"]) == {
        "image_id": "train_00011",
        "original_caption": "Original 11.",
        "cui": ["C0040405", "C1306645"],
        "flags": [],
        "model": "tests/small",
        "split": "train",
    }


def test_keys_have_no_dots_and_no_two_ids_share_one(database, root, out):
    ids = ["a.b", "a_b", "a%2Eb", "a/b", "../a", "", "é.", "A b"]
    run = filled(database, root, len(ids), ids=ids)
    publish.publish(database, run, ["train"], out / "tar", "webdataset")
    samples = tar_samples(out / "tar")
    assert [json.loads(one["json"])["image_id"] for one in samples.values()] == ids
    assert all(key and list(one) == ["png", "txt", "json"] for key, one in samples.items())
    publish.publish(database, run, ["train"], out / "pairs", "kohya")
    assert names(out / "pairs") == sorted(
        ["rococap.json", *(f"train/{key}.{ending}" for key in samples for ending in ("png", "txt"))]
    )


def test_the_longest_ids_name_files_too_and_those_that_begin_alike_name_different_ones(database, root, out):
    ids = ["a" * 240, "骨" * 80, "骨" * 79 + "é", "." * 240, "." * 239 + "/", "." * 80, "." * 81]
    run = filled(database, root, len(ids), ids=ids)
    publish.publish(database, run, ["train"], out / "tar", "webdataset")
    samples = tar_samples(out / "tar")
    assert [json.loads(one["json"])["image_id"] for one in samples.values()] == ids
    assert max(len(key) for key in samples) <= 240
    assert [key for key in samples if "%-" not in key] == ["a" * 240, "%2E" * 80]
    publish.publish(database, run, ["train"], out / "pairs", "kohya")
    assert names(out / "pairs") == sorted(
        ["rococap.json", *(f"train/{key}.{ending}" for key in samples for ending in ("png", "txt"))]
    )


def test_a_picture_that_cannot_be_read_is_told_and_the_rest_is_there(database, root, out):
    run = filled(database, root, 12)
    pictures = [picture(n) for n in range(12)]
    pictures[3], pictures[5], pictures[7] = b"", b"no picture", None
    write_data_set(root, ["o"] * 12, pictures=pictures)
    [written] = publish.publish(database, run, ["train"], out, "webdataset")
    assert (written.captions, written.missing) == (9, 0)
    assert list(written.without_picture) == ["train_00003", "train_00005", "train_00007"]
    assert written.without_picture["train_00005"].startswith("This is not a picture (it begins with b'no picture')")
    assert "holds no picture for train_00007" in written.without_picture["train_00007"]
    assert len(tar_samples(out)) == 9
    about = json.loads((out / "rococap.json").read_text())
    assert about["splits"]["train"]["without_picture"] == written.without_picture


def test_a_shard_that_is_gone_ends_the_export_and_leaves_nothing(database, root, out):
    run = filled(database, root)
    (root / "data" / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(RococapError, match=r"train-00000-of-00001\.parquet is gone"):
        publish.publish(database, run, ["train"], out, "kohya")
    assert [path.name for path in out.parent.iterdir() if "out" in path.name] == []


# --- conversations ---------------------------------------------------------------------------------------------


def test_a_conversation_is_the_picture_the_prompt_and_the_caption(database, root, out):
    write_data_set(root, [f"Original {n}." for n in range(3)])
    run = enqueue(database, root, recipe=Recipe(model="tests/small", prompt=" What is this?\nBe brief. "))
    caption(database, run, ["One.", "Two."])
    publish.publish(database, run, ["train"], out, "messages")
    question = "<image> What is this?\nBe brief. "
    assert conversations(out) == [
        (question, "One.", "train/train_00000.png"),
        (question, "Two.", "train/train_00001.png"),
    ]
    assert [(out / path).read_bytes() for _, _, path in conversations(out)] == [picture(0), picture(1)]
    about = json.loads((out / "rococap.json").read_text())
    assert (about["text"], about["recipe"]["prompt"]) == ("generated", run.recipe.prompt)
    assert about["note"].startswith("Machine-generated captions, not reviewed by clinicians")
    assert about["splits"]["train"] == {"captions": 2, "missing": 1, "flags": {}, "without_picture": {}}


def test_llama_factory_finds_the_files_of_each_split_that_has_captions(database, root, out):
    write_data_set(root, ["o"] * 2, split="validation")
    write_data_set(root, ["o"] * 2, split="test")
    write_data_set(root, ["o"] * 2)
    run = enqueue(database, root, ["train", "validation", "test"])
    caption(database, run, ["a"])
    caption(database, run, ["b"], "validation")
    publish.publish(database, run, ["train", "validation", "test"], out, "messages")
    described = {
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
    assert json.loads((out / "dataset_info.json").read_text()) == {
        "rococap_train": {"file_name": "train.jsonl"} | described,
        "rococap_validation": {"file_name": "validation.jsonl"} | described,
    }


def test_load_dataset_reads_the_conversations(database, root, out):
    from datasets import load_dataset

    write_data_set(root, AWKWARD)
    run = enqueue(database, root)
    caption(database, run, AWKWARD)
    publish.publish(database, run, ["train"], out, "messages")
    data = load_dataset("json", data_files=str(out / "train.jsonl"), cache_dir=str(out.parent / "cache"))["train"]
    assert [row["messages"][1]["content"] for row in data] == AWKWARD
    assert [row["images"] for row in data] == [[f"train/train_{n:05}.png"] for n in range(len(AWKWARD))]


@pytest.mark.every_database
def test_originals_are_written_for_every_picture_of_the_run_captioned_or_not(database, root, out, monkeypatch):
    monkeypatch.setattr(snapshot, "PAGE", 5)
    write_data_set(root, [f"Original {n}." for n in range(12)])
    run = enqueue(database, root, limit=11)
    caption(database, run, ["!!!!!!!!!!!!", "b"])
    [written] = publish.publish(database, run, ["train"], out, "messages", text="original")
    assert (written.captions, written.missing, written.flags) == (11, 0, {})
    assert [answer for _, answer, _ in conversations(out)] == [f"Original {n}." for n in range(11)]
    assert all((out / path).is_file() for _, _, path in conversations(out))
    about = json.loads((out / "rococap.json").read_text())
    assert about["text"] == "original"
    assert about["note"] == (
        "Captions of the data set, under its licence, with the prompt of the run. Not for clinical use."
    )


def test_what_is_enqueued_during_an_export_of_originals_is_left_for_the_next(database, root, out, monkeypatch):
    monkeypatch.setattr(snapshot, "PAGE", 2)
    write_data_set(root, [f"Original {n}." for n in range(6)])
    run = enqueue(database, root, limit=4)

    def enqueue_more(what: str, done: int, total: int) -> None:
        assert total == 4
        register(database, root, ["train"])

    [written] = publish.publish(database, run, ["train"], out, "messages", text="original", progress=enqueue_more)
    assert written.captions == 4


def test_originals_that_are_missing_are_told_and_a_set_without_any_makes_no_folder(database, root, out):
    write_data_set(root, ["First.", "", " \n", "Last."])
    run = enqueue(database, root)
    [written] = publish.publish(database, run, ["train"], out, "messages", text="original")
    assert [answer for _, answer, _ in conversations(out)] == ["First.", "Last."]
    assert written.without_text == dict.fromkeys(["train_00001", "train_00002"], "The data set has no caption for it.")
    assert json.loads((out / "rococap.json").read_text())["splits"]["train"]["without_text"] == written.without_text
    assert [name for name in names(out) if name.endswith(".png")] == ["train/train_00000.png", "train/train_00003.png"]
    unlabelled = root.with_name("unlabelled")
    write_data_set(unlabelled, [""] * 3)
    register(database, unlabelled, ["train"], run="other")
    with db.transaction(database) as conn:
        other = queue.get_run(conn, "other")
    with pytest.raises(RunError) as error:
        publish.publish(database, other, ["train"], out.with_name("new"), "messages", text="original")
    assert str(error.value) == (
        "Run 'other' has no caption that can be written. For the first picture: The data set has no caption for it."
    )
    assert not out.with_name("new").exists()


@pytest.mark.parametrize("text", ["generated", "original"])
def test_a_caption_with_a_place_for_a_picture_is_left_out_and_told(database, root, out, text):
    texts = ["A.", "see <image> B", "<|image_pad|>", "<video>", "<audio>", "a<|im_end|>b", "< image>", "<IMAGE> <b>"]
    write_data_set(root, texts)
    run = enqueue(database, root)
    caption(database, run, texts)
    [written] = publish.publish(database, run, ["train"], out, "messages", text=text)
    assert [answer for _, answer, _ in conversations(out)] == ["A.", "< image>", "<IMAGE> <b>"]
    assert list(written.without_text) == [f"train_{n:05}" for n in range(1, 6)]
    assert written.without_text["train_00001"] == (
        "Its caption contains <image>, which a trainer would not take for text."
    )
    assert all(question.count("<image>") == 1 for question, _, _ in conversations(out))


def test_a_prompt_with_a_place_for_a_picture_is_refused(database, root, out):
    write_data_set(root, ["o"])
    run = enqueue(database, root, recipe=Recipe(model="tests/small", prompt="What is in <image>?"))
    caption(database, run, ["a"])
    with pytest.raises(RunError) as error:
        publish.publish(database, run, ["train"], out, "messages")
    assert str(error.value) == (
        "The prompt of run 'default' contains <image>, which a trainer would not take for text. Export a run with "
        "another prompt: rococap enqueue --run NAME --from default --prompt …"
    )
    assert not out.exists()


def test_originals_do_not_replace_generated_captions(database, root, out):
    run = filled(database, root, 2)
    publish.publish(database, run, ["train"], out, "messages")
    before = content(out)
    with pytest.raises(RococapError) as error:
        publish.publish(database, run, ["train"], out, "messages", text="original")
    assert str(error.value) == (
        f"{out} holds another export (run default, format messages, text generated). Move it away, or choose another "
        "folder with --output."
    )
    assert content(out) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from rococap import db, queue
from rococap.results import publish

database = db.connect(sys.argv[1])
with db.transaction(database) as conn:
    run = queue.get_run(conn, "default")

def kill(what, done, total):
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)

publish.publish(database, run, ["train"], Path(sys.argv[2]), "messages", progress=kill)
"""


def test_a_killed_export_of_conversations_leaves_the_older_folder_whole(database, url, root, out):
    run = filled(database, root, 4)
    publish.publish(database, run, ["train"], out, "messages")
    before = content(out)
    done = subprocess.run([sys.executable, "-c", KILLED, url, str(out)], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert content(out) == before
    publish.publish(database, run, ["train"], out, "messages")
    assert content(out) == before


# --- the command -----------------------------------------------------------------------------------------------


def invoke(url: str, *args: str) -> Result:
    return steps.invoke("--db", url, "export", "--split", "train", *args)


def test_the_command_writes_each_format_and_says_what_is_missing(database, url, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data_set(root, ["o"] * 4, pictures=[picture(0), b"", picture(2), picture(3)])
    run = enqueue(database, root)
    caption(database, run, ["a", "b", ""])
    refused = invoke(url, "--format", "imageclef")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert invoke(url, "--format", "imageclef", "--allow-missing").stdout == (
        "results_medical/submission_train.csv: 4 captions, 2 of them empty, which will score almost nothing. Submit it "
        "as submission.csv, alone in a zip.\n"
    )
    names_local = f"  The files name {root}: check that others may read that\n"
    assert invoke(url, "--format", "hf").stdout == (
        f"results_medical/medical_captions_hf train: 3 captions; 1 of the split are not done\n{names_local}"
    )
    for format in ("webdataset", "kohya", "messages"):
        assert invoke(url, "--format", format, "--output", f"{format} set").stdout == (
            f"{format} set train: 2 captions; 1 of the split are not done\n"
            "  1 more were left out, because their pictures cannot be read:\n"
            "  train_00001: This is not a picture (it begins with b''): replace it at its source, then retry.\n"
            f"{names_local}"
        )
    assert sorted(path.name for path in (tmp_path / "results_medical").iterdir()) == [
        "medical_captions_hf",
        "submission_train.csv",
        "submission_train.json",
    ]


def test_the_command_says_which_captions_are_no_answers(database, url, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data_set(root, ["<image>", "An original."])
    run = enqueue(database, root)
    caption(database, run, ["a"])
    assert invoke(url, "--format", "messages").exit_code == 0
    told = invoke(url, "--format", "messages", "--text", "original").stdout
    assert told.startswith(
        "results_medical/original_captions_messages train: 1 caption\n"
        "  1 more were left out, because their captions cannot be answers:\n"
        "  train_00000: Its caption contains <image>, which a trainer would not take for text.\n"
    )
    folders = [tmp_path / "results_medical" / f"{name}_captions_messages" for name in ("original", "medical")]
    assert [[answer for _, answer, _ in conversations(folder)] for folder in folders] == [["An original."], ["a"]]


def test_every_path_that_the_files_name_is_told(database, url, root, out):
    write_data_set(root, ["o"])
    run = enqueue(database, root, recipe=Recipe(model="/models/small", adapter="/adapters/mine"))
    caption(database, run, ["a"])
    told = f"  The files name {root} and /models/small and /adapters/mine: check that others may read that\n"
    assert invoke(url, "--format", "hf", "--output", str(out)).stdout.endswith(told)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--format", "hf", "--push", ""], "--push needs the name of a data set: OWNER/NAME."),
        (["--format", "hf", "--push", " "], "--push needs the name of a data set: OWNER/NAME."),
        (["--format", "hf", "--excel-safe"], "--excel-safe does not apply to hf, only to csv: leave it out."),
        (
            ["--output", "x.parquet", "--excel-safe"],
            "--excel-safe does not apply to parquet, only to csv: leave it out.",
        ),
        (["--format", "csv", "--push", "a/b"], "--push does not apply to csv, only to hf: leave it out."),
        (["--format", "hf", "--follow"], "--follow does not apply to hf, only to csv, parquet, jsonl: leave it out."),
        (["--format", "kohya", "--checkpoint-every", "5"], "--checkpoint-every does not apply to kohya, only to csv, "),
        (
            ["--format", "imageclef", "--require-complete"],
            "--require-complete does not apply to imageclef, only to csv,",
        ),
        (
            ["--format", "kohya", "--text", "original"],
            "--text does not apply to kohya, only to messages: leave it out.",
        ),
        (
            ["--format", "messages", "--text", "original", "--strip-reasoning"],
            "--strip-reasoning is about the run's captions: leave it out with --text original.",
        ),
        (
            ["--format", "messages", "--text", "original", "--require-complete"],
            "--require-complete is about the run's captions: leave it out with --text original.",
        ),
        (["--allow-missing"], "--allow-missing does not apply to csv, only to imageclef: leave it out."),
        (
            ["--format", "imageclef", "--output", "x.jsonl"],
            "x.jsonl does not end as imageclef files do: end it in .csv, or leave out ",
        ),
    ],
)
def test_options_that_a_format_does_not_have_are_refused(database, url, root, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    filled(database, root, 1)
    result = invoke(url, *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


# --- pushing it ------------------------------------------------------------------------------------------------

PUSHES = """
import json, os, sys, warnings
from click.testing import CliRunner
from rococap.cli import cli

warnings.simplefilter("ignore")
for token, args in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    result = CliRunner().invoke(cli, args)
    print(json.dumps([result.exit_code, result.stdout, result.stderr]))
print(json.dumps(sorted(sys.modules)))
"""


def pushes(home: Path, endpoint: str, *commands: tuple[str, list[str]]) -> list:
    """A huggingface_hub of its own: it reads the endpoint once. Without the token, proxy or cache of who tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    kept = {name: value for name, value in kept.items() if not name.upper().endswith("_PROXY")}
    hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PUSHES, json.dumps(commands)],
        env=kept | hub,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def earlier(run: Run, /, **others: object) -> dict[str, bytes]:
    """What a push of the run left on the hub."""
    about = {"run": run.name, "recipe_hash": run.recipe.hash, "format": "hf", "splits": {"train": {}}} | others
    return {"rococap.json": json.dumps(about).encode(), "data/train-00000-of-00002.parquet": b"old"}


def refused(run: Run) -> dict[str, tuple[Repo, str]]:
    """By name, what a push of the run may not replace, and why."""
    not_ours = "holds a data set that rococap did not push, and was left unchanged. Give another name to --push."
    another = "holds another export (run {}, format hf), and was left unchanged. Give another name to --push."
    lost = (
        "also holds test, which this push would delete. Export all of its splits (--split test --split train), or give "
        "another name to --push."
    )
    return {
        "me/theirs": (Repo({"README.md": b"theirs", "data/train-00000-of-00001.parquet": b"theirs"}), not_ours),
        "me/tool": (Repo({"rococap.json": b"{}"}), not_ours),
        "me/text": (Repo({"rococap.json": b"no manifest \xff"}), not_ours),
        "me/run": (Repo(earlier(run, run="other")), another.format("other")),
        "me/recipe": (Repo(earlier(run, recipe_hash="c0ffee")), another.format("default")),
        "me/splits": (Repo(earlier(run, splits={"train": {}, "test": {}})), lost),
    }


def test_a_push_makes_a_private_data_set_and_replaces_what_an_earlier_one_left(database, url, root, tmp_path):
    run = filled(database, root, 3)
    folder = tmp_path / "folder"
    left = refused(run)
    theirs = left["me/theirs"][0].files
    pushed = earlier(run) | {".gitattributes": b""}
    repos = {name: repo for name, (repo, _) in left.items()}
    repos |= {"me/old": Repo(pushed), "other/away": Repo(theirs), "me/gated": Repo(earlier(run), gated=True)}
    command = ["--db", url, "export", "--split", "train", "--format", "hf", "--output", str(folder), "--push"]
    with Hub(repos) as hub:
        *results, modules = pushes(
            tmp_path / "home",
            hub.url,
            *((TOKEN, [*command, repo]) for repo in left),
            *((TOKEN, [*command, repo]) for repo in ("new", "me/old", "me/gated", "other/new", "other/away", "a//b")),
            *((token, [*command, "new"]) for token in ("wrong", "", CUT)),
        )
    new, old, gated, forbidden, read_only, no_name, unknown, anonymous, cut = results[len(left) :]
    assert (new[0], new[1].splitlines()[-1]) == (
        *(0,),
        f"{hub.url}/datasets/me/new: private, until you change that in its settings",
    )
    assert hub.repos["me/new"].private
    assert hub.repos["me/new"].files == content(folder) | {".gitattributes": b"* lfs"}
    assert (old[0], old[1].splitlines()[-1]) == (0, f"{hub.url}/datasets/me/old: public")
    assert hub.repos["me/old"].files == content(folder) | {".gitattributes": b""}
    assert [one[0] for one in results] == [1] * len(left) + [0, 0] + [1] * 7
    kept = f" The exported folder is complete: {folder}"
    for result, (name, (_, why)) in zip(results, left.items(), strict=False):
        assert result[2].strip() == f"Error: {name} {why}{kept}"
    assert all(hub.repos[name] is repo for name, (repo, _) in left.items())
    assert (hub.repos["other/away"].files, hub.repos["me/gated"].files) == (theirs, earlier(run))
    assert gated[2].strip() == (
        "Error: You have no write access to me/gated on the hub: run hf auth login with a token that has, or give "
        f"another name to --push.{kept}"
    )
    assert forbidden[2].strip() == (
        "Error: You have no write access to other/new on the hub: run hf auth login with a token that has, or give "
        f"another name to --push.{kept}"
    )
    assert read_only[2].startswith("Error: other/away holds a data set that rococap did not push")
    assert no_name[2].strip() == f"Error: 'a//b' is not a valid repository name: give --push OWNER/NAME.{kept}"
    assert unknown[2].strip() == (
        "Error: The hub rejected the token: run hf auth login or correct HF_TOKEN, then run this again."
    )
    assert anonymous[2].strip() == (
        "Error: You are not logged in to the hub: run hf auth login with a write token, then run this again."
    )
    assert cut[2].strip() == (
        f"Error: The hub at {hub.url} cannot be reached (Server disconnected without sending a response.): check the "
        "network, then run this again."
    )
    assert {"torch", "datasets", "transformers"}.isdisjoint(modules)


def test_a_push_that_cannot_be_costs_no_export(database, url, root, out, monkeypatch):
    filled(database, root, 3)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    result = invoke(url, "--format", "hf", "--output", str(out), "--push", "new")
    assert result.stderr.strip() == (
        "Error: Nothing can be pushed while HF_HUB_OFFLINE is set: unset it and run this again."
    )
    assert not out.exists()


# --- reasoning -------------------------------------------------------------------------------------------------

REASONED = ["<think>A lung?</think>\n\nA scan.", "<think>A lung", "A bone.", "<think>a</think>"]
STRIPPED = ["A scan.", "<think>A lung", "A bone.", ""]


def reasoned(database: Engine, root: Path) -> Run:
    write_data_set(root, [f"Original {n}." for n in range(len(REASONED))])
    return enqueue(database, root)


def manifest_in(out: Path, format: str) -> dict:
    name = {"csv": "x.json", "parquet": "x.parquet.json", "jsonl": "x.jsonl.json"}.get(format, "rococap.json")
    return json.loads((out / name).read_text())


@pytest.mark.parametrize("format", READERS)
@pytest.mark.parametrize(
    ("options", "texts", "stated"), [((), REASONED, None), (("--strip-reasoning",), STRIPPED, True)]
)
def test_reasoning_is_written_unless_it_is_to_be_stripped_and_then_the_manifest_says_so(
    database, url, root, out, format, options, texts, stated
):
    caption(database, reasoned(database, root), REASONED)
    place = out / f"x.{format}" if format in formats.FORMATS else out
    done = invoke(url, "--format", format, "--output", str(place), *options)
    assert done.exit_code == 0, done.output
    assert [row[2] for row in READERS[format](place)] == texts
    assert manifest_in(out, format).get("strip_reasoning") is stated


def test_a_submission_is_stripped_where_that_is_asked(database, url, root, out):
    caption(database, reasoned(database, root), REASONED)
    command = ("--format", "imageclef", "--output", str(out), "--allow-missing")
    path = out / "submission_train.csv"
    assert invoke(url, *command).exit_code == 0
    assert submitted(path)[:4] == list(map(fold, REASONED))
    assert "strip_reasoning" not in json.loads(path.with_suffix(".json").read_text())
    assert invoke(url, *command, "--strip-reasoning").exit_code == 0
    assert submitted(path)[:4] == STRIPPED
    assert json.loads(path.with_suffix(".json").read_text())["strip_reasoning"] is True


@pytest.mark.parametrize("format", [*formats.FORMATS, "hf"])
def test_what_was_stripped_is_not_restored_and_the_segments_beside_it_are(database, url, root, out, format):
    run = reasoned(database, root)
    caption(database, run, REASONED)
    place = out / f"x.{format}" if format in formats.FORMATS else out
    command = ("--format", format, "--output", str(place), "--strip-reasoning")
    assert invoke(url, *command).exit_code == 0
    path = place if format in formats.FORMATS else next(out.glob("data/*.parquet"))
    done = steps.invoke("--db", url, "restore", str(path))
    assert done.exit_code == 1
    assert " ".join(done.stderr.split()) == (
        f"Error: {path} was exported with --strip-reasoning, and a run keeps captions with the model's reasoning. "
        "Restore the checkpoint segments, or an export without --strip-reasoning."
    )
    [segment] = checkpoints.write_checkpoints(database, run, "train", out / "segments", 4)
    assert [row[2] for row in table_rows(segment)] == REASONED
    assert steps.invoke("--db", url, "restore", str(segment)).exit_code == 0
