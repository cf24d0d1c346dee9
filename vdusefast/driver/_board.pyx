# cython: language_level=3
"""The server's end of a board (csrc/board/): the memory by which several processes together drive one device.

One thread at a time uses a `Board`. The eventfds that it is given are borrowed.
"""
import errno
import fcntl
import os

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memset, strncpy
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap

from vdusefast.driver._board cimport *

from vdusefast.base._build cimport vf_build_id
from vdusefast.base.build import check_extension

check_extension(__name__, vf_build_id())

cdef extern from *:
    """
    #ifndef MAP_FIXED_NOREPLACE
    #define MAP_FIXED_NOREPLACE 0x100000
    #endif
    """
    enum:
        MAP_FIXED_NOREPLACE

MAGIC = VF_BOARD_MAGIC
USERS_MAX = VF_BOARD_USERS_MAX
SLOTS_MAX = VF_BOARD_SLOTS_MAX
SEGMENTS_MAX = VF_BOARD_SEGMENTS_MAX
BOUNCE_MAX_BYTES = VF_BOARD_BOUNCE_MAX_BYTES
QUEUES_MAX = VF_BOARD_QUEUES_MAX
ROUTES = ("own", "cross")
# Where boards are, one after another; programs and sanitizers have nothing there. The second is for machines with short
# addresses.
FIRST_ADDRESSES = (0x2000_0000_0000, 0x20_0000_0000)
ADDRESS_STEP = 0x10_0000_0000
ADDRESS_TRIES = 64
SHORT_STEP = 0x1_0000_0000


cdef class Board:
    """A board in a new memfd, mapped where every client will map it."""

    cdef vf_board_view view
    cdef uintptr_t start
    cdef uint64_t total
    cdef readonly int fd

    def __cinit__(self, *args, **kwargs):
        self.start = 0
        self.fd = -1

    def __init__(self, str name, *, str serial, str route, uint64_t spin_ns, **words):
        """Make it. words: the other fields of struct vf_board_geometry. Raises ValueError, OSError."""
        if self.start:
            raise ValueError("the board has been made already")
        cdef vf_board_geometry g
        memset(&g, 0, sizeof(g))
        g.spin_ns = spin_ns
        g.route = ROUTES.index(route)
        cdef bytes raw = serial.encode("ascii", "replace")[:20]
        strncpy(g.serial, raw, 20)
        g.capacity_bytes = words.pop("capacity_bytes")
        g.discard_max_bytes = words.pop("discard_max_bytes")
        g.discard_granularity_bytes = words.pop("discard_granularity_bytes")
        g.write_zeroes_max_bytes = words.pop("write_zeroes_max_bytes")
        g.block_bytes = words.pop("block_bytes")
        g.physical_block_bytes = words.pop("physical_block_bytes")
        g.io_min_bytes = words.pop("io_min_bytes")
        g.io_opt_bytes = words.pop("io_opt_bytes")
        g.size_max_bytes = words.pop("size_max_bytes")
        g.segments_max = words.pop("segments_max")
        g.bounce_bytes = words.pop("bounce_bytes")
        g.queue_count = words.pop("queue_count")
        g.queue_size = words.pop("queue_size")
        g.slot_count = words.pop("slot_count")
        g.user_max = words.pop("user_max")
        g.packed = words.pop("packed")
        g.event_idx = words.pop("event_idx")
        g.in_order = words.pop("in_order")
        g.indirect = words.pop("indirect")
        g.read_only = words.pop("read_only")
        g.has_flush = words.pop("has_flush")
        if words:
            raise TypeError(f"no fields of a board: {sorted(words)}")
        self.total = vf_server_bytes(&g, <void *>0x1000_0000)
        if self.total == 0:
            raise ValueError("a board cannot have these sizes")
        self.fd = os.memfd_create(f"vdusefast-board-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, self.total)
        # A client that cut it off would end every other process by SIGBUS.
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.start = self.map_somewhere()
        if vf_server_create(&self.view, <void *>self.start, &g):
            raise ValueError("a ring cannot have these sizes")

    cdef uintptr_t map_somewhere(self) except 0:
        cdef void *at
        for first, step in zip(FIRST_ADDRESSES, (ADDRESS_STEP, SHORT_STEP)):
            for i in range(ADDRESS_TRIES):
                wanted = first + i * step
                at = mmap(<void *><uintptr_t>wanted, self.total, PROT_READ | PROT_WRITE,
                          MAP_SHARED | MAP_FIXED_NOREPLACE, self.fd, 0)
                if at == <void *><uintptr_t>wanted:
                    return wanted
                if at != MAP_FAILED:
                    munmap(at, self.total)
        raise OSError(errno.ENOMEM, "no address is free for the memory that this process shares with its clients")

    def __dealloc__(self):
        self.unmap()

    cdef void unmap(self):
        if self.start:
            munmap(<void *>self.start, self.total)
            self.start = 0
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    cdef int check(self, uint32_t queue=0) except -1:
        if self.start == 0:
            raise ValueError("the board is closed")
        if queue >= self.view.geometry.queue_count:
            raise IndexError(queue)
        return 0

    def close(self):
        """Have clients notice that the disk is gone, and give up the memory. A second call does nothing."""
        if self.start:
            vf_server_close(&self.view)
        self.unmap()

    @property
    def address(self):
        """Where the board is in every process."""
        return self.start

    @property
    def size_bytes(self):
        """Its size."""
        return self.total

    def areas(self, uint32_t queue):
        """Return the addresses of a ring's three areas."""
        self.check(queue)
        cdef vf_board_parts *parts = &self.view.parts[queue]
        return <uintptr_t>parts.desc, <uintptr_t>parts.driver, <uintptr_t>parts.device

    def set_fds(self, uint32_t queue, int kick_fd, int irq_fd):
        """Note the eventfds of a queue (borrowed)."""
        self.check(queue)
        self.view.kick_fds[queue] = kick_fd
        self.view.irq_fds[queue] = irq_fd

    @property
    def capacity_bytes(self):
        """The size of the device, as clients see it."""
        self.check()
        return vf_load_relaxed_u64(&self.view.board.geometry.capacity_bytes)

    def set_capacity(self, uint64_t size_bytes):
        """Have clients see another size of the device."""
        self.check()
        vf_store_relaxed_u64(&self.view.board.geometry.capacity_bytes, size_bytes)

    def new_user(self, bint joined):
        """Enter a user. joined: fences reach its process (csrc/base/membarrier.h). Returns its number and its queue, or (0, 0) when there are too many."""
        self.check()
        cdef uint32_t number = vf_server_new_user(&self.view, joined)
        return number, vf_server_home(&self.view, number) if number else 0

    def end_user(self, uint32_t number):
        """Note that a user has ended. Returns how much of it is left; call again, after `reap`, until that is 0."""
        self.check()
        return vf_server_end_user(&self.view, number)

    def holds_lock(self, uint32_t number):
        """Return whether a user has a queue's lock."""
        self.check()
        return vf_server_holds_lock(&self.view, number)

    def owners(self):
        """Return the numbers of the users that have a queue's lock, as it says: no such user may exist."""
        self.check()
        cdef uint32_t q, held
        found = set()
        for q in range(self.view.geometry.queue_count):
            held = vf_load_relaxed_u32(&self.view.parts[q].queue.lock) & ~<uint32_t>VF_LOCK_WAITERS
            if held != VF_LOCK_FREE and held != VF_LOCK_SERVER:
                found.add(held)
            if vf_load_relaxed_u32(&self.view.parts[q].queue.inside):
                found.add(vf_load_relaxed_u32(&self.view.parts[q].queue.inside))
        return found

    def reap(self):
        """Reap all queues on behalf of their users."""
        self.check()
        vf_server_reap(&self.view)

    def lock(self, uint32_t queue):
        """Try to lock a queue. Returns 0, or the number of the user that has it locked."""
        self.check(queue)
        return vf_server_lock(&self.view, queue)

    def seize(self, uint32_t queue, uint32_t number):
        """Take over the lock of a user whose process has ended. Returns False when it has another owner by now."""
        self.check(queue)
        return vf_server_seize(&self.view, queue, number)

    def hold(self, uint32_t queue, uint32_t number, *, bint solo):
        """For tests alone: have a user own the lock that the server has, as if it had been killed with it, or solo."""
        self.check(queue)
        vf_server_hold(&self.view, queue, number, solo)

    def replay(self):
        """Make fresh rings, and put on them what the living have in flight. All queues are locked."""
        self.check()
        if vf_server_replay(&self.view):
            raise ValueError("the board has been written over")

    def resume(self):
        """Unlock all queues, and kick the device."""
        self.check()
        vf_server_resume(&self.view)

    def broken(self):
        """Return whether the device broke a ring, as a user saw it."""
        self.check()
        for q in range(self.view.geometry.queue_count):
            if vf_load_relaxed_u32(&self.view.parts[q].queue.broken):
                return True
        return False

    def figures(self):
        """Return a dictionary for each queue, and how often the device was reset."""
        self.check()
        queues = []
        cdef vf_board_queue *queue
        for q in range(self.view.geometry.queue_count):
            queue = self.view.parts[q].queue
            queues.append({
                "published": vf_load_relaxed_u64(&queue.published),
                "batches": vf_load_relaxed_u64(&queue.batches),
                "kicks": vf_load_relaxed_u64(&queue.kicks),
                "irqs": vf_load_relaxed_u64(&queue.irqs),
                "locks_contended": vf_load_relaxed_u64(&queue.locks_contended),
            })
        return {"queues": queues, "resets": self.view.board.resets, "replayed": self.view.board.replayed}
