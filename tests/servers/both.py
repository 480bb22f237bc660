"""Both servers at once, since each takes seconds to start."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

from tests.servers.kafka import Kafka, start_kafka
from tests.servers.postgres import Postgres, start_postgres


@contextmanager
def both() -> Iterator[tuple[Kafka, Postgres]]:
    """A Kafka and a PostgreSQL for the length of the block, started side by side. Raises `MissingServer`."""
    with ExitStack() as stack, ThreadPoolExecutor(1) as aside:
        broker = start_kafka()
        coming = aside.submit(broker.__enter__)
        try:
            database = stack.enter_context(start_postgres())
        finally:
            # Also when PostgreSQL is missing: a broker that came up meanwhile has to go down again.
            kafka = coming.result()
            stack.push(broker.__exit__)
        yield kafka, database
