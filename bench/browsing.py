"""Measures `rococap serve` from outside: whole pages over HTTP, and what an open dashboard costs a worker."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import httpx
from crew import SPAWN, START_SEC
from report import Line, alternate, ratio_line, value_line
from rows import RUN_NAME, SPLIT
from sizes import timing
from sqlalchemy import Engine

from rococap.data.datasets import locate
from rococap.queue.enqueue import enqueue
from rococap.recipe import Recipe

LOOK_SEC = 1.1
"""The server looks at the queue once a second: after this, the next look is a new one."""
CHARTS_SEC = 15
"""How often the page of the dashboard asks for its charts."""
LAST_PART = "event: failures"


@contextmanager
def served(url: str) -> Iterator[str]:
    """The address of a server of this queue."""
    command = [sys.executable, "-m", "rococap", "--db", url, "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split(" ")[4].rstrip("/")
        finally:
            process.terminate()


# --- Pages -------------------------------------------------------------------------------------------------------


def pages(url: str, rounds: int, skipped: int, limit: int, words: tuple[str, ...], target: str) -> list[Line]:
    """The time of each page, from the request to the last byte, on loopback. Pages that do not exist are left out."""
    gallery = f"/pictures?run={RUN_NAME}&split={SPLIT}&limit={limit}"
    asked = {
        "gallery, page 1": gallery,
        f"gallery, page {skipped // limit:,}": f"{gallery}&after={skipped}",
        **{f"search for {word!r}": f"{gallery}&q={word}" for word in words},
    }
    with served(url) as address, httpx.Client(base_url=address, timeout=60) as client:
        works: dict[str, Callable[[], object]] = {
            f"HTTP: {what}": partial(_get, client, path) for what, path in asked.items() if _exists(client, path)
        }
        lines = [_line(what, work, rounds, 0, target) for what, work in works.items()]
        lines.append(_line("HTTP: dashboard", partial(_get, client, "/"), rounds, LOOK_SEC, target))
        lines.append(_line("HTTP: first look of /live", partial(_first_look, client), rounds, LOOK_SEC, target))
    return lines


def _exists(client: httpx.Client, path: str) -> bool:
    """Whether a page answers. The first answer may wait until the server has opened its search index."""
    return client.get(path).status_code != 404


def _line(what: str, work: Callable[[], object], rounds: int, pause: float, target: str) -> Line:
    times: list[float] = []
    work()
    for _ in range(rounds):
        time.sleep(pause)
        with timing(times):
            work()
    return value_line(what, times, "ms", target)


def _get(client: httpx.Client, path: str) -> None:
    client.get(path).raise_for_status()


def _first_look(client: httpx.Client) -> None:
    """Until the last part of the dashboard has come."""
    with client.stream("GET", "/live") as answer:
        next(line for line in answer.iter_lines() if line == LAST_PART)


# --- A worker beside it ------------------------------------------------------------------------------------------


def open_dashboard(engine: Engine, rounds: int, pictures: int) -> Line:
    """Pictures a second of a worker on this queue, with one open dashboard against none, in turns.

    The server runs in both turns; browsers draw on machines of their own, so a process that reads the streams stands
    for one.
    """
    # Imported here, since it loads torch.
    import ways

    from rococap.demo import MODEL
    from rococap.demo.phantoms import write_dataset
    from rococap.engines import Options

    recipe = Recipe(model=str(MODEL), max_new_tokens=64, dtype="float32")
    with tempfile.TemporaryDirectory(prefix="bench_pictures_") as folder, served(_url(engine)) as address:
        write_dataset(Path(folder), {"train": pictures})
        loaded = ways.load(recipe, Options(device="cpu", batch_size=16))
        numbers = iter(range(1_000_000))

        def turn(seen: bool) -> float:
            with _viewer(address) if seen else _nobody():
                return pictures / _caption(engine, Path(folder), f"turn-{next(numbers)}", recipe, loaded)

        turn(False)  # does not count, for whatever happens only once
        results = alternate(rounds, partial(turn, False), partial(turn, True))
    alone, beside = ([result[n] for result in results] for n in (0, 1))
    return ratio_line("worker beside one open dashboard, against none", alone, beside, "pictures/s", ">= 0.95")


def _url(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=False)


def _caption(engine: Engine, root: Path, run: str, recipe: Recipe, loaded: Any) -> float:
    """The seconds of a worker from the loaded model to the last stored caption of a new run."""
    from rococap.worker.benchmark import Ready
    from rococap.worker.process import work
    from rococap.worker.settings import Settings

    enqueue(engine, locate(str(root), ["train"]), ["train"], run=run, recipe=recipe)
    outcome = work(engine, Settings(run=run, self_check=False), load=lambda *_: Ready(loaded))
    assert not outcome.failed, outcome
    return outcome.seconds


@contextmanager
def _nobody() -> Iterator[None]:
    yield


@contextmanager
def _viewer(address: str) -> Iterator[None]:
    watching = SPAWN.Event()
    process = SPAWN.Process(target=_view, args=(address, watching), daemon=True)
    process.start()
    try:
        assert watching.wait(START_SEC), "the viewer saw nothing"
        yield
        assert process.is_alive()
    finally:
        process.kill()
        process.join()


def _view(address: str, watching: Event) -> None:
    """Does what the page of the dashboard does: follows the stream, and asks for the charts now and then."""
    with httpx.Client(base_url=address, timeout=None) as client, client.stream("GET", "/live") as answer:
        charts = 0.0
        for _ in answer.iter_lines():
            watching.set()
            if time.monotonic() - charts > CHARTS_SEC:
                charts = time.monotonic()
                client.get("/throughput").raise_for_status()
