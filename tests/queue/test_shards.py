"""A data set that is at another path on this machine."""

import shutil
from pathlib import Path

import pytest
from samples import fill, register, write_shard

from rococap import db, queue
from rococap.data import Dataset, PictureReader
from rococap.errors import DatasetError
from rococap.queue.enqueue import enqueue
from rococap.recipe import Recipe

COMMIT = "0" * 40


@pytest.fixture
def run(database, tmp_path):
    return fill(database, tmp_path / "set", 12)


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """The data set, moved away."""
    return Path(shutil.move(tmp_path / "set", tmp_path / "copy"))


def places(database, run):
    with db.transaction(database) as conn:
        rows = db.execute(conn, f"SELECT {queue.PLACE} FROM images i JOIN shards s ON s.id = i.shard_id").fetchall()
    return [queue.place_of(row, run.columns) for row in rows]


def test_pictures_are_read_from_the_copy_and_the_run_keeps_its_data_set(database, run, copy):
    with pytest.raises(DatasetError, match=r"There is no folder .* with --dataset-root or ROCOCAP_DATASET_ROOT"):
        queue.dataset_of(database, run, ["train"])
    dataset = queue.dataset_of(database, run, ["train"], str(copy))
    assert (dataset.name, dataset.root) == (run.dataset, copy)
    with PictureReader(dataset.root) as reader:
        assert all(isinstance(data, bytes) for _, data in reader.read(places(database, run)))


def test_the_environment_names_a_copy_for_every_command(database, run, copy, tmp_path, monkeypatch):
    monkeypatch.setenv("ROCOCAP_DATASET_ROOT", str(copy))
    assert queue.dataset_of(database, run, ["train"]).root == copy
    with pytest.raises(DatasetError, match="There is no folder"):
        queue.dataset_of(database, run, ["train"], str(tmp_path / "option"))


def test_a_copy_of_a_data_set_of_the_hub_needs_no_hub(database, tmp_path):
    write_shard(tmp_path / "snapshot", "train", range(3))
    located = Dataset("radiology/roco", tmp_path / "snapshot", COMMIT)
    enqueue(database, located, ["train"], run="hub", recipe=Recipe(model="tests/small"))
    with db.transaction(database) as conn:
        run = queue.get_run(conn, "hub")
    dataset = queue.dataset_of(database, run, ["train"], str(tmp_path / "snapshot"))
    assert (dataset.name, dataset.root, dataset.revision) == ("radiology/roco", tmp_path / "snapshot", COMMIT)


@pytest.mark.parametrize(
    ("found", "names"),
    [("has another", ["00000-of-00001"]), ("lacks", ["00000-of-00002", "00001-of-00002"])],
)
def test_a_folder_that_is_no_copy_is_refused(database, run, tmp_path, found, names):
    other = tmp_path / "other"
    for number, name in enumerate(names):
        write_shard(other, "train", [number], name)
    with pytest.raises(DatasetError) as raised:
        queue.dataset_of(database, run, ["train"], str(other))
    assert f"{other} is no copy of the data set of run 'default', {run.dataset}: it {found} " in str(raised.value)
    assert f"{found} data/train-00000-of-00001.parquet. Name the folder of a copy with" in str(raised.value)


def test_only_the_splits_that_are_worked_on_have_to_be_there(database, run, copy, tmp_path):
    write_shard(tmp_path / "set", "train", range(12))
    write_shard(tmp_path / "set", "validation", range(3))
    register(database, tmp_path / "set", ["validation"])
    assert queue.dataset_of(database, run, ["train"], str(copy)).root == copy
    with pytest.raises(DatasetError, match="no split 'validation'"):
        queue.dataset_of(database, run, ["validation"], str(copy))
