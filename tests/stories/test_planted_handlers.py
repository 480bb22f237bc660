"""What a user gets wrong with handlers is found before anything runs: by mypy and pyright, else at start-up.

As `test_planted_mistakes.py`, over a post office: the wrong context for a kind, a verb that a kind does not have, an
answer that no command wants, resources that nobody gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from foldbus import AT_MOST_ONCE, BadHandler, BadService, Breaker, Context, EffectContext, Handler, Service
from tests.stories import post
from tests.stories.test_planted_mistakes import Found, by_mypy, by_pyright, wrong_lines

CORRECT = Path(post.__file__).read_text()
LISTED = 'app = Service("post", handlers=[mail, forget, note, count], lifespan=resources, middleware=[timed])'
EFFECT = "@handler(effect=True, timeout_s=10, breakers=[smtp])"
BARE = "@handler(delivery=AT_MOST_ONCE)"

PLANTS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "another_answer_returned": (
        ("    return Mailed(letter_id=command.letter_id, receipt=receipt)",
         "    return Mail(letter_id=command.letter_id, text=receipt)  # WRONG"),
    ),
    "an_answer_forgotten": (("    return Mailed(letter_id=command.letter_id, receipt=receipt)\n", ""),
                            ("ctx: EffectContext[Resources]) -> Mailed:",
                             "ctx: EffectContext[Resources]) -> Mailed:  # WRONG")),
    "an_answer_that_is_no_message": (
        ("async def forget(command: Forget, ctx: Context) -> None:",
         "async def forget(command: Forget, ctx: Context) -> int:"),
        ("    await sql.commit()\n", "    await sql.commit()\n    return 1\n"),
        (LISTED, LISTED + "  # WRONG"),
    ),
    "an_answer_of_what_is_called_at_most_once": (
        ("async def count(event: Mailed, ctx: BareContext) -> None:",
         "async def count(event: Mailed, ctx: BareContext) -> Mailed:"),
        ("    assert_type(ctx.deps, None)\n", "    return event\n"),
        (BARE, BARE + "  # WRONG"),
    ),
    "an_effect_that_wants_a_transaction": (
        ("ctx: EffectContext[Resources]) -> Mailed:", "ctx: Context[Resources]) -> Mailed:"),
        (EFFECT, EFFECT + "  # WRONG"),
    ),
    "an_effect_listed_as_a_plain_function": (
        (EFFECT + "\n", ""),
        (LISTED, LISTED + "  # WRONG"),
    ),
    "a_thread_that_wants_a_context_to_await": (
        ("def note(event: Mailed, ctx: ThreadContext[Resources]) -> None:",
         "def note(event: Mailed, ctx: Context[Resources]) -> None:"),
        (LISTED, LISTED + "  # WRONG"),
    ),
    "sql_in_an_effect": (
        ("    assert_type(receipt, str)\n", "    await ctx.sql()  # WRONG\n"),
    ),
    "a_message_staged_where_nothing_is_stored": (
        ("    assert_type(ctx.deps, None)\n", "    ctx.publish(event)  # WRONG\n"),
    ),
    "a_mistyped_resource": (
        ("await ctx.deps.mailer.send(", "await ctx.deps.mailr.send("),
        ("key=str(ctx.message_id))", "key=str(ctx.message_id))  # WRONG"),
        ("    assert_type(receipt, str)\n", ""),
        ("receipt=receipt)", "receipt=\"\")"),
        ("        receipt = await", "        await"),
    ),
    "resources_that_the_context_does_not_name": (
        ("ctx: ThreadContext[Resources]) -> None:\n    assert_type(ctx.deps, Resources)\n",
         "ctx: ThreadContext) -> None:\n    print(ctx.deps.mailer)  # WRONG\n"),
    ),
    "an_effect_that_is_called_at_most_once": (
        (EFFECT, "@handler(effect=True, delivery=AT_MOST_ONCE)  # WRONG"),
        (LISTED, LISTED + "  # WRONG"),
    ),
    "lanes_for_what_holds_a_connection": (
        ("async def forget(", "@handler(at_once=3)  # WRONG\nasync def forget("),
    ),
    "a_middleware_that_takes_too_little": (
        ("ctx: HandlerContext[Any], call_next: CallNext) -> Answer:\n    return await call_next()",
         "ctx: HandlerContext[Any]) -> Answer:\n    return None"),
        (LISTED, LISTED + "  # WRONG"),
    ),
    "a_lifespan_that_is_no_context": (
        ("@asynccontextmanager\n", ""),
        (LISTED, LISTED + "  # WRONG"),
    ),
    "a_breaker_that_does_not_say_what_counts": (
        ('smtp = Breaker("smtp", counts=(OSError,))', 'smtp = Breaker("smtp")  # WRONG'),
    ),
}  # fmt: skip
UNUSED = ("Import", "unused", "is not accessed")


def planted(name: str) -> str:
    text = CORRECT
    for old, new in PLANTS[name]:
        assert text.count(old) == 1, f"{name}: {old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    assert "# WRONG" in text
    return text


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("post")
    (directory / "correct.py").write_text(CORRECT)
    for name in PLANTS:
        (directory / f"{name}.py").write_text(planted(name))
    return directory


@pytest.fixture(scope="module", params=[by_mypy, by_pyright], ids=["mypy", "pyright"])
def found(request: pytest.FixtureRequest, project: Path) -> Found:
    return request.param(project)  # type: ignore[no-any-return]


@pytest.mark.timeout(300)
class TestTheChecker:
    def test_finds_nothing_in_what_is_correct(self, found: Found) -> None:
        assert found.get("correct", {}) == {}

    @pytest.mark.parametrize("name", PLANTS)
    def test_reports_on_its_line(self, found: Found, name: str) -> None:
        told = {
            line: whats
            for line, whats in found.get(name, {}).items()
            if not all(any(word in what for word in UNUSED) for what in whats)
        }
        assert told, f"nobody sees {name}"
        assert set(told) <= wrong_lines(planted(name)), told


class TestStartUpRefuses:
    def test_an_answer_that_its_command_does_not_want(self) -> None:
        async def mail(command: post.Mail, ctx: Context) -> None: ...

        with pytest.raises(BadHandler, match="cannot answer Mail: wanted Mailed"):
            Service("post", handlers=[mail])

    def test_a_command_that_is_handled_at_most_once(self) -> None:
        async def mail(command: post.Mail, ctx: Any) -> None: ...

        with pytest.raises(BadHandler, match="its answer is stored with its claim, so wanted EXACTLY_ONCE"):
            Handler(mail, delivery=AT_MOST_ONCE)

    def test_resources_that_nobody_gives(self) -> None:
        with pytest.raises(BadService, match=r"wants Resources as ctx\.deps, but the service has no lifespan"):
            Service("post", handlers=[post.mail])

    def test_two_breakers_of_one_name(self) -> None:
        async def count(event: post.Mailed, ctx: EffectContext) -> None: ...

        other = Breaker("smtp", counts=(TimeoutError,))
        with pytest.raises(BadService, match="two breakers called 'smtp'"):
            Service(
                "post",
                handlers=[post.mail, Handler(count, effect=True, breakers=[other])],
                lifespan=post.resources,
            )
