"""The engine that serves a disk written in Python: all requests of a round are handed over under one hold of the GIL.

A request is cut into pieces of contiguous memory; each has a tag, for which the class, or a thread or a task of its own,
answers once. Everything here that touches a piece holds the GIL, so that completions may come from any thread; those that
end a request put it into a ring that the loop reaps without the GIL.
"""

import os

from cpython.buffer cimport (PyBUF_FORMAT, PyBUF_SIMPLE, PyBUF_STRIDES, PyBUF_WRITABLE,
                             PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer)
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.memoryview cimport PyMemoryView_FromObject
from cpython.pycapsule cimport PyCapsule_New
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.errno cimport EIO, ENOMEM, ETIMEDOUT
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.unistd cimport read, write

from vdusefast._csrc cimport *
from vdusefast.backends._driver_memory cimport DriverMemory, Window, lend, open_window

from vdusefast.backends.python_class import overrides
from vdusefast.backends.python_errors import Complaints

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *, unsigned long, int)
    enum:
        POLLIN

cdef extern from *:
    """
    #include <time.h>
    #define vf_py_refs(o) Py_REFCNT((PyObject *)(o))
    static inline uint64_t vf_py_now_ns(void)
    {
        struct timespec ts;
        clock_gettime(CLOCK_MONOTONIC, &ts);
        return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
    }
    """
    uint64_t now_ns_of "vf_py_now_ns"() nogil
    Py_ssize_t refs "vf_py_refs"(PyObject *)

cdef extern from "store.h" nogil:
    void vf_req_advance(vf_req *, uint64_t)

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *, size_t, int, int, int, long)
    enum:
        PROT_READ
        PROT_WRITE
        MAP_PRIVATE
        MAP_ANONYMOUS
        MAP_NORESERVE
        MAP_FIXED
    void *MAP_FAILED

cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t
    pthread_t pthread_self()

cdef enum:
    PIECES_MAX = 64  # of one request; one in more goes through a buffer of its own
    ROWS_MAX = 256  # of one batch
    TAG_BITS = 16  # of a tag: which piece; above them: its how-manieth use
    WINDOW_MAX = 1024  # VF_IOTLB_CAPACITY
    WATCH_MAX = 8
    NOGIL_BYTES = 1 << 17  # moving less takes less than letting go of the lock does
    ZERO_BYTES = 1 << 20  # of one write of zeroes by a class that has no way for that
    STEP_NS = 1000000  # at least so often tasks of the class's own run
    EXPIRY_NS = 50000000  # how often it is looked for requests that are too old

cdef enum:  # of a request
    STAGE_DATA
    STAGE_FLUSH  # a flush behind it, which makes it durable
    STAGE_DONE

cdef enum:  # of a piece
    PIECE_FREE
    PIECE_OPEN
    PIECE_MARKED  # about to be completed
    PIECE_BUSY  # its bytes are being moved

cdef struct py_record:
    vf_req *req
    uint64_t zeroed_bytes
    uint64_t start_ns
    int32_t error
    uint32_t piece_count  # not completed
    uint8_t stage

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

cdef struct py_window:
    uintptr_t start
    size_t length_bytes
    uintptr_t alias
    PyObject *window  # owned

cdef struct py_state:
    void *owner  # the Engine; borrowed
    vf_engine *engine
    py_record *records
    uint32_t slot_count
    uint16_t *backlog  # slots that are not handed over yet: a circle
    uint32_t backlog_at
    uint32_t backlog_count
    uint16_t *done  # slots whose stage is over: a circle with free-running ends
    uint32_t done_head
    uint32_t done_tail
    uint32_t done_mask
    uint32_t sleeping
    uint8_t stuck  # there was no room for the first of the backlog
    uint8_t has_loop
    uint32_t task_count
    uint64_t timeout_ns
    uint64_t looked_ns
    uint64_t stepped_ns
    int wake_fd
    uint32_t window_count
    py_window windows[WINDOW_MAX]

_OPERATIONS = ("pread", "pwrite", "flush", "discard", "write_zeroes")

cdef object _ZEROES = bytes(ZERO_BYTES)


cdef class Buffers:
    """Memoryviews by tag."""

    cdef Engine engine

    def __getitem__(self, tag):
        return self.engine.buffer_of(self.engine.index_of(tag))

    def __contains__(self, tag):
        try:
            self.engine.index_of(tag)
        except (TypeError, ValueError):
            return False
        return True


cdef class Batch:
    """See python_class.Batch."""

    cdef Engine engine
    cdef object base  # the array of all rows
    cdef object view  # of those in use
    cdef char *rows
    cdef int64_t tags[ROWS_MAX]
    cdef uint32_t count
    cdef py_move moves[ROWS_MAX]
    cdef uint32_t move_count

    def __cinit__(self, Engine engine):
        import numpy as np
        self.engine = engine
        self.base = np.zeros(ROWS_MAX, _row_type())
        self.rows = <char *> <uintptr_t> <object> self.base.__array_interface__["data"][0]
        self.view = None
        self.count = 0

    def __len__(self):
        return self.count

    @property
    def requests(self):
        if self.view is None:
            self.view = self.base[: self.count]
            self.view.flags.writeable = False
        return self.view

    @property
    def buffers(self):
        return self.engine.buffers

    def read_from(self, store, at=None):
        return self.engine.move(self, store, at, VF_OP_READ)

    def write_to(self, store, at=None):
        return self.engine.move(self, store, at, VF_OP_WRITE)

    def complete(self, tags=None, error=0):
        cdef int32_t result = self.engine.result_of(error)
        if tags is None:
            if self.move_count:
                raise ValueError("bytes of this batch are being moved by another thread")
            self.engine.complete_open(self.tags, self.count, result)
        else:
            self.engine.complete_tags(tags, result)

    cdef bint is_alone(self):
        """Whether nobody else has this batch or its rows any more, so that it can be used again."""
        return refs(<PyObject *> self.base) == 1 + (self.view is not None) and (self.view is None or refs(<PyObject *> self.view) == 1)

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


cdef class Engine:
    """The plugin of a worker: a disk, and what is between it and the loop."""

    cdef object disk, spec, buffers, capsule
    cdef object complaints
    cdef vf_engine_plugin plugin
    cdef py_state *state
    cdef py_piece *pieces
    cdef uint16_t *free_pieces
    cdef uint32_t piece_total, free_count
    cdef list lent, memories  # by piece: the memoryview or None; the DriverMemory, or the private copy
    cdef uint32_t cut_count
    cdef uint16_t cut_index[PIECES_MAX]
    cdef bint batched, can_flush, can_discard, can_zero, copies
    cdef uint32_t block_mask
    cdef Batch spare
    cdef object loop
    cdef object pread, pwrite, flush, discard, write_zeroes, submit
    cdef pthread_t thread
    cdef uint32_t window_hit
    cdef bint is_open

    def __cinit__(self, disk, spec):
        """Get ready for a disk, which is opened next."""
        cdef uint32_t i
        self.disk, self.spec = disk, spec
        self.complaints = Complaints(spec.uri)
        self.state = <py_state *> calloc(1, sizeof(py_state))
        self.piece_total = max(1024, 4 * spec.slot_count)
        if self.state == NULL or self.piece_total >= 1 << TAG_BITS:
            raise MemoryError
        self.state.wake_fd = -1
        self.pieces = <py_piece *> calloc(self.piece_total, sizeof(py_piece))
        self.free_pieces = <uint16_t *> calloc(self.piece_total, sizeof(uint16_t))
        if self.pieces == NULL or self.free_pieces == NULL:
            raise MemoryError
        for i in range(self.piece_total):
            self.pieces[i].tag = i
            self.free_pieces[i] = <uint16_t> (self.piece_total - 1 - i)
        self.free_count = self.piece_total
        self.lent = [None] * self.piece_total
        self.memories = [None] * self.piece_total
        self.state.owner = <void *> self
        self.state.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.state.timeout_ns = <uint64_t> (spec.timeout_s * 1e9)
        self.buffers = Buffers.__new__(Buffers)
        (<Buffers> self.buffers).engine = self
        self.thread = pthread_self()
        self.plugin.abi = VF_ENGINE_ABI
        self.plugin.engine_bytes = sizeof(vf_engine)
        self.plugin.req_bytes = sizeof(vf_req)
        self.plugin.ops = &_OPS
        self.plugin.context = <void *> self.state
        self.capsule = PyCapsule_New(&self.plugin, VF_ENGINE_CAPSULE, NULL)
        self.is_open = True

    def __dealloc__(self):
        if self.state != NULL:
            free(self.state.records)
            free(self.state.backlog)
            free(self.state.done)
        free(self.state)
        free(self.pieces)
        free(self.free_pieces)

    # -- what the worker uses

    def begin(self):
        """Serve the disk, which is open now."""
        disk = self.disk
        self.batched = overrides(disk, "submit")
        self.can_flush = self.batched or overrides(disk, "flush")
        self.can_discard = disk.can_discard if self.batched else overrides(disk, "discard")
        self.can_zero = disk.can_write_zeroes if self.batched else overrides(disk, "write_zeroes")
        self.pread, self.pwrite, self.flush = disk.pread, disk.pwrite, disk.flush
        self.discard, self.write_zeroes, self.submit = disk.discard, disk.write_zeroes, disk.submit
        self.block_mask = <uint32_t> disk.block_size_bytes - 1

    def abandon(self):
        """Release everything of an engine that was not opened; its disk is left alone."""
        self.disk = None
        self.close()

    @property
    def engine(self):
        return self.capsule

    def fileno(self):
        return -1

    def news(self):
        return []

    def close(self):
        if not self.is_open:
            return
        self.is_open = False
        try:
            closing = self.disk.close() if self.disk is not None else None
            if closing is not None and hasattr(closing, "__await__"):
                self.have_loop().call(closing)
        except BaseException as error:
            self.failed("close", error)
        if self.loop is not None:
            self.loop.close()
            self.loop = None
            self.state.has_loop = False
        os.close(self.state.wake_fd)
        self.state.wake_fd = -1
        (<Buffers> self.buffers).engine = None

    def have_loop(self):
        """Return the event loop, made when it is first needed."""
        if self.loop is None:
            from vdusefast.backends.python_loop import Loop
            self.loop = Loop(self.state.wake_fd, self.loop_failed)
            self.state.has_loop = True
            if self.state.engine != NULL:
                self.state.engine.always = 1  # the class may have tasks of its own
        return self.loop

    def loop_failed(self, error):
        self.failed("a task", error)

    # -- errors

    cdef int32_t failed(self, str what, error):
        """Say what a class has raised; the -errno that its request gets."""
        cdef int32_t code = EIO
        if isinstance(error, OSError) and isinstance(error.errno, int) and 0 < error.errno < 4096:
            code = error.errno
        self.complaints.say_failure(what, error)
        return -code

    cdef int32_t checked(self, str what, result, uint64_t length_bytes):
        """The -errno for what pread or pwrite has returned, 0 for all bytes."""
        if result is None:
            return 0
        if isinstance(result, int) and not isinstance(result, bool):
            if result == length_bytes:
                return 0
            self.complaints.say("count", f"{what} returned {result}, but the request has {length_bytes} bytes; it must move all "
                                "of them, or raise OSError; the driver got IOERR")
        else:
            self.complaints.say("count", f"{what} returned {type(result).__name__}, which is neither None nor a count of bytes; "
                                "the driver got IOERR")
        return -EIO

    cdef int32_t result_of(self, error) except 1:
        if isinstance(error, int) and not isinstance(error, bool) and 0 <= error < 4096:
            return -<int32_t> error
        raise ValueError(f"error is {error!r}; it must be 0 or an errno")

    # -- handing over

    cdef void hand_over(self):
        """Give the class what was submitted."""
        self.state.stuck = False
        if self.state.timeout_ns:
            self.expire()
        if self.state.backlog_count:
            if self.batched:
                self.hand_over_batches()
            else:
                self.hand_over_calls()
        if self.loop is not None:
            self.step()

    cdef void hand_over_calls(self):
        cdef uint32_t i, count
        cdef uint16_t slot
        while self.state.backlog_count:
            slot = self.state.backlog[self.state.backlog_at]
            if not self.cut(slot):
                return
            self.pop()
            count = self.cut_count
            if count == 0:
                self.settle(slot, 0)
            for i in range(count):
                # In one go, as a piece that fails does not keep the driver from asking for the others.
                self.call(self.cut_index[i])

    cdef void hand_over_batches(self):
        cdef uint32_t i
        cdef uint16_t slot
        cdef Batch batch
        while self.state.backlog_count:
            batch = self.spare if self.spare is not None else Batch.__new__(Batch, self)
            self.spare = None
            if batch.view is not None and batch.count != self.state.backlog_count:
                batch.view = None
            batch.count = 0
            while self.state.backlog_count and batch.count + PIECES_MAX <= ROWS_MAX:
                slot = self.state.backlog[self.state.backlog_at]
                if not self.cut(slot):
                    break
                self.pop()
                if self.cut_count == 0:
                    self.settle(slot, 0)
                for i in range(self.cut_count):
                    batch.add(&self.pieces[self.cut_index[i]])
            if batch.view is not None and len(batch.view) != batch.count:
                batch.view = None
            if batch.count:
                self.give(batch)
            if refs(<PyObject *> batch) == 1 and batch.is_alone():
                self.spare = batch
            if self.state.stuck:
                return

    cdef void pop(self):
        self.state.backlog_at = self.state.backlog_at + 1 if self.state.backlog_at + 1 < self.state.slot_count else 0
        self.state.backlog_count -= 1

    cdef void give(self, Batch batch):
        try:
            result = self.submit(batch)
            if result is not None and hasattr(result, "__await__"):
                self.start(_wait_batch(self, result, batch))
        except BaseException as error:
            self.complete_open(batch.tags, batch.count, self.failed("submit", error))

    cdef void call(self, uint32_t index):
        """Have the class carry out one piece."""
        cdef py_piece *piece = &self.pieces[index]
        cdef int64_t tag = piece.tag
        cdef int32_t code = 0
        cdef uint8_t op = piece.op
        try:
            if op == VF_OP_READ:
                result = self.pread(self.buffer_of(index), piece.offset_bytes)
            elif op == VF_OP_WRITE:
                result = self.pwrite(self.buffer_of(index), piece.offset_bytes)
            elif op == VF_OP_FLUSH:
                result = self.flush()
            elif op == VF_OP_DISCARD:
                result = self.discard(piece.offset_bytes, piece.length_bytes)
            else:
                result = self.write_zeroes(piece.offset_bytes, piece.length_bytes, bool(piece.unmap))
            if result is not None:
                if hasattr(result, "__await__"):
                    self.start(_wait_piece(self, result, tag, op, piece.length_bytes))
                    return
                if op <= VF_OP_WRITE:
                    code = self.checked(_OPERATIONS[op], result, piece.length_bytes)
        except BaseException as error:
            code = self.failed(_OPERATIONS[op], error)
        if piece.tag == tag and piece.state == PIECE_OPEN:
            self.finish(index, code)

    cdef int start(self, coroutine) except -1:
        self.have_loop().start(coroutine)
        self.state.task_count += 1
        return 0

    def awaited(self, int64_t tag, int op, uint64_t length_bytes, result, error):
        """Take what a coroutine for one piece has returned or raised."""
        cdef uint32_t index = <uint32_t> tag & ((1 << TAG_BITS) - 1)
        cdef int32_t code
        self.state.task_count -= 1
        if error is not None:
            code = self.failed(_OPERATIONS[op], error)
        else:
            code = self.checked(_OPERATIONS[op], result, length_bytes) if op <= VF_OP_WRITE else 0
        if self.pieces[index].tag == tag and self.pieces[index].state == PIECE_OPEN:
            self.finish(index, code)

    def batch_awaited(self, Batch batch, error):
        self.state.task_count -= 1
        if error is not None:
            self.complete_open(batch.tags, batch.count, self.failed("submit", error))

    cdef void step(self):
        self.state.stepped_ns = now_ns_of()
        self.loop.step()

    # -- from requests to pieces

    cdef bint cut(self, uint16_t slot):
        """Put the pieces of what a request waits for into cut_index. False: there is no room for them now."""
        cdef py_record *record = &self.state.records[slot]
        cdef vf_req *req = record.req
        cdef uint32_t count = 1, i
        cdef bint whole = False
        cdef uint64_t at, left, length
        self.cut_count = 0
        if record.stage == STAGE_DATA and req.op <= VF_OP_WRITE and req.iov_count > 1:
            count = req.iov_count
            whole = count > PIECES_MAX
            for i in range(count):
                whole |= (req.iov[i].iov_len & self.block_mask) != 0
            count = 1 if whole else count
        if self.free_count < count:
            self.state.stuck = True
            return False
        if record.stage == STAGE_FLUSH:
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
            if self.can_flush and self.state.engine.store.cache != VF_CACHE_UNSAFE:
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

    # -- buffers

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
            raise ValueError(f"tag {tag} is not open: it was completed already, or never given")
        if self.pieces[index].state == PIECE_MARKED:
            raise ValueError(f"tag {tag} is there twice")
        if self.pieces[index].state == PIECE_BUSY:
            raise ValueError(f"tag {tag}: its bytes are just being moved")
        return index

    cdef object buffer_of(self, uint32_t index):
        """The memoryview of a piece, made when it is first asked for."""
        cdef py_piece *piece = &self.pieces[index]
        cdef Window window
        cdef DriverMemory memory
        cdef uintptr_t alias
        cdef object view = self.lent[index]
        if view is not None:
            return view
        if piece.address == NULL:
            raise ValueError(f"a {_OPERATIONS[piece.op]} has no buffer")
        if piece.zeroes:
            view = memoryview(_ZEROES)[: piece.length_bytes]
        elif piece.whole or self.copies or (window := self.window_of(<uintptr_t> piece.address, &alias)) is None:
            copy = self.copy_of(piece)
            self.memories[index] = copy
            view = PyMemoryView_FromObject(copy)
        else:
            memory = lend(window, <char *> alias, <Py_ssize_t> piece.length_bytes, piece.op == VF_OP_READ)
            self.memories[index] = memory
            view = PyMemoryView_FromObject(memory)
        self.lent[index] = view
        return view

    cdef object copy_of(self, py_piece *piece):
        """Private memory in place of the driver's: filled for a write."""
        if piece.op == VF_OP_READ:
            return bytearray(piece.length_bytes)
        copy = PyBytes_FromStringAndSize(NULL, <Py_ssize_t> piece.length_bytes)
        self.move_piece(piece, <char *> <bytes> copy, False)
        return copy

    cdef void move_piece(self, const py_piece *piece, char *memory, bint into_driver) noexcept nogil:
        """Copy between memory of ours and the driver's, however many pieces that is in."""
        cdef vf_req *req = self.state.records[piece.slot].req
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

    cdef Window window_of(self, uintptr_t address, uintptr_t *alias):
        """The second mapping that holds an address of the loop's; None: there is none."""
        cdef uint32_t i, at
        cdef py_window *found
        for i in range(self.state.window_count + 1):
            at = self.window_hit if i == 0 else i - 1
            if at >= self.state.window_count:
                continue
            found = &self.state.windows[at]
            if address - found.start < found.length_bytes:
                self.window_hit = at
                alias[0] = found.alias + (address - found.start)
                return <Window> found.window
        return None

    # -- completing

    cdef void finish(self, uint32_t index, int32_t code):
        """Complete a piece that is open: take its buffer away, and settle its request when that was the last one."""
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
        """End the use of a buffer. True: its request may not end before the window that it lies in is buried."""
        cdef py_piece *piece = &self.pieces[index]
        cdef object view = self.lent[index]
        cdef object owner = self.memories[index]
        cdef DriverMemory memory
        cdef Window window
        self.lent[index] = None
        self.memories[index] = None
        if type(owner) is not DriverMemory:
            if piece.op == VF_OP_READ and code == 0:
                self.move_piece(piece, <char *> <bytearray> owner, True)
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
            self.bury(window)
        return False

    cdef void condemn(self, Window window):
        """What the class has kept of a buffer must not lead to the driver's memory any longer."""
        if not self.copies:
            self.complaints.say("kept", f"{type(self.disk).__name__} has kept a buffer of a request that is complete, or a slice or "
                                "an array of it; that reads as zeroes from now on, and the class gets copies of the driver's "
                                "memory, which is slower; let it keep bytes(buffer) instead")
        self.copies = True
        window.condemned = True

    cdef void bury(self, Window window):
        cdef uint32_t i
        try:
            window.bury()
        except OSError as error:  # a view of the driver's memory that stayed would be worse than another worker
            self.complaints.say("bury", f"a buffer that was kept cannot be taken away: {error}; the worker ends")
            os.abort()
        for i in range(self.state.window_count):
            if <Window> self.state.windows[i].window is window:
                self.forget_window(i)
                break
        waiting, window.waiting = window.waiting, []
        window.condemned = False
        for slot, code in waiting:
            self.settle(slot, code)

    cdef void forget_window(self, uint32_t i):
        cdef PyObject *window = self.state.windows[i].window
        self.state.window_count -= 1
        self.state.windows[i] = self.state.windows[self.state.window_count]
        Py_DECREF(<object> window)

    cdef void settle(self, uint16_t slot, int32_t code):
        """Count a piece as done; when it was the last one, what the request waits for is over."""
        cdef py_record *record = &self.state.records[slot]
        cdef vf_req *req = record.req
        if code and not record.error:
            record.error = code
        if record.piece_count:
            record.piece_count -= 1
        if record.piece_count:
            return
        if record.error or record.stage == STAGE_FLUSH:
            record.stage = STAGE_DONE
        elif req.op == VF_OP_WRITE_ZEROES and not self.can_zero and record.zeroed_bytes < req.left_bytes:
            pass  # the next part
        elif (req.op == VF_OP_WRITE or req.op == VF_OP_WRITE_ZEROES) and self.must_flush():
            record.stage = STAGE_FLUSH
        else:
            record.stage = STAGE_DONE
        self.push(slot)

    cdef bint must_flush(self):
        cdef const vf_store *store = &self.state.engine.store
        return store.write_flags != 0 and self.can_flush and store.cache != VF_CACHE_UNSAFE

    cdef void push(self, uint16_t slot):
        """Show the loop what has ended; under the GIL, so there is one at a time."""
        cdef py_state *state = self.state
        cdef uint64_t one = 1
        state.done[state.done_tail & state.done_mask] = slot
        vf_store_release_u32(&state.done_tail, state.done_tail + 1)
        vf_fence_full()  # pairs with the one of py_sleep
        if not vf_load_relaxed_u32(&state.sleeping):
            return
        if self.loop is not None and pthread_self() == self.thread:
            self.loop.wake()
        elif write(state.wake_fd, &one, sizeof(one)) < 0:
            pass  # the counter is full: it is awake already

    cdef void complete_open(self, const int64_t *tags, uint32_t count, int32_t code):
        """Complete what is open of some tags."""
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
        """End requests that the class has had for too long."""
        cdef uint64_t now_ns = now_ns_of()
        cdef uint32_t i
        self.state.looked_ns = now_ns
        for i in range(self.piece_total):
            if self.pieces[i].state != PIECE_OPEN:
                continue
            if now_ns - self.state.records[self.pieces[i].slot].start_ns > self.state.timeout_ns:
                self.complaints.say("late", f"a {_OPERATIONS[self.pieces[i].op]} was not answered for {self.spec.timeout_s:g} s "
                                    "(backend.timeout_s); the driver got IOERR")
                self.finish(i, -ETIMEDOUT)

    # -- moving bytes

    cdef object move(self, Batch batch, store, at, uint8_t op):
        """Copy between a buffer and the memory of all open requests of a batch that have the operation."""
        cdef Py_buffer view, places
        cdef const int64_t *place = NULL
        cdef object array
        PyObject_GetBuffer(store, &view, PyBUF_WRITABLE if op == VF_OP_WRITE else PyBUF_SIMPLE)
        try:
            if at is None:
                return self.move_rows(batch, &view, NULL, op)
            array = _int64_array(at)
            PyObject_GetBuffer(array, &places, PyBUF_SIMPLE)
            try:
                if places.len != 8 * batch.count:
                    raise ValueError(f"{places.len // 8} places for {batch.count} requests")
                return self.move_rows(batch, &view, <const int64_t *> places.buf, op)
            finally:
                PyBuffer_Release(&places)
        finally:
            PyBuffer_Release(&view)

    cdef object move_rows(self, Batch batch, const Py_buffer *store, const int64_t *at, uint8_t op):
        cdef uint32_t count = 0, i, moved
        cdef uint64_t bytes_moved = 0
        if batch.move_count:
            raise ValueError("bytes of this batch are being moved by another thread")
        try:
            count = self.plan_moves(batch, store, at, op, &bytes_moved)
            if bytes_moved >= NOGIL_BYTES:
                with nogil:
                    self.carry_out(batch.moves, count, op)
            else:
                self.carry_out(batch.moves, count, op)
        finally:
            moved, batch.move_count = batch.move_count, 0
            for i in range(moved):
                self.pieces[batch.moves[i].index].state = PIECE_OPEN
            for i in range(moved):
                if self.pieces[batch.moves[i].index].doomed:  # its submit() has raised meanwhile
                    self.finish(batch.moves[i].index, self.pieces[batch.moves[i].index].doomed)
        return count

    cdef int plan_moves(self, Batch batch, const Py_buffer *store, const int64_t *at, uint8_t op,
                        uint64_t *bytes_moved) except -1:
        """Note what is to be copied, all of it within `store`; nobody completes it meanwhile."""
        cdef uint32_t i, index
        cdef py_piece *piece
        cdef py_move *move
        cdef int64_t offset
        for i in range(batch.count):
            index = <uint32_t> batch.tags[i] & ((1 << TAG_BITS) - 1)
            piece = &self.pieces[index]
            if piece.tag != batch.tags[i] or piece.state != PIECE_OPEN or piece.op != op:
                continue
            offset = at[i] if at != NULL else <int64_t> piece.offset_bytes
            if offset < 0 or offset > store.len or <uint64_t> (store.len - offset) < piece.length_bytes:
                raise IndexError(f"a request for {piece.length_bytes} bytes at {offset} lies outside of {store.len} bytes")
            move = &batch.moves[batch.move_count]
            move.store = <char *> store.buf + offset
            move.index = index
            move.memory = self.private_memory(index)
            piece.state = PIECE_BUSY
            batch.move_count += 1
            bytes_moved[0] += piece.length_bytes
        return <int> batch.move_count

    cdef char *private_memory(self, uint32_t index):
        """Where the bytes of a piece are that has a buffer of its own; NULL: in the driver's memory."""
        cdef object owner = self.memories[index]
        if owner is None or type(owner) is DriverMemory:
            return NULL
        return <char *> <bytearray> owner if type(owner) is bytearray else <char *> <bytes> owner

    cdef void carry_out(self, const py_move *moves, uint32_t count, uint8_t op) noexcept nogil:
        cdef uint32_t i
        cdef const py_piece *piece
        for i in range(count):
            piece = &self.pieces[moves[i].index]
            if moves[i].memory == NULL:
                self.move_piece(piece, moves[i].store, op == VF_OP_READ)
            elif op == VF_OP_READ:
                memcpy(moves[i].memory, moves[i].store, piece.length_bytes)
            else:
                memcpy(moves[i].store, moves[i].memory, piece.length_bytes)

    # -- what the loop calls

    cdef int sleep_in_loop(self, const int *fds, uint32_t count, int timeout_ms):
        """Run the event loop until there is something to do. 1: the time was up."""
        cdef uint32_t i
        cdef uint32_t readable
        self.state.sleeping = 1
        vf_fence_full()
        if vf_load_acquire_u32(&self.state.done_tail) != self.state.done_head:
            self.state.sleeping = 0
            return 0
        readable = self.loop.sleep([fds[i] for i in range(count)], timeout_ms / 1000 if timeout_ms >= 0 else None)
        self.state.sleeping = 0
        self.state.stepped_ns = now_ns_of()
        self.state.engine.readable |= readable
        return readable == 0 and vf_load_acquire_u32(&self.state.done_tail) == self.state.done_head

    cdef void region(self, void *va, size_t len_bytes, const vf_mapping *mapping):
        cdef uint32_t i
        cdef Window window
        cdef py_window *entry
        if mapping != NULL:
            if self.state.window_count == WINDOW_MAX:
                return  # its requests get copies
            window = open_window(mapping.fd, mapping.prot, mapping.offset_bytes, len_bytes)
            if window is None:
                return
            entry = &self.state.windows[self.state.window_count]
            entry.start = <uintptr_t> va
            entry.length_bytes = len_bytes
            entry.alias = <uintptr_t> window.alias
            Py_INCREF(window)
            entry.window = <PyObject *> window
            self.state.window_count += 1
            return
        for i in range(self.state.window_count):
            if self.state.windows[i].start == <uintptr_t> va:
                (<Window> self.state.windows[i].window).close()
                self.forget_window(i)
                return

    cdef void shut(self):
        """The engine closes: nothing is in flight."""
        while self.state.window_count:
            (<Window> self.state.windows[self.state.window_count - 1].window).close()
            self.forget_window(self.state.window_count - 1)
        self.state.engine = NULL


def _release(view):
    """Release a memoryview; one that something else was made of stays, which its DriverMemory knows."""
    try:
        view.release()
    except BufferError:
        pass


def _int64_array(values):
    """Return values as a contiguous array of 64-bit integers. Raises TypeError for what is none."""
    import numpy as np
    array = np.asarray(values)
    if array.size and (array.ndim != 1 or array.dtype.kind not in "iu"):
        raise TypeError(f"an array of integers in one dimension is wanted, not of {array.dtype} in {array.ndim}")
    return np.ascontiguousarray(array, "i8")


async def _wait_piece(Engine engine, awaitable, int64_t tag, int op, uint64_t length_bytes):
    try:
        result = await awaitable
    except BaseException as error:
        engine.awaited(tag, op, length_bytes, None, error)
    else:
        engine.awaited(tag, op, length_bytes, result, None)


async def _wait_batch(Engine engine, awaitable, Batch batch):
    try:
        await awaitable
    except BaseException as error:
        engine.batch_awaited(batch, error)
    else:
        engine.batch_awaited(batch, None)


cdef int py_open(vf_engine *engine, uint32_t slot_count) noexcept nogil:
    cdef py_state *state = <py_state *> engine.context
    cdef uint32_t capacity = 1
    while capacity < slot_count:
        capacity *= 2
    state.records = <py_record *> calloc(slot_count, sizeof(py_record))
    state.backlog = <uint16_t *> calloc(slot_count, sizeof(uint16_t))
    state.done = <uint16_t *> calloc(capacity, sizeof(uint16_t))
    if state.records == NULL or state.backlog == NULL or state.done == NULL:
        return -ENOMEM  # freed with the Engine
    state.slot_count = slot_count
    state.done_mask = capacity - 1
    state.engine = engine
    engine.state = state
    engine.always = state.has_loop
    return 0


cdef inline void py_queue(py_state *state, uint16_t slot) noexcept nogil:
    cdef uint32_t at = state.backlog_at + state.backlog_count
    state.backlog[at - state.slot_count if at >= state.slot_count else at] = slot
    state.backlog_count += 1


cdef int py_submit(vf_engine *engine, vf_req *req) noexcept nogil:
    cdef py_state *state = <py_state *> engine.state
    cdef py_record *record = &state.records[req.slot]
    record.req = req
    record.zeroed_bytes = 0
    record.start_ns = now_ns_of() if state.timeout_ns else 0
    record.error = 0
    record.piece_count = 0
    record.stage = STAGE_DATA
    py_queue(state, req.slot)
    engine.inflight_count += 1
    return 0


cdef void py_flush(vf_engine *engine) noexcept nogil:
    cdef py_state *state = <py_state *> engine.state
    if state.backlog_count == 0 and not (state.has_loop and now_ns_of() - state.stepped_ns > STEP_NS):
        return
    with gil:
        (<Engine> state.owner).hand_over()


cdef uint32_t py_take(py_state *state, vf_req **done, uint32_t most) noexcept nogil:
    """Hand out what has ended; what has another stage goes back to be handed over."""
    cdef uint32_t count = 0
    cdef uint32_t tail = vf_load_acquire_u32(&state.done_tail)
    cdef uint16_t slot
    cdef py_record *record
    while state.done_head != tail and count < most:
        slot = state.done[state.done_head & state.done_mask]
        state.done_head += 1
        record = &state.records[slot]
        if record.stage != STAGE_DONE:
            py_queue(state, slot)
            continue
        record.req.result = record.error
        if record.req.op == VF_OP_READ and record.error == 0:
            vf_req_advance(record.req, record.req.left_bytes)
        done[count] = record.req
        count += 1
    state.engine.inflight_count -= count
    return count


cdef uint32_t py_reap(vf_engine *engine, vf_req **done, uint32_t most) noexcept nogil:
    cdef py_state *state = <py_state *> engine.state
    cdef uint32_t count = py_take(state, done, most)
    if count == 0 and state.has_loop:
        with gil:
            (<Engine> state.owner).step()
        count = py_take(state, done, most)
    if state.timeout_ns and now_ns_of() - state.looked_ns > EXPIRY_NS:
        with gil:
            (<Engine> state.owner).expire()
    return count


cdef int py_sleep(vf_engine *engine, const int *fds, uint32_t count, int timeout_ms) noexcept nogil:
    cdef py_state *state = <py_state *> engine.state
    cdef pollfd polled[WATCH_MAX]
    cdef uint64_t wakes
    cdef uint32_t i
    cdef int ready = 0
    if vf_load_acquire_u32(&state.done_tail) != state.done_head or (state.backlog_count and not state.stuck):
        return 0
    if state.has_loop:
        with gil:
            return (<Engine> state.owner).sleep_in_loop(fds, count, timeout_ms)
    for i in range(count):
        polled[i] = pollfd(fds[i], POLLIN, 0)
    polled[count] = pollfd(state.wake_fd, POLLIN, 0)
    vf_store_relaxed_u32(&state.sleeping, 1)
    vf_fence_full()  # pairs with the one of push()
    if vf_load_acquire_u32(&state.done_tail) == state.done_head:
        ready = poll(polled, count + 1, timeout_ms)
        for i in range(count if ready > 0 else 0):
            engine.readable |= <uint32_t> (polled[i].revents != 0) << i
        if ready > 0 and polled[count].revents and read(state.wake_fd, &wakes, sizeof(wakes)) < 0:
            pass  # somebody else has read it
    else:
        ready = 1
    vf_store_relaxed_u32(&state.sleeping, 0)
    return ready == 0


cdef void py_wait(vf_engine *engine) noexcept nogil:
    cdef py_state *state = <py_state *> engine.state
    # A time-out of the requests' own is looked at now and then.
    py_sleep(engine, NULL, 0, <int> (EXPIRY_NS // 1000000) if state.timeout_ns else -1)


cdef void py_close(vf_engine *engine) noexcept nogil:
    cdef py_state *state = <py_state *> engine.state
    with gil:
        (<Engine> state.owner).shut()


cdef void py_region(vf_engine *engine, void *va, size_t len_bytes, const vf_mapping *mapping) noexcept nogil:
    cdef py_state *state = <py_state *> engine.state
    with gil:
        (<Engine> state.owner).region(va, len_bytes, mapping)


cdef int py_bury(vf_engine *engine, uintptr_t address) noexcept nogil:
    cdef py_state *state = <py_state *> engine.state
    cdef int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
    cdef uint32_t i
    cdef py_window *window
    for i in range(state.window_count):
        window = &state.windows[i]
        if address - window.alias < window.length_bytes:
            if mmap(<void *> window.alias, window.length_bytes, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED:
                return -1
            return 0
    return -1


cdef vf_engine_ops _OPS
memset(&_OPS, 0, sizeof(_OPS))
_OPS.name = "python"
_OPS.open = py_open
_OPS.submit = py_submit
_OPS.flush = py_flush
_OPS.reap = py_reap
_OPS.wait = py_wait
_OPS.sleep = py_sleep
_OPS.close = py_close
_OPS.region = py_region
_OPS.bury = py_bury
_OPS.publish_batch = 16
_OPS.blocks = 1
