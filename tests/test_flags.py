"""What is marked as degenerate, and what is not: real captions above all."""

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import SHARED

from rococap.flags import degenerate, of_reasoning, without_reasoning

CAPTIONS = SHARED / "captions"


@pytest.mark.parametrize("text", ["", " ", "\n\n\n\n", "\t \u2028"])
def test_a_caption_that_says_nothing_is_empty(text):
    assert degenerate(text, "stop") == ("empty",)


@pytest.mark.parametrize(
    "text",
    ["!" * 256, "!!!!!!!!", "the " * 40, "the the the the the the the the th", "ab" * 8, "0" * 64, "\n".join("-" * 30)],
)
def test_one_token_for_ever_is_marked_however_it_ends(text):
    assert degenerate(text, "length") == ("one_token",)
    assert degenerate(text, "stop") == ("one_token",)


@pytest.mark.parametrize(
    "text",
    [
        "An axial CT of the chest. " + "The heart is enlarged. " * 6,
        "Findings:\n" + "".join(f"{n}. **Lung**: clear, no opacity.\n" for n in range(1, 30)),
        "A long and truthful beginning that does not repeat at all. " + "no effusion, " * 4 + "no eff",
        "A CT of cavitating cavitating cavitating, cavitating cavitating cavitating nodules.",
        "A CT. " + "The liver, the spleen, the kidneys and the pancreas are all seen here. " * 3,
    ],
)
def test_a_loop_until_the_longest_caption_is_marked(text):
    assert degenerate(text, "length") == ("loop",)


@pytest.mark.parametrize(
    "text",
    [
        "The heart is enlarged. The heart is enlarged.",
        "very very very large mass in the left lung",
        "No effusion. No mass. No fracture. No pneumothorax. No consolidation.",
        "An X-ray of a hand with arrows at A, B, C, D, E, F, G, H, I and J",
    ],
)
def test_what_a_person_might_write_is_not_marked(text):
    assert degenerate(text, "length") == ()


def test_a_word_again_and_again_is_marked_wherever_it_stands():
    assert degenerate("A chest " + "X-ray of the " * 2 + "lung " * 6 + "with a nodule.", "stop") == ("loop",)
    assert degenerate("A chest X-ray of the " + "lung " * 5 + "with a nodule.", "stop") == ()


def test_a_caption_that_ended_by_itself_may_repeat():
    assert degenerate("No effusion is seen on either side. " * 5, "stop") == ()


@pytest.mark.skipif(not CAPTIONS.exists(), reason="shared/ is not there")
def test_no_caption_that_people_wrote_is_marked():
    texts = []
    for path in CAPTIONS.glob("*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            texts += [row.get("caption") or row["Caption"] for row in csv.DictReader(file)]
    assert len(texts) > 2_000
    marked = [text for text in texts if text.strip() and degenerate(text, "length")]
    assert marked == []


@given(
    st.text(alphabet="ab .", min_size=1, max_size=30).filter(str.strip),
    st.integers(0, 29),
    st.text(alphabet="cdef ", max_size=200),
)
def test_a_piece_that_fills_the_end_is_found_wherever_it_is_cut(piece, cut, beginning):
    rounds = 4 + 24 // len(piece)
    assert degenerate(beginning + piece * rounds + piece[: cut % len(piece)], "length") in (("loop",), ("one_token",))


REASONED = [
    ("<think>A lung?</think>A scan.", "A scan."),
    ("<think>\nA lung?\n</think>\n\nA scan.\n", "A scan.\n"),
    (" <think></think> A scan.", " A scan."),
    ("A lung? Yes.\n</think>\nA scan.", "A scan."),
    ("<think>a</think> A <think>b</think>scan.", "A scan."),
]


@pytest.mark.parametrize(("text", "said"), REASONED)
def test_a_closed_block_is_reasoning_and_goes_with_the_white_space_after_it(text, said):
    assert of_reasoning(text) == ("reasoning",)
    assert without_reasoning(text) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<think>A lung? Let me look", "<think>A lung? Let me look"),
        ("<think>A lung?</thi", "<think>A lung?</thi"),
        ("<think>A lung?</think>", ""),
        ("<think>A lung?</think>\n", ""),
        ("A lung?</think> ", ""),
        ("<think>a</think>A scan. <think>b", "A scan. <think>b"),
    ],
)
def test_reasoning_that_never_ends_or_that_nothing_follows_is_unfinished(text, said):
    assert of_reasoning(text) == ("unfinished_reasoning",)
    assert without_reasoning(text) == said


@pytest.mark.parametrize(
    "text", ["", "A scan.", " I think: a scan. ", "a < b > c", "<thinking> is no tag of this kind"]
)
def test_a_text_without_reasoning_stays_as_it_is(text):
    assert of_reasoning(text) == ()
    assert without_reasoning(text) == text


@given(st.lists(st.sampled_from(["<think>", "</think>", " ", "a", "\n"]), max_size=12).map("".join))
def test_what_is_stripped_once_has_no_closed_block_left(text):
    said = without_reasoning(text)
    assert "<think>" not in said or "</think>" not in said[said.index("<think>") :]
    assert len(said) <= len(text)
    assert bool(of_reasoning(text)) == ("<think>" in text or "</think>" in text)
