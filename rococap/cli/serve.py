"""The command that shows the queue in a browser, and answers requests for captions: serve."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from sqlalchemy import Engine as Database

from rococap import db, queue
from rococap.cli.enqueue import checked_recipe, chosen_recipe, explicit, recipe_options
from rococap.cli.options import DAY_SEC, Seconds, cli, db_option, open_database, run_option
from rococap.cli.worker import batch_size_option, local_options
from rococap.engines import EngineInfo, Options
from rococap.errors import RococapError
from rococap.recipe import Recipe

if TYPE_CHECKING:
    from fastapi import FastAPI

    from rococap.web.calls import Service


OF_THE_ENGINE = ("engine", "device", "decode", "graphs", "device_map", "batch_size")
OF_THE_SERVICE = ("served_name", "max_waiting", "request_timeout")


@cli.command("serve")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="The address to listen at.")
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=8642,
    show_default=True,
    metavar="N",
    help="The port to listen at; 0 takes a free one.",
)
@click.option(
    "--allow-host",
    "names",
    multiple=True,
    metavar="NAME",
    help="Another name that browsers may use for this server, such as that of a proxy. May be repeated.",
)
@click.option("--read-only", is_flag=True, help="Show the queue, and let nobody change it.")
@run_option("Also answer requests for captions, with the recipe of this run.")
@recipe_options(None, "Answer requests for captions with this model, and without a database.")
@click.option(
    "--engine",
    type=click.Choice(["transformers", "vllm"]),
    default="transformers",
    show_default=True,
    help="What runs the model.",
)
@local_options
@batch_size_option
@click.option(
    "--name",
    "served_name",
    metavar="NAME",
    help="What clients call the model. [default: its hub id, or the name of its folder]",
)
@click.option(
    "--max-waiting",
    type=click.IntRange(1, 100_000),
    default=256,
    show_default=True,
    metavar="N",
    help="Pictures that may wait for the model. Beyond it, clients are asked to come back later.",
)
@click.option(
    "--request-timeout",
    type=Seconds(0.1, DAY_SEC),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="Time after which a request that is not answered fails.",
)
@click.option(
    "--drain-timeout",
    type=Seconds(0, DAY_SEC),
    default=25.0,
    show_default=True,
    metavar="SECONDS",
    help="Time that SIGTERM, SIGUSR1 and Ctrl-C leave the requests that were accepted.",
)
@db_option
@click.pass_context
def serve_command(
    ctx: click.Context,
    /,
    host: str,
    port: int,
    names: tuple[str, ...],
    read_only: bool,
    run_name: str | None,
    drain_timeout: float,
    **options: Any,
) -> None:
    """Show the queue in a browser, live, and answer requests for captions.

    With --run, requests are answered with the recipe of that run; with --model, without a database.

    At any other address than this machine's own, a token is needed: that in ROCOCAP_TOKEN, or one that is made and
    printed once. Browsers are given it with the link that is printed, other programs send it as
    `Authorization: Bearer TOKEN`.
    """
    try:
        from rococap.web import access, app, bare, server
    except ModuleNotFoundError as error:
        raise RococapError(f"rococap serve needs FastAPI ({error}). Install it: pip install 'rococap[web]'") from error
    engine = {name: options.pop(name) for name in OF_THE_ENGINE}
    limits = {name: options.pop(name) for name in OF_THE_SERVICE}
    recipe = options
    _check_usage(ctx, run_name, recipe)
    if read_only and (run_name is not None or recipe["model"]):
        raise click.UsageError("--read-only accepts no requests for captions: leave it out, or --run and --model.")
    database = None if recipe["model"] else open_database(pooled=False)
    service = None
    if database is None:
        service = _service_of_model(engine, recipe, **limits)
    elif run_name is not None:
        service = _service_of_run(database, run_name, engine, **limits)
    given = os.environ.get("ROCOCAP_TOKEN", "")
    with server.listen(host, port) as listening:
        port = listening.getsockname()[1]
        allowed = access.access_for(host, port, token=given, names=names, read_only=read_only)
        click.echo(_welcome(access.link_to(host, port), allowed.token, bool(given), has_pages=database is not None))
        if database is not None:
            application: FastAPI = app.create_app(database, allowed, service)
        else:
            assert service is not None
            application = bare.create_bare_app(allowed, service)
        server.serve(application, listening, None if service is None else service.captioner, drain_timeout)


def _welcome(link: str, token: str | None, is_given: bool, *, has_pages: bool) -> str:
    """Says where the server is, and which token it asks for: the one that is `is_given` is not repeated."""
    what = "The dashboard" if has_pages else "The inference API"
    is_shown = token is not None and not is_given
    query = f"?token={token}" if is_shown and has_pages else ""
    lines = [f"{what} is at {link}{query} until you stop this with Ctrl-C."]
    if is_given:
        lines.append("It asks for the token in ROCOCAP_TOKEN.")
    elif is_shown and not has_pages:
        lines.append(f"Clients send this token as their API key: {token}")
    return "\n".join(lines)


def _check_usage(ctx: click.Context, run_name: str | None, recipe: dict[str, Any]) -> None:
    fields = {name: value for name, value in recipe.items() if name not in ("preset", "prompt_file", "prompts")}
    given = explicit(ctx, fields)
    first = min(given, default="").replace("_", "-")
    if run_name is not None and given:
        raise click.UsageError(f"--run serves that run's recipe: leave out --{first}.")
    if given and "model" not in given:
        raise click.UsageError(f"--{first} goes with a model: name one with --model.")
    if given and ctx.find_root().obj.is_option:
        raise click.UsageError("--model serves without a database: leave out --db, or name a run of it with --run.")
    if run_name is None and not given:
        for param in ctx.command.params:
            is_given = ctx.get_parameter_source(param.name or "") is ParameterSource.COMMANDLINE
            if is_given and param.name in (*OF_THE_ENGINE, *OF_THE_SERVICE, "drain_timeout"):
                message = f"{param.opts[0]} goes with a model: name one with --model, or a run with --run."
                raise click.UsageError(message)


def _service_of_model(options: dict[str, Any], recipe: dict[str, Any], **service: Any) -> "Service":
    return _service(checked_recipe(chosen_recipe(recipe)), options, lambda info: None, **service)


def _service_of_run(database: Database, name: str, options: dict[str, Any], **service: Any) -> "Service":
    with db.transaction(database) as conn:
        run = queue.get_run(conn, name)
        queue.check_rules(conn, run)

    def check(info: EngineInfo) -> None:
        with db.transaction(database) as conn:
            queue.check_pinned(conn, run, info)

    return _service(run.recipe, options, check, **service)


def _service(
    recipe: Recipe,
    options: dict[str, Any],
    check: Callable[[EngineInfo], None],
    *,
    served_name: str | None,
    max_waiting: int,
    request_timeout: float,
) -> "Service":
    from rococap.web.calls import Service
    from rococap.web.captioner import Captioner

    known_as = served_name or (Path(recipe.model).name if Path(recipe.model).is_dir() else recipe.model)
    captioner = Captioner(recipe, Options(**options), max_waiting, check, stall_timeout=request_timeout)
    return Service(captioner, known_as, request_timeout)
