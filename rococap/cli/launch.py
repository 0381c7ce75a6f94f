"""`rococap launch`: workers on many machines, through Slurm or Ray."""

import math
import shlex
from collections.abc import Iterator
from typing import Any

import click
from click.core import ParameterSource

from rococap.cli.options import F, cli, db_option, open_database, run_option, say, splits_option
from rococap.cli.worker import (
    RUN_HELP,
    batch_size_option,
    check_engine,
    decoding_options,
    echo_log_line,
    limit_option,
    report_ended,
    served_options,
    worker_command,
    worker_progress,
    working_options,
)


@cli.group("launch")
def launch_group() -> None:
    """Start workers on many machines, through Slurm or Ray.

    The queue must be in PostgreSQL unless they all run on one machine.
    """


def launched_options(command: F) -> F:
    """Adds the options of `rococap worker` that hold for workers on any machine, and --db."""
    for option in (db_option, working_options, batch_size_option, decoding_options, served_options, splits_option()):
        command = option(command)
    return run_option(RUN_HELP)(command)


# --- Slurm -----------------------------------------------------------------------------------------------------


def _time_limit(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    from rococap.launch import slurm

    try:
        if value is not None:
            slurm.seconds(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return value


def _check_time(time: str | None, drain_timeout: float) -> None:
    from rococap.launch import slurm

    warning = slurm.warning_sec(drain_timeout)
    least = warning + slurm.MIN_WORK_SEC
    if time is not None and slurm.seconds(time) < least:
        raise click.BadParameter(
            f"{time} is too short: workers are asked to stop {warning} s before the time limit, and must load the "
            f"model first. Give them {math.ceil(least / 60)} minutes or more.",
            param_hint="--time",
        )


def _one_line(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not value.isprintable():  # a second line would be a command of the script
        raise click.BadParameter(f"{value!r} is not one line of plain text.")
    return value


def _options_of_sbatch(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    from rococap.launch import slurm

    for value in values:
        for word in _words(value):
            if instead := slurm.instead_of(word):
                raise click.BadParameter(f"{value!r} sets what the script sets itself: {instead}.")
    return values


def _words(option: str) -> list[str]:
    """The words of an option of sbatch, which may be followed by its value and by other options."""
    try:
        if option.startswith("-") and option.isprintable():
            return shlex.split(option)
    except ValueError:  # a quotation mark without its other
        pass
    raise click.BadParameter(f"{option!r} is not an option of sbatch. Write --sbatch=--account=NAME.")


@launch_group.command("slurm")
@click.option("--nodes", type=click.IntRange(1, 10_000), default=1, show_default=True, help="Machines of a job.")
@click.option(
    "--gpus-per-node",
    type=click.IntRange(0, 64),
    default=1,
    show_default=True,
    help="GPUs on each machine, with a worker for each. 0: one worker on the CPU.",
)
@click.option("--cpus-per-task", type=click.IntRange(1, 10_000), help="CPU cores on each machine. [default: Slurm's]")
@click.option(
    "--time",
    callback=_time_limit,
    metavar="D-H:M:S",
    help="The time limit. A job that reaches it goes back to the queue and continues. [default: the partition's]",
)
@click.option("--partition", callback=_one_line, metavar="NAME", help="The partition. [default: Slurm's]")
@click.option("--array", type=click.IntRange(1, 10_000), metavar="N", help="Submit N such jobs, as one array.")
@click.option(
    "--sbatch",
    "more",
    multiple=True,
    callback=_options_of_sbatch,
    metavar="OPTION",
    help="Another option of sbatch, such as --sbatch=--account=NAME. May be repeated; overrides the script's.",
)
@click.option("--dry-run", is_flag=True, help="Print the script instead of submitting it.")
@launched_options
@click.pass_context
def slurm_command(ctx: click.Context, /, run_name: str | None, splits: tuple[str, ...], **options: Any) -> None:
    """Submit a Slurm job whose machines caption.

    Workers that Slurm stops finish what they are captioning; at the time limit the job returns to the queue as long
    as pictures are unfinished. There is a log for each job and for each of its tasks, in this folder.
    """
    from rococap.launch import check_shared, slurm
    from rococap.worker import children, supervisor
    from rococap.worker.settings import Settings

    check_engine(options)
    _check_time(options["time"], options["drain_timeout"])
    is_dry_run = options["dry_run"]
    asked = ("nodes", "gpus_per_node", "cpus_per_task", "time", "partition", "array", "more")
    allocation = slurm.Allocation(**{name: options[name] for name in asked})
    database = open_database()
    if allocation.n_nodes > 1:
        check_shared(database, f"{allocation.n_nodes} of them")
    run, is_work_left = supervisor.find_run(database, Settings(run=run_name, splits=splits, wait=options["wait"]))
    database.dispose()
    target = ctx.find_root().obj
    script = slurm.script(
        allocation,
        run.name,
        list(_given(ctx, without="run_name")),
        drain_timeout=options["drain_timeout"],
        flags=children.flags(force=target.force, debug=target.debug),
    )
    if is_dry_run:
        click.echo(script, nl=False)
    elif not is_work_left:
        say(f"{run.name}: nothing left to do. See: rococap status")
    else:
        job = slurm.submit(script, target.url)
        say(
            f"Submitted job {job}, for run {run.name}.\n"
            f"Progress:  rococap status --watch\n"
            f"Job:       squeue --job {job}\n"
            f"Logs:      tail -F rococap-{job}[-_.]*log\n"
            f"Stop:      scancel {job}"
        )


def _given(ctx: click.Context, without: str) -> Iterator[str]:
    """The options of `rococap worker` among those that were given, as a command line."""
    names = {param.name for param in worker_command.params} - {without}
    for param in ctx.command.params:
        if param.name not in names or not param.expose_value:
            continue
        if ctx.get_parameter_source(param.name) is not ParameterSource.COMMANDLINE:
            continue
        value = ctx.params[param.name]
        if isinstance(value, bool):
            yield (param.opts if value else param.secondary_opts)[0]
        else:
            for one in value if isinstance(value, tuple) else [value]:
                yield from (param.opts[0], "auto" if one is None else str(one))


# --- Ray -------------------------------------------------------------------------------------------------------


@launch_group.command("ray")
@click.option("--gpus", type=click.IntRange(1, 10_000), metavar="N", help="Caption on N GPUs of the cluster.")
@click.option("--cpus", type=click.IntRange(1, 10_000), metavar="N", help="Caption on N CPU cores, one worker on each.")
@click.option(
    "--address",
    metavar="auto|HOST:PORT",
    help="The cluster. auto: the one that this machine belongs to. [default: RAY_ADDRESS, or the one on this machine, "
    "which is started if there is none]",
)
@limit_option
@launched_options
@click.pass_context
def ray_command(
    ctx: click.Context,
    /,
    gpus: int | None,
    cpus: int | None,
    address: str | None,
    run_name: str | None,
    splits: tuple[str, ...],
    **options: Any,
) -> None:
    """Caption on the GPUs or CPU cores of a Ray cluster.

    Ray starts a worker again when its machine is lost. Ctrl-C stops all of them, once they have finished what they are
    captioning.
    """
    from rococap.launch import ray
    from rococap.worker import supervisor
    from rococap.worker.settings import Settings

    check_engine(options)
    if (gpus is None) == (cpus is None):
        raise click.UsageError("Say where to caption: either --gpus N or --cpus N.")
    target = ctx.find_root().obj
    settings = Settings.of(run=run_name, splits=splits, **options)
    kind: ray.Kind = "cpu" if gpus is None else "gpu"
    command = supervisor.worker_command(force=target.force, debug=target.debug)
    with worker_progress() as report:
        ended = ray.work(
            open_database(), target.url, settings, kind, gpus or cpus or 0, address, command, report, echo_log_line
        )
    where = f" --address {shlex.quote(address)}" if address else ""
    report_ended(ended, settings, f"launch ray --{kind}s {gpus or cpus}{where}")
