"""A processor for readers of events that were upcast: the one behind it sees only types that it names.

An event that was split is several messages to the processor, each with an id, hence a claim, of its own: what is
handled of it stays handled when the rest has to be given again. It counts as done when all its parts are.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from dataclasses import replace

from bus.codec import Codec
from bus.envelope import Failure
from bus.errors import BadInput, UpcastFailed
from bus.metrics import Metrics
from bus.processing import Again, Answer, Aside, Done, Failed, Item, Later, Processor, Result, Watermarks
from bus.transport import Delivery

log = logging.getLogger("foldbus.bus")


class UpcastProcessor:
    """Implements `bus.processing.Processor` around `inner`, which handles the types `names`. Only events come here:
    a command is answered under the type it was sent with, so whoever decides it upcasts it."""

    def __init__(self, inner: Processor, names: Collection[str], *, codec: Codec, metrics: Metrics) -> None:
        self.inner, self.group = inner, inner.group
        self._names, self._codec, self._metrics = frozenset(names), codec, metrics
        self._table = codec.registry.upcasting
        self._older = self._table.older(self._names)

    def wants(self, type_name: str) -> bool:
        if type_name in self._names:
            return self.inner.wants(type_name)
        if type_name in self._table:  # what leads elsewhere, or to nothing, is not for this reader
            return type_name in self._older
        return self.inner.wants(type_name)

    async def process(self, batch: Sequence[Item], watermarks: Watermarks) -> Sequence[Answer]:
        if self._names.issuperset({item.envelope.type for item in batch}):
            return await self.inner.process(batch, watermarks)
        works: list[tuple[Item, list[Item], Result]] = []
        failing: set[str] = set()
        for item in batch:
            parts: list[Item] = []
            outcome: Result = Done()
            if item.envelope.key in failing:
                outcome = Again()
            else:
                try:
                    parts = self._parts(item)
                except BadInput as error:
                    outcome = Failed(error)
                    failing.add(item.envelope.key)
            works.append((item, parts, outcome))
        results = iter(await self.inner.process([part for _, parts, _ in works for part in parts], watermarks))
        answers: list[Answer] = []
        waiting: set[str] = set()
        for item, parts, outcome in works:
            answer = _all(item, parts, [outcome, *(next(results) for _ in parts)])
            if item.envelope.key in waiting:
                if isinstance(answer, Later):
                    answer.result.cancel()
                answer = Again()  # of a key, nothing is done or failed behind what is not done
            if not isinstance(answer, Done):
                waiting.add(item.envelope.key)
            answers.append(answer)
        return answers

    async def give_up(self, item: Item, failure: Failure) -> Result:
        """What became one message goes as it came, and so does what cannot be upcast; of a split one each part that is
        not done. What comes behind a part that was parked is given again: it follows that one."""
        try:
            parts = self._parts(item)
        except BadInput:
            parts = []
        if len(parts) <= 1:
            return await self.inner.give_up(item, failure)
        results: list[Result] = []
        for part in parts:
            result = await self.inner.give_up(part, failure)
            if isinstance(result, Aside) and part is not parts[-1]:
                return Again()
            results.append(result)
        return _worst(results)

    async def give_up_raw(self, delivery: Delivery, failure: Failure) -> None:
        await self.inner.give_up_raw(delivery, failure)

    async def stored_watermarks(self) -> Watermarks:
        return await self.inner.stored_watermarks()

    async def store_watermarks(self, watermarks: Watermarks) -> None:
        await self.inner.store_watermarks(watermarks)

    def forget(self, topics: Collection[tuple[str, int]]) -> None:
        self.inner.forget(topics)

    def _parts(self, item: Item) -> list[Item]:
        envelope = item.envelope
        if envelope.type in self._names or envelope.type not in self._older:
            return [item]
        parts = self._codec.upcast(envelope, self._names)
        named = [part for part in parts if part.type in self._names]
        skipped = len(parts) - len(named) if parts else 1
        if skipped:
            self._metrics.count("foldbus_skipped_total", skipped, group=self.group, type=envelope.type)
            log.debug("%s: %d parts of %s are for others", self.group, skipped, envelope.type)
        if item.parked is not None and len(named) != 1:
            # It was parked whole since it could not be read; its place in the queue is one message's.
            raise UpcastFailed(
                f"{envelope.type} is parked and became {len(named)} messages; discard it from its queue and redrive it"
            )
        return [replace(item, envelope=part) for part in named]


def _all(item: Item, parts: Sequence[Item], answers: Sequence[Answer]) -> Answer:
    """What becomes of an item whose parts are answered so."""

    def known(results: Sequence[Result]) -> Result:
        item.examine = item.examine or any(part.examine for part in parts)
        return _worst(results)

    results = [answer for answer in answers if not isinstance(answer, Later)]
    late = [answer.result for answer in answers if isinstance(answer, Later)]

    async def came() -> Result:
        return known([*results, *await asyncio.gather(*late)])

    return Later(asyncio.ensure_future(came())) if late else known(results)


def _worst(results: Sequence[Result]) -> Result:
    """Done when all are: a failure counts before what merely waits."""
    waits = [result for result in results if isinstance(result, Again)]
    failures = [result for result in results if isinstance(result, Failed)]
    if failures:
        return failures[0]
    if waits:
        return max(waits, key=lambda again: again.after_s)
    return next((result for result in results if isinstance(result, Aside)), Done())
