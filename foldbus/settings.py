"""Settings of the program's entry point: command line over environment over `.env` over defaults.

Every variable starts with `FOLDBUS_`. The library itself reads nothing from the environment.
"""

from __future__ import annotations

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from bus.transport import PollSettings
from foldbus.health import HealthSettings
from foldbus.parking import ParkSettings
from foldbus.relay import RelaySettings
from foldbus.watchdog import WatchdogSettings
from foldbus.worker import WorkerSettings
from projections import ProjectionSettings


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="FOLDBUS_", env_file=".env", extra="ignore")

    store: str = "sqlite:.foldbus"
    """`FOLDBUS_STORE`: `sqlite:DIRECTORY` or `postgresql://user@host/database`."""
    bus: str = "embedded:.foldbus"
    """`FOLDBUS_BUS`: `embedded:DIRECTORY` or `kafka://host:port,host:port`."""
    topics: str = Field(default="validate", pattern="^(apply|validate)$")
    """`FOLDBUS_TOPICS`: `apply` makes missing topics at start; `validate` refuses to start without them. Embedded
    topics are always made."""
    session_timeout_s: float | None = Field(default=None, gt=0)
    """`FOLDBUS_SESSION_TIMEOUT_S`: after how long without a sign of life a worker's partitions, and what else it leads
    (its relay, its projections), go to another one. Unset: the transport's own, and 10 s for leases."""
    health_port: int | None = Field(default=None, ge=0, le=65535)
    """`FOLDBUS_HEALTH_PORT`: where a worker answers `/live`, `/ready` and `/metrics`; 0 takes a free port."""
    health_host: str = "127.0.0.1"
    """`FOLDBUS_HEALTH_HOST`: the address it listens on; 0.0.0.0 in a container whose probes come from outside."""
    strict: bool = False
    """`FOLDBUS_STRICT`: refuses a link that may be read on its way; otherwise it is a warning."""
    kafka_security_protocol: str | None = None
    """`FOLDBUS_KAFKA_…`: how Kafka is reached, in the words of `bus/kafka/options.py`; the bus's URL goes before."""
    kafka_ssl_cafile: str | None = None
    kafka_ssl_certfile: str | None = None
    kafka_ssl_keyfile: str | None = None
    kafka_ssl_password: SecretStr | None = None
    kafka_ssl_password_file: str | None = None
    kafka_sasl_mechanism: str | None = None
    kafka_sasl_plain_username: str | None = None
    kafka_sasl_plain_password: SecretStr | None = None
    kafka_sasl_plain_password_file: str | None = None
    kafka_compression_type: str | None = None
    kafka_client_rack: str | None = None
    kafka_decompressed_bytes_max: str | None = None
    park_base_s: float = Field(default=ParkSettings().base_s, gt=0)
    """`FOLDBUS_PARK_BASE_S`: how long a parked message waits for its first try; each further wait is as long as all
    that went before."""
    park_max_s: float = Field(default=ParkSettings().max_s, gt=0)
    """`FOLDBUS_PARK_MAX_S`: and no longer than this."""
    park_total_s: float = Field(default=ParkSettings().total_s, ge=0)
    """`FOLDBUS_PARK_TOTAL_S`: so long after its first failure a message is a dead letter, or held. 0: as soon as it has
    failed its attempts in place."""
    failpoint: str | None = None
    """`FOLDBUS_FAILPOINT`: `name:n` kills the process at the n-th hit. For crash tests."""

    def poll(self) -> PollSettings | None:
        """The transport's timings, and how Kafka is reached; None where the transport's own defaults hold."""
        extra = self.kafka() if self.bus.startswith("kafka:") else {}
        if self.session_timeout_s is None:
            return PollSettings(extra=extra) if extra else None
        return PollSettings(
            extra=extra,
            session_timeout_s=self.session_timeout_s,
            heartbeat_s=min(3.0, self.session_timeout_s / 6),
            rebalance_timeout_s=max(20.0, self.session_timeout_s),
        )

    def kafka(self) -> dict[str, str]:
        """What is set of `FOLDBUS_KAFKA_…`."""
        found: dict[str, str] = {}
        for name in Settings.model_fields:
            value: object = getattr(self, name)
            if name.startswith("kafka_") and value:
                text = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
                found[name.removeprefix("kafka_")] = text
        return found

    def worker(self) -> WorkerSettings:
        """The worker's settings, with leases that end when the session does."""
        parking = ParkSettings(base_s=self.park_base_s, max_s=self.park_max_s, total_s=self.park_total_s)
        if self.session_timeout_s is None:
            return WorkerSettings(parking=parking)
        alert_s = self.session_timeout_s / 3
        return WorkerSettings(
            parking=parking,
            health=HealthSettings(watchdog=WatchdogSettings(threshold_s=min(1.0, alert_s), alert_s=alert_s)),
            relay=RelaySettings(lease_ttl_s=self.session_timeout_s),
            projections=ProjectionSettings(lease_ttl_s=self.session_timeout_s),
        )
