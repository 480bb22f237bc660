-- Reading chosen events, parts of streams, and the list of streams.

-- Names compare by their bytes: the list of streams comes in one order on every server, the primary key gives it, an
-- append compares names without the server's locale, and an update of the system's locales spoils no index. No table
-- is rewritten, their indexes are built anew.
alter table {schema}.streams alter column category type text collate "C", alter column id type text collate "C";
alter table {schema}.events alter column category type text collate "C", alter column stream type text collate "C";
alter table {schema}.archived alter column category type text collate "C", alter column stream type text collate "C";

-- Events above `after`, up to `upto` (a watermark of an EARLIER statement, or below it), of which all that is given
-- (not null) holds. It looks at every event in between, so the caller keeps that short. Planned anew on each call: the
-- conditions are few of many, and an index that somebody added for one of them is found.
create function {schema}.read_chosen(
    after bigint, upto bigint, most bigint,
    types text[], categories text[], correlation text, since timestamptz, until timestamptz
)
returns table (
    pos bigint, id uuid, type text, key text, topic text, made_at timestamptz, data bytea, meta text,
    category text, stream text, version bigint
)
language plpgsql stable
set enable_seqscan = off set enable_bitmapscan = off as $$
begin
    return query execute
        'select e.position, e.id, e.type, e.key, e.topic, e.made_at, e.data, e.meta, e.category, e.stream, e.version
           from {schema}.events e where e.position > $1 and e.position <= $2'
        || case when types is null then '' else ' and e.type = any($4)' end
        || case when categories is null then '' else ' and e.category = any($5)' end
        || case when since is null then '' else ' and e.made_at >= $7' end
        || case when until is null then '' else ' and e.made_at < $8' end
        -- Most rows are told apart without parsing them.
        || case when correlation is null then ''
                else ' and strpos(e.meta, $6) > 0 and e.meta::json ->> ''correlation'' = $6' end
        || ' order by e.position limit $3'
    using after, upto, most, types, categories, correlation, since, until;
end $$;

-- The first `most` events of one stream above a position. Positions rise with versions, so the version to begin at is
-- found by halving; versions may be missing at the beginning of a stream only.
create function {schema}.read_stream_after(in_category text, in_stream text, after bigint, upto bigint, most bigint)
returns table (
    pos bigint, id uuid, type text, key text, topic text, made_at timestamptz, data bytea, meta text,
    category text, stream text, version bigint
)
language plpgsql stable
set enable_seqscan = off set enable_bitmapscan = off as $$
declare low bigint := 0; high bigint := 0; middle bigint; at record;  -- versions up to `low` are not above `after`
begin
    if after > 0 then
        select e.version into high from {schema}.events e
         where e.category = in_category and e.stream = in_stream order by e.version desc limit 1;
    end if;
    while low < high loop
        middle := (low + high + 1) / 2;
        select e.version, e.position into at from {schema}.events e
         where e.category = in_category and e.stream = in_stream and e.version >= middle order by e.version limit 1;
        if at.position <= after then
            low := at.version;
        else
            high := middle - 1;
        end if;
    end loop;
    return query
    select e.position, e.id, e.type, e.key, e.topic, e.made_at, e.data, e.meta, e.category, e.stream, e.version
      from {schema}.events e
     where e.category = in_category and e.stream = in_stream and e.version > low and e.position <= upto
     order by e.version limit most;
end $$;

-- One row per event, at least one (the stream's version; the event's columns are null).
create function {schema}.read_stream(
    in_category text, in_stream text, after bigint, upto bigint, backward boolean, most bigint
)
returns table (
    stream_version bigint,
    id uuid, type text, key text, topic text, made_at timestamptz, data bytea, meta text, version bigint, pos bigint
)
language plpgsql stable
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
begin
    return query execute format(
        'select coalesce(s.version, 0), e.id, e.type, e.key, e.topic, e.made_at, e.data, e.meta, e.version, e.position
           from (select 1) one
           left join lateral (
                 select t.version from {schema}.streams t where t.category = $1 and t.id = $2 offset 0) s on true
           left join lateral (
                 select * from {schema}.events t
                  where t.category = $1 and t.stream = $2 and t.version > $3 and t.version <= $4
                  order by t.version %1$s limit $5
           ) e on true
          order by e.version %1$s', case when backward then 'desc' else 'asc' end)
    using in_category, in_stream, after, upto, most;
end $$;

-- `kept_from` is the first version that is stored. An archived stream's version is stored negative.
create function {schema}.list_streams(of_category text, after_category text, after_id text, most bigint)
returns table (category text, id text, version bigint, kept_from bigint, archived_at timestamptz)
language plpgsql stable
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
begin
    return query execute
        'select s.category, s.id, abs(s.version), coalesce(p.truncated_upto, 0) + 1, s.archived_at
           from {schema}.streams s
           left join {schema}.snapshots p on p.category = s.category and p.id = s.id
          where s.version <> 0'
        || case when of_category is null then '' else ' and s.category = $1' end
        || case when after_category is null then '' else ' and (s.category, s.id) > ($2, $3)' end
        || ' order by s.category, s.id limit $4'
    using of_category, after_category, after_id, most;
end $$;
