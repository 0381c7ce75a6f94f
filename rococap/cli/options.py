"""What commands share: the group, options, the database they open, and how errors are told."""

import codecs
import errno
import json
import logging
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import TextIOWrapper
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from sqlalchemy import Engine as Database
from sqlalchemy.exc import DatabaseError as DriverError

from rococap import __version__, db, open_files
from rococap.data import SPLITS
from rococap.errors import RococapError
from rococap.urls import holds_password

DEFAULT_DATASET = "eltorio/ROCOv2-radiology"
MANY = 10**12
DAY_SEC = 86_400.0
SHOWN_FAILURES = 10

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
            raise click.ClickException(for_this_queue(ctx, _told(error))) from error


def for_this_queue(ctx: click.Context, text: str) -> str:
    """The text, its commands with the --db that this one was given, so that they work when pasted.

    One that holds a password is not repeated.
    """
    target = ctx.find_root().obj
    if target is None or not target.is_option or holds_password(target.url):
        return text
    commands = "|".join(cli.commands)
    return re.sub(rf"\brococap (?=({commands})\b)", lambda _: f"rococap --db {shlex.quote(target.url)} ", text)


def say(text: str) -> None:
    click.echo(for_this_queue(click.get_current_context(), text))


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
            level=level, format="%(message)s", handlers=[RichHandler(console=stderr_console(), show_path=False)]
        )
    else:
        logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s")
    for chatty in ("absl", "alembic", "httpx", "httpx2", "urllib3", "filelock", "PIL"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


@cache
def stderr_console() -> Any:
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


def open_database(*, may_be_new: bool = False) -> Database:
    target = click.get_current_context().find_root().obj
    return db.connect(target.url, must_exist=not may_be_new, force=target.force)


def echo_json(value: Any) -> None:
    is_utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    click.echo(json.dumps(value, indent=2, ensure_ascii=not is_utf8))


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


def with_run(command: str, name: str) -> str:
    """A command to paste, for this run."""
    return f"rococap {command}" + ("" if name == "default" else f" --run {shlex.quote(name)}")


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on a terminal; silence elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = stderr_console()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield progress


strip_option = click.option(
    "--strip-reasoning",
    is_flag=True,
    help="Leave out what a model thought aloud: closed <think> blocks, and the white space after them.",
)


def runs_option(help: str) -> Callable[[F], F]:
    return click.option("--run", "names", multiple=True, metavar="NAME", help=help)
