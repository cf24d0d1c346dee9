"""A server of the release that PYTHONPATH names, this one or an earlier one. Its device lives on a bus elsewhere.

Arguments: the bus, the base of run directories, and keywords of `make_config` as JSON. Prints its info as JSON once it
serves.
"""

from __future__ import annotations

import json
import logging
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def find(name: str, *modules: str) -> Any:
    """Return `name` of the first of these modules that the release has; later releases have moved it."""
    for module in modules:
        try:
            return getattr(import_module(f"vdusefast.{module}"), name)
        except ModuleNotFoundError as error:
            if not f"vdusefast.{module}".startswith(error.name or "?"):
                raise
    raise ModuleNotFoundError(f"this release has none of {modules}")


def main(bus: str, base: str, keywords: str) -> None:
    device_class = find("Device", "api")
    transport_class = find("RemoteLoopbackTransport", "transport.loopback_remote", "bench.torture.loopback_host")
    service_class = find("Service", "server.service", "daemon")
    config = find("resolve_cpus", "config")(find("make_config", "config")(**json.loads(keywords)))

    class Service(service_class):  # type: ignore[misc]
        def _can_leave(self) -> bool:
            """Return that the bus keeps the device, as the kernel does; release 0.1 asks for the kernel itself."""
            return True

    def make_device(config: Any, base: Path) -> Any:
        return device_class(config, run_dir=base, transport=transport_class(Path(bus)))

    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    Service(config, Path(base), make_device=make_device).run(lambda info: print(json.dumps(info), flush=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
