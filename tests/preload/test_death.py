"""Programs are killed at any moment: the others continue with right data, and nothing is left behind."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import struct
import subprocess
import time

import pytest
from disk_rig import built, ended, load, regions, served, wait_until

import vdusefast
from vdusefast.driver._board import MAGIC
from vdusefast.driver.attach_server import AttachServer

pytestmark = pytest.mark.slow

SURVIVOR = {"threads": 2, "depth": 8, "first": 0, "seconds": 1.5, "blocks": 64}
VICTIM = {"threads": 2, "depth": 8, "first": 2, "seconds": 60, "blocks": 64}


def kill_one(server: AttachServer, wait_s: float, memory: str) -> None:
    """Start a load and kill it after a while."""
    victim = load(server, memory=memory, **VICTIM)
    published = server.figures()["queues"][0]["published"]
    wait_until(lambda: server.figures()["queues"][0]["published"] > published + 100, "the victim works")
    time.sleep(wait_s)
    victim.kill()
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL


def kill_rounds(rounds: int, **words: object) -> int:
    """Kill so many programs beside one that checks its data. Return how often the device was reset."""
    chance = random.Random(7)
    with served(**words) as (device, server):  # type: ignore[arg-type]
        survivor = load(server, **SURVIVOR)
        for i in range(rounds):
            kill_one(server, chance.random() / 50, ("direct", "copied")[i % 2])
            if survivor.poll() is not None:
                ended(survivor)
                survivor = load(server, **SURVIVOR)
        ended(survivor)
        wait_until(lambda: not server.users, "no user is left")
        wait_until(lambda: regions(device) == 1, "the board is the only region")
        assert server.failure is None
        return server.figures()["resets"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "words",
    [
        {},
        {"queues": 2, "packed": True},
        {"queues": 3, "route": "cross", "spin_us": 0},
        {"packed": True, "in_order": True},
    ],
    ids=["split", "packed", "cross", "in order"],
)
def test_others_continue_when_a_program_is_killed(words: dict[str, object]) -> None:
    kill_rounds(10, **words)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("words", [{}, {"queues": 2, "packed": True}, {"queues": 3, "route": "cross"}])
def test_a_hundred_programs_are_killed(words: dict[str, object]) -> None:
    assert kill_rounds(100, **words) > 0


@pytest.mark.timeout(120)
@pytest.mark.parametrize("solo", [False, True], ids=["with a lock", "solo"])
def test_a_program_that_died_at_work_on_a_queue_costs_a_reset_and_no_data(solo: bool) -> None:
    """Have a user's number in a queue when its process dies, as if it had been in the middle of something."""
    with served(queues=2) as (device, server):
        survivor = load(server, processes=2, **SURVIVOR)
        wait_until(lambda: all(queue["published"] > 100 for queue in server.figures()["queues"]), "the load runs")
        victim = attach_only(server)
        number = new_user(victim)
        board = server._board
        for queue in range(2):
            while board.lock(queue):
                time.sleep(0.0001)
            board.hold(queue, number, solo=solo)
        victim.close()
        ended(survivor)
        assert server.figures()["resets"] == 1
        assert server.figures()["replayed"] > 0
        wait_until(lambda: not server.users, "no user is left")
        assert device.state.name == "SERVING" or server.failure is None


def attach_only(server: AttachServer) -> socket.socket:
    """Return a connection that has said hello."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(20)
    try:
        sock.connect(str(server.path))
    except OSError:
        sock.close()
        raise
    return sock


def message(op: int, *, arg: int = 0, a: int = 0, b: int = 0) -> bytes:
    """Return a message of the attach socket."""
    return struct.pack("=IiIIQQ", op, 0, arg, 0, a, b)


def ask(sock: socket.socket, packet: bytes, fds: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Send a message and return the answer; () when we were cut off."""
    socket.send_fds(sock, [packet], fds)
    try:
        packet, got, _flags, _peer = socket.recv_fds(sock, 64, 4)
    except ConnectionResetError:
        return ()
    for fd in got:
        os.close(fd)
    return struct.unpack("=IiIIQQ", packet) if packet else ()


def new_user(sock: socket.socket) -> int:
    """Return the number of a new user."""
    answer = ask(sock, message(3))
    assert answer[1] == 0
    return answer[2]


HOSTILE = {
    "short": lambda sock: sock.send(b"x"),
    "long": lambda sock: sock.send(b"x" * 4096),
    "unknown": lambda sock: sock.send(message(99)),
    "no such queue": lambda sock: sock.send(message(2, arg=7)),
    "no such user": lambda sock: sock.send(message(4, arg=1)),
    "no such region": lambda sock: sock.send(message(6, a=1 << 32)),
    "the board as a region": lambda sock: sock.send(message(6, a=0x2000_0000_0000)),
    "a region without memory": lambda sock: sock.send(message(5, a=4096)),
    "a descriptor with no region": lambda sock: socket.send_fds(sock, [message(1, a=MAGIC)], [0]),
    "many descriptors": lambda sock: socket.send_fds(sock, [message(5, a=4096)], [0, 0, 0, 0]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_process_that_breaks_the_protocol_is_cut_off(name: str) -> None:
    with served() as (_device, server):
        sock = attach_only(server)
        other = attach_only(server)
        HOSTILE[name](sock)
        assert sock.recv(64) == b""
        sock.close()
        assert new_user(other) > 0
        other.close()
        ended(load(server, seconds=0.1))


@pytest.mark.parametrize(
    ("size", "offset"), [(0, 0), (1 << 20, 0), (4096, 1 << 62), (1 << 63, 0), (1 << 41, 0), (4096, 1)]
)
def test_a_region_that_its_memory_has_not_is_refused(size: int, offset: int) -> None:
    with served() as (device, server):
        sock = attach_only(server)
        fd = os.memfd_create("small")
        os.ftruncate(fd, 8192)
        answer = ask(sock, message(5, a=size, b=offset), (fd,))
        os.close(fd)
        assert answer[1] != 0
        assert regions(device) == 1
        sock.close()


def test_too_many_users_are_refused() -> None:
    with served() as (_device, server):
        sock = attach_only(server)
        answers = [ask(sock, message(3)) for _ in range(1024)]
        assert [answer[1] for answer in answers].count(0) == 1023
        sock.close()
        wait_until(lambda: not server.users, "they end with their process")
        ended(load(server, seconds=0.1))


def lost(sock: socket.socket) -> bool:
    """Return whether the server has ended the connection."""
    poll = select.poll()  # takes any number
    poll.register(sock, select.POLLIN)
    if not poll.poll(0):
        return False
    try:
        return sock.recv(1, socket.MSG_PEEK) == b""
    except ConnectionResetError:
        return True


def add_region(sock: socket.socket) -> None:
    """Have the device reach a memfd."""
    fd = os.memfd_create("region")
    os.ftruncate(fd, 8192)
    answer = ask(sock, message(5, a=8192), (fd,))
    os.close(fd)
    assert answer[1] == 0


@pytest.mark.parametrize("end", ["close", "failure"])
def test_the_device_is_reset_before_programs_lose_the_disk(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that gets EIO uses its buffers again: the device must not."""
    with served() as (_device, server):
        sock = attach_only(server)
        new_user(sock)
        reset, seen = server.bus.reset, []

        def noted() -> None:
            if not seen:  # a second one follows, at the server's end
                seen.append(lost(sock))
            reset()

        monkeypatch.setattr(server.bus, "reset", noted)
        server.close() if end == "close" else server._fail(RuntimeError("a test"))
        assert seen == [False]
        assert lost(sock)
        sock.close()


def test_no_region_is_left_when_the_server_closes_before_its_programs() -> None:
    with served() as (device, server):
        socks = [attach_only(server) for _ in range(2)]
        for sock in socks:
            add_region(sock)
        assert regions(device) == 3
        server.close()
        assert regions(device) == 0
        for sock in socks:
            sock.close()


def test_a_program_with_users_that_breaks_the_protocol_keeps_its_requests() -> None:
    """Its device may be using its buffers: it must not take the end of the connection for the end of the disk."""
    with served() as (_device, server):
        sock = attach_only(server)
        new_user(sock)
        sock.send(message(99))
        wait_until(lambda: any(client.deaf for client in list(server._clients.values())), "it is cut off")
        assert not lost(sock)
        assert server.users
        sock.close()
        wait_until(lambda: not server.users, "its users end with it")


def test_the_device_is_kicked_for_a_process_that_may_have_died_before_its_kick() -> None:
    with served(queues=2) as (device, server):
        sock = attach_only(server)
        new_user(sock)
        before = [queue.kicks for queue in device.stats().queues]
        sock.close()
        wait_until(
            lambda: all(queue.kicks > old for queue, old in zip(device.stats().queues, before, strict=True)),
            "each queue is kicked",
        )


def test_an_event_of_a_number_that_is_another_process_now_ends_nobody() -> None:
    with served() as (_device, server):
        sock = attach_only(server)
        new_user(sock)
        (client,) = set(server._clients.values())
        server._serve_client(client.pidfd)
        assert not lost(sock)
        sock.close()


def test_another_layout_of_the_board_is_refused() -> None:
    with served() as (_device, server):
        sock = attach_only(server)
        assert ask(sock, message(1, a=MAGIC + 1))[1] != 0
        sock.close()


@pytest.mark.timeout(60)
def test_a_stopped_device_fails_its_programs() -> None:
    config = vdusefast.make_config(name="stopped", uri="memory:64M", transport="loopback")
    device = vdusefast.Device(config)
    device.start()
    with AttachServer(device.bus) as server:
        running = load(server, seconds=30)
        wait_until(lambda: server.figures()["queues"][0]["published"] > 1000, "the load runs")
        device.stop()
        _out, err = running.communicate(timeout=30)
        assert running.returncode == 2, err
        assert server.failure is not None


@pytest.mark.timeout(60)
def test_a_program_says_why_it_cannot_attach() -> None:
    with served() as (_device, server):
        environment = {**os.environ, **server.environment}
    command = [str(built()), "1", "1", "1", "4096", "8", "1", "copied", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 3
    assert "cannot attach to this disk: No such file or directory" in done.stderr
