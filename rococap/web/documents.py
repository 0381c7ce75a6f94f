"""The texts that can be searched, one document for each job, in SQLite's FTS5 or in PostgreSQL.

A document has the picture's original caption, the run's caption if there is one, and facets: marks such as a modality,
by which it is filtered. All conditions of a search hold for one document. Both databases get the words of `web.words`,
so that both find the same. Knows no queue.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal, Protocol

from sqlalchemy import Connection

from rococap.db import execute
from rococap.web.words import Term, words_of

Statement = tuple[str, tuple[Any, ...]]
"""SQL with `?` placeholders, and their values."""
Key = tuple[int, int]
"""The ids of a picture and of a run in the queue's database."""
Where = Literal["any", "original", "caption"]

_LETTERS: Final = {"run": "r", "split": "s", "state": "t", "modality": "m", "concept": "c", "flag": "f", "code": "e"}
_MARK: Final = "k"
_PLAIN: Final = frozenset("0123456789abcdefghijklmnopqrstuvwxy")
RUN_BITS: Final = 20
"""FTS5 knows rows by one number: the picture's id, shifted by this, and the run's. So its order is that of pictures."""
_GAP: Final = 100
"""Positions between two texts of a document, so that no phrase begins in one and ends in the other."""


@lru_cache(maxsize=65_536)
def facet(kind: str, value: object) -> str:
    """One word for a kind and a value of it, in ASCII letters and digits. Different ones are different words."""
    plain = (
        char if char.isascii() and char.isalnum() and char != "z" else f"z{ord(char):x}z" for char in str(value).lower()
    )
    return _LETTERS.get(kind, f"{_MARK}{kind}") + "x" + "".join(plain)


@dataclass(frozen=True, slots=True)
class Document:
    """The texts and facets of one job. `state` is done, failed or open."""

    image_id: int
    run_id: int
    state: str
    original: str
    caption: str
    facets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Conditions on a document: it belongs to the split and to one of the runs, has all `facets` and none of `without`,
    and contains every term in the texts that `where` names. `first_image` is a lower bound of the pictures' ids, which
    saves time.
    """

    split: str
    run_ids: tuple[int, ...]
    facets: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    terms: tuple[Term, ...] = ()
    where: Where = "any"
    first_image: int = 0


class Documents(Protocol):
    """How one kind of database keeps documents. `schema` goes before the name of a table."""

    schema: str

    def create(self, conn: Connection) -> None: ...
    def drop(self, conn: Connection) -> None: ...
    def states(self, conn: Connection, keys: Sequence[Key]) -> Mapping[Key, str]: ...
    def put(self, conn: Connection, documents: Sequence[Document]) -> None: ...

    def images(
        self, wanted: Wanted, after: int | None, limit: int, *, backwards: bool = False, also: Statement = ("", ())
    ) -> Statement:
        """Selects the picture of each such document, in order, beyond the picture `after`. `also` is a condition that
        goes after an AND, with `{image}` for the picture's id.
        """
        ...

    def holds(self, wanted: Wanted, image_id: str) -> Statement:
        """The condition that the picture whose id is this SQL expression, and which is of the split, has such a
        document.
        """
        ...


class Fts5:
    """Documents in a file of SQLite's own."""

    schema = ""

    def create(self, conn: Connection) -> None:
        execute(
            conn,
            "CREATE VIRTUAL TABLE documents USING fts5(original, caption, facets, state UNINDEXED, columnsize = 0, "
            "tokenize = 'unicode61')",
        )

    def drop(self, conn: Connection) -> None:
        execute(conn, "DROP TABLE IF EXISTS documents")

    def states(self, conn: Connection, keys: Sequence[Key]) -> Mapping[Key, str]:
        ids = [_row_id(*key) for key in keys]
        sql = f"SELECT rowid, state FROM documents WHERE rowid IN ({', '.join('?' * len(ids))})"
        rows = execute(conn, sql, tuple(ids)).fetchall()
        return {(row[0] >> RUN_BITS, row[0] & (1 << RUN_BITS) - 1): row[1] for row in rows}

    def put(self, conn: Connection, documents: Sequence[Document]) -> None:
        rows = [
            (
                _row_id(one.image_id, one.run_id),
                " ".join(words_of(one.original)),
                " ".join(words_of(one.caption)),
                " ".join(one.facets),
                one.state,
            )
            for one in documents
        ]
        sql = "INSERT OR REPLACE INTO documents (rowid, original, caption, facets, state) VALUES (?, ?, ?, ?, ?)"
        execute(conn, sql, rows)

    def images(
        self, wanted: Wanted, after: int | None, limit: int, *, backwards: bool = False, also: Statement = ("", ())
    ) -> Statement:
        match = _match(wanted, _of_runs(wanted), facet("split", wanted.split))
        lowest, highest = _row_id(wanted.first_image, 0), (1 << 63) - 1
        if after is not None and backwards:
            highest = _row_id(after, 0) - 1
        elif after is not None:
            lowest = max(lowest, _row_id(after + 1, 0))
        image = f"(documents.rowid >> {RUN_BITS})"
        sql = (
            f"SELECT {image} FROM documents WHERE documents MATCH ? AND rowid BETWEEN ? AND ? "
            f"{also[0].format(image=image)} ORDER BY rowid {'DESC' if backwards else 'ASC'} LIMIT ?"
        )
        return sql, (match, lowest, highest, *also[1], limit)

    def holds(self, wanted: Wanted, image_id: str) -> Statement:
        first = f"({image_id} << {RUN_BITS})"
        if len(wanted.run_ids) == 1 and (wanted.facets or wanted.terms):  # a word less to look up for each picture
            rows, match = f"= {first} + {wanted.run_ids[0]}", _match(wanted)
        else:
            rows, match = f"BETWEEN {first} AND {first} + {(1 << RUN_BITS) - 1}", _match(wanted, _of_runs(wanted))
        return f"EXISTS (SELECT 1 FROM documents WHERE documents MATCH ? AND rowid {rows})", (match,)


def _row_id(image_id: int, run_id: int) -> int:
    return image_id << RUN_BITS | run_id


def _of_runs(wanted: Wanted) -> str:
    return " OR ".join(facet("run", run_id) for run_id in wanted.run_ids)


def _match(wanted: Wanted, *more_facets: str) -> str:
    """The conditions in FTS5's language, with these facets. Words and facets consist of letters and digits."""
    columns = {"any": "{original caption}", "original": "original", "caption": "caption"}[wanted.where]
    parts = [f"facets : ({one})" for one in (*more_facets, *wanted.facets)]
    parts += [f'{columns} : ("{" ".join(term.words)}" {"*" if term.prefix else ""})' for term in wanted.terms]
    match = " AND ".join(parts)
    without = " OR ".join(wanted.without)
    return f"({match}) NOT (facets : ({without}))" if without else match


class TextSearch:
    """Documents in a schema of PostgreSQL beside the queue's."""

    def __init__(self, schema: str) -> None:
        self._name = schema
        self.schema = f"{schema}."

    def create(self, conn: Connection) -> None:
        execute(conn, f"CREATE SCHEMA IF NOT EXISTS {self._name}")
        execute(
            conn,
            f"CREATE TABLE {self.schema}documents (image_id bigint, run_id bigint, state text NOT NULL, "
            "facets text[] NOT NULL, words tsvector NOT NULL, PRIMARY KEY (image_id, run_id))",
        )
        execute(conn, f"CREATE INDEX ON {self.schema}documents USING gin (words, facets)")

    def drop(self, conn: Connection) -> None:
        execute(conn, f"DROP TABLE IF EXISTS {self.schema}documents")

    def states(self, conn: Connection, keys: Sequence[Key]) -> Mapping[Key, str]:
        images, runs = [key[0] for key in keys], [key[1] for key in keys]
        sql = (
            f"SELECT image_id, run_id, state FROM {self.schema}documents WHERE (image_id, run_id) IN "
            "(SELECT * FROM unnest(CAST(? AS bigint[]), CAST(? AS bigint[])))"
        )
        return {(row[0], row[1]): row[2] for row in execute(conn, sql, (images, runs)).fetchall()}

    def put(self, conn: Connection, documents: Sequence[Document]) -> None:
        rows = [
            (one.image_id, one.run_id, one.state, list(one.facets), _vector(one.original, one.caption))
            for one in documents
        ]
        sql = (
            f"INSERT INTO {self.schema}documents (image_id, run_id, state, facets, words) "
            "VALUES (?, ?, ?, ?, CAST(? AS tsvector)) ON CONFLICT (image_id, run_id) DO UPDATE SET "
            "state = excluded.state, facets = excluded.facets, words = excluded.words"
        )
        execute(conn, sql, rows)

    def images(
        self, wanted: Wanted, after: int | None, limit: int, *, backwards: bool = False, also: Statement = ("", ())
    ) -> Statement:
        where, values = self._where(wanted, facet("split", wanted.split))
        if after is not None:
            where += f" AND image_id {'<' if backwards else '>'} ?"
            values = (*values, after)
        sql = (
            f"SELECT d.image_id FROM {self.schema}documents d WHERE {where} {also[0].format(image='d.image_id')} "
            f"ORDER BY d.image_id {'DESC' if backwards else 'ASC'} LIMIT ?"
        )
        return sql, (*values, *also[1], limit)

    def holds(self, wanted: Wanted, image_id: str) -> Statement:
        where, values = self._where(wanted)
        return f"EXISTS (SELECT 1 FROM {self.schema}documents WHERE image_id = {image_id} AND {where})", values

    def _where(self, wanted: Wanted, *more_facets: str) -> Statement:
        parts = ["run_id = ANY (?) AND image_id >= ? AND facets @> CAST(? AS text[])"]
        values: list[Any] = [list(wanted.run_ids), wanted.first_image, [*more_facets, *wanted.facets]]
        if wanted.without:
            parts.append("NOT facets && CAST(? AS text[])")
            values.append(list(wanted.without))
        if wanted.terms:
            parts.append("words @@ CAST(? AS tsquery)")
            values.append(_query(wanted.terms, wanted.where))
        return " AND ".join(parts), tuple(values)


def _vector(original: str, caption: str) -> str:
    """The words with their positions, as the text of a tsvector: those of the original weigh A, of the caption B."""
    originals = words_of(original)
    places: dict[str, list[str]] = {}
    for weight, start, words in (("A", 1, originals), ("B", len(originals) + _GAP, words_of(caption))):
        for at, word in enumerate(words, start):
            places.setdefault(word, []).append(f"{at}{weight}")
    return " ".join(f"'{word}':{','.join(at)}" for word, at in places.items())


def _query(terms: Sequence[Term], where: Where) -> str:
    weight = {"any": "", "original": "A", "caption": "B"}[where]
    phrases = []
    for term in terms:
        marks = [weight] * (len(term.words) - 1) + [weight + ("*" if term.prefix else "")]
        words = [f"'{word}'" + (f":{mark}" if mark else "") for word, mark in zip(term.words, marks, strict=True)]
        phrases.append(f"({' <-> '.join(words)})")
    return " & ".join(phrases)
