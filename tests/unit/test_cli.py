"""The command line: its exit statuses and one-line errors, and what `check` finds on machines of many kinds."""

from __future__ import annotations

import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import vdusefast
from vdusefast import doctor, errors
from vdusefast.cli import app as cli


def make_root(root: Path) -> Path:
    """Write the parts of / that `check` reads, as on a machine without anything."""
    (root / "sys/devices/system/cpu").mkdir(parents=True)
    (root / "sys/devices/system/cpu/online").write_text("0-1\n")
    (root / "sys/module").mkdir()
    (root / "proc/sys/kernel").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 1 kB\nHugePages_Total:      12\n")
    (root / f"lib/modules/{os.uname().release}").mkdir(parents=True)
    (root / "dev").mkdir()
    return root


def finding(root: Path, name: str) -> doctor.Finding:
    (found,) = [each for each in doctor.examine(root) if each.name == name]
    return found


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return such a /, with extensions that load (their own tests start processes)."""
    monkeypatch.setattr(
        doctor, "_extension", lambda module, name: doctor.Finding(name, True, f"{module} loads", needed=True)
    )
    return make_root(tmp_path)


def test_version_is_the_packages() -> None:
    command = [sys.executable, "-m", "vdusefast", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"vdusefast {vdusefast.__version__}\n", "")


def test_check_says_what_works_here(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    assert cli.run(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {line[3:].split("  ")[0].strip() for line in lines if not line.startswith(" ")}
    assert names >= {"python", "datapath", "cpus", "io_uring", "kernel", "vduse", "vhost_vdpa", "/dev/vduse"}


def test_check_prints_json(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    assert cli.run(["check", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["loopback"] is True
    assert report["version"] == vdusefast.__version__
    assert {"name", "ok", "text", "remedy", "needed"} == set(report["findings"][0])


def test_check_ends_with_5_where_nothing_can_be_served(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = doctor.Finding("datapath", False, "cannot be loaded", "make build", needed=True)
    monkeypatch.setattr(doctor, "examine", lambda: [missing])
    assert cli.run(["check"]) == 5
    out, err = capsys.readouterr()
    assert "NO datapath" in out
    assert "remedy: make build" in out
    assert err == "vdusefast: devices cannot be served here: datapath; see the remedies above\n"
    assert cli.run(["check", "--json"]) == 5
    assert json.loads(capsys.readouterr().out)["loopback"] is False


def test_whole_check_runs_as_a_command() -> None:
    command = [sys.executable, "-m", "vdusefast", "check", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["loopback"] else 5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["chekc"], "No such command 'chekc'"),
        (["check", "--jsn"], "No such option"),
        (["check", "x"], "unexpected extra"),
    ],
)
def test_usage_error_is_one_line_and_2(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(args) == 2
    err = capsys.readouterr().err
    assert err.startswith("vdusefast: ")
    assert message in err
    assert err.count("\n") == 1


def test_no_command_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 2
    assert "check" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.VdusefastError("x"), 1),
        (errors.ConfigError("x"), 2),
        (errors.DeviceNotFoundError("x"), 3),
        (errors.DeviceBusyError("x"), 4),
        (errors.KernelSupportError("x"), 5),
        (errors.TimedOutError("x"), 6),
        (errors.BackendError("x"), 1),
        (errors.WorkerError("x"), 1),
        (KeyboardInterrupt(), 130),
        (OSError("x"), 1),
    ],
)
def test_exit_status_is_the_errors(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def examine() -> None:
        raise error

    monkeypatch.setattr(doctor, "examine", examine)
    assert cli.run(["check"]) == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines == [f"vdusefast: {str(error) or 'interrupted'}"]


@pytest.mark.parametrize("words", [["list"], ["check"], ["--help"], ["add", "--help"]])
def test_output_that_cannot_be_written_is_one_line_and_1(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "vdusefast", *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (1, "vdusefast: No space left on device\n")


def test_without_anybody_to_tell_the_exit_status_tells() -> None:
    words = "exec >&- 2>&-; exec " + shlex.join([sys.executable, "-m", "vdusefast", "show", "nothing"])
    assert subprocess.run(["sh", "-c", words], check=False, timeout=60).returncode == 3


def test_bare_import_and_version_load_nothing_heavy() -> None:
    code = (
        "import sys, vdusefast; vdusefast.ConfigError; vdusefast.__version__\n"
        "heavy = {'numpy', 'psutil', 'msgspec', 'click', 'rich', 'asyncio', 'ctypes'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import vdusefast.cli.app\n"
        "heavy = {'numpy', 'psutil', 'msgspec', 'rich', 'asyncio'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)


def test_public_names_are_all_there() -> None:
    assert sorted(vdusefast.__all__) == dir(vdusefast)
    for name in vdusefast.__all__:
        assert getattr(vdusefast, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        vdusefast.nothing  # noqa: B018


def test_extension_that_is_missing_or_broken_is_told_with_its_error() -> None:
    found = doctor._extension("_absent", "datapath")
    assert not found.ok
    assert "No module named 'vdusefast._absent'" in found.text
    assert "make build" in found.remedy
    assert doctor._extension("errors", "datapath").ok


def test_extension_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("python", 1)

    monkeypatch.setattr(subprocess, "run", hang)
    assert "takes over" in doctor._extension("errors", "datapath").text


def test_modules_are_found_loaded_built_in_and_on_disk(root: Path) -> None:
    assert "not in this kernel" in finding(root, "vduse").text
    modules = root / f"lib/modules/{os.uname().release}"
    (modules / "modules.dep").write_text("kernel/drivers/vdpa/vdpa_user/vduse.ko.xz: kernel/drivers/vhost/vringh.ko\n")
    (modules / "modules.builtin").write_text("kernel/drivers/vdpa/vdpa.ko\nkernel/drivers/virtio/virtio-vdpa.ko\n")
    assert finding(root, "vduse") == doctor.Finding(
        "vduse", False, "not loaded: devices served from user space", "modprobe vduse"
    )
    assert finding(root, "vdpa").text.startswith("built in")
    assert finding(root, "virtio_vdpa").ok
    (root / "sys/module/vduse").mkdir()
    assert finding(root, "vduse").text.startswith("loaded")


def test_control_node_is_looked_at(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert finding(root, "/dev/vduse").remedy == "modprobe vduse, where the kernel has it"
    (root / "dev/vduse").mkdir()
    (root / "dev/vduse/control").touch()
    assert finding(root, "/dev/vduse").ok
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "no permission" in doctor._control_node(root).text


@pytest.mark.parametrize(
    ("release", "ok"), [("6.12.95-amd64", True), ("5.15.0", True), ("5.10.0-1", False), ("7", True)]
)
def test_kernel_is_judged_by_its_release(release: str, ok: bool) -> None:
    assert doctor._kernel(release).ok is ok


@pytest.mark.parametrize(
    ("release", "without"),
    [("5.15.0", "user_memory (Linux 6.0), bounce"), ("6.1.0-50-amd64", "bounce_size_bytes and irq_cpu (Linux 6.4)")],
)
def test_kernel_that_lacks_what_came_later_is_told(release: str, without: str) -> None:
    assert f"{release}, without {without}" in doctor._kernel(release).text
    assert doctor._kernel("6.12.95-amd64").text == "6.12.95-amd64"


def test_huge_pages_are_counted(root: Path) -> None:
    shmem = root / "sys/kernel/mm/transparent_hugepage/shmem_enabled"
    shmem.parent.mkdir(parents=True)
    shmem.write_text("always within_size advise [never] deny force\n")
    assert finding(root, "huge pages").text == "12 reserved, transparent ones for shared memory: never"


def test_single_cpu_is_told_with_a_remedy(root: Path) -> None:
    (root / "sys/devices/system/cpu/online").write_text("0\n")
    found = finding(root, "cpus")
    assert not found.ok
    assert "allow two or more" in found.remedy


@pytest.mark.parametrize(
    ("code", "sysctl", "remedy"),
    [(1, "2", "sysctl kernel.io_uring_disabled=0"), (38, "0", "seccomp"), (12, "0", "ulimit -l")],
)
def test_io_uring_that_is_refused_has_a_remedy(
    root: Path, code: int, sysctl: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "proc/sys/kernel/io_uring_disabled").write_text(f"{sysctl}\n")

    class Libc:
        def syscall(self, *_: object) -> int:
            return -1

    monkeypatch.setattr(doctor.ctypes, "CDLL", lambda *_, **__: Libc())
    monkeypatch.setattr(doctor.ctypes, "get_errno", lambda: code)
    found = doctor._io_uring(root)
    assert not found.ok
    assert remedy in found.remedy
    assert os.strerror(code) in found.text
    assert "engine auto takes sync" in found.text


def test_run_directory_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor._run_directory().ok
    monkeypatch.setenv("VDUSEFAST_RUN_DIR", str(tmp_path / "a/b"))
    assert doctor._run_directory().ok
    (tmp_path / "file").touch()
    monkeypatch.setenv("VDUSEFAST_RUN_DIR", str(tmp_path / "file/b"))
    assert "set VDUSEFAST_RUN_DIR" in doctor._run_directory().remedy
    monkeypatch.setattr("vdusefast.host.run_dirs.base_directory", lambda: None)
    assert doctor._run_directory().ok


def test_limit_of_locked_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 << 20, 8 << 20))
    assert doctor._memlock().text == "limit 8192 KiB"
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert doctor._memlock().text == "limit unlimited"


# -- the kernel transport


@pytest.fixture
def kernel_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a / where the kernel transport can be used, with a kernel that answers."""
    for trace in doctor.MODULE_TRACES.values():
        (root / trace).mkdir(parents=True, exist_ok=True)
    (root / "dev/vduse").mkdir()
    (root / "dev/vduse/control").touch()
    (root / "proc/self").mkdir()
    (root / "proc/self/status").write_text("Name:\tx\nCapEff:\t000001ffffffffff\n")
    monkeypatch.setattr("vdusefast.transport.kernel_control.probe_control", lambda: (1, 0b11))
    monkeypatch.setattr("vdusefast.host.vdpa.family_id", lambda: 21)
    return root


def test_kernel_transport_that_works_is_told(kernel_root: Path) -> None:
    assert finding(kernel_root, "VDUSE").text == "API version 1, features QUEUE_READY SUSPEND"
    assert finding(kernel_root, "netlink vdpa").text == "answers (family 21)"
    assert finding(kernel_root, "virtio_blk").text.startswith("loaded")
    assert doctor.kernel_usable(kernel_root) == (True, "API version 1, features QUEUE_READY SUSPEND")
    found = finding(kernel_root, "kernel transport")
    assert (found.ok, found.text) == (True, "usable: API version 1, features QUEUE_READY SUSPEND")
    assert doctor.to_dict(doctor.examine(kernel_root))["kernel_transport"] is True


def test_kernel_without_the_modules_says_which(kernel_root: Path) -> None:
    (kernel_root / "sys/bus/vdpa/drivers/virtio_vdpa").rmdir()
    usable, reason = doctor.kernel_usable(kernel_root)
    assert not usable
    assert reason == f"this kernel, {os.uname().release}, has no virtio_vdpa"
    modules = kernel_root / f"lib/modules/{os.uname().release}/modules.dep"
    modules.write_text("kernel/drivers/virtio/virtio_vdpa.ko.xz:\n")
    assert doctor.kernel_usable(kernel_root) == (False, "not loaded: virtio_vdpa; modprobe -a virtio_vdpa")
    found = finding(kernel_root, "kernel transport")
    assert (found.ok, found.text) == (False, "not usable: not loaded: virtio_vdpa; modprobe -a virtio_vdpa")
    assert doctor.to_dict(doctor.examine(kernel_root))["kernel_transport"] is False


def refuse(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("where", "error", "reason"),
    [
        (
            "transport.kernel_control.probe_control",
            errors.VdusefastError("no permission for X: be root"),
            "no permission for X: be root",
        ),
        (
            "host.vdpa.family_id",
            errors.KernelSupportError("x"),
            "does not show in this network namespace; run in the machine's own",
        ),
        (
            "host.vdpa.family_id",
            PermissionError(1, "Operation not permitted"),
            "Operation not permitted; allow AF_NETLINK",
        ),
    ],
)
def test_kernel_that_refuses_is_told_with_the_remedy(
    kernel_root: Path, where: str, error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"vdusefast.{where}", lambda: refuse(error))
    usable, text = doctor.kernel_usable(kernel_root)
    assert not usable
    assert reason in text


def test_lack_of_rights_is_told(kernel_root: Path) -> None:
    (kernel_root / "proc/self/status").write_text("CapEff:\t0000000000000000\n")
    assert doctor.kernel_usable(kernel_root) == (
        False,
        "no CAP_NET_ADMIN: devices cannot be attached to the vDPA bus; be root; in a container: --cap-add=NET_ADMIN",
    )
