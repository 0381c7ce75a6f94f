"""Facts read from captions: what is stated, what is not, and how two captions agree."""

import csv
import re
import tomllib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled import ROCOV2, counts_of, read_labelled, read_labelled_negations, read_labelled_rocov2
from places import SHARED

from rococap.scores import facts
from rococap.scores.facts import KINDS, Agreement, agreements, f1, facts_of
from rococap.scores.facts.language import is_english
from rococap.scores.facts.sides import ABBREVIATIONS

FILE = Path(facts.__file__).parent / "facts.toml"


def named(kind, text):
    return set(facts_of(text).named[kind])


def agree(kind, caption, reference) -> Agreement:
    return agreements(facts_of(caption), facts_of(reference))[kind]


def score(kind, caption, reference) -> float:
    return float(f1(np.array(agree(kind, caption, reference).counts, dtype=float)))


# --- Names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "caption", "expected"),
    [
        ("modality", "CT scan after a chest X-ray.", {"CT", "X-ray"}),
        ("modality", "FDG uptake on PET/CT.", {"PET/CT"}),
        ("modality", "CT: the node is hyperintense.", {"CT"}),
        ("modality", "A hyperintense node.", {"MRI"}),
        ("modality", "Computed tomography angiography.", {"CT"}),
        ("modality", "Angiography, then a CT.", {"angiography", "CT"}),
        ("modality", "Bone scintigraphy with SPECT/CT.", {"nuclear medicine"}),
        ("modality", "Severe mitral regurgitation (MR).", set()),
        ("modality", "A computed tomograph of the spleen.", {"CT"}),
        ("modality", "HSG with patent tubes.", {"X-ray"}),
        ("modality", "Simultaneous PET/MRI.", {"PET/MRI"}),
        ("modality", "2-D echo image; fast spin echo image.", {"ultrasound", "MRI"}),
        ("modality", "Coronal 2D FIESTA.", {"MRI"}),
        ("modality", "Cine image.", set()),
        ("plane", "Axial and coronal reformats.", {"axial", "coronal"}),
        ("plane", "AP and lateral views of the elbow.", {"antero-posterior", "lateral"}),
        ("plane", "Parasternal long-axis view.", {"long axis"}),
        ("plane", "Left anterior oblique view.", {"oblique"}),
        ("plane", "The AP diameter of the transverse colon; superior sagittal sinus.", set()),
        ("plane", "A mass lateral to the aorta.", set()),
        ("plane", "Medial-lateral oblique view.", {"oblique"}),
        ("plane", "Cross-sectional area; cor pulmonale; pennation angle (PA).", set()),
        ("plane", "Cor T2 and Sag T1.", {"coronal", "sagittal"}),
        ("region", "Mass in the liver and the left lung.", {"abdomen", "chest"}),
        ("region", "Fracture of the femoral neck.", set()),
        ("region", "Cervical spine.", {"spine"}),
        ("region", "LV: left ventricle.", {"heart"}),
        ("region", "A patient with chest pain.", set()),
        ("region", "Head of the pancreas; the pancreatic head; the neck of gallbladder.", {"abdomen"}),
        ("region", "A dilated renal pelvis.", {"abdomen"}),
        ("region", "Bladder neck and uterine cervix; the head of the femur; iliac spine.", {"pelvis"}),
        ("region", "Humeral head; long head of the biceps; metacarpal heads.", {"upper extremity"}),
        ("region", "Metatarsal heads and the medial head of the gastrocnemius.", {"lower extremity"}),
        ("region", "Condylar head; the neck of the mandible.", {"face"}),
        ("region", "Head and neck.", {"head", "neck"}),
        ("region", "Fracture of the neck of the humerus.", {"upper extremity"}),
        ("region", "Stent in the left main bronchus.", {"chest"}),
        ("region", "Stenosis of the left main.", {"heart"}),
        ("region", "A cup of the optic nerve head.", {"face"}),
        ("region", "Vascular pedicle; crow's feet; molar-tooth sign.", set()),
        ("region", "A left parietal mass.", {"head"}),
        ("region", "The left parietal pleura.", {"chest"}),
        ("contrast", "Contrast-enhanced CT in the portal venous phase.", {"contrast", "venous phase"}),
        ("contrast", "CT without intravenous contrast.", {"no contrast"}),
        ("contrast", "Unenhanced CT.", {"no contrast"}),
        ("contrast", "Non-contrast-enhanced CT.", {"no contrast"}),
        ("contrast", "MRI with and without contrast.", {"contrast", "no contrast"}),
        ("contrast", "Pre- and postcontrast T1.", {"contrast", "no contrast"}),
        ("contrast", "CT without and with contrast.", {"contrast", "no contrast"}),
        ("contrast", "CT without contrast enhancement.", {"no contrast"}),
        ("contrast", "Ischemia without contrast enhancement of the bowel.", {"contrast"}),
        ("contrast", "Without extravasation of contrast.", {"contrast"}),
        ("contrast", "Contrast was not given.", {"no contrast"}),
        ("contrast", "In contrast to the CT, a cyst with posterior acoustic enhancement.", set()),
        ("sequence", "Fat-suppressed T2-weighted image and T1WI.", {"T1", "T2", "fat suppression"}),
        ("sequence", "T2 FLAIR.", {"FLAIR"}),
        ("sequence", "Metastasis at the T1-T2 level.", set()),
        ("sequence", "T1 without fat saturation.", {"T1"}),
        ("sequence", "Compression from T2-T4; T2 gastric cancer.", set()),
    ],
)
def test_a_caption_states_what_it_names(kind, caption, expected):
    assert named(kind, caption) == expected


def test_what_stands_in_place_of_another_is_opposite():
    found = agree("modality", "MRI of the brain", "CT of the brain")
    assert (found.counts, found.opposite) == ((0, 0, 0, 1), (("CT", "MRI"),))
    both = agree("plane", "axial, coronal", "axial, sagittal and oblique")
    assert (both.agreeing, both.invented, both.missed, both.opposite) == (
        ["axial"],
        [],
        ["sagittal"],
        (("oblique", "coronal"),),
    )
    assert score("plane", "axial", "axial and coronal") == pytest.approx(2 / 3)


# --- Sides -----------------------------------------------------------------------------------------------------


def sides(text):
    return [str(one) for one in facts_of(text).sides]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A mass in the left upper lobe.", ["left upper lobe"]),
        ("Right-sided pleural effusions", ["right pleural effusion"]),
        ("Bilateral hydronephrosis", ["left hydronephrosis", "right hydronephrosis"]),
        ("Opacities in both lungs.", ["left lung", "right lung"]),
        ("The left and right kidneys.", ["left kidney", "right kidney"]),
        ("LUL nodule, dilated RV.", ["left upper lobe", "right ventricle"]),
        ("Shift to the right.", ["right"]),
        ("A drain was left in place.", []),
        ("The wound was left open.", []),
        ("A right-angled clamp.", []),
        ("A right-handed man.", []),
        ("Right anterior oblique and left lateral decubitus views.", []),
        ("Left-to-right shunt.", []),
        ("Left panel: before treatment.", []),
        ("The left-hand image; the top left corner; the right side of the figure.", []),
        ("The left hand.", ["left"]),
        ("Left lateral position; right oblique view.", []),
        ("The right diagnosis.", []),
        ("LA = local anesthetics.", []),
        ("Local anesthetics (LA) around the nerve.", []),
        ("LA = left atrium.", ["left atrium", "left atrium"]),
        ("LPA: left pulmonary artery", ["left pulmonary artery", "left pulmonary artery"]),
        ("Both the femur and the tibia.", []),
        ("la rv", []),
    ],
)
def test_a_side_is_read_with_what_follows_it(caption, expected):
    assert sides(caption) == expected


@pytest.mark.parametrize("name", ABBREVIATIONS)
def test_an_abbreviation_is_the_side_that_it_stands_for(name):
    assert [one.side for one in facts_of(f"The {name} is seen.").sides] == [ABBREVIATIONS[name].side]


@pytest.mark.parametrize(
    ("caption", "reference", "expected"),
    [
        ("Mass in the left lung", "Left lung with a mass", (1, 0, 0, 0)),
        ("Mass in the left lung", "Mass in the right lung", (0, 0, 0, 1)),
        ("Left kidney, right lung", "Right kidney, left lung", (0, 0, 0, 2)),
        ("Left upper lobe and right lower lobe", "Right upper lobe and left lower lobe", (0, 0, 0, 2)),
        ("Left effusion", "Bilateral effusion", (1, 0, 1, 0)),
        ("Bilateral effusion", "Left effusion", (1, 1, 0, 0)),
        ("The left and right kidneys", "The right and left kidneys", (2, 0, 0, 0)),
        ("Left lung: a mass in the left upper lobe", "Left lung", (1, 0, 0, 0)),
        ("Left breast", "Left lung", (1, 0, 0, 0)),
        ("Left breast", "Right lung", (0, 0, 0, 1)),
        ("A mass", "Left lung", (0, 0, 1, 0)),
        ("Left lung", "A mass", (0, 1, 0, 0)),
        (
            "Effusion in the left lung, nodule in the right lung",
            "Nodule in the left lung, effusion in the right lung",
            (0, 0, 0, 2),
        ),
    ],
)
def test_sides_agree_or_are_opposite(caption, reference, expected):
    assert agree("side", caption, reference).counts == expected


# --- Negation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "denied", "affirmed"),
    [
        ("No pleural effusion.", {"effusion"}, set()),
        ("No effusion, pneumothorax or fracture.", {"effusion", "pneumothorax", "fracture"}, set()),
        ("No effusion, large mass.", {"effusion"}, {"mass"}),
        ("Mass without evidence of bone destruction", {"bone destruction"}, {"mass"}),
        ("Absence of fracture in a patient with pneumonia", {"fracture"}, {"opacity"}),
        ("Pneumothorax was ruled out.", {"pneumothorax"}, set()),
        ("CT negative for hemorrhage but with edema", {"hemorrhage"}, {"edema"}),
        ("The tear was not seen.", {"perforation"}, set()),
        ("Neither a mass nor a cyst.", {"mass", "cyst"}, set()),
        ("Complete resolution of the abscess.", {"abscess"}, set()),
        ("High-resolution of a mass, disappearance of a cyst.", {"cyst"}, {"mass"}),
        ("Fracture cannot be excluded.", set(), {"fracture"}),
        ("The scan does not rule out metastasis.", set(), {"metastasis"}),
        ("No change of the mass.", set(), {"mass"}),
        ("CT without contrast showing a mass.", set(), {"mass"}),
        ("Absence of the left kidney.", set(), set()),
        ("No large, lobulated, solid mass.", {"mass"}, set()),
        ("No enhancement, effusion on the left.", {"enhancement"}, {"effusion"}),
        ("No abnormal signal, mass in the liver.", {"signal abnormality"}, {"mass"}),
        ("No 4.3 x 2 cm cyst.", {"cyst"}, set()),
        ("Case no 4 with a cyst.", set(), {"cyst"}),
        ("No formation of a fistula.", {"fistula"}, set()),
        ("The stone (arrow) is not seen.", {"stone"}, set()),
        ("A cyst. A stone (arrow) is not seen.", {"stone"}, {"cyst"}),
        ("Enhancement of the mass was not seen.", {"enhancement"}, {"mass"}),
        ("In this view of the liver a mass is not seen.", {"mass"}, set()),
        ("Signs of inflammation were not seen.", {"inflammation"}, set()),
        ("A cyst, and a mass is not seen.", {"mass"}, {"cyst"}),
        ("An effusion (culture negative).", set(), {"effusion"}),
        ("An effusion on the left, no effusion on the right.", {"effusion"}, {"effusion"}),
        ("A cyst (tumor not shown).", set(), {"cyst", "mass"}),
        ("No contrast extravasation.", {"leak"}, set()),
        ("No contrast enhancement of the mass.", {"enhancement"}, {"mass"}),
        ("Ischemia without contrast enhancement of the bowel.", {"enhancement"}, {"infarction"}),
        ("No air under the diaphragm.", {"free air"}, set()),
        ("No evidence of disease.", {"abnormality"}, set()),
        ("No free fluid or free air.", {"free fluid", "free air"}, set()),
        ("There isn't any fracture. It doesn't show a mass.", {"fracture", "mass"}, set()),
        ("The stone isn’t seen.", {"stone"}, set()),
        ("The pneumothorax has resolved.", {"pneumothorax"}, set()),
        ("The effusion resolved after drainage; the mass disappeared.", {"effusion", "mass"}, set()),
        ("The mass has largely disappeared.", set(), {"mass"}),
        ("Time-resolved imaging of a fistula.", set(), {"fistula"}),
        ("A non-displaced fracture.", {"displacement"}, {"fracture"}),
        ("Nondisplaced fracture, undisplaced.", {"displacement"}, {"fracture"}),
        ("An unruptured aneurysm.", {"perforation"}, {"aneurysm"}),
        ("Calcifications and a noncalcified part; a non-enhancing mass.", set(), {"calcification", "mass"}),
        (
            "The fracture is not displaced and the mass does not enhance.",
            {"displacement", "enhancement"},
            {"fracture", "mass"},
        ),
        ("The lesion is not a cyst.", {"cyst"}, {"lesion"}),
        ("A mass with abscess-free margins.", {"abscess"}, {"mass"}),
        ("MRI to rule out metastasis.", set(), {"metastasis"}),
        ("A mass with or without calcification.", set(), {"mass", "calcification"}),
        ("A fracture of the lateral mass of C1.", set(), {"fracture"}),
    ],
)
def test_what_is_denied(caption, denied, affirmed):
    assert (facts_of(caption).denied, facts_of(caption).affirmed) == (denied, affirmed)


def test_a_finding_that_one_denies_and_the_other_names_is_opposite():
    assert agree("negation", "Effusion.", "No effusion.").opposite == [("no effusion", "effusion")]
    assert agree("negation", "No effusion.", "Effusion.").opposite == [("effusion", "no effusion")]
    assert agree("negation", "No effusion.", "A mass.").counts == (0, 1, 0, 0)
    assert agree("negation", "A mass.", "No effusion.").counts == (0, 0, 1, 0)
    assert agree("negation", "No effusion or mass.", "Without a mass.").counts == (1, 1, 0, 0)
    assert agree("negation", "Effusion.", "Effusion.").counts == (0, 0, 0, 0)


# --- Measurements ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A 3 x 4 cm mass", [("length in mm", 30), ("length in mm", 40)]),
        ("30 × 30-mm", [("length in mm", 30), ("length in mm", 30)]),
        ("17,27 × 8,7 cm", [("length in mm", 172.7), ("length in mm", 87)]),
        ("a nine-millimeter stone", [("length in mm", 9)]),
        ("2.5-cm, 3.2 cms", [("length in mm", 25), ("length in mm", 32)]),
        ("5–6 mm", [("length in mm", 5), ("length in mm", 6)]),
        ("1,000 mL and 40 cc", [("volume in ml", 1000), ("volume in ml", 40)]),
        ("45 HU at 1.5 T with 5.0 MHz", [("attenuation in HU", 45), ("field in tesla", 1.5), ("frequency in Hz", 5e6)]),
        ("60 Gy = 6000 cGy", [("dose in Gy", 60), ("dose in Gy", 60)]),
        ("a 90° angle, 45 degrees", [("angle in °", 90), ("angle in °", 45)]),
        ("at 12 weeks and two days", [("time in s", 12 * 604_800), ("time in s", 2 * 86_400)]),
        ("a 65-year-old man after 6 months", [("time in months", 780), ("time in months", 6)]),
        ("SUVmax 3.5; 80% stenosis", [("share in %", 80), ("uptake", 3.5)]),
        ("a twenty-two-year-old, fifty-eight years", [("time in months", 264), ("time in months", 696)]),
        ("10 yo, 45 y/o, 12 yrs, 6 mo", [("time in months", n) for n in (120, 540, 144, 6)]),
        ("5 h after, the 5th rib", [("time in s", 18_000)]),
        ("400 mg per day", [("mass in kg", 4e-4)]),
        ("-50 HU", [("attenuation in HU", -50)]),
        ("−100 to −50 HU", [("attenuation in HU", -100), ("attenuation in HU", -50)]),
        ("30-50 HU", [("attenuation in HU", 30), ("attenuation in HU", 50)]),
        ("0.8×10-3mm2/s", [("diffusivity in mm²/s", 8e-4)]),
        ("5 cm^2 and 3 cm^3", [("area in mm²", 500), ("volume in ml", 3)]),
        ("10 cm H2O", [("pressure in mmHg", 7.3556)]),
        ("20+3 weeks", []),
        ("1 mm or 1000 µm", [("length in mm", 1), ("length in mm", 1)]),
        ("case 3, T2-weighted, L4/L5, in 1989, 3D, 4-chamber", []),
    ],
)
def test_measurements_have_a_unit_and_are_converted(caption, expected):
    found = [(one.dimension, pytest.approx(one.value)) for one in facts_of(caption).measurements]
    assert [(dimension, value) for dimension, value in expected] == found


@pytest.mark.parametrize(
    ("caption", "reference", "expected"),
    [
        ("3.2 cm", "32 mm", (1, 0, 0, 0)),
        ("3 cm", "3.2 cm", (1, 0, 0, 0)),
        ("30 mm", "3.2 cm", (0, 0, 0, 1)),
        ("3 cm", "5 cm", (0, 0, 0, 1)),
        ("3 x 4 cm", "4 x 3 cm", (2, 0, 0, 0)),
        ("3 cm", "3 x 4 cm", (1, 0, 1, 0)),
        ("3 cm", "3 HU", (0, 1, 1, 0)),
        ("7 days", "1 week", (1, 0, 0, 0)),
    ],
)
def test_measurements_are_equal_within_rounding(caption, reference, expected):
    assert agree("measurement", caption, reference).counts == expected


# --- Language --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *("", "…", "Case 1.", "CT abdomen axial", "Coronal T2, de Quervain tenosynovitis", "IVC and SMV"),
        *("Müller maneuver, Köhler disease of the foot", "A mass (sagittal view) in the left lung"),
        "d'Acosta disease",
        *("TEE: LA thrombus, LA appendage", "Axial T1-w, T2-w", "DES, LAD; DES, RCA", "Le Fort I, Le Fort II"),
    ],
)
def test_english_is_read_also_where_it_is_terse(text):
    assert is_english(text)
    assert facts_of(text) is not None


@pytest.mark.parametrize(
    "text",
    [
        "Radiographie du thorax montrant un épanchement pleural gauche",
        "Coupe scanographique montrant l’aorte",
        "Aspect de l'IRM d'un kyste",
        "Radiografía de tórax con derrame pleural",
        "Röntgenbild der Lunge mit Erguss und Überblähung",
        "TC de tórax, corte axial, com janela para o mediastino",
        "胸部X线显示左侧胸腔积液",
        "胸部CT",
        "头颅MRI",
        "RADIOGRAFIA DE TORAX CON DERRAME EN LA BASE",
        "Рентгенограмма грудной клетки",
        "صورة شعاعية للصدر",
        "Rx torace: versamento pleurico della base e nel polmone",
    ],
)
def test_what_is_not_english_is_not_read(text):
    assert facts_of(text) is None


# --- All kinds -------------------------------------------------------------------------------------------------

WORDS = [*KINDS, "no", "without", "left", "right lung", "3", "cm", ",", "CT", "effusion"]
TEXTS = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(WORDS)).map(" ".join))


@settings(max_examples=60)
@given(TEXTS, TEXTS)
def test_any_two_texts_can_be_compared_and_it_is_the_same_the_other_way_round(one, other):
    first, second = facts_of(one), facts_of(other)
    if first and second:
        for kind, there in agreements(first, second).items():
            agreeing, invented, missed, opposite = there.counts
            assert agreements(second, first)[kind].counts == (agreeing, missed, invented, opposite)


def test_without_facts_there_is_no_score_and_an_empty_text_misses_all():
    counts = np.array([(0, 0, 0, 0), (1, 0, 0, 0), (1, 1, 1, 1), (0, 0, 0, 2)], dtype=float)
    np.testing.assert_array_equal(f1(counts), [np.nan, 1, 2 / 6, 0])
    assert agree("side", "", "Left lung").counts == (0, 0, 1, 0)
    assert all(one.counts == (0, 0, 0, 0) for one in agreements(facts_of(""), facts_of("")).values())


def test_2_000_words_are_read_and_agree_with_themselves():
    text = "No effusion in the left lung, 3 cm mass, MRI. CT: right kidney 4 mm, without a cyst or 12 weeks. " * 100
    assert len(text.split()) >= 2_000
    found = agreements(facts_of(text), facts_of(text))
    assert [sum(one.counts[1:]) for one in found.values()] == [0] * len(KINDS)
    assert found["measurement"].counts[0] == 3


# --- The lexicon -----------------------------------------------------------------------------------------------

TABLES = tomllib.loads(FILE.read_text("utf-8"))


def test_every_term_finds_its_own_name():
    lost = []
    for table in TABLES["fact"]:
        for term in (*table.get("terms", ()), *table.get("abbreviations", ())):
            text = term.replace("… ", "thin first ")
            found = {one.name for one in facts._lexicon(table["kind"]).finditer(text)}
            if table["name"] not in found:
                lost.append((table["kind"], table["name"], term, found))
    assert lost == []


def test_every_trap_names_nothing():
    caught = [
        (trap["kind"], term)
        for trap in TABLES["trap"]
        for term in trap["terms"]
        if list(facts._lexicon(trap["kind"]).finditer(term))
    ]
    assert caught == []


def test_no_term_is_listed_twice_for_one_name():
    for table in TABLES["fact"]:
        terms = [*table.get("terms", ()), *table.get("abbreviations", ())]
        assert len(set(terms)) == len(terms), (table["kind"], table["name"])
        assert all(term == term.lower().strip() for term in table.get("terms", ()))


# --- Measured --------------------------------------------------------------------------------------------------

MEASURED = {
    # kind: facts that both have, found facts, labelled facts
    "modality": (149, 149, 150),
    "plane": (52, 52, 52),
    "region": (194, 197, 200),
    "side": (133, 135, 133),
    "negation": (12, 12, 13),
    "measurement": (55, 55, 57),
    "contrast": (21, 21, 21),
    "sequence": (20, 20, 20),
}


MEASURED_ROCOV2 = {
    "modality": (33, 33, 33),
    "plane": (9, 9, 9),
    "region": (35, 35, 36),
    "side": (23, 23, 23),
    "negation": (5, 5, 5),
    "measurement": (5, 5, 6),
    "contrast": (3, 3, 3),
    "sequence": (4, 4, 4),
}


@pytest.mark.parametrize(
    ("labelled", "measured"),
    [
        (read_labelled, MEASURED),
        (read_labelled_negations, {"negation": (104, 110, 109)}),
        pytest.param(
            read_labelled_rocov2,
            MEASURED_ROCOV2,
            marks=pytest.mark.skipif(not ROCOV2.exists(), reason="needs the real captions of ../shared"),
        ),
    ],
)
def test_precision_and_recall_do_not_fall(labelled, measured):
    found = counts_of(labelled())
    for kind, (both, n_found, n_labelled) in measured.items():
        _, now_both, now_found, now_labelled = found[kind]
        assert now_labelled == n_labelled, kind
        assert now_both / now_found >= both / n_found - 1e-12, (kind, "precision")
        assert now_both / now_labelled >= both / n_labelled - 1e-12, (kind, "recall")


OTHER_SIDE = {"left": "right", "right": "left"}


@pytest.mark.parametrize(
    ("kind", "changed", "at_most"),
    [
        ("side", lambda text: re.sub(r"(?i)\b(?:left|right)\b", lambda one: OTHER_SIDE[one[0].lower()], text), 0.2),
        ("negation", lambda text: re.sub(r"(?i)\b(?:no|without)(?: evidence of)? ", "", text), 0.4),
    ],
)
def test_a_change_of_that_one_fact_costs_most_of_its_score(kind, changed, at_most):
    pairs = [(changed(one["caption"]), one["caption"]) for one in read_labelled() if one["facts"]]
    found = [score(kind, *pair) for pair in pairs if pair[0] != pair[1]]
    known = [value for value in found if not np.isnan(value)]
    assert len(known) > 4
    assert np.mean(known) <= at_most


def test_the_labelled_captions_name_their_source():
    captions = read_labelled()
    assert len({one["id"] for one in captions}) == len(captions) == 200
    captions += read_labelled_negations()
    assert len({one["id"] for one in captions}) == len(captions) == 357
    assert all(one["pmc_file"].startswith("PMC") for one in captions)
    assert {kind for one in captions for kind in one["facts"] or ()} == set(KINDS)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real captions of ../shared")
def test_no_real_caption_crashes_anything_and_each_agrees_with_itself():
    captions = []
    for path in sorted((SHARED / "captions").glob("*.csv")):
        with path.open(newline="", encoding="utf-8-sig") as file:
            captions += [
                {name.lower(): value for name, value in row.items()}["caption"] for row in csv.DictReader(file)
            ]
    assert len(captions) == 2_239
    for caption, other in pairwise(captions):
        read, another = facts_of(caption), facts_of(other)
        if read is None:
            continue
        for agreement in agreements(read, read).values():
            assert agreement.counts[1:] == (0, 0, 0), caption
        if another is not None:
            agreements(read, another)
