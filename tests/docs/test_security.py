"""docs/security.md: its commands and its code run on a broker with certificates, and its table names every setting."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from bus.cloudevents import HEADER_BYTES_MAX, HEADERS_MAX
from bus.codec import DEPTH_MAX, KEY_BYTES_MAX
from bus.kafka.options import NAMES
from bus.kafka.unpacking import UNPACKED_BYTES_MAX
from foldbus.settings import Settings
from tests.docs.blocks import ROOT, write_files
from tests.servers.missing import MissingServer
from tests.servers.secure import PASSWORD, SecureKafka, start_secure_kafka

pytestmark = pytest.mark.timeout(300)  # whole programs

PAGE = (ROOT / "docs" / "security.md").read_text()


@pytest.fixture(scope="module")
def secure() -> Iterator[SecureKafka]:
    try:
        with start_secure_kafka() as broker:
            yield broker
    except MissingServer as missing:
        pytest.fail(str(missing), pytrace=False)


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FOLDBUS_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return kept | {"PATH": path, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}"} | more


def test_its_command_makes_topics_over_tls_and_a_login(secure: SecureKafka, tmp_path: Path) -> None:
    (script,) = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "password").write_text(PASSWORD + "\n")
    given = {
        "BROKER": secure.bootstrap["login"], "CA": str(secure.trusted), "PASSWORD_FILE": str(tmp_path / "password"),
    }  # fmt: skip
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=environment(**given), capture_output=True,
        text=True, timeout=200,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "orders.commands" in ran.stdout
    assert PASSWORD not in ran.stdout + ran.stderr


def test_its_code_connects_and_is_refused_as_it_says(secure: SecureKafka, tmp_path: Path) -> None:
    (file,) = write_files("docs/security.md", tmp_path).values()
    # The topics are there since the command before, or are made here: a service without parts needs few.
    made = subprocess.run(
        [sys.executable, "-m", "foldbus", "topics", "apply", "shop.orders:app"], cwd=tmp_path, capture_output=True,
        text=True, timeout=200, env=environment(FOLDBUS_BUS=f"kafka://{secure.bootstrap['plain']}"),
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    ran = subprocess.run(
        [sys.executable, str(file), secure.bootstrap["login"], str(secure.trusted), quote(PASSWORD, safe="")],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, env=environment(),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    connected, refused, plaintext = ran.stdout.splitlines()
    assert connected == "connected"
    assert "refuses the login of 'orders' by SCRAM-SHA-512" in refused
    assert "PostgreSQL at db.example may be read and changed on its way: no sslmode is set" in plaintext
    assert "guessed" not in ran.stdout + ran.stderr


def test_its_table_names_every_setting_and_each_is_a_variable_as_well() -> None:
    table = PAGE.partition("| name | is | unless set |")[2].partition("\n\n")[0]
    named = {name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1] if line else "")}
    assert named == set(NAMES)
    assert {f"kafka_{name}" for name in NAMES} <= Settings.model_fields.keys()


def test_its_bounds_are_those_of_the_code() -> None:
    assert f"| {UNPACKED_BYTES_MAX} |" in PAGE
    assert UNPACKED_BYTES_MAX == 32 * 1024 * 1024
    assert f"| headers | {HEADERS_MAX}, of {HEADER_BYTES_MAX // 1024} KiB with their names |" in PAGE
    assert f"| a key | 1 to {KEY_BYTES_MAX:,} bytes of UTF-8" in PAGE
    assert f"| JSON | {DEPTH_MAX} levels written" in PAGE
