"""Parked keys, their queues, and claims of effects."""

from __future__ import annotations

from eventstore.postgres.migrations.script import run

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    run("0011_parking.sql")
    run("0011_parked_commits.sql")


def downgrade() -> None:
    raise NotImplementedError("parked messages would be lost")
