"""Perceptual hashes of pictures"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "image_hashes",
        sa.Column("image_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("algorithm", sa.Text(), nullable=False),
        sa.Column("hash", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["image_id"], ["images.id"], name=op.f("fk_image_hashes_image_id_images")),
        sa.PrimaryKeyConstraint("image_id", "algorithm", name=op.f("pk_image_hashes")),
        sqlite_strict=True,
    )


def downgrade() -> None:
    op.drop_table("image_hashes")
