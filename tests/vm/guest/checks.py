"""The list of checks: what a scenario module registers, and the runner and the host's tests read.

A check is a function without arguments that raises when something is not as promised. Its name is its module's,
without `scenario_`, a dot, and its own. Importing the scenario modules needs neither root nor a guest.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

# In this order: the first need modules that are not loaded yet, the last looks back on all of them.
MODULES = (
    "scenario_no_modules",
    "scenario_bad_input",
    "scenario_block",
    "scenario_filesystem",
    "scenario_fio",
    "scenario_settings",
    "scenario_polling",
    "scenario_resize",
    "scenario_vhost",
    "scenario_binding",
    "scenario_delete",
    "scenario_storage",
    "scenario_serve",
    "scenario_failure",
    "scenario_nbd",
    "scenario_python",
    "scenario_recovery",
    "scenario_memory",
    "scenario_torture",
    "scenario_many",
    "scenario_documents",
    "scenario_kernel_log",
)

SLOWEST = 2.0


@dataclass(frozen=True)
class Check:
    """One check. limit_s: where it hangs. keeps: devices may stay when it ends, for the next check of its module."""

    name: str
    function: Callable[[], object]
    limit_s: float
    keeps: bool


_found: dict[str, Check] = {}


def check(*, limit_s: float = 30.0, keeps: bool = False) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """Register a function as a check that may take `limit_s` under emulation, on a busy host SLOWEST times that."""

    def register(function: Callable[[], object]) -> Callable[[], object]:
        name = f"{function.__module__.rpartition('.')[2].removeprefix('scenario_')}.{function.__name__}"
        assert name not in _found, name
        _found[name] = Check(name, function, SLOWEST * limit_s, keeps)
        return function

    return register


def load() -> list[Check]:
    """Import all scenario modules and return their checks in order."""
    for module in MODULES:
        importlib.import_module(module)
    return list(_found.values())
