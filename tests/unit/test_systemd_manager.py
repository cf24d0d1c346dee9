"""The unit under a real systemd: a manager of a user, with a made-up device. tests/vm has real ones."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from vdusefast.server.rpc_client import RpcClient
from vdusefast.server.systemd import unit

SYSTEMD = Path("/lib/systemd/systemd")
SCRIPT = Path(__file__).with_name("managed_server.py")
LIMIT_S = 60.0  # for what takes a second, on a busy machine
WATCHDOG_S = 8
# The unit's other keys confine a service: only the system's manager can do that.
KEYS = (
    *("StartLimitIntervalSec", "Type", "NotifyAccess", "KillMode", "Restart", "RestartSec", "ExecStopPost"),
    *("RestartPreventExitStatus", "SuccessExitStatus", "TimeoutAbortSec"),
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def unit_text(base: Path, config: Path) -> str:
    """Return the product's unit with the server of SCRIPT."""
    lines = []
    for line in unit.unit_text("/usr/bin/vdusefast").splitlines():
        if line in ("[Unit]", "[Service]") or line.partition("=")[0] in KEYS:
            lines.append(line.replace("systemctl ", "systemctl --user "))
    for key, mode in (("ExecStart", "serve"), ("ExecReload", "reload")):
        lines.append(f"{key}={sys.executable} {SCRIPT} {mode} {base} {config}")
    return "\n".join([*lines, f"WatchdogSec={WATCHDOG_S}", ""])


class Manager:
    """A systemd of its own, with the service vd0."""

    def __init__(self, directory: Path) -> None:
        self.base = directory / "base"
        self._runtime, units = directory / "runtime", directory / "units"
        for path in (self.base, self._runtime, units):
            path.mkdir(mode=0o700)
        config = directory / "vd0.toml"
        config.write_text(
            '[device]\nname = "vd0"\ntransport = "kernel"\nlock_memory = "off"\n[backend]\nuri = "file:/x"\n'
        )
        (units / "vd0.service").write_text(unit_text(self.base, config))
        self._cgroups = make_cgroups(f"vdusefast-test-{os.getpid()}")
        self._environment = {**os.environ, "XDG_RUNTIME_DIR": str(self._runtime), "SYSTEMD_UNIT_PATH": f"{units}:"}
        into = "".join(f"echo $$ >{path}/cgroup.procs && " for path in self._cgroups)
        booted = (
            "mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system"  # it wants a system that systemd has booted
        )
        self._log = (directory / "log").open("w+")
        self._process = subprocess.Popen(
            ["sh", "-c", f"{into} exec unshare -m sh -c '{booted} && exec {SYSTEMD} --user --log-target=console'"],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )

    def wait_until_started(self) -> None:
        def up() -> bool:
            assert self._process.poll() is None, self.log()
            return self.systemctl("show", "--property=Version").returncode == 0

        wait_for(up)

    def log(self) -> str:
        return os.pread(self._log.fileno(), 1 << 16, 0).decode(errors="replace")

    def systemctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["systemctl", "--user", *words],
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=2 * LIMIT_S,
        )

    def show(self, name: str) -> str:
        return self.systemctl("show", "--value", f"--property={name}", "vd0").stdout.strip()

    def served_by(self, *, but: int = 0) -> int:
        """Return the main process once the service is active with another one than `but`."""
        wait_for(lambda: self.show("SubState") == "running" and int(self.show("MainPID")) not in (0, but))
        return int(self.show("MainPID"))

    def restarts(self) -> int:
        return int(self.show("NRestarts"))

    def close(self) -> None:
        self.systemctl("stop", "vd0")
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(LIMIT_S)
        self._process.kill()
        self._process.wait()
        self._log.close()
        for path in self._cgroups:
            end_cgroup(path)


def end_cgroup(path: Path) -> None:
    """Kill what is left in a group, and remove it with those below."""
    groups = sorted((found.parent for found in path.rglob("cgroup.procs")), key=lambda each: -len(each.parts))
    for group in groups:
        wait_for(lambda group=group: not kill_all(group))  # type: ignore[misc]
        group.rmdir()


def kill_all(group: Path) -> list[str]:
    """Kill the processes of a group, and return those that there were."""
    pids = (group / "cgroup.procs").read_text().split()
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    return pids


def make_cgroups(name: str) -> list[Path]:
    """Make a group for the manager in each hierarchy that systemd uses. Raises OSError."""
    roots = [Path("/sys/fs/cgroup") / kind for kind in ("systemd", "unified")]
    roots = [root for root in roots if (root / "cgroup.procs").exists()] or [Path("/sys/fs/cgroup")]
    made = [root / name for root in roots]
    for path in made:
        path.mkdir()
    return made


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    if os.geteuid() != 0 or not SYSTEMD.exists() or shutil.which("unshare") is None:
        pytest.skip("needs root, systemd and unshare")
    try:
        made = Manager(tmp_path)
    except OSError as error:
        pytest.skip(f"no group of its own for a systemd: {error}")
    try:
        made.wait_until_started()
        yield made
    finally:
        made.close()


def test_reloaded_server_is_the_main_process_in_every_respect(manager: Manager) -> None:
    assert manager.systemctl("start", "vd0").returncode == 0, manager.log()
    old = manager.served_by()
    assert manager.systemctl("reload", "vd0").returncode == 0, manager.log()
    new = manager.served_by(but=old)
    wait_for(lambda: not Path(f"/proc/{old}").exists())
    time.sleep(1.5 * WATCHDOG_S)  # it tells the watchdog that it is well
    assert (manager.served_by(), manager.restarts()) == (new, 0), manager.log()
    os.kill(new, signal.SIGKILL)
    killed = manager.served_by(but=new)
    assert manager.restarts() == 1
    assert manager.systemctl("reload", "vd0").returncode == 0, manager.log()
    stopped = manager.served_by(but=killed)
    # Until then the old one waits for the new one, and would take the device back.
    wait_for(lambda: not Path(f"/proc/{killed}").exists())
    os.kill(stopped, signal.SIGSTOP)
    manager.served_by(but=stopped)
    assert manager.restarts() == 2
    with RpcClient(manager.base / "vd0") as client:
        client.call("delete", {"force": True})
    wait_for(lambda: manager.show("ActiveState") == "inactive")
    assert manager.show("Result") == "success"
    time.sleep(1)
    assert manager.show("ActiveState") == "inactive"  # what was deleted is not served again


def test_reloaded_server_is_asked_to_stop_and_not_killed(manager: Manager) -> None:
    manager.systemctl("start", "vd0")
    old = manager.served_by()
    assert manager.systemctl("reload", "vd0").returncode == 0, manager.log()
    new = manager.served_by(but=old)
    wait_for(lambda: not Path(f"/proc/{old}").exists())
    note = manager.base / "slow"
    note.touch()
    assert manager.systemctl("stop", "vd0").returncode == 0
    wait_for(lambda: not Path(f"/proc/{new}").exists())
    assert note.read_text() == f"pid {new} has let go", manager.log()
    assert manager.show("Result") == "success"


def test_reload_that_is_refused_changes_nothing(manager: Manager) -> None:
    manager.systemctl("start", "vd0")
    pid = manager.served_by()
    (manager.base / "missing").touch()
    assert manager.systemctl("reload", "vd0").returncode == 1
    assert manager.show("StatusText") == f"reload failed: vd0: the store is missing; pid {pid} serves it"
    assert (manager.served_by(), manager.restarts()) == (pid, 0)
    (manager.base / "missing").unlink()
    assert manager.systemctl("reload", "vd0").returncode == 0
    manager.served_by(but=pid)


def test_start_is_tried_until_the_store_is_there_in_growing_pauses(manager: Manager) -> None:
    (manager.base / "missing").touch()
    assert manager.systemctl("start", "vd0").returncode == 1  # the caller learns it at once
    wait_for(lambda: manager.restarts() >= 8)  # more than systemd's own limit, 5 within 10 s
    assert manager.show("ActiveState") != "failed"
    wait_for(lambda: manager.show("SubState") == "stop-post")  # where it pauses
    (manager.base / "missing").unlink()
    manager.served_by()
