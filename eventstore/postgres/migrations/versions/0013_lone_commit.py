"""The floor is locked without a query."""

from __future__ import annotations

from eventstore.postgres.migrations.script import run

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    run("0013_lone_commit.sql")


def downgrade() -> None:
    raise NotImplementedError("older code works with these functions, too")
