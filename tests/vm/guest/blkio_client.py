"""A vhost-vdpa client: verified I/O on /dev/vhost-vdpa-N through libblkio.

    blkio_client.py NODE info
    blkio_client.py NODE check  [--queues N] [--blocks N]          every kind of request, once, verified
    blkio_client.py NODE load   --journal FILE [--seconds S] ...   random verified I/O; may be killed at any moment
    blkio_client.py NODE verify --journal FILE                     the area is what the journal says

Prints one JSON object last, and `load` a line "started" when its first request is done; SIGTERM ends it before its
time. Exit status 0, or 1 with one line on stderr.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import time
from pathlib import Path

from blkio import BlkioError, Client, run_one
from pattern import ANYTHING, BLOCK_BYTES, Journal, block_bytes

REQUEST_BLOCKS_MAX = 16
WAIT_S = 60.0


def check(client: Client, blocks: int) -> dict[str, object]:
    """Do one of every kind of request on every queue and verify what it leaves; returns what was done."""
    size = blocks * BLOCK_BYTES
    memory, counts = client.memory, dict.fromkeys(("write", "read", "zeroes", "discard", "flush"), 0)

    def do(queue: int, kind: str, offset: int, length: int, at: int = 0) -> None:
        requests = {
            "write": lambda q: q.write(offset, at, length, 1),
            "read": lambda q: q.read(offset, at, length, 1),
            "zeroes": lambda q: q.write_zeroes(offset, length, 1),
            "discard": lambda q: q.discard(offset, length, 1),
            "flush": lambda q: q.flush(1),
        }
        result = run_one(client, queue, requests[kind], WAIT_S)
        if result:
            raise BlkioError(f"{kind} of {length} bytes at {offset} on queue {queue}: {result}")
        counts[kind] += 1

    for queue in range(len(client.queues)):
        expected = random.Random(queue).randbytes(size)
        for offset, length in _pieces(size, client.request_alignment):
            memory[:length] = expected[offset : offset + length]
            do(queue, "write", offset, length)
        do(queue, "flush", 0, 0)
        middle = size // 2 // BLOCK_BYTES * BLOCK_BYTES
        do(queue, "zeroes", middle, 2 * BLOCK_BYTES)
        do(queue, "discard", middle + 2 * BLOCK_BYTES, BLOCK_BYTES)
        expected = expected[:middle] + bytes(2 * BLOCK_BYTES) + expected[middle + 2 * BLOCK_BYTES :]
        client.remap()
        memory[:size] = b"\xee" * size
        other = (queue + 1) % len(client.queues)  # what one queue wrote is there for every other
        for offset, length in _pieces(size, client.request_alignment):
            do(other, "read", offset, length, at=offset)
        discarded = slice(middle + 2 * BLOCK_BYTES, middle + 3 * BLOCK_BYTES)
        got = bytearray(memory[:size])
        got[discarded] = expected[discarded]
        if got != expected:
            first = next(i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b)
            raise BlkioError(f"read back by queue {other}: byte {first} is {got[first]:#x}, not {expected[first]:#x}")
    return counts


def _pieces(size: int, alignment: int) -> list[tuple[int, int]]:
    """Cut [0, size) into (offset, length) of growing lengths: one sector, two, three, five, ..."""
    found, offset, length, following = [], 0, alignment, 2 * alignment
    while offset < size:
        found.append((offset, min(length, size - offset)))
        offset += length
        length, following = following, length + following
    return found


class Load:
    """Random verified reads, writes and writes of zeroes, several in flight on each queue."""

    def __init__(self, client: Client, journal: Journal, depth: int, seed: int):
        self._client, self._journal = client, journal
        self._random = random.Random(seed)
        self._busy: set[int] = set()
        self._slots = list(range(1, depth * len(client.queues) + 1))
        self._flying: dict[int, tuple[str, range]] = {}
        self.counts = {"read": 0, "write": 0, "zeroes": 0, "flush": 0}
        self.problems: list[str] = []
        self._end_s = 0.0

    def stop(self) -> None:
        """Have `run` come to its end now."""
        self._end_s = 0.0

    def run(self, seconds: float) -> None:
        """Keep all slots busy for `seconds`, then wait for what is in flight."""
        self._end_s = time.monotonic() + seconds
        started = False
        while not self.problems:
            if time.monotonic() < self._end_s:
                while self._slots:
                    self._submit(self._slots.pop())
            elif not self._flying:
                return
            for tag, result in self._client.wait(WAIT_S):
                self._complete(tag, result)
            if not started:
                started = True
                print("started", flush=True)

    def _submit(self, tag: int) -> None:
        queue = self._client.queues[tag % len(self._client.queues)]
        at = (tag - 1) * REQUEST_BLOCKS_MAX * BLOCK_BYTES
        kind = self._random.choices(("read", "write", "zeroes", "flush"), (8, 8, 2, 1))[0]
        blocks = self._choose()
        self._flying[tag] = kind, blocks
        self._busy.update(blocks)
        offset, length = blocks.start * BLOCK_BYTES, len(blocks) * BLOCK_BYTES
        if kind == "flush":
            queue.flush(tag)
        elif kind == "read":
            queue.read(offset, at, length, tag)
        elif kind == "zeroes":
            for block in blocks:
                self._journal.submit(block, zeroes=True)
            queue.write_zeroes(offset, length, tag)
        else:
            for place, block in enumerate(blocks):
                data = block_bytes(block, self._journal.submit(block), self._journal.seed)
                self._client.memory[at + place * BLOCK_BYTES : at + (place + 1) * BLOCK_BYTES] = data
            queue.write(offset, at, length, tag)

    def _choose(self) -> range:
        """Return a few neighbouring blocks that no request in flight touches."""
        while True:
            start = self._random.randrange(self._journal.blocks)
            stop = min(start + self._random.choice((1, 1, 2, REQUEST_BLOCKS_MAX)), self._journal.blocks)
            if self._busy.isdisjoint(range(start, stop)):
                return range(start, stop)

    def _complete(self, tag: int, result: int) -> None:
        kind, blocks = self._flying.pop(tag)
        self._busy.difference_update(blocks)
        self._slots.append(tag)
        self.counts[kind] += 1
        if result:
            self.problems.append(f"{kind} of blocks {blocks.start} to {blocks.stop - 1}: result {result}")
        elif kind == "read":
            at = (tag - 1) * REQUEST_BLOCKS_MAX * BLOCK_BYTES
            for place, block in enumerate(blocks):
                data = self._client.memory[at + place * BLOCK_BYTES : at + (place + 1) * BLOCK_BYTES]
                problem = self._journal.problem(block, data)
                if problem:
                    self.problems.append(problem)
        elif kind in ("write", "zeroes"):
            for block in blocks:
                self._journal.complete(block)


def verify(client: Client, journal: Journal) -> dict[str, object]:
    """Read the whole area and compare it with the journal. Raises BlkioError on the first difference."""
    written = 0
    for start in range(0, journal.blocks, REQUEST_BLOCKS_MAX):
        blocks = range(start, min(start + REQUEST_BLOCKS_MAX, journal.blocks))
        queue = start // REQUEST_BLOCKS_MAX % len(client.queues)
        offset, length = start * BLOCK_BYTES, len(blocks) * BLOCK_BYTES
        result = run_one(client, queue, lambda q, o=offset, n=length: q.read(o, 0, n, 1), WAIT_S)
        if result:
            raise BlkioError(f"read of {length} bytes at {offset}: {result}")
        for place, block in enumerate(blocks):
            data = client.memory[place * BLOCK_BYTES : (place + 1) * BLOCK_BYTES]
            problem = journal.problem(block, data)
            if problem:
                raise BlkioError(problem)
            submitted, completed = journal.get(block)
            written += completed != ANYTHING
            if submitted != completed:
                journal.settle(block, data)
    return {"blocks": journal.blocks, "written": written}


def run(words: argparse.Namespace) -> dict[str, object]:
    """Do what the command line says; returns what is printed."""
    memory = max(words.depth * words.queues * REQUEST_BLOCKS_MAX, words.blocks, REQUEST_BLOCKS_MAX) * BLOCK_BYTES
    with Client(words.node, queues=words.queues, queue_size=words.queue_size, memory_bytes=memory) as client:
        found = {
            "capacity_bytes": client.capacity_bytes,
            "max_queues": client.max_queues,
            "request_alignment": client.request_alignment,
        }
        if words.action == "check":
            return found | check(client, words.blocks)
        if words.action == "info":
            return found
        with Journal(words.journal, words.blocks) as journal:
            if words.action == "verify":
                return found | verify(client, journal)
            load = Load(client, journal, words.depth, words.seed)
            signal.signal(signal.SIGTERM, lambda *_: load.stop())
            load.run(words.seconds)
            if load.problems:
                raise BlkioError(load.problems[0])
            return found | load.counts


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("node")
    parser.add_argument("action", choices=("info", "check", "load", "verify"))
    parser.add_argument("--queues", type=int, default=1)
    parser.add_argument("--queue-size", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=256, help="of 4096 bytes, the area from the device's start")
    parser.add_argument("--depth", type=int, default=8, help="requests in flight on each queue")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=1, help="of the order of requests")
    parser.add_argument("--journal", type=Path)
    words = parser.parse_args()
    if words.action in ("load", "verify") and words.journal is None:
        parser.error(f"{words.action} needs --journal")
    try:
        print(json.dumps(run(words)), flush=True)
    except BlkioError as error:
        print(f"blkio_client: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
