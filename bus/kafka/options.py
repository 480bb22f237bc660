"""How to reach a broker: `PollSettings` in aiokafka's words, and whether aiokafka runs at full speed."""

from __future__ import annotations

import logging
from typing import Any

from aiokafka.helpers import create_ssl_context
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from bus.errors import BusError
from bus.metrics import Metrics
from bus.transport import PollSettings

log = logging.getLogger("foldbus.bus")

_TEXTS = ("security_protocol", "sasl_mechanism", "sasl_plain_username", "sasl_plain_password")
_FILES = {"ssl_cafile": "cafile", "ssl_certfile": "certfile", "ssl_keyfile": "keyfile", "ssl_password": "password"}
_OTHERS = ("compression_type", "client_rack")


def client_options(bootstrap: str, settings: PollSettings, client_id: str) -> dict[str, Any]:
    """What all of aiokafka's clients take. Raises BusError for a name in `settings.extra` that nobody reads."""
    unknown = settings.extra.keys() - {*_TEXTS, *_FILES, *_OTHERS}
    if unknown:
        known = ", ".join((*_TEXTS, *_FILES, *_OTHERS))
        raise BusError(f"Kafka settings {', '.join(sorted(unknown))} are unknown; known are {known}")
    options: dict[str, Any] = {name: settings.extra[name] for name in _TEXTS if name in settings.extra}
    files = {argument: settings.extra[name] for name, argument in _FILES.items() if name in settings.extra}
    if files or "SSL" in options.get("security_protocol", ""):
        options["ssl_context"] = create_ssl_context(**files)
    return {
        **options,
        "bootstrap_servers": bootstrap,
        "client_id": client_id,
        "request_timeout_ms": milliseconds(settings.request_timeout_s),
    }


def compression(settings: PollSettings) -> str | None:
    """lz4 unless said otherwise; `none` turns it off."""
    chosen = settings.extra.get("compression_type", "lz4")
    return None if chosen == "none" else chosen


def milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def warn_when_slow(metrics: Metrics) -> None:
    """Without its compiled record codec aiokafka needs five to twenty times the processor time, silently."""
    compiled = "_crecords" in DefaultRecordBatchBuilder.__module__
    metrics.gauge("foldbus_kafka_compiled_codec", float(compiled))
    if not compiled:
        log.warning(
            "aiokafka runs without its compiled record codec, which costs most of its throughput; "
            "wanted an aiokafka wheel for this platform and no AIOKAFKA_NO_EXTENSIONS in the environment"
        )
