-- Tables of one service's store. {schema} is its schema, {log} its number in foldbus.logs.

-- Events and outgoing messages draw from one sequence. CACHE 1 and the burned 0 (is_called is true from here on) are
-- what the floor lock builds on: see 0001_floor_lock.sql.
create sequence {schema}.position minvalue 0 start 0 cache 1;
select nextval('{schema}.position');

create table {schema}.log (
    one boolean primary key default true check (one),
    service text not null,
    epoch bigint not null default 0
);

-- `previous` is the version before the call that made `version`: it carries the expected version of a commit into
-- INSERT … ON CONFLICT DO UPDATE … WHERE, so that creating or locking, comparing and setting are one statement.
create table {schema}.streams (
    category text not null,
    id text not null,
    version bigint not null,
    previous bigint not null,
    primary key (category, id)
) with (fillfactor = 70);

-- `data` is bytea: the very bytes that were staged, which need be neither text nor JSON (an empty reply, a codec that
-- encrypts). jsonb would drop duplicate keys, reorder and rewrite numbers. In SQL: convert_from(data, 'UTF8')::jsonb.
-- `meta` and `document` are JSON in text: SQLAlchemy sets its pool's connections up to parse json columns on arrival.
create table {schema}.events (
    position bigint primary key default nextval('{schema}.position'),
    category text not null,
    stream text not null,
    version bigint not null,
    id uuid not null,
    type text not null,
    key text not null,
    topic text,
    made_at timestamptz not null,
    data bytea not null,
    meta text not null,
    unique (category, stream, version)
);

-- `last_event` and `last_public` stand on a reply alone: where its unit ended, which is only known here.
create table {schema}.outgoing (
    position bigint primary key default nextval('{schema}.position'),
    id uuid not null,
    type text not null,
    key text not null,
    topic text,
    made_at timestamptz not null,
    data bytea not null,
    meta text not null,
    last_event bigint,
    last_public bigint
);

-- `state`: 1 done, 2 dead, 3 cancelled. `effect`: done with an ok reply or none, so there is something to undo.
create table {schema}.claims (
    consumer text not null,
    message_id uuid not null,
    key text not null,
    state smallint not null,
    effect boolean not null,
    taken_at timestamptz not null default now(),
    primary key (consumer, message_id)
);

-- Apart from the claims: a claim is the first statement of a commit, what its reply is stamped with the last.
create table {schema}.replies (
    consumer text not null,
    message_id uuid not null,
    document text not null,
    data bytea not null,
    last_event bigint not null,
    last_public bigint not null,
    primary key (consumer, message_id)
);

-- `show_at` is when a worker may see it: `due_at` at first, the end of the lease while somebody works on it.
create table {schema}.timers (
    consumer text not null,
    id uuid not null,
    key text not null,
    due_at timestamptz not null,
    show_at timestamptz not null,
    document text not null,
    data bytea not null,
    primary key (consumer, id)
);
create index timers_show_at on {schema}.timers (show_at);

create table {schema}.dead_letters (
    consumer text not null,
    id uuid not null,
    failed_at timestamptz not null,
    key bytea,
    value bytea,
    document text not null,
    primary key (consumer, id)
);
create index dead_letters_failed_at on {schema}.dead_letters (failed_at, id, consumer);

create table {schema}.watermarks (
    "group" text not null,
    topic text not null,
    partition int not null,
    "offset" bigint not null,
    primary key ("group", topic, partition)
) with (fillfactor = 50);

create table {schema}.leases (
    name text primary key,
    token bigint not null,
    until timestamptz not null,
    position bigint not null default 0
) with (fillfactor = 50);

insert into {schema}.log (service) values ('{service}');

-- Which log this schema was made for; `open` compares it with foldbus.logs.
create function {schema}.log_number() returns int language sql immutable as $$ select {log} $$;
