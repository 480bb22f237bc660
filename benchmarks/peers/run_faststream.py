"""FastStream as one would use it: a subscriber per topic, a session per message. One run, one figure.

Reads one order from its arguments (JSON), consumes the topic from its beginning in a group of its own and prints
messages per second, from the first one in hand until the last effect is committed, and how many effects there are.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from typing import Any
from uuid import UUID

from faststream import AckPolicy
from faststream.kafka import KafkaBroker
from faststream.kafka.annotations import KafkaMessage
from pydantic import BaseModel
from sqlalchemy import Uuid
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

CONSUMER = "faststream"


class Base(DeclarativeBase):
    pass


class Inbox(Base):
    __tablename__ = "inbox"
    consumer: Mapped[str] = mapped_column(primary_key=True)
    message_id: Mapped[UUID] = mapped_column(Uuid, primary_key=True)


class Shown(Base):
    __tablename__ = "shown"
    key: Mapped[str] = mapped_column(primary_key=True)
    count: Mapped[int]


class Note(BaseModel):
    note_id: str
    n: int
    text: str


class Run:
    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        self.total: int = order["total"]
        self.began = self.ended = 0.0
        self.done = 0
        self.over = asyncio.Event()

    def count(self) -> None:
        self.done += 1
        if self.done == self.total:
            self.ended = time.perf_counter()
            self.over.set()

    async def figure(self) -> float:
        order = self.order
        engine = create_async_engine(order["dsn"].replace("postgresql://", "postgresql+asyncpg://"), pool_size=16)
        session = async_sessionmaker(engine, expire_on_commit=False)
        broker = KafkaBroker(order["kafka"], logger=None)
        options: dict[str, Any] = {"max_workers": order["workers"]} if order["workers"] > 1 else {}

        @broker.subscriber(
            order["topic"],
            group_id=order["group"],
            auto_offset_reset="earliest",
            ack_policy=AckPolicy.ACK_FIRST if order["ack"] == "first" else AckPolicy.ACK,
            **options,
        )
        async def handle(note: Note, message: KafkaMessage) -> None:
            if not self.began:
                self.began = time.perf_counter()
            if order["sql"]:
                id = UUID(message.headers["ce_id"])
                async with session() as db, db.begin():
                    if await db.get(Inbox, (CONSUMER, id)) is None:
                        db.add(Inbox(consumer=CONSUMER, message_id=id))
                        shown = await db.get(Shown, note.note_id, with_for_update=True)
                        if shown is None:
                            db.add(Shown(key=note.note_id, count=1))
                        else:
                            shown.count += 1
            self.count()

        async with broker:
            await broker.start()
            async with asyncio.timeout(order["timeout_s"]):
                await self.over.wait()
        await engine.dispose()
        return self.total / (self.ended - self.began)


if __name__ == "__main__":
    logging.disable(logging.ERROR)
    run = Run(json.loads(sys.argv[1]))
    print(json.dumps({"value": asyncio.run(run.figure()), "done": run.done}), flush=True)
