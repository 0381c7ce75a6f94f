"""Workers whose network fails: cut, silent, slow, losing answers. Nothing is lost or doubled, and nobody hangs."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from network import Link, inside, two_machines, why_not
from postgres import Server
from proxy import COMMITTED, Proxy, proxied
from sqlalchemy.engine import make_url
from steps import until
from worlds import TTL_SEC, World, check, made

from rococap import db

pytestmark = pytest.mark.slow
torture = pytest.mark.torture

SOON = {
    "connect_timeout": "2",
    "tcp_user_timeout": "1000",
    "keepalives_idle": "1",
    "keepalives_interval": "1",
    "keepalives_count": "2",
}
"""Options of the URL with which both ends notice sooner that the other is gone."""
IMPATIENT = {
    "rococap.db.SILENCE_SEC": 1.0,
    "rococap.db.PATIENCE_SEC": 1.0,
    "rococap.worker.store.STORE_PATIENCE_SEC": 0.5,
    "rococap.worker.heartbeat.STORE_PATIENCE_SEC": 0.5,
}


# --- Two machines ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def link() -> Iterator[Link]:
    if reason := why_not():
        pytest.skip(reason)
    with two_machines() as link:
        yield link


@pytest.fixture(scope="module")
def remote(link: Link) -> Iterator[Server]:
    """A server on the database's machine. The test itself reaches it through its socket, whatever the network does."""
    server = Server()
    with inside(link.database):
        server.listen(link.address)
    db.connect(server.create("empty_queue")).dispose()
    yield server
    server.stop()


@pytest.fixture
def apart(link: Link, remote: Server, tmp_path: Path) -> Iterator[World]:
    """A world on that server, whose workers reach it by its address, from whatever machine they are started on."""
    with made(remote.create(template="empty_queue"), tmp_path) as world:
        world.crew.url = make_url(world.url).set(host=link.address, query=SOON).render_as_string(False)
        yield world
    link.mend()


def ports(world: World) -> list[int]:
    """Of the connections that the server has over the network."""
    sql = "SELECT client_port FROM pg_stat_activity WHERE datname = current_database() AND client_port > 0"
    return [port for (port,) in world.select(sql)]


def test_a_worker_that_was_cut_off_goes_on_and_others_caption_what_it_held(link, apart):
    n = 60
    apart.fill(n)
    far = apart.crew.start(namespace=link.workers, engine={"step_sec": 0.2})
    near = apart.crew.start(namespace=link.database, engine={"step_sec": 0.2})
    apart.until_busy()
    link.cut()
    until(lambda: apart.n_spooled() > 0, "captions in the spool")
    until(lambda: apart.n_done() == n, "all is done by the other")
    link.mend()
    outcomes = [apart.crew.finish(worker) for worker in (far, near)]
    assert sum(one["done"] for one in outcomes) == n
    assert outcomes[0]["lost"] > 0
    assert not apart.crew.spool.exists()
    check(apart, n)


@torture
@pytest.mark.parametrize(("settings", "away_sec"), [(SOON, 3 * TTL_SEC), ({}, 60.0)])
def test_a_cable_that_is_cut_for_longer_than_a_lease_again_and_again_costs_nothing(link, apart, settings, away_sec):
    """With our own settings, a connection survives cuts that are shorter than they are patient."""
    n, chance = 400, random.Random(1)
    apart.crew.url = make_url(apart.crew.url).set(query=settings).render_as_string(False)
    apart.fill(n)
    for _ in range(2):
        apart.crew.start(namespace=link.workers, engine={"step_sec": 0.2})
    for _ in range(4):
        apart.until_busy()
        time.sleep(chance.uniform(0, 0.5))
        link.cut()
        time.sleep(chance.choice([chance.uniform(0, TTL_SEC), away_sec]))
        assert apart.all_live()
        link.mend()
    outcomes = apart.crew.finish_all(180)
    assert (sum(one["done"] for one in outcomes), sum(one["lost"] for one in outcomes)) == (n, 0)
    assert not apart.crew.spool.exists()
    check(apart, n, charged=False)


def test_connections_whose_packets_vanish_are_given_up_by_both_ends(link, apart):
    n = 60
    apart.fill(n)
    worker = apart.crew.start(namespace=link.workers, engine={"step_sec": 0.2})
    apart.until_busy()
    vanished = ports(apart)
    assert vanished
    link.drop(vanished)
    assert apart.crew.finish(worker)["done"] == n
    check(apart, n, charged=False)
    until(lambda: not set(ports(apart)) & set(vanished), "the server has given them up")


def test_a_machine_that_vanishes_inside_a_transaction_keeps_no_rows(link, apart):
    n = 40
    apart.fill(n)
    # So that only the server's own look at the connection can end the transaction.
    apart.crew.constants |= {"rococap.db.SILENCE_SEC": 3600.0, "rococap.db.HURRIED_IDLE_SEC": 3600}
    trouble = {"thread": "store", "nth": 4, "do": "stop", "first": "SELECT CAST"}
    gone = apart.crew.start(namespace=link.workers, troubles=[trouble])
    until(lambda: "trouble" in gone.told(), "frozen inside complete")
    link.drop(ports(apart))
    apart.crew.kill(gone)
    other = apart.crew.start(namespace=link.database)
    assert apart.crew.finish(other)["done"] == n
    check(apart, n)


# --- A proxy ---------------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(postgres: Server) -> Iterator[Proxy]:
    with proxied(postgres) as proxy:
        yield proxy


@pytest.fixture
def behind(proxy: Proxy, postgres: Server, tmp_path: Path) -> Iterator[World]:
    """A world whose workers reach the server through the proxy; the test itself does not."""
    with made(postgres.create(template="empty_queue"), tmp_path) as world:
        world.crew.url = proxy.in_front_of(world.url)
        yield world


def finish(world: World, n: int, seconds: float = 60) -> None:
    """All is captioned once, by workers that have stayed in charge of what they held."""
    outcomes = world.crew.finish_all(seconds)
    assert (sum(one["done"] for one in outcomes), sum(one["lost"] for one in outcomes)) == (n, 0)
    assert not world.crew.spool.exists()
    check(world, n, charged=False)


@pytest.mark.parametrize(("n", "every"), [(120, 5), pytest.param(400, 3, marks=torture)])
def test_commits_whose_answers_are_lost_make_nobody_caption_or_store_twice(proxy, behind, n, every):
    behind.fill(n)
    for _ in range(2):
        behind.crew.start(engine={"step_sec": 0.02})
    behind.until_busy(1)
    proxy.loses = range(0, 1_000_000, every)
    finish(behind, n, 600)
    assert proxy.n_lost > n / 20


@pytest.mark.parametrize(("n", "delay_sec"), [(8, 0.02), pytest.param(80, 0.2, marks=torture)])
def test_a_slow_network_changes_nothing(proxy, behind, n, delay_sec):
    behind.fill(n)
    proxy.delay_sec = delay_sec
    for _ in range(2):
        behind.crew.start(settings={"batch_size": 4, "lease_ttl": max(TTL_SEC, 100 * delay_sec)})
    finish(behind, n, 300)


@pytest.mark.parametrize("told", [b"INSERT 0 1\x00", b"UPDATE 1\x00", COMMITTED])
def test_a_connection_that_falls_silent_without_ending_is_given_up_by_both_ends(proxy, behind, told):
    n = 40
    behind.fill(n)
    behind.crew.constants |= IMPATIENT
    behind.crew.start(engine={"step_sec": 0.3})
    behind.until_busy(1)
    proxy.hush = told
    finish(behind, n)
    assert proxy.n_silent == 1


@torture
def test_connections_that_fall_silent_again_and_again_cost_nothing(proxy, behind):
    n, chance = 800, random.Random(1)
    behind.fill(n)
    behind.crew.constants |= IMPATIENT
    for _ in range(2):
        behind.crew.start(engine={"step_sec": 0.1}, settings={"batch_size": 4, "lease_ttl": 10.0})
    for _ in range(10):
        behind.until_busy()
        time.sleep(chance.uniform(0, 0.5))
        assert proxy.fall_silent() > 0
    finish(behind, n, 300)
