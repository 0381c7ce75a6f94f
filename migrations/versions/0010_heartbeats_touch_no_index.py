"""Without the index of workers by when they were seen, which every heartbeat changed"""

from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.drop_index("ix_workers_seen_at", "workers")


def downgrade() -> None:
    op.create_index("ix_workers_seen_at", "workers", ["seen_at"])
