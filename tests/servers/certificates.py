"""Certificates for the servers of tests: an authority of one's own, and what it signs, rightly and wrongly."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

HERE = ("localhost", "127.0.0.1")


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as PEM; `both` holds the two, as Kafka wants a key store."""

    certificate: Path
    key: Path
    both: Path


class Authority:
    """Signs. `certificate` is what others trust."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._directory, self._name = directory, name
        self._key = ec.generate_private_key(ec.SECP256R1())
        subject = _called(f"Foldbus test {name}")
        self._own = _signed(subject, subject, self._key.public_key(), self._key, hosts=(), ca=True, days=1)
        self.certificate = directory / f"{name}.pem"
        self.certificate.write_bytes(self._own.public_bytes(Encoding.PEM))

    def pair(
        self, name: str, *, hosts: Sequence[str] = HERE, days: int = 1, by_itself: bool = False, password: str = ""
    ) -> Pair:
        """For these hosts, from yesterday for `days` from now (below 0: it has expired); `by_itself`: not signed by the
        authority. With a password the key is encrypted."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _called(f"Foldbus test {name}")
        signer, issuer = (key, subject) if by_itself else (self._key, self._own.subject)
        made = _signed(subject, issuer, key.public_key(), signer, hosts=hosts, ca=False, days=days)
        encryption: KeySerializationEncryption = (
            BestAvailableEncryption(password.encode()) if password else NoEncryption()
        )
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
        pair = Pair(*(self._directory / f"{self._name}-{name}.{end}" for end in ("crt", "key", "pem")))
        pair.certificate.write_bytes(made.public_bytes(Encoding.PEM))
        pair.key.write_bytes(pem)
        pair.both.write_bytes(pem + made.public_bytes(Encoding.PEM))
        return pair


def _called(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _signed(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePrivateKey,
    *,
    hosts: Sequence[str],
    ca: bool,
    days: int,
) -> x509.Certificate:
    now = datetime.now(UTC)
    begins = now - timedelta(days=1 + max(0, -days))
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .add_extension(_usage(ca), critical=True)
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_host(one) for one in hosts]), critical=False)
    return builder.sign(signer, hashes.SHA256())


def _usage(ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=ca, crl_sign=ca, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)
