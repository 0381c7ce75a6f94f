"""The search index: what captions are searched, filtered and sorted by. It can be thrown away at any time.

It is filled from the queue page by page and follows it by polling, in transactions of its own: beside an SQLite
database in the file `rococap.db.search`, in PostgreSQL in a schema of its own. The queue knows nothing of it. Several
processes may fill and read one index: each page is written only if nobody else has written it meanwhile. An index of
another database, of another format or of a past that a backup has undone is noticed and filled again, and so is a
damaged file. Where it cannot be written, there is no search, and the rest goes on.
"""

import json
import os
import random
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from sqlalchemy import Connection, event
from sqlalchemy import Engine as Database
from sqlalchemy.exc import DBAPIError

from rococap import db, queue
from rococap.db import execute, transaction
from rococap.errors import DatabaseError, RococapError
from rococap.progress import Progress, silent
from rococap.queue import Counts, Run
from rococap.results import current
from rococap.results.current import Position
from rococap.results.snapshot import PAGE
from rococap.scores import concepts
from rococap.scores.disagreement import DISAGREEMENT
from rococap.urls import shown
from rococap.web.documents import Document, Documents, Fts5, Key, TextSearch, Wanted, facet

FORMAT: Final = f"2 {concepts.DIGEST}"
"""An index of another format is filled again."""
LENGTH, TIME = "length", "time"
SCORES: Final = ("rouge_l", "meteor_nltk", "cider_d", "concept_f1", "bertscore_f1", DISAGREEMENT)
"""The scores that captions are sorted and filtered by, of those that `evaluate` and `compare` store."""
KEYS: Final = (LENGTH, TIME, *SCORES)
"""What captions are sorted by: characters, milliseconds since 1970, and scores."""
CHECK_SEC: Final = 60.0
"""How often a sample is compared with the queue: this is how new scores and a replaced database are noticed."""
SAMPLE: Final = 16
"""Captions of each run and split in a sample; as many of the latest ones are added."""
OVERLAP_MS: Final = 10_000
"""How far back each poll looks: a caption may be committed after others that were finished later."""
PATIENCE_SEC: Final = 5.0
_CACHE_KB: Final = 32_768
_TORN: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_ABSENT: Final = ("no such table", "does not exist")

_JOB: Final = "j.id, j.run_id, j.image_id, j.split, j.status, i.caption, i.cui, c.text, c.flags, c.generated_at"


class SearchUnavailable(RococapError):
    """The index cannot be read or written; the message says why. Pictures can be looked at without it."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A facet that people set, such as `reviewed`.

    `changed` returns the next page of the (id, job id) of the records after an id, in order; `held` says which of these
    jobs have the mark now.
    """

    name: str
    changed: Callable[[Connection, int], Sequence[Position]]
    held: Callable[[Connection, Sequence[int]], set[int]]


@dataclass(frozen=True, slots=True)
class Status:
    """How far the index is: `done` of `total` captions and pictures can be found. `why` says why it is off."""

    state: Literal["filling", "ready", "off"]
    done: int = 0
    total: int = 0
    why: str = ""


@dataclass(frozen=True, slots=True)
class _Memory:
    """What an index knows of the queue that it was filled from. It is stored with each page, and a page that was read
    under another memory is not written.

    Positions say how far each table has been read; `due_after` and `segments_after` are by run and split. `runs` has
    the time at which each was created, `shards` their digests. `recounted` names the counts after which everything was
    read again, so that this happens once.
    """

    jobs_after: int = 0
    failures_after: int = 0
    marks_after: dict[str, int] = field(default_factory=dict)
    due_after: dict[str, list[int]] = field(default_factory=dict)
    segments_after: dict[str, list[int]] = field(default_factory=dict)
    runs: dict[str, int] = field(default_factory=dict)
    shards: dict[str, str] = field(default_factory=dict)
    recounted: str = ""

    def with_(self, **changes: Any) -> "_Memory":
        """A copy with these values; a dictionary adds to the one that is there."""
        merged: dict[str, Any] = {
            name: {**getattr(self, name), **value} if isinstance(value, dict) else value
            for name, value in changes.items()
        }
        return replace(self, **merged)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A document with what it is sorted by."""

    document: Document
    split: str
    keys: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Queue:
    """The runs of the queue, oldest first, with the time at which each was created and its counts by split; `at` is the
    time of this look by the queue's clock.
    """

    at: int
    seen: list[queue.RunSeen]
    deleted: set[int]

    @property
    def splits(self) -> list[tuple[Run, Counts]]:
        return [(one.run, counts) for one in self.seen for counts in one.counts]

    @property
    def total(self) -> int:
        return sum(counts.total for _, counts in self.splits)


Counted = dict[tuple[int, str], Counter[str]]
"""How many documents of a run and split are in each state."""
Rows = Sequence[Sequence[Any]]


class _Overtaken(Exception):
    """Another process has written to the index since this one read it."""


class Index:
    """The search index of one queue. Thread-safe. `update` brings it up to date, a part at a time, and never raises
    because of the index itself; what reads it raises SearchUnavailable.
    """

    def __init__(self, queue_database: Database, marks: Sequence[Mark] = ()) -> None:
        self.status = Status("filling")
        self._queue = queue_database
        self._marks = tuple(marks)
        self._lock = threading.Lock()
        self._checked_at = -CHECK_SEC
        self._followed_until = 0
        self._file: Path | None = None
        self._opened: tuple[int, int] | None = None
        self._is_torn = False
        self.documents: Documents
        if queue_database.dialect.name == "sqlite":
            self._file = Path(f"{queue_database.url.database}.search")
            self.documents = Fts5()
            url = shown(queue_database.url.set(database=str(self._file), query={}))
            self._database = db.connect(url, create=False, force=True)
            event.listen(self._database, "connect", _set_cache)
        else:
            self.documents = TextSearch("rococap_search")
            self._database = queue_database

    def close(self) -> None:
        """Closes the index's file. The queue's connections are the caller's."""
        if self._database is not self._queue:
            self._database.dispose()

    # --- Reading ---

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that reads the index. Raises SearchUnavailable if it is being made, or cannot be read."""
        with self._explaining():
            if self._file is not None and not self._file.is_file():
                raise SearchUnavailable(self.status.why or _BEING_MADE)
            with transaction(self._database, patience=PATIENCE_SEC) as conn:
                yield conn

    def lists(self, conn: Connection, run: Run, split: str) -> dict[str, int]:
        """The ids of the lists by which captions of a run and split can be sorted, by the names in KEYS."""
        sql = f"SELECT name, id FROM {self.documents.schema}lists WHERE run_id = ? AND split = ?"
        return {row[0]: row[1] for row in execute(conn, sql, (run.id, split)).fetchall()}

    def totals(self, conn: Connection, runs: Sequence[Run], split: str) -> dict[int, tuple[int, int]]:
        """By run id, how many of its pictures of the split are in the index, and a lower bound of their ids."""
        sql = (
            f"SELECT run_id, sum(n), min(first_image) FROM {self.documents.schema}counts "
            f"WHERE run_id IN ({db.marks(runs)}) AND split = ? GROUP BY run_id"
        )
        rows = execute(conn, sql, (*(run.id for run in runs), split)).fetchall()
        return {row[0]: (int(row[1]), row[2]) for row in rows}

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except (DBAPIError, DatabaseError) as error:
            cause = error if isinstance(error, DBAPIError) else error.__cause__
            reason = getattr(cause, "orig", None) or error
            self._is_torn = self._is_torn or getattr(reason, "sqlite_errorcode", 0) & 0xFF in _TORN
            raise SearchUnavailable(self._why(reason)) from error

    def _why(self, reason: BaseException) -> str:
        text = str(reason).partition("\n")[0]
        if self._is_torn or any(words in text for words in _ABSENT):
            return _BEING_MADE
        where = self._file or f"the schema {self.documents.schema.rstrip('.')}"
        if "locked" in text:
            return f"The search index {where} is being written by another process: search again in a moment."
        if "full" in text:
            next_step = "Free some space, and it comes back by itself"
        elif getattr(reason, "sqlstate", None) == _NOT_ALLOWED:
            next_step = "Let this role make a schema: GRANT CREATE ON DATABASE NAME TO ROLE"
        else:
            next_step = "Check that the folder can be written"
        return f"The search index {where} cannot be used ({text}): search is off, all else works. {next_step}."

    # --- Writing ---

    def follow(self, stop: threading.Event, every_sec: float = 2.0) -> None:
        """Keeps the index up to date until `stop` is set; waits out a queue that cannot be reached."""
        while not stop.is_set():
            before = self.status
            with suppress(DatabaseError, DBAPIError):
                self.update()
            is_moving = self.status.state == "filling" and self.status != before
            stop.wait(0.0 if is_moving else every_sec)

    def update(self, seconds: float = 1.0, progress: Progress = silent) -> Status:
        """Follows the queue for about this long, and says how far the index is. An index that is missing, damaged or
        not of this queue is begun anew.

        Raises DatabaseError if the queue cannot be read.
        """
        with self._lock:
            try:
                self.status = self._update(time.monotonic() + seconds, progress)
            except SearchUnavailable as error:
                self.status = Status("off", why=str(error))
            except _Overtaken:
                pass
            return self.status

    def _update(self, until: float, progress: Progress) -> Status:
        self._reopen_if_replaced()
        memory, counted = self._remembered()
        seen = self._look()
        if memory is None or _is_of_another_past(memory, seen, counted):
            memory, counted = self._begin_anew(memory, seen), {}
        for rows, changes in self._news(memory, seen, counted):
            memory, counted = self._store(memory, rows, changes)
            done = sum(states.total() for states in counted.values())
            progress("filling the search index", done, seen.total)
            if time.monotonic() > until:
                return Status("filling", done, seen.total)
        self._followed_until = seen.at
        lacking = [(run.id, c.split, c.done, c.total) for run, c in seen.splits if _lacks(counted, run, c)]
        if lacking and memory.recounted != (names := json.dumps(lacking)):
            self._store(memory, [], {"jobs_after": 0, "recounted": names})
            return Status("filling", 0, seen.total)
        if self._sample_differs(memory, seen):
            return Status("filling", 0, seen.total)
        return Status("ready", seen.total, seen.total)

    def _look(self) -> _Queue:
        with transaction(self._queue) as conn:
            return _Queue(db.now(conn), queue.runs_seen(conn), current.deleted_runs(conn))

    # --- What is new in the queue ---

    def _news(self, memory: _Memory, seen: _Queue, counted: Counted) -> Iterator[tuple[Rows, dict[str, Any]]]:
        """Pages of jobs that are new or have changed, each with what to remember once it is stored."""
        created = {str(one.run.id): one.created_at for one in seen.seen}
        if created.items() - memory.runs.items():
            yield [], {"runs": created}
        yield from self._new_jobs(memory)
        for run, counts in seen.splits:
            is_short = counted.get((run.id, counts.split), Counter())["done"] != counts.done
            again = is_short or self._may_be_late(memory, run, counts.split)
            yield from self._finished(memory, run, counts.split, "due_after", current.due_after, again)
            yield from self._finished(memory, run, counts.split, "segments_after", current.in_segments_after, again)
        yield from self._failures(memory)
        for run, counts in seen.splits:
            if counted.get((run.id, counts.split), Counter())["failed"] != counts.failed:
                yield from self._failed(run, counts.split)
        for mark in self._marks:
            yield from self._marked(memory, mark)

    def _new_jobs(self, memory: _Memory) -> Iterator[tuple[Rows, dict[str, Any]]]:
        after = memory.jobs_after
        while rows := self._ask(current.jobs_after, after, _JOB):
            after = rows[-1][0]
            yield rows, {"jobs_after": after}

    def _may_be_late(self, memory: _Memory, run: Run, split: str) -> bool:
        """Whether jobs may have been committed since the last look that had finished before others that are known."""
        last, _ = memory.due_after.get(_key(run, split), (0, 0))
        return last > self._followed_until - OVERLAP_MS

    def _finished(
        self,
        memory: _Memory,
        run: Run,
        split: str,
        name: str,
        read: Callable[[Connection, Run, str, Position], list[current.Finished]],
        again: bool,
    ) -> Iterator[tuple[Rows, dict[str, Any]]]:
        """Jobs that have finished, also if they were done before: a merge has replaced their caption, which leaves the
        counts as they were. `again`: the latest ones are looked at again.
        """
        key, is_due = _key(run, split), name == "due_after"
        number, id = getattr(memory, name).get(key, (0, 0))
        last: Position = (number, id)
        after = (number - OVERLAP_MS if is_due else number, 0) if again else last
        while page := self._ask(read, run, split, after):
            after = page[-1].at
            new = {one.at[1]: one.finished_at for one in page if one.at > last}
            rows = self._ask(current.jobs_with, [one.at[1] for one in page], _JOB)
            # Most jobs in a segment are known from the time when they were due. A merge finishes some again.
            sure = {row[0] for row in rows if row[0] in new and (is_due or new[row[0]] != row[9])}
            known = self._captions(run, split, [row[2] for row in rows if row[0] not in sure])
            fresh = [row for row in rows if row[0] in sure or known.get(row[2]) != (row[9], len(row[7] or ""))]
            if fresh or after > last:
                yield fresh, {name: {key: list(max(after, last))}}

    def _captions(self, run: Run, split: str, images: Sequence[int]) -> dict[int, tuple[float, float]]:
        """The time and length of the captions of these images that are in the index."""
        with self.reading() as conn:
            lists = {name: id for name, id in self.lists(conn, run, split).items() if name in (TIME, LENGTH)}
            known = self._known(conn, lists, images)
        return {image: (known[TIME, image], known[LENGTH, image]) for name, image in known if name == TIME}

    def _failures(self, memory: _Memory) -> Iterator[tuple[Rows, dict[str, Any]]]:
        after = memory.failures_after
        while page := self._ask(current.failures_after, after):
            after = page[-1][0]
            jobs = sorted({job_id for _, job_id in page})
            yield self._ask(current.jobs_with, jobs, _JOB), {"failures_after": after}

    def _failed(self, run: Run, split: str) -> Iterator[tuple[Rows, dict[str, Any]]]:
        """Jobs that have failed or have been retried, without a new failure."""
        wanted = Wanted(split, (run.id,), (facet("state", "failed"),))
        with self.reading() as conn:
            known = {row[0] for row in execute(conn, *self.documents.images(wanted, None, _ALL)).fetchall()}
        changed = sorted(known ^ self._ask(current.failed_images, run, split))
        for start in range(0, len(changed), PAGE):
            yield self._ask(current.jobs_of_images, run, changed[start : start + PAGE], _JOB), {}

    def _marked(self, memory: _Memory, mark: Mark) -> Iterator[tuple[Rows, dict[str, Any]]]:
        after = memory.marks_after.get(mark.name, 0)
        while page := self._ask(mark.changed, after):
            after = page[-1][0]
            jobs = sorted({job_id for _, job_id in page})
            yield self._ask(current.jobs_with, jobs, _JOB), {"marks_after": {mark.name: after}}

    def _ask(self, read: Callable[..., Any], *values: Any) -> Any:
        """What `read` finds in the queue, in a short transaction."""
        with transaction(self._queue) as conn:
            return read(conn, *values)

    def _entries(self, rows: Rows) -> list[_Entry]:
        jobs = [row[0] for row in rows]
        with transaction(self._queue) as conn:
            failures = current.last_failures(conn, [row[0] for row in rows if row[4] == "failed"])
            scores = current.stored_scores(conn, jobs)
            marks = {mark.name: mark.held(conn, jobs) for mark in self._marks}
        return [
            _entry(
                row,
                failures.get(row[0], ("", ""))[0],
                scores.get(row[0], ()),
                [name for name, held in marks.items() if row[0] in held],
            )
            for row in rows
        ]

    # --- Whether the index is of this queue ---

    def _sample_differs(self, memory: _Memory, seen: _Queue) -> bool:
        """Whether a sample, which is compared with the queue now and then, has changed: then all is read again."""
        if time.monotonic() < self._checked_at + CHECK_SEC:
            return False
        self._checked_at = time.monotonic()
        digests = {str(id): digest for id, digest in self._ask(current.shard_digests).items()}
        keys = [name for run, counts in seen.splits for name in self._differences(run, counts.split)]
        is_changed = bool(keys) or any(memory.shards.get(id, digest) != digest for id, digest in digests.items())
        if is_changed:
            self._store(memory, [], {"jobs_after": 0, "shards": digests})
        elif digests != memory.shards:
            self._store(memory, [], {"shards": digests})
        return is_changed

    def _differences(self, run: Run, split: str) -> list[str]:
        """The names of the keys in which captions of a sample differ from the queue's."""
        with self.reading() as conn:
            lists = self.lists(conn, run, split)
            sample = self._sample(conn, lists)
            known = self._known(conn, lists, sample)
        entries = {
            one.document.image_id: one for one in self._entries(self._ask(current.jobs_of_images, run, sample, _JOB))
        }
        return [
            name
            for name in KEYS
            for image in sample
            if known.get((name, image)) != (entries[image].keys.get(name) if image in entries else None)
        ]

    def _known(self, conn: Connection, lists: Mapping[str, int], images: Sequence[int]) -> dict[tuple[str, int], float]:
        """What these images are sorted by in these lists, by the names of the lists."""
        if not lists or not images:
            return {}
        names = {id: name for name, id in lists.items()}
        sql = (
            f"SELECT list, image_id, value FROM {self.documents.schema}keys "
            f"WHERE list IN ({db.marks(names)}) AND image_id IN ({db.marks(images)})"
        )
        return {(names[row[0]], row[1]): row[2] for row in execute(conn, sql, (*names, *images)).fetchall()}

    def _sample(self, conn: Connection, lists: Mapping[str, int]) -> list[int]:
        keys, time_list = f"{self.documents.schema}keys", lists.get(TIME)
        if time_list is None:
            return []
        latest = f"SELECT image_id FROM {keys} WHERE list = ? ORDER BY value DESC, image_id DESC LIMIT ?"
        chosen = {row[0] for row in execute(conn, latest, (time_list, SAMPLE)).fetchall()}
        ends = f"SELECT min(image_id), max(image_id) FROM {keys} WHERE list = ?"
        first, last = execute(conn, ends, (time_list,)).one()
        at = f"SELECT image_id FROM {keys} WHERE list = ? AND image_id >= ? ORDER BY image_id LIMIT 1"
        for _ in range(SAMPLE if chosen else 0):
            chosen.add(execute(conn, at, (time_list, random.randint(first, last))).scalar_one())
        return sorted(chosen)

    # --- The index's own tables ---

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with self._explaining(), transaction(self._database, write=True, patience=PATIENCE_SEC) as conn:
            yield conn

    def _remembered(self) -> tuple[_Memory | None, Counted]:
        """What the index knows; None if there is no index of this format."""
        if self._file is not None and not self._file.exists():
            return None, {}
        try:
            with self.reading() as conn:
                return self._memory(conn), self._counts(conn)
        except SearchUnavailable as error:
            if self._is_torn or str(error) != _BEING_MADE:
                raise
            return None, {}

    def _memory(self, conn: Connection, lock: str = "") -> _Memory | None:
        row = execute(conn, f"SELECT format, memory FROM {self.documents.schema}state s{lock}").one_or_none()
        if row is None:  # in PostgreSQL, if another process has made the tables since this transaction began
            raise _Overtaken
        return _Memory(**json.loads(row[1])) if row[0] == FORMAT else None

    def _counts(self, conn: Connection) -> Counted:
        counted: Counted = {}
        sql = f"SELECT run_id, split, state, n FROM {self.documents.schema}counts"
        for run_id, split, state, n in execute(conn, sql).fetchall():
            counted.setdefault((run_id, split), Counter())[state] = n
        return counted

    def _begin_anew(self, known: _Memory | None, seen: _Queue) -> _Memory:
        """Makes empty tables, unless another process has changed what this one knows."""
        with transaction(self._queue) as conn:
            since = db.now(conn)
            memory = _Memory(
                failures_after=current.newest_failure(conn),
                due_after={_key(run, c.split): [since, 0] for run, c in seen.splits},
                segments_after={
                    _key(run, c.split): [current.last_segment(conn, run, c.split), 0] for run, c in seen.splits
                },
                runs={str(one.run.id): one.created_at for one in seen.seen},
                shards={str(id): digest for id, digest in current.shard_digests(conn).items()},
            )
        with self._writing() as conn:
            if known is not None and self._memory(conn) != known:
                raise _Overtaken
            self._make_tables(conn)
            values = (FORMAT, json.dumps(asdict(memory)))
            execute(conn, f"INSERT INTO {self.documents.schema}state (format, memory) VALUES (?, ?)", values)
        self._opened = _identity(self._file)
        return memory

    def _make_tables(self, conn: Connection) -> None:
        schema, is_sqlite = self.documents.schema, conn.dialect.name == "sqlite"
        for name in ("state", "counts", "lists", "keys"):
            execute(conn, f"DROP TABLE IF EXISTS {schema}{name}")
        self.documents.drop(conn)
        self.documents.create(conn)
        id = "INTEGER PRIMARY KEY" if is_sqlite else "bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY"
        without = " WITHOUT ROWID" if is_sqlite else ""
        for statement in (
            "{}state (format text NOT NULL, memory text NOT NULL)",
            "{}counts (run_id bigint, split text, state text, n bigint NOT NULL, first_image bigint NOT NULL, "
            "PRIMARY KEY (run_id, split, state))",
            f"{{}}lists (id {id}, run_id bigint, split text, name text, UNIQUE (run_id, split, name))",
            "{}keys (list bigint, value double precision, image_id bigint, PRIMARY KEY (list, value, image_id))"
            f"{without}",
        ):
            execute(conn, "CREATE TABLE " + statement.format(schema))
        # A sequence of its own would make the primary key's order no longer that of the list.
        execute(conn, f"CREATE UNIQUE INDEX {'' if schema else 'ix_'}keys_of_images ON {schema}keys (list, image_id)")

    def _store(self, memory: _Memory, rows: Rows, changes: Mapping[str, Any]) -> tuple[_Memory, Counted]:
        """Writes a page of jobs and what is known afterwards. Raises _Overtaken if another process has written."""
        entries = self._entries(rows) if rows else []
        changed = memory.with_(**changes)
        lock = "" if self._database.dialect.name == "sqlite" else " FOR UPDATE"
        with self._writing() as conn:
            if self._memory(conn, lock) != memory:
                raise _Overtaken
            if entries:
                self._put(conn, entries)
            execute(conn, f"UPDATE {self.documents.schema}state SET memory = ?", (json.dumps(asdict(changed)),))
            counted = self._counts(conn)
        return changed, counted

    def _put(self, conn: Connection, entries: Sequence[_Entry]) -> None:
        documents = [entry.document for entry in entries]
        before = self.documents.states(conn, [(one.image_id, one.run_id) for one in documents])
        self._count(conn, entries, before)
        self.documents.put(conn, documents)
        keys = f"{self.documents.schema}keys"
        lists = self._lists_of(conn, entries)
        values, absent = [], []
        for entry in entries:
            image, run_id = entry.document.image_id, entry.document.run_id
            ids = lists[run_id, entry.split]
            values += [(ids[name], value, image) for name, value in entry.keys.items()]
            if before.get((image, run_id)) == "done":
                absent += [(id, image) for name, id in ids.items() if name not in entry.keys]
        if absent:
            execute(conn, f"DELETE FROM {keys} WHERE list = ? AND image_id = ?", absent)
        if values:
            sql = (
                f"INSERT INTO {keys} (list, value, image_id) VALUES (?, ?, ?) "
                "ON CONFLICT (list, image_id) DO UPDATE SET value = excluded.value"
            )
            execute(conn, sql, values)

    def _count(self, conn: Connection, entries: Sequence[_Entry], before: Mapping[Key, str]) -> None:
        changes: dict[tuple[int, str, str], int] = Counter()
        firsts: dict[tuple[int, str, str], int] = {}
        for entry in entries:
            one = entry.document
            key = (one.run_id, entry.split, one.state)
            changes[key] += 1
            firsts[key] = min(one.image_id, firsts.get(key, one.image_id))
            if old := before.get((one.image_id, one.run_id)):
                changes[one.run_id, entry.split, old] -= 1
        sql = (
            f"INSERT INTO {self.documents.schema}counts AS c (run_id, split, state, n, first_image) "
            "VALUES (?, ?, ?, ?, ?) ON CONFLICT (run_id, split, state) DO UPDATE SET n = c.n + excluded.n, "
            "first_image = CASE WHEN excluded.first_image < c.first_image THEN excluded.first_image "
            "ELSE c.first_image END"
        )
        far = max(entry.document.image_id for entry in entries)
        execute(conn, sql, [(*key, n, firsts.get(key, far)) for key, n in sorted(changes.items())])

    def _lists_of(self, conn: Connection, entries: Sequence[_Entry]) -> dict[tuple[int, str], dict[str, int]]:
        wanted = sorted({(e.document.run_id, e.split, name) for e in entries for name in e.keys})
        lists: dict[tuple[int, str], dict[str, int]] = {(e.document.run_id, e.split): {} for e in entries}
        schema = self.documents.schema
        if wanted:
            sql = f"INSERT INTO {schema}lists (run_id, split, name) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
            execute(conn, sql, wanted)
        for run_id, split, name, id in execute(conn, f"SELECT run_id, split, name, id FROM {schema}lists").fetchall():
            lists.setdefault((run_id, split), {})[name] = id
        return lists

    def _reopen_if_replaced(self) -> None:
        """Notices a file that was removed or replaced, and removes a damaged one."""
        if self._file is None:
            return
        found = _identity(self._file)
        if self._is_torn and found == self._opened:
            self._database.dispose()
            for ending in ("", "-journal", "-wal", "-shm"):
                Path(f"{self._file}{ending}").unlink(missing_ok=True)
            found = None
        if found != self._opened:
            self._database.dispose()
        self._is_torn, self._opened = False, found


_BEING_MADE: Final = "The search index is being made: search again in a moment."
_NOT_ALLOWED: Final = "42501"
_ALL: Final = 1 << 62


def _set_cache(connection: sqlite3.Connection, _record: object) -> None:
    connection.execute(f"PRAGMA cache_size = -{_CACHE_KB}")


def _identity(file: Path | None) -> tuple[int, int] | None:
    try:
        stat = os.stat(file) if file is not None else None
    except OSError:
        return None
    return stat and (stat.st_dev, stat.st_ino)


def _key(run: Run, split: str) -> str:
    return f"{run.id} {split}"


def _lacks(counted: Counted, run: Run, counts: Counts) -> bool:
    known = counted.get((run.id, counts.split), Counter())
    return known["done"] < counts.done or known.total() < counts.total


def _is_of_another_past(memory: _Memory, seen: _Queue, counted: Counted) -> bool:
    """Whether the index knows of runs or captions that this queue does not have."""
    created = {str(one.run.id): one.created_at for one in seen.seen}
    gone = {str(id) for id in seen.deleted}
    if any(created.get(id) != at for id, at in memory.runs.items() if id not in gone):
        return True
    tallies = {(run.id, counts.split): counts for run, counts in seen.splits}
    for key, known in counted.items():
        if str(key[0]) in gone:
            continue
        if key not in tallies or known["done"] > tallies[key].done or known.total() > tallies[key].total:
            return True
    return False


def _entry(row: Sequence[Any], code: str, scores: Sequence[str], marks: Sequence[str]) -> _Entry:
    _, run_id, image_id, split, status, original, cui, text, flags, generated_at = row
    state = status if status in ("done", "failed") else "open"
    cuis = concepts.parse(cui)
    facets = [
        facet("run", run_id),
        facet("split", split),
        facet("state", state),
        facet("modality", concepts.modality(cuis)),
        *(facet("concept", cui) for cui in sorted(cuis)),
        *(facet("flag", flag) for flag in (flags or "").split(",") if flag),
        *(facet(mark, "") for mark in marks),
    ]
    if code:
        facets.append(facet("code", code))
    keys: dict[str, float] = {}
    if text is not None:
        values = {name: value for one in scores for name, value in json.loads(one).items()}
        keys = {LENGTH: float(len(text)), TIME: float(generated_at)}
        keys |= {name: float(values[name]) for name in SCORES if values.get(name) is not None}
    return _Entry(Document(image_id, run_id, state, original, text or "", tuple(facets)), split, keys)
