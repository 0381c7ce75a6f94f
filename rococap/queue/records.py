"""Jobs, leases, what is recorded about them, and the helpers that every transition needs."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from sqlalchemy import Connection

from rococap import db
from rococap.data import Columns, Place
from rococap.db import execute
from rococap.flags import degenerate, of_reasoning, without_reasoning

SLOTS = 16
"""Rows over which each tally is spread."""
MAX_TEXT = 65_536
"""Characters of a stored text."""

NORMAL, SUSPECTS, SOLO = 0, 4, 1
"""Lanes. After one crash, a job is claimed with at most three others; after a second, alone. The value of a lane is the
largest claim in it, unless it is 0."""


@dataclass(frozen=True, slots=True)
class Job:
    """One picture of one run, leased to a worker."""

    id: int
    lease_id: int
    place: Place


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker's exclusive right to the jobs of one claim. `lane` is NORMAL, SUSPECTS or SOLO."""

    id: int
    worker_id: int
    run_id: int
    split: str
    lane: int


@dataclass(frozen=True, slots=True)
class Claim(Lease):
    """A new lease with its jobs, at least one, in order of id."""

    jobs: tuple[Job, ...]


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds that the pictures of a lease spent in each stage."""

    load_ms: float = 0.0
    prepare_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    store_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Telemetry:
    """How a worker uses its time and memory, as it last reported. None means unknown. MB are millions of bytes.

    While the worker runs, rates and shares cover about its last minute; once it has stopped, its whole time.
    `fill`: rows decoded per step, as a share of the batch size. `busy`: the share of time that the model worked.
    `waited_sec`: total time without a picture to work on. `memory_mb` and `gpu_memory_mb` are the peaks of the process;
    `gpu_utilisation` is the driver's momentary figure, from 0 to 1, over all processes on the GPU.
    """

    captioning_sec: float
    pictures_per_sec: float
    new_tokens_per_sec: float
    fill: float | None
    busy: float
    waited_sec: float
    batch_size: int
    memory_mb: float
    gpu_memory_mb: float | None = None
    gpu_memory_total_mb: float | None = None
    gpu_utilisation: float | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Telemetry":
        """Parses the JSON, ignoring fields that a later version has added."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in json.loads(text).items() if name in known})


PLACE = "s.path, i.split, i.row_group, i.row_in_group, i.image_id"
"""The SQL columns of a Place, for the aliases `i` of images and `s` of shards."""


def place_of(row: Sequence[Any], columns: Columns) -> Place:
    """The Place in a row of the columns PLACE, in a data set with these `columns`."""
    return Place(*(*row, columns))


def clean_text(text: str, max_chars: int = MAX_TEXT) -> str:
    """Text that the database can store: NUL and lone surrogates become U+FFFD, and it is cut to `max_chars`."""
    if not text.isascii():
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")[:max_chars]


def time_of(conn: Connection, now: int | None) -> int:
    """`now`, or the database's clock if it is None, in milliseconds since 1970."""
    return db.now(conn) if now is None else now


def tally(conn: Connection, run_id: int, split: str, slot: int, changes: Mapping[str, int]) -> None:
    """Adds `changes`, by status, to the tallies of a run and split. `slot` is any number, such as the id of a lease."""
    rows = [(run_id, split, status, slot % SLOTS, n) for status, n in sorted(changes.items()) if n]
    if rows:
        execute(
            conn,
            "INSERT INTO tallies (run_id, split, status, slot, n) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (run_id, split, status, slot) DO UPDATE SET n = tallies.n + excluded.n",
            rows,
        )


def flags_of(text: str, finish_reason: str, engine_flags: str = "") -> str:
    """A caption's flags, joined by commas: those that its engine and worker set, those found in its text, and
    `replaced` if `clean_text` has to change or cut it.
    """
    caption = without_reasoning(text) or text
    found = (*degenerate(caption, finish_reason), *of_reasoning(text))
    return ",".join(filter(None, (engine_flags, *found, "" if clean_text(text) == text else "replaced")))


def flagged(flag: str) -> str:
    """The status under which captions with a flag are tallied, next to the states of jobs."""
    return f"flag:{flag}"


def flag_counts(flags: Iterable[str]) -> dict[str, int]:
    """How many captions to tally under each flag's status, given the flags of each caption as `flags_of` joins them."""
    return dict(Counter(flagged(flag) for joined in flags for flag in joined.split(",") if flag))
