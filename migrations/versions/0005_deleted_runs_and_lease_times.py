"""Deleted runs, and workers' lease times"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.add_column("runs", sa.Column("deleted_at", INT64, nullable=True))
    op.add_column("workers", sa.Column("lease_ttl_ms", INT64, nullable=False, server_default="120000"))


def downgrade() -> None:
    op.drop_column("workers", "lease_ttl_ms")
    op.drop_column("runs", "deleted_at")
