"""Clients that are many, slow, broken or greedy, and what a server still answers to the others."""

import base64
import json
import socket
import struct
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from patient_engine import CLUMSY, ENDLESS, LOUD, PREPARES, RUNS
from patient_server import (
    ASKING,
    CONTINUE,
    HEAD,
    HEALTH,
    PROGRAM,
    answer_to,
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
from PIL import Image
from steps import until
from web_server import Served, loaded, running

from rococap import open_files
from rococap.web.server import listen


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    # Patient enough for a thousand connections on a slow machine.
    with patient("--max-waiting", "2", ROCOCAP_TEST_PATIENCE="120") as served:
        yield served
        assert served.stop() == 0
        assert served.complaints() == []


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
            answer = httpx.post(f"{served.address}/v1/captions", json={"images": [grey(5)]}, timeout=60)
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
        with connected(served, ASKING) as (one_more,):
            refused = answer_to(one_more)
            assert (refused.status, refused.headers["Connection"]) == (503, "close"), "its body is not asked for"
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
            send_until_answered(dripping, b" ", every_sec=0.05)
            assert status_of(dripping) == 408
        assert any(line for line in lines), "a stream has outlived all of them"
        served.log.seek(0)
        assert [line for line in served.log if "error" in line.lower()] == []


def test_a_client_may_ask_for_the_head_alone(served):
    for path in ("/health", "/healthz", "/v1/models", "/metrics", "/docs"):
        whole, head = served.client.get(path), served.client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers.keys() == whole.headers.keys()
    assert served.client.head("/v1/captions").status_code == 405


def test_a_client_that_reads_nothing_of_its_answer_is_cut_and_one_that_waits_for_more_is_not():
    with patient(ROCOCAP_TEST_PATIENCE="1", ROCOCAP_TEST_SENDING="4096") as served, endless(served) as lines:
        process = psutil.Process(served.process.pid)
        n_open = process.num_fds()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((served.client.base_url.host, served.client.base_url.port))
            connection.sendall(HEALTH.replace(b"/health", b"/docs/swagger-ui-bundle.js"))
            until(lambda: process.num_fds() > n_open, "it is connected")
            until(lambda: process.num_fds() == n_open, "it is cut")
        assert any(line for line in lines)


# --- greedy ----------------------------------------------------------------------------------------------------


def peak_mb(served: Served) -> int:
    """The most memory that a server has had."""
    status = Path(f"/proc/{served.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def reset_peak(served: Served) -> int:
    """Forgets the peak so far, and returns the memory that the server has now."""
    Path(f"/proc/{served.process.pid}/clear_refs").write_text("5")
    return peak_mb(served)


def test_a_body_without_a_length_is_refused_as_soon_as_it_is_too_long(served):
    before, mb = reset_peak(served), b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
    with connected(served, HEAD + b"Transfer-Encoding: chunked\r\n\r\n") as (connection,):
        n_sent = send_until_answered(connection, mb, at_most=2_000)
        assert status_of(connection) == 413
        assert n_sent < 100
    assert peak_mb(served) - before < 200


def test_a_body_that_nobody_wants_is_refused_by_its_length(served):
    asking = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2000000000\r\n\r\n"
    with connected(served, asking) as (connection,):
        assert status_of(connection) == 413


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


# --- hostile ---------------------------------------------------------------------------------------------------

CAPTIONS, CHAT = "/v1/captions", "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "multipart/form-data; boundary=b"}
IMAGE = b'Content-Disposition: form-data; name="image"; filename="x"'
NESTED = b"[" * 100_000


def in_json(body: bytes, **headers: str) -> dict[str, Any]:
    return {"content": body, "headers": JSON | headers}


def in_form(head: bytes, data: bytes = b"x", *, n: int = 1, **headers: str) -> dict[str, Any]:
    return {"content": b"--b\r\n%b\r\n\r\n%b\r\n" % (head, data) * n + b"--b--\r\n", "headers": FORM | headers}


def chatting(extra: bytes) -> dict[str, Any]:
    return in_json(json.dumps(chat(5)).encode()[:-1] + b", %b}" % extra)


HOSTILE: dict[str, tuple[str, dict[str, Any], int]] = {
    "deep nesting": (CAPTIONS, in_json(b'{"images": ' + NESTED), 400),
    "deep nesting in chat": (CHAT, chatting(b'"tools": ' + NESTED), 400),
    "a million pictures": (CAPTIONS, in_json(b'{"images": [' + b'"",' * 1_000_000 + b'""]}'), 400),
    "a million messages": (CHAT, chatting(b'"messages": [' + b"{}," * 1_000_000 + b"{}]"), 400),
    "not a number": (CHAT, chatting(b'"temperature": NaN'), 400),
    "infinity": (CHAT, chatting(b'"max_tokens": 1e999'), 400),
    "minus infinity": (CHAT, chatting(b'"n": -Infinity'), 400),
    "a number of many digits": (CHAT, chatting(b'"max_tokens": ' + b"9" * 5_000), 400),
    "not a number for pictures": (CAPTIONS, in_json(b'{"images": [NaN]}'), 400),
    "half a document in chat": (CHAT, in_json(b'{"model": '), 400),
    "invalid UTF-8": (CAPTIONS, in_json(b'{"images": ["\xff"]}'), 400),
    "invalid UTF-8 in chat": (CHAT, in_json(b'{"model": "\xff"}'), 400),
    "half of a surrogate pair": (CHAT, in_json(json.dumps(chat(5)).replace("What?", r"\ud800").encode()), 400),
    "half of a pair as a field": (CHAT, chatting(rb'"\ud800": 1'), 400),
    "half of a pair as a model": (CHAT, chatting(rb'"model": "\ud800"'), 404),
    "a file's address": (CAPTIONS, in_json(b'{"images": ["file:///etc/passwd"]}'), 400),
    "an address in disguise": (CAPTIONS, in_json(b'{"images": [" HTTP://example.org/a.png"]}'), 400),
    "a data URL in disguise": (CAPTIONS, in_json(b'{"images": ["DATA:image/png;base64,AAAA"]}'), 400),
    "a data URL without base64": (CAPTIONS, in_json(b'{"images": ["data:image/svg+xml,<svg/>"]}'), 400),
    "compressed": (CAPTIONS, in_json(b"{}", **{"Content-Encoding": "gzip"}), 415),
    "a picture alone": (CAPTIONS, {"content": b"\x89PNG", "headers": {"Content-Type": "image/png"}}, 415),
    "another charset": (
        CAPTIONS,
        in_form(
            b'Content-Disposition: form-data; name="prompt"',
            b"1" * 400_000,
            **{"Content-Type": "multipart/form-data; boundary=b; charset=punycode"},
        ),
        415,
    ),
    "many files": (CAPTIONS, in_form(IMAGE, n=100_000), 400),
    "many fields": (CAPTIONS, in_form(IMAGE.partition(b"; file")[0], n=100_000), 400),
    "a long head of a part": (CAPTIONS, in_form(IMAGE + b"x" * 1_000_000), 400),
    "many heads of a part": (CAPTIONS, in_form(b"X: y\r\n" * 100_000 + IMAGE), 400),
    "a part without a name": (CAPTIONS, in_form(b"Content-Disposition: form-data"), 400),
    "a form without an end": (CAPTIONS, {"content": b"--b\r\n" + IMAGE + b"\r\n\r\nx", "headers": FORM}, 400),
    "a form that is JSON": (CAPTIONS, {"content": b"{}", "headers": FORM}, 400),
    "a form for chat": (CHAT, in_form(IMAGE), 400),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_is_refused_at_little_cost(served, name):
    path, request, expected = HOSTILE[name]
    before = reset_peak(served)
    answer = served.client.post(path, **request)
    assert answer.status_code == expected, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert not str(answer.json()["error"]["param"]).isdigit()
    assert peak_mb(served) - before < 50


LENGTH = b"Content-Length: 4\r\n"
MALFORMED = {
    "two lengths": HEAD + LENGTH + b"Content-Length: 5\r\n\r\n",
    "two hosts": HEAD + b"Host: example.org\r\n" + LENGTH + b"\r\n",
    "a negative length": HEAD + b"Content-Length: -1\r\n\r\n",
    "a length of many digits": HEAD + b"Content-Length: " + b"9" * 5_000 + b"\r\n\r\n",
    "an unknown coding": HEAD + b"Transfer-Encoding: gzip\r\n\r\n",
    "a broken chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "for a proxy": b"CONNECT example.org:80 HTTP/1.1\r\nHost: example.org:80\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_http_is_refused(served, name):
    with connected(served, MALFORMED[name]) as (connection,):
        assert status_of(connection) == 400


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
ENDLESS_HEADS = {
    "a line": b"GET /" + b"x" * 9,
    "a field": HEAD + b"X: ",
    "blank lines": b"\r\n",
    "an extension of a chunk": CHUNKED + b"4;",
    "a field after the body": CHUNKED + b"0\r\nX: ",
}


@pytest.mark.parametrize("name", ENDLESS_HEADS)
def test_what_comes_without_an_end_is_refused(served, name):
    before = reset_peak(served)
    with connected(served, ENDLESS_HEADS[name]) as (connection,):
        more = b"\r\n" * 2_000 if name == "blank lines" else b"x" * 4_000
        n_sent = send_until_answered(connection, more, every_sec=0.01, at_most=1_000)
        assert status_of(connection) == 431
        assert n_sent < 200
    assert peak_mb(served) - before < 20


def test_of_requests_that_do_not_wait_for_answers_the_first_is_answered(served):
    asking = HEAD + b"Content-Length: 2\r\n\r\n{}"
    with connected(served, asking + HEALTH * 5_000) as (connection,):
        assert status_of(connection) == 400
        assert connection.recv(1) == b"", "the client sends the others again, as HTTP has it"
    with connected(served, HEALTH) as (connection,):
        assert status_of(connection) == 200
        connection.sendall(HEALTH)
        assert status_of(connection) == 200, "they may follow"


def test_what_is_sent_while_an_answer_arrives_does_not_get_into_it(served):
    body = json.dumps(chat(ENDLESS, stream=True)).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with connected(served, head.encode() + body) as (connection,):
        assert served.process.stdout.readline() == RUNS + "\n"
        connection.sendall(b"\x16\x03" * 100_000)
        arrived = b""
        while len(arrived) < 20_000:
            arrived += connection.recv(9999)
        assert arrived.count(b"HTTP/1.1") == 1


def test_an_offer_of_another_protocol_is_declined(served):
    """Java's client makes one with every request."""
    body = json.dumps({"images": [grey(5)]}).encode()
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"
    with connected(served, HEAD + offer + b"Content-Length: %d\r\n\r\n" % len(body) + body[:9]) as (connection,):
        connection.sendall(body[9:])
        assert status_of(connection) == 200
        connection.sendall(HEALTH)
        assert status_of(connection) == 200


def png_of(width: int, height: int) -> bytes:
    """A picture of this size, without its pixels."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT": b"", b"IEND": b""}
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def animation() -> bytes:
    file = BytesIO()
    first, *rest = (Image.new("L", (28, 28), level) for level in range(6, 100))
    first.save(file, "GIF", save_all=True, append_images=rest)
    return file.getvalue()


def test_a_bomb_fails_alone(served):
    before = reset_peak(served)
    bombs = [png_of(60_000, 60_000), png_of(2**31 - 1, 2**31 - 1), b"<svg/>", b"", animation()]
    answers = []
    for bomb in bombs:
        beside = [("image", ("a", base64.b64decode(grey(5)))), ("image", ("b", bomb))]
        first, second = served.client.post("/v1/captions", files=beside).json()["captions"]
        assert first["caption"] == "µ grey 5"
        answers.append(second["caption"] or second["failure"]["code"])
    assert answers == ["too_large", "too_large", "unsupported", "empty", "µ grey 6"]
    assert peak_mb(served) - before < 50


def test_requests_that_are_too_large_together_are_asked_to_come_back():
    size = 1_000_000
    begun = HEAD + f"Content-Length: {size}\r\n\r\n".encode() + b" " * (size - 1)
    with patient(ROCOCAP_TEST_HELD="8500000") as served, connected(served, *[begun] * 8) as connections:
        assert captioned(served, 5).status_code == 200
        with connected(served, begun) as (one_too_many,):
            answer = answer_to(one_too_many)
            assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
        connections[0].sendall(b" ")
        assert status_of(connections[0]) == 400, "it was read whole"
        assert captioned(served, 5).status_code == 200


def test_nothing_of_a_request_is_logged_or_written_to_disk():
    """Not even of what fails. The server can make no file of a megabyte, as forms are usually read with."""
    secret = b"secret" * 500_000
    requests: list[dict[str, Any]] = [
        {"json": {"images": [base64.b64encode(secret).decode()], "prompt": "secret"}},
        {"json": {"images": ["AAAA"], "preset": "secret"}},
        {"json": {"secret": "secret"}},
        in_json(b"secret"),
        in_form(b"secret\0secret: secret", b"secret"),
    ]
    with patient(ROCOCAP_TEST_FILE_SIZE="1000000") as served:
        answer = served.client.post(CAPTIONS, files=[("image", ("secret", secret))])
        assert answer.json()["captions"][0]["failure"]["code"] == "not_an_image"
        for request in requests:
            assert served.client.post(CAPTIONS, **request).status_code < 500
        clumsy = {"images": [grey(5), grey(CLUMSY)], "prompt": "secret"}
        assert served.client.post(CAPTIONS, json=clumsy).status_code == 500
        served.client.get("/v1/secret?secret=secret", headers={"Secret": "secret"})
        assert served.stop() == 0
        served.log.seek(0)
        log = served.log.read()
        assert " POST /v1/captions: 400, " in log
        assert " ERROR a request failed (RuntimeError):" in log
        assert "secret" not in log


def test_with_debug_the_log_says_what_went_wrong():
    program = [PROGRAM[0], "--debug", *PROGRAM[1:]]
    with running(program) as served:
        loaded(served)
        assert served.client.post(CAPTIONS, json={"images": [grey(CLUMSY)], "prompt": "secret"}).status_code == 500
        assert [line for line in served.complaints() if line.startswith("RuntimeError") and "secret" in line]
