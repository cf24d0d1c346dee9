"""A device as plain values, for people and for JSON: what `vdusefast show` prints."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vdusefast.transport import uapi

if TYPE_CHECKING:
    from vdusefast.config import Config
    from vdusefast.device import BlockDevice
    from vdusefast.errors import VdusefastError
    from vdusefast.stats import DeviceStats
    from vdusefast.supervisor import DeviceState
    from vdusefast.transport import Transport


def describe(
    config: Config,
    model: BlockDevice,
    transport: Transport,
    state: DeviceState,
    failure: VdusefastError | None,
    stats: DeviceStats,
    memory: str,
) -> dict[str, Any]:
    """Return everything known about a device that has been started; `config` has its CPUs resolved."""
    device = config.device
    counters = stats.to_dict()
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
        "offered_features": uapi.names_of(model.offered_features),
        "acked_features": uapi.names_of(_acked_features(model, transport)),
        "status": model.status,
        "status_names": uapi.status_names(model.status),
        **_kernel_only(config, transport),
        "failure": str(failure) if failure is not None else "",
        "queues": [
            {**queue, "irq_cpu": -1 if wanted.irq_cpu is None else wanted.irq_cpu, "size": device.queue_size}
            for queue, wanted in zip(counters["queues"], config.queue, strict=True)
        ],
        "total": counters["total"],
    }


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
        "bounce_size_bytes": config.device.bounce_size_bytes if config.device.bus == "virtio" else 0,
        "regions": transport.region_count(),
    }
