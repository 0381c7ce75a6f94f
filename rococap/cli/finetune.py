"""`rococap finetune`."""

import logging
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from rococap import db, queue
from rococap.cli.enqueue import checked_recipe, chosen_prompt, explicit, named_model, prompt_options
from rococap.cli.options import (
    MAX_ROWS,
    F,
    cli,
    db_option,
    echo_json,
    json_option,
    open_database,
    run_option,
    say,
    stderr_console,
)
from rococap.cli.worker import parse_batch_size
from rococap.data import SPLITS
from rococap.figures import counted, duration
from rococap.recipe import DEFAULT_MODEL, GREEDY, LOAD_IN, Recipe
from rococap.training.settings import EFFECTIVE_BATCH, LEARNING_RATES, Settings

SHOWN_CODES = 5


def _picture_options(command: F) -> F:
    return _with(
        command,
        run_option("The run whose pictures to learn from, and whose model, prompt and settings to start with."),
        click.option(
            "--split", type=click.Choice(SPLITS), help="The split to learn from. [required, except with --merge]"
        ),
        click.option("--limit", type=click.IntRange(1, MAX_ROWS), metavar="N", help="Only the first N pictures."),
        click.option(
            "--modality",
            "modalities",
            multiple=True,
            metavar="NAME",
            help="Only pictures of this modality, as `evaluate` names them. May be repeated.",
        ),
        click.option(
            "--concept",
            "concepts",
            multiple=True,
            metavar="CUI",
            help="Only pictures with this concept. May be repeated, for pictures with any of them.",
        ),
        click.option(
            "--targets-from",
            "targets",
            metavar="RUN",
            help="Learn the captions of this run instead of the originals.",
        ),
    )


def _recipe_options(command: F) -> F:
    return _with(
        command,
        click.option("--model", default=DEFAULT_MODEL, metavar="FOLDER|HUB_ID", help="Another model than the run's."),
        click.option("--revision", default="main", metavar="REV", help="Branch, tag or commit of the model."),
        prompt_options("the run's"),
        click.option("--min-pixels", type=click.IntRange(min=1), metavar="N", help="Another bound than the run's."),
        click.option("--max-pixels", type=click.IntRange(min=1), metavar="N", help="Another bound than the run's."),
        click.option(
            "--load-in", type=click.Choice(LOAD_IN), help="Quantise the weights that a LoRA leaves alone (QLoRA)."
        ),
    )


def _method_options(command: F) -> F:
    return _with(
        command,
        click.option(
            "--method",
            type=click.Choice(["lora", "full"]),
            default="lora",
            show_default=True,
            help="lora: train small matrices beside the weights. full: train the weights themselves.",
        ),
        click.option("--rank", type=click.IntRange(1, 4096), default=16, show_default=True, help="Rank of the LoRA."),
        click.option(
            "--alpha",
            type=click.IntRange(1, 65_536),
            default=32,
            show_default=True,
            help="The LoRA counts alpha / rank times.",
        ),
        click.option(
            "--dropout",
            type=click.FloatRange(0, 1, max_open=True),
            default=0.05,
            show_default=True,
            help="Dropout of the LoRA's input.",
        ),
        click.option(
            "--target",
            default="language",
            show_default=True,
            metavar="language|language+vision|NAMES",
            help="What to train. For a LoRA, also names of linear layers, joined by commas.",
        ),
    )


def _schedule_options(command: F) -> F:
    rates = ", ".join(f"{rate:g} for {method}" for method, rate in LEARNING_RATES.items())
    steps = click.IntRange(1, MAX_ROWS)
    return _with(
        command,
        click.option(
            "--epochs",
            type=click.FloatRange(0, min_open=True),
            default=1.0,
            show_default=True,
            help="How often each picture is learned from.",
        ),
        click.option("--max-steps", type=steps, metavar="N", help="Stop after N steps, whatever --epochs says."),
        click.option(
            "--lr",
            type=click.FloatRange(0, 1, min_open=True),
            metavar="X",
            help=f"Highest learning rate. [default: {rates}]",
        ),
        click.option(
            "--warmup",
            type=click.FloatRange(0),
            default=0.03,
            show_default=True,
            metavar="X",
            help="Steps in which the learning rate rises; below 1, a share of all steps. It then falls as a cosine.",
        ),
        click.option(
            "--batch-size",
            callback=parse_batch_size,
            default="auto",
            show_default=True,
            metavar="auto|N",
            help=f"Pictures at a time. auto: as many as fit, up to 8, and {EFFECTIVE_BATCH} in a step.",
        ),
        click.option(
            "--accumulate",
            type=click.IntRange(1, 4096),
            metavar="N",
            help="Batches in a step, with a number in --batch-size. [default: 1]",
        ),
        click.option(
            "--checkpointing/--no-checkpointing",
            default=None,
            help="Compute activations twice instead of keeping them. [default: on a GPU]",
        ),
        click.option(
            "--max-caption-tokens",
            type=click.IntRange(1, 1_000_000),
            metavar="N",
            help="Longer captions end with an earlier sentence, or are left out. [default: what the run may write]",
        ),
        click.option(
            "--seed",
            type=click.IntRange(0, 2**31),
            default=1,
            show_default=True,
            metavar="N",
            help="Decides the order of the pictures, dropout and how a LoRA begins.",
        ),
        click.option(
            "--device",
            default="auto",
            show_default=True,
            metavar="auto|cpu|cuda:N",
            help="auto: the first GPU, or the CPU if there is none. With `accelerate launch`, each process's own.",
        ),
    )


def _control_options(command: F) -> F:
    steps = click.IntRange(1, MAX_ROWS)
    return _with(
        command,
        click.option(
            "--save-every", type=steps, default=100, show_default=True, metavar="N", help="Steps between checkpoints."
        ),
        click.option(
            "--keep",
            type=click.IntRange(1, 1_000),
            default=2,
            show_default=True,
            metavar="N",
            help="Keep the newest N checkpoints while training. The result replaces them.",
        ),
        click.option("--eval-split", type=click.Choice(SPLITS), help="A split to compute the loss on meanwhile."),
        click.option(
            "--eval-every", type=steps, default=100, show_default=True, metavar="N", help="Steps between evaluations."
        ),
        click.option(
            "--early-stopping",
            type=click.IntRange(1, 1_000),
            metavar="N",
            help="Stop after N evaluations in a row without a lower loss. The result is then the best one.",
        ),
    )


def _with(command: F, *options: Callable[[Any], Any]) -> F:
    for option in reversed(options):
        command = option(command)
    return command


@cli.command("finetune")
@_picture_options
@click.option("--output", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder of the result.")
@click.option(
    "--merge",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Instead of training: write the LoRA in DIR and its base model as a whole model to --output.",
)
@_recipe_options
@_method_options
@_schedule_options
@_control_options
@json_option
@db_option
@click.pass_context
def finetune_command(
    ctx: click.Context,
    /,
    run_name: str | None,
    split: str | None,
    limit: int | None,
    modalities: tuple[str, ...],
    concepts: tuple[str, ...],
    targets: str | None,
    output: Path,
    merge: Path | None,
    prompt: str | None,
    preset: str | None,
    prompt_file: Path | None,
    prompts: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Adapt a run's model to the original captions of a split.

    The same command continues after an interruption. The output folder holds an adapter for `enqueue --adapter`, or a
    whole model with --method full.
    """
    if merge is not None:
        _merge(merge, output)
        return
    if split is None:
        raise click.UsageError(f"Missing option '--split'. Choose from: {', '.join(SPLITS)}.")
    recipe_fields = {name: options.pop(name) for name in ("model", "revision", "min_pixels", "max_pixels", "load_in")}
    try:
        settings = Settings(**options)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    recipe_fields["prompt"] = chosen_prompt(prompt, preset, prompt_file, prompts)
    database = open_database()
    with db.transaction(database) as conn:
        run = queue.find_run(conn, run_name)
    recipe = _recipe(run.recipe, explicit(ctx, recipe_fields))

    from rococap.scores import concepts as known
    from rococap.training import processes
    from rococap.training.examples import Selection
    from rococap.training.train import Job, finetune

    _check_modalities(modalities, [one.name for one in known.CONCEPTS if one.kind == "modality"])
    selection = Selection(split, modalities, concepts, limit, targets)
    job = Job(database, run, recipe, selection, settings, output.resolve())
    with processes.joined(settings.device):
        with _training_progress(is_shown=processes.is_main()) as report:
            outcome = finetune(job, known.modality, report)
        if not processes.is_main():
            return
    if as_json:
        echo_json(asdict(outcome) | {"output": str(output)})
    else:
        _echo_outcome(outcome, run.name, settings, output)


def _merge(adapter: Path, output: Path) -> None:
    from rococap.training import processes, result

    with processes.joined("cpu"):
        processes.decided(lambda: result.merge(adapter.resolve(), output.resolve()))
        if processes.is_main():
            click.echo(f"{output} holds the whole model, in float32.")


def _recipe(of_run: Recipe, given: dict[str, Any]) -> Recipe:
    """The run's recipe with what the command line says instead. Another model has no adapter, and its own revision."""
    inherited = {name: value for name, value in asdict(of_run).items() if name not in GREEDY}
    if "model" in given:
        given["model"] = named_model(given["model"])
        inherited |= {"adapter": None, "adapter_base": None, "revision": "main"}
    return checked_recipe(inherited | given)


def _check_modalities(chosen: tuple[str, ...], names: list[str]) -> None:
    for name in chosen:
        if name not in (*names, "unknown"):
            raise click.BadParameter(f"{name!r} is none of {', '.join(names)}, unknown.", param_hint="--modality")


def _echo_outcome(outcome: Any, run: str, settings: Settings, output: Path) -> None:
    if outcome.shortened:
        click.echo(f"{outcome.shortened} captions are too long and ended with an earlier sentence")
    if outcome.refused:
        click.echo(f"{outcome.refused} captions were left out: no sentence is short enough, or they are no plain text")
    if outcome.skipped:
        codes = ", ".join(f"{code} ({n})" for code, n in list(outcome.skipped.items())[:SHOWN_CODES])
        unreadable = counted(sum(outcome.skipped.values()), "picture")
        click.echo(f"{unreadable} cannot be read: {codes}. See {output / 'skipped.jsonl'}")
    if not outcome.is_finished:
        click.echo(f"Stopped after step {outcome.steps} of {outcome.total}, which is saved.")
        click.echo("To continue, run the same command again.")
        return
    click.echo(f"{counted(outcome.steps, 'step')} on {counted(outcome.examples, 'picture')}: {output}")
    model = "--adapter" if settings.method == "lora" else "--model"
    name = shlex.quote(str(output))
    say(f"To caption with it: rococap enqueue --run tuned --from {shlex.quote(run)} {model} {name}")


@contextmanager
def _training_progress(*, is_shown: bool) -> Iterator[Callable[[Any], None]]:
    """Yields `report(progress)`: a live line on a terminal, and a log line every ten seconds elsewhere."""
    console = stderr_console()
    last = time.monotonic()

    def line(progress: Any) -> str:
        per_min, left = 60 * progress.steps_per_sec, duration(progress.left_sec)
        return f"step {progress.step} of {progress.steps}, loss {progress.loss:.4f}, {per_min:.0f}/min, {left} to go"

    if console.is_terminal and is_shown:
        with console.status("loading the model") as status:
            yield lambda progress: status.update(line(progress))
        return

    def log_line(progress: Any) -> None:
        nonlocal last
        if time.monotonic() - last >= 10 or progress.step == progress.steps:
            last = time.monotonic()
            logging.getLogger("rococap.training").info("%s", line(progress))

    yield log_line
