"""`rococap probe`: what each score notices."""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rococap.cli.options import (
    also_options,
    cli,
    db_option,
    echo_json,
    json_option,
    open_database,
    progress_bar,
    requested_scores,
    run_option,
)
from rococap.cli.tables import as_table
from rococap.data import SPLITS

if TYPE_CHECKING:
    from rococap.scores.probe import Changed, Fall, Probed


@cli.command("probe")
@click.option("--split", type=click.Choice(SPLITS), help="The split whose original captions are changed.")
@run_option("The run whose data set it is. [default: `default`, or the only one]")
@click.option(
    "--captions",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Change the captions of this CSV file instead: ID,Caption, or an export. It needs no database.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The plot, as PNG. [default: results_medical/probe_SPLIT.png or probe_FILE.png]",
)
@also_options
@json_option
@db_option
def probe_command(
    split: str | None,
    run_name: str | None,
    captions: Path | None,
    plot: Path | None,
    also: tuple[str, ...],
    commands: tuple[str, ...],
    command_limit: float,
    as_json: bool,
) -> None:
    """Show what each score notices, and what it misses.

    Original captions are changed in one respect, such as left to right or "no effusion" to "effusion", and scored
    against themselves. The table and the plot show how far each score falls.
    """
    from rococap.scores import probe as probing

    if (split is None) == (captions is None):
        raise click.UsageError("Name either a --split or a file of --captions.")
    if captions is not None and run_name is not None:
        raise click.UsageError("--run names the data set of a --split: leave it out with --captions.")
    extras, plugins = requested_scores(also, commands, command_limit)
    pairs = (
        probing.of_file(captions) if captions is not None else probing.of_split(open_database(), run_name, split or "")
    )
    with progress_bar() as progress:
        probed = probing.probe(pairs, also=extras, plugins=plugins, progress=progress)
    path = plot or probing.default_path(split, captions)
    probing.draw(probed, path)
    if as_json:
        echo_json(probing.to_json(probed))
    else:
        click.echo(_text(probed))
        click.echo(f"\n{path}: the plot")
    for line in _not_computed(probed):
        click.echo(line, err=as_json)


def _text(probed: "Probed") -> str:
    from rococap.scores import probe as probing

    return "\n\n".join(
        [
            f"How far each score falls when {probed.n} original captions are changed",
            *_tables(probed),
            _paragraph(
                "= cannot be told from no change: the 95% interval of the fall includes 0. cider_d goes up to 10; "
                f"{probing.SAME_MEANING} keeps the meaning."
            ),
            *_list("Cannot be told from no change", probing.unseen(probed)),
            *_list(f"Lower the score less than {probing.SAME_MEANING}", probing.below_rephrasing(probed)),
        ]
    )


def _tables(probed: "Probed") -> list[str]:
    """A row for each score and a column for each change, in as many tables of 80 columns as that takes."""
    tables: list[str] = []
    columns: list[str] = []
    for name in probed.changes:
        wider = _table(probed, [*columns, name])
        if columns and max(map(len, wider.splitlines())) > 80:
            tables.append(_table(probed, columns))
            columns = []
        columns.append(name)
    return [*tables, _table(probed, columns)]


def _table(probed: "Probed", columns: Sequence[str]) -> str:
    changes = [probed.changes[name] for name in columns]
    rows = [["n", *(str(change.n) for change in changes)]]
    rows += [[score, *(_cell(change, score) for change in changes)] for score in probed.names]
    return as_table(["score", *columns], rows)


def _cell(change: "Changed", score: str) -> str:
    fall: Fall | None = change.scores.get(score)
    if fall is None:
        return "-"
    shown = f"{round(fall.fall, 3) + 0.0:.3f}"  # + 0.0: no "-0.000"
    return shown if fall.is_seen else f"{shown} ="


def _list(heading: str, found: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    """A line for each set of changes, with the scores that have it in common."""
    scores: dict[tuple[str, ...], list[str]] = {}
    for score, changes in found:
        scores.setdefault(tuple(changes), []).append(score)
    lines = [_paragraph(f"  {', '.join(names)}: {', '.join(changes)}", "    ") for changes, names in scores.items()]
    return ["\n".join([f"{heading}:", *lines])] if lines else []


def _not_computed(probed: "Probed") -> list[str]:
    return [_paragraph(f"{name}: not computed: {why}", "  ") for name, why in probed.not_computed.items()]


def _paragraph(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 80, subsequent_indent=indent)
