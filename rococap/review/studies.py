"""Blinded reader studies: people compare or rate texts of the same pictures without knowing who wrote which.

Which text stands at which place is drawn for each picture and reader when the study is made, and is its key. Until
everything is read, or the study is unblinded, which is recorded, no function here gives away anything of the key; after
that, nobody can rate any more.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from sqlalchemy import Connection

from rococap import db, queue
from rococap.db import execute
from rococap.errors import RococapError, RunError
from rococap.queue import Run
from rococap.queue.records import time_of
from rococap.review.forms import Answers, Form
from rococap.review.records import checked_name, lock

ORIGINAL = "(original)"
"""What results call the data set's own captions. No run can have this name."""


@dataclass(frozen=True, slots=True)
class Study:
    """A study: each of `n_readers` readers reads `n_pictures` pictures of a split. `created_at` is in ms since 1970."""

    id: int
    name: str
    split: str
    n_pictures: int
    n_readers: int
    seed: int
    form: Form
    created_at: int


@dataclass(frozen=True, slots=True)
class Shown:
    """What a reader sees of one picture: its texts, without a hint of who wrote them.

    `position` counts the reader's pictures from 1; `image` is the picture's key in the table `images`. `answers` are
    those that the reader gave before, if any. `shown_at`, in ms since 1970, goes back with the answers: it is when the
    reading began.
    """

    study: str
    position: int
    n_pictures: int
    split: str
    image: int
    image_id: str
    texts: tuple[str, ...]
    form: Form
    answers: Answers | None
    shown_at: int


@dataclass(frozen=True, slots=True)
class Unblinding:
    """Who opened the key of a study before everything was read, when, and how many readings were missing then."""

    reader: str
    n_missing: int
    at: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a study is. `read` has the number of pictures of each reader, in order; the name is None until somebody
    joins.
    """

    study: Study
    read: tuple[tuple[str | None, int], ...]
    unblinding: Unblinding | None

    @property
    def n_missing(self) -> int:
        return self.study.n_pictures * self.study.n_readers - sum(n for _, n in self.read)

    @property
    def is_open(self) -> bool:
        """Whether the key may be seen, and nobody can rate any more."""
        return self.unblinding is not None or self.n_missing == 0


# --- Making a study --------------------------------------------------------------------------------------------


def new_study(
    conn: Connection,
    name: str,
    runs: Sequence[Run],
    split: str,
    *,
    with_original: bool,
    n_pictures: int,
    n_readers: int,
    seed: int,
    form: Form,
    modality: Callable[[str], str],
    now: int | None = None,
) -> Study:
    """Draws a study of pictures that all runs, which are of one data set, have captioned.

    The sample has as many pictures of each modality as there are, which `modality` tells by a picture's concepts (the
    column `cui`). The same seed draws the same study from the same captions, in any database. `with_original` adds the
    original captions as a further text, and leaves out pictures that have none.

    Raises RococapError if there is a study of this name or no address can hold it, if there are too few texts to
    compare, or too few pictures.
    """
    name = checked_name(name, "study")
    if "/" in name or name in (".", ".."):
        raise RococapError(f"{name!r} is not the name of a study: it stands in web addresses. Use letters and digits.")
    if len(runs) + with_original < 1 + form.preference:
        raise RococapError(
            "A preference needs at least two texts for each picture: add another --run, or --with-original."
        )
    for run in sorted(runs, key=lambda run: run.id):
        lock(conn, run)
    if execute(conn, "SELECT 1 FROM studies WHERE name = ?", (name,)).fetchall():
        raise RococapError(f"There is a study {name!r} already, and a study never changes. Choose another name.")
    sample = _balanced(_candidates(conn, runs, split, with_original, modality), n_pictures, random.Random(f"{seed}"))
    if len(sample) < n_pictures:
        raise RunError(
            f"Only {len(sample)} pictures of {split} are captioned by {' and '.join(run.name for run in runs)}"
            f"{' and have an original caption' if with_original else ''}: caption more, or ask for --pictures "
            f"{len(sample)} at most."
        )
    row = (name, split, n_pictures, n_readers, seed, form.to_json(), time_of(conn, now))
    columns = "name, split, n_pictures, n_readers, seed, form, created_at"
    sql = f"INSERT INTO studies ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?) RETURNING id"
    id = execute(conn, sql, row).scalar_one()
    items = [
        (id, reader, position, place, one.image, one.modality, job)
        for reader in range(1, n_readers + 1)
        for position, place, one, job in _shuffled(sample, random.Random(f"{seed} {reader}"))
    ]
    columns = "study_id, reader_number, position, place, image_id, modality, job_id"
    execute(conn, f"INSERT INTO study_items ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", items)
    return Study(id, name, split, n_pictures, n_readers, seed, form, row[-1])


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A picture, and the jobs of its texts; None stands for the original caption."""

    image: int
    modality: str
    jobs: tuple[int | None, ...]


def _candidates(
    conn: Connection, runs: Sequence[Run], split: str, with_original: bool, modality: Callable[[str], str]
) -> list[_Candidate]:
    """In order of image_id, which is the same in every database."""
    join = " JOIN jobs j{0} ON j{0}.run_id = ? AND j{0}.image_id = i.id AND j{0}.status = 'done'"
    joins = "".join(map(join.format, range(len(runs))))
    columns = "".join(f", j{n}.id" for n in range(len(runs)))
    sql = f"SELECT i.image_id, i.id, i.caption, i.cui{columns} FROM images i{joins} "
    sql += "WHERE i.dataset_id = ? AND i.split = ?"
    rows = execute(conn, sql, (*(run.id for run in runs), runs[0].dataset_id, split)).fetchall()
    original = (None,) if with_original else ()
    return [
        _Candidate(image, modality(cui), (*jobs, *original))
        for _, image, caption, cui, *jobs in sorted(map(tuple, rows))
        if not with_original or caption.strip()
    ]


def _balanced(candidates: Iterable[_Candidate], n: int, rng: random.Random) -> list[_Candidate]:
    """Draws n pictures, as equally many of each modality as there are."""
    by_modality: dict[str, list[_Candidate]] = {}
    for one in candidates:
        by_modality.setdefault(one.modality, []).append(one)
    groups = [by_modality[name] for name in sorted(by_modality)]
    for group in groups:
        rng.shuffle(group)
    rng.shuffle(groups)
    in_turn = chain.from_iterable(zip_longest(*groups))
    return [one for one in in_turn if one is not None][:n]


def _shuffled(sample: Sequence[_Candidate], rng: random.Random) -> Iterable[tuple[int, int, _Candidate, int | None]]:
    """(position, place, picture, job of the text there), with the pictures and their texts in random order."""
    for position, one in enumerate(rng.sample(sample, len(sample)), 1):
        for place, job in enumerate(rng.sample(one.jobs, len(one.jobs)), 1):
            yield position, place, one, job


# --- Reading ---------------------------------------------------------------------------------------------------

_STUDY = "SELECT id, name, split, n_pictures, n_readers, seed, form, created_at FROM studies "


def _study(row: Sequence[Any]) -> Study:
    id, name, split, n_pictures, n_readers, seed, form, created_at = row
    return Study(id, name, split, n_pictures, n_readers, seed, Form.from_json(form), created_at)


def list_studies(conn: Connection) -> list[Study]:
    """Every study, oldest first."""
    return [_study(row) for row in execute(conn, f"{_STUDY}ORDER BY id").fetchall()]


def get_study(conn: Connection, name: str) -> Study:
    """The study called `name`. Raises RococapError, listing those that exist, if there is none."""
    row = execute(conn, f"{_STUDY}WHERE name = ?", (name,)).one_or_none()
    if row is None:
        names = ", ".join(study.name for study in list_studies(conn))
        raise RococapError(
            f"There is no study {name!r}. " + (f"Studies: {names}." if names else "Make one: rococap study new --help")
        )
    return _study(row)


def progress(conn: Connection, study: Study) -> Progress:
    """How far each reader is, and whether the key is open."""
    names = dict(map(tuple, _rows(conn, "SELECT reader_number, reader FROM study_readers WHERE study_id = ?", study)))
    sql = "SELECT reader_number, count(DISTINCT position) FROM ratings WHERE study_id = ? GROUP BY reader_number"
    n_read = dict(map(tuple, _rows(conn, sql, study)))
    opened = _rows(conn, "SELECT reader, n_missing, at FROM unblindings WHERE study_id = ?", study)
    read = tuple((names.get(number), n_read.get(number, 0)) for number in range(1, study.n_readers + 1))
    return Progress(study, read, Unblinding(*opened[0]) if opened else None)


def _rows(conn: Connection, sql: str, study: Study) -> Sequence[Sequence[Any]]:
    return execute(conn, sql, (study.id,)).fetchall()


def _number_of(conn: Connection, study: Study, reader: str) -> int | None:
    sql = "SELECT reader_number FROM study_readers WHERE study_id = ? AND reader = ?"
    number = execute(conn, sql, (study.id, checked_name(reader))).scalar_one_or_none()
    return None if number is None else int(number)


def join(conn: Connection, study: Study, reader: str, *, now: int | None = None) -> int:
    """The reader's number in the study, from 1; a new reader is given the next that is free.

    Raises RococapError if every number is taken, or if the key is open.
    """
    name = checked_name(reader)
    db.lock(conn, "studies", study.id)
    if (number := _number_of(conn, study, name)) is not None:
        return number
    known = progress(conn, study)
    _refuse_open(known)
    free = [number for number, (taken, _) in enumerate(known.read, 1) if taken is None]
    if not free:
        readers = ", ".join(taken for taken, _ in known.read if taken)
        raise RococapError(f"Study {study.name!r} has its {study.n_readers} readers already: {readers}.")
    row = (study.id, free[0], name, time_of(conn, now))
    execute(conn, "INSERT INTO study_readers (study_id, reader_number, reader, joined_at) VALUES (?, ?, ?, ?)", row)
    return free[0]


def next_item(conn: Connection, study: Study, reader: str, *, now: int | None = None) -> Shown | None:
    """The reader's first picture without answers; None if there is none left, or if the key is open.

    Raises RococapError if the reader has not joined.
    """
    number = _joined(conn, study, reader)
    if progress(conn, study).is_open:
        return None
    read = "SELECT position FROM ratings WHERE study_id = ? AND reader_number = ?"
    sql = f"SELECT min(position) FROM study_items WHERE study_id = ? AND reader_number = ? AND position NOT IN ({read})"
    position = execute(conn, sql, (study.id, number) * 2).scalar_one()
    return None if position is None else item(conn, study, reader, position, now=now)


def item(conn: Connection, study: Study, reader: str, position: int, *, now: int | None = None) -> Shown:
    """One of the reader's pictures, with the answers given before, if any.

    Raises RococapError if the reader has not joined, or has no such picture.
    """
    number = _joined(conn, study, reader)
    rows = _texts(conn, study, number, position)
    if not rows:
        raise RococapError(f"Study {study.name!r} has {study.n_pictures} pictures for each reader, no {position}.")
    sql = "SELECT answers FROM ratings WHERE study_id = ? AND reader_number = ? AND position = ? ORDER BY id DESC"
    given = execute(conn, f"{sql} LIMIT 1", (study.id, number, position)).scalar_one_or_none()
    answers = None if given is None else Answers.from_json(given)
    image, image_id, texts = rows[0][0], rows[0][1], tuple(text for _, _, text in rows)
    return Shown(
        *(study.name, position, study.n_pictures, study.split, image, image_id, texts, study.form, answers),
        shown_at=time_of(conn, now),
    )


def _texts(conn: Connection, study: Study, number: int, position: int) -> list[tuple[int, str, str]]:
    """(key of the image, image_id, text) at each place, in order."""
    sql = (
        "SELECT i.id, i.image_id, COALESCE(c.text, i.caption) FROM study_items t JOIN images i ON i.id = t.image_id "
        "LEFT JOIN captions c ON c.job_id = t.job_id "
        "WHERE t.study_id = ? AND t.reader_number = ? AND t.position = ? ORDER BY t.place"
    )
    return [(row[0], row[1], row[2]) for row in execute(conn, sql, (study.id, number, position)).fetchall()]


def run_for_pictures(conn: Connection, study: Study) -> Run:
    """The run to look up pictures with, the same for all of a study, so that it says nothing about any text."""
    sql = (
        "SELECT r.name FROM study_items t JOIN jobs j ON j.id = t.job_id JOIN runs r ON r.id = j.run_id "
        "WHERE t.study_id = ? AND t.reader_number = 1 AND t.position = 1 ORDER BY r.id LIMIT 1"
    )
    return queue.get_run(conn, execute(conn, sql, (study.id,)).scalar_one())


def _joined(conn: Connection, study: Study, reader: str) -> int:
    number = _number_of(conn, study, reader)
    if number is None:
        raise RococapError(f"{reader!r} has not joined study {study.name!r} yet: join it first.")
    return number


def rate(
    conn: Connection,
    study: Study,
    reader: str,
    position: int,
    answers: Answers,
    *,
    shown_at: int,
    now: int | None = None,
) -> None:
    """Records what a reader says of one picture. Until the key is open it may be said again: the latest counts.

    `shown_at` is that of what was shown. Raises RococapError if the answers are not what the form asks for, or if the
    key is open.
    """
    number = _joined(conn, study, reader)
    db.lock(conn, "studies", study.id)
    _refuse_open(progress(conn, study))
    n_texts = len(_texts(conn, study, number, position))
    if not n_texts:
        raise RococapError(f"Study {study.name!r} has {study.n_pictures} pictures for each reader, no {position}.")
    answers.check(study.form, n_texts)
    at = time_of(conn, now)
    row = (study.id, number, position, answers.to_json(), max(study.created_at, min(shown_at, at)), at)
    columns = "study_id, reader_number, position, answers, shown_at, at"
    execute(conn, f"INSERT INTO ratings ({columns}) VALUES (?, ?, ?, ?, ?, ?)", row)


def _refuse_open(known: Progress) -> None:
    if known.is_open:
        raise RococapError(f"The key of study {known.study.name!r} is open, so nobody can read in it any more.")


# --- The key ---------------------------------------------------------------------------------------------------


def unblind(conn: Connection, study: Study, by: str, *, now: int | None = None) -> Unblinding:
    """Opens the key before everything is read, and records who did so. Nobody can read in the study after that.

    Raises RococapError if the key is open already.
    """
    name = checked_name(by)
    db.lock(conn, "studies", study.id)
    known = progress(conn, study)
    if known.is_open:
        raise RococapError(f"The key of study {study.name!r} is open already. See: rococap study results {study.name}")
    opened = Unblinding(name, known.n_missing, time_of(conn, now))
    sql = "INSERT INTO unblindings (study_id, reader, n_missing, at) VALUES (?, ?, ?, ?)"
    execute(conn, sql, (study.id, opened.reader, opened.n_missing, opened.at))
    return opened


@dataclass(frozen=True, slots=True)
class Reading:
    """A reader's latest answers on one picture, with the key: `texts` names who wrote the text at each place.

    `seconds` is the time that the reader spent on the picture, all visits together.
    """

    reader: str
    image_id: str
    modality: str
    texts: tuple[str, ...]
    answers: Answers
    seconds: float


def readings(conn: Connection, study: Study) -> list[Reading]:
    """Everything that was read, reader by reader. Raises RococapError while the key is closed."""
    known = progress(conn, study)
    if not known.is_open:
        raise RococapError(
            f"The key of study {study.name!r} is closed: {known.n_missing} readings are missing (see: rococap study "
            f"status {study.name}). To open it early, which is recorded and ends the study: rococap study unblind "
            f"{study.name}"
        )
    key = _key(conn, study)
    sql = (
        "SELECT a.reader_number, r.reader, a.position, a.answers, a.at - a.shown_at FROM ratings a "
        "JOIN study_readers r ON r.study_id = a.study_id AND r.reader_number = a.reader_number "
        "WHERE a.study_id = ? ORDER BY a.reader_number, a.position, a.id"
    )
    latest: dict[tuple[int, int], tuple[str, str, int]] = {}
    for number, reader, position, answers, took in _rows(conn, sql, study):
        spent = latest[number, position][2] if (number, position) in latest else 0
        latest[number, position] = (reader, answers, spent + took)
    return [
        Reading(reader, *key[place], Answers.from_json(answers), ms / 1000)
        for place, (reader, answers, ms) in latest.items()
    ]


def _key(conn: Connection, study: Study) -> Mapping[tuple[int, int], tuple[str, str, tuple[str, ...]]]:
    """(reader's number, position) -> image_id, modality, and who wrote the text at each place."""
    sql = (
        "SELECT t.reader_number, t.position, i.image_id, t.modality, r.name FROM study_items t "
        "JOIN images i ON i.id = t.image_id LEFT JOIN jobs j ON j.id = t.job_id LEFT JOIN runs r ON r.id = j.run_id "
        "WHERE t.study_id = ? ORDER BY t.reader_number, t.position, t.place"
    )
    key: dict[tuple[int, int], tuple[str, str, tuple[str, ...]]] = {}
    for number, position, image_id, modality, run in _rows(conn, sql, study):
        before = key.get((number, position), ("", "", ()))[2]
        key[number, position] = (image_id, modality, (*before, run or ORIGINAL))
    return key
