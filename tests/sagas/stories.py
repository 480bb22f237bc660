"""Messages and sagas that the tests of this room share."""

from __future__ import annotations

from pydantic import BaseModel

from bus.messages import Command, Event, Key, Refused
from sagas import SagaRun, StepFailed, saga


class OrderPlaced(Event, type="orders.order-placed.v1"):
    order_id: Key[str]
    cents: int = 100


class Reserved(BaseModel, frozen=True):
    shelf: str = "A1"


class Paid(BaseModel, frozen=True):
    receipt: str = "r-1"


class Reserve(Command[Reserved], type="stock.reserve.v1"):
    order_id: Key[str]


class Release(Command[None], type="stock.release.v1"):
    order_id: Key[str]


class Pay(Command[Paid], type="payments.pay.v1"):
    payment_id: Key[str]
    cents: int = 100


class Refund(Command[None], type="payments.refund.v1"):
    payment_id: Key[str]


class Ship(Command[None], type="shipping.ship.v1"):
    order_id: Key[str]
    note: str = ""


class CallBack(Command[None], type="shipping.call-back.v1"):
    order_id: Key[str]


class CancelOrder(Command[None], type="orders.cancel-order.v1"):
    order_id: Key[str]
    reason: str


class Note(Command[None], type="notes.note.v1"):
    text: Key[str]


class Erase(Command[None], type="notes.erase.v1"):
    text: Key[str]


class CardDeclined(Refused, code="payments.card-declined"):
    pass


PLACED = OrderPlaced(order_id="o-1")


@saga("fulfil-order", version=1)
async def fulfil_order(run: SagaRun, placed: OrderPlaced) -> None:
    try:
        await run.step(Reserve(order_id=placed.order_id), undo=Release(order_id=placed.order_id))
        payment_id = str(run.uuid())
        paid = await run.step(
            Pay(payment_id=payment_id, cents=placed.cents), undo=Refund(payment_id=payment_id), timeout_s=30
        )
        await run.step(Ship(order_id=placed.order_id, note=paid.receipt))
    except StepFailed as failed:
        await run.step(CancelOrder(order_id=placed.order_id, reason=failed.reason))
        raise


def names(commands: list[Command[object]]) -> list[str]:
    return [type(command).__name__ for command in commands]
