"""Measures what a browser waits for over a large queue: pages of the gallery, searches and the status, as queries and
over HTTP; what the search index costs, and what an open dashboard costs a worker.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))  # moved to the end: queue.py here would shadow the standard library's

import browsing
import server
from report import Line, show, value_line
from rows import RUN_NAME, SPLIT, caption, fill_many
from sizes import timing
from sqlalchemy import Engine

from rococap import db, queue
from rococap.web import gallery
from rococap.web.gallery import Query
from rococap.web.index import Index
from rococap.web.marks import MARKS

TEXTS = 10_000
"""How many different captions there are."""
EVERY = 100_000
"""One caption in so many contains RARE."""
RARE, COMMON = "pneumatosis", "axial"
LIMIT = 24
TARGET = "< 100"


def main() -> None:
    options = _options()
    load = os.getloadavg()[0]
    lines = _on_postgresql(options) if options.postgres else _on_sqlite(options)
    show(lines, f"{options.rows:,} jobs, {options.rounds} rounds, load {load:.1f} before")
    print("Missed: " + ("; ".join(line.what for line in lines if line.missed) or "none"))


def _on_sqlite(options: argparse.Namespace) -> list[Line]:
    with tempfile.TemporaryDirectory(prefix="bench_web_") as folder:
        lines = _measure(f"sqlite:///{folder}/queue.db", options)
        for what, name in (("index", "queue.db.search"), ("queue's database", "queue.db")):
            lines.append(value_line(f"size of the {what}", [Path(folder, name).stat().st_size / 1e6], "MB", ""))
    return lines


def _on_postgresql(options: argparse.Namespace) -> list[Line]:
    with server.started() as running:
        return _measure(running.create(), options)


def _measure(url: str, options: argparse.Namespace) -> list[Line]:
    engine = db.connect(url)
    fill(engine, options.rows)
    index = Index(engine, MARKS)
    began = time.perf_counter()
    while (status := index.update(5.0)).state != "ready":
        assert status.state == "filling", status
        print(f"{status.done:,} of {status.total:,} after {time.perf_counter() - began:.0f} s", flush=True)
    lines = [value_line("filling the index", [time.perf_counter() - began], "s", "")]
    if engine.dialect.name == "postgresql":
        with engine.connect() as conn:
            conn.exec_driver_sql("VACUUM ANALYZE")  # which autovacuum would do within a minute
    lines.append(_line("following a queue that is idle", index.update, options.rounds, ""))
    lines += [_line(what, work, options.rounds, TARGET) for what, work in _works(engine, index, options.rows).items()]
    index.close()
    skipped = _skipped(options.rows)
    lines += browsing.pages(url, options.rounds, skipped, LIMIT, (COMMON, RARE, "nowhere"), TARGET)
    if options.turns:
        lines.append(browsing.open_dashboard(engine, options.turns, options.pictures))
    engine.dispose()
    return lines


def _skipped(rows: int) -> int:
    """How many pictures there are before page 10,000, or before the middle of a smaller queue."""
    return min(10_000 * LIMIT, rows // 2)


def _line(what: str, work: Callable[[], object], rounds: int, target: str) -> Line:
    times: list[float] = []
    for _ in range(rounds):
        with timing(times):
            work()
    return value_line(what, times, "ms", target)


def _works(engine: Engine, index: Index, rows: int) -> dict[str, Callable[[], object]]:
    with db.transaction(engine) as conn:
        runs = [queue.get_run(conn, RUN_NAME)]
    skipped = _skipped(rows)

    def page(after: str = "", **query: object) -> Callable[[], object]:
        wanted = Query(SPLIT, **query)  # type: ignore[arg-type]
        return lambda: gallery.page(engine, index, runs, wanted, after=after, limit=LIMIT)

    def deep(name: str) -> str:
        with index.reading() as conn:
            sql = f"SELECT value, image_id FROM {index.documents.schema}keys WHERE list = ? "
            row = db.execute(
                conn,
                sql + "ORDER BY value, image_id LIMIT 1 OFFSET ?",
                (index.lists(conn, runs[0], SPLIT)[name], skipped),
            ).one()
        return f"{row[0]!r}:{row[1]}"

    def dashboard() -> None:
        with db.transaction(engine) as conn:
            queue.runs_seen(conn)
            queue.list_workers(conn)
            queue.list_leases(conn)

    far = str(skipped)
    return {
        "gallery, page 1": page(),
        f"gallery, page {skipped // LIMIT:,}": page(far),
        "by score, page 1": page(sort="rouge_l", descending=True),
        f"by score, page {skipped // LIMIT:,}": page(deep("rouge_l"), sort="rouge_l"),
        f"by length, page {skipped // LIMIT:,}": page(deep("length"), sort="length"),
        "search for a common word": page(words=COMMON),
        f"search for a common word, page {skipped // LIMIT:,}": page(far, words=COMMON),
        "search for a rare word": page(words=RARE),
        "search for a word that is nowhere": page(words="nowhere"),
        "search for a common phrase": page(words='"right lobe"'),
        "search for a common and a rare word": page(words=f"{COMMON} {RARE}"),
        "search for a common word, by score": page(words=COMMON, sort="rouge_l"),
        "search for a rare word, by score": page(words=RARE, sort="rouge_l"),
        "filter by a modality": page(modality="CT"),
        "filter by a rare flag": page(flag="loop"),
        "filter by a flag, by score": page(flag="blank", sort="rouge_l"),
        "filter by an uncommon flag, by score": page(flag="replaced", sort="rouge_l"),
        "filter by a flag, a word and a range of scores": page(flag="blank", words=COMMON, score="rouge_l", least=0.9),
        "filter by a wide range of scores": page(far, score="rouge_l", least=0.1),
        "filter by failures": page(failed=True),
        "status for the dashboard": dashboard,
    }


def fill(engine: Engine, rows: int) -> None:
    """A queue of `rows` jobs, nine of ten of which are done: with texts, concepts, flags and scores."""
    fill_many(engine, rows - rows * 9 // 10, done=rows * 9 // 10)
    source = random.Random(1)
    texts = [(n, caption(source), caption(source)) for n in range(TEXTS)]
    every = min(EVERY, rows // 10)
    pool = "(SELECT {} FROM bench_texts t WHERE t.id = {} % " + str(TEXTS) + ")"
    with db.transaction(engine, write=True) as conn:
        db.execute(conn, "CREATE TABLE bench_texts (id integer PRIMARY KEY, original text, generated text)")
        db.execute(conn, "INSERT INTO bench_texts VALUES (?, ?, ?)", texts)
        for statement in (
            f"UPDATE images SET caption = {pool.format('t.original', 'images.id')}, "
            "cui = CASE WHEN id / 3 * 3 = id THEN 'C0040405' ELSE 'C1306645' END",
            f"UPDATE captions SET text = {pool.format('t.generated', 'captions.job_id * 7')}, "
            f"flags = CASE WHEN job_id / {every} * {every} = job_id THEN 'loop' "
            "WHEN job_id / 50 * 50 = job_id THEN 'blank' WHEN job_id / 149 * 149 = job_id THEN 'replaced' ELSE '' END",
            f"UPDATE captions SET text = text || ' {RARE}' WHERE job_id / {every} * {every} = job_id",
            "INSERT INTO scores (job_id, metric, digest, value) SELECT job_id, 'overlap', 'x', "
            "'{\"rouge_l\": 0.' || (job_id * 7919 - job_id * 7919 / 9973 * 9973) || '}' FROM captions",
            "DROP TABLE bench_texts",
        ):
            db.execute(conn, statement.replace("%", "%%") if engine.dialect.name != "sqlite" else statement)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="jobs in the queue")
    parser.add_argument("--rounds", type=int, default=15, help="times that each query is made")
    parser.add_argument("--turns", type=int, default=5, help="turns of a worker with and without an open dashboard")
    parser.add_argument("--pictures", type=int, default=512, help="pictures that the worker captions in each turn")
    parser.add_argument("--postgres", action="store_true", help="measure on PostgreSQL instead of SQLite")
    return parser.parse_args()


if __name__ == "__main__":
    main()
