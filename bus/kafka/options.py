"""How to reach a broker: `PollSettings` in aiokafka's words, and whether aiokafka runs at full speed.

What `PollSettings.extra` may hold, all of it text:

| name | is |
| --- | --- |
| `security_protocol` | `PLAINTEXT`, `SSL`, `SASL_SSL` or `SASL_PLAINTEXT` |
| `ssl_cafile` | the certificates to trust (PEM); unset: those of the system |
| `ssl_certfile`, `ssl_keyfile`, `ssl_password` | our own certificate, its key, the key's password |
| `sasl_mechanism` | `SCRAM-SHA-512`, `SCRAM-SHA-256` or `PLAIN` |
| `sasl_plain_username`, `sasl_plain_password` | user and password, for each of these mechanisms |
| `sasl_plain_password_file`, `ssl_password_file` | the file that holds it: read when the transport opens |
| `compression_type` | `lz4` (unless said otherwise), `zstd`, `snappy`, `gzip`, `none` |
| `client_rack` | reads from the nearest replica |
| `decompressed_bytes_max` | what a batch may unpack to; see `unpacking.py` |

What is left out is taken from what is there: with a user it is `SASL_SSL` and `SCRAM-SHA-512`, with a file of
certificates `SSL`, otherwise `PLAINTEXT`. A certificate is always verified, with its host name.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiokafka.record.default_records import DefaultRecordBatchBuilder

from bus.errors import BusError
from bus.kafka.unpacking import UNPACKED_BYTES_MAX
from bus.metrics import Metrics
from bus.transport import PollSettings

log = logging.getLogger("foldbus.bus")

PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
MECHANISMS = ("SCRAM-SHA-512", "SCRAM-SHA-256", "PLAIN")
COMPRESSIONS = ("lz4", "zstd", "snappy", "gzip", "none")
NAMES = (
    "security_protocol", "sasl_mechanism", "sasl_plain_username", "sasl_plain_password", "sasl_plain_password_file",
    "ssl_cafile", "ssl_certfile", "ssl_keyfile", "ssl_password", "ssl_password_file", "compression_type", "client_rack",
    "decompressed_bytes_max",
)  # fmt: skip
"""What `PollSettings.extra` may hold for Kafka; also the names in a bus URL's query."""


def client_options(bootstrap: str, settings: PollSettings, client_id: str) -> dict[str, Any]:
    """What all of aiokafka's clients take. Raises BusError for a name in `settings.extra` that nobody reads, and for a
    value that cannot work; no password is in what it says."""
    extra = settings.extra
    unknown = extra.keys() - set(NAMES)
    if unknown:
        raise BusError(f"Kafka settings {', '.join(sorted(unknown))} are unknown; known are {', '.join(NAMES)}")
    protocol = security_protocol(extra)
    options: dict[str, Any] = {"security_protocol": protocol}
    if protocol.startswith("SASL_"):
        options |= _login(extra)
        if options["sasl_mechanism"] == "PLAIN":
            logging.getLogger("aiokafka.conn").addFilter(_without_passwords)
    elif "sasl_plain_username" in extra or "sasl_mechanism" in extra:
        raise BusError(f"Kafka settings: {protocol} has no login, but a user or mechanism is set; wanted SASL_SSL")
    if protocol.endswith("SSL"):
        options["ssl_context"] = _ssl_context(extra)
    elif "ssl_cafile" in extra or "ssl_certfile" in extra:
        raise BusError(f"Kafka settings: {protocol} has no TLS, but certificates are set; wanted SSL or SASL_SSL")
    unpacked_bytes_max(settings)
    compression(settings)
    return {
        **options,
        "bootstrap_servers": bootstrap,
        "client_id": client_id,
        "request_timeout_ms": milliseconds(settings.request_timeout_s),
    }


def security_protocol(extra: Mapping[str, str]) -> str:
    """The one that is set, or that what is set stands for."""
    given = extra.get("security_protocol")
    if given is not None:
        return _one_of("security_protocol", given.upper(), PROTOCOLS)
    if "sasl_plain_username" in extra or "sasl_mechanism" in extra:
        return "SASL_SSL"
    return "SSL" if "ssl_cafile" in extra or "ssl_certfile" in extra else "PLAINTEXT"


def compression(settings: PollSettings) -> str | None:
    """lz4 unless said otherwise; `none` turns it off."""
    chosen = _one_of("compression_type", settings.extra.get("compression_type", "lz4"), COMPRESSIONS)
    return None if chosen == "none" else chosen


def unpacked_bytes_max(settings: PollSettings) -> int:
    found = settings.extra.get("decompressed_bytes_max")
    if found is None:
        return UNPACKED_BYTES_MAX
    if not found.isascii() or not found.isdigit() or len(found) > 12 or int(found) < 1024 * 1024:
        raise BusError(f"Kafka setting decompressed_bytes_max is {found!r:.40}; wanted a number from 1048576 on")
    return int(found)


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


def _login(extra: Mapping[str, str]) -> dict[str, str]:
    password = _secret(extra, "sasl_plain_password")
    user = extra.get("sasl_plain_username")
    if not user or not password:
        missing = "sasl_plain_username" if not user else "sasl_plain_password (or sasl_plain_password_file)"
        raise BusError(f"Kafka settings: a login wants user and password; {missing} is not set")
    mechanism = _one_of("sasl_mechanism", extra.get("sasl_mechanism", MECHANISMS[0]).upper(), MECHANISMS)
    return {"sasl_mechanism": mechanism, "sasl_plain_username": user, "sasl_plain_password": password}


def _ssl_context(extra: Mapping[str, str]) -> ssl.SSLContext:
    trusted = extra.get("ssl_cafile")
    try:
        context = ssl.create_default_context(cafile=trusted)
    except (OSError, ValueError) as error:
        raise BusError(f"Kafka setting ssl_cafile: {trusted!r} cannot be read as certificates: {error}") from error
    certificate, key = extra.get("ssl_certfile"), extra.get("ssl_keyfile")
    if certificate is not None:
        # Always a function: without one OpenSSL would ask for the password on the terminal, and wait.
        password = _secret(extra, "ssl_password") or ""
        try:
            context.load_cert_chain(certificate, key, password=lambda: password)
        except (OSError, ValueError) as error:
            raise BusError(
                f"Kafka settings ssl_certfile, ssl_keyfile: {certificate!r} and {key or certificate!r} are no "
                f"certificate and its key, or ssl_password does not open it: {error}"
            ) from error
    elif key is not None:
        raise BusError("Kafka settings: ssl_keyfile is set and ssl_certfile is not")
    return context


def _secret(extra: Mapping[str, str], name: str) -> str | None:
    """As it is set, or out of the file that is set; the newline that an editor leaves at its end does not count."""
    file = extra.get(f"{name}_file")
    if file is None:
        return extra.get(name)
    if name in extra:
        raise BusError(f"Kafka settings: {name} and {name}_file are both set; wanted one of them")
    try:
        return Path(file).read_text().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BusError(f"Kafka setting {name}_file: {file!r} cannot be read: {type(error).__name__}") from error


def _one_of(name: str, found: str, wanted: tuple[str, ...]) -> str:
    if found not in wanted:
        raise BusError(f"Kafka setting {name} is {found!r:.40}; wanted one of {', '.join(wanted)}")
    return found


def _without_passwords(record: logging.LogRecord) -> bool:
    """At level DEBUG aiokafka logs every request, and a login by PLAIN is the password."""
    return not any("SaslAuthenticate" in type(one).__name__ for one in record.args or ())
