"""What a fold needs of most events."""

from __future__ import annotations

from eventstore.postgres.migrations.script import run

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    run("0008_bodies.sql")


def downgrade() -> None:
    raise NotImplementedError("long streams are folded from it")
