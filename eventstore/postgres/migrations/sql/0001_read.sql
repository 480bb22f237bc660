-- Reading. The functions pin their plans to index lookups in the order written: PostgreSQL caches the plan of a
-- prepared statement, and one cached while a table was nearly empty scans the whole of it long after it has grown.

-- One row per event of each wanted stream, at least one per stream (its version; the event's columns are null).
create function {schema}.load(categories text[], ids text[], after bigint[], most bigint[])
returns table (
    ord bigint, stream_version bigint,
    id uuid, type text, key text, topic text, made_at timestamptz, data bytea, meta text, version bigint, pos bigint
)
language plpgsql stable
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
begin
    return query
    select w.ord, coalesce(s.version, 0), e.id, e.type, e.key, e.topic, e.made_at, e.data, e.meta, e.version, e.position
      from unnest(categories, ids, after, most) with ordinality as w(category, stream, after, most, ord)
      left join lateral (
            select t.version from {schema}.streams t where t.category = w.category and t.id = w.stream offset 0
      ) s on true
      left join lateral (
            select * from {schema}.events t
             where t.category = w.category and t.stream = w.stream and t.version > w.after
             order by t.version limit w.most
      ) e on true
     order by w.ord, e.version;
end $$;

-- Events in position order; rows only up to a watermark taken by an EARLIER statement.
create function {schema}.read_events(after bigint, upto bigint, most bigint)
returns table (
    pos bigint, id uuid, type text, key text, topic text, made_at timestamptz, data bytea, meta text,
    category text, stream text, version bigint
)
language plpgsql stable
set enable_seqscan = off set enable_bitmapscan = off as $$
begin
    return query
    select e.position, e.id, e.type, e.key, e.topic, e.made_at, e.data, e.meta, e.category, e.stream, e.version
      from {schema}.events e where e.position > after and e.position <= upto order by e.position limit most;
end $$;

-- The same, merged with outgoing messages.
create function {schema}.read_log(after bigint, upto bigint, most bigint)
returns table (
    pos bigint, id uuid, type text, key text, topic text, made_at timestamptz, data bytea, meta text,
    category text, stream text, version bigint, last_event bigint, last_public bigint
)
language plpgsql stable
set enable_seqscan = off set enable_bitmapscan = off as $$
begin
    return query
    select * from (
        (select e.position as at, e.id, e.type, e.key, e.topic, e.made_at, e.data, e.meta, e.category, e.stream,
                e.version, null::bigint, null::bigint
           from {schema}.events e where e.position > after and e.position <= upto order by e.position limit most)
        union all
        (select o.position, o.id, o.type, o.key, o.topic, o.made_at, o.data, o.meta, null, null, null,
                o.last_event, o.last_public
           from {schema}.outgoing o where o.position > after and o.position <= upto order by o.position limit most)
    ) merged order by at limit most;
end $$;

-- What became of each id; state 0: nothing is known of it. The reply's columns are null when there is none.
create function {schema}.examine(who text, ids uuid[])
returns table (ord bigint, state smallint, document text, data bytea, last_event bigint, last_public bigint)
language plpgsql stable
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
begin
    return query
    select k.ord, coalesce(c.state, 0::smallint), r.document, r.data, r.last_event, r.last_public
      from unnest(ids) with ordinality as k(id, ord)
      left join lateral (select t.state from {schema}.claims t
          where t.consumer = who and t.message_id = k.id offset 0) c on true
      left join lateral (select t.* from {schema}.replies t
          where t.consumer = who and t.message_id = k.id offset 0) r on true
     order by k.ord;
end $$;
