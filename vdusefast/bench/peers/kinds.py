"""The ways to serve a file that are compared, each a small class."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdusefast.base.json_types import Json
from vdusefast.bench.peers import kernel_nbd as nbd
from vdusefast.bench.peers.peer import Peer, ServerProcess, first_line, run_tool
from vdusefast.errors import VdusefastError

if TYPE_CHECKING:
    from vdusefast.api import Device

QUEUE_SIZE = 256
CONFIGFS = Path("/sys/kernel/config")
CONTROL_NODE = "/dev/vduse/control"
PAGE_CACHE = "page cache"
UBLK_SERVERS = ("ublk", "rublk")
COUNTERS = ("requests", "batches", "kicks", "irqs", "sleeps")  # that a report tells of us


class Vdusefast(Peer):
    """Ourselves, by the kernel transport."""

    name = "vdusefast"
    title = "vdusefast, kernel transport, a worker process a queue"
    cache = f"writeback ({PAGE_CACHE})"
    modules = ("vduse", "virtio_blk", "virtio_vdpa")
    overrides: Mapping[str, Any] = {}  # of the configuration; see peers_variants

    @classmethod
    def missing_in_kernel(cls) -> str:
        """See `Peer`."""
        return vduse_missing()

    def _start(self) -> str:
        from vdusefast.api import Device
        from vdusefast.config import make_config
        from vdusefast.host.cpu_topology import format_cpu_list

        setup = self.setup
        # Not pinned by default: the CPU that feeds a queue is the wrong one for its worker, and fio may run on any.
        cpus = [setup.cpus[i % len(setup.cpus)] for i in range(setup.queues)] if setup.cpus else ""
        settings: dict[str, Any] = {"queues": setup.queues, "cpus": cpus, **self.overrides}
        store = settings.pop("uri", "file:")
        config = make_config(name=f"peers-{setup.tag}", uri=self._uri(store), transport="kernel", **settings)
        self._device: Device = Device(config)
        self._device.start()
        self._stack.callback(self._device.stop)
        pinned = cpus if isinstance(cpus, str) else format_cpu_list(cpus)
        arguments = ["vdusefast", "add", config.device.name, "--backend", config.backend.uri]
        self.commands.append([*arguments, "--queues", str(setup.queues), *(["--cpus", pinned] if pinned else [])])
        return self._device.node

    def _uri(self, store: str) -> str:
        """Return the URI of what is served, of a kind of store: "file:"."""
        return f"{store}{self.setup.path if store == 'file:' else self.setup.size_bytes}"

    def check(self) -> None:
        """See `Peer`; a worker or a ring that failed."""
        super().check()
        if self._device.failure is not None:
            raise self._device.failure

    def rest(self) -> None:
        """See `Peer`; the workers of a device that polls without end would not sleep."""
        self._signal_workers(signal.SIGSTOP)

    def wake(self) -> None:
        """See `Peer`."""
        self._signal_workers(signal.SIGCONT)

    def _signal_workers(self, number: int) -> None:
        for pid in (queue.pid for queue in self._device.queues() if queue.pid > 0):
            with contextlib.suppress(ProcessLookupError):  # `check` tells of one that has ended
                os.kill(pid, number)

    def counters(self) -> dict[str, int]:
        """See `Peer`."""
        counted = self._device.stats().counters
        return {name: counted[name] for name in COUNTERS}

    def stop(self, *, force: bool = False) -> None:
        """See `Peer`."""
        if self.node:
            self.wake()
            if force:
                self._device.stop(force=True)
        super().stop()

    def version(self) -> str:
        """See `Peer`."""
        from vdusefast import __version__

        return f"vdusefast {__version__}"

    def describe(self) -> Json:
        """See `Peer`; with the device's own account of itself."""
        return super().describe() | {"device": self._device.info()}


class QemuStorageDaemon(Peer):
    """QEMU's block layer as a VDUSE device: the one that does the same thing as we do."""

    name = "qsd"
    title = "qemu-storage-daemon, vduse-blk with an iothread"
    cache = f"cache.direct=off ({PAGE_CACHE}), aio=threads"
    modules = Vdusefast.modules
    tools = ("qemu-storage-daemon",)
    packages = ("qemu-system-common",)

    @classmethod
    def missing_in_kernel(cls) -> str:
        """See `Peer`."""
        return vduse_missing()

    def _start(self) -> str:
        from vdusefast.host import sysfs

        if self.setup.queues > 1 and not sysfs.all_cpus_online():
            # virtio_vdpa gives each queue a share of all CPUs that there could be, and an interrupt for a queue whose
            # share is absent loops in the kernel. We set the shares right; this server leaves them.
            raise VdusefastError("with CPUs that are offline and several queues it locks the kernel up; use --queues 1")
        self._device = f"qsd-{self.setup.tag}"
        self._server = self._serve()
        self._stack.callback(self._remove)  # before the server, which has to answer meanwhile
        self._server.wait_for("VDUSE device", lambda: Path(f"/dev/vduse/{self._device}").exists())
        self._server.wait_for("device that can be attached", self._attach)
        driver = sysfs.BUS_DRIVERS["virtio"]
        if sysfs.bound_driver(self._device) != driver:
            sysfs.bind(self._device, driver)
        return self._server.wait_for("block device", lambda: sysfs.node(self._device))

    def _attach(self) -> bool:
        """Attach the device; False while its server has not set all queues up, which comes after the node."""
        from vdusefast.host import vdpa

        try:
            vdpa.device_new(self._device)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return True

    def _serve(self) -> ServerProcess:
        file = {"driver": "file", "node-name": "f", "filename": str(self.setup.path), "aio": "threads"}
        export = {"type": "vduse-blk", "id": "e", "name": self._device, "node-name": "f", "iothread": "t0"}
        queues = {"num-queues": self.setup.queues, "queue-size": QUEUE_SIZE, "writable": True}
        arguments = [self.tools[0], "--object", "iothread,id=t0", "--blockdev", json.dumps(file)]
        return self.serve([*arguments, "--export", json.dumps(export | queues)])

    def _remove(self) -> None:
        """Take the device off the bus, then its server, then what that forgets when it ends."""
        from vdusefast.host import sysfs, vdpa
        from vdusefast.transport import uapi

        if not self._server.alive and sysfs.attached(self._device):
            # Detaching waits for requests that only a server can answer; a new one takes over where the old one died.
            self._server = self._serve()
        if sysfs.attached(self._device):
            vdpa.device_delete(self._device)
        self._server.end()
        if sysfs.created(self._device):
            name = self._device.encode().ljust(uapi.VDUSE_NAME_MAX_BYTES, bytes(1))
            fd = os.open(CONTROL_NODE, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(fd, uapi.VDUSE_DESTROY_DEV, name)
            finally:
                os.close(fd)
        Path(f"/tmp/vduse-blk-{self._device}").unlink(missing_ok=True)  # noqa: S108 (its place, not ours)


class Loop(Peer):
    """The kernel's own driver for files as disks."""

    name = "loop"
    title = "loop driver"
    cache = f"direct-io=off ({PAGE_CACHE})"
    modules = ("loop",)
    tools = ("losetup",)
    packages = ("mount",)

    @classmethod
    def missing_in_kernel(cls) -> str:
        """See `Peer`."""
        return "" if os.path.exists("/dev/loop-control") else "the kernel has no loop driver: modprobe loop"

    def _start(self) -> str:
        node = self.run(["losetup", "--find", "--show", "--direct-io=off", str(self.setup.path)])
        self._stack.callback(run_tool, ["losetup", "--detach", node])
        return node

    def version(self) -> str:
        """See `Peer`."""
        return ""


class _Nbd(Peer):
    """The kernel's nbd driver and a server, connected by Unix sockets, as many as we have queues."""

    modules = ("nbd",)

    @classmethod
    def missing_in_kernel(cls) -> str:
        """See `Peer`."""
        return "" if nbd.usable() else "the kernel has no nbd driver: modprobe nbd"

    @abstractmethod
    def _arguments(self, path: Path) -> list[str]:
        """Return the command that serves the file at the socket `path`."""

    def _start(self) -> str:
        path = self.setup.directory / f"{self.name}.sock"
        server = self.serve(self._arguments(path))
        index, export = server.wait_for("connection", lambda: self._connect(path))
        self._stack.callback(nbd.disconnect, index)
        if export.size_bytes != self.setup.size_bytes:
            raise VdusefastError(f"{self.name}: the server exports {export.size_bytes} bytes")
        return f"/dev/nbd{index}"

    def _connect(self, path: Path) -> tuple[int, nbd.Export] | None:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            return nbd.connect(path, self.setup.queues)
        return None  # the server does not listen yet


class QemuNbd(_Nbd):
    """QEMU's block layer behind a socket."""

    name = "qemu-nbd"
    title = "kernel nbd with qemu-nbd"
    cache = f"cache=writeback ({PAGE_CACHE}), aio=threads"
    tools = ("qemu-nbd",)
    packages = ("qemu-utils",)

    def _arguments(self, path: Path) -> list[str]:
        arguments = ["qemu-nbd", "--persistent", f"--shared={self.setup.queues}", "--format=raw", "--cache=writeback"]
        return [*arguments, f"--socket={path}", str(self.setup.path)]


def nbdkit_arguments(socket: Path, file: Path) -> list[str]:
    """Return the command by which nbdkit's file plugin serves a file at a socket."""
    return ["nbdkit", "--foreground", f"--unix={socket}", "file", f"file={file}"]


class Nbdkit(_Nbd):
    """nbdkit's file plugin behind a socket."""

    name = "nbdkit"
    title = "kernel nbd with nbdkit's file plugin"
    cache = PAGE_CACHE
    tools = ("nbdkit",)

    def _arguments(self, path: Path) -> list[str]:
        return nbdkit_arguments(path, self.setup.path)


class VdusefastNbd(Vdusefast):
    """Ourselves in front of the same server as the kernel's nbd has in `Nbdkit`."""

    name = "vdusefast-nbd"
    title = "vdusefast, kernel transport, over nbdkit's file plugin"
    cache = PAGE_CACHE
    tools = ("nbdkit",)

    @classmethod
    def missing_in_kernel(cls) -> str:
        """See `Peer`; our own library is no matter of the kernel's, but as much needed."""
        from vdusefast.backends.nbd import usability

        usable = usability()
        return super().missing_in_kernel() if usable.ok else f"{usable.text}; {usable.remedy}"

    def _uri(self, store: str) -> str:
        """See `Vdusefast`; starts the server."""
        path = self.setup.directory / f"{self.name}.sock"
        server = self.serve(nbdkit_arguments(path, self.setup.path))
        server.wait_for("socket", path.exists)
        return f"nbd+unix:///?socket={path}"


class Ublk(Peer):
    """A user-space server over io_uring's passthrough commands, if one is installed."""

    name = "ublk"
    title = "ublk, loop target"
    cache = PAGE_CACHE
    modules = ("ublk_drv",)

    @classmethod
    def missing(cls) -> str:
        """See `Peer`."""
        if not any(shutil.which(server) for server in UBLK_SERVERS):
            return f"no ublk server is installed ({' or '.join(UBLK_SERVERS)} on PATH)"
        return cls.missing_in_kernel()

    @classmethod
    def missing_in_kernel(cls) -> str:
        """See `Peer`."""
        return "" if os.path.exists("/dev/ublk-control") else "the kernel has no ublk driver: modprobe ublk_drv"

    def _start(self) -> str:
        index = _free_number("/dev/ublkc")
        server = next(server for server in UBLK_SERVERS if shutil.which(server))
        kind = ["loop"] if server == "rublk" else ["-t", "loop"]
        options = ["-n", str(index), "-q", str(self.setup.queues), "-d", "128", "-f", str(self.setup.path)]
        self.run([server, "add", *kind, *options])
        self._stack.callback(run_tool, [server, "del", "-n", str(index)])
        return f"/dev/ublkb{index}"

    def version(self) -> str:
        """See `Peer`."""
        return next((first_line([server, "--version"]) for server in UBLK_SERVERS if shutil.which(server)), "")


class NullBlk(Peer):
    """A disk that moves no data and answers at once: what the block layer and fio leave room for."""

    name = "null_blk"
    title = "null_blk, the ceiling: it moves no data"
    cache = "none"
    modules = ("configfs", "null_blk")
    keeps_data = False

    @classmethod
    def missing_in_kernel(cls) -> str:
        """See `Peer`."""
        return "" if os.path.isdir("/sys/module/null_blk") else "the kernel has no null_blk: modprobe null_blk"

    def _start(self) -> str:
        group = CONFIGFS / "nullb"
        if not group.is_dir():
            self.run(["mount", "-t", "configfs", "none", str(CONFIGFS)])
            self._stack.callback(run_tool, ["umount", str(CONFIGFS)])
        item = group / f"nullb-{self.setup.tag}"
        item.mkdir()
        self._stack.callback(item.rmdir)
        settings = {"size": self.setup.size_bytes >> 20, "blocksize": 512, "queue_mode": 2, "irqmode": 0}
        for key, value in (settings | {"submit_queues": self.setup.queues, "memory_backed": 0, "power": 1}).items():
            (item / key).write_text(f"{value}\n")
        self._stack.callback((item / "power").write_text, "0\n")
        number = (item / "index").read_text().strip()
        # Newer kernels name the disk after the directory.
        names = (item.name, f"nullb{number}")
        return next((f"/dev/{name}" for name in names if os.path.exists(f"/sys/block/{name}")), f"/dev/{names[1]}")


ALL: tuple[type[Peer], ...] = (Vdusefast, QemuStorageDaemon, Loop, QemuNbd, Nbdkit, VdusefastNbd, Ublk, NullBlk)
BY_NAME = {peer.name: peer for peer in ALL}


def vduse_missing() -> str:
    """Return why this kernel cannot show a VDUSE device as a disk, "" when it can."""
    from vdusefast.doctor import kernel_usable

    usable, reason = kernel_usable()
    return "" if usable else reason


def _free_number(prefix: str) -> int:
    """Return the lowest number for which there is no node yet."""
    number = 0
    while os.path.exists(f"{prefix}{number}"):
        number += 1
    return number
