-- Archived streams: their events stand apart, the stream's version is stored negative, so that no expected version fits.
alter table {schema}.streams add column archived_at timestamptz;

create table {schema}.archived (
    position bigint primary key,
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

-- The oldest migration that code may want and still work with this schema: see `eventstore/postgres/schema.py`.
alter table {schema}.log add column oldest text not null default '0003';
