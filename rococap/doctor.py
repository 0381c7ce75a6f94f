"""Checks this machine, the database, and the data sets and models of its runs. Changes and downloads nothing.

Each check reads in short transactions of its own, so that running workers neither cause false alarms nor wait long.
Only the check of the device imports torch.
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
from rococap.data import HUB_ID, SPLITS, at_revision, cached, datasets, parse_name
from rococap.db import execute, transaction
from rococap.errors import RococapError
from rococap.figures import counted
from rococap.queue import Run
from rococap.worker import spool


class Verdict(StrEnum):
    OK = "ok"
    WARN = "warning"
    FAIL = "failed"
    #: not checked, for the reason given
    SKIP = "skipped"


OK, WARN, FAIL, SKIP = Verdict

Finding = tuple[Verdict, str]


@dataclass(frozen=True, slots=True)
class Check:
    """A result of one check: `found` is one line, which for a warning or failure names the next step.

    A check may have several results, which then share its name.
    """

    name: str
    verdict: Verdict
    found: str


OLDEST_SQLITE = (3, 37)  # has STRICT tables
OLDEST_POSTGRESQL = 10  # supported by psycopg; the SQL itself needs 9.6
WARN_BELOW, FAIL_BELOW = 2 * 10**9, 100 * 10**6
"""Bytes free on the database's disk below which the check warns, and below which it fails."""

NVIDIA = "/dev/nvidia0"

FIRST_USE = "Register pictures first: rococap enqueue --split train"
BUG = "This is a bug in rococap: please report it."
START_OVER = (
    "Stop the workers and restore a backup of the database, or start a new one: rococap enqueue with the same options, "
    "then rococap restore results_medical/checkpoint_*.csv"
)


def examine(database: Database) -> Iterator[Check]:
    """Runs all checks in turn and yields their results. A check that needs one that failed is skipped.

    `database` must be opened with `connect(create=False, force=True)`; a missing file is not created. Errors are
    reported as failed checks, not raised. Under SQLite's DELETE journal, commits wait while a check reads: about five
    seconds per million pictures for integrity, one second for the others.
    """
    if database.dialect.name == "sqlite":
        # Even if the file disappears between a check and the connection, it is not created again.
        event.listen(database, "do_connect", db.refuse_absent)
    passed = {""}
    for name, needs, check in _CHECKS:
        if needs not in passed:
            yield Check(name, SKIP, f"Not checked: see {needs}.")
            continue
        failed = False
        for verdict, found in _guarded(check, database):
            failed |= verdict is FAIL
            yield Check(name, verdict, " ".join(found.splitlines()))
        if not failed:
            passed.add(name)


def _guarded(check: Callable[..., Iterator[Finding]], database: Database, *args: object) -> Iterator[Finding]:
    """The findings of a check; an error that it raises is reported as a failure."""
    try:
        yield from check(database, *args)
    except DBAPIError as error:
        yield FAIL, db.explain(error, database.url)
    except (RococapError, OSError, ValueError) as error:  # ValueError: for example, a cached file that is not JSON
        yield FAIL, str(error)


def _listed(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


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
        return FAIL, f"The file {path} does not exist yet ({build}). {FIRST_USE}"
    with transaction(database) as conn:
        journal = execute(conn, "PRAGMA journal_mode").scalar_one()
        synchronous = ("off", "normal", "full", "extra")[execute(conn, "PRAGMA synchronous").scalar_one()]
    if journal == "wal" and not is_safe:
        return WARN, (
            f"{build} has a bug that can damage files in WAL mode, such as {path}, when several processes write. Stop "
            "the workers, then use a Python with SQLite 3.51.3 (or 3.50.7, 3.44.6), or turn WAL off: "
            f"sqlite3 {shlex.quote(str(path))} 'PRAGMA journal_mode = DELETE'"
        )
    return OK, f"{build}{'' if is_safe else ' (with the WAL bug)'}, journal {journal}, synchronous {synchronous}"


def _postgresql(database: Database) -> Finding:
    settings = "current_setting('server_version'), current_setting('server_version_num'), current_setting('fsync')"
    with transaction(database) as conn:
        version, number, fsync = execute(conn, f"SELECT {settings}").one()
        ahead = db.now(conn) / 1000 - time.time()
    found = f"PostgreSQL {version}, fsync {fsync}, clock {ahead:+.1f} s from this machine's"
    if int(number) // 10_000 < OLDEST_POSTGRESQL:
        return FAIL, f"{found}. This version is too old: use {OLDEST_POSTGRESQL} or newer."
    if fsync != "on":
        return WARN, f"{found}. A power failure could damage the database: set fsync = on in postgresql.conf."
    return OK, found


def _file_system(database: Database) -> Iterator[Finding]:
    path = _file(database)
    if path is None:
        yield SKIP, "The server looks after its own."
        return
    kind = db.file_system(path.parent, db.mounts())
    if kind in db.NETWORK_FILE_SYSTEMS:
        found = f"{path} is on a network file system ({kind}), where SQLite's locks fail and captions get lost."
        yield FAIL, f"{found} Stop the workers and move it to a local disk, or use PostgreSQL."
    else:
        yield OK, f"{path.parent} is on {kind or 'a file system of unknown type'}"


def _disk(database: Database) -> Iterator[Finding]:
    path = _file(database)
    if path is None:
        yield SKIP, "The server looks after its own."
        return
    free = shutil.disk_usage(path.parent).free
    size = path.stat().st_size if path.exists() else 0
    found = f"{free / 1e6:,.0f} MB free in {path.parent}"
    if free < FAIL_BELOW:
        yield FAIL, f"{found}, too little to store captions. Free some space."
    elif free < max(WARN_BELOW, size):  # a migration copies the database
        yield WARN, f"{found}, for a database of {size / 1e6:,.0f} MB, its journal and a copy. Free some space."
    else:
        yield OK, f"{found}, for a database of {size / 1e6:,.0f} MB"


def _device(database: Database) -> Iterator[Finding]:
    try:
        import torch

        from rococap.engines import checkpoint
        from rococap.engines.decoding import dtype_name

        gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        devices = [
            (gpu, torch.cuda.get_device_properties(gpu), dtype_name(checkpoint.choose_dtype("auto", gpu)))
            for gpu in gpus
        ]
    except (ImportError, OSError, RuntimeError) as error:
        yield FAIL, f"PyTorch cannot be used ({error}). Reinstall it: pip install --force-reinstall torch"
        return
    for gpu, properties, dtype in devices:
        yield OK, f"{gpu}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, dtype auto is {dtype}"
    if not devices and os.path.exists(NVIDIA):
        found = f"There is a GPU ({NVIDIA}), but torch {torch.__version__} cannot use it."
        yield WARN, f"{found} Update the driver, or install the torch build for the CUDA version that nvidia-smi shows."
    elif not devices:
        dtype = dtype_name(checkpoint.choose_dtype("auto", torch.device("cpu")))
        yield OK, f"CPU, dtype auto is {dtype}. Qwen2-VL takes minutes per picture on a CPU: use it for trials only."


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
        yield SKIP, f"Use PostgreSQL's own tool: pg_amcheck {database.url.database}"
        return
    with transaction(database) as conn:
        damage = execute(conn, "PRAGMA integrity_check(1)").scalar_one()
    if damage != "ok":
        yield FAIL, f"{path} is damaged ({damage.splitlines()[-1]}). {START_OVER}"
        return
    with transaction(database) as conn:
        broken = execute(conn, "PRAGMA foreign_key_check").fetchall()
    if broken:
        table, _, parent, _ = broken[0]
        yield FAIL, f"{len(broken)} foreign keys are broken, the first from {table} to {parent}. {START_OVER}"
    else:
        yield OK, "no damage, all foreign keys valid"


# A single statement, so that both counts are from the same snapshot.
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
    for run, split, label, n_tallied, n_counted in rows:
        for status in _statuses(label):
            tallied[run, split, status] += int(n_tallied)
            counted[run, split, status] += int(n_counted)
    drift = [
        f"{' '.join(key)}: {n} tallied, {counted[key]} counted"
        for key, n in sorted(tallied.items())
        if n != counted[key]
    ]
    if drift:
        yield FAIL, f"The counts of `rococap status` are wrong ({_listed(drift)}). {BUG}"
    else:
        yield OK, f"agree with {sum(n for (_, _, status), n in counted.items() if status in _STATES)} jobs"


_STATES = {state.value for state in tables.JobState}


def _statuses(label: str) -> list[str]:
    """The names under which `label` is tallied: a state or a tallied flag is one already, a caption's flags are a list
    of several.
    """
    if label in _STATES or label.startswith(queue.flagged("")):
        return [label]
    return [queue.flagged(flag) for flag in label.split(",")]


def _pictures(conn: Connection, where: str) -> str:
    """The number of jobs that meet the condition, with the first three of them; empty if there are none."""
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
        step = "Free each of them: rococap cancel --image-id ID, then rococap retry --image-id ID"
        yield FAIL, f"Leased pictures without an open lease, which will never be freed: {stray}. {BUG} {step}"
    if n_empty:
        yield FAIL, f"Open leases without pictures: {n_empty}. {BUG} Close them once they have expired: rococap reap"
    if n_overdue:
        yield WARN, f"Expired leases whose pictures are not freed yet: {n_overdue}. Free them: rococap reap"
    if not (stray or n_empty or n_overdue):
        yield OK, f"{n_open} open"


def _captions(database: Database) -> Iterator[Finding]:
    caption = "EXISTS (SELECT 1 FROM captions c WHERE c.job_id = j.id)"
    with transaction(database) as conn:
        without = _pictures(conn, f"j.status = 'done' AND NOT {caption}")
        early = _pictures(conn, f"j.status <> 'done' AND {caption}")
        n = execute(conn, "SELECT count(*) FROM captions").scalar_one()
    if without:
        yield FAIL, f"Pictures that are done but have no caption: {without}. {BUG} {START_OVER}"
    if early:
        yield FAIL, f"Pictures that have a caption but are not done: {early}. {BUG} {START_OVER}"
    if not (without or early):
        yield OK, f"{n}, one for each picture that is done"


# --- What the runs need ----------------------------------------------------------------------------------------


def _each(
    database: Database, key: Callable[[Run], Hashable], check: Callable[[Database, Run], Iterator[Finding]]
) -> Iterator[Finding]:
    """The findings of `check` for each distinct data set or model, identified by `key`. One that only finished runs use
    is no longer needed, so its failures become warnings.
    """
    with transaction(database) as conn:
        runs = queue.list_runs(conn)
        needed = {key(run) for run in runs if any(queue.unfinished(conn, run, SPLITS).values())}
    if not runs:
        yield SKIP, f"There is no run yet. {FIRST_USE}"
    for identity, run in {key(run): run for run in runs}.items():
        for verdict, found in _guarded(check, database, run):
            if verdict is FAIL and identity not in needed:
                yield WARN, f"{found} (No unfinished run needs it.)"
            else:
                yield verdict, found


def _datasets(database: Database) -> Iterator[Finding]:
    return _each(database, lambda run: run.dataset_id, _dataset)


def _dataset(database: Database, run: Run) -> Iterator[Finding]:
    with transaction(database) as conn:
        registered = queue.registered_shards(conn, run.dataset_id)
    name, config = parse_name(run.dataset)
    copy = queue.root_here()
    root = copy or Path(name)
    if run.dataset_revision and copy is None:
        files = {path: cached(name, path, run.dataset_revision, "dataset") for path in registered}
        absent = [path for path, file in files.items() if file is None]
        if absent:
            yield _not_cached("dataset", name, run.dataset_revision, _listed(absent))
            return
        root = next((Path(file.removesuffix(path)) for path, file in files.items() if file), root)
    splits = dict.fromkeys(shard.split for shard in registered.values())
    on_disk = {
        shard.path: shard for split in splits for shard in datasets.find_shards(root, split, config, run.columns)
    }
    if copy:
        queue.refuse_other(copy, run, registered, on_disk)
    altered = [path for path in registered if path in on_disk and on_disk[path] != registered[path]]
    missing = [path for path in registered if path not in on_disk]
    dataset = at_revision(run.dataset, run.dataset_revision)
    step = "Register it again: rococap enqueue with the same options"
    if altered or missing:
        kinds = (("altered", altered), ("missing", missing))
        changes = "; ".join(f"{kind}: {_listed(paths)}" for kind, paths in kinds if paths)
        yield FAIL, f"{dataset} differs from what was registered ({changes}). {step}"
    elif registered.keys() != on_disk.keys() or not registered:
        yield WARN, f"{dataset} is only partly registered: an enqueue is running or was interrupted. {step}"
    else:
        where = f" in {copy}" if copy else ""
        yield OK, f"{dataset}{where}: as registered, {counted(len(registered), 'shard')}"


def _models(database: Database) -> Iterator[Finding]:
    return _each(database, lambda run: (run.recipe.model, run.recipe.revision), _model)


def _model(database: Database, run: Run) -> Iterator[Finding]:
    name, revision = run.recipe.model, run.recipe.revision
    if Path(name).is_dir():
        if (Path(name) / "config.json").is_file():
            yield OK, name
        else:
            yield FAIL, f"The folder {name} holds no model (it has no config.json). Restore it."
    elif not HUB_ID.fullmatch(name):
        step = "Restore it, or enqueue a run with another model: rococap enqueue --run NAME --model …"
        yield FAIL, f"The model folder {name} does not exist. {step}"
    elif missing := _missing_of_model(name, revision):
        yield _not_cached("model", name, revision, missing)
    else:
        yield OK, f"{at_revision(name, revision)}, in the cache"


def _missing_of_model(name: str, revision: str) -> str:
    """The files that loading the model would have to download; empty if there are none."""
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

    found = f"{at_revision(name, revision)} is incomplete in the cache {constants.HF_HUB_CACHE} (it lacks {missing})"
    if constants.HF_HUB_OFFLINE:
        return FAIL, f"{found}, and HF_HUB_OFFLINE is set. Unset it, or copy the cache from a machine with network."
    command = f"hf download --repo-type {kind} --revision {revision} {name}"
    return WARN, f"{found}. A worker will download it; to download it now: {command}"


# --- The spool -------------------------------------------------------------------------------------------------


def _spool(database: Database) -> Iterator[Finding]:
    folder = spool.folder_of(database.url)
    n = sum(spool.waiting(folder).values())
    if n:
        yield (
            WARN,
            f"{n} captions are waiting in {folder}. The next worker on their database stores them: rococap worker",
        )
    else:
        yield OK, f"nothing is waiting in {folder}"


# Name of the check, name of the check that must pass first, and the function.
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
