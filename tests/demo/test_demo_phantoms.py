import io
import itertools
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rococap.demo import phantoms, unseen
from rococap.demo.canvas import Phantom
from rococap.demo.phantoms import HELD_OUT_SEEDS, TRAINING_SEEDS, draw, write_dataset
from rococap.demo.sheet import contact_sheet
from rococap.errors import DatasetError

EQUAL_INK = (25, 115, 74)
DIFFERENT_INK = (179, 38, 30)


@pytest.fixture(scope="module")
def sample() -> list[Phantom]:
    return [draw(seed) for seed in HELD_OUT_SEEDS["validation"][-240:]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("phantoms")
    write_dataset(root, {"train": 110, "validation": 12, "test": 7}, rows_per_shard=50, rows_per_group=20)
    return root


def read(dataset: Path, split: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(dataset.glob(f"data/{split}-*.parquet")))


@pytest.mark.parametrize("draw", [draw, unseen.draw])
def test_the_same_seed_draws_the_same_phantom(draw: Callable[[int], Phantom]) -> None:
    for seed in TRAINING_SEEDS[:20]:
        one, other = draw(seed), draw(seed)
        assert one.image.tobytes() == other.image.tobytes()
        assert (one.caption, one.cui, one.finding) == (other.caption, other.cui, other.finding)


def test_another_process_draws_the_same_phantom() -> None:
    program = "from rococap.demo.phantoms import draw; print(draw(7).caption, draw(7).image.tobytes().hex())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{draw(7).caption} {draw(7).image.tobytes().hex()}"


def test_no_two_seeds_draw_the_same_picture(sample: list[Phantom]) -> None:
    assert len({phantom.image.tobytes() for phantom in sample}) == len(sample)


def test_training_and_held_out_seeds_share_none() -> None:
    ranges = sorted([TRAINING_SEEDS, *HELD_OUT_SEEDS.values()], key=lambda seeds: seeds.start)
    assert all(one.stop <= other.start for one, other in itertools.pairwise(ranges))
    assert set(HELD_OUT_SEEDS) == {"train", "validation", "test"}


def test_every_modality_appears_and_its_concept_agrees_with_the_caption(sample: list[Phantom]) -> None:
    words = {
        phantoms.CT: "axial ct ",
        phantoms.MRI: "-weighted mri ",
        phantoms.PLAIN_XRAY: "chest x-ray",
        phantoms.ULTRASOUND: "ultrasound of the liver",
    }
    for phantom in sample:
        named = [cui for cui, words_of in words.items() if words_of in phantom.caption.lower()]
        assert named == [phantom.cui[0]]
    counts = Counter(phantom.cui[0] for phantom in sample)
    assert set(counts) == set(phantoms.MODALITIES)
    assert min(counts.values()) > 40


def test_a_caption_names_the_side_that_the_finding_lies_on(sample: list[Phantom]) -> None:
    """Patients are seen from the feet or from the front, so their right is on the left of the picture."""
    sided = 0
    for phantom in sample:
        words = set(phantom.caption.rstrip(".").split())
        if phantom.finding is None or not words & {"left", "right"}:
            continue
        if "lobe" in words and "liver" in words:
            continue
        on_the_left = ("left" in words) == (phantom.cui[0] == phantoms.ULTRASOUND)
        assert (phantom.finding.x < 0.5) is on_the_left, phantom.caption
        sided += 1
    assert sided > 100


def test_a_phantom_is_normal_exactly_if_it_has_no_finding(sample: list[Phantom]) -> None:
    for phantom in sample:
        assert phantom.caption.startswith("Normal ") is (phantom.finding is None)
        if phantom.finding:
            assert 0 < phantom.finding.x < 1
            assert 0 < phantom.finding.y < 1


def test_pictures_are_grey_and_colour_in_mixed_aspect_ratios(sample: list[Phantom]) -> None:
    assert {phantom.image.mode for phantom in sample} == {"L", "RGB"}
    ratios = sorted(phantom.image.width / phantom.image.height for phantom in sample)
    assert ratios[0] < 0.7
    assert ratios[-1] > 1.3


def test_no_caption_takes_more_than_a_twentieth_of_the_phantoms(sample: list[Phantom]) -> None:
    assert Counter(phantom.caption for phantom in sample).most_common(1)[0][1] <= len(sample) / 20


def test_the_data_set_has_the_layout_of_the_hub(dataset: Path) -> None:
    assert sorted(path.name for path in (dataset / "data").iterdir()) == [
        "test-00000-of-00001.parquet",
        "train-00000-of-00003.parquet",
        "train-00001-of-00003.parquet",
        "train-00002-of-00003.parquet",
        "validation-00000-of-00001.parquet",
    ]
    schema = pq.read_schema(dataset / "data" / "train-00000-of-00003.parquet")
    assert schema.names == ["image", "image_id", "caption", "cui"]
    assert schema.field("image").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert schema.field("image_id").type == pa.string()
    assert schema.field("caption").type == pa.string()
    assert schema.field("cui").type == pa.list_(pa.string())


def test_row_groups_have_the_size_asked_for(dataset: Path) -> None:
    file = pq.ParquetFile(dataset / "data" / "train-00000-of-00003.parquet")
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert sizes == [20, 20, 10]


def test_rows_are_numbered_through_all_shards_with_the_infix_of_their_split(dataset: Path) -> None:
    ids = {split: read(dataset, split)["image_id"].to_pylist() for split in HELD_OUT_SEEDS}
    assert ids["train"] == [f"PHANTOM_train_{n:06}" for n in range(1, 111)]
    assert ids["validation"] == [f"PHANTOM_valid_{n:06}" for n in range(1, 13)]
    assert ids["test"] == [f"PHANTOM_test_{n:06}" for n in range(1, 8)]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_data_set_holds_phantoms_of_held_out_seeds_as_png(dataset: Path, split: str) -> None:
    rows = read(dataset, split).to_pylist()
    for seed, row in zip(HELD_OUT_SEEDS[split][: len(rows)], rows, strict=True):
        phantom = draw(seed)
        image = Image.open(io.BytesIO(row["image"]["bytes"]))
        assert image.format == "PNG"
        assert (image.mode, image.tobytes()) == (phantom.image.mode, phantom.image.tobytes())
        assert row["image"]["path"] is None
        assert (row["caption"], tuple(row["cui"])) == (phantom.caption, phantom.cui)


def test_an_empty_split_is_a_shard_without_rows(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"test": 0})
    table = pq.read_table(tmp_path / "data" / "test-00000-of-00001.parquet")
    assert (table.num_rows, table.schema.names) == (0, phantoms.SCHEMA.names)


def test_writing_the_same_again_changes_no_byte(dataset: Path) -> None:
    before = {path: path.read_bytes() for path in (dataset / "data").iterdir()}
    write_dataset(dataset, {"validation": 12, "test": 7}, rows_per_shard=50, rows_per_group=20)
    assert {path: path.read_bytes() for path in (dataset / "data").iterdir()} == before


def test_other_shards_of_a_split_are_refused(dataset: Path) -> None:
    with pytest.raises(DatasetError, match="holds other shards of train: delete them, or choose another folder"):
        write_dataset(dataset, {"train": 20})
    assert len(list(dataset.glob("data/train-*"))) == 3


def test_a_failed_write_leaves_the_old_shard_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path, {"test": 2})
    shard = tmp_path / "data" / "test-00000-of-00001.parquet"
    before = shard.read_bytes()

    def fail(_seed: int) -> Phantom:
        raise OSError("disk full")

    monkeypatch.setattr(phantoms, "draw", fail)
    with pytest.raises(OSError, match="disk full"):
        write_dataset(tmp_path, {"test": 2})
    assert shard.read_bytes() == before
    assert list(shard.parent.iterdir()) == [shard]


# --- Kinds that the model has not seen ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def new() -> list[Phantom]:
    return [unseen.draw(seed) for seed in HELD_OUT_SEEDS["validation"][-300:]]


def test_no_new_kind_has_a_caption_of_an_old_one(new: list[Phantom], sample: list[Phantom]) -> None:
    assert {phantom.caption for phantom in new}.isdisjoint(phantom.caption for phantom in sample)
    assert len({phantom.image.tobytes() for phantom in new}) == len(new)
    counts = Counter(word for phantom in new for word in ("mammogram", "knee", "kidney") if word in words(phantom))
    assert sum(counts.values()) == len(new)
    assert min(counts.values()) > 70
    assert len({phantom.caption for phantom in new}) > 35


def words(phantom: Phantom) -> set[str]:
    return set(phantom.caption.lower().rstrip(".").split())


def test_a_caption_of_a_new_kind_names_the_half_pole_or_bone_that_the_finding_lies_in(new: list[Phantom]) -> None:
    checked = 0
    for phantom in new:
        assert phantom.caption.startswith("Normal ") is (phantom.finding is None)
        if phantom.finding is None:
            continue
        if "half" in words(phantom) or "femur" in words(phantom) or "tibia" in words(phantom):
            assert (phantom.finding.y < 0.5) is bool(words(phantom) & {"upper", "femur"}), phantom.caption
        elif "pole" in words(phantom):
            assert (phantom.finding.x < 0.5) is ("upper" in words(phantom)), phantom.caption
        elif "fibula" in words(phantom):
            assert (phantom.finding.x < 0.5) is ("right" in words(phantom)), phantom.caption
        else:
            continue
        checked += 1
    assert checked > 150


def test_a_mixed_data_set_has_the_stated_share_of_old_kinds_and_no_picture_twice(tmp_path: Path) -> None:
    told: list[int] = []
    counts = {"train": 40, "test": 20}
    write_dataset(tmp_path, counts, rows_per_group=10, drawn=unseen.mixed, progress=lambda *step: told.append(step[1]))
    assert told == [10, 20, 30, 40, 50, 60]
    rows = {split: read(tmp_path, split).to_pylist() for split in counts}
    for split, count in counts.items():
        old = [row for row in rows[split] if row["image_id"].startswith(unseen.OLD)]
        assert len(old) == count // unseen.OLD_EVERY
        assert all(row["image_id"].startswith(unseen.NEW) for row in rows[split] if row not in old)
        captions = {draw(seed).caption for seed in HELD_OUT_SEEDS[split][:count]}
        assert {row["caption"] for row in old} <= captions
    pictures = [row["image"]["bytes"] for split in counts for row in rows[split]]
    assert len(set(pictures)) == 60


# --- The contact sheet -------------------------------------------------------------------------------------------


def inks(path: Path) -> set[tuple[int, int, int]]:
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        colours = sheet.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    return {EQUAL_INK, DIFFERENT_INK} & {colour for _, colour in colours}


def test_a_contact_sheet_marks_equal_and_different_captions(sample: list[Phantom], tmp_path: Path) -> None:
    grey = next(phantom for phantom in sample if phantom.image.mode == "L")
    equal, different = tmp_path / "equal.png", tmp_path / "different.png"
    contact_sheet([(grey.image, grey.caption, grey.caption)], equal)
    contact_sheet([(grey.image, grey.caption, "Something else.")], different)
    assert inks(equal) == {EQUAL_INK}
    assert inks(different) == {DIFFERENT_INK}


def test_a_contact_sheet_grows_by_rows_and_leaves_no_other_file(sample: list[Phantom], tmp_path: Path) -> None:
    rows = [(phantom.image, phantom.caption, phantom.caption) for phantom in sample]
    sizes = []
    for count in (0, 1, 4, 5):
        contact_sheet(rows[:count], tmp_path / f"{count}.png")
        with Image.open(tmp_path / f"{count}.png") as sheet:
            sizes.append(sheet.size)
    assert sizes[2][0] == sizes[3][0]
    assert sizes[0][1] < sizes[1][1] <= sizes[2][1] < sizes[3][1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", "4.png", "5.png"]


@pytest.mark.parametrize(
    ("size", "shown"), [((2000, 40), (300, 6)), ((3, 900), (1, 300)), ((112, 100), (224, 200)), ((1, 1), (2, 2))]
)
def test_a_picture_is_shown_twice_its_size_or_as_large_as_its_card_allows(
    tmp_path: Path, size: tuple[int, int], shown: tuple[int, int]
) -> None:
    contact_sheet([(Image.new("RGB", size, "magenta"), "x", "x")], tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        magenta = np.all(np.asarray(sheet) == (255, 0, 255), axis=2)
    rows, columns = np.nonzero(magenta)
    assert (int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1) == shown


def test_drawing_needs_no_torch() -> None:
    program = "import sys, rococap.demo.phantoms, rococap.demo.sheet; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
