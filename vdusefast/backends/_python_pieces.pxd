"""Requests in pieces, tags, buffers and their end; see _python_pieces.pyx."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from vdusefast.worker._csrc cimport vf_req
from vdusefast.backends._driver_memory cimport Window, Windows
from vdusefast.backends._handoff cimport vf_handoff

cdef enum:
    PIECES_MAX = 64  # of one request; one in more goes through a buffer of its own
    ROWS_MAX = 256  # of one batch
    TAG_BITS = 16  # bits of a tag: the piece; the bits above count its uses

cdef enum:  # of a piece
    PIECE_FREE
    PIECE_OPEN
    PIECE_MARKED  # about to be completed
    PIECE_BUSY  # its bytes are being moved

cdef struct py_piece:
    int64_t tag
    uint64_t offset_bytes
    uint64_t length_bytes
    char *address  # the driver's memory, or zeroes; NULL: none
    uint16_t slot
    uint8_t state
    uint8_t op
    uint8_t unmap
    uint8_t whole  # all of the request's memory, in however many pieces
    uint8_t zeroes
    int32_t doomed  # while it is PIECE_BUSY: -errno to complete it with afterwards

cdef struct py_move:
    char *store
    uint32_t index
    char *memory  # NULL: the request's own

cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t


cdef class Batch:
    cdef Pieces pieces
    cdef bytearray memory  # of all rows
    cdef object base  # the array of them, or None
    cdef object view  # of those in use
    cdef char *rows
    cdef int64_t tags[ROWS_MAX]
    cdef uint32_t count
    cdef py_move moves[ROWS_MAX]
    cdef uint32_t move_count

    cdef bint is_alone(self)
    cdef void add(self, const py_piece *piece)


cdef class Pieces:
    cdef object disk, spec, buffers, complaints
    cdef object loop  # python_loop.Loop, or None
    cdef vf_handoff *handoff  # owned
    cdef Windows windows
    cdef py_piece *pieces
    cdef uint16_t *free_pieces
    cdef uint32_t piece_total, free_count
    cdef list lent, memories  # by piece: the memoryview or None; the DriverMemory, or what stands in for it
    cdef uint32_t cut_count
    cdef uint16_t cut_index[PIECES_MAX]
    cdef bint can_flush, can_discard, can_zero
    cdef bint copies  # the class has kept a buffer
    cdef uint32_t block_mask
    cdef pthread_t thread  # the loop's

    cdef bint cut(self, uint16_t slot)
    cdef py_piece *add(self, uint16_t slot, uint8_t op, char *address, uint64_t offset_bytes, uint64_t length_bytes)
    cdef uint32_t index_of(self, object tag) except? 0xffffffff
    cdef uint32_t open_index(self, int64_t tag) except? 0xffffffff
    cdef object buffer_of(self, uint32_t index)
    cdef object copy_of(self, py_piece *piece)
    cdef void finish(self, uint32_t index, int32_t code)
    cdef bint take_away(self, uint32_t index, int32_t code)
    cdef void condemn(self, Window window)
    cdef void zero_pages(self, Window window)
    cdef void settle(self, uint16_t slot, int32_t code)
    cdef bint must_flush(self)
    cdef void push(self, uint16_t slot)
    cdef void complete_open(self, const int64_t *tags, uint32_t count, int32_t code)
    cdef int complete_tags(self, tags, int32_t code) except -1
    cdef int complete_array(self, tags, int32_t code) except -1
    cdef int complete_strided(self, const char *at, Py_ssize_t count, Py_ssize_t stride, int32_t code) except -1
    cdef void expire(self)
    cdef object move(self, Batch batch, store, at, uint8_t op)
    cdef int32_t failed(self, str what, error)
    cdef int32_t result_of(self, error) except 1
