"""Why a broker cannot be talked to: asked once, after opening has failed, so that a wrong setting is told as such.

aiokafka tries the brokers one after the other, logs what it found, and says only that none of them answered. Here one
connection of its kind is made to each, and what happens on it is told: a certificate, a login, or a port that expects
something else than what is set. What is no matter of settings (nobody listens) answers None.
"""

from __future__ import annotations

import asyncio
import ssl
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from aiokafka import conn
from aiokafka.errors import (
    IllegalSaslStateError,
    KafkaError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
)
from aiokafka.protocol.metadata import MetadataRequest

from bus.kafka.internals import close_connection
from bus.links import LinkRefused, found_in, refuses_ours, speaks_no_tls

_driver: Any = conn  # it has no types
_TRUST = "ssl_cafile"
_PROBE_S = 5.0


async def why_refused(options: Mapping[str, Any], *, timeout_s: float) -> LinkRefused | None:
    """Of the bootstrap brokers, and of those that they name, the first with which it is a matter of settings. Bounded
    by `timeout_s` for all of them; None also when that was not enough."""
    try:
        async with asyncio.timeout(timeout_s):
            seen: set[tuple[str, int]] = set()
            left: list[tuple[str, int]] = [
                (host, port) for host, port, _ in _driver.collect_hosts(options["bootstrap_servers"])
            ]
            while left:
                where = left.pop(0)
                if where in seen:
                    continue
                seen.add(where)
                found = await _look(*where, options)
                if isinstance(found, str):
                    return LinkRefused(f"{where[0]}:{where[1]} {found}")
                left += found
    except TimeoutError:
        pass
    return None


async def _look(host: str, port: int, options: Mapping[str, Any]) -> str | list[tuple[str, int]]:
    """What is wrong there; or the brokers that it names, none when nobody listens."""
    protocol = options["security_protocol"]
    ours = {name: value for name, value in options.items() if name != "bootstrap_servers"}
    welcome = False
    try:
        connection: Any = _driver.AIOKafkaConnection(host, port, **ours)
        try:
            await connection.connect()
            welcome = True
            metadata = await connection.send(MetadataRequest([]))
        finally:
            await close_connection(connection)
        return [(str(broker[1]), int(broker[2])) for broker in metadata.brokers]
    except (KafkaError, OSError, EOFError, TimeoutError) as error:
        for one in _causes(error):
            said = _said(one, options)
            if said is not None:
                return said
    tls = protocol.endswith("SSL")
    if not tls and await _speaks_tls(host, port):
        return f"speaks TLS; security_protocol is {protocol}, wanted {'SASL_SSL' if 'SASL' in protocol else 'SSL'}"
    if tls and await _speaks_plainly(host, port):
        wanted = "SASL_PLAINTEXT" if "SASL" in protocol else "PLAINTEXT"
        return f"speaks no TLS; security_protocol is {protocol}, that port wants {wanted}"
    if welcome and "SASL" not in protocol:
        wanted = "SASL_SSL" if tls else "SASL_PLAINTEXT"
        return (
            f"ends the connection at the first question; it most likely wants a login: security_protocol is {protocol},"
            f" wanted {wanted} with sasl_mechanism, sasl_plain_username and sasl_plain_password"
        )
    return []


def _said(error: BaseException, options: Mapping[str, Any]) -> str | None:
    mechanism, user = options.get("sasl_mechanism"), options.get("sasl_plain_username")
    match error:
        case SaslAuthenticationFailed():
            return (
                f"refuses the login of {user!r} by {mechanism}: {_words(error)}; correct sasl_plain_username, "
                "sasl_plain_password or sasl_mechanism"
            )
        case UnsupportedSaslMechanismError():
            return f"takes no login by {mechanism}: {_words(error)}; set sasl_mechanism to one that it takes"
        case IllegalSaslStateError():
            wanted = options["security_protocol"].removeprefix("SASL_")
            return f"takes no login; security_protocol is {options['security_protocol']}, wanted {wanted}"
        case ssl.SSLError() if refuses_ours(error):
            return (
                f"wants a certificate of ours, or refuses the one it got ({error.reason}); set ssl_certfile and "
                "ssl_keyfile to one that it trusts"
            )
        case ssl.SSLError() if not speaks_no_tls(error) and not isinstance(error, ssl.SSLEOFError):
            return f"cannot be trusted: {found_in(error, trust=_TRUST)}"
        case _:
            return None


def _words(error: BaseException) -> str:
    """In one line, and without what the client says of itself."""
    said = " ".join(str(one) for one in error.args if isinstance(one, str)) or type(error).__name__
    return " ".join(said.split())[:300]


async def _speaks_tls(host: str, port: int) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # only whether it is TLS; nothing is sent
    try:
        async with asyncio.timeout(_PROBE_S):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except ssl.SSLError as error:
        return not speaks_no_tls(error) and not isinstance(error, ssl.SSLEOFError)
    except (OSError, EOFError, TimeoutError):
        return False
    writer.transport.abort()
    return True


async def _speaks_plainly(host: str, port: int) -> bool:
    """Does it answer the first question of every client (ApiVersions, version 0)?"""
    try:
        async with asyncio.timeout(_PROBE_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(struct.pack(">ihhih", 10, 18, 0, 1, -1))
                answer = await reader.readexactly(8)
            finally:
                writer.transport.abort()
    except (OSError, EOFError, TimeoutError):
        return False
    return answer[4:] == struct.pack(">i", 1)


def _causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    for _ in range(10):
        if found is None:
            return
        yield found
        found = found.__cause__ or found.__context__
