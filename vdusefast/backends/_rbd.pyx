# SPDX-License-Identifier: Apache-2.0
"""The use of librados and librbd by the backend `rbd`: the probe of an image, and the engine that serves it.

Failures are reported as numbers; `vdusefast.backends.rbd` makes messages of them.
"""

import os

from cpython.pycapsule cimport PyCapsule_New
from libc.errno cimport ENOENT, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from vdusefast.worker._csrc cimport VF_ENGINE_CAPSULE, vf_engine_plugin

from vdusefast.base._build cimport vf_build_id
from vdusefast.base.build import check_extension

check_extension(__name__, vf_build_id())


cdef extern from "rbd/image.h" nogil:
    enum vf_rbd_step:
        VF_RBD_CLIENT
        VF_RBD_CONF
        VF_RBD_CONNECT
        VF_RBD_FENCE
        VF_RBD_POOL
        VF_RBD_NAMESPACE
        VF_RBD_IMAGE
        VF_RBD_SNAP
        VF_RBD_OPEN
    struct vf_rbd_settings:
        const char *conf
        const char *id
        const char *keyring
        const char *pool
        const char *name_space
        const char *image
        const char *snap
        const char *wanted
        uint8_t read_only
        uint8_t early_writes
        uint32_t connect_limit_s
        uint32_t op_limit_s
    struct vf_rbd_image:
        vf_rbd_step reached
    struct vf_rbd_about:
        uint64_t size_bytes
        uint64_t object_bytes
        uint64_t stripe_unit_bytes
        uint64_t stripe_count
        uint8_t exclusive_lock
        uint8_t caches
        uint8_t early_writes
        char identity[256]
    int vf_rbd_image_open(vf_rbd_image *, const vf_rbd_settings *, const char *, int *)
    void vf_rbd_image_close(vf_rbd_image *)
    int vf_rbd_about_image "vf_rbd_about"(const vf_rbd_image *, vf_rbd_about *)
    int vf_rbd_option(const vf_rbd_image *, const char *, char *, size_t)
    int vf_rbd_names(const vf_rbd_image *, char *, size_t)

cdef extern from "rbd/engine_rbd.h" nogil:
    enum vf_rbd_event_kind:
        VF_RBD_EVENT_NONE
        VF_RBD_EVENT_RETRIES
        VF_RBD_EVENT_OPENED
        VF_RBD_EVENT_GAVE_UP
        VF_RBD_EVENT_FENCED
        VF_RBD_EVENT_SHUT_OUT
        VF_RBD_EVENT_TIMED_OUT
        VF_RBD_EVENT_NOTES
        VF_RBD_EVENT_RESIZED
    struct vf_rbd_event:
        vf_rbd_event_kind kind
        vf_rbd_step step
        int err
        uint64_t value
    struct vf_rbd_opener:
        int events_fd
    struct vf_rbd:
        vf_engine_plugin plugin
        vf_rbd_opener opener
    vf_rbd *vf_rbd_create(const vf_rbd_settings *, uint64_t, double, double, int, uint32_t)
    int vf_rbd_destroy(vf_rbd *)
    int vf_rbd_event_take(vf_rbd_opener *, vf_rbd_event *)

STEPS = {
    VF_RBD_CLIENT: "client",
    VF_RBD_CONF: "conf",
    VF_RBD_CONNECT: "connect",
    VF_RBD_FENCE: "fence",
    VF_RBD_POOL: "pool",
    VF_RBD_NAMESPACE: "namespace",
    VF_RBD_IMAGE: "image",
    VF_RBD_SNAP: "snapshot",
    VF_RBD_OPEN: "open",
}
EVENTS = {
    VF_RBD_EVENT_RETRIES: "retries",
    VF_RBD_EVENT_OPENED: "opened",
    VF_RBD_EVENT_GAVE_UP: "gave up",
    VF_RBD_EVENT_FENCED: "fenced",
    VF_RBD_EVENT_SHUT_OUT: "shut out",
    VF_RBD_EVENT_TIMED_OUT: "timed out",
    VF_RBD_EVENT_NOTES: "notes",
    VF_RBD_EVENT_RESIZED: "resized",
}

DEF NAMES_BYTES = 4096
DEF OPTION_BYTES = 1024


cdef class Settings:
    """The names of an image, and the strings that C borrows."""

    cdef vf_rbd_settings c
    cdef tuple strings

    def __init__(self, names, *, bint read_only, bint early_writes, uint32_t connect_limit_s, uint32_t op_limit_s):
        """Keep `names`: conf, id, keyring, pool, namespace, image, snapshot, and its identity; "" for none."""
        self.strings = tuple(os.fsencode(name) for name in names)
        self.c.conf, self.c.id, self.c.keyring, self.c.pool, self.c.name_space, self.c.image, self.c.snap, self.c.wanted = self.strings
        self.c.read_only = read_only
        self.c.early_writes = early_writes
        self.c.connect_limit_s = connect_limit_s
        self.c.op_limit_s = op_limit_s


class Failure(Exception):
    """An image cannot be opened: the step, an errno, and details for the message."""

    def __init__(self, step, error, keyrings, names):
        super().__init__(step, error)
        self.step = step
        self.error = error
        self.keyrings = keyrings
        self.names = names


def look(Settings settings):
    """Return the properties of an image, as a dictionary. Raises Failure."""
    cdef vf_rbd_image image
    cdef vf_rbd_about about
    cdef char names[NAMES_BYTES]
    cdef char keyrings[OPTION_BYTES]
    cdef int names_bytes = 0
    cdef int fenced = 0
    cdef int err
    names[0] = keyrings[0] = 0
    with nogil:
        err = vf_rbd_image_open(&image, &settings.c, b"", &fenced)
        if err == 0:
            err = vf_rbd_about_image(&image, &about)
        elif err == -ENOENT or image.reached == VF_RBD_CONNECT:
            names_bytes = vf_rbd_names(&image, names, NAMES_BYTES)
            vf_rbd_option(&image, b"keyring", keyrings, OPTION_BYTES)
    step = STEPS[image.reached]
    with nogil:
        vf_rbd_image_close(&image)
    if err:
        found = names[:max(names_bytes, 0)].decode(errors="replace").split("\0")
        raise Failure(step, -err, keyrings.decode(errors="replace"), [name for name in found if name])
    return about


cdef class Engine:
    """The engine of one image, with its events: see vdusefast.backends.plugin.Plugin."""

    cdef vf_rbd *rbd
    cdef Settings settings

    def __cinit__(self, Settings settings, *, uint64_t size_bytes, double timeout_s, double reconnect_s, int notes_fd, uint32_t notes_offset):
        """Prepare; the image is opened by the engine. Raises OSError."""
        self.settings = settings
        self.rbd = vf_rbd_create(&settings.c, size_bytes, timeout_s, reconnect_s, notes_fd, notes_offset)
        if self.rbd == NULL:
            raise OSError(errno, os.strerror(errno))

    @property
    def engine(self):
        return PyCapsule_New(&self.rbd.plugin, VF_ENGINE_CAPSULE, NULL)

    def fileno(self):
        return self.rbd.opener.events_fd if self.rbd != NULL else -1

    def events(self):
        """Return the events since the last call: (kind, step, errno, value) each."""
        cdef vf_rbd_event event
        found = []
        while self.rbd != NULL and vf_rbd_event_take(&self.rbd.opener, &event):
            found.append((EVENTS[event.kind], STEPS[event.step], -event.err, event.value))
        return found

    def close(self):
        """Release everything. False when the cluster does not let go: the process has to be ended. Idempotent."""
        if self.rbd == NULL:
            return True
        released = vf_rbd_destroy(self.rbd) == 0
        self.rbd = NULL
        if not released:
            _kept.append(self.settings)  # a thread still uses its strings
        return released

    def __dealloc__(self):
        if self.rbd != NULL:
            vf_rbd_destroy(self.rbd)


_kept = []
