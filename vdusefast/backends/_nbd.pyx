"""Python's interface to csrc/nbd: the probe of a server, and the engine with its events. The rest is C."""

from cpython.pycapsule cimport PyCapsule_New
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from vdusefast.worker._csrc cimport VF_ENGINE_CAPSULE, vf_engine_plugin

import os

from vdusefast.backends.plugin import StoreEvent

from vdusefast.base._build cimport vf_build_id
from vdusefast.base.build import check_extension

check_extension(__name__, vf_build_id())

cdef extern from "libnbd.h" nogil:
    struct nbd_handle:
        pass
    nbd_handle *nbd_create()
    void nbd_close(nbd_handle *)
    const char *nbd_get_version(nbd_handle *)
    int nbd_supports_tls(nbd_handle *)

cdef extern from "nbd/nbd_export.h" nogil:
    enum:
        VF_NBD_LIST_MAX
    struct vf_nbd_export:
        uint64_t size_bytes
        uint32_t block_min_bytes
        uint32_t block_preferred_bytes
        uint32_t block_max_bytes
        uint8_t read_only
        uint8_t is_rotational
        uint8_t can_flush
        uint8_t can_fua
        uint8_t can_trim
        uint8_t can_zero
        uint8_t can_fast_zero
        uint8_t can_multi_conn
    enum:
        VF_NBD_STAGE_URI
        VF_NBD_STAGE_CONNECT
        VF_NBD_STAGE_HANDSHAKE
        VF_NBD_STAGE_EXPORT
    struct vf_nbd_probe:
        vf_nbd_export export_ "export"
        int stage
        int err
        char text[400]
        uint32_t listed_count
        char listed[8][64]
    int vf_nbd_probe_ "vf_nbd_probe"(vf_nbd_probe *, const char *, int)
    void vf_nbd_list(vf_nbd_probe *, const char *, int)

cdef extern from "nbd/nbd_events.h" nogil:
    struct vf_nbd_event:
        uint64_t size_bytes
        char text[800]
    struct vf_nbd_event_ring:
        int fd
    int vf_nbd_event_take(vf_nbd_event_ring *, vf_nbd_event *)

cdef extern from "nbd/engine_nbd.h" nogil:
    struct vf_nbd_config:
        const char *uri
        uint64_t size_bytes
        uint32_t block_size_bytes
        uint8_t read_only
        uint8_t sole
        uint64_t timeout_ns
        uint64_t reconnect_ns
        int hold_fd
        int notes_fd
        int64_t notes_offset
    struct vf_nbd:
        pass
    vf_nbd *vf_nbd_create(const vf_nbd_config *)
    void vf_nbd_destroy(vf_nbd *)
    const vf_engine_plugin *vf_nbd_plugin(const vf_nbd *)
    vf_nbd_event_ring *vf_nbd_events_of(vf_nbd *)

STAGES = {
    VF_NBD_STAGE_URI: "uri",
    VF_NBD_STAGE_CONNECT: "connect",
    VF_NBD_STAGE_HANDSHAKE: "handshake",
    VF_NBD_STAGE_EXPORT: "export",
}


class ProbeError(Exception):
    """A server could not be asked: `stage` is one of STAGES, `err` an errno or 0, `text` what libnbd says."""

    def __init__(self, stage, err, text):
        super().__init__(text)
        self.stage = stage
        self.err = err
        self.text = text


def probe(str uri, int limit_ms):
    """Connect, for at most `limit_ms`, and return the properties of the export, by name. Raises ProbeError."""
    cdef vf_nbd_probe found
    cdef bytes encoded = os.fsencode(uri)
    cdef const char *c_uri = encoded
    cdef int rc
    with nogil:
        rc = vf_nbd_probe_(&found, c_uri, limit_ms)
    if rc:
        raise ProbeError(STAGES[found.stage], found.err, found.text.decode(errors="replace"))
    return {
        "size_bytes": found.export_.size_bytes,
        "block_min_bytes": found.export_.block_min_bytes,
        "block_preferred_bytes": found.export_.block_preferred_bytes,
        "block_max_bytes": found.export_.block_max_bytes,
        "read_only": bool(found.export_.read_only),
        "is_rotational": bool(found.export_.is_rotational),
        "can_flush": bool(found.export_.can_flush),
        "can_fua": bool(found.export_.can_fua),
        "can_trim": bool(found.export_.can_trim),
        "can_zero": bool(found.export_.can_zero),
        "can_fast_zero": bool(found.export_.can_fast_zero),
        "can_multi_conn": bool(found.export_.can_multi_conn),
    }


def list_exports(str uri, int limit_ms):
    """Return the names of the first exports that the server lists, and the number of all."""
    cdef vf_nbd_probe found
    cdef bytes encoded = os.fsencode(uri)
    cdef const char *c_uri = encoded
    with nogil:
        vf_nbd_list(&found, c_uri, limit_ms)
    cdef uint32_t i
    names = []
    for i in range(found.listed_count):
        if i < <uint32_t> VF_NBD_LIST_MAX:
            names.append(found.listed[i].decode(errors="replace"))
    return names, found.listed_count


def library():
    """Return libnbd's version, and whether it has TLS."""
    cdef nbd_handle *handle = nbd_create()
    if handle == NULL:
        raise MemoryError
    try:
        return nbd_get_version(handle).decode(), nbd_supports_tls(handle) == 1
    finally:
        nbd_close(handle)


cdef class Engine:
    """The engine of one worker: a Plugin."""

    cdef vf_nbd *nbd

    def __init__(
        self, str uri, *, uint64_t size_bytes, uint32_t block_size_bytes, bint read_only, double timeout_s,
        double reconnect_s, bint sole=False, int hold_fd=-1, int notes_fd=-1, int64_t notes_offset=0,
    ):
        """Make it; nothing is connected before it is opened. The descriptors are borrowed. Raises OSError."""
        cdef bytes encoded = os.fsencode(uri)
        cdef vf_nbd_config config
        if self.nbd != NULL:
            raise ValueError("made already")
        config.uri = encoded
        config.size_bytes = size_bytes
        config.block_size_bytes = block_size_bytes
        config.read_only = read_only
        config.sole = sole
        config.timeout_ns = <uint64_t> (timeout_s * 1e9)
        config.hold_fd = hold_fd
        config.notes_fd = notes_fd
        config.notes_offset = notes_offset
        config.reconnect_ns = <uint64_t> (reconnect_s * 1e9)
        self.nbd = vf_nbd_create(&config)
        if self.nbd == NULL:
            raise OSError(errno, os.strerror(errno))

    def __dealloc__(self):
        vf_nbd_destroy(self.nbd)

    @property
    def engine(self):
        """See Plugin."""
        return PyCapsule_New(<void *> vf_nbd_plugin(self._open()), VF_ENGINE_CAPSULE, NULL)

    def fileno(self):
        """See Plugin."""
        return vf_nbd_events_of(self._open()).fd

    def events(self):
        """See Plugin."""
        cdef vf_nbd_event one
        found = []
        while vf_nbd_event_take(vf_nbd_events_of(self._open()), &one):
            if one.size_bytes:
                found.append(StoreEvent("resized", "", one.size_bytes))
            else:
                found.append(StoreEvent("log", one.text.decode(errors="replace")))
        return found

    def close(self):
        """See Plugin."""
        vf_nbd_destroy(self.nbd)
        self.nbd = NULL

    cdef vf_nbd *_open(self) except NULL:
        if self.nbd == NULL:
            raise ValueError("closed")
        return self.nbd
