"""Pages of pictures, with what any runs say about each: filtered, searched and sorted, each page as fast as the first.

The ids of a page come from the search index (`web.index`), its texts from the queue. Without an index, pictures can
still be looked at in the order of the data set.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from rococap import db, queue
from rococap.db import execute, transaction
from rococap.errors import RococapError
from rococap.queue import PLACE, History, Run, place_of
from rococap.results import current
from rococap.scores import concepts
from rococap.web.documents import Statement, Wanted, Where, facet
from rococap.web.index import KEYS, LENGTH, TIME, Index, SearchUnavailable
from rococap.web.pictures import Source, source_of
from rococap.web.words import Term, parse

BOUND: Final = 5_000
"""Totals are exact up to this, or twice as many if pictures are not in the data set's order. So many matches are sorted
in one go; where there are more, they are found along the order asked for.
"""
MAX_LIMIT: Final = 200
BEING_FILLED: Final = "The search index is being filled: searches and filters find what is in it already."
IMAGE: Final = "image"
SORTS: Final = (IMAGE, *KEYS)
"""What pictures can be sorted by: the order of the data set, or a key of the index."""


class QueryError(RococapError):
    """A gallery was asked for something that does not exist."""


@dataclass(frozen=True, slots=True)
class Query:
    """Which pictures of a split to show, and in which order.

    A picture is shown if one of the runs has a job for it that fulfils all conditions: `words` (see `words.parse`) in
    the texts that `where` names, `modality` by its name, `concept` by its CUI, `flag`, failure `code`, `failed`, and
    `marks` by name (`reviewed`: True or False). `least` and `most` bound the score `score` of the first run. `sort` is
    one of SORTS, `descending` its direction; a key is that of the first run, and pictures without it are left out.
    """

    split: str
    words: str = ""
    where: Where = "any"
    modality: str = ""
    concept: str = ""
    flag: str = ""
    code: str = ""
    failed: bool = False
    marks: Mapping[str, bool] = field(default_factory=dict)
    score: str = ""
    least: float | None = None
    most: float | None = None
    sort: str = IMAGE
    descending: bool = False

    def __post_init__(self) -> None:
        if self.sort not in SORTS:
            raise QueryError(f"Pictures cannot be sorted by {self.sort!r}: choose one of {', '.join(SORTS)}.")
        if self.score and self.score not in KEYS:
            raise QueryError(f"There is no score {self.score!r} to filter by: choose one of {', '.join(KEYS)}.")
        if self.words:
            parse(self.words)

    @property
    def terms(self) -> tuple[Term, ...]:
        return parse(self.words) if self.words else ()

    @property
    def conditions(self) -> tuple[str, ...]:
        """The facets that a document must have."""
        given = {name: getattr(self, name) for name in ("modality", "concept", "flag", "code")}
        facets = [facet(name, value) for name, value in given.items() if value]
        facets += [facet("state", "failed")] * self.failed
        return (*facets, *(facet(name, "") for name, held in self.marks.items() if held))

    @property
    def exclusions(self) -> tuple[str, ...]:
        return tuple(facet(name, "") for name, held in self.marks.items() if not held)

    @property
    def has_range(self) -> bool:
        return bool(self.score) and (self.least is not None or self.most is not None)

    @property
    def is_plain(self) -> bool:
        """Whether it asks for all pictures in the order of the data set, for which no index is needed."""
        return self.is_whole and not self.has_range and self.sort == IMAGE

    @property
    def is_whole(self) -> bool:
        """Whether every picture fulfils the conditions, apart from the range of a score."""
        return not (self.words or self.conditions or self.exclusions)


@dataclass(frozen=True, slots=True)
class Said:
    """What a run has for a picture. `state` is that of its job, "" if it has none; `text` is None without a caption.

    `code` and `message` are those of its last failure, if it failed. `scores` are those that `evaluate` stored.
    """

    run: str
    state: str = ""
    text: str | None = None
    flags: tuple[str, ...] = ()
    code: str = ""
    message: str = ""
    processing_ms: float | None = None
    generated_at: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of the data set with its original caption, and what each run has for it, in the order of the runs."""

    id: int
    source: Source
    original: str
    concepts: tuple[str, ...]
    modality: str
    said: tuple[Said, ...]

    @property
    def image_id(self) -> str:
        return self.source.place.image_id


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a gallery. `next` is the `after` of the page that follows, "" if this is the last; `previous` is the
    `before` of the page that precedes it, "" if this is the first.

    There are `total` pictures in all, or more than that unless it `is_exact`; None if there may be any number, because
    several conditions are each fulfilled by many. `why` says why there is nothing, or not everything, to search by.
    """

    pictures: list[Picture]
    next: str
    total: int | None
    is_exact: bool
    why: str = ""
    previous: str = ""


def page(
    database: Database,
    index: Index,
    runs: Sequence[Run],
    query: Query,
    *,
    after: str = "",
    before: str = "",
    limit: int = 24,
) -> Page:
    """One page of the pictures of `runs`, which are on one data set (`queue.find_runs`); the first is the one whose
    scores decide. It begins after one position, or ends before another.

    Raises QueryError for a position or a `limit` that make no sense, and SearchUnavailable if the query needs the index
    and there is none.
    """
    if not 1 <= limit <= MAX_LIMIT:
        raise QueryError(f"A page has 1 to {MAX_LIMIT} pictures, not {limit}.")
    position = _position(query, before or after)
    found = _find(database, index, runs, _reversed(query) if before else query, position, limit)
    more = len(found.keys) > limit
    if before and not more:  # the first page is always a full one
        return page(database, index, runs, query, limit=limit)
    shown = found.keys[:limit]
    if before:
        shown.reverse()
    with transaction(database) as conn:
        pictures = pictures_of(conn, runs, [image for _, image in shown])
    return Page(
        pictures,
        _cursor(query, shown[-1]) if shown and (more or before) else "",
        found.total,
        found.is_exact,
        found.why,
        _cursor(query, shown[0]) if shown and (after or before) else "",
    )


def neighbours(
    database: Database, index: Index, runs: Sequence[Run], query: Query, image: int
) -> tuple[int | None, int | None]:
    """The ids of the pictures before and after one in the order of a gallery, whether or not it shows that one itself.

    None at an end, and if the picture has not what the gallery is sorted by. Raises SearchUnavailable as `page` does.
    """
    position = _key_of(index, runs, query, image)
    if position is None:
        return None, None
    found = (_find(database, index, runs, one, position, 1).keys for one in (_reversed(query), query))
    before, after = (keys[0][1] if keys else None for keys in found)
    return before, after


# --- Which pictures --------------------------------------------------------------------------------------------

_Key = tuple[float, int]
"""The value that pictures are sorted by (0 if by the data set's order), and a picture's id."""


@dataclass(frozen=True, slots=True)
class _Found:
    keys: list[_Key]
    total: int | None
    is_exact: bool
    why: str = ""


def _find(
    database: Database, index: Index, runs: Sequence[Run], query: Query, position: _Key | None, limit: int
) -> _Found:
    """All pictures in the data set's order are read from the queue until the index has all of them."""
    why = index.status.why or BEING_FILLED
    if not query.is_plain or index.status.state == "ready":
        try:
            with index.reading() as conn:
                return _Search(index, conn, runs, query).page(position, limit)
        except SearchUnavailable as error:
            if not query.is_plain:
                raise
            why = str(error)
    with transaction(database) as conn:
        keys, total = _browse(conn, runs, query, position, limit)
    return _Found(keys, total, is_exact=len(runs) == 1, why=why)


def _key_of(index: Index, runs: Sequence[Run], query: Query, image: int) -> _Key | None:
    if query.sort == IMAGE:
        return 0.0, image
    with index.reading() as conn:
        keys = _Search(index, conn, runs, replace(query, least=None, most=None)).keys_of([image])
    return keys[0] if keys else None


def _reversed(query: Query) -> Query:
    return replace(query, descending=not query.descending)


def _position(query: Query, after: str) -> _Key | None:
    if not after:
        return None
    value, colon, image = after.rpartition(":")
    try:
        found = (float(value) if colon else 0.0), int(image)
        if bool(colon) != (query.sort != IMAGE) or not math.isfinite(found[0]) or not 0 <= found[1] < 1 << 42:
            raise ValueError(after)
    except ValueError as error:
        raise QueryError(f"There is no page after {after!r}: begin with the first.") from error
    return found


def _cursor(query: Query, key: _Key) -> str:
    return str(key[1]) if query.sort == IMAGE else f"{key[0]!r}:{key[1]}"


def _browse(
    conn: Connection, runs: Sequence[Run], query: Query, position: _Key | None, limit: int
) -> tuple[list[_Key], int]:
    """The pictures after a position in the order of the data set, read from the queue itself; and how many there are,
    if there is one run.
    """
    after = position[1] if position else (_LAST if query.descending else 0)
    found = {
        image
        for run in runs
        for image in current.image_ids(conn, run, query.split, after, limit + 1, backwards=query.descending)
    }
    names = {run.name for run in runs}
    totals = [c.total for c in queue.counts(conn) if c.run in names and c.split == query.split]
    images = sorted(found, reverse=query.descending)
    return [(0.0, image) for image in images[: limit + 1]], max(totals, default=0)


_LAST: Final = 1 << 42


class _Search:
    """One query over the index, in one transaction."""

    def __init__(self, index: Index, conn: Connection, runs: Sequence[Run], query: Query) -> None:
        self._conn, self._runs, self._query = conn, runs, query
        self._documents = index.documents
        # To look at one picture after another along a list takes longer than to sort twice as many.
        self._bound = BOUND if query.sort == IMAGE else 2 * BOUND
        self._keys = f"{index.documents.schema}keys"
        self._lists = index.lists(conn, runs[0], query.split)
        self._totals = index.totals(conn, runs, query.split)
        self._wanted = Wanted(
            query.split,
            tuple(run.id for run in runs),
            query.conditions,
            query.exclusions,
            query.terms,
            query.where,
            min((first for _, first in self._totals.values()), default=0),
        )

    def page(self, position: _Key | None, limit: int) -> _Found:
        """One more than a page of the keys after a position, in order."""
        query = self._query
        if query.is_plain:
            total = max((n for n, _ in self._totals.values()), default=0)
            return _Found(self._in_order(position, limit), total, is_exact=len(self._runs) == 1)
        few = self._few()
        if few is not None:
            keys = sorted(few, reverse=query.descending)
            rest = [key for key in keys if position is None or (key < position if query.descending else key > position)]
            return _Found(rest[: limit + 1], len(keys), is_exact=True)
        keys = self._in_order(position, limit) if query.sort == IMAGE else self._along_list(position, limit)
        if position is None and len(keys) <= limit:
            return _Found(keys, len(keys), is_exact=True)
        return _Found(keys, self._bound if self._is_one_condition else None, is_exact=False)

    @property
    def _is_one_condition(self) -> bool:
        """Whether what more than so many pictures fulfil is all that is asked for."""
        query = self._query
        if query.is_whole:
            return not query.has_range or query.sort in (IMAGE, LENGTH, TIME, query.score)
        return not query.has_range and query.sort == IMAGE

    def _few(self) -> list[_Key] | None:
        """All that the query finds, if the documents or the range of the score are few; else None."""
        query = self._query
        if not query.is_whole:
            images = self._images(None, self._bound + 1)
            if len(images) <= self._bound:
                return self.keys_of(images)
        if query.has_range or query.is_whole:
            name = query.score if query.has_range else query.sort
            where, values = self._range("k", query.has_range)
            sql = f"SELECT image_id FROM {self._keys} k WHERE k.list = ?{where} LIMIT ?"
            rows = self._rows(sql, (self._lists.get(name, -1), *values, self._bound + 1))
            if len(rows) <= self._bound:
                return self.keys_of(self._that_hold([row[0] for row in rows]))
        return None

    def _images(self, after: int | None, n: int, also: Statement = ("", ())) -> list[int]:
        """At least `n` different pictures that fulfil the conditions, unless there are fewer, in order."""
        limit, backwards = n * len(self._runs), self._query.descending
        rows = self._rows(*self._documents.images(self._wanted, after, limit, backwards=backwards, also=also))
        return list(dict.fromkeys(row[0] for row in rows))

    def _that_hold(self, images: Sequence[int]) -> list[int]:
        """Those of a few pictures that fulfil the conditions."""
        if self._query.is_whole or not images:
            return list(images)
        values = ", ".join("(?)" for _ in images)
        holds, parameters = self._documents.holds(self._wanted, "v.column1")
        sql = f"SELECT v.column1 FROM (VALUES {values}) v WHERE {holds}"
        return [row[0] for row in self._rows(sql, (*images, *parameters))]

    def keys_of(self, images: Sequence[int]) -> list[_Key]:
        """The keys of a few pictures, without those that have none or whose score is out of range."""
        query = self._query
        kept: dict[int, float] = dict.fromkeys(images, 0.0)
        for name, is_range in ((query.score, True), (query.sort, False)):
            if (is_range and not query.has_range) or name == IMAGE:
                continue
            where, values = self._range("k", is_range)
            sql = (
                f"SELECT image_id, value FROM {self._keys} k WHERE k.list = ?{where} AND image_id IN ({db.marks(kept)})"
            )
            kept = dict(self._rows(sql, (self._lists.get(name, -1), *values, *kept))) if kept else {}
        return [(0.0 if query.sort == IMAGE else value, image) for image, value in kept.items()]

    def _in_order(self, position: _Key | None, limit: int) -> list[_Key]:
        after = position[1] if position else None
        also = self._in_range("{image}") if self._query.has_range else ("", ())
        return [(0.0, image) for image in self._images(after, limit + 1, also)[: limit + 1]]

    def _in_range(self, image: str) -> Statement:
        """The condition that the score of the picture whose id is this SQL expression is in the range."""
        within, bounds = self._range("r", True)
        sql = f" AND EXISTS (SELECT 1 FROM {self._keys} r WHERE r.list = ? AND r.image_id = {image}{within})"
        return sql, (self._lists.get(self._query.score, -1), *bounds)

    def _along_list(self, position: _Key | None, limit: int) -> list[_Key]:
        """Pictures in the order of a list, those that fulfil the conditions."""
        query = self._query
        sign, order = ("<", "DESC") if query.descending else (">", "ASC")
        where, values = "", tuple[Any, ...]()
        if position is not None:
            where, values = f" AND k.value {sign}= ? AND (k.value, k.image_id) {sign} (?, ?)", (position[0], *position)
        holds, parameters = self._holds()
        if query.has_range:
            also, bounds = self._in_range("k.image_id")
            holds, parameters = holds + also, (*parameters, *bounds)
        sql = (
            f"SELECT k.value, k.image_id FROM {self._keys} k WHERE k.list = ?{where} AND {holds} "
            f"ORDER BY k.value {order}, k.image_id {order} LIMIT ?"
        )
        list_id = self._lists.get(query.sort, -1)
        return [(row[0], row[1]) for row in self._rows(sql, (list_id, *values, *parameters, limit + 1))]

    def _holds(self) -> Statement:
        return ("1 = 1", ()) if self._query.is_whole else self._documents.holds(self._wanted, "k.image_id")

    def _range(self, alias: str, is_range: bool) -> Statement:
        bounds = ((">=", self._query.least), ("<=", self._query.most)) if is_range else ()
        given = [(sign, bound) for sign, bound in bounds if bound is not None]
        return "".join(f" AND {alias}.value {sign} ?" for sign, _ in given), tuple(bound for _, bound in given)

    def _rows(self, sql: str, values: Sequence[Any]) -> list[Any]:
        return list(execute(self._conn, sql, tuple(values)).fetchall())


# --- What is shown of them -------------------------------------------------------------------------------------

_SAID: Final = "j.image_id, j.id, j.status, c.text, c.flags, c.processing_ms, c.generated_at"


def pictures_of(conn: Connection, runs: Sequence[Run], images: Sequence[int]) -> list[Picture]:
    """The pictures with these ids in the database, in this order, with what each run has for them."""
    if not images:
        return []
    sql = (
        f"SELECT i.id, {PLACE}, s.digest, i.caption, i.cui FROM images i JOIN shards s ON s.id = i.shard_id "
        f"WHERE i.id IN ({db.marks(images)})"
    )
    rows = {row[0]: row[1:] for row in execute(conn, sql, tuple(images)).fetchall()}
    said = [_said(conn, run, images) for run in runs]
    found = []
    for image in images:
        if image in rows:
            *place, digest, original, cui = rows[image]
            cuis = concepts.parse(cui)
            texts = tuple(by_image.get(image, Said(run.name)) for run, by_image in zip(runs, said, strict=True))
            found.append(
                Picture(
                    image,
                    Source(place_of(place, runs[0].columns), digest),
                    original,
                    tuple(sorted(cuis)),
                    concepts.modality(cuis),
                    texts,
                )
            )
    return found


@dataclass(frozen=True, slots=True)
class Details:
    """All about one picture: as in the gallery, and what happened to it in each run, None in one without it."""

    picture: Picture
    histories: tuple[History | None, ...]


def details(conn: Connection, runs: Sequence[Run], image: int) -> Details | None:
    """All about the picture with this id in the database; None if the data set of these runs has no such picture."""
    if source_of(conn, runs[0], image) is None:
        return None
    (picture,) = pictures_of(conn, runs, [image])
    return Details(picture, tuple(queue.history(conn, run, image) for run in runs))


def _said(conn: Connection, run: Run, images: Sequence[int]) -> dict[int, Said]:
    rows = current.jobs_of_images(conn, run, images, _SAID)
    scores = current.stored_scores(conn, [row[1] for row in rows])
    failures = current.last_failures(conn, [row[1] for row in rows if row[2] == "failed"])
    return {
        image: Said(
            run.name,
            status,
            text,
            tuple(filter(None, (flags or "").split(","))),
            *failures.get(job, ("", "")),
            processing_ms,
            generated_at,
            _numbers(scores.get(job, ())),
        )
        for image, job, status, text, flags, processing_ms, generated_at in rows
    }


def _numbers(stored: Sequence[str]) -> dict[str, float]:
    """The scores of one caption that are numbers; others are counts, which only make sense when summed up."""
    values = {name: value for one in stored for name, value in json.loads(one).items()}
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
