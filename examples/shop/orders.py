"""Orders: the aggregate, and the saga that fulfils an order across the other services or undoes what it did."""

from typing import Literal

from pydantic import BaseModel

from foldbus import Decider, SagaRun, Service, StepFailed, saga
from shop.messages import (
    CancelOrder,
    CardDeclined,
    CompleteOrder,
    OrderCancelled,
    OrderCompleted,
    OrderPlaced,
    OrderRefused,
    OutOfStock,
    ParcelTooLarge,
    PlaceOrder,
    RecallParcel,
    RefundPayment,
    ReleaseStock,
    ReserveStock,
    ShipParcel,
    TakePayment,
)

STEP_TIMEOUT_S = 3600

OrderEvent = OrderPlaced | OrderCompleted | OrderCancelled
OrderCommand = PlaceOrder | CompleteOrder | CancelOrder


class Order(BaseModel, frozen=True):
    status: Literal["new", "placed", "completed", "cancelled"] = "new"
    customer_id: str = ""
    quantity: int = 0
    cents: int = 0


def evolve(order: Order, event: OrderEvent) -> Order:
    match event:
        case OrderPlaced():
            return Order(status="placed", customer_id=event.customer_id, quantity=event.quantity, cents=event.cents)
        case OrderCompleted():
            return order.model_copy(update={"status": "completed"})
        case OrderCancelled():
            return order.model_copy(update={"status": "cancelled"})


def decide(order: Order, command: OrderCommand) -> list[OrderEvent]:
    match command:
        case PlaceOrder():
            if order.status != "new":
                raise OrderRefused("it was placed before", order_id=command.order_id)
            return [
                OrderPlaced(
                    order_id=command.order_id,
                    customer_id=command.customer_id,
                    quantity=command.quantity,
                    cents=command.cents,
                )
            ]
        case CompleteOrder():
            _must_be_placed(order, command.order_id)
            return [
                OrderCompleted(
                    order_id=command.order_id,
                    customer_id=order.customer_id,
                    quantity=order.quantity,
                    cents=order.cents,
                )
            ]
        case CancelOrder():
            _must_be_placed(order, command.order_id)
            return [
                OrderCancelled(
                    order_id=command.order_id,
                    customer_id=order.customer_id,
                    quantity=order.quantity,
                    cents=order.cents,
                    reason=command.reason,
                )
            ]


def _must_be_placed(order: Order, order_id: str) -> None:
    if order.status != "placed":
        raise OrderRefused(f"it is {order.status}, not placed", order_id=order_id)


orders = Decider("order", initial=Order(), evolve=evolve, decide=decide)


@saga("fulfil-order", version=1)
async def fulfil_order(run: SagaRun, placed: OrderPlaced) -> None:
    order_id, quantity = placed.order_id, placed.quantity
    try:
        await run.step(
            ReserveStock(stock_id="cds", order_id=order_id, quantity=quantity),
            undo=ReleaseStock(stock_id="cds", order_id=order_id, quantity=quantity),
            timeout_s=STEP_TIMEOUT_S,
        )
        if placed.cents > 0:
            payment_id = str(run.uuid())
            await run.step(
                TakePayment(payment_id=payment_id, order_id=order_id, cents=placed.cents),
                undo=RefundPayment(payment_id=payment_id),
                timeout_s=STEP_TIMEOUT_S,
            )
        await run.step(
            ShipParcel(order_id=order_id, quantity=quantity),
            undo=RecallParcel(order_id=order_id),
            timeout_s=STEP_TIMEOUT_S,
        )
    except StepFailed as failed:
        await run.step(CancelOrder(order_id=order_id, reason=failed.reason))
        raise
    await run.step(CompleteOrder(order_id=order_id))


app = Service(
    "orders",
    deciders=[orders],
    sagas=[fulfil_order],
    refusals=[CardDeclined, OutOfStock, ParcelTooLarge],
)
