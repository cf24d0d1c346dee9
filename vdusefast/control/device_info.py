"""A device as plain values, for people and for JSON: what `vdusefast show` prints."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from vdusefast.base.kinds import TransportKind
from vdusefast.base.secret import redact
from vdusefast.host import containers
from vdusefast.transport import uapi

if TYPE_CHECKING:
    from vdusefast.config import Config
    from vdusefast.control.device_model import BlockDevice
    from vdusefast.control.failures import PastFailure
    from vdusefast.control.placement import Placement
    from vdusefast.control.states import DeviceState
    from vdusefast.control.stats import DeviceStats
    from vdusefast.errors import VdusefastError
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
    last_failure: PastFailure | None,
    stats: DeviceStats,
    memory: str,
    placement: Placement,
) -> dict[str, Any]:
    """Return everything known about a device that has been started.

    failure: the present one. last_failure: the last that has ended. memory: the kind of memory that requests' data lies
    in. placement: where workers and interrupts are.
    """
    from vdusefast.transport.kernel import KernelTransport

    device = config.device
    counters = stats.to_dict()
    acked_features = _acked_features(model, transport)
    return {
        "name": device.name,
        "store_failure": counters["store_failure"],
        "state": str(state),
        "transport": transport.kind,
        "bus": device.bus if transport.kind == TransportKind.KERNEL else "",
        "driver": transport.driver,
        "node": transport.node,
        "device_number": transport.node_number if isinstance(transport, KernelTransport) else "",
        "pid": os.getpid(),
        "pid_namespace": containers.pid_namespace(),
        "size_bytes": model.capacity_sectors * 512,
        "block_size_bytes": model.block_size_bytes,
        "read_only": model.read_only,
        "serial": model.serial,
        "backend": redact(config.backend.uri),
        "cache": config.backend.cache,
        "discard": config.backend.discard,
        "write_zeroes": config.backend.write_zeroes,
        "memory": memory,
        "ring": ring_text(acked_features),
        "offered_features": uapi.names_of(model.offered_features),
        "acked_features": uapi.names_of(acked_features),
        "status": model.status,
        "status_names": uapi.status_names(model.status),
        **_kernel_only(config, transport),
        "failure": str(failure) if failure is not None else "",
        "last_failure": _past(last_failure),
        "placement": placement.to_dict(),
        "queues": [{**queue, "size": queue["size"] or device.effective_queue_size} for queue in counters["queues"]],
        "total": counters["total"],
    }


def ring_text(acked_features: int) -> str:
    """Return the form of the virtqueues that driver and device have agreed on, "" before they have.

    The feature bits of VIRTIO 1.3, 6, say whether the ring is packed or IN_ORDER.
    """
    if not acked_features:
        return ""
    form = "packed" if acked_features & RING_PACKED else "split"
    return ", ".join([form, *(name for bit, name in RING_OPTIONS.items() if acked_features & bit)])


def _past(failure: PastFailure | None) -> dict[str, Any] | None:
    """Return a failure that has ended; times are seconds since 1970, and how long ago it ended."""
    if failure is None:
        return None
    times = {"began_s": round(failure.began_s, 1), "ended_s": round(failure.ended_s, 1)}
    return {"text": str(failure.error), **times, "age_s": round(max(0.0, time.time() - failure.ended_s), 1)}


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
        "bounce_size_bytes": transport.bounce_size_bytes if config.device.bus.copies_data else 0,
        "regions": transport.region_count(),
    }
