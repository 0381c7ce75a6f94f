"""Commands that read captions, or read them back: compare, evaluate, report, export, restore."""

import re
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from sqlalchemy import Engine as Database

from rococap import db, queue
from rococap.cli.options import (
    SHOWN_FAILURES,
    also_options,
    cli,
    db_option,
    echo_json,
    json_option,
    open_database,
    progress_bar,
    requested_scores,
    run_option,
    runs_option,
    splits_option,
    strip_option,
)
from rococap.cli.tables import cut, within_80
from rococap.data import SPLITS
from rococap.errors import RococapError
from rococap.figures import counted, significant

if TYPE_CHECKING:
    from rococap.results.messages import Text
    from rococap.results.texts import Kind
    from rococap.scores.disagreement import Disagreements

CAPTIONS = ("machine", "edited", "reviewed")


@cli.command("compare")
@click.argument("names", metavar="RUN…", nargs=-1, required=True)
@splits_option()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A .csv, .parquet or .jsonl file. [default: results_medical/compare_RUN_RUN….csv]",
)
@click.option("--all-done", is_flag=True, help="Only pictures that every run has captioned.")
@click.option(
    "--worst",
    type=click.IntRange(0, 100_000),
    default=20,
    show_default=True,
    metavar="N",
    help="Number of pictures to name on which runs state different facts, the worst first.",
)
@strip_option
@json_option
@db_option
def compare_command(
    names: tuple[str, ...],
    splits: tuple[str, ...],
    output: Path | None,
    all_done: bool,
    worst: int,
    strip_reasoning: bool,
    as_json: bool,
) -> None:
    """Compare runs side by side: captions, speed, length, flags and facts.

    The captions go to a file, with a row for each picture; the rest is printed. How much runs disagree is stored, and
    the gallery of `rococap serve` can sort by it. Runs differ in facts where one says
    left and another right, one denies a finding that another names, or one sees a CT and another an MRI.
    """
    from rococap.scores import compare as comparison

    path = output or comparison.default_path(names)
    database = open_database()
    with progress_bar() as progress:
        compared = comparison.compare(
            *(database, names, path),
            splits=splits,
            all_done=all_done,
            strip_reasoning=strip_reasoning,
            worst=worst,
            progress=progress,
        )
    if as_json:
        echo_json({**asdict(compared), "path": str(compared.path), "strip_reasoning": strip_reasoning})
        return
    header = ["run", "captions", "s/pic", "pic/s", "tokens", "chars", "words", "flag %", "cut %"]
    click.echo(within_80(header, [_compared_row(run) for run in compared.runs], 0))
    if (found := compared.disagreements) and found.compared + found.not_read:
        click.echo(f"\n{_disagreements_text(found)}")
    shared = f", {compared.shared} of them captioned by every run" if len(names) > 1 else ""
    unlabelled = "" if compared.originals else ", no original captions"
    click.echo(f"\n{compared.path}: {counted(compared.rows, 'picture')}{shared}{unlabelled}")


def _compared_row(run: Any) -> list[str]:
    means = (run.sec_per_picture, run.pictures_per_sec, run.new_tokens, run.characters, run.words)
    shares = (None if share is None else 100 * share for share in (run.flagged, run.cut))
    return [run.run, str(run.captions), *("-" if n is None else str(significant(n)) for n in (*means, *shares))]


def _disagreements_text(found: "Disagreements") -> str:
    unread = f" Not compared, since captions are not in English: {found.not_read}." if found.not_read else ""
    heading = (
        f"Facts (side, negation, modality): the runs differ on {found.differing} of "
        f"{counted(found.compared, 'picture')}, and contradict each other on {found.opposite}.{unread}"
    )
    lines = textwrap.wrap(heading, 80)
    for one in found.worst:
        lines.append(f"{one.image_id} ({one.split})")
        for difference in one.differences:
            says = ", ".join(
                f"{run}: {fact or 'not stated'}" for run, fact in zip(difference.runs, difference.says, strict=True)
            )
            lines += textwrap.wrap(f"{difference.kind}: {says}", 80, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


# --- evaluate --------------------------------------------------------------------------------------------------

WIDEST_SCORE = 20  # characters, with its interval


@cli.command("evaluate")
@splits_option(required=True)
@runs_option("The run; repeat it to compare several. [default: `default`, or the only one]")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File for the scores of each caption: .parquet, .csv or .jsonl. "
    "[default: results_medical/scores_SPLIT_RUN….parquet]",
)
@also_options
@click.option(
    "--imageclef",
    type=click.Choice(["2026"]),
    help="Also combine the scores as ImageCLEFmedical Caption of this year ranks, if all of their parts are there.",
)
@click.option(
    "--card",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Also write the scores into the model card of this fine-tuned model, which one of the runs captions with.",
)
@click.option(
    "--captions",
    type=click.Choice(CAPTIONS[:2]),
    default="machine",
    show_default=True,
    help="Score the captions as the machine wrote them, or with the edits of readers.",
)
@strip_option
@json_option
@db_option
def evaluate_command(
    splits: tuple[str, ...],
    names: tuple[str, ...],
    output: Path | None,
    also: tuple[str, ...],
    commands: tuple[str, ...],
    command_limit: float,
    imageclef: str | None,
    card: Path | None,
    captions: "Kind",
    strip_reasoning: bool,
    as_json: bool,
) -> None:
    """Score captions against the originals, overall and by modality.

    The scores are BLEU, ROUGE, METEOR, CIDEr-D, facts, and the concepts that a caption names. They are stored in the
    database, so that no caption is scored twice, except by CIDEr-D: it weights words by how rare they are in all
    originals, so each further caption changes it for every caption.
    """
    from rococap.scores import compare as comparison
    from rococap.scores import evaluate as evaluation
    from rococap.scores import model_card

    if output is not None:
        comparison.check_suffix(output)
    if card is not None:
        model_card.check(card)
    extras, plugins = requested_scores(also, commands, command_limit)
    database = open_database()
    with progress_bar() as progress:
        found = evaluation.evaluate(
            *(database, names, splits),
            also=extras,
            plugins=plugins,
            as_imageclef=imageclef is not None,
            captions=captions,
            strip_reasoning=strip_reasoning,
            progress=progress,
        )
    scores = evaluation.to_json(found)
    path = output or evaluation.default_path(found, "scores", f"{_mark(captions)}.parquet")
    rows = evaluation.write(found, path, scores)
    if card is not None:
        model_card.write(card, found, scores)
    if as_json:
        echo_json(scores)
    else:
        shown = [split for split in splits if any(run["split"] == split for run in scores["runs"])]
        click.echo("\n\n".join(_scores_text(scores, split) for split in shown))
        click.echo(f"\n{path}: {counted(rows, 'caption')}")
        if card is not None:
            click.echo(f"{card}: scores in the model card")
    for warning in dict.fromkeys(text for run in scores["runs"] for text in run["warnings"]):
        click.echo(f"Warning: {warning}", err=True)
    scored = {(run["run"], run["split"]) for run in scores["runs"]}
    for run, split in product(dict.fromkeys(run["run"] for run in scores["runs"]), splits):
        if (run, split) not in scored:
            click.echo(f"{run} has captioned nothing of {split} yet.", err=True)


def _scores_text(scores: dict[str, Any], split: str) -> str:
    runs = [run for run in scores["runs"] if run["split"] == split]
    paired = [pair for pair in scores["paired"] if pair["split"] == split]
    counts = ", ".join(f"{counted(run['n'], 'caption')} of {run['run']}" for run in runs)
    names = dict.fromkeys(name for run in runs for name in run["metrics"])
    if len(runs) > 2:
        notes = ["For intervals and differences of more than two runs: --json, or rococap report"]
    else:
        notes = ["95% intervals in brackets. cider_d goes up to 10; for flagged, lower is better."]
    if len(runs) == 2:
        notes += [f"difference and p: over the {pair['n']} pictures that both runs captioned" for pair in paired]
    reasons: dict[str, list[str]] = {}
    for name, why in dict.fromkeys(item for run in runs for item in run["not_computed"].items()):
        reasons.setdefault(why, []).append(name)
    not_computed = [
        textwrap.fill(f"{', '.join(names)}: not computed: {why}", 80, subsequent_indent="  ")
        for why, names in reasons.items()
    ]
    parts = [
        f"{split}: {counts}",
        _overall_table(list(names), runs, paired),
        "\n".join(notes),
        *_facts_table(runs),
        *_without_near_duplicates(list(names), runs),
        _modalities_table(runs),
    ]
    return "\n\n".join([*parts, "\n".join(not_computed)]).rstrip()


def _overall_table(names: Sequence[str], runs: Sequence[Any], paired: Sequence[Any]) -> str:
    """Mean scores; for at most two runs also the 95% intervals, and the difference with its p. More would not fit."""
    with_intervals = len(runs) <= 2
    header = ["score", *(cut(run["run"], WIDEST_SCORE) for run in runs)]
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
    return within_80(header, rows, *range(1, len(runs) + 1))


def _facts_table(runs: Sequence[Any]) -> list[str]:
    """The facts behind the fact scores: `n` captions, where at least one of the texts has a fact of the kind."""
    counted = [(name, run["run"], of) for run in runs for name, of in run["facts"].items() if of["n"]]
    names = dict.fromkeys(name for name, _, _ in counted)
    rows = [
        [name.removeprefix("fact_"), cut(run, WIDEST_SCORE), *map(str, of.values())]
        for name in names
        for other, run, of in counted
        if other == name
    ]
    header = ["facts", "run", "n", "agreeing", "invented", "missed", "opposite"]
    return [within_80(header, rows, 1)] if rows else []


def _without_near_duplicates(names: Sequence[str], runs: Sequence[Any]) -> list[str]:
    """The scores without pictures that have near-duplicates in another split; empty while these are not known."""
    known = [(run["run"], without) for run in runs if (without := run["without_near_duplicates"])]
    left_out = [f"{without['left_out']} of {run}" for run, without in known if without["left_out"]]
    unseen = any(without["not_hashed"] for _, without in known)
    note = "Not all pictures have been looked at: rococap doctor --leaks" if unseen else ""
    if not left_out:
        return [f"No picture is known to have a near-duplicate in another split.\n{note}".rstrip()] if known else []
    header = ["score", *(cut(run, WIDEST_SCORE) for run, _ in known)]
    rows = [[name, *(_score(without["metrics"].get(name)) for _, without in known)] for name in names]
    heading = f"Without captions whose picture has a near-duplicate in another split ({', '.join(left_out)}):"
    table = within_80(header, rows, *range(1, len(known) + 1))
    return [f"{textwrap.fill(heading, 80)}\n{table}\n{note}".rstrip()]


def _score(value: float | None, interval: Sequence[float] | None = None) -> str:
    if value is None:
        return "-"
    return f"{_digits(value)} [{', '.join(map(_digits, interval))}]" if interval else _digits(value)


def _digits(value: float) -> str:
    """As wide for 10, the best of CIDEr-D, as for a smaller score."""
    return f"{value:.2f}" if value >= 9.9995 else f"{value:.3f}"


def _modalities_table(runs: Sequence[Any]) -> str:
    from rococap.scores.evaluate import BY_MODALITY

    modalities = dict.fromkeys(name for run in runs for name in run["by_modality"])
    rows = [
        [name, run["run"], str(of["n"]), *(_score(of["metrics"].get(shown)) for shown in BY_MODALITY)]
        for name in modalities
        for run in runs
        if (of := run["by_modality"].get(name))
    ]
    return within_80(["modality", "run", "n", *BY_MODALITY], rows, 1)


# --- report ----------------------------------------------------------------------------------------------------


@cli.command("report")
@click.option("--split", type=click.Choice(SPLITS), required=True, help="The split to report on.")
@runs_option("The run; repeat it to compare several. [default: `default`, or the only one]")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The HTML file. [default: results_medical/report_SPLIT_RUN….html]",
)
@click.option(
    "--pictures",
    type=click.IntRange(0, 100_000),
    default=200,
    show_default=True,
    metavar="N",
    help="Number of pictures to show.",
)
@also_options
@strip_option
@db_option
def report_command(
    split: str,
    names: tuple[str, ...],
    output: Path | None,
    pictures: int,
    also: tuple[str, ...],
    commands: tuple[str, ...],
    command_limit: float,
    strip_reasoning: bool,
) -> None:
    """Write an HTML report of scores, plots and captioned pictures.

    It is one file, which needs neither a server nor a network. The captions stand beside the originals. Of each run it
    shows the best pictures, the worst, a random sample, flagged ones and those that failed.
    """
    from rococap.scores import report as reporting

    extras, plugins = requested_scores(also, commands, command_limit)
    with progress_bar() as progress:
        made = reporting.report(
            *(open_database(), names, split, output),
            also=extras,
            plugins=plugins,
            pictures=pictures,
            strip_reasoning=strip_reasoning,
            progress=progress,
        )
    shown = f"{counted(made.captions, 'caption')}, {counted(made.pictures, 'picture')} shown"
    click.echo(f"{made.path}: {shown}, {made.size / 1e6:.1f} MB")
    if made.unreadable:
        click.echo(f"  {made.unreadable} of the pictures could not be read: their cards give the reason")
    for warning in made.warnings:
        click.echo(f"Warning: {warning}", err=True)


# --- export, restore -------------------------------------------------------------------------------------------


FILES = ("csv", "parquet", "jsonl")
FOLDERS = ("hf", "webdataset", "kohya", "messages")
TEXTS = ("generated", "original")
_ONLY_FOR = {
    "excel_safe": ("csv",),
    "allow_missing": ("imageclef",),
    "require_complete": (*FILES, *FOLDERS),
    "push": ("hf",),
    "text": ("messages",),
    "follow": FILES,
    "checkpoint_every": FILES,
}
"""Options of `export` that only some formats have, and those formats."""
_FILE_ENDING = re.compile(r"\.(?!v?\d+$)\w{1,8}")
"""The suffix of a file such as x.xlsx or x.csv.gz, but not of a folder such as run.2 or run.v2."""


@cli.command("export")
@splits_option(required=True)
@run_option("The run. [default: `default`, or the only one]")
@click.option(
    "--format",
    type=click.Choice([*FILES, "imageclef", *FOLDERS]),
    help="One of the formats above. [default: as the ending of --output, else csv]",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A folder, or a file for a single split. [default: in results_medical or results_medical/RUN]",
)
@click.option(
    "--checkpoint-every",
    type=click.IntRange(0, 1_000_000),
    default=25,
    show_default=True,
    metavar="N",
    help="csv, parquet, jsonl: pictures per checkpoint segment; 0 writes none.",
)
@click.option(
    "--follow", is_flag=True, help="csv, parquet, jsonl: write segments while workers caption, and export at the end."
)
@click.option(
    "--require-complete", is_flag=True, help="Fail if a picture of the split has no caption. Not for imageclef."
)
@click.option(
    "--excel-safe",
    is_flag=True,
    help="csv: put an apostrophe before texts that a spreadsheet would run as formulas, and begin the file with a "
    "byte-order mark, which Excel needs to show accents. `restore` removes both. Checkpoint segments are not changed.",
)
@strip_option
@click.option(
    "--text",
    type=click.Choice(TEXTS),
    default="generated",
    show_default=True,
    help="messages: train on the run's captions, or on the data set's own, which every picture of the run has.",
)
@click.option(
    "--captions",
    type=click.Choice(CAPTIONS),
    default="machine",
    show_default=True,
    help="The captions as the machine wrote them; with the edits of readers; or, of these, only those of pictures with "
    "a verdict. Checkpoint segments always hold the machine's.",
)
@click.option("--allow-missing", is_flag=True, help="imageclef: write an empty caption for pictures that have none.")
@click.option(
    "--push",
    metavar="REPO",
    help="hf: upload the folder to this data set on the hub. If it does not exist, a private one is created.",
)
@db_option
@click.pass_context
def export_command(
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
    text: "Text",
    captions: "Kind",
    allow_missing: bool,
    push: str | None,
) -> None:
    """Write captions beside the originals, with a manifest.

    The manifest records the model, prompt and settings that made the captions.

    \b
    csv, parquet, jsonl  a file per split, with checkpoint segments beside it
    imageclef            an ImageCLEFmedical Caption submission per split, with
                         every ID of it
    hf                   a folder that datasets.load_dataset opens, with its
                         card; --push REPO uploads it
    webdataset           a folder of tar shards: the picture, caption and facts
                         of 1,000 pictures each
    kohya                a folder per split: each picture and its caption, in
                         two files of one name
    messages             a folder for LLaMA-Factory, ms-swift and TRL: pictures,
                         and the prompt with the caption as its answer
    """
    format = format or _format_of(output)
    for name, formats in _ONLY_FOR.items():
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE and format not in formats:
            raise click.UsageError(
                f"--{name.replace('_', '-')} does not apply to {format}, only to {', '.join(formats)}: leave it out."
            )
    if push is not None and not push.strip():
        raise click.UsageError("--push needs the name of a data set: OWNER/NAME.")
    if text == "original" and (require_complete or strip_reasoning):
        option = "--require-complete" if require_complete else "--strip-reasoning"
        raise click.UsageError(f"{option} is about the run's captions: leave it out with --text original.")
    if captions != "machine" and text == "original":
        raise click.UsageError("--captions is about the run's captions: leave it out with --text original.")
    if captions == "reviewed" and require_complete:
        raise click.UsageError("--captions reviewed is of pictures with a verdict only: leave out --require-complete.")
    if follow and not checkpoint_every:
        raise click.UsageError("--follow writes checkpoints: give --checkpoint-every N, with N above 0.")
    _check_output(output, format, len(splits))
    database = open_database()
    with db.transaction(database) as conn:
        run = queue.find_run(conn, run_name)
    if format in FOLDERS:
        _export_folder(database, run, splits, format, output, captions, require_complete, strip_reasoning, text, push)
        return
    paths = {split: _export_path(run.name, split, format, output, captions) for split in splits}
    if format == "imageclef":
        _export_submissions(database, run, paths, captions, allow_missing, strip_reasoning)
    else:
        _export_files(
            *(database, run, paths, captions, checkpoint_every, follow, require_complete, excel_safe, strip_reasoning)
        )


def _export_files(
    database: Database,
    run: queue.Run,
    paths: dict[str, Path],
    captions: "Kind",
    checkpoint_every: int,
    follow: bool,
    require_complete: bool,
    excel_safe: bool,
    strip_reasoning: bool,
) -> None:
    from rococap.results import checkpoints
    from rococap.results import export as files

    folder = next(iter(paths.values())).parent
    if follow:
        checkpoints.follow(database, run, list(paths), folder, checkpoint_every, _echo_segments)
    for split, path in paths.items():
        with progress_bar() as progress:
            exported = files.export(
                *(database, run, split, path),
                captions=captions,
                require_complete=require_complete,
                excel_safe=excel_safe,
                strip_reasoning=strip_reasoning,
                progress=progress,
            )
        if checkpoint_every:
            _echo_segments(checkpoints.write_checkpoints(database, run, split, folder, checkpoint_every))
        click.echo(f"{exported.path}: {counted(exported.rows, 'caption')}{_left(exported.missing, captions)}")


def _export_submissions(
    database: Database,
    run: queue.Run,
    paths: dict[str, Path],
    captions: "Kind",
    allow_missing: bool,
    strip_reasoning: bool,
) -> None:
    from rococap.results import imageclef

    for split, path in paths.items():
        with progress_bar() as progress:
            submission = imageclef.submit(
                *(database, run, split, path),
                captions=captions,
                allow_missing=allow_missing,
                strip_reasoning=strip_reasoning,
                progress=progress,
            )
        empty = f", {submission.empty} of them empty, which will score almost nothing" if submission.empty else ""
        click.echo(
            f"{path}: {counted(submission.rows, 'caption')}{empty}. Submit it as submission.csv, alone in a zip."
        )


def _export_folder(
    database: Database,
    run: queue.Run,
    splits: Sequence[str],
    format: str,
    output: Path | None,
    captions: "Kind",
    require_complete: bool,
    strip_reasoning: bool,
    text: "Text",
    push: str | None,
) -> None:
    from rococap.results import hub, publish

    if push:
        hub.check_login()
    folder = output or _results(run.name) / (
        f"{'original' if text == 'original' else 'medical'}_captions_{format}{_mark(captions)}"
    )
    with progress_bar() as progress:
        written = publish.publish(
            *(database, run, splits, folder, format),
            captions=captions,
            require_complete=require_complete,
            strip_reasoning=strip_reasoning,
            text=text,
            progress=progress,
        )
    for part in written:
        click.echo(f"{folder} {part.split}: {counted(part.captions, 'caption')}{_left(part.missing, captions)}")
        _echo_left_out(part.without_picture, "because their pictures cannot be read")
        _echo_left_out(part.without_text, "because their captions cannot be answers")
    named = (run.dataset, run.recipe.model, run.recipe.adapter)
    if local := [name for name in named if name and Path(name).is_absolute()]:
        click.echo(f"  The files name {' and '.join(local)}: check that others may read that")
    if push:
        pushed = hub.push(folder, push, f"Captions of {', '.join(splits)} by {run.recipe.model}")
        visibility = "private, until you change that in its settings" if pushed.private else "public"
        click.echo(f"{pushed.url}: {visibility}")


def _echo_left_out(reasons: dict[str, str], why: str) -> None:
    if reasons:
        click.echo(f"  {len(reasons)} more were left out, {why}:")
    for image_id, reason in list(reasons.items())[:SHOWN_FAILURES]:
        click.echo(f"  {image_id}: {reason}")


def _left(missing: int, captions: "Kind") -> str:
    what = "have no verdict" if captions == "reviewed" else "are not done"
    return f"; {missing} of the split {what}" if missing else ""


def _mark(captions: "Kind") -> str:
    """What the names of files with these captions have before their ending."""
    return "" if captions == "machine" else f".{captions}"


def _results(run_name: str) -> Path:
    return Path("results_medical") if run_name == "default" else Path("results_medical") / run_name


def _format_of(output: Path | None) -> str:
    return output.suffix[1:].lower() if output and _is_file_name(output) else "csv"


def _is_file_name(output: Path) -> bool:
    return output.suffix[1:].lower() in FILES and not output.is_dir()


def _check_output(output: Path | None, format: str, n_splits: int) -> None:
    """Raises UsageError for an output that looks like a file which this format does not write.

    Otherwise a name like captions.xlsx would become a folder.
    """
    if output is None or output.is_dir() or not _FILE_ENDING.fullmatch(output.suffix):
        return
    folder = f"if it is meant to be a folder, make it first: mkdir -p {shlex.quote(str(output))}"
    if format in FOLDERS:
        raise click.UsageError(f"{output} looks like a file, but {format} is written to a folder: name one; {folder}")
    if not _is_file_name(output):
        endings = ", ".join(f".{ending}" for ending in FILES)
        raise click.UsageError(
            f"{output} looks like a file, but export only writes files that end in {endings}; {folder}"
        )
    if n_splits > 1:
        raise click.UsageError(f"{output} is a single file: name a folder for several splits.")
    if output.suffix.lower() != f".{_ending_of(format)}":
        raise click.UsageError(
            f"{output} does not end as {format} files do: end it in .{_ending_of(format)}, or leave out --format."
        )


def _ending_of(format: str) -> str:
    return "csv" if format == "imageclef" else format


def _export_path(run_name: str, split: str, format: str, output: Path | None, captions: "Kind") -> Path:
    if output and _is_file_name(output):
        return output
    name = "submission" if format == "imageclef" else "medical_captions"
    return (output or _results(run_name)) / f"{name}_{split}{_mark(captions)}.{_ending_of(format)}"


def _echo_segments(paths: list[Path]) -> None:
    if paths:
        names = paths[0].name if len(paths) == 1 else f"{paths[0].name} to {paths[-1].name}"
        click.echo(f"{paths[0].parent / names}: {counted(len(paths), 'new checkpoint')}")


@cli.command("restore")
@click.argument(
    "paths", metavar="FILE…", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@run_option("The run to restore into. [default: `default`, or the only one]")
@db_option
def restore_command(paths: tuple[Path, ...], run_name: str | None) -> None:
    """Read exports or checkpoints back into a run.

    Enqueue the split first. After the loss of a database, its captions need not be made again.
    """
    from rococap.results.restore import restore

    database = open_database()
    with db.transaction(database) as conn:
        run = queue.find_run(conn, run_name)
    results = [restore(database, run, path) for path in paths]
    total = {
        name: sum(getattr(result, name) for result in results)
        for name in ("restored", "known", "leased", "unknown", "different")
    }
    click.echo(f"{run.name}: {total['restored']} restored, {total['known']} already captioned")
    if total["leased"]:
        click.echo(f"  {total['leased']} are being captioned now: restore again once the workers have stopped")
    if total["unknown"]:
        click.echo(f"  {total['unknown']} are of pictures that the run does not have: enqueue all of their split first")
    if total["different"]:
        click.echo(
            f"  {total['different']} have another original caption here and were left out: is it another data set?"
        )
    warn_without_manifest([result.path for result in results if not result.has_manifest])
    if total["unknown"] + total["different"] and not (total["restored"] or total["known"] or total["leased"]):
        raise RococapError(
            f"Nothing was restored: run {run.name!r} has none of these pictures. Enqueue their split, or name another "
            "run with --run."
        )


def warn_without_manifest(paths: Sequence[Path]) -> None:
    """Says what could not be compared when these exports were read."""
    if paths:
        click.echo(
            f"Warning: {', '.join(map(str, paths))}: the manifest (.json) is missing. The recipe was not compared, and "
            "apostrophes that --excel-safe may have put before texts were kept.",
            err=True,
        )
