"""A VDUSE device under /sys: the attributes that the kernel shows, and the few that we set.

udev is not involved: a device is usable when the kernel has made its node, whatever the rules are.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from vdusefast.base.kinds import Bus
from vdusefast.host import containers

SYS = Path("/sys")
DEV = Path("/dev")

# For each `bus` the driver on the vDPA bus, and its kernel module.
BUS_DRIVERS: dict[str, str] = {Bus.VIRTIO: "virtio_vdpa", Bus.VHOST: "vhost_vdpa"}


def bus_loaded() -> bool:
    """Return whether the kernel has the vDPA bus."""
    return (SYS / "bus/vdpa").is_dir()


def driver_loaded(bus: str) -> bool:
    """Return whether the bus driver for `bus` is in the kernel."""
    return _driver_path(BUS_DRIVERS[bus]).is_dir()


def virtio_blk_loaded() -> bool:
    """Return whether the kernel's driver for virtio block devices is there."""
    return (SYS / "bus/virtio/drivers/virtio_blk").is_dir()


def request_queue_limit() -> int:
    """Return the maximum of queues in virtio_blk's parameter, 0 when it is not set."""
    try:
        return int((SYS / "module/virtio_blk/parameters/num_request_queues").read_text())
    except OSError:
        return 0


def attached(name: str) -> bool:
    """Return whether the device is on the vDPA bus."""
    return _device_path(name).is_dir()


def created(name: str) -> bool:
    """Return whether a VDUSE device of that name exists, no matter which program has made it."""
    return (SYS / "class/vduse" / name).is_dir()


def bound_driver(name: str) -> str:
    """Return the driver of the vDPA bus that has the device, "" when none has."""
    try:
        return (_device_path(name) / "driver").readlink().name
    except OSError:
        return ""


def bind(name: str, driver: str) -> None:
    """Bind the device to `driver` and reserve it for that, after unbinding it from another one.

    Blocks until both drivers are done; messages must be answered meanwhile. Raises OSError.
    """
    _write(_device_path(name) / "driver_override", driver)
    if bound_driver(name) == driver:
        return
    unbind(name)
    _write(_driver_path(driver) / "bind", name)


def unbind(name: str) -> None:
    """Unbind the device from its driver, if it has one. Blocks until the driver has released it. Raises OSError."""
    bound = bound_driver(name)
    if bound:
        try:
            _write(_driver_path(bound) / "unbind", name)
        except OSError as error:
            if error.errno != errno.ENODEV:  # another program has unbound it meanwhile
                raise


def node(name: str) -> str:
    """Return the node by which the device is used, "" while there is none.

    Where /dev is not the machine's, as in a container, it is the node that the machine has.
    """
    if here := node_here(name):
        return here
    return next((path for path, _number in _nodes(name)), "") if containers.has_own_dev(DEV) else ""


def node_here(name: str) -> str:
    """Return the same only if it can be found in this /dev.

    Its number is compared with the kernel's, so that a stale file of that name does not pass.
    """
    return next((path for path, number in _nodes(name) if containers.is_same_node(path, number)), "")


def node_number(name: str) -> str:
    """Return the number of the node, such as "254:16", "" while there is none."""
    return next((number for _path, number in _nodes(name)), "")


def _nodes(name: str) -> Iterator[tuple[str, str]]:
    """Find the device nodes of a device: paths and numbers, as the kernel names them."""
    device = _device_path(name)
    for entry in (*device.glob("virtio*/block/*"), *device.glob("vhost-vdpa-*")):
        try:
            number = (entry / "dev").read_text().strip()
        except OSError:
            continue
        yield str(DEV / entry.name), number


def disk_path(name: str) -> Path | None:
    """Return the directory in sysfs of the device's disk, None where it is no disk."""
    return next(_device_path(name).glob("virtio*/block/*"), None)


def number(disk: Path | None, attribute: str) -> int:
    """Return an attribute of a disk; 0 where this kernel does not have it. Never asks the device itself."""
    if disk is None:
        return 0
    try:
        text = (disk / attribute).read_text().strip()
    except OSError:
        return 0
    return int(text) if text.isdecimal() else int(text == "write back")


def queue_count(name: str) -> int:
    """Return how many virtqueues a VDUSE device has. Raises OSError."""
    return len([entry for entry in os.listdir(SYS / "class/vduse" / name) if re.fullmatch(r"vq\d+", entry)])


def set_scheduler(name: str, scheduler: str) -> None:
    """Give the disk of `name` another I/O scheduler. Waits for its requests in flight. Raises OSError."""
    for path in _device_path(name).glob("virtio*/block/*/queue/scheduler"):
        if f"[{scheduler}]" not in path.read_text():
            _write(path, scheduler)


def set_rotational(name: str, rotational: int) -> None:
    """Set whether the disk of `name` rotates (1 or 0): its driver cannot know, and assumes the same for all.

    Raises OSError.
    """
    for path in _device_path(name).glob("virtio*/block/*/queue/rotational"):
        if path.read_text().strip() != str(rotational):
            _write(path, str(rotational))


def set_attribute(name: str, attribute: str, value: str) -> None:
    """Write to /sys/class/vduse/NAME/ATTRIBUTE, such as `msg_timeout`, `bounce_size`, `vq0/irq_cb_affinity`.

    Raises OSError.
    """
    _write(SYS / "class/vduse" / name / attribute, value)


def has_attribute(name: str, attribute: str) -> bool:
    """Return whether this kernel lets `attribute` be set."""
    return (SYS / "class/vduse" / name / attribute).exists()


def attribute(name: str, attribute: str) -> str:
    """Return the value of an attribute of a VDUSE device. Raises OSError."""
    return (SYS / "class/vduse" / name / attribute).read_text().strip()


def online_cpus() -> set[int]:
    """Return the CPUs that are online. Raises OSError."""
    return _cpus("online")


def all_cpus_online() -> bool:
    """Return whether every CPU that this machine could have is there. Raises OSError."""
    return _cpus("possible") == _cpus("online")


def _cpus(which: str) -> set[int]:
    cpus: set[int] = set()
    for part in (SYS / "devices/system/cpu" / which).read_text().strip().split(","):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def pack_mask(cpus: Iterable[int]) -> str:
    """Return CPU numbers as the kernel writes masks: words of 8 hexadecimal digits, highest first."""
    bits = sum(1 << cpu for cpu in set(cpus))
    words = [f"{bits >> 32 * index & 0xFFFFFFFF:08x}" for index in range(max(1, (bits.bit_length() + 31) // 32))]
    return ",".join(reversed(words))


def unpack_mask(text: str) -> set[int]:
    """Return the CPU numbers in a mask as the kernel writes it."""
    bits = int(text.replace(",", ""), 16)
    return {cpu for cpu in range(bits.bit_length()) if bits >> cpu & 1}


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
