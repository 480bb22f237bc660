"""Projections: folds of events into read models that can be thrown away and rebuilt."""

from projections.building import Builder, Progress, ProjectionSettings, Workshop
from projections.definition import Projection, projection
from projections.errors import (
    BadProjection,
    BadRow,
    NameTaken,
    NotCaughtUp,
    NothingToSwapBack,
    NotThere,
    ProjectionError,
    RebuildStopped,
    RowUnreadable,
    SwapBlocked,
    TokenElsewhere,
)
from projections.feeds import CombinedFeed, LogFeed, TopicFeed, Wanted, open_feed
from projections.port import (
    LOG,
    BadRecord,
    Checkpoint,
    Feed,
    FeedPage,
    FeedRecord,
    Generation,
    Place,
    Rows,
    Snapshot,
    Status,
)
from projections.reading import Difference, ReadModel, Verified, verify
from projections.rebuild import rebuild, swap_back
from projections.rows import PostgresRows, SqliteRows, rows_for
from projections.runner import Doing, ProjectionRunner, RunnerState, what_to_do
from projections.waiting import wait_for

__all__ = [
    "LOG",
    "BadProjection",
    "BadRecord",
    "BadRow",
    "Builder",
    "Checkpoint",
    "CombinedFeed",
    "Difference",
    "Doing",
    "Feed",
    "FeedPage",
    "FeedRecord",
    "Generation",
    "LogFeed",
    "NameTaken",
    "NotCaughtUp",
    "NotThere",
    "NothingToSwapBack",
    "Place",
    "PostgresRows",
    "Progress",
    "Projection",
    "ProjectionError",
    "ProjectionRunner",
    "ProjectionSettings",
    "ReadModel",
    "RebuildStopped",
    "RowUnreadable",
    "Rows",
    "RunnerState",
    "Snapshot",
    "SqliteRows",
    "Status",
    "SwapBlocked",
    "TokenElsewhere",
    "TopicFeed",
    "Verified",
    "Wanted",
    "Workshop",
    "open_feed",
    "projection",
    "rebuild",
    "rows_for",
    "swap_back",
    "verify",
    "wait_for",
    "what_to_do",
]
