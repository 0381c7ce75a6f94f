"""Who is reading: a name that people give themselves."""

from collections.abc import Iterator

import pytest
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.testclient import TestClient

from rococap import db
from rococap.web import app
from rococap.web.access import access_for
from rococap.web.reader import MaybeReader, Reader
from rococap.web.site import Here

NAME = "Zoë O'Brien; <b>“ÆØ”</b> 李"

router = APIRouter()


@router.get("/needs")
def needs(request: Request, site: Here, reader: Reader) -> Response:
    return site.page(request, "error.html", reader=reader, status_code=200, title="Hello", message=reader)


@router.get("/may")
def may(reader: MaybeReader) -> dict[str, str]:
    return {"reader": reader}


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[TestClient]:
    monkeypatch.setattr(app, "ROUTERS", (*app.ROUTERS, router))
    database = db.connect(f"sqlite:///{tmp_path}/queue.db", pooled=False)
    access = access_for("127.0.0.1", 80, token="", names=["testserver"])
    client = TestClient(app.create_app(database, access), headers={"Accept": "text/html"})
    yield client
    client.close()
    database.dispose()


def say(client: TestClient, name: str, next: str = "/may") -> Response:
    return client.post("/reader", data={"name": name, "next": next}, follow_redirects=False)


def test_a_page_asks_for_the_name_and_then_goes_on(client):
    asked = client.get("/needs?a=1&b=%26")
    assert asked.status_code == 409
    assert "Who is reading?" in asked.text
    assert 'name="next" value="/needs?a=1&amp;b=%26"' in asked.text
    answer = say(client, f"  {NAME} ", "/needs?a=1&b=%26")
    assert (answer.status_code, answer.headers["location"]) == (303, "/needs?a=1&b=%26")
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith("rococap-80-reader=Zo%C3%AB%20O%27Brien%3B%20%3Cb%3E")
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    page = client.get("/needs").text
    assert "You are reading as <b>Zoë O&#39;Brien; &lt;b&gt;“ÆØ”&lt;/b&gt; 李</b> · change" in page
    assert client.get("/may").json() == {"reader": NAME}


def test_programs_get_an_error_and_other_pages_need_no_name(client):
    answer = client.get("/needs", headers={"Accept": "application/json"})
    assert (answer.status_code, list(answer.json())) == (409, ["error"])
    assert client.get("/may").json() == {"reader": ""}
    assert "reading as" not in client.get("/").text


@pytest.mark.parametrize("name", ["", " ", "a" * 101, "a\nb", "\0"])
def test_what_is_no_name_is_refused_and_not_believed(client, name):
    assert say(client, name).status_code == 400
    client.cookies.set("rococap-80-reader", "%00" if name == "\0" else name.replace("\n", "%0A"))
    assert client.get("/may").json() == {"reader": ""}


@pytest.mark.parametrize("next", ["//example.org", "https://example.org/", "", "\\\\example.org", "/\\example.org"])
def test_no_form_leads_to_another_site(client, next):
    location = say(client, "Anna", next).headers["location"]
    assert location == "/" or location == "/%5Cexample.org"
