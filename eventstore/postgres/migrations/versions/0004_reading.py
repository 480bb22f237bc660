"""Chosen events, parts of streams, the list of streams; names compare by their bytes."""

from __future__ import annotations

from eventstore.postgres.migrations.script import run

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    run("0004_reading.sql")


def downgrade() -> None:
    raise NotImplementedError("names are compared in one way only")
