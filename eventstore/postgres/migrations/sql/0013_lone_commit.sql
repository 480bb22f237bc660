-- A lone append is cheaper by some of the server's time: the floor (0001_floor_lock.sql) is locked by an expression, which
-- plpgsql evaluates without a query, in `commit_one` and in the trigger of both tables. Otherwise `commit_one` is as in 0011.
--
-- The sequence's value is null when nothing was drawn yet, or (since version 17) when it may not be read: a floor of 0 is
-- safe, no lock would not be.

create or replace function {schema}.lock_floor_before_insert() returns trigger language plpgsql volatile as $$
begin
    if pg_advisory_xact_lock_shared(
        ({log}::bigint << 48) | coalesce(pg_sequence_last_value('{schema}.position'::regclass), 0)) is null then
    end if;
    return null;
end $$;

create or replace function {schema}.commit_one(
    c_consumer text, c_id uuid, c_key text, c_state smallint, c_effect boolean,
    s_category text, s_id text, s_expected bigint, s_version bigint,
    e_id uuid, e_type text, e_key text, e_topic text, e_time timestamptz, e_data bytea, e_meta text,
    o_id uuid, o_type text, o_key text, o_topic text, o_time timestamptz, o_data bytea, o_meta text,
    p_id uuid, p_type text, p_key text, p_topic text, p_time timestamptz, p_data bytea, p_meta text,
    r_document text, r_data bytea,
    out written boolean, out at bigint
)
language plpgsql volatile as $$
declare made_up boolean; last_public bigint := 0;
begin
    written := false;
    at := 0;
    if c_consumer is not null then
        insert into {schema}.claims (consumer, message_id, key, state, effect)
        values (c_consumer, c_id, c_key, c_state, c_effect) on conflict do nothing;
        if not found then
            return;
        end if;
        -- A statement after the claim was won: see commit_calls.
        if exists (select from {schema}.parked_keys) and {schema}.is_parked(c_consumer, c_key) then
            execute 'delete from {schema}.claims where consumer = $1 and message_id = $2' using c_consumer, c_id;
            return;
        end if;
    end if;
    if s_category is not null then
        insert into {schema}.streams as s (category, id, previous, version)
        values (s_category, s_id, s_expected, s_version)
        on conflict (category, id) do update set version = excluded.version, previous = excluded.previous
             where s.version = excluded.previous
        returning s.xmax = 0 and s.previous > 0 into made_up;
        if made_up or not found then
            -- Rare, so planned anew each time: a plan cached on a small table would scan it when it has grown.
            if made_up then
                execute 'delete from {schema}.streams where category = $1 and id = $2' using s_category, s_id;
            end if;
            execute 'delete from {schema}.claims where consumer = $1 and message_id = $2' using c_consumer, c_id;
            return;
        end if;
    end if;
    written := true;
    if e_id is not null or o_id is not null or p_id is not null then
        -- Here, too: whoever calls may have turned triggers off (session_replication_role).
        if pg_advisory_xact_lock_shared(
            ({log}::bigint << 48) | coalesce(pg_sequence_last_value('{schema}.position'::regclass), 0)) is null then
        end if;
    end if;
    if e_id is not null then
        insert into {schema}.events (position, category, stream, version, id, type, key, topic, made_at, data, meta)
        values (nextval('{schema}.position'), s_category, s_id, s_version,
                e_id, e_type, e_key, e_topic, e_time, e_data, e_meta)
        returning position into at;
        if e_topic is not null then
            last_public := at;
        end if;
    end if;
    if o_id is not null then
        insert into {schema}.outgoing (position, id, type, key, topic, made_at, data, meta)
        values (nextval('{schema}.position'), o_id, o_type, o_key, o_topic, o_time, o_data, o_meta);
    end if;
    if p_id is not null then
        insert into {schema}.outgoing
            (position, id, type, key, topic, made_at, data, meta, last_event, last_public)
        values (nextval('{schema}.position'), p_id, p_type, p_key, p_topic, p_time, p_data, p_meta, at, last_public);
    end if;
    if r_document is not null then
        insert into {schema}.replies (consumer, message_id, document, data, last_event, last_public)
        values (c_consumer, c_id, r_document, r_data, at, last_public);
    end if;
end $$;
