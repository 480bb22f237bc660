-- What operators told the workers: the groups that stand still, and, for people, everything that was done to a group.
create table {schema}.pauses (
    "group" text primary key,
    made_at timestamptz not null default now(),
    made_by text not null,
    reason text not null
);

create table {schema}.flow_log (
    number bigint generated always as identity primary key,
    made_at timestamptz not null default now(),
    "group" text not null,
    what text not null,
    made_by text not null,
    reason text not null
);
