"""The kernel's log as it grows; bench/vm/kernel_log.py says what must not be in it."""

from __future__ import annotations

import os

from bench.vm.kernel_log import findings

HANGING_STORE = r"^(\[ *[\d.]+\] )?block nbd\d+: Possible stuck request "  # for as long as a check lets it hang


def complaints(log: str) -> list[str]:
    """Return the lines of the kernel's log that must not be there. Requests fail, or hang, on purpose here."""
    return findings(log, [HANGING_STORE], io_errors=False)


class Reader:
    """The kernel's log since the last look, from the boot on. Borrows nothing; the descriptor stays open."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def read(self) -> list[str]:
        """Return the messages' first lines, without their prefixes."""
        lines = []
        while True:
            try:
                record = os.read(self._fd, 8192).decode(errors="replace")
            except BlockingIOError:
                return lines
            except BrokenPipeError:
                lines.append("WARNING: kernel messages were lost before they were read")
                continue
            lines.append(record.partition(";")[2].partition("\n")[0])
