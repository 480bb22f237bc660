"""Links that anybody on the way can read: said when they are opened, refused where strict.

A host that is this machine's loopback is nobody's way. Names are taken as they are written and not looked up: what a
name means may change after it was looked up.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from urllib.parse import parse_qs, urlsplit

from bus.errors import FoldbusError
from bus.metrics import Metrics

log = logging.getLogger("foldbus.links")

_ENCRYPTS = ("require", "verify-ca", "verify-full")
_said: set[str] = set()


class PlaintextLink(FoldbusError):
    """Strict, and the link to a store or a bus may be read on its way: nothing was opened."""


def of_bus(brokers: str, extra: Mapping[str, str]) -> str | None:
    """What is wrong with the link to these brokers (`host:port,host:port`); None when nothing is."""
    from bus.kafka.options import security_protocol

    protocol = security_protocol(extra)
    hosts = [urlsplit(f"//{one}").hostname or "" for one in brokers.split(",")]
    away = _away(hosts)
    if not away or protocol.endswith("SSL"):
        return None
    login = "passwords and messages" if extra.get("sasl_mechanism", "").upper() == "PLAIN" else "messages"
    return (
        f"{login} to and from Kafka at {', '.join(away)} can be read and changed on their way: security_protocol is "
        f"{protocol}, wanted SSL or SASL_SSL (in the bus's URL, or FOLDBUS_KAFKA_SECURITY_PROTOCOL)"
    )


def of_store(url: str) -> str | None:
    """What is wrong with the link to this PostgreSQL; None when nothing is."""
    where = urlsplit(url)
    query = parse_qs(where.query)
    hosts = [one.partition(":")[0] for text in query.get("host", []) for one in text.split(",")]
    if where.hostname or not hosts:
        hosts.append(where.hostname or "")
    away = _away(hosts)
    mode = query.get("sslmode", query.get("ssl", ["prefer"]))[-1]
    if not away or mode in _ENCRYPTS:
        return None
    found = f"sslmode is {mode}" if "sslmode" in query or "ssl" in query else "no sslmode is set"
    return (
        f"what goes to and from PostgreSQL at {', '.join(away)} may be read and changed on its way: {found}, wanted "
        "sslmode=verify-full with sslrootcert (in the store's URL)"
    )


def say(problem: str | None, metrics: Metrics) -> None:
    """Counts it each time, and logs it once in a process."""
    if problem is None:
        return
    metrics.count("foldbus_plaintext_links_total")
    if problem not in _said:
        _said.add(problem)
        log.warning("%s", problem)


def refuse(problems: Iterable[str | None]) -> None:
    """Raises PlaintextLink with all of them."""
    found = [problem for problem in problems if problem is not None]
    if found:
        raise PlaintextLink("; ".join(found) + "; strict, so nothing was opened (FOLDBUS_STRICT)")


def _away(hosts: Iterable[str]) -> list[str]:
    return [host for host in hosts if not _is_loopback(host)]


def _is_loopback(host: str) -> bool:
    if not host or host.startswith("/"):
        return True  # a socket in a file, or the driver's own default, which is one
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
