"""A class's traceback, prints and log lines reach the person, with Python's default logging: Device, fio, serve."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

DISKS = """
import logging, os, sys
import vdusefast

class Disk(vdusefast.Backend):
    size_bytes = 1 << 20

    def pread(self, buffer, offset_bytes):
        buffer[:] = bytes(len(buffer))

class RaisesInRead(Disk):
    def pread(self, buffer, offset_bytes):
        self.find(offset_bytes)

    def find(self, offset_bytes):
        raise ValueError("no such block")

class RaisesInConstructor(Disk):
    def __init__(self):
        raise KeyError("missing")

class RaisesInOpen(Disk):
    def open(self):
        raise KeyError("missing")

class RaisesInOpenOfWorker(Disk):
    def open(self):
        if "worker" in " ".join(sys.orig_argv):
            raise KeyError("missing")

class BrokenImport(Disk):
    def __init__(self):
        import broken

class Prints(Disk):
    def pread(self, buffer, offset_bytes):
        print("on stdout")
        print("\\tindented on stderr", file=sys.stderr)
        super().pread(buffer, offset_bytes)

class PrintsInOpen(Disk):
    def open(self):
        print("opened in", os.getpid())

class Logs(Disk):
    def pread(self, buffer, offset_bytes):
        logging.getLogger("disk").warning("a warning")
        try:
            {}["missing"]
        except KeyError:
            logging.exception("an error")
        super().pread(buffer, offset_bytes)

class Dies(Disk):
    def pread(self, buffer, offset_bytes):
        print("the last words", end="")
        os._exit(7)
"""

PROGRAM = """
import sys, vdusefast

config = vdusefast.make_config(name="shown", uri=sys.argv[1], queues=1)
try:
    with vdusefast.Device(config) as device, device.driver() as driver:
        try:
            driver.read(0, 4096)
        except OSError as error:
            print("read:", error, file=sys.stderr)
except vdusefast.VdusefastError as error:
    print(error, file=sys.stderr)
"""


def program(tmp_path: Path, disk: str) -> list[str]:
    """Return a program that uses Device, and sets no logging up."""
    (tmp_path / "program.py").write_text(PROGRAM)
    return [sys.executable, str(tmp_path / "program.py"), f"python:{tmp_path}/disks.py:{disk}"]


def fio(tmp_path: Path, disk: str) -> list[str]:
    job = ["--name=job", "--rw=read", "--bs=4k", "--size=4k", "--transport=loopback", "--queues=1"]
    return [sys.executable, "-m", "vdusefast.bench", "fio", *job, f"--backend=python:{tmp_path}/disks.py:{disk}"]


def serve(tmp_path: Path, disk: str) -> list[str]:
    """Return a server in the foreground; it has no driver, and fails before it serves."""
    uri = f"python:{tmp_path}/disks.py:{disk}"
    (tmp_path / "shown.toml").write_text(
        f'[device]\nname = "shown"\ntransport = "loopback"\nqueues = 1\n[backend]\nuri = "{uri}"\n'
    )
    return [sys.executable, "-m", "vdusefast", "serve", str(tmp_path / "shown.toml")]


def stderr_of(words: list[str], tmp_path: Path) -> str:
    """Run a command in a directory with the disks. Returns its standard error."""
    run_dir = tmp_path / "run"
    run_dir.mkdir(exist_ok=True)
    done = subprocess.run(
        words,
        cwd=tmp_path,
        env={**os.environ, "VDUSEFAST_RUN_DIR": str(run_dir)},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    return done.stderr


@pytest.fixture(autouse=True)
def disks(tmp_path: Path) -> None:
    (tmp_path / "disks.py").write_text(DISKS)
    (tmp_path / "broken.py").write_text("def f(:\n")


SERVED = {
    "RaisesInRead": [
        ": Traceback (most recent call last):",
        'disks.py", line 16, in find',
        ':     raise ValueError("no such block")',
        ": ValueError: no such block",
        "RaisesInRead: pread raised ValueError: no such block (disks.py:16); the driver got IOERR",
    ],
    "Prints": [": on stdout", ":         indented on stderr"],
    "Logs": [": a warning", "ERROR:root:an error", ": KeyError: 'missing'"],
    "Dies": [": the last words", "ended with status 7; its last line: the last words; it is replaced"],
}
FAILED = {
    "RaisesInConstructor": ["in __init__", ": KeyError: 'missing'", "RaisesInConstructor() raised KeyError"],
    "RaisesInOpen": ["in open", ": KeyError: 'missing'", "open() raised KeyError: 'missing' (disks.py:24); nothing is"],
    "RaisesInOpenOfWorker": [
        "device shown: queue 0: worker (pid ",
        "in open",
        ": KeyError: 'missing'",
        "nothing is served",
    ],
    "BrokenImport": ['broken.py", line 1', ":     def f(:", "SyntaxError"],
}


@pytest.mark.parametrize("command", [program, fio])
@pytest.mark.parametrize("disk", SERVED)
def test_what_a_class_says_in_a_request_is_seen(
    command: Callable[[Path, str], list[str]], disk: str, tmp_path: Path
) -> None:
    said = stderr_of(command(tmp_path, disk), tmp_path)
    missing = [text for text in SERVED[disk] if text not in said]
    assert not missing, said
    assert "_python.pyx" not in said  # our own frames say nothing about the class


@pytest.mark.parametrize("command", [program, serve])
@pytest.mark.parametrize("disk", FAILED)
def test_what_a_class_says_at_the_start_is_seen(
    command: Callable[[Path, str], list[str]], disk: str, tmp_path: Path
) -> None:
    said = stderr_of(command(tmp_path, disk), tmp_path)
    missing = [text for text in FAILED[disk] if text not in said]
    assert not missing, said


def test_print_in_open_is_seen_of_each_process(tmp_path: Path) -> None:
    said = stderr_of(program(tmp_path, "PrintsInOpen"), tmp_path)
    assert ": probe (pid " in said
    assert "device shown: queue 0: worker (pid " in said
    assert said.count(": opened in ") == 2
