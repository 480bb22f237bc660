"""Random calls, and outcomes made comparable between stores: positions become ranks, PostgreSQL may leave gaps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

from bus.envelope import ReplyOutcome
from eventstore.port import ANY, Claim, Fence, Outcome, Unit
from tests.eventstore.stores import IDS, append, claim, event, message, reply, stream, undo


def random_units(rnd: random.Random, at: dict[str, int], ids: list[UUID], earlier: list[Unit]) -> list[Unit]:
    units: list[Unit] = []
    for _ in range(rnd.choice((1, 1, 2, 4, 6))):
        if earlier and rnd.random() < 0.15:
            units.append(rnd.choice(earlier + units))
            continue
        appends = []
        for name in rnd.sample(sorted(at), rnd.choice((0, 1, 1, 2))):
            wanted_ = rnd.choice([at[name]] * 8 + [ANY, at[name] + 1, 0])
            events = [event(name, public=rnd.random() < 0.6) for _ in range(rnd.choice((1, 2)))]
            appends.append(append(name, wanted_, *events))
            at[name] += len(events) if wanted_ in (ANY, at[name]) else 0
        asserts = [(stream(name), at[name]) for name in rnd.sample(sorted(at), rnd.choice((0, 0, 1)))]
        units.append(
            Unit(
                claim=_random_claim(rnd, ids) if rnd.random() < 0.8 else None,
                appends=tuple(appends),
                asserts=tuple(asserts),
                outgoing=tuple(message() for _ in range(rnd.choice((0, 1)))),
            )
        )
    return units


def _random_claim(rnd: random.Random, ids: list[UUID]) -> Claim:
    id = rnd.choice(ids) if ids and rnd.random() < 0.25 else IDS.new()
    step = rnd.choice([*ids, IDS.new()])
    ids += [id, step]
    answer = rnd.choice((None, reply(), reply(outcome=ReplyOutcome.REFUSED), reply(topic=None)))
    if rnd.random() < 0.3 and step != id:
        made = undo(step, rnd.choice(list(Fence)), id, key=rnd.choice("abc"), reply=answer)
    else:
        made = claim(id, rnd.choice("abc"), reply=answer)
    return replace(made, state=rnd.choice([made.state] * 5 + [type(made.state).DEAD]))


def ranks(log: Sequence[Any]) -> dict[int, int]:
    return {0: 0} | {one_.position: place for place, one_ in enumerate(log, 1)}


def with_ranks(found: Any, rank: dict[int, int]) -> Any:
    if found is None or found.token is None:
        return found
    return replace(
        found, token=replace(found.token, position=rank[found.token.position], public=rank[found.token.public])
    )


def by_rank(outcome: Outcome, rank: dict[int, int]) -> Outcome:
    return replace(
        outcome,
        position=rank[outcome.position],
        public=rank[outcome.public],
        versions=dict(outcome.versions),
        reply=with_ranks(outcome.reply, rank),
    )
