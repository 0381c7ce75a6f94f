"""One look a second for all viewers, on every database."""

import asyncio
import threading

import httpx
import pytest
from samples import caption, fill, texts
from steps import at_once

from rococap import db
from rococap.errors import RococapError
from rococap.web import live as live_module
from rococap.web.access import access_for
from rococap.web.app import create_app
from rococap.web.live import Live, Shared


def test_many_who_ask_at_once_share_one_look():
    looks = []

    def look() -> int:
        looks.append(threading.get_ident())
        return len(looks)

    shared = Shared(look, 60.0)
    assert at_once(20, shared.now) == [1] * 20
    shared.forget()
    assert shared.now() == 2


def test_a_look_that_fails_is_shared_as_well():
    looks = []

    def look() -> None:
        looks.append(1)
        raise RococapError("away")

    shared = Shared(look, 60.0)
    for _ in range(3):
        with pytest.raises(RococapError, match="away"):
            shared.now()
    assert len(looks) == 1


async def first(live: Live, events: int) -> list[bytes]:
    stream = live.stream()
    found = [await anext(stream) for _ in range(events)]
    await stream.aclose()
    return found


def test_viewers_get_what_has_changed_from_one_poll_that_ends_with_the_last_of_them(monkeypatch):
    monkeypatch.setattr(live_module, "EVERY_SEC", 0.01)
    seen = [{"runs": "a\nb", "leases": "same"}, {"runs": "c", "leases": "same"}]
    looks = []

    def look() -> dict[str, str]:
        looks.append(1)
        return seen[min(len(looks), len(seen)) - 1]

    async def watch() -> list[list[bytes]]:
        live = Live(Shared(look, 0.0))
        streams = await asyncio.gather(*(first(live, 5) for _ in range(10)))
        poller = live._poller
        if poller is not None:
            await poller
        n = len(looks)
        await asyncio.sleep(0.1)
        assert len(looks) == n, "it still looks though nobody watches"
        return streams

    streams = asyncio.run(watch())
    assert (
        streams
        == [
            [
                b"retry: 2000\n\n",
                b"event: runs\ndata: a\ndata: b\n\n",
                b"event: leases\ndata: same\n\n",
                b"event: trouble\ndata: \n\n",
                b"event: runs\ndata: c\n\n",
            ]
        ]
        * 10
    )
    assert len(looks) <= 4


@pytest.mark.every_database
def test_pages_show_the_queue_of_every_database(url, database, tmp_path):
    run = fill(database, tmp_path, 7)
    with db.transaction(database) as conn:
        soon = db.now(conn) + 60_000  # so that this minute is not over when the charts are asked for
    caption(database, run, texts("one", "two"), now=soon)
    served = db.connect(url, pooled=False)
    app = create_app(served, access_for("127.0.0.1", 1, token=""))

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            first = [await client.get("/"), await client.get("/throughput")]
            answers = [await client.post("/actions/cancel", json={"run": "default"}), await client.get("/")]
            return first + answers

    page, throughput, cancelled, after = asyncio.run(ask())
    served.dispose()
    assert "2 of 7" in page.text
    assert throughput.json()["series"] == []
    assert cancelled.json()["message"].startswith("default: 5 cancelled. Undo: rococap ")
    assert "5 cancelled" in after.text
