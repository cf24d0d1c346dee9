"""What the kernel shows of a VDUSE device under /sys, and the few things that are set there.

udev has no part in it: a device is usable when the kernel has made its node, under whatever rules.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

SYS = Path("/sys")
DEV = Path("/dev")

# The driver of the vDPA bus for each of a device's faces, and the kernel module it is in.
BUS_DRIVERS = {"virtio": "virtio_vdpa", "vhost": "vhost_vdpa"}


def driver_loaded(bus: str) -> bool:
    """Return whether the bus driver for `bus` is in the kernel."""
    return _driver_path(BUS_DRIVERS[bus]).is_dir()


def virtio_blk_loaded() -> bool:
    """Return whether the kernel's driver for virtio block devices is there."""
    return (SYS / "bus/virtio/drivers/virtio_blk").is_dir()


def attached(name: str) -> bool:
    """Return whether the device is on the vDPA bus."""
    return _device_path(name).is_dir()


def created(name: str) -> bool:
    """Return whether a VDUSE device of that name exists, whoever has made it."""
    return (SYS / "class/vduse" / name).is_dir()


def bound_driver(name: str) -> str:
    """Return the driver of the vDPA bus that has the device, "" when none has."""
    try:
        return (_device_path(name) / "driver").readlink().name
    except OSError:
        return ""


def bind(name: str, driver: str) -> None:
    """Give the device to `driver` and keep it for that, taking it from another one first.

    Blocks until both drivers are done: messages must be answered meanwhile. Raises OSError.
    """
    _write(_device_path(name) / "driver_override", driver)
    if bound_driver(name) == driver:
        return
    unbind(name)
    _write(_driver_path(driver) / "bind", name)


def unbind(name: str) -> None:
    """Take the device from its driver, if it has one. Blocks until the driver has let go. Raises OSError."""
    bound = bound_driver(name)
    if bound:
        try:
            _write(_driver_path(bound) / "unbind", name)
        except OSError as error:
            if error.errno != errno.ENODEV:  # somebody else has unbound it meanwhile
                raise


def node(name: str) -> str:
    """Return the node by which the device is used, "" while there is none.

    Its number is compared with the kernel's, so that a stale file of that name does not pass.
    """
    device = _device_path(name)
    for entry in (*device.glob("virtio*/block/*"), *device.glob("vhost-vdpa-*")):
        path = DEV / entry.name
        try:
            number = (entry / "dev").read_text().strip()
            status = path.stat()
        except OSError:
            continue
        if number == f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" and not stat.S_ISREG(status.st_mode):
            return str(path)
    return ""


def set_attribute(name: str, attribute: str, value: str) -> None:
    """Write to /sys/class/vduse/NAME/ATTRIBUTE, such as `msg_timeout`, `bounce_size`, `vq0/irq_cb_affinity`.

    Raises OSError.
    """
    _write(SYS / "class/vduse" / name / attribute, value)


def has_attribute(name: str, attribute: str) -> bool:
    """Return whether this kernel lets `attribute` be set."""
    return (SYS / "class/vduse" / name / attribute).exists()


def cpu_mask(cpu: int) -> str:
    """Return the mask with CPU number `cpu` alone, as the kernel reads masks: words of 32 bits, highest first."""
    words = [f"{1 << cpu % 32:x}"] + ["0"] * (cpu // 32)
    return ",".join(words)


def _device_path(name: str) -> Path:
    return SYS / "bus/vdpa/devices" / name


def _driver_path(driver: str) -> Path:
    return SYS / "bus/vdpa/drivers" / driver


def _write(path: Path, value: str) -> None:
    # One write: sysfs takes each for a whole value.
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    except OSError as error:
        error.filename = os.fspath(path)
        raise
    finally:
        os.close(fd)
