"""Commands that concern the machine or the database rather than one run: doctor, migrate, bench, demo."""

import shlex
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from rococap import db
from rococap.cli.options import (
    SHOWN_FAILURES,
    cli,
    db_option,
    echo_json,
    json_option,
    open_database,
    progress_bar,
    run_option,
    say,
    stderr_console,
)
from rococap.cli.tables import aligned, as_table, shortened
from rococap.cli.worker import check_engine, engine_options
from rococap.data import SPLITS
from rococap.figures import counted, in_hours, significant

if TYPE_CHECKING:
    from rococap.scores.leaks import Leaks


@cli.command("doctor")
@click.option(
    "--leaks",
    is_flag=True,
    help="Instead, look for pictures of one split that are in another one too, exactly or nearly. Reads every enqueued "
    "picture once; if it is stopped, the next call goes on.",
)
@json_option
@db_option
def doctor_command(leaks: bool, as_json: bool) -> None:
    """Check this machine, the database, the data set and the model.

    The exit code is 1 if something is wrong, with --leaks if there are near-duplicates.
    """
    if leaks:
        _find_leaks(as_json)
        return
    from rococap.doctor import Verdict, examine

    target = click.get_current_context().find_root().obj
    checks = []
    for check in examine(db.connect(target.url, create=False, force=True)):
        checks.append(check)
        if not as_json:
            say(f"{check.verdict:8} {check.name}: {check.found}")
    if as_json:
        echo_json([asdict(check) for check in checks])
    if any(check.verdict == Verdict.FAIL for check in checks):
        sys.exit(1)


def _find_leaks(as_json: bool) -> None:
    from rococap.scores import leaks

    database = open_database()
    with progress_bar() as progress:
        found = leaks.find(database, progress)
    if as_json:
        about = {"algorithm": leaks.ALGORITHM, "bits": leaks.BITS, "distance": leaks.DISTANCE}
        echo_json({**about, "datasets": [asdict(one) for one in found]})
    else:
        click.echo("\n\n".join(_leaks_text(one) for one in found))
    if any(one.pairs for one in found):
        sys.exit(1)


def _leaks_text(found: "Leaks") -> str:
    counts = ", ".join(f"{n} of {split}" for split, n in found.hashed.items()) or "none"
    lines = [f"{found.dataset}: pictures with a hash: {counts}; {found.new} of them new"]
    if found.unreadable:
        lines.append(f"  {counted(len(found.unreadable), 'picture')} cannot be read:")
    lines += [f"  {one.split} {one.image_id}: {one.reason}" for one in found.unreadable[:SHOWN_FAILURES]]
    if len(found.hashed) < 2:
        lines.append("  There is no other split to compare with: enqueue one, then run this again.")
    else:
        lines.append(f"  Near-duplicates in different splits: {len(found.pairs)}")
    for pair in found.pairs:
        (one, other), (first, second) = pair.splits, pair.image_ids
        lines.append(f"  {one} {first} = {other} {second} ({pair.distance} bits differ)")
    return "\n".join(lines)


@cli.command("migrate")
@db_option
def migrate_command() -> None:
    """Upgrade the database to this version's schema, after a backup."""
    target = click.get_current_context().find_root().obj
    migration = db.migrate(target.url, force=target.force)
    click.echo("Upgraded." if migration.upgraded else "The schema is up to date.")
    if migration.backup:
        click.echo(f"Backup of the old database: {migration.backup}")


# --- bench -----------------------------------------------------------------------------------------------------


def _sizes(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        sizes = [int(size) for size in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers. Write it like 1,4,16.") from None
    return [click.IntRange(1, 4096)(size, param, ctx) for size in sizes]


@cli.command("bench")
@run_option("The run to measure. [default: `default`, or the only one that has work]")
@click.option("--split", type=click.Choice(SPLITS), help="The split to measure. [default: the first one of the run]")
@click.option(
    "--pictures",
    type=click.IntRange(1, 100_000),
    default=64,
    show_default=True,
    metavar="N",
    help="Number of pictures to caption.",
)
@click.option(
    "--batch-size",
    "sizes",
    callback=_sizes,
    metavar="N,N,…",
    help="Batch sizes to measure. [default: powers of two up to the automatic one]",
)
@engine_options
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("results_medical/bench"),
    show_default=True,
    metavar="FOLDER",
    help="Folder for bench.json and bench.png.",
)
@json_option
@db_option
def bench_command(
    run_name: str | None,
    split: str | None,
    pictures: int,
    sizes: list[int] | None,
    output: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure this machine with a run's model and pictures.

    It times reading and preparing pictures, captioning at each batch size, and the whole worker, estimates how long the
    split will take, and recommends settings. The queue is only read. All N pictures are captioned at each batch size:
    if the model takes minutes per picture, begin with --pictures 4.
    """
    from rococap.engines import Options
    from rococap.files import write_json
    from rococap.worker import benchmark

    check_engine(options)
    database = open_database()
    with progress_bar() as progress:
        measured = benchmark.measure(
            database,
            Options(**options),
            run_name=run_name,
            split=split,
            max_pictures=pictures,
            sizes=sizes,
            progress=progress,
        )
    write_json(output / "bench.json", asdict(measured))
    benchmark.draw(measured, output / "bench.png")
    if as_json:
        echo_json(asdict(measured))
    else:
        click.echo(_measured_text(measured))
        click.echo(f"\nWritten: {output / 'bench.json'}, {output / 'bench.png'}")


def _measured_text(measured: Any) -> str:
    """At most 80 columns wide, however long the model's path is."""
    estimate, share = measured.estimate, 100 * measured.efficiency
    failures = f", and {measured.failures} that cannot be captioned" if measured.failures else ""
    facts = [
        ["model", shortened(measured.model)],
        ["device", f"{measured.device}, {measured.dtype}, {measured.cpu_count} CPU cores"],
        ["pictures", f"{measured.pictures} of {shortened(measured.run, 24)} {measured.split}{failures}"],
        ["reading", f"{measured.load_ms:.1f} ms per picture"],
        ["preparing", f"{measured.prepare_ms:.1f} ms per picture"],
        ["automatic", f"batch size {measured.automatic_batch_size}"],
        ["worker", f"{significant(measured.worker_pictures_per_sec)} pictures/s, {share:.0f}% of the model alone"],
        ["estimate", f"{in_hours(estimate.split_hours)} for all {measured.split_pictures} pictures of the split"],
        ["", f"{in_hours(estimate.unfinished_hours)} for the {measured.unfinished_pictures} that are unfinished"],
    ]
    rates = [
        [rate.batch_size, significant(rate.pictures_per_sec), significant(rate.tokens_per_sec)]
        for rate in measured.batch_sizes
    ]
    return "\n\n".join(
        [
            aligned(facts),
            as_table(["batch size", "pictures/s", "new tokens/s"], rates),
            textwrap.fill(measured.recommendation, 80, break_on_hyphens=False),
        ]
    )


# --- demo ------------------------------------------------------------------------------------------------------


@cli.command("demo")
@click.option(
    "--dir",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Folder for everything that the demo writes.",
)
@click.option(
    "--images",
    type=click.IntRange(min=5),
    metavar="N",
    help="Phantoms to draw.  [default: 200, or 4000 with --finetune]",
)
@click.option(
    "--workers", type=click.IntRange(1, 64), default=2, show_default=True, metavar="N", help="Worker processes."
)
@click.option(
    "--finetune",
    is_flag=True,
    help="Instead: teach the model kinds of phantom that it has never seen, in DIRECTORY/finetune.",
)
@click.option(
    "--method",
    type=click.Choice(["full", "lora"]),
    default="full",
    show_default=True,
    help="With --finetune: train all weights, or a LoRA.",
)
@click.option(
    "--steps",
    type=click.IntRange(1, 100_000),
    default=300,
    show_default=True,
    metavar="N",
    help="With --finetune: steps of 32 pictures.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31),
    default=1,
    show_default=True,
    metavar="N",
    help="With --finetune: decides the order of the pictures, and how a LoRA begins.",
)
@click.pass_context
def demo_command(
    ctx: click.Context, /, folder: Path, images: int | None, workers: int, finetune: bool, **training: Any
) -> None:
    """Run the whole job on drawings with a small model.

    It draws phantoms, captions them with the small model in this package, and writes an export and a report. With
    --finetune, it shows in about three minutes what the model learns about other kinds of phantom, and what it forgets.
    """
    from rococap.demo import run as run_demo

    for name in training:
        if not finetune and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name} goes with --finetune.")
    click.echo(
        "Phantoms are drawings made by a program; a small model that was trained on such drawings captions them."
    )
    click.echo("They show how rococap works, not what Qwen2-VL sees. Nothing in rococap is for clinical use.\n")
    if finetune:
        _finetune_demo(folder / "finetune", images, workers, training)
        return
    with progress_bar() as bar:
        result = run_demo(folder, images or 200, workers, bar if stderr_console().is_terminal else _steps())
    for example in result.examples[:4]:
        click.echo(f"{example.image_id}\n  original   {example.original}\n  generated  {example.generated}")
    click.echo(f"\n{_captioned_text(result, workers)}")
    click.echo(f"Look at  {result.sheet}")
    click.echo(f"Look at  {result.report}")
    for path in result.exports:
        click.echo(f"Read     {path}")
    click.echo(f"Run      rococap --db {shlex.quote(str(folder / 'rococap.db'))} status")


def _finetune_demo(folder: Path, images: int | None, workers: int, training: dict[str, Any]) -> None:
    from rococap.demo import finetune

    with progress_bar() as bar:
        progress = bar if stderr_console().is_terminal else _steps()
        result = finetune.run(folder, images or finetune.IMAGES, workers, **training, progress=progress)
    click.echo(f"\n{result.steps} steps of training on {result.trained_on} pictures.")
    click.echo("Captions of held-out pictures that equal the original exactly:\n")
    rows = [
        [name, str(one.pictures), f"{one.before / one.pictures:.1%}", f"{one.after / one.pictures:.1%}"]
        for name, one in (("never seen before", result.new), ("known before", result.old))
    ]
    click.echo(as_table(["kinds of phantom", "pictures", "before", "after"], rows))
    click.echo(f"\nLook at  {result.report}")
    click.echo(f"Look at  {result.output / 'loss.png'}")
    click.echo(f"Read     {result.output / 'README.md'}")
    click.echo(f"Run      rococap --db {shlex.quote(str(folder / 'rococap.db'))} runs")


def _captioned_text(result: Any, workers: int) -> str:
    """Reports the captions of this run apart from those that an earlier demo in the same folder made."""
    exact = f"{result.exact} of them identical to the original."
    if result.before == result.captioned:
        return (
            f"{result.captioned} pictures were captioned by an earlier demo in this folder, {exact}\n"
            "Nothing was captioned again; the files below were regenerated from its queue."
        )
    now = f"{result.captioned - result.before} pictures captioned by {workers} workers in {result.seconds:.0f} s, "
    if result.before:
        return f"{now}after {result.before} by an earlier demo in this folder, {exact}"
    return now + exact


def _steps() -> Callable[[str, int, int], None]:
    """A progress callback for output that is not a terminal: prints each step as it begins, and how far it is every
    quarter of a minute.
    """
    printed: set[str] = set()
    last = monotonic()

    def progress(step: str, done: int, total: int) -> None:
        nonlocal last
        if step not in printed:
            printed.add(step)
            last = monotonic()
            click.echo(f"{step} …")
        elif monotonic() - last >= 15 and done < total:
            last = monotonic()
            click.echo(f"{step} … {done} of {total}")

    return progress
