"""What happens to a run in weeks, in a moment: captions, failures, crashes, verdicts, edits, studies, at random."""

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

from small_engine import INFO
from sqlalchemy import Connection, Engine

from rococap import db, queue, review
from rococap.engines import Completion, Failure
from rococap.queue import Claim, Run, Timing
from rococap.review import Answers, Form, studies
from rococap.tables import metadata

TTL = 1_000


def live(database: Engine, run: Run, chance: random.Random, *, until: int = 10, start: int = 0) -> None:
    """A few workers that complete, fail, release and die, for `until` claims; no lease is open at the end."""
    now = start
    workers = [_worker(database, chance, now) for _ in range(chance.randint(1, 3))]
    for _ in range(until):
        now += chance.randint(1, 50)
        with db.transaction(database, write=True) as conn:
            queue.wake(conn, now=now)
            lane = chance.choice([queue.NORMAL, queue.NORMAL, queue.NORMAL, queue.SUSPECTS, queue.SOLO])
            worker, most = chance.choice(workers), chance.randint(1, 6)
            lease = queue.claim(conn, worker, run.id, "train", most, ttl_ms=TTL, lane=lane, now=now)
            if lease is not None:
                _end(conn, lease, chance, now + 1)
    with db.transaction(database, write=True) as conn:
        for worker in workers:
            if chance.random() < 0.5:
                queue.stop_worker(conn, worker, now=now)


def _worker(database: Engine, chance: random.Random, now: int) -> int:
    with db.transaction(database, write=True) as conn:
        uuid = f"{chance.getrandbits(128):032x}"
        return queue.register_worker(conn, uuid, f"host{chance.randint(1, 2)}", 1, INFO, self_check="{}", now=now)


def _end(conn: Connection, lease: Claim, chance: random.Random, now: int) -> None:
    jobs = list(lease.jobs)
    chance.shuffle(jobs)
    if chance.random() < 0.15:
        queue.crash(conn, lease.id, now=now)
        return
    kinds = {job.id: chance.choices(["done", "failed", "later", "left"], [8, 1, 1, 1])[0] for job in jobs}
    done = [job for job in jobs if kinds[job.id] == "done"]
    text = f"A caption of {chance.randint(0, 9)}."
    made = [Completion(job.id, text if chance.random() < 0.9 else "", new_tokens=chance.randint(1, 9)) for job in done]
    if made:
        queue.complete(conn, lease, made, timing=Timing(decode_ms=chance.random() * 100), now=now)
    for kind, is_transient in (("failed", False), ("later", True)):
        if failed := {id: Failure("corrupt", f"{chance.random()}", is_transient) for id in kinds if kinds[id] == kind}:
            queue.fail(conn, lease, failed, now=now)
    if left := [id for id in kinds if kinds[id] == "left"]:
        queue.release(conn, lease, left, now=now)


def judge(database: Engine, run: Run, chance: random.Random, pictures: Sequence[str], now: int = 5_000) -> None:
    """Verdicts, and edits that are undone, of those of these pictures that are captioned."""
    for job in _captioned(database, run, pictures):
        with db.transaction(database, write=True) as conn:
            if chance.random() < 0.5:
                review.add_review(conn, run, job, chance.choice(["ann", "bob"]), "minor", errors=["side"], now=now)
            if chance.random() < 0.5:
                edit = review.edit(conn, run, job, "ann", f"Edited {chance.random()}.", seen=None, now=now)
                if chance.random() < 0.5:
                    review.undo(conn, run, edit.id, "bob", now=now)
            if chance.random() < 0.5:
                row = (job, "cider_d", "dd", json.dumps({"cider_d": chance.random()}))
                db.execute(conn, "INSERT INTO scores VALUES (?, ?, ?, ?)", row)


def study(database: Engine, run: Run, name: str, chance: random.Random) -> None:
    """A study of one picture, which two readers read; its key may be opened before."""
    form = Form()
    with db.transaction(database, write=True) as conn:
        options: dict[str, Any] = {"n_pictures": 1, "n_readers": 2, "seed": 3, "form": form, "modality": lambda _: "CT"}
        made = studies.new_study(conn, name, [run], "train", with_original=True, now=6_000, **options)
        for reader in ("ann", "bob"):
            studies.join(conn, made, reader, now=6_001)
        studies.rate(conn, made, "ann", 1, Answers(preference=1), shown_at=6_002, now=6_003)
        if chance.random() < 0.5:
            studies.rate(conn, made, "ann", 1, Answers(preference=2), shown_at=6_002, now=6_004)
        studies.unblind(conn, made, "bob", now=6_005)


def _captioned(database: Engine, run: Run, pictures: Sequence[str]) -> list[int]:
    sql = (
        "SELECT i.image_id, c.job_id FROM captions c JOIN jobs j ON j.id = c.job_id JOIN images i ON i.id = j.image_id "
        "WHERE j.run_id = ? ORDER BY c.job_id"
    )
    with db.transaction(database) as conn:
        return [job for image_id, job in db.execute(conn, sql, (run.id,)).fetchall() if image_id in pictures]


def hash_pictures(database: Engine, chance: random.Random) -> None:
    with db.transaction(database, write=True) as conn:
        sql = "INSERT INTO image_hashes SELECT id, 'dhash-16', image_id FROM images WHERE 1 = 1 ON CONFLICT DO NOTHING"
        db.execute(conn, sql)


# --- What a database holds -------------------------------------------------------------------------------------

OF_THIS_DATABASE = {"id", "finished_at", "checkpoint", "lease_id", "origin_uuid", "origin_id", "slot"}
"""Columns of ids, and of when and where a row came into the database. A foreign key is the row that it points to."""


def contents(database: Engine) -> dict[str, list[tuple]]:
    """All rows of each table without the ids of this database: a foreign key is the row that it points to."""
    known: dict[str, dict[int, tuple]] = {}
    found: dict[str, list[tuple]] = {}
    with db.transaction(database) as conn:
        for table in metadata.sorted_tables:
            names = [column.name for column in table.columns]
            targets = {key.parent.name: key.column.table.name for key in table.foreign_keys}
            order = ", ".join(column.name for column in table.primary_key)
            rows = db.execute(conn, f"SELECT {', '.join(names)} FROM {table.name} ORDER BY {order}").fetchall()
            here = known.setdefault(table.name, {})
            for values in rows:
                row = dict(zip(names, values, strict=True))
                key = row.get("id", row.get("job_id"))
                here[key] = tuple(_shown(table.name, row, targets, known))
            found[table.name] = sorted(
                (tuple(_shown(table.name, dict(zip(names, values, strict=True)), targets, known)) for values in rows),
                key=repr,
            )
        tallies = db.execute(
            conn,
            "SELECT r.name, t.split, REPLACE(t.status, 'waiting', 'pending'), CAST(sum(t.n) AS INTEGER) FROM tallies t "
            "JOIN runs r ON r.id = t.run_id GROUP BY 1, 2, 3 HAVING sum(t.n) <> 0",
        )
        found["tallies"] = sorted(map(tuple, tallies.fetchall()))
    return found


def _shown(table: str, row: dict, targets: dict[str, str], known: dict[str, dict[int, tuple]]) -> Iterator[Any]:
    if row.get("status") == "waiting":  # for how long is up to each database
        row = row | {"status": "pending", "not_before": None}
    for name, value in row.items():
        if name in targets and not (table == "jobs" and name == "lease_id"):
            yield None if value is None else known[targets[name]][value]
        elif name not in OF_THIS_DATABASE and (table, name) != ("runs", "created_at"):
            yield value
    if table == "leases":
        yield row["origin_id"] or row["id"]
