"""Parts of splits, and where merged leases were made"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "parts",
        sa.Column("run_id", INT64, nullable=False),
        sa.Column("split", sa.Text(), nullable=False),
        sa.Column("number", INT64, nullable=False, autoincrement=False),
        sa.Column("n_parts", INT64, nullable=False, autoincrement=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_parts_run_id_runs")),
        sa.PrimaryKeyConstraint("run_id", "split", "number", "n_parts", name=op.f("pk_parts")),
        sqlite_strict=True,
    )
    op.add_column("leases", sa.Column("origin_uuid", sa.Text(), nullable=True))
    op.add_column("leases", sa.Column("origin_id", INT64, nullable=True))
    # An index rather than a constraint, for which SQLite would have to build the table anew. Most leases are not in it.
    op.create_index(
        "ix_leases_origin",
        "leases",
        ["origin_uuid", "origin_id"],
        unique=True,
        sqlite_where=sa.text("origin_id IS NOT NULL"),
        postgresql_where=sa.text("origin_id IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_index("ix_leases_origin", "leases")
    op.drop_column("leases", "origin_id")
    op.drop_column("leases", "origin_uuid")
    op.drop_table("parts")
