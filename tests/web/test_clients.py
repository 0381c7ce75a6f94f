"""Clients that are many, slow, broken or greedy, and what a server still answers to the others."""

import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPResponse
from pathlib import Path

import httpx
import pytest
from patient_engine import ENDLESS, LOUD, PREPARES
from patient_server import PROGRAM, captioned, endless, grey, patient, sent, texts
from steps import until
from web_server import Served, running

from rococap import open_files
from rococap.web.server import listen

TOKEN = "a-token-of-some-length"
HEAD = b"POST /v1/captions HTTP/1.1\r\nHost: localhost\r\n"
ASKING = HEAD + b"Content-Length: 100\r\nExpect: 100-continue\r\n\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 "


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with patient("--max-waiting", "2") as served:
        yield served
        assert served.stop() == 0
        assert served.complaints() == []


@contextmanager
def connected(served: Served, *beginnings: bytes) -> Iterator[list[socket.socket]]:
    """Connections that have sent these beginnings of requests, one after the other."""
    address = served.client.base_url
    with ExitStack() as stack:
        connections = []
        for beginning in beginnings:
            one = stack.enter_context(socket.create_connection((address.host, address.port), timeout=30))
            one.sendall(beginning)
            connections.append(one)
        yield connections


def answer_to(connection: socket.socket) -> HTTPResponse:
    answer = HTTPResponse(connection)
    answer.begin()
    answer.read()
    return answer


def status_of(connection: socket.socket) -> int:
    return answer_to(connection).status


def health(served: Served) -> int:
    """As a client is told that has just come."""
    with connected(served, HEALTH) as (connection,):
        return status_of(connection)


# --- many ------------------------------------------------------------------------------------------------------


def test_an_answer_does_not_wait_for_the_client_to_acknowledge_its_head():
    """Otherwise each takes 40 ms: TCP holds the body back until then."""
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_thousand_idle_connections_keep_nobody_from_being_served(served):
    assert open_files.room_for(1_100) == 1_100
    with connected(served, *[b"", b"POST /v1/capt"] * 500) as idle:
        assert texts(captioned(served, 5)) == ["µ grey 5"]
        idle[0].sendall(HEALTH)
        assert status_of(idle[0]) == 200, "they can be used all the same"


def test_where_few_files_can_be_opened_idle_connections_make_room_and_busy_ones_stay():
    with patient(ROCOCAP_TEST_FILES="160") as served, ExitStack() as stack:
        with connected(served, *[b""] * 200):
            # By a connection of its own: that of the other requests is idle, too.
            answer = httpx.post(f"{served.address}/v1/captions", json={"images": [grey(5)]})
            assert texts(answer) == ["µ grey 5"]
        busy = []
        while True:
            (one,) = stack.enter_context(connected(served, ASKING))
            if not one.recv(9999, socket.MSG_PEEK).startswith(CONTINUE):
                break
            one.recv(9999)
            busy.append(one)
        assert status_of(one) == 503
        assert 40 < len(busy) < 80
        busy.pop().close()
        until(lambda: health(served) == 200, "the place of one that has gone is free")
        busy[0].sendall(b"{" * 100)
        assert status_of(busy[0]) == 400


def test_requests_are_limited_in_number_and_health_is_always_told(served):
    assert open_files.room_for(1_100) == 1_100
    with connected(served, *[ASKING] * 1_000) as connections:
        assert all(one.recv(1000).startswith(CONTINUE) for one in connections), "all requests are under way"
        answer = captioned(served, 5)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert answer.json()["error"]["message"] == "1,000 requests are being answered. Try again later."
        assert served.client.get("/health").status_code == 200
        assert served.client.get("/healthz").status_code == 200
    until(lambda: captioned(served, 5).status_code == 200, "all have hung up")


# --- slow ------------------------------------------------------------------------------------------------------


def test_a_client_that_stops_sending_is_told_so_and_one_that_waits_for_its_answer_is_not_cut():
    stopped = {
        "nothing": b"",
        "half a head": b"POST /v1/captions HTT",
        "no body": HEAD + b"Content-Length: 100\r\n\r\n",
        "half a body": HEAD + b"Content-Length: 100\r\n\r\n" + b"{" * 50,
        "half a chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n64\r\n{",
        "half a form": HEAD + b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 100\r\n\r\n--b\r\n",
    }
    with (
        patient(ROCOCAP_TEST_PATIENCE="1") as served,
        endless(served) as lines,
        sent(served, ENDLESS),
        connected(served, *stopped.values()) as connections,
    ):
        assert connections[0].recv(1) == b""
        assert [status_of(connection) for connection in connections[1:]] == [408] * 5
        with connected(served, HEAD + b"Content-Length: 1000000\r\n\r\n") as (dripping,):
            while not select.select([dripping], [], [], 0.05)[0]:
                dripping.sendall(b" ")
            assert status_of(dripping) == 408
        assert any(line for line in lines), "a stream has outlived all of them"
        served.log.seek(0)
        assert [line for line in served.log if "error" in line.lower()] == []


# --- greedy ----------------------------------------------------------------------------------------------------


def peak_mb(served: Served) -> int:
    """The most memory that a server has had."""
    status = Path(f"/proc/{served.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def test_a_body_without_a_length_is_refused_as_soon_as_it_is_too_long(served):
    before, mb = peak_mb(served), b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
    with connected(served, HEAD + b"Transfer-Encoding: chunked\r\n\r\n") as (connection,):
        n_sent = 0
        while n_sent < 2_000 and not select.select([connection], [], [], 0)[0]:
            connection.sendall(mb)
            n_sent += 1
        assert status_of(connection) == 413
        assert n_sent < 100
    assert peak_mb(served) - before < 200


def test_a_full_queue_is_told_before_the_body_is_read(served):
    with endless(served), sent(served, LOUD, 1):
        assert served.process.stdout.readline() == PREPARES + "\n"
        without = HEAD + b"Content-Length: 1000000\r\n\r\n"
        with connected(served, ASKING, without) as (expecting, connection):
            answer = answer_to(expecting)
            assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
            assert answer.headers["Connection"] == "close", "nothing can be sent in the body's place"
            assert status_of(connection) == 429
            connection.sendall(b" " * 1_000_000 + HEALTH)
            assert status_of(connection) == 200, "a short rest is skipped"
    until(lambda: captioned(served, 4).status_code == 200, "the places of those that have hung up are free")


def test_a_server_that_is_loading_says_so_before_the_body_is_read():
    with running(PROGRAM, ROCOCAP_TEST_LOADS="for ever") as served, connected(served, ASKING) as (connection,):
        assert status_of(connection) == 503


def test_a_wrong_token_is_refused_before_the_body_is_read():
    with patient(ROCOCAP_TOKEN=TOKEN) as served:
        right = ASKING.replace(b"\r\n\r\n", f"\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
        wrong = right.replace(b"a-token", b"b-token")
        with connected(served, ASKING, wrong, right) as (without, with_wrong, with_right):
            assert status_of(without) == status_of(with_wrong) == 401
            assert with_right.recv(1000).startswith(CONTINUE)
