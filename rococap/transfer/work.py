"""What workers did in another database: workers, leases, jobs, their captions, failures and scores; and what people
said of the captions.

Of each job, the state that is nearer to its end counts: done, failed, unfinished, cancelled. Pictures that a worker
here holds are left to it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from rococap import db, queue
from rococap.db import execute, transaction
from rococap.errors import RococapError
from rococap.figures import counted
from rococap.progress import Progress
from rococap.queue import Run
from rococap.results import checkpoints, doubles
from rococap.results.doubles import Made
from rococap.tables import JobState
from rococap.transfer.catalogue import Catalogue, image_ids
from rococap.transfer.rows import Row, add_to_log, insert, insert_one, of_jobs, pages, select, translated

Identity = tuple[str, int]
"""Of a lease in every database: the uuid of its worker, and its id where it was made."""


@dataclass(slots=True)
class Merged:
    """What became of the pictures of one database, export or checkpoint.

    `pictures` were not in their run here. `merged` have a caption now that had none here, and `failed` have failed;
    `known` had the same caption already. `twice` had another caption here, and one of the two was kept. `leased` are
    being captioned by a worker here. `unknown` are not among the pictures here, or have another original caption, and
    were left out. `reviews` and `edits` are new here, and so are the rows of `studies`; `studies_left` are the names of
    studies with pictures that are leased. `parts` are those that the other database has, such as `default train 1/4`.
    `has_manifest` is false of an export without its manifest, whose recipe cannot be compared.
    """

    source: str
    pictures: int = 0
    merged: int = 0
    failed: int = 0
    known: int = 0
    twice: int = 0
    leased: int = 0
    unknown: int = 0
    reviews: int = 0
    edits: int = 0
    studies: int = 0
    studies_left: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    has_manifest: bool = True
    is_new: bool = False
    """Whether it had anything that was not here."""


# --- Workers and leases ----------------------------------------------------------------------------------------


def merge_workers(read: Connection, conn: Connection) -> dict[int, int]:
    """Adds workers, or what they reported last; returns their ids here by their ids there."""
    ids = {}
    ours = {row["uuid"]: row for row in select(conn, "workers")}
    for theirs in select(read, "workers", "1 = 1 ORDER BY x.id"):
        known, new = ours.get(theirs["uuid"]), translated("workers", theirs, {})
        if known is None:
            ids[theirs["id"]] = insert_one(conn, "workers", new)
            continue
        ids[theirs["id"]] = known["id"]
        if _reported(theirs) > _reported(known):
            columns = ", ".join(f"{name} = ?" for name in new)
            execute(conn, f"UPDATE workers SET {columns} WHERE id = ?", (*new.values(), known["id"]))
    return ids


def _reported(worker: Row) -> tuple[int, int, int]:
    return worker["seen_at"], worker["n_done"], worker["stopped_at"] or 0


_IDENTITIES = (
    "SELECT l.id, COALESCE(l.origin_uuid, w.uuid), COALESCE(l.origin_id, l.id) "
    "FROM leases l JOIN workers w ON w.id = l.worker_id WHERE l.id IN ({})"
)
_IMPORTED = "SELECT origin_id, id FROM leases WHERE origin_uuid = ? AND origin_id IN ({})"
_OUR_OWN = (
    "SELECT l.id, l.id FROM leases l JOIN workers w ON w.id = l.worker_id "
    "WHERE w.uuid = ? AND l.id IN ({}) AND l.origin_id IS NULL"
)


def _identities(read: Connection, ids: Sequence[int]) -> dict[int, Identity]:
    rows = execute(read, _IDENTITIES.format(db.marks(ids)), tuple(ids)).fetchall() if ids else []
    return {row[0]: (row[1], row[2]) for row in rows}


def _lease_ids(conn: Connection, identities: Mapping[int, Identity]) -> dict[int, int]:
    """The ids of leases here by their ids there, of those that are here."""
    by_worker: dict[str, dict[int, int]] = {}
    for theirs, (uuid, id) in identities.items():
        by_worker.setdefault(uuid, {})[id] = theirs
    found: dict[int, int] = {}
    for uuid, ids in by_worker.items():
        for sql in (_IMPORTED, _OUR_OWN):
            rows = execute(conn, sql.format(db.marks(list(ids))), (uuid, *ids)).fetchall()
            found |= {ids[row[0]]: row[1] for row in rows}
    return found


def merge_leases(
    read: Connection, database: Database, catalogue: Catalogue, workers: Mapping[int, int], progress: Progress
) -> int:
    """Adds the leases of runs that were not deleted; returns how many."""
    total = execute(read, "SELECT count(*) FROM leases").scalar_one()
    ids = {"workers": workers, "runs": {theirs: ours.id for theirs, ours in catalogue.runs.items()}}
    added = done = 0
    for page in pages(read, "leases"):
        leases = [lease for lease in page if lease["run_id"] in catalogue.runs]
        identities = _identities(read, [lease["id"] for lease in leases])
        with transaction(database, write=True) as conn:
            db.take_turns(conn)
            here = _lease_ids(conn, identities)
            new = []
            for lease in leases:
                origin = dict(zip(("origin_uuid", "origin_id"), identities[lease["id"]], strict=True))
                if lease["id"] in here:
                    # The time that storing took follows with its worker's next heartbeat.
                    sql = "UPDATE leases SET store_ms = ? WHERE id = ? AND origin_id IS NOT NULL AND store_ms < ?"
                    execute(conn, sql, (lease["store_ms"], here[lease["id"]], lease["store_ms"]))
                else:
                    new.append(translated("leases", lease, ids, **origin))
            added += insert(conn, "leases", new)
        done += len(page)
        progress("leases", done, total)
    return added


# --- Jobs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Page:
    """Jobs of one run and split in the other database, with what belongs to them."""

    jobs: list[Row]
    pictures: dict[int, tuple[str, str]]
    """By image id: the picture's id in the data set, and its original caption."""
    made: dict[int, Made]
    of_table: dict[str, dict[int, list[Row]]]
    """By table and job, the rows of `OF_JOBS`."""
    leases: dict[int, Identity]
    undone: dict[int, str]
    """The uuids of edits by their ids."""


OF_JOBS = ("captions", "scores", "failures", "reviews", "edits")


def merge_jobs(read: Connection, database: Database, catalogue: Catalogue, result: Merged, progress: Progress) -> None:
    """Merges the jobs of all runs, in pages of one transaction each."""
    for theirs, ours in catalogue.runs.items():
        sql = "SELECT split, count(*) FROM jobs WHERE run_id = ? GROUP BY split ORDER BY split"
        for split, total in execute(read, sql, (theirs,)).fetchall():
            done = 0
            for page in _pages(read, theirs, split):
                with transaction(database, write=True) as conn:
                    db.take_turns(conn)
                    db.lock(conn, "runs", ours.id)
                    queue.refuse_deleted(conn, ours)
                    _Merge(conn, ours, split, page, result).jobs()
                done += len(page.jobs)
                progress(f"{ours.name} {split}: captions", done, total)


def _pages(read: Connection, run_id: int, split: str) -> Iterator[_Page]:
    # The unary plus keeps SQLite from using another index: the rows are needed in order of id.
    for jobs in pages(read, "jobs", "+x.run_id = ? AND x.split = ?", (run_id, split)):
        ids = [job["id"] for job in jobs]
        images = [job["image_id"] for job in jobs]
        sql = f"SELECT id, image_id, caption FROM images WHERE id IN ({db.marks(images)})"
        pictures = {row[0]: (row[1], row[2]) for row in execute(read, sql, tuple(images)).fetchall()}
        of_table = {table: of_jobs(read, table, ids) for table in OF_JOBS}
        rows = [row for table in ("captions", "failures") for found in of_table[table].values() for row in found]
        leases = _identities(read, sorted({row["lease_id"] for row in rows if row["lease_id"] is not None}))
        undoes = sorted({row["undoes"] for found in of_table["edits"].values() for row in found if row["undoes"]})
        undone = {row["id"]: row["uuid"] for row in select(read, "edits", f"x.id IN ({db.marks(undoes)})", undoes)}
        yield _Page(jobs, pictures, doubles.made(read, ids), of_table, leases, undone)


_RANKS = {JobState.CANCELLED: 1, JobState.FAILED: 3, JobState.DONE: 4}


def _rank(status: str | None) -> int:
    """How near a state is to the end; None is that of a job that has just been added."""
    return 0 if status is None else _RANKS.get(JobState(status), 2)


class _Merge:
    """One page of jobs, in a transaction that holds the lock of the run."""

    def __init__(self, conn: Connection, run: Run, split: str, page: _Page, result: Merged) -> None:
        self._conn, self._run, self._split, self._page, self._result = conn, run, split, page, result
        self._moved: Counter[str] = Counter()

    def jobs(self) -> None:
        ours = self._jobs_here()
        kept, replaced, flagged = self._captions(ours)
        failed = self._failures(ours)
        self._states(ours, replaced, flagged, failed)
        ids = {theirs: ours[theirs]["id"] for theirs in kept}
        self._scores(ids)
        self._people(ids)
        queue.tally(self._conn, self._run.id, self._split, 0, self._moved)

    def _jobs_here(self) -> dict[int, Row]:
        """The jobs here by those there, locked, and added if they are new: then their status is None.

        Those that a worker holds are left out, and so are those of pictures that are not here.
        """
        page, run = self._page, self._run
        images = {job["image_id"]: 0 for job in page.jobs}
        here = image_ids(self._conn, run.dataset_id, self._split, [page.pictures[image][0] for image in images])
        for image in list(images):
            name, original = page.pictures[image]
            images[image], caption = here.get(name, (0, ""))
            if not images[image] or caption != original:
                del images[image]
                self._result.unknown += 1
        if not images:
            return {}
        known = {job["image_id"] for job in self._locked(list(images.values()))}
        new = [{"run_id": run.id, "image_id": id, "split": self._split} for id in images.values() if id not in known]
        insert(self._conn, "jobs", new)
        self._moved[JobState.PENDING] += len(new)
        self._result.pictures += len(new)
        self._result.is_new |= bool(new)
        jobs = {
            job["image_id"]: job if job["image_id"] in known else job | {"status": None}
            for job in self._locked(list(images.values()))
        }
        found = {job["id"]: jobs[images[job["image_id"]]] for job in page.jobs if job["image_id"] in images}
        held = {theirs for theirs, job in found.items() if job["status"] == JobState.LEASED}
        self._result.leased += sum(theirs in page.made or theirs in page.of_table["failures"] for theirs in held)
        return {theirs: job for theirs, job in found.items() if theirs not in held}

    def _locked(self, images: Sequence[int]) -> list[Row]:
        where = f"x.run_id = ? AND x.image_id IN ({db.marks(images)}) ORDER BY x.id{db.for_update(self._conn, 'x')}"
        return select(self._conn, "jobs", where, (self._run.id, *images))

    def _captions(self, ours: Mapping[int, Row]) -> tuple[list[int], set[int], set[int]]:
        """The jobs there whose caption is the one here now; those whose caption has replaced another one; and those
        whose caption was here, and has other flags now.
        """
        here = doubles.made(self._conn, [job["id"] for job in ours.values() if job["status"] == JobState.DONE])
        new, same, replaced, better = [], [], set(), []
        for theirs, made in self._page.made.items():
            if theirs not in ours:
                continue
            known = here.get(ours[theirs]["id"])
            if known is None:
                new.append(theirs)
            elif made.is_same(known):
                same.append(theirs)
                if made.provenance < known.provenance:
                    better.append(theirs)
            else:
                self._result.twice += 1
                if not made.is_unused and not known.is_unused:
                    raise used_twice(self._result.source, [self._page.pictures[ours[theirs]["image_id"]][0]])
                if made < known:
                    replaced.add(theirs)
        doubles.remove(self._conn, self._run, self._split, [ours[theirs]["id"] for theirs in sorted(replaced)])
        leases, captions = _lease_ids(self._conn, self._page.leases), self._page.of_table["captions"]
        rows = {
            theirs: translated("captions", captions[theirs][0], {"leases": leases}, job_id=ours[theirs]["id"])
            for theirs in (*new, *replaced, *better)
        }
        insert(self._conn, "captions", [rows[theirs] for theirs in (*new, *replaced)])
        flagged = self._update_captions({theirs: rows[theirs] for theirs in better})
        self._moved.update(queue.flag_counts(row["flags"] for row in rows.values()))
        self._result.merged += len(new)
        self._result.known += len(same)
        self._result.is_new |= bool(rows)
        return [*new, *same, *replaced], replaced, flagged

    def _update_captions(self, rows: Mapping[int, Row]) -> set[int]:
        """Replaces captions by copies that know more of how they were made. Their scores stay. Returns the jobs there
        whose flags are new here.
        """
        ids = [row["job_id"] for row in rows.values()]
        sql = f"SELECT job_id, flags FROM captions WHERE job_id IN ({db.marks(ids)})"
        flags = {row[0]: row[1] for row in execute(self._conn, sql, tuple(ids)).fetchall()}
        self._moved.subtract(queue.flag_counts(flags.values()))
        for row in rows.values():
            columns = ", ".join(f"{name} = ?" for name in row)
            execute(self._conn, f"UPDATE captions SET {columns} WHERE job_id = ?", (*row.values(), row["job_id"]))
        return {theirs for theirs, row in rows.items() if row["flags"] != flags[row["job_id"]]}

    def _failures(self, ours: Mapping[int, Row]) -> set[int]:
        """Adds failures; returns the jobs there whose latest failure is new here."""
        leases, found = _lease_ids(self._conn, self._page.leases), {}
        for theirs, rows in self._page.of_table["failures"].items():
            if theirs in ours:
                ids = {"leases": leases, "jobs": {theirs: ours[theirs]["id"]}}
                found[theirs] = [translated("failures", row, ids) for row in rows]
        added = add_to_log(
            self._conn,
            "failures",
            "job_id",
            ("code", "message"),
            [row for rows in found.values() for row in rows],
        )
        self._result.is_new |= bool(added)
        return {theirs for theirs, rows in found.items() if rows[-1] in added}

    def _states(self, ours: Mapping[int, Row], replaced: Set[int], flagged: Set[int], failed: Set[int]) -> None:
        at = db.now(self._conn)
        states, counters = [], []
        for job in self._page.jobs:
            if (mine := ours.get(job["id"])) is None:
                continue
            status = self._state(job, mine, job["id"] in failed)
            is_done = status == JobState.DONE != mine["status"] or job["id"] in replaced
            is_tried = is_done or mine["status"] is None or job["id"] in failed
            # A job whose caption has changed finishes again, so that those who follow the queue notice.
            if status != (mine["status"] or JobState.PENDING) or job["id"] in replaced | flagged:
                states.append((status, None if status == JobState.PENDING else at, mine["id"]))
                self._moved[mine["status"] or JobState.PENDING] -= 1
                self._moved[status] += 1
            counted = ("crashes", "solo_crashes", "attempts") if is_tried else ("crashes", "solo_crashes")
            if new := {name: job[name] for name in counted if job[name] > mine[name]}:
                counters.append((*((mine | new)[name] for name in ("attempts", "crashes", "solo_crashes")), mine["id"]))
        self._result.failed += sum(status == JobState.FAILED for status, _, _ in states)
        self._result.is_new |= bool(states or counters)
        if states:
            sql = "UPDATE jobs SET status = ?, not_before = NULL, finished_at = ? WHERE id = ?"
            execute(self._conn, sql, states)
        changed = [ours[theirs]["id"] for theirs in replaced | flagged]
        checkpoints.renew(self._conn, self._run, self._split, changed)
        if counters:
            sql = "UPDATE jobs SET attempts = ?, crashes = ?, solo_crashes = ? WHERE id = ?"
            execute(self._conn, sql, counters)

    def _state(self, theirs: Row, mine: Row, has_failed: bool) -> str:
        """The state of a job after the merge. A failure that was here before does not count again: the picture may have
        been retried since.
        """
        status = str(theirs["status"])
        if _rank(status) <= _rank(mine["status"]):
            return str(mine["status"])
        if status == JobState.FAILED and not has_failed and mine["status"] is not None:
            return str(mine["status"])
        return status if status in _RANKS else JobState.PENDING

    def _scores(self, ids: Mapping[int, int]) -> None:
        found = self._page.of_table["scores"]
        rows = [translated("scores", row, {}, job_id=ids[job]) for job in ids for row in found.get(job, [])]
        later = "WHERE excluded.digest < scores.digest"  # any order will do, as long as it is the same everywhere
        conflict = (
            f"ON CONFLICT (job_id, metric) DO UPDATE SET digest = excluded.digest, value = excluded.value {later}"
        )
        self._result.is_new |= bool(insert(self._conn, "scores", rows, conflict))

    def _people(self, ids: Mapping[int, int]) -> None:
        found = self._page.of_table
        rows = [translated("reviews", row, {"jobs": ids}) for job in ids for row in found["reviews"].get(job, [])]
        reviews = insert(self._conn, "reviews", rows, "ON CONFLICT (uuid) DO NOTHING")
        theirs = [row for job in ids for row in found["edits"].get(job, [])]
        uuids = [row["uuid"] for row in theirs]
        known = {row["uuid"]: row["id"] for row in select(self._conn, "edits", f"x.uuid IN ({db.marks(uuids)})", uuids)}
        new = sorted((row for row in theirs if row["uuid"] not in known), key=lambda row: row["id"])
        for row in new:
            undoes = known[self._page.undone[row["undoes"]]] if row["undoes"] else None
            known[row["uuid"]] = insert_one(self._conn, "edits", translated("edits", row, {"jobs": ids}, undoes=undoes))
        self._result.reviews += reviews
        self._result.edits += len(new)
        self._result.is_new |= bool(reviews or new)


def used_twice(source: str, pictures: Sequence[str]) -> RococapError:
    """The error for captions that differ from those here, although people have worked on both."""
    shown = ", ".join(pictures[:3]) + (", …" if len(pictures) > 3 else "")
    return RococapError(
        f"{source} was not merged: its captions differ from those here for {counted(len(pictures), 'picture')} "
        f"({shown}), and people have judged, edited or studied both, which is kept for good. To take its captions "
        "without what people did, export them and merge the export: rococap --db URL export --split SPLIT"
    )
