"""Message classes: what a declaration must have, and what it says when it has not."""

from __future__ import annotations

from uuid import UUID

import pytest
from pydantic import BaseModel, ValidationError

from bus.errors import BadMessageClass, UnknownType, UnknownVersion
from bus.messages import Command, Event, Key, Refused, TypeName
from bus.registry import Registry


class Placed(Event, type="orders.placed.v1"):
    order_id: Key[str]
    cents: int = 0


class Noted(Event, type="orders.noted.v2", public=False):
    order_id: Key[UUID]


class Moved(Event, type="crm.customer-moved.v1", topic="legacy.customers"):
    number: Key[int]


class Place(Command[Placed], type="orders.place.v1"):
    order_id: Key[str]


class Forget(Command[None], type="orders.forget.v1"):
    order_id: Key[str]


class Answer(BaseModel):
    text: str


class Ask(Command[Answer], type="orders.ask.v1"):
    order_id: Key[str]


class TestADeclaration:
    def test_knows_its_type_key_and_reply(self) -> None:
        assert Placed.type_name == TypeName("orders", "placed", 1)
        assert str(Placed.type_name) == "orders.placed.v1"
        assert Placed(order_id="o1").key == "o1"
        assert Moved(number=7).key == "7"
        assert (Place.reply_type(), Forget.reply_type(), Ask.reply_type()) == (Placed, None, Answer)

    def test_says_whether_an_event_is_published_and_where_a_foreign_one_comes_from(self) -> None:
        assert (Placed.public, Noted.public) == (True, False)
        assert (Placed.foreign_topic, Moved.foreign_topic) == (None, "legacy.customers")

    def test_is_frozen(self) -> None:
        with pytest.raises(ValidationError):
            Placed(order_id="o1").cents = 5  # type: ignore[misc]

    def test_without_a_key_is_refused_with_what_is_wanted(self) -> None:
        with pytest.raises(BadMessageClass, match=r"Keyless \(orders.keyless.v1\) has none marked as Key"):

            class Keyless(Event, type="orders.keyless.v1"):
                order_id: str

    def test_with_two_keys_is_refused_and_both_are_named(self) -> None:
        with pytest.raises(BadMessageClass, match="has order_id and line_id marked as Key; wanted exactly one"):

            class Twice(Event, type="orders.twice.v1"):
                order_id: Key[str]
                line_id: Key[str]

    @pytest.mark.parametrize("name", ["orders.placed", "placed.v1", "Orders.placed.v1", "orders.placed.v0", "a.b.v1 "])
    def test_with_a_name_outside_the_grammar_is_refused(self, name: str) -> None:
        with pytest.raises(BadMessageClass, match=r"wanted <service>\.<name>\.v<version>"):
            TypeName.parse(name)


class TestTheRegistry:
    def test_finds_a_class_by_name(self) -> None:
        assert Registry([Placed, Place]).find("orders.place.v1") is Place

    def test_tells_an_unknown_version_from_an_unknown_type(self) -> None:
        registry = Registry([Placed, Noted])
        with pytest.raises(UnknownVersion, match="version v9 is unknown here, wanted one of v1"):
            registry.find("orders.placed.v9")
        with pytest.raises(UnknownType, match="not one that this service names"):
            registry.find("orders.vanished.v1")
        assert registry.names_base("orders.placed.v9")
        assert not registry.names_base("orders.vanished.v1")

    def test_refuses_two_classes_with_one_name_and_names_both(self) -> None:
        class Other(Event, type="orders.placed.v1"):
            order_id: Key[str]

        with pytest.raises(BadMessageClass, match=r"claimed by .*Placed and .*Other"):
            Registry([Placed, Other])
        Registry([Placed, Placed])

    def test_refuses_a_class_without_a_type(self) -> None:
        class Base(Event):
            order_id: Key[str]

        with pytest.raises(BadMessageClass, match="Base has no type name"):
            Registry([Base])


class TestARefusal:
    def test_carries_code_message_and_attributes(self) -> None:
        class TooLate(Refused, code="orders.too-late"):
            """The cut-off has passed."""

        refusal = TooLate("after noon", hour=13)
        assert (refusal.code, refusal.message, refusal.attributes) == ("orders.too-late", "after noon", {"hour": 13})
        assert TooLate().message == "orders.too-late"
        assert TooLate("x", a=1) == TooLate("x", a=1)
        assert TooLate("x", a=1) != TooLate("x", a=2)
