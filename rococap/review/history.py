"""What has become of a caption, and how much was reviewed. Writes nothing."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection

from rococap.db import execute
from rococap.queue import Run
from rococap.results.texts import EDITED
from rococap.review.records import EDIT, REVIEW, VERDICTS, Edit, Review, review_of


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption: the original, what the machine wrote, and the edit that made its current text, if any."""

    job_id: int
    image_id: str
    split: str
    original: str
    machine: str
    edit: Edit | None

    @property
    def text(self) -> str:
        """The current text."""
        return self.machine if self.edit is None else self.edit.text


def caption_of(conn: Connection, run: Run, split: str, image_id: str) -> Caption | None:
    """The caption of a picture; None if the run has not captioned it."""
    sql = (
        f"SELECT j.id, i.image_id, i.split, i.caption, c.text, {EDIT} FROM images i "
        "JOIN jobs j ON j.image_id = i.id AND j.run_id = ? JOIN captions c ON c.job_id = j.id "
        f"{EDITED}WHERE i.dataset_id = ? AND i.split = ? AND i.image_id = ?"
    )
    row = execute(conn, sql, (run.id, 2**63 - 1, run.dataset_id, split, image_id)).one_or_none()
    if row is None:
        return None
    job_id, image_id, split, original, machine, *edit = row
    return Caption(job_id, image_id, split, original, machine, None if edit[0] is None else Edit(*edit))


def history(conn: Connection, job_id: int) -> list[Edit | Review]:
    """The edits of a caption and the verdicts on it, oldest first."""
    edits = execute(conn, f"SELECT {EDIT} FROM edits e WHERE e.job_id = ?", (job_id,)).fetchall()
    reviews = execute(conn, f"SELECT {REVIEW} FROM reviews v WHERE v.job_id = ?", (job_id,)).fetchall()
    both: list[Edit | Review] = [*(Edit(*row) for row in edits), *map(review_of, reviews)]
    return sorted(both, key=lambda one: (one.at, one.uuid))


@dataclass(frozen=True, slots=True)
class Reviewed:
    """What one reader did in one run and split: how many pictures their latest verdict is of each kind, and how many
    edits they made.
    """

    run: str
    split: str
    reader: str
    verdicts: Mapping[str, int]
    edits: int


def counts(conn: Connection, run: Run | None = None) -> list[Reviewed]:
    """What each reader did, in order of run, split and reader; of one run, or of all."""
    where, params = ("AND r.id = ? ", (run.id,)) if run else ("", ())
    by_reader = "SELECT r.id, r.name, j.split, {0}.reader{1} FROM {2} {0} JOIN jobs j ON j.id = {0}.job_id "
    by_reader += "JOIN runs r ON r.id = j.run_id WHERE r.deleted_at IS NULL " + where
    later = "w.job_id = v.job_id AND w.reader = v.reader AND (w.at, w.uuid) > (v.at, v.uuid)"
    judged = by_reader.format("v", ", v.verdict, count(*)", "reviews")
    judged += f"AND NOT EXISTS (SELECT 1 FROM reviews w WHERE {later}) GROUP BY 1, 2, 3, 4, 5"
    edited = by_reader.format("e", ", count(*)", "edits") + "GROUP BY 1, 2, 3, 4"
    verdicts: dict[tuple[int, str, str, str], Counter[str]] = {}
    for id, name, split, reader, verdict, n in execute(conn, judged, params).fetchall():
        verdicts.setdefault((id, name, split, reader), Counter())[verdict] = n
    edits = {(row[0], row[1], row[2], row[3]): row[4] for row in execute(conn, edited, params).fetchall()}
    found = []
    for key in sorted(verdicts.keys() | edits.keys()):
        of_each = {verdict: verdicts.get(key, Counter())[verdict] for verdict in VERDICTS}
        _, name, split, reader = key
        found.append(Reviewed(name, split, reader, of_each, edits.get(key, 0)))
    return found
