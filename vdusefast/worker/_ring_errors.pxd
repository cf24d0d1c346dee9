"""Texts about a ring that has failed."""

from vdusefast.worker._csrc cimport *


cdef inline str ring_error_text(int err):
    """Return the text for an enum vf_ring_error, "" for none."""
    return {
        VF_RING_OK: "",
        VF_RING_AVAIL_OVERRUN: "the driver's avail index is more than the queue size ahead",
        VF_RING_HEAD_RANGE: "an avail ring entry names a descriptor outside the table",
        VF_RING_NEXT_RANGE: "a descriptor's next field is outside the table",
        VF_RING_CHAIN_TOO_LONG: "a descriptor chain loops or is longer than the queue allows",
        VF_RING_INDIRECT_NOT_OFFERED: "an indirect descriptor without VIRTIO_F_INDIRECT_DESC",
        VF_RING_INDIRECT_NESTED: "an indirect descriptor inside an indirect table",
        VF_RING_INDIRECT_NEXT: "a descriptor with both INDIRECT and NEXT",
        VF_RING_INDIRECT_SIZE: "an indirect table whose length is zero, too large or no multiple of 16",
        VF_RING_INDIRECT_UNMAPPED: "an indirect table outside the mapped memory",
        VF_RING_HEAD_BUSY: "an avail ring entry names a chain that is still in flight",
        VF_RING_UNMAPPED: "a ring area is not mapped by one region with the permissions it needs",
        VF_RING_MISALIGNED: "a ring area is not aligned as VIRTIO asks",
        VF_RING_MEMORY_GONE: "pages of the driver's memory vanished while in use",
        VF_RING_LOG: "the in-flight log of the previous worker does not fit the ring",
        VF_RING_LOG_FOREIGN: "the in-flight log is none, or of another version or geometry",
        VF_RING_POISON: f"one request has killed {VF_LOG_HOPELESS} workers, the last ones although they refused it",
    }[err]


cdef inline str poison_text(const vf_poison *poison):
    """Return the text about requests that have killed too many workers."""
    operation = ("read", "write", "flush", "discard", "write zeroes", "get id", "other")[poison.op]
    more = f" (and {poison.count - 1} more)" if poison.count > 1 else ""
    return (f"request at head {poison.head} ({operation} at byte {poison.offset_bytes}){more} has ended "
            f"{poison.deaths} workers: answered with IOERR")
