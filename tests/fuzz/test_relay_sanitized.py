"""The relay under the sanitizers: workers that do what none should, beside one that checks what it reads and writes."""

from __future__ import annotations

import mmap
import os
import random
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vdusefast.control.relay_control import CHUNK_BYTES, _close_sockets, _make_memory, _make_sockets

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MAGIC = 0x564C5246
SLOTS = 4
STORE_BYTES = 1 << 20
READ, WRITE, FLUSH, DISCARD, ZEROES = range(5)
SECONDS = 1.5
WAIT_S = 20.0
_REQUEST = struct.Struct("=QQHBBI")
_ANSWER = struct.Struct("=Ii")


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("relay") / "relay_server"
    flags = ["-std=gnu11", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wall", "-Wextra"]
    sources = [HERE / "relay_server.c", ROOT / "csrc" / "relay" / "server.c"]
    command = [os.environ.get("FUZZ_CC", "clang"), *flags, "-Werror", f"-I{ROOT / 'csrc'}", "-o", path, *sources]
    compiled = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert compiled.returncode == 0, compiled.stderr
    return path


class Worker:
    """A worker's side of one queue."""

    def __init__(self, queue: int, address_fd: int, memory_fd: int):
        self.queue = queue
        self.memory = mmap.mmap(memory_fd, SLOTS * CHUNK_BYTES)
        self._address = f"/proc/self/fd/{address_fd}"
        self.sock = socket.socket()
        self.sock.close()

    def close(self) -> None:
        self.sock.close()
        self.memory.close()

    def connect(self) -> None:
        """Connect again, without a hello."""
        self.sock.close()
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(WAIT_S)
        self.sock.connect(self._address)

    def greet(self) -> None:
        """Connect again and be welcome."""
        self.connect()
        self.sock.send(struct.pack("=III", MAGIC, self.queue, SLOTS))
        assert self.sock.recv(100) == struct.pack("=I", MAGIC)

    def ask(self, op: int, offset: int, length: int, slot: int) -> int:
        """Carry one request out. Returns its result."""
        self.sock.send(_REQUEST.pack(offset, length, slot, op, 0, 0))
        got_slot, result = _ANSWER.unpack(self.sock.recv(1024))
        assert got_slot == slot
        return result

    def verify(self, chance: random.Random) -> None:
        """Write to a place of this queue's own, and read it back through another slot."""
        data = chance.randbytes(512 * chance.randint(1, 16))
        offset = self.queue * (STORE_BYTES // 2) + 512 * chance.randrange(512)
        self.memory[: len(data)] = data
        assert self.ask(WRITE, offset, len(data), 0) == 0
        assert self.ask(READ, offset, len(data), 1) == 0
        assert self.memory[CHUNK_BYTES : CHUNK_BYTES + len(data)] == data


@contextmanager
def served(binary: Path, directory: Path) -> Iterator[tuple[Worker, Worker]]:
    """Run a relay of two queues; at its end no sanitizer may have complained."""
    sockets, memories = _make_sockets(directory, 2), [_make_memory(SLOTS * CHUNK_BYTES) for _ in range(2)]
    end_fd = os.eventfd(0)
    places = [(listener.fileno(), memory) for (listener, _), memory in zip(sockets, memories, strict=True)]
    process = subprocess.Popen(
        [binary, str(end_fd), str(SLOTS), *(f"{listen}:{memory}" for listen, memory in places)],
        pass_fds=[end_fd, *(fd for place in places for fd in place)],
        stderr=subprocess.PIPE,
    )
    honest, other = (Worker(queue, sockets[queue][1], memories[queue]) for queue in (0, 1))
    try:
        yield honest, other
    finally:
        os.eventfd_write(end_fd, 1)
        try:
            _, said = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
        for worker in (honest, other):
            worker.close()
        _close_sockets(sockets)
        for fd in (end_fd, *memories):
            os.close(fd)
    assert process.returncode == 0, said[-6000:].decode()


def packet_of(chance: random.Random, slot: int | None = None) -> bytes:
    """Return one request, good or bad in one way or another."""
    values = [
        512 * chance.randrange(STORE_BYTES // 1024) + STORE_BYTES // 2,  # not in the honest worker's half
        512 * chance.randint(1, 8),
        chance.randrange(SLOTS) if slot is None else slot,
        chance.randrange(5),
        chance.randrange(4),
        0,
    ]
    if not chance.randrange(3):
        limits = (1 << 64, 1 << 64, 1 << 16, 256, 256, 1 << 32)
        place = chance.randrange(len(limits))
        edges = (0, 1, 511, SLOTS, CHUNK_BYTES, CHUNK_BYTES + 512, limits[place] - 512, limits[place] - 1)
        values[place] = chance.choice(edges) % limits[place]
    if values[3] in (WRITE, DISCARD, ZEROES) and values[0] < STORE_BYTES // 2:
        values[3] = READ  # an in-range write is no misdeed, but what is checked must stay the same
    return _REQUEST.pack(*values)


def wait_hung_up(sock: socket.socket) -> None:
    try:
        while sock.recv(4096):
            pass
    except ConnectionResetError:
        return


@pytest.mark.slow
def test_full_batch_for_one_slot_is_refused(binary: Path, tmp_path: Path) -> None:
    with served(binary, tmp_path) as (honest, other):
        honest.greet()
        other.greet()
        other.sock.send(_REQUEST.pack(0, 0, 0, FLUSH, 0, 0) * 64)
        wait_hung_up(other.sock)
        honest.verify(random.Random(1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_whatever_one_worker_sends_the_other_is_served(binary: Path, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    verified = sent = 0
    with served(binary, tmp_path) as (honest, other):
        honest.greet()
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            honest.verify(chance)
            verified += 1
            try:
                if other.sock.fileno() < 0 or not chance.randrange(20):
                    other.greet() if chance.randrange(10) else other.connect()
                other.sock.settimeout(0)
                deed = chance.randrange(12)
                if deed == 0:
                    other.sock.send(chance.randbytes(chance.randrange(1, 2000)))
                elif deed == 1:
                    other.sock.shutdown(chance.choice((socket.SHUT_RD, socket.SHUT_WR)))
                elif deed == 2:
                    with open(os.devnull) as null:
                        socket.send_fds(other.sock, [packet_of(chance)], [null.fileno()] * 3)
                elif deed == 3:  # answers are not read
                    for _ in range(500):
                        other.sock.send(packet_of(chance))
                else:
                    other.sock.send(b"".join(packet_of(chance) for _ in range(chance.randrange(1, 64))))
                    other.sock.recv(4096)
                sent += 1
            except BlockingIOError:
                continue
            except (ConnectionError, TimeoutError, AssertionError):
                other.sock.close()
    assert verified > 20
    assert sent > 20


@pytest.mark.slow
def test_worker_that_takes_no_answers_holds_nobody_up(binary: Path, tmp_path: Path) -> None:
    """Its socket is full of answers, and each slot waits for one more: the next request is one too many."""
    chance = random.Random(5)
    with served(binary, tmp_path) as (honest, other):
        honest.greet()
        other.greet()
        other.sock.settimeout(2)
        try:
            for _ in range(20000):
                other.sock.send(b"".join(_REQUEST.pack(0, 0, slot, FLUSH, 0, 0) for slot in range(SLOTS)))
                honest.verify(chance)
                time.sleep(0.004)  # for answers to arrive
            pytest.fail("its slots were in use, and it was served on")
        except ConnectionError:
            pass  # sent away
        honest.verify(chance)


def test_next_worker_waits_for_what_the_last_one_has_asked(binary: Path, tmp_path: Path) -> None:
    """One that comes while a worker is served is heard when that one has gone, the newest of several."""
    with served(binary, tmp_path) as (_, other):
        other.greet()
        first = other.sock.dup()
        passed_over = []
        for _ in range(3):
            other.connect()
            other.sock.send(struct.pack("=III", MAGIC, 1, SLOTS))
            passed_over.append(other.sock.dup())
        other.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            other.sock.recv(100)
        first.send(_REQUEST.pack(0, 512, 0, READ, 0, 0))
        first.close()
        other.sock.settimeout(WAIT_S)
        assert other.sock.recv(100) == struct.pack("=I", MAGIC)
        other.verify(random.Random(3))
        for sock in passed_over:
            sock.close()
