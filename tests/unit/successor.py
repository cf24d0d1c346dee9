"""A server whose device lives on a bus of another process, for tests of what happens between two servers.

Arguments: the bus, the base of run directories, the configuration as JSON, "first" or "next", what the next one does
wrong once the device has been handed over ("" nothing, "start" it fails, "die", "hang"), and for how many seconds the
first one waits for it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import msgspec

from vdusefast.api import Device
from vdusefast.base import logs, time_limits
from vdusefast.base.start_mode import StartMode
from vdusefast.bench.torture.loopback_host import RemoteLoopbackTransport
from vdusefast.config import Config
from vdusefast.errors import VdusefastError
from vdusefast.server.service import Service


def main(bus: str, base: str, text: str, which: str, wrong: str, limit_s: str) -> int:
    config = msgspec.json.decode(text, type=Config)

    class Failing(Device):
        def start(self, *args: object, **words: object) -> None:
            if wrong == "start":
                raise VdusefastError("its worker fails")
            if wrong == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if wrong == "hang":
                time.sleep(60)
            super().start(*args, **words)  # type: ignore[arg-type]

    def make_device(config: Config, base: Path) -> Device:
        return Failing(config, run_dir=base, transport=RemoteLoopbackTransport(Path(bus)))

    time_limits.start_s = lambda attach_timeout_s: float(limit_s)
    with logs.log_to_stderr():
        service = Service(
            config, Path(base), StartMode.TAKE_OVER if which == "next" else StartMode.ADD, make_device=make_device
        )
        try:
            service.run(lambda info: print(info["pid"], flush=True))
        except VdusefastError as error:
            print(error, file=sys.stderr)
            return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
