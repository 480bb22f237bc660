-- Many units of work in one call. Everything comes as arrays that the client has numbered and sorted; places count
-- from 1, place 0 means "none". What is what:
--
--   c_*  message ids, distinct, sorted by (consumer, id): claims and commands fenced by an undo alike, so that two
--        owners of one batch lock in one order. state/effect: what the row says if nothing is lost.
--   s_*  streams, distinct, sorted by (category, id). first: the version expected by the first unit that touches it
--        (-1: any), last: its version if nothing is lost.
--   u_*  units, in order. claim, fences: places in c (fence: 1 expect done, 2 cancel); key: number of (consumer, key);
--        state, effect: what its claim becomes; last_event, last_public: places in w.
--   t_*  what units touch, by unit: expected version (-1: any) and how many events come (0: only asserted).
--   w_*  one entry per log row in log order (events, outgoing, replies), with its unit.
--   e_*  events: place in w, touch, number within the touch.   o_*  outgoing rows, replies last within their unit.
--   r_*  replies to store with the claim.   d_*  dead letters.   m_*  watermarks, distinct and sorted.
--   x_*  timers staged and cancelled (without a document), sorted by (consumer, id) and then in the order of units.
--
-- `plain`: expected versions chain within the call, no id comes twice, nothing is fenced or any. Then, if all claims
-- are won and all first versions fit (nearly always), nothing needs to be decided unit by unit.
--
-- Answers the positions of w (null: its unit was not written), and if something was lost also per unit the verdict
-- (1 committed, 2 duplicate, 3 conflict, 4 cancelled, 5 was written before), the touch that did not fit with the version found, and for a
-- repeated append the positions it has; and per touch the version it began at.
create function {schema}.commit_units(
    c_consumer text[], c_id uuid[], c_key text[], c_state smallint[], c_effect boolean[],
    s_category text[], s_id text[], s_first bigint[], s_last bigint[],
    plain boolean, units int,
    u_claim int[], u_key int[], u_state smallint[], u_effect boolean[], u_fences int[], u_fence smallint[],
    u_last_event int[], u_last_public int[],
    t_unit int[], t_stream int[], t_expected bigint[], t_n int[],
    w_unit int[],
    e_at int[], e_touch int[], e_number int[],
    e_id uuid[], e_type text[], e_key text[], e_topic text[], e_time timestamptz[], e_data bytea[], e_meta text[],
    o_at int[], o_reply boolean[],
    o_id uuid[], o_type text[], o_key text[], o_topic text[], o_time timestamptz[], o_data bytea[], o_meta text[],
    r_unit int[], r_document text[], r_data bytea[],
    x_unit int[], x_consumer text[], x_id uuid[], x_key text[], x_due_at timestamptz[], x_document text[],
    x_data bytea[], x_cancels boolean,
    d_unit int[], d_consumer text[], d_id uuid[], d_failed_at timestamptz[], d_key bytea[], d_value bytea[],
    d_document text[],
    m_group text[], m_topic text[], m_partition int[], m_offset bigint[],
    out positions bigint[], out verdicts smallint[], out began bigint[], out misfit int[], out actual bigint[],
    out repeated bigint[], out repeated_public bigint[]
)
language plpgsql volatile
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare
    ids int := cardinality(c_id);
    streams int := cardinality(s_id);
    won_consumer text[]; won_id uuid[];
    took_category text[]; took_id text[]; took_made_up boolean[];
    fits boolean := plain;
    speculated boolean := false;
    now_state smallint[]; now_effect boolean[]; won boolean[];   -- per id
    held bigint[]; stored bigint[]; lost_stream boolean[]; needed boolean[];  -- per stream
    lost_key boolean[];
    i int; j int; u int; t int; first_touch int; after_touch int; found_version bigint;
    verdict smallint; matches boolean; last_position bigint; last_public bigint;
    cancelled_dead int[] := '{}';
    -- a statement trigger of 0001_floor_lock.sql locks again: harmless
begin
    -- 1. Claims and fenced commands: whoever inserts a row first has it, the other waits for the outcome.
    if ids > 0 then
        with w as (
            insert into {schema}.claims (consumer, message_id, key, state, effect)
            select * from unnest(c_consumer, c_id, c_key, c_state, c_effect)
            on conflict do nothing returning consumer, message_id
        )
        select array_agg(w.consumer), array_agg(w.message_id) into won_consumer, won_id from w;
        fits := fits and coalesce(cardinality(won_id), 0) = ids;
    end if;

    -- 2. Versions, before any position is drawn: losers leave no gaps. One pass over the sorted streams creates or
    --    locks, compares and sets. A row whose version does not fit is locked all the same.
    if fits and streams > 0 then
        speculated := true;
        with took as (
            insert into {schema}.streams as s (category, id, previous, version)
            select * from unnest(s_category, s_id, s_first, s_last)
            on conflict (category, id) do update set version = excluded.version, previous = excluded.previous
                 where s.version = excluded.previous
            returning s.category, s.id, s.xmax = 0 and s.previous > 0 as made_up  -- inserted, yet expected to be there
        )
        select array_agg(took.category), array_agg(took.id), array_agg(took.made_up)
          into took_category, took_id, took_made_up from took;
        fits := coalesce(cardinality(took_id), 0) = streams and true <> all(took_made_up);
    end if;

    if fits then
        if cardinality(w_unit) > 0 then
            perform pg_advisory_xact_lock_shared(({log}::bigint << 48) | (select last_value from {schema}.position));
            select array_agg(nextval('{schema}.position')) into positions from unnest(w_unit);
        end if;
        began := t_expected;
    else
        -- 3. Somebody else was there: decide unit by unit. First what the ids say now; those that were won, nothing.
        won := array_fill(false, array[ids]);
        if 2 = any(u_fence) then
            -- A dead command may be cancelled by its undo; two undoes must not both find it dead.
            perform from unnest(c_consumer, c_id) with ordinality as k(consumer, id, ord)
              cross join lateral (select 1 from {schema}.claims c
                  where c.consumer = k.consumer and c.message_id = k.id for update) locked;
        end if;
        select array_agg(coalesce(c.state, 0::smallint) order by k.ord), array_agg(coalesce(c.effect, false) order by k.ord)
          into now_state, now_effect
          from unnest(c_consumer, c_id) with ordinality as k(consumer, id, ord)
          left join lateral (select l.state, l.effect from {schema}.claims l
              where l.consumer = k.consumer and l.message_id = k.id offset 0) c on true;
        j := 1;
        for i in 1 .. ids loop
            if won_id[j] = c_id[i] and won_consumer[j] = c_consumer[i] then  -- both are in one order
                won[i] := true; now_state[i] := 0; now_effect[i] := false;
                j := j + 1;
            end if;
        end loop;

        -- Then the versions that the streams had before this call, all locked.
        held := array_fill(0::bigint, array[streams]);
        needed := array_fill(false, array[streams]);
        for t in 1 .. cardinality(t_unit) loop
            if u_claim[t_unit[t]] = 0 or now_state[u_claim[t_unit[t]]] = 0 then needed[t_stream[t]] := true; end if;
        end loop;
        stored := array_fill(null::bigint, array[streams]);
        lost_stream := array_fill(false, array[streams]);
        j := 1;
        for i in 1 .. streams loop
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
        lost_key := array_fill(false, array[units]);
        after_touch := 1;
        for u in 1 .. units loop
            first_touch := after_touch;
            while t_unit[after_touch] = u loop after_touch := after_touch + 1; end loop;
            verdict := 1;

            i := u_claim[u];
            if i > 0 and now_state[i] > 0 then
                verdicts[u] := case when now_state[i] = 3 then 4 else 2 end;
                continue;  -- drags nobody: the versions decide
            end if;

            if u_key[u] > 0 and lost_key[u_key[u]] then
                verdict := 3;
            end if;
            for t in first_touch .. after_touch - 1 loop
                if lost_stream[t_stream[t]] then verdict := 3; end if;
            end loop;

            i := u_fences[u];
            if verdict = 1 and i > 0 then
                if u_fence[u] = 1 and not (now_state[i] = 1 and now_effect[i])
                    or u_fence[u] = 2 and now_state[i] = 1 and now_effect[i] then
                    verdict := 3;
                end if;
            end if;

            if verdict = 1 then
                for t in first_touch .. after_touch - 1 loop
                    if t_expected[t] >= 0 and t_expected[t] <> held[t_stream[t]] then
                        verdict := 3; misfit[u] := t; actual[u] := held[t_stream[t]];
                        exit;
                    end if;
                end loop;
            end if;

            if verdict = 3 and u_claim[u] = 0 then
                -- No claim remembers that this was written: the events do, if they are where they were expected,
                -- stored or from an earlier unit of this call.
                select count(*) > 0 and bool_and(t_expected[e.touch] >= 0 and (s.id is not null or exists (
                            select from unnest(e_touch, e_number, e_id) as o(touch, number, id)
                             where o.id = e.id and t_stream[o.touch] = t_stream[e.touch]
                               and began[o.touch] + o.number = t_expected[e.touch] + e.number))),
                       max(s.position), max(s.position) filter (where s.topic is not null)
                  into matches, last_position, last_public
                  from unnest(e_touch, e_number, e_id) as e(touch, number, id)
                  left join lateral (select l.* from {schema}.events l
                      where l.category = s_category[t_stream[e.touch]] and l.stream = s_id[t_stream[e.touch]]
                        and l.version = t_expected[e.touch] + e.number and l.id = e.id offset 0) s on true
                 where e.touch between first_touch and after_touch - 1;
                if matches then
                    verdict := 5; misfit[u] := null; actual[u] := null;
                    repeated[u] := last_position; repeated_public[u] := last_public;
                end if;
            end if;

            verdicts[u] := verdict;
            if verdict = 3 then
                if u_key[u] > 0 then lost_key[u_key[u]] := true; end if;
                for t in first_touch .. after_touch - 1 loop lost_stream[t_stream[t]] := true; end loop;
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
                    now_state[u_claim[u]] := u_state[u]; now_effect[u_claim[u]] := u_effect[u];
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
        for i in 1 .. streams loop
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
    if x_cancels then
        for i in 1 .. cardinality(x_unit) loop
            if not fits and verdicts[x_unit[i]] <> 1 then
                continue;
            elsif x_document[i] is null then
                delete from {schema}.timers where consumer = x_consumer[i] and id = x_id[i];
            else
                insert into {schema}.timers (consumer, id, key, due_at, show_at, document, data)
                values (x_consumer[i], x_id[i], x_key[i], x_due_at[i], x_due_at[i], x_document[i], x_data[i])
                on conflict do nothing;
            end if;
        end loop;
    elsif cardinality(x_unit) > 0 then
        insert into {schema}.timers (consumer, id, key, due_at, show_at, document, data)
        select x.consumer, x.id, x.key, x.due_at, x.due_at, x.document, x.data
          from unnest(x_unit, x_consumer, x_id, x_key, x_due_at, x_document, x_data)
               as x(unit, consumer, id, key, due_at, document, data)
         where fits or verdicts[x.unit] = 1
         on conflict do nothing;
    end if;
    if cardinality(d_unit) > 0 then
        insert into {schema}.dead_letters (consumer, id, failed_at, key, value, document)
        select d.consumer, d.id, d.failed_at, d.key, d.value, d.document
          from unnest(d_unit, d_consumer, d_id, d_failed_at, d_key, d_value, d_document)
               as d(unit, consumer, id, failed_at, key, value, document)
         where fits or verdicts[d.unit] = 1
         on conflict do nothing;
    end if;
    if cardinality(m_group) > 0 then
        insert into {schema}.watermarks as m ("group", topic, partition, "offset")
        select * from unnest(m_group, m_topic, m_partition, m_offset)
        on conflict ("group", topic, partition) do update set "offset" = excluded."offset"
              where m."offset" < excluded."offset";
    end if;
    if positions is not null or cardinality(r_unit) > 0 then
        insert into {schema}.replies (consumer, message_id, document, data, last_event, last_public)
        select c_consumer[u_claim[r.unit]], c_id[u_claim[r.unit]], r.document, r.data,
               coalesce(positions[u_last_event[r.unit]], 0), coalesce(positions[u_last_public[r.unit]], 0)
          from unnest(r_unit, r_document, r_data) as r(unit, document, data)
         where fits or verdicts[r.unit] = 1;
        if cardinality(e_at) > 0 then
            insert into {schema}.events
                (position, category, stream, version, id, type, key, topic, made_at, data, meta)
            select positions[e.at], s_category[t_stream[e.touch]], s_id[t_stream[e.touch]], began[e.touch] + e.number,
                   e.id, e.type, e.key, e.topic, e.made_at, e.data, e.meta
              from unnest(e_at, e_touch, e_number, e_id, e_type, e_key, e_topic, e_time, e_data, e_meta)
                   as e(at, touch, number, id, type, key, topic, made_at, data, meta)
             where positions[e.at] is not null;
        end if;
        if cardinality(o_at) > 0 then
            insert into {schema}.outgoing
                (position, id, type, key, topic, made_at, data, meta, last_event, last_public)
            select positions[o.at], o.id, o.type, o.key, o.topic, o.made_at, o.data, o.meta,
                   case when o.reply then coalesce(positions[u_last_event[w_unit[o.at]]], 0) end,
                   case when o.reply then coalesce(positions[u_last_public[w_unit[o.at]]], 0) end
              from unnest(o_at, o_reply, o_id, o_type, o_key, o_topic, o_time, o_data, o_meta)
                   as o(at, reply, id, type, key, topic, made_at, data, meta)
             where positions[o.at] is not null;
        end if;
    end if;
    foreach i in array cancelled_dead loop
        -- Nobody shall redrive it any more, and its answer is another one now.
        delete from {schema}.dead_letters where consumer = c_consumer[i] and id = c_id[i];
        delete from {schema}.replies where consumer = c_consumer[i] and message_id = c_id[i];
    end loop;
    if fits then began := null; end if;
end $$;
