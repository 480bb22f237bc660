"""`commit_calls`: the units of several calls in one statement, as composite values."""

from __future__ import annotations

from eventstore.postgres.migrations.script import run

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    run("0005_commit_calls.sql")


def downgrade() -> None:
    raise NotImplementedError("events are not taken back: restore a backup")
