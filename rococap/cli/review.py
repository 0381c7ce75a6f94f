"""Commands for what people say of captions: reviews."""

from dataclasses import asdict
from pathlib import Path

import click

from rococap import db, queue
from rococap.cli.options import cli, db_option, echo_json, json_option, open_database, run_option, say
from rococap.cli.tables import within_80


@cli.command("reviews")
@click.option(
    "--export",
    "to_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write all verdicts and edits to this JSON Lines file.",
)
@click.option(
    "--import",
    "from_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Add the verdicts and edits in this file. Those that are here already are not added again.",
)
@run_option("Only this run. [default: all]")
@json_option
@db_option
def reviews_command(to_file: Path | None, from_file: Path | None, run_name: str | None, as_json: bool) -> None:
    """Count, export or import the verdicts and edits of readers.

    The file has a line for each verdict and each edit, with its reader and time, and with the caption that it is about.
    """
    from rococap import review

    if to_file and from_file:
        raise click.UsageError("--export and --import are two steps: give one of them.")
    if from_file and run_name is not None:
        raise click.UsageError("A file names its runs: leave out --run with --import.")
    if as_json and (to_file or from_file):
        raise click.UsageError("--json prints the counts: leave it out with --export and --import.")
    database = open_database()
    with db.transaction(database) as conn:
        run = None if run_name is None else queue.get_run(conn, run_name)
    if to_file:
        click.echo(f"{to_file}: {review.export_reviews(database, to_file, run)} verdicts and edits")
    elif from_file:
        added = review.import_reviews(database, from_file)
        click.echo(f"{from_file}: {added.reviews} verdicts and {added.edits} edits added, {added.known} known already")
    else:
        with db.transaction(database) as conn:
            counts = review.counts(conn, run)
        if as_json:
            echo_json([asdict(one) for one in counts])
        elif counts:
            header = ["run", "split", "reader", *review.VERDICTS, "edits"]
            rows = [[one.run, one.split, one.reader, *map(str, (*one.verdicts.values(), one.edits))] for one in counts]
            click.echo(within_80(header, rows, 2, 0))
        else:
            say("Nobody has reviewed or edited a caption here yet.")
