"""Commands that change a queue by hand: retry, cancel, pause, resume, reap, vacuum, backup."""

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
    with_run,
)
from rococap.errors import RococapError


def delete_run(database: Database, name: str, yes: bool) -> None:
    with db.transaction(database) as conn:
        run = queue.get_run(conn, name)
        total = sum(one.total for one in queue.counts(conn) if one.run == name)
        done = sum(one.done for one in queue.counts(conn) if one.run == name)
    if not yes:
        question = (
            f"Run {name} has {total} pictures, {done} of them captioned. Its captions, scores and failures go from the "
            "queue for good; files that were exported stay. Delete it?"
        )
        try:
            click.confirm(question, abort=True)
        except click.Abort as error:
            raise RococapError("Nothing was deleted. To delete without being asked: --yes") from error
    with db.transaction(database, write=True) as conn:
        queue.delete_run(conn, run)
    with progress_bar() as progress:
        clear_deleted(database, lambda n: progress(f"{name}: deleting", n, total))
    say(f"{name}: deleted, {total} pictures and {done} captions. To give the space back: rococap vacuum")


def clear_deleted(database: Database, report: Callable[[int], None] = lambda n: None) -> int:
    """In pages, each a transaction of its own, so that workers on other runs go on meanwhile."""
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
@click.option("--code", "codes", multiple=True, help="Those that failed with this code. May be repeated.")
@click.option("--image-id", "image_ids", multiple=True, help="This picture, failed or cancelled. May be repeated.")
@click.option("--cancelled", is_flag=True, help="Those that were cancelled.")
@click.option("--all", "everything", is_flag=True, help="Everything that failed.")
@db_option
def retry_command(
    run_name: str | None,
    splits: tuple[str, ...],
    codes: tuple[str, ...],
    image_ids: tuple[str, ...],
    cancelled: bool,
    everything: bool,
) -> None:
    """Make failed pictures pending again, with a clean record."""
    if not (codes or image_ids or cancelled or everything):
        raise click.UsageError("Say what to try again: --code CODE, --image-id ID, --cancelled or --all.")
    if everything and (codes or image_ids or cancelled):
        raise click.UsageError("--all is everything that failed: leave the other options out, or --all.")
    with db.transaction(open_database(), write=True) as conn:
        run = queue.find_run(conn, run_name)
        n = queue.retry(conn, run, splits=splits, codes=codes, image_ids=image_ids, cancelled=cancelled)
        if not n:
            _refuse_unknown(conn, run, image_ids, codes)
    say(f"{run.name}: {n} pending again" + (f". Caption them: {with_run('worker', run.name)}" if n else ""))


def _refuse_unknown(conn: Connection, run: queue.Run, image_ids: Sequence[str], codes: Sequence[str] = ()) -> None:
    """Raises RococapError if a name is why nothing was done."""
    if unknown := queue.unknown_images(conn, run, image_ids):
        raise RococapError(
            f"Run {run.name!r} has no picture {', '.join(unknown)}: nothing was changed. Check the IDs: they are the "
            "data set's own."
        )
    if unknown := queue.unknown_codes(conn, run, codes):
        raise RococapError(
            f"Nothing of run {run.name!r} failed with the code {', '.join(unknown)}: nothing was changed. See the "
            f"codes: {with_run('failures', run.name)}"
        )


@cli.command("cancel")
@run_option("The run. [default: `default`, or the only one]")
@splits_option()
@click.option("--image-id", "image_ids", multiple=True, help="Only this picture. May be repeated.")
@click.option("--all", "everything", is_flag=True, help="Everything that is not finished.")
@db_option
def cancel_command(run_name: str | None, splits: tuple[str, ...], image_ids: tuple[str, ...], everything: bool) -> None:
    """Withdraw pictures that are not finished. A worker that holds some drops their captions."""
    if not (splits or image_ids or everything):
        raise click.UsageError("Say what to cancel: --split SPLIT, --image-id ID or --all.")
    with db.transaction(open_database(), write=True) as conn:
        run = queue.find_run(conn, run_name)
        n = queue.cancel(conn, run, splits=splits, image_ids=image_ids)
        if not n:
            _refuse_unknown(conn, run, image_ids)
    say(f"{run.name}: {n} cancelled" + (f". Undo: {with_run('retry --cancelled', run.name)}" if n else ""))


@cli.command("pause")
@run_option("The run. [default: `default`, or the only one]")
@db_option
def pause_command(run_name: str | None) -> None:
    """Let workers finish what they hold and claim nothing more of a run, until `resume`."""
    _pause(run_name, True)


@cli.command("resume")
@run_option("The run. [default: `default`, or the only one]")
@db_option
def resume_command(run_name: str | None) -> None:
    """Let workers claim of a paused run again."""
    _pause(run_name, False)


def _pause(run_name: str | None, paused: bool) -> None:
    with db.transaction(open_database(), write=True) as conn:
        run = queue.find_run(conn, run_name)
        queue.pause(conn, run, paused)
    if paused:
        say(f"{run.name}: paused. Go on with: {with_run('resume', run.name)}")
    else:
        click.echo(f"{run.name}: workers may claim.")


@cli.command("reap")
@click.option("--lease", "lease_ids", type=int, multiple=True, help="This lease, though its time has not run out.")
@db_option
def reap_command(lease_ids: tuple[int, ...]) -> None:
    """Free the pictures of dead workers: of leases whose time has run out, or of those named.

    Workers do it by themselves. Name a lease (see: rococap leases) only if its worker is surely dead, and do not reap
    right after an outage of the database: then every lease has run out, and its worker lives.
    """
    with db.transaction(open_database(), write=True) as conn:
        reaped = [id for id in lease_ids if queue.crash(conn, id)] if lease_ids else queue.reap(conn)
    if unknown := sorted(set(lease_ids) - set(reaped)):
        raise RococapError(f"No open leases: {', '.join(map(str, unknown))}. Look at those there are: rococap leases")
    click.echo(f"Leases freed: {len(reaped)}. Their pictures are pending again." if reaped else "No lease has run out.")


@cli.command("vacuum")
@click.option(
    "--keep-days", type=click.FloatRange(0, 36_500), default=30.0, show_default=True, help="How much history stays."
)
@db_option
def vacuum_command(keep_days: float) -> None:
    """Delete old failures that a later one of the same picture has replaced and what is left of deleted runs, and give
    free space back.

    Captions, leases and each picture's latest failure stay. An SQLite file is made smaller only while no worker runs.
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
        say("Workers hold leases: the file was left as large as it is. Once they have stopped: rococap vacuum")
    else:
        db.vacuum(database)


def _prune(database: Database, before: int) -> int:
    with db.transaction(database, write=True) as conn:
        return queue.prune(conn, before=before)


@cli.command("backup")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@db_option
def backup_command(file: Path) -> None:
    """Copy the SQLite database as it is at one moment, while workers run. A file that is there is not overwritten."""
    click.echo(f"Copied to {db.back_up(open_database(), file)}")
