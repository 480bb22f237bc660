-- When the log's epoch began; null for the first one. What was sent before may have been answered by what a restore took
-- back.
alter table {schema}.log add column epoch_since timestamptz;
