-- Type and data of consecutive events of one stream, in their order: for folds that need no more. A small table has to be
-- looked up, too: see 0001_read.sql.
create function {schema}.read_bodies(in_category text, in_stream text, after bigint, upto bigint)
returns table (type text, data bytea)
language plpgsql stable
set enable_seqscan = off set enable_bitmapscan = off as $$
begin
    return query
    select e.type, e.data from {schema}.events e
     where e.category = in_category and e.stream = in_stream and e.version > after and e.version <= upto
     order by e.version;
end $$;
