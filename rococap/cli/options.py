"""What the commands share: the group, common options, opening the database, and how errors are reported."""

import codecs
import errno
import json
import logging
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource
from sqlalchemy import Engine as Database
from sqlalchemy.exc import DatabaseError as DriverError

from rococap import __version__, db, open_files
from rococap.data import SPLITS
from rococap.errors import RococapError
from rococap.urls import holds_password

if TYPE_CHECKING:
    from rococap.scores.evaluate import Metric

DEFAULT_DATASET = "eltorio/ROCOv2-radiology"
MAX_ROWS = 10**12
DAY_SEC = 86_400.0
SHOWN_FAILURES = 10

SECTIONS = {
    "Main job": ("enqueue", "worker", "launch", "status", "export"),
    "Inspect": ("serve", "runs", "failures", "leases", "workers", "prompts"),
    "Operate": ("retry", "cancel", "pause", "resume", "reap", "vacuum", "backup", "copy-db"),
    "Results": ("compare", "evaluate", "finetune", "probe", "report", "restore", "reviews", "study", "merge"),
    "Set-up": ("doctor", "migrate", "bench", "demo"),
}
"""The headings of `rococap --help` and the commands below each, in the order in which a user needs them."""

F = TypeVar("F", bound=Callable[..., Any])


class Seconds(click.FloatRange):
    """Seconds within bounds. FloatRange alone accepts nan, which no bound excludes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = float(super().convert(value, param, ctx))
        return self.fail(f"{value!r} is not a number.", param, ctx) if math.isnan(seconds) else seconds


class Commands(click.Group):
    """Lists the commands by section, and reports an error that a user can fix as one line and an exit code.

    The exit code is 2 for wrong usage and 1 for everything else.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(sys.stdout, TextIOWrapper):
            # Where the locale is not UTF-8, as on many clusters, characters that it lacks are escaped.
            sys.stdout.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (RococapError, DriverError, OSError, UnicodeEncodeError, KeyboardInterrupt) as error:
            if ctx.params.get("debug") or isinstance(error, BrokenPipeError):
                raise
            raise click.ClickException(for_this_queue(ctx, _message(error))) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        for section, names in SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl([(name.ljust(width), _summary(self.commands[name])) for name in names])


def _summary(command: click.Command) -> str:
    """The first sentence of the command's help, which the formatter wraps but never cuts."""
    return command.get_short_help_str(limit=1_000)


def for_this_queue(ctx: click.Context, text: str) -> str:
    """The text, with this invocation's --db added to the commands in it, so that they work when pasted.

    A URL that holds a password is not repeated.
    """
    target = ctx.find_root().obj
    if target is None or not target.is_option or holds_password(target.url):
        return text
    commands = "|".join(cli.commands)
    return re.sub(rf"\brococap (?=({commands})\b)", lambda _: f"rococap --db {shlex.quote(target.url)} ", text)


def say(text: str) -> None:
    """Prints text whose commands may be pasted."""
    click.echo(for_this_queue(click.get_current_context(), text))


def _message(error: BaseException) -> str:
    match error:
        case KeyboardInterrupt():
            return "Interrupted. Nothing is half-written: run the same command again to continue."
        case DriverError():
            return db.explain(error)
        case UnicodeEncodeError():
            return f"{error.object!r} is not valid Unicode. Type it again."
        case OSError(errno=errno.EMFILE):
            return f"This process may open only {open_files.limit()} files, which is too few. {open_files.ADVICE}"
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
    show_envvar=True,
    metavar="URL",
    help="The queue's database: a file, sqlite:///FILE or postgresql+psycopg://…",
)
@click.option("--force", is_flag=True, help="Open SQLite files even on network file systems, at your own risk.")
@click.option("--debug", is_flag=True, help="Show tracebacks and debug logs.")
@click.pass_context
def cli(ctx: click.Context, url: str, force: bool, debug: bool) -> None:
    """Caption radiology pictures with Qwen2-VL through a crash-safe work queue.

    \b
    rococap enqueue --split train     register every picture of a split
    rococap worker                    caption them; start as many as you like
    rococap status                    show the progress
    rococap export --split train      write the captions as CSV

    Captions are machine-generated and not for clinical use.
    """
    ctx.obj = Target(url, force, debug, ctx.get_parameter_source("url") is ParameterSource.COMMANDLINE)
    _set_up_logging(debug)


def _set_up_logging(debug: bool) -> None:
    level = logging.DEBUG if debug else logging.INFO
    if sys.stderr.isatty():
        from rich.logging import RichHandler

        logging.basicConfig(
            level=level, format="%(message)s", handlers=[RichHandler(console=stderr_console(), show_path=False)]
        )
    else:
        logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s")
    for library in ("absl", "alembic", "httpx", "httpx2", "urllib3", "filelock", "PIL"):
        logging.getLogger(library).setLevel(logging.WARNING)
    # Trainer imports it, and it warns of a kernel that only weights of 4 bits on a CPU would use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@cache
def stderr_console() -> Any:
    """Standard error. Logs and progress lines share one object, or they would overwrite each other."""
    from rich.console import Console

    return Console(stderr=True)


@dataclass(slots=True)
class Target:
    """The database that the options before or after the command name, and how to open it.

    `is_option` is true if --db named it, and false if the environment or the default did.
    """

    url: str
    force: bool
    debug: bool
    is_option: bool


def open_database(*, may_be_new: bool = False, pooled: bool = True) -> Database:
    """Opens this invocation's database. Raises DatabaseError if it does not exist, unless `may_be_new`."""
    target = click.get_current_context().find_root().obj
    return db.connect(target.url, must_exist=not may_be_new, force=target.force, pooled=pooled)


def echo_json(value: Any) -> None:
    is_utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    click.echo(json.dumps(value, indent=2, ensure_ascii=not is_utf8))


def _set_url(ctx: click.Context, param: click.Parameter, url: str | None) -> None:
    if url is not None:
        ctx.find_root().obj.url = url
        ctx.find_root().obj.is_option = True


db_option = click.option(
    "--db",
    metavar="URL",
    expose_value=False,
    callback=_set_url,
    help="The queue's database. May also be given before the command.",
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
        help=help
        or ("The split. May be repeated." if required else "Only this split. May be repeated. [default: all]"),
    )


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Yields `progress(step, done, total)`, which draws a bar per step on a terminal and nothing elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = stderr_console()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(step, total=total)
            bar.update(tasks[step], completed=done, total=total)

        yield progress


strip_option = click.option(
    "--strip-reasoning",
    is_flag=True,
    help="Leave out the model's reasoning: closed <think> blocks and the white space after them.",
)


def also_options(command: F) -> F:
    """Options for scores that are computed only on request: `also`, `commands` and `command_limit`."""
    limit = click.option(
        "--command-limit",
        type=Seconds(min=1),
        default=3600,
        show_default=True,
        metavar="SECONDS",
        help="What a command of --also-command may take for 1,000 captions.",
    )
    commands = click.option(
        "--also-command",
        "commands",
        multiple=True,
        metavar="NAME=COMMAND",
        help="Compute a score by a command, which may have an environment of its own. May be repeated.",
    )
    also = click.option(
        "--also",
        multiple=True,
        metavar="SCORE",
        help="Compute this score too: bertscore_f1 or meteor_1_5, which need an extra of rococap (without a GPU, "
        "BERTScore takes hours), one that a package brings, or your own, [NAME=]package.module:function. May be "
        "repeated.",
    )
    return also(commands(limit(command)))


def requested_scores(
    also: Sequence[str], commands: Sequence[str], command_limit: float
) -> tuple[list[str], list["Metric"]]:
    """The scores that `also_options` ask for: the names of our own, and plug-ins."""
    from rococap.scores import plugins

    try:
        return plugins.requested(also, commands, command_limit)
    except RococapError as error:
        raise click.UsageError(str(error)) from error


def runs_option(help: str) -> Callable[[F], F]:
    return click.option("--run", "names", multiple=True, metavar="NAME", help=help)
