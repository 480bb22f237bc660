-- At most one snapshot per stream, for the code that `schema` names. While events up to version `truncated_upto` are gone
-- from the stream, this row is all that is left of them: whoever truncates sets it, in the same transaction; then the
-- snapshot is neither dropped nor replaced by one below that version.
CREATE TABLE foldbus_snapshots (
    category TEXT NOT NULL,
    id TEXT NOT NULL,
    version INTEGER NOT NULL,
    schema TEXT NOT NULL,
    state BLOB NOT NULL,
    made_at INTEGER NOT NULL,
    truncated_upto INTEGER NOT NULL DEFAULT 0,
    UNIQUE (category, id)
);
