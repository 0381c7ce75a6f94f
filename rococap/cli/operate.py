"""Commands that operate a queue by hand: retry, cancel, pause, resume, reap, vacuum, backup; and deleting a run."""

from collections.abc import Callable, Sequence
from pathlib import Path

import click
from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from rococap import db, queue
from rococap.cli.options import (
    DAY_SEC,
    cli,
    db_option,
    open_database,
    progress_bar,
    run_option,
    say,
    splits_option,
)
from rococap.errors import RococapError
from rococap.figures import counted


def delete_run(database: Database, name: str, yes: bool) -> None:
    """Deletes a run with its captions, after asking unless `yes`. Raises RococapError if the answer is not yes."""
    with db.transaction(database) as conn:
        run = queue.get_run(conn, name)
        counts = [counts for counts in queue.counts(conn) if counts.run == name]
    total, done = sum(split.total for split in counts), sum(split.done for split in counts)
    if not yes:
        question = (
            f"Run {name} has {counted(total, 'picture')}, {done} of them captioned. Its captions, scores and failures "
            "will be deleted from the queue for good; exported files stay. Delete it?"
        )
        try:
            click.confirm(question, abort=True)
        except click.Abort as error:
            raise RococapError("Nothing was deleted. To delete without being asked, add --yes.") from error
    with db.transaction(database, write=True) as conn:
        queue.delete_run(conn, run)
    with progress_bar() as progress:
        clear_deleted(database, lambda n: progress(f"{name}: deleting", n, total))
    what = f"{counted(total, 'picture')} and {counted(done, 'caption')}"
    say(f"{name}: deleted, {what}. To reclaim the space: rococap vacuum")


def clear_deleted(database: Database, report: Callable[[int], None] = lambda n: None) -> int:
    """Deletes what deleted runs left behind, reports the jobs deleted so far, and returns how many there were.

    Each page is a transaction of its own, so that workers on other runs can write in between.
    """
    cleared = 0
    while True:
        with db.transaction(database, write=True) as conn:
            n = queue.clear_deleted(conn)
        if not n:
            return cleared
        cleared += n
        report(cleared)


@cli.command("retry")
@run_option("The run. [default: `default`, or the only one]")
@splits_option()
@click.option(
    "--code", "codes", multiple=True, metavar="CODE", help="Pictures that failed with this code. May be repeated."
)
@click.option(
    "--image-id", "image_ids", multiple=True, metavar="ID", help="This picture, failed or cancelled. May be repeated."
)
@click.option("--cancelled", is_flag=True, help="All cancelled pictures.")
@click.option("--all", "everything", is_flag=True, help="All failed pictures.")
@db_option
def retry_command(
    run_name: str | None,
    splits: tuple[str, ...],
    codes: tuple[str, ...],
    image_ids: tuple[str, ...],
    cancelled: bool,
    everything: bool,
) -> None:
    """Make failed or cancelled pictures pending again.

    Their attempts and crashes are counted from zero again.
    """
    if not (codes or image_ids or cancelled or everything):
        raise click.UsageError("Choose what to retry: --code CODE, --image-id ID, --cancelled or --all.")
    if everything and (codes or image_ids or cancelled):
        raise click.UsageError(
            "--all already selects every failed picture: leave out either --all or the other options."
        )
    with db.transaction(open_database(), write=True) as conn:
        run = queue.find_run(conn, run_name)
        n = queue.retry(conn, run, splits=splits, codes=codes, image_ids=image_ids, cancelled=cancelled)
        if not n:
            _refuse_unknown(conn, run, image_ids, codes)
    say(f"{run.name}: {n} pending again" + (f". Caption them: {queue.with_run('worker', run.name)}" if n else ""))


def _refuse_unknown(conn: Connection, run: queue.Run, image_ids: Sequence[str], codes: Sequence[str] = ()) -> None:
    """Raises RococapError if nothing was changed because the run has no such picture or no such failure."""
    if unknown := queue.unknown_images(conn, run, image_ids):
        raise RococapError(
            f"Run {run.name!r} has no picture {', '.join(unknown)}: nothing was changed. Check the IDs: they are "
            "those of the data set."
        )
    if unknown := queue.unknown_codes(conn, run, codes):
        raise RococapError(
            f"No picture of run {run.name!r} failed with the code {', '.join(unknown)}: nothing was changed. To see "
            f"the codes: {queue.with_run('failures', run.name)}"
        )


@cli.command("cancel")
@run_option("The run. [default: `default`, or the only one]")
@splits_option()
@click.option("--image-id", "image_ids", multiple=True, metavar="ID", help="Only this picture. May be repeated.")
@click.option("--all", "everything", is_flag=True, help="Every unfinished picture.")
@db_option
def cancel_command(run_name: str | None, splits: tuple[str, ...], image_ids: tuple[str, ...], everything: bool) -> None:
    """Withdraw pictures that are not finished.

    A worker that holds some of them discards their captions.
    """
    if not (splits or image_ids or everything):
        raise click.UsageError("Choose what to cancel: --split SPLIT, --image-id ID or --all.")
    with db.transaction(open_database(), write=True) as conn:
        run = queue.find_run(conn, run_name)
        n = queue.cancel(conn, run, splits=splits, image_ids=image_ids)
        if not n:
            _refuse_unknown(conn, run, image_ids)
    say(f"{run.name}: {n} cancelled" + (f". Undo: {queue.with_run('retry --cancelled', run.name)}" if n else ""))


@cli.command("pause")
@run_option("The run. [default: `default`, or the only one]")
@db_option
def pause_command(run_name: str | None) -> None:
    """Stop workers from claiming pictures of a run, until `resume`.

    They finish the pictures that they already hold.
    """
    _pause(run_name, True)


@cli.command("resume")
@run_option("The run. [default: `default`, or the only one]")
@db_option
def resume_command(run_name: str | None) -> None:
    """Let workers claim pictures of a paused run again."""
    _pause(run_name, False)


def _pause(run_name: str | None, paused: bool) -> None:
    with db.transaction(open_database(), write=True) as conn:
        run = queue.find_run(conn, run_name)
        queue.pause(conn, run, paused)
    if paused:
        say(f"{run.name}: paused. To resume: {queue.with_run('resume', run.name)}")
    else:
        click.echo(f"{run.name}: resumed. Workers may claim its pictures again.")


@cli.command("reap")
@click.option(
    "--lease", "lease_ids", type=int, multiple=True, metavar="ID", help="This lease, expired or not. May be repeated."
)
@db_option
def reap_command(lease_ids: tuple[int, ...]) -> None:
    """Release the pictures of dead workers.

    These are the pictures of expired leases, or of the leases named by --lease. Running workers do this by themselves.
    Name a lease (see: rococap leases) only if its worker is certainly dead, and do not reap right after an outage of
    the database: every lease has expired by then, although the workers are alive.
    """
    with db.transaction(open_database(), write=True) as conn:
        reaped = [id for id in lease_ids if queue.crash(conn, id)] if lease_ids else queue.reap(conn)
        n_open = len(queue.list_leases(conn))
    if unknown := sorted(set(lease_ids) - set(reaped)):
        raise RococapError(f"Not an open lease: {', '.join(map(str, unknown))}. To list the open ones: rococap leases")
    if reaped:
        click.echo(f"Leases released: {len(reaped)}. Their pictures are pending again.")
    else:
        say("No lease has expired." + (f" Open leases: {n_open}. To list them: rococap leases" if n_open else ""))


@cli.command("vacuum")
@click.option(
    "--keep-days",
    type=click.FloatRange(0, 36_500),
    default=30.0,
    show_default=True,
    metavar="DAYS",
    help="Failures younger than this are kept.",
)
@db_option
def vacuum_command(keep_days: float) -> None:
    """Delete old failures and deleted runs, and reclaim their space.

    A failure is deleted once a later one of the same picture has replaced it. Captions, leases and the latest failure
    of each picture are kept. An SQLite file shrinks only while no worker runs.
    """
    database = open_database()
    with db.transaction(database) as conn:
        before = db.now(conn) - int(keep_days * DAY_SEC * 1000)
        is_busy = bool(queue.list_leases(conn))
    clear_deleted(database)
    deleted = 0
    while n := _prune(database, before):
        deleted += n
    click.echo(f"Old failures deleted: {deleted}.")
    if is_busy and database.dialect.name == "sqlite":
        say("Workers hold leases, so the file was not shrunk. Once they have stopped, run: rococap vacuum")
    else:
        db.vacuum(database)


def _prune(database: Database, before: int) -> int:
    with db.transaction(database, write=True) as conn:
        return queue.prune(conn, before=before)


@cli.command("backup")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@db_option
def backup_command(file: Path) -> None:
    """Copy the SQLite database to FILE, while workers run.

    The copy is the database as it was at one moment. An existing file is not overwritten.
    """
    click.echo(f"Copied to {db.back_up(open_database(), file)}")
