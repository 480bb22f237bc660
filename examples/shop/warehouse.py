"""Warehouse: one stock of CDs, and a parcel per order.

The stock is the example's hot key, on purpose: it holds one number and decides blindly. Nothing but the claim protects
it from a second effect of a command that is delivered twice.
"""

from typing import Literal

from pydantic import BaseModel

from foldbus import Decider, Service
from shop.messages import (
    OutOfStock,
    ParcelRecalled,
    ParcelRefused,
    ParcelShipped,
    ParcelTooLarge,
    RecallParcel,
    ReleaseStock,
    ReserveStock,
    ShipParcel,
    StockReleased,
    StockReserved,
)

INITIAL_CDS = 200_000
PARCEL_CDS_MAX = 10


class Stock(BaseModel, frozen=True):
    left: int = INITIAL_CDS


def evolve_stock(stock: Stock, event: StockReserved | StockReleased) -> Stock:
    match event:
        case StockReserved():
            return Stock(left=stock.left - event.quantity)
        case StockReleased():
            return Stock(left=stock.left + event.quantity)


def decide_stock(stock: Stock, command: ReserveStock | ReleaseStock) -> list[StockReserved | StockReleased]:
    match command:
        case ReserveStock():
            if command.quantity > stock.left:
                raise OutOfStock(wanted=command.quantity, left=stock.left)
            return [StockReserved(stock_id=command.stock_id, order_id=command.order_id, quantity=command.quantity)]
        case ReleaseStock():
            return [StockReleased(stock_id=command.stock_id, order_id=command.order_id, quantity=command.quantity)]


class Parcel(BaseModel, frozen=True):
    status: Literal["none", "shipped", "recalled"] = "none"


def evolve_parcel(parcel: Parcel, event: ParcelShipped | ParcelRecalled) -> Parcel:
    match event:
        case ParcelShipped():
            return Parcel(status="shipped")
        case ParcelRecalled():
            return Parcel(status="recalled")


def decide_parcel(parcel: Parcel, command: ShipParcel | RecallParcel) -> list[ParcelShipped | ParcelRecalled]:
    match command:
        case ShipParcel():
            if command.quantity > PARCEL_CDS_MAX:
                raise ParcelTooLarge(quantity=command.quantity, most=PARCEL_CDS_MAX)
            if parcel.status != "none":
                raise ParcelRefused(f"it is {parcel.status} already", order_id=command.order_id)
            return [ParcelShipped(order_id=command.order_id, quantity=command.quantity)]
        case RecallParcel():
            if parcel.status != "shipped":
                raise ParcelRefused(f"it is {parcel.status}, not shipped", order_id=command.order_id)
            return [ParcelRecalled(order_id=command.order_id)]


stock = Decider("stock", initial=Stock(), evolve=evolve_stock, decide=decide_stock)
parcels = Decider("parcel", initial=Parcel(), evolve=evolve_parcel, decide=decide_parcel)

app = Service("warehouse", deciders=[stock, parcels])
