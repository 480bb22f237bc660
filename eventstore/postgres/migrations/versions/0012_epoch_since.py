"""When the log's epoch began."""

from __future__ import annotations

from eventstore.postgres.migrations.script import run

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    run("0012_epoch_since.sql")


def downgrade() -> None:
    raise NotImplementedError("requests answered before a restore would be skipped")
