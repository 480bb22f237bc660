"""TLS and logins, against a real broker with a listener for each way to get them right or wrong.

Each wrong one is told at once: in one line, with what was found and what to set, and never with a password.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from aiokafka.conn import AIOKafkaConnection

from bus.errors import BusError, TransportUnavailable
from bus.kafka import KafkaTransport
from bus.kafka.diagnosis import why_refused
from bus.kafka.options import client_options
from bus.links import LinkRefused, found_in
from bus.transport import Ack, Outgoing, PollSettings
from tests.bus.transports import Recorder, new_topic, take, unique
from tests.foldbus.desk import SOURCE
from tests.servers.missing import MissingServer
from tests.servers.secure import PASSWORD, USER, SecureKafka, start_secure_kafka


@pytest.fixture(scope="module")
def secure() -> Iterator[SecureKafka]:
    try:
        with start_secure_kafka() as broker:
            yield broker
    except MissingServer as missing:
        pytest.fail(str(missing), pytrace=False)


def login(broker: SecureKafka, **other: str) -> dict[str, str]:
    given = {"sasl_plain_username": USER, "sasl_plain_password": PASSWORD, "ssl_cafile": str(broker.trusted)} | other
    return {name: value for name, value in given.items() if value}


async def tried(bootstrap: str, extra: Mapping[str, str]) -> None:
    """Publishes, reads in a group and as a tail, and asks for offsets."""
    settings = PollSettings(
        session_timeout_s=6.0, heartbeat_s=0.5, request_timeout_s=10.0, publish_deadline_s=10.0, extra=extra
    )
    async with KafkaTransport.open(bootstrap, settings=settings) as transport:
        topic, group = await new_topic(transport, partitions=2), unique("group")
        sent = await transport.publish([Outgoing(topic, b"k", text) for text in (b"1", b"2")])
        assert all(isinstance(one, Ack) for one in sent)
        async with transport.consume(group, [topic], listener=Recorder()) as consumer:
            found = await take(consumer, 2)
            await consumer.commit({found[-1].assignment: found[-1].offset + 1})
        assert [one.value for one in found] == [b"1", b"2"]
        assert list((await transport.admin.committed(group, [topic])).values()) == [2]
        async with transport.tail(topic, start="begin") as consumer:
            assert len(await take(consumer, 2)) == 2


# --- what works ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["", "SCRAM-SHA-512", "SCRAM-SHA-256", "PLAIN", "scram-sha-256"])
async def test_a_login_over_tls_publishes_reads_and_administers(secure: SecureKafka, mechanism: str) -> None:
    """SASL_SSL and SCRAM-SHA-512 when there is no more than user and password."""
    await tried(secure.bootstrap["login"], login(secure, sasl_mechanism=mechanism))


async def test_tls_alone_and_a_login_alone_do_as_well(secure: SecureKafka) -> None:
    await tried(secure.bootstrap["tls"], {"ssl_cafile": str(secure.trusted)})
    await tried(secure.bootstrap["open_login"], login(secure, security_protocol="SASL_PLAINTEXT", ssl_cafile=""))


async def test_a_certificate_of_ours_is_shown_also_one_whose_key_is_locked(secure: SecureKafka) -> None:
    for pair, password in ((secure.client, ""), (secure.locked, PASSWORD)):
        extra = {
            "ssl_cafile": str(secure.trusted), "ssl_certfile": str(pair.certificate), "ssl_keyfile": str(pair.key),
            "ssl_password": password,
        }  # fmt: skip
        await tried(secure.bootstrap["mutual"], extra)


async def test_passwords_may_come_out_of_a_file_as_an_editor_leaves_it(secure: SecureKafka, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(PASSWORD + "\n")
    await tried(secure.bootstrap["login"], login(secure, sasl_plain_password="", sasl_plain_password_file=str(file)))
    locked = {
        "ssl_cafile": str(secure.trusted), "ssl_certfile": str(secure.locked.certificate),
        "ssl_keyfile": str(secure.locked.key), "ssl_password_file": str(file),
    }  # fmt: skip
    await tried(secure.bootstrap["mutual"], locked)


# --- what does not ---------------------------------------------------------------------------------------------------

CASES: Mapping[str, tuple[str, Mapping[str, str], str]] = {
    "a wrong password": (
        "login",
        {"sasl_plain_password": "wrong-secret"},
        "refuses the login of 'orders' by SCRAM-SHA-512: .*; correct sasl_plain_username, sasl_plain_password or",
    ),
    "a wrong password, plainly": (
        "login",
        {"sasl_plain_password": "wrong-secret", "sasl_mechanism": "PLAIN"},
        "refuses the login of 'orders' by PLAIN: .*; correct sasl_plain_username",
    ),
    "an unknown user": (
        "login",
        {"sasl_plain_username": "nobody"},
        "refuses the login of 'nobody' by SCRAM-SHA-512",
    ),
    "a mechanism that it does not offer": (
        "open_login",
        {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "SCRAM-SHA-256", "ssl_cafile": ""},
        "takes no login by SCRAM-SHA-256.*; set sasl_mechanism to one that it takes",
    ),
    "an authority that is not ours": (
        "login",
        {"ssl_cafile": "STRANGER"},
        "cannot be trusted: its certificate is signed by one that is not trusted here; set ssl_cafile",
    ),
    "the system's authorities": (
        "login",
        {"ssl_cafile": ""},
        "cannot be trusted: its certificate is signed by .*; set ssl_cafile to",
    ),
    "an expired certificate": (
        "expired",
        {"LOGIN": ""},
        "cannot be trusted: its certificate has expired; renew it there",
    ),
    "a certificate signed by itself": (
        "self_signed",
        {"LOGIN": ""},
        "cannot be trusted: its certificate is signed by itself, or by one that nobody here trusts; set ssl_cafile",
    ),
    "a certificate for another host": (
        "elsewhere",
        {"LOGIN": ""},
        r"cannot be trusted: its certificate is for another name \(.*127\.0\.0\.1.*\); use the name that it is for",
    ),
    "plaintext to a port with TLS": (
        "tls",
        {"LOGIN": "", "ssl_cafile": ""},
        "speaks TLS; security_protocol is PLAINTEXT, wanted SSL",
    ),
    "a login without TLS to a port with TLS": (
        "login",
        {"security_protocol": "SASL_PLAINTEXT", "ssl_cafile": ""},
        "speaks TLS; security_protocol is SASL_PLAINTEXT, wanted SASL_SSL",
    ),
    "TLS to a port without": (
        "plain",
        {"LOGIN": ""},
        "speaks no TLS; security_protocol is SSL, that port wants PLAINTEXT",
    ),
    "TLS and a login to a port with neither": (
        "plain",
        {},
        "speaks no TLS; security_protocol is SASL_SSL, that port wants SASL_PLAINTEXT",
    ),
    "a login where there is none": (
        "tls",
        {},
        "takes no login; security_protocol is SASL_SSL, wanted SSL",
    ),
    "no login where there is one": (
        "login",
        {"LOGIN": ""},
        "ends the connection .*; it most likely wants a login: security_protocol is SSL, wanted SASL_SSL with sasl",
    ),
    "no login where there is one, without TLS": (
        "open_login",
        {"LOGIN": "", "ssl_cafile": ""},
        "ends the connection .*; it most likely wants a login: security_protocol is PLAINTEXT, wanted SASL_PLAINTEXT",
    ),
    "no certificate where one is wanted": (
        "mutual",
        {"LOGIN": ""},
        "wants a certificate of ours, or refuses the one it got .*; set ssl_certfile and ssl_keyfile",
    ),
    "a certificate of ours that it does not trust": (
        "mutual",
        {"LOGIN": "", "ssl_certfile": "FOREIGN", "ssl_keyfile": "FOREIGN"},
        "wants a certificate of ours, or refuses the one it got .*; set ssl_certfile and ssl_keyfile",
    ),
}


def given(broker: SecureKafka, other: Mapping[str, str]) -> dict[str, str]:
    if "LOGIN" in other:
        other = {"sasl_plain_username": "", "sasl_plain_password": ""} | dict(other)
    meant = {
        ("ssl_cafile", "STRANGER"): str(broker.stranger),
        ("ssl_certfile", "FOREIGN"): str(broker.foreign.certificate),
        ("ssl_keyfile", "FOREIGN"): str(broker.foreign.key),
    }
    return login(broker, **{name: meant.get((name, value), value) for name, value in other.items() if name != "LOGIN"})


@pytest.mark.parametrize("case", CASES)
async def test_what_does_not_fit_is_told_in_one_line_and_at_once(
    secure: SecureKafka, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    where, other, said = CASES[case]
    extra = given(secure, other)
    async with asyncio.timeout(45):
        with pytest.raises(LinkRefused, match=f"^{secure.bootstrap[where]} {said}") as refused:
            async with KafkaTransport.open(secure.bootstrap[where], settings=PollSettings(extra=extra)):
                raise AssertionError("it connected")
    assert "\n" not in str(refused.value)
    for secret in ("wrong-secret", PASSWORD):
        assert secret not in str(refused.value)
        assert secret not in caplog.text


@pytest.mark.parametrize("case", ["nothing is wrong", "the login is refused"])
async def test_asking_why_leaves_no_socket_open(
    secure: SecureKafka, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over TLS closing takes a round trip; a program that ends right after would be told of an unclosed socket."""
    made: list[Any] = []

    class Noticed(AIOKafkaConnection):  # type: ignore[misc]  # aiokafka has no types
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr("aiokafka.conn.AIOKafkaConnection", Noticed)
    extra = login(secure)
    where = secure.bootstrap["login"]
    if case == "the login is refused":
        extra = {**extra, "sasl_plain_password": "wrong-secret"}
    options = client_options(where, PollSettings(extra=extra), client_id="why")
    refused = await why_refused(options, timeout_s=20)
    assert (refused is None) is (case == "nothing is wrong")
    assert made
    assert all(one._protocol is not None and one._closed_fut.done() for one in made)


async def test_nobody_there_is_no_matter_of_settings(secure: SecureKafka) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(TransportUnavailable):
        async with KafkaTransport.open(nobody, settings=PollSettings(extra=login(secure))):
            raise AssertionError("it connected")


async def test_one_good_broker_of_two_is_enough(secure: SecureKafka) -> None:
    both = f"{secure.bootstrap['elsewhere']},{secure.bootstrap['tls']}"
    async with KafkaTransport.open(both, settings=PollSettings(extra={"ssl_cafile": str(secure.trusted)})) as transport:
        assert await transport.admin.describe(["not-there"]) == {}


async def test_a_broker_that_tells_of_itself_by_a_name_that_is_not_its_own_is_told(secure: SecureKafka) -> None:
    """The first connection is good; every further one goes to where the broker says that it is (its
    `advertised.listeners`)."""
    settings = PollSettings(request_timeout_s=6.0, extra={"ssl_cafile": str(secure.trusted)})
    port = secure.bootstrap["renamed"].partition(":")[2]
    async with asyncio.timeout(45):
        with pytest.raises(
            LinkRefused, match=f"^localhost:{port} cannot be trusted: its certificate is for another name"
        ):
            async with KafkaTransport.open(secure.bootstrap["renamed"], settings=settings):
                raise AssertionError("it connected")


@pytest.mark.parametrize("silent", [True, False], ids=["says nothing", "hangs up"])
async def test_a_port_that_is_no_broker_is_given_up_in_time(silent: bool) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if silent:
                await asyncio.wait_for(reader.read(-1), 30)
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, asyncio.timeout(45):
        for protocol in ("PLAINTEXT", "SSL"):
            settings = PollSettings(request_timeout_s=1.0, extra={"security_protocol": protocol})
            with pytest.raises((TransportUnavailable, LinkRefused)):
                async with KafkaTransport.open(f"127.0.0.1:{port}", settings=settings):
                    raise AssertionError("it connected")


# --- settings that cannot work ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"security_protocol": "TLS"}, "security_protocol is 'TLS'; wanted one of PLAINTEXT, SSL, SASL_PLAINTEXT, "),
        ({"sasl_mechanism": "GSSAPI", "sasl_plain_username": "u", "sasl_plain_password": "p"}, "one of SCRAM-SHA-512,"),
        ({"sasl_plain_username": "u"}, r"sasl_plain_password \(or sasl_plain_password_file\) is not set"),
        ({"sasl_mechanism": "PLAIN", "sasl_plain_password": "secret"}, "sasl_plain_username is not set"),
        ({"security_protocol": "SASL_SSL"}, "a login wants user and password; sasl_plain_username is not set"),
        ({"security_protocol": "SSL", "sasl_plain_username": "u"}, "SSL has no login, but a user or mechanism is set"),
        ({"security_protocol": "PLAINTEXT", "ssl_cafile": "x"}, "PLAINTEXT has no TLS, but certificates are set"),
        ({"ssl_cafile": "/not/there"}, "ssl_cafile: '/not/there' cannot be read as certificates: .*No such file"),
        ({"ssl_cafile": __file__}, "ssl_cafile: .* cannot be read as certificates"),
        ({"ssl_certfile": "/not/there"}, "'/not/there' and '/not/there' are no certificate and its key"),
        ({"ssl_keyfile": "/x", "security_protocol": "SSL"}, "ssl_keyfile is set and ssl_certfile is not"),
        (
            {"sasl_plain_username": "u", "sasl_plain_password": "secret", "sasl_plain_password_file": "/x"},
            "sasl_plain_password and sasl_plain_password_file are both set; wanted one of them",
        ),
        (
            {"sasl_plain_username": "u", "sasl_plain_password_file": "/not/there"},
            "sasl_plain_password_file: '/not/there' cannot be read: FileNotFoundError",
        ),
        ({"compression_type": "brotli"}, "compression_type is 'brotli'; wanted one of lz4, zstd, snappy, gzip, none"),
    ],
)  # fmt: skip
async def test_settings_that_cannot_work_are_refused_before_anybody_is_asked(
    extra: Mapping[str, str], said: str
) -> None:
    with pytest.raises(BusError, match=said) as refused:
        async with KafkaTransport.open("127.0.0.1:1", settings=PollSettings(extra=extra)):
            raise AssertionError("it connected")
    assert "secret" not in str(refused.value)


async def test_a_locked_key_is_not_asked_for_on_the_terminal(secure: SecureKafka) -> None:
    """OpenSSL would, and the worker would wait there for ever."""
    extra = {"ssl_certfile": str(secure.locked.certificate), "ssl_keyfile": str(secure.locked.key)}
    for password in ({}, {"ssl_password": "another"}):
        with pytest.raises(BusError, match="or ssl_password does not open it"):
            async with KafkaTransport.open("127.0.0.1:1", settings=PollSettings(extra={**extra, **password})):
                raise AssertionError("it connected")


def test_settings_do_not_show_what_they_hold() -> None:
    assert "secret" not in repr(PollSettings(extra={"sasl_plain_password": "secret"}))


def test_a_certificate_error_that_nobody_knows_is_told_in_its_own_words() -> None:
    odd = ssl.SSLCertVerificationError(1, "odd")
    odd.verify_code, odd.verify_message = 23, "certificate revoked"
    assert found_in(odd, trust="x") == "its certificate is refused: certificate revoked; trusted is what x says"
    odd.verify_code = 9
    assert "not valid yet" in found_in(odd, trust="x")


# --- the command line ------------------------------------------------------------------------------------------------


def foldbus(home: Path, *args: str, **environment: str) -> tuple[int, str, str]:
    (home / "desk_service.py").write_text(SOURCE.replace("NAME", "desk"))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FOLDBUS_")}
    done = subprocess.run(
        [sys.executable, "-m", "foldbus", *args], cwd=home, env=kept | environment,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_the_command_line_reads_the_environment_and_the_url_goes_before(secure: SecureKafka, tmp_path: Path) -> None:
    (tmp_path / "password").write_text(PASSWORD)
    bus = f"kafka://{secure.bootstrap['login']}"
    right = {
        "FOLDBUS_KAFKA_SSL_CAFILE": str(secure.trusted), "FOLDBUS_KAFKA_SASL_PLAIN_USERNAME": USER,
        "FOLDBUS_KAFKA_SASL_PLAIN_PASSWORD_FILE": str(tmp_path / "password"),
    }  # fmt: skip
    code, out, said = foldbus(tmp_path, "topics", "plan", "desk_service:app", FOLDBUS_BUS=bus, **right)
    assert (code, said) == (0, ""), said
    assert "desk.commands" in out
    stranger = f"{bus}?ssl_cafile={secure.stranger}"
    code, out, said = foldbus(tmp_path, "topics", "plan", "desk_service:app", "--bus", stranger, **right)
    assert (code, out) == (2, "")
    assert said == (
        f"foldbus: Kafka at kafka://{secure.bootstrap['login']}: {secure.bootstrap['login']} cannot be trusted: its "
        "certificate is signed by one that is not trusted here; set ssl_cafile to the certificates to trust; or "
        "correct the bus's URL (--bus, FOLDBUS_BUS)\n"
    )


@pytest.mark.parametrize("command", ["topics validate", "run"])
def test_a_wrong_password_ends_each_command_with_one_line(secure: SecureKafka, tmp_path: Path, command: str) -> None:
    bus = f"kafka://{USER}:not-the-secret@{secure.bootstrap['login']}?ssl_cafile={secure.trusted}"
    code, out, said = foldbus(tmp_path, *command.split(), "desk_service:app", "--bus", bus)
    assert (code, out) == (2, "")
    (line,) = said.splitlines()
    assert line.startswith(f"foldbus: Kafka at kafka://{USER}@{secure.bootstrap['login']}: ")
    assert "refuses the login of 'orders' by SCRAM-SHA-512" in line
    assert "not-the-secret" not in said
