"""Processes that may open few files: they work with what there is, or say what is wrong."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai_server import ChatServer
from samples import fill
from steps import until

from rococap import open_files


def limited(n: int, url: str, *args: str, hard: int | None = None) -> subprocess.CompletedProcess[str]:
    """`rococap` where `ulimit -n` is `n`, or may be raised up to `hard`."""

    def set_limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (n, hard or n))

    return subprocess.run(
        [sys.executable, "-m", "rococap", "--db", url, *args],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=set_limit,
    )


@pytest.fixture
def limits() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_limit_is_raised_for_what_is_wanted_and_no_further(limits):
    n_open, hard = len(os.listdir("/dev/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 10, hard))
    assert open_files.room_for(5) == 5
    assert open_files.limit() == n_open + 10
    assert open_files.room_for(300) == 300
    assert n_open + 295 < open_files.limit() < n_open + 305


def test_it_is_known_when_no_more_can_be_opened(limits):
    assert not open_files.are_used_up()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    assert open_files.are_used_up()


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer() as server:
        yield server


def held_back(server: ChatServer, more_than: int, n: int, url: str, *args: str, hard: int | None = None):
    """The same, with a server that answers nothing until more than so many requests are in flight, and for a while."""

    def answer() -> None:
        try:
            until(lambda: server.in_flight > more_than, f"more than {more_than} requests")
            time.sleep(0.5)
        finally:
            server.go_on.set()

    server.sec = 120.0
    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(answer)
        done = limited(n, url, *args, hard=hard)
        answering.result()
    return done


def test_a_worker_that_may_open_64_files_keeps_fewer_requests_in_flight(server, database, url, tmp_path):
    fill(database, tmp_path / "set", 120)
    worker = ("worker", "--engine", "openai", "--base-url", server.url, "--batch-size", "200", "--no-self-check")
    done = held_back(server, 8, 64, url, *worker)
    assert done.returncode == 0, done.stderr
    assert "default: 120 captioned" in done.stdout
    assert "requests are in flight instead of 200, since this process may open 64 files" in done.stderr
    assert server.most_in_flight < 32


def test_a_worker_raises_a_limit_that_may_be_raised(server, database, url, tmp_path):
    fill(database, tmp_path / "set", 120)
    worker = ("worker", "--engine", "openai", "--base-url", server.url, "--batch-size", "100", "--no-self-check")
    done = held_back(server, 64, 64, url, *worker, hard=4_096)
    assert done.returncode == 0, done.stderr
    assert "instead of" not in done.stderr


@pytest.mark.parametrize("n", [8, 12, 16, 24, 32])
def test_where_nothing_works_the_limit_is_named_and_how_to_raise_it(server, database, url, tmp_path, n):
    fill(database, tmp_path / "set", 4)
    worker = ("worker", "--engine", "openai", "--base-url", server.url, "--no-self-check")
    done = limited(n, url, *worker)
    print(done.stderr)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(open_files.ADVICE)
    assert "Traceback" not in done.stderr
