"""Archived streams, and which code may use a schema that is newer than it."""

from __future__ import annotations

from eventstore.postgres.migrations.script import run

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    run("0003_care.sql")


def downgrade() -> None:
    raise NotImplementedError("events are not taken back: restore a backup")
