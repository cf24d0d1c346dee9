"""`faulty:`: each rule applies to its own requests and to no others, with every engine below it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import vdusefast
from vdusefast.driver.loopback_driver import LoopbackDriver

MIB = 1 << 20
SIZE = 8 * MIB
BLOCK = 4096


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


@contextmanager
def served(rules: str, inner: str, **options: object) -> Iterator[LoopbackDriver]:
    config = vdusefast.make_config(name="faulty", uri=f"faulty:{rules}:{inner}", **options)
    with vdusefast.Device(config) as device, device.driver() as driver:
        assert all(queue.engine.endswith("with faults") for queue in device.queues())
        yield driver


def outcomes(driver: LoopbackDriver, count: int, *, write: bool = False) -> str:
    """Do so many requests of a block each, one after the other: "." for each that went well, "E" for the others."""
    said = ""
    for place in range(count):
        try:
            if write:
                driver.write(place * BLOCK, bytes([place + 1]) * BLOCK)
            else:
                driver.read(place * BLOCK, BLOCK)
            said += "."
        except OSError:
            said += "E"
    return said


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ("op=read,error=EIO", "EEEEEEEE"),
        ("op=write,error=EIO", "........"),
        ("op=read,error=EIO,every=3", "E..E..E."),
        ("op=read,error=EIO,skip=2,every=3", "..E..E.."),
        ("op=read,error=EIO,skip=1,count=2", ".EE....."),
        ("error=EIO,range=8K-16K", "..EE...."),
        ("op=read,error=EIO,count=1+op=read,error=EIO,skip=1,count=1", "E.E....."),
        ("op=flush/write,error=ENOSPC", "........"),
    ],
)
def test_rule_meets_the_requests_that_it_is_for(image: Path, rules: str, expected: str) -> None:
    with served(rules, f"file:{image}") as driver:
        assert outcomes(driver, 8) == expected


@pytest.mark.parametrize("engine", ["sync", "uring"])
def test_failed_write_does_not_reach_the_store_and_others_do(image: Path, engine: str) -> None:
    with served("op=write,error=EIO,every=2", f"file:{image}", engine=engine) as driver:
        assert outcomes(driver, 6, write=True) == "E.E.E."
        driver.flush()
    data = image.read_bytes()
    for place in range(6):
        expected = bytes([place + 1]) * BLOCK if place % 2 else bytes(BLOCK)
        assert data[place * BLOCK : (place + 1) * BLOCK] == expected


def test_rules_are_for_a_modules_engine_as_well(tmp_path: Path) -> None:
    disk = Path(__file__).parents[2] / "examples" / "disks" / "ram_disk.py"
    rules = "op=write,error=EIO,every=2+op=read,delay=20ms"
    with served(rules, f"python:{disk}:RamDisk?size=8M&path={tmp_path}/memory") as driver:
        assert outcomes(driver, 4, write=True) == "E.E."
        began = time.monotonic()
        assert driver.read(BLOCK, BLOCK) == b"\2" * BLOCK
        assert time.monotonic() - began >= 0.02


@pytest.mark.slow
def test_chance_is_repeated_by_its_seed() -> None:
    said = []
    for seed in (7, 7, 8):
        with served(f"op=read,error=EIO,chance=25%,seed={seed}", "memory:8M") as driver:
            said.append(outcomes(driver, 400))
    assert said[0] == said[1] != said[2]
    assert all(60 < text.count("E") < 140 for text in said)


def test_delay_keeps_a_request_and_not_those_beside_it(image: Path) -> None:
    with served("op=read,range=0-4K,delay=300ms", f"file:{image}") as driver:
        began = time.monotonic()
        assert outcomes(driver, 1) == "."
        assert time.monotonic() - began >= 0.3
        began = time.monotonic()
        for _ in range(50):
            driver.read(BLOCK, BLOCK)
        assert time.monotonic() - began < 50 * 0.3 / 2


def test_file_turns_a_rule_on_and_off(image: Path, tmp_path: Path) -> None:
    switch = tmp_path / "broken"
    with served(f"error=EIO,file={switch}", f"file:{image}") as driver:
        assert outcomes(driver, 2) == ".."
        switch.touch()
        assert outcomes(driver, 2) == "EE"
        switch.unlink()
        assert outcomes(driver, 2) == ".."


def test_errors_are_counted_by_their_errno(image: Path) -> None:
    config = vdusefast.make_config(name="count", uri=f"faulty:op=write,error=ENOSPC,count=3:file:{image}")
    with vdusefast.Device(config) as device, device.driver() as driver:
        assert outcomes(driver, 5, write=True) == "EEE.."
        counters = device.stats().counters
    assert (counters["host_errors"], counters["host_enospc"]) == (3, 3)


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["file", "memory:8M"])
@pytest.mark.parametrize("options", [["--engine=auto"], ["--engine=uring"], ["--queues=2"]])
def test_what_is_delayed_keeps_its_data(image: Path, inner: str, options: list[str]) -> None:
    if inner != "file" and options == ["--engine=uring"]:
        return
    uri = f"faulty:delay=2ms,chance=5%:{f'file:{image}' if inner == 'file' else inner}"
    words = ["--name=v", "--rw=randrw", "--verify=crc32c", "--bs=4k", "--iodepth=32", "--size=8M", "--runtime=1s"]
    command = [sys.executable, "-m", "vdusefast.bench", "raw", *words, "--output-format=json", f"--backend={uri}"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=50, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    job = json.loads(done.stdout)["jobs"][0]
    assert job["error"] == 0
    assert job["write"]["total_ios"] > 100


def test_delayed_requests_end_before_a_device_does(image: Path) -> None:
    with served("op=write,delay=200ms", f"file:{image}") as driver:
        driver.write(0, b"x" * BLOCK)
    assert image.read_bytes()[:BLOCK] == b"x" * BLOCK
