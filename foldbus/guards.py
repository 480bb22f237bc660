"""Breakers around one attempt of a handler: what is let through, and what its end says about its dependencies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from types import TracebackType
from typing import Any, TypeVar

from bus.breaker import Call, Circuit
from bus.errors import FoldbusError

T = TypeVar("T")


class BreakerOpen(FoldbusError):
    """The dependency is taken for down: the call was not made. Let it pass, and the message waits for the breaker
    without an attempt counted."""

    def __init__(self, name: str, *, wait_s: float) -> None:
        super().__init__(f"breaker {name!r} is open for {wait_s:.1f} s: the call was not made")
        self.name, self.wait_s = name, wait_s


class Calls:
    """One attempt's calls of the dependencies that its handler names. Begun before the handler runs, so that a
    half-open circuit lets one message through and not one call of each."""

    def __init__(self, circuits: Mapping[str, Circuit], begun: Mapping[str, Call] | None = None) -> None:
        self._circuits = circuits
        self._begun = dict(begun or {})
        self._unused = dict(self._begun)

    def guard(self, name: str, loop: asyncio.AbstractEventLoop) -> Guard:
        if name not in self._circuits:
            known = ", ".join(self._circuits) or "none"
            raise FoldbusError(f"no breaker {name!r}: the handler names {known} in breakers=")
        return Guard(self, name, loop)

    def begin(self, name: str) -> Call:
        """Raises BreakerOpen."""
        call = self._unused.pop(name, None) or self._circuits[name].begin()
        if call is None:
            raise BreakerOpen(name, wait_s=self._circuits[name].wait_s)
        return call

    def cut_short(self, name: str, call: Call) -> None:
        """Cancelled: by the handler's own time limit, which counts as the dependency's, or by whoever stops us. The
        handler's end tells."""
        if self._unused.setdefault(name, call) is not call:
            call.abandoned()

    def end(self, error: BaseException | None) -> bool:
        """The handler has ended. Where it put no guard around its calls, its own end says how the dependencies are: an
        error that they do not count says nothing. Answers whether one of them is taken for down now."""
        for name, call in self._unused.items():
            if error is None:
                call.answered()
            elif isinstance(error, self._circuits[name].breaker.counts):
                call.failed(error)
            else:
                call.abandoned()
        self._unused.clear()
        if error is None:
            return False
        if isinstance(error, BreakerOpen):
            return True
        return any(
            circuit.free is not None and isinstance(error, circuit.breaker.counts)
            for circuit in self._circuits.values()
        )

    def abandon(self) -> None:
        """The handler was cut short, or did not run after all."""
        for call in self._unused.values():
            call.abandoned()
        self._unused.clear()

    @property
    def wait_s(self) -> float:
        return max((circuit.wait_s for circuit in self._circuits.values()), default=0.0)


class Guard:
    """See `HandlerContext.breaker`. For one use."""

    def __init__(self, calls: Calls, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self._calls, self._name, self._loop = calls, name, loop
        self._call: Call | None = None

    def __enter__(self) -> Guard:
        self._call = on_loop(self._loop, lambda: self._calls.begin(self._name))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        call = self._call
        if call is None:
            return
        if error is None:
            on_loop(self._loop, call.answered)
        elif isinstance(error, Exception):
            on_loop(self._loop, lambda: call.failed(error))
        else:
            on_loop(self._loop, lambda: self._calls.cut_short(self._name, call))

    async def __aenter__(self) -> Guard:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, stack)


# --- threads ---------------------------------------------------------------------------------------------------------


def on_loop(loop: asyncio.AbstractEventLoop, function: Callable[[], T]) -> T:
    """Calls it on the event loop, whichever thread asks: what is shared with other messages belongs to that loop."""
    try:
        here: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
    except RuntimeError:
        here = None
    if here is loop:
        return function()

    async def run() -> T:
        return function()

    return wait_for(run(), loop)


def wait_for(work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> T:
    return asyncio.run_coroutine_threadsafe(work, loop).result()


__all__ = ["BreakerOpen", "Calls", "Guard", "on_loop", "wait_for"]
