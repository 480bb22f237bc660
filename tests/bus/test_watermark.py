"""The watermark of a part against the plain definition: the first received offset that is not complete."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bus.engine.watermark import Part
from bus.transport import Assignment

PART = Assignment("t", 0, 1)


def test_nothing_received_leaves_the_watermark_where_reading_starts() -> None:
    assert Part(PART, start=7).watermark == 7


def test_a_later_completion_does_not_pass_an_earlier_open_offset() -> None:
    part = Part(PART, start=5)
    for offset in (5, 6, 7):
        assert part.receive(offset)
    part.complete(7)
    assert part.watermark == 5
    part.complete(5)
    assert part.watermark == 6
    part.complete(6)
    assert part.watermark == 8


def test_offsets_that_never_arrive_hold_nothing_up() -> None:
    part = Part(PART, start=0)
    for offset in (3, 9, 100):
        part.receive(offset)
    part.complete(9)
    part.complete(3)
    assert part.watermark == 100
    part.complete(100)
    assert part.watermark == 101


def test_an_offset_seen_before_is_refused() -> None:
    part = Part(PART, start=4)
    assert not part.receive(3)
    assert part.receive(4)
    assert not part.receive(4)
    assert part.spread == 1


@given(st.lists(st.integers(1, 5), max_size=60), st.randoms(use_true_random=False), st.integers(0, 10))
def test_the_watermark_is_the_first_incomplete_received_offset(gaps: list[int], rng, start: int) -> None:
    """Receives and completes in random interleaving; the model recomputes from scratch."""
    part = Part(PART, start=start)
    offsets, at = [], start - 1
    for gap in gaps:
        at += gap
        offsets.append(at)
    received: list[int] = []
    done: set[int] = set()
    coming = list(offsets)
    while coming or len(done) < len(received):
        if coming and rng.random() < 0.5:
            offset = coming.pop(0)
            assert part.receive(offset)
            received.append(offset)
        elif len(done) < len(received):
            offset = rng.choice([o for o in received if o not in done])
            part.complete(offset)
            done.add(offset)
        still_open = [o for o in received if o not in done]
        after_last = received[-1] + 1 if received else start
        assert part.watermark == (still_open[0] if still_open else after_last)
        assert part.spread == len([o for o in received if o >= part.watermark])
