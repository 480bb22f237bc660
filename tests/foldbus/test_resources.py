"""Plain services: what a lifespan gives, when it is entered and left, and what middleware may and may not do."""

# Without `from __future__ import annotations`: handlers and classes are made per test.
import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest
import pytest_asyncio
from sqlalchemy import insert

from bus.codec import JsonCodec
from bus.envelope import Origin, ReplyTo
from bus.processing import Failed, Item
from bus.registry import Registry
from eventstore.port import Store
from foldbus import (
    AT_MOST_ONCE,
    Answer,
    BadService,
    BareContext,
    CallNext,
    Command,
    Connection,
    Context,
    EffectContext,
    Event,
    Handler,
    HandlerContext,
    Key,
    LifespanFailed,
    Message,
    MiddlewareError,
    Service,
    ThreadContext,
)
from foldbus.worker import command_processor
from tests.eventstore.stores import IDS, NOON, whole_log
from tests.foldbus.test_delivery import Seen, Tracker, connect
from tests.foldbus.test_effects import answers, kinds, settle
from tests.foldbus.test_handlers import accounts, balance, tables
from tests.stories.pairs import Pair, eventually, unique


@dataclass
class Mailer:
    sent: list[str] = field(default_factory=list)
    closed: bool = False

    def send(self, who: str) -> None:
        assert not self.closed, "used after it was closed"
        self.sent.append(who)


class Sends(Protocol):
    def send(self, who: str) -> None: ...


def mail_service(mailer: Mailer, *, lifespan: Any = None, handlers: Any = None, **options: Any) -> tuple[Service, Any]:
    """A service of plain handlers, and the command that it takes."""
    name = unique("mail")

    class Send(Command[None], type=f"{name}.send.v1"):
        who: Key[str]

    class Sent(Event, type=f"{name}.sent.v1"):
        who: Key[str]

    async def send(command: Send, ctx: EffectContext[Mailer]) -> None:
        ctx.deps.send(command.who)
        ctx.publish(Sent(who=command.who))

    async def count(event: Sent, ctx: BareContext[Mailer]) -> None:
        ctx.deps.send(f"counted {event.who}")

    def note(event: Sent, ctx: ThreadContext[Mailer]) -> None:
        ctx.deps.send(f"noted {event.who}")

    made = [Handler(send, effect=True), Handler(count, delivery=AT_MOST_ONCE), Handler(note)]
    service = Service(name, handlers=handlers or made, lifespan=lifespan, partitions=2, **options)
    return service, Send


class TestALifespan:
    async def test_is_entered_once_before_the_first_message_and_left_after_the_drain(self, pair: Pair) -> None:
        mailer, entered = Mailer(), list[Connection]()

        @asynccontextmanager
        async def lifespan(connection: Connection) -> AsyncIterator[Mailer]:
            entered.append(connection)
            async with asyncio.TaskGroup() as group:  # must be left by the task that entered it
                sleeping = group.create_task(asyncio.sleep(3600))
                yield mailer
                sleeping.cancel()
            mailer.closed = True

        service, Send = mail_service(mailer, lifespan=lifespan)
        async with pair.connect(service) as connection:
            await connection.request(Send(who="a"), timeout_s=30)
            await connection.send(Send(who="b"))

            async def sent() -> set[str]:
                return set(mailer.sent)

            wanted = {"a", "b", "counted a", "counted b", "noted a", "noted b"}
            await eventually(sent, lambda found: found >= wanted)
            assert not mailer.closed
        assert mailer.closed
        assert entered == [connection]
        assert sorted(mailer.sent) == sorted(wanted), "each once"

    async def test_is_there_for_what_is_in_hand_when_the_worker_ends(self, tmp_path: Path) -> None:
        name, mailer, inside = unique("mail"), Mailer(), asyncio.Event()

        class Send(Command[None], type=f"{name}.send.v1"):
            who: Key[str]

        async def send(command: Send, ctx: EffectContext[Mailer]) -> None:
            inside.set()
            while connection.worker is not None and connection.worker.running_now:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            await asyncio.sleep(0)
            ctx.deps.send(command.who)

        @asynccontextmanager
        async def lifespan(connection: Connection) -> AsyncIterator[Mailer]:
            yield mailer
            mailer.closed = True

        service = Service(name, handlers=[Handler(send, effect=True)], lifespan=lifespan)
        where: dict[str, Any] = {"store": f"sqlite:{tmp_path}", "bus": f"embedded:{tmp_path}"}
        async with service.connect(**where, worker=True) as connection:
            await connection.send(Send(who="a"))
            await asyncio.wait_for(inside.wait(), 30)
        assert (mailer.sent, mailer.closed) == (["a"], True)

    async def test_that_fails_is_told_and_nothing_is_consumed(self, tmp_path: Path) -> None:
        @asynccontextmanager
        async def lifespan(connection: Connection) -> AsyncIterator[Mailer]:
            raise OSError("no route to the mail server")
            yield Mailer()

        service, Send = mail_service(Mailer(), lifespan=lifespan)
        where: dict[str, Any] = {"store": f"sqlite:{tmp_path}", "bus": f"embedded:{tmp_path}"}
        async with service.connect(**where) as client:
            id = await client.send(Send(who="a"))
        with pytest.raises(
            LifespanFailed, match=r"could not be entered, OSError: no route.*nothing was consumed"
        ) as told:
            async with service.connect(**where, worker=True):
                raise AssertionError("it runs all the same")
        assert isinstance(told.value.__cause__, OSError)
        async with service.connect(**where) as client:
            assert (await client.transport.admin.committed(service.name, [f"{service.name}.commands"])) == {}
            assert (await client.store.examine(service.name, [(id, "a")]))[0].state == "new"

    async def test_that_gives_nothing_is_told(self, tmp_path: Path) -> None:
        @asynccontextmanager
        async def lifespan(connection: Connection) -> AsyncIterator[Mailer]:
            if connection is None:
                yield Mailer()

        service, _ = mail_service(Mailer(), lifespan=lifespan)
        with pytest.raises(LifespanFailed, match="could not be entered, RuntimeError: generator didn't yield"):
            async with service.connect(store=f"sqlite:{tmp_path}", bus=f"embedded:{tmp_path}", worker=True):
                pass

    async def test_that_gives_something_else_than_handlers_want_is_told(self, tmp_path: Path) -> None:
        @asynccontextmanager
        async def lifespan(connection: Connection) -> AsyncIterator[str]:
            yield "mailer"

        service, _ = mail_service(Mailer(), lifespan=lifespan)
        with pytest.raises(LifespanFailed, match="gives str, but handler 'send' wants Mailer"):
            async with service.connect(store=f"sqlite:{tmp_path}", bus=f"embedded:{tmp_path}", worker=True):
                pass

    async def test_that_ends_while_the_worker_runs_ends_the_worker(self, tmp_path: Path) -> None:
        fail = asyncio.Event()

        @asynccontextmanager
        async def lifespan(connection: Connection) -> AsyncIterator[Mailer]:
            async def lose() -> None:
                await fail.wait()
                raise ConnectionError("the pool is gone")

            async with asyncio.TaskGroup() as group:
                group.create_task(lose())
                yield Mailer()

        service, _ = mail_service(Mailer(), lifespan=lifespan)

        async def run() -> None:
            async with service.connect(store=f"sqlite:{tmp_path}", bus=f"embedded:{tmp_path}", worker=True):
                fail.set()
                await asyncio.Event().wait()

        with pytest.raises(ExceptionGroup) as told:
            await run()
        assert told.group_contains(ConnectionError)

    async def test_whose_end_fails_says_so(self, tmp_path: Path) -> None:
        @asynccontextmanager
        async def lifespan(connection: Connection) -> AsyncIterator[Mailer]:
            yield Mailer()
            raise OSError("could not say goodbye")

        service, _ = mail_service(Mailer(), lifespan=lifespan)
        with pytest.raises(OSError, match="goodbye"):
            async with service.connect(store=f"sqlite:{tmp_path}", bus=f"embedded:{tmp_path}", worker=True):
                pass

    async def test_is_entered_by_execute_without_a_worker_and_left_with_the_connection(self, tmp_path: Path) -> None:
        mailer, entered = Mailer(), list[int]()

        @asynccontextmanager
        async def lifespan(connection: Connection) -> AsyncIterator[Mailer]:
            entered.append(1)
            yield mailer
            mailer.closed = True

        service, Send = mail_service(mailer, lifespan=lifespan)
        async with service.connect(store=f"sqlite:{tmp_path}", bus=f"embedded:{tmp_path}") as connection:
            assert entered == []
            await asyncio.gather(*(connection.execute(Send(who=who)) for who in "abc"))
            assert (entered, sorted(mailer.sent), mailer.closed) == ([1], ["a", "b", "c"], False)
        assert mailer.closed

    def test_that_is_missing_is_refused_at_start_up(self) -> None:
        with pytest.raises(BadService, match=r"wants Mailer as ctx\.deps, but the service has no lifespan"):
            mail_service(Mailer())

    async def test_may_give_what_only_fits_a_protocol(self, tmp_path: Path) -> None:
        name, mailer = unique("mail"), Mailer()

        class Send(Command[None], type=f"{name}.send.v1"):
            who: Key[str]

        async def send(command: Send, ctx: Context[Sends]) -> None:
            ctx.deps.send(command.who)

        @asynccontextmanager
        async def lifespan(connection: Connection) -> AsyncIterator[Mailer]:
            yield mailer

        service = Service(name, handlers=[send], lifespan=lifespan)
        async with service.connect(store=f"sqlite:{tmp_path}", bus=f"embedded:{tmp_path}") as connection:
            await connection.execute(Send(who="a"))
        assert mailer.sent == ["a"]


# --- middleware ------------------------------------------------------------------------------------------------------


class Paid(Event, type="tracker.paid.v1"):
    account: Key[str]


class Pay(Command[Paid], type="tracker.pay.v1"):
    account: Key[str]
    cents: int = 5


async def pay(command: Pay, ctx: Context) -> Paid:
    sql = await ctx.sql()
    await sql.execute(insert(accounts).values(id=command.account, cents=command.cents))
    if command.cents == 13:
        raise RuntimeError("a bug at thirteen")
    return Paid(account=command.account)


async def charge(command: Pay, ctx: EffectContext) -> Paid:
    ctx.publish(Paid(account=command.account))
    if command.cents == 13:
        raise RuntimeError("a bug at thirteen")
    return Paid(account=command.account)


KINDS: dict[str, Callable[[], Any]] = {"sql": lambda: Handler(pay), "effect": lambda: Handler(charge, effect=True)}


@pytest_asyncio.fixture
async def store(store: Store) -> Store:
    async with store.transaction() as tx:
        await tx.sql.run_sync(tables.create_all)
    return store


def item(message: Any) -> Item:
    origin = Origin("front", IDS.new(), NOON, IDS.new())
    to = ReplyTo("front.inbox", "front-1", "i-7")
    codec = JsonCodec(Registry([Pay]))
    return Item(codec.encode(message, origin, topic="tracker.commands", reply_to=to), None)


@pytest.mark.parametrize("kind", KINDS)
class TestMiddleware:
    async def test_wraps_each_attempt_the_first_one_outermost(self, store: Store, kind: str) -> None:
        order: list[str] = []

        def named(name: str) -> Any:
            async def middleware(message: Message, ctx: HandlerContext[Any], call_next: CallNext) -> Answer:
                order.append(f"{name} before {type(message).__name__} {message.key}")
                try:
                    answer = await call_next()
                except Exception as error:
                    order.append(f"{name} saw {error}")
                    raise
                order.append(f"{name} after {type(answer).__name__}")
                return answer

            return middleware

        processor = command_processor(connect(store, KINDS[kind](), middleware=[named("one"), named("two")]))
        assert kinds(await processor.process([item(Pay(account="a"))], {})) == ["Done"]
        assert order == ["one before Pay a", "two before Pay a", "two after Paid", "one after Paid"]
        order.clear()
        assert kinds(await processor.process([item(Pay(account="b", cents=13))], {})) == ["Failed"]
        assert order[2:] == ["two saw a bug at thirteen", "one saw a bug at thirteen"]

    async def test_has_the_handlers_context(self, store: Store, kind: str) -> None:
        async def stages(message: Message, ctx: HandlerContext[Any], call_next: CallNext) -> Answer:
            assert isinstance(ctx, Context | EffectContext)
            ctx.publish(Paid(account=f"by-{message.key}"))
            return await call_next()

        one = item(Pay(account="a"))
        await settle(command_processor(connect(store, KINDS[kind](), middleware=[stages])), one)
        logged = await whole_log(store)
        assert logged[0].key == "by-a"
        assert logged[0].causation_id == one.envelope.id

    async def test_that_raises_fails_the_attempt_and_nothing_is_stored(self, store: Store, kind: str) -> None:
        async def raises(message: Message, ctx: HandlerContext[Any], call_next: CallNext) -> Answer:
            await call_next()
            raise PermissionError("not you")

        processor = command_processor(connect(store, KINDS[kind](), middleware=[raises]))
        (result,) = await processor.process([item(Pay(account="a"))], {})
        assert isinstance(result, Failed)
        assert isinstance(result.error, PermissionError)
        assert await balance(store) is None
        assert await whole_log(store) == []

    async def test_may_answer_in_the_handlers_place_but_only_as_the_command_wants(
        self, store: Store, kind: str
    ) -> None:
        async def answers_itself(message: Message, ctx: HandlerContext[Any], call_next: CallNext) -> Answer:
            return Paid(account=message.key) if message.key == "a" else None

        processor = command_processor(connect(store, KINDS[kind](), middleware=[answers_itself]))
        batch = [item(Pay(account="a")), item(Pay(account="b"))]
        assert kinds(await processor.process(batch, {})) == ["Done", "Failed"]
        assert await answers(store) == [(batch[0].envelope.id, "ok")]
        assert await balance(store) is None

    async def test_cannot_run_the_handler_twice_for_one_claim(self, store: Store, kind: str) -> None:
        async def twice(message: Message, ctx: HandlerContext[Any], call_next: CallNext) -> Answer:
            try:
                return await call_next()
            except RuntimeError:
                return await call_next()

        processor = command_processor(connect(store, KINDS[kind](), middleware=[twice]))
        assert kinds(await processor.process([item(Pay(account="a"))], {})) == ["Done"]
        (result,) = await processor.process([item(Pay(account="b", cents=13))], {})
        assert isinstance(result, Failed)
        assert isinstance(result.error, MiddlewareError)

    async def test_that_swallows_everything_cannot_have_a_message_handled_twice(self, store: Store, kind: str) -> None:
        """Not even what tells the handler's transaction that somebody else has handled it."""

        async def swallows(message: Message, ctx: HandlerContext[Any], call_next: CallNext) -> Answer:
            try:
                return await call_next()
            except BaseException:
                return Paid(account=message.key)

        one = item(Pay(account="a"))
        for _ in range(3):
            await settle(command_processor(connect(store, KINDS[kind](), middleware=[swallows])), one)
        assert await balance(store) in (5, None)
        assert [record.type for record in await whole_log(store)].count("tracker.paid.v1") == (kind == "effect")
        assert await answers(store) == [(one.envelope.id, "ok")] * 3

    async def test_is_within_the_time_limit(self, store: Store, kind: str) -> None:
        async def sleeps(message: Message, ctx: HandlerContext[Any], call_next: CallNext) -> Answer:
            await asyncio.Event().wait()
            return await call_next()

        made = KINDS[kind]()
        made.timeout_s = 0.05
        (result,) = await command_processor(connect(store, made, middleware=[sleeps])).process(
            [item(Pay(account="a"))], {}
        )
        assert isinstance(result, Failed)
        assert isinstance(result.error, TimeoutError)


async def test_middleware_is_around_handlers_in_threads_and_those_that_are_called_at_most_once() -> None:
    order: list[str] = []

    async def logged(message: Message, ctx: HandlerContext[Any], call_next: CallNext) -> Answer:
        order.append(f"before {message.key}")
        answer = await call_next()
        order.append(f"after {message.key}")
        return answer

    def track(event: Seen, ctx: BareContext) -> None:
        order.append(event.who)

    await Tracker(track, middleware=[logged]).handle(Seen(who="a"))
    assert order == ["before a", "a", "after a"]
