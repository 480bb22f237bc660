"""A type of which any version is wanted."""

from __future__ import annotations

from eventstore.postgres.migrations.script import run

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    run("0006_any_version.sql")


def downgrade() -> None:
    raise NotImplementedError("readers ask for any version")
