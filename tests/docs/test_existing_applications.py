"""docs/existing-applications.md on both pairs: the handler answers, and the FastAPI application's rows and events live
and die together."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from tests.docs.blocks import write_files
from tests.stories.conftest import pair
from tests.stories.pairs import Pair, eventually, unique

pytestmark = pytest.mark.timeout(300)  # whole programs

_ = pair


@pytest.fixture
def documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """The document's two files as modules. The service gets a name of its own: the broker is shared."""
    name = unique("customers")
    for file in write_files("docs/existing-applications.md", tmp_path).values():
        source = (
            file.read_text().replace('"customers.', f'"{name}.').replace('Service("customers"', f'Service("{name}"')
        )
        file.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("customers"), importlib.import_module("web")
    for module in ("customers", "web"):
        del sys.modules[module]


@asynccontextmanager
async def sessions(pair: Pair, service: str) -> Any:
    if pair.name == "embedded":
        engine = create_async_engine(f"sqlite+aiosqlite:///{pair.store.removeprefix('sqlite:')}/{service}.db")
        event.listen(engine.sync_engine, "connect", lambda driver, _: setattr(driver, "isolation_level", None))
        event.listen(engine.sync_engine, "begin", lambda sql: sql.exec_driver_sql("BEGIN IMMEDIATE"))
    else:
        engine = create_async_engine(pair.store.replace("postgresql://", "postgresql+asyncpg://"))
    yield async_sessionmaker(engine)
    await engine.dispose()


async def test_rows_and_events_live_and_die_together(pair: Pair, documented: tuple[Any, Any]) -> None:
    customers, web = documented
    async with (
        pair.connect(customers.app) as worker,
        sessions(pair, customers.app.name) as maker,
    ):
        async with worker.store.transaction() as tx:
            await tx.sql.run_sync(customers.tables.create_all)
        site = web.make_web(maker, pair.store, pair.bus)
        async with (
            site.router.lifespan_context(site),
            httpx.AsyncClient(
                transport=httpx.ASGITransport(site, raise_app_exceptions=False), base_url="http://site"
            ) as browser,
        ):
            first = await browser.post("/customers/anna", params={"town": "Ulm"})
            again = await browser.post("/customers/anna", params={"town": "Bonn"})
        assert (first.status_code, again.status_code) == (200, 500), "the second breaks the primary key"
        moved = await worker.request(customers.MoveCustomer(customer_id="anna", town="Köln"), timeout_s=30)
        assert (moved.town, moved.moves) == ("Köln", 1)
        with pytest.raises(customers.NoSuchCustomer):
            await worker.request(customers.MoveCustomer(customer_id="otto", town="Köln"), timeout_s=30)
        async with (
            pair.transport() as transport,
            transport.tail(f"{customers.app.name}.events", start="begin") as topic,
        ):
            told: list[str] = []

            async def look() -> list[str]:
                found = await topic.poll(max_records=10, timeout_s=0.2)
                told.extend(json.loads(record.value or b"")["town"] for record in found)
                return told

            await eventually(look, lambda towns: towns == ["Ulm", "Köln"], timeout_s=20)
