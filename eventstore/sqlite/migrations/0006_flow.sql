-- What operators told the workers: the groups that stand still, and, for people, everything that was done to a group.
CREATE TABLE foldbus_pauses (
    consumer_group TEXT PRIMARY KEY,
    at INTEGER NOT NULL,
    made_by TEXT NOT NULL,
    reason TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE foldbus_flow_log (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    at INTEGER NOT NULL,
    consumer_group TEXT NOT NULL,
    what TEXT NOT NULL,
    made_by TEXT NOT NULL,
    reason TEXT NOT NULL
);
