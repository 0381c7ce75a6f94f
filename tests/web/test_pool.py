"""A server with several devices: real processes that share the requests, die, are replaced, and stop together."""

import json
import os
import re
import signal
import stat
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from patient_engine import ENDLESS, FATAL, LOUD, PREPARES, RUNS, STALLING
from patient_server import HEAD, HEALTH, PROGRAM, captioned, chat, connected, grey, sent, status_of, texts
from prometheus_client.parser import text_string_to_metric_families
from steps import members, until
from web_server import Served, running

from rococap.web.pool import Replica
from rococap.worker import children

BOTH = ["cpu 1", "cpu 2"]
DIED = "The process that had this request has died, and another takes its place. Send the request again."
STOPPING = "The server is stopping. Try again later."
STALLED = "The model has stopped answering. Try again later, or restart the server."


def said(served: Served, line: str) -> list[str]:
    """The processes that said this, each as often as it did."""
    served.log.seek(0)
    return re.findall(rf"^(.*?)  {re.escape(line)}$", served.log.read(), re.MULTILINE)


def ready(served: Served) -> int:
    """How many processes have become ready since the server began."""
    return served.logged("answers requests")


@contextmanager
def replaced(served: Served) -> Iterator[None]:
    """One process dies meanwhile, and is replaced. Then both answer again."""
    n = ready(served)
    yield
    until(lambda: ready(served) == n + 1, "the process is replaced")
    with endless(served) as (one, _), endless(served) as (other, _):
        assert sorted([one, other]) == BOTH


def processes(served: Served) -> dict[str, psutil.Process]:
    """The processes by their labels, which number their sockets."""
    found = {json.loads(process.cmdline()[-1])["socket"]: process for process in members(served.process)}
    return {f"cpu {int(Path(socket).name) + 1}": process for socket, process in found.items()}


def is_dead(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextmanager
def crew(*options: str, **environment: str) -> Iterator[Served]:
    with running([*PROGRAM, "--devices", "cpu:2", *options], **environment) as served:
        until(lambda: ready(served) == 2, "both are ready")
        yield served


@contextmanager
def endless(served: Served) -> Iterator[tuple[str, Iterator[str]]]:
    """The process of a stream that never ends, in which it has the only place, and the stream's lines."""
    n = len(said(served, RUNS))
    with served.client.stream("POST", "/v1/chat/completions", json=chat(ENDLESS, stream=True)) as answer:
        assert answer.status_code == 200
        until(lambda: len(said(served, RUNS)) == n + 1, "it runs")
        yield said(served, RUNS)[-1], (line for line in answer.iter_lines() if line)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with crew() as served:
        yield served
        assert served.stop() == 0
        assert served.logged("ERROR") + served.logged("Traceback") == 0


def test_the_processes_share_the_requests_and_a_client_that_hangs_up_frees_its_place(served):
    """Each process has one place: if an endless request kept one, the next would wait for ever."""
    server = psutil.Process(served.process.pid)
    with endless(served) as (first, _):
        n_open = server.num_fds()
        for _ in range(2):
            with endless(served) as (second, _):
                assert sorted([first, second]) == BOTH
            until(lambda: server.num_fds() <= n_open, "the server has seen that the client is gone")
    n = len(said(served, RUNS))
    with sent(served, ENDLESS), sent(served, ENDLESS):
        until(lambda: len(said(served, RUNS)) == n + 2, "both run")
    assert texts(captioned(served, 3, 1, 2)) == ["µ grey 3", "µ grey 1", "µ grey 2"]
    with ThreadPoolExecutor(4) as threads:
        answers = threads.map(lambda level: texts(captioned(served, level)), range(8))
        assert list(answers) == [[f"µ grey {level}"] for level in range(8)]


def test_a_stream_comes_through_token_by_token(served):
    """The stream never ends: all that arrives was sent while it ran."""
    with endless(served) as (_, lines):
        said = [json.loads(next(lines).removeprefix("data: "))["choices"][0]["delta"]["content"] for _ in range(12)]
    assert said == ["", *"µ grey 200", "µ"]


def test_what_a_process_answers_is_passed_on_as_it_is(served):
    assert served.client.get("/v1/models").json()["data"][0]["root"] == "patient"
    refused = served.client.post("/v1/captions", json={"images": [], "n": 2})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
    assert served.client.get("/v1/no%3Fthing?a=%20").status_code == 404
    assert served.client.post("/v1/models").status_code == 405
    assert served.client.get("/metrics").status_code == served.client.get("/docs").status_code == 200


def test_an_address_leads_to_no_other_host_and_not_out_of_the_api(served):
    for path in ("/v1/captions/", "/v1/" + "x" * 65_000):
        assert served.client.post(path).status_code == 404
    with connected(served, HEALTH.replace(b"/health", b"/v1/../health")) as (connection,):
        assert status_of(connection) == 404


def test_a_header_that_is_not_ascii_is_answered_as_by_one_process(served):
    head = HEAD + b"Content-Type: multipart/form-data; boundary=\xff\r\nContent-Length: 2\r\n\r\n{}"
    with connected(served, head) as (connection,):
        assert status_of(connection) == 400


def test_a_request_may_be_as_large_as_with_one_process(served):
    padded = json.dumps({"images": [grey(7)]}).encode() + b" " * 5_000_000
    assert texts(served.client.post("/v1/captions", content=padded)) == ["µ grey 7"]
    in_chunks = served.client.post("/v1/captions", content=(b" " * 1_000_000 for _ in range(65)))
    assert in_chunks.status_code == 413
    assert in_chunks.json()["error"]["message"].startswith("A request may have at most 64,000,000 bytes. ")


def test_a_client_that_hangs_up_before_it_has_sent_everything_is_no_error(served):
    """The log of the server shows at the end that nothing went wrong."""
    with connected(served, HEAD + b"Content-Length: 1000\r\n\r\n{"):
        pass
    assert texts(captioned(served, 4)) == ["µ grey 4"]


def test_nobody_else_reaches_the_processes(served):
    sockets = [json.loads(process.cmdline()[-1])["socket"] for process in members(served.process)]
    (folder,) = {Path(socket).parent for socket in sockets}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_metrics_are_those_of_every_process_by_its_device(served):
    with endless(served) as (label, _):
        families = list(text_string_to_metric_families(served.client.get("/metrics").text))
    assert len({family.name for family in families}) == len(families)
    samples = [one for family in families for one in family.samples]
    running = {one.labels["device"]: one.value for one in samples if one.name == "rococap_num_requests_running"}
    assert running == {device: float(device == label) for device in BOTH}
    assert {one.labels["device"]: one.value for one in samples if one.name == "rococap_up"} == dict.fromkeys(BOTH, 1)
    memory = [one.labels.get("device") for one in samples if one.name == "process_resident_memory_bytes"]
    assert memory == [*BOTH, None], "the server's own is without a label"


def test_the_server_itself_loads_no_torch(served):
    assert not [one.path for one in psutil.Process(served.process.pid).memory_maps() if "libtorch" in one.path]


# --- death -----------------------------------------------------------------------------------------------------


def test_a_process_that_is_killed_loses_only_its_requests_which_are_told_once_and_it_is_replaced(served):
    with replaced(served), ThreadPoolExecutor(3) as threads:
        with endless(served) as (victim, doomed), endless(served) as (_, lines):
            waiting = [threads.submit(captioned, served, LOUD) for _ in BOTH]
            until(lambda: sorted(said(served, PREPARES)) == BOTH, "one waits in each")
            process = processes(served)[victim]
            process.kill()
            *_, last = doomed
            # The system closes its sockets one after the other: until all are, it could be sent one more request.
            until(lambda: is_dead(process), "it is dead")
            late = threads.submit(captioned, served, 5)
            assert next(lines), "the other stream goes on"
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "process_died"
        kept, lost = sorted((one.result() for one in waiting), key=lambda answer: answer.status_code)
        assert texts(kept) == [f"µ grey {LOUD}"]
        error = {"message": DIED, "type": "server_error", "param": None, "code": "process_died"}
        assert (lost.status_code, lost.json()) == (502, {"error": error})
        assert texts(late.result()) == ["µ grey 5"], "the dead process got nothing of it"
    assert sorted(said(served, PREPARES)) == BOTH, "neither was sent a second time"


def test_a_process_whose_engine_dies_is_replaced(served):
    with replaced(served):
        assert captioned(served, FATAL).json()["error"]["code"] == "unavailable"
        # Until the server has heard of it, the next may get the same answer.
        until(lambda: captioned(served, 5).status_code == 200, "the other answers")
    assert served.logged("ended with code 1 (the device has vanished.); restarting it") == 1


def test_processes_whose_engines_stay_in_a_step_get_no_requests_until_they_go_on(tmp_path):
    stalls = tmp_path / "stalls"
    stalls.touch()

    def up() -> list[str]:
        families = text_string_to_metric_families(served.client.get("/metrics").text)
        samples = [one for family in families for one in family.samples if one.name == "rococap_up"]
        return [one.labels["device"] for one in samples if one.value]

    with crew("--request-timeout", "0.5", ROCOCAP_TEST_STALLS=str(stalls)) as served:
        assert captioned(served, STALLING).status_code == 504
        until(lambda: len(up()) == 1, "it has stalled")
        (other,) = up()
        assert served.client.get("/healthz").status_code == 200
        for _ in range(4):  # on a busy machine, even the other may need longer than half a second
            until(lambda: captioned(served, LOUD).status_code == 200, "the other answers")
        assert set(said(served, PREPARES)) == {other}
        assert captioned(served, STALLING).status_code == 504
        until(lambda: up() == [], "the other has stalled as well")
        healthz = served.client.get("/healthz")
        assert (healthz.status_code, healthz.json()) == (503, {"status": "stalled"})
        answer = captioned(served, 5)
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, STALLED)
        stalls.unlink()
        until(lambda: up() == BOTH, "they go on")


def test_a_model_that_cannot_be_loaded_ends_the_server():
    with running([*PROGRAM, "--devices", "cpu:1"], ROCOCAP_TEST_LOADS="never") as served:
        assert served.process.wait(60) == 1
        reason = "it ended with code 1 (the weights are not there.)"
        assert served.complaints()[-1] == f"Error: cpu failed 2 times in a row and was given up: {reason}\n"


def test_a_process_that_has_answered_is_never_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(children, "FIRST_PAUSE_SEC", 0.0)
    script = 'import sys; print(\'{"state": "ok"}\', flush=True); sys.exit(1)'
    replica = Replica("cpu", tmp_path, [sys.executable, "-I", "-S", "-c", script], os.environ, lambda line: None)
    for _ in range(children.TRIES + 1):
        for state in ("ok", "loading"):
            until(lambda state=state: replica.tend(is_stopping=False) or replica.state == state, state)
    assert replica.error == ""


def test_a_process_that_cannot_load_is_given_up_however_long_it_takes_to_find_out(tmp_path, monkeypatch):
    monkeypatch.setattr(children, "FIRST_PAUSE_SEC", 0.0)
    monkeypatch.setattr(children, "QUICK_SEC", 0.0)
    replica = Replica("cpu", tmp_path, ["false"], os.environ, lambda line: None)
    until(lambda: replica.tend(is_stopping=False) or replica.is_over, "it is given up")
    assert "failed 3 times in a row and was given up" in replica.error


# --- the end ---------------------------------------------------------------------------------------------------


def test_while_all_load_clients_are_asked_to_come_back_and_it_stops_at_once():
    with running([*PROGRAM, "--devices", "cpu:2"], ROCOCAP_TEST_LOADS="for ever") as served:
        healthz = served.client.get("/healthz")
        assert (healthz.status_code, healthz.json()) == (503, {"status": "loading"})
        answer = captioned(served, 1)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert served.stop() == 0
        assert served.complaints() == []


def test_all_finish_what_runs_before_the_server_ends():
    """The signal goes to all of them, as systemd sends it, and the server passes it on as well."""
    with crew() as served:
        crew_of_two = processes(served)
        with endless(served) as (busy, lines):
            for process in (*crew_of_two.values(), served.process):
                process.send_signal(signal.SIGTERM)
            (idle,) = (process for label, process in crew_of_two.items() if label != busy)
            assert psutil.wait_procs([idle], timeout=60)[1] == []
            healthz = served.client.get("/healthz")
            assert (healthz.status_code, healthz.json()) == (503, {"status": "stopping"})
            answer = captioned(served, 1)
            assert (answer.status_code, answer.json()["error"]["message"]) == (503, STOPPING)
            assert next(lines)
            assert served.process.poll() is None
        assert served.process.wait(60) == 0
        assert not crew_of_two[busy].is_running()


def test_after_the_drain_timeout_what_still_runs_fails_and_the_server_ends():
    with crew("--drain-timeout", "0.5") as served:
        with endless(served) as (_, lines):
            served.process.send_signal(signal.SIGTERM)
            *_, last = lines
            assert json.loads(last.removeprefix("data: "))["error"]["message"] == STOPPING
        assert served.process.wait(60) == 0


def test_no_process_outlives_a_server_that_is_killed():
    with crew() as served:
        orphans = list(processes(served).values())
        served.process.kill()
        assert psutil.wait_procs(orphans, timeout=60)[1] == []
