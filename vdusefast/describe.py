"""A device as plain values, for people and for JSON: what `vdusefast show` prints."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vdusefast.transport import uapi

if TYPE_CHECKING:
    from vdusefast.config import Config
    from vdusefast.device import BlockDevice
    from vdusefast.errors import VdusefastError
    from vdusefast.placement import Placement
    from vdusefast.stats import DeviceStats
    from vdusefast.supervisor import DeviceState
    from vdusefast.transport import Transport

RING_PACKED = 1 << 34
RING_OPTIONS = {
    1 << 35: "IN_ORDER",
    uapi.VIRTIO_RING_F_EVENT_IDX: "EVENT_IDX",
    uapi.VIRTIO_RING_F_INDIRECT_DESC: "INDIRECT_DESC",
}


def describe(
    config: Config,
    model: BlockDevice,
    transport: Transport,
    state: DeviceState,
    failure: VdusefastError | None,
    stats: DeviceStats,
    memory: str,
    placement: Placement,
) -> dict[str, Any]:
    """Return everything known about a device that has been started.

    memory: what requests' data lies in. placement: where workers and interrupts are.
    """
    device = config.device
    counters = stats.to_dict()
    acked_features = _acked_features(model, transport)
    return {
        "name": device.name,
        "state": str(state),
        "transport": transport.kind,
        "bus": device.bus if transport.kind == "kernel" else "",
        "driver": transport.driver,
        "node": transport.node,
        "pid": os.getpid(),
        "size_bytes": model.capacity_sectors * 512,
        "block_size_bytes": model.block_size_bytes,
        "read_only": model.read_only,
        "serial": model.serial,
        "backend": config.backend.uri,
        "cache": config.backend.cache,
        "memory": memory,
        "ring": ring_text(acked_features),
        "offered_features": uapi.names_of(model.offered_features),
        "acked_features": uapi.names_of(acked_features),
        "status": model.status,
        "status_names": uapi.status_names(model.status),
        **_kernel_only(config, transport),
        "failure": str(failure) if failure is not None else "",
        "placement": placement.to_dict(),
        "queues": [{**queue, "size": device.effective_queue_size} for queue in counters["queues"]],
        "total": counters["total"],
    }


def ring_text(acked_features: int) -> str:
    """Return the form of the virtqueues that driver and device have agreed on, "" before they have.

    A packed ring and IN_ORDER are told from the bits of VIRTIO 1.3, 6.
    """
    if not acked_features:
        return ""
    form = "packed" if acked_features & RING_PACKED else "split"
    return ", ".join([form, *(name for bit, name in RING_OPTIONS.items() if acked_features & bit)])


def _acked_features(model: BlockDevice, transport: Transport) -> int:
    if not model.status & uapi.VIRTIO_CONFIG_S_FEATURES_OK:
        return 0
    try:
        return transport.acked_features()
    except OSError:  # the device is broken or has just been stopped: there is no driver any more
        return 0


def _kernel_only(config: Config, transport: Transport) -> dict[str, Any]:
    from vdusefast.transport.kernel import KernelTransport

    if not isinstance(transport, KernelTransport):
        return {}
    return {
        "api_version": transport.api_version,
        "vduse_features": uapi.vduse_feature_names(transport.vduse_features),
        "msg_timeout_s": config.device.msg_timeout_s,
        "bounce_size_bytes": config.device.effective_bounce_size_bytes if config.device.bus == "virtio" else 0,
        "regions": transport.region_count(),
    }
