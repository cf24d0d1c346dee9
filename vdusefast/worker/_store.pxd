"""Build the vf_store that an engine is opened over from the supervisor's arguments, and its rules for faults."""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memset

from vdusefast.worker._csrc cimport *

cdef extern from "<sys/uio.h>":
    const int RWF_DSYNC


cdef inline vf_store_kind store_kind(str name):
    """Return the kind of that name that the core's engines serve; any other name is a module with its own engine."""
    return {
        "file": VF_STORE_FILE,
        "blockdev": VF_STORE_BLOCKDEV,
        "memory": VF_STORE_MEMORY,
        "null": VF_STORE_NULL,
    }.get(name, VF_STORE_PLUGIN)


cdef inline int store_describe(vf_store *store, vf_queue *q, vf_store_kind kind, uint64_t size_bytes, str cache) except -1:
    """Fill in the fields that all kinds of stores share."""
    if q.engine.ops != NULL:
        raise ValueError("an engine is open already")
    memset(store, 0, sizeof(store[0]))
    store.fd = store.lock_fd = store.witness_fd = -1
    store.kind = kind
    store.cache = {
        "writeback": VF_CACHE_WRITEBACK,
        "writethrough": VF_CACHE_WRITETHROUGH,
        "none": VF_CACHE_NONE,
        "unsafe": VF_CACHE_UNSAFE,
    }[cache]
    store.size_bytes = size_bytes
    store.publisher = &q.publisher
    return 0


cdef inline int store_check_granule(uint32_t granule) except -1:
    if granule & (granule - 1) or granule > 65536:
        raise ValueError(f"blocks of {granule} bytes are no power of two up to 65536")
    return 0


cdef inline int store_hold(vf_store *store, hold_fds) except -1:
    for hold_fd in hold_fds:
        if store.hold_count == 2:
            raise ValueError("more than two descriptors to hold")
        store.hold_fds[store.hold_count] = hold_fd
        store.hold_count += 1
    return 0


cdef inline vf_faulty *store_faults(list faults, uint64_t seed, uint32_t slot_count) except NULL:
    """Return an engine's place with rules in front: each a backends.faulty.Fault with its path in bytes. Raises ValueError,
    MemoryError.
    """
    cdef vf_fault rules[VF_FAULT_MAX]
    cdef vf_faulty *faulty
    cdef uint32_t count = 0
    memset(rules, 0, sizeof(rules))
    for fault, path in faults:
        if count == VF_FAULT_MAX:
            raise ValueError(f"more than {VF_FAULT_MAX} rules")
        if len(path) >= VF_FAULT_PATH_BYTES:
            raise ValueError(f"a path of {len(path)} bytes")
        rules[count].ops = fault.ops
        rules[count].err = fault.err
        rules[count].delay_ns = fault.delay_ns
        rules[count].start = fault.start
        rules[count].last = fault.last
        rules[count].skip = fault.skip
        rules[count].every = fault.every
        rules[count].limit = fault.limit
        rules[count].chance = fault.chance
        memcpy(rules[count].path, <const char *> <bytes> path, len(path))
        count += 1
    faulty = vf_faulty_new(rules, count, seed, slot_count)
    if faulty == NULL:
        raise MemoryError
    return faulty


cdef inline void store_use_features(vf_queue *q, uint64_t acked_features) noexcept:
    """Apply the driver's accepted features: limits, discard, write zeroes, durability of writes."""
    vf_queue_limit(q, acked_features)
    q.device.discard = vf_has_feature(acked_features, VF_BLK_F_DISCARD)
    q.device.write_zeroes = vf_has_feature(acked_features, VF_BLK_F_WRITE_ZEROES)
    # Without FLUSH the driver cannot ask for durability, so every write is durable (VIRTIO 1.3, 5.2.6.2).
    through = q.engine.store.cache == VF_CACHE_WRITETHROUGH or not vf_has_feature(acked_features, VF_BLK_F_FLUSH)
    q.engine.store.write_flags = RWF_DSYNC if through and q.engine.store.cache != VF_CACHE_UNSAFE else 0
