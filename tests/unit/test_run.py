"""`vdusefast run`: a program that has a loopback device as its disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from documents import block_with, make_checkout, type_in

from vdusefast.api import Device
from vdusefast.cli.run import PassedOn, run_program, split_words
from vdusefast.config import make_config
from vdusefast.driver import preload
from vdusefast.errors import ConfigError, VdusefastError

RUN = (sys.executable, "-m", "vdusefast", "run")


def run(*words: str, status: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    done = subprocess.run([*RUN, *words], env=environment, capture_output=True, text=True, timeout=45, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_document(tmp_path: Path) -> None:
    shown = type_in(make_checkout(tmp_path), block_with("vdusefast run", "docs/run.md"), 50)
    assert "Filesystem volume name" in shown
    assert "err= 0" in shown


def test_a_program_finds_the_disk(tmp_path: Path) -> None:
    store = tmp_path / "disk.img"
    store.write_bytes(bytes(1 << 20))
    uri = f"file:{store}"
    run("--backend", uri, "--", "sh", "-c", 'printf hello > "$VDUSEFAST_DISK"; test -b {} -a {} = "$VDUSEFAST_DISK"')
    assert store.read_bytes()[:6] == b"hello\0"
    shown = run("--backend", uri, "--queues", "2", "--serial", "mine", "--", "head", "-c", "5", "{}").stdout
    assert shown == "hello"
    assert run("--backend", uri, "--route", "cross", "--queues", "2", "--", "head", "-c", "5", "{}").stdout == "hello"


def test_a_configuration_file_says_what_the_disk_is(tmp_path: Path) -> None:
    file = tmp_path / "disk.toml"
    file.write_text('[device]\nname = "mine"\nread_only = true\n[backend]\nuri = "memory:1M"\n')
    assert run(str(file), "--", "blockdev", "--getsize64", "--getro", "{}").stdout.split() == ["1048576", "1"]


@pytest.mark.parametrize(
    ("program", "status"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM),
        (["./no-such-program"], 127),
        (["/etc/passwd"], 126),
    ],
)
def test_the_exit_status_is_the_program_s(program: list[str], status: int) -> None:
    done = run("--backend", "null:1M", "--", *program, status=status)
    assert bool(done.stderr) == (status in (126, 127))


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--backend", "null:1M"),
        ("--backend", "null:1M", "--"),
        ("--", "true"),
        ("true",),
        ("--backend", "no-such-scheme:x", "--", "true"),
        ("--bus", "vhost", "--backend", "null:1M", "--", "true"),
    ],
)
def test_wrong_words_are_refused(words: tuple[str, ...]) -> None:
    assert run(*words, status=2).stderr.startswith("vdusefast: ")


def test_words_are_split() -> None:
    assert split_words(["dd", "--x"], has_backend=True) == ("", ["dd", "--x"])
    assert split_words(["--", "dd", "--"], has_backend=True) == ("", ["dd", "--"])
    assert split_words(["a.toml", "--", "dd"], has_backend=False) == ("a.toml", ["dd"])
    with pytest.raises(ConfigError):
        split_words(["a.toml", "--"], has_backend=False)


def test_a_signal_reaches_the_program_and_nothing_is_left() -> None:
    program = 'trap "exit 9" TERM; echo "$VDUSEFAST_DISK"; while :; do sleep 0.1; done'
    words = [*RUN, "--backend", "memory:1M", "--", "bash", "-c", program]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        assert path.is_socket()
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)  # the terminal's: the program has its own
        process.terminate()
        assert process.wait(30) == 9
    assert not path.parent.exists()


def test_another_preload_library_stays() -> None:
    class Server:
        path = Path("/there")
        environment = {"VDUSEFAST_ATTACH": "/there"}  # noqa: RUF012

    variables = preload.environment(Server(), {"LD_PRELOAD": "other.so"})  # type: ignore[arg-type]
    assert variables["LD_PRELOAD"] == f"{preload.library_path()}:other.so"
    assert variables["VDUSEFAST_DISK"] == variables["VDUSEFAST_ATTACH"] == "/there"


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preload, "library_path", lambda: None)
    with pytest.raises(VdusefastError, match="make build"):
        preload.environment(None)  # type: ignore[arg-type]
    monkeypatch.setattr(preload, "library_path", lambda: Path("/my files/_preload.so"))
    with pytest.raises(VdusefastError, match="space"):
        preload.environment(None)  # type: ignore[arg-type]


def test_a_program_outlives_its_server_and_gets_errors() -> None:
    program = """
import os, signal, sys, time
fd = os.open(os.environ["VDUSEFAST_DISK"], os.O_RDWR)
assert os.pread(fd, 4096, 0) == bytes(4096)
os.kill(os.getppid(), signal.SIGKILL)
deadline_s = time.monotonic() + 20
while time.monotonic() < deadline_s:
    try:
        os.pread(fd, 4096, 0)
    except OSError as error:
        print(error.errno, flush=True)
        break
"""
    words = [*RUN, "--backend", "memory:1M", "--", sys.executable, "-I", "-c", program]
    done = subprocess.run(words, capture_output=True, text=True, timeout=45, check=False)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == "5\n"
    (line,) = [line for line in done.stderr.splitlines() if "disk" in line]
    path = Path(line.split(": ")[1])
    assert line == f"vdusefast: {path}: the server of this disk has ended; all requests fail with EIO"
    left = (path.parent, Path(os.environ["VDUSEFAST_RUN_DIR"], path.name))  # by a server that was killed
    assert all(one.is_dir() for one in left)
    run("--backend", "null:1M", "--", "true")
    assert not any(one.exists() for one in left)


SLOW = """
import time
import vdusefast

class Slow(vdusefast.Backend):
    size_bytes = 1 << 20

    def __init__(self):
        open("started", "w").close()
        time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_program_is_started_ends_the_command(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "disk.py").write_text(SLOW)
    words = [*RUN, "--backend", f"python:{tmp_path}/disk.py:Slow", "--", "true"]
    variables = {"TMPDIR": str(tmp_path), "VDUSEFAST_RUN_DIR": str(tmp_path / "run")}
    with subprocess.Popen(words, cwd=tmp_path, env={**os.environ, **variables}) as process:
        deadline_s = time.monotonic() + 40
        while not (tmp_path / "started").exists() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(40) == 128 + number
    assert not list(tmp_path.glob("vdusefast-*"))
    assert not list(tmp_path.glob("run/run-*"))


class _Started:
    """A program for PassedOn, which notes its signals."""

    def __init__(self) -> None:
        self.got: list[int] = []

    def send_signal(self, number: int) -> None:
        self.got.append(number)


def test_a_signal_while_the_program_is_started_reaches_it() -> None:
    started = _Started()
    with PassedOn() as signals:
        signals.keep()
        os.kill(os.getpid(), signal.SIGTERM)
        assert started.got == []
        signals.pass_to(started)  # type: ignore[arg-type]
        assert started.got == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGHUP)
        assert started.got == [signal.SIGTERM, signal.SIGHUP]


def test_a_second_signal_does_not_interrupt_the_clean_up() -> None:
    with PassedOn():
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGHUP


def test_a_signal_that_is_ignored_stays_ignored_in_the_program() -> None:
    code = "import signal; print(signal.getsignal(signal.SIGHUP).name, signal.getsignal(signal.SIGTERM).name)"
    words = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *RUN, "--backend", "null:1M", "--", sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, timeout=45, check=True)
    assert done.stdout == "SIG_IGN SIG_DFL\n"


def test_a_device_that_fails_while_it_drains_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    class FailsLate(Device):
        drained = False

        @property
        def failure(self) -> VdusefastError | None:
            return VdusefastError("the last flush has failed") if self.drained else None

        def stop(self, *words: Any, **options: Any) -> None:
            super().stop(*words, **options)
            self.drained = True

    monkeypatch.setattr("vdusefast.api.Device", FailsLate)
    with pytest.raises(VdusefastError, match="true has lost its disk: the last flush has failed"):
        run_program(make_config(name="late", uri="null:1M", transport="loopback"), ["true"], "own")
