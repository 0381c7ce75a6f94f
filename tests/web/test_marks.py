"""What people have said of captions can be searched for, and is shown with the pictures."""

import galleries
from galleries import up_to_date, world

from rococap import db, review
from rococap.results import current
from rococap.web import gallery
from rococap.web.gallery import Query
from rococap.web.index import Index
from rococap.web.marks import MARKS, Opinion, opinions

pytestmark = galleries.both_databases


def found(database, index, runs, **marks):
    return [one.id for one in gallery.page(database, index, runs, Query("train", marks=marks), limit=100).pictures]


def test_reviews_and_edits_are_found_once_they_are_made_and_no_longer_when_undone(database, tmp_path):
    runs = world(database, tmp_path)
    index = up_to_date(Index(database, MARKS))
    with db.transaction(database, write=True) as conn:
        jobs = {row[0]: row[1] for row in current.jobs_of_images(conn, runs[0], [1, 2, 3], "j.image_id, j.id")}
        review.add_review(conn, runs[0], jobs[1], "Ada", "minor", now=1)
        review.add_review(conn, runs[0], jobs[1], "Bo", "major", now=2)
        first = review.edit(conn, runs[0], jobs[2], "Ada", "Better", seen=None)
        review.edit(conn, runs[0], jobs[3], "Ada", "Better", seen=None)
    up_to_date(index)
    assert found(database, index, runs[:1], reviewed=True) == [1]
    assert found(database, index, runs[:1], edited=True) == [2, 3]
    assert 1 not in found(database, index, runs[:1], reviewed=False)
    with db.transaction(database, write=True) as conn:
        review.undo(conn, runs[0], first.id, "Ada")
        said = opinions(conn, runs[0], [1, 2, 3, 5])
        assert opinions(conn, runs[1], [1, 2, 3]) == {}
        assert opinions(conn, runs[0], []) == {}
    assert said[1] == Opinion("major", "Bo", None, None)
    assert said[3] == Opinion(None, None, "Better", "Ada")
    assert 5 not in said
    up_to_date(index)
    assert found(database, index, runs[:1], edited=True) == [3]
    index.close()
