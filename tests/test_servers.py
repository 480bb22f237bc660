"""The ground the other tests stand on: the servers are real, keep what they were given, and say what is missing."""

import asyncio
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import asyncpg
import psutil
import pytest
import yaml
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from tests.servers import Kafka, MissingServer, Postgres, start_kafka, start_postgres
from tests.servers.engine import engine_answers
from tests.servers.jars import KAFKA_VERSION
from tests.servers.postgres import POSTGRES_MAJOR, new_database

ROOT = Path(__file__).parents[1]


async def test_the_broker_keeps_a_record_with_its_key_and_headers(kafka: str) -> None:
    topic = await a_topic(kafka)
    await produce(kafka, topic, b"value", headers=[("ce_id", b"1"), ("empty", b"")])

    (record,) = await consume(kafka, topic, count=1)

    assert (record.key, record.value) == (b"key", b"value")
    assert list(record.headers) == [("ce_id", b"1"), ("empty", b"")]


async def test_the_broker_makes_no_topic_that_nobody_declared(kafka: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    try:
        topic = f"undeclared-{uuid4()}"
        await admin.describe_topics([topic])
        assert topic not in await admin.list_topics()
    finally:
        await admin.close()


async def test_each_test_has_a_database_of_its_own_on_a_server_that_syncs(database: str, postgres: str) -> None:
    connection = await asyncpg.connect(database)
    try:
        assert str(await connection.fetchval("SELECT version()")).startswith("PostgreSQL ")
        assert int(str(await connection.fetchval("SHOW server_version_num"))) >= POSTGRES_MAJOR * 10_000
        assert await connection.fetchval("SHOW fsync") == "on"
        assert int(str(await connection.fetchval("SHOW max_prepared_transactions"))) >= 10
        assert await connection.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0
    finally:
        await connection.close()
    assert database != postgres


async def test_a_database_goes_away_with_whoever_is_still_connected(postgres: str) -> None:
    with new_database(postgres) as dsn:
        connection = await asyncpg.connect(dsn)
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await connection.execute("SELECT 1")
    connection.terminate()
    with pytest.raises(asyncpg.InvalidCatalogNameError):
        await asyncpg.connect(dsn)


async def test_a_broker_killed_and_started_again_has_what_it_acknowledged(fresh_kafka: Kafka) -> None:
    topic = await a_topic(fresh_kafka.bootstrap)
    await produce(fresh_kafka.bootstrap, topic, b"before")

    await asyncio.to_thread(fresh_kafka.kill)
    assert not await reachable(fresh_kafka.bootstrap)
    await asyncio.to_thread(fresh_kafka.start)

    await produce(fresh_kafka.bootstrap, topic, b"after")
    assert [record.value for record in await consume(fresh_kafka.bootstrap, topic, count=2)] == [b"before", b"after"]


async def test_a_database_server_killed_and_started_again_has_what_it_committed(fresh_postgres: Postgres) -> None:
    connection = await asyncpg.connect(fresh_postgres.dsn)
    await connection.execute("CREATE TABLE kept (id int)")
    await connection.execute("INSERT INTO kept VALUES (1)")

    await asyncio.to_thread(fresh_postgres.kill)
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await connection.execute("INSERT INTO kept VALUES (2)")
    connection.terminate()
    await asyncio.to_thread(fresh_postgres.start)

    connection = await asyncpg.connect(fresh_postgres.dsn)
    assert await connection.fetchval("SELECT array_agg(id) FROM kept") == [1]
    await connection.close()


async def test_a_paused_server_answers_when_it_goes_on(fresh_postgres: Postgres) -> None:
    connection = await asyncpg.connect(fresh_postgres.dsn)
    await asyncio.to_thread(fresh_postgres.pause)
    answer = asyncio.ensure_future(connection.fetchval("SELECT 42"))
    done, _ = await asyncio.wait([answer], timeout=0.3)
    assert not done

    await asyncio.to_thread(fresh_postgres.resume)

    assert await answer == 42
    await connection.close()


def test_a_docker_client_without_an_engine_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = tmp_path / "docker"
    client.write_text("#!/bin/sh\necho 'Docker version 28.2.2'\n")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody.sock")

    assert not engine_answers(timeout_s=1)


def test_a_missing_broker_is_named_with_what_to_install(bare_machine: Path) -> None:
    with pytest.raises(MissingServer) as missing, start_kafka():
        pass

    said = str(missing.value)
    assert "need a real Kafka" in said
    assert "Java 17" in said
    assert "maven" in said
    assert "FOLDBUS_TEST_KAFKA" in said
    assert "no engine answers" in said


def test_a_missing_database_server_is_named_with_what_to_install(bare_machine: Path) -> None:
    with pytest.raises(MissingServer) as missing, start_postgres():
        pass

    said = str(missing.value)
    assert "need a real PostgreSQL" in said
    assert "apt-get install postgresql" in said
    assert "FOLDBUS_TEST_POSTGRES" in said


def test_a_given_server_that_nobody_serves_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        port = taken.getsockname()[1]
        monkeypatch.setenv("FOLDBUS_TEST_KAFKA", f"127.0.0.1:{port}")
        monkeypatch.setenv("FOLDBUS_TEST_POSTGRES", f"postgresql://postgres@127.0.0.1:{port}/postgres")
        with pytest.raises(MissingServer, match="nobody listens there"), start_kafka():
            pass
        with pytest.raises(MissingServer, match="FOLDBUS_TEST_POSTGRES"), start_postgres():
            pass


def test_run_hands_the_servers_to_a_command_and_returns_its_code(kafka: str, postgres: str) -> None:
    program = "import os, sys; print(os.environ['FOLDBUS_TEST_KAFKA'], *sys.argv[1:]); sys.exit(7)"
    done = subprocess.run(
        [sys.executable, "-m", "tests.servers", "run", "--", "python", "-c", program, "{kafka}", "--store={postgres}"],
        cwd=ROOT,
        env={**os.environ, "FOLDBUS_TEST_KAFKA": kafka, "FOLDBUS_TEST_POSTGRES": postgres},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 7, done.stderr
    assert done.stdout.split() == [kafka, f"kafka://{kafka}", f"--store={postgres}"]


def test_a_run_that_is_killed_leaves_no_server_behind() -> None:
    program = """
from tests.servers import start_postgres
with start_postgres(own=True) as server:
    print(server.dsn, flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline().startswith("postgresql://")
        started = psutil.Process(run.pid).children(recursive=True)
        assert any(process.name() == "postgres" for process in started)
        run.kill()

    gone, alive = psutil.wait_procs(started, timeout=40)

    assert gone
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_compose_starts_the_versions_that_the_tests_run_on() -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    services = compose["services"]

    assert services["kafka"]["image"] == f"apache/kafka:{KAFKA_VERSION}"
    assert services["postgres"]["image"] == f"postgres:{POSTGRES_MAJOR}"
    pom = (ROOT / "tests" / "servers" / "kafka" / "pom.xml").read_text()
    assert re.findall(r"<kafka.version>(.*?)<", pom) == [KAFKA_VERSION]
    for name in ("orders", "payments", "warehouse", "insights"):
        service = services[name]
        assert service["command"] == ["foldbus", "run", f"shop.{name}:app"]
        assert {"FOLDBUS_STORE", "FOLDBUS_BUS"} <= service["environment"].keys()
        assert set(service["depends_on"]) <= services.keys()


@pytest.fixture
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with nothing on it: no engine, no Java, no Maven, no PostgreSQL, no helpful wheel."""
    for name in ("FOLDBUS_TEST_KAFKA", "FOLDBUS_TEST_POSTGRES", "JAVA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody.sock")
    monkeypatch.setattr("tests.servers.jars.find_spec", lambda name: None)
    monkeypatch.setattr("tests.servers.postgres.find_spec", lambda name: None)
    monkeypatch.setattr("tests.servers.postgres.DEBIAN", tmp_path)
    return tmp_path


async def a_topic(bootstrap: str) -> str:
    topic = f"servers-{uuid4()}"
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, num_partitions=1, replication_factor=1)])
    finally:
        await admin.close()
    return topic


async def produce(bootstrap: str, topic: str, value: bytes, *, headers: list[tuple[str, bytes]] | None = None) -> None:
    async with AIOKafkaProducer(
        bootstrap_servers=bootstrap, enable_idempotence=True, compression_type="lz4"
    ) as producer:
        await producer.send_and_wait(topic, value, key=b"key", headers=headers or [])


async def consume(bootstrap: str, topic: str, *, count: int) -> list:  # type: ignore[type-arg]  # untyped records
    consumer = AIOKafkaConsumer(
        topic, bootstrap_servers=bootstrap, group_id=f"group-{uuid4()}", auto_offset_reset="earliest"
    )
    async with consumer:
        return [await consumer.getone() for _ in range(count)]


async def reachable(bootstrap: str) -> bool:
    host, _, port = bootstrap.rpartition(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return False
    writer.close()
    return True
