"""Runs: one recipe on one data set, with the model state that the run's first worker pinned."""

import json
import shlex
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
from rococap.queue.records import time_of
from rococap.recipe import Recipe, refuse_placeholders


@dataclass(frozen=True, slots=True)
class Run:
    """A run. `resolved` is the model state that it pinned (`EngineInfo.resolved`), with the version of the rules; None
    before its first worker.

    `columns` are those that its data set was registered with.
    """

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


def with_run(command: str, name: str) -> str:
    """The command line to paste that runs this command on this run."""
    return f"rococap {command}" + ("" if name == "default" else f" --run {shlex.quote(name)}")


def list_runs(conn: Connection) -> list[Run]:
    """Every run that was not deleted, oldest first."""
    return [_run(row) for row in execute(conn, _RUNS + "ORDER BY r.id").fetchall()]


def get_run(conn: Connection, name: str) -> Run:
    """The run called `name`. Raises RunError, listing the runs that exist, if there is none."""
    row = execute(conn, _RUNS + "WHERE r.name = ?", (name,)).one_or_none()
    if row is None:
        names = ", ".join(run.name for run in list_runs(conn))
        raise RunError(
            f"There is no run {name!r}. "
            + (f"Runs: {names}." if names else "Register one: rococap enqueue --split train")
        )
    return _run(row)


def find_run(conn: Connection, name: str | None) -> Run:
    """The run called `name`; if it is None, the only run there is, or else `default`.

    Raises RunError, listing the runs that exist, if there is no such run.
    """
    if name is not None:
        return get_run(conn, name)
    return only_or_default(list_runs(conn)) or get_run(conn, "default")


def only_or_default(runs: Sequence[Run]) -> Run | None:
    """The run that is meant when none is named: the one called `default`, or the only one; None if it is not clear."""
    if len(runs) == 1:
        return runs[0]
    return next((run for run in runs if run.name == "default"), None)


def refuse_deleted(conn: Connection, run: Run) -> None:
    """Raises RunError if the run has been deleted since it was looked up. While a writer holds `db.lock` on the run, it
    cannot be deleted.
    """
    if execute(conn, "SELECT deleted_at FROM runs WHERE id = ?", (run.id,)).scalar_one() is not None:
        raise RunError(f"Run {run.name!r} has been deleted. See: rococap runs")


def create_run(conn: Connection, name: str, dataset_id: int, recipe: Recipe, now: int | None = None) -> Run:
    """The run called `name`, created if it is new.

    Raises RunError if it exists with another recipe or data set, or if a new run's prompt contains a placeholder.
    """
    created = execute(
        conn,
        "INSERT INTO runs (name, dataset_id, recipe, recipe_hash, created_at) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT (name) DO NOTHING",
        (name, dataset_id, recipe.to_json(), recipe.hash, time_of(conn, now)),
    )
    if created.rowcount:
        _check_prompt(name, recipe)
    run = get_run(conn, name)
    if differences := run.recipe.differences(recipe):
        listed = "; ".join(f"{field}: {mine!r}, not {asked!r}" for field, (mine, asked) in differences.items())
        raise RunError(f"Run {name!r} has another recipe ({listed}). Give this one a name of its own: --run NAME")
    if run.dataset_id != dataset_id:
        raise RunError(
            f"Run {name!r} is on another data set ({_dataset(run)}). Give this one a name of its own: --run NAME"
        )
    return run


def _check_prompt(name: str, recipe: Recipe) -> None:
    try:
        refuse_placeholders(recipe.prompt)
    except ValueError as error:
        raise RunError(f"Run {name!r} cannot be created: {error}") from error


def pin(conn: Connection, run: Run, info: EngineInfo, *, accept_new_rules: bool = False) -> None:
    """Pins the model state that the run's recipe resolved to on its first worker, and the rules.

    A run without captions adopts this version's rules; one with captions does so only with `accept_new_rules`, and
    records it. Raises RunError for a worker whose model state differs from the pinned one.
    """
    mine = run.recipe.rules
    db.lock(conn, "runs", run.id)
    pin_first(conn, run, info.resolved() | {"rules": mine})
    check_pinned(conn, run, info, accept_new_rules=accept_new_rules)
    pinned = get_run(conn, run.name).resolved or {}
    if (rules := rules_of(pinned)) != mine:
        changed = pinned | {"rules": mine}
        if n := _n_captioned(conn, run):
            accepted = {"from": rules, "to": mine, "captions_before": n, "at": db.now(conn)}
            changed["accepted_rules"] = [*pinned.get("accepted_rules", []), accepted]
        execute(conn, "UPDATE runs SET resolved = ? WHERE id = ?", (json.dumps(changed, sort_keys=True), run.id))


def check_pinned(conn: Connection, run: Run, info: EngineInfo, *, accept_new_rules: bool = False) -> None:
    """Raises RunError if the worker's model state differs from the pinned one; does nothing if none is pinned yet."""
    mine = info.resolved()
    pinned = get_run(conn, run.name).resolved
    if pinned is None:
        return
    check_rules(conn, run, accept_new_rules=accept_new_rules)
    if differing := differences(pinned, mine):
        listed = "; ".join(f"{key}: {pinned[key]}, here {mine[key]}" for key in differing)
        raise RunError(
            f"Run {run.name!r} was started with another model state ({listed}), and a run never mixes two. "
            "Use the same engine (--engine), model and dtype, or enqueue a new run: rococap enqueue --run NAME"
        )


def differences(pinned: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys in which two model states differ, other than their rules. A key that only one of them has is ignored."""
    return [key for key in other if key in pinned and key not in _RULES_KEYS and other[key] != pinned[key]]


_RULES_KEYS = ("rules", "accepted_rules")


def rules_of(resolved: Mapping[str, Any]) -> int:
    """The version of the rules (`Recipe.rules`) that a run was started under, or has accepted since."""
    return int(resolved.get("rules", 1))


def check_rules(conn: Connection, run: Run, *, accept_new_rules: bool = False) -> None:
    """Raises RunError if continuing the run would mix captions made under different rules (`Recipe.rules`)."""
    pinned, mine = get_run(conn, run.name).resolved, run.recipe.rules
    rules = mine if pinned is None else rules_of(pinned)
    if rules > mine:
        raise RunError(
            f"Run {run.name!r} was started by a newer version of rococap, which has other rules for opening pictures, "
            f"quantising weights and ending captions ({rules}, here {mine}), and a run never mixes two. Upgrade "
            "rococap."
        )
    if rules < mine and not accept_new_rules and _n_captioned(conn, run):
        raise RunError(
            f"Run {run.name!r} was started under older rules for opening pictures, quantising weights and ending "
            f"captions ({rules}, here {mine}), and a run never mixes two. Caption its pictures again: rococap enqueue "
            f"--run NEW --from {run.name}; or continue, which its manifests will record: rococap worker --run "
            f"{run.name} --accept-new-rules"
        )


def _n_captioned(conn: Connection, run: Run) -> int:
    """How many captions the run has, or is about to have."""
    sql = "SELECT COALESCE(sum(n), 0) FROM tallies WHERE run_id = ? AND status IN ('done', 'leased')"
    return int(execute(conn, sql, (run.id,)).scalar_one())


def pin_first(conn: Connection, run: Run, resolved: Mapping[str, Any]) -> None:
    """Pins a model state for the run, unless one is pinned already."""
    pinned = json.dumps(resolved, sort_keys=True)
    execute(conn, "UPDATE runs SET resolved = ? WHERE id = ? AND resolved IS NULL", (pinned, run.id))


def find_runs(conn: Connection, names: Sequence[str]) -> list[Run]:
    """The runs called `names`, to be compared. Raises RunError if one does not exist or is named twice, or if they are
    not all on the same data set.
    """
    runs = [get_run(conn, name) for name in names]
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise RunError(f"Run {twice[0]!r} is named twice: name each run once.")
    for run in runs[1:]:
        if run.dataset_id != runs[0].dataset_id:
            raise RunError(
                f"Runs {runs[0].name!r} and {run.name!r} are on different data sets ({_dataset(runs[0])}, "
                f"{_dataset(run)}), so their pictures differ. Compare runs on the same one: see rococap runs --json"
            )
    return runs


def _dataset(run: Run) -> str:
    return at_revision(run.dataset, run.dataset_revision)
