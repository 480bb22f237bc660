"""Checked, never run: what a type checker must see in a saga. `test_types.py` says which lines are wrong."""

from __future__ import annotations

from typing import assert_type

from sagas import SagaRun, saga
from tests.sagas.stories import Note, OrderPlaced, Paid, Pay, Refund, Release, Reserve, Reserved


async def branch(run: SagaRun) -> int:
    return 1


@saga("typed")
async def typed(run: SagaRun, placed: OrderPlaced) -> None:
    reserved = await run.step(Reserve(order_id="o"), undo=Release(order_id="o"))
    assert_type(reserved, Reserved)
    assert_type(await run.step(Note(text="a"), timeout_s=3), None)
    two = await run.all(run.step(Reserve(order_id="o")), branch(run))
    assert_type(two, tuple[Reserved, int])
    three = await run.all(run.step(Reserve(order_id="o")), run.step(Pay(payment_id="p")), run.all(branch(run)))
    assert_type(three[1], Paid)
    many = await run.all(*[run.step(Pay(payment_id=p)) for p in "ab"])
    assert_type(many[0], Paid)
    four = await run.all(branch(run), branch(run), branch(run), run.step(Refund(payment_id="p")))
    assert_type(four, tuple[int, int, int, None])
    print(reserved.receipt)  # WRONG: a Reserved has none
    await run.step(placed)  # WRONG: an event is no command
    await run.all(3, branch(run))  # WRONG: no branch
    print(placed.nothing)  # WRONG: the event has no such field
