"""Virtio-blk requests (VIRTIO 1.3, 5.2.6): from a chain in private memory to a checked request, and back.

Inline, so that the worker's loop and the fuzz harness compile the same code. The driver is an adversary: header and
ranges are copied once and then checked; every segment is checked for mapping, permission and direction before the
first effect of a request. Header, data and status may be cut into segments in any way (2.7.4, no framing assumptions).
"""

from libc cimport errno
from libc.stdint cimport UINT64_MAX, uint8_t, uint32_t, uint64_t
from vdusefast.worker._csrc cimport *

cdef enum:
    BLK_DONE = 0  # done: blk_status is set
    BLK_SUBMIT = 1  # for the engine

cdef extern from *:
    """
    #define BLK_STATUS_SHAPE VF_SEGMENT_SHAPE(1, 1)
    """
    const uint64_t BLK_STATUS_SHAPE


cdef inline int blk_fail(vf_queue *q, vf_req *req, uint8_t blk_status) noexcept nogil:
    """Complete req with an error that the driver caused."""
    req.blk_status = blk_status
    if blk_status == VF_BLK_S_UNSUPP:
        q.counters.unsupported += 1
    else:
        q.counters.bad_requests += 1
    return BLK_DONE


cdef inline int blk_map(vf_queue *q, vf_req *req, uint32_t writable, uint64_t skip, uint64_t want) noexcept nogil:
    """Point req's iovecs at `want` bytes of the segments of one direction, after the first `skip`.

    The caller has checked that the segments hold skip + want bytes. Returns 0, or -1 when an address is outside the
    table, wraps, lacks the permission, or when there are more pieces than a request can have.
    """
    cdef uint32_t perm = VF_PERM_WO if writable else VF_PERM_RO
    cdef uint32_t i, piece, run
    cdef uint64_t iova
    cdef vf_segment *segment
    cdef iovec *iov = req.iov_base
    cdef uint32_t count = 0
    cdef void *va

    for i in range(q.chain.segment_count):
        if want == 0:
            break
        segment = &q.chain.segments[i]
        if segment.writable != writable:
            continue
        if skip >= segment.len:
            skip -= segment.len
            continue
        if vf_unlikely(segment.iova > UINT64_MAX - (segment.len - 1)):
            return -1
        iova = segment.iova + skip
        piece = <uint32_t> (segment.len - skip)
        skip = 0
        if piece > want:
            piece = <uint32_t> want
        want -= piece
        while piece:
            va = vf_iotlb_translate(&q.tlb, iova, piece, perm, &run)
            if vf_unlikely(va == NULL):
                return -1
            if count and <uint8_t *> iov[count - 1].iov_base + iov[count - 1].iov_len == <uint8_t *> va:
                iov[count - 1].iov_len += run
            elif vf_unlikely(count == q.iov_max):
                return -1
            else:
                iov[count].iov_base = va
                iov[count].iov_len = run
                count += 1
            iova += run
            piece -= run
    req.iov = iov
    req.iov_count = count
    return 0


cdef inline int blk_copy_in(vf_queue *q, uint64_t skip, void *to, uint64_t want) noexcept nogil:
    """Copy `want` readable bytes after the first `skip` into private memory, once. 0 or -1 as blk_map.

    They may lie in any number of pieces: a copy needs no iovec.
    """
    cdef uint32_t i
    cdef uint64_t piece
    cdef vf_segment *segment
    cdef uint8_t *out = <uint8_t *> to

    for i in range(q.chain.segment_count):
        if want == 0:
            break
        segment = &q.chain.segments[i]
        if segment.writable:
            continue
        if skip >= segment.len:
            skip -= segment.len
            continue
        if vf_unlikely(segment.iova > UINT64_MAX - (segment.len - 1)):
            return -1
        piece = segment.len - skip
        if piece > want:
            piece = want
        if vf_unlikely(vf_iotlb_copy_from(&q.tlb, segment.iova + skip, out, piece)):
            return -1
        out += piece
        want -= piece
        skip = 0
    return 0


cdef inline int blk_copy_header(vf_queue *q, vf_req *req, vf_blk_header *header) noexcept nogil:
    """Copy the request header. 0 or -1 as blk_map."""
    cdef vf_segment *first = &q.chain.segments[0]
    cdef uint32_t run
    cdef void *va
    if vf_likely(first.len >= VF_BLK_HEADER_BYTES and not first.writable):
        if vf_unlikely(first.iova > UINT64_MAX - (first.len - 1)):
            return -1
        va = vf_iotlb_translate(&q.tlb, first.iova, VF_BLK_HEADER_BYTES, VF_PERM_RO, &run)
        if vf_unlikely(va == NULL):
            return -1
        if vf_likely(run == VF_BLK_HEADER_BYTES):
            vf_copy_from_shared(header, va, VF_BLK_HEADER_BYTES)
            return 0
    return blk_copy_in(q, 0, header, VF_BLK_HEADER_BYTES)


cdef inline void blk_write_status(vf_req *req, uint8_t blk_status) noexcept nogil:
    """Write the status byte into the driver's memory."""
    vf_store_relaxed_u8(req.status, blk_status)


cdef inline void blk_find_status(vf_queue *q, vf_req *req) noexcept nogil:
    """Set req.status to the last writable byte of the chain; NULL where there is none that can be written."""
    cdef vf_segment *last = q.chain.last_writable
    cdef uint32_t run
    req.status = NULL
    if last != NULL and last.iova <= UINT64_MAX - (last.len - 1):
        req.status = <uint8_t *> vf_iotlb_translate(&q.tlb, last.iova + (last.len - 1), 1, VF_PERM_WO, &run)


cdef inline bint blk_outside(const vf_blk_device *device, uint64_t sector, uint64_t sectors) noexcept nogil:
    """Return whether a range is misaligned or not wholly on the device; written so that nothing overflows."""
    if vf_unlikely(device.block_sectors > 1) and (sector | sectors) & (device.block_sectors - 1):
        return True
    return sector > device.capacity_sectors or sectors > device.capacity_sectors - sector


cdef inline int blk_parse_rw(vf_queue *q, vf_req *req, uint64_t sector, bint writing) noexcept nogil:
    """IN and OUT. Data of IN is everything writable but the status; of OUT everything readable but the header."""
    cdef uint64_t data_bytes
    req.op = VF_OP_WRITE if writing else VF_OP_READ
    if writing:
        # Data in device-writable segments would be in the wrong direction, as would more than a header for IN.
        if q.device.read_only or q.chain.writable_bytes != 1:
            return blk_fail(q, req, VF_BLK_S_IOERR)
        data_bytes = q.chain.readable_bytes - VF_BLK_HEADER_BYTES
    else:
        if q.chain.readable_bytes != VF_BLK_HEADER_BYTES:
            return blk_fail(q, req, VF_BLK_S_IOERR)
        data_bytes = q.chain.writable_bytes - 1
    if vf_unlikely(data_bytes % VF_SECTOR_BYTES or data_bytes > q.request_bytes_max):
        return blk_fail(q, req, VF_BLK_S_IOERR)
    if vf_unlikely(blk_outside(&q.device, sector, data_bytes // VF_SECTOR_BYTES)):
        return blk_fail(q, req, VF_BLK_S_IOERR)
    if blk_map(q, req, not writing, VF_BLK_HEADER_BYTES if writing else 0, data_bytes):
        return blk_fail(q, req, VF_BLK_S_IOERR)
    req.offset_bytes = sector * VF_SECTOR_BYTES
    req.left_bytes = data_bytes
    req.data_bytes = data_bytes
    if vf_unlikely(data_bytes == 0):
        return BLK_DONE
    return BLK_SUBMIT


cdef inline void blk_set_range(const vf_blk_device *device, vf_req *req) noexcept nogil:
    """Put the cursor on the current range."""
    cdef vf_blk_range *piece = &req.ranges[req.range_at]
    req.offset_bytes = piece.sector * VF_SECTOR_BYTES
    req.left_bytes = <uint64_t> piece.num_sectors * VF_SECTOR_BYTES
    req.unmap = piece.flags & VF_BLK_WRITE_ZEROES_F_UNMAP and not device.keeps_zeroes
    req.refused = 0


cdef inline int blk_check_ranges(vf_queue *q, vf_req *req, uint32_t max_sectors) noexcept nogil:
    """Check every range before the first takes effect (5.2.6.2), dropping empty ones. BLK_SUBMIT or BLK_DONE."""
    cdef uint32_t i, kept = 0
    cdef uint32_t known = VF_BLK_WRITE_ZEROES_F_UNMAP if req.op == VF_OP_WRITE_ZEROES else 0
    cdef vf_blk_range *piece
    for i in range(req.range_count):
        if req.ranges[i].flags & ~known:
            return blk_fail(q, req, VF_BLK_S_UNSUPP)
    for i in range(req.range_count):
        piece = &req.ranges[i]
        if piece.num_sectors > max_sectors or blk_outside(&q.device, piece.sector, piece.num_sectors):
            return blk_fail(q, req, VF_BLK_S_IOERR)
        if piece.num_sectors:
            req.ranges[kept] = piece[0]
            kept += 1
            req.data_bytes += <uint64_t> piece.num_sectors * VF_SECTOR_BYTES
    req.range_count = kept
    if kept == 0:
        return BLK_DONE
    if req.op == VF_OP_DISCARD and q.device.ignores_discards:
        return BLK_DONE
    blk_set_range(&q.device, req)
    return BLK_SUBMIT


cdef inline int blk_parse_ranges(vf_queue *q, vf_req *req, bint discard) noexcept nogil:
    """DISCARD and WRITE_ZEROES: the data are ranges."""
    cdef uint64_t data_bytes = q.chain.readable_bytes - VF_BLK_HEADER_BYTES
    cdef uint32_t max_seg, max_sectors
    if discard:
        req.op = VF_OP_DISCARD
        max_seg = q.device.discard_max_seg
        max_sectors = q.device.discard_max_sectors if q.device.discard else 0
    else:
        req.op = VF_OP_WRITE_ZEROES
        max_seg = q.device.write_zeroes_max_seg
        max_sectors = q.device.write_zeroes_max_sectors if q.device.write_zeroes else 0
    if max_sectors == 0:
        return blk_fail(q, req, VF_BLK_S_UNSUPP)
    if q.device.read_only or q.chain.writable_bytes != 1:
        return blk_fail(q, req, VF_BLK_S_IOERR)
    if data_bytes == 0 or data_bytes % sizeof(vf_blk_range) or data_bytes // sizeof(vf_blk_range) > max_seg:
        return blk_fail(q, req, VF_BLK_S_IOERR)
    if blk_copy_in(q, VF_BLK_HEADER_BYTES, req.ranges, data_bytes):
        return blk_fail(q, req, VF_BLK_S_IOERR)
    req.range_count = <uint32_t> (data_bytes // sizeof(vf_blk_range))
    return blk_check_ranges(q, req, max_sectors)


cdef inline int blk_answer_id(vf_queue *q, vf_req *req) noexcept nogil:
    """GET_ID: 20 bytes, padded with zeroes, not terminated when they are all used."""
    cdef uint64_t want = q.chain.writable_bytes - 1
    cdef uint32_t i, at = 0
    req.op = VF_OP_GET_ID
    if want > VF_BLK_ID_BYTES:
        want = VF_BLK_ID_BYTES
    if q.chain.readable_bytes != VF_BLK_HEADER_BYTES or want == 0 or blk_map(q, req, 1, 0, want):
        return blk_fail(q, req, VF_BLK_S_IOERR)
    for i in range(req.iov_count):
        vf_copy_to_shared(req.iov[i].iov_base, &q.device.serial[at], req.iov[i].iov_len)
        at += <uint32_t> req.iov[i].iov_len
    req.stored_bytes = at
    req.data_bytes = at
    return BLK_DONE


cdef inline int blk_parse_any(vf_queue *q, vf_req *req) noexcept nogil:
    """Any request, in any number of pieces."""
    cdef vf_blk_header header
    req.op = VF_OP_OTHER
    req.unmap = 0
    req.blk_status = VF_BLK_S_OK
    req.retry_count = 0
    req.held = False
    req.queued = False
    req.finished = False
    req.refused = 0
    req.result = 0
    req.range_count = 0
    req.range_at = 0
    req.stored_bytes = 0
    req.iov_count = 0
    req.left_bytes = 0
    req.data_bytes = 0
    vf_chain_measure(&q.chain)
    req.writable_bytes = q.chain.writable_bytes
    blk_find_status(q, req)
    # Without a status byte the driver cannot learn the result, so nothing is done.
    if vf_unlikely(req.status == NULL or q.chain.disorder or q.chain.readable_bytes < VF_BLK_HEADER_BYTES):
        return blk_fail(q, req, VF_BLK_S_IOERR)
    if vf_unlikely(blk_copy_header(q, req, &header)):
        return blk_fail(q, req, VF_BLK_S_IOERR)
    if header.type == VF_BLK_T_IN:
        return blk_parse_rw(q, req, header.sector, False)
    if header.type == VF_BLK_T_OUT:
        return blk_parse_rw(q, req, header.sector, True)
    if header.type == VF_BLK_T_FLUSH:
        req.op = VF_OP_FLUSH
        return BLK_SUBMIT
    if header.type == VF_BLK_T_GET_ID:
        return blk_answer_id(q, req)
    if header.type == VF_BLK_T_DISCARD:
        return blk_parse_ranges(q, req, True)
    if header.type == VF_BLK_T_WRITE_ZEROES:
        return blk_parse_ranges(q, req, False)
    return blk_fail(q, req, VF_BLK_S_UNSUPP)


cdef inline int blk_parse(vf_queue *q, vf_req *req) noexcept nogil:
    """Parse the chain in q into a request. Returns BLK_SUBMIT, or BLK_DONE when its status is set already."""
    cdef const vf_segment *segment = q.chain.segments
    cdef int what
    # The commonest chain: header, data and status, each in one segment.
    cdef bint plain = (
        q.chain.segment_count == 3
        and vf_segment_shape(&segment[0]) == VF_BLK_HEADER_BYTES
        and vf_segment_shape(&segment[2]) == BLK_STATUS_SHAPE
    )
    if plain and q.tlb.has_windows and vf_fast_path_fill(
            q, req, segment[0].iova, segment[1].iova, vf_fast_path_shape(&segment[1]), segment[2].iova):
        return BLK_SUBMIT
    what = blk_parse_any(q, req)
    if plain and what == BLK_SUBMIT and req.iov_count == 1:
        vf_fast_path_aim(&q.tlb, segment[0].iova, segment[1].iova)  # so the fast path is tried for the next chains
    return what


cdef inline void blk_note_host_error(vf_counters *counters, int err) noexcept nogil:
    """Count an error of the store; err is a positive errno."""
    counters.host_errors += 1
    counters.last_host_errno = <uint64_t> err
    if err == errno.ENOSPC or err == errno.EDQUOT:
        counters.host_enospc += 1
    elif err == errno.EIO:
        counters.host_eio += 1


cdef inline int blk_begin_flush(vf_queue *q, vf_req *req) noexcept nogil:
    """Submit a flush, unless an earlier one of the device has failed. Returns BLK_SUBMIT or BLK_DONE."""
    cdef int err = vf_flush_begin(q)
    if vf_likely(err == 0):
        return BLK_SUBMIT
    blk_note_host_error(q.counters, -err)
    req.blk_status = VF_BLK_S_IOERR
    return BLK_DONE


cdef inline bint blk_next(vf_queue *q, vf_req *req) noexcept nogil:
    """Process the engine's result. True when req has another range to submit."""
    if vf_unlikely(req.op == VF_OP_FLUSH):
        req.result = vf_flush_end(q, req.result)
    if vf_unlikely(req.result != 0):
        blk_note_host_error(q.counters, -req.result)
        req.blk_status = VF_BLK_S_IOERR
    elif req.range_count:
        req.range_at += 1
        if req.range_at < req.range_count:
            blk_set_range(&q.device, req)
            return True
    if req.op == VF_OP_READ:
        # The null engine moves nothing and leaves the cursor where it was.
        req.stored_bytes = <uint32_t> (req.data_bytes - req.left_bytes)
    return False
