"""Stored scores of captions"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "scores",
        sa.Column("job_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("metric", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["captions.job_id"], name=op.f("fk_scores_job_id_captions")),
        sa.PrimaryKeyConstraint("job_id", "metric", name=op.f("pk_scores")),
        sqlite_strict=True,
    )


def downgrade() -> None:
    op.drop_table("scores")
