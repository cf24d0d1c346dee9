"""What a device is put together from, by its configuration: its store, its transport, what its workers are told."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from vdusefast.backends import SECTOR_BYTES, Store, find, open_store, plugin_store
from vdusefast.config import BackendConfig, Config
from vdusefast.control import WorkerSpec
from vdusefast.errors import BackendError, DeviceBusyError
from vdusefast.transport.loopback import LoopbackTransport

if TYPE_CHECKING:
    from pathlib import Path

    from vdusefast.device import BlockDevice
    from vdusefast.relay_control import RelayControl
    from vdusefast.saved_state import SavedState
    from vdusefast.shm import SharedPages
    from vdusefast.transport import Transport

SLOT_MAX = 1024  # VF_SLOT_MAX: requests of a queue in flight
LEFT_STORE_S = 10.0  # for the last workers of a server that was killed to end
LEFT_STORE_LOOK_S = 0.01


def open_device_store(config: Config, state: SavedState | None, *, fail_requests: bool = False) -> Store:
    """Open the store of a device. That of one that was left may be locked for a moment by its last workers.

    state: that of a device that is to be taken over. fail_requests: its requests are only to be failed, for which the
    store is not needed. Raises as `open_store` does, BackendError for a store that has ended with its server.
    """
    name, backend, read_only = config.device.name, config.backend, config.device.read_only
    if fail_requests and state is not None:
        return open_store(BackendConfig(uri=f"null:{state.capacity_sectors * SECTOR_BYTES}"), read_only=read_only)
    is_same = state is not None and backend.uri == state.config.backend.uri and find(backend.uri).plugin
    if state is not None and state.described is not None and is_same:
        # It may be away: the device's messages are to be answered all the same, and its requests wait.
        described = state.described._replace(size_bytes=state.capacity_sectors * SECTOR_BYTES)
        return plugin_store(backend, read_only=read_only, described=described)
    deadline = time.monotonic() + (LEFT_STORE_S if state is not None else 0)
    while True:
        try:
            store = open_store(backend, read_only=read_only)
            break
        except DeviceBusyError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(LEFT_STORE_LOOK_S)
    if state is not None and store.kind == "memory":
        store.close()
        raise BackendError(
            f"{name}: its bytes were in the memory of the server that has ended: nobody can go on with it; "
            f"vdusefast del {name} --force removes it"
        )
    return store


def make_transport(config: Config, state: SavedState | None) -> Transport:
    """Return the transport that `config` asks for. state: that of a device that is to be taken over."""
    device = config.device
    if device.transport != "kernel":
        return LoopbackTransport()
    from vdusefast.transport.kernel import KernelOptions, KernelTransport

    return KernelTransport(
        KernelOptions(
            bus=device.bus,
            msg_timeout_s=device.msg_timeout_s,
            bounce_size_bytes=device.effective_bounce_size_bytes,
            attach_timeout_s=device.attach_timeout_s,
            user_memory=_wants_user_memory(config),
            scheduler=device.scheduler,
            irq_cpus=tuple(queue.irq_cpu for queue in config.queue),
            api_version=state.api_version if state is not None else 0,
            vduse_features=state.vduse_features if state is not None else 0,
        )
    )


def _wants_user_memory(config: Config) -> bool:
    """Tell whether memory of ours is to take the place of the kernel's bounce pages."""
    if config.device.bus != "virtio":  # a client's memory is used as it is
        return False
    if config.device.user_memory == "auto":
        return config.backend.cache == "none" and config.backend.engine in ("auto", "uring")
    return config.device.user_memory == "on"


def make_relay(
    config: Config, device: BlockDevice, store: Store, directory: Path, on_store_size: Callable[[int], None]
) -> RelayControl | None:
    """Return the relay that the workers share a store through, None where each has it by itself. Raises OSError."""
    if store.spec is None or store.shareable or device.queue_count == 1:
        return None
    from vdusefast.relay_control import RelayControl, check_relay

    check_relay()
    return RelayControl(
        config.device.name,
        store.spec._replace(
            queue_count=device.queue_count,
            size_bytes=device.capacity_sectors * SECTOR_BYTES,
            block_size_bytes=device.block_size_bytes,
        ),
        slot_count=min(device.queue_size, SLOT_MAX),
        directory=directory,
        on_store_size=on_store_size,
    )


def worker_specs(
    config: Config, device: BlockDevice, store: Store, pages: SharedPages, relay: RelayControl | None = None
) -> list[WorkerSpec]:
    """Return what each queue's worker is told; the supervisor fills in its own descriptors.

    Borrows store, pages and relay, which is None where the workers have the store by themselves.
    """
    return [
        WorkerSpec(
            device=device.name,
            queue=index,
            queue_size=device.queue_size,
            supervisor_pid=os.getpid(),
            ctl_fd=-1,
            shm_fd=pages.fd,
            kick_fd=-1,
            cpu=-1 if queue.cpu is None else queue.cpu,
            poll_us=queue.spin_limit_us,
            irq_delay_us=queue.irq_delay_us,
            store=store.kind,
            store_fd=store.fd,
            engine=config.backend.engine,
            cache=config.backend.cache,
            merge=int(config.backend.merge),
            sqpoll=int(config.backend.sqpoll),
            map_reads=int(config.backend.map == "auto"),
            direct_align=store.direct_align,
            relay_fd=-1 if relay is None else relay.socket_fd,
            store_notes_fd=store.spec.notes_fd if store.spec else -1,
            store_spec=store.spec._replace(queue_count=device.queue_count).to_json() if store.spec else "",
            faults=store.faults,
            capacity_sectors=device.capacity_sectors,
            block_size=device.block_size_bytes,
            read_only=int(device.read_only),
            seg_max=device.seg_max,
            discard_max_sectors=device.discard_max_sectors,
            discard_max_seg=device.discard_max_seg,
            write_zeroes_max_sectors=device.write_zeroes_max_sectors,
            write_zeroes_max_seg=device.write_zeroes_max_seg,
            serial=device.serial,
        )
        for index, queue in enumerate(config.queue)
    ]
