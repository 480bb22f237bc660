"""Dead letters that were dealt with."""

from __future__ import annotations

from eventstore.postgres.migrations.script import run

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    run("0007_settled_letters.sql")


def downgrade() -> None:
    raise NotImplementedError("operators settle dead letters")
