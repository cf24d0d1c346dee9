"""Run by systemd in test_systemd_manager.py: a server of a made-up device, and what replaces it.

    managed_server.py serve BASE CONFIG         # ExecStart
    managed_server.py reload BASE CONFIG        # ExecReload
    managed_server.py replace BASE WORD...      # what a reload starts, in place of vdusefast.server.launch

While BASE/missing is there, the store cannot be opened. While BASE/slow is there, a server needs a second to let go of
its device, and notes in it that it has.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from daemon_rig import FakeDevice  # noqa: E402

from vdusefast import errors  # noqa: E402
from vdusefast.base import logs  # noqa: E402
from vdusefast.cli import app as cli  # noqa: E402
from vdusefast.config import Config, load_config  # noqa: E402
from vdusefast.server import launch  # noqa: E402
from vdusefast.server import service as daemon  # noqa: E402

LETTING_GO_S = 1.0


class ManagedDevice(FakeDevice):
    """One over a store that may be missing."""

    def __init__(self, config: Config, base: Path) -> None:
        super().__init__(config, base)
        self._missing = base / "missing"
        if self._missing.exists():
            self.start_error = self.proof_error = errors.BackendError("vd0: the store is missing")

    def hand_over(self, timeout_s: float = 30.0) -> None:
        if (note := self._base / "slow").exists():
            time.sleep(LETTING_GO_S)
            note.write_text(f"pid {os.getpid()} has let go")
        super().hand_over(timeout_s)

    def info(self) -> dict[str, Any]:
        return {**super().info(), "transport": "kernel"}


def main(mode: str, base: Path, words: list[str]) -> int:
    """Return the exit status."""
    os.environ["VDUSEFAST_RUN_DIR"] = str(base)
    daemon._make_device = ManagedDevice  # type: ignore[assignment]
    if mode == "replace":
        return launch.main(words)
    if mode == "reload":
        launch._default_command = lambda _function: [sys.executable, __file__, "replace", str(base)]
        return cli.run(["systemd-reload", *words])
    with logs.log_to_stderr():
        service = daemon.Service(load_config(words[0]), base)
        try:
            service.run(lambda info: None)
        except errors.VdusefastError as error:
            print(error, file=sys.stderr)
            return error.exit_code
    return service.exit_status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
