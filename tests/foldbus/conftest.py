"""The stores of `tests/eventstore` and the pairs of `tests/stories`, for what is built on them."""

from tests.eventstore.conftest import backend, store, twin, unmigrated
from tests.stories.conftest import pair

__all__ = ["backend", "pair", "store", "twin", "unmigrated"]
