"""Inside of a guest whose process 1 is systemd, as root: devices that vdusefast@NAME.service serves.

    systemd_service.py prepare            # before systemd starts
    systemd_service.py RESULTS [CHECK...] # a line of JSON a check in RESULTS/checks.jsonl, then a reboot

vd0 has its store on a mount of its own, and a file system that fstab mounts and a verified load works on. The store of
`late` comes late. The file system of `byhand` is mounted by hand.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[2])]

import guest  # noqa: E402
import systemd_more  # noqa: E402
from scenario_documents import SHELL, blocks_of  # noqa: E402
from steady_load import SteadyLoad  # noqa: E402

DISK = "/dev/vda"
STORE, DATA, BY_HAND = Path("/srv/store"), Path("/mnt/data"), Path("/mnt/hand")
LATE = Path("/srv/late.img")
LATE_S = 30.0  # since its server was tried first
UNITS = Path("/etc/systemd/system")
VD0 = "vdusefast@vd0.service"
LIMIT_S = 240.0  # for what takes a second or two, on a loaded host
FSTAB = f"""{DISK} {STORE} ext4 defaults 0 2
LABEL=data {DATA} ext4 _netdev,x-systemd.after={VD0},x-systemd.device-timeout=300 0 2
"""
WATCHDOG_S = 15
guest.COMMAND_S = LIMIT_S


def systemctl(*words: str) -> str:
    """Run systemctl. Raises AssertionError with what it says when it fails."""
    return guest.sh("systemctl", *words, timeout_s=LIMIT_S)


def show(name: str, unit: str = VD0) -> str:
    """Return a property of a unit."""
    return systemctl("show", "--value", f"--property={name}", unit).strip()


def main_pid() -> int:
    return int(show("MainPID"))


def restarts() -> int:
    return int(show("NRestarts"))


def wait_for_server(but: int) -> int:
    """Return the pid of the server that is there once the service is active with another one than `but`."""

    def served() -> bool:
        return show("ActiveState") == "active" and main_pid() not in (0, but)

    guest.wait_for(f"another server than {but}", served, LIMIT_S)
    return main_pid()


# -- before systemd


def prepare() -> None:
    """Make images, configurations, units and fstab."""
    for path in (STORE, DATA, BY_HAND, Path("/etc/vdusefast"), Path("/run/image")):
        path.mkdir(parents=True, exist_ok=True)
    for name in ("vd0", "byhand"):
        guest.sh("truncate", "-s", "48M", f"/run/image/{name}.img")
    guest.sh("mkfs.ext4", "-q", "-L", "data", "/run/image/vd0.img")
    guest.sh("modprobe", "virtio_blk")
    guest.wait_for(DISK, Path(DISK).exists)
    guest.sh("mkfs.ext4", "-q", "-d", "/run/image", DISK)
    uris = {"vd0": f"file:{STORE}/vd0.img", "byhand": f"file:{STORE}/byhand.img", "late": f"file:{LATE}"}
    for name, uri in uris.items():
        Path(f"/etc/vdusefast/{name}.toml").write_text(f'[device]\nname = "{name}"\n[backend]\nuri = "{uri}"\n')
        unit = guest.attempt_in_copy("systemd-unit", name)
        assert unit.returncode == 0, unit.stderr
        (UNITS / f"vdusefast@{name}.service").write_text(unit.stdout)
        if name == "vd0":
            guest.sh("systemctl", "enable", VD0)
    drop_ins = UNITS / f"{VD0}.d"
    drop_ins.mkdir()
    (drop_ins / "watchdog.conf").write_text(f"[Service]\nWatchdogSec={WATCHDOG_S}\n")
    Path("/etc/fstab").write_text(FSTAB)


# -- checks, in this order; each continues where the previous one ended


class Checks:
    """The checks of the services. Each returns what it saw."""

    def __init__(self) -> None:
        self._mount_id = ""
        self._load: SteadyLoad | None = None

    def boot(self) -> str:
        """Everything comes up by itself, in order, and systemd has nothing against the units."""
        guest.wait_for("vd0", lambda: show("ActiveState") == "active", LIMIT_S)
        guest.wait_for("the mount of fstab", lambda: os.path.ismount(DATA), LIMIT_S)
        self._mount_id = mount_id()
        self._load = SteadyLoad(DATA, Path("/run"))
        self._wait_for_load()
        names = [str(path) for path in UNITS.glob("vdusefast@*.service")]
        said = guest.attempt("systemd-analyze", "verify", "--man=no", *names, timeout_s=LIMIT_S).stderr
        assert "vdusefast" not in said, said
        assert show("Requires", "mnt-data.mount").find("vdusefast") < 0
        return systemctl("list-units", "vdusefast@*", "mnt-data.mount", "--no-legend", "--plain")

    def document(self) -> str:
        """The lines of docs/operate.md that install a unit leave a service that runs as it is."""
        pid = main_pid()
        (lines,) = blocks_of("Start at boot", "docs/operate.md")
        said = guest.sh("bash", "-c", SHELL + lines, guest.CHECKOUT, timeout_s=LIMIT_S)
        assert said == (UNITS / VD0).read_text(), said
        assert (main_pid(), mount_id()) == (pid, self._mount_id)
        return lines

    def kill(self) -> str:
        """The main process is killed."""
        return self._survives(lambda pid: os.kill(pid, signal.SIGKILL), restarted=True)

    def reload(self) -> str:
        """`systemctl reload` replaces the server: it is the main process of the same run of the service."""
        seen = self._survives(lambda _pid: systemctl("reload", VD0), restarted=False)
        pid, count = main_pid(), restarts()
        time.sleep(WATCHDOG_S * 1.5)
        assert (main_pid(), restarts()) == (pid, count), "it does not tell the watchdog that it is well"
        return seen

    def watchdog(self) -> str:
        """A server that hangs is replaced, also one that came by a reload."""
        return self._survives(lambda pid: os.kill(pid, signal.SIGSTOP), restarted=True)

    def command(self) -> str:
        """`vdusefast restart` does what systemctl reload does."""
        return self._survives(lambda _pid: guest.vdusefast("restart", "vd0"), restarted=False)

    def kill_after_reload(self) -> str:
        """systemd sees the death of a main process that it has not started itself."""
        return self._survives(lambda pid: os.kill(pid, signal.SIGKILL), restarted=True)

    def restart(self) -> str:
        """`systemctl restart`."""
        return self._survives(lambda _pid: systemctl("restart", VD0), restarted=False)

    def refused_reload(self) -> str:
        """A new server that cannot serve changes nothing, and its reason is said."""
        config = Path("/etc/vdusefast/vd0.toml")
        text = config.read_text()
        config.write_text(text.replace("vd0.img", "none.img"))
        pid, says = main_pid(), "was made with file:.*vd0.img, and would now get file:.*none.img"
        try:
            said = guest.refused("restart", "vd0", status=1, says=says, by_command=True)
        finally:
            config.write_text(text)
        assert f"pid {pid} serves it" in said, said
        assert (main_pid(), show("ActiveState"), mount_id()) == (pid, "active", self._mount_id)
        self._wait_for_load()
        return said

    def late_store(self) -> str:
        """A store that comes late is served, without anybody's help."""
        unit = "vdusefast@late.service"
        began_s = time.monotonic()
        said = guest.attempt("systemctl", "start", unit, timeout_s=LIMIT_S)
        assert said.returncode == 1, said  # the caller learns it
        guest.wait_for("30 s", lambda: time.monotonic() > began_s + LATE_S, LIMIT_S)
        tries = int(show("NRestarts", unit))
        assert 1 <= tries < 2 * LATE_S, tries  # under emulation a server needs many seconds until it knows
        assert show("ActiveState", unit) != "failed"
        guest.sh("truncate", "-s", "16M", LATE)
        began_s = time.monotonic()
        guest.wait_for("the late one", lambda: show("ActiveState", unit) == "active", LIMIT_S)
        return f"{tries} tries before, served {time.monotonic() - began_s:.1f} s after its store came"

    def load(self) -> str:
        """Check that all data written meanwhile is there."""
        assert self._load is not None
        done = self._load.done()
        self._load.stop()
        assert mount_id() == self._mount_id
        return f"{done} requests"

    def added(self) -> str:
        """A server that `vdusefast add` started."""
        return systemd_more.added()

    def by_hand(self) -> str:
        """A file system is mounted by hand, as it will be when the machine goes down."""
        systemctl("start", "vdusefast@byhand.service")
        node = guest.info("byhand")["node"]
        guest.sh("mkfs.ext4", "-q", node)
        guest.sh("mount", node, BY_HAND)
        (BY_HAND / "file").write_bytes(os.urandom(1 << 20))
        return str(node)

    def _survives(self, blow: Callable[[int], object], *, restarted: bool) -> str:
        """Do something to the server: the file system stays mounted, and the load continues after a pause."""
        assert self._load is not None
        self._load.longest_pause_s()
        pid, count = main_pid(), restarts()
        began_s = time.monotonic()
        blow(pid)
        wait_for_server(pid)
        took_s = time.monotonic() - began_s
        self._wait_for_load()
        pause_s = self._load.longest_pause_s()
        assert mount_id() == self._mount_id, "it was unmounted"
        # systemctl restart sets the count to zero
        assert restarts() == (count + 1 if restarted else restarts() and count), (count, restarts())
        assert pause_s < LIMIT_S, f"a pause of {pause_s:.1f} s"
        return f"served again after {took_s:.1f} s; longest pause {pause_s:.2f} s"

    def _wait_for_load(self) -> None:
        assert self._load is not None
        before = self._load.done()
        guest.wait_for(
            "the load",
            lambda: all(now > then + 20 for now, then in zip(self._load.done(), before, strict=True)),  # type: ignore[union-attr]
            LIMIT_S,
        )


ORDER = (
    *("boot", "document", "kill", "reload", "watchdog", "command", "kill_after_reload", "restart", "refused_reload"),
    *("late_store", "load", "added", "by_hand"),
)
SHORT = ("boot", "document", "kill", "reload", "load")


def mount_id() -> str:
    """Return the kernel's number of the mount of fstab: another one after it was mounted again."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words = line.split()
        if words[4] == str(DATA):
            return words[0]
    raise AssertionError(f"{DATA} is not mounted")


def run(results: Path, names: list[str]) -> None:
    """Run the checks, and reboot."""
    checks = Checks()
    with (results / "checks.jsonl").open("w") as lines:
        for name in names or ORDER:
            began_s = time.monotonic()
            try:
                ok, detail = True, getattr(checks, name)()
            except Exception:
                ok, detail = False, traceback.format_exc()
            result = {"check": name, "ok": ok, "detail": detail, "took_s": round(time.monotonic() - began_s, 1)}
            print(json.dumps(result), flush=True)
            print(json.dumps(result), file=lines, flush=True)
            if name == "boot" and not ok:
                break  # nothing else could be checked
    subprocess.run(["sync"], check=True)
    Path("/dev/kmsg").write_text("guest: going down\n")
    subprocess.run(["systemctl", "reboot"], check=True)
    time.sleep(LIMIT_S)


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        prepare()
    else:
        run(Path(sys.argv[1]), sys.argv[2:])
