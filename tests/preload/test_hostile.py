"""A program that writes where it should not, or sends anything: the server and all other programs continue."""

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

import pytest
from disk_rig import built, ended, load, regions, served, wait_until
from test_death import ask, attach_only, message, new_user

from vdusefast.driver._board import MAGIC
from vdusefast.driver.attach_server import AttachServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1")
FUZZ_ROUNDS = 150


@pytest.mark.parametrize("side", ["server", "client"])
@pytest.mark.parametrize("flags", [(), SANITIZERS], ids=["plain", "sanitized"])
def test_nothing_that_is_written_into_the_board_leads_outside_of_it(side: str, flags: tuple[str, ...]) -> None:
    command = [built(*flags, program="board_fuzz"), side, str(random.getrandbits(31)), str(FUZZ_ROUNDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, f"{command}: {done.returncode}: {done.stderr[-2000:]}"


@contextmanager
def board_of(server: AttachServer) -> Iterator[tuple[socket.socket, int]]:
    """Attach, and yield the connection and the board's descriptor, as a program has them."""
    sock = attach_only(server)
    socket.send_fds(sock, [message(1, a=MAGIC)], [])
    _packet, fds, _flags, _peer = socket.recv_fds(sock, 64, 4)
    try:
        yield sock, fds[0]
    finally:
        os.close(fds[0])
        sock.close()


def test_no_program_can_cut_the_board_off() -> None:
    with served() as (_device, server), board_of(server) as (_sock, fd):
        for size in (0, 4096, 1 << 40):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        ended(load(server, seconds=0.1))


@pytest.mark.parametrize("solo", [False, True])
def test_a_lock_of_nobody_is_taken_back(solo: bool) -> None:
    """As if a program had written over it: nobody would ever release it."""
    with served(queues=2) as (_device, server):
        board = server._board
        while board.lock(1):
            time.sleep(0.0001)
        board.hold(1, 1000, solo=solo)
        wait_until(lambda: server.figures()["resets"] == 1, "the server takes it")
        ended(load(server, processes=2, seconds=0.1))
        assert server.failure is None


def test_a_board_that_was_written_over_ends_the_disk_and_not_the_server() -> None:
    with served(queues=2) as (_device, server), board_of(server) as (sock, fd):
        new_user(sock)
        with mmap.mmap(fd, server._board.size_bytes) as board:
            chance = random.Random(5)
            first, last = 256, 1 << 18  # users, marks, the first queue with its slots and ring
            for _ in range(2000):
                struct.pack_into("=I", board, chance.randrange(first, last, 4), chance.getrandbits(32))
        sock.close()
        other = attach_only(server)
        assert ask(other, message(1, a=MAGIC))[1] == 0
        other.close()
        wait_until(lambda: not server._clients, "both have ended")
        assert server._thread.is_alive()


def anything(chance: random.Random, sock: socket.socket) -> None:
    """Send a message that may be good or bad in each of its parts."""
    op = chance.choice([1, 2, 3, 4, 5, 6, chance.getrandbits(32)])
    numbers = [0, 1, 2, MAGIC, 4096, 1 << 32, (1 << 64) - 1, chance.getrandbits(64)]
    packet = message(op, arg=chance.choice(numbers) & 0xFFFFFFFF, a=chance.choice(numbers), b=chance.choice(numbers))
    if chance.random() < 0.1:
        packet = packet[: chance.randrange(len(packet))] or b"x"
    fds = []
    for _ in range(chance.choice([0, 0, 1, 1, 1, 2, 8])):
        if chance.random() < 0.5:
            fds.append(os.memfd_create("some"))
            os.ftruncate(fds[-1], chance.choice([0, 4096, 8192, 1 << 20]))
        else:
            fds.append(os.open(chance.choice(["/dev/null", "/", "/proc/self/status"]), os.O_RDONLY))
    try:
        socket.send_fds(sock, [packet], fds)
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize("seed", range(4))
def test_messages_of_any_kind_end_nobody_else(seed: int) -> None:
    chance = random.Random(seed)
    with served(queues=2) as (device, server):
        running = load(server, processes=2, seconds=3)
        deadline_s = time.monotonic() + 3
        while time.monotonic() < deadline_s:
            try:
                sock = attach_only(server)
            except BlockingIOError:
                continue  # more connections wait than its queue holds
            sock.setblocking(False)
            for _ in range(chance.randrange(1, 30)):
                try:
                    anything(chance, sock)
                    if chance.random() < 0.5:  # else the answers fill its buffer
                        _packet, fds, _flags, _peer = socket.recv_fds(sock, 64, 4)
                        for fd in fds:
                            os.close(fd)
                except BlockingIOError:
                    continue
                except (BrokenPipeError, ConnectionResetError):
                    break
            sock.close()
        assert ended(running) > 0
        wait_until(lambda: not server.users and regions(device) == 1, "nothing is left")
        assert server.failure is None
