"""Exceptions of vdusefast. Each carries the exit status that the command line ends with."""

from __future__ import annotations

from vdusefast.base.printable import printable
from vdusefast.base.secret import redact

EXIT_DELETED = 7  # tells systemd from a server that has come to its end otherwise: it is not to be started again


class VdusefastError(Exception):
    """Something failed; the message says what, to which device and queue, and what to do: one line without secrets."""

    exit_code = 1

    def __str__(self) -> str:
        return printable(redact(super().__str__()))


class ConfigError(VdusefastError):
    """The configuration or the command line is wrong."""

    exit_code = 2


class DeviceNotFoundError(VdusefastError):
    """No device has that name."""

    exit_code = 3


class DeviceBusyError(VdusefastError):
    """The device, its name or its store is in use."""

    exit_code = 4


class KernelSupportError(VdusefastError):
    """The kernel lacks something that was asked for, or forbids it."""

    exit_code = 5


class TimedOutError(VdusefastError):
    """Something did not happen within its limit."""

    exit_code = 6


class BackendError(VdusefastError):
    """A store cannot be opened or used."""


class WorkerError(VdusefastError):
    """A worker process failed; the message names its queue, pid and cause."""


class UpgradedError(WorkerError):
    """No worker can be started, as the files of vdusefast are of another build by now."""


_BY_EXIT_CODE = {
    cls.exit_code: cls for cls in (ConfigError, DeviceNotFoundError, DeviceBusyError, KernelSupportError, TimedOutError)
}


def from_exit_code(message: str, exit_code: int, otherwise: type[VdusefastError] = VdusefastError) -> VdusefastError:
    """Return the exception that ends with `exit_code`, as another process reported it; `otherwise` for 1."""
    return _BY_EXIT_CODE.get(exit_code, otherwise)(message)
