"""The command that shows the queue in a browser: serve."""

import os

import click

from rococap.cli.options import cli, db_option, open_database
from rococap.errors import RococapError


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
@db_option
def serve_command(host: str, port: int, names: tuple[str, ...], read_only: bool) -> None:
    """Show the queue in a browser, live.

    At any other address than this machine's own, a token is needed: that in ROCOCAP_TOKEN, or one that is made and
    printed once. Browsers are given it with the link that is printed, other programs send it as
    `Authorization: Bearer TOKEN`.
    """
    try:
        from rococap.web import access, app, server
    except ModuleNotFoundError as error:
        raise RococapError(f"rococap serve needs FastAPI ({error}). Install it: pip install 'rococap[web]'") from error
    database = open_database(pooled=False)
    given = os.environ.get("ROCOCAP_TOKEN", "")
    with server.listen(host, port) as listening:
        port = listening.getsockname()[1]
        allowed = access.access_for(host, port, token=given, names=names, read_only=read_only)
        link = access.link_to(host, port) + ("" if given or not allowed.token else f"?token={allowed.token}")
        click.echo(f"The dashboard is at {link} until you stop this with Ctrl-C.")
        if given:
            click.echo("It asks for the token in ROCOCAP_TOKEN.")
        server.serve(app.create_app(database, allowed), listening)
