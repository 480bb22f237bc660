"""A real Kafka and a real PostgreSQL for tests, benchmarks and demonstrations, on a machine with or without Docker.

    with both() as (kafka, postgres):
        ...  # kafka.bootstrap, postgres.dsn; kill(), restart(), pause(), resume()

The order in which each is looked for stands in `kafka.py` and `postgres.py`. What cannot be had raises `MissingServer`,
whose message says what was tried and what to install: a run without the real servers fails, it does not skip.
"""

from tests.servers.both import both
from tests.servers.kafka import Kafka, start_kafka
from tests.servers.missing import MissingServer
from tests.servers.postgres import Postgres, start_postgres

__all__ = ["Kafka", "MissingServer", "Postgres", "both", "start_kafka", "start_postgres"]
