"""Texts in pieces lose nothing, and say what was found and what differs."""

from hypothesis import given
from hypothesis import strategies as st

from rococap.web.pieces import Piece, pieces
from rococap.web.words import parse

TEXTS = st.text("ab .\n", max_size=30)


def test_hits_and_differences_are_marked_together():
    found = pieces("A large left effusion.", parse('"left effusion"'), "A small left effusion.")
    assert found == [
        Piece("A "),
        Piece("small ", "removed"),
        Piece("large ", "added"),
        Piece("left effusion", hit=True),
        Piece("."),
    ]
    assert (found[1].words, found[1].space) == ("small", " ")
    assert [piece.kind for piece in pieces("A b", (), "A c", removed=False)] == ["same", "added"]


@given(TEXTS, TEXTS)
def test_the_pieces_of_a_text_are_the_text(before, text):
    found = pieces(text, parse("a"), before)
    assert "".join(piece.text for piece in found if piece.kind != "removed") == text
    assert all(piece.words + piece.space == piece.text for piece in found)
