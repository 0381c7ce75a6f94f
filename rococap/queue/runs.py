"""Runs: one recipe on one data set, and the model state that its first worker pinned."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from rococap import db
from rococap.data import STANDARD, Columns, at_revision
from rococap.db import execute
from rococap.engines import EngineInfo
from rococap.errors import RunError
from rococap.queue import runs as runs_module
from rococap.queue.records import time_of
from rococap.recipe import RULES, Recipe, refuse_placeholders


@dataclass(frozen=True, slots=True)
class Run:
    id: int
    name: str
    dataset_id: int
    dataset: str
    dataset_revision: str
    recipe: Recipe
    resolved: dict[str, Any] | None
    max_attempts: int
    paused: bool
    columns: Columns = STANDARD


_RUNS = (
    "SELECT r.id, r.name, r.dataset_id, d.name, d.revision, r.recipe, r.resolved, r.max_attempts, "
    "r.paused, d.columns FROM runs r JOIN datasets d ON d.id = r.dataset_id AND r.deleted_at IS NULL "
)


def _run(row: Sequence[Any]) -> Run:
    run_id, name, dataset_id, dataset, revision, recipe, resolved, max_attempts, paused, columns = row
    parsed = json.loads(resolved) if resolved else None
    return Run(
        *(run_id, name, dataset_id, dataset, revision, Recipe.from_json(recipe), parsed, max_attempts, bool(paused)),
        columns=Columns.from_json(columns),
    )


def list_runs(conn: Connection) -> list[Run]:
    return [_run(row) for row in execute(conn, _RUNS + "ORDER BY r.id").fetchall()]


def get_run(conn: Connection, name: str) -> Run:
    """The run of that name. Raises RunError, naming those that exist."""
    row = execute(conn, _RUNS + "WHERE r.name = ?", (name,)).one_or_none()
    if row is None:
        names = ", ".join(run.name for run in list_runs(conn))
        raise RunError(
            f"There is no run {name!r}. "
            + (f"Runs here: {names}." if names else "Register one: rococap enqueue --split train")
        )
    return _run(row)


def find_run(conn: Connection, name: str | None) -> Run:
    """The run of that name; without one, `default`, or the only run. Raises RunError, naming them."""
    if name is not None:
        return get_run(conn, name)
    runs = list_runs(conn)
    if len(runs) == 1:
        return runs[0]
    return get_run(conn, "default")


def refuse_deleted(conn: Connection, run: Run) -> None:
    """Raises RunError if the run was deleted since it was looked up. A writer that holds `db.lock` on it is safe from
    that until its transaction ends.
    """
    if execute(conn, "SELECT deleted_at FROM runs WHERE id = ?", (run.id,)).scalar_one() is not None:
        raise RunError(f"Run {run.name!r} was deleted meanwhile. See: rococap runs")


def create_run(conn: Connection, name: str, dataset_id: int, recipe: Recipe, now: int | None = None) -> Run:
    """The run of that name, made if it is new. Raises RunError if it exists with another recipe or data set, or if a
    new one's prompt holds what would have to be filled in for each picture.
    """
    made = execute(
        conn,
        "INSERT INTO runs (name, dataset_id, recipe, recipe_hash, created_at) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT (name) DO NOTHING",
        (name, dataset_id, recipe.to_json(), recipe.hash, time_of(conn, now)),
    )
    if made.rowcount:
        _check_prompt(name, recipe)
    run = get_run(conn, name)
    if differences := run.recipe.differences(recipe):
        told = "; ".join(f"{field}: {mine!r}, not {asked!r}" for field, (mine, asked) in differences.items())
        raise RunError(f"Run {name!r} has another recipe ({told}). Give this one a name of its own: --run NAME")
    if run.dataset_id != dataset_id:
        raise RunError(
            f"Run {name!r} is on another data set ({_dataset(run)}). Give this one a name of its own: --run NAME"
        )
    return run


def _check_prompt(name: str, recipe: Recipe) -> None:
    try:
        refuse_placeholders(recipe.prompt)
    except ValueError as error:
        raise RunError(f"Run {name!r} cannot be: {error}") from error


def pin(conn: Connection, run: Run, info: EngineInfo, *, accept_new_rules: bool = False) -> None:
    """Fixes what the run's recipe came to on its first worker. Raises RunError for a worker that differs.

    A run without captions takes new rules; one that has some does with `accept_new_rules` alone, and remembers it.
    """
    db.lock(conn, "runs", run.id)
    pin_first(conn, run, info.resolved())
    check_pinned(conn, run, info, accept_new_rules=accept_new_rules)
    pinned = get_run(conn, run.name).resolved or {}
    if (rules := rules_of(pinned)) != RULES:
        changed = pinned | {"rules": RULES}
        if n := _n_begun(conn, run):
            accepted = {"from": rules, "to": RULES, "captions_before": n, "at": db.now(conn)}
            changed["accepted_rules"] = [*pinned.get("accepted_rules", []), accepted]
        told = json.dumps(changed, sort_keys=True)
        execute(conn, "UPDATE runs SET resolved = ? WHERE id = ?", (told, run.id))


def check_pinned(conn: Connection, run: Run, info: EngineInfo, *, accept_new_rules: bool = False) -> None:
    """Raises RunError for a worker that differs from what is pinned, if anything is."""
    mine = info.resolved()
    pinned = get_run(conn, run.name).resolved
    if pinned is None:
        return
    check_rules(conn, run, accept_new_rules=accept_new_rules)
    if differing := differences(pinned, mine):
        told = "; ".join(f"{key}: {pinned[key]}, here {mine[key]}" for key in differing)
        raise RunError(
            f"Run {run.name!r} was started with another model state ({told}), and a run never mixes. "
            "Use the same engine (--engine), model and dtype, or enqueue a new run: rococap enqueue --run NAME"
        )


def differences(pinned: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What two model states differ in, apart from their rules. What only one of them knows is no difference."""
    return [key for key in other if key in pinned and key not in _OF_RULES and other[key] != pinned[key]]


_OF_RULES = ("rules", "accepted_rules")


def rules_of(resolved: Mapping[str, Any]) -> int:
    """Those that a run was begun under, or has accepted since."""
    return int(resolved.get("rules", 1))


def check_rules(conn: Connection, run: Run, *, accept_new_rules: bool = False) -> None:
    """Raises RunError if going on would mix captions that were made by different rules: see `rococap.recipe.RULES`."""
    pinned = get_run(conn, run.name).resolved
    rules = RULES if pinned is None else rules_of(pinned)
    if rules > RULES:
        raise RunError(
            f"Run {run.name!r} was begun by a newer rococap, which opens pictures by other rules ({rules}, here "
            f"{RULES}), and a run never mixes. Upgrade rococap."
        )
    if rules < RULES and not accept_new_rules and _n_begun(conn, run):
        raise RunError(
            f"Run {run.name!r} was begun under older rules of opening pictures and ending captions ({rules}, here "
            f"{RULES}), and a run never mixes. Caption its pictures anew: rococap enqueue --run NEW --from {run.name}; "
            f"or go on, which its manifests will tell: rococap worker --run {run.name} --accept-new-rules"
        )


def _n_begun(conn: Connection, run: Run) -> int:
    """Captions that a run has, or is about to have."""
    sql = "SELECT COALESCE(sum(n), 0) FROM tallies WHERE run_id = ? AND status IN ('done', 'leased')"
    return int(execute(conn, sql, (run.id,)).scalar_one())


def pin_first(conn: Connection, run: Run, resolved: Mapping[str, Any]) -> None:
    """Pins what a run came to, unless it is pinned already."""
    pinned = json.dumps(resolved, sort_keys=True)
    execute(conn, "UPDATE runs SET resolved = ? WHERE id = ? AND resolved IS NULL", (pinned, run.id))


def find_runs(conn: Connection, names: Sequence[str]) -> list[Run]:
    runs = [runs_module.get_run(conn, name) for name in names]
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise RunError(f"Run {twice[0]!r} is named twice: name each run once.")
    for run in runs[1:]:
        if run.dataset_id != runs[0].dataset_id:
            raise RunError(
                f"Runs {runs[0].name!r} and {run.name!r} are on different data sets ({_dataset(runs[0])}, "
                f"{_dataset(run)}): their pictures are not the same. Compare runs of one: see rococap runs --json"
            )
    return runs


def _dataset(run: Run) -> str:
    return at_revision(run.dataset, run.dataset_revision)
