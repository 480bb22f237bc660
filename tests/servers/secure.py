"""A real Kafka that wants certificates and logins: one broker, a listener for each way to get it right or wrong.

From Kafka's own jars on every machine, also where a Docker engine answers: its listeners and users are set here file
by file.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.servers.certificates import Authority, Pair
from tests.servers.kafka import INSTALL, Listener, broker_from_jars
from tests.servers.missing import MissingServer, Unavailable

USER, PASSWORD = "orders", "a secret: it's 9$ & {more}"
"""By SCRAM-SHA-256, SCRAM-SHA-512 and, over TLS, PLAIN."""

_SCRAM = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
_PLAIN = f'org.apache.kafka.common.security.plain.PlainLoginModule required user_{USER}="{PASSWORD}";'


@dataclass(frozen=True)
class SecureKafka:
    """`bootstrap[name]`: plain, tls, login (TLS and SASL), mutual (wants a certificate), open_login (SASL without TLS);
    with bad certificates expired, self_signed, elsewhere (for another host), renamed (for this one, but not for the
    name under which the broker then tells of itself)."""

    bootstrap: dict[str, str]
    trusted: Path
    """Signed the good ones."""
    stranger: Path
    """An authority that signed none of them."""
    client: Pair
    """What `mutual` takes."""
    locked: Pair
    """The same, its key under PASSWORD."""
    foreign: Pair
    """What it does not take."""


@contextmanager
def start_secure_kafka() -> Iterator[SecureKafka]:
    """For the length of the block. Raises `MissingServer`."""
    with TemporaryDirectory(prefix="foldbus-certificates-") as made:
        directory = Path(made)
        authority, stranger = Authority(directory), Authority(directory, "stranger")
        good = authority.pair("broker")
        listeners = [
            Listener("tls", "SSL", _store(good)),
            Listener("login", "SASL_SSL", {**_store(good), **_logins("SCRAM-SHA-512", "SCRAM-SHA-256", "PLAIN")}),
            Listener(
                "mutual",
                "SSL",
                {
                    **_store(good), "ssl.client.auth": "required", "ssl.truststore.type": "PEM",
                    "ssl.truststore.location": str(authority.certificate),
                },
            ),
            Listener("open_login", "SASL_PLAINTEXT", _logins("SCRAM-SHA-512")),
            Listener("expired", "SSL", _store(authority.pair("expired", days=-1))),
            Listener("self_signed", "SSL", _store(authority.pair("self-signed", by_itself=True))),
            Listener("renamed", "SSL", _store(authority.pair("renamed", hosts=["127.0.0.1"])), host="localhost"),
            Listener("elsewhere", "SSL", _store(authority.pair("elsewhere", hosts=["kafka.elsewhere.example"]))),
        ]  # fmt: skip
        try:
            broker = broker_from_jars(listeners, users={USER: PASSWORD})
        except Unavailable as closed:
            raise MissingServer("Kafka with TLS", [str(closed)], install=INSTALL[:2]) from closed
        try:
            yield SecureKafka(
                {"plain": broker.bootstrap, **{name: f"127.0.0.1:{port}" for name, port in broker.ports.items()}},
                trusted=authority.certificate,
                stranger=stranger.certificate,
                client=authority.pair("client"),
                locked=authority.pair("locked", password=PASSWORD),
                foreign=stranger.pair("client"),
            )
        finally:
            broker.close()


def _store(pair: Pair) -> dict[str, str]:
    return {"ssl.keystore.type": "PEM", "ssl.keystore.location": str(pair.both)}


def _logins(*mechanisms: str) -> dict[str, str]:
    modules = {"PLAIN": _PLAIN}
    return {
        "sasl.enabled.mechanisms": ",".join(mechanisms),
        **{f"{name.lower()}.sasl.jaas.config": modules.get(name, _SCRAM) for name in mechanisms},
    }
