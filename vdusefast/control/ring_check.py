"""Whether a ring that a driver has set up can be served, and which in-flight log belongs to it."""

from __future__ import annotations

from vdusefast.state import shared_pages
from vdusefast.transport.uapi import VIRTIO_F_IN_ORDER, is_packed


def check_ring_size(size: int, acked_features: int) -> str:
    """Return what is wrong with the size of a ring, "" for a size that VIRTIO 1.3, 2.7 and 2.8.10.1, allows.

    It may be larger than the device has offered: over vhost the kernel passes on whatever a driver sets up.
    """
    if 0 < size <= shared_pages.RING_SIZE_MAX and (is_packed(acked_features) or size & (size - 1) == 0):
        return ""
    kind = "size" if is_packed(acked_features) else "power of two"
    return f"its driver has set up a ring of {size} entries, which is no {kind} from 1 to {shared_pages.RING_SIZE_MAX}"


def log_format(acked_features: int) -> int:
    """Return the format of the in-flight log for rings with these features."""
    if is_packed(acked_features):
        return shared_pages.INFLIGHT_PACKED
    return shared_pages.INFLIGHT_SPLIT_IN_ORDER if acked_features & VIRTIO_F_IN_ORDER else shared_pages.INFLIGHT_SPLIT


def is_position(last_avail_idx: int, acked_features: int) -> bool:
    """Return whether a queue with these features can stand there: a position of a split ring has 16 bits."""
    return last_avail_idx <= 0xFFFF or is_packed(acked_features)
