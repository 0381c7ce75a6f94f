"""The parts of `gpu.py` that caption many pictures: how many a second, by which method and with how much help."""

import io
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import ways
from gpu_setting import Bench, Figures, plain_rotation, random_weights
from PIL.Image import Image

from rococap.data.images import open_picture
from rococap.demo.phantoms import SCHEMA
from rococap.engines import Prepared, Request
from rococap.worker import fetcher
from rococap.worker.dry_run import from_memory
from rococap.worker.telemetry import gpu_of

SAMPLE_SEC = 0.25
USUAL_ROWS = 128
CASE_SEC = 30.0
"""No case of captioning goes on for longer: it is broken off, and counts what it has done."""
MIDDLE = (0.25, 0.75)
"""The captions between these shares of all are made at the rate of a long run: at the end, rows are empty."""


def lengths(bench: Bench) -> list[int]:
    """Of the captions of one turn, in tokens."""
    scale = bench.scale
    return ways.uneven_lengths(scale.turn, scale.mean_length, scale.max_length)


# --- By method -------------------------------------------------------------------------------------------------


def throughput(bench: Bench) -> Iterator[Figures]:
    """Pictures a second of `generate`, one at a time and in static batches, and of the engine."""
    scale, forced = bench.scale, lengths(bench)
    side = scale.sides[0]
    yield {"case": "lengths", "turn": scale.turn, "mean": mean(forced), "longest": max(forced)}
    yield from _ours(bench, side, forced, [n for n in scale.many_rows if n <= max(bench.rows)])
    with plain_rotation(), random_weights(bench.device, ways):
        stock = ways.stock(bench.recipe)
        for size in (1, *scale.static):
            case = f"generate, {size} at a time"
            if reason := bench.too_late_for(20):
                yield {"case": case, "skipped": reason}
                continue
            pictures = bench.prepared(side, scale.alone if size == 1 else scale.turn)
            ways.static_batches(stock, pictures[:size], size, [2] * size)  # loads kernels
            with Watch(bench) as watch:
                _generate(bench, stock, pictures, size, forced, watch)
            yield {"case": case, "method": "generate", "side": side, "rows": size, **watch.figures()}


def _ours(bench: Bench, side: int, forced: Sequence[int], rows: Sequence[int]) -> Iterator[Figures]:
    engine = bench.engine
    ways.force(engine, forced)
    bench.use_graphs()
    for n in rows:
        case = f"ours, {n} at a time, {side} x {side}"
        if reason := bench.too_late_for(20):
            yield {"case": case, "skipped": reason}
            continue
        engine.batch_size = n
        pictures = bench.prepared(side, _enough(bench, n))
        from_memory(engine, pictures[: 2 * n], is_over=_after(2.0))  # loads kernels
        with Watch(bench) as watch:
            _caption(bench, pictures, forced, watch)
        graphs = len(bench.decoder._graphs._graphs)
        yield {"case": case, "method": "ours", "side": side, "rows": n, "graphs": graphs, **watch.figures()}


def _enough(bench: Bench, rows: int) -> int:
    """Pictures for a run of so many rows: whole turns, and at least three for each row."""
    turn = bench.scale.turn
    return turn * max(2, math.ceil(3 * rows / turn))


def _caption(bench: Bench, pictures: Sequence[Prepared], forced: Sequence[int], watch: "Watch") -> None:
    is_over = _after(min(CASE_SEC, bench.left()))
    _, completions = from_memory(bench.engine, pictures, watch.count, is_over)
    assert all(completion.failure is None for completion in completions), completions[0].failure
    watch.tokens = sum(forced[(completion.job_id - 1) % len(forced)] for completion in completions)


def _generate(
    bench: Bench, stock: ways.Stock, pictures: Sequence[Prepared], size: int, forced: Sequence[int], watch: "Watch"
) -> None:
    is_over = _after(min(CASE_SEC, bench.left()))
    for start in range(0, len(pictures), size):
        if is_over():
            return
        batch = pictures[start : start + size]
        ends = [forced[(picture.job_id - 1) % len(forced)] for picture in batch]
        ways.static_batches(stock, batch, size, ends)
        watch.count(start + len(batch))
        watch.tokens += sum(ends)


def _after(seconds: float) -> Callable[[], bool]:
    ends_at = time.monotonic() + seconds
    return lambda: time.monotonic() > ends_at


class Watch:
    """Times what happens inside, and samples meanwhile how busy the driver says that the GPU is."""

    def __init__(self, bench: Bench) -> None:
        self.tokens = 0
        self._bench = bench
        self._times: list[float] = []
        self._samples: list[float] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Watch":
        self._bench.synchronise()
        self._bench.forget_peak()
        self._thread.start()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._bench.synchronise()
        self.seconds = time.perf_counter() - self._started
        self._over.set()
        self._thread.join()

    def count(self, done: int) -> None:
        """Notes that so many pictures are done."""
        now = time.perf_counter()
        self._times += [now] * (done - len(self._times))

    def figures(self) -> Figures:
        done = len(self._times)
        first, last = (int(share * done) for share in MIDDLE)
        return {
            "pictures": done,
            "seconds": self.seconds,
            "pictures_per_sec": done / self.seconds,
            "middle_per_sec": self._rate(first, last),
            "tokens_per_sec": self.tokens / self.seconds,
            **self.of_device(),
        }

    def of_device(self) -> Figures:
        return {"gpu_busy": mean(self._samples) if self._samples else None, **self._bench.peak()}

    def _rate(self, first: int, last: int) -> float | None:
        """Pictures a second between two of them; None if they were done at once."""
        if last <= first or self._times[last] <= self._times[first]:
            return None
        return (last - first) / (self._times[last] - self._times[first])

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_SEC):
            busy = gpu_of(str(self._bench.device)).get("gpu_utilisation")
            if busy is not None:
                self._samples.append(busy)


# --- The whole worker ------------------------------------------------------------------------------------------


def worker(bench: Bench) -> Iterator[Figures]:
    """A whole worker, from Parquet files to stored captions, against the engine with all pictures prepared."""
    scale, engine, forced = bench.scale, bench.engine, lengths(bench)
    side, n = scale.sides[0], scale.turn * scale.worker_turns
    rows = min(scale.worker_rows, max(bench.rows))
    ways.force(engine, forced)
    bench.use_graphs()
    engine.batch_size = rows
    with tempfile.TemporaryDirectory(prefix="bench_gpu_") as folder:
        pngs = _encoded(bench.images(side, scale.turn))
        yield {"case": "preparing", **_preparing(bench, pngs)}
        yield from _whole(bench, _write(Path(folder) / "phantoms", pngs, n), n, rows, scale.preparers)


def _whole(bench: Bench, root: Path, n: int, rows: int, preparers: Sequence[int]) -> Iterator[Figures]:
    pictures = bench.prepared(bench.scale.sides[0], n)
    from_memory(bench.engine, pictures[: 2 * rows], is_over=_after(2.0))  # loads kernels
    with Watch(bench) as watch:
        _caption(bench, pictures, lengths(bench), watch)
    alone = watch.figures()
    yield {"case": "engine alone", "rows": rows, **alone}
    for threads in preparers:
        case = f"{threads} preparing"
        if reason := bench.too_late_for(5 + 1.5 * n / alone["pictures_per_sec"]):
            yield {"case": case, "skipped": reason}
            continue
        with (
            tempfile.TemporaryDirectory(prefix="bench_gpu_") as folder,
            patch.object(fetcher, "n_preparers", lambda device, threads=threads: threads),
            Watch(bench) as watch,
        ):
            seconds, working = ways.whole_worker(bench.engine, root, Path(folder), bench.recipe)
        yield {
            "case": case,
            "preparers": threads,
            "rows": rows,
            "pictures": n,
            "seconds": seconds,
            "pictures_per_sec": n / seconds,
            "worker_over_engine": n / seconds / alone["pictures_per_sec"],
            "model_share": working,
            **watch.of_device(),
        }


def _encoded(images: Sequence[Image]) -> list[bytes]:
    pngs = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        pngs.append(buffer.getvalue())
    return pngs


def _write(root: Path, pngs: Sequence[bytes], n: int) -> Path:
    """Writes a data set of n pictures, which repeat."""
    rows = [
        {
            "image": {"bytes": pngs[number % len(pngs)], "path": None},
            "image_id": f"PHANTOM_{number + 1:06}",
            "caption": "",
            "cui": [],
        }
        for number in range(n)
    ]
    (root / "data").mkdir(parents=True)
    table = pa.Table.from_pylist(rows, SCHEMA)
    pq.write_table(table, root / "data" / "train-00000-of-00001.parquet", row_group_size=100)
    return root


def _preparing(bench: Bench, pngs: Sequence[bytes]) -> Figures:
    """Milliseconds to decode and prepare a picture on one thread, with nothing beside it."""
    open_sec = prepare_sec = 0.0
    for png in pngs:
        started = time.perf_counter()
        picture = open_picture(png, 1)
        opened = time.perf_counter()
        bench.engine.prepare(0, Request([picture]))
        open_sec, prepare_sec = open_sec + opened - started, prepare_sec + time.perf_counter() - opened
    return {"open_ms": 1000 * open_sec / len(pngs), "prepare_ms": 1000 * prepare_sec / len(pngs), "pictures": len(pngs)}


# --- Other sizes of pictures -----------------------------------------------------------------------------------


def sizes(bench: Bench) -> Iterator[Figures]:
    """Pictures a second of the engine for the less usual sizes."""
    rows = max(n for n in bench.rows if n <= USUAL_ROWS)
    for side in bench.scale.sides[1:]:
        bench.forget_pictures()
        yield from _ours(bench, side, lengths(bench), [rows])
