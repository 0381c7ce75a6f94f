"""`rococap launch ray` on real Ray clusters of several nodes, which are killed while they work."""

import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import click
import pytest
from databases import new_queue
from openai_server import ChatServer, Request, measure
from PIL import Image
from places import ROOT
from ray_cluster import Nodes, driver, nodes
from samples import fill
from steps import column, refused, running, said, until
from worlds import TTL_SEC, World, check, check_books, made

from rococap import db
from rococap.cli.options import cli
from rococap.cli.worker import echo_outcome
from rococap.engines import Completion
from rococap.worker.settings import Settings
from rococap.worker.store import Outcome

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with nodes(2) as started:
        yield started


@pytest.fixture
def world(url, tmp_path) -> Iterator[World]:
    with made(url, tmp_path) as world:
        yield world


def ended(process: subprocess.Popen) -> dict:
    """What a driver did that ends by itself."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out)


# --- What is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--gpus", "1", "--cpus", "1")])
def test_either_gpus_or_cpu_cores_are_chosen(here, options):
    assert refused("launch", "ray", *options, code=2) == "Say where to caption: either --gpus N or --cpus N."


def test_where_no_cluster_is_the_next_step_is_named(here):
    fill(db.connect("sqlite:///rococap.db"), here / "dataset", 1)
    error = refused("launch", "ray", "--cpus", "1", "--address", "127.0.0.1:1")
    assert error == (
        "There is no Ray cluster at 127.0.0.1:1 ([Errno 111] Connection refused). Start one with ray start --head, or "
        "leave out --address to use this machine alone."
    )


def test_nothing_is_started_where_there_is_nothing_to_do(here):
    fill(db.connect("sqlite:///rococap.db"), here / "dataset", 1)
    said("cancel", "--all")
    told = said("launch", "ray", "--cpus", "1", "--address", "127.0.0.1:1")
    assert told == "default: nothing left to do. See: rococap status\n"


# --- Work ------------------------------------------------------------------------------------------------------


def n_workers_that_stored(world: World) -> int:
    return column(
        world.database, "SELECT count(DISTINCT l.worker_id) FROM captions c JOIN leases l ON l.id = c.lease_id"
    )[0]


def test_the_command_captions_everything_although_a_node_is_killed(cluster, world):
    world.fill(60)
    options = ("--batch-size", "4", "--lease-ttl", str(TTL_SEC), "--no-self-check", "--db", world.url)
    both_hold_some = threading.Event()

    def say(picture: Image.Image, request: Request) -> Completion:
        both_hold_some.wait(120)  # else the first could be done with all before the second has begun
        return measure(picture, request)

    with ChatServer(say) as server:
        server.sec = 0.3
        engine = ("--engine", "openai", "--base-url", server.url)
        command = (sys.executable, "-m", "rococap", "launch", "ray", "--cpus", "2", "--address", cluster.address)
        with running(*command, *engine, *options, cwd=ROOT) as process:
            holding = "SELECT count(DISTINCT worker_id) FROM leases"
            until(lambda: column(world.database, holding) == [2], "both hold pictures", 120)
            both_hold_some.set()
            until(lambda: n_workers_that_stored(world) == 2, "both work")
            cluster.kill(cluster.running[0])
            cluster.add()
            out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert re.fullmatch(r"default: \d+ captioned in .* s \(.*/s\), 0 failed\n", out)
    # What the one wrote that was killed may be lost with its node.
    assert re.search(r"^cpu [12] on \S+  .* INFO captioning run default", err, re.MULTILINE)
    assert re.search(r"cpu [12] was lost; Ray has started it again", err)
    check(world, 60)


def test_what_was_stopped_is_continued_by_the_same_command(capsys):
    outcome = Outcome("default", done=3, seconds=1.0, drained=True)
    with click.Context(cli):
        echo_outcome(outcome, Settings.of(dataset_root="/mounted"), "launch ray --gpus 8 --address auto")
    assert capsys.readouterr().out.endswith(
        "To continue: rococap launch ray --gpus 8 --address auto --dataset-root /mounted\n"
    )


# --- Torture ---------------------------------------------------------------------------------------------------


@pytest.mark.torture
def test_a_request_to_stop_drains_the_workers_of_all_nodes(cluster, world):
    world.fill(1_000)
    with running(*driver("gpu", 2, cluster.address, world.url, {"step_sec": 0.3}, batch_size=4)) as process:
        until(lambda: n_workers_that_stored(world) == 2, "both work")
        process.send_signal(signal.SIGINT)
        found = ended(process)
    assert found["signals"] == [signal.SIGINT]
    assert found["errors"] == []
    assert found["outcome"]["drained"]
    assert found["outcome"]["done"] == world.n_done() > 0
    assert world.statuses().keys() == {"done", "pending"}
    assert column(world.database, "SELECT count(*) FROM workers WHERE stopped_at IS NULL") == [0]
    assert world.select("SELECT count(*) FROM leases WHERE state IN ('open', 'expired')") == [(0,)]


@pytest.mark.torture
def test_each_worker_sees_a_gpu_of_its_own_and_their_limits_add_up(cluster, world):
    world.fill(30)
    with running(*driver("gpu", 2, cluster.address, world.url, {"step_sec": 0.3}, limit=9)) as process:
        until(lambda: all(map(cluster.workers, cluster.running)), "both have started")
        [worker, _] = [worker for node in cluster.running for worker in cluster.workers(node)]
        environment = worker.environ()
        found = ended(process)
    assert environment["CUDA_VISIBLE_DEVICES"] == "0"  # what Ray gives, as long as num_gpus asks for it
    assert "OMP_NUM_THREADS" not in environment
    assert environment["ROCOCAP_DB"] == world.url
    assert found["outcome"]["done"] == world.n_done() == 9


@pytest.mark.torture
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give the driver another host name")
def test_sqlite_is_refused_on_a_cluster_of_other_machines(cluster, world):
    world.fill(1)
    command = shlex.join(driver("cpu", 1, cluster.address, world.url))
    with running("unshare", "--uts", "sh", "-c", f"hostname elsewhere && exec {command}") as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"SQLite is for one machine, and the workers would run on {socket.gethostname()}. Copy the queue" in err
    assert f"rococap copy-db {world.url} postgresql+psycopg://USER@HOST/NAME" in err
    assert world.statuses() == {"pending": 1}


@pytest.mark.torture
def test_when_the_driver_is_killed_its_workers_drain_and_others_finish(cluster, world):
    world.fill(200)
    command = driver("cpu", 2, cluster.address, world.url, {"step_sec": 0.2}, batch_size=4)
    with running(*command) as process:
        until(lambda: n_workers_that_stored(world) == 2, "both work")
        process.kill()
        until(
            lambda: column(world.database, "SELECT count(*) FROM workers WHERE stopped_at IS NULL") == [0], "they drain"
        )
    n = world.n_done()
    assert world.statuses() == {"done": n, "pending": 200 - n}
    with running(*command) as process:
        assert ended(process)["outcome"]["done"] == 200 - n > 0
    check(world, 200, charged=False)


AT_RISK = "SELECT count(*) FROM jobs WHERE status = 'leased' AND solo_crashes > 0"
"""Pictures that would fail by design if their worker were killed once more."""


def kill_any(cluster: Nodes, world: World, chance: random.Random) -> None:
    """Kills a node at any time after its worker has begun, and adds another in its place."""
    victim = chance.choice(cluster.running)

    def is_aboard() -> bool:
        pids = ", ".join(str(worker.pid) for worker in cluster.workers(victim)) or "0"
        return column(world.database, f"SELECT count(*) FROM workers WHERE pid IN ({pids})") == [1]

    until(is_aboard, "its worker has begun", 120)
    time.sleep(chance.uniform(0.0, 0.5))
    until(lambda: column(world.database, AT_RISK) == [0], "no picture is at risk")
    cluster.kill(victim)
    cluster.add()


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(5))
def test_nodes_that_are_killed_at_any_moment_lose_and_double_nothing(seed, request, tmp_path):
    """40 kills for each seed, 200 in all, of any of three nodes."""
    kills, n = 40, 12_000
    chance = random.Random(seed)
    with new_queue(request, "postgresql", tmp_path) as url, made(url, tmp_path) as world, nodes(3) as cluster:
        world.fill(n)
        command = driver("cpu", 3, cluster.address, url, {"step_sec": 0.5}, batch_size=4, lease_ttl=TTL_SEC)
        with running(*command) as process:
            for _ in range(kills):
                kill_any(cluster, world, chance)
                assert process.poll() is None, process.communicate()
            check_books(world)
            process.send_signal(signal.SIGTERM)
            ended(process)
        check_books(world)
        assert 0 < world.n_done() < n, "all was done too early"
        assert column(world.database, "SELECT count(*) FROM leases WHERE state = 'expired'")[0] >= kills / 2
        world.crew.start()
        world.crew.finish_all()
        check(world, n)
