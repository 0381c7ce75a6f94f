"""The tables of the database. Times are integer milliseconds since 1970 (UTC) by the database's clock.

Text columns never contain NUL, which PostgreSQL refuses: `queue.clean_text` replaces it before a write.
"""

from enum import StrEnum

from sqlalchemy import (
    REAL,
    BigInteger,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.types import TypeEngine

SCHEMA = "0010"
"""The alembic revision that this code reads and writes."""


class JobState(StrEnum):
    """The state of a job. `done` is final within a run: captioning a picture again takes another run."""

    #: can be claimed
    PENDING = "pending"
    #: held by an open lease
    LEASED = "leased"
    #: failed for now; pending again at `not_before`
    WAITING = "waiting"
    #: captioned, with the caption stored
    DONE = "done"
    #: failed for good, for the reason in `failures`; `retry` makes it pending
    FAILED = "failed"
    #: cancelled by the user; `retry` makes it pending
    CANCELLED = "cancelled"


# SQLite's STRICT tables accept only INTEGER, REAL and TEXT; PostgreSQL needs 64-bit types by name.
Int64 = BigInteger().with_variant(Integer(), "sqlite")
Real: TypeEngine[float] = Double().with_variant(REAL(), "sqlite")

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _id() -> Column[int]:
    return Column("id", Int64, primary_key=True)


def _to(name: str, target: str, *, nullable: bool = False, primary_key: bool = False) -> Column[int]:
    return Column(name, Int64, ForeignKey(target), nullable=nullable, primary_key=primary_key)


datasets = Table(
    "datasets",
    metadata,
    _id(),
    Column("name", Text, nullable=False),  # absolute path of a folder, or a hub id; `:config` is appended if one is set
    Column("revision", Text, nullable=False),  # the hub's commit; empty for a folder
    Column("columns", Text),  # JSON of places.Columns; NULL: the columns have their standard names
    UniqueConstraint("name", "revision"),
    sqlite_strict=True,
)

shards = Table(
    "shards",
    metadata,
    _id(),
    _to("dataset_id", "datasets.id"),
    Column("path", Text, nullable=False),
    Column("split", Text, nullable=False),
    Column("n_rows", Int64, nullable=False),
    Column("n_row_groups", Int64, nullable=False),
    Column("size", Int64, nullable=False),
    Column("digest", Text, nullable=False),
    UniqueConstraint("dataset_id", "path"),
    sqlite_strict=True,
)

images = Table(
    "images",
    metadata,
    _id(),
    _to("dataset_id", "datasets.id"),
    Column("split", Text, nullable=False),
    Column("image_id", Text, nullable=False),
    _to("shard_id", "shards.id"),
    Column("row_group", Int64, nullable=False),
    Column("row_in_group", Int64, nullable=False),
    Column("caption", Text, nullable=False),
    Column("cui", Text, nullable=False),  # concepts joined by ";", as in ImageCLEF's files
    UniqueConstraint("dataset_id", "split", "image_id"),
    sqlite_strict=True,
)

# Perceptual hashes, by which near-duplicate pictures are found: see `scores.leaks`.
image_hashes = Table(
    "image_hashes",
    metadata,
    _to("image_id", "images.id", primary_key=True),
    Column("algorithm", Text, primary_key=True),
    Column("hash", Text, nullable=False),  # hexadecimal
    sqlite_strict=True,
)

runs = Table(
    "runs",
    metadata,
    _id(),
    Column("name", Text, nullable=False, unique=True),
    _to("dataset_id", "datasets.id"),
    Column("recipe", Text, nullable=False),
    Column("recipe_hash", Text, nullable=False),
    Column("resolved", Text),  # JSON of what `auto` and a branch name resolved to, pinned by the run's first worker
    Column("max_attempts", Int64, nullable=False, server_default="5"),
    Column("paused", Int64, nullable=False, server_default="0"),
    Column("created_at", Int64, nullable=False),
    # A deleted run keeps its row, because SQLite would reuse its id.
    Column("deleted_at", Int64),
    sqlite_strict=True,
)

workers = Table(
    "workers",
    metadata,
    _id(),
    Column("uuid", Text, nullable=False, unique=True),  # new for every process
    Column("host", Text, nullable=False),
    Column("pid", Int64, nullable=False),
    Column("device", Text, nullable=False),
    Column("engine", Text, nullable=False),
    Column("versions", Text, nullable=False),
    Column("self_check", Text),
    Column("n_done", Int64, nullable=False, server_default="0"),
    Column("started_at", Int64, nullable=False),
    Column("seen_at", Int64, nullable=False),
    Column("stopped_at", Int64),
    Column("telemetry", Text),  # JSON of queue.Telemetry, as of the last heartbeat
    Column("lease_ttl_ms", Int64, nullable=False, server_default="120000"),
    sqlite_strict=True,
)

# The parts of a split that a run has, if `enqueue --part` registered them; none if it has all of it, or a selection.
parts = Table(
    "parts",
    metadata,
    _to("run_id", "runs.id", primary_key=True),
    Column("split", Text, primary_key=True),
    Column("number", Int64, primary_key=True, autoincrement=False),  # from 1
    Column("n_parts", Int64, primary_key=True, autoincrement=False),
    sqlite_strict=True,
)

# One row per claim: it is the lease, its fencing token and the timing record. Ids are never reused.
leases = Table(
    "leases",
    metadata,
    _id(),
    _to("worker_id", "workers.id"),
    _to("run_id", "runs.id"),
    Column("split", Text, nullable=False),
    Column("lane", Int64, nullable=False),
    Column("state", Text, nullable=False),
    Column("n_jobs", Int64, nullable=False),
    Column("n_done", Int64, nullable=False, server_default="0"),
    Column("claimed_at", Int64, nullable=False),
    Column("beat_at", Int64, nullable=False),
    Column("expires_at", Int64, nullable=False),
    Column("closed_at", Int64),
    Column("load_ms", Real, nullable=False, server_default="0"),
    Column("prepare_ms", Real, nullable=False, server_default="0"),
    Column("prefill_ms", Real, nullable=False, server_default="0"),
    Column("decode_ms", Real, nullable=False, server_default="0"),
    Column("store_ms", Real, nullable=False, server_default="0"),
    # Set if the lease was made in another database and merged: the uuid of its worker, and its id there.
    Column("origin_uuid", Text),
    Column("origin_id", Int64),
    CheckConstraint("state IN ('open', 'closed', 'released', 'expired')", name="state"),
    CheckConstraint("(state = 'open') = (closed_at IS NULL)", name="closed"),
    Index(None, "expires_at", sqlite_where=text("state = 'open'"), postgresql_where=text("state = 'open'")),
    Index(None, "closed_at"),
    Index(
        "ix_leases_origin",
        "origin_uuid",
        "origin_id",
        unique=True,
        sqlite_where=text("origin_id IS NOT NULL"),
        postgresql_where=text("origin_id IS NOT NULL"),
    ),
    sqlite_autoincrement=True,
    sqlite_strict=True,
)


def _partial(name: str, *columns: str, where: str) -> Index:
    return Index(name, *columns, sqlite_where=text(where), postgresql_where=text(where))


# Narrow and hot. The partial indexes keep a claim at microseconds with ten million rows; the planners use them only
# if the status is a literal in the SQL.
jobs = Table(
    "jobs",
    metadata,
    _id(),
    _to("run_id", "runs.id"),
    _to("image_id", "images.id"),
    Column("split", Text, nullable=False),
    Column("status", Text, nullable=False, server_default="pending"),
    Column("attempts", Int64, nullable=False, server_default="0"),
    Column("crashes", Int64, nullable=False, server_default="0"),
    Column("solo_crashes", Int64, nullable=False, server_default="0"),
    _to("lease_id", "leases.id", nullable=True),
    Column("not_before", Int64),
    Column("finished_at", Int64),
    Column("checkpoint", Int64),
    UniqueConstraint("run_id", "image_id"),
    CheckConstraint("status IN ('pending', 'leased', 'waiting', 'done', 'failed', 'cancelled')", name="status"),
    CheckConstraint("(status = 'leased') = (lease_id IS NOT NULL)", name="lease"),
    CheckConstraint("(status = 'waiting') = (not_before IS NOT NULL)", name="not_before"),
    CheckConstraint("(status IN ('done', 'failed', 'cancelled')) = (finished_at IS NOT NULL)", name="finished_at"),
    CheckConstraint("checkpoint IS NULL OR status = 'done'", name="checkpoint"),
    _partial("ix_jobs_pending", "run_id", "split", "crashes", "id", where="status = 'pending'"),
    _partial("ix_jobs_leased", "lease_id", where="lease_id IS NOT NULL"),
    _partial("ix_jobs_waiting", "not_before", where="status = 'waiting'"),
    _partial("ix_jobs_due", "run_id", "split", "finished_at", where="status = 'done' AND checkpoint IS NULL"),
    _partial("ix_jobs_checkpoint", "run_id", "split", "checkpoint", where="checkpoint IS NOT NULL"),
    _partial("ix_jobs_failed", "run_id", "split", where="status = 'failed'"),
    sqlite_strict=True,
)

captions = Table(
    "captions",
    metadata,
    _to("job_id", "jobs.id", primary_key=True),
    _to("lease_id", "leases.id", nullable=True),  # NULL if restored from a file
    Column("text", Text, nullable=False),
    Column("flags", Text, nullable=False, server_default=""),
    Column("finish_reason", Text),
    Column("prompt_tokens", Int64),
    Column("new_tokens", Int64),
    Column("processing_ms", Real),
    Column("latency_ms", Real),
    Column("batch_size", Int64),
    Column("generated_at", Int64, nullable=False),
    sqlite_strict=True,
)

# What `evaluate` computed for a caption. `digest` covers everything the score depends on (texts and versions): if it
# no longer matches, the score is stale.
scores = Table(
    "scores",
    metadata,
    _to("job_id", "captions.job_id", primary_key=True),
    Column("metric", Text, primary_key=True),
    Column("digest", Text, nullable=False),
    Column("value", Text, nullable=False),  # JSON: name -> number, or null where the score is undefined
    sqlite_strict=True,
)

failures = Table(
    "failures",
    metadata,
    _id(),
    _to("job_id", "jobs.id"),
    _to("lease_id", "leases.id", nullable=True),
    Column("code", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("at", Int64, nullable=False),
    Index(None, "job_id"),
    sqlite_strict=True,
)

# What people say of captions and make of them: rows are only ever added. A uuid is a row's identity in every database,
# so that importing it again adds nothing.
reviews = Table(
    "reviews",
    metadata,
    _id(),
    Column("uuid", Text, nullable=False, unique=True),
    _to("job_id", "jobs.id"),
    Column("reader", Text, nullable=False),
    Column("verdict", Text, nullable=False),
    Column("errors", Text, nullable=False, server_default=""),  # review.ERRORS, joined by commas
    Column("note", Text, nullable=False, server_default=""),
    Column("at", Int64, nullable=False),
    CheckConstraint("verdict IN ('correct', 'minor', 'major', 'unusable')", name="verdict"),
    Index(None, "job_id", "at", "uuid"),
    sqlite_strict=True,
)

# The latest edit of a caption, by `at` and then `uuid`, is its current text; without one, it is the machine's.
edits = Table(
    "edits",
    metadata,
    _id(),
    Column("uuid", Text, nullable=False, unique=True),
    _to("job_id", "jobs.id"),
    Column("reader", Text, nullable=False),
    Column("text", Text, nullable=False),
    Column("previous", Text, nullable=False),  # the text before
    _to("undoes", "edits.id", nullable=True),
    Column("act", Text),  # the same for all edits that one reader made at once; NULL for one made by itself
    Column("at", Int64, nullable=False),
    Index(None, "job_id", "at", "uuid"),
    _partial("ix_edits_act", "act", where="act IS NOT NULL"),
    sqlite_strict=True,
)

# Reader studies: rows are only ever added here too.
studies = Table(
    "studies",
    metadata,
    _id(),
    Column("name", Text, nullable=False, unique=True),
    Column("split", Text, nullable=False),
    Column("n_pictures", Int64, nullable=False),
    Column("n_readers", Int64, nullable=False),
    Column("seed", Int64, nullable=False),
    Column("form", Text, nullable=False),  # JSON of review.Form
    Column("created_at", Int64, nullable=False),
    sqlite_strict=True,
)

# One text that one reader is shown: which text is at which place is the key of the study.
study_items = Table(
    "study_items",
    metadata,
    _id(),
    _to("study_id", "studies.id"),
    Column("reader_number", Int64, nullable=False),
    Column("position", Int64, nullable=False),  # of the picture, in this reader's order
    Column("place", Int64, nullable=False),  # of the text, beside the others of the picture
    _to("image_id", "images.id"),
    Column("modality", Text, nullable=False),
    _to("job_id", "jobs.id", nullable=True),  # NULL: the original caption
    UniqueConstraint("study_id", "reader_number", "position", "place"),
    Index(None, "job_id"),
    sqlite_strict=True,
)

study_readers = Table(
    "study_readers",
    metadata,
    _to("study_id", "studies.id", primary_key=True),
    Column("reader_number", Int64, primary_key=True, autoincrement=False),
    Column("reader", Text, nullable=False),
    Column("joined_at", Int64, nullable=False),
    UniqueConstraint("study_id", "reader"),
    sqlite_strict=True,
)

# The latest row of a reader and position counts.
ratings = Table(
    "ratings",
    metadata,
    _id(),
    _to("study_id", "studies.id"),
    Column("reader_number", Int64, nullable=False),
    Column("position", Int64, nullable=False),
    Column("answers", Text, nullable=False),  # JSON of review.Answers
    Column("shown_at", Int64, nullable=False),
    Column("at", Int64, nullable=False),
    CheckConstraint("at >= shown_at", name="shown_at"),
    Index(None, "study_id", "reader_number", "position"),
    sqlite_strict=True,
)

unblindings = Table(
    "unblindings",
    metadata,
    _to("study_id", "studies.id", primary_key=True),
    Column("reader", Text, nullable=False),
    Column("n_missing", Int64, nullable=False),  # readings that were missing at the time
    Column("at", Int64, nullable=False),
    sqlite_strict=True,
)

# How many jobs of a run and split are in each state, and how many captions have each flag ("flag:loop"). Every
# transition updates them in its own transaction, so that `status` costs the same at any size. They are spread over
# slots so that workers on PostgreSQL do not wait for one row.
tallies = Table(
    "tallies",
    metadata,
    _to("run_id", "runs.id", primary_key=True),
    Column("split", Text, primary_key=True),
    Column("status", Text, primary_key=True),
    Column("slot", Int64, primary_key=True, autoincrement=False),
    Column("n", Int64, nullable=False),
    sqlite_strict=True,
)
