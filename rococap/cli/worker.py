"""`rococap worker`, and the options that choose an engine."""

import logging
import shlex
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from click.core import ParameterSource

from rococap import queue
from rococap.cli.options import (
    DAY_SEC,
    MAX_ROWS,
    F,
    Seconds,
    cli,
    db_option,
    open_database,
    run_option,
    say,
    splits_option,
    stderr_console,
)
from rococap.errors import RococapError
from rococap.figures import counted, duration

RATE_SEC = 300.0
"""How far back the rate of a worker's progress line looks."""
RUN_HELP = "The run to work on. [default: `default`, or the only one that has work]"


def engine_options(command: F) -> F:
    """Adds an option for each field of `engines.Options` but the batch size."""
    return served_options(local_options(command))


def served_options(command: F) -> F:
    """Adds the options that choose the engine, and the server of those that have one."""
    options = (
        click.option(
            "--engine",
            type=click.Choice(["transformers", "vllm", "openai"]),
            default="transformers",
            show_default=True,
            help="What runs the model. openai: any server with OpenAI's interface, at --base-url.",
        ),
        click.option(
            "--base-url",
            metavar="URL",
            help="With --engine openai: the server, such as http://localhost:8000/v1. Key: OPENAI_API_KEY.",
        ),
        click.option(
            "--served-model",
            metavar="NAME",
            help="With --engine openai: the server's name for the model. [default: the run's]",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def local_options(command: F) -> F:
    """Adds the options of engines that run the model in this process."""
    return device_option(decoding_options(command))


device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda:N",
    help="auto: the first GPU, or the CPU if there is none.",
)


def decoding_options(command: F) -> F:
    """Adds the options of engines that run the model in this process, but for the device."""
    options = (
        click.option(
            "--decode",
            type=click.Choice(["auto", "continuous", "static"]),
            default="auto",
            show_default=True,
            help="continuous: a finished caption makes room for the next picture at once. static: one batch after the "
            "other. auto: continuous if the model supports it.",
        ),
        click.option(
            "--graphs/--no-graphs",
            default=True,
            show_default=True,
            help="With continuous decoding on a GPU: replay steps from CUDA graphs.",
        ),
        click.option(
            "--device-map",
            type=click.Choice(["auto"]),
            help="auto: spread a model that does not fit on one GPU over all of them, with accelerate.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def check_engine(options: dict[str, Any]) -> None:
    for name in ("base_url", "served_model"):
        if options[name] is not None and options["engine"] != "openai":
            flag = "--" + name.replace("_", "-")
            raise click.UsageError(f"{flag} is for the engine openai: add --engine openai, or leave out {flag}.")


def parse_batch_size(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    if value == "auto":
        return None
    if not value.isdecimal():
        raise click.BadParameter(f"{value!r} is neither auto nor a number.")
    return click.IntRange(1, 4096)(value, param, ctx)


batch_size_option = click.option(
    "--batch-size",
    callback=parse_batch_size,
    default="auto",
    show_default=True,
    metavar="auto|N",
    help="Pictures at a time. auto: as many as fit in memory and still add speed.",
)


def _devices(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str] | None:
    if value is None:
        return None
    from rococap.worker import children

    try:
        return children.parse_devices(value, children.count_gpus)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


limit_option = click.option(
    "--limit", type=click.IntRange(1, MAX_ROWS), metavar="N", help="Stop after N pictures in all."
)


def working_options(command: F) -> F:
    """Adds the options of `worker.settings.Settings` that say how to work, rather than on what."""
    options = (
        click.option("--wait", is_flag=True, help="When everything is done, poll for new work instead of ending."),
        click.option(
            "--self-check/--no-self-check",
            default=True,
            show_default=True,
            help="Before the first claim, caption a few of the run's pictures alone and in a batch, and stop if the "
            "captions show that the engine does not see the pictures.",
        ),
        click.option(
            "--dataset-root",
            metavar="FOLDER",
            help="The folder that holds the run's data set on this machine, if that is at another path than where it "
            "was enqueued, or a copy. [default: ROCOCAP_DATASET_ROOT]",
        ),
        click.option(
            "--accept-new-rules",
            is_flag=True,
            help="Continue a run that began under older rules for opening pictures, quantising weights and ending "
            "captions. It then has captions under both, which every manifest records.",
        ),
        click.option(
            "--lease-ttl",
            type=Seconds(2, DAY_SEC),
            default=120.0,
            show_default=True,
            metavar="SECONDS",
            help="Time without a heartbeat after which other workers take over a worker's pictures.",
        ),
        click.option(
            "--drain-timeout",
            type=Seconds(0, DAY_SEC),
            default=25.0,
            show_default=True,
            metavar="SECONDS",
            help="Time that SIGTERM, SIGUSR1 and Ctrl-C leave the running batch to finish.",
        ),
        click.option(
            "--stall-timeout",
            type=Seconds(1, DAY_SEC),
            default=600.0,
            show_default=True,
            metavar="SECONDS",
            help="Time without a decoding step after which the model counts as hung and the worker exits.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


devices_option = click.option(
    "--devices",
    callback=_devices,
    metavar="all|0,1,…|cpu:N",
    help="Start a process per GPU, or N that share the CPU cores. One that dies is restarted; all stop together.",
)


def check_devices(ctx: click.Context, devices: Sequence[str] | None) -> None:
    if devices and ctx.get_parameter_source("device") is not ParameterSource.DEFAULT:
        raise click.UsageError("--devices sets the device of every process: leave out --device.")


@cli.command("worker")
@run_option(RUN_HELP)
@splits_option()
@engine_options
@devices_option
@batch_size_option
@limit_option
@working_options
@click.option("--member", metavar="JSON", hidden=True, help="The settings of a process that --devices starts.")
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
    """Claim pictures in batches, caption them and store the captions.

    Any number of workers may run at once; --devices starts several.
    """
    from rococap.worker import process
    from rococap.worker.settings import Settings

    if member is not None:
        _be_member(Settings.from_json(member))
        return
    check_engine(options)
    check_devices(ctx, devices)
    settings = Settings.of(run=run_name, splits=splits, **options)
    if devices:
        _work_on(devices, settings)
    else:
        database = open_database()
        with worker_progress() as report:
            outcome = process.work(database, settings, report)
        echo_outcome(outcome, settings)


def _work_on(devices: Sequence[str], settings: Any) -> None:
    from rococap.worker import supervisor

    target = click.get_current_context().find_root().obj
    command = supervisor.worker_command(force=target.force, debug=target.debug)
    database = open_database()
    with worker_progress() as report:
        ended = supervisor.work(database, target.url, settings, devices, command, report, echo_log_line)
    report_ended(ended, settings)


def report_ended(ended: Any, settings: Any, command: str = "worker") -> None:
    """Says what several workers have done, which `command` continues. Exits if they were told to exit at once, and
    raises RococapError with the errors of devices that were given up.
    """
    if len(ended.signals) > 1:
        sys.exit(128 + ended.signals[-1])
    if ended.outcome.seconds or not ended.errors:
        echo_outcome(ended.outcome, settings, command)
    if ended.errors:
        raise RococapError("\n".join(ended.errors))


def _be_member(settings: Any) -> None:
    from rococap.worker import children, process, supervisor

    children.leave_with_parent()
    supervisor.report_outcome(process.work(open_database(), settings, supervisor.report_outcome))


def echo_log_line(line: str) -> None:
    stderr_console().out(line, highlight=False)


def echo_outcome(outcome: Any, settings: Any, command: str = "worker") -> None:
    if not (outcome.seconds or outcome.drained):
        say(f"{outcome.run}: nothing left to do. See: rococap status")
        return
    rate = outcome.done / outcome.seconds if outcome.seconds else 0.0
    click.echo(
        f"{outcome.run}: {outcome.done} captioned in {outcome.seconds:.1f} s ({rate:.1f}/s), {outcome.failed} failed"
    )
    if outcome.failed:
        say(f"Why they failed: {queue.with_run('failures', outcome.run)}")
    if outcome.lost:
        too_late = counted(outcome.lost, "caption")
        click.echo(f"{too_late} came too late: another worker had taken over the picture, or it was cancelled.")
    if outcome.spooled:
        waiting = counted(outcome.spooled, "caption")
        click.echo(f"{waiting} could not be stored yet: the next worker stores what is in {outcome.spool}")
    if outcome.drained:
        again = _again(command, outcome.run, settings)
        say(f"Stopped on request; unfinished pictures were given back. To continue: {again}")


def _again(command: str, run: str, settings: Any) -> str:
    """The command line that continues the run on the same engine and data set, which the run does not record."""
    options = settings.options
    engine = "" if options.engine == "transformers" else f" --engine {options.engine}"
    places = {
        "--base-url": options.base_url,
        "--served-model": options.served_model,
        "--dataset-root": settings.dataset_root,
    }
    named = "".join(f" {name} {shlex.quote(value)}" for name, value in places.items() if value)
    return queue.with_run(command, run) + engine + named


@contextmanager
def worker_progress() -> Iterator[Callable[[Any, int], None]]:
    """Yields `report(outcome, left)`: a live line on a terminal, and a log line every ten seconds elsewhere."""
    console = stderr_console()
    last = time.monotonic()
    seen: deque[tuple[float, int]] = deque()

    def line(outcome: Any, left: int, per_minute: float) -> str:
        eta = duration(60 * left / per_minute) if per_minute else "?"
        memory = _gpu_memory(outcome.device)
        return f"{outcome.done} done here, {left} left, {per_minute:.0f}/min, {eta} to go{memory}"

    if console.is_terminal:
        with console.status("loading the model") as status:
            yield lambda outcome, left: status.update(line(outcome, left, _per_minute(seen, left)))
        return

    def log_line(outcome: Any, left: int) -> None:
        nonlocal last
        per_minute = _per_minute(seen, left)
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            logging.getLogger("rococap.worker").info("%s", line(outcome, left, per_minute))

    yield log_line


def _per_minute(seen: deque[tuple[float, int]], left: int) -> float:
    """How many pictures all workers finish in a minute, from how many were left when; `seen` are the looks of the last
    RATE_SEC seconds, as (time, left), to which this one is added.
    """
    at = time.monotonic()
    seen.append((at, left))
    while seen[0][0] < at - RATE_SEC:
        seen.popleft()
    first_at, first_left = seen[0]
    return 60 * max(0, first_left - left) / max(at - first_at, 1)


def _gpu_memory(device: str) -> str:
    if not device.startswith("cuda"):
        return ""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return f", GPU memory {(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB"
