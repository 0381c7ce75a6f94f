"""The command that shows the queue in a browser, and answers requests for captions: serve."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from sqlalchemy import Engine as Database

from rococap import db, queue
from rococap.cli.enqueue import checked_recipe, chosen_recipe, explicit, recipe_options
from rococap.cli.options import DAY_SEC, Seconds, cli, db_option, open_database, run_option
from rococap.cli.worker import batch_size_option, check_devices, devices_option, echo_log_line, local_options
from rococap.engines import EngineInfo, Options
from rococap.errors import RococapError
from rococap.recipe import Recipe

if TYPE_CHECKING:
    from fastapi import FastAPI

    from rococap.web.calls import RecipeOf, Service
    from rococap.web.pool import Pool

OF_THE_ENGINE = ("engine", "device", "decode", "graphs", "device_map", "batch_size")
OF_THE_SERVICE = ("served_name", "max_waiting", "request_timeout")


@dataclass(frozen=True, slots=True)
class Member:
    """What a process that --devices starts serves, and at which socket. `engine` and `service` are options."""

    recipe: str
    run: str | None
    engine: dict[str, Any]
    service: dict[str, Any]
    drain_timeout: float
    socket: str = ""


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
@devices_option
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
@click.option("--member", metavar="JSON", hidden=True, help="What a process that --devices starts serves.")
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
    devices: list[str] | None,
    drain_timeout: float,
    member: str | None,
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
        from rococap.web.calls import Service
    except ModuleNotFoundError as error:
        raise RococapError(f"The server needs FastAPI ({error}). Install it: pip install 'rococap[web]'") from error
    if member is not None:
        _be_member(Member(**json.loads(member)))
        return
    engine = {name: options.pop(name) for name in OF_THE_ENGINE}
    limits = {name: options.pop(name) for name in OF_THE_SERVICE}
    recipe = options
    _check_usage(ctx, run_name, recipe)
    check_devices(ctx, devices)
    if read_only and (run_name is not None or recipe["model"]):
        raise click.UsageError("--read-only accepts no requests for captions: leave it out, or --run and --model.")
    database = None if recipe["model"] else open_database(pooled=False)
    chosen = _recipe_of_run(database, run_name) if database else checked_recipe(chosen_recipe(recipe))
    service: Service | Pool | None = None
    if chosen is not None and devices:
        service = _pool(devices, Member(chosen.to_json(), run_name, engine, limits, drain_timeout))
    elif chosen is not None:
        service = _service(chosen, engine, _check_of(database, run_name), **limits)
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
        backend = service.captioner if isinstance(service, Service) else service
        server.serve(application, listening, backend, drain_timeout)


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
            if is_given and param.name in (*OF_THE_ENGINE, *OF_THE_SERVICE, "devices", "drain_timeout"):
                message = f"{param.opts[0]} goes with a model: name one with --model, or a run with --run."
                raise click.UsageError(message)


def _recipe_of_run(database: Database, name: str | None) -> Recipe | None:
    """The recipe of the run of this name, or None without one."""
    if name is None:
        return None
    with db.transaction(database) as conn:
        run = queue.get_run(conn, name)
        queue.check_rules(conn, run)
    return run.recipe


def _check_of(database: Database | None, name: str | None) -> Callable[[EngineInfo], None]:
    """The check that what was loaded is what made the captions of a run, if one is served."""

    def check(info: EngineInfo) -> None:
        if database is None or name is None:
            return
        with db.transaction(database) as conn:
            queue.check_pinned(conn, queue.get_run(conn, name), info)

    return check


def _service(
    recipe: Recipe,
    engine: dict[str, Any],
    check: Callable[[EngineInfo], None],
    on_state: Callable[[str], None] = lambda state: None,
    *,
    served_name: str | None,
    max_waiting: int,
    request_timeout: float,
) -> "Service":
    from rococap.web.calls import Service
    from rococap.web.captioner import Captioner

    known_as = served_name or (Path(recipe.model).name if Path(recipe.model).is_dir() else recipe.model)
    captioner = Captioner(recipe, Options(**engine), max_waiting, check, on_state, stall_timeout=request_timeout)
    return Service(captioner, known_as, request_timeout)


# --- several devices -------------------------------------------------------------------------------------------


def _pool(devices: Sequence[str], member: Member) -> "Pool":
    from rococap.web.pool import Pool
    from rococap.worker import children

    target = click.get_current_context().find_root().obj

    def command(device: str, socket: Path) -> list[str]:
        one = replace(member, engine=member.engine | {"device": device}, socket=str(socket))
        return children.member_command("serve", json.dumps(asdict(one)), force=target.force, debug=target.debug)

    # `ps` would show the password of the database on a command line.
    env = children.environment(devices) | {"ROCOCAP_DB": target.url}
    return Pool(devices, command, env, echo_log_line, member.service["request_timeout"])


def _be_member(member: Member) -> None:
    from rococap.web import access, bare, server
    from rococap.worker import children

    children.leave_with_parent()
    database = open_database(pooled=False) if member.run is not None else None
    service = _service(
        Recipe.from_json(member.recipe),
        member.engine,
        _check_of(database, member.run),
        lambda state: children.report_to_parent({"state": state}),
        **member.service,
    )
    recipe_of = None if database is None else _recipes_of(database)
    # The parent has already checked who may ask.
    allowed = access.Access(0, frozenset(["localhost"]))
    with server.listen_at(member.socket) as listening:
        application = bare.create_bare_app(allowed, service, recipe_of)
        server.serve(application, listening, service.captioner, member.drain_timeout)


def _recipes_of(database: Database) -> "RecipeOf":
    def recipe_of(name: str) -> Recipe:
        with db.transaction(database) as conn:
            return queue.get_run(conn, name).recipe

    return recipe_of
