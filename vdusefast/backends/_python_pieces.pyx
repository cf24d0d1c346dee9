"""Requests in pieces of contiguous memory: each has a tag, by which it is completed once, and a buffer while it is open.

Everything here holds the interpreter's lock, so any thread may complete tags. A buffer is a memoryview of the driver's
memory in a mapping of its own (_driver_memory), or of a copy: if a request's pieces are no whole blocks, or the class has
kept a buffer before.
"""

import os

from cpython.buffer cimport (PyBUF_FORMAT, PyBUF_SIMPLE, PyBUF_STRIDES, PyBUF_WRITABLE, PyBuffer_Release,
                             PyObject_CheckBuffer, PyObject_GetBuffer)
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.memoryview cimport PyMemoryView_FromObject
from cpython.ref cimport PyObject
from libc.errno cimport EIO, ETIMEDOUT
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from posix.unistd cimport write

from vdusefast.worker._csrc cimport *
from vdusefast.backends._driver_memory cimport DriverMemory, Window, Windows
from vdusefast.backends._handoff cimport *
from vdusefast.backends._python_moves cimport move_piece, move_rows

from vdusefast.backends.python_errors import Complaints

from vdusefast.base._build cimport vf_build_id
from vdusefast.base.build import check_extension

check_extension(__name__, vf_build_id())

cdef extern from *:
    """
    #define vf_py_refs(o) Py_REFCNT((PyObject *)(o))
    """
    Py_ssize_t refs "vf_py_refs"(PyObject *)

cdef extern from "<pthread.h>" nogil:
    pthread_t pthread_self()

cdef enum:
    ZERO_BYTES = 1 << 20  # of one write of zeroes by a class that has no way for that

OPERATIONS = ("pread", "pwrite", "flush", "discard", "write_zeroes")

cdef object _ZEROES = bytes(ZERO_BYTES)


cdef class Buffers:
    """Memoryviews by tag."""

    cdef Pieces pieces

    def __getitem__(self, tag):
        return self.pieces.buffer_of(self.pieces.index_of(tag))

    def __contains__(self, tag):
        try:
            self.pieces.index_of(tag)
        except (TypeError, ValueError):
            return False
        return True


cdef class Batch:
    """See python_class.Batch."""

    def __cinit__(self, Pieces pieces):
        self.pieces = pieces
        self.memory = bytearray(32 * ROWS_MAX)
        self.rows = <char *> self.memory
        self.base = None
        self.view = None
        self.count = 0

    def __len__(self):
        return self.count

    @property
    def requests(self):
        if self.base is None:  # NumPy takes long to import: for classes that look at rows
            import numpy as np
            self.base = np.frombuffer(self.memory, _row_type())
        if self.view is None:
            self.view = self.base[: self.count]
            self.view.flags.writeable = False
        return self.view

    @property
    def buffers(self):
        return self.pieces.buffers

    def read_from(self, store, at=None):
        return self.pieces.move(self, store, at, VF_OP_READ)

    def write_to(self, store, at=None):
        return self.pieces.move(self, store, at, VF_OP_WRITE)

    def complete(self, tags=None, error=0):
        cdef int32_t result = self.pieces.result_of(error)
        if tags is None:
            if self.move_count:
                raise ValueError("bytes of this batch are being moved by another thread")
            self.pieces.complete_open(self.tags, self.count, result)
        else:
            self.pieces.complete_tags(tags, result)

    cdef bint is_alone(self):
        """Whether nobody else refers to this batch or its rows, so that it can be reused."""
        if self.view is not None and refs(<PyObject *> self.view) > 1:
            return False
        return self.base is None or refs(<PyObject *> self.base) == 1 + (self.view is not None)

    cdef void add(self, const py_piece *piece):
        cdef int64_t *row = <int64_t *> (self.rows + 32 * self.count)
        row[0] = <int64_t> piece.offset_bytes
        row[1] = <int64_t> piece.length_bytes
        row[2] = piece.tag
        (<uint8_t *> row)[24] = piece.op
        (<uint8_t *> row)[25] = piece.unmap
        self.tags[self.count] = piece.tag
        self.count += 1


def _row_type():
    import numpy as np
    return np.dtype({
        "names": ["offset_bytes", "length_bytes", "tag", "operation", "unmap"],
        "formats": ["i8", "i8", "i8", "u1", "?"],
        "offsets": [0, 8, 16, 24, 25],
        "itemsize": 32,
    })


cdef class Pieces:
    """The open pieces of the requests in flight."""

    def __cinit__(self, disk, spec):
        cdef uint32_t i
        self.disk, self.spec = disk, spec
        self.complaints = Complaints(spec.uri)
        self.windows = Windows.__new__(Windows)
        self.thread = pthread_self()
        self.piece_total = max(1024, 4 * spec.slot_count)
        if self.piece_total >= 1 << TAG_BITS:
            raise ValueError(f"{spec.slot_count} requests in flight are too many")
        self.handoff = <vf_handoff *> calloc(1, sizeof(vf_handoff))
        self.pieces = <py_piece *> calloc(self.piece_total, sizeof(py_piece))
        self.free_pieces = <uint16_t *> calloc(self.piece_total, sizeof(uint16_t))
        if self.handoff == NULL or self.pieces == NULL or self.free_pieces == NULL:
            raise MemoryError
        self.handoff.wake_fd = -1
        self.handoff.timeout_ns = <uint64_t> (spec.timeout_s * 1e9)
        for i in range(self.piece_total):
            self.pieces[i].tag = i
            self.free_pieces[i] = <uint16_t> (self.piece_total - 1 - i)
        self.free_count = self.piece_total
        self.lent = [None] * self.piece_total
        self.memories = [None] * self.piece_total
        self.buffers = Buffers.__new__(Buffers)
        (<Buffers> self.buffers).pieces = self

    def __dealloc__(self):
        if self.handoff != NULL:
            vf_handoff_free(self.handoff)
        free(self.handoff)
        free(self.pieces)
        free(self.free_pieces)

    def forget_buffers(self):
        """Break the circle of references; nothing is open."""
        (<Buffers> self.buffers).pieces = None

    cdef bint cut(self, uint16_t slot):
        """Put the pieces of a request's current stage into cut_index. False: there is no room for them now."""
        cdef vf_handoff_record *record = &self.handoff.records[slot]
        cdef vf_req *req = record.req
        cdef uint32_t count = 1, i
        cdef bint whole = False
        cdef uint64_t at, left, length
        self.cut_count = 0
        if record.stage == VF_STAGE_DATA and req.op <= VF_OP_WRITE and req.iov_count > 1:
            count = req.iov_count
            whole = count > PIECES_MAX
            for i in range(count):
                whole |= (req.iov[i].iov_len & self.block_mask) != 0
            count = 1 if whole else count
        if self.free_count < count:
            self.handoff.stuck = True
            return False
        if record.stage == VF_STAGE_FLUSH:
            self.add(slot, VF_OP_FLUSH, NULL, 0, 0)
        elif req.op <= VF_OP_WRITE:
            at, left = req.offset_bytes, req.left_bytes
            for i in range(count):
                length = left if whole or req.iov[i].iov_len > left else req.iov[i].iov_len
                if length:
                    self.add(slot, req.op, <char *> req.iov[i].iov_base, at, length).whole = whole
                at += length
                left -= length
        elif req.op == VF_OP_FLUSH:
            if self.can_flush and self.handoff.engine.store.cache != VF_CACHE_UNSAFE:
                self.add(slot, VF_OP_FLUSH, NULL, 0, 0)
        elif req.op == VF_OP_DISCARD:
            if self.can_discard:
                self.add(slot, VF_OP_DISCARD, NULL, req.offset_bytes, req.left_bytes)
        elif req.op == VF_OP_WRITE_ZEROES and self.can_zero:
            self.add(slot, VF_OP_WRITE_ZEROES, NULL, req.offset_bytes, req.left_bytes).unmap = req.unmap != 0
        elif req.op == VF_OP_WRITE_ZEROES:
            length = req.left_bytes - record.zeroed_bytes
            length = length if length < ZERO_BYTES else ZERO_BYTES
            self.add(slot, VF_OP_WRITE, <char *> <bytes> _ZEROES, req.offset_bytes + record.zeroed_bytes, length).zeroes = True
            record.zeroed_bytes += length
        record.piece_count = self.cut_count
        return True

    cdef py_piece *add(self, uint16_t slot, uint8_t op, char *address, uint64_t offset_bytes, uint64_t length_bytes):
        cdef uint16_t index
        cdef py_piece *piece
        self.free_count -= 1
        index = self.free_pieces[self.free_count]
        piece = &self.pieces[index]
        piece.tag += 1 << TAG_BITS  # never the same twice
        piece.offset_bytes = offset_bytes
        piece.length_bytes = length_bytes
        piece.address = address
        piece.slot = slot
        piece.state = PIECE_OPEN
        piece.doomed = 0
        piece.op = op
        piece.unmap = piece.whole = piece.zeroes = False
        self.cut_index[self.cut_count] = index
        self.cut_count += 1
        return piece

    cdef uint32_t index_of(self, object tag) except? 0xffffffff:
        """The piece of a tag that is open. Raises TypeError, ValueError."""
        cdef int64_t number
        if isinstance(tag, bool) or not hasattr(tag, "__index__"):
            raise TypeError(f"a tag is an integer, not {type(tag).__name__}")
        number = tag
        return self.open_index(number)

    cdef uint32_t open_index(self, int64_t tag) except? 0xffffffff:
        cdef uint32_t index = <uint32_t> tag & ((1 << TAG_BITS) - 1)
        if tag < 0 or index >= self.piece_total or self.pieces[index].tag != tag or self.pieces[index].state == PIECE_FREE:
            raise ValueError(f"tag {tag} is not open: it was completed already, or never issued")
        if self.pieces[index].state == PIECE_MARKED:
            raise ValueError(f"tag {tag} is given twice")
        if self.pieces[index].state == PIECE_BUSY:
            raise ValueError(f"tag {tag}: its bytes are just being moved")
        return index

    cdef object buffer_of(self, uint32_t index):
        """Return the memoryview of a piece; it is made on the first call."""
        cdef py_piece *piece = &self.pieces[index]
        cdef object memory = None
        cdef object view = self.lent[index]
        if view is not None:
            return view
        if piece.address == NULL:
            raise ValueError(f"a {OPERATIONS[piece.op]} has no buffer")
        if piece.zeroes:
            memory = memoryview(_ZEROES)[: piece.length_bytes]
        elif not piece.whole and not self.copies:
            memory = self.windows.lend(piece.address, <Py_ssize_t> piece.length_bytes, piece.op == VF_OP_READ)
        if memory is None:
            memory = self.copy_of(piece)
        view = PyMemoryView_FromObject(memory)
        self.memories[index] = memory
        self.lent[index] = view
        return view

    cdef object copy_of(self, py_piece *piece):
        """Private memory in place of the driver's: filled for a write."""
        if piece.op == VF_OP_READ:
            return bytearray(piece.length_bytes)
        copy = PyBytes_FromStringAndSize(NULL, <Py_ssize_t> piece.length_bytes)
        move_piece(self, piece, <char *> <bytes> copy, False)
        return copy

    cdef void finish(self, uint32_t index, int32_t code):
        """Complete an open piece: revoke its buffer, and settle its request if this was the last piece."""
        cdef py_piece *piece = &self.pieces[index]
        cdef uint16_t slot = piece.slot
        cdef bint held = False
        if self.lent[index] is not None:
            held = self.take_away(index, code)
        piece.state = PIECE_FREE
        piece.address = NULL
        self.free_pieces[self.free_count] = <uint16_t> index
        self.free_count += 1
        if not held:
            self.settle(slot, code)

    cdef bint take_away(self, uint32_t index, int32_t code):
        """Revoke a buffer. True: its request must not end before its window is replaced with zero pages."""
        cdef py_piece *piece = &self.pieces[index]
        cdef object view = self.lent[index]
        cdef object owner = self.memories[index]
        cdef DriverMemory memory
        cdef Window window
        self.lent[index] = None
        self.memories[index] = None
        if type(owner) is not DriverMemory:
            if piece.op == VF_OP_READ and code == 0:
                move_piece(self, piece, <char *> <bytearray> owner, True)
            _release(view)
            return False
        memory = <DriverMemory> owner
        window = memory.window
        if refs(<PyObject *> view) > 1:
            _release(view)
        view = None
        memory.is_lent = False
        window.active -= 1
        if memory.views:
            self.condemn(window)
            if window.active:
                window.waiting.append((piece.slot, code))
                return True
        if window.condemned and window.active == 0:
            self.zero_pages(window)
        return False

    cdef void condemn(self, Window window):
        """Let the class get copies from now on, and replace the window of a kept buffer with zero pages soon."""
        if not self.copies:
            self.complaints.say("kept", f"{type(self.disk).__name__} has kept a buffer of a completed request, or a slice or "
                                "an array of it; that reads as zeroes from now on, and the class gets copies of the driver's "
                                "memory, which is slower; keep bytes(buffer) instead")
        self.copies = True
        window.condemned = True

    cdef void zero_pages(self, Window window):
        try:
            self.windows.zero_pages(window)
        except OSError as error:  # a remaining view of the driver's memory would be worse than a restart of the worker
            self.complaints.say("zero_pages", f"a kept buffer cannot be replaced with zero pages: {error}; the worker ends")
            os.abort()
        waiting, window.waiting = window.waiting, []
        window.condemned = False
        for slot, code in waiting:
            self.settle(slot, code)

    cdef void settle(self, uint16_t slot, int32_t code):
        """Count a piece as done; the last one ends the request's current stage."""
        cdef vf_handoff_record *record = &self.handoff.records[slot]
        cdef vf_req *req = record.req
        if code and not record.error:
            record.error = code
        if record.piece_count:
            record.piece_count -= 1
        if record.piece_count:
            return
        if record.error or record.stage == VF_STAGE_FLUSH:
            record.stage = VF_STAGE_DONE
        elif req.op == VF_OP_WRITE_ZEROES and not self.can_zero and record.zeroed_bytes < req.left_bytes:
            pass  # the next part
        elif (req.op == VF_OP_WRITE or req.op == VF_OP_WRITE_ZEROES) and self.must_flush():
            record.stage = VF_STAGE_FLUSH
        else:
            record.stage = VF_STAGE_DONE
        self.push(slot)

    cdef bint must_flush(self):
        cdef const vf_store *store = &self.handoff.engine.store
        return store.write_flags != 0 and self.can_flush and store.cache != VF_CACHE_UNSAFE

    cdef void push(self, uint16_t slot):
        """Push a slot whose stage has ended to the loop."""
        cdef uint64_t one = 1
        if not vf_handoff_push(self.handoff, slot):
            return
        if self.loop is not None and pthread_self() == self.thread:
            self.loop.wake()
        elif write(self.handoff.wake_fd, &one, sizeof(one)) < 0:
            pass  # the counter is full: it is awake already

    cdef void complete_open(self, const int64_t *tags, uint32_t count, int32_t code):
        """Complete those of some tags that are open."""
        cdef uint32_t i, index
        for i in range(count):
            index = <uint32_t> tags[i] & ((1 << TAG_BITS) - 1)
            if self.pieces[index].tag != tags[i]:
                continue
            if self.pieces[index].state == PIECE_OPEN:
                self.finish(index, code)
            elif self.pieces[index].state == PIECE_BUSY:
                self.pieces[index].doomed = code

    cdef int complete_tags(self, tags, int32_t code) except -1:
        """Complete all of some tags, or none. Raises TypeError, ValueError."""
        cdef Py_buffer view
        if isinstance(tags, int) or not PyObject_CheckBuffer(tags):
            if hasattr(tags, "__index__"):
                self.finish(self.index_of(tags), code)
                return 0
            return self.complete_array(_int64_array(list(tags)), code)
        PyObject_GetBuffer(tags, &view, PyBUF_STRIDES | PyBUF_FORMAT)
        try:
            if view.ndim == 0:
                self.finish(self.index_of(tags.item()), code)
                return 0
            if view.ndim == 1 and view.itemsize == 8 and view.format[0] in b"lqLQ":
                return self.complete_strided(<const char *> view.buf, view.shape[0], view.strides[0], code)
        finally:
            PyBuffer_Release(&view)
        if view.ndim != 1 or view.shape[0]:
            raise TypeError("tags are an array of 64-bit integers in one dimension, as in batch.requests[\"tag\"]")
        return 0

    cdef int complete_array(self, tags, int32_t code) except -1:
        cdef Py_buffer view
        PyObject_GetBuffer(tags, &view, PyBUF_SIMPLE)
        try:
            return self.complete_strided(<const char *> view.buf, view.len // 8, 8, code)
        finally:
            PyBuffer_Release(&view)

    cdef int complete_strided(self, const char *at, Py_ssize_t count, Py_ssize_t stride, int32_t code) except -1:
        cdef Py_ssize_t i, marked = 0
        cdef uint32_t mask = (1 << TAG_BITS) - 1
        cdef uint32_t index
        try:
            for i in range(count):
                index = self.open_index((<const int64_t *> (at + i * stride))[0])
                self.pieces[index].state = PIECE_MARKED
                marked = i + 1
        except ValueError:
            for i in range(marked):
                self.pieces[<uint32_t> (<const int64_t *> (at + i * stride))[0] & mask].state = PIECE_OPEN
            raise
        for i in range(count):
            # Nobody else completes it: it is marked.
            self.finish(<uint32_t> (<const int64_t *> (at + i * stride))[0] & mask, code)
        return 0

    cdef void expire(self):
        """End requests that the class has not completed in time."""
        cdef uint64_t now_ns = vf_now_ns()
        cdef uint32_t i
        self.handoff.looked_ns = now_ns
        for i in range(self.piece_total):
            if self.pieces[i].state != PIECE_OPEN:
                continue
            if now_ns - self.handoff.records[self.pieces[i].slot].start_ns > self.handoff.timeout_ns:
                self.complaints.say("late", f"a {OPERATIONS[self.pieces[i].op]} was not answered for {self.spec.timeout_s:g} s "
                                    "(backend.timeout_s); the driver got IOERR")
                self.finish(i, -ETIMEDOUT)

    cdef object move(self, Batch batch, store, at, uint8_t op):
        """Copy between a buffer and the memory of all open requests of a batch that have the operation."""
        cdef Py_buffer view, places
        cdef const int64_t *place = NULL
        cdef object array
        PyObject_GetBuffer(store, &view, PyBUF_WRITABLE if op == VF_OP_WRITE else PyBUF_SIMPLE)
        try:
            if at is None:
                return move_rows(self, batch, &view, NULL, op)
            array = _int64_array(at)
            PyObject_GetBuffer(array, &places, PyBUF_SIMPLE)
            try:
                if places.len != 8 * batch.count:
                    raise ValueError(f"{places.len // 8} places for {batch.count} requests")
                return move_rows(self, batch, &view, <const int64_t *> places.buf, op)
            finally:
                PyBuffer_Release(&places)
        finally:
            PyBuffer_Release(&view)

    cdef int32_t failed(self, str what, error):
        """Report an exception of the class. Returns the -errno for its request."""
        cdef int32_t code = EIO
        if isinstance(error, OSError) and isinstance(error.errno, int) and 0 < error.errno < 4096:
            code = error.errno
        self.complaints.say_failure(what, error)
        return -code

    cdef int32_t result_of(self, error) except 1:
        if isinstance(error, int) and not isinstance(error, bool) and 0 <= error < 4096:
            return -<int32_t> error
        raise ValueError(f"error is {error!r}; it must be 0 or an errno")


def _release(view):
    """Release a memoryview. One with other views of it stays, and its DriverMemory counts that."""
    try:
        view.release()
    except BufferError:
        pass


def _int64_array(values):
    """Return values as a contiguous array of 64-bit integers. Raises TypeError for other values."""
    import numpy as np
    array = np.asarray(values)
    if array.size and (array.ndim != 1 or array.dtype.kind not in "iu"):
        raise TypeError(f"an array of integers in one dimension is required, not of {array.dtype} in {array.ndim}")
    return np.ascontiguousarray(array, "i8")
