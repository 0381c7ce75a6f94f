import pytest
from hypothesis import given
from hypothesis import strategies as st

from rococap.errors import RococapError
from rococap.web import words
from rococap.web.words import Segment, Term

TEXTS = st.text(st.sampled_from('the left right lung é É e\u0301 L4-L5 ½ _ \n. "* <b>'), max_size=60)


def test_words_are_folded_alike_in_any_case_with_any_accent_and_between_any_signs():
    assert words.words_of("Émphysème, L4–L5 (T2_weighted)") == ["emphyseme", "l4", "l5", "t2", "weighted"]
    assert words.words_of("e\u0301 É é E") == ["e"] * 4
    assert words.words_of("AXIAL ct") == ["axial", "ct"]


def test_a_search_has_words_phrases_and_prefixes():
    assert words.parse('effusion "Left  lung" cardio* L4-L5') == (
        Term(("effusion",)),
        Term(("left", "lung")),
        Term(("cardio",), prefix=True),
        Term(("l4", "l5")),
    )
    assert words.parse('"open quote') == (Term(("open", "quote")),)


@pytest.mark.parametrize("asked", ["", " * ", '""', "a " * 17])
def test_a_search_without_words_or_with_too_many_is_refused(asked):
    with pytest.raises(RococapError, match="one to 16 words"):
        words.parse(asked)


def test_hits_are_marked_where_they_are():
    found = words.marked("The left lung; the LEFT, Lungs.", words.parse('"left lung*"'))
    assert found == [
        Segment("The ", False),
        Segment("left lung", True),
        Segment("; the ", False),
        Segment("LEFT, Lungs", True),
        Segment(".", False),
    ]
    overlapping = words.marked("a b c d", words.parse('"a b" "b c"'))
    assert overlapping == [Segment("a b c", True), Segment(" d", False)]
    assert words.marked("a bc", words.parse("b")) == [Segment("a bc", False)]
    assert words.marked("", words.parse("b")) == []


@given(TEXTS, TEXTS)
def test_segments_and_changes_are_the_texts_they_came_from(one, other):
    changes = words.differences(one, other)
    assert "".join(change.before for change in changes) == one
    assert "".join(change.after for change in changes) == other
    for change in changes:
        if change.kind == "equal":
            assert change.before.split() == change.after.split()
    if words.words_of(other):
        terms = words.parse(" ".join(words.words_of(other)[:3]))
        assert "".join(segment.text for segment in words.marked(one, terms)) == one


def test_texts_differ_word_by_word():
    changes = words.differences("A mass in the left lung.", "A large mass in the right lung.")
    assert [(change.kind, change.before, change.after) for change in changes] == [
        ("equal", "A ", "A "),
        ("insert", "", "large "),
        ("equal", "mass in the ", "mass in the "),
        ("replace", "left ", "right "),
        ("equal", "lung.", "lung."),
    ]


def test_long_texts_are_compared_only_up_to_a_limit():
    middle = [f"w{n}" for n in range(words.MAX_DIFFERING + 1)]
    other = [*middle[1:], middle[0]]
    kinds = [change.kind for change in words.differences(f"same {' '.join(middle)} end", f"same {' '.join(other)} end")]
    assert kinds == ["equal", "replace", "equal"]
