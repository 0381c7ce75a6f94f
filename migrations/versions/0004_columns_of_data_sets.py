"""The columns that a data set was registered with"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("datasets", sa.Column("columns", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("datasets", "columns")
