"""Servers while the machine goes down: marks, launch files, names of units. With systemd as process 1:
tests/vm/test_going_down.py.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from vdusefast.config import make_config
from vdusefast.errors import VdusefastError
from vdusefast.host import shutdown
from vdusefast.server.systemd import start_file, transient_unit

CHILD = """
import os
from vdusefast.host import final_kill
final_kill.survive_with(os.getppid())
print(open("/proc/self/cmdline").read()[:1])
"""


def test_process_that_survives_the_final_kill_bears_its_mark_and_so_do_its_workers() -> None:
    code = """
import subprocess, sys
from vdusefast.host import final_kill
final_kill.survive()
print(open("/proc/self/cmdline").read()[:1])
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
"""
    done = subprocess.run([sys.executable, "-uc", code, CHILD], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["@", "@"]
    # Below a process without a mark, which pytest may bear: servers of other tests run in it.
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    done = subprocess.run([sys.executable, "-c", code, CHILD], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == sys.executable[:1]


def test_stop_command_is_read_as_it_was_written(tmp_path: Path) -> None:
    """By systemd-run itself, which fails later: nothing runs a service here."""
    words = ["/bin/sh", "-c", "import x; y('a b')"]
    unit = tmp_path / "own.service"
    unit.write_text(
        f"[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\nExecStop={transient_unit._line(words)}\n"
    )
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", os.fspath(unit)], check=False, capture_output=True, text=True
    )
    assert "own.service" not in done.stderr


def test_a_server_is_no_service_where_systemd_is_not_process_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (shutdown, transient_unit):
        monkeypatch.setattr(module, "SYSTEMD_IS_INIT", tmp_path / "absent")
    assert transient_unit.refusal()
    assert not shutdown.is_going_down()
    assert not shutdown.in_final_stage()


@pytest.fixture
def launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "launch"
    monkeypatch.setattr(start_file, "DIRECTORY", directory)
    return directory


def test_launch_file_is_for_root_alone_and_says_what_was_written(launches: Path) -> None:
    config = make_config(name="vd0", uri="memory:1M")
    start = start_file.Launch(config, "add", "address", "/tmp", {"TOKEN": "secret"})
    start_file.write(start)
    start_file.write(start)
    assert start_file.read("vd0") == start
    (path,) = launches.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(launches.stat().st_mode) == 0o700
    start_file.remove("vd0")
    start_file.remove("vd0")
    with pytest.raises(VdusefastError, match=r"vd0\.json cannot be read"):
        start_file.read("vd0")


def test_first_start_finds_who_waits_and_a_later_one_does_not(launches: Path) -> None:
    listener, address = start_file.listen()
    with listener:
        connection = start_file.connect(address)
        assert connection is not None
        server, _ = listener.accept()
        assert start_file.peer_ids(server) == (os.getpid(), os.getuid())
        with connection, server:
            server.sendall(b"x")
            assert connection.recv(1) == b"x"
    assert start_file.connect(address) is None


def test_jobs_of_others_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = (
        "10 shutdown.target start waiting\n12 vdusefast-a.service stop running\n13 vdusefast@b.service stop running\n"
    )
    said = [f"{ours}11 mnt.mount stop running\n", ours]
    monkeypatch.setattr(shutdown, "_systemctl", lambda *_: said[0])
    watch = shutdown.Bystanders()
    assert not any(watch.are_done() for _ in range(10))
    monkeypatch.setattr(shutdown, "_systemctl", lambda *_: said[1])
    assert [watch.are_done() for _ in range(shutdown.JOBS_LOOKS)] == [False] * (shutdown.JOBS_LOOKS - 1) + [True]
    monkeypatch.setattr(shutdown, "_systemctl", lambda *_: "")  # systemd does not answer
    assert not watch.are_done()
