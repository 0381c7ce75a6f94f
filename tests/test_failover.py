"""A PostgreSQL server with a standby that takes its place while workers run."""

from collections.abc import Iterator

import pytest
from postgres import Server
from sqlalchemy.engine import make_url
from worlds import check, made

pytestmark = pytest.mark.slow


@pytest.fixture
def primary() -> Iterator[Server]:
    server = Server(is_durable=True)
    yield server
    server.stop()


def test_workers_go_on_with_a_synchronous_standby_that_takes_the_place_of_the_primary(primary, tmp_path):
    n = 160
    with primary.standby() as standby:
        url = make_url(primary.create("queue"))
        hosts = f"{primary.socket_folder},{standby.socket_folder}"
        both = url.set(query={"host": hosts, "port": "5432,5432", "target_session_attrs": "read-write"})
        with made(both.render_as_string(hide_password=False), tmp_path / "world") as world:
            world.fill(n)
            for _ in range(2):
                world.crew.start(engine={"step_sec": 0.2})
            world.until_busy(12)
            done = world.n_done()
            primary.control("stop", "-m", "immediate")
            standby.control("promote")
            world.until_busy(12)
            assert world.all_live()
            outcomes = world.crew.finish_all()
            assert world.select("SELECT pg_is_in_recovery()") == [(False,)]
            assert sum(one["done"] for one in outcomes) == n > done > 0
            check(world, n, charged=False)
