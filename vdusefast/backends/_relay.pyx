"""A store that only one process has open for all queues: the engine of the workers, and the relay's loop."""

import os

from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memset

from vdusefast.worker._csrc cimport *

from vdusefast.base._build cimport vf_build_id
from vdusefast.base.build import check_extension

check_extension(__name__, vf_build_id())

cdef extern from "relay/relay.h" nogil:
    enum:
        VF_RELAY_EVENTS
        VF_RELAY_QUEUE_MAX
    struct vf_relay_address:
        char path[108]
        uint32_t queue
        int memory_fd
    struct vf_relay_place:
        int listen_fd
        int memory_fd
    struct vf_relay_server
    const vf_engine_ops vf_engine_relay
    vf_relay_server *vf_relay_open(
        const vf_engine_plugin *, const vf_store *, const vf_relay_place *, uint32_t, uint32_t, bint)
    int vf_relay_serve(vf_relay_server *, int)
    void vf_relay_close(vf_relay_server *)

PATH_MAX_BYTES = 107


cdef class Client:
    """The engine of a worker (backends.plugin.Plugin) that sends its requests to the relay at the socket `path`.

    memory_fd: the memory that the two share for the queue; borrowed.
    """

    cdef vf_engine_plugin plugin
    cdef vf_relay_address address

    def __cinit__(self, path, uint32_t queue, int memory_fd):
        cdef bytes name = os.fsencode(path)
        if len(name) > PATH_MAX_BYTES:
            raise ValueError(f"the path of a socket has at most {PATH_MAX_BYTES} bytes: {path}")
        memset(&self.address, 0, sizeof(self.address))
        memcpy(self.address.path, <const char *> name, len(name))
        self.address.queue = queue
        self.address.memory_fd = memory_fd
        self.plugin = vf_engine_plugin(
            VF_ENGINE_ABI, sizeof(vf_engine), sizeof(vf_req), &vf_engine_relay, &self.address)

    @property
    def engine(self):
        """See Plugin."""
        return PyCapsule_New(&self.plugin, VF_ENGINE_CAPSULE, NULL)

    def fileno(self):
        """See Plugin: there are no events, as the relay sends them to the supervisor itself."""
        return -1

    def events(self):
        """See Plugin."""
        return []

    def close(self):
        """See Plugin."""


cdef class Server:
    """The relay of several queues with `slot_count` slots each, over the engine of `plugin`, which it keeps.

    places: of each queue a listening SOCK_SEQPACKET and the memory that it shares with its worker, borrowed. read_only:
    refuse requests that write. Raises OSError (EPROTO: the module was built for another version).
    """

    cdef vf_relay_server *server
    cdef object plugin

    def __cinit__(self, plugin, *, places, uint32_t slot_count, uint64_t size_bytes, bint flushes=True,
                  bint read_only=False):
        cdef vf_relay_place place[VF_RELAY_QUEUE_MAX]
        cdef vf_store store
        cdef const vf_engine_plugin *brought = <const vf_engine_plugin *> PyCapsule_GetPointer(
            plugin.engine, VF_ENGINE_CAPSULE)
        memset(&store, 0, sizeof(store))
        store.fd = -1
        store.kind = VF_STORE_PLUGIN
        store.cache = VF_CACHE_WRITEBACK if flushes else VF_CACHE_UNSAFE
        store.size_bytes = size_bytes
        self.plugin = plugin
        if len(places) > VF_RELAY_QUEUE_MAX:
            raise ValueError(f"a relay has at most {VF_RELAY_QUEUE_MAX} queues")
        for i, (listen_fd, memory_fd) in enumerate(places):
            place[i] = vf_relay_place(listen_fd, memory_fd)
        self.server = vf_relay_open(brought, &store, place, len(places), slot_count, read_only)
        if self.server == NULL:
            raise OSError(errno, os.strerror(errno))

    def serve(self, int wake_fd):
        """Serve until there is an event of the store (True), or `wake_fd` is readable (False)."""
        cdef int reason
        with nogil:
            reason = vf_relay_serve(self.server, wake_fd)
        return reason == VF_RELAY_EVENTS

    def close(self):
        """Drop all requests and release everything; a second call does nothing."""
        if self.server != NULL:
            vf_relay_close(self.server)
            self.server = NULL
            self.plugin.close()

    def __dealloc__(self):
        if self.server != NULL:
            vf_relay_close(self.server)
