"""Which caption is kept of a picture that was captioned twice in one run, in databases or files that are combined.

Captions are compared by what they are and not by where they are found, so that the same one is kept in whatever order
databases are combined.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection

from rococap import queue
from rococap.db import execute, marks
from rococap.queue import Run


@dataclass(frozen=True, slots=True, order=True)
class Made:
    """How a caption was made. Of two captions of a picture, the smaller one is kept: the one that people have judged,
    edited or read in a study; else the one made first; of one caption, the copy that knows its lease.

    `lease` is the uuid of its worker and its id in the database where it was made.
    """

    is_unused: bool
    generated_at: int
    text: str
    is_restored: bool = True
    lease: tuple[str, int] = ("", 0)

    @property
    def provenance(self) -> tuple[bool, tuple[str, int]]:
        """By this, the smaller of two copies of one caption is kept."""
        return self.is_restored, self.lease

    def is_same(self, other: "Made") -> bool:
        """Whether the two are copies of one caption."""
        return (self.generated_at, self.text) == (other.generated_at, other.text)


_USED = " OR ".join(
    f"EXISTS (SELECT 1 FROM {table} x WHERE x.job_id = c.job_id)" for table in ("reviews", "edits", "study_items")
)
_MADE = (
    f"SELECT c.job_id, CASE WHEN {_USED} THEN 0 ELSE 1 END, c.generated_at, c.text, c.lease_id, "
    "COALESCE(l.origin_uuid, w.uuid, ''), COALESCE(l.origin_id, l.id, 0) "
    "FROM captions c LEFT JOIN leases l ON l.id = c.lease_id LEFT JOIN workers w ON w.id = l.worker_id "
    "WHERE c.job_id IN ({})"
)


def made(conn: Connection, job_ids: Sequence[int]) -> dict[int, Made]:
    """How the captions of those of these jobs were made that have one."""
    rows = execute(conn, _MADE.format(marks(job_ids)), tuple(job_ids)).fetchall() if job_ids else []
    return {
        job_id: Made(bool(unused), at, text, lease_id is None, (uuid, id))
        for job_id, unused, at, text, lease_id, uuid, id in rows
    }


def remove(conn: Connection, run: Run, split: str, job_ids: Sequence[int]) -> None:
    """Removes captions, with their scores, so that others can be stored. Their jobs stay done."""
    if not job_ids:
        return
    within = f"WHERE job_id IN ({marks(job_ids)})"
    flags = execute(conn, f"SELECT flags FROM captions {within}", tuple(job_ids)).fetchall()
    for table in ("scores", "captions"):
        execute(conn, f"DELETE FROM {table} {within}", tuple(job_ids))
    queue.tally(conn, run.id, split, 0, {flag: -n for flag, n in queue.flag_counts(row[0] for row in flags).items()})
