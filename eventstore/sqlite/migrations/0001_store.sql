-- The store of one service. Ids are 16 bytes, instants microseconds since 1970. Names are prefixed because the service's
-- own tables live in the same file.

-- `head` is the highest position ever drawn: a deleted tail is never drawn again. `epoch` rises after a restore.
CREATE TABLE foldbus_log (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    service TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    head INTEGER NOT NULL
);

-- `number` is the position of the stream's first event: short in the events' index, and unique by itself.
CREATE TABLE foldbus_streams (
    number INTEGER PRIMARY KEY,
    category TEXT NOT NULL,
    id TEXT NOT NULL,
    version INTEGER NOT NULL,
    UNIQUE (category, id)
);

CREATE TABLE foldbus_events (
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

-- Commands, replies and copies on their way out; deleted once they are published.
CREATE TABLE foldbus_outgoing (
    position INTEGER PRIMARY KEY,
    id BLOB NOT NULL,
    type TEXT NOT NULL,
    key TEXT NOT NULL,
    topic TEXT NOT NULL,
    data BLOB NOT NULL,
    time INTEGER NOT NULL,
    meta TEXT NOT NULL
);

-- `outcome` is the reply's, apart from it because a fence asks for nothing else.
CREATE TABLE foldbus_claims (
    consumer TEXT NOT NULL,
    message_id BLOB NOT NULL,
    key TEXT NOT NULL,
    state TEXT NOT NULL,
    outcome TEXT,
    reply TEXT,
    reply_data BLOB,
    claimed_at INTEGER NOT NULL,
    PRIMARY KEY (consumer, message_id)
) WITHOUT ROWID;

CREATE TABLE foldbus_watermarks (
    consumer_group TEXT NOT NULL,
    topic TEXT NOT NULL,
    partition INTEGER NOT NULL,
    next_offset INTEGER NOT NULL,
    PRIMARY KEY (consumer_group, topic, partition)
) WITHOUT ROWID;

-- `shown_at` is `due_at`, or the end of the lease of whoever was given the timer.
CREATE TABLE foldbus_timers (
    number INTEGER PRIMARY KEY,
    consumer TEXT NOT NULL,
    id BLOB NOT NULL,
    key TEXT NOT NULL,
    due_at INTEGER NOT NULL,
    shown_at INTEGER NOT NULL,
    envelope TEXT NOT NULL,
    data BLOB NOT NULL,
    UNIQUE (consumer, id)
);
CREATE INDEX foldbus_timers_due ON foldbus_timers (due_at, number);
CREATE INDEX foldbus_timers_shown ON foldbus_timers (shown_at);

CREATE TABLE foldbus_dead_letters (
    consumer TEXT NOT NULL,
    id BLOB NOT NULL,
    failed_at INTEGER NOT NULL,
    key BLOB,
    value BLOB,
    details TEXT NOT NULL,
    PRIMARY KEY (consumer, id)
);
CREATE INDEX foldbus_dead_letters_oldest ON foldbus_dead_letters (failed_at, id, consumer);

-- `until` is 0 for a lease that was given up.
CREATE TABLE foldbus_leases (
    name TEXT PRIMARY KEY,
    token INTEGER NOT NULL,
    until INTEGER NOT NULL,
    position INTEGER NOT NULL
) WITHOUT ROWID;
