"""The list of checks: what a scenario module registers, and the runner and the host's tests read.

A check is a function without arguments that raises when something is not as promised. Its name is its module's,
without `scenario_`, a dot, and its own. Importing the scenario modules needs neither root nor a guest.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass

# In this order: the first need modules that are not loaded yet, the last looks back on all of them.
MODULES = (
    "scenario_no_modules",
    "scenario_bad_input",
    "scenario_block",
    "scenario_filesystem",
    "scenario_stack",
    "scenario_fio",
    "scenario_settings",
    "scenario_polling",
    "scenario_resize",
    "scenario_vhost",
    "scenario_qemu",
    "scenario_binding",
    "scenario_delete",
    "scenario_users",
    "scenario_content",
    "scenario_storage",
    "scenario_limits",
    "scenario_serve",
    "scenario_failure",
    "scenario_nbd",
    "scenario_python",
    "scenario_recovery",
    "scenario_memory",
    "scenario_torture",
    "scenario_many",
    "scenario_container",
    "scenario_documents",
    "scenario_kernel_log",
)

# Beginnings of the names of checks that an older kernel runs in `make soak` alone: what they test is our own, or long
# and much the same on all kernels. Checks that the kernel takes part in (binding, rings, resizing, recovery, removal,
# limits of the disk) run on each.
NEWEST_KERNEL_ONLY = (
    "no_modules.none_is_loaded",
    "no_modules.check_says_what_to_load",
    "no_modules.no_",
    "bad_input.name_taken_by_us",
    "bad_input.not_root",
    "bad_input.root_without_",
    "bad_input.no_",
    "filesystem.xfs",  # ext4 runs on each
    "stack.",
    "fio.",
    "settings.pinned_workers",
    "settings.by_options",
    "polling.",
    "resize.mounted_ext4_grows",  # a disk grows under load on each
    "qemu.",
    "delete.refused_",
    "delete.forced_with_a_direct_store_",  # the same with a flush runs on each
    "users.",
    "content.",
    "storage.",
    "limits.disk_with_odd_limits_",  # stripes, which are limits as well, are shown on each
    "limits.large_discard_",
    "serve.",
    "failure.idle_worker_killed",
    "nbd.",
    "python.",
    "recovery.another_device_is_refused",
    "recovery.restart_that_would_fail_",
    "recovery.lost_run_directory_",
    "memory.servers_come_and_go_",  # servers come and go in all of recovery, on each
    "torture.",
    "many.by_command",
    "documents.",
)
# Checks with a longer form that `make soak` runs on every kernel: the same with more samples.
WITH_LONG_FORM = ("binding.again_and_again_", "fio.same_requests_", "torture.", "many.")
# Beginnings of the names of checks that `make soak` alone runs: another one is much like them.
IN_SOAK = ("content.lvm_finds_a_volume_on_a_partition_", "content.lvm_does_not_look_")
# In a guest of their own, by `make soak` alone.
SOAK_ONLY = ("container",)

SLOWEST = 4.0  # the suite runs other things beside the guests


@dataclass(frozen=True)
class Check:
    """One check. limit_s: where it hangs. keeps: devices may stay when it ends, for the next check of its module."""

    name: str
    function: Callable[[], object]
    limit_s: float
    keeps: bool


LONG = os.environ.get("VDUSEFAST_LONG") == "1"  # a check runs its long form


def times(short: int, long: int) -> int:
    """Return how often a check does something: `long` in `make soak`."""
    return long if LONG else short


_found: dict[str, Check] = {}


def check(*, limit_s: float = 30.0, keeps: bool = False) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """Register a function as a check that may take `limit_s` under emulation, on a busy host SLOWEST times that."""

    def register(function: Callable[[], object]) -> Callable[[], object]:
        name = f"{function.__module__.rpartition('.')[2].removeprefix('scenario_')}.{function.__name__}"
        assert name not in _found, name
        _found[name] = Check(name, function, SLOWEST * limit_s, keeps)
        return function

    return register


def left_out(*, is_newest: bool) -> tuple[str, ...]:
    """Return the beginnings of the names of checks that a kernel runs in `make soak` alone."""
    return IN_SOAK if is_newest else (*IN_SOAK, *NEWEST_KERNEL_ONLY)


def load() -> list[Check]:
    """Import all scenario modules and return their checks in order."""
    for module in MODULES:
        importlib.import_module(module)
    return list(_found.values())
