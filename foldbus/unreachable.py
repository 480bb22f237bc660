"""What is said when a store or a bus cannot be opened: what was tried, without its password; what happened; what to do.

Told apart by SQLSTATE, errno and class of what lies at the bottom, never by text.
"""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

from bus.errors import TransportUnavailable
from bus.links import LinkRefused, found_in
from eventstore.errors import StoreUnavailable

_STORE = "correct the store's URL (--store, FOLDBUS_STORE)"
_BUS = "correct the bus's URL (--bus, FOLDBUS_BUS)"


@contextmanager
def naming_store(url: str, shown: str) -> Generator[None]:
    """Around the opening of a PostgreSQL store: its StoreUnavailable comes out telling of `shown`."""
    try:
        yield
    except StoreUnavailable as error:
        raise StoreUnavailable(f"PostgreSQL at {shown} {_of_postgresql(url, error)}") from error


@contextmanager
def naming_bus(shown: str) -> Generator[None]:
    """Around the opening of Kafka: its TransportUnavailable comes out telling of `shown`, its LinkRefused as well."""
    try:
        yield
    except LinkRefused as error:
        raise LinkRefused(f"Kafka at {shown}: {error}; or {_BUS}") from error
    except TransportUnavailable as error:
        # aiokafka's own word for it names nothing but the address once more.
        why = "" if type(error.__cause__).__name__ == "KafkaConnectionError" else f" ({error})"
        raise TransportUnavailable(
            f"Kafka at {shown} cannot be reached: no broker answered there{why}; start it, or {_BUS}"
        ) from error


def _of_postgresql(url: str, error: BaseException) -> str:
    where = urlsplit(url)
    causes = list(_causes(error))
    code = next((str(one) for found in causes if (one := getattr(found, "sqlstate", None))), "")
    last = causes[-1]
    said = f"{last} (SQLSTATE {code})" if code else str(last) or type(last).__name__
    if code.startswith("28"):
        return f"refuses user {unquote(where.username or '')!r}: {said}; correct user or password, or {_STORE}"
    if code == "3D000":
        name = unquote(where.path.strip("/"))
        return f"has no database {name!r}: {said}; make it (`createdb {name}`), or {_STORE}"
    if code:
        return f"answers, but does not do it: {said}"
    for found in causes:
        if isinstance(found, ssl.SSLError):
            return f"cannot be trusted: {found_in(found, trust='sslrootcert')}; or {_STORE}"
        if type(found) is ConnectionError and "sslmode" in where.query:  # what the driver raises in its own name
            return f"speaks no TLS, and its URL wants it ({found}); set sslmode to what it has, or {_STORE}"
    return f"cannot be reached: {_of_network(last)}; start it, or {_STORE}"


def _of_network(error: BaseException) -> str:
    match error:
        case ConnectionRefusedError():
            return "nobody listens there (connection refused)"
        case socket.gaierror():
            return f"no such host ({error.strerror})"
        case TimeoutError():
            return "no answer in time"
        case OSError(errno=errno.EHOSTUNREACH | errno.ENETUNREACH):
            return f"no way there ({error.strerror})"
        case _:
            return f"{type(error).__name__}: {error}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Itself and what led to it, down to what the driver or the system raised."""
    found: BaseException | None = error
    while found is not None:
        yield found
        if getattr(found, "sqlstate", None) and not isinstance(getattr(found, "orig", None), BaseException):
            return  # what the server said; below it is only how the driver heard it
        below = getattr(found, "orig", None)
        found = below if isinstance(below, BaseException) else found.__cause__
