"""What happens to requests: places that are freed, queues that are full, servers that stop and engines that die."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from click.testing import CliRunner
from patient_engine import CHANGED, ENDLESS, FATAL, LOUD, PREPARES, RUNS, STALLING
from patient_server import (
    ASKING,
    HEAD,
    PROGRAM,
    answer_to,
    asking,
    captioned,
    chat,
    connected,
    endless,
    grey,
    patient,
    send_until_answered,
    sent,
    status_of,
    texts,
)
from places import TESTS
from samples import fill
from steps import run_worker, until
from web_server import Served, loaded, running

from rococap.cli.options import cli
from rococap.demo import MODEL
from rococap.engines import Completion, Prepared
from rococap.recipe import Recipe
from rococap.web.requests import HOLD, Asked, Requests, Unavailable

TOKEN = "a-token-of-some-length"
STOPPING = "The server is stopping. Try again later."


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with patient("--max-waiting", "3") as served:
        yield served
        assert served.stop() == 0
        assert served.complaints() == []


def test_captions_come_in_the_order_of_their_pictures(served):
    assert texts(captioned(served, 3, 1, 2)) == ["µ grey 3", "µ grey 1", "µ grey 2"]


def test_a_character_of_several_tokens_is_streamed_whole(served):
    answer = served.client.post("/v1/chat/completions", json=chat(7, stream=True))
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if "{" in line]
    assert answer.text.endswith("data: [DONE]\n\n")
    assert [event["choices"][0]["delta"].get("content") for event in events] == ["", *"µ grey 7", None]


def test_an_answer_that_has_changed_since_it_was_streamed_ends_in_an_error(served):
    answer = served.client.post("/v1/chat/completions", json=chat(CHANGED, stream=True))
    *_, last = answer.text.strip().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"


def test_a_client_that_hangs_up_frees_its_place(served):
    """There is only one place: if one of the endless ones stayed, nothing would be answered any more."""
    with endless(served), sent(served, LOUD, ENDLESS, ENDLESS):
        assert served.process.stdout.readline() == PREPARES + "\n"
    assert texts(captioned(served, 1, 2, 3)) == ["µ grey 1", "µ grey 2", "µ grey 3"]
    with sent(served, ENDLESS):
        assert served.process.stdout.readline() == RUNS + "\n"
    assert texts(captioned(served, 4)) == ["µ grey 4"]


def test_a_client_that_hangs_up_before_it_has_sent_everything_is_no_error(served):
    """The log of the server shows at the end that nothing went wrong."""
    for path in ("captions", "chat/completions"):
        n = served.logged(f"{path}: 499")
        head = f"POST /v1/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{{"
        with connected(served, head.encode()):
            pass
        until(lambda path=path, n=n: served.logged(f"{path}: 499") == n + 1, "it is logged as what it is")
    assert texts(captioned(served, 4)) == ["µ grey 4"]


def test_beyond_the_queue_requests_are_asked_to_come_back(served):
    with endless(served), sent(served, LOUD, 1, 2):
        assert served.process.stdout.readline() == PREPARES + "\n"
        answer = captioned(served, 1)
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
    error = {"type": "rate_limit_error", "param": None, "code": "queue_full"}
    assert answer.json()["error"] == error | {"message": "3 requests are waiting, and 3 may. Try again later."}
    until(lambda: captioned(served, 4).status_code == 200, "the places of those that have hung up are free")


def test_a_request_that_takes_too_long_fails_and_frees_its_place():
    with patient("--request-timeout", "0.5") as served:
        assert captioned(served, ENDLESS).json()["error"] == {
            "message": "There was no answer within 0.5 s.",
            "type": "server_error",
            "param": None,
            "code": "timeout",
        }
        streamed = served.client.post("/v1/chat/completions", json=chat(ENDLESS, stream=True))
        assert '"code":"timeout"' in streamed.text
        with connected(served, HEAD + b"Content-Length: 10000000\r\n\r\n") as (connection,):
            send_until_answered(connection, b" " * 1_000, every_sec=0.05)
            assert status_of(connection) == 408, "it has not been sent in that time"
        # On a busy machine, any request may take longer than half a second.
        until(lambda: captioned(served, 4).status_code == 200, "the place is free")
        assert served.stop() == 0


def test_an_engine_that_stays_in_a_step_is_told_to_everyone_until_it_goes_on(tmp_path):
    stalls = tmp_path / "stalls"
    stalls.touch()
    with patient("--request-timeout", "0.5", ROCOCAP_TEST_STALLS=str(stalls)) as served:
        assert captioned(served, STALLING).json()["error"]["code"] == "timeout"
        until(lambda: served.client.get("/healthz").json() == {"status": "stalled"}, "it has stalled")
        assert served.client.get("/healthz").status_code == 503
        assert served.client.get("/health").status_code == 200
        answer = captioned(served, 1)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        stalls.unlink()
        until(lambda: captioned(served, 4).status_code == 200, "it goes on")
        assert served.client.get("/healthz").status_code == 200


def test_a_server_whose_engine_stays_in_a_step_stops_all_the_same(tmp_path):
    with patient("--request-timeout", "0.5", ROCOCAP_TEST_STALLS=str(tmp_path)) as served:
        assert captioned(served, STALLING).status_code == 504
        assert served.stop() == 0


def test_only_who_has_the_token_gets_captions():
    with patient(ROCOCAP_TOKEN=TOKEN) as served:
        for headers in ({}, {"Authorization": "Bearer another-token-of-that-length"}):
            answer = served.client.post("/v1/captions", json={"images": [grey(1)]}, headers=headers)
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
            assert served.client.get("/v1/models", headers=headers).status_code == 401
        with connected(served, ASKING) as (connection,):
            assert status_of(connection) == 401, "before the body is sent"
        served.client.headers["Authorization"] = f"Bearer {TOKEN}"
        assert texts(captioned(served, 5)) == ["µ grey 5"]
        answer = served.client.post("/v1/captions", json={}, headers={"Origin": "https://example.org"})
        assert answer.status_code == 403
        assert served.stop() == 0


def test_a_server_at_another_address_makes_a_token_for_its_clients():
    with running([*PROGRAM, "--host", "0.0.0.0"]) as served:
        token = served.process.stdout.readline().rpartition(" ")[2].strip()
        loaded(served)
        assert captioned(served, 5).status_code == 401
        served.client.headers["Authorization"] = f"Bearer {token}"
        assert texts(captioned(served, 5)) == ["µ grey 5"]


# --- the source ------------------------------------------------------------------------------------------------


def test_what_is_cancelled_leaves_the_queue_wherever_it_is():
    requests = Requests(max_waiting=4)
    waiting, preparing, ready, runs = batch = [Asked([b""]) for _ in range(4)]
    for asked in reversed(batch):
        requests.ask([asked])
    assert [requests.next(9) for _ in range(3)] == [runs, ready, preparing]
    for asked in (runs, ready):
        requests.offer(asked, Prepared(asked.id, None, 1))
    assert [one.job_id for one in requests.take(1, 0)] == [runs.id]
    assert requests.step(1) == set()
    for asked in batch:
        asked.answer.cancel()
    requests.offer(preparing, Prepared(preparing.id, None, 1))
    assert (requests.n_waiting, requests.n_running) == (0, 0)
    assert requests.step(1) == {runs.id}
    assert requests.take(4, 0.0) == []
    assert waiting.answer.cancelled()


def test_what_is_being_prepared_at_the_end_is_told_so():
    requests = Requests(max_waiting=4)
    asked, cancelled, failed = batch = [Asked([b""]) for _ in range(3)]
    requests.ask(batch)
    for _ in batch:
        requests.next(9)
    cancelled.answer.cancel()
    requests.end(Unavailable(STOPPING))
    failed.answer.set_running_or_notify_cancel()
    failed.answer.set_result(Completion(failed.id))
    requests.offer(asked, Prepared(asked.id, None, 1))
    requests.offer(cancelled, Prepared(cancelled.id, None, 1))
    requests.offer(failed, None)
    assert str(asked.answer.exception(0)) == STOPPING
    assert cancelled.answer.cancelled()
    assert failed.answer.exception(0) is None


def test_a_batch_waits_only_for_requests_that_have_come():
    """Without the wait for what is being prepared, a batch would start half empty; with any other, it would be late."""
    requests = Requests(max_waiting=4)
    first, second = Asked([b""]), Asked([b""])
    requests.ask([first, second])
    for _ in range(2):
        requests.next(9)
    requests.offer(first, Prepared(1, None, 1))
    assert [one.job_id for one in requests.take(4, None)] == [1]
    later = threading.Timer(0.05, requests.offer, (second, Prepared(2, None, 1)))
    later.start()
    assert [one.job_id for one in requests.take(4, 60)] == [2]
    assert requests.take(4, 60) == []


def test_a_running_batch_takes_requests_a_few_at_a_time_and_lets_none_wait_for_long():
    requests = Requests(max_waiting=20)

    def come(n: int) -> None:
        requests.ask([Asked([b""]) for _ in range(n)])
        for _ in range(n):
            asked = requests.next(20)
            requests.offer(asked, Prepared(asked.id, None, 1))

    def joined() -> int:
        return len(requests.take(20, 0))

    come(9)
    assert joined() == 9
    come(1)
    assert joined() == 0
    come(1)
    assert joined() == 2
    come(1)
    for _ in range(HOLD):
        assert joined() == 0
        requests.step(11)
    assert joined() == 1


# --- the end ---------------------------------------------------------------------------------------------------


def test_a_server_that_is_asked_to_stop_finishes_what_runs_and_accepts_no_more():
    with patient() as served:
        with endless(served):
            served.process.send_signal(signal.SIGTERM)
            until(lambda: served.client.get("/healthz").status_code == 503, "it is stopping")
            assert served.client.get("/healthz").json() == {"status": "stopping"}
            answer = captioned(served, 1)
            assert (answer.status_code, answer.json()["error"]["message"]) == (503, STOPPING)
            assert answer.headers["Connection"] == "close"
            assert served.process.poll() is None
        assert served.process.wait(60) == 0
        assert served.complaints() == []


def test_a_connection_ends_with_the_answer_that_it_waited_for_when_the_server_was_asked_to_stop():
    with patient() as served, ExitStack() as stack:
        with endless(served):
            (connection,) = stack.enter_context(connected(served, asking(5)))
            until(lambda: "rococap_num_requests_waiting 1.0" in served.client.get("/metrics").text, "it waits")
            served.process.send_signal(signal.SIGTERM)
            until(lambda: served.client.get("/healthz").status_code == 503, "it is stopping")
        answer = answer_to(connection)
        assert (answer.status, answer.headers["Connection"]) == (200, "close")
        assert served.process.wait(20) == 0


def test_signals_that_keep_coming_do_not_change_the_exit_code():
    with patient() as served:
        while served.process.poll() is None:
            served.process.send_signal(signal.SIGTERM)
            time.sleep(0.01)
        assert served.process.returncode == 0


def test_after_the_drain_timeout_what_still_runs_fails_and_the_server_ends():
    with patient("--drain-timeout", "0.5") as served:
        with endless(served) as lines:
            served.process.send_signal(signal.SIGTERM)
            *_, last = (line for line in lines if line)
            assert json.loads(last.removeprefix("data: "))["error"]["message"] == STOPPING
        assert served.process.wait(60) == 0


def test_a_server_whose_engine_dies_says_so_to_everyone_and_ends():
    with patient() as served:
        answer = captioned(served, 1, FATAL, 2)
        message = "The model has failed, and the server ends: the device has vanished."
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, message)
        assert served.process.wait(60) == 1
        assert served.complaints() == ["Error: the device has vanished.\n"]


def test_a_server_whose_model_is_loading_asks_to_come_back_and_stops_at_once():
    with running(PROGRAM, ROCOCAP_TEST_LOADS="for ever") as served:
        healthz = served.client.get("/healthz")
        assert (healthz.status_code, healthz.json()) == (503, {"status": "loading"})
        assert served.client.get("/health").status_code == 200
        for answer in (captioned(served, 1), served.client.get("/v1/models")):
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        with connected(served, ASKING) as (connection,):
            assert status_of(connection) == 503, "before the body is sent"
        assert served.stop() == 0


def test_a_model_that_cannot_be_loaded_ends_the_server():
    with running(PROGRAM, ROCOCAP_TEST_LOADS="never") as served:
        assert served.process.wait(60) == 1
        assert served.complaints() == ["Error: the weights are not there.\n"]


def test_a_run_is_not_served_with_another_model_than_made_its_captions(database, url, tmp_path):
    fill(database, tmp_path / "set", 2, recipe=Recipe(model=str(MODEL)))
    run_worker(database)
    program = [str(TESTS / "patient_engine.py"), "--db", url, "serve", "--port", "0", "--run", "default"]
    with running(program) as served:
        assert served.process.wait(60) == 1
        (said,) = served.complaints()
        assert said.startswith("Error: Run 'default' was started with another model state (engine: small, here patient")


WRONG = {
    "--run a --model m": "--run serves that run's recipe: leave out --model.",
    "--run a --prompt p": "--run serves that run's recipe: leave out --prompt.",
    "--adapter a": "--adapter goes with a model: name one with --model.",
    "--preset caption": "--prompt goes with a model: name one with --model.",
    "--db q.db --model m": "--model serves without a database: leave out --db, or name a run of it with --run.",
    "--max-waiting 4": "--max-waiting goes with a model: name one with --model, or a run with --run.",
    "--name x": "--name goes with a model: name one with --model, or a run with --run.",
    "--decode static": "--decode goes with a model: name one with --model, or a run with --run.",
    "--run a --read-only": "--read-only accepts no requests for captions: leave it out, or --run and --model.",
}


@pytest.mark.parametrize("options", WRONG)
def test_options_that_do_not_go_together_are_named(options):
    result = CliRunner().invoke(cli, ["serve", *options.split()])
    assert (result.exit_code, result.output.splitlines()[-1]) == (2, f"Error: {WRONG[options]}")
