"""Types for words of the configuration, the saved state and messages: transports, buses, cache modes.

Each member is the word itself, a string. The type, or its owner, knows the consequences.
"""

from __future__ import annotations

from enum import StrEnum


class TransportKind(StrEnum):
    """The connection of a device to its driver."""

    AUTO = "auto"  # in a configuration: kernel for the commands `add` and `serve`, loopback for the Python API
    LOOPBACK = "loopback"
    KERNEL = "kernel"  # the device is in the kernel, and stays there when its server ends

    @property
    def resolved(self) -> TransportKind:
        """What a device of the Python API has."""
        return TransportKind.LOOPBACK if self is TransportKind.AUTO else self


class Bus(StrEnum):
    """The driver for a device on the kernel's vDPA bus."""

    VIRTIO = "virtio"  # a disk of this machine, /dev/vdX: data is copied through bounce pages
    VHOST = "vhost"  # /dev/vhost-vdpa-N, whose client gives its own memory

    @property
    def copies_data(self) -> bool:
        """Whether the kernel copies data through bounce pages."""
        return self is Bus.VIRTIO


class CacheMode(StrEnum):
    """When writes are durable, and whether they go through the page cache."""

    WRITEBACK = "writeback"  # at the next flush
    WRITETHROUGH = "writethrough"  # when the write is complete
    NONE = "none"  # O_DIRECT; at the next flush
    UNSAFE = "unsafe"  # some time: a flush does nothing


class StoreKind(StrEnum):
    """How the core's engines reach a store (enum vf_store_kind). One with an engine of its own has its first scheme."""

    FILE = "file"
    BLOCKDEV = "blockdev"
    MEMORY = "memory"
    NULL = "null"
