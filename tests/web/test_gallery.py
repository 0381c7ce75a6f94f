"""Pages of the gallery: each is what a plain look at all rows finds, in the same order."""

from collections.abc import Iterator, Sequence
from itertools import pairwise, product

import galleries
import pytest
from galleries import CHEST, FAILED, FLAGGED, ORIGINALS, SCORES, SECOND, N, up_to_date, world
from sqlalchemy import Engine

from rococap.queue import Run
from rococap.web import gallery
from rococap.web.gallery import Page, Query, QueryError
from rococap.web.index import Index, SearchUnavailable

pytestmark = galleries.both_databases

FILTERS = {
    "everything": {},
    "modality": {"modality": "X-ray"},
    "concept": {"concept": CHEST},
    "flag": {"flag": "loop"},
    "failed": {"failed": True},
    "code": {"code": "corrupt"},
    "range": {"score": "rouge_l", "least": 0.25, "most": 0.75},
    "from": {"score": "rouge_l", "least": 0.5},
    "word": {"words": "EFFUSION"},
    "phrase": {"words": '"of the left"'},
    "prefix": {"words": "nod* of"},
    "original": {"words": "lung", "where": "original"},
    "caption": {"words": "lung", "where": "caption"},
    "several": {"words": "axial emphysema", "modality": "X-ray", "score": "rouge_l", "most": 0.6},
}


def fulfils(query: Query, names: Sequence[str], n: int) -> bool:
    """Whether a picture fulfils the filters, by the plainest means."""
    if query.has_range:
        score = SCORES.get(n, -1.0)
        if score < 0 or score < (query.least or 0) or score > (1 if query.most is None else query.most):
            return False
    is_xray = n % 3 == 0
    if (query.modality or query.concept) and not is_xray:
        return False
    return any(_fulfils_in(query, name, n) for name in names)


def _fulfils_in(query: Query, name: str, n: int) -> bool:
    failed = name == "one" and n in FAILED
    if (query.flag and (name != "one" or failed or n not in FLAGGED)) or (query.failed and not failed):
        return False
    if query.code and not (failed and FAILED[n] == query.code):
        return False
    captioned = not failed and (name == "one" or n < SECOND)
    original = ORIGINALS[n].lower()
    caption = galleries.text(name, n).lower().replace("é", "e") if captioned else ""
    searched = {"any": f"{original} | {caption}", "original": original, "caption": caption}[query.where]
    return all(_contains(f" {searched} ", word) for word in _words(query.words))


def _words(asked: str) -> list[str]:
    return [asked.strip('"')] if asked.startswith('"') else asked.lower().split()


def _contains(text: str, word: str) -> bool:
    return f" {word.rstrip('*')}" in text if word.endswith("*") else f" {word} " in text


def value(query: Query, n: int) -> float | None:
    if query.sort == "image":
        return 0.0
    if n in FAILED:
        return None
    known = {"length": len(galleries.text("one", n)), "time": galleries.at(n), "rouge_l": SCORES.get(n)}
    return known[query.sort]


def expected(query: Query, names: Sequence[str]) -> list[int]:
    keys = [(value(query, n), n) for n in range(N) if value(query, n) is not None and fulfils(query, names, n)]
    return [n for _, n in sorted(keys, reverse=query.descending)]


def pages(database: Engine, index: Index, runs: Sequence[Run], query: Query, limit: int) -> Iterator[Page]:
    after = ""
    while True:
        page = gallery.page(database, index, runs, query, after=after, limit=limit)
        yield page
        if not page.next:
            return
        after = page.next


def numbers(page: Page) -> list[int]:
    return [int(picture.image_id[-5:]) for picture in page.pictures]


@pytest.mark.parametrize("bound", [3, 2_000])
def test_pages_are_the_whole_list_in_order_for_each_filter_and_sort(database, tmp_path, monkeypatch, bound):
    monkeypatch.setattr(gallery, "BOUND", bound)  # with a small one, matches are found along the order asked for
    runs = world(database, tmp_path)
    index = up_to_date(Index(database))
    sorts = product(("image", "length", "time", "rouge_l"), (False, True), (1, 2))
    for (sort, descending, n_runs), (name, given) in product(sorts, FILTERS.items()):
        query = Query("train", sort=sort, descending=descending, **given)
        wanted = expected(query, [run.name for run in runs[:n_runs]])
        found = list(pages(database, index, runs[:n_runs], query, 4))
        assert [n for page in found for n in numbers(page)] == wanted, (name, sort, descending, n_runs)
        assert all(len(page.pictures) == 4 for page in found[:-1])
        for page in found:
            assert page.total is None or (page.total == len(wanted) if page.is_exact else page.total <= len(wanted))
        assert found[0].is_exact or bound == 3 or query.is_plain
    index.close()


@pytest.mark.parametrize("given", [{}, {"sort": "length"}, {"sort": "rouge_l", "descending": True}, {"words": "lung"}])
def test_pages_are_turned_backwards_as_well(database, tmp_path, given):
    runs = world(database, tmp_path)
    index = up_to_date(Index(database))
    query = Query("train", **given)
    forwards = list(pages(database, index, runs, query, 4))
    assert forwards[0].previous == ""
    for earlier, later in pairwise(forwards):
        back = gallery.page(database, index, runs, query, before=later.previous, limit=4)
        assert (numbers(back), back.next, back.previous) == (numbers(earlier), earlier.next, earlier.previous)
    shifted = gallery.page(database, index, runs, query, after=forwards[0].previous, limit=3)
    first = gallery.page(database, index, runs, query, before=shifted.next, limit=4)
    assert (numbers(first), first.previous) == (numbers(forwards[0]), ""), "the first page is always a full one"
    index.close()


@pytest.mark.parametrize("bound", [1, 2_000])
def test_neighbours_are_those_of_the_list_even_of_a_picture_that_it_leaves_out(database, tmp_path, monkeypatch, bound):
    monkeypatch.setattr(gallery, "BOUND", bound)
    runs = world(database, tmp_path)
    index = up_to_date(Index(database))
    ids = {numbers(page)[0]: page.pictures[0].id for page in pages(database, index, runs, Query("train"), 1)}
    for sort, descending, name in product(
        ("image", "rouge_l"), (False, True), ("everything", "modality", "range", "word")
    ):
        query = Query("train", sort=sort, descending=descending, **FILTERS[name])
        shown = expected(query, ["one"])
        for n in range(N):
            key = (value(query, n), n)
            others = [one for one in shown if one != n and key[0] is not None]
            is_before = {one: ((value(query, one), one) < key) != descending for one in others}
            wanted = [one for one in others if is_before[one]][-1:], [one for one in others if not is_before[one]][:1]
            found = gallery.neighbours(database, index, runs[:1], query, ids[n])
            assert found == tuple(ids[one[0]] if one else None for one in wanted), (sort, descending, name, n)
    index.close()


def test_without_an_index_neighbours_are_those_in_the_data_set(database, tmp_path):
    runs = world(database, tmp_path)
    index = Index(database)
    assert gallery.neighbours(database, index, runs, Query("train"), 2) == (1, 3)
    assert gallery.neighbours(database, index, runs, Query("train", descending=True), 1) == (2, None)
    with pytest.raises(SearchUnavailable, match="search index"):
        gallery.neighbours(database, index, runs, Query("train", sort="time"), 2)


def test_a_picture_is_shown_with_what_each_run_has_for_it(database, tmp_path):
    runs = world(database, tmp_path)
    index = up_to_date(Index(database))
    page = gallery.page(database, index, runs, Query("train", code="too_large"))
    (picture,) = page.pictures
    assert (page.total, page.is_exact, page.next, page.why) == (1, True, "", "")
    assert (picture.image_id, picture.original, picture.modality) == ("train_00011", ORIGINALS[11], "CT")
    one, two = picture.said
    assert (one.run, one.state, one.text, one.code, one.message) == ("one", "failed", None, "too_large", "picture 11")
    assert (two.run, two.state, two.text, two.generated_at) == (
        "two",
        "done",
        galleries.text("two", 11),
        galleries.at(11),
    )
    (flagged,) = gallery.page(database, index, runs, Query("train", flag="loop", words="20")).pictures
    assert (flagged.said[0].flags, flagged.said[0].scores) == (("loop",), {"rouge_l": SCORES[20]})
    assert (flagged.said[1].state, flagged.said[1].text) == ("pending", None)
    index.close()


def test_splits_are_apart_and_a_split_of_no_run_is_empty(database, tmp_path):
    runs = world(database, tmp_path)
    index = up_to_date(Index(database))
    assert numbers(gallery.page(database, index, runs, Query("test", words="original"))) == [0, 1, 2, 3, 4]
    assert gallery.page(database, index, runs, Query("validation")).pictures == []
    assert gallery.page(database, index, runs[:1], Query("validation", sort="time", words="of")).total == 0
    index.close()


def test_without_an_index_pictures_are_looked_at_in_order_and_nothing_else(database, tmp_path):
    runs = world(database, tmp_path)
    index = Index(database)
    for descending in (False, True):
        query = Query("train", descending=descending)
        found = list(pages(database, index, runs, query, 10))
        assert [n for page in found for n in numbers(page)] == expected(query, ["one"])
        assert found[0].total == N
        assert "search index" in found[0].why
    for query in (Query("train", words="lung"), Query("train", sort="time"), Query("train", failed=True)):
        with pytest.raises(SearchUnavailable, match="search index"):
            gallery.page(database, index, runs, query)


@pytest.mark.parametrize("after", ["x", "1:2", "-1", "nan:1", str(1 << 70), "1e999:3"])
def test_a_page_that_cannot_be_is_refused(database, tmp_path, after):
    runs = world(database, tmp_path)
    index = Index(database)
    with pytest.raises(QueryError, match="begin with the first"):
        gallery.page(database, index, runs, Query("train"), after=after)
    with pytest.raises(QueryError, match="begin with the first"):
        gallery.page(database, index, runs, Query("train", sort="time"), after=after.replace("1:2", "inf:2"))
    with pytest.raises(QueryError, match="1 to 200"):
        gallery.page(database, index, runs, Query("train"), limit=0)


def test_what_does_not_exist_cannot_be_asked_for(url):
    with pytest.raises(QueryError, match="choose one of image, length"):
        Query("train", sort="beauty")
    with pytest.raises(QueryError, match="no score 'beauty'"):
        Query("train", score="beauty")
