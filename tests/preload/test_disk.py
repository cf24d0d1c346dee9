"""Programs are the driver of a device together: rings, users, sharing and memory, with every ring format."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path
from typing import Any

import pytest
from disk_rig import built, ended, load, regions, served, wait_until

pytestmark = pytest.mark.slow

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one user": ({}, {}),
    "depth 1": ({}, {"depth": 1}),
    "copied": ({}, {"memory": "copied"}),
    "cut into pieces": ({}, {"memory": "copied", "block": 1 << 20, "blocks": 4}),
    "segments of direct memory": ({}, {"block": 1 << 20, "blocks": 4}),
    "threads share a queue": ({}, {"threads": 4}),
    "processes share a queue": ({}, {"processes": 4}),
    "16 users on 2 queues": ({"queues": 2}, {"processes": 8, "threads": 2, "depth": 16}),
    "16 users on 2 queues, copied": ({"queues": 2}, {"processes": 8, "threads": 2, "memory": "copied"}),
    "cross": ({"queues": 4, "route": "cross"}, {"processes": 2, "threads": 2, "depth": 16, "blocks": 1000}),
    "cross, depth 1": ({"queues": 4, "route": "cross"}, {"depth": 1, "blocks": 1000, "memory": "copied"}),
    "packed": ({"queues": 2, "packed": True}, {"processes": 4}),
    "packed, in order": ({"queues": 2, "packed": True, "in_order": True}, {"processes": 4}),
    "in order": ({"queues": 2, "in_order": True}, {"processes": 4}),
    "plain rings": ({"event_idx": False, "indirect": False}, {"processes": 2, "memory": "copied"}),
    "more users than slots": (
        {"queue_size": 8},
        {"processes": 3, "threads": 3, "depth": 16, "block": 65536, "blocks": 8},
    ),
    "without spinning": ({"spin_us": 0}, {"processes": 3}),
    "4 KiB blocks": ({"block_size_bytes": 4096}, {"memory": "copied", "block": 8192}),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", CASES)
def test_data_is_right(case: str) -> None:
    device_words, load_words = CASES[case]
    with served(**device_words) as (device, server):
        count = ended(load(server, **load_words))
        assert count > 0
        assert sum(queue.requests for queue in device.stats().queues) >= count
        assert server.figures()["resets"] == 0


@pytest.mark.timeout(120)
def test_nothing_is_left_of_processes_that_have_ended() -> None:
    with served(queues=2) as (device, server):
        for _ in range(3):
            ended(load(server, processes=3, threads=2, seconds=0.1))
        wait_until(lambda: regions(device) == 1, "the board is the only region")
        wait_until(lambda: not server.users, "no user is left")


@pytest.mark.timeout(120)
def test_a_disk_that_ends_fails_what_is_in_flight() -> None:
    with served() as (_device, server):
        running = load(server, processes=2, threads=2, seconds=30)
        wait_until(lambda: server.figures()["queues"][0]["published"] > 1000, "the load runs")
    _out, err = running.communicate(timeout=30)
    assert running.returncode == 2
    assert "the server of this disk has ended; all requests fail with EIO" in err


@pytest.mark.timeout(120)
@pytest.mark.parametrize("route", ["own", "cross"])
@pytest.mark.parametrize("words", [(), ("clone",)], ids=["fork", "clone"])
def test_a_child_attaches_by_itself(route: str, words: tuple[str, ...]) -> None:
    with served(queues=2, route=route) as (_device, server):
        environment = {**os.environ, **server.environment}
        assert subprocess.run([built(program="disk_fork"), *words], env=environment, timeout=60).returncode == 0
        wait_until(lambda: not server.users, "no user is left")


@pytest.mark.timeout(60)
def test_programs_see_a_resize(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    with served(uri=f"file:{path}") as (device, server):
        device.resize(2 << 20)
        wait_until(lambda: server.capacity_bytes == 2 << 20, "the board has the new size")
        ended(load(server, seconds=0.1, blocks=512))


@pytest.mark.timeout(120)
def test_a_signal_handler_waits_for_no_lock_of_its_own_thread() -> None:
    with served() as (_device, server):
        environment = {**os.environ, **server.environment}
        assert subprocess.run([built(program="disk_signal")], env=environment, timeout=90).returncode == 0


@pytest.mark.timeout(170)
def test_more_than_500_programs_attach_at_once() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip(f"descriptors are limited to {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))  # as most machines have it
    try:
        with served(spin_us=0) as (_device, server):
            running = load(server, processes=520, depth=1, memory="copied", blocks=4, seconds=20)
            wait_until(lambda: len(server._clients) >= 520 or running.poll() is not None, "all attach", 90)
            assert len(server._clients) >= 520
            assert ended(running, 120) >= 520
            wait_until(lambda: not server.users and not server._clients, "nothing is left of them", 60)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
