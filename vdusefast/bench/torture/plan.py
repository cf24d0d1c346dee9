"""The plan of the torture suite: the blows to a device, and their order."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vdusefast.base.kinds import TransportKind
from vdusefast.errors import ConfigError

KINDS = ("worker", "supervisor", "group", "relay", "keeper", "stall", "restart", "resize", "fail")
DEFAULT_KILLS = {"worker": 100, "supervisor": 20, "group": 10, "stall": 5, "restart": 5}
KILLS = ("worker", "supervisor", "group", "relay")  # which may be followed by a second one
ENDS_SERVER = ("supervisor", "group", "restart")
NEEDS_FILE = ("resize", "fail")
AGAIN_SHARE = 0.125  # of the kills: a second one follows, while what the first has done is still being put right
SIZE_BYTES = 8 << 20
# Of load in each cycle; a pause makes it longer.
RUN_S: dict[str, float] = {TransportKind.LOOPBACK: 0.1, TransportKind.KERNEL: 0.3}
STALL_MIN_S = 0.1
STALL_MAX_S = 2.0
FAIL_MIN_S = 0.01
FAIL_MAX_S = 0.1


@dataclass(frozen=True)
class Blow:
    """One thing done to a device under load."""

    kind: str  # one of KINDS
    delay_s: float  # after the load has begun
    queue: int  # whose worker it meets, where it meets one
    again_s: float = -1.0  # a second one, so long after the first; negative = none
    stall_s: float = 0.0  # how long a stopped process stays so, or a store that fails does
    of_supervisor: bool = False  # a stall: of the supervisor rather than of a worker

    @property
    def title(self) -> str:
        """The row of the report that this counts for."""
        if self.kind == "stall":
            return "stall of the supervisor" if self.of_supervisor else "stall of a worker"
        if self.kind == "restart":
            return "restart (hand-over)"
        if self.kind == "fail":
            return "the store fails for a while"
        return f"{self.kind}, again while it recovers" if self.again_s >= 0 else self.kind


# The keys of a device's configuration for each format of its rings.
RINGS: dict[str, dict[str, bool]] = {
    "default": {},
    "split": {"packed": False, "in_order": False},
    "split-in-order": {"packed": False, "in_order": True},
    "packed": {"packed": True, "in_order": False},
    "packed-in-order": {"packed": True, "in_order": True},
}


@dataclass(frozen=True)
class TortureOptions:
    """The options of `bench torture`."""

    transport: str = "auto"
    kills: dict[str, int] = field(default_factory=lambda: dict(DEFAULT_KILLS))
    seed: int = 0
    queues: int = 2
    queue_size: int = 64
    ring: str = "default"  # one of RINGS
    engine: str = "auto"
    cache: str = "writeback"
    backend: str | None = None
    size_bytes: int = 0  # of what is written to; 0 = SIZE_BYTES, or what the store has if that is less
    block_bytes: int = 4096
    depth: int = 16
    run_s: float = 0.0  # of load in each cycle; 0 = RUN_S
    duration_s: float = 0.0  # repeat the same mix for so long; 0 = once
    give_up_s: float = 30.0  # a request not answered for so long is lost
    json: Path | None = None
    keep_going: bool = False
    msg_timeout_s: float = 90.0

    def load_s(self, transport: str) -> float:
        """Return how long the load of a cycle goes on."""
        return self.run_s or RUN_S[transport]

    def area_bytes(self, capacity_bytes: int) -> int:
        """Return how much of a device of that size is written to."""
        return min(capacity_bytes, self.size_bytes or SIZE_BYTES)


def parse_kills(text: str) -> dict[str, int]:
    """Return how often each kind is asked for by `worker=100,stall=5`. Raises ConfigError."""
    kills: dict[str, int] = {}
    for part in text.split(","):
        kind, sep, count = part.strip().partition("=")
        if kind not in KINDS or not sep or not count.isdecimal():
            raise ConfigError(f"--kills: {part.strip()!r} is not KIND=COUNT, with a kind out of {', '.join(KINDS)}")
        if kind in kills:
            raise ConfigError(f"--kills: {kind} is given twice")
        kills[kind] = int(count)
    if not any(kills.values()):
        raise ConfigError("--kills: nothing is to be killed")
    return kills


def blows(
    kills: dict[str, int], numbers: random.Random, queues: int, run_s: float, *, for_ever: bool
) -> Iterator[Blow]:
    """Yield the blows of one mix in random order, or of one mix after another.

    run_s: how long the load of one cycle goes on: each blow falls at a random moment of it.
    """
    while True:
        order = [kind for kind, count in kills.items() for _ in range(count)]
        numbers.shuffle(order)
        for kind in order:
            yield _blow(kind, numbers, queues, run_s)
        if not for_ever:
            return


def _blow(kind: str, numbers: random.Random, queues: int, run_s: float) -> Blow:
    delay_s, queue = numbers.uniform(0, run_s), numbers.randrange(queues)
    if kind == "stall":
        return Blow(
            kind,
            delay_s,
            queue,
            stall_s=numbers.uniform(STALL_MIN_S, STALL_MAX_S),
            of_supervisor=numbers.random() < 0.5,
        )
    if kind == "fail":
        return Blow(kind, delay_s, queue, stall_s=numbers.uniform(FAIL_MIN_S, FAIL_MAX_S))
    again_s = -1.0
    if kind in KILLS and numbers.random() < AGAIN_SHARE:
        again_s = numbers.uniform(0, 0.06 if kind == "worker" else 0.5)
    return Blow(kind, delay_s, queue, again_s)
