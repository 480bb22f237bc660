-- As in 0004, but that a type like `orders.order-placed.v*` stands for all versions of it.

-- Events above `after`, up to `upto` (a watermark of an EARLIER statement, or below it), of which all that is given
-- (not null) holds. It looks at every event in between, so the caller keeps that short. Planned anew on each call: the
-- conditions are few of many, and an index that somebody added for one of them is found.
create or replace function {schema}.read_chosen(
    after bigint, upto bigint, most bigint,
    types text[], categories text[], correlation text, since timestamptz, until timestamptz
)
returns table (
    pos bigint, id uuid, type text, key text, topic text, made_at timestamptz, data bytea, meta text,
    category text, stream text, version bigint
)
language plpgsql stable
set enable_seqscan = off set enable_bitmapscan = off as $$
declare any_version boolean := exists (select from unnest(types) as t(name) where right(t.name, 3) = '.v*');
begin
    return query execute
        'select e.position, e.id, e.type, e.key, e.topic, e.made_at, e.data, e.meta, e.category, e.stream, e.version
           from {schema}.events e where e.position > $1 and e.position <= $2'
        || case when types is null then ''
                when any_version then
                    ' and (e.type = any($4) or rtrim(e.type, ''0123456789'') || ''*'' = any($4))'
                else ' and e.type = any($4)' end
        || case when categories is null then '' else ' and e.category = any($5)' end
        || case when since is null then '' else ' and e.made_at >= $7' end
        || case when until is null then '' else ' and e.made_at < $8' end
        -- Most rows are told apart without parsing them.
        || case when correlation is null then ''
                else ' and strpos(e.meta, $6) > 0 and e.meta::json ->> ''correlation'' = $6' end
        || ' order by e.position limit $3'
    using after, upto, most, types, categories, correlation, since, until;
end $$;
