"""Data sets, their pictures and runs of another database: found here or added, and refused if they are others."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from rococap import db, queue
from rococap.data import Columns, at_revision
from rococap.db import execute, transaction
from rococap.errors import RunError
from rococap.progress import Progress
from rococap.queue import Part, Run
from rococap.transfer.rows import Row, insert, insert_one, pages, select, translated

_SHARD = ("split", "n_rows", "n_row_groups", "size", "digest")


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The data sets and runs here, by their ids in the other database."""

    datasets: Mapping[int, int]
    runs: Mapping[int, Run]


def merge_runs(read: Connection, conn: Connection, source: str) -> Catalogue:
    """Finds or adds the data sets and runs of a database. Raises RunError, field by field, for a run that differs."""
    datasets = {row["id"]: _dataset(read, conn, source, row) for row in select(read, "datasets", "1 = 1 ORDER BY x.id")}
    runs = {run.id: _run(read, conn, source, run, datasets) for run in queue.list_runs(read)}
    for theirs, ours in runs.items():
        _record_parts(read, conn, theirs, ours)
    return Catalogue(datasets, runs)


def refusal(source: str, what: str, differences: Sequence[str], why: str) -> RunError:
    return RunError(
        f"{source} was not merged: {what} ({'; '.join(differences)}), and {why}. Merge it into another "
        f"database: rococap --db URL merge {shlex.quote(source)}"
    )


# --- Data sets -------------------------------------------------------------------------------------------------


def _dataset(read: Connection, conn: Connection, source: str, theirs: Row) -> int:
    name = at_revision(theirs["name"], theirs["revision"])
    same = select(conn, "datasets", "x.name = ? AND x.revision = ?", (theirs["name"], theirs["revision"]))
    ours = same[0] if same else _elsewhere(read, conn, theirs)
    if ours is None:
        return insert_one(conn, "datasets", translated("datasets", theirs, {}))
    columns, here = Columns.from_json(theirs["columns"]), Columns.from_json(ours["columns"])
    differences = [f"columns: {columns}, not {here}"] if columns.differs(here) else []
    known = _shards(conn, ours["id"])
    for path, shard in _shards(read, theirs["id"]).items():
        differences += [
            f"{path}: {field} {shard[field]}, not {known[path][field]}"
            for field in _SHARD
            if path in known and shard[field] != known[path][field]
        ]
    if differences:
        why = "captions of other pictures are never mixed"
        raise refusal(source, f"its data set {name} is not the one here", differences, why)
    return int(ours["id"])


def _elsewhere(read: Connection, conn: Connection, theirs: Row) -> Row | None:
    """The data set here with the same files, if the other one is a folder: each machine may have it at another path."""
    wanted = {path: [shard[field] for field in _SHARD] for path, shard in _shards(read, theirs["id"]).items()}
    for ours in select(conn, "datasets", "x.revision = ? ORDER BY x.id", ("",)) if theirs["revision"] == "" else []:
        here = {path: [shard[field] for field in _SHARD] for path, shard in _shards(conn, ours["id"]).items()}
        shared = wanted.keys() & here.keys()
        if shared and all(wanted[path] == here[path] for path in shared):
            return ours
    return None


def _shards(conn: Connection, dataset_id: int) -> dict[str, Row]:
    return {row["path"]: row for row in select(conn, "shards", "x.dataset_id = ? ORDER BY x.id", (dataset_id,))}


def merge_images(read: Connection, database: Database, datasets: Mapping[int, int], progress: Progress) -> int:
    """Adds the pictures of splits, or of shards, that are new here; returns how many.

    All of a split in one transaction, because `enqueue` assumes that a registered shard has all of its pictures.
    """
    n = 0
    for theirs, ours in datasets.items():
        shards = _shards(read, theirs)
        for split in sorted({row["split"] for row in shards.values()}):
            n += _images(read, database, theirs, ours, split, list(shards.values()), progress)
    return n


def _images(
    read: Connection, database: Database, theirs: int, ours: int, split: str, shards: Sequence[Row], progress: Progress
) -> int:
    with transaction(database) as conn:
        known = _shards(conn, ours)
    if all(shard["path"] in known for shard in shards if shard["split"] == split):
        return 0
    total, done, added = sum(row["n_rows"] for row in shards if row["split"] == split), 0, 0
    with transaction(database, write=True) as conn:
        db.take_turns(conn)
        db.lock(conn, "datasets", ours)
        known, new = _shards(conn, ours), {}
        for shard in shards:
            if shard["split"] == split and shard["path"] not in known:
                new[shard["id"]] = insert_one(conn, "shards", translated("shards", shard, {}, dataset_id=ours))
        # The unary plus keeps SQLite from using another index: the rows are needed in order of id.
        for page in pages(read, "images", "+x.dataset_id = ? AND x.split = ?", (theirs, split)):
            ids = {"shards": new, "datasets": {theirs: ours}}
            rows = [translated("images", row, ids) for row in page if row["shard_id"] in new]
            added += insert(conn, "images", rows, "ON CONFLICT (dataset_id, split, image_id) DO NOTHING")
            done += len(page)
            progress(f"{split}: pictures", done, total)
    return added


def image_ids(conn: Connection, dataset_id: int, split: str, names: Sequence[str]) -> dict[str, tuple[int, str]]:
    """The id here and the original caption of pictures of a split, by their ids in the data set."""
    sql = (
        "SELECT image_id, id, caption FROM images WHERE dataset_id = ? AND split = ? "
        f"AND image_id IN ({db.marks(names)})"
    )
    rows = execute(conn, sql, (dataset_id, split, *names)).fetchall() if names else []
    return {row[0]: (row[1], row[2]) for row in rows}


# --- Runs ------------------------------------------------------------------------------------------------------


def _run(read: Connection, conn: Connection, source: str, theirs: Run, datasets: Mapping[int, int]) -> Run:
    (row,) = select(read, "runs", "x.id = ?", (theirs.id,))
    known = select(conn, "runs", "x.name = ?", (theirs.name,))
    if not known:
        # Whether a run is paused is up to whoever works here.
        insert_one(conn, "runs", translated("runs", row, {"datasets": datasets}, paused=0))
        return queue.get_run(conn, theirs.name)
    db.lock(conn, "runs", known[0]["id"])
    ours = queue.get_run(conn, theirs.name)
    differences = _differences(theirs, ours)
    if ours.dataset_id != datasets[theirs.dataset_id]:
        differences.append(_other_dataset(read, conn, theirs, ours))
    if differences:
        raise refusal(
            source, f"its run {theirs.name!r} differs from the one here", differences, "a run never mixes two"
        )
    changed = (_joined(theirs.resolved, ours.resolved), max(theirs.max_attempts, ours.max_attempts))
    if changed != (known[0]["resolved"], ours.max_attempts):
        execute(conn, "UPDATE runs SET resolved = ?, max_attempts = ? WHERE id = ?", (*changed, ours.id))
    return queue.get_run(conn, theirs.name)


def _other_dataset(read: Connection, conn: Connection, theirs: Run, ours: Run) -> str:
    there, here = (at_revision(run.dataset, run.dataset_revision) for run in (theirs, ours))
    found = f"data set: {there}, not {here}"
    are_folders = theirs.dataset_revision == ours.dataset_revision == ""
    if are_folders and not _splits_of(read, theirs.dataset_id) & _splits_of(conn, ours.dataset_id):
        found += (
            ", which have no split in common, so nothing shows that they are one data set: if they are, first merge a "
            "database that has splits of both"
        )
    return found


def _splits_of(conn: Connection, dataset_id: int) -> set[str]:
    return {shard["split"] for shard in _shards(conn, dataset_id).values()}


def _differences(theirs: Run, ours: Run) -> list[str]:
    found = [
        f"{name}: {there!r}, not {here!r}" for name, (there, here) in theirs.recipe.differences(ours.recipe).items()
    ]
    if theirs.resolved is not None and ours.resolved is not None:
        there, here = theirs.resolved, ours.resolved
        found += [f"{key}: {there[key]}, not {here[key]}" for key in queue.differences(here, there)]
        if queue.rules_of(there) != queue.rules_of(here):
            found.append(f"rules: {queue.rules_of(there)}, not {queue.rules_of(here)}")
    return found


def _joined(theirs: dict[str, Any] | None, ours: dict[str, Any] | None) -> str | None:
    """What both databases know of the model state, as JSON; where both know something, it is the same."""
    if theirs is None and ours is None:
        return None
    joined = {**(theirs or {}), **(ours or {})}
    accepted = [one for state in (theirs, ours) for one in (state or {}).get("accepted_rules", [])]
    if accepted:
        once = {json.dumps(one, sort_keys=True): one for one in accepted}
        joined["accepted_rules"] = [once[key] for key in sorted(once, key=lambda key: (once[key]["at"], key))]
    return json.dumps(joined, sort_keys=True)


def _record_parts(read: Connection, conn: Connection, theirs: int, ours: Run) -> None:
    """Records which parts of each split the run will have after the merge."""
    here = _splits(conn, ours.id)
    for split, parts in _parts(read, theirs).items():
        if split not in here or queue.parts_of(conn, ours, split):
            queue.record_parts(conn, ours.id, split, parts)


def forget_parts(read: Connection, conn: Connection, catalogue: Catalogue) -> None:
    """Forgets the parts of splits that the other database has whole, once the pictures are here: another merge may have
    recorded parts until then.
    """
    for theirs, ours in catalogue.runs.items():
        for split, parts in _parts(read, theirs).items():
            if not parts:
                queue.forget_parts(conn, ours.id, split)


def _parts(read: Connection, run_id: int) -> dict[str, list[Part]]:
    """The parts that the run has, by split; none of a split that it has whole."""
    of_split: dict[str, list[Part]] = {split: [] for split in _splits(read, run_id)}
    for row in select(read, "parts", "x.run_id = ?", (run_id,)):
        of_split.setdefault(row["split"], []).append(Part(row["number"], row["n_parts"]))
    return of_split


def _splits(conn: Connection, run_id: int) -> set[str]:
    """The splits of which the run has pictures."""
    sql = "SELECT DISTINCT split FROM tallies WHERE run_id = ?"
    return {row[0] for row in execute(conn, sql, (run_id,)).fetchall()}
