"""Kernel devices whose run directory is lost: adopt one with a configuration that an operator gives.

The kernel keeps the device. The limits of its disk show what its driver was offered, but not who made the device or
which requests are in flight. So a claim needs an explicit `--claim`, and a queue is adopted only where its ring shows
that its driver waits for nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vdusefast.base.kinds import Bus, TransportKind
from vdusefast.config import QUEUE_SIZE_MAX, Config, make_config, resolve_cpus
from vdusefast.errors import ConfigError, DeviceBusyError, DeviceNotFoundError, VdusefastError
from vdusefast.host import sysfs
from vdusefast.state import saved_state
from vdusefast.transport import kernel_control
from vdusefast.transport.kernel import KernelOptions, KernelTransport
from vdusefast.transport.virtio_blk import config_fields
from vdusefast.units import SECTOR_BYTES

if TYPE_CHECKING:
    from vdusefast.control.device_model import BlockDevice
    from vdusefast.state.run_dir import RunDirectory
    from vdusefast.state.saved_state import SavedState

ANY_FEATURES = (1 << 64) - 1
UNKNOWN_SIZE_BYTES = 1 << 20


class _Limit(NamedTuple):
    """A limit of a disk that the kernel shows, and the configured value that must fit it."""

    key: str
    shown: int
    configured: int
    exact: bool  # otherwise the driver may have been offered less

    @property
    def fits(self) -> bool:
        """Whether a driver that was shown this can be served by the configuration."""
        return self.shown == self.configured if self.exact else self.shown <= self.configured


def check(directory: RunDirectory, *, any_driver: bool) -> None:
    """Check that there is a device to claim. Changes nothing.

    directory: locked by us. any_driver: the device is only removed. Raises DeviceNotFoundError, DeviceBusyError for
    one that has a saved state or is broken, VdusefastError for one of which the kernel shows too little.
    """
    name = directory.path.name
    if not sysfs.created(name) or not sysfs.attached(name):
        raise DeviceNotFoundError(f"{name}: the kernel has no device of this name in use: there is nothing to claim")
    if saved_state.load(directory.state_path) is not None:
        raise DeviceBusyError(
            f"{name}: needs no --claim, as its state is in {directory.path}: vdusefast recover {name}"
        )
    if kernel_control.is_left_broken(name):
        raise DeviceBusyError(f"{name}: is broken, so it cannot be adopted: vdusefast del {name} --force")
    if not any_driver and not sysfs.disk_path(name):
        raise VdusefastError(
            f"{name}: is no disk of this machine, so nothing shows whether a configuration is the right one: end "
            f"its client, then: vdusefast del {name} --force --claim"
        )


def removal_config(name: str) -> Config:
    """Return a configuration to remove the device by: every request is answered with an error."""
    if not sysfs.created(name) or not sysfs.attached(name):
        raise DeviceNotFoundError(f"{name}: the kernel has no device of this name in use: there is nothing to claim")
    disk = sysfs.disk_path(name)
    size_bytes = sysfs.number(disk, "size") * SECTOR_BYTES if disk else 0
    return resolve_cpus(
        make_config(
            name=name,
            uri=f"null:{size_bytes or UNKNOWN_SIZE_BYTES}",
            transport=TransportKind.KERNEL,
            bus=Bus.VHOST if sysfs.bound_driver(name) == sysfs.BUS_DRIVERS[Bus.VHOST] else Bus.VIRTIO,
            queues=sysfs.queue_count(name),
            queue_size=QUEUE_SIZE_MAX,
            user_memory="off",
        )
    )


def make_state(config: Config, model: BlockDevice, *, any_driver: bool) -> SavedState:
    """Rebuild the lost state from the configuration and the kernel.

    any_driver: the device is only to be removed, whatever its driver was offered. Raises ConfigError for each key that
    cannot be as configured, KernelSupportError.
    """
    if any_driver:
        model.offered_features = ANY_FEATURES
    else:
        wrong = [limit for limit in _limits(model) if not limit.fits]
        if wrong:
            told = "; ".join(f"{limit.key}: {limit.shown}, not {limit.configured}" for limit in wrong)
            raise ConfigError(
                f"{model.name}: the kernel shows that the device was made with another configuration: {told}; give the "
                "configuration that it was served by"
            )
    # The kernel does not show the protocol. Assume the one that this version uses on this kernel.
    api_version, vduse_features = kernel_control.probe_control()
    transport = KernelTransport(KernelOptions(api_version=api_version, vduse_features=vduse_features))
    return saved_state.make_state(config, model.spec(), transport)


def _limits(model: BlockDevice) -> list[_Limit]:
    name, space = model.name, config_fields(model.config_space)
    disk = sysfs.disk_path(name)

    def limit(key: str, attribute: str, configured: int, *, exact: bool = False) -> _Limit:
        return _Limit(key, sysfs.number(disk, attribute), configured, exact)

    return [
        _Limit("device.queues", sysfs.queue_count(name), model.queue_count, True),
        limit("size in sectors", "size", space["capacity"], exact=True),
        limit("device.block_size_bytes", "queue/logical_block_size", space["blk_size"], exact=True),
        limit("device.read_only", "ro", int(model.read_only), exact=True),
        limit("backend.cache is not writethrough", "queue/write_cache", int(model.writeback), exact=True),
        limit("device.size_max_bytes", "queue/max_segment_size", space["size_max"]),
        limit("device.seg_max", "queue/max_segments", space["seg_max"]),
        limit("bytes of a discard", "queue/discard_max_hw_bytes", space["max_discard_sectors"] * SECTOR_BYTES),
        limit(
            "bytes of a write-zeroes",
            "queue/write_zeroes_max_bytes",
            space["max_write_zeroes_sectors"] * SECTOR_BYTES,
        ),
    ]


def unclean_text(name: str, why: str) -> str:
    """Return the message for a claimed device whose rings do not show what is in flight."""
    return (
        f"{name}: cannot be adopted: {why}; the record of its completed requests is lost with its run "
        f"directory: vdusefast del {name} --force --claim removes it and fails them"
    )


def advice(name: str) -> str:
    """Return the remedy for a kernel device without a saved state."""
    return (
        "if it was vdusefast's, and its run directory was lost: vdusefast add CONFIG --claim adopts it if "
        f"nothing was in flight, vdusefast del {name} --force --claim removes it"
    )
