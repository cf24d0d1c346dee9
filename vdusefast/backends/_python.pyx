"""The engine that serves a disk written in Python: all requests of a round are handed over under one hold of the GIL.

csrc/python/handoff.c connects the loop with this module, which calls the class. _python_pieces.pyx has the pieces that the
class completes. A thread (csrc/python/hang_watch.c) names calls that do not return, and interrupts them after the time-out.
"""

import errno
import os
import signal
import sys

from cpython.pycapsule cimport PyCapsule_New
from cpython.ref cimport PyObject
from libc.errno cimport EIO, ETIMEDOUT
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from posix.unistd cimport _exit, usleep

from vdusefast.worker._csrc cimport *
from vdusefast.backends._handoff cimport *
from vdusefast.backends._python_hangs cimport py_title, say_hang, say_line, say_over
from vdusefast.backends._python_pieces cimport PIECE_OPEN, PIECES_MAX, ROWS_MAX, TAG_BITS, Batch, Pieces, py_piece

from vdusefast.backends._python_pieces import OPERATIONS
from vdusefast.backends.python_class import overrides
from vdusefast.backends.python_errors import is_between_calls, print_stack

from vdusefast.base._build cimport vf_build_id
from vdusefast.base.build import check_extension

check_extension(__name__, vf_build_id())

cdef extern from *:
    """
    #define vf_py_refs(o) Py_REFCNT((PyObject *)(o))
    """
    Py_ssize_t refs "vf_py_refs"(PyObject *)

cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t
    ctypedef struct pthread_attr_t:
        pass
    int pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *) noexcept nogil, void *)
    int pthread_detach(pthread_t)

cdef extern from "<signal.h>" nogil:
    int pthread_kill(pthread_t, int)

cdef enum:
    EXIT_HANGS = 70  # of a process whose class could not be interrupted

# Free in a worker; a class that uses it too gets TimeoutError only after the time-out.
INTERRUPT_SIGNAL = signal.SIGRTMIN + 6


cdef class Engine(Pieces):
    """The plugin of a worker: a disk, and its connection to the loop."""

    cdef object capsule
    cdef vf_engine_plugin plugin
    cdef bint batched
    cdef Batch spare
    cdef object pread, pwrite, flush, discard, write_zeroes, submit
    cdef bint is_open
    cdef vf_hang_watch watch
    cdef bint is_watched
    cdef bytes uri
    cdef py_title title  # of the lines about hangs
    cdef int interrupt_signal  # 0: calls cannot be interrupted
    cdef uint32_t locating  # a thread prints where the class is

    def __cinit__(self, disk, spec):
        """Get ready for a disk, which is opened next."""
        self.handoff.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.handoff.owner = <void *> self
        self.handoff.hand_over = on_hand_over
        self.handoff.step = on_step
        self.handoff.expire = on_expire
        self.handoff.sleep_in_loop = on_sleep
        self.handoff.region = on_region
        self.handoff.zero_pages = on_zero_pages
        self.handoff.shut = on_shut
        self.plugin.abi = VF_ENGINE_ABI
        self.plugin.engine_bytes = sizeof(vf_engine)
        self.plugin.req_bytes = sizeof(vf_req)
        self.plugin.ops = &vf_engine_python
        self.plugin.context = <void *> self.handoff
        self.capsule = PyCapsule_New(&self.plugin, VF_ENGINE_CAPSULE, NULL)
        self.is_open = True

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

    def name_hangs(self):
        """Have calls that do not return named, and interrupted after the time-out; for a process of the class's own."""
        spec = self.spec
        self.uri = spec.uri.encode(errors="replace")
        self.title.uri = self.uri
        is_relay = spec.queue_count > 1 and not self.disk.shareable
        self.title.queue_slots = max(1, spec.slot_count // spec.queue_count) if is_relay else 0
        self.title.timeout_s = spec.timeout_s
        self.title.batched = self.batched
        self.watch.owner = <void *> self
        self.watch.handoff = self.handoff
        self.watch.on_event = on_hang
        self.is_watched = True
        if spec.timeout_s:
            signal.signal(INTERRUPT_SIGNAL, self.interrupted)
            self.interrupt_signal = INTERRUPT_SIGNAL

    def interrupted(self, number, frame):
        """End a call of the class, or a task of its loop, that has run for longer than the time-out, by an exception."""
        cdef uint64_t now_ns = vf_now_ns()
        cdef uint32_t i
        cdef bint is_late = False
        if self.handoff.engine == NULL:
            return
        if self.handoff.call & 1:
            is_late = vf_handoff_is_late(self.handoff, <uint16_t> self.handoff.call_slot, now_ns)
        elif not is_between_calls(frame):
            for i in range(self.handoff.slot_count):
                is_late |= self.handoff.records[i].number != 0 and vf_handoff_is_late(self.handoff, <uint16_t> i, now_ns)
        if is_late:
            raise TimeoutError(ETIMEDOUT, f"the request has taken longer than {self.spec.timeout_s:g} s (backend.timeout_s)")

    def print_place(self):
        """Print where the class is, if it still is there."""
        frame = sys._current_frames().get(self.thread)
        if frame is not None and (self.handoff.call & 1 or not is_between_calls(frame)):
            print_stack(frame)

    def abandon(self):
        """Release everything of an engine that was not opened; its disk is left alone."""
        self.disk = None
        self.close()

    @property
    def engine(self):
        return self.capsule

    def fileno(self):
        return -1

    def events(self):
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
            self.handoff.has_loop = False
        os.close(self.handoff.wake_fd)
        self.handoff.wake_fd = -1
        self.forget_buffers()

    def have_loop(self):
        """Return the event loop; it is made on the first call."""
        if self.loop is None:
            from vdusefast.backends.python_loop import Loop
            self.loop = Loop(self.handoff.wake_fd, self.loop_failed)
            self.handoff.has_loop = True
            if self.handoff.engine != NULL:
                self.handoff.engine.always = 1  # the class may have tasks of its own
        return self.loop

    def loop_failed(self, error):
        self.failed("a task", error)

    cdef int32_t checked(self, str what, result, uint64_t length_bytes):
        """Return the -errno for the result of pread or pwrite, 0 for all bytes."""
        if result is None:
            return 0
        if isinstance(result, int) and not isinstance(result, bool):
            if result == length_bytes:
                return 0
            self.complaints.say("count", f"{what} returned {result}, but the request has {length_bytes} bytes; it must move all "
                                "of them, or raise OSError; the driver got IOERR")
        else:
            hint = "fill the buffer instead, by buffer[:] = data" if what == "pread" else "return one of these"
            self.complaints.say("count", f"{what} returned {type(result).__name__}, which is neither None nor a count of bytes: "
                                f"{hint}; the driver got IOERR")
        return -EIO

    cdef void hand_over(self):
        """Hand the submitted requests to the class."""
        self.handoff.stuck = False
        if self.is_watched and not self.watch.started and vf_hang_watch_start(&self.watch) < 0:
            self.is_watched = False  # no thread: the supervisor still says which queue waits
        if self.handoff.timeout_ns:
            self.expire()
            self.expire_backlog()
        if self.handoff.backlog_count:
            if self.batched:
                self.hand_over_batches()
            else:
                self.hand_over_calls()
        if self.loop is not None:
            self.step()

    cdef void expire_backlog(self):
        """End requests that are too late before the class has seen them, as it has not returned from earlier ones."""
        cdef uint64_t now_ns = vf_now_ns()
        cdef uint32_t i
        cdef uint16_t slot
        for i in range(self.handoff.backlog_count):
            slot = self.handoff.backlog[self.handoff.backlog_at]
            vf_handoff_pop(self.handoff)
            if vf_handoff_is_late(self.handoff, slot, now_ns):
                self.settle_late(slot)
            else:
                vf_handoff_queue(self.handoff, slot)

    cdef void settle_late(self, uint16_t slot):
        self.complaints.say("late", f"a request waited for longer than {self.spec.timeout_s:g} s (backend.timeout_s) for "
                            "earlier ones; the driver got IOERR")
        self.handoff.records[slot].piece_count = 0
        self.settle(slot, -ETIMEDOUT)

    cdef void hand_over_calls(self):
        cdef uint32_t i, count
        cdef uint16_t slot
        while self.handoff.backlog_count:
            slot = self.handoff.backlog[self.handoff.backlog_at]
            if self.handoff.timeout_ns and vf_handoff_is_late(self.handoff, slot, vf_now_ns()):
                vf_handoff_pop(self.handoff)
                self.settle_late(slot)
                continue
            if not self.cut(slot):
                return
            vf_handoff_pop(self.handoff)
            count = self.cut_count
            if count == 0:
                self.settle(slot, 0)
            for i in range(count):
                # All pieces, even if one fails: the driver asked for the others as well.
                self.call(self.cut_index[i])

    cdef void hand_over_batches(self):
        cdef uint32_t i
        cdef uint16_t slot
        cdef Batch batch
        while self.handoff.backlog_count:
            batch = self.spare if self.spare is not None else Batch.__new__(Batch, self)
            self.spare = None
            if batch.view is not None and batch.count != self.handoff.backlog_count:
                batch.view = None
            batch.count = 0
            while self.handoff.backlog_count and batch.count + PIECES_MAX <= ROWS_MAX:
                slot = self.handoff.backlog[self.handoff.backlog_at]
                if not self.cut(slot):
                    break
                vf_handoff_pop(self.handoff)
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
            if self.handoff.stuck:
                return

    cdef void give(self, Batch batch):
        cdef uint32_t first = <uint32_t> batch.tags[0] & ((1 << TAG_BITS) - 1)
        vf_handoff_call_begin(self.handoff, self.pieces[first].slot, VF_CALL_SUBMIT)
        try:
            result = self.submit(batch)
            vf_handoff_call_end(self.handoff)
            if result is not None and hasattr(result, "__await__"):
                self.start(_wait_batch(self, result, batch))
        except BaseException as error:
            vf_handoff_call_end(self.handoff)
            self.complete_open(batch.tags, batch.count, self.failed("submit", error))

    cdef void call(self, uint32_t index):
        """Have the class carry out one piece."""
        cdef py_piece *piece = &self.pieces[index]
        cdef int64_t tag = piece.tag
        cdef int32_t code = 0
        cdef uint8_t op = piece.op
        vf_handoff_call_begin(self.handoff, piece.slot, op)
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
            vf_handoff_call_end(self.handoff)
            if result is not None:
                if hasattr(result, "__await__"):
                    self.start(_wait_piece(self, result, tag, op, piece.length_bytes))
                    return
                if op <= VF_OP_WRITE:
                    code = self.checked(OPERATIONS[op], result, piece.length_bytes)
        except BaseException as error:
            vf_handoff_call_end(self.handoff)
            code = self.failed(OPERATIONS[op], error)
        if piece.tag == tag and piece.state == PIECE_OPEN:
            self.finish(index, code)

    cdef int start(self, coroutine) except -1:
        self.have_loop().start(coroutine)
        return 0

    def awaited(self, int64_t tag, int op, uint64_t length_bytes, result, error):
        """Complete a piece by the result or exception of its coroutine."""
        cdef uint32_t index = <uint32_t> tag & ((1 << TAG_BITS) - 1)
        cdef int32_t code
        cdef bint is_open = self.pieces[index].tag == tag and self.pieces[index].state == PIECE_OPEN
        if not is_open and type(error).__name__ == "CancelledError":
            return  # it has ended by the time-out, and its task now
        if error is not None:
            code = self.failed(OPERATIONS[op], error)
        else:
            code = self.checked(OPERATIONS[op], result, length_bytes) if op <= VF_OP_WRITE else 0
        if self.pieces[index].tag == tag and self.pieces[index].state == PIECE_OPEN:
            self.finish(index, code)

    def batch_awaited(self, Batch batch, error):
        if error is not None:
            self.complete_open(batch.tags, batch.count, self.failed("submit", error))

    cdef void step(self):
        self.handoff.stepped_ns = vf_now_ns()
        self.loop.step()

    cdef int sleep_in_loop(self, const int *fds, uint32_t count, int timeout_ms):
        """Run the event loop until there is something to do. Returns 1 when the time was up."""
        cdef uint32_t i
        cdef uint32_t readable
        vf_store_relaxed_u32(&self.handoff.sleeping, 1)
        vf_fence_full()  # pairs with the one of vf_handoff_push()
        if vf_handoff_is_done(self.handoff):
            self.handoff.sleeping = 0
            return 0
        readable = self.loop.sleep([fds[i] for i in range(count)], timeout_ms / 1000 if timeout_ms >= 0 else None)
        self.handoff.sleeping = 0
        self.handoff.stepped_ns = vf_now_ns()
        self.handoff.engine.readable |= readable
        return readable == 0 and not vf_handoff_is_done(self.handoff)


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


cdef void on_hand_over(void *owner) noexcept nogil:
    with gil:
        (<Engine> owner).hand_over()


cdef void on_step(void *owner) noexcept nogil:
    with gil:
        (<Engine> owner).step()


cdef void on_expire(void *owner) noexcept nogil:
    with gil:
        (<Engine> owner).expire()
        (<Engine> owner).expire_backlog()


cdef int on_sleep(void *owner, const int *fds, uint32_t count, int timeout_ms) noexcept nogil:
    with gil:
        return (<Engine> owner).sleep_in_loop(fds, count, timeout_ms)


cdef void on_region(void *owner, void *va, size_t len_bytes, const vf_mapping *mapping) noexcept nogil:
    with gil:
        if mapping != NULL:
            (<Engine> owner).windows.add(va, len_bytes, mapping)
        else:
            (<Engine> owner).windows.remove(va)


cdef int on_zero_pages(void *owner, uintptr_t address) noexcept nogil:
    return (<Engine> owner).windows.zero_pages_at(address)


cdef void on_shut(void *owner) noexcept nogil:
    with gil:
        with nogil:  # the other thread may be about to print
            vf_hang_watch_stop(&(<Engine> owner).watch)
            while vf_load_acquire_u32(&(<Engine> owner).locating):
                usleep(1000)
        (<Engine> owner).windows.close()


# -- calls that do not return; in the thread that watches, without the lock, which the class may hold

cdef void on_hang(void *owner, vf_hang_event event, const vf_hang *hang) noexcept nogil:
    if event == VF_HANG_NAMED:
        say_hang(&(<Engine> owner).title, hang)
        if vf_exchange_if_u32(&(<Engine> owner).locating, 0, 1):
            print_place_soon(owner)
    elif event == VF_HANG_OVER:
        say_over(&(<Engine> owner).title, hang)
    elif event == VF_HANG_LATE:
        if (<Engine> owner).interrupt_signal:
            pthread_kill((<Engine> owner).thread, (<Engine> owner).interrupt_signal)
    else:
        say_line(&(<Engine> owner).title, hang.slot, b"a call that outlasts backend.timeout_s cannot be interrupted; this process ends, and "
                 b"another one tries its requests again")
        _exit(EXIT_HANGS)


cdef void print_place_soon(void *owner) noexcept nogil:
    """Have the lines of the class's code printed, once the interpreter's lock is free."""
    cdef pthread_t thread
    if pthread_create(&thread, NULL, print_place, owner) == 0:
        pthread_detach(thread)
    else:
        vf_store_release_u32(&(<Engine> owner).locating, 0)


cdef void *print_place(void *owner) noexcept nogil:
    with gil:
        try:
            (<Engine> owner).print_place()
        finally:
            vf_store_release_u32(&(<Engine> owner).locating, 0)
    return NULL
