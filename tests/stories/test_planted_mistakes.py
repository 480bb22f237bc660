"""What a user gets wrong is found before anything runs: by mypy and pyright where types can say it, else at start-up.

The checkers run once each, over `bank.py` and a copy of it per planted mistake, in a directory of their own and in
strict mode, as in a user's project: without a plugin, and with nothing but what is installed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic import BaseModel

from foldbus import BadDecider, BadMessageClass, BadService, Command, Decider, Event, Key, Service
from tests.stories import bank

ROOT = Path(__file__).parents[2]
CORRECT = Path(bank.__file__).read_text()

FROZEN = 'class Frozen(Event, type="bank.frozen.v1"):\n    account_id: Key[str]\n\n\nclass Open('

PLANTS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "an_event_that_evolve_does_not_take": (
        ("class Open(", FROZEN),
        ("def decide(account: Account, command: AccountCommand) -> list[AccountEvent]:",
         "def decide(account: Account, command: AccountCommand) -> list[AccountEvent | Frozen]:"),
        ("return [Closed(account_id=account_id)]", "return [Frozen(account_id=account_id)]"),
        ("accounts = Decider(", "accounts = Decider(  # WRONG\n    "),
        ('"account", initial=Account(), evolve=evolve, decide=decide)',
         '"account", initial=Account(), evolve=evolve, decide=decide)  # WRONG'),
    ),
    "a_wrong_event_returned": (
        ("class Open(", FROZEN),
        ("return [Closed(account_id=account_id)]", "return [Frozen(account_id=account_id)]  # WRONG"),
    ),
    "a_command_returned_for_an_event": (
        ("return [Closed(account_id=account_id)]", "return [Close(account_id=account_id)]  # WRONG"),
    ),
    "a_single_event_returned_for_a_list": (
        ("return [Closed(account_id=account_id)]", "return Closed(account_id=account_id)  # WRONG"),
    ),
    "a_case_forgotten_in_evolve": (
        ("def evolve(account: Account, event: AccountEvent) -> Account:\n    match event:",
         "def evolve(account: Account, event: AccountEvent) -> Account:  # WRONG\n    match event:  # WRONG"),
        ('        case Closed():\n            return account.model_copy(update={"status": "closed"})\n', ""),
    ),
    "a_case_forgotten_in_decide": (
        ("-> list[AccountEvent]:\n    match command:", "-> list[AccountEvent]:  # WRONG\n    match command:  # WRONG"),
        ("        case Close(account_id=account_id):\n            return [Closed(account_id=account_id)]\n", ""),
        ("        case _:\n            assert_never(command)\n", ""),
        (", assert_never", ""),
    ),
    "a_case_forgotten_where_assert_never_stands": (
        ("        case Close(account_id=account_id):\n            return [Closed(account_id=account_id)]\n", ""),
        ("assert_never(command)", "assert_never(command)  # WRONG"),
    ),
    "another_state_returned_by_evolve": (
        ('return account.model_copy(update={"status": "closed"})', 'return Balance(account_id="a")  # WRONG'),
    ),
    "an_initial_state_that_evolve_does_not_take": (
        ("initial=Account(), evolve=evolve", 'initial=Balance(account_id="a"), evolve=evolve'),
        ("accounts = Decider(", "accounts = Decider(  # WRONG\n    "),
        ("evolve=evolve, decide=decide)", "evolve=evolve, decide=decide)  # WRONG"),
    ),
    "a_mistyped_field_of_the_state": (
        ("raise NotOpen(status=account.status)", "raise NotOpen(status=account.state)  # WRONG"),
    ),
    "a_mistyped_argument_of_a_command": (
        ("await bank.request(Open(account_id=\"a\", owner=\"Ann\"))",
         "await bank.request(Open(account_id=\"a\", ownr=\"Ann\"))  # WRONG"),
    ),
    "a_mistyped_reply_field_of_request": (
        ("    assert_type(opened, Opened)\n", "    print(opened.ownr)  # WRONG\n"),
    ),
    "a_mistyped_reply_field_of_a_receipt": (
        ("    assert_type(receipt.value, Deposited)\n", "    print(receipt.value.cent)  # WRONG\n"),
    ),
    "a_mistyped_reply_field_of_execute": (
        ('(await bank.execute(Deposit(account_id="a", cents=5))).cents',
         '(await bank.execute(Deposit(account_id="a", cents=5))).cent  # WRONG'),
    ),
    "a_mistyped_reply_field_of_a_step": (("if deposited.cents != 100:", "if deposited.cent != 100:  # WRONG"),),
    "a_mistyped_field_of_the_event_that_starts_a_saga": (
        ("        await run.step(Close(account_id=opened.account_id))\n",
         "        await run.step(Close(account_id=opened.account))  # WRONG\n"),
    ),
    "an_event_as_a_step": (
        ("        await run.step(Close(account_id=opened.account_id))\n", "        await run.step(opened)  # WRONG\n"),
    ),
    "a_step_that_is_not_awaited_for_its_reply": (
        ("    deposited = await run.step(", "    deposited = run.step("),
        ("    assert_type(deposited, Deposited)\n", ""),
        ("if deposited.cents != 100:", "if deposited.cents != 100:  # WRONG"),
    ),
    "a_saga_that_is_no_coroutine": (
        ('@saga("welcome", version=1)\nasync def welcome', '@saga("welcome", version=1)  # WRONG\ndef welcome'),
        ("deposited = await run.step(", "run.step("),
        ("    assert_type(deposited, Deposited)\n", ""),
        ("    if deposited.cents != 100:\n        await run.step(Close(account_id=opened.account_id))\n", ""),
    ),
    "a_row_of_another_type_returned": (
        ("        case Opened():\n            return row\n",
         "        case Opened():\n            return Account()  # WRONG\n"),
    ),
    "a_fold_that_takes_one_row_and_gives_another": (
        ('@projection("balance", version=1)', '@projection("balance", version=1)  # WRONG'),
        ("Opened | Deposited) -> Balance | None:", "Opened | Deposited) -> Account | None:"),
        ("        case Opened():\n            return row\n", "        case Opened():\n            return Account()\n"),
        ('return row.model_copy(update={"cents": row.cents + cents})', "return Account(cents=cents)"),
        ("    assert_type(row, Balance | None)\n", ""),
        ("    return row.cents if row is not None else (", "    return (row is not None) + ("),
    ),
    "a_mistyped_field_of_a_row": (("row.cents + cents", "row.cent + cents"),
                                  ('cents})\n\n\n@saga', 'cents})  # WRONG\n\n\n@saga')),
    "a_mistyped_field_of_a_row_in_a_view": (("return row.cents if row", "return row.cent if row"),
                                            ("cents=5))).cents", "cents=5))).cents  # WRONG")),
    "a_case_forgotten_in_a_projection": (
        ("Opened | Deposited) -> Balance | None:", "Opened | Deposited) -> Balance | None:  # WRONG"),
        ("Balance(account_id=event.account_id)\n    match event:",
         "Balance(account_id=event.account_id)\n    match event:  # WRONG"),
        ("        case Opened():\n            return row\n", ""),
    ),
    "a_list_of_functions_for_a_list_of_deciders": (
        ("deciders=[accounts]", "deciders=[decide]"),
        ("refusals=[NotOpen])", "refusals=[NotOpen])  # WRONG"),
    ),
}  # fmt: skip


def planted(name: str) -> str:
    text = CORRECT
    for old, new in PLANTS[name]:
        assert text.count(old) == 1, f"{name}: {old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    assert "# WRONG" in text
    return text


def wrong_lines(text: str) -> set[int]:
    return {number for number, line in enumerate(text.splitlines(), start=1) if "# WRONG" in line}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's project: the correct file and one per mistake."""
    directory = tmp_path_factory.mktemp("project")
    (directory / "correct.py").write_text(CORRECT)
    for name in PLANTS:
        (directory / f"{name}.py").write_text(planted(name))
    return directory


Found = Mapping[str, Mapping[int, list[str]]]


def by_mypy(project: Path) -> Found:
    cache = ROOT / ".cache" / "mypy-planted"
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--cache-dir", str(cache), "--no-pretty"]
    command += ["--no-error-summary", "--hide-error-context", "--no-color-output", *_files(project)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for line in done.stdout.splitlines():
        if ": error: " in line:
            where, _, what = line.partition(": error: ")
            name, number = where.split(":")[:2]
            found[Path(name).stem][int(number)].append(what)
    return found


def by_pyright(project: Path) -> Found:
    settings = {"typeCheckingMode": "strict", "reportMissingTypeStubs": False}
    (project / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "--project", "."]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    found: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for one in json.loads(done.stdout)["generalDiagnostics"]:
        if one["severity"] == "error":
            found[Path(one["file"]).stem][one["range"]["start"]["line"] + 1].append(one["message"])
    return found


def _files(project: Path) -> list[str]:
    return sorted(path.name for path in project.glob("*.py"))


@pytest.fixture(scope="module", params=[by_mypy, by_pyright], ids=["mypy", "pyright"])
def found(request: pytest.FixtureRequest, project: Path) -> Found:
    return request.param(project)  # type: ignore[no-any-return]


@pytest.mark.timeout(300)
class TestTheChecker:
    def test_finds_nothing_in_what_is_correct(self, found: Found) -> None:
        assert found.get("correct", {}) == {}

    @pytest.mark.parametrize("name", PLANTS)
    def test_reports_on_its_line(self, found: Found, name: str) -> None:
        lines = set(found.get(name, {}))
        assert lines, f"nobody sees {name}"
        assert lines <= wrong_lines(planted(name)), found[name]


# --- what no checker sees: refused when the program starts ---------------------------------------------------------


class Paid(Event, type="bank.paid.v1"):
    account_id: Key[str]


class ForeignPaid(Event, type="bank.legacy-paid.v1", topic="legacy.payments"):
    account_id: Key[str]


class Receipt(BaseModel, frozen=True):
    number: int


class Pay(Command[Receipt], type="bank.pay.v1"):
    account_id: Key[str]


class Ship(Command[None], type="shipping.ship.v1"):
    account_id: Key[str]


def on_paid(state: bank.Account, event: Paid) -> bank.Account:
    return state


class TestStartUpRefuses:
    def test_a_handler_for_another_services_command(self) -> None:
        def decide(state: bank.Account, command: Ship) -> list[Paid]:
            return []

        shipping = Decider("shipping", initial=bank.Account(), evolve=on_paid, decide=decide)
        with pytest.raises(BadService) as refused:
            Service("bank", deciders=[shipping])
        assert "'bank' cannot decide shipping.ship.v1" in str(refused.value)
        assert "arrive on shipping.commands" in str(refused.value)

    def test_a_reply_that_no_event_can_give(self) -> None:
        def decide(state: bank.Account, command: Pay) -> list[Paid]:
            return [Paid(account_id=command.account_id)]

        with pytest.raises(BadDecider) as refused:
            Decider("account", initial=bank.Account(), evolve=on_paid, decide=decide)
        assert "no reply to Pay: it wants Receipt, which is none of the events Paid" in str(refused.value)
        assert "pass reply=" in str(refused.value)

    def test_not_when_a_function_gives_that_reply(self) -> None:
        def decide(state: bank.Account, command: Pay) -> list[Paid]:
            return [Paid(account_id=command.account_id)]

        Decider("account", initial=bank.Account(), evolve=on_paid, decide=decide, reply=lambda *_: Receipt(number=1))

    def test_a_message_without_a_key(self) -> None:
        with pytest.raises(
            BadMessageClass, match=r"Keyless \(bank.keyless.v1\) has none marked as Key; wanted exactly one"
        ):

            class Keyless(Event, type="bank.keyless.v1"):
                account_id: str

    def test_a_message_with_two_keys(self) -> None:
        with pytest.raises(BadMessageClass, match="has account_id and owner marked as Key; wanted exactly one field"):

            class TwoKeys(Event, type="bank.two-keys.v1"):
                account_id: Key[str]
                owner: Key[str]

    def test_a_message_without_a_version(self) -> None:
        with pytest.raises(BadMessageClass, match=r"'bank\.opened' is no type name; wanted <service>\."):

            class Versionless(Event, type="bank.opened"):
                account_id: Key[str]

    def test_a_decider_of_foreign_events(self) -> None:
        def evolve(state: bank.Account, event: ForeignPaid) -> bank.Account:
            return state

        def decide(state: bank.Account, command: bank.Close) -> list[ForeignPaid]:
            return []

        foreign = Decider("account", initial=bank.Account(), evolve=evolve, decide=decide, reply=lambda *_: None)
        with pytest.raises(BadService, match=r"bank.legacy-paid.v1, which belongs to 'legacy.payments'"):
            Service("bank", deciders=[foreign])

    def test_two_owners_of_one_command(self) -> None:
        with pytest.raises(BadService, match=r"lists decider category account twice"):
            Service("bank", deciders=[bank.accounts, bank.accounts])

    def test_one_type_name_for_two_classes(self) -> None:
        class Other(Event, type="bank.opened.v1"):
            account_id: Key[str]

        with pytest.raises(BadMessageClass, match=r"'bank.opened.v1' is claimed by .*Opened and .*Other"):
            Service("bank", deciders=[bank.accounts], messages=[Other])
