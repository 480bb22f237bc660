-- Dead letters that somebody dealt with. A row moves here from foldbus_dead_letters, which holds the open ones alone; a
-- message that dies again after a redrive is here once for each time. `number` rises with each settling.
CREATE TABLE foldbus_settled_letters (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    consumer TEXT NOT NULL,
    id BLOB NOT NULL,
    failed_at INTEGER NOT NULL,
    key BLOB,
    value BLOB,
    details TEXT NOT NULL,
    settled_at INTEGER NOT NULL,
    settled_as TEXT NOT NULL,
    settled_by TEXT NOT NULL,
    reason TEXT NOT NULL
);
CREATE INDEX foldbus_settled_letters_of ON foldbus_settled_letters (id, consumer);
