"""The stores of `tests/eventstore`, for what is built on them."""

from tests.eventstore.conftest import backend, store, twin, unmigrated

__all__ = ["backend", "store", "twin", "unmigrated"]
