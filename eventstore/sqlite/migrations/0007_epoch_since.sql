-- When the log's epoch began, in microseconds; NULL for the first one. What was sent before may have been answered by
-- what a restore took back.
ALTER TABLE foldbus_log ADD COLUMN epoch_since INTEGER;
