"""Groups that operators paused, and what they did to groups."""

from __future__ import annotations

from eventstore.postgres.migrations.script import run

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    run("0010_flow.sql")


def downgrade() -> None:
    raise NotImplementedError("paused groups would run again")
