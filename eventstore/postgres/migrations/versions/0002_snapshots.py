"""Snapshots, and `load` that brings a snapshot and the events after it in one round trip."""

from __future__ import annotations

from eventstore.postgres.migrations.script import run

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    run("0002_snapshots.sql")


def downgrade() -> None:
    raise NotImplementedError("events are not taken back: restore a backup")
