"""Pauses, places and forgotten claims in the service's schema. See `eventstore/flow.py`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from uuid import UUID

from eventstore.flow import REPLIES, Act, Forgotten, Pause, check_limit, placed
from eventstore.port import Watermark

Query = Callable[..., Awaitable[Any]]


class PostgresFlow:
    """`fetch(sql, *arguments)` runs one statement in autocommit and answers its rows."""

    def __init__(self, fetch: Query, schema: str) -> None:
        self._fetch, self._schema = fetch, schema
        log = f'insert into {schema}.flow_log ("group", what, made_by, reason)'
        self._pause = f"""
            with changed as (
                insert into {schema}.pauses ("group", made_by, reason) values ($1, $2, $3)
                on conflict do nothing returning 1
            ), told as ({log} select $1, 'paused', $2, $3 from changed)
            select count(*) from changed"""
        self._resume = f"""
            with changed as (delete from {schema}.pauses where "group" = $1 returning 1),
                 told as ({log} select $1, 'resumed', $2, $3 from changed)
            select count(*) from changed"""
        self._place = f"""
            with placed as (
                insert into {schema}.watermarks as m ("group", topic, partition, "offset")
                select * from unnest($1::text[], $2::text[], $3::int[], $4::bigint[])
                on conflict ("group", topic, partition) do update set "offset" = excluded."offset"
            )
            {log} select g, what, $6, $7 from unnest($1::text[], $5::text[]) with ordinality as n(g, what, ord)
             order by ord"""

    async def pause(self, group: str, *, by: str, reason: str = "") -> bool:
        return bool((await self._fetch(self._pause, group, by, reason))[0][0])

    async def resume(self, group: str, *, by: str, reason: str = "") -> bool:
        return bool((await self._fetch(self._resume, group, by, reason))[0][0])

    async def paused(self) -> Mapping[str, Pause]:
        found = await self._fetch(f'select "group", made_at, made_by, reason from {self._schema}.pauses')
        return {group: Pause(group, at, by, reason) for group, at, by, reason in found}

    async def place(self, marks: Sequence[Watermark], *, by: str, reason: str = "") -> None:
        last = {(mark.group, mark.topic, mark.partition): mark for mark in marks}  # a statement sets a row only once
        found = sorted(last.values(), key=lambda mark: (mark.group, mark.topic, mark.partition))
        if found:
            await self._fetch(
                self._place,
                [mark.group for mark in found],
                [mark.topic for mark in found],
                [mark.partition for mark in found],
                [mark.offset for mark in found],
                [placed(mark) for mark in found],
                by,
                reason,
            )

    async def acts(self, *, limit: int = 100) -> Sequence[Act]:
        check_limit(limit)
        sql = f"""select number, made_at, "group", what, made_by, reason from {self._schema}.flow_log
                   order by number desc limit $1"""
        return [Act(*row) for row in await self._fetch(sql, limit)]


class PostgresInbox:
    """There is no index over ages: claims are walked by their primary key, a piece at a time."""

    def __init__(self, fetch: Query, schema: str) -> None:
        self._fetch = fetch
        # The reply is a scalar subquery: what EXISTS asks may be hashed, which would parse every reply of the consumer.
        # The second look, under the lock, is at the newest version of each row; `skip locked` waits for nobody, and so
        # never meets a commit in another order.
        self._forget = f"""
            with page as materialized (
                select message_id, state, taken_at from {schema}.claims
                 where consumer = $1 %s order by message_id limit $2
            ), aged as materialized (
                select p.message_id from page p
                 where p.state in (1, 2, 3) and p.taken_at < statement_timestamp() - make_interval(secs => $3)
                   and not (p.state = 2 and exists (select from {schema}.dead_letters d
                                                     where d.consumer = $1 and d.id = p.message_id))
                   and (p.taken_at < statement_timestamp() - make_interval(secs => $4)
                        or p.state <> 3 and coalesce((select r.document::json -> 'reply_to' ->> 0
                                                        from {schema}.replies r
                                                       where r.consumer = $1 and r.message_id = p.message_id), '')
                                            not like '%%{REPLIES}')
            ), locked as materialized (
                select c.message_id from {schema}.claims c
                 where c.consumer = $1 and c.state in (1, 2, 3)
                   and c.message_id = any(array(select message_id from aged))
                 order by c.message_id for update skip locked
            ), answers as (
                delete from {schema}.replies
                 where consumer = $1 and message_id = any(array(select message_id from locked))
            ), begun as (
                delete from {schema}.effects
                 where consumer = $1 and message_id = any(array(select message_id from locked))
            ), gone as (
                delete from {schema}.claims
                 where consumer = $1 and message_id = any(array(select message_id from locked)) returning 1
            )
            select (select count(*) from page) as looked, (select count(*) from gone) as gone,
                   (select message_id from page order by message_id desc limit 1) as after"""

    async def forget(
        self,
        consumer: str,
        *,
        older_than_s: float,
        steps_older_than_s: float | None = None,
        after: UUID | None = None,
        limit: int = 2000,
    ) -> Forgotten:
        check_limit(limit)
        sql = self._forget % ("" if after is None else "and message_id > $5")
        arguments: list[Any] = [consumer, limit, older_than_s, steps_older_than_s]
        if after is not None:
            arguments.append(after)
        (row,) = await self._fetch(sql, *arguments)
        return Forgotten(row["looked"], row["gone"], row["after"] if row["looked"] == limit else None)


__all__ = ["PostgresFlow", "PostgresInbox"]
