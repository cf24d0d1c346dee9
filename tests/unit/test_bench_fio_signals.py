"""Signals to `bench fio`: fio reports, nothing is left, and the end comes within a known time."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
FINISH_S = 3  # in place of the 20 s that people get
CODE = f"""
import sys, pytest, fio_rig
from vdusefast.bench.fio import shown
from vdusefast.bench.__main__ import main
shown.FINISH_S = {FINISH_S}.0
if "--backend" not in " ".join(sys.argv):
    fio_rig.load_the_file_itself(pytest.MonkeyPatch())
main(["fio", *sys.argv[1:]])
"""
LOOP = ["--transport=loopback", "--queues=1", "--name=a", "--rw=randrw", "--bs=4k", "--size=1m", "--time_based",
        "--runtime=60", "--verify_state_save=0"]  # fmt: skip
HANGS = """
import time, vdusefast

class Disk(vdusefast.Backend):
    size_bytes = 1 << 20

    def pread(self, buffer, offset_bytes):
        time.sleep(3600)

    def pwrite(self, buffer, offset_bytes):
        time.sleep(3600)
"""
HANGS_AT_START = """
import time, vdusefast

class Disk(vdusefast.Backend):
    size_bytes = 1 << 20

    def open(self):
        time.sleep(3600)

    def pread(self, buffer, offset_bytes):
        pass
"""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", CODE, *LOOP, *arguments]


def environment(directory: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TMPDIR": str(directory)}


@contextmanager
def started(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=directory,
        env=environment(directory),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(condition: Callable[[], object], limit_s: float = 30.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def jobs_of_fio(pid: int) -> list[psutil.Process]:
    """Return the processes of fio's jobs: once there is one, fio handles signals."""
    try:
        (fio,) = [one for one in psutil.Process(pid).children() if one.name() == "fio"]
        return [one for one in fio.children() if one.name() == "fio"]
    except (psutil.NoSuchProcess, ValueError):
        return []


def has_read(pid: int) -> bool:
    try:
        return any(job.io_counters().read_count > 50 for job in jobs_of_fio(pid))
    except psutil.NoSuchProcess:
        return False


def assert_nothing_left(directory: Path, family: list[psutil.Process]) -> None:
    _, left = psutil.wait_procs(family, 10)
    assert left == []
    assert [path.name for path in directory.iterdir() if path.name not in ("disk.py", "__pycache__")] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("kind", ["normal", "json"])
def test_signal_lets_fio_report_and_leaves_nothing(tmp_path: Path, number: signal.Signals, kind: str) -> None:
    with started(tmp_path, f"--output-format={kind}") as process:
        wait_until(lambda: has_read(process.pid))
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    if kind == "json":
        report: dict[str, Any] = json.loads(out[out.index("{\n") :])
        assert report["vdusefast"]["stopped_by"] == number.name
        assert report["jobs"][0]["read"]["total_ios"] > 0
    else:
        assert "Run status group 0" in out
        assert f"stopped early by {number.name}; the requests in flight were finished" in out
    assert_nothing_left(tmp_path, family)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_at_any_moment_ends_with_status_0(tmp_path: Path, number: signal.Signals) -> None:
    """Whether there is a store, a device, a fio, or a fio that handles signals."""
    for delay_s in (0.0, 0.1, 0.2, 0.3, 0.5):
        with started(tmp_path, "--output-format=json", "--backend=memory:1M") as process:
            assert process.stderr is not None
            assert process.stderr.readline().startswith("transport: ")
            time.sleep(delay_s)
            process.send_signal(number)
            _, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
        assert "Traceback" not in err
        assert_nothing_left(tmp_path, [])


def test_terminal_that_is_closed_ends_all(tmp_path: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(sys.executable, command(), environment(tmp_path))
    wait_until(lambda: has_read(pid))
    family = psutil.Process(pid).children(recursive=True)
    assert len(family) >= 3  # fio, its job, a worker
    os.close(terminal)
    wait_until(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid)
    assert_nothing_left(tmp_path, family)


# -- a Python class that hangs


def hanging(directory: Path, text: str = HANGS) -> str:
    (directory / "disk.py").write_text(text)
    return f"--backend=python:{directory}/disk.py:Disk"


@pytest.mark.parametrize("is_repeated", [False, True])
def test_disk_that_hangs_does_not_keep_us_after_a_signal(tmp_path: Path, is_repeated: bool) -> None:
    limits = [] if is_repeated else ["--output-format=json"]
    with started(tmp_path, hanging(tmp_path), *limits) as process:
        wait_until(lambda: jobs_of_fio(process.pid))
        time.sleep(1)
        family = psutil.Process(process.pid).children(recursive=True)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        if is_repeated:
            time.sleep(0.7)
            process.send_signal(signal.SIGINT)
        _out, err = process.communicate(timeout=60)
    passed = time.monotonic() - began
    assert process.returncode == 1
    if is_repeated:
        assert "because a second signal came" in err
    else:
        assert f"did not end within {FINISH_S} s after the signal" in err
        assert "at once when you press Ctrl-C again" in err
        assert passed > FINISH_S
    assert passed < FINISH_S + 20
    assert_nothing_left(tmp_path, family)


def test_disk_that_hangs_at_its_start_does_not_keep_us_after_a_signal(tmp_path: Path) -> None:
    with started(tmp_path, hanging(tmp_path, HANGS_AT_START)) as process:
        wait_until(lambda: psutil.Process(process.pid).children(recursive=True))
        time.sleep(1)
        family = psutil.Process(process.pid).children(recursive=True)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, _err = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert process.returncode == 0
    assert "stopped by SIGINT before fio had begun" in out
    assert_nothing_left(tmp_path, family)
