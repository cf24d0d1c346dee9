"""VDUSE block devices served from Python at the speed of C.

Names are imported on first use: a worker process imports this package and must not pay for what it does not need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from vdusefast.api import Device
    from vdusefast.backends import Store, open_store
    from vdusefast.backends.python_class import Backend, Batch
    from vdusefast.config import BackendConfig, Config, DeviceConfig, QueueConfig, load_config, make_config
    from vdusefast.errors import (
        BackendError,
        ConfigError,
        DeviceBusyError,
        DeviceNotFoundError,
        KernelSupportError,
        TimedOutError,
        VdusefastError,
        WorkerError,
    )
    from vdusefast.units import parse_size

_MODULE_OF = {
    "Device": "api",
    "Backend": "backends.python_class",
    "Batch": "backends.python_class",
    "Store": "backends",
    "open_store": "backends",
    "BackendConfig": "config",
    "Config": "config",
    "DeviceConfig": "config",
    "QueueConfig": "config",
    "load_config": "config",
    "make_config": "config",
    "parse_size": "units",
    "BackendError": "errors",
    "ConfigError": "errors",
    "DeviceBusyError": "errors",
    "DeviceNotFoundError": "errors",
    "KernelSupportError": "errors",
    "TimedOutError": "errors",
    "VdusefastError": "errors",
    "WorkerError": "errors",
}

__all__ = [
    "Backend",
    "BackendConfig",
    "BackendError",
    "Batch",
    "Config",
    "ConfigError",
    "Device",
    "DeviceBusyError",
    "DeviceConfig",
    "DeviceNotFoundError",
    "KernelSupportError",
    "QueueConfig",
    "Store",
    "TimedOutError",
    "VdusefastError",
    "WorkerError",
    "__version__",
    "load_config",
    "make_config",
    "open_store",
    "parse_size",
]


def __getattr__(name: str) -> Any:
    """Import what `name` stands for (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, imported or not."""
    return sorted(__all__)
