"""Telemetry of workers"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("workers", sa.Column("telemetry", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("workers", "telemetry")
