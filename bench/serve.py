"""Measures `rococap serve`: against a worker and `transformers serve` with the same model, and over many requests."""

import argparse
import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

if __name__ == "__main__":
    # Moved to the end: queue.py here would shadow the standard library's.
    sys.path.append(sys.path.pop(0))
    os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}

import httpx
import psutil
import ways
from clients import Figures, Sent, drive
from forced_server import LENGTHS, LONGEST
from report import Line, alternate, ratio_line, show, value_line
from transformers.utils import logging as transformers_logging

from rococap.demo import MODEL
from rococap.demo.phantoms import HELD_OUT_SEEDS, draw, write_dataset
from rococap.engines import Engine, Options
from rococap.engines.openai import OpenAIEngine
from rococap.recipe import Recipe

RECIPE = Recipe(model=str(MODEL), dtype="float32")
BENCH = Path(__file__).resolve().parent
PARTS = ("worker", "transformers", "client", "memory")
OURS = ("-m", "rococap", "serve")
CLIENTS = (1, 8, 50)
PEERS_CLIENTS = 16
BATCH = 16
IN_FLIGHT = 2 * BATCH
MEMORY_EVERY = 1_000


def main() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    options, load = _options(), os.getloadavg()[0]
    measure = {"worker": _worker, "transformers": _transformers, "client": _client, "memory": _memory}
    lines: list[Line] = []
    for part in options.only.split(","):
        lines += measure[part](options)
    show(lines, f"{options.pictures} pictures, {options.rounds} rounds, load {load:.1f} before")


# --- parts -----------------------------------------------------------------------------------------------------


def _worker(options: argparse.Namespace) -> list[Line]:
    """Clients of the server against a whole worker, from the loaded model to the last stored caption."""
    requests = _for_captions(options.pictures)
    size = options.batch_size
    given = () if size is None else ("--batch-size", str(size))
    with _pictures(options.pictures) as root, _ours((*OURS, *given)) as port:
        engine = ways.load(RECIPE, Options(device="cpu", batch_size=size))
        work = _whole_worker(engine, root)
        works = [work, *(_clients(port, requests, n) for n in CLIENTS)]
        for each in works[:1] + works[-1:]:  # a first turn that does not count, for whatever happens only once
            each()
        rounds = alternate(options.rounds, *works)
    columns = list(zip(*rounds, strict=True))
    print(f"The worker takes {engine.batch_size} pictures at a time.")
    peer = [figures.per_sec for figures in columns[0]]
    lines = []
    for n, column in zip(CLIENTS, columns[1:], strict=True):
        target = ">= 0.9" if n == max(CLIENTS) else ""
        ours = [figures.per_sec for figures in column]
        lines += [
            ratio_line(f"{n} clients against a whole worker", peer, ours, "pictures/s", target),
            value_line(f"{n} clients: half are answered within", [1000 * one.p50 for one in column], "ms", ""),
            value_line(f"{n} clients: 99 in 100 within", [1000 * one.p99 for one in column], "ms", ""),
        ]
    return lines


def _transformers(options: argparse.Namespace) -> list[Line]:
    """The same conversations, sent by the same clients to both servers."""
    requests = _for_chat(options.pictures)
    with _ours() as port, _theirs() as other:
        works = [_clients(other, _named(requests, str(MODEL)), PEERS_CLIENTS)]
        works.append(_clients(port, _named(requests, MODEL.name), PEERS_CLIENTS))
        for each in works:
            each()
        rounds = alternate(options.rounds, *works)
    theirs, ours = ([figures.per_sec for figures in column] for column in zip(*rounds, strict=True))
    what = f"{PEERS_CLIENTS} clients of chat against transformers serve"
    return [ratio_line(what, theirs, ours, "answers/s", ">= 3")]


def _client(options: argparse.Namespace) -> list[Line]:
    """A worker with the engine openai and this server, against one with the model in its process, with captions as long
    as ROCOv2's and as many pictures at a time. It has more requests in flight than the server takes at once, so that
    the next pictures are read while the model works, as they are in a worker.
    """
    recipe = Recipe(model=str(MODEL), max_new_tokens=LONGEST, dtype="float32")
    ours = [str(BENCH / "forced_server.py"), "serve", "--max-new-tokens", str(LONGEST), "--batch-size", str(BATCH)]
    with _pictures(options.pictures) as root, _ours(ours) as port:
        local = ways.load(recipe, Options(device="cpu", batch_size=BATCH), LENGTHS)
        url = f"http://127.0.0.1:{port}/v1"
        to_server = Options(engine="openai", base_url=url, served_model=MODEL.name, batch_size=IN_FLIGHT)
        remote = OpenAIEngine(Recipe(model=str(MODEL), max_new_tokens=LONGEST), to_server)
        remote.load()
        works = [_whole_worker(engine, root) for engine in (local, remote)]
        for each in works:
            each()
        rounds = alternate(options.rounds, *works)
        remote.close()
    in_process, over_http = ([figures.per_sec for figures in column] for column in zip(*rounds, strict=True))
    what = f"a worker, {IN_FLIGHT} in flight, uneven lengths: over HTTP against the model in its process"
    return [ratio_line(what, in_process, over_http, "pictures/s", ">= 0.9")]


def _memory(options: argparse.Namespace) -> list[Line]:
    """Resident memory of the server after each thousand of many requests."""
    requests = _for_captions(MEMORY_EVERY)
    sizes = []
    with _ours() as port:
        process = _listening(port)
        for _ in range(options.requests // MEMORY_EVERY):
            drive(port, requests, max(CLIENTS))
            sizes.append(process.memory_info().rss / 1e6)
    tenth = max(1, len(sizes) // 10)
    lines = [value_line("memory after the first tenth of the requests", [sizes[tenth - 1]], "MB", "")]
    lines.append(value_line("memory at the end", [sizes[-1]], "MB", ""))
    return [*lines, value_line("growth from the first tenth to the end", [sizes[-1] / sizes[tenth - 1]], "", "<= 1.05")]


# --- what is measured ------------------------------------------------------------------------------------------


def _clients(port: int, requests: list[Sent], n: int) -> Callable[[], Figures]:
    # A single client would take too long for all of them.
    return lambda: drive(port, requests[: max(100, len(requests) * min(n, 8) // 8)], n)


def _whole_worker(engine: Engine, root: Path) -> Callable[[], Figures]:
    def run() -> Figures:
        with tempfile.TemporaryDirectory(prefix="bench_queue_") as folder:
            seconds, _ = ways.whole_worker(engine, root, Path(folder), engine.recipe)
        n = len(list(ways.pictures_of(root)))
        return Figures(n / seconds, 0.0, 0.0)

    return run


@contextmanager
def _pictures(n: int) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bench_serve_") as folder:
        write_dataset(Path(folder), {"train": n})
        yield Path(folder)


def _pngs(n: int) -> list[bytes]:
    files = []
    for seed in HELD_OUT_SEEDS["train"][:n]:
        file = BytesIO()
        draw(seed).image.save(file, "PNG")
        files.append(file.getvalue())
    return files


def _for_captions(n: int) -> list[Sent]:
    return [_form(png) for png in _pngs(n)]


def _form(png: bytes) -> Sent:
    request = httpx.Request("POST", "http://localhost", files={"image": ("scan.png", png, "image/png")})
    return "/v1/captions", request.read(), {"Content-Type": request.headers["content-type"]}


def _for_chat(n: int) -> list[list[dict[str, object]]]:
    question = {"type": "text", "text": RECIPE.prompt}
    urls = [f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in _pngs(n)]
    return [[{"type": "image_url", "image_url": {"url": url}}, question] for url in urls]


def _named(conversations: list[list[dict[str, object]]], model: str) -> list[Sent]:
    headers = {"Content-Type": "application/json"}
    bodies = [
        {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 64, "temperature": 0}
        for content in conversations
    ]
    return [("/v1/chat/completions", json.dumps(body).encode(), headers) for body in bodies]


# --- servers ---------------------------------------------------------------------------------------------------


@contextmanager
def _ours(command: Sequence[str] = OURS) -> Iterator[int]:
    recipe = ["--model", str(MODEL), "--dtype", "float32", "--device", "cpu", "--port", "0"]
    with _process([*command, *recipe]) as process:
        assert process.stdout is not None
        port = int(re.findall(r":(\d+)/", process.stdout.readline())[0])
        _wait_until_answers(f"http://127.0.0.1:{port}/healthz")
        yield port


@contextmanager
def _theirs() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = ["-m", "transformers.cli.transformers", "serve", str(MODEL), "--device", "cpu", "--dtype", "float32"]
    with _process([*command, "--port", str(port), "--log-level", "error"]):
        _wait_until_answers(f"http://127.0.0.1:{port}/health")
        yield port


@contextmanager
def _process(command: list[str]) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)


def _wait_until_answers(url: str) -> None:
    for _ in range(600):
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"{url} does not answer")


def _listening(port: int) -> psutil.Process:
    return next(psutil.Process(one.pid) for one in psutil.net_connections("tcp") if one.laddr.port == port and one.pid)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, in each of which all take a turn")
    parser.add_argument("--pictures", type=int, default=1_000, help="pictures to caption")
    parser.add_argument("--batch-size", type=int, help="pictures at a time, in `worker` [default: both choose]")
    parser.add_argument("--requests", type=int, default=20_000, help="requests after which memory is measured")
    return parser.parse_args()


if __name__ == "__main__":
    main()
