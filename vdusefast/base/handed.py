"""The arguments of one of our processes, in a sealed memfd that it inherits.

Everybody may read a command line, and a store's URI can hold secrets.

Only the standard library is imported here: the module is part of a worker's start-up time.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence

from vdusefast.base.build import BUILD_ID, PROTOCOL_VERSION, check_process

WORDS_MAX_BYTES = 1 << 20
# The first word names the sender's build. It has this form in every version, as other builds must understand it.
_GREETING = "vdusefast"
_SEALS = fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def write_arguments(arguments: Sequence[str]) -> int:
    """Return a descriptor for `read_arguments` in another process. Raises ValueError, OSError."""
    if any("\0" in argument for argument in arguments):
        raise ValueError("a NUL character cannot be handed to another process")
    greeting = f"{_GREETING} {PROTOCOL_VERSION} {BUILD_ID}"
    text = "\0".join([greeting, *arguments]).encode("utf-8", "surrogateescape")
    fd = os.memfd_create("vdusefast-spec", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, text)
        fcntl.fcntl(fd, *_SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_arguments(fd: int) -> list[str]:
    """Return the arguments given to `write_arguments`. Consumes the descriptor.

    Raises OtherBuildError when that was done by a process of another build, ValueError, OSError.
    """
    try:
        text = os.pread(fd, WORDS_MAX_BYTES, 0)
    finally:
        os.close(fd)
    first, *arguments = text.decode("utf-8", "surrogateescape").split("\0")
    greeting, _, speaker = first.partition(" ")
    if greeting != _GREETING:
        raise ValueError(f"descriptor {fd} holds nothing that vdusefast has written")
    protocol, _, build_id = speaker.partition(" ")
    check_process(protocol, build_id)
    return arguments
