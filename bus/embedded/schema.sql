-- The embedded bus: every topic and every group of one machine in one SQLite file (WAL).
--
-- A *lane* is one partition of one topic. Records are clustered by lane: a record's id is (lane << 40) + offset, so that
-- reading on in a partition is one range of the table's own b-tree, without an index.

-- Raised by every transaction that publishes or changes a group; `touched` columns hold its value, so that a reader
-- asks for what changed since it last looked, and nothing else.
CREATE TABLE IF NOT EXISTS clock (
    id    INTEGER PRIMARY KEY CHECK (id = 1),
    value INTEGER NOT NULL
);
INSERT OR IGNORE INTO clock (id, value) VALUES (1, 0);

-- Never altered once created: processes keep them in memory.
CREATE TABLE IF NOT EXISTS topics (
    id          INTEGER PRIMARY KEY,
    name        TEXT    NOT NULL UNIQUE,
    partitions  INTEGER NOT NULL CHECK (partitions > 0),
    retention_s REAL,
    compact     INTEGER NOT NULL,
    max_bytes   INTEGER NOT NULL
);

CREATE TABLE IF NOT EXISTS lanes (
    id           INTEGER PRIMARY KEY,
    topic_id     INTEGER NOT NULL REFERENCES topics (id),
    partition    INTEGER NOT NULL,
    first_offset INTEGER NOT NULL DEFAULT 0,
    next_offset  INTEGER NOT NULL DEFAULT 0,
    touched      INTEGER NOT NULL DEFAULT 0,
    UNIQUE (topic_id, partition)
);
CREATE INDEX IF NOT EXISTS lanes_touched ON lanes (touched);

CREATE TABLE IF NOT EXISTS records (
    id      INTEGER PRIMARY KEY,  -- (lane << 40) + offset
    time_us INTEGER NOT NULL,     -- since the epoch, UTC
    key     BLOB,
    value   BLOB,
    headers BLOB                  -- packed, see log.py; NULL: none
);

CREATE TABLE IF NOT EXISTS consumer_groups (
    id      INTEGER PRIMARY KEY,
    name    TEXT    NOT NULL UNIQUE,
    touched INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS consumer_groups_touched ON consumer_groups (touched);

-- Who is alive. `alive_until` is on the machine's monotonic clock, which all its processes share; after a restart of the
-- machine old values lie further ahead than `session_s`, which no living member's ever does.
CREATE TABLE IF NOT EXISTS members (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice: an old member cannot be taken for a new one
    group_id    INTEGER NOT NULL REFERENCES consumer_groups (id),
    topics      TEXT    NOT NULL,                   -- JSON array of topic ids
    alive_until REAL    NOT NULL,
    session_s   REAL    NOT NULL,
    rebalance_s REAL    NOT NULL
);

-- A lane in a group. `owner` holds it now, `target` ought to; where they differ the owner drains and lets go, then the
-- target takes it and raises the epoch.
CREATE TABLE IF NOT EXISTS shares (
    group_id  INTEGER NOT NULL REFERENCES consumer_groups (id),
    lane      INTEGER NOT NULL REFERENCES lanes (id),
    epoch     INTEGER NOT NULL DEFAULT 0,
    owner     INTEGER,
    target    INTEGER,
    asked_at  REAL,     -- when the owner was asked to let go
    committed INTEGER,  -- the next offset to be read
    PRIMARY KEY (group_id, lane)
) WITHOUT ROWID;
