"""Building the next generation beside the one that serves, and swapping them.

The serving generation goes on being fed by whoever runs it. When the build is within a page of the head, the serving
one is held still (reads go on), the build passes it, and view and status change in one transaction: no reader ever sees
an earlier state than before, or an empty one. What served is kept as `retired` until the next rebuild; `swap_back`
brings it back, and its runner goes on from where it stood.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator

from bus.errors import Fenced, MissingTopics
from projections.building import Builder, Progress, Workshop, reached
from projections.errors import NotCaughtUp, SwapBlocked
from projections.port import Generation, Row, Status

log = logging.getLogger("foldbus.projections")

_IDLE_S = 0.2
_NEAR_MAX = 10
"""Pages within a page of the head before swapping without having reached it: a busy log never lets one, and the end of
a topic may be markers that nobody can read."""


async def rebuild(shop: Workshop[Row], *, skip_failures: bool = False) -> AsyncGenerator[Progress]:
    """Builds the next generation of `shop.projection` from the beginning of all its sources, swaps it in, and tells
    after every page how far it is; the last Progress says `swapped`.

    Stopped at any point (also by a kill) it goes on from its checkpoint when it is called again. It waits while another
    process builds the same generation. Undecodable records become dead letters as they do live; an event whose fold
    fails raises RebuildStopped, unless `skip_failures` makes a dead letter of it as well. Raises MissingTopics,
    OffsetOutOfRange and what the store raises: the build stays, the old generation serves on.
    """
    await shop.rows.serving()
    generation = await shop.rows.build()
    name, number = shop.projection.name, generation.number
    log.info("%s: building generation %s (version %s)", name, number, generation.version)
    async with shop.store.leases.lead(shop.lease(number), ttl_s=shop.settings.lease_ttl_s) as leadership:
        found = next(one for one in await shop.rows.generations() if one.number == number)
        if found.status is Status.SERVING:  # who led before us finished it
            yield Progress(number, 0, 0, 0.0, 0.0, swapped=True)
            return
        async with shop.open_feed() as feed:
            builder = Builder(shop, number, feed, stop_on_bugs=not skip_failures)
            await builder.reload()
            began, done = shop.clock.monotonic(), builder.done()
            idle = rate = 0.0
            near = 0
            while True:
                if leadership.lost:
                    raise Fenced(f"projection {name!r}: the lease of generation {number} was lost; nothing was swapped")
                page = await builder.step(timeout_s=idle)
                if page.missing:  # half of a read model is not to be swapped in
                    raise MissingTopics(page.missing)
                idle = 0.0 if page.records else _IDLE_S
                seconds = shop.clock.monotonic() - began
                rate = (builder.done() - done) / seconds if seconds > 0 else 0.0
                eta_s = page.behind / rate if rate > 0 else None
                yield Progress(number, builder.done(), builder.done() + page.behind, rate, eta_s)
                near = near + 1 if page.behind <= shop.settings.page else 0
                if near and (page.behind == 0 or near > _NEAR_MAX) and await _swap(shop, builder):
                    break
    yield Progress(number, builder.done(), builder.done(), rate, 0.0, swapped=True)


async def _swap(shop: Workshop[Row], builder: Builder[Row]) -> bool:
    """Holds the serving generation, passes it, swaps. False when that did not fit into the hold: try again."""
    serving = await shop.rows.serving()
    target = await shop.rows.hold(serving.number, shop.settings.hold_s)
    until = shop.clock.monotonic() + shop.settings.hold_s
    while not reached(builder.checkpoint, target, builder.feed):
        if shop.clock.monotonic() >= until:
            return False
        await builder.step(timeout_s=0.05)
    shop.failpoint.hit("before-swap")
    try:
        await shop.rows.swap(builder.generation, sources=builder.feed.sources)
    except (NotCaughtUp, SwapBlocked) as error:
        shop.metrics.count("foldbus_projection_swap_retries_total", projection=shop.projection.name)
        log.warning("%s: swap to generation %s has to wait: %s", shop.projection.name, builder.generation, error)
        await asyncio.sleep(_IDLE_S)
        return False
    shop.failpoint.hit("after-swap")
    await builder.settle_letters()
    shop.metrics.count("foldbus_projection_swaps_total", projection=shop.projection.name)
    log.info("%s: generation %s serves, %s is retired", shop.projection.name, builder.generation, serving.number)
    return True


async def swap_back(shop: Workshop[Row]) -> Generation:
    """Undoes the last swap in one transaction; answers the generation that serves now. It stands where it stood when it
    was retired, and its runner catches up. Raises NothingToSwapBack."""
    back = await shop.rows.swap_back()
    log.warning("%s: swapped back to generation %s", shop.projection.name, back.number)
    shop.metrics.count("foldbus_projection_swaps_total", projection=shop.projection.name)
    return back
