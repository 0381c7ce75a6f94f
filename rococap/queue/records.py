"""Jobs, leases and what is recorded about them, and the small functions that every transition needs."""

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
MAX_TEXT = 65_536

NORMAL, SUSPECTS, SOLO = 0, 4, 1
"""Lanes. A job that was in a crash is claimed by fours, after a second crash alone; the value bounds the claim."""


@dataclass(frozen=True, slots=True)
class Job:
    """One picture of one run, leased to a worker."""

    id: int
    lease_id: int
    place: Place


@dataclass(frozen=True, slots=True)
class Lease:
    """The right of a worker to what one claim took. `lane` is NORMAL, SUSPECTS or SOLO."""

    id: int
    worker_id: int
    run_id: int
    split: str
    lane: int


@dataclass(frozen=True, slots=True)
class Claim(Lease):
    """A new lease, with its jobs in order of id; there is at least one."""

    jobs: tuple[Job, ...]


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds that a lease's pictures took in each stage."""

    load_ms: float = 0.0
    prepare_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    store_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Telemetry:
    """What a worker made of its time and memory, as it told last. None: not known. MB are millions of bytes.

    While it runs, the rates and shares are over its last minute or so; once it has said goodbye, over its whole time.
    `fill`: rows decoded a step, as a share of the batch size. `busy`: the share of the time that the model worked.
    `waited_sec`: how long in all it had no picture to work on. `memory_mb` and `gpu_memory_mb` are the process's peaks;
    `gpu_utilisation` is the driver's share of a moment, by whatever process.
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
        """Without what only a later version knows."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in json.loads(text).items() if name in known})


PLACE = "s.path, i.split, i.row_group, i.row_in_group, i.image_id"
"""The columns of a Place, of images i and shards s."""


def place_of(row: Sequence[Any], columns: Columns) -> Place:
    return Place(*(*row, columns))


def clean_text(text: str, most: int = MAX_TEXT) -> str:
    """Text as the database can hold it: NUL becomes U+FFFD, lone surrogates too, and the length is bounded."""
    if not text.isascii():
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")[:most]


def time_of(conn: Connection, now: int | None) -> int:
    return db.now(conn) if now is None else now


def tally(conn: Connection, run_id: int, split: str, slot: int, changes: Mapping[str, int]) -> None:
    rows = [(run_id, split, status, slot % SLOTS, n) for status, n in sorted(changes.items()) if n]
    if rows:
        execute(
            conn,
            "INSERT INTO tallies (run_id, split, status, slot, n) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (run_id, split, status, slot) DO UPDATE SET n = tallies.n + excluded.n",
            rows,
        )


def flags_of(text: str, finish_reason: str, told: str = "") -> str:
    """What is odd about a caption, joined by commas: what its engine told, what it is like, and `replaced` where
    `clean_text` had to change or cut it.
    """
    said = without_reasoning(text) or text
    odd = (*degenerate(said, finish_reason), *of_reasoning(text))
    return ",".join(filter(None, (told, *odd, "" if clean_text(text) == text else "replaced")))


def flagged(flag: str) -> str:
    """The status under which captions with a flag are tallied, beside the states of jobs."""
    return f"flag:{flag}"


def flag_counts(flags: Iterable[str]) -> dict[str, int]:
    """How many captions to tally under each flag."""
    return dict(Counter(flagged(flag) for told in flags for flag in told.split(",") if flag))
