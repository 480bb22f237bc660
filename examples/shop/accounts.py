"""What `verify` knows and concludes: fed record by record, with some memory per order and little per event.

Nothing here uses the code that is under test: events are JSON, sagas are read from their stored history.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID
from zlib import crc32

from bus.envelope import Envelope
from bus.transport import Delivery
from shop.purchases import Figures

FINDINGS_MAX = 20
"""How many findings of one invariant are told in words."""

_SAGA = "foldbus.saga-"


class Findings:
    """What is wrong, by invariant: `found` the first of them in words, `total` how many there are."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}
        self.total: Counter[str] = Counter()

    @property
    def ok(self) -> bool:
        return not self.total

    def add(self, rule: str, text: str) -> None:
        self.total[rule] += 1
        texts = self.found.setdefault(rule, [])
        if len(texts) < FINDINGS_MAX:
            texts.append(text)


@dataclass(slots=True)
class _Order:
    """One order, over all services: how often each thing happened to it, and how much."""

    customer: str = ""
    quantity: int = 0
    cents: int = 0
    reason: str = ""
    placed: int = 0
    completed: int = 0
    cancelled: int = 0
    reserved: int = 0
    reserved_cds: int = 0
    released: int = 0
    released_cds: int = 0
    taken: int = 0
    taken_cents: int = 0
    refunded: int = 0
    refunded_cents: int = 0
    shipped: int = 0
    recalled: int = 0
    saga: str = ""


@dataclass(slots=True)
class _Step:
    path: str
    id: bytes
    type: str
    undoable: bool
    outcome: str | None = None


@dataclass(slots=True)
class _Saga:
    start: UUID | None = None
    order: str = ""
    status: str = "running"
    steps: dict[str, _Step] = field(default_factory=dict[str, _Step])
    """By path, the latest attempt of each, in the order of the first."""


@dataclass(slots=True)
class _Published:
    """An event of a log that must be on a topic, exactly as it is in the log."""

    topic: str
    position: int
    version: int
    crc: int
    seen: bool = False


@dataclass(slots=True)
class _Row:
    placed: int = 0
    completed: int = 0
    cds: int = 0
    cents: int = 0
    cancelled: Counter[str] = field(default_factory=Counter[str])

    def values(self) -> tuple[int, int, dict[str, int], int, int]:
        return (self.placed, self.completed, dict(self.cancelled), self.cds, self.cents)


class Account:
    """First `logged` for every log (payments and warehouse before orders), then `delivered` and `published` for the
    topics, `read_model`, `journal`, at last `close`; then `findings` is complete."""

    def __init__(self) -> None:
        self.findings = Findings()
        self._orders: defaultdict[str, _Order] = defaultdict(_Order)
        self._sagas: defaultdict[str, _Saga] = defaultdict(_Saga)
        self._versions: dict[tuple[str, str, str], int] = {}
        self._positions: Counter[str] = Counter()
        self._public: dict[bytes, _Published] = {}
        self._effects: dict[bytes, str] = {}
        """Command to the type of the event that it caused."""
        self._starts: dict[bytes, str] = {}
        """OrderPlaced events to their orders."""
        self._steps: dict[bytes, tuple[str, str | None]] = {}
        """The sagas' commands: type and outcome."""
        self._commands: dict[bytes, str] = {}
        """Commands that are on a topic, and on which."""
        self._newest: dict[tuple[str, int, bytes, bytes], int] = {}
        self._heard: set[bytes] = set()
        self._duplicates = 0
        self._rows: defaultdict[str, _Row] = defaultdict(_Row)
        self._rows_upto: Mapping[tuple[str, int], int] = {}

    # --- the logs -----------------------------------------------------------------------------------------------

    def logged(self, service: str, record: Envelope) -> None:
        stream, version, position = record.stream, record.version, record.position or 0
        if stream is None or version is None:
            self.findings.add("I3", f"{service} {record.id} has no stream")
            return
        if position <= self._positions[service]:
            self.findings.add("I3", f"{service}: position {position} comes after {self._positions[service]}")
        self._positions[service] = position
        wanted = self._versions.get((service, stream.category, stream.id), 0) + 1
        if version != wanted:
            self.findings.add("I3", f"{service}: {stream} has version {version} where {wanted} comes next")
        self._versions[service, stream.category, stream.id] = version
        data = json.loads(record.data)
        if record.type.startswith(_SAGA):
            self._saga_event(stream.id, record.type.removeprefix(_SAGA).partition(".")[0], data)
            return
        if record.topic is not None:
            if record.id.bytes in self._public:
                self.findings.add("I2", f"{service}: event {record.id} is in the log twice")
            self._public[record.id.bytes] = _Published(record.topic, position, version, crc32(record.data))
        cause = record.causation_id.bytes if record.causation_id else b""
        if cause in self._effects:
            self.findings.add(
                "I2", f"{service}: command {record.causation_id} caused {self._effects[cause]} and {record.type}"
            )
        self._effects[cause] = record.type
        self._domain_event(record, data)

    def _domain_event(self, record: Envelope, data: Mapping[str, Any]) -> None:
        order = self._orders[data["order_id"]]
        match record.type.split(".")[1]:
            case "order-placed":
                order.placed += 1
                order.customer, order.quantity, order.cents = data["customer_id"], data["quantity"], data["cents"]
                self._starts[record.id.bytes] = data["order_id"]
            case "order-completed":
                order.completed += 1
            case "order-cancelled":
                order.cancelled += 1
                order.reason = data["reason"]
            case "stock-reserved":
                order.reserved += 1
                order.reserved_cds += data["quantity"]
            case "stock-released":
                order.released += 1
                order.released_cds += data["quantity"]
            case "payment-taken":
                order.taken += 1
                order.taken_cents += data["cents"]
            case "payment-refunded":
                order.refunded += 1
                order.refunded_cents += data["cents"]
            case "parcel-shipped":
                order.shipped += 1
            case "parcel-recalled":
                order.recalled += 1
            case _:
                self.findings.add("I1", f"nobody here knows {record.type} {record.id}")

    # --- sagas --------------------------------------------------------------------------------------------------

    def _saga_event(self, id: str, what: str, data: Mapping[str, Any]) -> None:
        saga = self._sagas[id]
        if saga.status in ("completed", "compensated"):
            self.findings.add("I4", f"saga {id} was {saga.status}, then came {what}")
            return
        match what:
            case "started":
                if saga.start is not None:
                    self.findings.add("I4", f"saga {id} started twice")
                saga.start, saga.order = UUID(data["start"]["id"]), data["start"]["key"]
            case "step-scheduled":
                path, attempt = data["path"], data.get("attempt", 1)
                if attempt == 1 and path in saga.steps:
                    self.findings.add("I4", f"saga {id} scheduled step {path} twice")
                undoable = data.get("undo_type") is not None
                saga.steps[path] = _Step(path, UUID(data["id"]).bytes, data["type"], undoable)
            case "step-replied" | "step-timed-out":
                step = saga.steps.get(data["path"])
                if step is None or step.outcome is not None:
                    self.findings.add("I2", f"saga {id} heard twice, or unasked, of step {data['path']}")
                    return
                step.outcome = "unknown" if what == "step-timed-out" else data["outcome"]
            case "completed" | "compensated" | "parked" | "compensating":
                saga.status = what
                if what in ("completed", "compensated"):
                    self._saga_ended(id, saga)
            case _:  # cancelled, retried: it goes on
                saga.status = "running"

    def _saga_ended(self, id: str, saga: _Saga) -> None:
        """Its compensations are what was done (or may have been), in reverse, once each, and they worked."""
        done = [s for s in saga.steps.values() if s.undoable and not s.path.startswith("undo:")]
        owed = ("ok", "unknown") if saga.status == "compensated" else ("unknown",)
        wanted = [f"undo:{step.path}" for step in reversed(done) if step.outcome in owed]
        found = [step.path for step in saga.steps.values() if step.path.startswith("undo:")]
        if wanted != found:
            self.findings.add("I4", f"saga {id} {saga.status} with compensations {found}, wanted {wanted}")
        for step in saga.steps.values():
            if step.outcome is None or (step.path.startswith("undo:") and step.outcome != "ok"):
                self.findings.add("I4", f"saga {id} {saga.status} while step {step.path} was {step.outcome or 'open'}")
            self._steps[step.id] = (step.type, step.outcome)
        saga.steps = {}

    # --- topics -------------------------------------------------------------------------------------------------

    def delivered(self, delivery: Delivery) -> None:
        """A command or a reply."""
        headers = dict(delivery.headers)
        id = UUID(headers["ce_id"].decode()).bytes
        self._in_order(delivery, headers, id)
        if delivery.topic.endswith(".commands"):
            self._commands[id] = delivery.topic

    def published(self, delivery: Delivery) -> None:
        """An event: as in the log it came from, and folded once into what the read model must be."""
        headers = dict(delivery.headers)
        id = UUID(headers["ce_id"].decode())
        first = self._in_order(delivery, headers, id.bytes)
        event = self._public.get(id.bytes)
        where = f"{delivery.topic}[{delivery.partition}]@{delivery.offset}"
        if event is None:
            self.findings.add("I1", f"{where} holds event {id}, which no log has")
            return
        event.seen = True
        found = (delivery.topic, int(headers["ce_position"]), int(headers["ce_sequence"]), crc32(delivery.value or b""))
        if found != (event.topic, event.position, event.version, event.crc):
            self.findings.add("I1", f"{where} holds event {id} as {found}, the log {event}")
        place = (delivery.topic, delivery.partition)
        if first and delivery.topic == "orders.events" and delivery.offset < self._rows_upto.get(place, 0):
            self._fold(headers["ce_type"].decode(), json.loads(delivery.value or b"null"))

    def _in_order(self, delivery: Delivery, headers: Mapping[str, bytes], id: bytes) -> bool:
        """First deliveries of a partition, and of a key, are in the order of their log; the rest repeats them."""
        first = id not in self._heard
        self._heard.add(id)
        self._duplicates += not first
        if first and "ce_position" in headers:  # what a client sent is in no log
            source, position = headers["ce_source"], int(headers["ce_position"])
            where = f"{delivery.topic}[{delivery.partition}]@{delivery.offset}"
            self._rises((delivery.topic, delivery.partition, source, b""), position, f"{where}: position")
            if "ce_sequence" in headers:
                key = headers["ce_stream"] + b"/" + headers.get("ce_streamid", delivery.key or b"")
                self._rises((delivery.topic, -1, source, key), int(headers["ce_sequence"]), f"{where}: version", hole=1)
        return first

    def _rises(self, what: tuple[str, int, bytes, bytes], number: int, where: str, *, hole: int = 0) -> None:
        last = self._newest.get(what, 0)
        if number <= last or (hole and number > last + hole):
            self.findings.add("I3", f"{where} {number} was first delivered after {last}")
        self._newest[what] = max(last, number)

    # --- the read model -----------------------------------------------------------------------------------------

    def read_model_at(self, places: Mapping[tuple[str, int], int]) -> None:
        """The checkpoint that the rows belong to; before `published`."""
        self._rows_upto = places

    def _fold(self, type: str, data: Mapping[str, Any]) -> None:
        row = self._rows[data["customer_id"]]
        match type.split(".")[1]:
            case "order-placed":
                row.placed += 1
            case "order-completed":
                row.completed += 1
                row.cds += data["quantity"]
                row.cents += data["cents"]
            case _:
                row.cancelled[data["reason"]] += 1

    def read_model(self, rows: Mapping[str, tuple[int, int, Mapping[str, int], int, int]]) -> None:
        for key in sorted(rows.keys() | self._rows.keys()):
            folded = self._rows[key].values() if key in self._rows else None
            if rows.get(key) != folded:
                self.findings.add("I5", f"customer {key} is {rows.get(key)}, the topic says {folded}")

    # --- the buyers ---------------------------------------------------------------------------------------------

    def journal(self, facts: Iterable[tuple[str, UUID, str]]) -> None:
        intended: set[bytes] = set()
        for what, id, key in facts:
            intended.add(id.bytes)
            if what == "ack" and self._effects.get(id.bytes) != "orders.order-placed.v1":
                self.findings.add("I1", f"order {key} ({id}) was acknowledged and is not in the log")
        for raw, type in self._effects.items():
            if type == "orders.order-placed.v1" and raw not in intended:
                self.findings.add("I2", f"command {UUID(bytes=raw)} placed an order that nobody intended")

    # --- the sum of it ------------------------------------------------------------------------------------------

    def close(self) -> None:
        """What can only be said at the end."""
        add = self.findings.add
        started: Counter[bytes] = Counter(saga.start.bytes for saga in self._sagas.values() if saga.start is not None)
        for start, order_id in self._starts.items():
            if started[start] != 1:
                add(
                    "I1" if not started[start] else "I2", f"order {order_id} started {started[start]} sagas, wanted one"
                )
        for id, saga in self._sagas.items():
            if saga.start is None or saga.start.bytes not in self._starts:
                add("I2", f"saga {id} was started by {saga.start}, which is not in the log")
            if saga.status not in ("completed", "compensated", "parked"):
                add("I4", f"saga {id} of order {saga.order} is {saga.status}")
            for step in saga.steps.values():
                self._steps[step.id] = (step.type, step.outcome)
            self._orders[saga.order].saga = saga.status
        for raw, event in self._public.items():
            if not event.seen:
                add("I1", f"event {UUID(bytes=raw)} at {event.position} is not on {event.topic}")
        self._commands_and_effects()
        for order_id, order in self._orders.items():
            self._order(order_id, order)

    def _commands_and_effects(self) -> None:
        add = self.findings.add
        for raw, (type, outcome) in self._steps.items():
            topic = f"{type.partition('.')[0]}.commands"
            if self._commands.get(raw) != topic:
                add("I1", f"a saga's {type} {UUID(bytes=raw)} is not on {topic}")
            if outcome == "ok" and raw not in self._effects:
                add("I1", f"{type} {UUID(bytes=raw)} answered ok and is in no log")
            if outcome in ("refused", "died", "cancelled") and raw in self._effects:
                add("I2", f"{type} {UUID(bytes=raw)} was {outcome} and caused {self._effects[raw]}")
        for raw, found in self._commands.items():
            if raw not in self._steps and raw not in self._effects:
                add("I1", f"command {UUID(bytes=raw)} is on {found} and had no effect")
        for raw, caused in self._effects.items():
            if raw not in self._commands:
                add("I2", f"{caused} was caused by {UUID(bytes=raw) if raw else 'nothing'}, which is on no topic")

    def _order(self, order_id: str, o: _Order) -> None:
        """Across all services: everything once when it completed, and undone in full when not."""
        paid = int(o.cents > 0)
        completed = (
            o.completed, o.cancelled, o.reserved, o.reserved_cds, o.released, o.taken, o.taken_cents, o.refunded,
            o.shipped, o.recalled, o.saga,
        ) == (1, 0, 1, o.quantity, 0, paid, o.cents, 0, 1, 0, "completed")  # fmt: skip
        undone = (
            (o.completed, o.cancelled, o.saga) == (0, 1, "compensated")
            and (o.reserved, o.reserved_cds, o.taken, o.taken_cents, o.shipped)
            == (o.released, o.released_cds, o.refunded, o.refunded_cents, o.recalled)
            and max(o.reserved, o.taken, o.shipped) <= 1
        )
        if o.placed != 1 or not (completed or undone or o.saga == "parked"):
            self.findings.add("I2" if max(o.placed, o.reserved, o.taken, o.shipped) > 1 else "I4", f"{order_id}: {o}")

    def figures(self) -> Figures:
        """As a plain pass over the purchases would count them."""
        out, reasons = Figures(), Counter[str]()
        for o in self._orders.values():
            out.placed += o.placed
            out.completed += o.completed
            out.completed_cds += o.completed * o.quantity
            out.completed_cents += o.completed * o.cents
            out.taken_cents += o.taken_cents
            out.refunded_cents += o.refunded_cents
            out.cds_left += o.released_cds - o.reserved_cds
            if o.cancelled:
                reasons[o.reason] += o.cancelled
        out.customers = len({o.customer for o in self._orders.values()})
        out.declined = reasons.pop("payments.card-declined", 0)
        out.too_large = reasons.pop("warehouse.parcel-too-large", 0)
        out.out_of_stock = reasons.pop("warehouse.out-of-stock", 0)
        out.other_reasons = reasons.total()
        return out

    def counts(self) -> dict[str, int]:
        return {
            "orders": len(self._orders),
            "sagas": len(self._sagas),
            "events": sum(self._versions.values()),
            "commands": len(self._commands),
            "repeated deliveries": self._duplicates,
        }
