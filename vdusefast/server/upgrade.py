"""Bring a device to the files that are on disk, when these are of another build than the server that has it.

Such a server cannot start workers any more. It keeps those that it has, and as soon as it needs a new one, a process of
the new files does what `vdusefast restart` does: it proves that it can serve the device, and takes it over.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from vdusefast.base import spawn

RETRY_S = 60.0
SAID_MAX_BYTES = 4096
RESTART = "restart"

_log = logging.getLogger("vdusefast")


class Upgrader:
    """The upgrade of one device, from its old server's side. Call `look` again and again."""

    def __init__(self, name: str, base: Path, *, command: Sequence[str] | None = None) -> None:
        """Prepare. base: where run directories live. command: in place of the new files."""
        self._name = name
        self._base = base
        self._command = list(command or _default_command())
        self._process: subprocess.Popen[bytes] | None = None
        self._said_fd = -1
        self._next_s = 0.0

    def look(self, upgraded: str) -> None:
        """Begin an upgrade, or check the one that was begun.

        upgraded: why one is needed, "" when none is. One that has failed is tried again after a while.
        """
        if self._process is not None:
            if self._process.poll() is not None:
                self._judge(self._process.returncode)
        elif upgraded and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + RETRY_S
            _log.warning("%s: %s: a new server is started, which takes the device over", self._name, upgraded)
            try:
                self._begin()
            except OSError as error:
                self._fail(error.strerror or str(error))

    def close(self) -> None:
        """Forget a process that still runs: it takes the device over. A second call does nothing."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.returncode = 0
            self._process = None
        if self._said_fd >= 0:
            os.close(self._said_fd)
            self._said_fd = -1

    def _begin(self) -> None:
        self._said_fd = os.memfd_create("vdusefast-upgrade", os.MFD_CLOEXEC)
        try:
            self._process = subprocess.Popen(
                [*self._command, RESTART, self._name],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._said_fd,
                start_new_session=True,
                env={**os.environ, "VDUSEFAST_RUN_DIR": os.fspath(self._base)},
            )
        except OSError:
            self.close()
            raise

    def _judge(self, status: int) -> None:
        said = os.pread(self._said_fd, SAID_MAX_BYTES, 0).decode(errors="replace").strip().splitlines()
        self.close()
        if status:
            self._fail(said[-1] if said else f"it ended with status {status}")

    def _fail(self, why: str) -> None:
        _log.error(
            "%s: a server of the new files cannot take it over: %s; the workers that are there serve on, and it is "
            "tried again in %g s",
            *(self._name, why, RETRY_S),
        )


def _default_command() -> list[str]:
    """Return the command line as it is on disk then: `vdusefast.cli.run` stays where it is."""
    return spawn.command("cli", "run")
