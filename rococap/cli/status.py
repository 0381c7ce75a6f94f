"""Commands that inspect a queue: status, runs, failures, leases, workers. Only `runs --delete` changes one."""

import time
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
)
from rococap.cli.tables import as_table, within_80
from rococap.figures import ago, duration, percent
from rococap.recipe import Recipe

SHOWN_PROCESS = 16  # characters
MANY = 20
"""More workers than this are shown by host."""
SHOWN_HOSTS = 10
SHOWN_OUTLIERS = 5


# --- status ----------------------------------------------------------------------------------------------------


@cli.command("status")
@click.option("--watch", is_flag=True, help="Refresh every two seconds until Ctrl-C.")
@json_option
@db_option
def status_command(watch: bool, as_json: bool) -> None:
    """Show the progress of every run and split, and the live workers."""
    database = open_database()
    if as_json:
        echo_json(_status_json(database))
    elif watch:
        context = click.get_current_context()
        _watch(lambda: for_this_queue(context, _status_text(database)))
    else:
        say(_status_text(database))


Parts = dict[tuple[str, str], list[queue.Part]]


def _look(database: Database) -> tuple[list[queue.Counts], list[queue.WorkerSeen], Parts]:
    with db.transaction(database) as conn:
        return queue.counts(conn), queue.list_workers(conn), queue.all_parts(conn)


def _status_json(database: Database) -> dict[str, Any]:
    counts, workers, parts = _look(database)
    runs = [
        {
            **asdict(tally),
            "total": tally.total,
            "per_minute": round(tally.per_minute, 2),
            "parts": list(map(str, parts.get((tally.run, tally.split), []))),
        }
        for tally in counts
    ]
    return {
        "runs": runs,
        "workers": [asdict(worker) for worker in workers],
        "versions": {version: len(some) for version, some in queue.by_version(workers).items()},
    }


def _status_text(database: Database) -> str:
    counts, workers, parts = _look(database)
    if not counts:
        return "Nothing is registered here yet. Register pictures first: rococap enqueue --split train"
    paused = sorted({tally.run for tally in counts if tally.paused})
    notes = [
        *(
            f"{run} {split}: only part {', '.join(map(str, some))}"
            for (run, split), some in parts.items()
            if not queue.are_all(some)
        ),
        *filter(None, map(_rare_states, counts)),
        *(f"{run} is paused. To resume: {queue.with_run('resume', run)}" for run in paused),
    ]
    left = any(one.unfinished for one in counts)
    seen = [_workers_text(workers)] if workers or left else ["No worker is running, and nothing is left to caption."]
    return "\n".join([_counts_table(counts), *notes, "", *seen])


def _counts_table(counts: Sequence[queue.Counts]) -> str:
    rows = [
        [
            *map(str, (tally.run, tally.split, tally.pending, tally.leased, tally.done, tally.total)),
            str(round(tally.per_minute, 1)),
            duration(tally.eta_sec) if tally.unfinished else "-",
        ]
        for tally in counts
    ]
    return within_80(["run", "split", "pending", "leased", "done", "total", "per min", "time left"], rows, 0)


def _rare_states(counts: queue.Counts) -> str:
    """A line for the states that the table leaves out, and one for flagged captions; empty if there are none."""
    n = {"failed": counts.failed, "waiting": counts.waiting, "cancelled": counts.cancelled}
    states = ", ".join(f"{number} {state}" for state, number in n.items() if number)
    reason = f". Why: {queue.with_run('failures', counts.run)}" if counts.failed else ""
    flags = ", ".join(f"{number} {flag}" for flag, number in counts.flags.items())
    lines = [f"{states}{reason}"] * bool(states) + [f"flagged captions: {flags}"] * bool(flags)
    return "\n".join(f"{counts.run} {counts.split}: {line}" for line in lines)


def _workers_text(workers: Sequence[queue.WorkerSeen]) -> str:
    """The workers in 80 columns, with their telemetry, except that of lost ones, which is out of date."""
    if not workers:
        return "No worker is running. Start one: rococap worker"
    if len(workers) > MANY:
        return _hosts_text(workers, SHOWN_HOSTS)
    rows = [
        [
            *(_process(worker), worker.device, worker.state, worker.done),
            *_measured(None if worker.state == "lost" else worker.telemetry),
        ]
        for worker in workers
    ]
    table = as_table(["worker", "device", "state", "done", *_MEASURED], rows)
    return "\n".join([table, *_together(workers), *_versions(workers)])


def _together(workers: Sequence[queue.WorkerSeen]) -> list[str]:
    rates = [worker.rate for worker in workers if worker.rate is not None]
    return [f"{len(rates)} workers together: {sum(rates):.2f} pictures/s"] if len(rates) > 1 else []


def _versions(workers: Sequence[queue.WorkerSeen]) -> list[str]:
    """Nothing, unless the workers that are running have several versions of rococap."""
    versions = queue.by_version(workers)
    if len(versions) < 2:
        return []
    listed = ", ".join(f"{version} ({_some(ones)})" for version, ones in versions.items())
    return [
        f"Versions of rococap that run together: {listed}.",
        "To run one version, stop the workers of the others, upgrade them, and start them again.",
    ]


def _some(workers: Sequence[queue.WorkerSeen]) -> str:
    """Two processes by name, more by number."""
    return f"{len(workers)} workers" if len(workers) > 2 else ", ".join(map(_process, workers))


def _hosts_text(workers: Sequence[queue.WorkerSeen], most: int | None = None) -> str:
    """A line for each host, or for at most so many, those with outliers first; then the outliers. In 80 columns."""
    outliers = queue.outliers(workers)
    troubled = {worker.host for worker in outliers}
    hosts = queue.by_host(workers)
    shown = sorted(hosts, key=lambda host: host.host not in troubled)[:most]
    header = ["host", "running", "lost", "stopped", "done", "pic/s", "slowest", "pid"]
    lines = [within_80(header, list(map(_host_row, shown)), 0)]
    if len(shown) < len(hosts):
        lines.append(f"… and {len(hosts) - len(shown)} more hosts. To list them: rococap workers")
    lines += [*_together(workers), *_versions(workers)]
    if outliers:
        rows = [[one.host, str(one.pid), one.device, _strangeness(one)] for one in outliers[:SHOWN_OUTLIERS]]
        lines += ["", within_80(["outlier", "pid", "device", ""], rows, 0)]
    if len(outliers) > SHOWN_OUTLIERS:
        lines.append(f"… and {len(outliers) - SHOWN_OUTLIERS} more outliers")
    return "\n".join(lines)


def _host_row(seen: queue.HostSeen) -> list[str]:
    slowest = seen.slowest
    return [
        *(seen.host, str(seen.running), str(seen.lost), str(seen.stopped), str(seen.done)),
        *((f"{seen.pictures_per_sec:.2f}", f"{slowest.rate:.2f}", str(slowest.pid)) if slowest else ("-", "-", "-")),
    ]


def _strangeness(outlier: queue.WorkerSeen) -> str:
    if outlier.state == "lost":
        return f"lost, seen {ago(outlier.seen_sec_ago)}"
    return f"{outlier.rate:.2f} pic/s, below half the median"


def _process(worker: queue.WorkerSeen) -> str:
    """host:pid, with a long host name cut."""
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
@click.option("--delete", "doomed", metavar="NAME", help="Delete this run with its captions, after asking.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@db_option
def runs_command(doomed: str | None, yes: bool, as_json: bool) -> None:
    """List the runs with model, recipe and progress, or delete one."""
    if doomed is not None:
        if as_json:
            raise click.UsageError("--delete prints no JSON: leave out --json.")
        delete_run(open_database(), doomed, yes)
        return
    if yes:
        raise click.UsageError("--yes only goes with --delete NAME.")
    with db.transaction(open_database()) as conn:
        seen = queue.runs_seen(conn)
    if as_json:
        echo_json([_run_json(run) for run in seen])
    elif seen:
        header = ["run", "model", "recipe", "done", "failed", "state"]
        click.echo(within_80(header, [_run_row(run) for run in seen], 2, 1, 0))
    else:
        say("Nothing is registered here yet. Register pictures first: rococap enqueue --split train")


def _run_json(seen: queue.RunSeen) -> dict[str, Any]:
    created_at = datetime.fromtimestamp(seen.created_at / 1000, UTC).isoformat(timespec="milliseconds")
    return {
        **asdict(seen.run),
        "columns": seen.run.columns.given(),
        "recipe_hash": seen.run.recipe.hash,
        "created_at": created_at.replace("+00:00", "Z"),
        "state": seen.state,
        "splits": [{**asdict(tally), "total": tally.total} for tally in seen.counts],
    }


def _run_row(seen: queue.RunSeen) -> list[str]:
    done, total = sum(tally.done for tally in seen.counts), sum(tally.total for tally in seen.counts)
    failed = sum(tally.failed for tally in seen.counts)
    model = Path(seen.run.recipe.model).name
    return [seen.run.name, model, _recipe_text(seen.run.recipe), f"{done}/{total}", str(failed), seen.state]


def _recipe_text(recipe: Recipe) -> str:
    """The settings other than the model that are not the default. The prompt comes first, by name if it is a preset."""
    from rococap import prompts as library

    changed = recipe.differences(Recipe(model=recipe.model))
    prompt = []
    if "prompt" in changed:
        del changed["prompt"]
        names = [preset.name for preset in library.presets().values() if preset.prompt == recipe.prompt]
        prompt = names[:1] or [repr(recipe.prompt)]
    return ", ".join([*prompt, *(f"{name} {value}" for name, (value, _) in changed.items())]) or "default"


# --- failures, leases, workers ----------------------------------------------------------------------------------


@cli.command("failures")
@run_option("Only this run.")
@splits_option()
@json_option
@db_option
def failures_command(run_name: str | None, splits: tuple[str, ...], as_json: bool) -> None:
    """List the failed pictures and the reasons, grouped by failure code."""
    with db.transaction(open_database()) as conn:
        failed = queue.list_failures(conn, run_name, splits)
    if as_json:
        echo_json([asdict(failure) for failure in failed])
        return
    if not failed:
        click.echo("Nothing has failed.")
        return
    for group in queue.by_code(failed):
        click.echo(f"{group.run}: {group.n} {group.code}")
        for failure in group.failed[:SHOWN_FAILURES]:
            click.echo(f"  {failure.split} {failure.image_id}: {failure.message}")
        if group.n > SHOWN_FAILURES:
            click.echo(f"  … and {group.n - SHOWN_FAILURES} more: --json lists them all")
    say("To retry them: rococap retry --code CODE, or --image-id ID, or --all")


@cli.command("leases")
@click.option("--last", type=click.IntRange(0, 10_000), default=0, metavar="N", help="Also list the last N that ended.")
@json_option
@db_option
def leases_command(last: int, as_json: bool) -> None:
    """List the open leases with their workers, progress and age."""
    with db.transaction(open_database()) as conn:
        leases = queue.list_leases(conn, closed=last)
    if as_json:
        echo_json([asdict(lease) for lease in leases])
        return
    if not leases:
        click.echo("No lease is open.")
        return
    rows = [
        [
            *(lease.id, lease.worker, f"{lease.host}:{lease.pid}", lease.run, lease.split, lease.lane, lease.state),
            *(f"{lease.done}/{lease.jobs}", duration(lease.age_sec), ago(lease.beat_sec_ago)),
            "-" if lease.expires_in_sec is None else f"{lease.expires_in_sec:.0f} s",
        ]
        for lease in leases
    ]
    header = ["lease", "worker", "process", "run", "split", "lane", "state", "done", "age", "beat", "left"]
    click.echo(as_table(header, rows))


@cli.command("workers")
@click.option("--all", "everyone", is_flag=True, help="List each one, also those that stopped long ago.")
@json_option
@db_option
def workers_command(everyone: bool, as_json: bool) -> None:
    """List the worker processes: running, stopped or lost.

    More than 20 are shown by host, unless you pass --all or --json.
    """
    with db.transaction(open_database()) as conn:
        workers = queue.list_workers(conn, everyone=everyone)
    if as_json:
        echo_json([asdict(worker) for worker in workers])
        return
    if not workers:
        say("No worker is running. Start one: rococap worker")
    elif everyone or len(workers) <= MANY:
        say(_workers_table(workers))
    else:
        say(f"{_hosts_text(workers)}\n\nTo list each worker: rococap workers --all")


def _workers_table(workers: Sequence[queue.WorkerSeen]) -> str:
    """All telemetry, however wide; of workers that stopped, the last that they reported."""
    rows = [
        [
            *(worker.id, f"{worker.host}:{worker.pid}", worker.device, worker.state, worker.done),
            ago(worker.seen_sec_ago),
            *_measured(worker.telemetry),
            *_further_measured(worker.telemetry),
        ]
        for worker in workers
    ]
    header = ["worker", "process", "device", "state", "done", "seen", *_MEASURED, *_FURTHER_MEASURED]
    return "\n".join([as_table(header, rows), *_versions(workers)])


_MEASURED = ("pic/s", "tok/s", "fill %", "wait %", "mem GB")
_FURTHER_MEASURED = ("busy %", "batch", "of GB", "gpu %")


def _measured(telemetry: queue.Telemetry | None) -> list[str]:
    """The cells of `_MEASURED`. Memory is that of the GPU if there is one, and else of the process."""
    if telemetry is None:
        return ["-"] * len(_MEASURED)
    memory_mb = telemetry.memory_mb if telemetry.gpu_memory_mb is None else telemetry.gpu_memory_mb
    return [
        f"{telemetry.pictures_per_sec:.2f}",
        f"{telemetry.new_tokens_per_sec:.0f}",
        percent(telemetry.fill),
        percent(telemetry.waited_sec / telemetry.captioning_sec if telemetry.captioning_sec else None),
        f"{memory_mb / 1000:.1f}",
    ]


def _further_measured(telemetry: queue.Telemetry | None) -> list[str]:
    """The cells of `_FURTHER_MEASURED`."""
    if telemetry is None:
        return ["-"] * len(_FURTHER_MEASURED)
    total_mb = telemetry.gpu_memory_total_mb
    total = "-" if total_mb is None else f"{total_mb / 1000:.1f}"
    return [percent(telemetry.busy), str(telemetry.batch_size), total, percent(telemetry.gpu_utilisation)]
