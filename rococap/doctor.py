"""Looks at this machine, this database, the data sets and models of its runs. Changes nothing, downloads nothing.

Each check reads in transactions of its own, so that running workers make no false alarm and wait as little as may be.
torch is imported by the one check that asks for it.
"""

import json
import os
import shlex
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sqlalchemy import Connection, event
from sqlalchemy import Engine as Database
from sqlalchemy.exc import DBAPIError

from rococap import db, queue, tables
from rococap.data import HUB_ID, SPLITS, Shard, at_revision, cached, datasets, parse_name
from rococap.db import execute, transaction
from rococap.errors import RococapError
from rococap.queue import Run
from rococap.worker import spool


class Verdict(StrEnum):
    OK = "ok"
    WARN = "warning"
    FAIL = "failed"
    #: not looked at, for the reason given
    SKIP = "skipped"


OK, WARN, FAIL, SKIP = Verdict

Finding = tuple[Verdict, str]


@dataclass(frozen=True, slots=True)
class Check:
    """What one look found, in one line; of a warning or failure it names the next step. Names may repeat."""

    name: str
    verdict: Verdict
    found: str


OLDEST_SQLITE = (3, 37)  # STRICT tables
OLDEST_POSTGRESQL = 10  # what psycopg speaks to; the SQL itself needs 9.6
ROOMY, LEAST = 2 * 10**9, 100 * 10**6
"""Bytes free beside the database, below which to warn and to fail."""

NVIDIA = "/dev/nvidia0"

FIRST_USE = "Register pictures first: rococap enqueue --split train"
BUG = "This is a bug of rococap: please report it."
START_ANEW = (
    "Stop the workers and go back to a copy of it, or begin a new one: rococap enqueue with the same options, then "
    "rococap restore results_medical/checkpoint_*.csv"
)


def examine(database: Database) -> Iterator[Check]:
    """Every check in turn, as it is done. What needs something that failed is skipped; an absent file stays absent.

    Made for an engine that was opened as it is (`connect(create=False, force=True)`). Under SQLite's DELETE journal
    a commit waits until the read before it is over: integrity takes about five seconds a million pictures, the
    others one.
    """
    if database.dialect.name == "sqlite":
        # Even if it goes between our look and the connection.
        event.listen(database, "do_connect", db.refuse_absent)
    in_order = {""}
    for name, needs, look in _CHECKS:
        if needs not in in_order:
            yield Check(name, SKIP, f"Not looked at: see {needs}.")
            continue
        failed = False
        for verdict, found in _guarded(look, database):
            failed |= verdict is FAIL
            yield Check(name, verdict, " ".join(found.splitlines()))
        if not failed:
            in_order.add(name)


def _guarded(look: Callable[..., Iterator[Finding]], database: Database, *more: object) -> Iterator[Finding]:
    """What it finds; what it stumbles over is a finding too."""
    try:
        yield from look(database, *more)
    except DBAPIError as error:
        yield FAIL, db.explain(error, database.url)
    except (RococapError, OSError, ValueError) as error:  # ValueError: a cached file that is no JSON, say
        yield FAIL, str(error)


def _listed(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --- The machine and the file ----------------------------------------------------------------------------------


def _file(database: Database) -> Path | None:
    """The SQLite file, or None for a server."""
    return Path(database.url.database or "").resolve() if database.dialect.name == "sqlite" else None


def _database(database: Database) -> Iterator[Finding]:
    path = _file(database)
    yield _postgresql(database) if path is None else _sqlite(database, path)


def _sqlite(database: Database, path: Path) -> Finding:
    build, is_safe = f"SQLite {sqlite3.sqlite_version}", db.wal_is_safe(sqlite3.sqlite_version_info)
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        return FAIL, f"{build} is too old: use a Python whose SQLite is 3.37 or newer, or PostgreSQL."
    if not path.exists():
        return FAIL, f"There is no file {path} yet ({build}). {FIRST_USE}"
    with transaction(database) as conn:
        journal = execute(conn, "PRAGMA journal_mode").scalar_one()
        synchronous = ("off", "normal", "full", "extra")[execute(conn, "PRAGMA synchronous").scalar_one()]
    if journal == "wal" and not is_safe:
        return WARN, (
            f"{build} has a bug that can damage files in WAL mode, as {path} is, when several processes write. Stop "
            "the workers, then use a Python with SQLite 3.51.3 (or 3.50.7, 3.44.6), or leave the mode: "
            f"sqlite3 {shlex.quote(str(path))} 'PRAGMA journal_mode = DELETE'"
        )
    return OK, f"{build}{'' if is_safe else ' (with the WAL bug)'}, journal {journal}, synchronous {synchronous}"


def _postgresql(database: Database) -> Finding:
    settings = "current_setting('server_version'), current_setting('server_version_num'), current_setting('fsync')"
    with transaction(database) as conn:
        version, number, fsync = execute(conn, f"SELECT {settings}").one()
        ahead = db.now(conn) / 1000 - time.time()
    found = f"PostgreSQL {version}, fsync {fsync}, its clock {ahead:+.1f} s from this machine's"
    if int(number) // 10_000 < OLDEST_POSTGRESQL:
        return FAIL, f"{found}. It is too old: use {OLDEST_POSTGRESQL} or newer."
    if fsync != "on":
        return WARN, f"{found}. A power cut could damage it: set fsync = on in postgresql.conf."
    return OK, found


def _file_system(database: Database) -> Iterator[Finding]:
    path = _file(database)
    if path is None:
        yield SKIP, "The server looks after its own."
        return
    kind = db.file_system(path.parent, db.mounts())
    if kind in db.NETWORK_FILE_SYSTEMS:
        found = f"{path} is on a network file system ({kind}), where SQLite's locks do not hold and captions are lost."
        yield FAIL, f"{found} Stop the workers and move it to a local disk, or use PostgreSQL."
    else:
        yield OK, f"{path.parent} is on {kind or 'a file system of a kind that this machine does not tell'}"


def _disk(database: Database) -> Iterator[Finding]:
    path = _file(database)
    if path is None:
        yield SKIP, "The server looks after its own."
        return
    free = shutil.disk_usage(path.parent).free
    size = path.stat().st_size if path.exists() else 0
    found = f"{free / 1e6:,.0f} MB free in {path.parent}"
    if free < LEAST:
        yield FAIL, f"{found}. Free some space, or captions cannot be stored."
    elif free < max(ROOMY, size):  # a migration makes a copy
        yield WARN, f"{found}, for a database of {size / 1e6:,.0f} MB, its journal and a copy. Free some space."
    else:
        yield OK, f"{found}, for a database of {size / 1e6:,.0f} MB"


def _device(database: Database) -> Iterator[Finding]:
    try:
        import torch

        from rococap.engines import checkpoint
        from rococap.engines.decoding import dtype_name

        gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        told = [
            (gpu, torch.cuda.get_device_properties(gpu), dtype_name(checkpoint.choose_dtype("auto", gpu)))
            for gpu in gpus
        ]
    except (ImportError, OSError, RuntimeError) as error:
        yield FAIL, f"PyTorch cannot be used ({error}). Install it again: pip install --force-reinstall torch"
        return
    for gpu, properties, dtype in told:
        yield OK, f"{gpu}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, dtype auto is {dtype}"
    if not told and os.path.exists(NVIDIA):
        found = f"There is a GPU ({NVIDIA}), and torch {torch.__version__} cannot use it."
        yield WARN, f"{found} Update the driver, or install the build of torch for the CUDA that nvidia-smi shows."
    elif not told:
        dtype = dtype_name(checkpoint.choose_dtype("auto", torch.device("cpu")))
        yield OK, f"CPU, dtype auto is {dtype}. Captioning with Qwen2-VL takes minutes a picture: for trying things."


# --- The tables ------------------------------------------------------------------------------------------------


def _schema(database: Database) -> Iterator[Finding]:
    with transaction(database) as conn:
        found = db.found_schema(conn)
    if found is None:
        yield FAIL, f"The database is empty. {FIRST_USE}"
    elif found != tables.SCHEMA:
        yield FAIL, str(db.wrong_schema(database.url, found))
    else:
        yield OK, found


def _integrity(database: Database) -> Iterator[Finding]:
    path = _file(database)
    if path is None:
        yield SKIP, f"PostgreSQL's own tool does this: pg_amcheck {database.url.database}"
        return
    with transaction(database) as conn:
        damage = execute(conn, "PRAGMA integrity_check(1)").scalar_one()
    if damage != "ok":
        yield FAIL, f"{path} is damaged ({damage.splitlines()[-1]}). {START_ANEW}"
        return
    with transaction(database) as conn:
        broken = execute(conn, "PRAGMA foreign_key_check").fetchall()
    if broken:
        table, _, parent, _ = broken[0]
        yield FAIL, f"{len(broken)} references are broken, of {table} to {parent} first. {START_ANEW}"
    else:
        yield OK, "whole, and every reference holds"


# One statement is one snapshot.
_TALLIED_AND_COUNTED = (
    "SELECT r.name, n.split, n.status, sum(n.tallied), sum(n.counted) FROM "
    "(SELECT run_id, split, status, n AS tallied, 0 AS counted FROM tallies UNION ALL "
    "SELECT run_id, split, status, 0, count(*) FROM jobs GROUP BY run_id, split, status UNION ALL "
    "SELECT j.run_id, j.split, c.flags, 0, count(*) FROM captions c JOIN jobs j ON j.id = c.job_id "
    "WHERE c.flags <> '' GROUP BY j.run_id, j.split, c.flags) AS n "
    "JOIN runs r ON r.id = n.run_id AND r.deleted_at IS NULL "
    "GROUP BY r.name, n.split, n.status ORDER BY r.name, n.split, n.status"
)


def _tallies(database: Database) -> Iterator[Finding]:
    with transaction(database) as conn:
        rows = execute(conn, _TALLIED_AND_COUNTED).fetchall()
    tallied: Counter[tuple[str, str, str]] = Counter()
    counted: Counter[tuple[str, str, str]] = Counter()
    for run, split, told, n_tallied, n_counted in rows:
        for status in _statuses(told):
            tallied[run, split, status] += int(n_tallied)
            counted[run, split, status] += int(n_counted)
    drift = [
        f"{' '.join(key)}: {n} tallied, {counted[key]} there" for key, n in sorted(tallied.items()) if n != counted[key]
    ]
    if drift:
        yield FAIL, f"The counts of `rococap status` are wrong ({_listed(drift)}). {BUG}"
    else:
        yield OK, f"agree with {sum(n for (_, _, status), n in counted.items() if status in _STATES)} jobs"


_STATES = {state.value for state in tables.JobState}


def _statuses(told: str) -> list[str]:
    """A state, or a tallied flag, as it is; of a caption's flags each as it is tallied."""
    if told in _STATES or told.startswith(queue.flagged("")):
        return [told]
    return [queue.flagged(flag) for flag in told.split(",")]


def _pictures(conn: Connection, where: str) -> str:
    """How many jobs there are such, and the first of them; empty if there are none."""
    rows = execute(
        conn,
        "SELECT i.image_id, r.name, count(*) OVER () FROM jobs j JOIN images i ON i.id = j.image_id "
        f"JOIN runs r ON r.id = j.run_id WHERE {where} ORDER BY j.id LIMIT 3",
    ).fetchall()
    return f"{rows[0][2]} ({', '.join(f'{image_id} of run {run}' for image_id, run, _ in rows)})" if rows else ""


def _leases(database: Database) -> Iterator[Finding]:
    with transaction(database) as conn:
        stray = _pictures(
            conn,
            "j.lease_id IS NOT NULL "
            "AND NOT EXISTS (SELECT 1 FROM leases l WHERE l.id = j.lease_id AND l.state = 'open')",
        )
        n_open, n_empty, n_overdue = execute(
            conn,
            "SELECT count(*), count(CASE WHEN NOT EXISTS (SELECT 1 FROM jobs WHERE lease_id = leases.id) THEN 1 END), "
            "count(CASE WHEN expires_at <= ? THEN 1 END) FROM leases WHERE state = 'open'",
            (db.now(conn),),
        ).one()
    if stray:
        step = "Free each: rococap cancel --image-id ID, then rococap retry --image-id ID"
        yield FAIL, f"Pictures that are leased under no open lease, for ever: {stray}. {BUG} {step}"
    if n_empty:
        yield FAIL, f"Open leases that hold nothing: {n_empty}. {BUG} Once their time is over: rococap reap"
    if n_overdue:
        yield WARN, f"Leases whose time is over and whose pictures nobody freed: {n_overdue}. Free them: rococap reap"
    if not (stray or n_empty or n_overdue):
        yield OK, f"{n_open} open"


def _captions(database: Database) -> Iterator[Finding]:
    caption = "EXISTS (SELECT 1 FROM captions c WHERE c.job_id = j.id)"
    with transaction(database) as conn:
        without = _pictures(conn, f"j.status = 'done' AND NOT {caption}")
        early = _pictures(conn, f"j.status <> 'done' AND {caption}")
        n = execute(conn, "SELECT count(*) FROM captions").scalar_one()
    if without:
        yield FAIL, f"Pictures that are done without a caption: {without}. {BUG} {START_ANEW}"
    if early:
        yield FAIL, f"Pictures that have a caption and are not done: {early}. {BUG} {START_ANEW}"
    if not (without or early):
        yield OK, f"{n}, one for each picture that is done"


# --- What the runs need ----------------------------------------------------------------------------------------


def _each(
    database: Database, key: Callable[[Run], Hashable], look: Callable[[Database, Run], Iterator[Finding]]
) -> Iterator[Finding]:
    """What `look` finds for each data set or model, told apart by `key`; a run that is finished needs none."""
    with transaction(database) as conn:
        runs = queue.list_runs(conn)
        needed = {key(run) for run in runs if any(queue.unfinished(conn, run, SPLITS).values())}
    if not runs:
        yield SKIP, f"There is no run yet. {FIRST_USE}"
    for one, run in {key(run): run for run in runs}.items():
        for verdict, found in _guarded(look, database, run):
            if verdict is FAIL and one not in needed:
                yield WARN, f"{found} (No run has work left for it.)"
            else:
                yield verdict, found


def _datasets(database: Database) -> Iterator[Finding]:
    return _each(database, lambda run: run.dataset_id, _dataset)


def _dataset(database: Database, run: Run) -> Iterator[Finding]:
    sql = "SELECT path, split, n_rows, n_row_groups, size, digest FROM shards WHERE dataset_id = ? ORDER BY id"
    with transaction(database) as conn:
        known = {row[0]: Shard(*row) for row in execute(conn, sql, (run.dataset_id,)).fetchall()}
    name, config = parse_name(run.dataset)
    root = Path(name)
    if run.dataset_revision:
        files = {path: cached(name, path, run.dataset_revision, "dataset") for path in known}
        absent = [path for path, file in files.items() if file is None]
        if absent:
            yield _not_cached("dataset", name, run.dataset_revision, _listed(absent))
            return
        root = next((Path(file.removesuffix(path)) for path, file in files.items() if file), root)
    splits = dict.fromkeys(shard.split for shard in known.values())
    there = {shard.path: shard for split in splits for shard in datasets.find_shards(root, split, config, run.columns)}
    altered = [path for path in known if path in there and there[path] != known[path]]
    gone = [path for path in known if path not in there]
    found = at_revision(run.dataset, run.dataset_revision)
    again = "Register it anew: rococap enqueue with the same options"
    if altered or gone:
        told = "; ".join(f"{what}: {_listed(paths)}" for what, paths in (("altered", altered), ("gone", gone)) if paths)
        yield FAIL, f"{found} is not what was registered ({told}). {again}"
    elif known.keys() != there.keys() or not known:
        yield WARN, f"{found} was registered in part: an enqueue runs, or broke off. {again}"
    else:
        yield OK, f"{found}: as registered, {len(known)} shards"


def _models(database: Database) -> Iterator[Finding]:
    return _each(database, lambda run: (run.recipe.model, run.recipe.revision), _model)


def _model(database: Database, run: Run) -> Iterator[Finding]:
    name, revision = run.recipe.model, run.recipe.revision
    if Path(name).is_dir():
        if (Path(name) / "config.json").is_file():
            yield OK, name
        else:
            yield FAIL, f"The folder {name} holds no model (there is no config.json). Restore it."
    elif not HUB_ID.fullmatch(name):
        yield FAIL, f"There is no model folder {name}. Restore it, or enqueue a run with another: --run NAME --model …"
    elif missing := _missing_of_model(name, revision):
        yield _not_cached("model", name, revision, missing)
    else:
        yield OK, f"{at_revision(name, revision)}, in the cache"


def _missing_of_model(name: str, revision: str) -> str:
    """What loading it would have to download; empty if nothing."""
    if cached(name, "config.json", revision, "model") is None:
        return "config.json"
    for weights in ("model.safetensors", "pytorch_model.bin"):
        if cached(name, weights, revision, "model"):
            return ""
        if index := cached(name, f"{weights}.index.json", revision, "model"):
            parts = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
            return _listed(part for part in parts if cached(name, part, revision, "model") is None)
    return "model.safetensors"


def _not_cached(kind: str, name: str, revision: str, missing: str) -> Finding:
    from huggingface_hub import constants

    found = f"{at_revision(name, revision)} is not whole in the cache {constants.HF_HUB_CACHE} (it lacks {missing})"
    if constants.HF_HUB_OFFLINE:
        return FAIL, f"{found}, and HF_HUB_OFFLINE is set. Unset it, or copy the cache from where there is a network."
    command = f"hf download --repo-type {kind} --revision {revision} {name}"
    return WARN, f"{found}. A worker downloads it; to have it now: {command}"


# --- The spool -------------------------------------------------------------------------------------------------


def _spool(database: Database) -> Iterator[Finding]:
    folder = spool.folder_of(database.url)
    n = sum(spool.waiting(folder).values())
    if n:
        yield WARN, f"{n} captions wait in {folder}. The next worker of their database stores them: rococap worker"
    else:
        yield OK, f"nothing waits in {folder}"


# Name, what must be in order first, and the look.
_CHECKS: tuple[tuple[str, str, Callable[[Database], Iterator[Finding]]], ...] = (
    ("database", "", _database),
    ("file system", "", _file_system),
    ("disk", "", _disk),
    ("schema", "database", _schema),
    ("integrity", "database", _integrity),
    ("tallies", "schema", _tallies),
    ("leases", "schema", _leases),
    ("captions", "schema", _captions),
    ("device", "", _device),
    ("data set", "schema", _datasets),
    ("model", "schema", _models),
    ("spool", "", _spool),
)
