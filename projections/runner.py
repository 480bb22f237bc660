"""The live runner: keeps the serving generation up to date, builds the next one when the code has changed."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic

from bus.errors import Fenced, MissingTopics
from projections.building import Builder, Progress, Workshop
from projections.definition import Projection
from projections.errors import BadProjection, NameTaken
from projections.port import Generation, Row, Status
from projections.rebuild import rebuild
from projections.rows.columns import Columns

log = logging.getLogger("foldbus.projections")

_MISSING_EVERY_S = 30.0
_PASSED = (Status.RETIRED, Status.DROPPED)


class Doing(StrEnum):
    STARTING = "starting"
    WAITING = "waiting"
    """Another process leads, or a swap holds the generation."""
    FOLLOWING = "following"
    BUILDING = "building"
    STANDING_BY = "standing-by"
    """A newer version of this projection serves or is being built: this process runs old code."""


@dataclass(slots=True)
class RunnerState:
    """What the runner is at, for health, lag and humans. `behind` None: not known to this process (it does not lead).
    `error` is the last one, empty once things go on."""

    doing: Doing = Doing.STARTING
    generation: int = 0
    behind: int | None = None
    progress: Progress | None = None
    error: str = ""


def what_to_do(projection: Projection[Any], serving: Generation, generations: Sequence[Generation]) -> Doing:
    """What a process that runs this code does: FOLLOWING, BUILDING or STANDING_BY."""
    mine = (projection.version, Columns(projection.name, projection.row).shape)
    if (serving.version, serving.shape) == mine:
        return Doing.FOLLOWING
    for one in generations:
        if one.status is Status.BUILDING and one.version > projection.version:
            return Doing.STANDING_BY
        if one.status in _PASSED and one.swapped_at and (one.version, one.shape) == mine:
            return Doing.STANDING_BY  # what this code makes was swapped out already
    return Doing.STANDING_BY if projection.version < serving.version else Doing.BUILDING


class ProjectionRunner(Generic[Row]):
    """Runs one projection in one process; any number of processes may run it, one leads.

    The first start creates generation 1, which serves while it fills. When the code's version (or its row's columns)
    is not the serving generation's, this runner builds the next generation in the background. The old one then stands
    still, unless a process with the old code still feeds it, and serves as it is until the swap: the new code could not
    write rows of the old shape. A process whose version has been passed stands by and never swaps back by itself.

    Errors never end `run`: they are logged, counted, shown in `state.error`, and tried again with growing pauses, from
    what is stored. Only a projection that can never run (NameTaken, BadProjection) raises.
    """

    def __init__(self, shop: Workshop[Row], *, rng: random.Random | None = None) -> None:
        self.shop = shop
        self.state = RunnerState()
        self._random = rng or random.Random()
        self._failures = 0
        self._missing_at: float | None = None

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self._once()
                self._failures = 0
            except (NameTaken, BadProjection):
                raise
            except Exception as error:
                self._failures += 1
                self.state.error = f"{type(error).__qualname__}: {error}"
                self.state.behind = None
                self._count("foldbus_projection_errors_total", error=type(error).__qualname__)
                self._log(error)
                await self._pause(self._failures)

    async def _once(self) -> None:
        """Does what the serving generation calls for, until that changes."""
        serving = await self.shop.rows.serving()
        match what_to_do(self.shop.projection, serving, await self.shop.rows.generations()):
            case Doing.FOLLOWING:
                await self._follow(serving)
            case Doing.BUILDING:
                self.state.doing, self.state.behind = Doing.BUILDING, None
                async for progress in rebuild(self.shop):
                    self.state.progress, self.state.generation = progress, progress.generation
                    self.state.error = ""
                    self._failures = 0
                self.state.progress = None
            case _:
                if self.state.doing is not Doing.STANDING_BY:
                    log.warning(
                        "%s: generation %s is of version %s, this code is version %s and stands by",
                        self.shop.projection.name, serving.number, serving.version, self.shop.projection.version,
                    )  # fmt: skip
                    self._count("foldbus_projection_standing_by_total")
                self.state = RunnerState(Doing.STANDING_BY, serving.number)
                await asyncio.sleep(self.shop.settings.poll_s)

    async def _follow(self, serving: Generation) -> None:
        """Leads the serving generation until it is another one, or until the lease is lost."""
        shop, state = self.shop, self.state
        state.doing, state.generation, state.behind = Doing.WAITING, serving.number, None
        async with shop.store.leases.lead(shop.lease(serving.number), ttl_s=shop.settings.lease_ttl_s) as leadership:
            async with shop.open_feed() as feed:
                builder = Builder(shop, serving.number, feed, stop_on_bugs=False)
                while not leadership.lost:
                    now = await shop.rows.serving()
                    if now.number != serving.number:
                        return
                    if now.held:  # a swap is about to happen
                        state.doing = Doing.WAITING
                        await asyncio.sleep(0.02)
                        continue
                    await builder.reload()
                    await builder.settle_letters()  # of a swap that was cut off
                    state.doing = Doing.FOLLOWING
                    try:
                        while not leadership.lost:
                            page = await builder.step(timeout_s=shop.settings.poll_s)
                            state.behind, state.error, self._failures = page.behind, "", 0
                            if page.missing:  # the other sources go on
                                self._wait_for(MissingTopics(page.missing))
                            if not page.records and (await shop.rows.serving()).number != serving.number:
                                return  # swapped while there was nothing to save
                    except Fenced as error:
                        self._count("foldbus_projection_fenced_total")
                        log.info("%s: %s; reading again what is stored", shop.projection.name, error)
                        await self._pause(0)

    def _log(self, error: Exception) -> None:
        """A topic that is missing means wait: its service may not have started yet. That is said now and then."""
        name = self.shop.projection.name
        if not isinstance(error, MissingTopics):
            log.error("%s: %s; trying again", name, self.state.error, exc_info=error)
        else:
            self._wait_for(error)

    def _wait_for(self, missing: MissingTopics) -> None:
        name = self.shop.projection.name
        self.state.error = f"{type(missing).__qualname__}: {missing}"
        now = self.shop.clock.monotonic()
        if self._missing_at is None or now - self._missing_at >= _MISSING_EVERY_S:
            self._missing_at = now
            log.warning("%s waits for topics: %s", name, missing)

    async def _pause(self, failures: int) -> None:
        """Grows with the failures, with jitter, bounded."""
        most = min(self.shop.settings.backoff_max_s, self.shop.settings.backoff_s * 2 ** min(failures, 16))
        await asyncio.sleep(most * self._random.uniform(0.1, 0.5 if failures == 0 else 1.0))

    def _count(self, name: str, **labels: str) -> None:
        self.shop.metrics.count(name, 1, projection=self.shop.projection.name, **labels)
