"""Which files are which split's, by their names or by a README.md."""

import pytest

from rococap.data.layout import RESULTS, read
from rococap.errors import DatasetError
from rococap.results.export import FOLDER


def refused(paths, split="train", config="", readme=""):
    with pytest.raises(DatasetError) as caught:
        read(paths, "It", readme).files_of(split, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def of(paths, split="train", config="", readme=""):
    return read(paths, "It", readme).files_of(split, config)


ALIASES = [
    *(("train", alias) for alias in ("train", "Train", "TRAIN", "training")),
    *(("validation", alias) for alias in ("validation", "valid", "val", "dev", "Val", "DEV", "Validation")),
    *(("test", alias) for alias in ("test", "testing", "eval", "evaluation", "Test")),
]
FORMS = [
    "{}-00000-of-00001.parquet",
    "{}-00000-of-00001-3f2a9c0b1d.parquet",
    "data/{}-00000-of-00001.parquet",
    "roco-{}-00000-of-00001.parquet",
    "data/roco_v2_{}-00000-of-00001.parquet",
    "{}_00000_of_00001.parquet",
    "{}.parquet",
    "data/{}.parquet",
    "{}-0000.parquet",
    "{}/0000.parquet",
    "{}/part.parquet",
    "data/{}/0000.parquet",
    "{}/{}-00000-of-00001.parquet",
    "default/{}/0000.parquet",
    "axial/{}/0000.parquet",
    "axial/{}-00000-of-00001.parquet",
    "data/axial/{}-00000-of-00001.parquet",
    "axial/{}.parquet",
    "data/{}-00000-of-00001.PARQUET",
    "{}_captions.csv",
]


@pytest.mark.parametrize(("split", "alias"), ALIASES)
@pytest.mark.parametrize("form", FORMS)
def test_a_split_is_found_by_every_name_and_in_every_place(split, alias, form):
    path = form.format(alias, alias)
    layout = read([path], "It")
    assert layout.files_of(split) == (path,)
    assert layout.splits() == [split]
    assert layout.unknown == []


def test_shards_come_in_the_order_of_their_numbers():
    for form in ("train-{:05}-of-00012.parquet", "NAME-train-{:05}-of-00012.parquet", "train/{:04}.parquet"):
        paths = [form.format(number) for number in range(12)]
        assert of(paths[::-1]) == tuple(paths)
    assert of(["train-10.parquet", *(f"train-{n}.parquet" for n in range(10))])[-1] == "train-10.parquet"
    assert of(["train/b.parquet", "train/a.parquet"]) == ("train/a.parquet", "train/b.parquet")
    spark = [f"train/part-{n:05}-3f2a-c000.snappy.parquet" for n in (0, 2, 3)]  # it writes no empty part
    assert of(spark[::-1]) == tuple(spark)


@pytest.mark.parametrize(
    ("paths", "told"),
    [
        (["data/val-00000-of-00003.parquet", "data/val-00002-of-00003.parquet"], "1 of the 3"),
        (["roco_validation-00000-of-00002.parquet"], "1 of the 2"),
        (["validation/0000.parquet", "validation/0002.parquet"], "1 of the 3"),
        (["data/validation/0001.parquet"], "1 of the 2"),
        (["default/validation/0000.parquet", "default/validation/0003.parquet"], "2 of the 4"),
        (["validation/validation-00001-of-00002.parquet"], "1 of the 2"),
        (["dev-1.parquet", "dev-3.parquet"], "1 of the 3"),
    ],
)
def test_missing_shards_are_noticed_in_every_form(paths, told):
    assert refused(paths, "validation").startswith(f"It lacks {told} shards of the split 'validation': ")


def test_a_missing_shard_is_named_as_it_would_be_called():
    assert refused(["data/roco_val-00000-of-00002-0a1b.parquet"], "validation") == (
        "It lacks 1 of the 2 shards of the split 'validation': data/roco_val-00001-of-00002.parquet. "
        "Download them, then run this again."
    )
    assert "'train': default/train/0001.parquet. " in refused(
        ["default/train/0000.parquet", "default/train/0002.parquet"]
    )


def test_years_and_dates_are_no_numbers_of_shards():
    assert of(["train/2019.parquet", "train/2021.parquet"]) == ("train/2019.parquet", "train/2021.parquet")


@pytest.mark.parametrize(
    "paths",
    [
        ["a-train-00000-of-00001.parquet", "b-train-00000-of-00001.parquet"],
        ["data/val-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"],
        ["train.parquet", "train-00000-of-00001.parquet"],
        ["train.parquet", "train/0000.parquet"],
        ["Train.parquet", "train.parquet"],
        ["valid_captions.csv", "val_captions.csv"],
    ],
)
def test_two_sets_for_a_split_are_refused_with_both_names(paths):
    split = "train" if "rain" in paths[0] else "validation"
    told = refused(paths, split)
    assert all(path in told for path in paths)
    assert told.endswith(": keep one, and move the others away.")


def test_data_goes_before_the_top_and_the_top_before_csvs_and_folders():
    order = ["data/train-00000-of-00001.parquet", "train.parquet", "train_captions.csv", "axial/train/0000.parquet"]
    for n in range(3):
        assert of(order[n:]) == (order[n],)


def test_our_own_exports_are_never_data():
    exports = [
        "results_medical/medical_captions_train.parquet",
        "results_medical/hf/data/train-00000-of-00001.parquet",
        "results_medical/train/0000.parquet",
        "medical_captions_train.parquet",
        "scores_train_default.parquet",
        "again/rococap.json",
        "again/data/train-00000-of-00001.parquet",
    ]
    assert of(exports) == ()
    assert read(exports, "It").unknown == []
    assert of([*exports, "axial/train/0000.parquet"]) == ("axial/train/0000.parquet",)
    assert FOLDER.name == RESULTS


def test_hidden_and_deep_folders_are_left_out():
    assert of([".cache/train/0000.parquet", "a/b/train/0000.parquet", "train/.0000.parquet"]) == ()


# --- configurations --------------------------------------------------------------------------------------------

SEVERAL = ["axial/train-00000-of-00001.parquet", "coronal/train/0000.parquet", "coronal/test/0000.parquet"]


def test_a_configuration_is_chosen_by_its_name():
    assert of(SEVERAL, config="axial") == (SEVERAL[0],)
    assert of(SEVERAL, config="coronal") == (SEVERAL[1],)
    assert read(SEVERAL, "It").splits("coronal") == ["train", "test"]


def test_several_configurations_are_refused_with_their_names():
    assert refused(SEVERAL) == "It has several configurations (axial, coronal): choose one with --config NAME."


def test_a_configuration_that_is_not_there_is_refused_with_those_that_are():
    assert refused(SEVERAL, config="sagittal") == (
        "It has no configuration 'sagittal'. Choose one of these with --config: axial, coronal."
    )
    assert refused(["train.parquet"], config="axial").endswith("Choose one of these with --config: default.")


def test_the_configuration_without_a_name_is_called_default():
    for paths in (["train.parquet"], ["default/train/0000.parquet"]):
        assert of(paths, config="default") == of([*paths, *SEVERAL]) == of(paths) == tuple(paths)


def test_a_split_that_only_a_configuration_has_is_pointed_to():
    layout = read(["train.parquet", "axial/test/0000.parquet"], "It")
    assert layout.files_of("test") == ()
    assert layout.hints("test") == " It is in the configuration axial: choose it with --config."


def test_what_the_hub_converted_in_part_is_refused():
    told = refused(["default/partial-train/0000.parquet", "default/test/0000.parquet"])
    assert told.startswith("It has only a part of the split 'train' (default/partial-train/0000.parquet): ")
    assert told.endswith("Use the data set's own files, which are on its branch main.")
    assert of(["default/partial-train/0000.parquet", "default/test/0000.parquet"], "test") == (
        "default/test/0000.parquet",
    )


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("fold1-00000-of-00002.parquet", "train-00000-of-00002.parquet"),
        ("data/roco_fold1-00000-of-00002.parquet", "data/train-00000-of-00002.parquet"),
        ("fold1_captions.csv", "train_captions.csv"),
        ("part-0.parquet", "train/part-0.parquet"),
    ],
)
def test_a_file_of_an_unknown_split_is_named_with_what_to_rename_it_to(path, name):
    layout = read([path], "It")
    assert layout.splits() == []
    assert layout.hints("train") == f" The name of {path} gives no split: to use it as train, rename it to {name}."
    assert of([name.replace("0-of-00002", "0-of-00001")])


# --- README.md -------------------------------------------------------------------------------------------------

FILES = ["a/x-1.parquet", "a/x-2.parquet", "a/y.parquet", "b/deep/er/z.parquet", "train-00000-of-00001.parquet"]


def readme(configs):
    return f"---\nlicense: mit\nconfigs:\n{configs}\n---\n# A data set\n"


@pytest.mark.parametrize(
    ("data_files", "split", "expected"),
    [
        ("[{split: train, path: a/x-*}, {split: val, path: a/y.parquet}]", "train", FILES[:2]),
        ("[{split: train, path: a/x-*}, {split: val, path: a/y.parquet}]", "validation", FILES[2:3]),
        ("[{split: train, path: [a/x-1.parquet, 'b/**/*.parquet']}]", "train", [FILES[0], FILES[3]]),
        ("{training: 'a/x-?.parquet', dev: './a/y.parquet'}", "train", FILES[:2]),
        ("{training: 'a/x-?.parquet', dev: './a/y.parquet'}", "validation", FILES[2:3]),
        ("'a/*.parquet'", "train", FILES[:3]),
        ("['a/x-[12].parquet', '**/z.parquet']", "train", [*FILES[:2], FILES[3]]),
        ("[{split: test, path: a}]", "test", FILES[:3]),
    ],
)
def test_a_readme_that_names_parquet_files_decides(data_files, split, expected):
    text = readme(f"- config_name: default\n  data_files: {data_files}")
    assert of(FILES, split, readme=text) == tuple(expected)


def test_a_readme_names_configurations_and_which_is_the_default():
    text = readme(
        "- config_name: x\n  data_files: a/x-*\n- config_name: y\n  default: true\n  data_files: [a/y.parquet]"
    )
    assert of(FILES, readme=text) == of(FILES, config="y", readme=text) == ("a/y.parquet",)
    assert of(FILES, config="x", readme=text) == tuple(FILES[:2])
    assert refused(FILES, config="z", readme=text).endswith("with --config: y, x.")
    without = text.replace("  default: true\n", "")
    assert refused(FILES, readme=without) == "It has several configurations (x, y): choose one with --config NAME."


def test_a_folder_that_a_readme_names_is_read_by_the_names_in_it():
    paths = ["some/where/deep/val-00000-of-00001.parquet", "train.parquet"]
    text = readme("- config_name: default\n  data_dir: some/where/deep")
    assert of(paths, "validation", readme=text) == (paths[0],)


def test_a_readme_with_files_that_are_missing_is_noticed():
    paths = ["d/all-00000-of-00003.parquet", "d/all-00002-of-00003.parquet"]
    text = readme("- config_name: default\n  data_files: [{split: train, path: d/all-*}]")
    assert "lacks 1 of the 3 shards of the split 'train': d/all-00001-of-00003.parquet" in refused(paths, readme=text)


@pytest.mark.parametrize(
    "text",
    [
        "# No head",
        readme("- config_name: default\n  data_files: '*.csv'"),
        readme("- config_name: default\n  data_files: nowhere/*.parquet"),
        readme("- {config_name: 'default"),
        readme("  just: text"),
        "---\nlicense: mit\n---\nconfigs:",
    ],
)
def test_a_readme_that_names_no_parquet_files_decides_nothing(text):
    assert of(FILES, readme=text) == ("train-00000-of-00001.parquet",)


def test_splits_of_a_readme_that_no_command_accepts_are_told_apart():
    text = readme(
        "- config_name: default\n  data_files: [{split: fold1, path: a/x-*}, {split: test, path: a/y.parquet}]"
    )
    layout = read(FILES, "It", text)
    assert (layout.splits(), layout.unknown) == (["test"], FILES[:2])
