"""The shop's input: real purchases from a CSV file, and what a plain pass over that file says should come out."""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shop.payments import CARD_LIMIT_CENTS
from shop.warehouse import INITIAL_CDS, PARCEL_CDS_MAX

FILE = Path(__file__).with_name("purchases.csv")
COLUMNS = ("purchase_id", "customer_id", "date", "quantity", "amount_cents")


@dataclass(frozen=True, slots=True)
class Purchase:
    purchase_id: str
    customer_id: str
    quantity: int
    cents: int


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is no purchase: its line in the file, and why."""

    line: int
    reason: str


class BadFile(Exception):
    """The file is not of the wanted shape at all."""


def read_purchases(path: Path, *, limit: int | None = None) -> Iterator[Purchase | BadRow]:
    """Rows in order; at most `limit` of them. Raises BadFile for a missing file or another header."""
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = csv.reader(file)
            header = next(rows, list[str]())
            if tuple(header) != COLUMNS:
                raise BadFile(f"{path}: the header is {','.join(header)[:100]!r}, wanted {','.join(COLUMNS)!r}")
            seen: set[str] = set()
            for row in itertools.islice(rows, limit):
                yield _parse(row, rows.line_num, seen)
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror}") from error


def _parse(row: list[str], line: int, seen: set[str]) -> Purchase | BadRow:
    if len(row) != len(COLUMNS):
        return BadRow(line, f"{len(row)} columns, wanted {len(COLUMNS)}")
    purchase_id, customer_id, _date, quantity, cents = row
    if not purchase_id or not customer_id:
        return BadRow(line, "purchase_id or customer_id is empty")
    if purchase_id in seen:
        return BadRow(line, f"purchase_id {purchase_id!r} appeared before")
    for name, text, least in (("quantity", quantity, 1), ("amount_cents", cents, 0)):
        if not (text.isascii() and text.isdigit() and least <= int(text) < 2**31):
            return BadRow(line, f"{name} is {text!r}, wanted a whole number from {least} on")
    seen.add(purchase_id)
    return Purchase(purchase_id, customer_id, int(quantity), int(cents))


@dataclass(slots=True)
class Figures:
    """What came out, of the shop or of the plain pass; equal means that nothing was lost or done twice."""

    placed: int = 0
    completed: int = 0
    completed_cds: int = 0
    completed_cents: int = 0
    declined: int = 0
    too_large: int = 0
    out_of_stock: int = 0
    other_reasons: int = 0
    taken_cents: int = 0
    refunded_cents: int = 0
    cds_left: int = INITIAL_CDS
    customers: int = 0

    @property
    def cancelled(self) -> int:
        return self.declined + self.too_large + self.out_of_stock + self.other_reasons


@dataclass(slots=True)
class CustomerFigures:
    placed: int = 0
    completed: int = 0
    cancelled: Counter[str] = field(default_factory=Counter[str])
    cds: int = 0
    cents: int = 0


def plain_pass(purchases: Iterator[Purchase]) -> tuple[Figures, dict[str, CustomerFigures]]:
    """The rules of the shop, applied one purchase after another: no services, no events."""
    out = Figures()
    customers: dict[str, CustomerFigures] = {}
    for purchase in purchases:
        customer = customers.setdefault(purchase.customer_id, CustomerFigures())
        out.placed += 1
        customer.placed += 1
        if purchase.quantity > out.cds_left:
            out.out_of_stock += 1
            customer.cancelled["warehouse.out-of-stock"] += 1
        elif purchase.cents > CARD_LIMIT_CENTS:
            out.declined += 1
            customer.cancelled["payments.card-declined"] += 1
        elif purchase.quantity > PARCEL_CDS_MAX:
            out.too_large += 1
            out.taken_cents += purchase.cents
            out.refunded_cents += purchase.cents
            customer.cancelled["warehouse.parcel-too-large"] += 1
        else:
            out.completed += 1
            out.completed_cds += purchase.quantity
            out.completed_cents += purchase.cents
            out.taken_cents += purchase.cents
            out.cds_left -= purchase.quantity
            customer.completed += 1
            customer.cds += purchase.quantity
            customer.cents += purchase.cents
    out.customers = len(customers)
    return out, customers
