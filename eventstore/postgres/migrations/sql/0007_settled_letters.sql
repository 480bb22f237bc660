-- Dead letters that somebody dealt with. A row moves here from dead_letters, which holds the open ones alone; a message
-- that dies again after a redrive is here once for each time. `number` rises with each settling.
create table {schema}.settled_letters (
    number bigint generated always as identity primary key,
    consumer text not null,
    id uuid not null,
    failed_at timestamptz not null,
    key bytea,
    value bytea,
    document text not null,
    settled_at timestamptz not null,
    settled_as text not null,
    settled_by text not null,
    reason text not null
);
create index settled_letters_of on {schema}.settled_letters (id, consumer);
