"""Those who look for other processes' writes wake their event loop together."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.embedded.hub import Hub
from bus.embedded.transport import EmbeddedTransport
from bus.ticks import FASTEST_S, SLOWEST_S, Pace
from bus.transport import TopicSpec
from eventstore.sqlite.store import SqliteStore
from eventstore.sqlite.watch import Watch
from tests.bus.transports import eventually

NOW = st.floats(min_value=0.0, max_value=1e7)


@given(NOW, st.floats(min_value=0.0, max_value=100.0))
def test_a_look_is_never_now_and_never_late_beside_the_quiet_there_was(now: float, quiet_s: float) -> None:
    wait = Pace(now - quiet_s).next_look(now) - now
    assert 0 < wait <= max(FASTEST_S, min(SLOWEST_S, quiet_s / 20)) + 1e-6


@given(NOW, st.floats(min_value=0.0, max_value=0.999), st.floats(min_value=0.5, max_value=100.0))
def test_who_looks_seldom_looks_when_everybody_else_does(now: float, share: float, quiet_s: float) -> None:
    """Whenever within the same stretch one asks."""
    one, other = Pace(now - quiet_s), Pace(now - quiet_s)
    at = one.next_look(now)
    assert other.next_look(now + share * (at - now)) == at
    assert one.next_look(at) == one.next_look(at - 1e-9) > at


def test_a_change_is_followed_by_looks_close_together() -> None:
    pace = Pace(0.0)
    assert pace.next_look(100.0) - 100.0 >= 0.02
    pace.changed(100.0)
    assert pace.next_look(100.0) - 100.0 <= FASTEST_S + 1e-6


async def test_a_store_and_a_bus_that_wait_wake_their_loop_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    rounds: list[set[str]] = []

    def told(name: str, look: Any) -> Any:
        def and_tell(self: Any) -> None:
            if not looked:
                asyncio.get_running_loop().call_soon(over)
            looked.append(name)
            look(self)

        return and_tell

    def over() -> None:  # in the loop's next round, and the first call of it
        rounds.append(set(looked))
        looked.clear()

    monkeypatch.setattr(Hub, "_look", told("bus", Hub._look))
    monkeypatch.setattr(Watch, "_tick", told("store", Watch._tick))
    path = tmp_path / "store.db"
    await SqliteStore.migrate(path, service="shop")
    async with (
        SqliteStore.open(path, service="shop") as store,
        EmbeddedTransport.open(tmp_path / "bus.db") as transport,
    ):
        await transport.admin.create([TopicSpec("orders", partitions=1)])
        async with transport.tail("orders", start="begin") as reader, asyncio.TaskGroup() as waiting:
            polling = waiting.create_task(reader.poll(max_records=1, timeout_s=600.0))
            watching = waiting.create_task(store.wait_past(0, timeout_s=600.0))
            loop, paces = asyncio.get_running_loop(), [transport._hub._pace, store._watch._pace]  # type: ignore[union-attr]
            await eventually(
                lambda: all(loop.time() - pace._changed_at > 0.5 for pace in paces), what="nothing happens"
            )
            rounds.clear()
            await eventually(lambda: len(rounds) > 10, what="some more looks")
            assert rounds[1:11] == [{"bus", "store"}] * 10
            polling.cancel()
            watching.cancel()


async def test_a_renewed_lease_is_no_change_of_the_log(tmp_path: Path) -> None:
    """Each worker renews its own every few seconds: a store that took that for a change would never look seldom."""
    path = tmp_path / "store.db"
    await SqliteStore.migrate(path, service="shop")
    async with SqliteStore.open(path, service="shop") as store, SqliteStore.open(path, service="shop") as twin:
        store._watch.look()
        version, changed_at = store._watch._seen_version, store._watch._pace._changed_at
        async with twin.leases.lead("relay", ttl_s=60.0):
            store._watch.look()
        assert store._watch._seen_version != version
        assert store._watch._pace._changed_at == changed_at
