"""Reviews, edits and reader studies"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _int(name: str, *, nullable: bool = False, **options: Any) -> sa.Column[int]:
    return sa.Column(name, INT64, nullable=nullable, **options)


def _text(name: str, *, nullable: bool = False, **options: Any) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), nullable=nullable, **options)


def _to(table: str, column: str, target: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [f"{target}.id"], name=op.f(f"fk_{table}_{column}_{target}"))


def upgrade() -> None:
    op.create_table(
        "reviews",
        _int("id"),
        _text("uuid"),
        _int("job_id"),
        _text("reader"),
        _text("verdict"),
        _text("errors", server_default=""),
        _text("note", server_default=""),
        _int("at"),
        sa.CheckConstraint("verdict IN ('correct', 'minor', 'major', 'unusable')", name=op.f("ck_reviews_verdict")),
        _to("reviews", "job_id", "jobs"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_reviews")),
        sa.UniqueConstraint("uuid", name=op.f("uq_reviews_uuid")),
        sqlite_strict=True,
    )
    op.create_index(op.f("ix_reviews_job_id_at_uuid"), "reviews", ["job_id", "at", "uuid"])
    op.create_table(
        "edits",
        _int("id"),
        _text("uuid"),
        _int("job_id"),
        _text("reader"),
        _text("text"),
        _text("previous"),
        _int("undoes", nullable=True),
        _text("act", nullable=True),
        _int("at"),
        _to("edits", "job_id", "jobs"),
        _to("edits", "undoes", "edits"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_edits")),
        sa.UniqueConstraint("uuid", name=op.f("uq_edits_uuid")),
        sqlite_strict=True,
    )
    op.create_index(op.f("ix_edits_job_id_at_uuid"), "edits", ["job_id", "at", "uuid"])
    op.create_index(
        "ix_edits_act",
        "edits",
        ["act"],
        sqlite_where=sa.text("act IS NOT NULL"),
        postgresql_where=sa.text("act IS NOT NULL"),
    )
    op.create_table(
        "studies",
        _int("id"),
        _text("name"),
        _text("split"),
        _int("n_pictures"),
        _int("n_readers"),
        _int("seed"),
        _text("form"),
        _int("created_at"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_studies")),
        sa.UniqueConstraint("name", name=op.f("uq_studies_name")),
        sqlite_strict=True,
    )
    op.create_table(
        "study_items",
        _int("id"),
        _int("study_id"),
        _int("reader_number"),
        _int("position"),
        _int("place"),
        _int("image_id"),
        _text("modality"),
        _int("job_id", nullable=True),
        _to("study_items", "study_id", "studies"),
        _to("study_items", "image_id", "images"),
        _to("study_items", "job_id", "jobs"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_study_items")),
        sa.UniqueConstraint(
            *("study_id", "reader_number", "position", "place"),
            name=op.f("uq_study_items_study_id_reader_number_position_place"),
        ),
        sqlite_strict=True,
    )
    op.create_index(op.f("ix_study_items_job_id"), "study_items", ["job_id"])
    op.create_table(
        "study_readers",
        _int("study_id"),
        _int("reader_number", autoincrement=False),
        _text("reader"),
        _int("joined_at"),
        _to("study_readers", "study_id", "studies"),
        sa.PrimaryKeyConstraint("study_id", "reader_number", name=op.f("pk_study_readers")),
        sa.UniqueConstraint("study_id", "reader", name=op.f("uq_study_readers_study_id_reader")),
        sqlite_strict=True,
    )
    op.create_table(
        "ratings",
        _int("id"),
        _int("study_id"),
        _int("reader_number"),
        _int("position"),
        _text("answers"),
        _int("shown_at"),
        _int("at"),
        sa.CheckConstraint("at >= shown_at", name=op.f("ck_ratings_shown_at")),
        _to("ratings", "study_id", "studies"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ratings")),
        sqlite_strict=True,
    )
    op.create_index(
        op.f("ix_ratings_study_id_reader_number_position"), "ratings", ["study_id", "reader_number", "position"]
    )
    op.create_table(
        "unblindings",
        _int("study_id"),
        _text("reader"),
        _int("n_missing"),
        _int("at"),
        _to("unblindings", "study_id", "studies"),
        sa.PrimaryKeyConstraint("study_id", name=op.f("pk_unblindings")),
        sqlite_strict=True,
    )


def downgrade() -> None:
    for table in ("unblindings", "ratings", "study_readers", "study_items", "studies", "edits", "reviews"):
        op.drop_table(table)
