"""Payments: one aggregate per payment. A card above 200.00 is declined."""

from typing import Literal

from pydantic import BaseModel

from foldbus import Decider, Service
from shop.messages import (
    CardDeclined,
    PaymentRefunded,
    PaymentRefused,
    PaymentTaken,
    RefundPayment,
    TakePayment,
)

CARD_LIMIT_CENTS = 20_000

PaymentEvent = PaymentTaken | PaymentRefunded
PaymentCommand = TakePayment | RefundPayment


class Payment(BaseModel, frozen=True):
    status: Literal["none", "taken", "refunded"] = "none"
    order_id: str = ""
    cents: int = 0


def evolve(payment: Payment, event: PaymentEvent) -> Payment:
    match event:
        case PaymentTaken():
            return Payment(status="taken", order_id=event.order_id, cents=event.cents)
        case PaymentRefunded():
            return payment.model_copy(update={"status": "refunded"})


def decide(payment: Payment, command: PaymentCommand) -> list[PaymentEvent]:
    match command:
        case TakePayment():
            if payment.status != "none":
                raise PaymentRefused(f"it is {payment.status} already", payment_id=command.payment_id)
            if command.cents > CARD_LIMIT_CENTS:
                raise CardDeclined(cents=command.cents, limit_cents=CARD_LIMIT_CENTS)
            return [PaymentTaken(payment_id=command.payment_id, order_id=command.order_id, cents=command.cents)]
        case RefundPayment():
            if payment.status != "taken":
                raise PaymentRefused(f"it is {payment.status}, not taken", payment_id=command.payment_id)
            return [PaymentRefunded(payment_id=command.payment_id, order_id=payment.order_id, cents=payment.cents)]


payments = Decider("payment", initial=Payment(), evolve=evolve, decide=decide)

app = Service("payments", deciders=[payments])
