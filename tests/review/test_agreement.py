"""The statistics of reader studies give the numbers that were published."""

import pytest

from rococap.review.agreement import (
    agreement,
    cohen_kappa,
    fleiss_kappa,
    krippendorff_alpha,
    mean_interval,
    share_interval,
)

TWO_READERS = [{"a": 1, "b": 1}] * 20 + [{"a": 1, "b": 0}] * 5 + [{"a": 0, "b": 1}] * 10 + [{"a": 0, "b": 0}] * 15
"""Cohen's kappa of two readers of 50 grant proposals, a well-known worked example: 0.4."""

FOURTEEN_READERS = (
    *((0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1)),
    *((7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7)),
)
"""Counts of 14 readers for 10 subjects in 5 categories, the usual worked example of Fleiss' kappa: 0.210."""

FOUR_OBSERVERS = {"a": "123321412   ", "b": "1233224125 3", "c": " 3332342251 ", "d": "12332441251 "}
"""Of twelve units, with gaps: Krippendorff, "Computing Krippendorff's alpha-reliability" (2011), where alpha is
0.743 for nominal data and 0.849 for intervals."""


def units() -> list[dict[str, int]]:
    return [{who: int(text[at]) for who, text in FOUR_OBSERVERS.items() if text[at] != " "} for at in range(12)]


def test_cohens_kappa_of_the_grant_proposals():
    assert cohen_kappa(TWO_READERS, "a", "b", 2) == pytest.approx(0.4)


def test_weighted_kappa_counts_a_near_miss_as_less():
    """Cohen 1968: 1 less the observed by the expected mean of the squared distance."""
    pairs = [(0, 0), (1, 1), (2, 2), (2, 1)]
    codings = [{"a": a, "b": b} for a, b in pairs]
    observed = sum((a - b) ** 2 for a, b in pairs) / 4
    expected = sum((a - b) ** 2 for a, _ in pairs for _, b in pairs) / 16
    assert cohen_kappa(codings, "a", "b", 3, ordered=True) == pytest.approx(1 - observed / expected)
    assert cohen_kappa(codings, "a", "b", 3) == pytest.approx(1 - (1 / 4) / (1 - 5 / 16))


def test_fleiss_kappa_of_fourteen_readers():
    codings = []
    for counts in FOURTEEN_READERS:
        answers = [category for category, n in enumerate(counts) for _ in range(n)]
        codings.append({f"reader {n}": category for n, category in enumerate(answers)})
    assert fleiss_kappa(codings, 5) == pytest.approx(0.210, abs=0.0005)
    found = agreement(codings, 5)
    assert (len(found.readers), found.n_items, found.fleiss) == (14, 10, fleiss_kappa(codings, 5))
    assert len(found.cohen) == 91


def test_krippendorffs_alpha_of_his_own_example():
    assert krippendorff_alpha(units()) == pytest.approx(0.743, abs=0.0005)
    assert krippendorff_alpha(units(), ordered=True) == pytest.approx(0.849, abs=0.0005)


def test_what_is_not_defined_is_none():
    for codings in ([], [{"a": 1}], [{"a": 1, "b": 1}] * 3, [{"a": 1}, {"b": 0}]):
        found = agreement(codings, 2)
        assert (found.cohen_mean, found.fleiss, found.krippendorff) == (None, None, None)


def test_fleiss_kappa_leaves_out_what_not_everybody_read():
    found = agreement([*TWO_READERS, {"a": 1}, {"b": 0}], 2)
    assert (found.n_items, found.fleiss) == (50, agreement(TWO_READERS, 2).fleiss)
    assert found.cohen == {"a, b": pytest.approx(0.4)}


def test_intervals_are_those_of_the_books():
    """Wilson for 81 of 263: Newcombe, Statistics in Medicine 17 (1998), 857-872, table I."""
    assert share_interval([1.0] * 81 + [0.0] * 182) == pytest.approx((0.2553, 0.3662), abs=0.00005)
    assert share_interval([0.5] * 4) == share_interval([1.0, 0.0] * 2)
    assert share_interval([]) is None
    low, high = mean_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert mean_interval([2.0]) is None
    assert mean_interval([2.0, 2.0]) == (2.0, 2.0)
