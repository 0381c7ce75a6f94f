"""Commands that only look: status, runs, failures, leases, workers."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from sqlalchemy import Engine as Database

from rococap import db, queue
from rococap.cli.operate import delete_run
from rococap.cli.options import (
    SHOWN_FAILURES,
    cli,
    db_option,
    echo_json,
    for_this_queue,
    json_option,
    open_database,
    run_option,
    say,
    splits_option,
    with_run,
)
from rococap.cli.tables import ago, as_table, duration, percent, within_80
from rococap.recipe import Recipe

SHOWN_PROCESS = 16  # characters


# --- status ----------------------------------------------------------------------------------------------------


@cli.command("status")
@click.option("--watch", is_flag=True, help="Refresh every two seconds until Ctrl-C.")
@json_option
@db_option
def status_command(watch: bool, as_json: bool) -> None:
    """Where every run and split stands, and which workers live."""
    database = open_database()
    if as_json:
        echo_json(_status_json(database))
    elif watch:
        context = click.get_current_context()
        _watch(lambda: for_this_queue(context, _status_text(database)))
    else:
        say(_status_text(database))


def _look(database: Database) -> tuple[list[queue.Counts], list[queue.WorkerSeen]]:
    with db.transaction(database) as conn:
        return queue.counts(conn), queue.list_workers(conn)


def _status_json(database: Database) -> dict[str, Any]:
    counts, workers = _look(database)
    runs = [{**asdict(one), "total": one.total, "per_minute": round(one.per_minute, 2)} for one in counts]
    return {"runs": runs, "workers": [asdict(one) for one in workers]}


def _status_text(database: Database) -> str:
    counts, workers = _look(database)
    if not counts:
        return "Nothing is registered here yet. Register pictures first: rococap enqueue --split train"
    paused = sorted({one.run for one in counts if one.paused})
    told = [
        *filter(None, map(_exceptions_of, counts)),
        *(f"{run} is paused. Go on with: {with_run('resume', run)}" for run in paused),
    ]
    return "\n".join([_counts_table(counts), *told, "", _living(workers)])


def _counts_table(counts: Sequence[queue.Counts]) -> str:
    rows = [
        [
            *map(str, (one.run, one.split, one.pending, one.leased, one.done, one.total, round(one.per_minute, 1))),
            duration(one.eta_sec) if one.unfinished else "-",
        ]
        for one in counts
    ]
    return within_80(["run", "split", "pending", "leased", "done", "total", "per min", "time left"], rows, 0)


def _exceptions_of(counts: queue.Counts) -> str:
    """On the states that the table leaves out, since they are rare and to be noticed; empty if there are none."""
    n = {"failed": counts.failed, "waiting": counts.waiting, "cancelled": counts.cancelled}
    told = ", ".join(f"{number} {state}" for state, number in n.items() if number)
    why = f". Why: {with_run('failures', counts.run)}" if counts.failed else ""
    flags = ", ".join(f"{number} {flag}" for flag, number in counts.flags.items())
    lines = [f"{told}{why}"] * bool(told) + [f"flagged captions: {flags}"] * bool(flags)
    return "\n".join(f"{counts.run} {counts.split}: {line}" for line in lines)


def _living(workers: Sequence[queue.WorkerSeen]) -> str:
    """The workers in 80 columns, with what they measured; those that are lost told it too long ago."""
    if not workers:
        return "No worker is running. Start one: rococap worker"
    rows = [
        [_process(one), one.device, one.state, one.done, *_measured(None if one.state == "lost" else one.telemetry)]
        for one in workers
    ]
    table = as_table(["worker", "device", "state", "done", *_MEASURED], rows)
    rates = [one.telemetry.pictures_per_sec for one in workers if one.state == "running" and one.telemetry]
    return table + (f"\n{len(rates)} workers together: {sum(rates):.2f} pictures/s" if len(rates) > 1 else "")


def _process(worker: queue.WorkerSeen) -> str:
    """host:pid, of a long host its beginning."""
    pid = f":{worker.pid}"
    room = max(SHOWN_PROCESS - len(pid), 1)
    host = worker.host if len(worker.host) <= room else worker.host[: room - 1] + "…"
    return host + pid


def _watch(text: Callable[[], str]) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    try:
        with Live(Text(text()), console=Console(), refresh_per_second=2) as live:
            while True:
                time.sleep(2)
                live.update(Text(text()))
    except KeyboardInterrupt:
        return


# --- runs ------------------------------------------------------------------------------------------------------


@cli.command("runs")
@click.option("--delete", "doomed", metavar="NAME", help="Remove this run with its captions, after asking.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@db_option
def runs_command(doomed: str | None, yes: bool, as_json: bool) -> None:
    """List the runs: model, recipe, and how far each is. Or remove one: --delete NAME."""
    if doomed is not None:
        if as_json:
            raise click.UsageError("--delete prints no JSON: leave --json out.")
        delete_run(open_database(), doomed, yes)
        return
    if yes:
        raise click.UsageError("--yes is for --delete NAME.")
    with db.transaction(open_database()) as conn:
        seen = queue.runs_seen(conn)
    if as_json:
        echo_json([_run_json(one) for one in seen])
    elif seen:
        header = ["run", "model", "recipe", "done", "failed", "state"]
        click.echo(within_80(header, [_run_row(one) for one in seen], 2, 1, 0))
    else:
        say("Nothing is registered here yet. Register pictures first: rococap enqueue --split train")


def _run_json(seen: queue.RunSeen) -> dict[str, Any]:
    created_at = datetime.fromtimestamp(seen.created_at / 1000, UTC).isoformat(timespec="milliseconds")
    return {
        **asdict(seen.run),
        "columns": seen.run.columns.given(),
        "recipe_hash": seen.run.recipe.hash,
        "created_at": created_at.replace("+00:00", "Z"),
        "state": _state(seen),
        "splits": [{**asdict(one), "total": one.total} for one in seen.counts],
    }


def _run_row(seen: queue.RunSeen) -> list[str]:
    done, total = sum(one.done for one in seen.counts), sum(one.total for one in seen.counts)
    failed = sum(one.failed for one in seen.counts)
    model = Path(seen.run.recipe.model).name
    return [seen.run.name, model, _recipe_text(seen.run.recipe), f"{done}/{total}", str(failed), _state(seen)]


def _state(seen: queue.RunSeen) -> str:
    if seen.run.paused:
        return "paused"
    if any(one.leased for one in seen.counts):
        return "running"
    if any(one.unfinished for one in seen.counts):
        return "waiting"
    return "finished" if seen.counts else "empty"


def _recipe_text(recipe: Recipe) -> str:
    """What of it is not the default, but for the model; the prompt first, by its name if it has one."""
    from rococap import prompts as library

    others = recipe.differences(Recipe(model=recipe.model))
    told = []
    if "prompt" in others:
        del others["prompt"]
        names = [preset.name for preset in library.presets().values() if preset.prompt == recipe.prompt]
        told = names[:1] or [repr(recipe.prompt)]
    return ", ".join([*told, *(f"{name} {mine}" for name, (mine, _) in others.items())]) or "default"


# --- failures, leases, workers ----------------------------------------------------------------------------------


@cli.command("failures")
@run_option("Only this run.")
@splits_option()
@json_option
@db_option
def failures_command(run_name: str | None, splits: tuple[str, ...], as_json: bool) -> None:
    """What failed and why, grouped by code."""
    with db.transaction(open_database()) as conn:
        failed = queue.list_failures(conn, run_name, splits)
    if as_json:
        echo_json([asdict(one) for one in failed])
        return
    if not failed:
        click.echo("Nothing has failed.")
        return
    for (run, code), n in Counter((one.run, one.code) for one in failed).most_common():
        click.echo(f"{run}: {n} {code}")
        for one in [one for one in failed if (one.run, one.code) == (run, code)][:SHOWN_FAILURES]:
            click.echo(f"  {one.split} {one.image_id}: {one.message}")
        if n > SHOWN_FAILURES:
            click.echo(f"  … and {n - SHOWN_FAILURES} more: --json lists all")
    say("Try them again: rococap retry --code CODE, or --image-id ID, or --all")


@cli.command("leases")
@click.option("--last", type=click.IntRange(0, 10_000), default=0, metavar="N", help="Also the last N that ended.")
@json_option
@db_option
def leases_command(last: int, as_json: bool) -> None:
    """Who holds which pictures, and for how long."""
    with db.transaction(open_database()) as conn:
        found = queue.list_leases(conn, closed=last)
    if as_json:
        echo_json([asdict(one) for one in found])
        return
    if not found:
        click.echo("No lease is open.")
        return
    rows = [
        [
            *(one.id, one.worker, f"{one.host}:{one.pid}", one.run, one.split, one.lane, one.state),
            *(f"{one.done}/{one.jobs}", duration(one.age_sec), ago(one.beat_sec_ago)),
            "-" if one.expires_in_sec is None else f"{one.expires_in_sec:.0f} s",
        ]
        for one in found
    ]
    header = ["lease", "worker", "process", "run", "split", "lane", "state", "done", "age", "beat", "left"]
    click.echo(as_table(header, rows))


@cli.command("workers")
@click.option("--all", "everyone", is_flag=True, help="Also those that stopped long ago.")
@json_option
@db_option
def workers_command(everyone: bool, as_json: bool) -> None:
    """Worker processes: running, stopped or lost."""
    with db.transaction(open_database()) as conn:
        found = queue.list_workers(conn, everyone=everyone)
    if as_json:
        echo_json([asdict(one) for one in found])
        return
    say(_workers_table(found) if found else "No worker is running. Start one: rococap worker")


def _workers_table(seen: Sequence[queue.WorkerSeen]) -> str:
    """Everything; of those that stopped, what they told at the end."""
    rows = [
        [
            *(one.id, f"{one.host}:{one.pid}", one.device, one.state, one.done, ago(one.seen_sec_ago)),
            *_measured(one.telemetry),
            *_further_measured(one.telemetry),
        ]
        for one in seen
    ]
    return as_table(["worker", "process", "device", "state", "done", "seen", *_MEASURED, *_FURTHER_MEASURED], rows)


_MEASURED = ("pic/s", "tok/s", "fill %", "wait %", "mem GB")
_FURTHER_MEASURED = ("busy %", "batch", "of GB", "gpu %")


def _measured(told: queue.Telemetry | None) -> list[str]:
    """The memory is the GPU's where there is one, else the process's."""
    if told is None:
        return ["-"] * len(_MEASURED)
    memory_mb = told.memory_mb if told.gpu_memory_mb is None else told.gpu_memory_mb
    return [
        f"{told.pictures_per_sec:.2f}",
        f"{told.new_tokens_per_sec:.0f}",
        percent(told.fill),
        percent(told.waited_sec / told.captioning_sec if told.captioning_sec else None),
        f"{memory_mb / 1000:.1f}",
    ]


def _further_measured(told: queue.Telemetry | None) -> list[str]:
    if told is None:
        return ["-"] * len(_FURTHER_MEASURED)
    total_mb = told.gpu_memory_total_mb
    total = "-" if total_mb is None else f"{total_mb / 1000:.1f}"
    return [percent(told.busy), str(told.batch_size), total, percent(told.gpu_utilisation)]
