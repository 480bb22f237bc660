"""A service with sagas comes back from a backup, the service that does their steps does not: it lost nothing.

Goal: what docs/operations.md says of sagas after a restore. Method: one saga begins before the backup and takes its
step after it, one begins after it. The first is paid once. The second becomes two, under its old id and a new one: the
topic still holds the event that began it, and the command that led to it is handled again. It is paid twice.
"""

# Without `from __future__ import annotations`: the services are made per test, of classes that only exist in there.
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from bus.envelope import Envelope
from eventstore.port import Store
from foldbus import Command, Decider, Event, Key, SagaRun, Service, saga
from foldbus.backends import raise_epoch
from tests.eventstore.stores import whole_log
from tests.stories.pairs import Pair, eventually, unique
from tests.stories.test_restore_backup import BACK_UP


class Nothing(BaseModel, frozen=True):
    """Whoever decides here does not look back."""


class Story:
    def __init__(self) -> None:
        orders, payments = unique("orders"), unique("payments")

        class Placed(Event, type=f"{orders}.placed.v1"):
            order: Key[str]

        class Place(Command[Placed], type=f"{orders}.place.v1"):
            order: Key[str]

        class Paid(Event, type=f"{payments}.paid.v1"):
            order: Key[str]

        class Pay(Command[Paid], type=f"{payments}.pay.v1"):
            order: Key[str]

        def placed(state: Nothing, event: Placed) -> Nothing:
            return state

        def place(state: Nothing, command: Place) -> list[Placed]:
            return [Placed(order=command.order)]

        def paid(state: Nothing, event: Paid) -> Nothing:
            return state

        def pay(state: Nothing, command: Pay) -> list[Paid]:
            return [Paid(order=command.order)]

        @saga("fulfil", version=1)
        async def fulfil(run: SagaRun, placed: Placed) -> None:
            await run.step(Pay(order=placed.order), timeout_s=3600)

        self.place: Any = Place
        self.paid = f"{payments}.paid.v1"
        self.orders = Service(
            orders, deciders=[Decider("order", initial=Nothing(), evolve=placed, decide=place)], sagas=[fulfil],
            messages=[Pay, Paid], partitions=1,
        )  # fmt: skip
        self.payments = Service(
            payments, deciders=[Decider("payment", initial=Nothing(), evolve=paid, decide=pay)], partitions=1
        )


@pytest.mark.timeout(180)
async def test_a_saga_from_before_the_backup_goes_on_and_one_from_after_it_becomes_two(
    pair: Pair, tmp_path: Path
) -> None:
    story = Story()
    elsewhere = Pair("elsewhere", f"sqlite:{tmp_path}/payments", pair.bus)

    async def payments(store: Store) -> list[Envelope]:
        return [one for one in await whole_log(store) if one.type == story.paid]

    async with pair.connect(story.orders) as orders:
        await orders.send(story.place(order="old"))
        (old,) = await eventually(lambda: sagas(orders.store), lambda found: len(found) == 1)
    restore = await BACK_UP[pair.name](pair.store, story.orders.name, tmp_path)

    async with pair.connect(story.orders) as orders, elsewhere.connect(story.payments) as paying:
        await orders.send(story.place(order="new"))
        await eventually(lambda: payments(paying.store), lambda found: len(found) == 2)
        began = await sagas(orders.store)
        assert len(began) == 2

    await restore()
    await raise_epoch(pair.store, story.orders.name)
    async with pair.connect(story.orders) as orders, elsewhere.connect(story.payments) as paying:
        await eventually(lambda: payments(paying.store), lambda found: len(found) == 3)
        known = await eventually(lambda: completed(orders.store), lambda ended: len(ended) == 3)
        found = await payments(paying.store)
        assert sorted(one.key for one in found) == ["new", "new", "old"]
        assert len({one.correlation_id for one in found}) == 2
        assert began < known == await sagas(orders.store)
        assert old in known
        assert await orders.store.dead_letters() == []
        assert await paying.store.dead_letters() == []


async def sagas(store: Store) -> set[str]:
    return {one.stream.id for one in await whole_log(store) if one.stream and one.stream.category == "saga.fulfil"}


async def completed(store: Store) -> set[str]:
    log = await whole_log(store)
    return {one.stream.id for one in log if one.stream and one.type == "foldbus.saga-completed.v1"}
