"""python -m benchmarks.bus_soak [--messages N] [--keys N] [--seconds S] [--seed N] [--down S]
                                 [--policy hold --failing SHARE]

Commands over a thousand keys on a real Kafka and a real PostgreSQL, three worker processes, and every two seconds
something happens to them: one is killed and another started, one is frozen past its session and thawed later, one
leaves in order, one joins. Once, at two fifths, the broker is killed and stays away for a while. With `--policy hold
--failing 0.01` one message in a hundred fails until three quarters are sent: its key waits, in order, and the others go
on.

The effects are rows of a ledger in which nothing is unique. In the end every command must be there once, and those of a
key in the order in which they were sent. The last line of JSON is the account, with the mean and the worst pause per
rebalance and the seed that runs it again; it ends with 1 when anything differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.pauses import pauses_of
from tests.servers import Kafka, MissingServer, start_kafka, start_postgres
from tests.servers.postgres import new_database
from tests.stories.lives import Life, Lives, lives_of

EVERY_S = 2.0
SESSION_S = 6.0
WORKERS, WORKERS_MAX = 3, 5
PARTITIONS = 12
BATCH = 100


@dataclass(frozen=True)
class Options:
    """`down_s` is how long the broker is away; `rest_s` how long the last effects may take once all is sent and
    everybody is left alone."""

    messages: int = 100_000
    keys: int = 1000
    seconds: float = 150.0
    seed: int = 0
    down_s: float = 30.0
    policy: str = "skip"
    failing: float = 0.0
    rest_s: float = 300.0


@dataclass
class Chaos:
    """Does something to the workers every two seconds, so that two at least are at work. `done` says what and when."""

    lives: Lives
    rng: random.Random
    done: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    frozen: list[tuple[float, Life]] = field(default_factory=list[tuple[float, Life]])
    leaving: list[Life] = field(default_factory=list[Life])

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(EVERY_S)
            self.thaw(time.monotonic())
            await self.strike()

    async def strike(self) -> None:
        up = self.up
        at_work = [life for life in up if life.heard("took over")]
        what = self.rng.choice(["kill", "freeze", "leave", "join"] if len(up) < WORKERS_MAX else ["freeze", "leave"])
        if len(up) < WORKERS:
            what = "join"
        if what == "join":
            self.note(what)
            await self.lives.start()
            return
        if len(at_work) < WORKERS:  # the last ones are still on their way: somebody has to be at work
            return
        self.note(what)
        victim = self.rng.choice(at_work)
        if what == "kill":
            victim.signal(signal.SIGKILL)
        elif what == "freeze":
            victim.signal(signal.SIGSTOP)
            self.frozen.append((time.monotonic() + SESSION_S + self.rng.uniform(0.5, 4.0), victim))
        elif what == "leave":
            self.leaving.append(victim)
            victim.signal(signal.SIGTERM)
        if len(up) <= WORKERS:
            await self.lives.start()

    @property
    def up(self) -> list[Life]:
        """Those that run, not frozen, not asked to leave."""
        away = [*self.leaving, *(life for _, life in self.frozen)]
        return [life for life in self.lives.all if life.runs and life not in away]

    def thaw(self, now: float) -> None:
        for until, life in [one for one in self.frozen if one[0] <= now]:
            self.frozen.remove((until, life))
            self.note("thaw")
            life.signal(signal.SIGCONT)

    def note(self, what: str) -> None:
        self.done.append((time.time(), what))

    def may_end_so(self, life: Life) -> bool:
        """Killed, or asked to leave (before it listened to signals, perhaps); or it began without a broker, said so and
        ended, and whoever supervises it starts it again."""
        match life.process.returncode:
            case 0 | -9:
                return True
            case -15:
                return life in self.leaving
            case 2:
                return life.heard("cannot be reached")
            case _:
                return False

    async def rest(self) -> None:
        """Everybody is thawed, and three are at work."""
        self.thaw(float("inf"))
        while len(self.up) < WORKERS:
            await self.lives.start()


async def send_all(options: Options, lives: Lives, rng: random.Random, *, at: Mapping[int, Any]) -> None:
    """Evenly over the time there is, in rounds over all keys. `at` is what to call once so many are sent."""
    keys = [f"key-{n}" for n in range(options.keys)]
    due: list[str] = []
    while len(due) < options.messages:
        rng.shuffle(keys)
        due += keys
    began, sent = time.monotonic(), 0
    calls = sorted(at.items())
    while sent < options.messages:
        batch = due[sent : min(sent + BATCH, options.messages)]
        await lives.enter_all(batch)
        sent += len(batch)
        while calls and sent >= calls[0][0]:
            calls.pop(0)[1]()
        ahead_s = options.seconds * sent / options.messages - (time.monotonic() - began)
        if ahead_s > 0:
            await asyncio.sleep(ahead_s)


async def at_rest(lives: Lives, *, within_s: float) -> dict[str, list[int]]:
    """The ledger once nothing is missing, or as it is when the time is over."""
    total, until = sum(map(len, lives.wanted().values())), time.monotonic() + within_s
    while True:
        done: int = await lives.sql.fetchval("select count(*) from ledger")
        await asyncio.sleep(2.0)  # also what may come twice has the time to come
        if done >= total or time.monotonic() > until:
            return await lives.rows()


def judged(wanted: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """What was lost, done twice, done out of order, or never asked for; with examples."""
    faults: dict[str, list[str]] = {"lost": [], "twice": [], "disordered": [], "unasked": []}
    for key, ns in wanted.items():
        done = list(found.get(key, ()))
        counted = Counter(done)
        faults["lost"] += [f"{key}/{n}" for n in ns if n not in counted]
        faults["twice"] += [f"{key}/{n}" for n, times in counted.items() if times > 1]
        faults["unasked"] += [f"{key}/{n}" for n in counted if n not in set(ns)]
        firsts = list(dict.fromkeys(done))
        if firsts != sorted(firsts):
            faults["disordered"].append(f"{key}: {done[:50]}")
    faults["unasked"] += [key for key in found if key not in wanted]
    return {
        "ok": not any(faults.values()),
        "commands": sum(map(len, wanted.values())),
        "effects": sum(map(len, found.values())),
        **{name: len(examples) for name, examples in faults.items()},
        "examples": {name: examples[:5] for name, examples in faults.items() if examples},
    }


async def soak(options: Options, kafka: Kafka, database: str, marks: Path) -> dict[str, Any]:
    rng = random.Random(options.seed)
    async with lives_of(
        f"soak-{options.seed % 1_000_000}", store=database, bus=f"kafka://{kafka.bootstrap}", marks=marks,
        partitions=PARTITIONS, session_s=SESSION_S, LEDGER_POLICY=options.policy, LEDGER_FAILING=str(options.failing),
        FOLDBUS_PARK_MAX_S="10",
    ) as lives:  # fmt: skip
        began, chaos = time.monotonic(), Chaos(lives, rng)
        broken: list[asyncio.Task[None]] = []

        async def outage() -> None:
            chaos.note("broker away")
            await asyncio.to_thread(kafka.kill)
            await asyncio.sleep(options.down_s)
            await asyncio.to_thread(kafka.start)
            chaos.note("broker back")

        rain = marks / "rain"
        if options.failing:
            rain.touch()
        await asyncio.gather(*(lives.start() for _ in range(WORKERS)))
        striking = asyncio.create_task(chaos.run())
        try:
            calls = {
                options.messages * 2 // 5: lambda: broken.append(asyncio.create_task(outage())),
                options.messages * 3 // 4: lambda: rain.unlink(missing_ok=True),
            }
            await send_all(options, lives, rng, at=calls)
            sent_s = time.monotonic() - began
            await asyncio.gather(*broken)
        finally:
            striking.cancel()
            await asyncio.gather(striking, return_exceptions=True)
        await chaos.rest()
        found = await at_rest(lives, within_s=options.rest_s)
        took_s = time.monotonic() - began
        account = judged(lives.wanted(), found)
        rows = await lives.sql.fetch("select account, at from ledger order by seq")
        letters = await lives.client.store.dead_letters()
        codes = Counter(life.process.returncode for life in lives.all if not life.runs)
        wrong = [life for life in lives.all if not life.runs and not chaos.may_end_so(life)]
        return {
            **account,
            "ok": account["ok"] and not wrong and not letters,
            "dead_letters": len(letters),
            "exit_codes": {str(code): n for code, n in codes.items()},
            "last_words": [life.messages()[-3:] for life in wrong[:3]],
            "sent_s": round(sent_s, 1),
            "took_s": round(took_s, 1),
            "workers": len(lives.all),
            "done_to_them": dict(Counter(what for _, what in chaos.done)),
            "pauses": pauses_of(
                [(row["account"], row["at"].timestamp()) for row in rows],
                [life.logged for life in lives.all],
                chaos.done,
                partitions=PARTITIONS,
            ),
            "load": round(os.getloadavg()[0], 2),
        }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bus_soak", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--messages", type=int, default=Options.messages)
    parser.add_argument("--keys", type=int, default=Options.keys)
    parser.add_argument("--seconds", type=float, default=Options.seconds, help="they are sent over so long")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--down", type=float, default=Options.down_s, help="how long the broker is away")
    parser.add_argument("--policy", choices=("skip", "hold"), default=Options.policy)
    parser.add_argument("--failing", type=float, default=Options.failing, help="share of the messages, for a while")
    parser.add_argument("--rest", type=float, default=Options.rest_s, help="how long the last effects may take")
    chosen = parser.parse_args()
    if chosen.failing and chosen.policy != "hold":
        parser.error("--failing wants --policy hold: under skip what fails becomes a dead letter and its key goes on")
    options = Options(
        messages=chosen.messages, keys=chosen.keys, seconds=chosen.seconds, down_s=chosen.down, policy=chosen.policy,
        failing=chosen.failing, rest_s=chosen.rest,
        seed=random.SystemRandom().randrange(2**32) if chosen.seed is None else chosen.seed,
    )  # fmt: skip
    logging.basicConfig(level=logging.ERROR)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="foldbus-bus-soak-") as directory,
            start_kafka(own=True) as kafka,
            start_postgres() as postgres,
            new_database(postgres.dsn) as database,
        ):
            result = asyncio.run(soak(options, kafka, database, Path(directory)))
    except MissingServer as missing:
        print(missing, file=sys.stderr)
        return 1
    if not result["ok"]:
        words = " ".join(f"--{name} {value}" for name, value in vars(chosen).items() if name != "seed")
        result["again"] = f"python -m benchmarks.bus_soak {words} --seed {options.seed}"
    print(json.dumps({**asdict(options), **result}))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
