"""`rococap merge`, which combines the databases of parts, and `rococap copy-db`, which moves a database."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rococap.cli.options import cli, db_option, echo_json, json_option, open_database, progress_bar, say
from rococap.cli.results import warn_without_manifest
from rococap.errors import RococapError
from rococap.figures import counted

if TYPE_CHECKING:
    from rococap.transfer import Merged


@cli.command("merge")
@click.argument("sources", metavar="FILE…", nargs=-1, required=True)
@json_option
@db_option
def merge_command(sources: tuple[str, ...], as_json: bool) -> None:
    """Combine the databases or exports of parts in this database.

    A database, a file or a URL, brings its pictures and runs along. For exports and checkpoint segments, enqueue the
    split first. Parts may be merged in any order, before they are finished, and again. Of a picture that was captioned
    twice, the caption that people have judged, edited or studied is kept, or else the one that was made first.
    """
    from rococap import transfer

    databases = [source for source in sources if not transfer.is_export(source)]
    for source in sources:
        if "://" not in source and not Path(source).expanduser().is_file():
            raise RococapError(f"There is no file {source}. Name the databases, exports or checkpoints of the parts.")
    for source in databases:
        transfer.open_source(source).dispose()  # before a new database is created
    database = open_database(may_be_new=bool(databases))
    results = []
    with progress_bar() as progress:
        for source in sources:
            results.append(transfer.merge(database, source, progress))
            if not as_json:
                _echo_merged(results[-1])
    if as_json:
        echo_json([asdict(result) for result in results])
    warn_without_manifest([Path(result.source) for result in results if not result.has_manifest])


def _echo_merged(result: "Merged") -> None:
    part = f" ({', '.join(result.parts)})" if result.parts else ""
    if not result.is_new:
        already = "merged already, " if result.known and not result.unknown else ""
        click.echo(f"{result.source}{part}: {already}nothing is new")
    else:
        click.echo(
            f"{result.source}{part}: {counted(result.pictures, 'new picture')}; "
            f"{counted(result.merged, 'caption')} merged, {result.known} known; {result.failed} failed"
        )
    people = {"reviews": result.reviews, "edits": result.edits, "rows of reader studies": result.studies}
    if any(people.values()):
        click.echo("  with " + ", ".join(f"{n} {what}" for what, n in people.items() if n))
    if result.twice:
        click.echo(f"  captioned twice: {counted(result.twice, 'picture')}; one caption of each was kept")
    if result.leased:
        click.echo(f"  {result.leased} are being captioned here now: merge again once the workers have stopped")
    if result.unknown:
        click.echo(
            f"  {result.unknown} are not among the pictures here, or have another original caption, and were left out"
        )
    if result.studies_left:
        names = ", ".join(result.studies_left)
        say(f"  studies left out until all of their pictures are captioned here: {names}. Then merge again")


@cli.command("copy-db")
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
def copy_command(source: str, target: str) -> None:
    """Copy a database, also between SQLite and PostgreSQL.

    FROM and TO are URLs, or the paths of SQLite files; TO is new or empty. Stop the workers first. The copy is verified
    by the number and the hashes of the rows of each table; if it is interrupted, TO stays empty.
    """
    from rococap import transfer

    with progress_bar() as progress:
        copied = transfer.copy(source, target, progress)
    for table in copied:
        click.echo(f"{table.table}: {counted(table.rows, 'row')}, {table.digest[:16]}")
    click.echo("Copied and verified.")
