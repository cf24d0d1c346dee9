"""The layout of the shared pages as C sees it."""

from vdusefast.worker._csrc cimport *


cdef inline dict shm_layout():
    """Return the layout of the shared pages as C sees it."""
    cdef vf_shm_layout offsets = vf_shm_layout_of()
    return {
        "constants": {
            "version": VF_SHM_VERSION,
            "hist_sub_bits": VF_HIST_SUB_BITS,
            "hist_max_bits": VF_HIST_MAX_BITS,
            "hist_bucket_count": VF_HIST_BUCKET_COUNT,
            "op_count": VF_OP_COUNT,
        },
        "sizes": {
            "vf_counters": sizeof(vf_counters),
            "vf_op_counters": sizeof(vf_op_counters),
            "vf_hist": sizeof(vf_hist),
            "vf_shm_ctl": sizeof(vf_shm_ctl),
            "vf_shm_status": sizeof(vf_shm_status),
            "vf_inflight_header": sizeof(vf_inflight_header),
            "vf_inflight_entry": sizeof(vf_inflight_entry),
        },
        "offsets": {
            "header": offsets.header_bytes,
            "counters": offsets.counters_offset,
            "hist": offsets.hist_offset,
            "inflight": offsets.inflight_offset,
            "stride": offsets.stride_bytes,
        },
    }
