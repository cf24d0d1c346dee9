"""The device that fio loads, over either transport: what fio opens, and what it must have in its environment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from vdusefast.api import Device
from vdusefast.base.kinds import Bus, TransportKind
from vdusefast.bench.common import block_node
from vdusefast.bench.common.real_fio import KILL_S, FioStuckError
from vdusefast.bench.common.store import StoppedError
from vdusefast.bench.fio.target import Target
from vdusefast.config import Config
from vdusefast.driver import preload
from vdusefast.driver.attach_server import AttachServer
from vdusefast.errors import ConfigError, VdusefastError
from vdusefast.server.signals import PatientStopSignals, StopRequestedError
from vdusefast.transport import uapi
from vdusefast.transport.virtio_blk import config_fields
from vdusefast.units import SECTOR_BYTES

LOOPBACK_MEMORY = "shm"  # the device reaches such memory without a copy; fio maps mmapshared privately


@dataclass(frozen=True)
class Reachable:
    """A device that fio can open."""

    device: Device
    target: Target
    capacity_bytes: int
    read_only: bool
    can_discard: bool
    environment: Mapping[str, str] = field(default_factory=dict)


def check_bus(config: Config, transport: str) -> None:
    """Refuse a device that gives no block device. Raises ConfigError."""
    if transport == TransportKind.KERNEL and config.device.bus != Bus.VIRTIO:
        raise ConfigError(f'device.bus: {config.device.bus} gives no block device to load; use bus = "virtio"')


@contextmanager
def served(
    config: Config, transport: str, asynchronous: str, route: str, signals: PatientStopSignals
) -> Iterator[Reachable]:
    """Serve a device for fio, until the end. A fio that could not be killed is reaped once the device is gone.

    signals: one that comes before the device has started ends that. Raises VdusefastError, StoppedError.
    """
    with _started(config, signals) as device:
        try:
            if transport == TransportKind.KERNEL:
                node = device.node
                yield Reachable(
                    device,
                    Target(node, transport, asynchronous),
                    block_node.size_bytes(node),
                    block_node.is_read_only(node),
                    block_node.discard_max_bytes(node) > 0,
                )
            else:
                with _attached(device, asynchronous, route) as reachable:
                    yield reachable
        except FioStuckError as stuck:
            device.stop(force=True)
            stuck.fio.reap(KILL_S)
            raise stuck.cause or VdusefastError(f"device {device.name}: {stuck}") from None
        except BaseException:
            # Nobody waits for requests any more, and those of a failed queue would be waited for in vain.
            device.stop(force=True)
            raise


@contextmanager
def _started(config: Config, signals: PatientStopSignals) -> Iterator[Device]:
    device = Device(config)
    try:
        with signals.interrupting():
            device.start()
        yield device
    except StopRequestedError as stop:
        raise StoppedError(f"stopped by {stop} before fio had begun") from None
    finally:
        device.stop()


@contextmanager
def _attached(device: Device, asynchronous: str, route: str) -> Iterator[Reachable]:
    """Let programs that preload our library reach a loopback device."""
    bus = device.bus
    with AttachServer(bus, serial=device.config.device.serial, route=route) as server:
        yield Reachable(
            device,
            Target(str(server.path), TransportKind.LOOPBACK, asynchronous, LOOPBACK_MEMORY),
            config_fields(bus.config)["capacity"] * SECTOR_BYTES,
            bool(server.features & uapi.VIRTIO_BLK_F_RO),
            bool(server.features & uapi.VIRTIO_BLK_F_DISCARD),
            preload.environment(server),
        )
