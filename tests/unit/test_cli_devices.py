"""The commands about devices, with real servers on the loopback transport: from `add` to `del`, and what goes wrong."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import resource
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vdusefast import api, background, cli, cli_serve, display, errors, registry, run_dir
from vdusefast.config import load_config
from vdusefast.rpc import CLIENT_COUNT_MAX
from vdusefast.rpc_client import RpcClient
from vdusefast.run_dir import RunDirectory

BASE = Path(os.environ["VDUSEFAST_RUN_DIR"])
CONFIG = """
[device]
name = "vd0"
transport = "loopback"
queues = 2
serial = "S-1"
[backend]
uri = "memory:8M"
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "vd0.toml"
    path.write_text(CONFIG)
    return str(path)


def vdusefast(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vdusefast", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **options)


def ended(pid: int) -> bool:
    """Return whether a process that is not our child has gone, waiting for it a while."""
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            return bool(select.select([fd], [], [], 10)[0])
        finally:
            os.close(fd)
    return True


@pytest.fixture
def added(config: str) -> Iterator[int]:
    """Return the pid of a server of vd0, which the test may end."""
    done = vdusefast("add", config, "--json")
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    yield info["pid"]
    with contextlib.suppress(ProcessLookupError):
        os.kill(info["pid"], signal.SIGCONT)
        os.kill(info["pid"], signal.SIGTERM)
    assert ended(info["pid"])
    if registry.kernel_device_left("vd0") or not (BASE / "vd0").exists():
        return
    registry.remove_dead(BASE / "vd0")


def test_life_of_a_device_in_the_background(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = vdusefast("add", config)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "vd0: no node, the transport is loopback\n"
    assert sorted(os.listdir(BASE / "vd0")) == ["lock", "log", "pages", "socket"]
    assert (BASE / "vd0").stat().st_mode & 0o777 == 0o700

    assert cli.run(["list"]) == 0
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split() == ["NAME", "STATE", "NODE", "BUS", "SIZE", "QUEUES", "BACKEND"]
    assert line.split() == ["vd0", "attached", "-", "-", "8", "MiB", "2", "memory:8M"]

    assert cli.run(["show", "vd0", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["serial"], info["transport"], len(info["queues"])) == ("S-1", "loopback", 2)
    assert os.getsid(info["pid"]) == info["pid"]
    assert os.readlink(f"/proc/{info['pid']}/cwd") == "/"
    assert os.readlink(f"/proc/{info['pid']}/fd/0") == "/dev/null"
    assert os.readlink(f"/proc/{info['pid']}/fd/2") == str(BASE / "vd0/log")

    assert cli.run(["show", "vd0"]) == 0
    text = capsys.readouterr().out
    for word in ("S-1", "memory:8M", "8 MiB (8388608 bytes)", "EVENT_IDX", f"pid {info['pid']}", "queue"):
        assert word in text

    assert cli.run(["stats", "vd0"]) == 0
    assert "irqs_suppressed" in capsys.readouterr().out

    assert cli.run(["add", config]) == 4
    assert "vd0: a device of this name is being served already" in capsys.readouterr().err

    assert cli.run(["del", "vd0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "vd0", "deleted": True}
    assert not (BASE / "vd0").exists()
    assert ended(info["pid"])
    assert cli.run(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_serve_stays_in_the_foreground(config: str) -> None:
    command = [sys.executable, "-m", "vdusefast", "serve", config, "--queues", "1", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        info = json.loads(process.stdout.readline())
        assert (info["pid"], len(info["queues"])) == (process.pid, 1)
        assert [each["name"] for each in registry.describe_all()] == ["vd0"]
        process.terminate()
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert not (BASE / "vd0").exists()


def test_list_is_quick_and_loads_little(added: int) -> None:
    """Under 0.15 s: of computing, as it waits for nothing and a busy machine would make the clock's time longer."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert vdusefast("list").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.15
    code = (
        "import sys, vdusefast.cli\nassert vdusefast.cli.run(['list']) == 0\n"
        "heavy = {'numpy', 'psutil', 'rich', 'asyncio', 'ctypes', 'subprocess'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20, stdout=subprocess.DEVNULL)


def test_server_that_hangs_and_then_dies(
    added: int, config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "LIST_TIMEOUT_S", 0.2)
    os.kill(added, signal.SIGSTOP)
    assert cli.run(["list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["vd0", "silent"]
    os.kill(added, signal.SIGCONT)
    os.kill(added, signal.SIGKILL)
    assert ended(added)
    assert cli.run(["list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["vd0", "dead"]
    assert cli.run(["show", "vd0"]) == 0
    assert "dead" in capsys.readouterr().out
    assert cli.run(["stats", "vd0"]) == 1
    assert capsys.readouterr().err == "vdusefast: vd0: its server has died; `vdusefast del vd0` cleans up\n"

    assert cli.run(["del", "vd0"]) == 0
    assert not (BASE / "vd0").exists()


def test_dead_kernel_device_that_is_attached_is_left_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    destroyed: list[str] = []
    monkeypatch.setattr("vdusefast.transport.sysfs.attached", lambda name: True)
    monkeypatch.setattr("vdusefast.transport.sysfs.created", lambda name: True)
    monkeypatch.setattr("vdusefast.transport.kernel.destroy_device", destroyed.append)
    RunDirectory("vd0", BASE, "kernel").release()
    for _ in range(2):  # looking at it changes nothing
        assert cli.run(["del", "vd0"]) == 4
        err = capsys.readouterr().err
        assert "its server has died, and the kernel still has the device" in err
        assert "Reboot" in err
    assert (BASE / "vd0").is_dir()
    monkeypatch.setattr("vdusefast.transport.sysfs.attached", lambda name: False)
    assert registry.left_text("vd0").endswith("which nothing uses: vdusefast del vd0")
    assert cli.run(["del", "vd0"]) == 0
    assert destroyed == ["vd0"]
    assert not (BASE / "vd0").exists()


def test_kernel_device_of_a_loopback_devices_name_is_none_of_ours(
    added: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither while the loopback device lives nor when its server has died."""
    monkeypatch.setattr("vdusefast.transport.sysfs.attached", lambda name: True)
    monkeypatch.setattr("vdusefast.transport.sysfs.created", lambda name: True)
    monkeypatch.setattr("vdusefast.transport.sysfs.node", lambda name: "/dev/vda")
    monkeypatch.setattr("vdusefast.transport.kernel.destroy_device", lambda name: pytest.fail("destroyed"))
    os.kill(added, signal.SIGKILL)
    assert ended(added)
    assert cli.run(["list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["vd0", "dead", "-"]
    assert cli.run(["del", "vd0"]) == 0
    RunDirectory("vd0", BASE, "loopback").close()


def test_loopback_device_is_removed_although_the_kernel_has_one_of_its_name(
    added: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("vdusefast.transport.sysfs.attached", lambda name: True)
        assert cli.run(["del", "vd0"]) == 0


def test_server_that_refuses_to_answer_is_not_dead(
    added: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = [RpcClient(BASE / "vd0") for _ in range(CLIENT_COUNT_MAX)]
    try:
        for client in taken:
            client.call("ping")
        assert cli.run(["list"]) == 0
    finally:
        for client in taken:
            client.close()
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["vd0", "silent"]


def test_devices_of_roots_are_told_to_a_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path) -> Any:
        raise errors.VdusefastError(f"no permission for {path}")

    (tmp_path / "system/vd0").mkdir(parents=True)
    monkeypatch.delenv("VDUSEFAST_RUN_DIR")
    monkeypatch.setattr(run_dir, "SYSTEM_BASE", tmp_path / "system")
    monkeypatch.setattr(registry, "RpcClient", refuse)
    for own in (tmp_path / "own", None):
        monkeypatch.setattr(run_dir, "base_directory", lambda own=own: own)
        for command in ("show", "del", "stats"):
            assert cli.run([command, "vd0"]) == 1
            assert capsys.readouterr().err == f"vdusefast: vd0: no permission for {tmp_path}/system/vd0; be root\n"
        assert cli.run(["list"]) == 0
        out, err = capsys.readouterr()
        assert out.splitlines()[1].split()[:2] == ["vd0", "hidden"]
        assert err == f"vdusefast: no permission for {tmp_path}/system/vd0; be root\n"


def test_place_that_may_not_be_looked_at_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stat(self: Path, **_: Any) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", stat)
        assert cli.run(["show", "vd0"]) == 1
    assert capsys.readouterr().err == f"vdusefast: vd0: no permission for {BASE}; be root, or the user who added it\n"


@pytest.mark.parametrize("name", ["", "..", "a/b", "n" * 300])
def test_no_file_of_the_kernels_is_taken_for_a_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vdusefast.transport.sysfs.created", lambda name: True)
    monkeypatch.setattr("vdusefast.transport.sysfs.attached", lambda name: False)
    monkeypatch.setattr("vdusefast.transport.kernel.destroy_device", lambda name: pytest.fail("destroyed"))
    assert cli.run(["del", name, "--force"]) == 3


def test_dead_name_is_added_again(added: int, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.kill(added, signal.SIGKILL)
    assert ended(added)
    assert vdusefast("add", config).returncode == 0
    assert cli.run(["del", "vd0"]) == 0


def test_device_of_another_program_is_listed_and_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with RunDirectory("embedded0"):
        assert cli.run(["list"]) == 0
        assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["embedded0", "embedded"]
        for command in ("del", "stats"):
            assert cli.run([command, "embedded0"]) == 4
            assert f"held by pid {os.getpid()}, which takes no commands" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["del", "show", "stats"])
@pytest.mark.parametrize("name", ["nothing", "../x", "..", "", "a/b", "n" * 300])
def test_unknown_name_is_3(command: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([command, name]) == 3
    err = capsys.readouterr().err
    assert err == f"vdusefast: {name}: no such device; none is served here\n"


def test_list_without_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["list"]) == 0
    assert capsys.readouterr().out == "no devices\n"


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["a/b", "--backend", "null:1M"], 2, "device.name: 'a/b'"),
        (["control", "--backend", "null:1M"], 2, "'control' is the name of the kernel's own node"),
        (["vd0"], 2, "say what holds its bytes: --backend file:PATH"),
        (["gone.toml"], 2, "gone.toml: no such configuration file"),
        (["vd0", "--backend", "null:1M", "--queues", "0"], 2, "device.queues: 0 is not between"),
        (["vd0", "--backend", "null:1M", "--queues", "x"], 2, "'x' is not a valid integer"),
        (["vd0", "--backend", "null:1M", "--bounce-size", "x"], 2, "'x' is not a size"),
        (["vd0", "--backend", "null:1M", "--cpus", "9999"], 2, "9999"),
        (["vd0", "--backend", "null:1M", "--irq-cpus", "0,0"], 2, "--irq-cpus: 2 CPUs for 1 queues"),
        (["vd0", "--backend", "null:1M", "--bus", "pci"], 2, "'pci' is not one of"),
        (["vd0", "--backend", "null:1M", "--timeout", "0"], 2, "device.attach_timeout_s: 0"),
        (["vd0", "--backend", "nonsense"], 2, "nonsense"),
        (["CONFIG", "--backend", "file:/nowhere/disk.img"], 1, "file:/nowhere/disk.img: no such file"),
    ],
)
@pytest.mark.parametrize("command", ["add", "serve"])
def test_bad_input_is_one_line_and_nothing_is_left(
    command: str, words: list[str], status: int, message: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [config if word == "CONFIG" else word for word in words]
    assert cli.run([command, *words]) == status
    err = capsys.readouterr().err
    assert err.startswith("vdusefast: ")
    assert err.count("\n") == 1
    assert message in err
    assert not os.listdir(BASE)


def test_kernel_without_vduse_is_5(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What `serve` says where there is no control node, on whatever machine this runs."""
    monkeypatch.setattr("vdusefast.transport.kernel.CONTROL_NODE", "/nowhere/control")
    assert cli.run(["serve", "vd0", "--backend", "null:1M"]) == 5
    err = capsys.readouterr().err
    assert err.startswith("vdusefast: device vd0: the kernel has no vduse")
    assert "modprobe -a vduse" in err
    assert not os.listdir(BASE)


@pytest.mark.parametrize("closed", ["0<&- 1>&- 2>&-", "0<&-", "1>&-", "0<&- 2>&-"])
def test_closed_standard_descriptors_harm_nothing(config: str, closed: str) -> None:
    words = shlex.join([sys.executable, "-m", "vdusefast", "add", config])
    done = subprocess.run(["sh", "-c", f"exec {closed}; exec {words}"], check=False, timeout=60)
    assert done.returncode == 0
    assert registry.describe("vd0")["state"] == "attached"
    assert cli.run(["del", "vd0"]) == 0


def test_node_that_cannot_be_printed_is_told(config: str) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "vdusefast", "add", config]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert re.fullmatch(
        r"vdusefast: vd0: is served by pid \d+, which cannot be printed: No space left on device\n", done.stderr
    )
    assert cli.run(["del", "vd0"]) == 0


# -- the configuration that words stand for


def no_options() -> dict[str, Any]:
    return {option.name: None for option in cli_serve.add.params if option.name not in ("target", "as_json")}


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
        "read_only": True,
        "block_size_bytes": 4096,
        "cache": "none",
        "engine": "sync",
        "poll_us": 7,
        "irq_delay_us": 9,
        "msg_timeout_s": 60,
        "bounce_size_bytes": "128M",
        "attach_timeout_s": 9,
    }
    assert set(given) == set(no_options())
    found = cli_serve.read_config(config, given)
    assert found.backend.uri == f"file:{tmp_path}/disk.img"
    assert (found.device.bounce_size_bytes, found.device.bus, found.device.queues) == (128 << 20, "vhost", 3)
    assert found.device.transport == "loopback"
    for key, value in given.items():
        if key in ("queue_size", "serial", "read_only", "block_size_bytes", "msg_timeout_s", "attach_timeout_s"):
            assert getattr(found.device, key) == value
    assert [(queue.cpu, queue.irq_cpu) for queue in found.queue] == [(0, 0)] * 3
    assert [(queue.poll_us, queue.irq_delay_us) for queue in found.queue] == [(7, 9)] * 3


def test_without_options_the_file_stands(config: str) -> None:
    assert cli_serve.read_config(config, no_options()) == load_config(config)


def test_commands_take_the_kernel_unless_told_otherwise() -> None:
    assert cli_serve.read_config("vd0", {**no_options(), "uri": "null:1M"}).device.transport == "kernel"


# -- a server that does not come up


def start(tmp_path: Path, config: str, code: str, timeout_s: float = 20.0) -> Any:
    """Start `code` in place of the server; sys.argv has name, report descriptor, journal descriptor."""
    command = [sys.executable, "-c", f"import os, sys, time, signal\n{code}"]
    return background.start(load_config(config), timeout_s, command)


def test_server_that_dies_without_a_word_is_told_with_its_last_words(tmp_path: Path, config: str) -> None:
    with pytest.raises(errors.VdusefastError, match=r"^vd0: its server ended with status 3 .*: last words$"):
        start(tmp_path, config, "print('first'); print('last words', file=sys.stderr); sys.exit(3)")
    with pytest.raises(errors.VdusefastError, match=r"^vd0: its server was killed by SIGKILL before"):
        start(tmp_path, config, "os.kill(os.getpid(), 9)")


def test_servers_error_is_passed_on(tmp_path: Path, config: str) -> None:
    code = 'os.write(int(sys.argv[2]), b\'{"error": "vd0: no vduse", "exit_code": 5}\\n\')'
    with pytest.raises(errors.KernelSupportError, match=r"^vd0: no vduse$"):
        start(tmp_path, config, code)


def test_server_that_takes_too_long_is_ended(tmp_path: Path, config: str) -> None:
    (tmp_path / "ended").unlink(missing_ok=True)
    code = f"""
def end(*_):
    open({str(tmp_path / "ended")!r}, "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
time.sleep(60)
"""
    with pytest.raises(errors.TimedOutError, match=r"^vd0: not usable within 1.* s"):
        start(tmp_path, config, code, 1.0)
    assert (tmp_path / "ended").exists()


def test_server_that_cannot_be_ended_is_killed_and_its_directory_removed(
    tmp_path: Path, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "END_TIMEOUT_S", 0.5)
    code = """
from pathlib import Path
from vdusefast.run_dir import RunDirectory
signal.signal(signal.SIGTERM, signal.SIG_IGN)
held = RunDirectory("vd0")
time.sleep(60)
"""
    with pytest.raises(errors.TimedOutError, match="not usable within"):
        start(tmp_path, config, code, 1.0)
    assert not (BASE / "vd0").exists()


def test_server_that_was_lost_is_asked_to_end_before_it_is_killed(
    tmp_path: Path, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "EXIT_TIMEOUT_S", 0.2)
    code = f"""
def end(*_):
    open({str(tmp_path / "asked")!r}, "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
os.close(int(sys.argv[2]))
time.sleep(60)
"""
    with pytest.raises(errors.VdusefastError, match="its server ended with status 0 before the device was usable"):
        start(tmp_path, config, code)
    assert (tmp_path / "asked").exists()


def test_add_waits_longer_than_the_server_allows_itself() -> None:
    assert background.START_MARGIN_S >= api.START_TIMEOUT_S + api.MARGIN_S


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
    with pytest.raises(
        background.InterruptedStartError, match=r"^vd0: interrupted by SIGINT; it was not added$"
    ) as caught:
        start(tmp_path, config, code)
    assert caught.value.exit_code == 130


def test_server_whose_adder_is_gone_ends(config: str) -> None:
    """As when `add` is killed: nobody reads the report, and nobody would know of the device."""
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    command = [*background._default_command(), "vd0", str(write_fd), "-1"]
    text = msgspec.json.encode(load_config(config))
    done = subprocess.run(command, input=text, pass_fds=[write_fd], capture_output=True, check=False, timeout=30)
    os.close(write_fd)
    assert done.returncode == 1
    assert not (BASE / "vd0").exists()


# -- the log


def test_log_is_bounded(tmp_path: Path) -> None:
    code = f"""
import logging
from pathlib import Path
from vdusefast import logs
logs.LOG_MAX_BYTES = 2000
file = logs.LogFile()
log = logging.getLogger("vdusefast")
log.warning("before")
file.move(Path({str(tmp_path / "log")!r}))
for number in range(100):
    log.warning("message %d %s", number, "x" * 50)
import sys
print("still here", file=sys.stderr)
"""
    with (tmp_path / "first").open("w+b") as first:
        subprocess.run([sys.executable, "-c", code], check=True, timeout=20, stdout=first, stderr=first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "log", "log.1"]
    assert (tmp_path / "log").stat().st_size + (tmp_path / "log.1").stat().st_size < 4500
    assert "before" in (tmp_path / "first").read_text()
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[-1] == "still here"
    assert " WARNING message 99 " in lines[-2]


def test_journal_gets_priorities(tmp_path: Path) -> None:
    code = """
import logging
from vdusefast import logs
with logs.log_to_stderr():
    logging.getLogger("vdusefast").error("two\\nlines")
    logging.getLogger("vdusefast").info("fine")
"""
    with (tmp_path / "journal").open("w+b") as journal:
        status = os.fstat(journal.fileno())
        env = {**os.environ, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        subprocess.run([sys.executable, "-c", code], check=True, timeout=20, stderr=journal, env=env)
    assert (tmp_path / "journal").read_text() == "<3>two\n<3>lines\n<6>fine\n"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=20, capture_output=True, text=True)
    assert done.stderr == "vdusefast: two\nlines\nvdusefast: fine\n"


# -- what is printed


def test_table_is_aligned() -> None:
    assert display.table([["A", "BB"], ["xyz", 1], ["x", 10]], left=(0,)) == "A    BB\nxyz   1\nx    10"


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(0, "0 B"), (512, "512 B"), (1536, "1.5 KiB"), (64 << 20, "64 MiB"), (1 << 60, "1024 PiB")]
)
def test_sizes(size_bytes: int, text: str) -> None:
    assert display.size_text(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (90061, "1 d 1 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert display.duration_text(seconds) == text


@pytest.mark.parametrize(
    ("state", "failure", "queue", "shown"),
    [
        ("running", "", "running", "running"),
        ("running", "queue 0: bad", "running", "failed"),
        ("running", "", "failed", "failed"),
        ("stopping", "queue 0: bad", "failed", "stopping"),
    ],
)
def test_list_shows_what_has_failed(state: str, failure: str, queue: str, shown: str) -> None:
    info = {"name": "vd0", "state": state, "failure": failure, "queues": [{"state": "running"}, {"state": queue}]}
    assert display.list_text([info]).splitlines()[1].split()[:2] == ["vd0", shown]


def test_show_has_what_a_kernel_device_has() -> None:
    queue = {"index": 0, "pid": 5, "cpu": 0, "irq_cpu": -1, "size": 256, "engine": "sync", "state": "failed"}
    counters = {"requests": 10, "bytes_read": 4096, "bytes_written": 0, "errors": 2, "kicks": 3, "irqs": 4}
    text = display.show_text(
        {
            "name": "vd0",
            "state": "running",
            "bus": "virtio",
            "driver": "virtio_vdpa",
            "node": "/dev/vdb",
            "transport": "kernel",
            "api_version": 1,
            "vduse_features": ["SUSPEND"],
            "msg_timeout_s": 90,
            "bounce_size_bytes": 64 << 20,
            "offered_features": ["FLUSH", "MQ"],
            "acked_features": ["FLUSH"],
            "status": 15,
            "status_names": ["DRIVER_OK"],
            "failure": "queue 0: bad",
            "queues": [{**queue, "reason": "bad", **counters}],
        }
    )
    lines = {line.strip().split("  ")[0].strip(): line for line in text.splitlines()}
    assert lines["node"].endswith("/dev/vdb (driver virtio_vdpa)")
    assert lines["transport"].endswith("kernel, VDUSE API 1 with SUSPEND")
    assert lines["acked"].endswith("FLUSH")
    assert lines["not acked"].endswith("MQ")
    assert lines["limits"].endswith("messages 90 s, bounce pages 64 MiB")
    last = text.splitlines()[-1].split()
    assert last == [*"050-", "256", "sync", "failed:", "bad", "10", "4", "KiB", "0", "B", *"234"]


def test_stats_show_latencies_of_what_was_done() -> None:
    ops = {
        "read": {"requests": 3, "bytes": 12, "errors": 0, "latency_ns": {"p50": 1500.0, "p99": 2000.0}},
        "write": {"requests": 0, "bytes": 0, "errors": 0, "latency_ns": {"p50": 0.0, "p99": 0.0}},
    }
    queue = {"index": 0, "pid": 5, "cpu": 0, "engine": "sync", "state": "running", "reason": "", "requests": 3}
    text = display.stats_text({"queues": [{**queue, "ops": ops}], "total": {"requests": 3, "ops": ops}})
    assert text.splitlines()[0].split() == ["queue", "0", "total"]
    assert text.splitlines()[-1].split() == ["read", "3", "12", "0", "1.5", "2.0"]


# -- run directories


def test_held_and_free_directories(tmp_path: Path) -> None:
    with RunDirectory("vd0", tmp_path) as directory:
        assert run_dir.is_held(directory.path)
        assert run_dir.holder_pid(directory.path) == os.getpid()
        assert run_dir.device_names(tmp_path) == ["vd0"]
        directory.release()
        assert not run_dir.is_held(directory.path)
        registry.remove_dead(directory.path)
    assert run_dir.device_names(tmp_path) == []
    assert run_dir.device_names(tmp_path / "none") == []
    assert not run_dir.is_held(tmp_path / "none")
    assert run_dir.holder_pid(tmp_path / "none") == 0


def test_a_look_at_the_lock_does_not_refuse_who_wants_the_name(tmp_path: Path) -> None:
    (tmp_path / "vd0").mkdir(mode=0o700)
    fd = os.open(tmp_path / "vd0/lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_SH)
    threading.Timer(0.01, os.close, (fd,)).start()
    with RunDirectory("vd0", tmp_path) as directory:
        assert directory.path.is_dir()


def test_a_kernel_device_without_a_server_is_destroyed_by_force_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    destroyed: list[str] = []
    monkeypatch.setattr("vdusefast.transport.sysfs.created", lambda name: name == "left")
    monkeypatch.setattr("vdusefast.transport.sysfs.attached", lambda _name: False)
    monkeypatch.setattr("vdusefast.transport.kernel.destroy_device", destroyed.append)
    assert cli.run(["del", "left"]) == 3
    assert "vdusefast del left --force" in capsys.readouterr().err
    assert destroyed == []
    assert cli.run(["del", "left", "--force"]) == 0
    assert destroyed == ["left"]
    assert cli.run(["del", "other", "--force"]) == 3
    monkeypatch.setattr("vdusefast.transport.sysfs.attached", lambda _name: True)
    assert cli.run(["del", "left", "--force"]) == 3
    assert destroyed == ["left"]
