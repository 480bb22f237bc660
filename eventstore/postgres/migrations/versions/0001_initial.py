"""Streams, the log with its floor lock, claims, timers, dead letters, leases; and the functions on them."""

from __future__ import annotations

from eventstore.postgres.migrations.script import run

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("0001_tables.sql", "0001_floor_lock.sql", "0001_read.sql", "0001_commit.sql"):
        run(name)


def downgrade() -> None:
    raise NotImplementedError("events are not taken back: restore a backup")
