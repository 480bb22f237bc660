"""Streams, the log with its floor lock, claims, timers, dead letters, leases; and the functions on them."""

from __future__ import annotations

from eventstore.postgres.migrations.script import run

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("tables", "floor_lock", "read", "commit", "commit_one"):
        run(f"0001_{name}.sql")


def downgrade() -> None:
    raise NotImplementedError("events are not taken back: restore a backup")
