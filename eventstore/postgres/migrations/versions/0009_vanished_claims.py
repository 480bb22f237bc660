"""Claims that a redrive gave back while a commit looked at them."""

from __future__ import annotations

from eventstore.postgres.migrations.script import run

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    run("0009_vanished_claims.sql")


def downgrade() -> None:
    raise NotImplementedError("redriving dead letters needs it")
