"""A small bank as its author means it: `test_planted_mistakes.py` plants one mistake at a time into a copy of it."""

from __future__ import annotations

from typing import Literal, assert_never, assert_type

from pydantic import BaseModel

from foldbus import Command, Connection, Decider, Event, Key, Refused, SagaRun, Service, projection, saga


class Opened(Event, type="bank.opened.v1"):
    account_id: Key[str]
    owner: str


class Deposited(Event, type="bank.deposited.v1"):
    account_id: Key[str]
    cents: int


class Closed(Event, type="bank.closed.v1"):
    account_id: Key[str]


class Open(Command[Opened], type="bank.open.v1"):
    account_id: Key[str]
    owner: str


class Deposit(Command[Deposited], type="bank.deposit.v1"):
    account_id: Key[str]
    cents: int


class Close(Command[Closed], type="bank.close.v1"):
    account_id: Key[str]


class NotOpen(Refused, code="bank.not-open"): ...


class Account(BaseModel, frozen=True):
    status: Literal["new", "open", "closed"] = "new"
    cents: int = 0


AccountEvent = Opened | Deposited | Closed
AccountCommand = Open | Deposit | Close


def evolve(account: Account, event: AccountEvent) -> Account:
    match event:
        case Opened():
            return account.model_copy(update={"status": "open"})
        case Deposited(cents=cents):
            return account.model_copy(update={"cents": account.cents + cents})
        case Closed():
            return account.model_copy(update={"status": "closed"})


def decide(account: Account, command: AccountCommand) -> list[AccountEvent]:
    match command:
        case Open(account_id=account_id, owner=owner):
            return [Opened(account_id=account_id, owner=owner)]
        case Deposit(account_id=account_id, cents=cents):
            if account.status != "open":
                raise NotOpen(status=account.status)
            return [Deposited(account_id=account_id, cents=cents)]
        case Close(account_id=account_id):
            return [Closed(account_id=account_id)]
        case _:
            assert_never(command)


accounts = Decider("account", initial=Account(), evolve=evolve, decide=decide)


class Balance(BaseModel, frozen=True):
    account_id: str
    cents: int = 0


@projection("balance", version=1)
def balance(row: Balance | None, event: Opened | Deposited) -> Balance | None:
    row = row or Balance(account_id=event.account_id)
    match event:
        case Opened():
            return row
        case Deposited(cents=cents):
            return row.model_copy(update={"cents": row.cents + cents})


@saga("welcome", version=1)
async def welcome(run: SagaRun, opened: Opened) -> None:
    deposited = await run.step(
        Deposit(account_id=opened.account_id, cents=100), undo=Close(account_id=opened.account_id), timeout_s=5
    )
    assert_type(deposited, Deposited)
    if deposited.cents != 100:
        await run.step(Close(account_id=opened.account_id))


app = Service("bank", deciders=[accounts], sagas=[welcome], projections=[balance], refusals=[NotOpen])


async def use(bank: Connection) -> int:
    opened = await bank.request(Open(account_id="a", owner="Ann"))
    assert_type(opened, Opened)
    receipt = await bank.request(Deposit(account_id="a", cents=5), receipt=True)
    assert_type(receipt.value, Deposited)
    row = await bank.view(balance).get("a", after=receipt)
    assert_type(row, Balance | None)
    return row.cents if row is not None else (await bank.execute(Deposit(account_id="a", cents=5))).cents
