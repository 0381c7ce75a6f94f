"""`rococap enqueue`, and `rococap prompts`, which lists the prompts that it knows by name."""

import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from sqlalchemy import Engine as Database

from rococap import db, queue
from rococap.cli.options import (
    DEFAULT_DATASET,
    MAX_ROWS,
    F,
    cli,
    db_option,
    echo_json,
    json_option,
    open_database,
    progress_bar,
    splits_option,
)
from rococap.cli.tables import cut
from rococap.data import HUB_ID, SPLITS, STANDARD, Columns, datasets
from rococap.errors import RococapError
from rococap.flags import FLAGS
from rococap.recipe import DEFAULT_MODEL, DEFAULT_PROMPT, DTYPES, GREEDY, LOAD_IN, Recipe, refuse_placeholders

LONGEST_RUN_NAME = 100  # bytes in UTF-8


def _part(ctx: click.Context, param: click.Parameter, value: str | None) -> queue.Part | None:
    try:
        return None if value is None else queue.Part.parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from error


# --- prompts ---------------------------------------------------------------------------------------------------

prompts_option = click.option(
    "--prompts",
    envvar="ROCOCAP_PROMPTS",
    show_envvar=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A TOML file with presets of your own.",
)


def prompt_options(default: str) -> Callable[[F], F]:
    """Adds the alternative ways to give the prompt; `chosen_prompt` accepts one of them."""
    options = (
        click.option("--prompt", help=f"Prompt sent with every picture. [default: {default}]"),
        click.option("--preset", metavar="NAME", help="Instead of --prompt: a name from `rococap prompts`."),
        click.option(
            "--prompt-file",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Instead of --prompt: a file that holds it.",
        ),
        prompts_option,
    )

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def chosen_prompt(prompt: str | None, preset: str | None, file: Path | None, prompts: Path | None) -> str:
    from rococap import prompts as library

    if sum(source is not None for source in (prompt, preset, file)) > 1:
        raise click.UsageError("--prompt, --preset and --prompt-file exclude one another: give only one of them.")
    if preset is not None:
        return library.find(preset, prompts).prompt
    if file is not None:
        return library.read_prompt(file)
    return DEFAULT_PROMPT if prompt is None else prompt


@cli.command("prompts")
@prompts_option
@json_option
def prompts_command(prompts: Path | None, as_json: bool) -> None:
    """List the prompts that `enqueue --preset NAME` accepts.

    They are rococap's own and those of your file.
    """
    from rococap import prompts as library

    known = library.presets(prompts).values()
    if as_json:
        echo_json([asdict(preset) for preset in known])
        return
    for preset in known:
        click.echo(f"{preset.name}: {preset.about}" if preset.about else preset.name)
        for line in preset.prompt.splitlines():
            click.echo(textwrap.fill(line, 80, initial_indent="  ", subsequent_indent="  "))


# --- recipes ---------------------------------------------------------------------------------------------------


def recipe_options(default_model: str | None, model_help: str) -> Callable[[F], F]:
    """Adds an option for each field of a recipe; `chosen_recipe` reads them."""
    options = (
        click.option(
            "--model",
            default=default_model,
            show_default=default_model is not None,
            metavar="FOLDER|HUB_ID",
            help=model_help,
        ),
        click.option(
            "--revision", default="main", show_default=True, metavar="REV", help="Branch, tag or commit of the model."
        ),
        click.option(
            "--adapter", metavar="FOLDER|HUB_ID", help="A LoRA or other adapter for the model, in PEFT's format."
        ),
        click.option(
            "--adapter-base",
            type=click.Choice(["any"]),
            help="any: apply the adapter even if it names another base model than --model.",
        ),
        click.option(
            "--load-in",
            type=click.Choice(LOAD_IN),
            help="Quantise the layers of the language model with bitsandbytes, for models that do not fit.",
        ),
        click.option(
            "--trust-remote-code", is_flag=True, help="Run the code that comes with the model. Review it first."
        ),
        prompt_options(DEFAULT_PROMPT),
        click.option(
            "--repetition-penalty",
            type=click.FloatRange(0.1, 10),
            default=1.0,
            show_default=True,
            metavar="X",
            help="Above 1, tokens that have already occurred become less likely. Requires decoding in static batches.",
        ),
        click.option(
            "--max-new-tokens",
            type=click.IntRange(1, 1_000_000),
            default=256,
            show_default=True,
            metavar="N",
            help="Longest caption, in tokens.",
        ),
        click.option(
            "--min-pixels",
            type=click.IntRange(min=1),
            default=3_136,
            show_default=True,
            metavar="N",
            help="Smaller pictures are enlarged to this many pixels.",
        ),
        click.option(
            "--max-pixels",
            type=click.IntRange(min=1),
            default=1_003_520,
            show_default=True,
            metavar="N",
            help="Larger pictures are reduced to this many pixels; 784 make one visual token.",
        ),
        click.option(
            "--frame",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            metavar="N",
            help="The frame to caption in files that hold several, such as DICOM, counted from 1.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(DTYPES),
            default="auto",
            show_default=True,
            help="auto: bfloat16 on a GPU that supports it, float16 on an older one, float32 on the CPU.",
        ),
    )

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def chosen_recipe(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of the recipe that the options of `recipe_options` choose; folders become absolute."""
    ways = ("preset", "prompt_file", "prompts")
    recipe = {name: value for name, value in options.items() if name not in ways}
    recipe["model"] = named_model(recipe["model"])
    if recipe["adapter"] is not None:
        recipe["adapter"] = _absolute_if_folder(recipe["adapter"], "an adapter")
    recipe["prompt"] = chosen_prompt(options["prompt"], *(options[name] for name in ways))
    return recipe


# --- enqueue ---------------------------------------------------------------------------------------------------


@cli.command("enqueue")
@splits_option(
    help="Split to register. May be repeated. [required; with --from, the default is every split of that run]"
)
@click.option(
    "--dataset",
    envvar="ROCOCAP_DATASET",
    show_envvar=True,
    default=DEFAULT_DATASET,
    show_default=True,
    metavar="FOLDER|HUB_ID",
    help="The data set: Parquet shards as on the hub, or pictures and CSV files as on Zenodo.",
)
@click.option(
    "--dataset-revision", metavar="REV", help="Branch, tag or commit of a data set on the hub. [default: main]"
)
@click.option("--config", metavar="NAME", help="The configuration to use of a data set that has several.")
@click.option(
    "--columns",
    metavar="KEY=NAME,…",
    help="Column names that differ from the keys image, image_id, caption and cui. They are stored with the data set.",
)
@click.option("--limit", type=click.IntRange(1, MAX_ROWS), metavar="N", help="At most N rows of each split.")
@click.option("--offset", type=click.IntRange(0, MAX_ROWS), default=0, metavar="K", help="Skip the first K rows.")
@click.option(
    "--part",
    callback=_part,
    metavar="i/n",
    help="Only part i of n of each split, counted from 1, for machines without a shared database: see `rococap merge`.",
)
@click.option(
    "--run",
    "run_name",
    default="default",
    show_default=True,
    metavar="NAME",
    help="The run to register the pictures in. A run has one model, prompt and settings.",
)
@click.option(
    "--from",
    "source",
    metavar="RUN",
    help="Instead of a data set: the pictures of this run, and its recipe, except for the options given here.",
)
@click.option(
    "--flag",
    "flags",
    type=click.Choice(FLAGS),
    multiple=True,
    metavar="FLAG",
    help=f"With --from: only pictures whose caption has this flag. May be repeated. Flags: {', '.join(FLAGS)}.",
)
@recipe_options(DEFAULT_MODEL, "The model to caption with.")
@db_option
@click.pass_context
def enqueue_command(
    ctx: click.Context,
    /,
    splits: tuple[str, ...],
    dataset: str,
    dataset_revision: str | None,
    config: str | None,
    columns: str | None,
    limit: int | None,
    offset: int,
    part: queue.Part | None,
    run_name: str,
    source: str | None,
    flags: tuple[str, ...],
    **options: Any,
) -> None:
    """Register every picture of a split as pending in a run.

    Repeating the command is cheap and changes nothing. For another model, prompt or setting, use another run: --run
    NAME. To caption flagged pictures again with another recipe, use: --run NEW --from OLD --flag loop.
    """
    from rococap.queue import enqueue as registration

    _check_enqueue(ctx, source, bool(splits), bool(flags))
    _check_run_name(run_name)
    recipe = chosen_recipe(options)
    database = open_database(may_be_new=source is None)
    if source is not None:
        old, splits_of_old = _find_source(database, source, splits)
        inherited = {name: value for name, value in asdict(old.recipe).items() if name not in GREEDY}
        new_recipe = checked_recipe(inherited | explicit(ctx, recipe))
        with progress_bar() as progress:
            results = registration.enqueue_from(
                database, old, splits_of_old, run=run_name, recipe=new_recipe, flags=flags, progress=progress
            )
    else:
        new_recipe = checked_recipe(recipe)
        column_names = Columns.parse(columns) if columns is not None else STANDARD
        revision = dataset_revision or _pinned_revision(database, run_name, dataset, config or "")
        located = replace(datasets.locate(dataset, splits, revision, config or ""), columns=column_names)
        with progress_bar() as progress:
            results = registration.enqueue(
                database,
                located,
                splits,
                run=run_name,
                recipe=new_recipe,
                limit=limit,
                offset=offset,
                part=part,
                progress=progress,
            )
    for result in results:
        _echo_enqueued(run_name, result)


def checked_recipe(fields: dict[str, Any]) -> Recipe:
    from rococap.engines import files

    try:
        recipe = Recipe(**fields)
        refuse_placeholders(recipe.prompt)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if recipe.adapter_base is not None and recipe.adapter is None:
        raise click.UsageError("--adapter-base goes with an adapter: name one with --adapter.")
    files.check(recipe.model, recipe.revision, recipe.prompt)
    return recipe


def _check_enqueue(ctx: click.Context, source: str | None, has_splits: bool, has_flags: bool) -> None:
    if source is None:
        if has_flags:
            raise click.UsageError("--flag selects from another run's captions: name that run with --from RUN.")
        if not has_splits:
            raise click.UsageError("Missing option '--split'. Choose from: train, validation, test, all.")
        if ctx.params["part"] is not None and (ctx.params["limit"] is not None or ctx.params["offset"]):
            raise click.UsageError("--part divides the whole split: leave --limit and --offset out.")
        return
    for name in ("dataset", "dataset_revision", "config", "columns", "limit", "offset", "part"):
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--from takes another run's pictures: leave --{name.replace('_', '-')} out.")
    if ctx.get_parameter_source("run_name") is ParameterSource.DEFAULT:
        raise click.UsageError("--from needs a name for the new run: --run NAME.")


def _find_source(database: Database, name: str, splits: Sequence[str]) -> tuple[queue.Run, list[str]]:
    """The run of --from, and those of these splits that it has; all of its splits, if none is named."""
    with db.transaction(database) as conn:
        run = queue.get_run(conn, name)
        return run, [counts.split for counts in queue.counts_of(conn, run, splits or SPLITS)]


def explicit(ctx: click.Context, recipe: dict[str, Any]) -> dict[str, Any]:
    """The fields of the recipe that were set on the command line."""
    names = dict.fromkeys(recipe, ()) | {"prompt": ("prompt", "preset", "prompt_file")}
    return {
        name: recipe[name]
        for name, options in names.items()
        if any(ctx.get_parameter_source(option) is ParameterSource.COMMANDLINE for option in options or (name,))
    }


def _check_run_name(name: str) -> None:
    """Raises BadParameter for a name that no folder or file could have.

    Some file names contain the names of two runs, so the length of a name leaves room for both and the rest.
    """
    if not all(c.isalnum() or c in "._-" for c in name) or name.startswith((".", "-")) or not name:
        raise click.BadParameter(
            f"{name!r} is not a file name. Use letters, digits, '.', '_' and '-', and begin with neither '.' nor '-'.",
            param_hint="--run",
        )
    if (size := len(name.encode())) > LONGEST_RUN_NAME:
        raise click.BadParameter(
            f"{cut(name, 20)!r} is {size} bytes long in UTF-8, and the limit is {LONGEST_RUN_NAME}: shorten it.",
            param_hint="--run",
        )


def named_model(model: str) -> str:
    from rococap.engines import families

    families.check_name(model)
    return _absolute_if_folder(model, "a model")


def _absolute_if_folder(name: str, what: str) -> str:
    path = Path(os.path.expanduser(name))
    if not path.is_dir() and not HUB_ID.fullmatch(name):
        raise RococapError(f"There is no folder {name}: check the path, or name {what} of the hub as owner/name.")
    return str(path.resolve()) if path.is_dir() else name


def _pinned_revision(database: Database, run_name: str, dataset: str, config: str) -> str | None:
    """The commit of the data set that the run was registered with, on which it stays although the branch moves on."""
    name = datasets.name_of(dataset, config)
    with db.transaction(database) as conn:
        for run in queue.list_runs(conn):
            if (run.name, run.dataset) == (run_name, name):
                return run.dataset_revision or None
    return None


def _echo_enqueued(run_name: str, result: Any) -> None:
    click.echo(f"{run_name} {result.split}: {result.new} new, {result.known} known, {result.changed} changed")
    if result.duplicates:
        click.echo(f"  {result.duplicates} rows repeat an image_id that is already registered and were skipped")
    if result.is_unlabelled:
        click.echo("  no original captions, so nothing can be scored. If a column holds them, register it in another")
        click.echo("  queue: --db URL --columns caption=NAME")
    for shard in result.altered_shards:
        click.echo(f"  {shard} has changed since it was registered: its rows and captions were read again")
