-- A global order without gaps while appends run concurrently.
--
-- Positions are drawn before they commit, so a reader that follows the highest position skips those that commit late.
-- The floor lock: an appender takes a *shared* advisory lock keyed by (log number: 16 bits, sequence value: 48 bits)
-- before it draws positions, and keeps it until its transaction ends. Every position it draws is above that value. So
-- all positions up to the lowest value locked for this log (up to the sequence's value, when nothing is locked) are
-- committed or gone for good. Shared locks never wait for each other: appenders do not notice.
--
-- What breaks it: sequence values cached per connection (CACHE > 1), drawing before locking, lock scan and row read in
-- one statement or one snapshot, two logs with one number, reading on a standby (pg_locks is per server).

create function {schema}.lock_floor() returns void language sql volatile as $$
    select pg_advisory_xact_lock_shared(({log}::bigint << 48) | (select last_value from {schema}.position));
$$;

-- For inserts that do not come through `commit`: a BEFORE STATEMENT trigger runs before the statement draws its
-- default positions. (Positions drawn by an earlier statement without the lock are beyond its help.)
create function {schema}.lock_floor_before_insert() returns trigger language plpgsql volatile as $$
begin
    perform pg_advisory_xact_lock_shared(({log}::bigint << 48) | (select last_value from {schema}.position));
    return null;
end $$;

create trigger floor_lock before insert on {schema}.events
    for each statement execute function {schema}.lock_floor_before_insert();
create trigger floor_lock before insert on {schema}.outgoing
    for each statement execute function {schema}.lock_floor_before_insert();

-- Reads the sequence first, the locks second, each in a statement (and snapshot) of its own; the caller reads rows in
-- a LATER statement. A position at or below `drawn` was drawn under a lock that is either still held, and then found
-- below, or was released after its commit became visible. In one snapshot (REPEATABLE READ) that reasoning fails.
create function {schema}.watermark(out safe bigint, out drawn bigint) language plpgsql volatile as $$
declare lowest bigint;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'the log of {schema} is read in READ COMMITTED only, found %',
            current_setting('transaction_isolation') using errcode = 'active_sql_transaction';
    end if;
    select last_value into drawn from {schema}.position;
    select min(((classid::bigint << 32) | objid::bigint) & ((1::bigint << 48) - 1)) into lowest
      from pg_locks
     where locktype = 'advisory' and objsubid = 1 and mode = 'ShareLock' and granted
       and database = (select oid from pg_database where datname = current_database())
       and (classid::bigint >> 16) = {log};
    safe := least(drawn, lowest);  -- least ignores null
end $$;
