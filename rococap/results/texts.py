"""Which texts of captions are meant: those that the machine wrote, or these with the edits of readers.

The machine's texts are in `captions` and never change. Each edit is a row of `edits`, and the latest one of a caption
is its current text.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from sqlalchemy import Connection

from rococap.db import execute

Kind = Literal["machine", "edited", "reviewed"]


def latest(table: Literal["edits", "reviews"]) -> str:
    """A subquery for the id of the latest edit or review of the job `j`. Its parameter is the highest id to look at.

    By time and not by id, so that imported rows take their place in the history.
    """
    return f"(SELECT x.id FROM {table} x WHERE x.job_id = j.id AND x.id <= ? ORDER BY x.at DESC, x.uuid DESC LIMIT 1)"


EDITED = f"LEFT JOIN edits e ON e.id = {latest('edits')} "
CURRENT = "COALESCE(e.text, c.text)"
"""The current text of a caption, where EDITED is joined."""
_REVIEWED = f"JOIN reviews v ON v.id = {latest('reviews')} "
_EVERYTHING = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Texts:
    """Which texts of the captions to read: the machine's; with edits applied; or these, of pictures with a verdict.

    Edits and reviews with an id above `last_edit` and `last_review` came later and are ignored.
    """

    kind: Kind = "machine"
    last_edit: int = _EVERYTHING
    last_review: int = _EVERYTHING

    @property
    def joins(self) -> str:
        """The tables `e` (the latest edit, or NULL) and `v` (the latest review), as far as this kind has them."""
        return {"machine": "", "edited": EDITED, "reviewed": EDITED + _REVIEWED}[self.kind]

    @property
    def params(self) -> tuple[int, ...]:
        """The parameters of `joins`."""
        of_kind = {"machine": 0, "edited": 1, "reviewed": 2}[self.kind]
        return (self.last_edit, self.last_review)[:of_kind]

    @property
    def people(self) -> dict[str, str]:
        """Who edited and judged a caption, and when: the name of each column -> its SQL."""
        edited = {"edited_by": "e.reader", "edited_at": "e.at"}
        reviewed = {"reviewed_by": "v.reader", "reviewed_at": "v.at", "verdict": "v.verdict", "errors": "v.errors"}
        return {"machine": {}, "edited": edited, "reviewed": edited | reviewed}[self.kind]

    def select(self, columns: str) -> str:
        """The columns, with c.text as these texts. What the machine's flags say is not true of an edited text."""
        if self.kind == "machine":
            return columns
        flags = "CASE WHEN e.id IS NULL THEN c.flags ELSE '' END"
        return columns.replace("c.text", CURRENT).replace("c.flags", flags)

    def in_manifest(self) -> dict[str, str]:
        """The manifest entries that say which texts a file holds; empty for the machine's."""
        if self.kind == "machine":
            return {}
        judged = ", each with a reader's verdict" if self.kind == "reviewed" else ""
        note = f"Machine-generated captions with the edits of readers{judged}. Not for clinical use."
        return {"captions": self.kind, "note": note}


MACHINE = Texts()


def texts_now(conn: Connection, kind: Kind) -> Texts:
    """The texts of this kind as they are now: later edits and reviews do not change them."""
    if kind == "machine":
        return MACHINE
    tables = ("edits", "reviews")
    return Texts(kind, *(execute(conn, f"SELECT COALESCE(max(id), 0) FROM {one}").scalar_one() for one in tables))


def people_of(names: Collection[str], row: Sequence[Any]) -> dict[str, str | None]:
    """The columns `names` of `Texts.people`, which are the last of the row; times are ISO 8601."""
    cells = zip(names, row[len(row) - len(names) :], strict=True)
    return {name: iso(cell) if name.endswith("_at") and cell is not None else cell for name, cell in cells}


def iso(at: int) -> str:
    """A time in ms since 1970 as ISO 8601, in UTC."""
    time = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=at)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
