"""Assemble a device from its configuration: its store, its transport, the specs of its workers."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vdusefast.backends import Store, find, lvm, open_store, plugin_store
from vdusefast.config import BackendConfig, Config
from vdusefast.errors import BackendError, DeviceBusyError, VdusefastError
from vdusefast.state.saved_state import check_store
from vdusefast.transport.loopback import LoopbackTransport
from vdusefast.units import SECTOR_BYTES
from vdusefast.worker.protocol import WorkerSpec

if TYPE_CHECKING:
    from pathlib import Path

    from vdusefast.control.device_model import BlockDevice
    from vdusefast.control.relay_control import RelayControl
    from vdusefast.state.keeper_control import KeeperControl
    from vdusefast.state.saved_state import SavedState
    from vdusefast.state.shared_pages import SharedPages
    from vdusefast.transport import Transport

_log = logging.getLogger("vdusefast")

SLOT_MAX = 1024  # VF_SLOT_MAX: requests of a queue in flight
LEFT_STORE_S = 10.0  # for the last workers of a server that was killed to end
LEFT_STORE_LOOK_S = 0.01


def open_device_store(
    config: Config,
    state: SavedState | None,
    *,
    fail_requests: bool = False,
    prove: bool = False,
    look: bool = True,
    is_new: bool = False,
) -> Store:
    """Open the store of a device. An orphan's store may be locked for a moment by its last workers.

    is_new: see backends.open_store.
    state: of a device that is to be adopted. fail_requests: its requests are only to be failed, for which the store is
    not needed. prove: another server still has the store open: it is opened a second time. look: then also ask a
    plugin's store, rather than believe what is known of it. Raises as `open_store` does, BackendError for a store that
    has ended with its server.
    """
    backend, read_only = config.backend, config.device.read_only
    if fail_requests and state is not None:
        return open_store(BackendConfig(uri=f"null:{state.capacity_sectors * SECTOR_BYTES}"), read_only=read_only)
    is_same = state is not None and backend.uri == state.config.backend.uri and find(backend.uri).plugin
    if state is not None and state.described is not None and is_same and not (prove and look):
        # It may be away: the device's messages are to be answered all the same, and its requests wait.
        described = state.described._replace(
            size_bytes=state.capacity_sectors * SECTOR_BYTES,
            identity=state.identity.get("id", "") or _look_who(backend, read_only),
        )
        return plugin_store(backend, read_only=read_only, described=described)
    deadline = time.monotonic() + (LEFT_STORE_S if state is not None and not prove else 0)
    while True:
        try:
            store = open_store(backend, read_only=read_only, claim=not prove, is_new=is_new)
            break
        except DeviceBusyError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(LEFT_STORE_LOOK_S)
    try:
        if is_new and config.device.is_kernel_disk:
            lvm.check(store)
        if state is not None:
            _check_store(state, store)
        _check_loops(store, is_served=state is not None)
    except BaseException:
        store.close()
        raise
    return store


def _look_who(backend: BackendConfig, read_only: bool) -> str:
    """Return the identity of a plugin's store, "" where it has none or cannot be reached."""
    if not find(backend.uri).identifies:
        return ""
    try:
        return plugin_store(backend, read_only=read_only).identity.get("id", "")
    except VdusefastError:
        return ""


def _check_loops(store: Store, *, is_served: bool) -> None:
    """Raise DeviceBusyError while a loop device is attached to the store.

    is_served: a previous server had it already, and the users of its device wait: only a warning.
    """
    from vdusefast.backends.file import find_loops

    loops = [f"/dev/{name}" for name in find_loops(store)]
    if not loops:
        return
    text = (
        f"{store.uri}: attached to {', '.join(loops)} as well, which takes no lock: writing by both would damage it; "
        f"detach that first: losetup --detach {' '.join(loops)}"
    )
    if not is_served:
        raise DeviceBusyError(text)
    _log.warning("%s", text)


def _check_store(state: SavedState, store: Store) -> None:
    """Raise BackendError unless `store` is the one that the previous server served."""
    if not store.persistent:
        name = state.config.device.name
        raise BackendError(
            f"{name}: its bytes were in the memory of the server that has ended: no server can adopt it; "
            f"vdusefast del {name} --force removes it"
        )
    check_store(state, store)


def make_transport(config: Config, state: SavedState | None) -> Transport:
    """Return the transport that `config` asks for. state: of a device that is to be adopted."""
    device = config.device
    if not device.is_in_kernel:
        return LoopbackTransport()
    from vdusefast.transport.kernel import KernelOptions, KernelTransport

    return KernelTransport(
        KernelOptions(
            bus=device.bus,
            msg_timeout_s=device.msg_timeout_s,
            bounce_size_bytes=device.effective_bounce_size_bytes,
            bounce_size_min_bytes=device.bounce_size_min_bytes,
            attach_timeout_s=device.attach_timeout_s,
            user_memory=_wants_user_memory(config),
            scheduler=device.scheduler,
            irq_cpus=tuple(queue.irq_cpu for queue in config.queue),
            api_version=state.api_version if state is not None else 0,
            vduse_features=state.vduse_features if state is not None else 0,
        )
    )


def _wants_user_memory(config: Config) -> bool:
    """Return whether user memory is to replace the kernel's bounce pages."""
    if not config.device.bus.copies_data:  # a client's memory is used as it is
        return False
    if config.device.user_memory == "auto":
        return config.backend.is_direct and config.backend.engine in ("auto", "uring")
    return config.device.user_memory == "on"


def shares_by_relay(device: BlockDevice, store: Store) -> bool:
    """Return whether one process has the store open, and the workers use it through that process."""
    if store.spec is None or device.queue_count == 1:
        return False
    # A process that changes a part of a block must know of all writes to that block.
    return not store.shareable or device.block_size_bytes < store.granule_bytes


def make_keeper(
    device: BlockDevice, store: Store, directory: Path, on_failure: Callable[[VdusefastError], None], *, adopt: bool
) -> KeeperControl | None:
    """Return the control of the keeper of connections to a store, None where none is needed. Raises OSError.

    adopt: the device is an orphan, and its last server may have left a keeper.
    """
    if store.spec is None or not find(store.uri).keeps:
        return None
    from vdusefast.base.guard import Guard
    from vdusefast.state.keeper_control import KeeperControl

    guard = Guard(device.name, on_failure)
    count = 1 if shares_by_relay(device, store) else device.queue_count
    return KeeperControl(device.name, directory, count, store.spec.notes_fd, guard, adopt=adopt)


def make_relay(
    config: Config,
    device: BlockDevice,
    store: Store,
    directory: Path,
    on_store_size: Callable[[int], None],
    on_failure: Callable[[VdusefastError], None],
    keeper: KeeperControl | None = None,
) -> RelayControl | None:
    """Return the relay through which the workers share a store, None where each opens the store. Raises OSError."""
    if not shares_by_relay(device, store):
        return None
    assert store.spec is not None
    from vdusefast.control.relay_control import RelayControl, check_relay

    check_relay()
    return RelayControl(
        config.device.name,
        store.spec._replace(
            queue_count=device.queue_count,
            size_bytes=device.capacity_sectors * SECTOR_BYTES,
            block_size_bytes=device.block_size_bytes,
            sole=True,
            hold_fd=-1 if keeper is None else keeper.hold_fd(0),
        ),
        slot_count=min(device.queue_size, SLOT_MAX),
        directory=directory,
        on_store_size=on_store_size,
        on_failure=on_failure,
        lock_memory=config.device.locks_memory,
    )


def _worker_store(device: BlockDevice, store: Store) -> str:
    """Return the description of the store for each worker's module."""
    if store.spec is None:
        return ""
    return store.spec._replace(queue_count=device.queue_count, sole=device.queue_count == 1).to_json()


def worker_specs(
    config: Config,
    device: BlockDevice,
    store: Store,
    pages: SharedPages,
    relay: RelayControl | None = None,
    witness_fds: Sequence[int] = (),
    keeper: KeeperControl | None = None,
) -> list[WorkerSpec]:
    """Return the spec of each queue's worker; the supervisor fills in its own descriptors.

    Borrows all arguments. relay: None where each worker opens the store. witness_fds: the witness of each
    queue (write_back.py), where there are any.
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
            lock_memory=int(config.device.locks_memory),
            poll_us=queue.spin_limit_us,
            irq_delay_us=queue.irq_delay_us,
            store=store.kind,
            store_fd=store.fd,
            store_witness_fd=witness_fds[index] if witness_fds else -1,
            engine=config.backend.engine,
            cache=config.backend.cache,
            merge=int(config.backend.merge),
            sqpoll=int(config.backend.sqpoll),
            map_reads=int(config.backend.map == "auto"),
            direct_align=store.direct_align,
            granule_bytes=store.granule_bytes,
            discard_unit_bytes=store.discard_granularity_bytes,
            discard_offset_bytes=store.discard_offset_bytes,
            relay_fd=-1 if relay is None else relay.socket_fds[index],
            relay_memory_fd=-1 if relay is None else relay.memory_fds[index],
            store_hold_fd=-1 if keeper is None or relay is not None else keeper.hold_fd(index),
            store_notes_fd=store.spec.notes_fd if store.spec else -1,
            store_spec=_worker_store(device, store),
            faults=store.faults,
            capacity_sectors=device.capacity_sectors,
            block_size=device.block_size_bytes,
            read_only=int(device.read_only),
            limits=device.limits,
            ignores_discards=int(config.backend.discard == "ignore"),
            keeps_zeroes=int(config.backend.keeps_zeroes),
            serial=device.serial,
        )
        for index, queue in enumerate(config.queue)
    ]
