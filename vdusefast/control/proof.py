"""Prove that this process could adopt a device while another one still serves it. The device is not changed.

Every step of a start is done once: read the state, open the store and compare it with the state, open the shared pages,
and start every worker, on pages of its own and without a driver. Resources that only one process can have are left out:
the lock of the store, the device's descriptor, and the engine of a plugin's store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vdusefast.control.assembly import make_transport, open_device_store, shares_by_relay, worker_specs
from vdusefast.control.device_model import BlockDevice
from vdusefast.control.placement import foresee
from vdusefast.control.supervisor import Supervisor
from vdusefast.state import orphans, pages_upgrade, saved_state
from vdusefast.state.shared_pages import SharedPages
from vdusefast.transport.loopback import LoopbackTransport

if TYPE_CHECKING:
    from vdusefast.backends import Store
    from vdusefast.config import Config
    from vdusefast.control.limits import Limits
    from vdusefast.transport import Transport

STOP_TIMEOUT_S = 10.0  # for the end of workers that have served nothing


def prove(
    config: Config,
    path: Path,
    transport: Transport | None = None,
    *,
    timeout_s: float,
    look: bool = True,
    command: Sequence[str] | None = None,
    limits: Limits | None = None,
) -> None:
    """Do the steps of adopting the device of the run directory at `path`, and undo them.

    transport: in place of the configured one (borrowed). timeout_s: for the workers to be ready. look: also ask a
    plugin's store, which may allow one client only, or be unreachable. command, limits: as of a `Device`. Raises the
    VdusefastError of the failed step.
    """
    state = orphans.load_state(path)
    placed = foresee(config).apply(config)
    transport = transport or make_transport(placed, state)
    saved_state.check_config(state, config, transport.kind)
    placed = saved_state.as_made(state, placed)
    with open_device_store(placed, state, prove=True, look=look) as store:
        model = BlockDevice(placed, store, state.shown)
        saved_state.check_shown(state, store)
        device = placed.device
        pages_upgrade.check(path / "pages", device.name, device.queues, device.effective_queue_size)
        transport.check(model.spec())
        if shares_by_relay(model, store):
            from vdusefast.control.relay_control import check_relay

            check_relay()
        asyncio.run(_try_workers(placed, model, store, timeout_s, command, limits))


async def _try_workers(
    config: Config,
    model: BlockDevice,
    store: Store,
    timeout_s: float,
    command: Sequence[str] | None,
    limits: Limits | None,
) -> None:
    """Start all workers and end them. Raises the error that the first one reports."""
    with SharedPages.create(None, model.name, model.queue_count, model.queue_size) as pages:
        specs = worker_specs(config, model, store, pages)
        if store.spec is not None:  # its engine may be one that no two processes can have at once
            specs = [spec._replace(engine="fail") for spec in specs]
        supervisor = Supervisor(model, LoopbackTransport(), pages, specs, command=command, limits=limits)
        await supervisor.start(timeout_s)
        await supervisor.stop(STOP_TIMEOUT_S)
    if supervisor.failure is not None:
        raise supervisor.failure
