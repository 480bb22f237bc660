"""What the shop's services say to each other: shared classes, owned by the service that their type names.

Keys: an order's id, a payment's id, the one stock `cds`, and a parcel, which has its order's id.
"""

from foldbus import Command, Event, Key, Refused

# --- orders ----------------------------------------------------------------------------------------------------------


class OrderPlaced(Event, type="orders.order-placed.v1"):
    order_id: Key[str]
    customer_id: str
    quantity: int
    cents: int


class OrderCompleted(Event, type="orders.order-completed.v1"):
    order_id: Key[str]
    customer_id: str
    quantity: int
    cents: int


class OrderCancelled(Event, type="orders.order-cancelled.v1"):
    order_id: Key[str]
    customer_id: str
    quantity: int
    cents: int
    reason: str


class PlaceOrder(Command[OrderPlaced], type="orders.place-order.v1"):
    order_id: Key[str]
    customer_id: str
    quantity: int
    cents: int


class CompleteOrder(Command[OrderCompleted], type="orders.complete-order.v1"):
    order_id: Key[str]


class CancelOrder(Command[OrderCancelled], type="orders.cancel-order.v1"):
    order_id: Key[str]
    reason: str


class OrderRefused(Refused, code="orders.refused"):
    """The order is not in a state in which this can be done."""


# --- payments --------------------------------------------------------------------------------------------------------


class PaymentTaken(Event, type="payments.payment-taken.v1"):
    payment_id: Key[str]
    order_id: str
    cents: int


class PaymentRefunded(Event, type="payments.payment-refunded.v1"):
    payment_id: Key[str]
    order_id: str
    cents: int


class TakePayment(Command[PaymentTaken], type="payments.take-payment.v1"):
    payment_id: Key[str]
    order_id: str
    cents: int


class RefundPayment(Command[PaymentRefunded], type="payments.refund-payment.v1"):
    payment_id: Key[str]


class CardDeclined(Refused, code="payments.card-declined"):
    """The card does not cover the amount."""


class PaymentRefused(Refused, code="payments.refused"):
    """The payment is not in a state in which this can be done."""


# --- warehouse -------------------------------------------------------------------------------------------------------


class StockReserved(Event, type="warehouse.stock-reserved.v1"):
    stock_id: Key[str]
    order_id: str
    quantity: int


class StockReleased(Event, type="warehouse.stock-released.v1"):
    stock_id: Key[str]
    order_id: str
    quantity: int


class ReserveStock(Command[StockReserved], type="warehouse.reserve-stock.v1"):
    stock_id: Key[str]
    order_id: str
    quantity: int


class ReleaseStock(Command[StockReleased], type="warehouse.release-stock.v1"):
    stock_id: Key[str]
    order_id: str
    quantity: int


class ParcelShipped(Event, type="warehouse.parcel-shipped.v1"):
    order_id: Key[str]
    quantity: int


class ParcelRecalled(Event, type="warehouse.parcel-recalled.v1"):
    order_id: Key[str]


class ShipParcel(Command[ParcelShipped], type="warehouse.ship-parcel.v1"):
    order_id: Key[str]
    quantity: int


class RecallParcel(Command[ParcelRecalled], type="warehouse.recall-parcel.v1"):
    order_id: Key[str]


class OutOfStock(Refused, code="warehouse.out-of-stock"):
    """Fewer CDs are left than the order wants."""


class ParcelTooLarge(Refused, code="warehouse.parcel-too-large"):
    """A parcel holds ten CDs."""


class ParcelRefused(Refused, code="warehouse.refused"):
    """The parcel is not in a state in which this can be done."""
