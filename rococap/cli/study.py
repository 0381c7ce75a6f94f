"""Commands for blinded reader studies: study new, status, results, unblind."""

import getpass
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rococap import db, queue
from rococap.cli.options import cli, db_option, echo_json, json_option, open_database, runs_option, say
from rococap.cli.tables import within_80
from rococap.data import SPLITS
from rococap.errors import RococapError
from rococap.figures import counted

if TYPE_CHECKING:
    from rococap.review import Progress


@cli.group("study")
def study_group() -> None:
    """Let readers compare runs without knowing which is which.

    Readers read in the browser; the texts of each picture stand in an order that was drawn for it and for the reader.
    Which run wrote which stays closed until everything is read.
    """


@study_group.command("new")
@click.argument("name")
@runs_option("A run whose captions to read. May be repeated.")
@click.option("--with-original", is_flag=True, help="Also show the original captions, as one more text.")
@click.option("--split", type=click.Choice(SPLITS), required=True, help="The split to draw pictures from.")
@click.option(
    "--pictures", type=click.IntRange(1, 10_000), required=True, metavar="N", help="Pictures that each reader reads."
)
@click.option("--readers", type=click.IntRange(1, 100), required=True, metavar="R", help="Number of readers.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**62),
    default=0,
    show_default=True,
    metavar="S",
    help="Draws the same study again from the same captions.",
)
@click.option(
    "--form",
    "form_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="A TOML file with the ratings to ask for. [default: asks which text is best]",
)
@db_option
def new_command(
    name: str,
    names: tuple[str, ...],
    with_original: bool,
    split: str,
    pictures: int,
    readers: int,
    seed: int,
    form_file: Path | None,
) -> None:
    """Draw a study: pictures balanced by modality, and the order of their texts.

    Only pictures that every run has captioned are drawn.
    """
    from rococap import review
    from rococap.scores import concepts

    if not names:
        raise click.UsageError("Name a run whose captions to read: --run NAME.")
    form = review.read_form(form_file) if form_file else review.Form()
    with db.transaction(open_database(), write=True) as conn:
        made = review.new_study(
            *(conn, name, queue.find_runs(conn, names), split),
            with_original=with_original,
            n_pictures=pictures,
            n_readers=readers,
            seed=seed,
            form=form,
            modality=lambda cui: concepts.modality(concepts.parse(cui)),
        )
    say(f"{made.name}: {counted(made.n_pictures, 'picture')} for each of {counted(made.n_readers, 'reader')}")


@study_group.command("status")
@click.argument("name", required=False)
@json_option
@db_option
def study_status_command(name: str | None, as_json: bool) -> None:
    """Show how far the readers of a study, or of all studies, are."""
    from rococap import review

    with db.transaction(open_database()) as conn:
        studies = review.list_studies(conn) if name is None else [review.get_study(conn, name)]
        known = [review.progress(conn, study) for study in studies]
    if as_json:
        echo_json([_progress_json(one) for one in known])
    elif known:
        rows = [
            [one.study.name, reader or f"reader {number}", f"{n}/{one.study.n_pictures}", _key_state(one)]
            for one in known
            for number, (reader, n) in enumerate(one.read, 1)
        ]
        click.echo(within_80(["study", "reader", "read", "key"], rows, 0, 1))
    else:
        say("There is no study here yet. Make one: rococap study new --help")


def _key_state(known: "Progress") -> str:
    if known.unblinding:
        return "unblinded"
    return "open" if known.is_open else "closed"


def _progress_json(known: "Progress") -> dict[str, Any]:
    return {
        "study": known.study.name,
        "split": known.study.split,
        "pictures": known.study.n_pictures,
        "readers": [{"reader": reader, "read": n} for reader, n in known.read],
        "missing": known.n_missing,
        "key": _key_state(known),
        "unblinding": asdict(known.unblinding) if known.unblinding else None,
    }


@study_group.command("unblind")
@click.argument("name")
@click.option("--reader", metavar="NAME", help="Who opens it, for the record. [default: your user name]")
@click.option("--yes", is_flag=True, help="Do not ask.")
@db_option
def unblind_command(name: str, reader: str | None, yes: bool) -> None:
    """Open the key before everything is read, which ends the study.

    Who did so is recorded, with the time and the number of readings that were missing.
    """
    from rococap import review

    database = open_database()
    with db.transaction(database) as conn:
        known = review.progress(conn, review.get_study(conn, name))
    if not (yes or known.is_open):
        question = f"{known.n_missing} readings of {name} are missing and cannot be made afterwards. Open the key?"
        try:
            click.confirm(question, abort=True)
        except click.Abort as error:
            raise RococapError("The key stays closed. To open it without being asked, add --yes.") from error
    with db.transaction(database, write=True) as conn:
        opened = review.unblind(conn, known.study, reader or getpass.getuser())
    say(f"{name}: unblinded, with {counted(opened.n_missing, 'reading')} missing. See: rococap study results {name}")


@study_group.command("results")
@click.argument("name")
@json_option
@db_option
def study_results_command(name: str, as_json: bool) -> None:
    """Show what a study found, once its key is open.

    Preferences and ratings with 95% intervals, the agreement of the readers, and reading times; also by modality.
    """
    from rococap import review

    with db.transaction(open_database()) as conn:
        found = review.results_of(conn, review.get_study(conn, name))
    if as_json:
        echo_json(found)
    else:
        tables = [
            "\n".join([within_80(table.header, table.rows, 0), *table.notes]) for table in review.tables_of(found)
        ]
        click.echo("\n\n".join([review.heading_of(found), *tables]))
