-- Parking and effects: see `eventstore/parking.py`. A parked key has a row as long as its queue holds a message.
--
-- `due_at` is when its head is tried again, null while it is held; `shown_at` is that or the end of the lease of whoever
-- was given the head. `token` rises with every change of hands.
CREATE TABLE foldbus_parked_keys (
    consumer TEXT NOT NULL,
    key TEXT NOT NULL,
    since INTEGER NOT NULL,
    due_at INTEGER,
    shown_at INTEGER,
    token INTEGER NOT NULL,
    PRIMARY KEY (consumer, key)
) WITHOUT ROWID;
CREATE INDEX foldbus_parked_keys_shown ON foldbus_parked_keys (shown_at);

-- Columns as `eventstore/queued.py` makes them. `number` is the place in all queues, never used again.
CREATE TABLE foldbus_parked (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    consumer TEXT NOT NULL,
    key TEXT NOT NULL,
    message_id BLOB NOT NULL,
    parked_at INTEGER NOT NULL,
    envelope TEXT NOT NULL,
    data BLOB NOT NULL,
    details TEXT NOT NULL,
    record_key BLOB,
    record_value BLOB,
    failure TEXT,
    UNIQUE (consumer, message_id)
);
CREATE INDEX foldbus_parked_queue ON foldbus_parked (consumer, key, number);

-- Messages whose handler may have called the outside world and is not known to be through with it. A row stays when the
-- message is parked, given up or redriven, and goes when it is done.
CREATE TABLE foldbus_effects (
    consumer TEXT NOT NULL,
    message_id BLOB NOT NULL,
    token INTEGER NOT NULL,
    lease_until INTEGER NOT NULL,
    PRIMARY KEY (consumer, message_id)
) WITHOUT ROWID;
