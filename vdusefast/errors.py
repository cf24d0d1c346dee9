"""Exceptions of vdusefast. Each carries the exit status that the command line ends with."""

from __future__ import annotations


class VdusefastError(Exception):
    """Something failed; the message says what, to which device and queue, and what to do."""

    exit_code = 1


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


_BY_EXIT_CODE = {
    cls.exit_code: cls for cls in (ConfigError, DeviceNotFoundError, DeviceBusyError, KernelSupportError, TimedOutError)
}


def from_exit_code(message: str, exit_code: int, otherwise: type[VdusefastError] = VdusefastError) -> VdusefastError:
    """Return the exception that ends with `exit_code`, as another process reported it; `otherwise` for 1."""
    return _BY_EXIT_CODE.get(exit_code, otherwise)(message)
