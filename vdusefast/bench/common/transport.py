"""The transport that a benchmark uses, and why."""

from __future__ import annotations

import shutil

from vdusefast.base.kinds import TransportKind
from vdusefast.errors import KernelSupportError


def choose_transport(wanted: str) -> tuple[TransportKind, str]:
    """Return the transport to use and the reason. Raises KernelSupportError for one that cannot be used here."""
    if wanted == TransportKind.LOOPBACK:
        return TransportKind.LOOPBACK, "as asked"
    from vdusefast.doctor import kernel_usable

    usable, reason = kernel_usable()
    if wanted == TransportKind.KERNEL:
        if not usable:
            raise KernelSupportError(f"--transport=kernel: {reason}; --transport=loopback needs no kernel module")
        return TransportKind.KERNEL, "as asked"
    if not usable:
        return TransportKind.LOOPBACK, f"it needs no kernel module; the kernel's VDUSE cannot be used: {reason}"
    if shutil.which("fio") is None:
        missing = "VDUSE can be used here, but fio, which would load the device, is not installed"
        return TransportKind.LOOPBACK, missing
    return TransportKind.KERNEL, reason or "VDUSE can be used here"
