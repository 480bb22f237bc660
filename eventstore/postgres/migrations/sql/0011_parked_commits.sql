-- `commit_calls` as in 0009 and `commit_one` as in 0001, but that a unit whose message is parked or begun, or whose key is
-- parked, is not written: verdicts 6 parked and 7 started. Both lose like a conflict, so what follows in the call falls
-- with them.

create or replace function {schema}.commit_calls(
    plain boolean, echo boolean, units int, log_rows int, numbers text[],
    claims {schema}.staged_claim[], streams {schema}.staged_stream[],
    events {schema}.staged_event[], outgoing {schema}.staged_outgoing[], replies {schema}.staged_reply[],
    timers {schema}.staged_timer[], cancels boolean, letters {schema}.staged_letter[], marks {schema}.staged_mark[],
    out positions bigint[], out verdicts smallint[], out began bigint[], out misfit int[], out actual bigint[],
    out repeated bigint[], out repeated_public bigint[]
)
language plpgsql volatile
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
#variable_conflict use_column
declare
    ids int := cardinality(claims);
    stream_count int := cardinality(streams);
    won_consumer text[]; won_id uuid[];
    took_category text[]; took_id text[]; took_made_up boolean[];
    fits boolean := plain;
    speculated boolean := false;
    c_consumer text[]; c_id uuid[]; c_state smallint[]; c_effect boolean[];
    s_category text[]; s_id text[]; s_first bigint[]; s_last bigint[];
    u_call int[]; u_claim int[]; u_key int[]; u_state smallint[]; u_effect int[]; u_fences int[]; u_fence int[];
    t_unit int[]; t_stream int[]; t_expected bigint[]; t_n int[]; w_unit int[];
    now_state smallint[]; now_effect boolean[]; won boolean[];   -- per id
    parked int[];                                                -- ids whose key is parked
    held bigint[]; stored bigint[]; needed boolean[];            -- per stream
    lost_stream int[]; lost_key int[];                           -- in which call
    i int; j int; u int; t int; first_touch int; after_touch int; found_version bigint;
    verdict smallint; waits smallint; matches boolean; last_position bigint; last_public bigint;
    cancelled_dead int[] := '{}';
    x record;
    -- a statement trigger of 0001_floor_lock.sql locks again: harmless
begin
    -- 1. Claims and fenced commands: whoever inserts a row first has it, the other waits for the outcome.
    if ids > 0 then
        with w as (
            insert into {schema}.claims (consumer, message_id, key, state, effect)
            select c.consumer, c.id, c.key, c.state, c.effect from unnest(claims) as c
            on conflict do nothing returning consumer, message_id
        )
        select array_agg(w.consumer), array_agg(w.message_id) into won_consumer, won_id from w;
        fits := fits and coalesce(cardinality(won_id), 0) = ids;
        -- A statement of its own, after the claims: one that waited for somebody who parked its message sees the key.
        -- Nearly always there is none at all.
        if exists (select from {schema}.parked_keys) then
            select array_agg(c.ord::int) into parked
              from unnest(claims) with ordinality as c(consumer, id, key, state, effect, ord)
             where exists (select from {schema}.parked_keys p
                            where p.consumer = c.consumer and p.digest = sha256(convert_to(c.key, 'UTF8'))
                              and encode(p.digest, 'hex') <> all (
                                  string_to_array(coalesce(current_setting('foldbus.passing', true), ''), ',')));
            fits := fits and parked is null;
        end if;
    end if;

    -- 2. Versions, before any position is drawn: losers leave no gaps. One pass over the sorted streams creates or
    --    locks, compares and sets. A row whose version does not fit is locked all the same.
    if fits and stream_count > 0 then
        speculated := true;
        with took as (
            insert into {schema}.streams as s (category, id, previous, version)
            select n.category, n.id, n.first, n.last from unnest(streams) as n
            on conflict (category, id) do update set version = excluded.version, previous = excluded.previous
                 where s.version = excluded.previous
            returning s.category, s.id, s.xmax = 0 and s.previous > 0 as made_up  -- inserted, yet expected to be there
        )
        select array_agg(took.category), array_agg(took.id), array_agg(took.made_up)
          into took_category, took_id, took_made_up from took;
        fits := coalesce(cardinality(took_id), 0) = stream_count and true <> all(took_made_up);
    end if;

    if fits then
        if log_rows > 0 then
            perform pg_advisory_xact_lock_shared(({log}::bigint << 48) | (select last_value from {schema}.position));
            select array_agg(nextval('{schema}.position')) into positions from generate_series(1, log_rows);
        end if;
    else
        -- 3. Somebody else was there: decide unit by unit.
        select coalesce(array_agg(c.consumer), '{}'), coalesce(array_agg(c.id), '{}'),
               coalesce(array_agg(c.state), '{}'), coalesce(array_agg(c.effect), '{}')
          into c_consumer, c_id, c_state, c_effect from unnest(claims) as c;
        select coalesce(array_agg(n.category), '{}'), coalesce(array_agg(n.id), '{}'),
               coalesce(array_agg(n.first), '{}'), coalesce(array_agg(n.last), '{}')
          into s_category, s_id, s_first, s_last from unnest(streams) as n;
        u_call := numbers[1]; u_claim := numbers[2]; u_key := numbers[3]; u_state := numbers[4];
        u_effect := numbers[5]; u_fences := numbers[6]; u_fence := numbers[7];
        t_unit := numbers[8]; t_stream := numbers[9]; t_expected := numbers[10]; t_n := numbers[11];
        w_unit := numbers[12];

        -- What the ids say now; those that were won, nothing.
        won := array_fill(false, array[ids]);
        if 2 = any(u_fence) then
            -- A dead command may be cancelled by its undo; two undoes must not both find it dead.
            perform from unnest(c_consumer, c_id) with ordinality as k(consumer, id, ord)
              cross join lateral (select 1 from {schema}.claims c
                  where c.consumer = k.consumer and c.message_id = k.id for update) locked;
        end if;
        select array_agg(c.state order by k.ord), array_agg(coalesce(c.effect, false) order by k.ord)
          into now_state, now_effect
          from unnest(c_consumer, c_id) with ordinality as k(consumer, id, ord)
          left join lateral (select l.state, l.effect from {schema}.claims l
              where l.consumer = k.consumer and l.message_id = k.id offset 0) c on true;
        j := 1;
        for i in 1 .. ids loop
            if won_id[j] = c_id[i] and won_consumer[j] = c_consumer[i] then  -- both are in one order
                won[i] := true; now_state[i] := 0; now_effect[i] := false;
                j := j + 1;
            elsif now_state[i] is null then
                -- A redrive took away the dead claim that stood in the way of ours. Whatever was decided now, no row
                -- would remember it.
                raise exception 'the claim of % was given back meanwhile', c_id[i]
                    using errcode = 'serialization_failure';
            end if;
        end loop;

        -- Then the versions that the streams had before this call, all locked.
        held := array_fill(0::bigint, array[stream_count]);
        needed := array_fill(false, array[stream_count]);
        for t in 1 .. cardinality(t_unit) loop
            if u_claim[t_unit[t]] = 0 or now_state[u_claim[t_unit[t]]] = 0 then needed[t_stream[t]] := true; end if;
        end loop;
        stored := array_fill(null::bigint, array[stream_count]);
        lost_stream := array_fill(0, array[stream_count]);
        j := 1;
        for i in 1 .. stream_count loop
            if speculated and took_id[j] = s_id[i] and took_category[j] = s_category[i] then
                held[i] := case when took_made_up[j] then 0 else s_first[i] end;
                stored[i] := s_last[i];
                j := j + 1;
            elsif needed[i] then
                select s.version into found_version from {schema}.streams s
                 where s.category = s_category[i] and s.id = s_id[i] for update;
                if not found then
                    -- Made even if it will not stay: two writers of a new stream must wait for each other.
                    insert into {schema}.streams as s (category, id, version, previous)
                    values (s_category[i], s_id[i], 0, 0)
                    on conflict (category, id) do update set previous = s.previous
                    returning s.version into found_version;
                end if;
                held[i] := found_version;
                stored[i] := found_version;
            end if;
        end loop;

        verdicts := array_fill(3::smallint, array[units]);
        misfit := array_fill(null::int, array[units]);
        actual := array_fill(null::bigint, array[units]);
        repeated := array_fill(null::bigint, array[units]);
        repeated_public := array_fill(null::bigint, array[units]);
        began := array_fill(null::bigint, array[cardinality(t_unit)]);
        lost_key := array_fill(0, array[units]);
        after_touch := 1;
        for u in 1 .. units loop
            first_touch := after_touch;
            while t_unit[after_touch] = u loop after_touch := after_touch + 1; end loop;
            verdict := 1;

            i := u_claim[u];
            if i > 0 and now_state[i] in (1, 2, 3) then
                verdicts[u] := case when now_state[i] = 3 then 4 else 2 end;
                continue;  -- drags nobody: the versions decide
            end if;

            waits := 0;
            if i > 0 and now_state[i] = 5 then
                waits := 7;
            elsif i > 0 and (now_state[i] = 4 or i = any (parked)) then
                waits := 6;
            end if;

            -- Whoever lost drags along the followers in its own call, not another's.
            if u_key[u] > 0 and lost_key[u_key[u]] = u_call[u] then
                verdict := 3;
            end if;
            for t in first_touch .. after_touch - 1 loop
                if lost_stream[t_stream[t]] = u_call[u] then verdict := 3; end if;
            end loop;
            if waits > 0 then
                verdict := waits;
            end if;

            i := u_fences[u];
            if verdict = 1 and i > 0 then
                if u_fence[u] = 1 and not (now_state[i] = 1 and now_effect[i])
                    or u_fence[u] = 2 and (now_state[i] = 1 and now_effect[i] or now_state[i] in (4, 5)) then
                    verdict := 3;
                end if;
            end if;

            if verdict = 1 then
                for t in first_touch .. after_touch - 1 loop
                    -- An archived stream's version is negative: none fits it, "any" neither.
                    if t_expected[t] <> held[t_stream[t]] and (t_expected[t] >= 0 or held[t_stream[t]] < 0) then
                        verdict := 3; misfit[u] := t; actual[u] := held[t_stream[t]];
                        exit;
                    end if;
                end loop;
            end if;

            if verdict = 3 and u_claim[u] = 0 then
                -- No claim remembers that this was written: the events do, if they are where they were expected,
                -- stored or from an earlier unit of this statement.
                select count(*) > 0 and bool_and(t_expected[e.touch] >= 0 and (s.id is not null or echo and exists (
                            select from unnest(events) as o
                             where o.id = e.id and t_stream[o.touch] = t_stream[e.touch]
                               and began[o.touch] + o.number = t_expected[e.touch] + e.number))),
                       max(s.position), max(s.position) filter (where s.topic is not null)
                  into matches, last_position, last_public
                  from unnest(events) as e
                  left join lateral (select l.* from {schema}.events l
                      where l.category = e.category and l.stream = e.stream
                        and l.version = t_expected[e.touch] + e.number and l.id = e.id offset 0) s on true
                 where e.touch between first_touch and after_touch - 1;
                if matches then
                    verdict := 5; misfit[u] := null; actual[u] := null;
                    repeated[u] := last_position; repeated_public[u] := last_public;
                end if;
            end if;

            verdicts[u] := verdict;
            if verdict in (3, 6, 7) then
                if u_key[u] > 0 then lost_key[u_key[u]] := u_call[u]; end if;
                for t in first_touch .. after_touch - 1 loop lost_stream[t_stream[t]] := u_call[u]; end loop;
            elsif verdict = 1 then
                for t in first_touch .. after_touch - 1 loop
                    began[t] := held[t_stream[t]];
                end loop;
                for t in first_touch .. after_touch - 1 loop
                    held[t_stream[t]] := held[t_stream[t]] + t_n[t];
                end loop;
                if u_fence[u] = 2 and now_state[i] in (0, 2) then  -- i is still the fenced one
                    if now_state[i] = 2 then cancelled_dead := cancelled_dead || i; end if;
                    now_state[i] := 3; now_effect[i] := false;
                end if;
                if u_claim[u] > 0 then
                    now_state[u_claim[u]] := u_state[u]; now_effect[u_claim[u]] := u_effect[u] = 1;
                end if;
            end if;
        end loop;

        -- Make claims and streams say what was decided; a loser's claim is given back.
        for i in 1 .. ids loop
            if won[i] and now_state[i] = 0 then
                delete from {schema}.claims where consumer = c_consumer[i] and message_id = c_id[i];
            elsif won[i] and (now_state[i] <> c_state[i] or now_effect[i] <> c_effect[i]) or i = any(cancelled_dead) then
                update {schema}.claims set state = now_state[i], effect = now_effect[i]
                 where consumer = c_consumer[i] and message_id = c_id[i];
            end if;
        end loop;
        for i in 1 .. stream_count loop
            if held[i] = 0 and stored[i] is not null then
                delete from {schema}.streams s where s.category = s_category[i] and s.id = s_id[i];
            elsif held[i] <> stored[i] then
                update {schema}.streams s set version = held[i], previous = held[i]
                 where s.category = s_category[i] and s.id = s_id[i];
            end if;
        end loop;

        if exists (select from unnest(w_unit) as w(unit) where verdicts[w.unit] = 1) then
            perform pg_advisory_xact_lock_shared(({log}::bigint << 48) | (select last_value from {schema}.position));
            select array_agg(case when verdicts[w.unit] = 1 then nextval('{schema}.position') end) into positions
              from unnest(w_unit) as w(unit);
        end if;
    end if;

    -- 4. The rows of those that won, and what goes with them.
    if cancels then
        for x in select * from unnest(timers) loop
            if not fits and verdicts[x.unit] <> 1 then
                continue;
            elsif x.document is null then
                delete from {schema}.timers s where s.consumer = x.consumer and s.id = x.id;
            else
                insert into {schema}.timers (consumer, id, key, due_at, show_at, document, data)
                values (x.consumer, x.id, x.key, x.due_at, x.due_at, x.document, x.data)
                on conflict do nothing;
            end if;
        end loop;
    elsif cardinality(timers) > 0 then
        insert into {schema}.timers (consumer, id, key, due_at, show_at, document, data)
        select n.consumer, n.id, n.key, n.due_at, n.due_at, n.document, n.data
          from unnest(timers) as n
         where fits or verdicts[n.unit] = 1
         on conflict do nothing;
    end if;
    if cardinality(letters) > 0 then
        insert into {schema}.dead_letters (consumer, id, failed_at, key, value, document)
        select d.consumer, d.id, d.failed_at, d.key, d.value, d.document
          from unnest(letters) as d
         where fits or verdicts[d.unit] = 1
         on conflict do nothing;
    end if;
    if cardinality(marks) > 0 then
        insert into {schema}.watermarks as m ("group", topic, partition, "offset")
        select n."group", n.topic, n.partition, n."offset" from unnest(marks) as n
        on conflict ("group", topic, partition) do update set "offset" = excluded."offset"
              where m."offset" < excluded."offset";
    end if;
    if cardinality(replies) > 0 then
        insert into {schema}.replies (consumer, message_id, document, data, last_event, last_public)
        select r.consumer, r.id, r.document, r.data,
               coalesce(positions[r.last_event], 0), coalesce(positions[r.last_public], 0)
          from unnest(replies) as r
         where fits or verdicts[r.unit] = 1;
    end if;
    if cardinality(events) > 0 and positions is not null then
        insert into {schema}.events
            (position, category, stream, version, id, type, key, topic, made_at, data, meta)
        select positions[e.at], e.category, e.stream, case when fits then e.version else began[e.touch] + e.number end,
               e.id, e.type, e.key, e.topic, e.made_at, e.data, e.meta
          from unnest(events) as e
         where positions[e.at] is not null;
    end if;
    if cardinality(outgoing) > 0 and positions is not null then
        insert into {schema}.outgoing
            (position, id, type, key, topic, made_at, data, meta, last_event, last_public)
        select positions[o.at], o.id, o.type, o.key, o.topic, o.made_at, o.data, o.meta,
               case when o.last_event is not null then coalesce(positions[o.last_event], 0) end,
               case when o.last_event is not null then coalesce(positions[o.last_public], 0) end
          from unnest(outgoing) as o
         where positions[o.at] is not null;
    end if;
    foreach i in array cancelled_dead loop
        -- Nobody shall redrive it any more, and its answer is another one now.
        delete from {schema}.dead_letters where consumer = c_consumer[i] and id = c_id[i];
        delete from {schema}.replies where consumer = c_consumer[i] and message_id = c_id[i];
    end loop;
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
        perform pg_advisory_xact_lock_shared(({log}::bigint << 48) | (select last_value from {schema}.position));
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
    end if;
    if r_document is not null then
        insert into {schema}.replies (consumer, message_id, document, data, last_event, last_public)
        values (c_consumer, c_id, r_document, r_data, at, last_public);
    end if;
end $$;
