"""Captions are changed in one respect, and only where the change is one."""

import csv
from random import Random

import pytest
from places import SHARED

from rococap.results.formats import fold
from rococap.scores import changes
from rococap.scores.changes import apply

CAPTIONS = SHARED / "captions"
ORIGINALS = ["CT of the chest.", "MRI of the brain.", " CT of the\nchest."]
CHANGES = changes.changes(ORIGINALS)


def changed(name: str, text: str) -> str | None:
    return apply(name, CHANGES[name], text)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("side_swap", "Right-sided effusion and a right rib.", "Left-sided effusion and a left rib."),
        ("side_swap", "A mass was left in place in the right lung.", "A mass was left in place in the left lung."),
        ("side_swap", "Left kidney.\r\nNormal", "Right kidney. Normal"),
        ("side_swap", "The kidney (left).", "The kidney (right)."),
        ("side_swap", "Both kidneys.", None),
        ("side_swap", "The right and the left kidney.", None),
        ("side_swap", "The left panel is at right angles.", None),
        ("side_swap", "LV: left ventricle.", None),
        ("negation_flip", "CT shows no sign of fracture.", "CT shows evidence of fracture."),
        ("negation_flip", "X-ray showing no pneumothorax.", "X-ray showing evidence of pneumothorax."),
        ("negation_flip", "There is no mass. No cyst.", "There is evidence of mass. No cyst."),
        ("negation_flip", "There were no stones.", "There were stones."),
        ("negation_flip", "A cyst without any enhancement.", "A cyst with enhancement."),
        ("negation_flip", "A cyst with no clear evidence of rupture.", "A cyst with evidence of rupture."),
        (
            "negation_flip",
            "MRI with and without contrast shows no cyst.",
            "MRI with and without contrast shows evidence of cyst.",
        ),
        ("negation_flip", "Absence of effusion.", "Presence of effusion."),
        ("negation_flip", "The cyst was not seen.", "The cyst was seen."),
        ("negation_flip", "No air under the diaphragm.", "Evidence of air under the diaphragm."),
        ("negation_flip", "Smear negative for cells.", "Smear positive for cells."),
        ("negation_flip", "CT showing a large mass.", "CT showing no large mass."),
        ("negation_flip", "CT showing a 4 cm mass.", "CT showing no 4 cm mass."),
        ("negation_flip", "CT demonstrates multiple cysts.", "CT demonstrates no cysts."),
        ("negation_flip", "There is an effusion.", "There is no effusion."),
        ("negation_flip", "An effusion is also seen.", "An effusion is not seen."),
        ("negation_flip", "CT reveals the presence of gas.", "CT reveals the absence of gas."),
        ("negation_flip", "CT showing the left kidney.", None),
        ("negation_flip", "CT showing normal lungs.", None),
        ("negation_flip", "The mass (not shown).", None),
        ("negation_flip", "The mass is no longer visible.", None),
        ("negation_flip", "CT of the chest.", None),
        ("negation_flip", "TC com gás no seu interior.", None),
        ("modality_swap", "Computed tomography (CT) scan.", "Magnetic resonance imaging (MRI) scan."),
        ("modality_swap", "Axial magnetic resonance image.", "Axial computed tomography image."),
        ("modality_swap", "Chest X-ray and lateral radiographs.", "Chest CT and lateral CT images."),
        ("modality_swap", "Ultrasonography: a cyst.", "MRI: a cyst."),
        ("modality_swap", "CT and MRI of the brain.", None),
        ("modality_swap", "T1-weighted MRI.", None),
        ("modality_swap", "PET/CT.", None),
        ("modality_swap", "The ct of an act.", None),
        ("region_swap", "Chest CT of both lungs.", "Abdomen CT of both kidneys."),
        ("region_swap", "X-ray of the right knee.", "X-ray of the right shoulder."),
        ("region_swap", "CT of the chest and abdomen.", None),
        ("region_swap", "The renal pelvis.", None),
        ("region_swap", "A fracture.", None),
        ("measurement_change", "Of no size, at L4, in 2016, a 40-year-old.", None),
        ("shuffle_words", "Three words only", None),
        ("cut_half", "CT of the left lung", "CT of"),
        ("cut_half", "Three words only", None),
        ("rephrase", "Axial CT showing a mass.", "A mass, as seen on axial CT."),
        ("rephrase", "A CT scan of the chest, showing cysts", "Cysts, as seen on a CT scan of the chest"),
        ("rephrase", "CT shows no mass. The liver is normal.", "No mass, as seen on CT. The liver is normal."),
        ("rephrase", "(A) CT showing a cyst. (B) MRI showing a mass.", None),
        ("rephrase", "CT showing that it grew.", None),
        ("rephrase", "CT of the chest.", None),
    ],
)
def test_a_change_applies_where_it_changes_the_meaning_and_nowhere_else(name, text, expected):
    assert changed(name, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A 3 x 2.5-cm mass", {"A 6 x 5.0-cm mass", "A 9 x 7.5-cm mass", "A 12 x 10.0-cm mass"}),
        ("1,5 mm", {"3,0 mm", "4,5 mm", "6,0 mm"}),
        ("from 3 to 5 mm, 20 HU", {"from 6 to 10 mm, 40 HU", "from 9 to 15 mm, 60 HU", "from 12 to 20 mm, 80 HU"}),
    ],
)
def test_every_number_with_a_unit_grows_by_one_factor_and_keeps_its_decimals(text, expected):
    assert changed("measurement_change", text) in expected


def test_the_caption_of_another_picture_is_another_text():
    assert changed("other_picture", "CT of the chest.") == "MRI of the brain."
    alone = changes.changes(["CT.", " CT. "])
    assert apply("other_picture", alone["other_picture"], "CT.") is None


def test_shuffled_words_are_the_same_in_another_order():
    text = "CT of the left lung showing a mass."
    found = changed("shuffle_words", text)
    assert sorted(found.split()) == sorted(text.split())
    assert found != text
    assert changed("shuffle_words", "no no no no") is None


def test_a_swap_of_sides_undoes_itself():
    text = "Left lung, with a LEFT-sided effusion."
    assert changed("side_swap", changed("side_swap", text)).lower() == text.lower()


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize(
    "text",
    ["", " \n", "no", "CT", "Ä", "КТ грудной клетки справа", "胸部CT。", "left " * 2_000, "showing no 3 mm " * 500],
)
def test_no_text_is_too_short_too_long_or_too_foreign(name, text):
    found = changed(name, text)
    assert found is None or (found and found == fold(found))


@pytest.mark.skipif(not CAPTIONS.exists(), reason="shared/ is not there")
@pytest.mark.parametrize(
    ("file", "column"),
    [("roco_v1_2000.csv", "caption"), ("roco_v1_awkward_200.csv", "caption"), ("rocov2_test_sample_39.csv", "Caption")],
)
def test_every_real_caption_is_changed_in_the_same_way_again_or_left_alone(file, column):
    with (CAPTIONS / file).open(encoding="utf-8", newline="") as lines:
        texts = [row[column] for row in csv.DictReader(lines)]
    for name, change in changes.changes(texts).items():
        applied = [apply(name, change, text) for text in texts]
        assert [text for text in applied if text is not None and text != fold(text)] == [], name
        assert [one for one, text in zip(applied, texts, strict=True) if one == fold(text)] == [], name
        assert any(applied), name
        backwards = [apply(name, change, text) for text in reversed(texts)]
        assert backwards[::-1] == applied, name


def test_a_change_depends_on_nothing_but_its_text_and_its_draws():
    text = "CT of the left lung showing a 3 cm mass."
    for change in CHANGES.values():
        assert change(text, Random(1)) == change(text, Random(1))
