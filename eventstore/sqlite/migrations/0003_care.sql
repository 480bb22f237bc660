-- Archived streams: their events stand apart, the stream's version is stored negative, so that no expected version fits.
ALTER TABLE foldbus_streams ADD COLUMN archived_at INTEGER;

CREATE TABLE foldbus_archived (
    position INTEGER PRIMARY KEY,
    stream INTEGER NOT NULL,
    version INTEGER NOT NULL,
    id BLOB NOT NULL,
    type TEXT NOT NULL,
    key TEXT NOT NULL,
    topic TEXT,
    data BLOB NOT NULL,
    time INTEGER NOT NULL,
    meta TEXT NOT NULL,
    UNIQUE (stream, version)
);

-- The oldest schema number that this code's predecessors may want and still work: see `eventstore/sqlite/migrations.py`.
ALTER TABLE foldbus_log ADD COLUMN oldest INTEGER NOT NULL DEFAULT 3;
