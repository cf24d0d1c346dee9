"""A server that a reload starts: systemd is its parent, and the reload still learns how it went."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vdusefast import errors
from vdusefast.base.start_mode import StartMode
from vdusefast.config import make_config
from vdusefast.server import foreign_process, launch

LIMIT_S = 30.0


def ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        yield pid


def start(
    code: str, *words: object, said: bytes = b"", pass_fds: tuple[int, ...] = ()
) -> foreign_process.ForeignProcess:
    with tempfile.TemporaryFile() as stdin:
        stdin.write(said)
        stdin.seek(0)
        command = [sys.executable, "-c", code, *map(str, words)]
        return foreign_process.start(command, stdin=stdin, pass_fds=pass_fds, environment={"WORD": "of ours"})


def test_parent_is_an_ancestor_of_ours_from_the_first_line_on() -> None:
    code = "import os, sys; os.write(int(sys.argv[1]), f'{os.getppid()} {os.getsid(0) == os.getpid()}'.encode())"
    read_fd, write_fd = os.pipe()
    process = start(code, write_fd, pass_fds=(write_fd,))
    os.close(write_fd)
    process.wait(LIMIT_S)
    parent, leads = os.read(read_fd, 100).decode().split()
    os.close(read_fd)
    assert int(parent) != os.getpid()
    assert int(parent) in (*ancestors(os.getpid()), 0)  # 0: outside of our PID namespace
    assert leads == "True"


def test_input_environment_and_descriptors_arrive() -> None:
    code = "import os, sys; os.write(int(sys.argv[1]), (sys.stdin.read() + os.environ['WORD']).encode())"
    read_fd, write_fd = os.pipe()
    process = start(code, write_fd, said=b"a word ", pass_fds=(write_fd,))
    os.close(write_fd)
    process.wait(LIMIT_S)
    assert os.read(read_fd, 100) == b"a word of ours"
    os.close(read_fd)


def test_signal_arrives_and_the_end_is_seen() -> None:
    process = start("import time; time.sleep(60)")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.05)
    assert process.returncode is None
    process.send_signal(signal.SIGKILL)
    process.wait(LIMIT_S)
    assert process.returncode == 0
    process.send_signal(signal.SIGTERM)  # there is nothing left to send it to


def test_command_that_cannot_be_started_ends_with_a_reason(capfd: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryFile() as stdin:
        process = foreign_process.start(["/nowhere/python"], stdin=stdin, pass_fds=(), environment={})
    process.wait(LIMIT_S)
    assert capfd.readouterr().err == "vdusefast: /nowhere/python: No such file or directory\n"


def test_process_in_between_that_fails_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fails = [sys.executable, "-c", "import sys; sys.exit(3)"]
    monkeypatch.setattr("vdusefast.base.spawn.command", lambda *_, **__: fails)
    with pytest.raises(errors.VdusefastError, match=r"^the process that starts it ended with status 3$"):
        start("")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "kind", "text"),
    [
        ("sys.exit(3)", errors.VdusefastError, "vd0: its server ended before the device was usable"),
        ('os.write(fd, b\'{"error": "no", "exit_code": 5}\\n\')', errors.KernelSupportError, "no"),
    ],
)
def test_result_of_a_successor_is_learned(
    code: str, kind: type[Exception], text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config(name="vd0", uri="null:1M", transport="kernel")
    command = [sys.executable, "-c", f"import os, sys; fd = int(sys.argv[2]); print('seen', flush=True); {code}"]
    with pytest.raises(kind, match=f"^{text}") as caught:
        launch.start(config, LIMIT_S, command, mode=StartMode.TAKE_OVER, service=True)
    assert type(caught.value) is kind
    assert capfd.readouterr().out == "seen\n"  # where our output goes
