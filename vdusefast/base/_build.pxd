cdef extern from "identity/build_id.h":
    const char *vf_build_id()
