"""The command line: options -> call -> echo. torch and pandas are imported inside the commands that need them."""

import codecs
import errno
import json
import logging
import math
import os
import re
import shlex
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from io import TextIOWrapper
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from sqlalchemy import Connection
from sqlalchemy import Engine as Database
from sqlalchemy.exc import DatabaseError as DriverError

from rococap import __version__, datasets, db, open_files, queue
from rococap.datasets import SPLITS
from rococap.errors import RococapError
from rococap.flags import FLAGS
from rococap.recipe import DEFAULT_MODEL, DEFAULT_PROMPT, DTYPES, LOAD_IN, Recipe, refuse_placeholders
from rococap.urls import holds_password

DEFAULT_DATASET = "eltorio/ROCOv2-radiology"
MANY = 10**12
DAY_SEC = 86_400.0
SHOWN_FAILURES = 10
SHOWN_PROCESS = 16  # characters
LONGEST_RUN_NAME = 100  # bytes

_NUMBER = re.compile(r"-?\d[\d.]*|-")

F = TypeVar("F", bound=Callable[..., Any])


class Seconds(click.FloatRange):
    """A number within bounds: FloatRange takes nan for one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = float(super().convert(value, param, ctx))
        return self.fail(f"{value!r} is not a number.", param, ctx) if math.isnan(seconds) else seconds


class Commands(click.Group):
    """Turns what a user can act on into one line and an exit code: 2 for usage, 1 for the rest."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(sys.stdout, TextIOWrapper):
            # A locale that is not UTF-8, as on clusters, fails no command: what it cannot show is escaped.
            sys.stdout.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (RococapError, DriverError, OSError, UnicodeEncodeError, KeyboardInterrupt) as error:
            if ctx.params.get("debug") or isinstance(error, BrokenPipeError):
                raise
            raise click.ClickException(_for_this_queue(ctx, _told(error))) from error


def _for_this_queue(ctx: click.Context, text: str) -> str:
    """The text, its commands with the --db that this one was given, so that they work when pasted.

    One that holds a password is not repeated.
    """
    target = ctx.find_root().obj
    if target is None or not target.is_option or holds_password(target.url):
        return text
    commands = "|".join(cli.commands)
    return re.sub(rf"\brococap (?=({commands})\b)", lambda _: f"rococap --db {shlex.quote(target.url)} ", text)


def _say(text: str) -> None:
    click.echo(_for_this_queue(click.get_current_context(), text))


def _told(error: BaseException) -> str:
    match error:
        case KeyboardInterrupt():
            return "Stopped. Nothing is half-written: the same command goes on from here."
        case DriverError():
            return db.explain(error)
        case UnicodeEncodeError():
            return f"{error.object!r} is not valid Unicode. Write it again."
        case OSError(errno=errno.EMFILE):
            return f"This process may open {open_files.limit()} files, which is too few. {open_files.ADVICE}"
        case OSError():
            return f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
    return str(error)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="rococap")
@click.option(
    "--db",
    "url",
    envvar="ROCOCAP_DB",
    default=db.DEFAULT_URL,
    show_default=True,
    metavar="URL",
    help="The queue: sqlite:///FILE or its path, or postgresql+psycopg://… Also from ROCOCAP_DB.",
)
@click.option("--force", is_flag=True, help="Open SQLite files on network file systems too, at your own risk.")
@click.option("--debug", is_flag=True, help="Show tracebacks and debug logs.")
@click.pass_context
def cli(ctx: click.Context, url: str, force: bool, debug: bool) -> None:
    """Caption radiology pictures with Qwen2-VL through a crash-safe work queue.

    \b
    rococap enqueue --split train     register every picture of a split
    rococap worker                    caption them; start as many as you like
    rococap status                    where it stands
    rococap export --split train      the captions as CSV

    Captions are made by a machine and are not for clinical use.
    """
    ctx.obj = Target(url, force, debug, ctx.get_parameter_source("url") is ParameterSource.COMMANDLINE)
    _set_up_logging(debug)


def _set_up_logging(debug: bool) -> None:
    level = logging.DEBUG if debug else logging.INFO
    if sys.stderr.isatty():
        from rich.logging import RichHandler

        logging.basicConfig(
            level=level, format="%(message)s", handlers=[RichHandler(console=_console(), show_path=False)]
        )
    else:
        logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s")
    for chatty in ("absl", "alembic", "httpx", "httpx2", "urllib3", "filelock", "PIL"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


@cache
def _console() -> Any:
    """Standard error. One object for logs and live lines, which would else write over each other."""
    from rich.console import Console

    return Console(stderr=True)


@dataclass(slots=True)
class Target:
    """The database that the options before and after the command name, and how to open it.

    `is_option`: it was named by --db, not by the environment or for lack of a name.
    """

    url: str
    force: bool
    debug: bool
    is_option: bool


def _database(*, may_be_new: bool = False) -> Database:
    target = click.get_current_context().find_root().obj
    return db.connect(target.url, is_there=not may_be_new, force=target.force)


def _echo_json(value: Any) -> None:
    is_utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    click.echo(json.dumps(value, indent=2, ensure_ascii=not is_utf8))


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned with spaces: numbers to the right, words to the left."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    right = [all(_NUMBER.fullmatch(row[column]) for row in cells[1:]) for column in range(len(header))]

    def line(values: Sequence[str]) -> str:
        padded = (v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join(line(values) for values in cells)


def _use(ctx: click.Context, param: click.Parameter, url: str | None) -> None:
    if url is not None:
        ctx.find_root().obj.url = url
        ctx.find_root().obj.is_option = True


db_option = click.option(
    "--db", metavar="URL", expose_value=False, callback=_use, help="The queue; may stand here or before the command."
)


def run_option(help: str) -> Callable[[F], F]:
    return click.option("--run", "run_name", metavar="NAME", help=help)


def splits_option(required: bool = False, help: str | None = None) -> Callable[[F], F]:
    def expand(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(split for split in SPLITS if split in value or "all" in value)

    return click.option(
        "--split",
        "splits",
        type=click.Choice([*SPLITS, "all"]),
        multiple=True,
        required=required,
        callback=expand,
        help=help or ("May be repeated." if required else "May be repeated. [default: all]"),
    )


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


# --- prompts ---------------------------------------------------------------------------------------------------

prompts_option = click.option(
    "--prompts",
    envvar="ROCOCAP_PROMPTS",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Presets of your own, as TOML. Also from ROCOCAP_PROMPTS.",
)


def prompt_options(command: F) -> F:
    """The ways to say the prompt, of which `_prompt` takes one."""
    options = (
        click.option("--prompt", help=f"What it is asked of each picture. [default: {DEFAULT_PROMPT}]"),
        click.option("--preset", metavar="NAME", help="Instead: a prompt by its name. See: rococap prompts"),
        click.option(
            "--prompt-file", type=click.Path(path_type=Path), metavar="FILE", help="Instead: a file that holds it."
        ),
        prompts_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


def _prompt(prompt: str | None, preset: str | None, file: Path | None, prompts: Path | None) -> str:
    from rococap import prompts as library

    if sum(way is not None for way in (prompt, preset, file)) > 1:
        raise click.UsageError("--prompt, --preset and --prompt-file each say the prompt: give one of them.")
    if preset is not None:
        return library.find(preset, prompts).prompt
    if file is not None:
        return library.read_prompt(file)
    return DEFAULT_PROMPT if prompt is None else prompt


@cli.command("prompts")
@prompts_option
@json_option
def list_prompts(prompts: Path | None, as_json: bool) -> None:
    """Prompts that `enqueue --preset NAME` knows: rococap's own, and those of your file."""
    from rococap import prompts as library

    known = library.presets(prompts).values()
    if as_json:
        _echo_json([asdict(preset) for preset in known])
        return
    for preset in known:
        click.echo(f"{preset.name}: {preset.about}" if preset.about else preset.name)
        for line in preset.prompt.splitlines():
            click.echo(textwrap.fill(line, 80, initial_indent="  ", subsequent_indent="  "))


# --- enqueue ---------------------------------------------------------------------------------------------------


@cli.command()
@splits_option(help="May be repeated. [required, but with --from: all that it has]")
@click.option(
    "--dataset",
    envvar="ROCOCAP_DATASET",
    default=DEFAULT_DATASET,
    show_default=True,
    metavar="FOLDER|HUB_ID",
    help="Parquet shards as on the hub, or pictures and CSVs as on Zenodo. Also from ROCOCAP_DATASET.",
)
@click.option(
    "--dataset-revision", metavar="REV", help="Branch, tag or commit of a data set on the hub. [default: main]"
)
@click.option("--config", metavar="NAME", help="Of a data set that has several configurations, this one.")
@click.option(
    "--columns",
    metavar="KEY=NAME,…",
    help="Columns of other names: image=IMG,image_id=ID,caption=TEXT,cui=CONCEPTS. Kept with the data set.",
)
@click.option("--limit", type=click.IntRange(1, MANY), metavar="N", help="Only N rows of each split.")
@click.option("--offset", type=click.IntRange(0, MANY), default=0, metavar="K", help="Leave out the first K rows.")
@click.option(
    "--run",
    "run_name",
    default="default",
    show_default=True,
    metavar="NAME",
    help="Captions of one model, prompt and settings; each run has its own.",
)
@click.option(
    "--from",
    "source",
    metavar="RUN",
    help="Instead of a data set: that run's pictures, and its recipe but for what is said here.",
)
@click.option(
    "--flag",
    "flags",
    type=click.Choice(FLAGS),
    multiple=True,
    help="Of --from only those whose caption is flagged so. May be repeated.",
)
@click.option("--model", default=DEFAULT_MODEL, show_default=True, metavar="FOLDER|HUB_ID", help="What captions.")
@click.option(
    "--revision", default="main", show_default=True, metavar="REV", help="Branch, tag or commit of the model."
)
@click.option("--adapter", metavar="FOLDER|HUB_ID", help="A LoRA or other adapter for the model, in PEFT's format.")
@click.option(
    "--adapter-base",
    type=click.Choice(["any"]),
    help="any: put the adapter on the model although it says that it was trained on one of another name.",
)
@click.option(
    "--load-in", type=click.Choice(LOAD_IN), help="Quantise the weights by bitsandbytes, for models that do not fit."
)
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model. Look at it first.")
@prompt_options
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(0.1, 10),
    default=1.0,
    show_default=True,
    help="Above 1, what was said is less likely to be said again. Decodes in static batches.",
)
@click.option(
    "--max-new-tokens", type=click.IntRange(1, 1_000_000), default=256, show_default=True, help="Longest caption."
)
@click.option(
    "--min-pixels", type=click.IntRange(min=1), default=3_136, show_default=True, help="Smaller pictures are enlarged."
)
@click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    default=1_003_520,
    show_default=True,
    help="Larger pictures are reduced; 784 pixels are one visual token.",
)
@click.option(
    "--frame",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Which frame to caption of files that hold several, such as DICOM, counted from 1.",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    show_default=True,
    help="auto: bfloat16 on a GPU that has it, float16 on an older one, float32 on the CPU.",
)
@db_option
@click.pass_context
def enqueue(
    ctx: click.Context,
    /,
    splits: tuple[str, ...],
    dataset: str,
    dataset_revision: str | None,
    config: str | None,
    columns: str | None,
    limit: int | None,
    offset: int,
    run_name: str,
    source: str | None,
    flags: tuple[str, ...],
    prompt: str | None,
    preset: str | None,
    prompt_file: Path | None,
    prompts: Path | None,
    **recipe: Any,
) -> None:
    """Register every picture of a split as pending in a run.

    Again costs almost nothing and changes nothing. Another model, prompt or setting is another run: --run NAME.
    Captions that are flagged are done again under another recipe: --run NEW --from OLD --flag loop.
    """
    from rococap import enqueue as registration

    _check_enqueue(ctx, source, bool(splits), bool(flags))
    _check_run_name(run_name)
    recipe["model"] = _model(recipe["model"])
    if recipe["adapter"] is not None:
        recipe["adapter"] = _absolute_if_folder(recipe["adapter"], "an adapter")
    recipe["prompt"] = _prompt(prompt, preset, prompt_file, prompts)
    database = _database(may_be_new=source is None)
    if source is not None:
        old, present = _look_at_run(database, source, splits)
        wanted = _recipe(asdict(old.recipe) | _given(ctx, recipe))
        with _bar() as progress:
            results = registration.enqueue_from(
                database, old, present, run=run_name, recipe=wanted, flags=flags, progress=progress
            )
    else:
        wanted = _recipe(recipe)
        asked = datasets.Columns.parse(columns) if columns is not None else datasets.STANDARD
        revision = dataset_revision or _pinned_revision(database, run_name, dataset, config or "")
        located = replace(datasets.locate(dataset, splits, revision, config or ""), columns=asked)
        with _bar() as progress:
            results = registration.enqueue(
                database, located, splits, run=run_name, recipe=wanted, limit=limit, offset=offset, progress=progress
            )
    for result in results:
        _echo_enqueued(run_name, result)


def _recipe(fields: dict[str, Any]) -> Recipe:
    from rococap.engines import files

    try:
        recipe = Recipe(**fields)
        refuse_placeholders(recipe.prompt)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if recipe.adapter_base is not None and recipe.adapter is None:
        raise click.UsageError("--adapter-base says which models an adapter is put on: name one with --adapter.")
    files.check(recipe.model, recipe.revision, recipe.prompt)
    return recipe


def _check_enqueue(ctx: click.Context, source: str | None, has_splits: bool, has_flags: bool) -> None:
    if source is None:
        if has_flags:
            raise click.UsageError("--flag chooses among another run's captions: name it with --from RUN.")
        if not has_splits:
            raise click.UsageError("Missing option '--split'. Choose from: train, validation, test, all.")
        return
    for name in ("dataset", "dataset_revision", "config", "columns", "limit", "offset"):
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--from takes another run's pictures: leave --{name.replace('_', '-')} out.")
    if ctx.get_parameter_source("run_name") is ParameterSource.DEFAULT:
        raise click.UsageError("--from needs a name for the new run: --run NAME.")


def _look_at_run(database: Database, name: str, splits: Sequence[str]) -> tuple[queue.Run, list[str]]:
    """A run, and what it has of these splits; of all, if none is named."""
    with db.transaction(database) as conn:
        run = queue.get_run(conn, name)
        return run, [one.split for one in queue.counts_of(conn, run, splits or SPLITS)]


def _given(ctx: click.Context, recipe: dict[str, Any]) -> dict[str, Any]:
    """What of a recipe was said on the command line."""
    names = dict.fromkeys(recipe, ()) | {"prompt": ("prompt", "preset", "prompt_file")}
    return {
        name: recipe[name]
        for name, options in names.items()
        if any(ctx.get_parameter_source(option) is ParameterSource.COMMANDLINE for option in options or (name,))
    }


def _with_run(command: str, name: str) -> str:
    """A command to paste, for this run."""
    return f"rococap {command}" + ("" if name == "default" else f" --run {shlex.quote(name)}")


def _check_run_name(name: str) -> None:
    """Runs name folders and files, also two runs one file: what else stands in its name has room beside them."""
    if not all(c.isalnum() or c in "._-" for c in name) or name.startswith((".", "-")) or not name:
        raise click.BadParameter(f"{name!r} is no file name. Use letters, digits, dots, dashes.", param_hint="--run")
    if (size := len(name.encode())) > LONGEST_RUN_NAME:
        raise click.BadParameter(
            f"{_cut(name, 20)!r} is {size} bytes long in UTF-8, and {LONGEST_RUN_NAME} are the most: shorten it.",
            param_hint="--run",
        )


def _model(model: str) -> str:
    from rococap.engines import families

    families.check_name(model)
    return _absolute_if_folder(model, "a model")


def _absolute_if_folder(name: str, what: str) -> str:
    path = Path(os.path.expanduser(name))
    if not path.is_dir() and not datasets.HUB_ID.fullmatch(name):
        raise RococapError(f"There is no folder {name}: check the path, or name {what} of the hub as owner/name.")
    return str(path.resolve()) if path.is_dir() else name


def _pinned_revision(database: Database, run_name: str, dataset: str, config: str) -> str | None:
    """A run stays on the commit of its data set, also when the hub's branch has moved on."""
    name = datasets.name_of(dataset, config)
    with db.transaction(database) as conn:
        for run in queue.list_runs(conn):
            if (run.name, run.dataset) == (run_name, name):
                return run.dataset_revision or None
    return None


def _echo_enqueued(run_name: str, result: Any) -> None:
    click.echo(f"{run_name} {result.split}: {result.new} new, {result.known} known, {result.changed} changed")
    if result.duplicates:
        click.echo(f"  {result.duplicates} rows repeat an image_id that is already there and were left out")
    if result.is_unlabelled:
        click.echo("  no originals: nothing is scored against them. If a column holds them, register it in another")
        click.echo("  queue: --db URL --columns caption=NAME")
    for shard in result.altered_shards:
        click.echo(f"  {shard} was altered since it was registered: places and captions were read anew")


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on a terminal; silence elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = _console()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield progress


# --- worker ----------------------------------------------------------------------------------------------------


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


def _check_engine(options: dict[str, Any]) -> None:
    for name in ("base_url", "served_model"):
        if options[name] is not None and options["engine"] != "openai":
            flag = "--" + name.replace("_", "-")
            raise click.UsageError(f"{flag} is the engine openai's: add --engine openai, or leave {flag} out.")


def _batch_size(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    if value == "auto":
        return None
    if not value.isdecimal():
        raise click.BadParameter(f"{value!r} is neither auto nor a number.")
    return click.IntRange(1, 4096)(value, param, ctx)


def _devices(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str] | None:
    if value is None:
        return None
    from rococap import crew

    try:
        return crew.parse_devices(value, crew.count_gpus)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@cli.command()
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
    callback=_batch_size,
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
@click.option("--member", "is_member", is_flag=True, hidden=True, help="A process that --devices started.")
@db_option
@click.pass_context
def worker(
    ctx: click.Context,
    /,
    run_name: str | None,
    splits: tuple[str, ...],
    devices: list[str] | None,
    is_member: bool,
    **options: Any,
) -> None:
    """Claim pictures in batches, caption them, store them. Any number may run at once; --devices starts several."""
    from rococap import worker as process

    _check_engine(options)
    if devices and ctx.get_parameter_source("device") is not ParameterSource.DEFAULT:
        raise click.UsageError("--devices says it for every process: leave --device out.")
    settings = process.Settings(run=run_name, splits=splits, **options)
    if devices:
        _work_on(devices, settings)
    elif is_member:
        _be_member(settings)
    else:
        database = _database()
        with _worker_progress() as report:
            outcome = process.work(database, settings, report)
        _echo_outcome(outcome, settings)


def _work_on(devices: Sequence[str], settings: Any) -> None:
    from rococap import crew

    target = click.get_current_context().find_root().obj
    command = crew.worker_command(force=target.force, debug=target.debug)
    database = _database()
    with _worker_progress() as report:
        ended = crew.work(database, target.url, settings, devices, command, report, _echo_log_line)
    if len(ended.signals) > 1:
        sys.exit(128 + ended.signals[-1])
    if ended.outcome.seconds or not ended.errors:
        _echo_outcome(ended.outcome, settings)
    if ended.errors:
        raise RococapError("\n".join(ended.errors))


def _be_member(settings: Any) -> None:
    from rococap import crew
    from rococap import worker as process

    crew.leave_with_parent()
    crew.tell(process.work(_database(), settings, crew.tell))


def _echo_log_line(line: str) -> None:
    _console().out(line, highlight=False)


def _echo_outcome(outcome: Any, settings: Any) -> None:
    if not (outcome.seconds or outcome.drained):
        _say(f"{outcome.run}: nothing is left to do. See: rococap status")
        return
    rate = outcome.done / outcome.seconds if outcome.seconds else 0.0
    click.echo(
        f"{outcome.run}: {outcome.done} captioned in {outcome.seconds:.1f} s ({rate:.1f}/s), {outcome.failed} failed"
    )
    if outcome.failed:
        _say(f"Why they failed: {_with_run('failures', outcome.run)}")
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
        _say(f"Stopped as asked; what was left was given back. Go on with: {again}")


def _worker_again(run: str, settings: Any) -> str:
    """With the engine, which a run does not change."""
    options = {"--base-url": settings.base_url, "--served-model": settings.served_model}
    engine = "" if settings.engine == "transformers" else f" --engine {settings.engine}"
    told = "".join(f" {name} {shlex.quote(value)}" for name, value in options.items() if value)
    return _with_run("worker", run) + engine + told


@contextmanager
def _worker_progress() -> Iterator[Callable[[Any, Sequence[queue.Counts]], None]]:
    """One live line on a terminal, a log line every ten seconds elsewhere."""
    console = _console()
    last = time.monotonic()

    def line(outcome: Any, counts: Sequence[queue.Counts]) -> str:
        left = sum(one.unfinished for one in counts)
        per_minute = sum(one.per_minute for one in counts if one.unfinished)  # splits follow one another
        eta = _duration(60 * left / per_minute) if per_minute else "?"
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


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, sec = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {sec:02} s" if minutes else f"{sec} s"


# --- status ----------------------------------------------------------------------------------------------------


@cli.command()
@click.option("--watch", is_flag=True, help="Refresh every two seconds until Ctrl-C.")
@json_option
@db_option
def status(watch: bool, as_json: bool) -> None:
    """Where every run and split stands, and which workers live."""
    database = _database()
    if as_json:
        _echo_json(_status_json(database))
    elif watch:
        context = click.get_current_context()
        _watch(lambda: _for_this_queue(context, _status_text(database)))
    else:
        _say(_status_text(database))


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
        *(f"{run} is paused. Go on with: {_with_run('resume', run)}" for run in paused),
    ]
    return "\n".join([_counts_table(counts), *told, "", _living(workers)])


def _counts_table(counts: Sequence[queue.Counts]) -> str:
    rows = [
        [
            *map(str, (one.run, one.split, one.pending, one.leased, one.done, one.total, round(one.per_minute, 1))),
            _duration(one.eta_sec) if one.unfinished else "-",
        ]
        for one in counts
    ]
    return _within_80(["run", "split", "pending", "leased", "done", "total", "per min", "time left"], rows, 0)


def _exceptions_of(counts: queue.Counts) -> str:
    """On the states that the table leaves out, since they are rare and to be noticed; empty if there are none."""
    n = {"failed": counts.failed, "waiting": counts.waiting, "cancelled": counts.cancelled}
    told = ", ".join(f"{number} {state}" for state, number in n.items() if number)
    why = f". Why: {_with_run('failures', counts.run)}" if counts.failed else ""
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
    table = _table(["worker", "device", "state", "done", *_MEASURED], rows)
    rates = [one.telemetry.pictures_per_sec for one in workers if one.state == "running" and one.telemetry]
    return table + (f"\n{len(rates)} workers together: {sum(rates):.2f} pictures/s" if len(rates) > 1 else "")


def _within_80(header: Sequence[str], rows: Sequence[list[str]], *shorten: int) -> str:
    """A table of 80 columns at most: those named by their place give way, one after the other."""
    for column in shorten:
        excess = max(map(len, _table(header, rows).splitlines())) - 80
        if excess > 0:
            width = max(len(header[column]), max(len(row[column]) for row in rows) - excess)
            rows = [[*row[:column], _cut(row[column], width), *row[column + 1 :]] for row in rows]
    return _table(header, rows)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


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


strip_option = click.option(
    "--strip-reasoning",
    is_flag=True,
    help="Leave out what a model thought aloud: closed <think> blocks, and the white space after them.",
)

# --- runs, compare ---------------------------------------------------------------------------------------------


@cli.command()
@click.option("--delete", "doomed", metavar="NAME", help="Remove this run with its captions, after asking.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@db_option
def runs(doomed: str | None, yes: bool, as_json: bool) -> None:
    """List the runs: model, recipe, and how far each is. Or remove one: --delete NAME."""
    if doomed is not None:
        if as_json:
            raise click.UsageError("--delete prints no JSON: leave --json out.")
        _delete_run(_database(), doomed, yes)
        return
    if yes:
        raise click.UsageError("--yes is for --delete NAME.")
    with db.transaction(_database()) as conn:
        seen = queue.runs_seen(conn)
    if as_json:
        _echo_json([_run_json(one) for one in seen])
    elif seen:
        header = ["run", "model", "recipe", "done", "failed", "state"]
        click.echo(_within_80(header, [_run_row(one) for one in seen], 2, 1, 0))
    else:
        _say("Nothing is registered here yet. Register pictures first: rococap enqueue --split train")


def _delete_run(database: Database, name: str, yes: bool) -> None:
    with db.transaction(database) as conn:
        run = queue.get_run(conn, name)
        total = sum(one.total for one in queue.counts(conn) if one.run == name)
        done = sum(one.done for one in queue.counts(conn) if one.run == name)
    if not yes:
        question = (
            f"Run {name} has {total} pictures, {done} of them captioned. Its captions, scores and failures go from the "
            "queue for good; files that were exported stay. Delete it?"
        )
        try:
            click.confirm(question, abort=True)
        except click.Abort as error:
            raise RococapError("Nothing was deleted. To delete without being asked: --yes") from error
    with db.transaction(database, write=True) as conn:
        queue.delete_run(conn, run)
    with _bar() as progress:
        _clear_deleted(database, lambda n: progress(f"{name}: deleting", n, total))
    _say(f"{name}: deleted, {total} pictures and {done} captions. To give the space back: rococap vacuum")


def _clear_deleted(database: Database, report: Callable[[int], None] = lambda n: None) -> int:
    """In pages, each a transaction of its own, so that workers on other runs go on meanwhile."""
    cleared = 0
    while True:
        with db.transaction(database, write=True) as conn:
            n = queue.clear_deleted(conn)
        if not n:
            return cleared
        cleared += n
        report(cleared)


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


@cli.command()
@click.argument("names", metavar="RUN…", nargs=-1, required=True)
@splits_option()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Ends in .csv, .parquet or .jsonl. [default: results_medical/compare_RUN_RUN….csv]",
)
@click.option("--all-done", is_flag=True, help="Only pictures that every run has captioned.")
@strip_option
@json_option
@db_option
def compare(
    names: tuple[str, ...],
    splits: tuple[str, ...],
    output: Path | None,
    all_done: bool,
    strip_reasoning: bool,
    as_json: bool,
) -> None:
    """Put runs side by side: a file with a row for each picture, and speed, length and flags of each run."""
    from rococap import compare as comparison

    path = output or comparison.default_path(names)
    database = _database()
    with _bar() as progress:
        compared = comparison.compare(
            *(database, names, path),
            splits=splits,
            all_done=all_done,
            strip_reasoning=strip_reasoning,
            progress=progress,
        )
    if as_json:
        _echo_json({**asdict(compared), "path": str(compared.path), "strip_reasoning": strip_reasoning})
        return
    header = ["run", "captions", "s/pic", "pic/s", "tokens", "chars", "words", "flag %", "cut %"]
    click.echo(_within_80(header, [_compared_row(one) for one in compared.runs], 0))
    shared = f", {compared.shared} of them captioned by every run" if len(names) > 1 else ""
    click.echo(f"\n{compared.path}: {compared.rows} pictures{shared}{'' if compared.originals else ', no originals'}")


def _compared_row(run: Any) -> list[str]:
    means = (run.sec_per_picture, run.pictures_per_sec, run.new_tokens, run.characters, run.words)
    shares = (None if share is None else 100 * share for share in (run.flagged, run.cut))
    return [run.run, str(run.captions), *("-" if n is None else str(_significant(n)) for n in (*means, *shares))]


# --- evaluate --------------------------------------------------------------------------------------------------

WIDEST_SCORE = 20  # characters, with its interval
EXTRA_METRICS = ("bertscore_f1", "meteor_1_5")


def runs_option(help: str) -> Callable[[F], F]:
    return click.option("--run", "names", multiple=True, metavar="NAME", help=help)


@cli.command()
@splits_option(required=True)
@runs_option("May be repeated: runs side by side. [default: `default`, or the only one]")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The scores of each caption: .parquet, .csv or .jsonl. [default: results_medical/scores_SPLIT_RUN….parquet]",
)
@click.option(
    "--also",
    type=click.Choice(EXTRA_METRICS),
    multiple=True,
    help="Compute this too: it needs an extra of rococap, and BERTScore hours without a GPU. May be repeated.",
)
@strip_option
@json_option
@db_option
def evaluate(
    splits: tuple[str, ...],
    names: tuple[str, ...],
    output: Path | None,
    also: tuple[str, ...],
    strip_reasoning: bool,
    as_json: bool,
) -> None:
    """Score captions against the original ones: BLEU, ROUGE, METEOR, CIDEr-D and concepts, overall and by modality.

    Scores are kept in the database: what was scored costs nothing again. CIDEr-D weighs words by how rare they are in
    all originals, so that one more caption has it computed anew for all.
    """
    from rococap import compare as comparison
    from rococap import evaluate as evaluation

    if output is not None:
        comparison.check_suffix(output)
    database = _database()
    with _bar() as progress:
        found = evaluation.evaluate(
            database, names, splits, also=also, strip_reasoning=strip_reasoning, progress=progress
        )
    told = evaluation.to_json(found)
    path = output or evaluation.default_path(found, "scores", ".parquet")
    rows = evaluation.write(found, path, told)
    if as_json:
        _echo_json(told)
    else:
        shown = [split for split in splits if any(run["split"] == split for run in told["runs"])]
        click.echo("\n\n".join(_scores_text(told, split) for split in shown))
        click.echo(f"\n{path}: {rows} captions")
    for warning in dict.fromkeys(text for run in told["runs"] for text in run["warnings"]):
        click.echo(f"Warning: {warning}", err=True)
    scored = {(run["run"], run["split"]) for run in told["runs"]}
    for run, split in product(dict.fromkeys(run["run"] for run in told["runs"]), splits):
        if (run, split) not in scored:
            click.echo(f"{run} captioned nothing of {split} yet.", err=True)


def _scores_text(told: dict[str, Any], split: str) -> str:
    runs = [run for run in told["runs"] if run["split"] == split]
    paired = [one for one in told["paired"] if one["split"] == split]
    counts = ", ".join(f"{run['n']} captions of {run['run']}" for run in runs)
    names = dict.fromkeys(name for run in runs for name in run["metrics"])
    if len(runs) > 2:
        notes = ["Intervals and differences of more than two runs: --json, or rococap report"]
    else:
        notes = ["In brackets 95 % intervals. cider_d goes to 10, and of flagged less is better."]
    notes += [f"difference and p: of the {one['n']} pictures that both captioned" for one in paired if len(runs) == 2]
    reasons: dict[str, list[str]] = {}
    for name, why in dict.fromkeys(one for run in runs for one in run["not_computed"].items()):
        reasons.setdefault(why, []).append(name)
    reasons_told = [
        textwrap.fill(f"{', '.join(names)}: not computed: {why}", 80, subsequent_indent="  ")
        for why, names in reasons.items()
    ]
    tables = (_overall_table(list(names), runs, paired), _modalities_table(runs))
    return "\n\n".join([f"{split}: {counts}", tables[0], "\n".join(notes), tables[1], "\n".join(reasons_told)]).rstrip()


def _overall_table(names: Sequence[str], runs: Sequence[Any], paired: Sequence[Any]) -> str:
    """With 95 % intervals, and the difference and its p, of two runs at most: more do not fit."""
    with_intervals = len(runs) <= 2
    header = ["score", *(_cut(run["run"], WIDEST_SCORE) for run in runs)]
    rows = [
        [
            name,
            *(_score(run["metrics"].get(name), run["intervals"].get(name) if with_intervals else None) for run in runs),
        ]
        for name in names
    ]
    if len(paired) == 1:
        header += ["difference", "p"]
        for row in rows:
            row += [_score(paired[0][key].get(row[0])) for key in ("differences", "p")]
    return _within_80(header, rows, *range(1, len(runs) + 1))


def _score(value: float | None, interval: Sequence[float] | None = None) -> str:
    if value is None:
        return "-"
    return f"{_digits(value)} [{', '.join(map(_digits, interval))}]" if interval else _digits(value)


def _digits(value: float) -> str:
    """As wide for 10, which is CIDEr-D's best, as for less."""
    return f"{value:.2f}" if value >= 9.9995 else f"{value:.3f}"


def _modalities_table(runs: Sequence[Any]) -> str:
    from rococap.evaluate import BY_MODALITY

    modalities = dict.fromkeys(name for run in runs for name in run["by_modality"])
    rows = [
        [name, run["run"], str(of["n"]), *(_score(of["metrics"].get(shown)) for shown in BY_MODALITY)]
        for name in modalities
        for run in runs
        if (of := run["by_modality"].get(name))
    ]
    return _within_80(["modality", "run", "n", *BY_MODALITY], rows, 1)


# --- report ----------------------------------------------------------------------------------------------------


@cli.command()
@click.option("--split", type=click.Choice(SPLITS), required=True)
@runs_option("May be repeated: runs side by side. [default: `default`, or the only one]")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="[default: results_medical/report_SPLIT_RUN….html]",
)
@click.option(
    "--pictures", type=click.IntRange(0, 100_000), default=200, show_default=True, metavar="N", help="How many to show."
)
@strip_option
@db_option
def report(split: str, names: tuple[str, ...], output: Path | None, pictures: int, strip_reasoning: bool) -> None:
    """Write one HTML file to look at: scores, plots, and pictures with their captions beside the originals.

    It needs no server and no network. Of a run's pictures it shows the best, the worst, some at random, those that are
    flagged and those that failed.
    """
    from rococap import report as reporting

    with _bar() as progress:
        made = reporting.report(
            *(_database(), names, split, output),
            pictures=pictures,
            strip_reasoning=strip_reasoning,
            progress=progress,
        )
    click.echo(f"{made.path}: {made.captions} captions, {made.pictures} pictures shown, {made.size / 1e6:.1f} MB")
    if made.unreadable:
        click.echo(f"  {made.unreadable} of the pictures could not be read: their cards say why")
    for warning in made.warnings:
        click.echo(f"Warning: {warning}", err=True)


# --- export, restore -------------------------------------------------------------------------------------------


FILES = ("csv", "parquet", "jsonl")
FOLDERS = ("hf", "webdataset", "kohya")
_ONLY_FOR = {
    "excel_safe": ("csv",),
    "allow_missing": ("imageclef",),
    "require_complete": (*FILES, *FOLDERS),
    "push": ("hf",),
    "follow": FILES,
    "checkpoint_every": FILES,
}
"""Options of `export` that not every format has."""
_FILE_ENDING = re.compile(r"\.(?!v?\d+$)\w{1,8}")
"""What stands behind the dot of x.xlsx or x.csv.gz, and not of the folders run.2 and run.v2."""


@cli.command()
@splits_option(required=True)
@run_option("The run. [default: `default`, or the only one]")
@click.option(
    "--format",
    type=click.Choice([*FILES, "imageclef", *FOLDERS]),
    help="See above. [default: by the name of --output, else csv]",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A folder, or a file (one split only). [default: in results_medical, or in results_medical/RUN]",
)
@click.option(
    "--checkpoint-every",
    type=click.IntRange(0, 1_000_000),
    default=25,
    show_default=True,
    metavar="N",
    help="Images per checkpoint segment; 0 for none.",
)
@click.option("--follow", is_flag=True, help="Keep writing segments as workers finish them, then export.")
@click.option("--require-complete", is_flag=True, help="Fail if images of the split are not captioned.")
@click.option(
    "--excel-safe",
    is_flag=True,
    help="csv: an apostrophe before texts that a spreadsheet would run as formulas, and a byte-order mark, by which "
    "Excel shows accents; `restore` takes both away. "
    "Checkpoint segments, which are for restoring, stay as they are.",
)
@strip_option
@click.option("--allow-missing", is_flag=True, help="imageclef: an empty caption for pictures that have none.")
@click.option(
    "--push", metavar="REPO", help="hf: upload the folder to this data set of the hub; a new one is made, and private."
)
@db_option
@click.pass_context
def export(
    ctx: click.Context,
    /,
    splits: tuple[str, ...],
    run_name: str | None,
    format: str | None,
    output: Path | None,
    checkpoint_every: int,
    follow: bool,
    require_complete: bool,
    excel_safe: bool,
    strip_reasoning: bool,
    allow_missing: bool,
    push: str | None,
) -> None:
    """Write captions next to the originals, and a manifest that says what made them.

    \b
    csv, parquet, jsonl  a file a split, and checkpoint segments beside it
    imageclef            ID,Caption for ImageCLEFmedical Caption, a file a split, every ID of it
    hf                   a folder that datasets.load_dataset opens, with its card; --push REPO uploads it
    webdataset           a folder of tar shards: picture, caption and facts of 1,000 pictures each
    kohya                a folder a split: each picture and its caption, in two files of one name
    """
    format = format or _format_of(output)
    for name, formats in _ONLY_FOR.items():
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE and format not in formats:
            raise click.UsageError(
                f"--{name.replace('_', '-')} is not for {format}: it goes with {', '.join(formats)}."
            )
    if push is not None and not push.strip():
        raise click.UsageError("--push needs the name of a data set: OWNER/NAME.")
    if follow and not checkpoint_every:
        raise click.UsageError("--follow writes checkpoints: give it --checkpoint-every N.")
    _check_output(output, format, len(splits))
    database = _database()
    with db.transaction(database) as conn:
        run = queue.find_run(conn, run_name)
    if format in FOLDERS:
        _export_folder(database, run, splits, format, output, require_complete, strip_reasoning, push)
        return
    paths = {split: _export_path(run.name, split, format, output) for split in splits}
    if format == "imageclef":
        _export_submissions(database, run, paths, allow_missing, strip_reasoning)
    else:
        _export_files(database, run, paths, checkpoint_every, follow, require_complete, excel_safe, strip_reasoning)


def _export_files(
    database: Database,
    run: queue.Run,
    paths: dict[str, Path],
    checkpoint_every: int,
    follow: bool,
    require_complete: bool,
    excel_safe: bool,
    strip_reasoning: bool,
) -> None:
    from rococap import export as files

    folder = next(iter(paths.values())).parent
    if follow:
        files.follow(database, run, list(paths), folder, checkpoint_every, _echo_segments)
    for split, path in paths.items():
        with _bar() as progress:
            exported = files.export(
                *(database, run, split, path),
                require_complete=require_complete,
                excel_safe=excel_safe,
                strip_reasoning=strip_reasoning,
                progress=progress,
            )
        if checkpoint_every:
            _echo_segments(files.write_checkpoints(database, run, split, folder, checkpoint_every))
        click.echo(f"{exported.path}: {exported.rows} captions{_left(exported.missing)}")


def _export_submissions(
    database: Database, run: queue.Run, paths: dict[str, Path], allow_missing: bool, strip_reasoning: bool
) -> None:
    from rococap import publish

    for split, path in paths.items():
        with _bar() as progress:
            submission = publish.submit(
                *(database, run, split, path),
                allow_missing=allow_missing,
                strip_reasoning=strip_reasoning,
                progress=progress,
            )
        empty = f", {submission.empty} of them empty, which score next to nothing" if submission.empty else ""
        click.echo(f"{path}: {submission.rows} captions{empty}. Submit it as submission.csv, alone in a zip.")


def _export_folder(
    database: Database,
    run: queue.Run,
    splits: Sequence[str],
    format: str,
    output: Path | None,
    require_complete: bool,
    strip_reasoning: bool,
    push: str | None,
) -> None:
    from rococap import publish

    if push:
        publish.check_login()
    folder = output or _results(run.name) / f"medical_captions_{format}"
    with _bar() as progress:
        written = publish.publish(
            *(database, run, splits, folder, format),
            require_complete=require_complete,
            strip_reasoning=strip_reasoning,
            progress=progress,
        )
    for one in written:
        click.echo(f"{folder} {one.split}: {one.captions} captions{_left(one.missing)}")
        if lost := one.without_picture:
            click.echo(f"  {len(lost)} more were left out, since their pictures cannot be read:")
            for image_id, why in list(lost.items())[:SHOWN_FAILURES]:
                click.echo(f"  {image_id}: {why}")
    named = (run.dataset, run.recipe.model, run.recipe.adapter)
    if local := [name for name in named if name and Path(name).is_absolute()]:
        click.echo(f"  It names {' and '.join(local)}: look whether others may read that")
    if push:
        pushed = publish.push(folder, push, f"Captions of {', '.join(splits)} by {run.recipe.model}")
        seen = "private, until you change that in its settings" if pushed.private else "public"
        click.echo(f"{pushed.url}: {seen}")


def _left(missing: int) -> str:
    return f"; {missing} of the split are not done" if missing else ""


def _results(run_name: str) -> Path:
    return Path("results_medical") if run_name == "default" else Path("results_medical") / run_name


def _format_of(output: Path | None) -> str:
    return output.suffix[1:].lower() if output and _is_file_name(output) else "csv"


def _is_file_name(output: Path) -> bool:
    return output.suffix[1:].lower() in FILES and not output.is_dir()


def _check_output(output: Path | None, format: str, n_splits: int) -> None:
    """Whoever names a file of a kind that is not written here wants no folder of that name."""
    if output is None or output.is_dir() or not _FILE_ENDING.fullmatch(output.suffix):
        return
    folder = f"if it is to be a folder, make it first: mkdir -p {shlex.quote(str(output))}"
    if format in FOLDERS:
        raise click.UsageError(f"{output} looks like a file, and {format} is a folder: name one; {folder}")
    if not _is_file_name(output):
        endings = ", ".join(f".{ending}" for ending in FILES)
        raise click.UsageError(f"{output} looks like a file, and those written here end in {endings}; {folder}")
    if n_splits > 1:
        raise click.UsageError(f"{output} is one file: name a folder for several splits.")
    if output.suffix.lower() != f".{_ending_of(format)}":
        raise click.UsageError(f"{output} is no {format} file: name it .{_ending_of(format)}, or leave out --format.")


def _ending_of(format: str) -> str:
    return "csv" if format == "imageclef" else format


def _export_path(run_name: str, split: str, format: str, output: Path | None) -> Path:
    if output and _is_file_name(output):
        return output
    name = "submission" if format == "imageclef" else "medical_captions"
    return (output or _results(run_name)) / f"{name}_{split}.{_ending_of(format)}"


def _echo_segments(paths: list[Path]) -> None:
    if paths:
        what = paths[0].name if len(paths) == 1 else f"{paths[0].name} to {paths[-1].name}"
        click.echo(f"{paths[0].parent / what}: {len(paths)} new checkpoints")


@cli.command()
@click.argument(
    "paths", metavar="FILE…", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@run_option("The run to restore into. [default: `default`, or the only one]")
@db_option
def restore(paths: tuple[Path, ...], run_name: str | None) -> None:
    """Read exports or checkpoints back into a run whose split is enqueued, so that a lost database costs nothing."""
    from rococap import export as files

    database = _database()
    with db.transaction(database) as conn:
        run = queue.find_run(conn, run_name)
    results = [files.restore(database, run, path) for path in paths]
    total = {
        name: sum(getattr(one, name) for one in results)
        for name in ("restored", "known", "leased", "unknown", "different")
    }
    click.echo(f"{run.name}: {total['restored']} restored, {total['known']} captioned already")
    if total["leased"]:
        click.echo(f"  {total['leased']} are being captioned now: restore again when the workers have stopped")
    if total["unknown"]:
        click.echo(f"  {total['unknown']} are of images that the run does not have: enqueue all of their split first")
    if total["different"]:
        click.echo(f"  {total['different']} have another original caption here and were left out: another data set?")
    if unknown := [one.path for one in results if not one.has_manifest]:
        click.echo(
            f"Warning: {', '.join(map(str, unknown))}: its manifest (.json) is not beside it. What it says of the "
            "recipe was not compared, and apostrophes that --excel-safe put before texts, if it did, are still there.",
            err=True,
        )
    if total["unknown"] + total["different"] and not (total["restored"] or total["known"] or total["leased"]):
        raise RococapError(
            f"Nothing was restored: run {run.name!r} has none of these pictures. Enqueue their split, or name another "
            "run with --run."
        )


# --- failures, retry, cancel -----------------------------------------------------------------------------------


@cli.command()
@run_option("Only this run.")
@splits_option()
@json_option
@db_option
def failures(run_name: str | None, splits: tuple[str, ...], as_json: bool) -> None:
    """What failed and why, grouped by code."""
    with db.transaction(_database()) as conn:
        failed = queue.list_failures(conn, run_name, splits)
    if as_json:
        _echo_json([asdict(one) for one in failed])
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
    _say("Try them again: rococap retry --code CODE, or --image-id ID, or --all")


@cli.command()
@run_option("The run. [default: `default`, or the only one]")
@splits_option()
@click.option("--code", "codes", multiple=True, help="Those that failed with this code. May be repeated.")
@click.option("--image-id", "image_ids", multiple=True, help="This picture, failed or cancelled. May be repeated.")
@click.option("--cancelled", is_flag=True, help="Those that were cancelled.")
@click.option("--all", "everything", is_flag=True, help="Everything that failed.")
@db_option
def retry(
    run_name: str | None,
    splits: tuple[str, ...],
    codes: tuple[str, ...],
    image_ids: tuple[str, ...],
    cancelled: bool,
    everything: bool,
) -> None:
    """Make failed pictures pending again, with a clean record."""
    if not (codes or image_ids or cancelled or everything):
        raise click.UsageError("Say what to try again: --code CODE, --image-id ID, --cancelled or --all.")
    if everything and (codes or image_ids or cancelled):
        raise click.UsageError("--all is everything that failed: leave the other options out, or --all.")
    with db.transaction(_database(), write=True) as conn:
        run = queue.find_run(conn, run_name)
        n = queue.retry(conn, run, splits=splits, codes=codes, image_ids=image_ids, cancelled=cancelled)
        if not n:
            _refuse_unknown(conn, run, image_ids, codes)
    _say(f"{run.name}: {n} pending again" + (f". Caption them: {_with_run('worker', run.name)}" if n else ""))


def _refuse_unknown(conn: Connection, run: queue.Run, image_ids: Sequence[str], codes: Sequence[str] = ()) -> None:
    """Raises RococapError if a name is why nothing was done."""
    if unknown := queue.unknown_images(conn, run, image_ids):
        raise RococapError(
            f"Run {run.name!r} has no picture {', '.join(unknown)}: nothing was changed. Check the IDs: they are the "
            "data set's own."
        )
    if unknown := queue.unknown_codes(conn, run, codes):
        raise RococapError(
            f"Nothing of run {run.name!r} failed with the code {', '.join(unknown)}: nothing was changed. See the "
            f"codes: {_with_run('failures', run.name)}"
        )


@cli.command()
@run_option("The run. [default: `default`, or the only one]")
@splits_option()
@click.option("--image-id", "image_ids", multiple=True, help="Only this picture. May be repeated.")
@click.option("--all", "everything", is_flag=True, help="Everything that is not finished.")
@db_option
def cancel(run_name: str | None, splits: tuple[str, ...], image_ids: tuple[str, ...], everything: bool) -> None:
    """Withdraw pictures that are not finished. A worker that holds some drops their captions."""
    if not (splits or image_ids or everything):
        raise click.UsageError("Say what to cancel: --split SPLIT, --image-id ID or --all.")
    with db.transaction(_database(), write=True) as conn:
        run = queue.find_run(conn, run_name)
        n = queue.cancel(conn, run, splits=splits, image_ids=image_ids)
        if not n:
            _refuse_unknown(conn, run, image_ids)
    _say(f"{run.name}: {n} cancelled" + (f". Undo: {_with_run('retry --cancelled', run.name)}" if n else ""))


# --- operating -------------------------------------------------------------------------------------------------


@cli.command()
@run_option("The run. [default: `default`, or the only one]")
@db_option
def pause(run_name: str | None) -> None:
    """Let workers finish what they hold and claim nothing more of a run, until `resume`."""
    _pause(run_name, True)


@cli.command()
@run_option("The run. [default: `default`, or the only one]")
@db_option
def resume(run_name: str | None) -> None:
    """Let workers claim of a paused run again."""
    _pause(run_name, False)


def _pause(run_name: str | None, paused: bool) -> None:
    with db.transaction(_database(), write=True) as conn:
        run = queue.find_run(conn, run_name)
        queue.pause(conn, run, paused)
    if paused:
        _say(f"{run.name}: paused. Go on with: {_with_run('resume', run.name)}")
    else:
        click.echo(f"{run.name}: workers may claim.")


@cli.command()
@click.option("--lease", "lease_ids", type=int, multiple=True, help="This lease, though its time has not run out.")
@db_option
def reap(lease_ids: tuple[int, ...]) -> None:
    """Free the pictures of dead workers: of leases whose time has run out, or of those named.

    Workers do it by themselves. Name a lease (see: rococap leases) only if its worker is surely dead, and do not reap
    right after an outage of the database: then every lease has run out, and its worker lives.
    """
    with db.transaction(_database(), write=True) as conn:
        reaped = [id for id in lease_ids if queue.crash(conn, id)] if lease_ids else queue.reap(conn)
    if unknown := sorted(set(lease_ids) - set(reaped)):
        raise RococapError(f"No open leases: {', '.join(map(str, unknown))}. Look at those there are: rococap leases")
    click.echo(f"Leases freed: {len(reaped)}. Their pictures are pending again." if reaped else "No lease has run out.")


@cli.command()
@click.option("--last", type=click.IntRange(0, 10_000), default=0, metavar="N", help="Also the last N that ended.")
@json_option
@db_option
def leases(last: int, as_json: bool) -> None:
    """Who holds which pictures, and for how long."""
    with db.transaction(_database()) as conn:
        found = queue.list_leases(conn, closed=last)
    if as_json:
        _echo_json([asdict(one) for one in found])
        return
    if not found:
        click.echo("No lease is open.")
        return
    rows = [
        [
            *(one.id, one.worker, f"{one.host}:{one.pid}", one.run, one.split, one.lane, one.state),
            *(f"{one.done}/{one.jobs}", _duration(one.age_sec), _ago(one.beat_sec_ago)),
            "-" if one.expires_in_sec is None else f"{one.expires_in_sec:.0f} s",
        ]
        for one in found
    ]
    header = ["lease", "worker", "process", "run", "split", "lane", "state", "done", "age", "beat", "left"]
    click.echo(_table(header, rows))


@cli.command()
@click.option("--all", "everyone", is_flag=True, help="Also those that stopped long ago.")
@json_option
@db_option
def workers(everyone: bool, as_json: bool) -> None:
    """Worker processes: running, stopped or lost."""
    with db.transaction(_database()) as conn:
        found = queue.list_workers(conn, everyone=everyone)
    if as_json:
        _echo_json([asdict(one) for one in found])
        return
    _say(_workers_table(found) if found else "No worker is running. Start one: rococap worker")


def _workers_table(seen: Sequence[queue.WorkerSeen]) -> str:
    """Everything; of those that stopped, what they told at the end."""
    rows = [
        [
            *(one.id, f"{one.host}:{one.pid}", one.device, one.state, one.done, _ago(one.seen_sec_ago)),
            *_measured(one.telemetry),
            *_further_measured(one.telemetry),
        ]
        for one in seen
    ]
    return _table(["worker", "process", "device", "state", "done", "seen", *_MEASURED, *_FURTHER_MEASURED], rows)


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
        _percent(told.fill),
        _percent(told.waited_sec / told.captioning_sec if told.captioning_sec else None),
        f"{memory_mb / 1000:.1f}",
    ]


def _further_measured(told: queue.Telemetry | None) -> list[str]:
    if told is None:
        return ["-"] * len(_FURTHER_MEASURED)
    total_mb = told.gpu_memory_total_mb
    total = "-" if total_mb is None else f"{total_mb / 1000:.1f}"
    return [_percent(told.busy), str(told.batch_size), total, _percent(told.gpu_utilisation)]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}"


def _ago(seconds: float) -> str:
    return f"{_duration(max(0.0, seconds))} ago"


@cli.command()
@click.option(
    "--keep-days", type=click.FloatRange(0, 36_500), default=30.0, show_default=True, help="How much history stays."
)
@db_option
def vacuum(keep_days: float) -> None:
    """Delete old failures that a later one of the same picture has replaced and what is left of deleted runs, and give
    free space back.

    Captions, leases and each picture's latest failure stay. An SQLite file is made smaller only while no worker runs.
    """
    database = _database()
    with db.transaction(database) as conn:
        before = db.now(conn) - int(keep_days * DAY_SEC * 1000)
        is_busy = bool(queue.list_leases(conn))
    _clear_deleted(database)
    deleted = 0
    while n := _prune(database, before):
        deleted += n
    click.echo(f"Old failures deleted: {deleted}.")
    if is_busy and database.dialect.name == "sqlite":
        _say("Workers hold leases: the file was left as large as it is. Once they have stopped: rococap vacuum")
    else:
        db.vacuum(database)


def _prune(database: Database, before: int) -> int:
    with db.transaction(database, write=True) as conn:
        return queue.prune(conn, before=before)


@cli.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@db_option
def backup(file: Path) -> None:
    """Copy the SQLite database as it is at one moment, while workers run. A file that is there is not overwritten."""
    click.echo(f"Copied to {db.back_up(_database(), file)}")


@cli.command()
@json_option
@db_option
def doctor(as_json: bool) -> None:
    """Check this machine, the database, the data set and the model; exit code 1 if something is wrong."""
    from rococap.doctor import Verdict, examine

    target = click.get_current_context().find_root().obj
    checks = []
    for check in examine(db.connect(target.url, create=False, force=True)):
        checks.append(check)
        if not as_json:
            click.echo(f"{check.verdict:8} {check.name}: {check.found}")
    if as_json:
        _echo_json([asdict(check) for check in checks])
    if any(check.verdict == Verdict.FAIL for check in checks):
        sys.exit(1)


@cli.command()
@db_option
def migrate() -> None:
    """Upgrade the database to this rococap's schema, after a backup copy."""
    target = click.get_current_context().find_root().obj
    done = db.migrate(target.url, force=target.force)
    click.echo("Upgraded." if done.upgraded else "The schema is up to date.")
    if done.backup:
        click.echo(f"The database as it was: {done.backup}")


# --- bench -----------------------------------------------------------------------------------------------------


def _sizes(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        sizes = [int(size) for size in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of numbers. Write it like 1,4,16.") from None
    return [click.IntRange(1, 4096)(size, param, ctx) for size in sizes]


@cli.command()
@run_option("The run to measure. [default: `default`, or the only one that has work]")
@click.option("--split", type=click.Choice(SPLITS), help="[default: the first that the run has]")
@click.option(
    "--pictures", type=click.IntRange(1, 100_000), default=64, show_default=True, metavar="N", help="How many to use."
)
@click.option(
    "--batch-size",
    "sizes",
    callback=_sizes,
    metavar="N,N,…",
    help="Batch sizes to measure. [default: powers of two up to the automatic one]",
)
@engine_options
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("results_medical/bench"),
    show_default=True,
    metavar="FOLDER",
    help="Where bench.json and bench.png go.",
)
@json_option
@db_option
def bench(
    run_name: str | None,
    split: str | None,
    pictures: int,
    sizes: list[int] | None,
    output: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure this machine with a run's model and pictures. The queue is only read.

    Reading, preparing, captioning by batch size and the whole worker; what the split will take, and what to set. Each
    batch size captions all N pictures: where the model takes minutes a picture, begin with --pictures 4.
    """
    from rococap import bench as bench_module
    from rococap.engines import Options
    from rococap.export import write_json

    _check_engine(options)
    database = _database()
    with _bar() as progress:
        measured = bench_module.measure(
            database,
            Options(**options),
            run_name=run_name,
            split=split,
            most=pictures,
            sizes=sizes,
            progress=progress,
        )
    write_json(output / "bench.json", asdict(measured))
    bench_module.draw(measured, output / "bench.png")
    if as_json:
        _echo_json(asdict(measured))
    else:
        click.echo(_measured_text(measured))
        click.echo(f"\nWritten: {output / 'bench.json'}, {output / 'bench.png'}")


def _measured_text(measured: Any) -> str:
    """Within 80 columns, whatever the model's folder is."""
    hours, share = measured.estimate, 100 * measured.efficiency
    failures = f", and {measured.failures} that cannot be captioned" if measured.failures else ""
    facts = [
        ["model", _shortened(measured.model)],
        ["device", f"{measured.device}, {measured.dtype}, {measured.cpu_count} CPU cores"],
        ["pictures", f"{measured.pictures} of {_shortened(measured.run, 24)} {measured.split}{failures}"],
        ["reading", f"{measured.load_ms:.1f} ms a picture"],
        ["preparing", f"{measured.prepare_ms:.1f} ms a picture"],
        ["automatic", f"batch size {measured.automatic_batch_size}"],
        ["worker", f"{_significant(measured.worker_pictures_per_sec)} pictures/s, {share:.0f} % of the model alone"],
        ["estimate", f"{_hours(hours.split_hours)} for all {measured.split_pictures} pictures of the split"],
        ["", f"{_hours(hours.unfinished_hours)} for the {measured.unfinished_pictures} that are not finished"],
    ]
    rates = [
        [rate.batch_size, _significant(rate.pictures_per_sec), _significant(rate.tokens_per_sec)]
        for rate in measured.batch_sizes
    ]
    return "\n\n".join(
        [
            _lines(facts),
            _table(["batch size", "pictures/s", "new tokens/s"], rates),
            textwrap.fill(measured.recommendation, 80, break_on_hyphens=False),
        ]
    )


def _lines(facts: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"{name:<11}{value}" for name, value in facts)


def _shortened(text: str, most: int = 66) -> str:
    """Its end, which tells folders apart."""
    return text if len(text) <= most else "…" + text[1 - most :]


def _hours(hours: float) -> str:
    return f"about {_duration(3600 * hours)}"


def _significant(number: float) -> float:
    return round(number, 1) if number >= 10 else float(f"{number:.3g}")


# --- demo ------------------------------------------------------------------------------------------------------


@cli.command()
@click.option(
    "--dir",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Where everything goes.",
)
@click.option("--images", type=click.IntRange(min=5), default=200, show_default=True, help="How many phantoms to draw.")
@click.option("--workers", type=click.IntRange(1, 64), default=2, show_default=True, help="Processes that caption.")
def demo(folder: Path, images: int, workers: int) -> None:
    """Run the whole job on drawings: phantoms, two workers, the small model in this package, an export, a report."""
    from rococap.demo import run as run_demo

    click.echo("Phantoms: drawings made by a program, captioned by a small model that was trained on such drawings.")
    click.echo("They show how rococap works, not what Qwen2-VL sees. Nothing in rococap is for clinical use.\n")
    with _bar() as bar:
        result = run_demo(folder, images, workers, bar if _console().is_terminal else _steps())
    for shown in result.examples[:4]:
        click.echo(f"{shown.image_id}\n  original   {shown.original}\n  generated  {shown.generated}")
    click.echo(f"\n{_captioned_text(result, workers)}")
    click.echo(f"Look at  {result.sheet}")
    click.echo(f"Look at  {result.report}")
    for path in result.exports:
        click.echo(f"Read     {path}")
    click.echo(f"Ask      rococap --db {shlex.quote(str(folder / 'rococap.db'))} status")


def _captioned_text(result: Any, workers: int) -> str:
    """Not of captions that were there that they were made now."""
    exact = f"{result.exact} of them word for word as the original."
    if result.before == result.captioned:
        return (
            f"{result.captioned} pictures were captioned by an earlier demo in this folder, {exact}\n"
            "Nothing was captioned again; the files below were made anew from its queue."
        )
    now = f"{result.captioned - result.before} pictures captioned by {workers} workers in {result.seconds:.0f} s, "
    if result.before:
        return f"{now}after {result.before} by an earlier demo in this folder, {exact}"
    return now + exact


def _steps() -> Callable[[str, int, int], None]:
    """Without a terminal: each step once, as it begins."""
    seen: set[str] = set()

    def step(what: str, done: int, total: int) -> None:
        if what not in seen:
            seen.add(what)
            click.echo(f"{what} …")

    return step


def main() -> None:
    cli()
