"""The first schema"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
REAL = sa.Double().with_variant(sa.REAL(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "datasets",
        sa.Column("id", INT64, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("revision", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_datasets")),
        sa.UniqueConstraint("name", "revision", name=op.f("uq_datasets_name_revision")),
        sqlite_strict=True,
    )
    op.create_table(
        "workers",
        sa.Column("id", INT64, nullable=False),
        sa.Column("uuid", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", INT64, nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("engine", sa.Text(), nullable=False),
        sa.Column("versions", sa.Text(), nullable=False),
        sa.Column("self_check", sa.Text(), nullable=True),
        sa.Column("n_done", INT64, server_default="0", nullable=False),
        sa.Column("started_at", INT64, nullable=False),
        sa.Column("seen_at", INT64, nullable=False),
        sa.Column("stopped_at", INT64, nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
        sa.UniqueConstraint("uuid", name=op.f("uq_workers_uuid")),
        sqlite_strict=True,
    )
    op.create_index(op.f("ix_workers_seen_at"), "workers", ["seen_at"], unique=False)

    op.create_table(
        "runs",
        sa.Column("id", INT64, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("dataset_id", INT64, nullable=False),
        sa.Column("recipe", sa.Text(), nullable=False),
        sa.Column("recipe_hash", sa.Text(), nullable=False),
        sa.Column("resolved", sa.Text(), nullable=True),
        sa.Column("max_attempts", INT64, server_default="5", nullable=False),
        sa.Column("paused", INT64, server_default="0", nullable=False),
        sa.Column("created_at", INT64, nullable=False),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.id"], name=op.f("fk_runs_dataset_id_datasets")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
        sa.UniqueConstraint("name", name=op.f("uq_runs_name")),
        sqlite_strict=True,
    )
    op.create_table(
        "shards",
        sa.Column("id", INT64, nullable=False),
        sa.Column("dataset_id", INT64, nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("split", sa.Text(), nullable=False),
        sa.Column("n_rows", INT64, nullable=False),
        sa.Column("n_row_groups", INT64, nullable=False),
        sa.Column("size", INT64, nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.id"], name=op.f("fk_shards_dataset_id_datasets")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_shards")),
        sa.UniqueConstraint("dataset_id", "path", name=op.f("uq_shards_dataset_id_path")),
        sqlite_strict=True,
    )
    op.create_table(
        "images",
        sa.Column("id", INT64, nullable=False),
        sa.Column("dataset_id", INT64, nullable=False),
        sa.Column("split", sa.Text(), nullable=False),
        sa.Column("image_id", sa.Text(), nullable=False),
        sa.Column("shard_id", INT64, nullable=False),
        sa.Column("row_group", INT64, nullable=False),
        sa.Column("row_in_group", INT64, nullable=False),
        sa.Column("caption", sa.Text(), nullable=False),
        sa.Column("cui", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.id"], name=op.f("fk_images_dataset_id_datasets")),
        sa.ForeignKeyConstraint(["shard_id"], ["shards.id"], name=op.f("fk_images_shard_id_shards")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_images")),
        sa.UniqueConstraint("dataset_id", "split", "image_id", name=op.f("uq_images_dataset_id_split_image_id")),
        sqlite_strict=True,
    )
    op.create_table(
        "leases",
        sa.Column("id", INT64, nullable=False),
        sa.Column("worker_id", INT64, nullable=False),
        sa.Column("run_id", INT64, nullable=False),
        sa.Column("split", sa.Text(), nullable=False),
        sa.Column("lane", INT64, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("n_jobs", INT64, nullable=False),
        sa.Column("n_done", INT64, server_default="0", nullable=False),
        sa.Column("claimed_at", INT64, nullable=False),
        sa.Column("beat_at", INT64, nullable=False),
        sa.Column("expires_at", INT64, nullable=False),
        sa.Column("closed_at", INT64, nullable=True),
        sa.Column("load_ms", REAL, server_default="0", nullable=False),
        sa.Column("prepare_ms", REAL, server_default="0", nullable=False),
        sa.Column("prefill_ms", REAL, server_default="0", nullable=False),
        sa.Column("decode_ms", REAL, server_default="0", nullable=False),
        sa.Column("store_ms", REAL, server_default="0", nullable=False),
        sa.CheckConstraint("(state = 'open') = (closed_at IS NULL)", name=op.f("ck_leases_closed")),
        sa.CheckConstraint("state IN ('open', 'closed', 'released', 'expired')", name=op.f("ck_leases_state")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_leases_run_id_runs")),
        sa.ForeignKeyConstraint(["worker_id"], ["workers.id"], name=op.f("fk_leases_worker_id_workers")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_leases")),
        sqlite_autoincrement=True,
        sqlite_strict=True,
    )
    op.create_index("ix_leases_closed_at", "leases", ["closed_at"], unique=False)
    op.create_index(
        "ix_leases_expires_at",
        "leases",
        ["expires_at"],
        unique=False,
        sqlite_where=sa.text("state = 'open'"),
        postgresql_where=sa.text("state = 'open'"),
    )

    op.create_table(
        "tallies",
        sa.Column("run_id", INT64, nullable=False),
        sa.Column("split", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("slot", INT64, autoincrement=False, nullable=False),
        sa.Column("n", INT64, nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_tallies_run_id_runs")),
        sa.PrimaryKeyConstraint("run_id", "split", "status", "slot", name=op.f("pk_tallies")),
        sqlite_strict=True,
    )
    op.create_table(
        "jobs",
        sa.Column("id", INT64, nullable=False),
        sa.Column("run_id", INT64, nullable=False),
        sa.Column("image_id", INT64, nullable=False),
        sa.Column("split", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), server_default="pending", nullable=False),
        sa.Column("attempts", INT64, server_default="0", nullable=False),
        sa.Column("crashes", INT64, server_default="0", nullable=False),
        sa.Column("solo_crashes", INT64, server_default="0", nullable=False),
        sa.Column("lease_id", INT64, nullable=True),
        sa.Column("not_before", INT64, nullable=True),
        sa.Column("finished_at", INT64, nullable=True),
        sa.Column("checkpoint", INT64, nullable=True),
        sa.CheckConstraint("(status = 'leased') = (lease_id IS NOT NULL)", name=op.f("ck_jobs_lease")),
        sa.CheckConstraint("(status = 'waiting') = (not_before IS NOT NULL)", name=op.f("ck_jobs_not_before")),
        sa.CheckConstraint(
            "(status IN ('done', 'failed', 'cancelled')) = (finished_at IS NOT NULL)",
            name=op.f("ck_jobs_finished_at"),
        ),
        sa.CheckConstraint("checkpoint IS NULL OR status = 'done'", name=op.f("ck_jobs_checkpoint")),
        sa.CheckConstraint(
            "status IN ('pending', 'leased', 'waiting', 'done', 'failed', 'cancelled')",
            name=op.f("ck_jobs_status"),
        ),
        sa.ForeignKeyConstraint(["image_id"], ["images.id"], name=op.f("fk_jobs_image_id_images")),
        sa.ForeignKeyConstraint(["lease_id"], ["leases.id"], name=op.f("fk_jobs_lease_id_leases")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_jobs_run_id_runs")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
        sa.UniqueConstraint("run_id", "image_id", name=op.f("uq_jobs_run_id_image_id")),
        sqlite_strict=True,
    )
    op.create_index(
        "ix_jobs_checkpoint",
        "jobs",
        ["run_id", "split", "checkpoint"],
        unique=False,
        sqlite_where=sa.text("checkpoint IS NOT NULL"),
        postgresql_where=sa.text("checkpoint IS NOT NULL"),
    )
    op.create_index(
        "ix_jobs_due",
        "jobs",
        ["run_id", "split", "finished_at"],
        unique=False,
        sqlite_where=sa.text("status = 'done' AND checkpoint IS NULL"),
        postgresql_where=sa.text("status = 'done' AND checkpoint IS NULL"),
    )
    op.create_index(
        "ix_jobs_failed",
        "jobs",
        ["run_id", "split"],
        unique=False,
        sqlite_where=sa.text("status = 'failed'"),
        postgresql_where=sa.text("status = 'failed'"),
    )
    op.create_index(
        "ix_jobs_leased",
        "jobs",
        ["lease_id"],
        unique=False,
        sqlite_where=sa.text("lease_id IS NOT NULL"),
        postgresql_where=sa.text("lease_id IS NOT NULL"),
    )
    op.create_index(
        "ix_jobs_pending",
        "jobs",
        ["run_id", "split", "crashes", "id"],
        unique=False,
        sqlite_where=sa.text("status = 'pending'"),
        postgresql_where=sa.text("status = 'pending'"),
    )
    op.create_index(
        "ix_jobs_waiting",
        "jobs",
        ["not_before"],
        unique=False,
        sqlite_where=sa.text("status = 'waiting'"),
        postgresql_where=sa.text("status = 'waiting'"),
    )

    op.create_table(
        "captions",
        sa.Column("job_id", INT64, nullable=False),
        sa.Column("lease_id", INT64, nullable=True),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("flags", sa.Text(), server_default="", nullable=False),
        sa.Column("finish_reason", sa.Text(), nullable=True),
        sa.Column("prompt_tokens", INT64, nullable=True),
        sa.Column("new_tokens", INT64, nullable=True),
        sa.Column("processing_ms", REAL, nullable=True),
        sa.Column("latency_ms", REAL, nullable=True),
        sa.Column("batch_size", INT64, nullable=True),
        sa.Column("generated_at", INT64, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_captions_job_id_jobs")),
        sa.ForeignKeyConstraint(["lease_id"], ["leases.id"], name=op.f("fk_captions_lease_id_leases")),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_captions")),
        sqlite_strict=True,
    )
    op.create_table(
        "failures",
        sa.Column("id", INT64, nullable=False),
        sa.Column("job_id", INT64, nullable=False),
        sa.Column("lease_id", INT64, nullable=True),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("at", INT64, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_failures_job_id_jobs")),
        sa.ForeignKeyConstraint(["lease_id"], ["leases.id"], name=op.f("fk_failures_lease_id_leases")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_failures")),
        sqlite_strict=True,
    )
    op.create_index(op.f("ix_failures_job_id"), "failures", ["job_id"], unique=False)


def downgrade() -> None:
    for table in (
        "failures",
        "captions",
        "jobs",
        "tallies",
        "leases",
        "images",
        "shards",
        "runs",
        "workers",
        "datasets",
    ):
        op.drop_table(table)
