"""The guest kit itself: what a command in a guest sees, how it ends, and that nothing stays."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from scenario_guest import RUN

from bench.vm import cache, guest, initramfs, packages
from bench.vm.errors import GuestError, GuestTimeoutError
from bench.vm.kernel_log import findings
from bench.vm.machine import ROOT, Clock, GuestConfig

BOOT = pytest.mark.vm
KERNELS = pytest.mark.parametrize("kernel", cache.KERNELS)
END_LIMIT_S = 10
BOOT_LIMIT_S = 160


@BOOT
@KERNELS
def test_command_runs_as_root_in_the_checkout_with_its_environment(kernel: str, tmp_path: Path) -> None:
    config = GuestConfig(
        kernel=kernel,
        cpus=2,
        disk="64M",
        modules=("null_blk nr_devices=3",),
        results=tmp_path,
        environment={"GREETING": "a 'quoted' one"},
    )
    script = """
        id -u; pwd; echo $GREETING; nproc; command -v python; echo complaint >&2
        echo kept >$VDUSEFAST_VM_RESULTS/file
        blockdev --getsize64 $VDUSEFAST_VM_DISK; ls -d /dev/nullb*
        ls $VDUSEFAST_LIBBLKIO; touch $PWD/written /tmp/written /run/written /dev/shm/written && rm /usr/bin/env
        modprobe -a vduse virtio_vdpa vhost_vdpa ublk_drv nbd loop ext4 xfs && ls /dev/vduse/control
        sleep 1000 & # holds the output open
        exit 77
    """
    outcome, out, err = guest.captured(config, ["sh", "-c", script])
    assert err == "complaint\n"
    assert out.split("\n") == [
        *("0", str(ROOT), "a 'quoted' one", "2", f"{ROOT}/.venv/bin/python"),
        *(str(64 << 20), "/dev/nullb0", "/dev/nullb1", "/dev/nullb2"),
        *(str(cache.libblkio()), "/dev/vduse/control", ""),
    ]
    assert outcome.status == 77
    assert f"Linux version {kernel}" in outcome.kernel_log
    assert findings(outcome.kernel_log) == []
    assert (tmp_path / "file").read_text() == "kept\n"
    assert not (ROOT / "written").exists()
    assert Path("/usr/bin/env").exists()


@BOOT
def test_systemd_runs_the_command_as_a_service_which_ends_the_guest(tmp_path: Path) -> None:
    lines = "[Service]\\nType=oneshot\\nRemainAfterExit=yes\\nExecStart=/bin/true\\n"
    unit = f"printf '{lines}' >/etc/systemd/system/own.service"
    config = GuestConfig(systemd=True, timeout_s=BOOT_LIMIT_S, before=unit, results=tmp_path)
    script = f"""
        cat /proc/1/comm; systemctl start own; systemctl is-active own systemd-udevd systemd-logind dbus
        loginctl --no-legend list-seats; systemctl list-units --failed --no-legend
        echo '{guest.GOING_DOWN}' >/dev/kmsg
        reboot; sleep 1000
    """
    outcome, out, _ = guest.captured(config, ["sh", "-c", script])
    assert out.split() == ["systemd", "active", "active", "active", "active", "seat0"]
    assert (outcome.status, outcome.went_down) == (0, "Restarting system")
    assert 0 < outcome.down_s < BOOT_LIMIT_S
    assert "systemd-shutdown[1]: Rebooting." in outcome.kernel_log
    assert findings(outcome.kernel_log) == []


@BOOT
@pytest.mark.soak
def test_a_command_below_systemd_ends_as_elsewhere() -> None:
    outcome, out, _ = guest.captured(
        GuestConfig(systemd=True, timeout_s=BOOT_LIMIT_S), ["sh", "-c", "echo out; sleep 1000 & exit 77"]
    )
    assert (outcome.status, outcome.went_down, out) == (77, "", "out\n")


@BOOT
def test_much_output_comes_whole_and_in_order() -> None:
    program = "import sys; [sys.stdout.write(f'{n}\\n') for n in range(300000)]; sys.stderr.write('x' * 200000)"
    outcome, out, err = guest.captured(GuestConfig(), ["python", "-c", program])
    assert outcome.status == 0
    assert out == "".join(f"{n}\n" for n in range(300000))
    assert err == "x" * 200000


@BOOT
@pytest.mark.parametrize("clock", ["counted", "steady"])
def test_time_of_a_computation_does_not_depend_on_the_host(clock: Clock) -> None:
    program = "import time; a = time.perf_counter(); sum(range(10**6)); print(time.perf_counter() - a)"
    script = f'python -c "{program}"; python -c "{program}"'
    _, out, _ = guest.captured(GuestConfig(clock=clock, cpus=1), ["sh", "-c", script])
    first_s, second_s = map(float, out.split())
    assert first_s == pytest.approx(second_s, rel=0.1)


@BOOT
def test_time_limit_ends_the_guest_and_says_what_it_last_said() -> None:
    script = "echo before; echo 'to be seen' >/dev/kmsg; sleep 1000"
    out = bytearray()
    started_s = time.monotonic()
    with pytest.raises(GuestTimeoutError, match=r"did not end within 20 s(.|\n)*to be seen") as caught:
        guest.run(GuestConfig(timeout_s=20), ["sh", "-c", script], out.extend)
    assert time.monotonic() - started_s < 20 + END_LIMIT_S
    assert out == b"before\n"
    assert "to be seen" in caught.value.kernel_log


def test_a_kernel_that_dies_while_it_boots_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    died, crashed = GuestError("the guest ended by itself"), GuestError("the guest ended by itself")
    died.died_booting = True
    ends: list[GuestError] = [died] * (guest.BOOT_TRIES - 1)

    def boot(*_args: object) -> str:
        if ends:
            raise ends.pop()
        return "booted"

    monkeypatch.setattr(guest.machine, "check_tools", lambda _config: None)
    monkeypatch.setattr(guest, "_run_once", boot)
    assert guest.run(GuestConfig(), ["true"]) == "booted"
    ends[:] = [died] * guest.BOOT_TRIES
    with pytest.raises(GuestError):
        guest.run(GuestConfig(), ["true"])
    ends[:] = [crashed]  # after its boot: what the command did may not be done twice
    with pytest.raises(GuestError):
        guest.run(GuestConfig(), ["true"])


@BOOT
def test_crash_is_told_with_the_beginning_of_the_kernels_report() -> None:
    with pytest.raises(GuestError, match=r"ended by itself(.|\n)*Kernel panic.*sysrq triggered crash"):
        guest.run(GuestConfig(), ["sh", "-c", "echo c >/proc/sysrq-trigger"])


@BOOT
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_interrupted_run_leaves_nothing(number: signal.Signals, status: int, tmp_path: Path) -> None:
    words = [sys.executable, str(RUN), "--disk", "1G", "--timeout", "50", "--", "sh", "-c", "echo started; sleep 1000"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)}) as process:
        assert process.stdout
        assert process.stdout.readline() == b"started\n"
        started = psutil.Process(process.pid).children(recursive=True)
        assert [child.name() for child in started] == ["qemu-system-x86_64"]
        process.send_signal(number)
        assert process.wait(END_LIMIT_S) == status
    assert psutil.wait_procs(started, END_LIMIT_S)[1] == []
    assert list(tmp_path.iterdir()) == []


@BOOT
def test_command_line_passes_status_streams_and_log_on(tmp_path: Path) -> None:
    """From a checkout that lies below /tmp, which in the guest is another file system."""
    checkout = tmp_path / "checkout"
    shutil.copytree(RUN.parent, checkout / "bench/vm")
    log = tmp_path / "log"
    script = "pwd; ls bench/vm/run; echo complaint >&2; echo 'WARNING: this is a test' >/dev/kmsg; exit $STATUS"
    words = ["bench/vm/run", "--kernel", "7.3", "--check-log", "--log", str(log), "--verbose", "--env"]

    def run(status: int) -> subprocess.CompletedProcess[str]:
        command = [*words, f"STATUS={status}", "--", "sh", "-c", script]
        return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False, timeout=50)

    done = run(3)
    assert done.returncode == 3, done.stderr
    assert done.stdout == f"{checkout}\nbench/vm/run\n"
    assert done.stderr.startswith("complaint\nbench/vm/run: booted in ")
    assert "Linux version 7.3" in log.read_text()
    assert "WARNING: this is a test" in done.stderr
    assert run(0).returncode == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no command"),
        (["--kernel", "2.6", "--", "true"], "invalid choice"),
        (["--results", "/nonexistent", "--", "true"], "/nonexistent is no directory"),
        (["--icount", "--accel", "kvm", "--", "true"], "--clock counted"),
    ],
)
def test_command_line_refuses(words: list[str], said: str) -> None:
    done = subprocess.run([sys.executable, RUN, *words], capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 2
    assert said in done.stderr


LOGS = {
    "warning": "[    5.1] WARNING: CPU: 0 PID: 1 at drivers/vdpa/vdpa_user/vduse_dev.c:1 f+0x1/0x2 [vduse]",
    "cut here": "[    5.1] ------------[ cut here ]------------",
    "trace": "[    5.1] Call Trace:",
    "bug": "[    5.1] BUG: kernel NULL pointer dereference, address: 0000000000000008",
    "bug at": "[    5.1] kernel BUG at fs/inode.c:1!",
    "oops": "[    5.1] Oops: 0002 [#1] PREEMPT SMP NOPTI",
    "protection": "[    5.1] Oops: general protection fault, probably for non-canonical address 0xdead",
    "hung task": "[  125.1] INFO: task kworker/0:1:9 blocked for more than 60 seconds.",
    "soft lockup": "[   50.1] watchdog: BUG: soft lockup - CPU#1 stuck for 22s! [fio:200]",
    "stall": "[   50.1] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
    "circular": "[   50.1] WARNING: possible circular locking dependency detected",
    "refcount": "[   50.1] refcount_t: underflow; use-after-free.",
    "ubsan": "[   50.1] UBSAN: array-index-out-of-bounds in drivers/x.c:1:1",
    "segfault": "[   50.1] python3[200]: segfault at 8 ip 000055d1 sp 00007ffd error 4 in python3.11[55d1+2a0]",
    "trap": "[   50.1] traps: fio[20] general protection fault ip:1 sp:2 error:0 in fio[1+2]",
    "memory": "[   50.1] Out of memory: Killed process 200 (fio) total-vm:1kB",
}
IO_LOGS = {
    "block": "[   50.1] I/O error, dev vda, sector 8 op 0x0:(READ) flags 0x0 phys_seg 1 prio class 2",
    "buffer": "[   50.1] Buffer I/O error on dev vda, logical block 1, lost async page write",
    "ext4": "[   50.1] EXT4-fs error (device vda): ext4_lookup:1: inode #2: comm ls: deleted inode referenced: 3",
    "xfs": '[   50.1] XFS (vda): metadata I/O error in "xfs_imap_to_bp+0x1/0x2 [xfs]" at daddr 0x40 len 32 error 5',
}
CLEAN = """\
[    0.000000] Linux version 6.12.95+deb12-amd64 (debian-kernel@lists.debian.org)
[    0.112969] RCU Tasks Trace: Setting shift to 1 and lim to 1 rcu_task_cb_adjust=1 rcu_task_cpu_ids=2.
[    0.651036] PCI: Using host bridge windows from ACPI; if necessary, use "pci=nocrs" and report a bug
[    0.672002] acpi PNP0A03:00: fail to add MMCONFIG information, can't access extended configuration space
[    1.219528] RAS: Correctable Errors collector initialized.
[    4.801053] XFS (vda): Mounting V5 Filesystem da69de52-395a-4441-b5b8-57db336e12fc
[    5.065874] EXT4-fs (vda): mounted filesystem 48897ed1 r/w with ordered data mode. Quota mode: none.
"""


@pytest.mark.parametrize("line", [*LOGS.values(), *IO_LOGS.values()], ids=[*LOGS, *IO_LOGS])
def test_kernel_log_checker_finds(line: str) -> None:
    assert findings(CLEAN + line + "\n" + CLEAN) == [line]
    assert findings(CLEAN + line, allowed=[r"not there", re.escape(line[12:30])]) == []


@pytest.mark.parametrize("line", IO_LOGS.values(), ids=IO_LOGS)
def test_kernel_log_checker_leaves_io_errors_out_where_they_are_meant(line: str) -> None:
    assert findings(line, io_errors=False) == []


def test_kernel_log_checker_has_nothing_against_a_good_boot() -> None:
    assert findings(CLEAN) == []


@pytest.mark.parametrize("size", [1, 2, 7, 20, 1000])
def test_output_ends_at_the_mark_however_it_arrives(size: int) -> None:
    token = b"\x1e0123456789abcdef\n"
    text = b"\x1e" + token[:5] + b"line\n\x1e\x1e01234" * 20 + b"end"
    stream = text + token + b"not ours"
    got: list[bytes] = []
    output = guest._Output(got.append, token)
    for at in range(0, len(stream), size):
        output.feed(stream[at : at + size])
    assert b"".join(got) == text
    assert output.ended


def test_output_passes_on_at_once_what_cannot_be_the_mark() -> None:
    got: list[bytes] = []
    output = guest._Output(got.append, b"\x1eabc\n")
    output.feed(b"prompt: ")
    output.feed(b"a\x1eab")
    assert b"".join(got) == b"prompt: a"
    output.feed(b"x")
    assert b"".join(got) == b"prompt: a\x1eabx"


@pytest.mark.slow
@pytest.mark.parametrize(("ci", "said"), [("false", "1 skipped"), ("true", "1 error")])
def test_missing_program_is_named_and_fails_in_ci(ci: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import shutil\nwhich = shutil.which\n"
        "shutil.which = lambda name, *a, **k: None if name.startswith('qemu-system') else which(name, *a, **k)\n"
    )
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "test_much_output"]
    env = {**os.environ, "CI": ci, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=50)
    assert said in done.stdout
    assert "no guest without qemu-system-x86_64; ./bootstrap.sh test" in done.stdout
    assert done.returncode == (1 if ci == "true" else 0)


@BOOT
def test_initramfs_is_an_archive_that_cpio_reads() -> None:
    archive = initramfs.archive({"init": b"#!/bin/sh\n", "boot/a.ko": b"odd"}, executables=["init"])
    words = ["busybox", "cpio", "-t"]
    listed = subprocess.run(words, input=archive, capture_output=True, check=True, timeout=20)
    assert listed.stdout.split() == [b"boot", b"dev", b"dev/console", b"init", b"boot/a.ko"]


def make_slowly(ready: threading.Event, go_on: threading.Event, made: list[str]) -> Callable[[Path], None]:
    def make(into: Path) -> None:
        (into / "half").write_text("half")
        ready.set()
        assert go_on.wait(END_LIMIT_S)
        (into / "whole").write_text("whole")
        made.append(into.name)

    return make


def test_cache_entry_appears_whole_and_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VDUSEFAST_VM_CACHE", str(tmp_path / "cache"))
    ready, go_on, made = threading.Event(), threading.Event(), []
    make = make_slowly(ready, go_on, made)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(cache._entry("x", make, "recipe"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert ready.wait(END_LIMIT_S)
    assert list((tmp_path / "cache").glob("x-*")) == []
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert found[0] == found[1]
    assert (found[0] / "whole").exists()


def test_cache_keeps_nothing_half_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VDUSEFAST_VM_CACHE", str(tmp_path))

    def fail(into: Path) -> None:
        (into / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache._entry("x", fail, "recipe")
    (tmp_path / ".x-left").mkdir()  # by one that was killed
    assert [path.name for path in tmp_path.iterdir() if path.name != ".x-left"] == ["x.lock"]
    made = cache._entry("x", lambda into: (into / "whole").touch(), "recipe")
    assert sorted(path.name for path in tmp_path.iterdir()) == [made.name, "x.lock"]


def test_cached_kernel_is_made_anew_only_for_another_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VDUSEFAST_VM_CACHE", str(tmp_path))
    entries = [cache._entry("x", lambda into: None, recipe) for recipe in ("a", "a", "b")]
    assert entries[0] == entries[1] != entries[2]


TREES = [("trixie", ("busybox",))]  # conftest.py fetches them


@BOOT
def test_tree_has_a_package_with_what_it_depends_on() -> None:
    root = cache.tree(*TREES[0])
    assert (root / "lib").readlink() == Path("usr/lib")
    assert not (root / "usr/share/doc").exists()
    # By its own C library: the one of this machine may be older than the program.
    loader = [str(root / "lib64/ld-linux-x86-64.so.2"), "--library-path", str(root / "lib/x86_64-linux-gnu")]
    words = [*loader, str(root / "bin/busybox"), "echo", "runs"]
    assert subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout == "runs\n"


def test_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VDUSEFAST_VM_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(GuestError, match=r"cannot write to the cache .*file/cache.*VDUSEFAST_VM_CACHE"):
        cache._entry("x", lambda into: None, "recipe")


def test_mirror_is_the_one_of_the_machines_own_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apt = tmp_path / "apt-get"
    apt.write_text(
        "#!/bin/sh\necho http://one.test/other stable-thing main\necho http://one.test/debian-security "
        "bookworm-security main\necho http://two.test/debian/ bookworm main\n"
    )
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("VDUSEFAST_VM_MIRROR", raising=False)
    assert packages.debian_mirror() == "http://two.test/debian/"
    monkeypatch.setenv("VDUSEFAST_VM_MIRROR", "http://three.test/debian")
    assert packages.debian_mirror() == "http://three.test/debian"
    monkeypatch.delenv("VDUSEFAST_VM_MIRROR")
    apt.write_text("#!/bin/sh\necho http://one.test/ubuntu noble main\n")
    with pytest.raises(GuestError, match="VDUSEFAST_VM_MIRROR"):
        packages.debian_mirror()
