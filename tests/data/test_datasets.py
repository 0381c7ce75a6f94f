import csv
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from unicodedata import normalize

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from places import SHARED
from samples import picture as png
from samples import write_shard as write_hub_shard

from rococap.data import STANDARD, Columns, Dataset, PictureReader, Place, Sample, Shard
from rococap.data.datasets import find_shards, locate, samples
from rococap.errors import DatasetError, PictureError

CAPTIONS = SHARED / "captions"
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def row(number, caption="A caption.", cui=("C0040405",), data=None, path=None):
    picture = f"picture {number}".encode() if data is None else data
    return {
        "image": {"bytes": picture, "path": path},
        "image_id": f"ROCOv2_2023_train_{number:06d}",
        "caption": caption,
        "cui": None if cui is None else list(cui),
    }


def write_shard(path, rows, row_group_size=100, text=None, listed=None, columns=None, **options):
    text = text or pa.string()
    schema = pa.schema([("image", IMAGE), ("image_id", text), ("caption", text), ("cui", (listed or pa.list_)(text))])
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table.select(columns or schema.names), path, row_group_size=row_group_size, **options)


def write_csv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def all_samples(root, split="train"):
    return [sample for shard in find_shards(root, split) for sample in samples(root, shard)]


def place(number, row_group=0, row_in_group=None, shard="train-00000-of-00001.parquet", split="train"):
    return Place(
        shard, split, row_group, number if row_in_group is None else row_in_group, f"ROCOv2_2023_train_{number:06d}"
    )


def read(reader, places):
    """What was read for each place: bytes, or the code of the error."""
    read = list(reader.read(places))
    assert [there for there, _ in read] == list(places)
    return [item.code if isinstance(item, PictureError) else item for _, item in read]


def message(call, *args):
    with pytest.raises(DatasetError) as caught:
        call(*args)
    return str(caught.value)


# ---- Parquet: shards


def test_a_shard_says_what_its_file_holds(tmp_path):
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    write_shard(path, [row(n) for n in range(250)])
    data = path.read_bytes()
    footer = data[-8 - int.from_bytes(data[-8:-4], "little") : -8]
    assert find_shards(tmp_path, "train") == [
        Shard(
            path="data/train-00000-of-00001.parquet",
            split="train",
            rows=250,
            row_groups=3,
            size=len(data),
            digest=hashlib.sha256(footer).hexdigest(),
        )
    ]


def test_another_caption_gives_another_digest(tmp_path):
    digests = set()
    for caption in ("left", "right"):
        write_shard(tmp_path / "train-00000-of-00001.parquet", [row(1, caption=caption)])
        digests.add(find_shards(tmp_path, "train")[0].digest)
    assert len(digests) == 2


@pytest.mark.parametrize("folder", ["data", "."])
def test_shards_come_in_the_order_of_their_numbers(tmp_path, folder):
    numbers = [10, 2, 0, 11, 1, 3, 9, 4, 8, 5, 7, 6]
    for number in numbers:
        write_shard(tmp_path / folder / f"train-{number:05d}-of-00012.parquet", [row(number)])
    assert [sample.image_id[-2:] for sample in all_samples(tmp_path)] == [f"{n:02d}" for n in range(12)]


def test_only_the_split_asked_for_is_read(tmp_path):
    for number, split in enumerate(("train", "validation", "test")):
        write_shard(tmp_path / "data" / f"{split}-00000-of-00001.parquet", [row(number)])
    assert [sample.image_id[-1] for sample in all_samples(tmp_path, "validation")] == ["1"]


def test_shards_with_a_hash_in_their_name_are_found(tmp_path):
    write_shard(tmp_path / "train-00000-of-00001-3f2a9c0b1d.parquet", [row(0)])
    assert len(find_shards(tmp_path, "train")) == 1


def test_missing_shards_are_named(tmp_path):
    for number in (0, 2):
        write_shard(tmp_path / f"train-{number:05d}-of-00004.parquet", [row(number)])
    assert message(find_shards, tmp_path, "train") == (
        f"{tmp_path} lacks 2 of the 4 shards of the split 'train': train-00001-of-00004.parquet, "
        "train-00003-of-00004.parquet. Download them, then run this again."
    )


def test_of_many_missing_shards_five_are_named(tmp_path):
    write_shard(tmp_path / "train-00000-of-00027.parquet", [row(0)])
    assert message(find_shards, tmp_path, "train").endswith(
        "train-00004-of-00027.parquet, train-00005-of-00027.parquet and 21 more. Download them, then run this again."
    )


def test_shards_of_two_sets_are_refused(tmp_path):
    write_shard(tmp_path / "train-00000-of-00003.parquet", [row(0)])
    write_shard(tmp_path / "train-00001-of-00002.parquet", [row(1)])
    assert message(find_shards, tmp_path, "train") == (
        f"{tmp_path} has shards of more than one set for the split 'train' (of 00002, of 00003): "
        "keep one set and move the others away."
    )


def test_one_shard_twice_is_refused(tmp_path):
    for end in ("", "-0a1b2c"):
        write_shard(tmp_path / f"train-00000-of-00001{end}.parquet", [row(0)])
    assert "more than one set" in message(find_shards, tmp_path, "train")


def test_a_missing_split_names_those_that_are_there(tmp_path):
    write_shard(tmp_path / "data" / "test-00000-of-00001.parquet", [row(0)])
    write_csv(tmp_path / "valid_captions.csv", ["ID", "Caption"], [])
    assert message(find_shards, tmp_path, "train") == (
        f"{tmp_path} has no split 'train': there is neither train-00000-of-000NN.parquet nor train_captions.csv. "
        "It has: validation, test. Choose one of these."
    )


def test_a_folder_without_splits_says_so(tmp_path):
    assert message(find_shards, tmp_path, "validation") == (
        f"{tmp_path} has no split 'validation': there is neither validation-00000-of-000NN.parquet nor "
        "valid_captions.csv. It has no split at all: choose another folder."
    )


def test_a_folder_that_is_gone_is_named(tmp_path):
    assert message(find_shards, tmp_path / "nowhere", "train") == (
        f"There is no folder {tmp_path / 'nowhere'}: check the path."
    )


@pytest.mark.parametrize("kept", [0, 3, 11, 2000])
def test_a_truncated_shard_is_named(tmp_path, kept):
    path = tmp_path / "train-00000-of-00001.parquet"
    write_shard(path, [row(n, caption=str(n) * 40) for n in range(100)])
    whole = path.read_bytes()
    assert len(whole) > 2000
    path.write_bytes(whole[:kept])
    assert message(find_shards, tmp_path, "train") == (
        f"{path} is not a Parquet file, or it is truncated or damaged: download it again."
    )


def test_a_page_that_is_not_parquet_is_named(tmp_path):
    path = tmp_path / "train-00000-of-00001.parquet"
    path.write_text("<!DOCTYPE html><title>Too many requests</title>")
    assert message(find_shards, tmp_path, "train") == (
        f"{path} is not a Parquet file, or it is truncated or damaged: download it again."
    )


def test_missing_columns_are_named_with_those_found(tmp_path):
    path = tmp_path / "train-00000-of-00001.parquet"
    write_shard(path, [row(0)], columns=["caption", "cui"])
    assert message(find_shards, tmp_path, "train") == (
        f"{path} lacks the column image; it has the columns caption, cui. "
        "Say what they are called, for example --columns image=IMG,image_id=ID,caption=TEXT,cui=CONCEPTS"
    )
    columns = Columns(image="cui", image_id="number", caption="caption", cui="concepts")
    assert message(find_shards, tmp_path, "train", "", columns).startswith(
        f"{path} lacks the columns number, concepts; it has the columns caption, cui. "
    )


@pytest.mark.parametrize(
    ("column", "values", "complaint"),
    [
        ("image", pa.array([7]), "the column image is int64, not a struct with bytes"),
        ("image", pa.array([{"height": 7}]), "the column image is struct<height: int64>, not a struct with bytes"),
        (
            "image",
            pa.array([[{"bytes": b"x"}]]),
            "the column image is list<element: struct<bytes: binary>>, not a struct with bytes",
        ),
        ("image_id", pa.array([7.5]), "the column image_id is double, not text"),
        ("image_id", pa.array([b"x"]), "the column image_id is binary, not text"),
        ("caption", pa.array([b"x"]), "the column caption is binary, not text"),
        ("caption", pa.array([["x"]]), "the column caption is list<element: string>, not text"),
        ("cui", pa.array([7]), "the column cui is int64, not a list of text"),
        ("cui", pa.array([[7]]), "the column cui is list<element: int64>, not a list of text"),
    ],
)
def test_a_column_of_another_type_is_named(tmp_path, column, values, complaint):
    path = tmp_path / "train-00000-of-00001.parquet"
    write_shard(path, [row(0)])
    replace_column(path, column, values)
    assert message(find_shards, tmp_path, "train") == f"{path}: {complaint}. Write the file again."


def replace_column(path, column, values):
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.schema.get_field_index(column), column, values), path)


DECODE = "If it holds base64, decode it (base64.b64decode) to pa.binary()"
CAST = "Convert each list with bytes() to pa.binary()."
PATHS = "; if it holds paths, make it the field path of a struct."


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (pa.array([{"bytes": [1, 2], "path": None}]), f"image.bytes is list<element: int64>, not binary. {CAST}"),
        (
            pa.array([{"bytes": [1, 2]}], pa.struct([("bytes", pa.large_list(pa.uint8()))])),
            f"image.bytes is large_list<element: uint8>, not binary. {CAST}",
        ),
        (pa.array([{"bytes": "aGk=", "path": "a.png"}]), f"image.bytes is string, not binary. {DECODE}."),
        (pa.array(["aGk="], pa.large_string()), f"image is large_string, not a struct with bytes. {DECODE}{PATHS}"),
        (pa.array(["a.png"]).dictionary_encode(), None),
        (pa.array([[1, 2]], pa.list_(pa.uint8())), f"image is list<element: uint8>, not a struct with bytes. {CAST}"),
    ],
)
def test_pictures_that_are_not_binary_are_refused_with_what_to_cast_them_to(tmp_path, values, complaint):
    path = tmp_path / "train-00000-of-00001.parquet"
    write_shard(path, [row(0)])
    replace_column(path, "image", values)
    complaint = complaint or f"image is {values.type}, not a struct with bytes. {DECODE}{PATHS}"
    assert message(find_shards, tmp_path, "train") == f"{path}: the column {complaint}"


@pytest.mark.parametrize("column", ["image", "image_id", "caption", "cui"])
def test_a_column_that_is_there_twice_is_named_with_its_file(tmp_path, column):
    path = tmp_path / "train-00000-of-00001.parquet"
    write_shard(path, [row(0)])
    table = pq.read_table(path)
    pq.write_table(table.append_column(column, table.column(column)), path)
    assert message(find_shards, tmp_path, "train") == (
        f"{path} has the column {column} 2 times: rename or drop all but one."
    )


def test_a_field_of_the_picture_that_is_there_twice_is_named(tmp_path):
    path = tmp_path / "train-00000-of-00001.parquet"
    write_shard(path, [row(0)])
    twice = pa.StructArray.from_arrays([pa.array([b"x"]), pa.array([b"y"])], names=["bytes", "bytes"])
    replace_column(path, "image", twice)
    assert message(find_shards, tmp_path, "train") == (
        f"{path}: the column image has the field bytes 2 times: rename or drop all but one."
    )


def test_a_column_that_nobody_reads_may_be_there_twice(tmp_path):
    path = tmp_path / "train-00000-of-00001.parquet"
    write_shard(path, [row(0)])
    table = pq.read_table(path)
    pq.write_table(table.append_column("note", pa.array(["x"])).append_column("note", pa.array(["y"])), path)
    assert [sample.caption for sample in all_samples(tmp_path)] == ["A caption."]
    with PictureReader(tmp_path) as reader:
        assert read(reader, [place(0)]) == [b"picture 0"]


# ---- Parquet: other columns


def write_table(path, table, row_group_size=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)


def picture_of(root, sample, shard, columns=STANDARD):
    place = Place(shard.path, shard.split, sample.row_group, sample.row_in_group, sample.image_id, columns)
    with PictureReader(root) as reader:
        ((_, data),) = reader.read([place])
    return data.code if isinstance(data, PictureError) else data


def everything(root, columns=STANDARD, split="train"):
    """(id, caption, concepts, picture) of each row."""
    return [
        (sample.image_id, sample.caption, sample.cui, picture_of(root, sample, shard, columns))
        for shard in find_shards(root, split, columns=columns)
        for sample in samples(root, shard, columns)
    ]


def test_columns_of_other_names_are_read(tmp_path):
    images = pa.array([{"bytes": b"p0", "path": None}, {"bytes": b"p1", "path": None}], IMAGE)
    table = pa.table(
        {"IMG": images, "n": ["a", "b"], "text": ["A.", "B."], "concepts": [["C1"], []], "image": ["x", "y"]}
    )
    write_table(tmp_path / "train.parquet", table)
    columns = Columns.parse("image=IMG,image_id=n, caption=text,cui=concepts")
    assert everything(tmp_path, columns) == [("a", "A.", ("C1",), b"p0"), ("b", "B.", (), b"p1")]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()], ids=str)
def test_a_picture_may_be_a_plain_binary_column(tmp_path, kind):
    write_table(tmp_path / "train.parquet", pa.table({"image": pa.array([b"p0", b"p1"], kind), "image_id": ["a", "b"]}))
    assert everything(tmp_path) == [("a", "", (), b"p0"), ("b", "", (), b"p1")]


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.uint64()], ids=str)
def test_ids_that_are_numbers_are_taken_as_text(tmp_path, kind):
    write_table(tmp_path / "train.parquet", pa.table({"image": [b"p0", b"p1"], "image_id": pa.array([7, 12], kind)}))
    assert everything(tmp_path) == [("7", "", (), b"p0"), ("12", "", (), b"p1")]


def test_concepts_may_be_text_joined_by_semicolons(tmp_path):
    cuis = ["C1;C2", "", None, "nan", "C3; C4"]
    write_table(tmp_path / "train.parquet", pa.table({"image": [b"p"] * 5, "image_id": list("abcde"), "cui": cuis}))
    assert [sample.cui for sample in all_samples(tmp_path)] == [("C1", "C2"), (), (), (), ("C3", "C4")]


@pytest.mark.parametrize("captions", [None, pa.nulls(2), pa.array([None, None], pa.string())])
def test_a_set_without_captions_is_unlabelled(tmp_path, captions):
    table = pa.table({"image": [b"p0", b"p1"], "image_id": ["a", "b"]})
    write_table(tmp_path / "train.parquet", table if captions is None else table.append_column("caption", captions))
    assert [sample.caption for sample in all_samples(tmp_path)] == ["", ""]


def write_without_ids(root, paths, per_shard=4):
    """Shards of pictures that have a path, in row groups of three."""
    numbers = range(len(paths))
    n_shards = -(-len(paths) // per_shard)
    for shard in range(n_shards):
        part = numbers[shard * per_shard : (shard + 1) * per_shard]
        images = [{"bytes": f"p{n}".encode(), "path": paths[n]} for n in part]
        table = pa.table({"image": pa.array(images, IMAGE), "caption": [f"c{n}" for n in part]})
        write_table(root / f"train-{shard:05}-of-{n_shards:05}.parquet", table)


def test_without_ids_the_file_name_is_the_id_as_it_is(tmp_path):
    paths = ["a.png", "x/b.JPG", "deep/er/c d.dcm", "./e", "Röntgen.tif"]
    write_without_ids(tmp_path, paths)
    expected = ["a.png", "b.JPG", "c d.dcm", "e", "Röntgen.tif"]
    assert everything(tmp_path) == [(one, f"c{n}", (), f"p{n}".encode()) for n, one in enumerate(expected)]


@pytest.mark.parametrize("paths", [["a.png", None], ["a.png", ""], ["a.png", "x/"], ["x/a.png", "y/a.png"], [None] * 2])
def test_without_ids_and_file_names_that_are_distinct_rows_are_counted_over_the_split(tmp_path, paths):
    paths = [*(f"{n}.png" for n in range(7)), *paths]
    write_without_ids(tmp_path, paths)
    expected = [(f"train_{n:06}", f"c{n}", (), f"p{n}".encode()) for n in range(9)]
    assert everything(tmp_path) == expected


def test_pictures_alone_are_enough(tmp_path):
    write_table(tmp_path / "test.parquet", pa.table({"image": [b"p0", b"p1", b"p2", b"p3"]}))
    assert everything(tmp_path, split="test") == [(f"test_{n:06}", "", (), f"p{n}".encode()) for n in range(4)]


def test_a_file_name_that_is_not_the_one_enqueued_means_moved(tmp_path):
    write_without_ids(tmp_path, ["a.png", "b.png"])
    with PictureReader(tmp_path) as reader:
        ((_, error),) = reader.read([Place("train-00000-of-00001.parquet", "train", 0, 1, "a.png")])
    assert str(error).startswith("train-00000-of-00001.parquet holds 'b.png' in row group 0, row 1, where 'a.png' was ")


def test_a_row_whose_id_is_null_is_not_taken_for_one_without_ids(tmp_path):
    write_shard(tmp_path / "train-00000-of-00001.parquet", [row(0) | {"image_id": None}])
    with PictureReader(tmp_path) as reader:
        ((_, error),) = reader.read([Place("train-00000-of-00001.parquet", "train", 0, 0, "train_000000")])
    assert error.code == "moved"


def test_one_shard_of_a_split_without_ids_is_named(tmp_path):
    write_shard(tmp_path / "train-00000-of-00002.parquet", [row(0)])
    write_shard(tmp_path / "train-00001-of-00002.parquet", [row(1)], columns=["image", "caption"])
    assert message(find_shards, tmp_path, "train") == (
        f"{tmp_path / 'train-00001-of-00002.parquet'} lacks the column image_id, which train-00000-of-00002.parquet "
        "has: write it with ids, or all files of the split without."
    )


@pytest.mark.parametrize("text", ["text=x", "image", "image=", "caption=a,caption=b", "", "=x", "image=a,,cui=b"])
def test_what_columns_cannot_be_is_refused_with_what_can(text):
    told = message(Columns.parse, text)
    assert told.startswith(
        "--columns takes image, image_id, caption and cui, each at most once and with the name of a "
    )
    assert told.endswith("for example --columns image=IMG,caption=TEXT")


def test_columns_come_back_from_their_json():
    columns = Columns.parse("image=IMG,cui=Konzepte")
    assert Columns.from_json(columns.to_json()) == columns
    assert (STANDARD.to_json(), Columns.from_json(None)) == (None, STANDARD)
    assert columns.differs(STANDARD)
    assert not Columns(image="image").differs(STANDARD)


# ---- Parquet: samples


@pytest.mark.parametrize("row_group_size", [1, 7, 100, 10_000])
@pytest.mark.parametrize("text", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
@pytest.mark.parametrize("listed", [pa.list_, pa.large_list])
def test_every_row_comes_once_in_order_with_its_place(tmp_path, row_group_size, text, listed):
    rows = [row(n, caption=f"Caption {n}", cui=[f"C{n}", f"D{n}"][: n % 3]) for n in range(250)]
    write_shard(tmp_path / "train-00000-of-00001.parquet", rows, row_group_size, text, listed)
    assert all_samples(tmp_path) == [
        Sample(
            image_id=f"ROCOv2_2023_train_{n:06d}",
            caption=f"Caption {n}",
            cui=(f"C{n}", f"D{n}")[: n % 3],
            row_group=n // row_group_size,
            row_in_group=n % row_group_size,
        )
        for n in range(250)
    ]


def test_places_are_right_beyond_one_batch_of_rows(tmp_path):
    write_shard(tmp_path / "train-00000-of-00001.parquet", [row(n) for n in range(20_000)], row_group_size=9000)
    found = [(sample.image_id, sample.row_group, sample.row_in_group) for sample in all_samples(tmp_path)]
    assert found == [(f"ROCOv2_2023_train_{n:06d}", n // 9000, n % 9000) for n in range(20_000)]


def test_the_concept_nan_is_dropped(tmp_path):
    rows = [
        row(0, cui=["nan"]),
        row(1, cui=None),
        row(2, cui=[]),
        row(3, cui=["C1", None, "nan", "", "C2"]),
    ]
    write_shard(tmp_path / "train-00000-of-00001.parquet", rows)
    assert [sample.cui for sample in all_samples(tmp_path)] == [(), (), (), ("C1", "C2")]


def test_no_concepts_column_means_no_concepts(tmp_path):
    write_shard(tmp_path / "train-00000-of-00001.parquet", [row(0), row(1)], columns=["image_id", "image", "caption"])
    assert [sample.cui for sample in all_samples(tmp_path)] == [(), ()]


def test_a_caption_that_is_null_is_empty(tmp_path):
    write_shard(tmp_path / "train-00000-of-00001.parquet", [row(0, caption=None), row(1, caption=" kept \n")])
    assert [sample.caption for sample in all_samples(tmp_path)] == ["", " kept \n"]


def test_rows_without_an_id_are_refused(tmp_path):
    path = tmp_path / "train-00000-of-00001.parquet"
    write_shard(path, [row(0), row(1) | {"image_id": None}])
    assert message(all_samples, tmp_path) == f"{path}: 1 rows have no image_id. Write the file again."


def test_a_shard_that_breaks_after_it_was_found_is_named(tmp_path):
    path = tmp_path / "train-00000-of-00001.parquet"
    write_shard(path, [row(0)])
    (shard,) = find_shards(tmp_path, "train")
    path.write_bytes(b"PAR1")
    assert message(lambda: list(samples(tmp_path, shard))) == (
        f"{path} is not a Parquet file, or it is truncated or damaged: download it again."
    )
    path.unlink()
    assert message(lambda: list(samples(tmp_path, shard))) == (f"{path} is gone: restore it or download it again.")


def test_samples_read_no_picture(tmp_path):
    path = tmp_path / "train-00000-of-00001.parquet"
    write_shard(path, [row(n, data=b"PICTURE" * 999) for n in range(40)], 10, compression="none", use_dictionary=False)
    expected = all_samples(tmp_path)
    data = path.read_bytes()
    assert data.count(b"PICTURE") == 999 * 40
    meta = pq.read_metadata(path)
    broken = bytearray(data)
    for group in range(4):
        column = meta.row_group(group).column(0)
        assert column.path_in_schema == "image.bytes"
        start = column.data_page_offset
        broken[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(broken)
    assert all_samples(tmp_path) == expected


# ---- folders of pictures: shards and samples


def test_a_captions_csv_is_one_shard(tmp_path):
    path = tmp_path / "train_captions.csv"
    write_csv(path, ["ID", "Caption"], [["a", "one"], ["b", "two\nlines"], ["c", ""]])
    assert find_shards(tmp_path, "train") == [
        Shard(
            path="train_captions.csv",
            split="train",
            rows=3,
            row_groups=1,
            size=path.stat().st_size,
            digest=hashlib.sha256(path.read_bytes()).hexdigest(),
        )
    ]
    assert all_samples(tmp_path) == [
        Sample("a", "one", (), 0, 0),
        Sample("b", "two\nlines", (), 0, 1),
        Sample("c", "", (), 0, 2),
    ]


@pytest.mark.parametrize("infix", ["valid", "validation"])
def test_the_split_validation_is_called_valid_in_files(tmp_path, infix):
    write_csv(tmp_path / f"{infix}_captions.csv", ["ID", "Caption"], [["a", "one"]])
    write_csv(tmp_path / f"{infix}_concepts.csv", ["ID", "CUIs"], [["a", "C1;C2"]])
    (tmp_path / infix).mkdir()
    (tmp_path / infix / "a.jpg").write_bytes(b"picture")
    (shard,) = find_shards(tmp_path, "validation")
    assert (shard.path, shard.split) == (f"{infix}_captions.csv", "validation")
    assert all_samples(tmp_path, "validation") == [Sample("a", "one", ("C1", "C2"), 0, 0)]
    with PictureReader(tmp_path) as reader:
        assert read(reader, [Place(shard.path, "validation", 0, 0, "a")]) == [b"picture"]


def test_other_concepts_give_another_digest(tmp_path):
    write_csv(tmp_path / "train_captions.csv", ["ID", "Caption"], [["a", "A."]])
    write_csv(tmp_path / "train_concepts.csv", ["ID", "CUIs"], [["a", "C1"]])
    (before,) = find_shards(tmp_path, "train")
    write_csv(tmp_path / "train_concepts.csv", ["ID", "CUIs"], [["a", "C2"]])
    (after,) = find_shards(tmp_path, "train")
    assert before.digest != after.digest


def test_manual_concepts_are_preferred(tmp_path):
    write_csv(tmp_path / "train_captions.csv", ["ID", "Caption"], [["a", "one"], ["b", "two"], ["c", "three"]])
    write_csv(tmp_path / "train_concepts.csv", ["ID", "CUIs"], [["a", "C1;C2;C3"]])
    assert [sample.cui for sample in all_samples(tmp_path)] == [("C1", "C2", "C3"), (), ()]
    write_csv(tmp_path / "train_concepts_manual.csv", ["ID", "CUIs"], [["a", "C9"], ["b", ""], ["c", "nan"]])
    assert [sample.cui for sample in all_samples(tmp_path)] == [("C9",), (), ()]


def test_a_byte_order_mark_and_blank_lines_are_no_data(tmp_path):
    (tmp_path / "train_captions.csv").write_bytes(b"\xef\xbb\xbfID,Caption\r\na,one\r\n\r\nb,two\r\n")
    assert [(s.image_id, s.caption, s.row_in_group) for s in all_samples(tmp_path)] == [
        ("a", "one", 0),
        ("b", "two", 1),
    ]


def test_parquet_goes_before_csv(tmp_path):
    write_shard(tmp_path / "train-00000-of-00001.parquet", [row(0)])
    write_csv(tmp_path / "train_captions.csv", ["ID", "Caption"], [["a", "one"]])
    assert [shard.path for shard in find_shards(tmp_path, "train")] == ["train-00000-of-00001.parquet"]


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"ID;Caption\na;one\n", " lacks the columns ID, Caption; it has the column ID;Caption. "),
        (b"ID,Text\na,one\n", " lacks the column Caption; it has the columns ID, Text. "),
        (b"", " lacks the columns ID, Caption; it has no columns. "),
    ],
)
def test_missing_csv_columns_are_named(tmp_path, data, complaint):
    path = tmp_path / "train_captions.csv"
    path.write_bytes(data)
    assert message(find_shards, tmp_path, "train") == f"{path}{complaint}Rename its columns to ID and Caption."


def test_missing_columns_of_concepts_are_named(tmp_path):
    write_csv(tmp_path / "train_captions.csv", ["ID", "Caption"], [["a", "one"]])
    write_csv(tmp_path / "train_concepts.csv", ["ID", "Concepts"], [["a", "C1"]])
    assert message(all_samples, tmp_path) == (
        f"{tmp_path / 'train_concepts.csv'} lacks the column CUIs; it has the columns ID, Concepts. "
        "Rename its columns to ID and CUIs."
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"ID,Caption\na,caf\xe9\n", "'utf-8' codec can't decode byte 0xe9 in position 16: invalid continuation byte"),
        (b'ID,Caption\na,"cut in the middle', "unexpected end of data"),
    ],
)
def test_a_csv_that_cannot_be_read_is_named(tmp_path, data, reason):
    path = tmp_path / "train_captions.csv"
    path.write_bytes(data)
    assert message(find_shards, tmp_path, "train") == (
        f"{path} cannot be read as UTF-8 CSV ({reason}): download it again."
    )


@pytest.mark.parametrize(("line", "cells"), [("b", 1), ("b,two,three", 3)])
def test_a_line_with_another_number_of_cells_is_named(tmp_path, line, cells):
    path = tmp_path / "train_captions.csv"
    path.write_text(f"ID,Caption\na,one\n{line}\n")
    assert message(find_shards, tmp_path, "train") == (
        f"{path}, line 3: {cells} cells, but the header has 2. Correct the line, or download the file again."
    )


# ---- real captions


def real(name):
    path = CAPTIONS / name
    if not path.is_file():
        pytest.skip("the collection of real captions is not beside the checkout")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("name", "count"), [("roco_v1_2000.csv", 2000), ("roco_v1_awkward_200.csv", 200)])
def test_real_captions_come_through_both_layouts_unchanged(tmp_path, name, count):
    originals = real(name)
    assert len(originals) == count
    expected = [(o["roco_id"], o["caption"], tuple(c for c in o["cuis"].split(";") if c)) for o in originals]
    write_shard(
        tmp_path / "hub" / "data" / "train-00000-of-00001.parquet",
        [row(0, caption=caption, cui=cui) | {"image_id": image_id} for image_id, caption, cui in expected],
    )
    write_csv(tmp_path / "folder" / "train_captions.csv", ["ID", "Caption"], [e[:2] for e in expected])
    write_csv(tmp_path / "folder" / "train_concepts.csv", ["ID", "CUIs"], [[e[0], ";".join(e[2])] for e in expected])
    for root in (tmp_path / "hub", tmp_path / "folder"):
        assert [(s.image_id, s.caption, s.cui) for s in all_samples(root)] == expected


def test_real_rocov2_rows_come_through_unchanged(tmp_path):
    originals = real("rocov2_test_sample_39.csv")
    assert len(originals) == 39
    write_csv(tmp_path / "test_captions.csv", ["ID", "Caption"], [[o["ID"], o["Caption"]] for o in originals])
    write_csv(tmp_path / "test_concepts_manual.csv", ["ID", "CUIs"], [[o["ID"], o["CUIs_manual"]] for o in originals])
    found = all_samples(tmp_path, "test")
    assert [(s.image_id, s.caption, ";".join(s.cui)) for s in found] == [
        (o["ID"], o["Caption"], o["CUIs_manual"]) for o in originals
    ]
    assert [s.cui for s in found].count(()) == 1


# ---- pictures in shards


@pytest.fixture
def shard(tmp_path):
    write_shard(tmp_path / "train-00000-of-00001.parquet", [row(n) for n in range(250)])
    return tmp_path


def test_pictures_are_read_by_their_place(shard):
    numbers = (0, 1, 99, 100, 149, 249)
    places = [place(n, n // 100, n % 100) for n in numbers]
    with PictureReader(shard) as reader:
        assert read(reader, places) == [f"picture {n}".encode() for n in numbers]


def test_samples_and_pictures_agree_on_every_place(tmp_path):
    for number in range(3):
        rows = [row(number * 100 + n) for n in range(70)]
        write_shard(tmp_path / "data" / f"train-{number:05d}-of-00003.parquet", rows, row_group_size=33)
    places = [
        Place(shard.path, "train", s.row_group, s.row_in_group, s.image_id)
        for shard in find_shards(tmp_path, "train")
        for s in samples(tmp_path, shard)
    ]
    with PictureReader(tmp_path) as reader:
        assert read(reader, places) == [f"picture {n * 100 + k}".encode() for n in range(3) for k in range(70)]


def test_a_row_group_is_opened_once_for_consecutive_claims(shard):
    places = [place(n, n // 100, n % 100) for n in range(250)]
    with PictureReader(shard) as reader:
        for start in range(0, 250, 8):
            claim = places[start : start + 8]
            assert read(reader, claim) == [f"picture {start + n}".encode() for n in range(len(claim))]
        assert reader.row_groups_opened == 3


def test_a_place_further_back_opens_the_row_group_again(shard):
    with PictureReader(shard) as reader:
        assert read(reader, [place(90)]) == [b"picture 90"]
        assert read(reader, [place(70)]) == [b"picture 70"]
        assert read(reader, [place(3)]) == [b"picture 3"]
        assert reader.row_groups_opened == 2


def test_one_place_may_be_read_twice(shard):
    with PictureReader(shard) as reader:
        assert read(reader, [place(5), place(5)]) == [b"picture 5", b"picture 5"]
        assert reader.row_groups_opened == 1


def test_memory_does_not_grow_with_the_row_group(tmp_path):
    rows = [row(n, data=os.urandom(50_000)) for n in range(1600)]
    path = tmp_path / "train-00000-of-00001.parquet"
    write_shard(path, rows, row_group_size=1600, write_batch_size=8)
    assert path.stat().st_size > 80_000_000
    del rows
    before, most = pa.total_allocated_bytes(), 0
    with PictureReader(tmp_path) as reader:
        for item in reader.read([place(n) for n in range(0, 1600, 5)]):
            assert isinstance(item[1], bytes)
            most = max(most, pa.total_allocated_bytes() - before)
    assert most < 8_000_000


def test_an_id_that_is_not_the_one_enqueued_means_moved(shard):
    with PictureReader(shard) as reader:
        ((_, error),) = reader.read([place(7, row_in_group=8)])
    assert error.code == "moved"
    assert str(error) == (
        "train-00000-of-00001.parquet holds 'ROCOv2_2023_train_000008' in row group 0, row 8, where "
        "'ROCOv2_2023_train_000007' was enqueued: the file has changed, so enqueue the data set again."
    )


@pytest.mark.parametrize(("row_group", "row_in_group"), [(0, 100), (2, 50), (3, 0), (99, 0)])
def test_a_row_that_is_not_there_means_moved(shard, row_group, row_in_group):
    with PictureReader(shard) as reader:
        assert read(reader, [place(7, row_group, row_in_group), place(7)]) == ["moved", b"picture 7"]


def test_a_row_without_a_picture_fails_alone(tmp_path):
    rows = [row(0), row(1), row(2), row(3, data=b"")]
    rows[1]["image"] = {"bytes": None, "path": None}
    rows[2]["image"] = None
    write_shard(tmp_path / "train-00000-of-00001.parquet", rows)
    with PictureReader(tmp_path) as reader:
        assert read(reader, [place(n) for n in range(4)]) == [b"picture 0", "no_picture", "no_picture", b""]


def test_a_picture_given_by_its_path_is_read_from_there(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"outside")
    root = tmp_path / "set"
    paths = ["pictures/a.png", "pictures/gone.png", "../secret.png", str(tmp_path / "secret.png")]
    rows = [row(n) | {"image": {"bytes": None, "path": path}} for n, path in enumerate(paths)]
    write_shard(root / "train-00000-of-00001.parquet", rows)
    (root / "pictures").mkdir()
    (root / "pictures" / "a.png").write_bytes(b"picture a")
    with PictureReader(root) as reader:
        assert read(reader, [place(n) for n in range(4)]) == [b"picture a"] + ["missing_file"] * 3


def test_bytes_go_before_the_path(tmp_path):
    (tmp_path / "a.png").write_bytes(b"by path")
    write_shard(tmp_path / "train-00000-of-00001.parquet", [row(0, data=b"by bytes", path="a.png")])
    with PictureReader(tmp_path) as reader:
        assert read(reader, [place(0)]) == [b"by bytes"]


def test_a_shard_that_is_gone_is_an_error_of_the_data_set(shard):
    path = shard / "train-00000-of-00001.parquet"
    path.rename(shard / "away")
    with PictureReader(shard) as reader:
        assert message(lambda: list(reader.read([place(0)]))) == f"{path} is gone: restore it or download it again."
        (shard / "away").rename(path)
        assert read(reader, [place(0)]) == [b"picture 0"]


def test_a_damaged_row_group_is_an_error_of_the_data_set(shard):
    path = shard / "train-00000-of-00001.parquet"
    whole = path.read_bytes()
    column = pq.read_metadata(path).row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    with PictureReader(shard) as reader:
        path.write_bytes(whole[:start] + b"\xff" * 64 + whole[start + 64 :])
        assert read(reader, [place(99)]) == [b"picture 99"]
        assert message(lambda: list(reader.read([place(100, 1, 0)]))) == (
            f"{path} is not a Parquet file, or it is truncated or damaged: download it again."
        )
        path.write_bytes(whole)
        assert read(reader, [place(100, 1, 0)]) == [b"picture 100"]


# ---- pictures in folders


@pytest.mark.parametrize(
    "path",
    [
        "train/a.jpg",
        "train/a.jpeg",
        "train/a.png",
        "train/train/a.jpg",
        "train_images/a.jpg",
        "train_images/train/a.png",
    ],
)
def test_a_picture_is_found_where_unzipping_puts_it(tmp_path, path):
    write_csv(tmp_path / "train_captions.csv", ["ID", "Caption"], [["a", "one"]])
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_bytes(b"picture a")
    with PictureReader(tmp_path) as reader:
        assert read(reader, [Place("train_captions.csv", "train", 0, 0, "a")]) == [b"picture a"]


@pytest.fixture
def folder(tmp_path):
    write_csv(tmp_path / "train_captions.csv", ["ID", "Caption"], [["a", "one"], ["b", "two"]])
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.jpg").write_bytes(b"picture a")
    return tmp_path


def folder_places(*ids):
    return [Place("train_captions.csv", "train", 0, n, image_id) for n, image_id in enumerate(ids)]


def test_a_missing_picture_file_fails_alone(folder):
    with PictureReader(folder) as reader:
        (_, error), (_, data) = reader.read(folder_places("b", "a"))
    assert (error.code, data) == ("missing_file", b"picture a")
    assert str(error) == "There is no file train/b.jpg for b: restore it, then retry."


def test_a_picture_file_that_cannot_be_read_fails_alone(folder):
    (folder / "train" / "b.jpg").mkdir()
    with PictureReader(folder) as reader:
        (_, error), (_, data) = reader.read(folder_places("b", "a"))
    assert (error.code, data) == ("unreadable_file", b"picture a")
    assert str(error) == (f"{folder / 'train' / 'b.jpg'} cannot be read (Is a directory): check the file, then retry.")


def test_an_id_does_not_lead_out_of_the_folder(folder):
    (folder / "secret.jpg").write_bytes(b"outside")
    with PictureReader(folder) as reader:
        assert read(reader, folder_places("../secret", "a")) == ["missing_file", b"picture a"]


def test_a_disk_that_is_gone_is_not_blamed_on_the_picture(folder):
    with PictureReader(folder) as reader:
        assert read(reader, folder_places("a")) == [b"picture a"]
        folder.rename(folder.with_name("away"))
        assert message(lambda: list(reader.read(folder_places("a")))) == (
            f"{folder / 'train_captions.csv'} cannot be read (No such file or directory): "
            "check that the disk is mounted, then run this again."
        )


def test_a_split_without_a_picture_folder_is_an_error_of_the_data_set(tmp_path):
    write_csv(tmp_path / "valid_captions.csv", ["ID", "Caption"], [["a", "one"]])
    place = Place("valid_captions.csv", "validation", 0, 0, "a")
    with PictureReader(tmp_path) as reader:
        assert message(lambda: list(reader.read([place]))) == (
            f"{tmp_path} has no pictures of the split 'validation': unpack them as valid/ID.jpg or valid_images/ID.jpg."
        )


SUFFIXES = ["jpg", "jpeg", "png", "tif", "tiff", "webp", "bmp", "dcm", "gif", "jp2", "avif"]
NFC, NFD = (normalize(form, "Röntgen_1") for form in ("NFC", "NFD"))


@pytest.mark.parametrize("suffix", [*SUFFIXES, *map(str.upper, SUFFIXES), "Jpg", "TiFf"])
@pytest.mark.parametrize("image_id", ["a", "a.b", "1.2.840.10008", "a.jpg", "a.JPG", "a.tif"])
@pytest.mark.parametrize("folder", ["train", "Train", "training_images", "train/deep"])
def test_a_picture_is_found_whatever_its_ending_and_its_id(tmp_path, suffix, image_id, folder):
    write_csv(tmp_path / "train_captions.csv", ["ID", "Caption"], [[image_id, "one"]])
    stem = image_id.removesuffix(".jpg").removesuffix(".JPG").removesuffix(".tif")
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / f"{stem}.{suffix}").write_bytes(b"picture")
    with PictureReader(tmp_path) as reader:
        assert read(reader, folder_places(image_id)) == [b"picture"]


@pytest.mark.parametrize("image_id", [NFC, NFD, f"{NFC}.jpg", f"{NFD}.JPG"])
@pytest.mark.parametrize("name", [NFC, NFD])
@pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".tif"])
def test_a_name_in_either_form_of_unicode_is_the_same_name(tmp_path, image_id, name, suffix):
    assert NFC != NFD
    write_csv(tmp_path / "train_captions.csv", ["ID", "Caption"], [[image_id, "one"]])
    write_csv(tmp_path / "train_concepts.csv", ["ID", "CUIs"], [[normalize("NFC", image_id), "C1"], [NFD, "C2"]])
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / f"{name}{suffix}").write_bytes(b"picture")
    with PictureReader(tmp_path) as reader:
        assert read(reader, folder_places(image_id)) == [b"picture"]
    assert all_samples(tmp_path)[0].image_id == image_id
    assert all_samples(tmp_path)[0].cui[0] == "C1"


def test_of_several_candidates_todays_order_goes_first(tmp_path):
    write_csv(tmp_path / "train_captions.csv", ["ID", "Caption"], [["a", "one"]])
    order = [
        *("train/a.jpg", "train/a.jpeg", "train/a.png", "train_images/a.jpg", "train_images/a.png"),
        *("train/a.JPG", "train/a.JPEG", "train/a.tif", "train/a.TIF", "train/a.avif", "train_images/a.JPG"),
        *("train/inner/a.jpg", "train/inner/a.bmp", "train_images/inner/a.jpg"),
    ]
    for path in order:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(path.encode())
    for path in order:
        with PictureReader(tmp_path) as reader:
            assert read(reader, folder_places("a")) == [path.encode()]
        (tmp_path / path).unlink()


def test_of_an_id_with_an_ending_the_file_with_that_ending_goes_first(tmp_path):
    order = ["a.png.jpg", "a.png", "a.PNG", "a.jpg", "a.JPG", "a.tif"]
    (tmp_path / "train").mkdir()
    (tmp_path / "train_captions.csv").touch()
    for name in order:
        (tmp_path / "train" / name).write_bytes(name.encode())
    for name in order:
        with PictureReader(tmp_path) as reader:
            assert read(reader, folder_places("a.png")) == [name.encode()]
        (tmp_path / "train" / name).unlink()


def test_other_letters_are_another_picture(folder):
    with PictureReader(folder) as reader:
        assert read(reader, folder_places("A", "a.", "", "aa", "a.jpeg.")) == ["missing_file"] * 5


def test_the_usual_file_is_opened_without_listing_its_folder_and_a_miss_lists_it_once(folder, monkeypatch):
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(Path(path).name) or scandir(path))
    (folder / "train" / "b.TIF").write_bytes(b"picture b")
    (folder / "train" / "c.tif").write_bytes(b"picture c")
    with PictureReader(folder) as reader:
        assert read(reader, folder_places("a", "a")) == [b"picture a"] * 2
        assert listed == []
        assert read(reader, folder_places("b", "c", "d", "b", "a"))[:2] == [b"picture b", b"picture c"]
        once = list(listed)
        assert read(reader, folder_places("e", "c")) == ["missing_file", b"picture c"]
        assert listed == once


def test_a_missing_picture_of_an_id_with_an_ending_is_named_as_it_is(folder):
    with PictureReader(folder) as reader:
        ((_, error),) = reader.read(folder_places("b.png"))
    assert str(error) == "There is no file train/b.png for b.png: restore it, then retry."


@pytest.mark.parametrize(
    "there", ["pictures/a.JPG", "pictures/a.tif", f"{NFD}/a.jpg", f"{NFC}/a.JPG", f"pictures/{NFD}.png"]
)
def test_a_path_in_a_row_is_found_as_a_file_of_a_folder_is(tmp_path, there):
    asked = (
        normalize("NFC", there) if there.endswith(".png") else str(Path(normalize("NFC", there)).with_suffix(".jpg"))
    )
    root = tmp_path / "set"
    write_shard(root / "train-00000-of-00001.parquet", [row(0) | {"image": {"bytes": None, "path": asked}}])
    (root / there).parent.mkdir(parents=True)
    (root / there).write_bytes(b"picture")
    with PictureReader(root) as reader:
        assert read(reader, [place(0)]) == [b"picture"]


@pytest.mark.parametrize(
    "path", ["../secret.png", "../secret", "pictures/../../secret.jpg", "..", ".", "", "/", "a\0b/c.png"]
)
def test_no_way_of_writing_a_path_leads_out_of_the_data_set(tmp_path, path):
    (tmp_path / "secret.PNG").write_bytes(b"outside")
    root = tmp_path / "set"
    write_shard(root / "train-00000-of-00001.parquet", [row(0) | {"image": {"bytes": None, "path": path}}])
    with PictureReader(root) as reader:
        assert read(reader, [place(0)]) == ["missing_file" if path else "no_picture"]


def test_concepts_of_an_id_that_is_listed_twice_are_joined_in_order(tmp_path):
    write_csv(tmp_path / "train_captions.csv", ["ID", "Caption"], [["a", "one"], ["b", "two"]])
    concepts = [["a", "C3;C1"], ["b", "C9"], ["a", "C1;C2"], ["a", ""], ["a", "C0;nan"]]
    write_csv(tmp_path / "train_concepts.csv", ["ID", "CUIs"], concepts)
    assert [sample.cui for sample in all_samples(tmp_path)] == [("C3", "C1", "C2", "C0"), ("C9",)]


def test_a_captions_csv_of_nothing_but_ids_is_unlabelled(tmp_path):
    write_csv(tmp_path / "train_captions.csv", ["ID"], [["a"], ["b"]])
    write_csv(tmp_path / "train_concepts.csv", ["ID", "CUIs"], [["b", "C1"]])
    assert all_samples(tmp_path) == [Sample("a", "", (), 0, 0), Sample("b", "", ("C1",), 0, 1)]


def test_a_csv_has_columns_of_other_names_and_none_of_pictures(tmp_path):
    write_csv(tmp_path / "train_captions.csv", ["Name", "Text", "ID"], [["a", "one", "7"]])
    write_csv(tmp_path / "train_concepts.csv", ["Name", "Codes"], [["a", "C1"]])
    columns = Columns(image_id="Name", caption="Text", cui="Codes")
    (shard,) = find_shards(tmp_path, "train", columns=columns)
    assert list(samples(tmp_path, shard, columns)) == [Sample("a", "one", ("C1",), 0, 0)]
    assert message(find_shards, tmp_path, "train", "", Columns(image="IMG")) == (
        f"{tmp_path / 'train_captions.csv'} is a CSV, and its pictures are separate files: "
        "leave image=IMG out of --columns."
    )


@pytest.mark.parametrize("header", [["ID", "Caption", "Caption"], ["ID", "ID", "Caption"]])
def test_a_column_of_a_csv_that_is_there_twice_is_named(tmp_path, header):
    path = tmp_path / "train_captions.csv"
    write_csv(path, header, [["a", "b", "c"]])
    assert message(find_shards, tmp_path, "train") == f"{path} has the column {header[1]} 2 times: drop all but one."


@pytest.mark.parametrize("alias", ["val", "dev", "Valid", "VALIDATION"])
def test_a_folder_of_pictures_is_found_by_every_name_of_its_split(tmp_path, alias):
    write_csv(tmp_path / f"{alias}_captions.csv", ["ID", "Caption"], [["a", "one"]])
    (tmp_path / alias).mkdir()
    (tmp_path / alias / "a.jpg").write_bytes(b"picture")
    (shard,) = find_shards(tmp_path, "validation")
    assert (shard.path, shard.split) == (f"{alias}_captions.csv", "validation")
    with PictureReader(tmp_path) as reader:
        assert read(reader, [Place(shard.path, "validation", 0, 0, "a")]) == [b"picture"]


# ---- layouts on disk


def test_a_folder_is_read_as_its_names_and_its_readme_say(tmp_path):
    write_shard(tmp_path / "sub" / "x.parquet", [row(0)])
    write_shard(tmp_path / "dev-00000-of-00001.parquet", [row(1)])
    write_shard(tmp_path / "results_medical" / "train.parquet", [row(2)])
    write_shard(tmp_path / ".hidden" / "train.parquet", [row(3)])
    assert [shard.path for shard in find_shards(tmp_path, "validation")] == ["dev-00000-of-00001.parquet"]
    assert message(find_shards, tmp_path, "train") == (
        f"{tmp_path} has no split 'train': there is neither train-00000-of-000NN.parquet nor train_captions.csv. "
        "It has: validation. Choose one of these. The name of sub/x.parquet gives no split: to use it as train, "
        "rename it to sub/train/x.parquet."
    )
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: sub/*\n---\n")
    assert [shard.path for shard in find_shards(tmp_path, "train")] == ["sub/x.parquet"]


def test_splits_that_no_command_accepts_are_not_offered(tmp_path):
    write_shard(tmp_path / "fold1-00000-of-00001.parquet", [row(0)])
    told = message(find_shards, tmp_path, "train")
    assert "Choose" not in told
    assert told.endswith(
        "The name of fold1-00000-of-00001.parquet gives no split: to use it as train, rename it to "
        "train-00000-of-00001.parquet."
    )


# ---- locate


def test_a_configuration_is_part_of_the_name(tmp_path):
    root = tmp_path / "a:b"
    root.mkdir()
    assert locate(str(root), ["train"]) == Dataset(str(root), root, "")
    named = Dataset(f"{root}:axial", root, "", "axial")
    assert locate(str(root), ["train"], config="axial") == locate(f"{root}:axial", ["train"]) == named
    assert locate(str(root), ["train"], config="default") == Dataset(str(root), root, "")
    assert message(lambda: locate(f"{root}:axial", ["train"], config="coronal")) == (
        f"{root}:axial names the configuration axial, but --config is coronal: leave one of them out."
    )


def test_a_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    monkeypatch.chdir(tmp_path)
    root = (tmp_path / "set").resolve()
    assert locate("set", ["train"]) == Dataset(name=str(root), root=root, revision="")
    assert locate(f"{tmp_path}/./set/", ["train"]) == Dataset(name=str(root), root=root, revision="")


def test_a_link_to_a_folder_is_the_folder_itself(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "link").symlink_to("set")
    assert locate(str(tmp_path / "link"), ["train"]) == locate(str(tmp_path / "set"), ["train"])


def test_a_folder_has_no_revision(tmp_path):
    assert message(locate, str(tmp_path), ["train"], "main") == (
        f"{tmp_path} is a folder, and folders have no revisions: leave the revision out."
    )


@pytest.mark.parametrize("name", ["/no/such/folder", "./roco", "../roco", "~/no such folder", "a/b/c", "roco"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message(locate, name, ["train"]) == (
        f"There is no folder {name}: check the path, or name a data set on the hub as owner/name."
    )


def test_a_file_is_not_a_data_set(tmp_path):
    path = tmp_path / "train-00000-of-00001.parquet"
    write_shard(path, [row(0)])
    assert message(locate, str(path), ["train"]) == f"{path} is a file: give the folder that holds it."


def test_reading_a_folder_imports_neither_the_hub_nor_torch():
    script = "import sys, rococap.data.datasets; print({'huggingface_hub', 'torch', 'sqlalchemy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


def test_a_reader_notices_that_its_open_shard_was_replaced(tmp_path):
    write_hub_shard(tmp_path, "train", range(4))
    (shard,) = find_shards(tmp_path, "train")
    with PictureReader(tmp_path) as reader:
        assert read(reader, [Place(shard.path, "train", 0, 0, "train_00000")]) == [png(0)]
        (tmp_path / shard.path).unlink()
        write_hub_shard(tmp_path, "train", [3, 2, 1, 0])
        assert read(reader, [Place(shard.path, "train", 0, 3, "train_00000")]) == [png(0)]


def test_a_nul_in_a_name_is_one_missing_file(tmp_path):
    write_csv(tmp_path / "train_captions.csv", ["ID", "Caption"], [["a", "A."]])
    (tmp_path / "train").mkdir()
    with PictureReader(tmp_path) as reader:
        ((_, failed),) = reader.read([Place("train_captions.csv", "train", 0, 0, "a\0b")])
    assert failed.code == "missing_file"
