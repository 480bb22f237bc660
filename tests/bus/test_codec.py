"""The codec: bytes and messages, replies of every outcome, and what is said of bytes that do not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from bus.codec import (
    DEPTH_MAX,
    HEADROOM_BYTES,
    JsonCodec,
    check_size,
    command_type_name,
    died_error,
    died_reply,
    reply_type_name,
)
from bus.envelope import Envelope, Kind, Origin, ReplyOutcome, ReplyTo
from bus.errors import MessageTooLarge, Undecodable, UnknownType, UnknownVersion
from bus.messages import Command, Event, Key, Refused
from bus.registry import Registry
from bus.seams import SystemClock, Uuid7Ids


class Placed(Event, type="orders.placed.v1"):
    order_id: Key[str]
    cents: int


class Place(Command[Placed], type="orders.place.v1"):
    order_id: Key[str]


class Deep(Event, type="orders.deep.v1"):
    order_id: Key[str]
    value: Any = None


class TooLate(Refused, code="orders.too-late"):
    """The cut-off has passed."""


@pytest.fixture
def codec() -> JsonCodec:
    return JsonCodec(Registry([Placed, Place], [TooLate]))


def origin() -> Origin:
    ids = Uuid7Ids()
    return Origin("orders", ids.new(), SystemClock().now(), correlation_id=ids.new())


def placed(codec: JsonCodec, **changes: Any) -> Envelope:
    return replace(codec.encode(Placed(order_id="o1", cents=5), origin(), topic="orders.events"), **changes)


def asked(codec: JsonCodec) -> Envelope:
    to = ReplyTo("shop.inbox", "k", "me")
    return codec.encode(Place(order_id="o1"), origin(), topic="orders.commands", reply_to=to)


class TestAMessage:
    def test_comes_back_equal_from_its_bytes(self, codec: JsonCodec) -> None:
        envelope = placed(codec)
        assert (envelope.kind, envelope.type, envelope.key) == (Kind.EVENT, "orders.placed.v1", "o1")
        assert envelope.data == b'{"order_id":"o1","cents":5}'
        assert codec.decode(envelope) == Placed(order_id="o1", cents=5)

    def test_with_more_fields_than_we_know_is_taken(self, codec: JsonCodec) -> None:
        assert codec.decode(placed(codec, data=b'{"order_id":"o1","cents":5,"new":1}')).key == "o1"

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            (b"\xff\xfe", "orders.placed.v1"),
            (b"", "orders.placed.v1"),
            (b'{"order_id":"o1"}', "cents: Field required"),
            (b'{"order_id":"o1","cents":"many"}', "cents: .* \\(found 'many'\\)"),
            (b"[1]", "orders.placed.v1 does not fit Placed"),
            (b'{"order_id":"other","cents":5}', "the record's key is 'o1', but field 'order_id' says 'other'"),
        ],
    )
    def test_whose_bytes_do_not_fit_says_what_was_found_and_wanted(
        self, codec: JsonCodec, data: bytes, said: str
    ) -> None:
        with pytest.raises(Undecodable, match=said):
            codec.decode(placed(codec, data=data))

    def test_of_an_unknown_type_or_version_says_so(self, codec: JsonCodec) -> None:
        with pytest.raises(UnknownVersion):
            codec.decode(placed(codec, type="orders.placed.v2"))
        with pytest.raises(UnknownType):
            codec.decode(placed(codec, type="orders.gone.v1"))

    @pytest.mark.parametrize("key", ["", "a\x00b", "x" * 1025, "é" * 600])
    def test_with_a_key_that_cannot_be_one_is_refused(self, codec: JsonCodec, key: str) -> None:
        with pytest.raises(Undecodable, match="wanted 1 to 1024 bytes without NUL"):
            codec.encode(Placed(order_id=key, cents=0), origin())

    def test_over_the_limit_is_refused_when_it_is_staged(self, codec: JsonCodec) -> None:
        envelope = placed(codec, data=b"x" * 1000)
        check_size(envelope, 1000 + 2 + HEADROOM_BYTES)
        with pytest.raises(MessageTooLarge, match="the limit is 5097; nothing was staged or sent"):
            check_size(envelope, 1000 + 2 + HEADROOM_BYTES - 1)

    @pytest.mark.parametrize("wrap", [lambda inner: [inner], lambda inner: {"a": inner}])
    @pytest.mark.parametrize("depth", [DEPTH_MAX, 190, 230, 300, 20_000])
    def test_that_nests_too_deep_to_be_read_back_is_refused_before_it_is_stored(self, depth: int, wrap: Any) -> None:
        codec = JsonCodec(Registry([Deep]))
        value: Any = [{}] * 200  # wide is not deep
        for _ in range(depth - 3):
            value = wrap(value)
        deepest = codec.encode(Deep(order_id="o1", value=value), origin()) if depth == DEPTH_MAX else None
        if deepest is not None:
            assert codec.decode(deepest) == Deep(order_id="o1", value=value)
            value = wrap(value)
        with pytest.raises(Undecodable, match=f"at most {DEPTH_MAX} levels"):
            codec.encode(Deep(order_id="o1", value=value), origin())

    @pytest.mark.parametrize("data", [b"[" * 200_000 + b"]" * 200_000, b'{"a":' * 200_000 + b"1" + b"}" * 200_000])
    def test_of_endless_depth_from_elsewhere_is_undecodable(self, data: bytes) -> None:
        codec = JsonCodec(Registry([Deep]))
        with pytest.raises(Undecodable):
            codec.decode(replace(codec.encode(Deep(order_id="o1"), origin()), data=data))


class TestAReply:
    def test_of_ok_brings_the_value_and_the_way_back(self, codec: JsonCodec) -> None:
        command = asked(codec)
        reply = codec.encode_reply(command, Placed(order_id="o1", cents=7), origin())
        assert (reply.kind, reply.type) == (Kind.REPLY, "orders.place.reply.v1")
        assert (reply.topic, reply.key, reply.causation_id) == ("shop.inbox", "k", command.id)
        assert reply.correlation_id == command.correlation_id
        assert codec.decode_reply(reply, Place) == Placed(order_id="o1", cents=7)

    def test_of_refused_brings_the_named_refusal_with_its_attributes(self, codec: JsonCodec) -> None:
        reply = codec.encode_reply(asked(codec), TooLate("noon", hour=13), origin())
        refusal = codec.decode_reply(reply, Place)
        assert reply.outcome is ReplyOutcome.REFUSED
        assert isinstance(refusal, TooLate)
        assert refusal == TooLate("noon", hour=13)

    def test_with_an_unknown_refusal_brings_a_plain_one(self, codec: JsonCodec) -> None:
        stranger = Refused("no", code="other.no", why="x")
        found = codec.decode_reply(codec.encode_reply(asked(codec), stranger, origin()), Place)
        assert type(found) is Refused
        assert (cast("Refused", found).code, cast("Refused", found).attributes) == ("other.no", {"why": "x"})

    def test_of_a_refusal_with_its_own_constructor_is_rebuilt_without_it(self) -> None:
        class Strict(Refused, code="orders.strict"):
            def __init__(self, *, left: int) -> None:
                super().__init__("strict", left=left)

        codec = JsonCodec(Registry([Placed, Place], [Strict]))
        found = codec.decode_reply(codec.encode_reply(asked(codec), Strict(left=3), origin()), Place)
        assert isinstance(found, Strict)
        assert found.attributes == {"left": 3}

    def test_of_died_says_why(self, codec: JsonCodec) -> None:
        reply = died_reply(asked(codec), "KeyError: 'x'", origin())
        assert (reply.outcome, died_error(reply)) == (ReplyOutcome.DIED, "KeyError: 'x'")

    def test_nobody_asked_for_is_kept_without_a_topic(self, codec: JsonCodec) -> None:
        command = replace(asked(codec), reply_to=None)
        reply = codec.encode_reply(command, None, origin())
        assert (reply.topic, reply.key, reply.data) == (None, "o1", b"null")

    def test_type_names_its_command(self) -> None:
        assert command_type_name(reply_type_name("orders.place.v1")) == "orders.place.v1"
        for wrong in ("orders.place.v1", "reply", "foldbus.saga-retry.v1"):
            with pytest.raises(Undecodable, match="is no reply type"):
                command_type_name(wrong)
