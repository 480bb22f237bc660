"""What both adapters decide in the same way: names, places as JSON, what to build, whether a build is behind."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

from bus.errors import Fenced
from projections.errors import NotCaughtUp, NothingToSwapBack
from projections.port import Checkpoint, Generation, Place, Places, Status

GENERATIONS = "projection_generations"
CHECKPOINTS = "projection_checkpoints"


def table_of(view: str, generation: int) -> str:
    """The table of one generation. Names come from the projections' strict grammar; they are quoted all the same."""
    return f"projection_{view}_g{generation}"


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def places_to_text(places: Places) -> str:
    rows = [[source, part, at.offset, at.epoch, at.position] for (source, part), at in sorted(places.items())]
    return json.dumps(rows, separators=(",", ":"))


def places_from_text(text: str) -> dict[tuple[str, int], Place]:
    return {
        (source, part): Place(offset, epoch, position) for source, part, offset, epoch, position in json.loads(text)
    }


def to_build(found: Sequence[Generation], *, version: int, shape: str) -> tuple[Generation | None, list[Generation]]:
    """The build to go on with, if there is one, and what has to be dropped first: other builds and what retired."""
    go_on: Generation | None = None
    drop: list[Generation] = []
    for one in found:
        if one.status is Status.BUILDING and (one.version, one.shape) == (version, shape):
            go_on = one
        elif one.status is Status.BUILDING:
            drop.append(one)
    if go_on is None:
        drop += [one for one in found if one.status is Status.RETIRED]
    return go_on, drop


def check_caught_up(serving: Places, to: Places, *, sources: Collection[str]) -> None:
    """Raises NotCaughtUp."""
    for (source, part), there in serving.items():
        here = to.get((source, part), Place())
        if source in sources and not here.reached(there):
            raise NotCaughtUp(f"{source}[{part}]: the build is at {here}, what serves at {there}; nothing was swapped")


def check_swappable(found: Sequence[Generation], to: int) -> Generation:
    """The generation that serves. Raises Fenced unless `to` is being built."""
    serving = next((one for one in found if one.status is Status.SERVING), None)
    wanted = next((one for one in found if one.number == to), None)
    if serving is None or wanted is None or wanted.status is not Status.BUILDING:
        state = "absent" if wanted is None else wanted.status.value
        raise Fenced(f"generation {to} is {state}, wanted building; nothing was swapped")
    return serving


def check_swappable_back(name: str, found: Sequence[Generation]) -> tuple[Generation, Generation]:
    """What serves and what shall serve again."""
    serving = [one for one in found if one.status is Status.SERVING]
    retired = [one for one in found if one.status is Status.RETIRED]
    if not serving or not retired:
        raise NothingToSwapBack(f"projection {name!r} has no retired generation; nothing was changed")
    return serving[-1], max(retired, key=lambda one: one.number)


def fenced(name: str, generation: int, old: Checkpoint) -> Fenced:
    return Fenced(
        f"projection {name!r}, generation {generation}: revision {old.revision} is not what is stored, or the "
        "generation is held, retired or gone; nothing was saved"
    )
