"""Insights: read models only. One row per customer, folded from the orders' events alone."""

from pydantic import BaseModel

from foldbus import Service, projection
from shop.messages import OrderCancelled, OrderCompleted, OrderPlaced


class Customer(BaseModel, frozen=True):
    customer_id: str
    placed: int = 0
    completed: int = 0
    cancelled: dict[str, int] = {}
    """How many orders were cancelled, by reason."""
    cds: int = 0
    cents: int = 0


@projection("customers", version=1, key=lambda event: event.customer_id)
def customers(row: Customer | None, event: OrderPlaced | OrderCompleted | OrderCancelled) -> Customer:
    row = row or Customer(customer_id=event.customer_id)
    match event:
        case OrderPlaced():
            return row.model_copy(update={"placed": row.placed + 1})
        case OrderCompleted():
            return row.model_copy(
                update={
                    "completed": row.completed + 1,
                    "cds": row.cds + event.quantity,
                    "cents": row.cents + event.cents,
                }
            )
        case OrderCancelled(reason=reason):
            counted = {**row.cancelled, reason: row.cancelled.get(reason, 0) + 1}
            return row.model_copy(update={"cancelled": counted})


app = Service("insights", projections=[customers])
