"""The real thing: a device of /dev/vduse, which the kernel shows to its own drivers over the vDPA bus.

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
from dataclasses import dataclass
from typing import TypeVar

from vdusefast import usage
from vdusefast.errors import ConfigError, DeviceBusyError, KernelSupportError, TimedOutError, VdusefastError
from vdusefast.transport import (
    DeviceBrokenError,
    DeviceSpec,
    TransportError,
    WorkerPort,
    kernel_control,
    sysfs,
    uapi,
    vdpa,
)
from vdusefast.transport.uapi import Request, Response, VqInfo
from vdusefast.transport.user_memory import UserMemory

BOUNCE_PAGES = "the kernel's bounce pages"
KERNEL_BOUNCE_SIZE_BYTES = 64 << 20

REGION_COUNT_MAX = 1024

DRIVER_OK_WAIT_S = 0.05  # the kernel takes our answer a moment after it was given

_U64 = struct.Struct("=Q")
_U32 = struct.Struct("=I")
_T = TypeVar("_T")


@dataclass(frozen=True)
class KernelOptions:
    """How the kernel is to treat the device.

    bus: `virtio` for /dev/vdX, `vhost` for /dev/vhost-vdpa-N. irq_cpus: one entry a queue, None = any CPU.
    user_memory: give it memory of ours in place of its bounce pages, where it takes that; bus `virtio` has these.
    scheduler: I/O scheduler of a disk that is new, "kernel" = whatever the kernel gives it.
    api_version, vduse_features: what a device that is reopened was created with, which the kernel does not tell.
    """

    bus: str = "virtio"
    msg_timeout_s: int = 90
    bounce_size_bytes: int = 64 << 20
    attach_timeout_s: float = 30.0
    irq_cpus: tuple[int | None, ...] = ()
    user_memory: bool = False
    scheduler: str = "none"
    api_version: int = 0
    vduse_features: int = 0


class KernelTransport:
    """The device's side of a VDUSE device; see `Transport` for the methods."""

    kind = "kernel"

    def __init__(self, options: KernelOptions | None = None):
        """Prepare; nothing is opened before `create` or `reopen`."""
        self.options = options or KernelOptions()
        self.memory_text = BOUNCE_PAGES if self.options.bus == "virtio" else "the client's own"
        self.msg_timeout_s = float(self.options.msg_timeout_s)
        self.api_version = self.options.api_version
        self.vduse_features = self.options.vduse_features
        self.irq_cpus = self.options.irq_cpus
        self.name = ""
        self._fd = -1
        self._user_memory: UserMemory | None = None
        self._created = False
        self._attached = False

    @property
    def node(self) -> str:
        """The node by which the device is used, "" while no driver has it."""
        return sysfs.node(self.name) if self.name else ""

    @property
    def driver(self) -> str:
        """The bus driver that has the device, "" when none has."""
        return sysfs.bound_driver(self.name) if self.name else ""

    def create(self, spec: DeviceSpec) -> None:
        """Make /dev/vduse/NAME with its queues and settings."""
        self._check_drivers(spec.name)
        control = kernel_control.open_control()
        try:
            self.api_version, self.vduse_features = kernel_control.negotiate(control)
            kernel_control.create_device(control, spec, self.api_version)
            self.name, self._created = spec.name, True
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
        """Take over /dev/vduse/NAME, with what its driver and the server that has ended have made of it."""
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

    def driver_status(self) -> int:
        """Return what the kernel's answers tell of the device status: it has no call to ask for it.

        The features are those that the driver wrote, just before FEATURES_OK, and zero after a reset. An interrupt is
        taken from DRIVER_OK on, and harms nobody: the one of a queue that has an eventfd of a client, though, at any
        time, for which a client gets that of the configuration space.
        """
        if not self.acked_features():
            return 0
        status = uapi.VIRTIO_CONFIG_S_ACKNOWLEDGE | uapi.VIRTIO_CONFIG_S_DRIVER | uapi.VIRTIO_CONFIG_S_FEATURES_OK
        deadline = time.monotonic() + DRIVER_OK_WAIT_S
        while True:
            try:
                self.inject_config_irq() if self.options.bus == "vhost" else self.inject_irq(0)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            else:
                return status | uapi.VIRTIO_CONFIG_S_DRIVER_OK
            if time.monotonic() > deadline:
                return status
            time.sleep(kernel_control.NODE_LOOK_S)

    async def attach(self) -> None:
        """Put the device on the vDPA bus, give it to the driver that was asked for, and wait until its node is there.

        Of a device that was reopened, only what the server before has not done.

        Raises TransportError, KernelSupportError, TimedOutError.
        """
        limit_s = self.options.attach_timeout_s
        driver = sysfs.BUS_DRIVERS[self.options.bus]
        try:
            async with asyncio.timeout(limit_s):
                new = not self._attached
                if new:
                    await self._put_on_bus()
                if self.driver != driver:
                    await _in_thread(sysfs.bind, self.name, driver)
                while not self.node:
                    await asyncio.sleep(kernel_control.NODE_LOOK_S)
                if new and self.options.bus == "virtio" and self.options.scheduler != "kernel":
                    await _in_thread(sysfs.set_scheduler, self.name, self.options.scheduler)
        except TimeoutError:
            raise TimedOutError(self._describe_timeout(driver, limit_s)) from None
        except OSError as error:
            raise self._attach_error(error) from error

    async def detach(self) -> None:
        """Take the device from its driver, which waits for its requests, and then off the bus.

        In two steps, as removal holds a lock that every other vDPA command of the machine needs. A client of vhost-vdpa
        that does not let go would be waited for without any limit: DeviceBusyError names it, and the device stays.
        """
        if not self._attached:
            return
        if self.driver == sysfs.BUS_DRIVERS["vhost"]:
            # Not in this thread: to look at such a node may reset the device, which this thread answers.
            users = await self._vhost_users()
            if users:
                raise DeviceBusyError(
                    f"device {self.name}: {self.node} is {usage.describe(users)}, which the kernel would wait for: the "
                    f"device stays in the kernel; end its client, then: vdpa dev del {self.name}"
                )
        try:
            await _in_thread(sysfs.unbind, self.name)
            await _in_thread(vdpa.device_delete, self.name)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise TransportError(f"device {self.name}: cannot be detached: {error.strerror}") from error
        self._attached = False

    async def _vhost_users(self) -> list[str]:
        try:
            return await _in_thread(usage.find_users, self.node)
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
        """Return what the driver has set up for queue `index`."""
        packed = uapi.is_packed(self.acked_features())
        answer = self._ioctl(uapi.VDUSE_VQ_GET_INFO, uapi.VQ_INFO.pack(index, 0, 0, 0, 0, b"", 0))
        vq_index, size, desc, driver, device, state, ready = uapi.VQ_INFO.unpack(answer)
        return VqInfo(vq_index, size, desc, driver, device, uapi.unpack_vq_state(state, packed=packed), bool(ready))

    def set_kickfd(self, index: int, fd: int) -> None:
        """Have the driver's kicks of queue `index` signal `fd` (borrowed)."""
        wanted = fd if fd >= 0 else uapi.VDUSE_EVENTFD_DEASSIGN
        self._ioctl(uapi.VDUSE_VQ_SETUP_KICKFD, uapi.VQ_EVENTFD.pack(index, wanted))

    def place_irqs(self) -> None:
        """Let each queue's interrupts go to the CPU that `irq_cpus` names, and none to CPUs that are not there.

        The kernel's driver spreads queues over all CPUs that there could be, and for a queue whose mask holds none that
        is online the injection of an interrupt loops in the kernel for ever.
        """
        online = sysfs.online_cpus()
        for index, cpu in enumerate(self.irq_cpus):
            attribute = f"vq{index}/irq_cb_affinity"
            if cpu is not None and cpu in online:
                sysfs.set_attribute(self.name, attribute, sysfs.pack_mask([cpu]))
                continue
            if not sysfs.has_attribute(self.name, attribute):
                continue  # a kernel that does not place interrupts either
            if not sysfs.unpack_mask(sysfs.attribute(self.name, attribute)) & online:
                sysfs.set_attribute(self.name, attribute, sysfs.pack_mask(online))

    def inject_irq(self, index: int) -> None:
        """Interrupt the driver for queue `index`."""
        self._ioctl(uapi.VDUSE_VQ_INJECT_IRQ, _U32.pack(index))

    def inject_config_irq(self) -> None:
        """Tell the driver that the configuration space has changed."""
        self._ioctl(uapi.VDUSE_DEV_INJECT_CONFIG_IRQ, b"")

    def set_config(self, offset_bytes: int, data: bytes) -> None:
        """Overwrite a part of the configuration space."""
        self._ioctl(uapi.VDUSE_DEV_SET_CONFIG, uapi.CONFIG_DATA.pack(offset_bytes, len(data)) + data)

    def region_count(self) -> int:
        """Return how many regions of memory the driver shows us; 0 where the kernel cannot tell."""
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
        """Return the memory that may take the place of the kernel's bounce pages."""
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
            self._created = self._attached = False  # it is not ours any more
        if self._created and not self._attached:
            kernel_control.destroy_device(self.name)
            self._created = False

    # -- inside

    def _ioctl(self, number: int, argument: bytes) -> bytes:
        """Return what the kernel has made of `argument`. Raises OSError, EBADF once the device is closed."""
        if self._fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        buffer = bytearray(argument)
        fcntl.ioctl(self._fd, number, buffer) if buffer else fcntl.ioctl(self._fd, number)
        return bytes(buffer)

    def _make_user_memory(self) -> None:
        if self.options.user_memory:
            self._user_memory = UserMemory(self.name, self.options.bounce_size_bytes, self._ioctl)

    def _check_drivers(self, name: str) -> None:
        """Refuse before anything is made what could never be attached."""
        driver = sysfs.BUS_DRIVERS[self.options.bus]
        missing = [] if sysfs.driver_loaded(self.options.bus) else [driver]
        if self.options.bus == "virtio" and not sysfs.virtio_blk_loaded():
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
        """Set what is set through sysfs, where the configuration differs from what the kernel does by itself.

        new: the bounce pages can be had in another size before the device is on the bus only.
        """
        options = self.options
        settings = {"msg_timeout": str(options.msg_timeout_s)}
        if new and options.bus == "virtio" and options.bounce_size_bytes != KERNEL_BOUNCE_SIZE_BYTES:
            settings["bounce_size"] = str(options.bounce_size_bytes)
        placed = [f"vq{index}/irq_cb_affinity" for index, cpu in enumerate(options.irq_cpus) if cpu is not None]
        for attribute in (*settings, *placed):
            if not sysfs.has_attribute(self.name, attribute):
                raise KernelSupportError(f"device {self.name}: this kernel cannot set {attribute}; Linux 6.4 can")
        for attribute, value in settings.items():
            sysfs.set_attribute(self.name, attribute, value)
        absent = sorted({cpu for cpu in options.irq_cpus if cpu is not None} - sysfs.online_cpus())
        if absent:
            raise ConfigError(f"device {self.name}: irq_cpu: CPU {absent[0]} is not online")
        self.place_irqs()  # what is refused is better known now

    def _check_whole(self) -> None:
        """Raise DeviceBrokenError when the kernel has given the device up."""
        if kernel_control.is_broken(self._fd):
            raise DeviceBrokenError(
                f"device {self.name} is broken: a message was not answered within its msg_timeout, after which the "
                f"kernel lets it do nothing; `vdusefast recover {self.name}` makes it anew when nobody uses it"
            )

    def _set_up_error(self, error: OSError) -> TransportError:
        where = f" ({error.filename})" if error.filename else ""
        return TransportError(f"device {self.name}: cannot be set up: {error.strerror}{where}")

    def _describe_timeout(self, driver: str, limit_s: float) -> str:
        bound = self.driver
        if not sysfs.attached(self.name):
            what = "the kernel did not finish attaching it"
        elif bound != driver:
            what = f"it is bound to {bound or 'no driver'}, not to {driver}"
        else:
            what = f"{driver} has it, but it has made no usable node under {sysfs.DEV} (the kernel log may say why)"
        return f"device {self.name}: not attached within {limit_s:g} s: {what}"

    def _attach_error(self, error: OSError) -> VdusefastError:
        if error.errno in (errno.EPERM, errno.EACCES):
            return KernelSupportError(
                f"device {self.name}: not allowed to attach it: be root (CAP_NET_ADMIN is needed)"
            )
        if error.errno == errno.EEXIST:
            return DeviceBusyError(f"device {self.name}: the vDPA bus has a device of this name; choose another name")
        return TransportError(f"device {self.name}: the kernel refuses to attach it: {error.strerror}")


async def _in_thread(function: Callable[..., _T], *args: str) -> _T:
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
            return  # the loop has ended: nobody waits for this any more

    threading.Thread(target=run, name=f"vdusefast-{function.__name__}", daemon=True).start()
    return await future
