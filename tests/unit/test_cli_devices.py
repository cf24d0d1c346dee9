"""The commands about devices, with real servers on the loopback transport: from `add` to `del`, and what goes wrong."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served import BASE, CONFIG, ended, vdusefast

from vdusefast import errors
from vdusefast.cli import app as cli
from vdusefast.host import run_dirs
from vdusefast.server import registry
from vdusefast.server.rpc import CLIENT_COUNT_MAX
from vdusefast.server.rpc_client import RpcClient
from vdusefast.state import orphans
from vdusefast.state.run_dir import RunDirectory


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "vd0.toml"
    path.write_text(CONFIG)
    return str(path)


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
    if orphans.in_kernel("vd0") or not (BASE / "vd0").exists():
        return
    registry.remove_dead(BASE / "vd0")


@pytest.mark.slow
def test_life_of_a_device_in_the_background(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = vdusefast("add", config)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "vd0: no node, the transport is loopback\n"
    assert sorted(os.listdir(BASE / "vd0")) == ["lock", "log", "pages", "socket", "state"]
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_serve_tells_systemd_a_deleted_device_from_one_to_be_served_again(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its exit status, which the unit names; without systemd it is a success like any other."""
    for variable, deleted, status in (("@nobody", True, 7), ("@nobody", False, 0), ("", True, 0)):
        monkeypatch.setenv("NOTIFY_SOCKET", variable)
        command = [sys.executable, "-m", "vdusefast", "serve", config]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            monkeypatch.delenv("NOTIFY_SOCKET")
            assert registry.describe("vd0")["systemd"] == bool(variable)
            if deleted:
                assert cli.run(["del", "vd0"]) == 0
            else:
                process.terminate()
            assert process.wait(20) == status


def computing_s(run: Callable[[], subprocess.CompletedProcess[Any]]) -> float:
    """Return how much CPU time a process takes that ends well."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run().returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
def test_list_is_quick_and_loads_little(added: int) -> None:
    """Less than eight bare starts of Python, 0.15 s where one takes 20 ms: of computing, as it waits for nothing."""
    ours, bare = [], []
    for _ in range(3):
        ours.append(computing_s(lambda: vdusefast("list")))
        bare.append(computing_s(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True, timeout=20)))
    assert min(ours) < 8 * min(bare)
    code = (
        "import sys, vdusefast.cli.app\nassert vdusefast.cli.app.run(['list']) == 0\n"
        "heavy = {'numpy', 'psutil', 'rich', 'asyncio', 'ctypes', 'subprocess'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20, stdout=subprocess.DEVNULL)


@pytest.mark.slow
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


def test_kernel_device_of_a_loopback_devices_name_is_none_of_ours(
    added: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither while the loopback device lives nor when its server has died."""
    monkeypatch.setattr("vdusefast.host.sysfs.attached", lambda name: True)
    monkeypatch.setattr("vdusefast.host.sysfs.created", lambda name: True)
    monkeypatch.setattr("vdusefast.host.sysfs.node", lambda name: "/dev/vda")
    monkeypatch.setattr("vdusefast.transport.kernel_control.destroy_device", lambda name: pytest.fail("destroyed"))
    os.kill(added, signal.SIGKILL)
    assert ended(added)
    assert cli.run(["list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["vd0", "dead", "-"]
    assert cli.run(["del", "vd0"]) == 0
    RunDirectory("vd0", BASE, "loopback").close()


@pytest.mark.slow
def test_loopback_device_is_removed_although_the_kernel_has_one_of_its_name(
    added: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("vdusefast.host.sysfs.attached", lambda name: True)
        assert cli.run(["del", "vd0"]) == 0


@pytest.mark.slow
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
    monkeypatch.setattr(run_dirs, "SYSTEM_BASE", tmp_path / "system")
    monkeypatch.setattr(registry, "RpcClient", refuse)
    for own in (tmp_path / "own", None):
        monkeypatch.setattr(run_dirs, "base_directory", lambda own=own: own)
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
    monkeypatch.setattr("vdusefast.host.sysfs.created", lambda name: True)
    monkeypatch.setattr("vdusefast.host.sysfs.attached", lambda name: False)
    monkeypatch.setattr("vdusefast.transport.kernel_control.destroy_device", lambda name: pytest.fail("destroyed"))
    assert cli.run(["del", name, "--force"]) == 3


@pytest.mark.slow
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
    """Without a control node, `serve` names the modules to load."""
    monkeypatch.setattr("vdusefast.transport.kernel_control.CONTROL_NODE", "/nowhere/control")
    assert cli.run(["serve", "vd0", "--backend", "null:1M"]) == 5
    err = capsys.readouterr().err
    assert err.startswith("vdusefast: device vd0: the kernel has no vduse")
    assert "modprobe -a vduse" in err
    assert not os.listdir(BASE)


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["0<&- 1>&- 2>&-", "0<&-", "1>&-", "0<&- 2>&-"])
def test_closed_standard_descriptors_harm_nothing(config: str, closed: str) -> None:
    words = shlex.join([sys.executable, "-m", "vdusefast", "add", config])
    done = subprocess.run(["sh", "-c", f"exec {closed}; exec {words}"], check=False, timeout=60)
    assert done.returncode == 0
    assert registry.describe("vd0")["state"] == "attached"
    assert cli.run(["del", "vd0"]) == 0


@pytest.mark.slow
def test_node_that_cannot_be_printed_is_told(config: str) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "vdusefast", "add", config]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert re.fullmatch(
        r"vdusefast: vd0: is served by pid \d+, which cannot be printed: No space left on device\n", done.stderr
    )
    assert cli.run(["del", "vd0"]) == 0
