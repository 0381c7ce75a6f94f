"""What the page of a picture stores and answers, on both databases."""

from collections.abc import Iterator

import pytest
from galleries import both_databases, text, world
from sqlalchemy import Engine
from starlette.testclient import TestClient
from steps import select

from rococap.web import app
from rococap.web.access import access_for

pytestmark = both_databases
PAGE = "/picture/3?run=one&run=two"


@pytest.fixture
def client(database: Engine, tmp_path) -> Iterator[TestClient]:
    world(database, tmp_path)
    served = app.create_app(database, access_for("127.0.0.1", 80, token="", names=["testserver"]))
    client = TestClient(served, cookies={"rococap-80-reader": "Anna"})
    yield client
    client.close()
    served.close()


def test_verdicts_and_edits_are_stored_under_the_readers_name_and_shown(client, database):
    judged = {"run": "two", "verdict": "minor", "errors": ["missed", "side"], "note": "A\0B"}
    assert client.post("/picture/3/reviews", json=judged).json() == {"message": "Saved: Minor error."}
    edited = {"run": "one", "text": "A new text.", "seen": None}
    assert client.post("/picture/3/edits", json=edited).status_code == 200
    (edit,) = select(database, "SELECT id, reader, text, previous FROM edits")
    assert edit[1:] == ("Anna", "A new text.", text("one", 2))
    reviews = select(database, "SELECT reader, verdict, errors, note FROM reviews")
    assert reviews == [("Anna", "minor", "side,missed", "A\ufffdB")]
    assert "edited by Anna" in client.get(PAGE).text

    clash = client.post("/picture/3/edits", json=edited | {"text": "Another."})
    assert clash.status_code == 409
    assert clash.json()["theirs"] == {"id": edit[0], "text": "A new text."}
    assert client.post("/picture/3/undo", json={"run": "two", "edit": edit[0]}).status_code == 400
    assert client.post("/picture/3/undo", json={"run": "one", "edit": edit[0]}).status_code == 200
    assert client.post("/picture/3/undo", json={"run": "one", "edit": edit[0]}).status_code == 400
    assert select(database, "SELECT text, undoes FROM edits WHERE id > 1") == [(text("one", 2), edit[0])]


REFUSED = [
    ("/picture/3/reviews", {"run": "one", "verdict": "fine"}, 400),
    ("/picture/3/reviews", {"run": "one", "verdict": "correct", "errors": ["side"]}, 400),
    ("/picture/3/reviews", {"run": "o\0ne", "verdict": "correct"}, 422),
    ("/picture/3/reviews", {"run": "none", "verdict": "correct"}, 409),
    ("/picture/4/reviews", {"run": "one", "verdict": "correct"}, 409),
    ("/picture/999/reviews", {"run": "one", "verdict": "correct"}, 404),
    ("/picture/3/edits", {"run": "one", "text": "x" * 200_000, "seen": None}, 400),
    ("/picture/3/undo", {"run": "one", "edit": 1 << 70}, 422),
    ("/picture/3/undo", {"run": "one", "edit": 7}, 400),
]


def test_what_cannot_be_is_refused_and_nothing_is_stored(client, database):
    for path, sent, status in REFUSED:
        answer = client.post(path, json=sent)
        assert (answer.status_code, list(answer.json())) == (status, ["error"]), (path, sent)
    assert select(database, "SELECT 1 FROM reviews UNION ALL SELECT 1 FROM edits") == []


def test_a_picture_that_is_not_in_the_list_has_a_page_without_neighbours(client):
    assert 'rel="next"' in client.get(PAGE).text
    # The index may still be filling: without it, and without a score to sort by, there is no next picture.
    failed = client.get("/picture/4?run=one&sort=rouge_l")
    assert failed.status_code == 200
    assert 'rel="next"' not in failed.text
    assert client.get(f"{PAGE}&sort=beauty").status_code == 400
