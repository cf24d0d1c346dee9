"""Copies between a class's memory and that of requests in pieces. A piece is BUSY while it is copied."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from vdusefast.worker._csrc cimport *
from vdusefast.backends._driver_memory cimport DriverMemory
from vdusefast.backends._handoff cimport *
from vdusefast.backends._python_pieces cimport PIECE_BUSY, PIECE_OPEN, TAG_BITS, Batch, Pieces, py_move, py_piece

cdef enum:
    NOGIL_BYTES = 1 << 17  # copying less takes less time than releasing the lock does


cdef inline void move_piece(Pieces pieces, const py_piece *piece, char *memory, bint into_driver) noexcept nogil:
    """Copy between private memory and the driver's, in any number of pieces."""
    cdef vf_req *req = pieces.handoff.records[piece.slot].req
    cdef uint64_t left = piece.length_bytes, length
    cdef uint32_t i
    if not piece.whole:
        if into_driver:
            memcpy(piece.address, memory, left)
        else:
            memcpy(memory, piece.address, left)
        return
    for i in range(req.iov_count):
        length = req.iov[i].iov_len if req.iov[i].iov_len < left else left
        if into_driver:
            memcpy(req.iov[i].iov_base, memory, length)
        else:
            memcpy(memory, req.iov[i].iov_base, length)
        memory += length
        left -= length


cdef inline int plan_moves(Pieces pieces, Batch batch, const Py_buffer *store, const int64_t *at, uint8_t op,
                           uint64_t *bytes_moved) except -1:
    """Note the ranges to copy, all within `store`, and mark their pieces BUSY."""
    cdef uint32_t i, index
    cdef py_piece *piece
    cdef py_move *move
    cdef int64_t offset
    for i in range(batch.count):
        index = <uint32_t> batch.tags[i] & ((1 << TAG_BITS) - 1)
        piece = &pieces.pieces[index]
        if piece.tag != batch.tags[i] or piece.state != PIECE_OPEN or piece.op != op:
            continue
        offset = at[i] if at != NULL else <int64_t> piece.offset_bytes
        if offset < 0 or offset > store.len or <uint64_t> (store.len - offset) < piece.length_bytes:
            raise IndexError(f"a request for {piece.length_bytes} bytes at {offset} lies outside of {store.len} bytes")
        move = &batch.moves[batch.move_count]
        move.store = <char *> store.buf + offset
        move.index = index
        move.memory = private_memory(pieces, index)
        piece.state = PIECE_BUSY
        batch.move_count += 1
        bytes_moved[0] += piece.length_bytes
    return <int> batch.move_count


cdef inline char *private_memory(Pieces pieces, uint32_t index):
    """Where the bytes of a piece are that has a buffer of its own; NULL: in the driver's memory."""
    cdef object owner = pieces.memories[index]
    if owner is None or type(owner) is DriverMemory:
        return NULL
    if type(owner) is bytearray:
        return <char *> <bytearray> owner
    return <char *> <bytes> owner if type(owner) is bytes else NULL


cdef inline void carry_out(Pieces pieces, const py_move *moves, uint32_t count, uint8_t op) noexcept nogil:
    cdef uint32_t i
    cdef const py_piece *piece
    for i in range(count):
        piece = &pieces.pieces[moves[i].index]
        if moves[i].memory == NULL:
            move_piece(pieces, piece, moves[i].store, op == VF_OP_READ)
        elif op == VF_OP_READ:
            memcpy(moves[i].memory, moves[i].store, piece.length_bytes)
        else:
            memcpy(moves[i].store, moves[i].memory, piece.length_bytes)


cdef inline object move_rows(Pieces pieces, Batch batch, const Py_buffer *store, const int64_t *at, uint8_t op):
    cdef uint32_t count = 0, i, moved
    cdef uint64_t bytes_moved = 0
    if batch.move_count:
        raise ValueError("bytes of this batch are being moved by another thread")
    try:
        count = plan_moves(pieces, batch, store, at, op, &bytes_moved)
        if bytes_moved >= NOGIL_BYTES:
            with nogil:
                carry_out(pieces, batch.moves, count, op)
        else:
            carry_out(pieces, batch.moves, count, op)
    finally:
        moved, batch.move_count = batch.move_count, 0
        for i in range(moved):
            pieces.pieces[batch.moves[i].index].state = PIECE_OPEN
        for i in range(moved):
            if pieces.pieces[batch.moves[i].index].doomed:  # its submit() has raised meanwhile
                pieces.finish(batch.moves[i].index, pieces.pieces[batch.moves[i].index].doomed)
    return count
