"""The engine openai, against a real server on loopback that misbehaves when it is told to."""

import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest
from openai_server import HTML, Batched, ChatServer, Trouble, decoded, failing, picture_of, saying, streaming
from PIL import Image
from samples import fill, register
from small_engine import caption_of
from sqlalchemy import Engine
from steps import invoke, select, until

from rococap import db, queue
from rococap.demo import MODEL
from rococap.demo.phantoms import write_dataset
from rococap.engines import Completion, Options, Prepared, Request, load_engine
from rococap.engines import chat as chat_module
from rococap.engines import openai as openai_module
from rococap.engines.hf import TransformersEngine
from rococap.engines.openai import OpenAIEngine
from rococap.errors import ModelError, PictureError, RunError, ServerRefuses
from rococap.recipe import Recipe
from rococap.worker.process import work
from rococap.worker.settings import Settings
from rococap.worker.store import Outcome

RECIPE = Recipe(model="tests/small", max_new_tokens=64)


class Pictures:
    """A Source over grey pictures that are there from the start; `steps` are what it was told, with the times."""

    def __init__(self, engine: OpenAIEngine, greys: Sequence[int], size: tuple[int, int] = (30, 28)) -> None:
        self.left = [engine.prepare(grey, Request([Image.new("RGB", size, (grey,) * 3)])) for grey in greys]
        self.steps: list[tuple[float, int]] = []
        self.lost: set[int] = set()
        self.held = 0
        self.takes: list[tuple[int, float | None]] = []

    def take(self, most: int, wait: float | None) -> list[Prepared]:
        self.takes.append((self.held, wait))
        taken = [self.left.pop(0) for _ in range(min(most, len(self.left)))]
        self.held += len(taken)
        return taken

    def step(self, rows: int) -> set[int]:
        self.steps.append((time.monotonic(), rows))
        return self.lost


class Releasing(Pictures):
    """Lets the server answer what it holds back as soon as another answer has come."""

    def __init__(self, engine: OpenAIEngine, greys: Sequence[int], server: ChatServer) -> None:
        super().__init__(engine, greys)
        self.server = server

    def step(self, rows: int) -> set[int]:
        if rows:
            self.server.go_on.set()
        return super().step(rows)


@pytest.fixture(autouse=True)
def no_key_and_short_waits(monkeypatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(openai_module, "FIRST_WAIT_SEC", 0.02)
    monkeypatch.setattr(openai_module, "SHORT_WAIT_SEC", 0.02)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer() as server:
        yield server


@pytest.fixture
def load(server) -> Iterator[Callable[..., OpenAIEngine]]:
    """Loads an engine for the server; closed at the end."""
    engines = []

    def load(url: str | None = None, recipe: Recipe = RECIPE, **options: object) -> OpenAIEngine:
        engine = load_engine(recipe, Options(engine="openai", base_url=url or server.url, **options))
        assert isinstance(engine, OpenAIEngine)
        engine.load()
        engines.append(engine)
        return engine

    yield load
    for engine in engines:
        engine.close()


def run(engine: OpenAIEngine, source: Pictures) -> dict[int, Completion]:
    completions = list(engine.run(source))
    by_job = {completion.job_id: completion for completion in completions}
    assert len(by_job) == len(completions)
    return by_job


def grey_texts(greys: Sequence[int]) -> dict[int, str]:
    return {grey: f"30 by 28, grey {grey}" for grey in greys}


def texts(completions: dict[int, Completion]) -> dict[int, str]:
    return {job_id: completion.text for job_id, completion in sorted(completions.items())}


def asked(server: ChatServer) -> list[int]:
    return [picture_of(request).getpixel((0, 0))[0] for request in server.requests]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("rococap")]


# --- what is asked, and what comes of it -----------------------------------------------------------------------


def test_every_caption_goes_to_its_picture_whatever_the_order_of_the_answers(server, load):
    server.of_grey = {grey: [Trouble(delay=0.01 * (40 - grey))] for grey in range(0, 40, 3)}
    completions = run(load(), Pictures(load(), range(40)))
    assert texts(completions) == grey_texts(range(40))
    assert list(completions) != sorted(completions)


def test_the_request_is_a_picture_and_the_prompt_without_sampling(server, load):
    engine = load(recipe=Recipe(model="tests/small", prompt="What is this?", max_new_tokens=9))
    run(engine, Pictures(engine, [200]))
    (request,) = server.requests
    content = request["messages"][0].pop("content")
    assert request == {
        "model": "tests/small",
        "messages": [{"role": "user"}],
        "max_tokens": 9,
        "temperature": 0,
        "stream": False,
    }
    assert [part["type"] for part in content] == ["image_url", "text"]
    assert content[1]["text"] == "What is this?"
    assert server.paths[-1] == "/v1/chat/completions"


def test_messages_arrive_with_their_pictures_in_their_places_and_their_limit(server, load):
    engine = load()
    dark, light = (Image.new("RGB", (30, 28), (grey,) * 3) for grey in (10, 200))
    compare, with_, system = ({"type": "text", "text": text} for text in ("Compare", "with", "Be brief."))
    image, answer = {"type": "image"}, {"role": "assistant", "content": [{"type": "text", "text": "Yes?"}]}
    messages = [
        {"role": "system", "content": [system]},
        {"role": "user", "content": [compare, image, with_]},
        answer,
        {"role": "user", "content": [image]},
    ]
    source = Pictures(engine, [])
    source.left = [engine.prepare(1, Request([dark, light], messages, max_new_tokens=5))]
    run(engine, source)
    (request,) = server.requests
    assert request["max_tokens"] == 5
    sent = request["messages"]
    assert [message["role"] for message in sent] == ["system", "user", "assistant", "user"]
    assert (sent[0]["content"], sent[2]) == ([system], answer)
    assert (sent[1]["content"][0], sent[1]["content"][2]) == (compare, with_)
    came = [decoded(part) for part in (sent[1]["content"][1], sent[3]["content"][0])]
    assert [picture.getpixel((0, 0))[0] for picture in came] == [10, 200]


def test_the_recipes_prompt_as_messages_is_the_request_of_captioning(server, load):
    engine = load(recipe=Recipe(model="tests/small", prompt="What is this?"))
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    picture = Image.effect_noise((60, 40), 90).convert("RGB")
    assert engine.prepare(1, Request([picture], asked)) == engine.prepare(1, Request([picture]))


def test_a_limit_above_the_recipes_is_refused(load):
    with pytest.raises(PictureError, match=r"^max_new_tokens must be at most 64, as in the recipe, not 65\.$"):
        load().prepare(1, Request([Image.new("RGB", (30, 28))], max_new_tokens=65))


def test_pictures_are_sent_in_at_most_max_pixels_and_in_their_ratio(server, load):
    engine = load(recipe=Recipe(model="tests/small", min_pixels=1, max_pixels=10_000))
    sizes = {1: (100, 100), 2: (400, 200), 3: (2000, 10), 4: (50, 60), 5: (1234, 777)}
    source = Pictures(engine, [])
    source.left = [engine.prepare(job_id, Request([Image.new("RGB", size)])) for job_id, size in sizes.items()]
    estimates = {picture.job_id: picture.n_tokens for picture in source.left}
    run(engine, source)
    came = [picture_of(request).size for request in server.requests]
    assert sorted(came) == [(50, 60), (100, 100), (126, 79), (141, 70), (1414, 7)]
    assert all(width * height <= 10_000 for width, height in came)
    assert estimates == {1: 13, 2: 13, 3: 13, 4: 4, 5: 13}


def test_a_picture_arrives_as_it_was(server, load):
    engine = load()
    grey = Image.effect_noise((60, 40), 90).convert("RGB")
    marked = grey.copy()
    marked.putpixel((59, 39), (1, 1, 2))
    coloured = Image.merge("RGB", [Image.effect_noise((60, 40), 90) for _ in range(3)])
    pictures = [grey, marked, coloured]
    for picture in pictures:
        source = Pictures(engine, [])
        source.left = [engine.prepare(1, Request([picture]))]
        run(engine, source)
    assert [picture_of(request).tobytes() for request in server.requests] == [one.tobytes() for one in pictures]


def test_requests_use_the_connections_of_those_before_them(server, load, monkeypatch):
    monkeypatch.setattr(chat_module, "KEEP_SEC", 600.0)
    engine = load(batch_size=4)
    run(engine, Pictures(engine, range(40)))
    assert len(server._server.connections) <= 4


def test_requests_in_flight_reach_the_batch_size_and_never_exceed_it(server, load):
    server.of_grey = {grey: [Trouble(delay=60)] for grey in range(5)}
    engine = load(batch_size=5)
    assert engine.batch_size == 5
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, engine, Pictures(engine, range(23)))
        until(lambda: server.in_flight == 5, "as many as the batch size")
        server.go_on.set()
        completions = running.result()
    assert server.most_in_flight == 5
    assert max(completion.batch_size for completion in completions.values()) == 5
    assert load().batch_size == 16


def test_it_waits_for_pictures_only_while_nothing_is_in_flight(server, load):
    server.of_grey = {1: [Trouble(delay=60)]}  # still in flight when another has come back
    engine = load(batch_size=3)
    source = Releasing(engine, range(12), server)
    for _ in engine.run(source):
        source.held -= 1
    assert all((wait is None) == (held == 0) for held, wait in source.takes)
    assert {wait for _, wait in source.takes} == {0, None}


def test_pictures_that_come_later_fill_free_places_at_once(server, load):
    engine = load(batch_size=4)
    server.of_grey = {1: [Trouble(delay=600)]}
    source = Pictures(engine, [1, 2, 3])
    later = source.left[1:]
    del source.left[1:]
    done = []
    thread = threading.Thread(target=lambda: done.extend(engine.run(source)))
    thread.start()
    until(lambda: server.in_flight == 1, "the first request")
    source.left += later
    until(lambda: len(done) == 2, "two captions while the first is under way")
    server.go_on.set()
    thread.join(60)
    *early, late = [completion.job_id for completion in done]
    assert (sorted(early), late) == ([2, 3], 1)


def test_the_answer_is_taken_as_it_is(server, load):
    uncounted = saying(" A scan.\n\n")
    server.of_grey = {
        1: [replace(uncounted, changes=uncounted.changes | {"usage": None})],
        2: [saying("A sc", "length")],
        3: [saying("")],
        4: [saying(None)],
    }
    engine = load()
    completions = run(engine, Pictures(engine, [1, 2, 3, 4, 5]))
    assert texts(completions) == {1: " A scan.\n\n", 2: "A sc", 3: "", 4: "", 5: "30 by 28, grey 5"}
    assert [completions[n].finish_reason for n in range(1, 6)] == ["stop", "length", "stop", "stop", "stop"]
    assert (completions[1].prompt_tokens, completions[1].new_tokens) == (0, 0)
    assert (completions[5].prompt_tokens, completions[5].new_tokens) == (7, 3)
    assert all(completion.failure is None for completion in completions.values())


def test_a_reason_that_is_left_out_is_a_caption_that_ended(server, load):
    null = {"message": {"content": "A bone."}, "finish_reason": None}
    server.of_grey = {1: [saying("A scan.", None)], 2: [Trouble(changes={"choices": [null]})]}
    engine = load()
    completions = run(engine, Pictures(engine, [1, 2]))
    assert texts(completions) == {1: "A scan.", 2: "A bone."}
    assert {one.finish_reason for one in completions.values()} == {"stop"}


def test_a_caption_in_parts_is_their_text(server, load):
    server.of_grey = {
        1: [saying([{"type": "text", "text": "A scan."}])],
        2: [saying([{"type": "text", "text": "A scan "}, {"type": "text", "text": "of a hand."}], "length")],
        3: [saying([])],
    }
    engine = load()
    completions = run(engine, Pictures(engine, [1, 2, 3]))
    assert texts(completions) == {1: "A scan.", 2: "A scan of a hand.", 3: ""}
    assert [completions[n].finish_reason for n in (1, 2, 3)] == ["stop", "length", "stop"]


REASONING = [
    (saying("A scan.", reasoning_content="A lung?"), "<think>A lung?</think>\nA scan.", "reasoning"),
    (saying("A scan.", reasoning="A lung?\n"), "<think>A lung?\n</think>\nA scan.", "reasoning"),
    (saying("<think>A lung?</think>\n\nA scan."), "<think>A lung?</think>\n\nA scan.", "reasoning"),
    (saying(None, "length", reasoning_content="A lu"), "<think>A lu</think>\n", "unfinished_reasoning"),
    (saying("<think>A lu", "length"), "<think>A lu", "unfinished_reasoning"),
    (saying("<think>A lung?</think>"), "<think>A lung?</think>", "unfinished_reasoning"),
    (saying("A scan.", reasoning_content=None, reasoning=""), "A scan.", ""),
    (saying("A scan.", reasoning={"effort": "low"}), "A scan.", ""),
]


def test_reasoning_is_stored_as_it_came_and_flagged(server, database, tmp_path):
    fill(database, tmp_path / "set", len(REASONING), recipe=RECIPE)
    server.of_grey = {grey: [trouble] for grey, (trouble, _, _) in enumerate(REASONING)}
    assert caption_with(database, server, self_check=False).done == len(REASONING)
    found = select(database, "SELECT c.text, c.flags FROM captions c ORDER BY c.job_id")
    assert found == [(text, f"blank,{flags}".rstrip(",")) for _, text, flags in REASONING]


def test_the_shares_of_all_pictures_sum_to_the_time_that_requests_were_in_flight(server, load):
    server.sec = 0.1
    engine = load(batch_size=4)
    source = Pictures(engine, range(12))
    started = time.monotonic()
    completions = run(engine, source)
    took = time.monotonic() - started
    assert 0.29 < sum(one.processing_ms for one in completions.values()) / 1000 <= took
    assert all(one.latency_ms > 90 for one in completions.values())


def test_a_step_is_told_after_every_answer_and_never_while_a_server_hangs(server, load):
    server.of_grey = {1: [Trouble(delay=600)]}
    engine = load(batch_size=3)
    source = Pictures(engine, [1, 2, 3])
    done: list[Completion] = []
    thread = threading.Thread(target=lambda: done.extend(engine.run(source)))
    thread.start()
    until(lambda: len(done) == 2, "two captions")
    n_takes = len(source.takes)
    until(lambda: len(source.takes) > n_takes + 1, "their steps")
    n_steps = len(source.steps)
    until(lambda: len(source.takes) > n_takes + 10, "looks for more pictures")
    assert len(source.steps) == n_steps
    server.go_on.set()
    thread.join(60)
    rows = [rows for _, rows in source.steps]
    assert sum(rows) >= 3
    assert max(rows) <= 3
    assert rows[-1] == 1


def test_rows_that_were_given_up_are_cancelled_while_the_server_hangs(server, load):
    server.of_grey = {1: [Trouble(delay=60)], 2: [Trouble(delay=60)]}
    engine = load()
    source = Pictures(engine, [1, 2, 3])
    threading.Timer(0.3, lambda: source.lost.update((1, 2))).start()
    completions = run(engine, source)
    assert texts(completions) == grey_texts([3])
    assert server.answered == 1


def test_an_engine_can_run_again_after_it_ran(load):
    engine = load()
    assert texts(run(engine, Pictures(engine, [1, 2]))) == grey_texts([1, 2])
    engine.batch_size = 1
    assert texts(run(engine, Pictures(engine, [3, 4]))) == grey_texts([3, 4])


def test_closing_ends_its_thread_and_what_is_under_way(server):
    before = threading.active_count()
    engine = OpenAIEngine(RECIPE, Options(engine="openai", base_url=server.url))
    engine.load()
    server.always = Trouble(delay=60)
    completions = engine.run(Pictures(engine, [1]))
    ended = []

    def caption() -> None:
        try:
            next(completions)
        except CancelledError:
            ended.append(True)

    thread = threading.Thread(target=caption)
    thread.start()
    until(lambda: server.in_flight == 1, "a request")
    engine.close()
    engine.close()
    thread.join(60)
    assert ended
    server.go_on.set()
    until(lambda: threading.active_count() <= before, "the threads' end")


# --- a server that is away -------------------------------------------------------------------------------------

ERROR_200 = Trouble(body=b'{"error": {"message": "Vision add-on is not loaded", "code": 1}}')
REASONS = [
    (failing(500, "out of cheese"), "status 500: out of cheese"),
    (failing(502), "status 502"),
    (failing(503, "loading"), "status 503: loading"),
    (failing(429, "slow down"), "status 429: slow down"),
    (failing(408), "status 408"),
    (failing(409), "status 409"),
    (Trouble(body=b'{"choices": ['), 'an answer that holds no caption: {"choices": ['),
    (Trouble(body=HTML), "a web page: Welcome to nginx!"),
    (Trouble(body=b'{"choices": []}'), 'an answer that holds no caption: {"choices": []}'),
    (Trouble(body=b"[1, 2]"), "an answer that holds no caption: [1, 2]"),
    (Trouble(body=b'{"object": "error", "message": "out of slots"}'), "an answer that holds no caption: out of slots"),
    (
        Trouble(body=b'{"choices": [{"message": {"content": null}, "finish_reason": null}]}'),
        'an answer that holds no caption: {"choices": [{"message": {"content": null}, "finish_reason": null}]}',
    ),
    (
        Trouble(body=b'{"choices": [{"message": {"content": [1]}}]}'),
        'an answer whose caption is not text: {"choices": [{"message": {"content": [1]}}]}',
    ),
    (
        Trouble(body=b'{"choices": [{"message": {"content": [{"type": "audio", "text": "a"}]}}]}'),
        "an answer whose caption is not text: "
        '{"choices": [{"message": {"content": [{"type": "audio", "text": "a"}]}}]}',
    ),
    (ERROR_200, "an error with status 200: Vision add-on is not loaded"),
    (Trouble(body=b'{"error": {"code": 7}}'), 'an error with status 200: {"error": {"code": 7}}'),
    (Trouble(302, headers={"Location": "/login?to=v1"}), "a redirect with status 302: /login?to=v1"),
    (Trouble(308, HTML), "a redirect with status 308"),
    (
        Trouble(body=b"<!DOCTYPE html>\n<script>let a = '<b>'</script><title>Log &lt;in&gt;</title><p>Please  do"),
        "a web page: Log <in> Please do",
    ),
    (streaming("A"), "an event stream, which was not asked for: data: " + streaming("A").body.decode()[6:].strip()),
    (saying("A sc", "abort"), "an answer that ended with the reason: abort"),
    (saying("A sc", "error"), "an answer that ended with the reason: error"),
    (saying(None, "content_filter"), "an answer that ended with the reason: content_filter"),
    (saying("A scan.", "tool_calls", tool_calls=[]), "an answer that ended with the reason: tool_calls"),
    (saying(None, "function_call"), "an answer that ended with the reason: function_call"),
    (saying("A scan.", "on\na whim"), "an answer that ended with the reason: on a whim"),
    (saying("A scan.", ["stop"]), 'an answer that ended with the reason: ["stop"]'),
    (
        Trouble(body=b'{"choices": [{"finish_reason": "error", "error": {"code": 502, "message": "overloaded"}}]}'),
        "an answer that ended with the reason: error: overloaded",
    ),
]


@pytest.mark.parametrize(("trouble", "reason"), REASONS)
def test_what_may_pass_is_asked_again_and_told_once(server, load, caplog, trouble, reason):
    caplog.set_level(logging.INFO)
    server.troubles.extend([trouble] * 3)
    engine = load(batch_size=1)
    assert texts(run(engine, Pictures(engine, [1, 2, 3]))) == grey_texts([1, 2, 3])
    assert len(server.requests) == 6
    assert told(caplog) == [
        f"{server.url} is not available: waiting until it answers again ({' '.join(reason.split())})",
        f"{server.url} answers again",
    ]


def test_what_was_asked_over_cut_connections_is_asked_again(server, load, caplog):
    server.troubles.extend([Trouble(cut=True)] * 8)
    engine = load(batch_size=8)
    assert texts(run(engine, Pictures(engine, range(8)))) == grey_texts(range(8))
    assert len(server.requests) == 16
    assert "is not available: waiting until it answers again" in caplog.text


def test_a_server_that_is_gone_is_waited_for(server, load, caplog):
    caplog.set_level(logging.INFO)
    with ChatServer() as another:
        engine = load(another.url)
    source = Pictures(engine, range(5))
    done: list[Completion] = []
    thread = threading.Thread(target=lambda: done.extend(engine.run(source)))
    thread.start()
    until(lambda: len(source.steps) > 10, "steps while it is away")
    assert not done
    with ChatServer(port=another.port):
        thread.join(60)
    assert {completion.job_id: completion.text for completion in done} == grey_texts(range(5))
    assert [line.partition(" (")[0] for line in told(caplog)] == [
        f"{another.url} is not available: waiting until it answers again",
        f"{another.url} answers again",
    ]


def test_a_request_that_takes_too_long_is_asked_again(server, load, caplog, monkeypatch):
    monkeypatch.setattr(chat_module, "REQUEST_SEC", 0.2)
    server.troubles.append(Trouble(delay=2))
    engine = load()
    assert texts(run(engine, Pictures(engine, [1]))) == grey_texts([1])
    assert "no answer within 0 s: with a smaller --batch-size, answers come sooner" in caplog.text


def test_all_pause_while_it_is_away_and_one_at_a_time_asks_whether_it_is_back(server, load, monkeypatch):
    monkeypatch.setattr(openai_module, "FIRST_WAIT_SEC", 0.1)
    server.of_grey = {grey: [replace(failing(500), delay=60)] for grey in range(8)}
    server.troubles.extend([failing(500)] * 4)
    engine = load(batch_size=8)
    source = Pictures(engine, range(8))
    thread = threading.Thread(target=lambda: list(engine.run(source)))
    thread.start()
    until(lambda: server.in_flight == 8, "the first eight")
    server.go_on.set()
    thread.join(60)
    waits = [later - sooner for sooner, later in zip(server.came_at[7:11], server.came_at[8:12], strict=True)]
    assert [wait > 0.05 * 2**n for n, wait in enumerate(waits)] == [True] * 4, waits
    assert len(server.requests) == 12 + 8


def test_while_it_waits_it_steps_at_least_twice_a_second(server, load):
    server.troubles.append(failing(429, retry_after="600"))
    engine = load()
    source = Pictures(engine, [1])
    thread = threading.Thread(target=lambda: list(engine.run(source)))
    thread.start()
    try:
        until(lambda: len(server.requests) == 1 and server.in_flight == 0, "the answer")
        n_steps = len(source.steps)
        until(lambda: len(source.steps) > n_steps + 20, "steps")
    finally:
        source.lost.add(1)
        thread.join(60)
    assert len(server.requests) == 1
    times = [at for at, _ in source.steps[n_steps:]]
    assert median(later - sooner for sooner, later in pairwise(times)) < 0.5  # one may take longer on a busy machine


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured_by_all(server, load, form):
    date = (datetime.now(UTC) + timedelta(seconds=3)).replace(microsecond=0)
    server.troubles.append(failing(429, retry_after="1" if form == "seconds" else format_datetime(date, usegmt=True)))
    engine = load(batch_size=1)
    source = Pictures(engine, range(4))
    run(engine, source)
    first, second, *_ = server.came_at
    if form == "seconds":
        assert second - first > 0.95
    else:
        assert time.time() - (time.monotonic() - second) > date.timestamp() - 0.05
    later = [rows for at, rows in source.steps if at > second]
    assert later.count(0) == 3, "one as each of the others is taken, and none that tells of waiting"


@pytest.mark.parametrize(
    ("told", "seconds"),
    [(None, 0), ("7", 7), ("1.5", 1.5), ("86400", 600), ("-5", 0), ("soon", 0), ("", 0), ("nan", 0), ("9" * 400, 600)],
)
def test_retry_after_is_bounded(told, seconds):
    assert chat_module._retry_after(told) == seconds


def test_a_retry_after_date_that_is_past_or_far_is_bounded():
    now = datetime.now(UTC)
    assert chat_module._retry_after(format_datetime(now - timedelta(days=1), usegmt=True)) == 0
    assert chat_module._retry_after(format_datetime(now + timedelta(days=1), usegmt=True)) == 600


def test_rows_that_were_given_up_while_it_is_away_end_the_run_promptly(server, load, monkeypatch):
    monkeypatch.setattr(openai_module, "FIRST_WAIT_SEC", 60.0)
    server.always = failing(500)
    engine = load()
    source = Pictures(engine, range(4))
    threading.Timer(0.5, lambda: source.lost.update(range(4))).start()
    assert run(engine, source) == {}
    assert len(server.requests) <= 4, "it waited until it could ask again"


# --- a picture that fails alone --------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_a_picture_that_is_refused_fails_alone_and_is_not_asked_again(server, load, status):
    server.of_grey = {3: [failing(status, "image " + "too large " * 100)] * 9}
    engine = load()
    completions = run(engine, Pictures(engine, range(6)))
    failure = completions.pop(3).failure
    assert texts(completions) == grey_texts([0, 1, 2, 4, 5])
    assert asked(server).count(3) == 1
    assert len(server.requests) <= 7, "and one of the others once more, if nothing else can tell"
    assert failure is not None
    assert (failure.code, failure.transient) == ("refused_by_server", False)
    assert failure.message.startswith(f"The server refused this picture with status {status}: image too large too")
    assert len(failure.message) < 400


@pytest.mark.parametrize(
    ("trouble", "code", "is_transient", "last"),
    [
        (Trouble(body=HTML), "garbage_answer", False, "a web page: Welcome to nginx!"),
        (ERROR_200, "server_error", True, "an error with status 200: Vision add-on is not loaded"),
        (failing(500, "no such tensor"), "server_error", True, "status 500: no such tensor"),
        (saying("A sc", "abort"), "ended_by_server", True, "an answer that ended with the reason: abort"),
        (saying("", "content_filter"), "ended_by_server", True, "an answer that ended with the reason: content_filter"),
    ],
)
def test_a_picture_that_the_server_never_answers_fails_while_others_are(
    server, load, trouble, code, is_transient, last
):
    server.of_grey = {3: [trouble] * 99}
    server.sec = 0.01
    engine = load(batch_size=4)
    completions = run(engine, Pictures(engine, range(60)))
    failure = completions.pop(3).failure
    assert texts(completions) == grey_texts([grey for grey in range(60) if grey != 3])
    assert failure is not None
    assert (failure.code, failure.transient) == (code, is_transient)
    assert failure.message == (
        f"The server failed on this picture 5 times while it answered others. The last error: {last}"
    )


def test_a_server_that_answers_nobody_is_no_pictures_fault(server, load, monkeypatch):
    monkeypatch.setattr(openai_module, "FIRST_WAIT_SEC", 0.001)
    server.always = failing(500)
    engine = load(batch_size=2)
    source = Pictures(engine, range(2))
    done: list[Completion] = []
    thread = threading.Thread(target=lambda: done.extend(engine.run(source)))
    thread.start()
    until(lambda: len(server.requests) > 10, "ten tries")  # five for each and one
    server.always = None
    thread.join(60)
    assert {completion.job_id: completion.text for completion in done} == grey_texts(range(2))


@pytest.mark.parametrize(
    "trouble", [failing(500), Trouble(body=HTML), saying("", "content_filter")], ids=["500", "page", "filter"]
)
def test_the_last_picture_fails_too_where_one_that_was_captioned_is_captioned_again(server, load, trouble):
    engine = load(batch_size=1)
    assert texts(run(engine, Pictures(engine, [1, 2]))) == grey_texts([1, 2])
    server.of_grey = {3: [trouble] * 99}
    failure = run(engine, Pictures(engine, [3]))[3].failure
    assert failure is not None
    assert failure.message.startswith("The server failed on this picture 5 times while it answered others.")
    assert asked(server) == [1, 2, 3, 2, 3, 3, 3, 3, 3]


def test_a_refusal_is_the_pictures_only_once_the_server_captioned_what_it_was_asked_after_it(server, load):
    server.of_grey = {1: [failing(400)], 2: [Trouble(delay=60)]}
    engine = load(batch_size=2)
    source = Releasing(engine, [1, 2], server)
    later = [engine.prepare(3, Request([Image.new("RGB", (30, 28), (3,) * 3)]))]
    order = []
    for completion in engine.run(source):
        order.append((completion.job_id, completion.failure is None))
        source.left += later
        later = []
    assert order == [(2, True), (1, False), (3, True)], "2 may have been captioned before the server broke"


def test_many_refusals_in_a_row_are_the_pictures_where_one_that_was_captioned_is_captioned_again(server, load):
    greys = range(10, 50)
    server.of_grey = {grey: [failing(413, "too large")] for grey in greys}
    engine = load(batch_size=4)
    completions = run(engine, Pictures(engine, [1, 2, *greys, 3]))
    assert {grey for grey, one in completions.items() if one.failure is None} == {1, 2, 3}
    codes = {one.failure.code for one in completions.values() if one.failure is not None}
    assert codes == {"refused_by_server"}
    assert all(asked(server).count(grey) == 1 for grey in greys)


# --- what ends the worker --------------------------------------------------------------------------------------


def run_error(load, server, trouble: Trouble, **options: object) -> str:
    engine = load(**options)
    server.of_grey = {2: [trouble]}
    with pytest.raises(ModelError) as error:
        run(engine, Pictures(engine, range(4)))
    return str(error.value)


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        (ERROR_200, "an error with status 200: Vision add-on is not loaded"),
        (streaming("A"), "an event stream, which was not asked for: data: {"),
        (
            Trouble(307, headers={"Location": "https://sso.example/"}),
            "a redirect with status 307: https://sso.example/",
        ),
        (Trouble(body=HTML), "a web page: Welcome to nginx!"),
        (saying("A sc", "abort"), "an answer that ended with the reason: abort"),
        (Trouble(body=b"{}"), "an answer that holds no caption: {}"),
    ],
    ids=["error", "stream", "redirect", "page", "abort", "garbage"],
)
@pytest.mark.parametrize("n_good", [0, 3])
def test_a_server_that_gives_no_captions_ends_it_after_so_many(server, load, trouble, told, n_good):
    server.troubles.extend([Trouble()] * n_good + [trouble] * 99)
    engine = load(batch_size=1)
    completions = []
    with pytest.raises(ModelError) as error:
        completions.extend(engine.run(Pictures(engine, range(9))))
    assert str(error.value).startswith(
        f"{server.url} answered 16 times in a row with something other than a caption ({told}"
    )
    assert str(error.value).endswith(
        "). No attempt was charged to a picture. Fix the server or --base-url, then start the worker again."
    )
    assert len(server.requests) == n_good + 16


def test_fewer_answers_in_a_row_that_are_no_captions_are_waited_for(server, load):
    server.troubles.extend([Trouble(body=HTML)] * 15 + [Trouble()] + [Trouble(body=HTML)] * 4)
    engine = load(batch_size=1)
    assert texts(run(engine, Pictures(engine, range(3)))) == grey_texts(range(3))


def test_answers_of_one_moment_count_once(server, load):
    server.troubles.extend([replace(saying("A sc", "abort"), delay=0.2)] * 40)
    engine = load(batch_size=40)
    assert texts(run(engine, Pictures(engine, range(40)))) == grey_texts(range(40))


@pytest.mark.parametrize("status", [400, 413, 415, 422])
@pytest.mark.parametrize("n_good", [0, 5])
def test_a_server_that_refuses_everything_ends_it_and_fails_no_picture(server, load, status, n_good):
    server.troubles.extend([Trouble()] * n_good + [failing(status, "The model has crashed.")] * 99)
    engine = load(batch_size=1)
    completions = []
    with pytest.raises(ServerRefuses) as error:
        completions.extend(engine.run(Pictures(engine, range(40))))
    assert str(error.value) == (
        f"{server.url} refuses every picture (status {status}: The model has crashed.). "
        "No attempt was charged to a picture. Fix the server, then start the worker again."
    )
    assert texts({one.job_id: one for one in completions}) == grey_texts(range(n_good))
    assert asked(server) == [*range(n_good + 16), *([n_good - 1] if n_good else [])]


def test_the_only_picture_that_a_server_was_asked_for_and_refused_ends_it(server, load):
    server.of_grey = {1: [failing(400, "no")]}
    engine = load()
    with pytest.raises(ServerRefuses):
        run(engine, Pictures(engine, [1]))


def test_a_key_that_is_refused_under_way_ends_it(server, load, monkeypatch):
    assert run_error(load, server, failing(401, "no")) == (
        f"{server.url} requires an API key (status 401), and OPENAI_API_KEY is not set. Set OPENAI_API_KEY."
    )
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    assert run_error(load, server, failing(403, "no")) == (
        f"{server.url} requires an API key (status 403), and refuses the one in OPENAI_API_KEY. Set OPENAI_API_KEY."
    )


def test_a_model_that_is_gone_under_way_ends_it(server, load):
    assert run_error(load, server, failing(404, "The model does not exist.")) == (
        f"{server.url} no longer captions with tests/small (status 404: The model does not exist.). "
        "Start the server again with this model, or correct --base-url."
    )


def test_an_answer_by_another_of_its_models_ends_it(server, load):
    server.listed.append({"id": "tests/other"})
    assert run_error(load, server, Trouble(changes={"model": "tests/other"})) == (
        f"{server.url} answered with the model tests/other, not with tests/small, and a run never mixes models. "
        "Start the server again with the run's model."
    )


def test_a_model_name_that_the_server_never_listed_is_let_pass(server, load):
    server.always = Trouble(changes={"model": "/models/small-q4.gguf"})
    engine = load()
    assert texts(run(engine, Pictures(engine, [1]))) == grey_texts([1])


# --- loading ---------------------------------------------------------------------------------------------------


def load_error(url: str | None, recipe: Recipe = RECIPE, **options: object) -> str:
    before = threading.active_count()
    with pytest.raises(ModelError) as error:
        load_engine(recipe, Options(engine="openai", base_url=url, **options)).load()
    assert threading.active_count() <= before + 1  # the server's, which answered
    assert "requests" not in {thread.name for thread in threading.enumerate()}
    return str(error.value)


def test_without_a_base_url_it_says_how_to_give_one():
    assert load_error(None) == "The engine openai needs the URL of its server: --base-url http://localhost:8000/v1"


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "http://", "http:///v1", "http://host:99999/v1"])
def test_what_is_no_base_url_is_refused(url):
    assert load_error(url) == f"--base-url must look like http://localhost:8000/v1, not {url}"


@pytest.mark.parametrize("url", ["http://me:secret@host/v1", "https://host/v1?key=secret", "http://host/v1#secret"])
def test_a_secret_in_the_base_url_is_refused_and_not_told(url):
    assert load_error(url) == (
        "--base-url contains a user name, a password or a query. Leave them out: the API key is taken from "
        "OPENAI_API_KEY."
    )


def test_a_server_that_does_not_answer_is_refused():
    with ChatServer() as gone:
        pass
    assert load_error(gone.url) == (
        f"Nothing answers at {gone.url} (All connection attempts failed): start the server, or correct --base-url."
    )


@pytest.mark.parametrize(
    ("trouble", "status"),
    [
        (Trouble(body=HTML), 200),
        (Trouble(body=b"[1"), 200),
        (Trouble(body=b"[1]"), 200),
        (Trouble(body=b'{"data": 1}'), 200),
        (Trouble(body=b'{"data": [{"name": "x"}]}'), 200),
        (Trouble(404, HTML), 404),
        (Trouble(302, headers={"Location": "/login"}), 302),
    ],
)
def test_what_is_no_server_of_this_kind_is_refused(server, trouble, status):
    server.models = trouble
    assert load_error(server.url) == (
        f"{server.url} is not an OpenAI-compatible server: its /models returns no list of models "
        f"(status {status}). "
        "Correct --base-url, which usually ends in /v1."
    )


def test_a_server_that_is_still_starting_is_refused(server):
    server.models = failing(503, "Loading model")
    assert load_error(server.url) == (
        f"{server.url} is not ready (status 503: Loading model): "
        "start the worker again when it is, or correct --base-url."
    )


def test_a_model_that_the_server_does_not_have_is_refused(server):
    server.listed = [{"id": "a/b"}, {"id": "c/d"}]
    assert load_error(server.url) == (
        f"{server.url} does not serve tests/small; it serves a/b, c/d. "
        "If one of these is the run's model, name it: --served-model NAME"
    )
    assert load_error(server.url, served_model="e").startswith(f"{server.url} does not serve e; it serves a/b, c/d. ")
    server.listed = [{"id": f"m{n}"} for n in range(13)]
    assert "it serves m0, m1, m2, m3, m4, m5, m6, m7, m8, m9 and 3 more. " in load_error(server.url)
    server.listed = []
    assert load_error(server.url) == f"{server.url} serves no model. Load one there, then start the worker again."


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"repetition_penalty": 1.1}, "repetition_penalty = 1.1: the server decides it. "),
        ({"adapter": "me/lora"}, "adapter = me/lora: the server decides it. "),
        ({"dtype": "float32"}, "dtype = float32: the server decides it. Enqueue a run that leaves it at auto"),
        ({"revision": "v2"}, "revision = v2: the server decides it. Enqueue a run that leaves it at main"),
        ({"load_in": "4bit"}, "load_in = 4bit: the server decides it. "),
        ({"trust_remote_code": True}, "trust_remote_code = True: the server decides it. "),
    ],
)
def test_what_the_interface_cannot_say_is_refused(server, changes, told):
    message = load_error(server.url, Recipe(model="tests/small", **changes))
    assert message.startswith(f"The engine openai cannot honour {told}")
    assert message.endswith(", or use --engine transformers.")


@pytest.mark.parametrize("name", [str(MODEL), "./my-model", "~/my-model"])
def test_a_folder_needs_the_name_that_the_server_knows_it_by(server, load, name):
    assert load_error(server.url, Recipe(model=name)) == (
        f"The run's model is the folder {name}, which the server knows by another name: give it with "
        "--served-model NAME"
    )
    engine = load(recipe=Recipe(model=name), served_model="tests/small")
    run(engine, Pictures(engine, [1]))
    assert server.requests[0]["model"] == "tests/small"
    assert engine.info.model == name


def test_the_info_says_what_the_server_tells(server, load):
    info = load().info
    assert (info.name, info.model, info.revision, info.dtype) == ("openai", "tests/small", "", "server")
    assert info.device == f"127.0.0.1:{server.port}"
    assert info.digest == "served: tests/small, id: tests/small, root: small, owned_by: tests"
    assert info.versions["server"] == "tests/1"
    assert info.versions["httpx"] == "0.28.1"
    server.version = "0.9.1"
    assert load(server.url + "/").info.versions["server"] == "tests/1 0.9.1"


def test_what_a_run_pins_survives_a_restart_of_the_server_and_not_another_model(server, load, database, tmp_path):
    registered = fill(database, tmp_path / "set", 3, recipe=RECIPE)
    with db.transaction(database, write=True) as conn:
        queue.pin(conn, registered, load().info)
        server.listed[0] |= {"created": 2}
        queue.pin(conn, registered, load().info)
        server.listed[0] |= {"root": "/another"}
        with pytest.raises(RunError, match="root: small, owned_by: tests, here served: tests/small, id: tests/small, "):
            queue.pin(conn, registered, load().info)


# --- the key ---------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_told_nowhere(server, load, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    server.key = "sk-very-secret"
    assert load_error(server.url) == (
        f"{server.url} requires an API key (status 401), and OPENAI_API_KEY is not set. Set OPENAI_API_KEY."
    )
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-secret")
    assert "secret" not in load_error(server.url)
    monkeypatch.setenv("OPENAI_API_KEY", " sk-very-secret\n")
    server.of_grey = {
        2: [failing(400, "you sent sk-very-secret")],
        3: [failing(500, "you sent sk-very-secret")],
        4: [
            Trouble(302, headers={"Location": "/login?key=sk-very-secret"}),
            Trouble(body=b"<html>Not sk-very-secret"),
            Trouble(body=b'{"error": "bad sk-very-secret"}'),
            Trouble(body=b'{"key": "sk-very-secret"}'),
            saying("", "sk-very-secret"),
            streaming("sk-very-secret"),
        ],
    }
    engine = load()
    completions = run(engine, Pictures(engine, range(5)))
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer sk-very-secret"}
    assert completions[2].failure is not None
    assert completions[2].failure.message.endswith("status 400: you sent ***")
    assert "***" in caplog.text, "which of the troubles is told depends on which came first"
    for told in (caplog.text, repr(engine.info), repr(completions), json.dumps(server.requests)):
        assert "secret" not in told


def test_without_a_key_no_header_is_sent(server, load):
    engine = load()
    run(engine, Pictures(engine, [1]))
    assert "Authorization" not in server.headers[0]


def test_a_key_that_no_header_can_carry_is_refused_and_not_told(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-sécret")
    assert load_error(server.url) == "OPENAI_API_KEY contains characters that cannot be sent. Set it again."


def test_a_proxy_of_the_environment_is_not_asked_for_a_server_on_this_machine(load, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    engine = load()
    assert texts(run(engine, Pictures(engine, [1]))) == grey_texts([1])


# --- a worker --------------------------------------------------------------------------------------------------


CAPTIONS = "SELECT i.image_id, c.text FROM captions c JOIN jobs j ON j.id = c.job_id JOIN images i ON i.id = j.image_id"


def caption_with(database: Engine, server: ChatServer, **settings: object) -> Outcome:
    return work(database, Settings.of(engine="openai", base_url=server.url, lease_ttl=60.0, **settings))


def test_a_storm_of_errors_charges_no_attempt(server, database, tmp_path, monkeypatch):
    monkeypatch.setattr(openai_module, "FIRST_WAIT_SEC", 0.002)
    fill(database, tmp_path / "set", 40, recipe=RECIPE)
    server.troubles.extend([replace(failing(500), delay=0.2)] * 8)  # all in flight; then one by one
    server.troubles.extend([failing(500), failing(503), Trouble(cut=True), failing(429), Trouble(body=HTML)])
    outcome = caption_with(database, server, batch_size=8)
    assert (outcome.done, outcome.failed) == (40, 0)
    assert dict(select(database, CAPTIONS)) == {f"train_{n:05}": caption_of(n) for n in range(40)}
    assert select(database, "SELECT DISTINCT attempts, crashes FROM jobs") == [(1, 0)], "the one that succeeded"
    assert select(database, "SELECT count(*) FROM failures") == [(0,)]


def test_a_refused_picture_fails_with_its_code_and_the_rest_is_captioned(server, database, tmp_path):
    fill(database, tmp_path / "set", 12, recipe=RECIPE)
    server.of_grey = {5: [failing(413, "too large")]}
    outcome = caption_with(database, server)
    assert (outcome.done, outcome.failed) == (11, 1)
    assert select(database, "SELECT code, message FROM failures") == [
        ("refused_by_server", "The server refused this picture with status 413: too large")
    ]


def pending_and_done(database: Engine) -> dict[tuple, int]:
    rows = select(database, "SELECT status, attempts, crashes, count(*) FROM jobs GROUP BY 1, 2, 3")
    return {row[:3]: row[3] for row in rows}


@pytest.mark.every_database
@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        (failing(400, "The model has crashed."), r"refuses every picture \(status 400: The model has crashed.\)"),
        (ERROR_200, r"something other than a caption \(an error with status 200: Vision add-on is not loaded\)"),
        (saying("A sc", "abort"), r"something other than a caption \(an answer that ended with the reason: abort\)"),
    ],
    ids=["refuses", "error", "abort"],
)
def test_a_server_that_breaks_under_way_fails_no_picture(server, database, tmp_path, batch_size, trouble, told):
    fill(database, tmp_path / "set", 50, recipe=RECIPE)
    # So many in a row end the worker, and would cancel a good answer that is still under way.
    server.troubles.extend([Trouble()] * 14 + [replace(trouble, after=14)] * 999)
    with pytest.raises(ModelError, match=told):
        caption_with(database, server, batch_size=batch_size, self_check=False)
    assert pending_and_done(database) == {("pending", 0, 0): 36, ("done", 1, 0): 14}
    assert select(database, "SELECT count(*) FROM failures") == [(0,)]


def test_a_server_that_refuses_the_whole_self_check_stops_the_worker(server, database, tmp_path):
    fill(database, tmp_path / "set", 20, recipe=RECIPE)
    server.always = failing(422, "no vision")
    with pytest.raises(ModelError) as error:
        caption_with(database, server)
    assert str(error.value) == (
        "The self-check failed, and nothing was claimed: none of 12 pictures was captioned. The first: "
        "The server refused this picture with status 422: no vision To continue anyway: --no-self-check"
    )
    assert pending_and_done(database) == {("pending", 0, 0): 20}
    assert sorted(set(asked(server))) == sorted(asked(server)), "no picture twice"


def test_a_self_check_whose_first_pictures_are_refused_looks_at_others(server, database, tmp_path):
    fill(database, tmp_path / "set", 20, recipe=RECIPE)
    server.of_grey = {grey: [failing(413, "too large")] * 9 for grey in range(4)}
    outcome = caption_with(database, server)
    assert (outcome.done, outcome.failed) == (16, 4)


@pytest.mark.parametrize("reason", ["abort", "content_filter", "tool_calls", "eos"])
def test_an_answer_that_ended_for_another_reason_is_tried_again_and_never_stored(
    server, database, tmp_path, monkeypatch, reason
):
    monkeypatch.setattr(openai_module, "FIRST_WAIT_SEC", 0.002)
    monkeypatch.setattr("rococap.queue.leases.backoff_ms", lambda attempts: 1)
    fill(database, tmp_path / "set", 8, recipe=RECIPE)
    server.of_grey = {5: [saying("A sc", reason)] * 999}
    outcome = caption_with(database, server)
    assert outcome.done == 7
    last = f"The last error: an answer that ended with the reason: {reason}"
    message = f"The server failed on this picture 5 times while it answered others. {last}"
    assert select(database, "SELECT code, message FROM failures") == [("ended_by_server", message)] * 5
    assert select(database, "SELECT status, attempts FROM jobs WHERE status <> 'done'") == [("failed", 5)]


def test_an_error_that_ends_the_worker_gives_back_what_was_under_way(server, database, tmp_path):
    fill(database, tmp_path / "set", 12, recipe=RECIPE)
    server.of_grey = {5: [failing(404, "gone")]}
    with pytest.raises(ModelError, match="no longer captions with tests/small"):
        caption_with(database, server, batch_size=4)
    assert set(select(database, "SELECT DISTINCT status, attempts, crashes FROM jobs")) <= {
        ("pending", 0, 0),
        ("done", 1, 0),
    }


def start(url: str, server: str, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "rococap", "--db", url, "worker", "--engine", "openai", "--base-url", server]
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("trouble", [failing(500), Trouble(delay=600)], ids=["away", "hangs"])
def test_a_worker_asked_to_stop_while_its_server_is_away_or_hangs_stops(server, database, url, tmp_path, trouble):
    fill(database, tmp_path / "set", 20, recipe=RECIPE)
    server.always = trouble
    process = start(url, server.url, "--drain-timeout", "0.5")
    until(lambda: len(server.requests) > 0, "a request")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert select(database, "SELECT DISTINCT status, attempts, crashes FROM jobs") == [("pending", 0, 0)]


def test_a_worker_without_a_server_says_so_in_one_line_and_exits_1(database, url, tmp_path):
    fill(database, tmp_path / "set", 2, recipe=RECIPE)
    with ChatServer() as gone:
        pass
    process = start(url, gone.url)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.strip().splitlines()[-1].endswith("start the server, or correct --base-url.")
    assert "Traceback" not in out + err


@pytest.mark.parametrize("n_good", [0, 6])
def test_a_worker_whose_server_refuses_everything_says_so_in_one_line_and_exits_1(
    server, database, url, tmp_path, n_good
):
    fill(database, tmp_path / "set", 40, recipe=RECIPE)
    server.troubles.extend([Trouble()] * n_good + [replace(failing(400, "The model has crashed."), after=n_good)] * 99)
    process = start(url, server.url, "--no-self-check")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert (
        err.strip()
        .splitlines()[-1]
        .endswith(
            f"{server.url} refuses every picture (status 400: The model has crashed.). "
            "No attempt was charged to a picture. Fix the server, then start the worker again."
        )
    )
    assert "Traceback" not in out + err
    assert pending_and_done(database).get(("pending", 0, 0)) == 40 - n_good


@pytest.mark.parametrize("command", ["worker", "bench"])
@pytest.mark.parametrize("flag", ["--base-url", "--served-model"])
def test_the_servers_options_are_refused_with_another_engine(url, command, flag):
    done = invoke("--db", url, command, flag, "x")
    assert done.exit_code == 2
    words = " ".join(done.stderr.split())
    assert f"{flag} is for the engine openai: add --engine openai, or leave out {flag}." in words


def test_the_engine_imports_no_torch():
    code = "import sys, rococap.engines.openai; print('torch' in sys.modules, 'httpx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.slow
def test_a_server_of_the_demo_model_captions_as_the_transformers_engine_does(database, tmp_path):
    write_dataset(tmp_path / "set", {"validation": 24})
    register(database, tmp_path / "set", ["validation"], recipe=Recipe(model=str(MODEL), max_new_tokens=64))
    engine = TransformersEngine(
        Recipe(model=str(MODEL), dtype="float32", max_new_tokens=64), Options(device="cpu", batch_size=8)
    )
    engine.load()
    model = Batched(engine)
    with ChatServer(model) as demo:
        demo.listed = [{"id": "demo", "owned_by": "tests"}]
        assert caption_with(database, demo, served_model="demo", batch_size=8).done == 24
    model.close()
    found = dict(select(database, CAPTIONS))
    assert found == _by_transformers(tmp_path)
    assert len(set(found.values())) > 6, "a model that says the same of every picture would prove nothing"
    assert select(database, "SELECT min(prompt_tokens) > 0, min(new_tokens) > 0 FROM captions") == [(1, 1)]


def _by_transformers(folder: Path) -> dict[str, str]:
    database = db.connect(f"sqlite:///{folder / 'transformers.db'}")
    recipe = Recipe(model=str(MODEL), max_new_tokens=64, dtype="float32")
    register(database, folder / "set", ["validation"], recipe=recipe)
    work(database, Settings.of(batch_size=8, device="cpu"), load=TransformersEngine)
    captions = dict(select(database, CAPTIONS))
    database.dispose()
    return captions
