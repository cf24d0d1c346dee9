"""The attach server at the limit of descriptors: programs wait, or are copied, and none is cut off."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from disk_rig import served, wait_until
from test_death import ask, attach_only, lost, message, new_user

from vdusefast.driver import attach_client
from vdusefast.driver.attach_server import AttachServer

pytestmark = pytest.mark.slow


@contextmanager
def no_descriptors() -> Iterator[list[int]]:
    """Use up all descriptors of this process below its limit, which cannot be raised. Yields them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, hard))
    taken: list[int] = []
    try:
        while True:
            try:
                taken.append(os.dup(0))
            except OSError:
                break
        yield taken
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(autouse=True)
def _limit_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vdusefast.driver.attach_server.make_room", lambda _fd: None)


def clients(server: AttachServer) -> int:
    return len(server._clients)


def test_the_server_sleeps_while_a_program_waits_for_a_descriptor() -> None:
    with served() as (_device, server):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(20)
        with no_descriptors():
            sock.connect(str(server.path))
            wait_until(lambda: server._accept_again_s, "the server notices")
            before_s = time.process_time()
            time.sleep(1.5)
            assert time.process_time() - before_s < 0.5
            assert clients(server) == 0
        assert new_user(sock) > 0  # as soon as there are descriptors
        sock.close()
        wait_until(lambda: clients(server) == 0, "it ends")


def test_a_program_that_ends_makes_room_for_one_that_waits() -> None:
    with served() as (_device, server):
        first = attach_only(server)
        new_user(first)
        second = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        second.settimeout(20)
        with no_descriptors():
            second.connect(str(server.path))
            wait_until(lambda: server._accept_again_s, "the server notices")
            first.close()
            assert new_user(second) > 0
        second.close()


def test_memory_is_copied_when_there_is_no_descriptor_for_it() -> None:
    with served() as (_device, server):
        sock = attach_only(server)
        new_user(sock)
        fd = os.memfd_create("region")
        os.ftruncate(fd, 8192)
        with no_descriptors():
            answer = ask(sock, message(attach_client.ADD_REGION, a=8192), (fd,))
        os.close(fd)
        assert os.strerror(answer[1]) == "Cannot allocate memory"
        assert not lost(sock)
        assert new_user(sock) > 0
        sock.close()


def test_descriptors_above_1023_are_no_reason_to_be_cut_off() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1200:
        pytest.skip(f"descriptors are limited to {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    taken = []
    try:
        with served() as (_device, server):
            taken = [os.dup(0) for _ in range(1100)]
            sock = attach_only(server)
            new_user(sock)
            (client,) = server._clients.values()
            assert client.pidfd > 1023
            assert not client.has_ended()
            server._serve_client(client.pidfd)
            assert not lost(sock)
            sock.close()
            wait_until(lambda: not server.users, "it ends")
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_limit_is_raised_when_it_is_near_and_not_before() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1024:
        pytest.skip(f"descriptors are limited to {hard}")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        attach_client.make_room(100)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (512, hard)
        attach_client.make_room(500)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1024, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        attach_client.make_room(hard - 1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
