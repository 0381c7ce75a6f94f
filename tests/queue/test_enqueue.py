"""Registering: what is new, known, changed and left out."""

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from databases import recount, tallies
from samples import fill, picture, register, write_shard
from small_engine import INFO
from sqlalchemy import Engine
from steps import select

from rococap import db, queue
from rococap.data import Columns, PictureReader
from rococap.data.datasets import locate
from rococap.engines import Completion
from rococap.errors import DatasetError, RunError
from rococap.queue.enqueue import Enqueued, enqueue, enqueue_from
from rococap.recipe import Recipe
from rococap.worker import dry_run

pytestmark = pytest.mark.every_database


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "set"


def image_ids(database: Engine, run: str = "default") -> list[str]:
    sql = (
        "SELECT i.image_id FROM jobs j JOIN images i ON i.id = j.image_id JOIN runs r ON r.id = j.run_id "
        f"WHERE r.name = '{run}' ORDER BY j.id"
    )
    return [row[0] for row in select(database, sql)]


def names(*numbers: int) -> list[str]:
    return [f"train_{n:05}" for n in numbers]


def test_every_row_is_registered_as_pending_with_its_place_and_texts(database, root):
    write_shard(root, "train", range(12), "00000-of-00002")
    write_shard(root, "train", range(12, 15), "00001-of-00002")
    (result,) = register(database, root, ["train"])
    assert (result.split, result.new, result.known, result.changed, result.duplicates) == ("train", 15, 0, 0, 0)
    assert image_ids(database) == names(*range(15))
    assert select(database, "SELECT DISTINCT status FROM jobs") == [("pending",)]
    place = (
        "SELECT s.path, i.row_group, i.row_in_group, i.caption, i.cui FROM images i JOIN shards s ON s.id = i.shard_id"
    )
    found = select(database, place)
    assert found[11] == ("data/train-00000-of-00002.parquet", 1, 1, "Original caption 11.", "C0040405")
    assert found[14][:3] == ("data/train-00001-of-00002.parquet", 0, 2)


def with_ids(root: Path, ids: list[str]) -> None:
    path = write_shard(root, "train", range(len(ids)))
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.schema.get_field_index("image_id"), "image_id", [ids]), path)


def test_an_id_may_be_as_long_as_a_file_name_can_hold(database, root):
    ids = ["a" * 240, "骨" * 80, "é" * 120]
    with_ids(root, ids)
    (result,) = register(database, root, ["train"])
    assert (result.new, image_ids(database)) == (3, ids)


@pytest.mark.parametrize("long", ["a" * 241, "骨" * 81, "a" * 100_000])
def test_an_id_that_names_no_file_is_refused_before_anything_is_written(database, root, long):
    with_ids(root, ["short", long])
    with pytest.raises(DatasetError) as caught:
        register(database, root, ["train"])
    assert str(caught.value) == (
        f"{root}/data/train-00000-of-00001.parquet contains the id {long[:20]!r}…, which is {len(long.encode())} bytes "
        "long in UTF-8; the limit is 240, because ids become file names. Shorten it, or take the ids from another "
        "column: --columns image_id=NAME"
    )
    assert [select(database, f"SELECT * FROM {table}") for table in ("datasets", "runs", "images")] == [[], [], []]


def test_a_long_id_in_a_csv_is_refused_too(database, root):
    (root / "train").mkdir(parents=True)
    (root / "train_captions.csv").write_text(f"ID,Caption\n{'a' * 241},x\n")
    with pytest.raises(DatasetError, match="which is 241 bytes long in UTF-8; the limit is 240,"):
        register(database, root, ["train"])


def test_enqueuing_again_changes_nothing(database, root):
    write_shard(root, "train", range(12))
    register(database, root, ["train"])
    before = select(database, "SELECT * FROM images"), select(database, "SELECT * FROM jobs")
    (result,) = register(database, root, ["train"])
    assert (result.new, result.known, result.changed, result.duplicates, result.altered_shards) == (0, 12, 0, 0, [])
    assert (select(database, "SELECT * FROM images"), select(database, "SELECT * FROM jobs")) == before


def test_an_unchanged_shard_is_not_read_again(database, root, monkeypatch):
    write_shard(root, "train", range(12))
    register(database, root, ["train"])
    monkeypatch.setattr("rococap.data.datasets.samples", lambda *_: pytest.fail("read the shard again"))
    register(database, root, ["train"])


def test_limit_and_offset_are_rows_of_the_data_sets_order_and_a_second_call_changes_nothing(database, root):
    write_shard(root, "train", range(20))
    for expected in (4, 0):
        (result,) = register(database, root, ["train"], limit=4, offset=7)
        assert (result.new, result.known) == (expected, 4 - expected)
    assert image_ids(database) == names(7, 8, 9, 10)
    (result,) = register(database, root, ["train"], limit=6, offset=5)
    assert (result.new, result.known) == (2, 4)
    assert sorted(image_ids(database)) == names(5, 6, 7, 8, 9, 10)
    (result,) = register(database, root, ["train"])
    assert (result.new, result.known) == (14, 6)


def test_a_limit_past_the_end_takes_what_there_is_and_an_offset_past_it_is_refused(database, root):
    write_shard(root, "train", range(5))
    assert register(database, root, ["train"], limit=99, offset=3)[0].new == 2
    with pytest.raises(RunError, match="Split train has 5 rows, so --offset 5 is past its end"):
        register(database, root, ["train"], offset=5)


def test_jobs_are_registered_page_by_page(database, root, monkeypatch):
    monkeypatch.setattr("rococap.queue.enqueue.PAGE", 3)
    write_shard(root, "train", range(10), "00000-of-00002")
    write_shard(root, "train", range(10, 14), "00001-of-00002")
    seen = []
    register(database, root, ["train"], progress=lambda what, done, total: seen.append((what, done, total)))
    assert image_ids(database) == names(*range(14))
    assert seen[:2] == [("train: reading captions", 10, 14), ("train: reading captions", 14, 14)]
    assert [done for what, done, _ in seen if what == "train: registering"] == [3, 6, 9, 12, 14]


def test_a_second_row_of_an_id_is_left_out_and_counted(database, root):
    write_shard(root, "train", [0, 1, 1, 2], "00000-of-00002")
    write_shard(root, "train", [2, 3], "00001-of-00002")
    (result,) = register(database, root, ["train"])
    assert (result.new, result.duplicates) == (4, 2)
    assert image_ids(database) == names(0, 1, 2, 3)


def test_a_shard_that_was_altered_is_reported_and_its_rows_get_their_new_place(database, root):
    write_shard(root, "train", range(12))
    register(database, root, ["train"])
    write_shard(root, "train", [11, *range(11), 12])
    (result,) = register(database, root, ["train"])
    assert (result.new, result.known, result.changed) == (1, 12, 12)
    assert result.altered_shards == ["data/train-00000-of-00001.parquet"]
    place = "SELECT row_group, row_in_group FROM images WHERE image_id = 'train_00011'"
    assert select(database, place) == [(0, 0)]


def test_an_altered_shard_takes_no_row_from_another(database, root):
    write_shard(root, "train", range(5), "00000-of-00002")
    write_shard(root, "train", range(5, 10), "00001-of-00002")
    register(database, root, ["train"])
    write_shard(root, "train", [*range(5, 10), 0], "00001-of-00002")
    (result,) = register(database, root, ["train"])
    assert (result.known, result.changed, result.duplicates) == (10, 0, 1)
    shard = "SELECT s.path FROM images i JOIN shards s ON s.id = i.shard_id WHERE i.image_id = 'train_00000'"
    assert select(database, shard) == [("data/train-00000-of-00002.parquet",)]


def test_a_set_that_was_cut_into_other_shards_keeps_its_jobs(database, root):
    path = write_shard(root, "train", range(12))
    register(database, root, ["train"])
    path.unlink()
    write_shard(root, "train", range(6), "00000-of-00002")
    write_shard(root, "train", range(6, 12), "00001-of-00002")
    (result,) = register(database, root, ["train"])
    assert (result.new, result.known, result.changed, result.duplicates) == (0, 12, 12, 0)
    shards = "SELECT s.path, count(*) FROM images i JOIN shards s ON s.id = i.shard_id GROUP BY s.path"
    assert select(database, shards) == [
        ("data/train-00000-of-00002.parquet", 6),
        ("data/train-00001-of-00002.parquet", 6),
    ]


def test_an_enqueue_that_was_killed_goes_on_where_it_stopped(database, root, monkeypatch):
    write_shard(root, "train", range(10), "00000-of-00002")
    write_shard(root, "train", range(10, 14), "00001-of-00002")

    def stop_after_the_first_shard(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        register(database, root, ["train"], progress=stop_after_the_first_shard)
    assert select(database, "SELECT count(*) FROM images") == [(10,)]
    assert register(database, root, ["train"])[0].new == 14


def test_two_runs_share_the_images_and_have_jobs_of_their_own(database, root):
    write_shard(root, "train", range(4))
    register(database, root, ["train"])
    register(database, root, ["train"], run="other", recipe=Recipe(model="tests/small", prompt="In one word?"), limit=2)
    assert select(database, "SELECT count(*) FROM images") == [(4,)]
    assert image_ids(database, "other") == names(0, 1)


def test_a_run_of_another_recipe_is_refused_before_anything_is_registered(database, root):
    write_shard(root, "train", range(4))
    register(database, root, ["train"], limit=1)
    with pytest.raises(RunError, match="prompt: "):
        register(database, root, ["train"], recipe=Recipe(model="tests/small", prompt="In one word?"))
    assert image_ids(database) == names(0)


def test_a_run_on_another_data_set_is_refused(database, root, tmp_path):
    write_shard(root, "train", range(4))
    write_shard(tmp_path / "other", "train", range(4))
    register(database, root, ["train"])
    with pytest.raises(RunError, match="Run 'default' is on another data set"):
        register(database, tmp_path / "other", ["train"])


def test_a_broken_shard_stops_the_enqueue_before_anything_is_written(database, root):
    write_shard(root, "train", range(4), "00000-of-00002")
    path = write_shard(root, "train", range(4, 8), "00001-of-00002")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DatasetError):
        register(database, root, ["train"])
    assert select(database, "SELECT count(*) FROM runs") == [(0,)]
    with db.transaction(database) as conn:
        assert queue.counts(conn) == []


def test_rows_that_moved_between_two_altered_shards_get_their_new_places(database, root):
    write_shard(root, "train", range(5), "00000-of-00002")
    write_shard(root, "train", range(5, 10), "00001-of-00002")
    register(database, root, ["train"])
    write_shard(root, "train", range(5, 10), "00000-of-00002")
    write_shard(root, "train", range(5), "00001-of-00002")
    (result,) = register(database, root, ["train"])
    assert (result.known, result.changed, result.duplicates, len(result.altered_shards)) == (10, 10, 0, 2)
    shard = "SELECT DISTINCT s.path FROM images i JOIN shards s ON s.id = i.shard_id WHERE i.image_id < 'train_00005'"
    assert select(database, shard) == [("data/train-00001-of-00002.parquet",)]


def test_a_split_without_rows_says_so(database, root):
    write_shard(root, "train", [])
    with pytest.raises(RunError, match=r"Split train has 0 rows: choose another\."):
        register(database, root, ["train"])


# --- other columns ---------------------------------------------------------------------------------------------


def write_renamed(root: Path, n: int = 4, **names: str) -> None:
    """A shard whose columns are called otherwise; without one whose name is empty."""
    path = write_shard(root, "train", range(n))
    table = pq.read_table(path)
    kept = [key for key in table.column_names if names.get(key, key)]
    pq.write_table(table.select(kept).rename_columns([names.get(key, key) for key in kept]), path)


def register_with(database: Engine, root: Path, columns: str = "", **options: str) -> list[Enqueued]:
    asked = Columns.parse(columns) if columns else Columns()
    located = replace(locate(str(root), ["train"], **options), columns=asked)
    return enqueue(database, located, ["train"], run="default", recipe=Recipe(model="tests/small"))


NAMES = {"image": "IMG", "image_id": "n", "caption": "text", "cui": "concepts"}
ASKED = "image=IMG,image_id=n,caption=text,cui=concepts"


def test_columns_of_other_names_are_kept_with_the_data_set_and_every_reader_of_pictures_has_them(database, root):
    write_renamed(root, **NAMES)
    assert register_with(database, root, ASKED)[0].new == 4
    assert select(database, "SELECT image_id, caption, cui FROM images ORDER BY id")[1] == (
        *("train_00001", "Original caption 1.", "C0040405"),
    )
    with db.transaction(database, write=True) as conn:
        run = queue.get_run(conn, "default")
        worker = queue.register_worker(conn, "one", "host", 1, INFO)
        lease = queue.claim(conn, worker, run.id, "train", 4, ttl_ms=60_000)
        places = dry_run.places(conn, run, "train", 4)
    assert run.columns == Columns.parse(ASKED)
    assert [job.place for job in lease.jobs] == places
    with PictureReader(root) as reader:
        assert [data for _, data in reader.read(places)] == [picture(n) for n in range(4)]


def test_a_second_enqueue_uses_the_columns_of_the_first_and_is_refused_with_others(database, root):
    write_renamed(root, **NAMES)
    register_with(database, root, ASKED)
    for columns in ("", ASKED, "cui=concepts,caption=text,image_id=n,image=IMG"):
        assert register_with(database, root, columns)[0].known == 4
    with pytest.raises(DatasetError) as caught:
        register_with(database, root, "image=IMG,caption=concepts")
    assert str(caught.value) == (
        f"The data set {root} was registered with {ASKED} for its columns, and its pictures are read with these, not "
        "with image=IMG,caption=concepts: omit --columns, or register it in another queue with --db."
    )
    assert select(database, "SELECT count(*) FROM datasets") == [(1,)]


def test_a_data_set_of_standard_columns_is_not_read_by_others_later(database, root):
    write_shard(root, "train", range(4))
    register(database, root, ["train"])
    assert select(database, "SELECT columns FROM datasets") == [(None,)]
    assert register_with(database, root, "image=image,caption=caption")[0].known == 4
    with pytest.raises(
        DatasetError, match=r"was registered with the standard names for its columns, .* not with caption=cui: "
    ):
        register_with(database, root, "caption=cui")


def test_a_set_without_captions_is_registered_and_told_apart(database, root):
    write_renamed(root, caption="")
    (result,) = register_with(database, root)
    assert (result.new, result.is_unlabelled) == (4, True)
    assert select(database, "SELECT DISTINCT caption FROM images") == [("",)]
    write_shard(root, "test", range(4))
    assert not register(database, root, ["test"])[0].is_unlabelled


def test_rows_that_only_their_number_names_are_refused_once_they_are_other_rows(database, root):
    write_renamed(root, image_id="")
    register_with(database, root)
    assert image_ids(database) == [f"train_{n:06}" for n in range(4)]
    assert register_with(database, root)[0].known == 4
    write_renamed(root, n=5, image_id="")
    with pytest.raises(DatasetError) as caught:
        register_with(database, root)
    path = root / "data" / "train-00000-of-00001.parquet"
    assert str(caught.value) == (
        f"{path} has changed since it was registered, and its rows have no ids to match them by: register the data "
        "set in another queue with --db, or give it a column image_id."
    )
    assert image_ids(database) == [f"train_{n:06}" for n in range(4)]


def test_configurations_of_a_folder_are_data_sets_of_their_own(database, root):
    for config in ("axial", "coronal"):
        write_shard(root / config, "train", range(4))
    with pytest.raises(DatasetError, match=r"several configurations \(axial, coronal\)"):
        register_with(database, root)
    register_with(database, root, config="axial")
    located = locate(f"{root}:coronal", ["train"])
    enqueue(database, located, ["train"], run="other", recipe=Recipe(model="tests/small"))
    assert select(database, "SELECT name FROM datasets ORDER BY id") == [(f"{root}:axial",), (f"{root}:coronal",)]
    assert select(database, "SELECT path FROM shards ORDER BY id") == [
        ("axial/data/train-00000-of-00001.parquet",),
        ("coronal/data/train-00000-of-00001.parquet",),
    ]


# --- pictures that cannot be opened ----------------------------------------------------------------------------


def bad(*numbers: int) -> dict[int, bytes]:
    return dict.fromkeys(numbers, b"no picture")


@pytest.mark.parametrize("good", [0, 1, 17, 37])
def test_a_split_of_which_some_pictures_can_be_opened_is_registered(database, root, good):
    fine = {n % 40 for n in range(good, good + 3)}
    write_shard(root, "train", range(40), pictures=bad(*({*range(40)} - fine)))
    assert register(database, root, ["train"])[0].new == 40


def test_a_split_of_which_no_picture_can_be_opened_is_refused_before_anything_is_written(database, root):
    write_shard(root, "train", range(30), "00000-of-00002", pictures=bad(*range(30)))
    write_shard(root, "train", range(30, 50), "00001-of-00002", pictures=bad(*range(30, 50)))
    with pytest.raises(DatasetError) as caught:
        register(database, root, ["train"])
    told = str(caught.value)
    assert told.startswith(
        "Nothing was registered: none of the 20 pictures tried from the split 'train' can be opened. "
        "The first, row 1 of data/train-00000-of-00002.parquet: "
    )
    assert told.endswith(" If the pictures are elsewhere, name their column: --columns image=NAME")
    assert "\n" not in told
    assert select(database, "SELECT count(*) FROM datasets") == select(database, "SELECT count(*) FROM runs") == [(0,)]


def test_every_picture_of_a_small_split_is_tried(database, root):
    write_shard(root, "train", range(20), pictures=bad(*range(19)))
    assert register(database, root, ["train"])[0].new == 20
    write_shard(root, "test", range(1), pictures=bad(0))
    with pytest.raises(DatasetError, match="none of the 1 pictures tried from the split 'test'"):
        register(database, root, ["train", "test"])


def test_a_split_that_is_registered_and_unchanged_is_not_looked_at_again(database, root, monkeypatch):
    write_shard(root, "train", range(12))
    register(database, root, ["train"])
    monkeypatch.setattr(PictureReader, "look", lambda *_: pytest.fail("looked again"))
    assert register(database, root, ["train"])[0].known == 12
    assert register(database, root, ["train"], run="other")[0].new == 12
    write_shard(root, "train", range(13))
    with pytest.raises(pytest.fail.Exception, match="looked again"):
        register(database, root, ["train"])


def test_a_folder_whose_pictures_are_not_there_is_refused(database, root):
    (root / "train").mkdir(parents=True)
    (root / "train_captions.csv").write_text("ID,Caption\na,A.\nb,B.\n")
    with pytest.raises(DatasetError) as caught:
        register(database, root, ["train"])
    assert "The first, row 0 of train_captions.csv: There is no file train/a.jpg for a: restore it, then retry." in str(
        caught.value
    )
    (root / "train" / "b.TIF").write_bytes(picture(1))
    assert register(database, root, ["train"])[0].new == 2


# --- from another run ------------------------------------------------------------------------------------------


def caption_some(database, n: int) -> queue.Run:
    """The default run with the first n pictures captioned, the even ones empty."""
    with db.transaction(database, write=True) as conn:
        run = queue.get_run(conn, "default")
        lease = queue.claim(
            conn, queue.register_worker(conn, "one", "host", 1, INFO), run.id, "train", n, ttl_ms=60_000
        )
        queue.complete(conn, lease, [Completion(job.id, "A CT." * (i % 2)) for i, job in enumerate(lease.jobs)])
    return run


def test_flagged_captions_are_done_again_in_a_run_of_their_own(database, tmp_path, monkeypatch):
    monkeypatch.setattr("rococap.queue.enqueue.PAGE", 2)
    fill(database, tmp_path / "set", 9)
    old = caption_some(database, 7)
    recipe = replace(old.recipe, repetition_penalty=1.1)
    again = {"run": "again", "recipe": recipe, "flags": ["empty", "loop"]}
    assert enqueue_from(database, old, ["train"], **again) == [Enqueued("train", new=4)]
    assert image_ids(database, "again") == names(0, 2, 4, 6)
    assert enqueue_from(database, old, ["train"], **again) == [Enqueued("train", known=4)]
    with db.transaction(database) as conn:
        assert queue.get_run(conn, "again").dataset_id == old.dataset_id
        assert tallies(conn) == recount(conn)


def test_a_run_may_take_all_pictures_of_another(database, tmp_path):
    fill(database, tmp_path / "set", 9)
    old = caption_some(database, 3)
    recipe = replace(old.recipe, prompt="What is this?")
    assert enqueue_from(database, old, ["train"], run="all", recipe=recipe) == [Enqueued("train", new=9)]


def test_flags_that_no_caption_has_make_no_run(database, tmp_path):
    fill(database, tmp_path / "set", 3)
    old = caption_some(database, 3)
    with pytest.raises(
        RunError, match=r"^No caption of run 'default' is flagged loop or one_token. See: rococap status$"
    ):
        enqueue_from(
            database,
            old,
            ["train"],
            run="again",
            recipe=replace(old.recipe, prompt="What?"),
            flags=["loop", "one_token"],
        )
    with db.transaction(database) as conn:
        assert [run.name for run in queue.list_runs(conn)] == ["default"]


def test_the_same_recipe_would_say_the_same_again(database, tmp_path):
    fill(database, tmp_path / "set", 3)
    old = caption_some(database, 3)
    with pytest.raises(RunError) as caught:
        enqueue_from(database, old, ["train"], run="again", recipe=old.recipe, flags=["empty"])
    assert str(caught.value) == (
        "Run 'default' has the same recipe, which would give the same captions again. Change something: --prompt, "
        "--model, --max-new-tokens, --repetition-penalty …"
    )


# --- Parts of a split ------------------------------------------------------------------------------------------


def folder_of(root: Path, n: int) -> None:
    """Pictures in a folder, with their captions CSV."""
    (root / "train").mkdir(parents=True)
    for number in range(n):
        (root / "train" / f"train_{number:05}.png").write_bytes(picture(number))
    rows = "".join(f"train_{number:05},Original caption {number}.\n" for number in range(n))
    (root / "train_captions.csv").write_text("ID,Caption\n" + rows)


def test_parts_are_every_nth_row_group_across_shards_disjoint_and_together_everything(database, root):
    write_shard(root, "train", range(25), "00000-of-00002")  # row groups of 10, 10, 5
    write_shard(root, "train", range(25, 47), "00001-of-00002")  # 10, 10, 2
    for number in (2, 1, 4, 3):
        (result,) = register(database, root, ["train"], run=f"part{number}", part=queue.Part(number, 4))
        assert result.known == 0
    assert image_ids(database, "part1") == names(*range(10), *range(35, 45))
    assert image_ids(database, "part2") == names(*range(10, 20), *range(45, 47))
    assert image_ids(database, "part3") == names(*range(20, 25))
    assert image_ids(database, "part4") == names(*range(25, 35))


def test_parts_of_a_folder_are_blocks_of_100_pictures(database, root):
    folder_of(root, 305)
    for number in (1, 2):
        register(database, root, ["train"], run=f"part{number}", part=queue.Part(number, 2))
    assert image_ids(database, "part1") == names(*range(100), *range(200, 300))
    assert image_ids(database, "part2") == names(*range(100, 200), *range(300, 305))


def test_parts_are_the_same_on_a_machine_that_saw_the_shards_in_another_order(database, root):
    write_shard(root, "train", range(20, 40), "b-00000-of-00001")
    (root / "data" / "train-b-00000-of-00001.parquet").rename(root / "data" / "train-00001-of-00002.parquet")
    later = write_shard(root, "train", range(20), "00000-of-00002")
    later.rename(root / "later.parquet")
    (root / "data" / "train-00001-of-00002.parquet").rename(root / "data" / "train-00000-of-00001.parquet")
    register(database, root, ["train"], run="before")
    (root / "data" / "train-00000-of-00001.parquet").rename(root / "data" / "train-00001-of-00002.parquet")
    (root / "later.parquet").rename(later)
    register(database, root, ["train"], part=queue.Part(1, 2))
    assert sorted(image_ids(database)) == names(*range(10), *range(20, 30))


def parts(database: Engine) -> list[str]:
    with db.transaction(database) as conn:
        return list(map(str, queue.parts_of(conn, queue.get_run(conn, "default"), "train")))


def test_several_parts_add_up_and_the_whole_split_is_no_part(database, root):
    write_shard(root, "train", range(40))
    part = queue.Part(1, 3)
    assert [register(database, root, ["train"], part=part)[0].new for _ in range(2)] == [20, 0]
    register(database, root, ["train"], limit=5)
    assert parts(database) == ["1/3"], "nothing was added"
    register(database, root, ["train"], part=queue.Part(3, 3))
    assert (parts(database), len(image_ids(database))) == (["1/3", "3/3"], 30)
    register(database, root, ["train"])
    assert (parts(database), len(image_ids(database))) == ([], 40)
    register(database, root, ["train"], part=part)
    assert parts(database) == [], "it has the rest too"
    assert tallies_match(database)


def test_a_run_that_gets_pictures_of_another_run_has_no_part_any_more(database, root):
    write_shard(root, "train", range(40))
    part, recipe = queue.Part(1, 2), Recipe(model="tests/small")
    prompt = replace(recipe, prompt="Another.")
    register(database, root, ["train"], run="whole", recipe=prompt)
    register(database, root, ["train"], run="part", recipe=prompt, part=part)
    register(database, root, ["train"], recipe=recipe, part=part)
    with db.transaction(database) as conn:
        old, same = queue.get_run(conn, "whole"), queue.get_run(conn, "part")
    (found,) = enqueue_from(database, same, ["train"], run="default", recipe=recipe)
    assert (found.new, parts(database)) == (0, ["1/2"])
    (found,) = enqueue_from(database, old, ["train"], run="default", recipe=recipe)
    assert (found.new > 0, parts(database)) == (True, [])


def tallies_match(database: Engine) -> bool:
    with db.transaction(database) as conn:
        return tallies(conn) == recount(conn)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (
            queue.Part(2, 2),
            "Run 'default' has part 1/3 of train, which part 2/2 would overlap. Use the same number of parts, "
            "--part i/3, or another run: --run NAME",
        ),
        (
            queue.Part(1, 5),
            "Split train cannot be divided into 5 parts: it has 4 row groups or blocks of 100 pictures, which stay "
            "together. Use --part i/4 or fewer parts.",
        ),
    ],
)
def test_a_part_that_would_overlap_or_leave_another_empty_is_refused(database, root, part, told):
    write_shard(root, "train", range(40))
    register(database, root, ["train"], part=queue.Part(1, 3))
    before = select(database, "SELECT * FROM jobs")
    with pytest.raises(RunError) as caught:
        register(database, root, ["train"], part=part)
    assert str(caught.value) == told
    assert (parts(database), select(database, "SELECT * FROM jobs")) == (["1/3"], before)


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3", "1/3/5", ""])
def test_what_is_no_part(text):
    with pytest.raises(ValueError, match="is not a part: write its number and how many there are, such as 1/4"):
        queue.Part.parse(text)


def test_parts_are_all_there_only_if_each_of_one_division_is():
    of = queue.Part.parse
    assert not queue.are_all([])
    assert not queue.are_all([of("1/2"), of("2/3")])
    assert queue.are_all([of("1/2"), of("2/3"), of("2/2")])
