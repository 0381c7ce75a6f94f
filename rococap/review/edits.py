"""Edits of captions, one by one or many as one act, and how they are undone. The machine's caption never changes."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from rococap.db import execute, transaction
from rococap.errors import RococapError
from rococap.queue import Run
from rococap.queue.records import MAX_TEXT, time_of
from rococap.results.snapshot import done_pages, finished_until, short_reads
from rococap.results.texts import Texts, latest, texts_now
from rococap.review.records import EDIT, Conflict, Edit, checked_name, checked_text, lock, machine_text

AT_ONCE = 500


def latest_edit(conn: Connection, job_id: int) -> Edit | None:
    """The edit that made the caption's current text; None if nobody edited it."""
    sql = f"SELECT {EDIT} FROM edits e WHERE e.job_id = ? ORDER BY e.at DESC, e.uuid DESC LIMIT 1"
    row = execute(conn, sql, (job_id,)).one_or_none()
    return None if row is None else Edit(*row)


def edit(
    conn: Connection, run: Run, job_id: int, reader: str, text: str, *, seen: int | None, now: int | None = None
) -> Edit:
    """Changes a caption. `seen` is the id of the edit whose text the reader saw; None for the machine's text.

    Raises Conflict, with the other person's edit, if the caption was edited since; RunError if the run has no caption
    of this job; RococapError if the text is as it was, or too long.
    """
    name, text = checked_name(reader), checked_text(text)
    lock(conn, run)
    machine, current = machine_text(conn, run, job_id), latest_edit(conn, job_id)
    _refuse_unseen(current, seen)
    previous = current.text if current else machine
    if text == previous:
        raise RococapError("The caption is as it was: nothing was stored. Change the text first.")
    return _add(conn, current, Edit(0, uuid4().hex, job_id, name, text, previous, None, None, time_of(conn, now)))


def undo(conn: Connection, run: Run, edit_id: int, reader: str, *, now: int | None = None) -> Edit:
    """Takes back an edit, by another one that restores the text before it. Undoing that one restores the edit.

    Raises Conflict if the caption was edited since, RococapError if the run has no such edit.
    """
    name = checked_name(reader)
    lock(conn, run)
    sql = f"SELECT {EDIT} FROM edits e JOIN jobs j ON j.id = e.job_id WHERE e.id = ? AND j.run_id = ?"
    row = execute(conn, sql, (edit_id, run.id)).one_or_none()
    if row is None:
        raise RococapError(f"Run {run.name!r} has no edit number {edit_id}: nothing was changed.")
    undone = Edit(*row)
    current = latest_edit(conn, undone.job_id)
    _refuse_unseen(current, edit_id)
    return _add(conn, current, _undoing(undone, name, None, time_of(conn, now)))


def _refuse_unseen(current: Edit | None, seen: int | None) -> None:
    if current is not None and current.id != seen:
        raise Conflict(current)


def _undoing(undone: Edit, reader: str, act: str | None, at: int) -> Edit:
    return Edit(0, uuid4().hex, undone.job_id, reader, undone.previous, undone.text, undone.id, act, at)


_INSERT = "INSERT INTO edits (uuid, job_id, reader, text, previous, undoes, act, at) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"


def _add(conn: Connection, current: Edit | None, new: Edit) -> Edit:
    row = _row(new, current.at if current else 0)
    id = execute(conn, f"{_INSERT} RETURNING id", row).scalar_one()
    return Edit(id, *row)


def _row(new: Edit, after: int) -> tuple[Any, ...]:
    """The row of a new edit. The latest one is the current text, so its time is after that of the edit before it, even
    if the clock went back.
    """
    at = max(new.at, after + 1)
    return (new.uuid, new.job_id, new.reader, new.text, new.previous, new.undoes, new.act, at)


# --- Many at once ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Replacement:
    """What to replace in captions, and by what; both are taken literally."""

    find: str
    replace: str
    match_case: bool = True
    whole_words: bool = False

    def __call__(self, text: str) -> str:
        """The text after the replacement. Raises RococapError if there is nothing to look for."""
        if not self.find:
            raise RococapError("There is nothing to look for: give the text to replace.")
        pattern = re.escape(self.find)
        if self.whole_words:
            pattern = rf"(?<!\w){pattern}(?!\w)"
        return re.sub(pattern, lambda _: self.replace, text, flags=0 if self.match_case else re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Seen:
    """The moment that a preview shows: captions that were done by `cutoff` (ms since 1970), with all edits up to the id
    `last_edit`.
    """

    cutoff: int
    last_edit: int


@dataclass(frozen=True, slots=True)
class Change:
    """What a replacement would do to one caption. `key` orders changes; `seen` is the latest edit so far, if any."""

    key: int
    job_id: int
    image_id: str
    before: str
    after: str
    seen: int | None


def seen_now(conn: Connection, run: Run, split: str) -> Seen:
    """The present moment, for a preview and for `replace_all` after it."""
    return Seen(finished_until(conn, [run], [split]), texts_now(conn, "edited").last_edit)


_CHANGED = "j.image_id, j.id, i.image_id, c.text, e.id, e.at"


def changes(
    database: Database, run: Run, split: str, replacement: Replacement, seen: Seen, *, after: int = 0
) -> Iterator[Change]:
    """The captions that a replacement would change, in data set order, beginning after the key `after`.

    Reads in short transactions, as an export does.
    """
    with short_reads(database) as read:
        texts = Texts("edited", seen.last_edit)
        for rows in done_pages(read, run, split, seen.cutoff, _CHANGED, texts=texts, after=after):
            for key, job_id, image_id, before, edit_id, _ in rows:
                if (new := replacement(before)) != before:
                    yield Change(key, job_id, image_id, before, new, edit_id)


@dataclass(frozen=True, slots=True)
class Replaced:
    """What one act did: it changed `n` captions, and left alone `skipped` others that were edited in the meantime.

    `act` identifies it, to undo it; None if it changed nothing.
    """

    act: str | None
    n: int
    skipped: int


def replace_all(
    database: Database, run: Run, split: str, replacement: Replacement, seen: Seen, reader: str
) -> Replaced:
    """Makes the changes that a preview of the moment `seen` showed, all or none, as one act.

    Captions that were edited since are left as they are. Raises RococapError, and changes nothing, if a caption would
    become too long.
    """
    name = checked_name(reader)
    wanted = list(changes(database, run, split, replacement, seen))
    if too_long := [one.image_id for one in wanted if len(one.after) > MAX_TEXT]:
        raise RococapError(
            f"The caption of {too_long[0]} would have more than {MAX_TEXT:,} characters: nothing was done."
        )
    act = uuid4().hex
    with transaction(database, write=True) as conn:
        lock(conn, run)
        current, at = _latest_of(conn, [one.job_id for one in wanted]), time_of(conn, None)
        rows = [
            _row(Edit(0, uuid4().hex, one.job_id, name, checked_text(one.after), one.before, None, act, at), last_at)
            for one in wanted
            for last, last_at in [current.get(one.job_id, (None, 0))]
            if last == one.seen
        ]
        if rows:
            execute(conn, _INSERT, rows)
    return Replaced(act if rows else None, len(rows), len(wanted) - len(rows))


def undo_act(conn: Connection, run: Run, act: str, reader: str, *, now: int | None = None) -> Replaced:
    """Takes back all edits of an act as another act. Captions that were edited since are left as they are.

    Raises RococapError if the run has no such act.
    """
    name, new_act = checked_name(reader), uuid4().hex
    lock(conn, run)
    sql = f"SELECT {EDIT} FROM edits e JOIN jobs j ON j.id = e.job_id WHERE e.act = ? AND j.run_id = ? ORDER BY e.id"
    undone = [Edit(*row) for row in execute(conn, sql, (act, run.id)).fetchall()]
    if not undone:
        raise RococapError(f"Run {run.name!r} has no act {act!r}: nothing was changed.")
    current, at = _latest_of(conn, [one.job_id for one in undone]), time_of(conn, now)
    rows = [_row(_undoing(one, name, new_act, at), one.at) for one in undone if current[one.job_id][0] == one.id]
    if rows:
        execute(conn, _INSERT, rows)
    return Replaced(new_act if rows else None, len(rows), len(undone) - len(rows))


def _latest_of(conn: Connection, job_ids: Sequence[int]) -> dict[int, tuple[int, int]]:
    """The id and time of the latest edit of each job that has one."""
    found: dict[int, tuple[int, int]] = {}
    for start in range(0, len(job_ids), AT_ONCE):
        some = job_ids[start : start + AT_ONCE]
        sql = (
            f"SELECT j.id, e.id, e.at FROM jobs j JOIN edits e ON e.id = {latest('edits')} "
            f"WHERE j.id IN ({', '.join('?' * len(some))})"
        )
        found |= {row[0]: (row[1], row[2]) for row in execute(conn, sql, (2**63 - 1, *some)).fetchall()}
    return found


@dataclass(frozen=True, slots=True)
class Act:
    """Edits that a reader made at once: how many, and whether another act has undone them."""

    act: str
    reader: str
    at: int
    n: int
    is_undone: bool


def list_acts(conn: Connection, run: Run, limit: int = 20) -> list[Act]:
    """The latest acts of a run, latest first."""
    sql = (
        "SELECT e.act, min(e.reader), max(e.at), count(*), count(u.id) FROM edits e JOIN jobs j ON j.id = e.job_id "
        "LEFT JOIN edits u ON u.undoes = e.id AND u.act IS NOT NULL "
        "WHERE e.act IS NOT NULL AND j.run_id = ? GROUP BY e.act ORDER BY max(e.at) DESC, e.act LIMIT ?"
    )
    rows = execute(conn, sql, (run.id, limit)).fetchall()
    return [Act(act, reader, at, n, bool(n_undone)) for act, reader, at, n, n_undone in rows]
