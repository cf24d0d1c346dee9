"""The NBD engine under the sanitizers, against a server that does every so often what no server should."""

from __future__ import annotations

import os
import random
import re
import socket
import subprocess
from pathlib import Path

import pytest
from nbd_misdeeds import MISDEEDS, StaleCookies, half_of_the_data
from nbd_rig import ALL_FLAGS, FLAG_FUA, FLAG_ZERO, READ, Behaviour, FakeServer, Request

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SIZE = 4 << 20
SECONDS = 2
RARITY = 60  # one misdeed in so many requests


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nbd") / "nbd_engine"
    flags = ["-std=gnu11", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wall", "-Wextra"]
    sources = [HERE / "nbd_engine.c", *sorted((ROOT / "csrc" / "nbd").glob("*.c"))]
    command = [
        os.environ.get("FUZZ_CC", "clang"),
        *flags,
        "-Werror",
        f"-I{ROOT / 'csrc'}",
        "-o",
        path,
        *sources,
        "-lnbd",
    ]
    compiled = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert compiled.returncode == 0, compiled.stderr
    return path


@pytest.mark.parametrize(
    ("flags", "blocks"),
    [(ALL_FLAGS, None), (ALL_FLAGS & ~FLAG_FUA & ~FLAG_ZERO, (512, 4096, 4096))],
    ids=["able", "poor"],
)
def test_every_misdeed_costs_a_connection_and_no_request(
    tmp_path: Path, binary: Path, flags: int, blocks: tuple[int, int, int] | None
) -> None:
    chance = random.Random(11)
    done: set[str] = set()

    def behave(connection: socket.socket, request: Request) -> bool:
        if chance.randrange(RARITY):
            return False
        deed = chance.choice(MISDEEDS)
        if deed is half_of_the_data and request.kind != READ:
            return False
        done.add(deed.__name__)
        deed(connection, request)
        return True

    with FakeServer(tmp_path / "s", Behaviour(size=SIZE, flags=flags, blocks=blocks, on_request=behave)) as server:
        ended = subprocess.run([binary, server.uri, str(SECONDS), "5"], capture_output=True, text=True, timeout=40)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-4000:]
    verified = re.search(r"verified (\d+)", ended.stdout)
    assert verified is not None
    assert int(verified[1]) > 50
    assert len(done) > 3


def test_answers_to_requests_of_earlier_connections_reach_no_memory(tmp_path: Path, binary: Path) -> None:
    """Their requests have ended without an answer: their memory is the driver's again."""
    chance, stale = random.Random(13), StaleCookies()

    def behave(connection: socket.socket, request: Request) -> bool:
        if request.kind == READ and not chance.randrange(RARITY):
            stale.keep(connection, request)
            return True
        return stale.answer(connection)

    with FakeServer(tmp_path / "s", Behaviour(size=SIZE, on_request=behave)) as server:
        words = [binary, server.uri, str(SECONDS), "5", "100"]
        ended = subprocess.run(words, capture_output=True, text=True, timeout=40)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-4000:]
    counts = re.search(r"verified (\d+), expired (\d+)", ended.stdout)
    assert counts is not None
    assert int(counts[1]) > 20
    assert int(counts[2]) > 1
    assert stale.answered_count > 1
    assert "replies to a request that was not sent" in ended.stderr
