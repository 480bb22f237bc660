"""Parked messages as columns, shared by the adapters: the envelope, the record it came in, its last failure.

A row has the envelope as `rows.document` and its data; `details`, JSON, says where the envelope had its place in a log
and what record it was: topic, partition, offset, time, headers. The record's value is nearly always the envelope's data
and is not stored twice then. What is read back equals what was given, but for the epoch of the assignment.
"""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from bus.envelope import Failure, StreamId
from bus.transport import Assignment, Delivery
from eventstore import rows
from eventstore.checks import check_envelope, check_name, check_text
from eventstore.errors import BadUnit
from eventstore.parking import Parked, Waiting
from eventstore.port import Claim, Fence, Outcome, Unit, Verdict


class Lost(Exception):
    """Raised within a transaction to undo it: `outcome` is what to answer instead."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(str(outcome.verdict))
        self.outcome = outcome


class Columns(NamedTuple):
    envelope: str
    data: bytes
    details: str
    record_key: bytes | None
    record_value: bytes | None


def columns(message: Waiting) -> Columns:
    envelope, delivery = message.envelope, message.delivery
    details: dict[str, Any] = {}
    if envelope.stream is not None:
        details["stream"] = (envelope.stream.category, envelope.stream.id)
    if envelope.version is not None:
        details["version"] = envelope.version
    if envelope.position is not None:
        details["position"] = envelope.position
    key = value = None
    if delivery is not None:
        key, value = delivery.key, delivery.value
        same = value == envelope.data
        details["record"] = {
            "topic": delivery.topic,
            "partition": delivery.partition,
            "offset": delivery.offset,
            "time": rows.micros(delivery.time),
            "headers": [(name, text.hex()) for name, text in delivery.headers],
            "same": same,
        }
        if same:
            value = None
    document = rows.document(envelope, epoch=envelope.epoch)
    # The standard library's: a header's name may hold half a surrogate pair.
    return Columns(document, envelope.data, json.dumps(details), key, value)


def message(document: str, data: bytes, details: str, key: bytes | None, value: bytes | None) -> Waiting:
    """The inverse."""
    found = json.loads(details)
    stream = found.get("stream")
    envelope = replace(
        rows.from_document(document, data),
        stream=None if stream is None else StreamId(*stream),
        version=found.get("version"),
        position=found.get("position"),
    )
    record = found.get("record")
    if record is None:
        return Waiting(envelope)
    delivery = Delivery(
        assignment=Assignment(record["topic"], record["partition"]),
        offset=record["offset"],
        key=key,
        value=data if record["same"] else value,
        headers=tuple((name, bytes.fromhex(text)) for name, text in record["headers"]),
        time=rows.instant(record["time"]),
    )
    return Waiting(envelope, delivery)


def failure_document(failure: Failure | None) -> str | None:
    if failure is None:
        return None
    return json.dumps(
        {
            "error": failure.error,
            "message": failure.message,
            "stack": failure.stack,
            "attempts": failure.attempts,
            "first_failed_at": rows.micros(failure.first_failed_at),
            "failed_at": rows.micros(failure.failed_at),
            "code_version": failure.code_version,
        }
    )


def failure(document: str | None) -> Failure | None:
    if document is None:
        return None
    found = json.loads(document)
    return Failure(
        error=found["error"],
        message=found["message"],
        stack=found["stack"],
        attempts=found["attempts"],
        first_failed_at=rows.instant(found["first_failed_at"]),
        failed_at=rows.instant(found["failed_at"]),
        code_version=found["code_version"],
    )


# --- what is asked is checked ----------------------------------------------------------------------------------------


def check_message(consumer: str, message: Waiting) -> None:
    """Raises BadUnit."""
    check_name("a consumer", consumer)
    check_envelope(message.envelope)
    delivery = message.delivery
    if delivery is not None and delivery.time.tzinfo is None:
        raise BadUnit(f"{message.envelope.id} came in a record with a time without a time zone; nothing was written")


def check_failure(failure: Failure) -> None:
    """Raises BadUnit."""
    if failure.first_failed_at.tzinfo is None or failure.failed_at.tzinfo is None:
        raise BadUnit("a failure at a time without a time zone; nothing was written")


def check_effect(consumer: str, message_id: UUID, key: str, parked: Parked | None) -> None:
    """Raises BadUnit."""
    check_name("a consumer", consumer)
    check_text("a claim's key", key)
    if parked is not None:
        of = (parked.consumer, parked.message.envelope.id, parked.key)
        if of != (consumer, message_id, key):
            raise BadUnit(
                f"parked message {of[1]} of {of[0]} is none of {consumer}'s {message_id}; nothing was written"
            )


def check_claim(unit: Unit) -> Claim:
    """Raises BadUnit."""
    if unit.claim is None:
        raise BadUnit("the unit that ends an effect has no claim; nothing was written")
    return unit.claim


def check_head(parked: Parked, unit: Unit) -> Claim:
    """The claim of the unit that handles `parked`. Raises BadUnit."""
    claim, of = unit.claim, parked.message.envelope.id
    if claim is None or (claim.consumer, claim.message_id, claim.key) != (parked.consumer, of, parked.key):
        raise BadUnit(
            f"the unit that handles parked message {of} of {parked.consumer} must claim it, with its key; nothing was "
            "written"
        )
    return claim


def check_instead(parked: Parked, instead: Waiting) -> None:
    """Raises BadUnit."""
    check_message(parked.consumer, instead)
    if instead.envelope.key != parked.key:
        raise BadUnit(
            f"{instead.envelope.id} has key {instead.envelope.key[:80]!r}, what it would take the place of has "
            f"{parked.key[:80]!r}; nothing was written"
        )


def check_cancel(consumer: str, step: UUID, unit: Unit) -> Claim:
    """The claim of the undo. Raises BadUnit."""
    claim = unit.claim
    if claim is None or (claim.consumer, claim.fences, claim.fence) != (consumer, step, Fence.CANCEL):
        raise BadUnit(f"what cancels {step} of {consumer} must fence it, with {Fence.CANCEL!r}; nothing was written")
    return claim


def check_due(due_at: datetime | None) -> None:
    """Raises ValueError."""
    if due_at is not None and due_at.tzinfo is None:
        raise ValueError(f"due_at is {due_at}, without a time zone")


def check_limit(limit: int) -> None:
    """Raises ValueError."""
    if limit < 1:
        raise ValueError(f"limit is {limit}; wanted 1 or more")


def whole(outcome: Outcome) -> Outcome:
    """The outcome of a unit that was committed; raises Lost for any other."""
    if outcome.verdict is not Verdict.COMMITTED:
        raise Lost(outcome)
    return outcome


__all__ = [
    "Columns",
    "Lost",
    "check_cancel",
    "check_claim",
    "check_due",
    "check_effect",
    "check_failure",
    "check_head",
    "check_instead",
    "check_limit",
    "check_message",
    "columns",
    "failure",
    "failure_document",
    "message",
    "whole",
]
