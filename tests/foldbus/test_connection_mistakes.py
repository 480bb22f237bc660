"""What a connection says at once about a message that could never be answered."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from foldbus import BadMessageClass, Command, Connection, Decider, Event, Key, NobodyDecides, OutcomeUnknown, Service


class Pinged(Event, type="pinger.pinged.v1"):
    name: Key[str]


class Ping(Command[Pinged], type="pinger.ping.v1"):
    name: Key[str]


class Forgotten(Command[None], type="pinger.forgotten.v1"):
    name: Key[str]


class UntypedEvent(Event):
    name: Key[str]


class UntypedCommand(Command[None]):
    name: Key[str]


class Nothing(BaseModel, frozen=True): ...


def evolve(state: Nothing, event: Pinged) -> Nothing:
    return state


def decide(state: Nothing, command: Ping) -> list[Pinged]:
    return [Pinged(name=command.name)]


@pytest.fixture
async def pinger(tmp_path: Path) -> AsyncIterator[Connection]:
    service = Service("pinger", deciders=[Decider("ping", initial=Nothing(), evolve=evolve, decide=decide)])
    async with service.connect(store=f"sqlite:{tmp_path}", bus=f"embedded:{tmp_path}") as connection:
        yield connection


async def test_no_answer_asks_for_a_worker_of_the_service(pinger: Connection) -> None:
    await pinger.inbox.ready()
    with pytest.raises(
        OutcomeUnknown, match=r"is a worker of 'pinger' running there \(foldbus run, or connect\(worker"
    ):
        await pinger.request(Ping(name="a"), timeout_s=0.2)


async def test_no_answer_says_on_which_bus_nobody_answered(pinger: Connection, tmp_path: Path) -> None:
    """Most often it is another one than the worker's."""
    await pinger.inbox.ready()
    with pytest.raises(OutcomeUnknown, match=f"no answer within 0.2 s on embedded:{re.escape(str(tmp_path))};"):
        await pinger.request(Ping(name="a"), timeout_s=0.2)


async def test_an_own_command_that_no_decider_takes_fails_at_once(pinger: Connection) -> None:
    with pytest.raises(NobodyDecides, match=r"pinger\.forgotten\.v1"):
        await pinger.request(Forgotten(name="a"), timeout_s=3600)


async def test_what_is_no_command_fails_at_once(pinger: Connection) -> None:
    wrong: Any = Pinged(name="a")
    for call in (pinger.request, pinger.send, pinger.execute):
        with pytest.raises(BadMessageClass, match="Pinged is no Command"):
            await call(wrong)
    with pytest.raises(BadMessageClass, match="Ping is no Event"):
        async with pinger.unit() as unit:
            unit.publish(Ping(name="a"))  # type: ignore[arg-type]


async def test_a_message_class_without_a_type_name_is_named(pinger: Connection) -> None:
    for call in (pinger.request, pinger.send, pinger.execute):
        with pytest.raises(BadMessageClass, match="UntypedCommand has no type name"):
            await call(UntypedCommand(name="a"))
    async with pinger.unit() as unit:
        with pytest.raises(BadMessageClass, match="UntypedEvent has no type name"):
            unit.publish(UntypedEvent(name="a"))
        with pytest.raises(BadMessageClass, match="UntypedCommand has no type name"):
            unit.send(UntypedCommand(name="a"))


class Elsewhere(Event, type="ponger.ponged.v1"):
    name: Key[str]


class Imported(Event, type="pinger.imported.v1", topic="legacy.pings"):
    name: Key[str]


async def test_an_event_that_others_wait_for_elsewhere_is_not_published(pinger: Connection) -> None:
    async with pinger.unit() as unit:
        with pytest.raises(
            BadMessageClass, match=r"ponger\.ponged\.v1 belongs to service 'ponger', and service 'pinger'"
        ):
            unit.publish(Elsewhere(name="a"))
        with pytest.raises(BadMessageClass, match=r"pinger\.imported\.v1 arrives on 'legacy\.pings'"):
            unit.publish(Imported(name="a"), delay_s=1)
        assert (unit.outgoing, unit.delays) == ((), False)
        unit.publish(Pinged(name="a"))
        assert [one.topic for one in unit.outgoing] == ["pinger.events"]
