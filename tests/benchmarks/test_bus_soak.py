"""The soak of the bus: that its account bites, that its pauses are what they are called, and that it runs."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from benchmarks.bus_soak import judged
from benchmarks.pauses import pauses_of, takeovers
from bus.partitioner import partition_of

WANTED = {"a": [0, 1, 2], "b": [0, 1]}


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        ({"a": [0, 1], "b": [0, 1]}, "lost"),
        ({"a": [0, 1, 2]}, "lost"),
        ({"a": [0, 1, 2, 2], "b": [0, 1]}, "twice"),
        ({"a": [0, 2, 1], "b": [0, 1]}, "disordered"),
        ({"a": [0, 1, 2, 3], "b": [0, 1]}, "unasked"),
        ({"a": [0, 1, 2], "b": [0, 1], "c": [0]}, "unasked"),
    ],
)
def test_the_account_names_what_is_wrong(found: dict[str, list[int]], fault: str) -> None:
    account = judged(WANTED, found)
    assert account["ok"] is False
    assert {name for name in ("lost", "twice", "disordered", "unasked") if account[name]} == {fault}
    assert account["examples"][fault]


def test_the_account_of_what_is_right_is_right() -> None:
    account = judged(WANTED, {"b": [0, 1], "a": [0, 1, 2]})
    assert account["ok"] is True
    assert (account["commands"], account["effects"], account["examples"]) == (5, 5, {})


def test_takeovers_are_read_from_the_workers_logs() -> None:
    one = [{"message": "x: took over x.commands[0-2,5] epoch 7", "heard_at": 10.0}, {"message": "x: gave back it"}]
    two = [{"message": "x: took over x.commands[3-4] epoch 7", "heard_at": 11.0}]
    assert takeovers([one, two]) == {7: {0: 10.0, 1: 10.0, 2: 10.0, 3: 11.0, 4: 11.0, 5: 10.0}}


def test_a_pause_is_the_time_between_the_effects_around_a_takeover_under_what_was_done_last() -> None:
    keys: dict[int, str] = {}
    for n in range(100):
        keys.setdefault(partition_of(f"k{n}".encode(), 2), f"k{n}")
    effects = [(keys[0], 1.0), (keys[1], 1.5), (keys[0], 4.0), (keys[1], 9.5), (keys[0], 20.0), (keys[1], 20.5)]
    logs = [
        [{"message": "x: took over x.commands[0-1] epoch 1", "heard_at": 3.0}],
        [{"message": "x: took over x.commands[0-1] epoch 2", "heard_at": 14.0}],
        [{"message": "x: took over x.commands[0-1] epoch 3", "heard_at": 15.0}],  # ends the pause that 2 was in
    ]
    found = pauses_of(effects, logs, [(2.0, "kill"), (12.0, "join")], partitions=2)
    assert found["by_cause"] == {
        "kill": {"rebalances": 1, "mean_s": 8.0, "worst_s": 8.0},
        "join": {"rebalances": 1, "mean_s": 16.0, "worst_s": 16.0},
    }
    assert (found["rebalances"], found["mean_s"], found["worst_s"]) == (2, 12.0, 16.0)
    assert found["per_partition_mean_s"] == (3.0 + 8.0 + 16.0 + 11.0) / 4


@pytest.mark.timeout(480)
async def test_a_short_soak_through_all_that_can_be_done_to_workers_and_a_broker_that_is_away_loses_nothing() -> None:
    chosen = "--messages 1000 --keys 50 --seconds 12 --seed 4 --down 4 --rest 120"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.bus_soak", *chosen.split()),
        cwd=Path(__file__).parents[2],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said, errors = await process.communicate()
    assert process.returncode == 0, said.decode()[-3000:] + errors.decode()[-3000:]
    account = json.loads(said)
    assert (account["ok"], account["commands"], account["effects"]) == (True, 1000, 1000)
    assert account["done_to_them"].keys() >= {"broker away", "broker back"}
    assert account["workers"] >= 3
    assert account["pauses"].keys() >= {"rebalances", "mean_s", "worst_s", "by_cause"}
