"""The kernel transport: a device of /dev/vduse, which the kernel shows to its own drivers over the vDPA bus.

Source: Linux 7.3, include/uapi/linux/vduse.h and drivers/vdpa/vdpa_user/vduse_dev.c.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from vdusefast.base.deadline import limit
from vdusefast.base.kinds import Bus, TransportKind
from vdusefast.errors import ConfigError, DeviceBusyError, KernelSupportError, TimedOutError, VdusefastError
from vdusefast.host import containers, node_users, sysfs, vdpa
from vdusefast.transport import DeviceBrokenError, DeviceSpec, TransportError, WorkerPort, kernel_control, uapi
from vdusefast.transport.uapi import Request, Response, VqInfo
from vdusefast.transport.user_memory import UserMemory

BOUNCE_PAGES = "the kernel's bounce pages"
KERNEL_BOUNCE_SIZE_BYTES = 64 << 20

REGION_COUNT_MAX = 1024

NODE_OWN_DEV_WAIT_S = 0.3

# A disk's driver sends no message but when it comes and goes. When it goes without our doing, most often the machine is
# shut down: Linux 7.3 resets every device then, one after the other, and waits for servers that are dead or stopped.
REST_MSG_TIMEOUT_S = 2

DRIVER_OK_WAIT_S = 0.05  # the kernel processes our answer a moment after we have written it

_U64 = struct.Struct("=Q")
_U32 = struct.Struct("=I")
_T = TypeVar("_T")


@dataclass(frozen=True)
class KernelOptions:
    """How the kernel is to treat the device.

    bus: `virtio` for /dev/vdX, `vhost` for /dev/vhost-vdpa-N. irq_cpus: one entry a queue, None = any CPU.
    bounce_size_min_bytes: enough for a kernel before 6.4, which has KERNEL_BOUNCE_SIZE_BYTES and no other size.
    user_memory: register user memory in place of its bounce pages, if it supports that; bus `virtio` has these.
    scheduler: I/O scheduler of a new disk, "kernel" = the kernel's default.
    api_version, vduse_features: those that a reopened device was created with, which the kernel does not report.
    """

    bus: Bus = Bus.VIRTIO
    msg_timeout_s: int = 90
    bounce_size_bytes: int = KERNEL_BOUNCE_SIZE_BYTES
    bounce_size_min_bytes: int = 0
    attach_timeout_s: float = 30.0
    irq_cpus: tuple[int | None, ...] = ()
    user_memory: bool = False
    scheduler: str = "none"
    api_version: int = 0
    vduse_features: int = 0


class KernelTransport:
    """The device's side of a VDUSE device; see `Transport` for the methods."""

    kind = TransportKind.KERNEL
    keeps = True

    def __init__(self, options: KernelOptions | None = None):
        """Prepare; nothing is opened before `create` or `reopen`."""
        self.options = options or KernelOptions()
        self.memory_text = BOUNCE_PAGES if self.options.bus == Bus.VIRTIO else "the client's own"
        self.msg_timeout_s = float(self.options.msg_timeout_s)
        self.api_version = self.options.api_version
        self.vduse_features = self.options.vduse_features
        self.irq_cpus = self.options.irq_cpus
        self.name = ""
        self._fd = -1
        self._user_memory: UserMemory | None = None
        self._created = False
        self._attached = False
        self._rotational = -1

    @property
    def node(self) -> str:
        """The node by which the device is used, "" while no driver has it."""
        return sysfs.node(self.name) if self.name else ""

    @property
    def node_number(self) -> str:
        """The number of that node, such as "254:16"."""
        return sysfs.node_number(self.name) if self.name else ""

    @property
    def driver(self) -> str:
        """The bus driver that has the device, "" when none has."""
        return sysfs.bound_driver(self.name) if self.name else ""

    @property
    def bounce_size_bytes(self) -> int:
        """The size of the kernel's bounce pages, of an existing device."""
        can_choose = sysfs.has_attribute(self.name, "bounce_size")
        return self.options.bounce_size_bytes if can_choose else KERNEL_BOUNCE_SIZE_BYTES

    def create(self, spec: DeviceSpec) -> None:
        """Make /dev/vduse/NAME with its queues and settings."""
        self._check_drivers(spec.name)
        control = kernel_control.open_control()
        try:
            self.api_version, self.vduse_features = kernel_control.negotiate(control)
            kernel_control.create_device(control, spec, self.api_version)
            self.name, self._created, self._rotational = spec.name, True, spec.rotational
        finally:
            os.close(control)
        try:
            self._fd = kernel_control.open_device(spec.name)
            for index in range(spec.queue_count):
                self._ioctl(uapi.VDUSE_VQ_SETUP, uapi.VQ_CONFIG.pack(index, spec.queue_size_max, 0, 0))
            self._set_attributes(new=True)
            self._make_user_memory()
        except OSError as error:
            raise self._set_up_error(error) from error

    def reopen(self, spec: DeviceSpec) -> None:
        """Adopt /dev/vduse/NAME, with the settings of its driver and of its last server."""
        fd = kernel_control.reopen_device(spec.name)
        self.name, self._fd = spec.name, fd
        try:
            self._check_whole()
            self._set_attributes(new=False)
            self._make_user_memory()
        except BaseException as error:
            self.close(keep=True)
            if isinstance(error, OSError):
                raise self._set_up_error(error) from error
            raise
        self._created, self._attached = True, sysfs.attached(spec.name)

    def check(self, spec: DeviceSpec) -> None:
        """Raise the errors of `reopen` that can be seen while another server has the device."""
        if not sysfs.created(spec.name):
            raise TransportError(f"device {spec.name}: cannot be adopted: the kernel has no /dev/vduse/{spec.name}")
        self.name = spec.name
        self._check_attributes(self._settings(new=False))

    def driver_status(self) -> int:
        """Deduce the device status from other calls, as the kernel has none that returns it.

        The features are those that the driver wrote just before FEATURES_OK, and zero after a reset. The kernel accepts
        an interrupt from DRIVER_OK on, and a spurious one is harmless. A queue with a client's eventfd accepts one at
        any time, so a client gets the interrupt of the configuration space.
        """
        if not self.acked_features():
            return 0
        status = uapi.VIRTIO_CONFIG_S_ACKNOWLEDGE | uapi.VIRTIO_CONFIG_S_DRIVER | uapi.VIRTIO_CONFIG_S_FEATURES_OK
        deadline = time.monotonic() + DRIVER_OK_WAIT_S
        while True:
            try:
                self.inject_config_irq() if self.options.bus == Bus.VHOST else self.inject_irq(0)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            else:
                return status | uapi.VIRTIO_CONFIG_S_DRIVER_OK
            if time.monotonic() > deadline:
                return status
            time.sleep(kernel_control.NODE_LOOK_S)

    async def attach(self) -> None:
        """Put the device on the vDPA bus, bind it to the configured driver, and wait until its node is there.

        Of a reopened device, only the steps that the previous server has not done.

        Raises TransportError, KernelSupportError, TimedOutError.
        """
        limit_s = self.options.attach_timeout_s
        driver = sysfs.BUS_DRIVERS[self.options.bus]
        try:
            async with limit(limit_s):
                new = not self._attached
                if new:
                    await self._put_on_bus()
                if self.driver != driver:
                    await _in_thread(sysfs.bind, self.name, driver)
                while not self.node:
                    await asyncio.sleep(kernel_control.NODE_LOOK_S)
                if new and self.options.bus == Bus.VIRTIO and self.options.scheduler != "kernel":
                    await _in_thread(sysfs.set_scheduler, self.name, self.options.scheduler)
                if new and self.options.bus == Bus.VIRTIO and self._rotational >= 0:
                    await _in_thread(sysfs.set_rotational, self.name, self._rotational)
                self._wait_for_messages(rest=True)
        except TimeoutError:
            raise TimedOutError(self._describe_timeout(driver, limit_s)) from None
        except OSError as error:
            raise self._attach_error(error) from error
        # A /dev that is not the machine's never has the node, unless a program there makes it.
        patience = time.monotonic() + NODE_OWN_DEV_WAIT_S
        while not sysfs.node_here(self.name) and time.monotonic() < patience:
            await asyncio.sleep(kernel_control.NODE_LOOK_S)

    async def detach(self) -> None:
        """Unbind the device from its driver, which waits for its requests, and then remove it from the bus.

        In two steps, because removal holds a lock that every other vDPA command of the machine needs. The kernel would
        wait without limit for a client of vhost-vdpa: DeviceBusyError names it then, and the device stays.
        """
        if not self._attached:
            return
        if self.driver == sysfs.BUS_DRIVERS[Bus.VHOST]:
            # Not in this thread: opening such a node may reset the device, and this thread answers that message.
            users = await self._vhost_users()
            if users:
                raise DeviceBusyError(
                    f"device {self.name}: {self.node} is {node_users.describe(users)}, which the kernel would wait "
                    f"for: the device stays in the kernel; end its client, then: vdpa dev del {self.name}"
                )
        try:
            self._wait_for_messages(rest=False)
            await _in_thread(sysfs.unbind, self.name)
            await _in_thread(vdpa.device_delete, self.name)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise TransportError(f"device {self.name}: cannot be detached: {error.strerror}") from error
        self._attached = False

    async def _vhost_users(self) -> list[str]:
        try:
            return await _in_thread(node_users.find_users, self.node)
        except OSError as error:
            raise TransportError(f"device {self.name}: cannot see who uses it: {error.strerror}") from error

    async def _put_on_bus(self) -> None:
        self._attached = True  # also when this is cut short
        try:
            await _in_thread(vdpa.device_new, self.name)
        except (OSError, VdusefastError):
            self._attached = False
            raise

    def message_fd(self) -> int:
        """Return the descriptor of /dev/vduse/NAME."""
        return self._fd

    def receive(self) -> Request | None:
        """Return the next message, None when there is none."""
        try:
            packet = os.read(self._fd, uapi.REQUEST.size)
        except BlockingIOError:
            self._check_whole()
            return None
        return uapi.unpack_request(packet)

    def respond(self, response: Response) -> None:
        """Answer a message."""
        os.write(self._fd, uapi.pack_response(response))

    def acked_features(self) -> int:
        """Return the features that the driver has accepted."""
        return int(_U64.unpack(self._ioctl(uapi.VDUSE_DEV_GET_FEATURES, bytes(_U64.size)))[0])

    def vq_info(self, index: int) -> VqInfo:
        """Return the driver's settings of queue `index`."""
        packed = uapi.is_packed(self.acked_features())
        answer = self._ioctl(uapi.VDUSE_VQ_GET_INFO, uapi.VQ_INFO.pack(index, 0, 0, 0, 0, b"", 0))
        vq_index, size, desc, driver, device, state, ready = uapi.VQ_INFO.unpack(answer)
        return VqInfo(vq_index, size, desc, driver, device, uapi.unpack_vq_state(state, packed=packed), bool(ready))

    def set_kickfd(self, index: int, fd: int) -> None:
        """Let the driver's kicks of queue `index` signal `fd` (borrowed)."""
        wanted = fd if fd >= 0 else uapi.VDUSE_EVENTFD_DEASSIGN
        self._ioctl(uapi.VDUSE_VQ_SETUP_KICKFD, uapi.VQ_EVENTFD.pack(index, wanted))

    def place_irqs(self) -> None:
        """Send each queue's interrupts to the CPU that `irq_cpus` names, and none to offline CPUs.

        The kernel's driver spreads queues over all possible CPUs. If no CPU of a queue's mask is online, injection of
        an interrupt loops in the kernel for ever.
        """
        online = sysfs.online_cpus()
        placed = list(self.irq_cpus)
        for index, cpu in enumerate(placed):
            attribute = f"vq{index}/irq_cb_affinity"
            if not sysfs.has_attribute(self.name, attribute):
                placed[index] = None  # Linux before 6.4 does not place interrupts
            elif cpu is not None and cpu in online:
                sysfs.set_attribute(self.name, attribute, sysfs.pack_mask([cpu]))
            elif not sysfs.unpack_mask(sysfs.attribute(self.name, attribute)) & online:
                sysfs.set_attribute(self.name, attribute, sysfs.pack_mask(online))
        self.irq_cpus = tuple(placed)

    def inject_irq(self, index: int) -> None:
        """Interrupt the driver for queue `index`."""
        self._ioctl(uapi.VDUSE_VQ_INJECT_IRQ, _U32.pack(index))

    def inject_config_irq(self) -> None:
        """Notify the driver that the configuration space has changed."""
        self._ioctl(uapi.VDUSE_DEV_INJECT_CONFIG_IRQ, b"")

    def set_config(self, offset_bytes: int, data: bytes) -> None:
        """Overwrite a part of the configuration space."""
        self._ioctl(uapi.VDUSE_DEV_SET_CONFIG, uapi.CONFIG_DATA.pack(offset_bytes, len(data)) + data)

    def region_count(self) -> int:
        """Return how many regions of memory the driver has mapped for us; 0 where the kernel cannot report it."""
        count = start = 0
        while count < REGION_COUNT_MAX and start <= uapi.IOVA_LAST:
            try:
                packed = self._ioctl(uapi.VDUSE_IOTLB_GET_INFO, uapi.IOVA_INFO.pack(start, uapi.IOVA_LAST, 0, 0))
            except OSError:  # no region from here on, or a kernel without the call
                break
            start = uapi.IOVA_INFO.unpack(packed)[1] + 1
            count += 1
        return count

    def worker_port(self, index: int) -> WorkerPort:
        """Return the device's own descriptor: workers look up memory and interrupt by themselves."""
        port = WorkerPort(self.kind, port_fd=self._fd, api_version=self.api_version)
        if self._user_memory is not None:
            port.user_memory_fd, port.user_memory_bytes = self._user_memory.fd, self._user_memory.used_bytes
        return port

    def user_memory(self) -> UserMemory | None:
        """Return the user memory that may replace the kernel's bounce pages."""
        return self._user_memory

    def close(self, *, keep: bool = False) -> None:
        """Destroy the device, unless it could not be detached. Raises DeviceBusyError while other processes hold it."""
        if self._user_memory is not None:
            self._user_memory.close()
            self._user_memory = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if keep:
            if self._attached:
                self._wait_for_messages(rest=True)
            self._created = self._attached = False  # it is not ours any more
        if self._created and not self._attached:
            kernel_control.destroy_device(self.name)
            self._created = False

    # -- inside

    def _ioctl(self, number: int, argument: bytes) -> bytes:
        """Return `argument` as the kernel has filled it in. Raises OSError, EBADF once the device is closed."""
        if self._fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        buffer = bytearray(argument)
        fcntl.ioctl(self._fd, number, buffer) if buffer else fcntl.ioctl(self._fd, number)
        return bytes(buffer)

    def _make_user_memory(self) -> None:
        if self.options.user_memory:
            self._user_memory = UserMemory(self.name, self.bounce_size_bytes, self._ioctl)

    def _check_drivers(self, name: str) -> None:
        """Refuse a device that could never be attached, before anything is made."""
        driver = sysfs.BUS_DRIVERS[self.options.bus]
        missing = [] if sysfs.driver_loaded(self.options.bus) else [driver]
        if self.options.bus == Bus.VIRTIO and not sysfs.virtio_blk_loaded():
            missing.append("virtio_blk")
        if not os.path.exists(kernel_control.CONTROL_NODE):
            missing.insert(0, "vduse")
        if sysfs.attached(name):
            raise DeviceBusyError(f"device {name}: the vDPA bus has a device of this name; choose another name")
        if missing:
            raise KernelSupportError(
                f"device {name}: the kernel has no {', '.join(missing)}: modprobe -a {' '.join(missing)} "
                "(`vdusefast check` says more)"
            )

    def _set_attributes(self, *, new: bool) -> None:
        """Write the settings in sysfs, where the configuration differs from the kernel's defaults.

        new: the size of the bounce pages can be set only before the device is on the bus.
        """
        has, needs = self.bounce_size_bytes, self.options.bounce_size_min_bytes
        if new and has < needs:
            raise KernelSupportError(
                f"device {self.name}: needs bounce pages of {needs} bytes, and this kernel has {has} and cannot change "
                f"that (Linux 6.4 can): set device.bounce_size_bytes = {has}, and lower device.size_max_bytes or "
                "device.seg_max if that is too little for these"
            )
        settings = self._settings(new=new)
        self._check_attributes(settings)
        absent = {cpu for cpu in self.options.irq_cpus if cpu is not None} - sysfs.online_cpus()
        if new and absent:  # the CPU of an adopted device may have gone meanwhile
            raise ConfigError(f"device {self.name}: irq_cpu: CPU {min(absent)} is not online")
        for attribute, value in settings.items():
            sysfs.set_attribute(self.name, attribute, value)
        self.place_irqs()  # what is refused is better known now

    def _wait_for_messages(self, *, rest: bool) -> None:
        """Set the kernel's time limit for an answer: shorter while a disk is at rest. A client may send at any time."""
        if self.options.bus == Bus.VIRTIO:
            limit_s = self.options.msg_timeout_s
            limit_s = min(limit_s or REST_MSG_TIMEOUT_S, REST_MSG_TIMEOUT_S) if rest else limit_s
            with suppress(FileNotFoundError):  # the kernel's device is gone
                sysfs.set_attribute(self.name, "msg_timeout", str(limit_s))

    def _settings(self, *, new: bool) -> dict[str, str]:
        options = self.options
        settings = {"msg_timeout": str(options.msg_timeout_s)}
        if new and options.bus == Bus.VIRTIO and self.bounce_size_bytes != KERNEL_BOUNCE_SIZE_BYTES:
            settings["bounce_size"] = str(self.bounce_size_bytes)
        return settings

    def _check_attributes(self, settings: dict[str, str]) -> None:
        """Raise KernelSupportError where these settings, or those of interrupts, cannot be made."""
        irq_cpus = self.options.irq_cpus
        placed = [f"vq{index}/irq_cb_affinity" for index, cpu in enumerate(irq_cpus) if cpu is not None]
        for attribute in (*settings, *placed):
            if not sysfs.has_attribute(self.name, attribute):
                raise KernelSupportError(f"device {self.name}: this kernel cannot set {attribute}; Linux 6.4 can")

    def _check_whole(self) -> None:
        """Raise DeviceBrokenError if the device is broken."""
        if kernel_control.is_broken(self._fd):
            raise DeviceBrokenError(
                f"device {self.name} is broken: a message was not answered within its msg_timeout, after which the "
                f"kernel disables it; `vdusefast recover {self.name}` recreates it once nobody uses it"
            )

    def _set_up_error(self, error: OSError) -> TransportError:
        path = error.filename or ""
        if path == f"{kernel_control.DIRECTORY}/{self.name}" and error.errno in (errno.EPERM, errno.EACCES):
            return TransportError(f"device {self.name}: {containers.refused_node_text(path, error)}")
        return TransportError(f"device {self.name}: cannot be set up: {_told(error)}")

    def _describe_timeout(self, driver: str, limit_s: float) -> str:
        bound = self.driver
        if not sysfs.attached(self.name):
            what = "the kernel did not finish attaching it"
        elif bound != driver:
            what = f"it is bound to {bound or 'no driver'}, not to {driver}"
        else:
            what = f"{driver} has it, but has made no usable node under {sysfs.DEV} (see the kernel log)"
        return f"device {self.name}: not attached within {limit_s:g} s: {what}"

    def _attach_error(self, error: OSError) -> VdusefastError:
        if error.errno in (errno.EPERM, errno.EACCES):
            if not containers.is_initial_user_namespace():
                why = "root of this user namespace may not; run it in the machine's own"
            else:
                why = "be root (CAP_NET_ADMIN is needed; in a container: --cap-add=NET_ADMIN)"
            return KernelSupportError(f"device {self.name}: not allowed to attach it: {why}")
        if error.errno == errno.EEXIST:
            return DeviceBusyError(f"device {self.name}: the vDPA bus has a device of this name; choose another name")
        return TransportError(f"device {self.name}: the kernel refuses to attach it: {_told(error)}")


def _told(error: OSError) -> str:
    """Return the kernel's error with its file, and the remedy where a container is the reason."""
    where = f" ({error.filename})" if error.filename else ""
    remedy = ""
    if error.errno == errno.EROFS and where:
        remedy = (
            f": this container's /sys cannot be written: start it with --volume=/sys:/sys; see {containers.DOCUMENT}"
        )
    return f"{error.strerror}{where}{remedy}"


async def _in_thread(function: Callable[..., _T], *args: Any) -> _T:
    """Run a call that blocks in a thread of its own, which never keeps the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def finish(result: _T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, failure = None, None
        try:
            result = function(*args)
        except BaseException as error:
            failure = error
        try:
            loop.call_soon_threadsafe(finish, result, failure)
        except RuntimeError:
            return  # the loop has ended: nobody waits for this result

    threading.Thread(target=run, name=f"vdusefast-{function.__name__}", daemon=True).start()
    return await future
