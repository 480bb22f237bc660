"""How a store and a bus are reached: in the URL or the environment, encrypted or said to be otherwise."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest

from bus.metrics import MemoryMetrics
from bus.seams import SystemClock, Uuid7Ids
from eventstore.errors import StoreUnavailable
from foldbus import Service
from foldbus.backends import BadUrl, BusUrl, open_store, open_transport, without_password
from foldbus.plaintext import PlaintextLink, of_bus, of_store
from foldbus.settings import Settings
from tests.foldbus.desk import SOURCE
from tests.servers.certificates import Authority
from tests.servers.missing import MissingServer
from tests.servers.postgres import start_postgres_with_tls

# --- the bus's URL and the environment -------------------------------------------------------------------------------


def test_a_bus_url_says_how_its_brokers_are_reached() -> None:
    url = BusUrl.parse("kafka://me:p%40ss%2Fword@a:1,b:2?ssl_cafile=/etc/ca.pem&sasl_mechanism=PLAIN")
    assert url.text == "a:1,b:2"
    assert url.extra == {
        "sasl_plain_username": "me", "sasl_plain_password": "p@ss/word", "ssl_cafile": "/etc/ca.pem",
        "sasl_mechanism": "PLAIN",
    }  # fmt: skip
    assert BusUrl.parse("kafka://a:1").extra == {}
    assert "p@ss" not in repr(url)
    assert without_password("kafka://me:secret@a:1,b:2?sasl_plain_password=secret") == "kafka://me@a:1,b:2"


def test_a_bus_url_that_cannot_be_read_tells_no_password() -> None:
    for wrong in ("kafka://a:1?secret", "kafka://me:secret@a:x?ssl_cafile=x", "kafka://a:1?secret&x=1"):
        with pytest.raises(BadUrl, match="wanted kafka://host:port") as refused:
            BusUrl.parse(wrong)
        assert "secret" not in str(refused.value)


def test_the_environment_says_it_for_kafka_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOLDBUS_KAFKA_SASL_PLAIN_PASSWORD", "secret")
    monkeypatch.setenv("FOLDBUS_KAFKA_CLIENT_RACK", "eu-1a")
    monkeypatch.setenv("FOLDBUS_BUS", "kafka://a:1")
    settings = Settings()
    poll = settings.poll()
    assert poll is not None
    assert poll.extra == {"sasl_plain_password": "secret", "client_rack": "eu-1a"}
    assert "secret" not in repr(settings)
    assert Settings(bus="embedded:x").poll() is None  # an embedded bus keeps its own timings
    quick = Settings(session_timeout_s=3.0).poll()
    assert quick is not None
    assert (quick.session_timeout_s, quick.extra["client_rack"]) == (3.0, "eu-1a")


# --- plaintext -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("brokers", "extra", "away"),
    [
        ("127.0.0.1:9092", {}, None),
        ("127.8.8.8:9092,localhost:9092,[::1]:9092,kafka.localhost:1", {}, None),
        ("kafka:9092", {}, "kafka"),
        ("localhost:9092,10.0.0.7:9092,[fe80::1]:1", {}, "10.0.0.7, fe80::1"),
        ("kafka:9092", {"security_protocol": "SASL_PLAINTEXT"}, "kafka"),
        ("kafka:9092", {"security_protocol": "ssl"}, None),
        ("kafka:9092", {"ssl_cafile": "x"}, None),
        ("kafka:9092", {"sasl_plain_username": "x"}, None),
        ("localhost.example.org:9092", {}, "localhost.example.org"),
        ("127.0.0.1.example.org:9092", {}, "127.0.0.1.example.org"),
        ("0.0.0.0:9092", {}, "0.0.0.0"),
    ],
)
def test_a_bus_that_may_be_read_on_its_way_is_told_with_its_hosts(
    brokers: str, extra: dict[str, str], away: str | None
) -> None:
    found = of_bus(brokers, extra)
    if away is None:
        assert found is None
    else:
        assert found is not None
        assert f"Kafka at {away} can be read and changed on their way" in found
        assert "wanted SSL or SASL_SSL" in found


@pytest.mark.parametrize(
    ("url", "away"),
    [
        ("postgresql://me:secret@127.0.0.1/shop", None),
        ("postgresql://localhost/shop", None),
        ("postgresql:///shop", None),
        ("postgresql:///shop?host=/run/postgresql", None),
        ("postgresql://me@[::1]:5432/shop", None),
        ("postgresql://me:secret@db/shop", "no sslmode is set"),
        ("postgresql://me:secret@db/shop?sslmode=prefer", "sslmode is prefer"),
        ("postgresql://me:secret@db/shop?sslmode=allow", "sslmode is allow"),
        ("postgresql://me:secret@db/shop?sslmode=disable", "sslmode is disable"),
        ("postgresql:///shop?host=db", "no sslmode is set"),
        ("postgresql:///shop?host=/run/postgresql,db", "no sslmode is set"),
        ("postgresql://me@db/shop?sslmode=require", None),
        ("postgresql://me@db/shop?sslmode=verify-ca", None),
        ("postgresql://me@db/shop?sslmode=verify-full", None),
        ("postgresql://me@db/shop?sslmode=verify-full&sslmode=disable", "sslmode is disable"),
    ],
)
def test_a_store_that_may_be_read_on_its_way_is_told_with_its_mode(url: str, away: str | None) -> None:
    found = of_store(url)
    if away is None:
        assert found is None
    else:
        assert found is not None
        assert f"PostgreSQL at db may be read and changed on its way: {away}, wanted sslmode=verify-full" in found
        assert "secret" not in found


async def test_it_is_counted_each_time_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Names under `.invalid` are nobody's."""
    metrics = MemoryMetrics()
    for _ in range(3):
        with pytest.raises(Exception, match="cannot be reached"):
            async with open_transport("kafka://once.invalid:9092", clock=SystemClock(), metrics=metrics):
                raise AssertionError("it connected")
        with pytest.raises(StoreUnavailable, match="cannot be reached"):
            async with open_store(
                "postgresql://me:secret@once.invalid/shop", "shop", clock=SystemClock(), ids=Uuid7Ids(), metrics=metrics
            ):
                raise AssertionError("it connected")
    assert metrics.total("foldbus_plaintext_links_total") == 6
    said = [record.getMessage() for record in caplog.records if record.name == "foldbus.links"]
    assert [one.partition("once.invalid")[0] for one in said] == [
        "messages to and from Kafka at ", "what goes to and from PostgreSQL at ",
    ]  # fmt: skip
    assert "secret" not in caplog.text


async def test_strict_opens_nothing_that_may_be_read_on_its_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    store, bus = f"sqlite:{tmp_path}", f"embedded:{tmp_path}"
    for url, through, said in (
        (store, "kafka://k.invalid:1", "Kafka at k.invalid"),
        ("postgresql://db.invalid/x", bus, "PostgreSQL at db.invalid"),
        ("postgresql://db.invalid/x", "kafka://k.invalid:1", r"PostgreSQL at db\.invalid .*; .* Kafka at k\.invalid"),
    ):
        with pytest.raises(PlaintextLink, match=f"{said}.*nothing was opened"):
            async with Service("desk").connect(store=url, bus=through, strict=True):
                raise AssertionError("it connected")
    assert not list(tmp_path.iterdir())
    async with Service("desk").connect(store=store, bus=bus, strict=True):
        pass


def test_the_command_line_is_strict_where_the_environment_says_so(tmp_path: Path) -> None:
    (tmp_path / "desk_service.py").write_text(SOURCE.replace("NAME", "desk"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOLDBUS_")}

    def said(*args: str, **more: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "foldbus", *args], cwd=tmp_path, env={**environment, **more}, capture_output=True,
            text=True, timeout=60,
        )  # fmt: skip
        return done.returncode, done.stderr

    for command in ("run", "lag", "topics apply", "saga list"):
        code, line = said(*command.split(), "desk_service:app", "--bus", "kafka://k.invalid:1", FOLDBUS_STRICT="1")
        assert code == 2
        assert line.startswith("foldbus: messages to and from Kafka at k.invalid can be read and changed on their way")
        assert line.count("\n") == 1
    code, line = said(
        "db", "check", "desk_service:app", "--store", "postgresql://u:secret@db.invalid/x", FOLDBUS_STRICT="1"
    )
    assert code == 2
    assert "PostgreSQL at db.invalid may be read" in line
    assert "secret" not in line
    safe = {"FOLDBUS_STRICT": "1", "FOLDBUS_KAFKA_SECURITY_PROTOCOL": "SSL"}
    code, line = said("topics", "plan", "desk_service:app", "--bus", "kafka://k.invalid:1", **safe)
    assert code == 2
    assert "cannot be reached" in line


# --- PostgreSQL ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tls:
    dsn: str
    trusted: Path
    stranger: Path

    def url(self, mode: str, **query: object) -> str:
        asked = "".join(f"&{name}={quote(str(value), safe='')}" for name, value in query.items())
        return f"{self.dsn}?sslmode={mode}{asked}"


@pytest.fixture(scope="module")
def postgres_with_tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tls]:
    directory = tmp_path_factory.mktemp("certificates")
    authority, stranger = Authority(directory), Authority(directory, "stranger")
    try:
        with start_postgres_with_tls(authority.pair("postgres", hosts=["127.0.0.1"])) as dsn:
            yield Tls(dsn, authority.certificate, stranger.certificate)
    except MissingServer as missing:
        pytest.fail(str(missing), pytrace=False)


async def encrypted(url: str, service: str) -> list[bool]:
    """Of each connection that this store holds: its pool's, its listener's."""
    async with open_store(
        url, service, clock=SystemClock(), ids=Uuid7Ids(), metrics=MemoryMetrics(), migrate=True
    ) as store:
        async with store.transaction() as tx:
            found = await tx.sql.exec_driver_sql(
                "select s.ssl from pg_stat_ssl s join pg_stat_activity a using (pid) "
                "where a.backend_type = 'client backend'"
            )
            return [bool(row[0]) for row in found.fetchall()]


async def test_sslmode_in_the_stores_url_reaches_every_connection(postgres_with_tls: Tls) -> None:
    tls = postgres_with_tls
    assert not any(await encrypted(tls.url("disable"), "plain"))
    for mode, query in (
        ("require", {}),
        ("verify-ca", {"sslrootcert": tls.trusted}),
        ("verify-full", {"sslrootcert": tls.trusted}),
    ):
        found = await encrypted(tls.url(mode, **query), "shop")
        assert found
        assert all(found), mode


async def test_a_postgresql_that_cannot_be_trusted_is_told_with_what_to_do(postgres_with_tls: Tls) -> None:
    tls = postgres_with_tls
    elsewhere = tls.url("verify-full", sslrootcert=tls.trusted).replace("127.0.0.1", "localhost")
    for url, said in (
        (
            tls.url("verify-full", sslrootcert=tls.stranger),
            "cannot be trusted: its certificate is signed by one .*sslrootcert",
        ),
        (elsewhere, "cannot be trusted: its certificate is for another name"),
    ):
        with pytest.raises(StoreUnavailable, match=said):
            await encrypted(url, "shop")


async def test_a_postgresql_without_tls_is_told_when_it_is_wanted(database: str) -> None:
    with pytest.raises(StoreUnavailable, match="speaks no TLS"):
        await encrypted(f"{database}?sslmode=require", "shop")
