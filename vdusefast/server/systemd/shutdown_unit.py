"""The service that looks after orphaned devices when systemd shuts the machine down.

A file system on a device without a server could never be unmounted. The service does nothing while the machine
runs. When it is stopped in a shutdown, it serves such devices until nobody uses them, and removes them. The first
server of a machine starts it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vdusefast.base import spawn
from vdusefast.base.start_mode import StartMode
from vdusefast.errors import VdusefastError

if TYPE_CHECKING:
    from vdusefast.config import Config

UNIT = "vdusefast-shutdown.service"
REMOVE_LIMIT_S = 10.0
START_LIMIT_S = 80.0  # for a server whose store may be away; systemd waits for 90 s until it gives up an unmount
PROPERTIES = (
    *("Type=oneshot", "RemainAfterExit=yes", "KillMode=process", "TimeoutStopSec=180"),
    *("DefaultDependencies=no", "Conflicts=shutdown.target", "Before=shutdown.target", "LimitMEMLOCK=infinity"),
    "OOMScoreAdjust=-900",
)
# Of a unit without a process that stands between that service and what a device's store is on: a server that has died
# does not keep its store mounted.
STORE_PROPERTIES = (
    *("Type=oneshot", "RemainAfterExit=yes", "DefaultDependencies=no", "Conflicts=shutdown.target"),
    *("Before=shutdown.target", f"Before={UNIT}"),
)

_log = logging.getLogger("vdusefast")


def ensure(config: Config) -> None:
    """Have the service run where systemd is process 1 and ours to ask, and keep a store until then. Does not wait."""
    from vdusefast.server.systemd import transient_unit
    from vdusefast.server.systemd import unit as systemd_unit

    if not transient_unit.can_ask():
        return
    command = _command()

    def start() -> None:
        name = config.device.name
        order = [f"After={unit}" for unit in systemd_unit.needed_units(config, command[0])]
        try:
            transient_unit.start_passive(UNIT, "removes orphaned block devices at shutdown", PROPERTIES, command)
            transient_unit.stop_unit(_store_unit(name))  # that of a device of this name which is no more
            transient_unit.start_passive(
                _store_unit(name), f"store of block device {name}", [*STORE_PROPERTIES, *order]
            )
        except VdusefastError as error:
            _log.warning("%s: orphaned devices may delay a shutdown", error)

    threading.Thread(target=start, name="vdusefast-shutdown-unit", daemon=True).start()


def forget(name: str) -> None:
    """Have the store of a device that is no more be unmounted at any time."""
    from vdusefast.server.systemd import transient_unit

    if transient_unit.can_ask():
        try:
            transient_unit.stop_unit(_store_unit(name), wait=False)
        except VdusefastError as error:
            _log.warning("%s", error)


def _store_unit(name: str) -> str:
    return f"vdusefast-store-{name}.service"


def _command() -> list[str]:
    return spawn.command("server.systemd.shutdown_unit")


def main(_arguments: Sequence[str] = ()) -> None:
    """Look after orphaned devices until there are none, or until systemd waits for nothing else."""
    from vdusefast.base import logs
    from vdusefast.host import run_dirs, shutdown
    from vdusefast.server import registry
    from vdusefast.state import orphans as orphaned

    with logs.log_to_stderr():
        if not shutdown.is_going_down():
            return
        base = registry.base_directory()
        bystanders, orphans = shutdown.Bystanders(), Orphans()
        while names := [name for name in run_dirs.device_names(base) if orphaned.in_kernel(name)]:
            for name in names:
                orphans.look_after(base / name)
            if bystanders.are_done():
                break
            time.sleep(shutdown.LOOK_S)


class Orphans:
    """Devices that were found without a server."""

    def __init__(self) -> None:
        self._tried: set[str] = set()  # one that cannot be served is not tried again
        self._served: set[str] = set()

    def look_after(self, path: Path) -> None:
        """Serve a device without a server; remove one that we serve once it is not in use."""
        from vdusefast.state import orphans as orphaned

        name = path.name
        try:
            if name in self._served:
                self._remove(path)
            elif name not in self._tried and orphaned.is_left(path) and not orphaned.is_broken(name):
                self._tried.add(name)
                self._serve(path)
        except VdusefastError as error:
            _log.info("%s", error)

    def _remove(self, path: Path) -> None:
        """Remove a device. Raises DeviceBusyError while it is in use."""
        from vdusefast.server.lifecycle import delete_served
        from vdusefast.server.rpc_client import RpcClient

        with RpcClient(path) as client:
            delete_served(client, path, False, REMOVE_LIMIT_S)

    def _serve(self, path: Path) -> None:
        """Serve an orphaned device; where its store is away, have its requests fail. Raises VdusefastError."""
        from vdusefast.server import launch
        from vdusefast.state import orphans as orphaned

        config = orphaned.load_state(path).config
        try:
            launch.start(config, START_LIMIT_S, mode=StartMode.ADD, own_service=False)
        except launch.InterruptedStartError:
            raise
        except VdusefastError as error:
            _log.warning("%s: its requests fail", error)
            launch.start(config, mode=StartMode.FAIL, own_service=False)
        self._served.add(path.name)
