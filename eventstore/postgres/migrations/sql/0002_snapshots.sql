-- At most one snapshot per stream, for the code that `schema` names. While events up to version `truncated_upto` are gone
-- from the stream, this row is all that is left of them: whoever truncates locks the row, checks its version and sets
-- it, in the same transaction; then the snapshot is neither dropped nor replaced by one below that version.
--
-- Names compare by their bytes, so that pages come in one order on every server.
create table {schema}.snapshots (
    category text collate "C" not null,
    id text collate "C" not null,
    version bigint not null,
    schema text not null,
    state bytea not null,
    made_at timestamptz not null,
    truncated_upto bigint not null default 0,
    primary key (category, id)
) with (fillfactor = 70);

-- Each unless the stream is not that far, or a better one is there; answers how many. Sorted by the caller. What decides
-- stands in the WHERE of DO UPDATE: it is asked of the row as it is when its lock was won.
create function {schema}.save_snapshots(
    categories text[], ids text[], versions bigint[], schemas text[], states bytea[], made timestamptz[]
) returns bigint
language plpgsql volatile
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare stored bigint;
begin
    insert into {schema}.snapshots as s (category, id, version, schema, state, made_at)
    select w.category, w.id, w.version, w.schema, w.state, w.made_at
      from unnest(categories, ids, versions, schemas, states, made) with ordinality
           as w(category, id, version, schema, state, made_at, ord)
     where exists (select from {schema}.streams t
                    where t.category = w.category and t.id = w.id and t.version >= w.version)
     order by w.ord
    on conflict (category, id) do update
       set version = excluded.version, schema = excluded.schema, state = excluded.state, made_at = excluded.made_at
     where (s.schema <> excluded.schema or s.version <= excluded.version) and excluded.version >= s.truncated_upto;
    get diagnostics stored = row_count;
    return stored;
end $$;

-- As `load` of four, with a snapshot of exactly the schema given (null: none) that is above `after`: a row without id,
-- its state as data, its version as version; the events begin after it. One statement, so both are of one moment.
create function {schema}.load(categories text[], ids text[], after bigint[], most bigint[], schemas text[])
returns table (
    ord bigint, stream_version bigint,
    id uuid, type text, key text, topic text, made_at timestamptz, data bytea, meta text, version bigint, pos bigint
)
language plpgsql stable
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
begin
    return query
    select w.ord, coalesce(s.version, 0), e.id, e.type, e.key, e.topic, e.made_at, e.data, e.meta, e.version, e.position
      from unnest(categories, ids, after, most, schemas) with ordinality
           as w(category, stream, after, most, schema, ord)
      left join lateral (
            select t.version from {schema}.streams t where t.category = w.category and t.id = w.stream offset 0
      ) s on true
      left join lateral (
            select t.version, t.state, t.made_at from {schema}.snapshots t
             where t.category = w.category and t.id = w.stream and t.schema = w.schema and t.version > w.after offset 0
      ) p on true
      left join lateral (
            select null::uuid as id, null::text as type, null::text as key, null::text as topic, p.made_at,
                   p.state as data, null::text as meta, p.version, null::bigint as position
             where p.version is not null
            union all
            (select t.id, t.type, t.key, t.topic, t.made_at, t.data, t.meta, t.version, t.position
               from {schema}.events t
              where t.category = w.category and t.stream = w.stream and t.version > coalesce(p.version, w.after)
              order by t.version limit w.most)
      ) e on true
     order by w.ord, e.version;
end $$;
