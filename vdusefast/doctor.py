"""What `vdusefast check` looks at: each finding says what works here, what does not, and the remedy."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import vdusefast
from vdusefast.backends import BACKENDS, plugin_module
from vdusefast.errors import VdusefastError
from vdusefast.host import containers, reclaim

KERNEL_MODULES = {
    "vdpa": "the vDPA bus",
    "vduse": "devices served from user space",
    "virtio_vdpa": "such devices as disks of this machine",
    "vhost_vdpa": "such devices for virtual machines",
    "virtio_blk": "virtio block devices",
}
# Where a module shows itself when it is built in and has no parameters.
MODULE_TRACES = {
    "vdpa": "sys/bus/vdpa",
    "vduse": "sys/class/vduse",
    "virtio_vdpa": "sys/bus/vdpa/drivers/virtio_vdpa",
    "vhost_vdpa": "sys/bus/vdpa/drivers/vhost_vdpa",
    "virtio_blk": "sys/bus/virtio/drivers/virtio_blk",
}
CAP_NET_ADMIN = 12  # linux/capability.h
KERNEL_MIN = (5, 15)  # the first with VDUSE
# What came later, and is done without.
KERNEL_LATER = (
    ((6, 0), "user_memory (Linux 6.0)"),
    ((6, 4), "bounce_size_bytes and irq_cpu (Linux 6.4)"),
)
SYS_IO_URING_SETUP = 425  # the same on every architecture
IMPORT_TIMEOUT_S = 20


@dataclass(frozen=True)
class Finding:
    """One line of the report. `needed` marks what no device can be served without, `ok` whether it works."""

    name: str
    ok: bool
    text: str
    remedy: str = ""
    needed: bool = False


def examine(root: Path = Path("/")) -> list[Finding]:
    """Look at this machine. `root` stands in for / in tests, for /proc, /sys, /dev and /lib/modules."""
    release = os.uname().release
    return [
        _python(),
        _extension("worker._datapath", "datapath"),
        _extension("driver._driver", "loopback driver"),
        _run_directory(),
        _cpus(root),
        _io_uring(root),
        *_backends(),
        _memlock(),
        _reclaim(),
        _hugepages(root),
        _kernel(release),
        *(_module(name, purpose, release, root) for name, purpose in KERNEL_MODULES.items()),
        _control_node(root),
        _vduse(root),
        _netlink(root),
        _net_admin(root),
        _kernel_transport(root),
    ]


def kernel_usable(root: Path = Path("/")) -> tuple[bool, str]:
    """Return whether a device with a node /dev/vdX can be made here, and the reason in one line."""
    release = os.uname().release
    missing = [name for name in ("vduse", "virtio_vdpa", "virtio_blk") if not _is_loaded(name, root)]
    absent = [name for name in missing if not _module(name, "", release, root).remedy.startswith("modprobe")]
    if absent:
        return False, f"this kernel, {release}, has no {', '.join(absent)}"
    if missing:
        return False, f"not loaded: {', '.join(missing)}; modprobe -a {' '.join(missing)}"
    for look in (_control_node, _vduse, _netlink, _net_admin):
        finding = look(root)
        if not finding.ok:
            return False, f"{finding.text}; {finding.remedy}" if finding.remedy else finding.text
    return True, _vduse(root).text


def to_dict(findings: list[Finding]) -> dict[str, Any]:
    """Return the report as plain values for JSON."""
    return {
        "version": vdusefast.__version__,
        "kernel": os.uname().release,
        "loopback": all(finding.ok for finding in findings if finding.needed),
        "kernel_transport": all(finding.ok for finding in findings if finding.name == "kernel transport"),
        "findings": [asdict(finding) for finding in findings],
    }


def _python() -> Finding:
    version = ".".join(str(part) for part in sys.version_info[:3])
    return Finding("python", True, f"{version} at {sys.executable}, vdusefast {vdusefast.__version__}", needed=True)


def _extension(module: str, name: str) -> Finding:
    """Try the import in a process of its own: a library that is missing must not end this one."""
    command = [sys.executable, "-c", f"import vdusefast.{module}"]
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=IMPORT_TIMEOUT_S,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finding(name, False, f"importing vdusefast.{module} takes over {IMPORT_TIMEOUT_S} s", needed=True)
    if done.returncode == 0:
        return Finding(name, True, "extension built and loads", needed=True)
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    remedy = "in the source tree: make build; else: pip install --force-reinstall vdusefast"
    return Finding(name, False, f"the extension cannot be loaded: {lines[-1]}", remedy, needed=True)


def _backends() -> list[Finding]:
    """Look at each backend that needs more than the core."""
    found = []
    for registration in BACKENDS:
        if not registration.plugin:
            continue
        usable = plugin_module(registration.example).usability()
        found.append(Finding(f"backend {registration.schemes[0]}", usable.ok, usable.text, usable.remedy))
    return found


def _run_directory() -> Finding:
    from vdusefast.host.run_dirs import base_directory

    base = base_directory()
    if base is None:
        return Finding(
            "run directory", True, f"a private one below {tempfile.gettempdir()} for each process", needed=True
        )
    nearest = next(path for path in (base.absolute(), *base.absolute().parents) if path.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        return Finding("run directory", True, str(base), needed=True)
    remedy = "set VDUSEFAST_RUN_DIR to a directory of yours"
    return Finding("run directory", False, f"{base} cannot be written", remedy, needed=True)


def _cpus(root: Path) -> Finding:
    from vdusefast.host import cpu_topology

    try:
        topology = cpu_topology.read_topology(root / "sys")
        order = cpu_topology.plan(len(topology.allowed), topology)
    except VdusefastError as error:
        return Finding("cpus", False, str(error))
    text = (
        f"{len(topology.cpus)} online ({cpu_topology.format_cpu_list(topology.online)}) on {topology.core_count} "
        f"cores, allowed here {cpu_topology.format_cpu_list(topology.allowed)}, queues are placed on "
        f"{','.join(map(str, order))}"
    )
    if len(order) > 1:
        return Finding("cpus", True, text)
    return Finding("cpus", False, text, "a worker that polls wants a CPU of its own; allow two or more, or poll_us = 0")


def _io_uring(root: Path) -> Finding:
    sysctl = root / "proc/sys/kernel/io_uring_disabled"
    disabled = sysctl.read_text().strip() if sysctl.exists() else "0"
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(ctypes.c_long(SYS_IO_URING_SETUP), ctypes.c_uint(1), ctypes.create_string_buffer(120))
    if fd >= 0:
        os.close(fd)
        return Finding("io_uring", True, f"usable (kernel.io_uring_disabled = {disabled})")
    code = ctypes.get_errno()
    text = f"refused: {os.strerror(code)} (kernel.io_uring_disabled = {disabled}); engine auto takes sync"
    if disabled != "0":
        return Finding("io_uring", False, text, "sysctl kernel.io_uring_disabled=0")
    if code == errno.ENOMEM:
        return Finding("io_uring", False, text, "raise the limit of locked memory: ulimit -l")
    return Finding("io_uring", False, text, "allow io_uring_setup in the seccomp profile of this container or service")


def _memlock() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    text = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft >> 10} KiB"
    return Finding("locked memory", True, f"limit {text}")


def _reclaim() -> Finding:
    if reclaim.can_mark_io_flusher():
        return Finding("memory reclaim", True, "servers can be marked as I/O flushers (CAP_SYS_RESOURCE)")
    text = "servers cannot be marked as I/O flushers: buffered writes to a disk of this machine crawl"
    return Finding("memory reclaim", False, text, "be root, or give CAP_SYS_RESOURCE to the container or service")


def _hugepages(root: Path) -> Finding:
    reserved = "0"
    meminfo = root / "proc/meminfo"
    for line in meminfo.read_text().splitlines() if meminfo.exists() else []:
        if line.startswith("HugePages_Total:"):
            reserved = line.split()[1]
    shmem = root / "sys/kernel/mm/transparent_hugepage/shmem_enabled"
    chosen = [word for word in (shmem.read_text().split() if shmem.exists() else []) if word.startswith("[")]
    shared = chosen[0].strip("[]") if chosen else "absent"
    return Finding("huge pages", True, f"{reserved} reserved, transparent ones for shared memory: {shared}")


def _kernel(release: str) -> Finding:
    parts = [int("".join(c for c in part if c.isdigit()) or 0) for part in release.split("-")[0].split(".")[:2]]
    if tuple(parts) >= KERNEL_MIN:
        lacks = [text for since, text in KERNEL_LATER if tuple(parts) < since]
        return Finding("kernel", True, f"{release}, without {', '.join(lacks)}" if lacks else release)
    wanted = ".".join(map(str, KERNEL_MIN))
    return Finding("kernel", False, f"{release} has no VDUSE", f"the kernel transport needs Linux {wanted} or newer")


def _module(name: str, purpose: str, release: str, root: Path) -> Finding:
    if _is_loaded(name, root):
        return Finding(name, True, f"loaded: {purpose}")
    modules = root / "lib/modules" / release
    for index, text in (("modules.builtin", "built in"), ("modules.dep", "not loaded")):
        listed = modules / index
        if listed.exists() and _lists_module(listed.read_text(), name):
            remedy = "" if text == "built in" else f"modprobe {name}"
            return Finding(name, not remedy, f"{text}: {purpose}", remedy)
    remedy = "a kernel with CONFIG_VDPA, VDPA_USER, VIRTIO_VDPA, VHOST_VDPA; in Debian 12: one of bookworm-backports"
    return Finding(name, False, f"not in this kernel: {purpose}", remedy)


def _is_loaded(name: str, root: Path) -> bool:
    return (root / "sys/module" / name).is_dir() or (root / MODULE_TRACES[name]).is_dir()


def _lists_module(index: str, name: str) -> bool:
    """Return whether a file of /lib/modules lists the module; file names may have - for _ and be compressed."""
    paths = (line.split(":")[0] for line in index.splitlines())
    return any(path.rpartition("/")[2].partition(".ko")[0].replace("-", "_") == name for path in paths)


def _control_node(root: Path) -> Finding:
    node = root / "dev/vduse/control"
    if not node.exists() and (root / "sys/class/vduse/control").exists():
        return Finding(
            "/dev/vduse",
            False,
            f"not in this /dev, though the kernel has it; see {containers.DOCUMENT}",
            "start the container with --volume=/dev/vduse:/dev/vduse",
        )
    if not node.exists():
        return Finding(
            "/dev/vduse",
            False,
            "absent; the kernel transport cannot be used",
            "modprobe vduse, where the kernel has it",
        )
    if not os.access(node, os.R_OK | os.W_OK):
        return Finding("/dev/vduse", False, f"no permission for {node}", "be root, or change its owner by a udev rule")
    return Finding("/dev/vduse", True, f"{node} can be opened")


def _vduse(root: Path) -> Finding:
    """Ask the control node what it can do."""
    from vdusefast.transport import kernel_control, uapi

    if not (root / "dev/vduse/control").exists():
        return Finding("VDUSE", False, "cannot be asked: there is no /dev/vduse/control")
    try:
        api_version, features = kernel_control.probe_control()
    except VdusefastError as error:
        return Finding("VDUSE", False, str(error))
    names = " ".join(uapi.vduse_feature_names(features)) or "none"
    return Finding("VDUSE", True, f"API version {api_version}, features {names}")


def _netlink(root: Path) -> Finding:
    """Look for the netlink family by which devices come onto the vDPA bus."""
    from vdusefast.host import vdpa

    if not (root / "sys/bus/vdpa").is_dir():
        return Finding("netlink vdpa", False, "absent: the vDPA bus is not loaded", "modprobe vduse")
    try:
        number = vdpa.family_id()
    except VdusefastError:
        remedy = "run in the machine's own network namespace; in a container: --network=host"
        return Finding("netlink vdpa", False, "the family vdpa does not show in this network namespace", remedy)
    except OSError as error:
        remedy = "allow AF_NETLINK in the sandbox of this container or service"
        return Finding("netlink vdpa", False, f"netlink is refused: {error.strerror}", remedy)
    return Finding("netlink vdpa", True, f"answers (family {number})")


def _net_admin(root: Path) -> Finding:
    """Look for the right to add devices to the bus."""
    status = root / "proc/self/status"
    lines = status.read_text().splitlines() if status.exists() else []
    effective = next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), 0)
    if effective >> CAP_NET_ADMIN & 1 and not containers.is_initial_user_namespace():
        text = "CAP_NET_ADMIN in a user namespace: devices cannot be attached to the vDPA bus"
        return Finding("permission", False, text, "run it without a user namespace (as root's container)")
    if effective >> CAP_NET_ADMIN & 1:
        return Finding("permission", True, "CAP_NET_ADMIN: devices can be attached to the vDPA bus")
    text = "no CAP_NET_ADMIN: devices cannot be attached to the vDPA bus"
    return Finding("permission", False, text, "be root; in a container: --cap-add=NET_ADMIN")


def _kernel_transport(root: Path) -> Finding:
    usable, reason = kernel_usable(root)
    return Finding("kernel transport", usable, f"{'usable' if usable else 'not usable'}: {reason}")
