"""The ring side of a program under the address, leak and undefined-behaviour sanitizers."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
from disk_rig import built, ended, load, served

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1")

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "direct": ({}, {"threads": 2}),
    "copied pieces": ({}, {"memory": "copied", "block": 1 << 20, "blocks": 4}),
    "cross": ({"queues": 3, "route": "cross"}, {"processes": 2, "threads": 2, "blocks": 600}),
    "packed": ({"packed": True, "in_order": True, "queue_size": 16}, {"processes": 3, "memory": "copied"}),
}


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("case", CASES)
def test_the_ring_side_is_clean_under_the_sanitizers(case: str) -> None:
    device_arguments, load_arguments = CASES[case]
    with served(**device_arguments) as (_device, server):
        assert ended(load(server, binary=built(*FLAGS), **load_arguments)) > 0


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_end_of_the_server_is_clean_under_the_sanitizers() -> None:
    binary = built(*FLAGS)
    with served() as (_device, server):
        running = load(server, binary=binary, threads=3, seconds=20)
        while server.figures()["queues"][0]["published"] < 100:
            assert running.poll() is None
    _out, err = running.communicate(timeout=60)
    assert running.returncode == 2, err
    assert "Sanitizer" not in err
    assert "runtime error" not in err


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("what", ["lock", "rings", "solo"])
@pytest.mark.parametrize("flags", [(), FLAGS], ids=["plain", "sanitized"])
def test_a_client_and_the_server_use_a_queue_at_once(what: str, flags: tuple[str, ...]) -> None:
    """Have the server own each queue that it takes, and never show a ring without pointers, in millions of tries."""
    done = subprocess.run(
        [built(*flags, program="board_race"), what, "1"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}{done.stderr[-2000:]}"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_lock_of_a_queue_is_clean_under_the_thread_sanitizer() -> None:
    """Rings and solo work are no use to it: it knows neither fences nor membarrier()."""
    binary = built("-fsanitize=thread", "-O1", "-Wno-tsan", program="board_race")
    done = subprocess.run([binary, "lock", "1"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}{done.stderr[-2000:]}"
