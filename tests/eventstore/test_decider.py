"""Deciders: what is read from annotations, what start-up refuses, and what a decision becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from pydantic import BaseModel

from bus.codec import JsonCodec
from bus.envelope import Envelope, Origin, ReplyOutcome, ReplyTo, StreamId
from bus.errors import UnknownType
from bus.messages import Command, Event, Key, Message, Refused
from bus.registry import Registry
from bus.seams import SystemClock, Uuid7Ids
from eventstore.decider import Aggregate, BadDecider, BadDecision, Decider, DeciderBehaviour, NoState
from eventstore.port import Bodies


class Opened(Event, type="bank.opened.v1"):
    account: Key[str]


class Deposited(Event, type="bank.deposited.v1"):
    account: Key[str]
    cents: int


class Audited(Event, type="bank.audited.v1", public=False):
    account: Key[str]


class Open(Command[Opened], type="bank.open.v1"):
    account: Key[str]


class Deposit(Command[Deposited], type="bank.deposit.v1"):
    account: Key[str]
    cents: int


class Audit(Command[None], type="bank.audit.v1"):
    account: Key[str]
    wrong: str = ""


class Balance(BaseModel, frozen=True):
    cents: int = 0
    open: bool = False


class Ask(Command[Balance], type="bank.ask.v1"):
    account: Key[str]


class Closed(Refused, code="bank.closed"):
    """There is no such account."""


BankEvent = Opened | Deposited | Audited


def evolve(state: Balance, event: BankEvent) -> Balance:
    match event:
        case Opened():
            return replace_model(state, open=True)
        case Deposited(cents=cents):
            return replace_model(state, cents=state.cents + cents)
        case Audited():
            return state


def replace_model(state: Balance, **changes: Any) -> Balance:
    return state.model_copy(update=changes)


def decide(state: Balance, command: Open | Deposit | Audit) -> list[BankEvent]:
    match command:
        case Open():
            return [Opened(account=command.account)]
        case Deposit():
            if not state.open:
                raise Closed(account=command.account)
            return [Audited(account=command.account), Deposited(account=command.account, cents=command.cents)]
        case Audit():
            if command.wrong == "key":
                return [Audited(account="somebody else's")]
            if command.wrong == "type":
                return [Stray(account=command.account)]  # type: ignore[list-item]
            return []


class Stray(Event, type="bank.stray.v1"):
    account: Key[str]


account = Decider("account", initial=Balance(), evolve=evolve, decide=decide)
codec = JsonCodec(Registry([Opened, Deposited, Audited, Open, Deposit, Audit, Ask]))
ids = Uuid7Ids()


@pytest.fixture
def behaviour() -> DeciderBehaviour:
    return DeciderBehaviour([account], service="bank", codec=codec, ids=ids, clock=SystemClock())


def enveloped(message: Message, **changes: Any) -> Envelope:
    origin = Origin(
        "shop", ids.new(), SystemClock().now(), ids.new(), tenant="t1", headers={"traceparent": "00-1", "x": "y"}
    )
    to = ReplyTo("shop.inbox", "k", "me")
    return replace(codec.encode(message, origin, topic="bank.commands", reply_to=to), **changes)


class TestADecider:
    def test_reads_its_commands_and_events_from_annotations(self) -> None:
        assert account.commands == (Open, Deposit, Audit)
        assert account.events == (Opened, Deposited, Audited)
        assert account.stream("a1") == StreamId("account", "a1")

    def test_without_annotations_says_where_they_are_missing(self) -> None:
        def bare(state, event):  # type: ignore[no-untyped-def]
            return state

        with pytest.raises(BadDecider, match="bare does not say which Events it takes"):
            Decider("x", initial=Balance(), evolve=bare, decide=decide)

    def test_of_something_else_than_messages_names_it(self) -> None:
        def odd(state: Balance, event: Opened | int) -> Balance:
            return state

        with pytest.raises(BadDecider, match=r"odd takes <class 'int'> as event; wanted subclasses of Event"):
            Decider("x", initial=Balance(), evolve=odd, decide=decide)  # type: ignore[arg-type]

    def test_that_can_give_no_reply_is_refused(self) -> None:
        def asked(state: Balance, command: Ask) -> list[BankEvent]:
            return []

        with pytest.raises(BadDecider, match="can give no reply to Ask: it wants Balance"):
            Decider("x", initial=Balance(), evolve=evolve, decide=asked)

        def answer(state: Balance, command: Ask, events: Sequence[BankEvent]) -> Balance:
            return state

        Decider("x", initial=Balance(), evolve=evolve, decide=asked, reply=answer)

    def test_of_a_command_that_another_decides_too_is_refused(self) -> None:
        twin = Decider("twin", initial=Balance(), evolve=evolve, decide=decide)
        with pytest.raises(BadDecider, match=r"bank.open.v1 is decided by .*account.* and by .*twin"):
            DeciderBehaviour([account, twin], service="bank", codec=codec, ids=ids, clock=SystemClock())


class TestADecision:
    def test_carries_events_with_topic_cause_and_trace_and_the_typed_reply(self, behaviour: DeciderBehaviour) -> None:
        command = enveloped(Deposit(account="a1", cents=5))
        state = behaviour.initial(behaviour.stream_of(command))
        state = replace(state, state=Balance(open=True, cents=1))
        decision = behaviour.decide(state, command)
        assert [event.type for event in decision.events] == ["bank.audited.v1", "bank.deposited.v1"]
        assert [event.topic for event in decision.events] == [None, "bank.events"]  # the private one is not published
        assert {event.causation_id for event in decision.events} == {command.id}
        assert {event.correlation_id for event in decision.events} == {command.correlation_id}
        assert {event.tenant for event in decision.events} == {"t1"}
        assert {tuple(event.headers) for event in decision.events} == {("traceparent",)}
        assert decision.state.state == Balance(open=True, cents=6)
        assert decision.reply is not None
        assert codec.decode_reply(decision.reply, Deposit) == Deposited(account="a1", cents=5)

    def test_refused_is_an_answer_without_events(self, behaviour: DeciderBehaviour) -> None:
        command = enveloped(Deposit(account="a1", cents=5))
        decision = behaviour.decide(behaviour.initial(StreamId("account", "a1")), command)
        assert decision.events == ()
        assert decision.reply is not None
        assert decision.reply.outcome is ReplyOutcome.REFUSED

    def test_of_nothing_is_answered_none_where_none_is_wanted(self, behaviour: DeciderBehaviour) -> None:
        decision = behaviour.decide(behaviour.initial(StreamId("account", "a")), enveloped(Audit(account="a")))
        assert decision.events == ()
        assert decision.reply is not None
        assert codec.decode_reply(decision.reply, Audit) is None

    def test_with_an_event_of_another_key_is_a_mistake(self, behaviour: DeciderBehaviour) -> None:
        with pytest.raises(BadDecision, match="with key \"somebody else's\" for a command with key 'a'"):
            behaviour.decide(behaviour.initial(StreamId("account", "a")), enveloped(Audit(account="a", wrong="key")))

    def test_with_an_event_that_evolve_does_not_take_is_a_mistake(self, behaviour: DeciderBehaviour) -> None:
        with pytest.raises(BadDecision, match="decided Stray for Audit; wanted one of Opened, Deposited, Audited"):
            behaviour.decide(behaviour.initial(StreamId("account", "a")), enveloped(Audit(account="a", wrong="type")))

    def test_equals_the_fold_of_what_it_stored(self, behaviour: DeciderBehaviour) -> None:
        stream = StreamId("account", "a1")
        opened = behaviour.decide(behaviour.initial(stream), enveloped(Open(account="a1")))
        paid = behaviour.decide(opened.state, enveloped(Deposit(account="a1", cents=5)))
        assert behaviour.fold(behaviour.initial(stream), [*opened.events, *paid.events]) == paid.state

    def test_of_an_unknown_command_is_bad_input(self, behaviour: DeciderBehaviour) -> None:
        with pytest.raises(UnknownType):
            behaviour.stream_of(enveloped(Open(account="a"), type="bank.close.v1"))


def forgetful(state: Balance, event: BankEvent) -> Balance:
    match event:
        case Opened():
            return replace_model(state, open=True)
        case Deposited(cents=cents):
            return replace_model(state, cents=state.cents + cents)
    return None  # type: ignore[return-value]  # as a match without a case for the third one does


def closing(state: Balance | None, event: BankEvent) -> Balance | None:
    return None if isinstance(event, Audited) else Balance(open=True)


def behaviour_of(evolve: Any, initial: Any) -> DeciderBehaviour:
    decider: Any = Decider("account", initial=initial, evolve=evolve, decide=decide)
    return DeciderBehaviour([decider], service="bank", codec=codec, ids=ids, clock=SystemClock())


class TestAStateThatIsNone:
    missing = "evolve of Decider\\('account'\\) gave None for bank.audited.v1; wanted a state"
    opened, audited, paid = (Opened(account="a"), Audited(account="a"), Deposited(account="a", cents=1))

    def test_is_found_before_the_event_that_made_it_is_stored(self) -> None:
        behaviour = behaviour_of(forgetful, Balance())
        state = behaviour.initial(StreamId("account", "a"))
        state = replace(state, state=Balance(open=True))
        with pytest.raises(NoState, match=self.missing):
            behaviour.decide(state, enveloped(Deposit(account="a", cents=1)))

    def test_names_the_event_that_made_it_and_not_the_next_one_that_met_it(self) -> None:
        behaviour = behaviour_of(forgetful, Balance())
        state = behaviour.initial(StreamId("account", "a"))
        stored = [enveloped(event) for event in (self.opened, self.audited)]
        with pytest.raises(NoState, match=self.missing):
            behaviour.fold(state, stored)
        with pytest.raises(NoState, match=self.missing) as found:
            behaviour.fold(state, [*stored, enveloped(self.paid)])
        assert isinstance(found.value.__context__, AttributeError)
        bodies = Bodies(StreamId("account", "a"), [one.type for one in stored], [one.data for one in stored])
        with pytest.raises(NoState, match=self.missing):
            behaviour.fold_bodies(state, bodies)

    def test_another_error_stays_what_it_is(self) -> None:
        def wrong(state: Balance, event: BankEvent) -> Balance:
            raise LookupError("of its own")

        behaviour = behaviour_of(wrong, Balance())
        with pytest.raises(LookupError, match="of its own"):
            behaviour.fold(behaviour.initial(StreamId("account", "a")), [enveloped(self.opened)])

    def test_is_a_state_like_any_other_where_evolve_says_so(self) -> None:
        behaviour = behaviour_of(closing, None)
        state = behaviour.initial(StreamId("account", "a"))
        stored = [enveloped(event) for event in (self.opened, self.audited)]
        assert behaviour.fold(state, stored).state is None
        assert behaviour.fold(Aggregate(state.decider, Balance()), [*stored, enveloped(self.paid)]).state == Balance(
            open=True
        )
        bodies = Bodies(StreamId("account", "a"), [one.type for one in stored], [one.data for one in stored])
        folded = behaviour.fold_bodies(state, bodies)
        assert folded is not None
        assert folded.state is None
