"""Concepts read from captions: what is named, what only looks like it, and the F1 of ImageCLEF."""

import hashlib
import random
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from rococap.scores import concepts
from rococap.scores.concepts import CONCEPTS, DIGEST, curated, f1, found, modality, parse, recall

MANUAL = frozenset(one.cui for one in CONCEPTS)

FILE = Path(concepts.__file__).parent / "concepts.toml"
CUI_OF = {concept.name: concept.cui for concept in CONCEPTS}
NAME_OF = {concept.cui: concept.name for concept in CONCEPTS}
TRAPS = tomllib.loads(FILE.read_text())["trap"]


def names(text):
    return {NAME_OF[cui] for cui in found(text)}


# --- What a caption names --------------------------------------------------------------------------------------

NAMED = [
    ("Whole-body 18F-FDG PET/CT shows an avid lymph node.", {"PET/CT"}),
    ("Intense FDG uptake on PET-CT.", {"PET/CT"}),
    ("Positron emission tomography (PET)/computed tomography (CT) of the neck.", {"PET/CT"}),
    ("PET scan: no residual uptake.", {"PET"}),
    ("18F-FDG accumulation has disappeared.", {"PET"}),
    ("Axial T2-weighted MRI of the brain.", {"MRI"}),
    ("Sagittal T1 weighted image after gadolinium.", {"MRI"}),
    ("T2WI: a cyst in the left thalamus.", {"MRI"}),
    ("Fluid‐attenuated inversion recovery sequence, periventricular lesions.", {"MRI"}),
    ("MR angiography of the circle of Willis.", {"MRI"}),
    ("A hyperintense focus in the white matter (arrow).", {"MRI"}),
    ("Contrast-enhanced CT scan of the abdomen.", {"CT"}),
    ("Computerised tomography of the chest.", {"CT"}),
    ("HRCT with ground-glass opacities.", {"CT"}),
    ("CT pulmonary angiogram with a filling defect.", {"CT"}),
    ("Computed tomography angiography of the aorta.", {"CT"}),
    ("X-ray computed tomography of a tooth.", {"CT"}),
    ("Digital subtraction angiogram of the left carotid artery.", {"angiography"}),
    ("DSA after coiling.", {"angiography"}),
    ("Venogram of the right femoral vein.", {"angiography"}),
    ("Transthoracic echocardiogram, apical view.", {"ultrasound"}),
    ("Colour Doppler of the portal vein.", {"ultrasound"}),
    ("Transverse US image of the left ovary.", {"ultrasound"}),
    ("Sonograms of the thyroid.", {"ultrasound"}),
    ("An anechoic lesion with posterior enhancement.", {"ultrasound"}),
    ("Chest radiograph at admission.", {"X-ray", "chest"}),
    ("CXR: clear lungs.", {"X-ray", "chest"}),
    ("Plain X ray of the abdomen, supine.", {"X-ray", "abdomen"}),
    ("KUB with a stone in the left ureter.", {"X-ray", "abdomen"}),
    ("Postoperative roentgenogram of both hips.", {"X-ray", "pelvis"}),
    ("Orthopantomogram with an impacted molar.", {"X-ray", "cranium"}),
    ("Panoramic radiograph at one year.", {"X-ray", "cranium"}),
    ("Radiograph of the thoracic spine.", {"X-ray", "spine"}),
    ("Xrays of the right knee.", {"X-ray", "lower extremity"}),
    ("Radiographs of the wrist show a scaphoid fracture.", {"X-ray", "upper extremity"}),
    ("Mammogram with a spiculated mass.", {"X-ray", "breast"}),
    ("AP radiograph of the pelvis.", {"X-ray", "pelvis", "antero-posterior"}),
    ("Anterior-posterior chest X-ray.", {"X-ray", "chest", "antero-posterior"}),
    ("Chest X-ray, PA view.", {"X-ray", "chest", "postero-anterior"}),
    ("Posteroanterior chest film.", {"X-ray", "chest", "postero-anterior"}),
    ("Ankle X-ray (lateral view).", {"X-ray", "lower extremity", "lateral"}),
    ("Lateral cervical spine radiograph.", {"X-ray", "spine", "lateral"}),
    ("Lateral cephalogram before treatment.", {"X-ray", "cranium", "lateral"}),
    ("Arrow shows the tumour.", set()),
]


@pytest.mark.parametrize(("caption", "named"), NAMED, ids=[caption for caption, _ in NAMED])
def test_a_caption_names_its_concepts(caption, named):
    assert names(caption) == named


LOOKS_LIKE_IT = [
    ("Severe mitral regurgitation (MR) in the four-chamber view.", set()),
    ("Severe MR after valve repair.", set()),
    ("A study of US patients in the US population.", set()),
    ("They told us that it was benign.", set()),
    ("Metastasis in T1 and T2 of the vertebral column.", set()),
    ("A pet dog with its owner.", set()),
    ("Optical coherence tomography of the macula.", set()),
    ("Fluorescein angiography of the retina.", set()),
    ("SPECT/CT of the parathyroid.", set()),
    ("Planned with 6 MV X-ray beams.", set()),
    ("The patient had chest pain and a lateral wound.", set()),
    ("The impact of the contact was direct.", set()),
    ("CT: dilated pulmonary artery (PA); AP diameter 4 cm.", {"CT"}),
    ("Lateral view of the chest on CT.", {"CT"}),
    ("MRI of the knee, AP diameter 4 cm.", {"MRI"}),
    ("Radiograph taken for chest pain.", {"X-ray"}),
    ("X-ray after aspiration, at the anterior superior iliac spine.", {"X-ray"}),
    ("On the other hand, the radiograph was normal.", {"X-ray"}),
    ("Chest radiograph: mass lateral to the aorta.", {"X-ray", "chest"}),
    ("Chest radiograph: bilateral collateral vessels in view.", {"X-ray", "chest"}),
    ("Chest radiograph: dilated pulmonary artery (PA).", {"X-ray", "chest"}),
    ("Chest radiograph: the anteroposterior diameter is large.", {"X-ray", "chest"}),
    ("Left lateral decubitus radiograph.", {"X-ray"}),
    ("Lateral wall. Intact radiograph.", {"X-ray"}),
]


@pytest.mark.parametrize(("caption", "named"), LOOKS_LIKE_IT, ids=[caption for caption, _ in LOOKS_LIKE_IT])
def test_a_caption_names_no_more_than_that(caption, named):
    assert names(caption) == named


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("Chest X-ray; a CT scan followed.", {"X-ray", "chest"}),
        ("CT scan after a chest X-ray.", {"CT"}),
        ("X-ray of the pelvis; the femur is spared.", {"X-ray", "pelvis"}),
        ("AP and lateral views, X-ray of the elbow.", {"X-ray", "upper extremity", "antero-posterior"}),
    ],
)
def test_of_several_of_a_kind_the_first_counts(caption, named):
    assert names(caption) == named


@pytest.mark.parametrize("nothing", ["", " ", "\u2028\n", "…", "0"])
def test_a_text_without_words_names_nothing(nothing):
    assert found(nothing) == frozenset()


@pytest.mark.parametrize("space", [*"\r\n\t\v\f\x1c\x1d\x85\xa0\u2028\u2029\u3000", "\r\n", "   ", " \u2028\v "])
def test_any_white_space_between_the_words_of_a_phrase_is_a_space(space):
    caption = "Lateral|view.|Magnetic|resonance was not done,|plain|film|of the|cervical|spine.".replace("|", space)
    assert names(caption) == {"MRI"}
    assert names(caption.replace(f"Magnetic{space}resonance", "It")) == {"X-ray", "spine", "lateral"}


@pytest.mark.parametrize("dash", ["-", "‐", "‑", "–", "—", "−", " ", "", " - ", "- "])
def test_a_hyphen_may_be_any_dash_a_space_or_nothing(dash):
    assert names(f"X{dash}ray of the chest, antero{dash}posterior") == {"X-ray", "chest", "antero-posterior"}


WORDS = ["the", "Arrow", "shows", "a", "large,", "white", "lesion", "(b)", "with", "3.5", "cm", "of", "effusion"]
OTHER_WORDS = st.lists(st.sampled_from(WORDS), max_size=8)


@settings(max_examples=40)
@given(OTHER_WORDS, OTHER_WORDS, st.sampled_from(NAMED))
def test_words_around_a_caption_change_nothing(before, after, pair):
    caption, named = pair
    assert names(" ".join([*before, caption, *after])) == named


@settings(max_examples=40)
@given(st.sampled_from(NAMED), st.randoms(use_true_random=False), st.sampled_from([str.upper, str.lower, str.title]))
def test_the_case_of_words_around_a_caption_changes_nothing(pair, order, cased):
    caption, named = pair
    words = ["early", "findings", "in", "patient", "number", "two"]
    order.shuffle(words)
    around = cased(" ".join(words))
    assert names(f"{around}. {caption} {around}") == named


@settings(max_examples=40)
@given(st.text(max_size=30))
def test_any_text_can_be_read(text):
    assert found(text) <= MANUAL


# --- The data file ---------------------------------------------------------------------------------------------

TERMS = [(concept, term) for concept in CONCEPTS for term in concept.terms + concept.abbreviations]


def written(term):
    return term.replace("… ", "left first ")


def alone(kind, term):
    """A term of a region or direction behind a word that says X-ray, and nothing of its kind."""
    return written(term) if kind == "modality" else f"Radiograph. {written(term)}"


def of_kind(cuis, kind):
    return {concept.cui for concept in CONCEPTS if concept.kind == kind} & cuis


def test_every_term_finds_its_own_concept():
    lost = {
        (concept.name, term)
        for concept, term in TERMS
        if of_kind(found(alone(concept.kind, term)), concept.kind) != {concept.cui}
    }
    assert lost == set()


def test_terms_find_their_concept_in_any_case_and_abbreviations_only_as_written():
    for concept in CONCEPTS:
        for term in concept.terms:
            for cased in (str.upper, str.title):
                assert concept.cui in found(alone(concept.kind, cased(term))), term
    assert names("mr") == names("us") == names("dsa") == set()
    assert names("radiograph ap") == {"X-ray"}


def test_every_trap_names_nothing():
    caught = [
        (trap["kind"], term)
        for trap in TRAPS
        for term in trap["terms"] + trap.get("abbreviations", [])
        if of_kind(found(alone(trap["kind"], term)), trap["kind"])
    ]
    assert caught == []


def test_concepts_are_whole():
    assert {concept.kind for concept in CONCEPTS} == {"modality", "region", "direction"} == {t["kind"] for t in TRAPS}
    assert len(CUI_OF) == len(NAME_OF) == len(CONCEPTS)
    assert all(re.fullmatch(r"C\d{7}", concept.cui) for concept in CONCEPTS)
    assert all(term == term.lower().strip() for concept in CONCEPTS for term in concept.terms)
    assert len({(concept.cui, term) for concept, term in TERMS}) == len(TERMS)


def test_the_concepts_are_those_of_rocov2():
    assert CUI_OF == {
        "CT": "C0040405",
        "MRI": "C0024485",
        "X-ray": "C1306645",
        "ultrasound": "C0041618",
        "angiography": "C0002978",
        "PET": "C0032743",
        "PET/CT": "C1699633",
        "antero-posterior": "C1999039",
        "postero-anterior": "C1996865",
        "lateral": "C0205129",
        "chest": "C0817096",
        "abdomen": "C0000726",
        "pelvis": "C0030797",
        "cranium": "C0037303",
        "spine": "C0037949",
        "lower extremity": "C0023216",
        "upper extremity": "C1140618",
        "breast": "C0006141",
    }
    assert frozenset(CUI_OF.values()) == MANUAL


def test_the_digest_is_that_of_the_file():
    assert hashlib.sha256(FILE.read_bytes()).hexdigest()[:12] == DIGEST


# --- Modality and column ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CT", "MRI", "X-ray", "ultrasound", "angiography", "PET", "PET/CT"])
def test_a_modality_has_a_name(name):
    assert modality({CUI_OF[name]}) == modality([CUI_OF["chest"], CUI_OF[name], "C0000001"]) == name


def test_without_a_modality_it_is_unknown():
    assert modality(frozenset()) == modality({CUI_OF["chest"], "C0000001"}) == "unknown"


def test_of_several_modalities_the_files_first_counts():
    order = ["PET/CT", "PET", "MRI", "CT", "angiography", "ultrasound", "X-ray"]
    assert [modality({CUI_OF[name] for name in order[skipped:]}) for skipped in range(7)] == order


@pytest.mark.parametrize(
    ("column", "cuis"),
    [
        ("C0040405", {"C0040405"}),
        ("C1306645;C0817096;C1996865", {"C1306645", "C0817096", "C1996865"}),
        ("C0040405; C0817096 ;", {"C0040405", "C0817096"}),
        ("C0040405;C0040405", {"C0040405"}),
        ("", set()),
        (" ; ", set()),
    ],
)
def test_the_column_is_parsed(column, cuis):
    assert parse(column) == frozenset(cuis)


# --- F1 and recall ---------------------------------------------------------------------------------------------

CUIS = st.frozensets(st.sampled_from([*sorted(MANUAL), "C0000001", "C0000002"]), max_size=8)


def imageclefs_f1(found, reference):
    union = sorted(found | reference)
    if not union:
        return 1.0
    return f1_score([cui in reference for cui in union], [cui in found for cui in union], zero_division=0.0)


@settings(max_examples=50)
@given(CUIS, CUIS)
def test_f1_is_scikit_learns_over_the_union(found, reference):
    assert f1(found, reference) == pytest.approx(imageclefs_f1(found, reference), abs=1e-12)


def test_f1_is_scikit_learns_on_captions():
    shuffled = random.Random(1).sample(NAMED, len(NAMED))
    for (caption, _), (_, named) in zip(NAMED, shuffled, strict=True):
        reference = frozenset(CUI_OF[name] for name in named)
        assert f1(found(caption), reference) == pytest.approx(imageclefs_f1(found(caption), reference), abs=1e-12)


def test_f1_counts_each_concept_once():
    assert f1(["C1", "C1", "C2"], ["C1"]) == pytest.approx(2 / 3)


def test_f1_of_nothing():
    assert f1([], []) == 1.0
    assert f1(["C1"], []) == f1([], ["C1"]) == f1(["C1"], ["C2"]) == 0.0


def test_recall_is_the_part_that_was_found():
    assert recall({"C1", "C3", "C4"}, ["C1", "C2"]) == 0.5
    assert recall(set(), {"C1"}) == 0.0
    assert recall({"C1"}, set()) is None


@pytest.mark.parametrize(
    ("cuis", "expected"),
    [
        ({"C0040405", "C0817096", "C0022646"}, {"C0040405"}),  # a CT of the chest, with the kidney
        ({"C1306645", "C0817096", "C1996865", "C0022646"}, {"C1306645", "C0817096", "C1996865"}),
        ({"C0022646"}, set()),
        ((), set()),
    ],
)
def test_curated_concepts_are_those_that_a_caption_can_be_read_for(cuis, expected):
    assert curated(cuis) == expected
