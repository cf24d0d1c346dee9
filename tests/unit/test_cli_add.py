"""`add` and `serve`: the configuration that words stand for, and servers that do not come up."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from served import BASE, CONFIG, vdusefast

from vdusefast import errors
from vdusefast.base import time_limits
from vdusefast.base.start_mode import StartMode
from vdusefast.cli import app as cli
from vdusefast.cli import serve
from vdusefast.config import load_config
from vdusefast.server import launch
from vdusefast.server.signals import PatientStopSignals
from vdusefast.state import orphans


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "vd0.toml"
    path.write_text(CONFIG)
    return str(path)


# -- the configuration that words stand for


NOT_CONFIGURATION = ("target", "as_json", "other_store", "claim", "explain", "dry_run")


def no_options() -> dict[str, Any]:
    return {option.name: None for option in serve.add.params if option.name not in NOT_CONFIGURATION}


def test_options_go_over_the_file(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {
        "uri": "file:disk.img",
        "queues": 3,
        "queue_size": 128,
        "cpus": "0,0,0",
        "irq_cpus": "0,0,0",
        "bus": "vhost",
        "serial": "other",
        "packed": True,
        "in_order": True,
        "indirect": True,
        "event_idx": False,
        "read_only": True,
        "block_size_bytes": 4096,
        "cache": "none",
        "engine": "sync",
        "timeout_s": 3.5,
        "reconnect_s": 7.0,
        "poll": "never",
        "map": "off",
        "sqpoll": False,
        "poll_us": 7,
        "irq_delay_us": 9,
        "msg_timeout_s": 60,
        "bounce_size_bytes": "128M",
        "user_memory": "off",
        "lock_memory": "off",
        "scheduler": "kernel",
        "attach_timeout_s": 9,
    }
    assert set(given) == set(no_options())
    found = serve.read_config(config, given)
    assert found.backend.uri == f"file:{tmp_path}/disk.img"
    assert (found.device.bounce_size_bytes, found.device.bus, found.device.queues) == (128 << 20, "vhost", 3)
    assert found.device.transport == "loopback"
    for key, value in given.items():
        if key in (
            "queue_size",
            "packed",
            "in_order",
            "indirect",
            "event_idx",
            "serial",
            "read_only",
            "block_size_bytes",
            "msg_timeout_s",
            "attach_timeout_s",
            "user_memory",
        ):
            assert getattr(found.device, key) == value
    assert [(queue.cpu, queue.irq_cpu) for queue in found.queue] == [(0, 0)] * 3
    assert [(queue.poll, queue.poll_us, queue.irq_delay_us) for queue in found.queue] == [("never", 7, 9)] * 3


def test_without_options_the_file_stands(config: str) -> None:
    assert serve.read_config(config, no_options()) == load_config(config)


def test_commands_take_the_kernel_unless_told_otherwise() -> None:
    assert serve.read_config("vd0", {**no_options(), "uri": "null:1M"}).device.transport == "kernel"


# -- a server that does not come up


def start(tmp_path: Path, config: str, code: str, timeout_s: float = 20.0) -> Any:
    """Start `code` in place of the server; sys.argv has name, report descriptor, journal descriptor."""
    command = [sys.executable, "-c", f"import os, sys, time, signal\n{code}"]
    return launch.start(load_config(config), timeout_s, command)


def time_out(tmp_path: Path, config: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start `code` as `start` does, and wait 1 s for it in vain, but until it has called ready() in any case."""
    ready = tmp_path / "ready"

    class Signals(PatientStopSignals):
        def wait_for(self, *fds: int, timeout_s: float | None = None) -> list[int]:
            end = time.monotonic() + 30
            while not ready.exists():
                assert time.monotonic() < end
                time.sleep(0.01)
            return super().wait_for(*fds, timeout_s=timeout_s)

    monkeypatch.setattr(launch, "PatientStopSignals", Signals)
    start(tmp_path, config, f"def ready():\n    open({str(ready)!r}, 'w').close()\n{code}", 1.0)


def test_server_that_dies_without_a_word_is_told_with_its_last_words(tmp_path: Path, config: str) -> None:
    with pytest.raises(errors.VdusefastError, match=r"^vd0: its server ended with status 3 .*: last words$"):
        start(tmp_path, config, "print('first'); print('last words', file=sys.stderr); sys.exit(3)")
    with pytest.raises(errors.VdusefastError, match=r"^vd0: its server was killed by SIGKILL before"):
        start(tmp_path, config, "os.kill(os.getpid(), 9)")


@pytest.mark.slow
def test_traceback_of_a_class_that_cannot_start_reaches_the_person(tmp_path: Path) -> None:
    (tmp_path / "disk.py").write_text(
        "import vdusefast\n\nclass Disk(vdusefast.Backend):\n    size_bytes = 4096\n\n    def open(self):\n"
        "        raise ValueError('no paint')\n\n    def pread(self, buffer, offset_bytes):\n        pass\n"
    )
    path = tmp_path / "vd0.toml"
    path.write_text(re.sub("uri = .*", f'uri = "python:{tmp_path}/disk.py:Disk"', CONFIG))
    done = vdusefast("add", str(path))
    *log, last = done.stderr.splitlines()
    assert done.returncode == 1
    uri = f"python:{tmp_path}/disk.py:Disk"
    assert last == f"vdusefast: {uri}: open() raised ValueError: no paint (disk.py:7); nothing is served"
    for text in ("Traceback (most recent call last)", f'File "{tmp_path}/disk.py", line 7, in open', "no paint"):
        assert text in "\n".join(log)


def test_servers_error_is_passed_on(tmp_path: Path, config: str) -> None:
    code = 'os.write(int(sys.argv[2]), b\'{"error": "vd0: no vduse", "exit_code": 5}\\n\')'
    with pytest.raises(errors.KernelSupportError, match=r"^vd0: no vduse$"):
        start(tmp_path, config, code)


def test_server_that_takes_too_long_is_ended(tmp_path: Path, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"""
def end(*_):
    open({str(tmp_path / "ended")!r}, "w").close()
    sys.exit(0)
signal.signal(signal.SIGINT, end)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
ready()
time.sleep(60)
"""
    with pytest.raises(errors.TimedOutError, match=r"^vd0: not usable within \d.* s"):
        time_out(tmp_path, config, code, monkeypatch)
    assert (tmp_path / "ended").exists()


def test_server_that_cannot_be_ended_is_killed_and_its_directory_removed(
    tmp_path: Path, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "END_TIMEOUT_S", 0.5)
    code = """
from pathlib import Path
from vdusefast.state.run_dir import RunDirectory
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
held = RunDirectory("vd0")
ready()
time.sleep(60)
"""
    with pytest.raises(errors.TimedOutError, match="not usable within"):
        time_out(tmp_path, config, code, monkeypatch)
    assert not (BASE / "vd0").exists()


def test_server_that_was_lost_is_asked_to_end_before_it_is_killed(
    tmp_path: Path, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "EXIT_TIMEOUT_S", 0.2)
    code = f"""
def end(*_):
    open({str(tmp_path / "asked")!r}, "w").close()
    sys.exit(0)
signal.signal(signal.SIGINT, end)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.close(int(sys.argv[2]))
time.sleep(60)
"""
    with pytest.raises(errors.VdusefastError, match="its server ended with status 0 before the device was usable"):
        start(tmp_path, config, code)
    assert (tmp_path / "asked").exists()


def test_add_waits_longer_than_the_server_allows_itself() -> None:
    attach_s = 7.0
    own_s = time_limits.START_TIMEOUT_S + attach_s + time_limits.MARGIN_S
    assert time_limits.client_s(time_limits.start_s(attach_s)) > own_s


def test_interrupted_add_ends_the_server(config: str) -> None:
    """In all stages: before there is a server, while it starts, and while the store is slow to open."""
    for delay_s in (0.05, 0.1, 0.15, 0.2):
        command = [sys.executable, "-m", "vdusefast", "add", config]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            time.sleep(delay_s)
            process.terminate()
            status = process.wait(30)
        if status == 0:
            assert cli.run(["del", "vd0"]) == 0
        else:
            assert status in (130, -signal.SIGTERM)
        deadline = time.monotonic() + 10
        while (BASE / "vd0").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        if (BASE / "vd0").exists():
            assert cli.run(["del", "vd0"]) == 0  # it was ready as the signal came


def test_signal_while_waiting_says_so(tmp_path: Path, config: str) -> None:
    code = f"os.kill({os.getpid()}, signal.SIGINT); time.sleep(60)"
    with pytest.raises(launch.InterruptedStartError, match=r"^vd0: interrupted by SIGINT; it was not added$") as caught:
        start(tmp_path, config, code)
    assert caught.value.exit_code == 130


@pytest.mark.parametrize("was_left", [False, True])
def test_lost_server_of_a_device_that_was_left_is_not_asked_to_remove_it(
    tmp_path: Path, config: str, was_left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGINT is what removes a device that nobody uses."""
    monkeypatch.setattr(orphans, "is_left", lambda path: was_left)
    # Not by handlers: the second signal would cut off what the first one does.
    code = f"""
asking = {{signal.SIGINT, signal.SIGTERM}}
signal.pthread_sigmask(signal.SIG_BLOCK, asking)
ready()
open({str(tmp_path / "asked")!r}, "w").write(signal.sigwait(asking).name)
"""
    words = "left as it was" if was_left else "not added"
    with pytest.raises(errors.TimedOutError, match=f"^vd0: not usable within .* and {words}; "):
        time_out(tmp_path, config, code, monkeypatch)
    assert (tmp_path / "asked").read_text() == ("SIGTERM" if was_left else "SIGINT")


@pytest.mark.slow
def test_server_whose_adder_is_gone_ends(config: str) -> None:
    """As when `add` is killed: nobody reads the report, and nobody would know of the device."""
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    command = [*launch._default_command("main"), "vd0", str(write_fd), "-1", StartMode.ADD]
    text = msgspec.json.encode(load_config(config))
    done = subprocess.run(command, input=text, pass_fds=[write_fd], capture_output=True, check=False, timeout=30)
    os.close(write_fd)
    assert done.returncode == 1
    assert not (BASE / "vd0").exists()


# -- where it runs


@pytest.mark.slow
def test_dry_run_prints_the_plan_and_makes_nothing() -> None:
    words = ("add", "vd0", "--backend=null:1M", "--queues=2", "--cpus=auto", "--dry-run")
    done = vdusefast(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\nqueue 1 (requests from CPU " in done.stdout
    assert "as the kernel's rule has it" in done.stdout
    plan = json.loads(vdusefast(*words, "--json").stdout)
    assert [queue["index"] for queue in plan["placement"]["queues"]] == [0, 1]
    assert not (BASE / "vd0").exists()
    assert vdusefast("serve", *words[1:]).stdout == done.stdout


@pytest.mark.slow
def test_plan_follows_the_node(config: str) -> None:
    try:
        done = vdusefast("add", config, "--cpus=auto", "--explain")
        first, *rest = done.stdout.splitlines()
        assert first == "vd0: no node, the transport is loopback", done.stderr
        assert rest[0].endswith("not known: the driver is no kernel's block driver")
        assert any(line.startswith("  worker      CPU ") for line in rest)
    finally:
        vdusefast("del", "vd0")
