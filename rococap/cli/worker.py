"""`rococap worker`, and the options that name an engine."""

import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from click.core import ParameterSource

from rococap import queue
from rococap.cli.options import (
    DAY_SEC,
    MANY,
    F,
    Seconds,
    cli,
    db_option,
    open_database,
    run_option,
    say,
    splits_option,
    stderr_console,
    with_run,
)
from rococap.cli.tables import duration
from rococap.errors import RococapError


def engine_options(command: F) -> F:
    """What Options says of an engine, but for the batch size."""
    options = (
        click.option(
            "--engine",
            type=click.Choice(["transformers", "vllm", "openai"]),
            default="transformers",
            show_default=True,
            help="What runs the model; openai: any server with that interface, at --base-url.",
        ),
        click.option(
            "--base-url",
            metavar="URL",
            help="With --engine openai, like http://localhost:8000/v1; key: OPENAI_API_KEY.",
        ),
        click.option("--served-model", metavar="NAME", help="What that server calls the model. [default: as the run]"),
        click.option(
            "--device",
            default="auto",
            show_default=True,
            metavar="auto|cpu|cuda:N",
            help="auto: the first GPU, else the CPU.",
        ),
        click.option(
            "--decode",
            type=click.Choice(["auto", "continuous", "static"]),
            default="auto",
            show_default=True,
            help="A finished caption makes room for the next picture at once, or batch after batch. "
            "[auto: as the model can]",
        ),
        click.option(
            "--device-map",
            type=click.Choice(["auto"]),
            help="auto: spread a model that does not fit on one GPU over all of them, by accelerate.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def check_engine(options: dict[str, Any]) -> None:
    for name in ("base_url", "served_model"):
        if options[name] is not None and options["engine"] != "openai":
            flag = "--" + name.replace("_", "-")
            raise click.UsageError(f"{flag} is the engine openai's: add --engine openai, or leave {flag} out.")


def parse_batch_size(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    if value == "auto":
        return None
    if not value.isdecimal():
        raise click.BadParameter(f"{value!r} is neither auto nor a number.")
    return click.IntRange(1, 4096)(value, param, ctx)


def _devices(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str] | None:
    if value is None:
        return None
    from rococap.worker import supervisor

    try:
        return supervisor.parse_devices(value, supervisor.count_gpus)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@cli.command("worker")
@run_option("The run to work on. [default: `default`, or the only one that has work]")
@splits_option()
@engine_options
@click.option(
    "--devices",
    callback=_devices,
    metavar="all|0,1,…|cpu:N",
    help="One process per GPU, or N on the CPU that share its cores: started again when they die, stopped together.",
)
@click.option(
    "--batch-size",
    callback=parse_batch_size,
    default="auto",
    show_default=True,
    metavar="auto|N",
    help="Pictures at a time. auto: as many as there is memory for and speed to gain.",
)
@click.option("--limit", type=click.IntRange(1, MANY), metavar="N", help="Stop after N pictures in all.")
@click.option("--wait", is_flag=True, help="Keep polling for new work instead of ending when all is done.")
@click.option(
    "--self-check/--no-self-check",
    default=True,
    show_default=True,
    help="Before the first claim: caption a handful of the run's pictures alone and together, and stop if that shows "
    "an engine that does not look at them.",
)
@click.option(
    "--accept-new-rules",
    is_flag=True,
    help="Go on with a run that was begun when pictures were opened by other rules: its captions are then mixed, which "
    "every manifest tells.",
)
@click.option(
    "--lease-ttl",
    type=Seconds(2, DAY_SEC),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="A worker that was not heard of for so long loses its pictures to others.",
)
@click.option(
    "--drain-timeout",
    type=Seconds(0, DAY_SEC),
    default=25.0,
    show_default=True,
    metavar="SECONDS",
    help="How long SIGTERM, SIGUSR1 and Ctrl-C let the running batch finish.",
)
@click.option(
    "--stall-timeout",
    type=Seconds(1, DAY_SEC),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="A model that makes no step for so long hangs: the worker ends.",
)
@click.option("--member", metavar="JSON", hidden=True, help="The settings of a process that --devices started.")
@db_option
@click.pass_context
def worker_command(
    ctx: click.Context,
    /,
    run_name: str | None,
    splits: tuple[str, ...],
    devices: list[str] | None,
    member: str | None,
    **options: Any,
) -> None:
    """Claim pictures in batches, caption them, store them. Any number may run at once; --devices starts several."""
    from rococap.worker import process
    from rococap.worker.settings import Settings

    if member is not None:
        _be_member(Settings.from_json(member))
        return
    check_engine(options)
    if devices and ctx.get_parameter_source("device") is not ParameterSource.DEFAULT:
        raise click.UsageError("--devices says it for every process: leave --device out.")
    settings = Settings.of(run=run_name, splits=splits, **options)
    if devices:
        _work_on(devices, settings)
    else:
        database = open_database()
        with _worker_progress() as report:
            outcome = process.work(database, settings, report)
        _echo_outcome(outcome, settings)


def _work_on(devices: Sequence[str], settings: Any) -> None:
    from rococap.worker import supervisor

    target = click.get_current_context().find_root().obj
    command = supervisor.worker_command(force=target.force, debug=target.debug)
    database = open_database()
    with _worker_progress() as report:
        ended = supervisor.work(database, target.url, settings, devices, command, report, _echo_log_line)
    if len(ended.signals) > 1:
        sys.exit(128 + ended.signals[-1])
    if ended.outcome.seconds or not ended.errors:
        _echo_outcome(ended.outcome, settings)
    if ended.errors:
        raise RococapError("\n".join(ended.errors))


def _be_member(settings: Any) -> None:
    from rococap.worker import process, supervisor

    supervisor.leave_with_parent()
    supervisor.report_to_parent(process.work(open_database(), settings, supervisor.report_to_parent))


def _echo_log_line(line: str) -> None:
    stderr_console().out(line, highlight=False)


def _echo_outcome(outcome: Any, settings: Any) -> None:
    if not (outcome.seconds or outcome.drained):
        say(f"{outcome.run}: nothing is left to do. See: rococap status")
        return
    rate = outcome.done / outcome.seconds if outcome.seconds else 0.0
    click.echo(
        f"{outcome.run}: {outcome.done} captioned in {outcome.seconds:.1f} s ({rate:.1f}/s), {outcome.failed} failed"
    )
    if outcome.failed:
        say(f"Why they failed: {with_run('failures', outcome.run)}")
    if outcome.lost:
        click.echo(
            f"{outcome.lost} captions came too late: their pictures had gone to another worker, or were cancelled."
        )
    if outcome.spooled:
        click.echo(
            f"{outcome.spooled} captions could not be stored and wait in {outcome.spool}: the next worker stores them."
        )
    if outcome.drained:
        again = _worker_again(outcome.run, settings)
        say(f"Stopped as asked; what was left was given back. Go on with: {again}")


def _worker_again(run: str, settings: Any) -> str:
    """With the engine, which a run does not change."""
    given = settings.options
    options = {"--base-url": given.base_url, "--served-model": given.served_model}
    engine = "" if given.engine == "transformers" else f" --engine {given.engine}"
    told = "".join(f" {name} {shlex.quote(value)}" for name, value in options.items() if value)
    return with_run("worker", run) + engine + told


@contextmanager
def _worker_progress() -> Iterator[Callable[[Any, Sequence[queue.Counts]], None]]:
    """One live line on a terminal, a log line every ten seconds elsewhere."""
    console = stderr_console()
    last = time.monotonic()

    def line(outcome: Any, counts: Sequence[queue.Counts]) -> str:
        left = sum(one.unfinished for one in counts)
        per_minute = sum(one.per_minute for one in counts if one.unfinished)  # splits follow one another
        eta = duration(60 * left / per_minute) if per_minute else "?"
        memory = _gpu_memory(outcome.device)
        return f"{outcome.done} done here, {left} left, {per_minute:.0f}/min, {eta} to go{memory}"

    if console.is_terminal:
        with console.status("loading the model") as status:
            yield lambda outcome, counts: status.update(line(outcome, counts))
        return

    def log_line(outcome: Any, counts: Sequence[queue.Counts]) -> None:
        nonlocal last
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            logging.getLogger("rococap.worker").info("%s", line(outcome, counts))

    yield log_line


def _gpu_memory(device: str) -> str:
    if not device.startswith("cuda"):
        return ""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return f", GPU memory {(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB"
