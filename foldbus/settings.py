"""Settings of the program's entry point: command line over environment over `.env` over defaults.

Every variable starts with `FOLDBUS_`. The library itself reads nothing from the environment.
"""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from bus.transport import PollSettings
from foldbus.relay import RelaySettings
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
    failpoint: str | None = None
    """`FOLDBUS_FAILPOINT`: `name:n` kills the process at the n-th hit. For crash tests."""

    def poll(self) -> PollSettings | None:
        """The transport's timings; None where the transport's own defaults hold."""
        if self.session_timeout_s is None:
            return None
        return PollSettings(
            session_timeout_s=self.session_timeout_s,
            heartbeat_s=min(3.0, self.session_timeout_s / 6),
            rebalance_timeout_s=max(20.0, self.session_timeout_s),
        )

    def worker(self) -> WorkerSettings:
        """The worker's settings, with leases that end when the session does."""
        if self.session_timeout_s is None:
            return WorkerSettings()
        return WorkerSettings(
            relay=RelaySettings(lease_ttl_s=self.session_timeout_s),
            projections=ProjectionSettings(lease_ttl_s=self.session_timeout_s),
        )
