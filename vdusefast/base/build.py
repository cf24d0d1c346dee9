"""The build identity of this process: equal in all parts of one build, and different in any other build.

setup.py computes it from the version and from everything that processes of a device share: headers, layouts, messages.
It is compiled into each extension. It also lies in the package's directory, where an upgrade of the files changes it.

Only the standard library is imported here, and little of that: workers load it.
"""

from __future__ import annotations

import os

PROTOCOL_VERSION = 2  # of the arguments of processes (handed.py); a change makes another build, too
EXIT_OTHER_BUILD = 77  # exit status of a process that was started by one of another build
ID_MAX_BYTES = 128
PATH = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "build_id.txt")


def on_disk() -> str:
    """Return the identity of the installed files, from which a process would be started now, "" when there is none."""
    try:
        fd = os.open(PATH, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(fd, ID_MAX_BYTES).decode(errors="replace").strip()
    finally:
        os.close(fd)


BUILD_ID = on_disk()


def upgraded() -> str:
    """Return the message for installed files of another build, "" if they are of this build."""
    found = on_disk()
    if found == BUILD_ID:
        return ""
    return f"the files of vdusefast were upgraded: they are of build {found or 'none'}, this server is of {BUILD_ID}"


class OtherBuildError(ImportError):
    """A process or an extension is of another build than this one."""


def check_process(protocol: str, build_id: str) -> None:
    """Check that the process that started this one is of the same build. Raises OtherBuildError."""
    if (protocol, build_id) != (str(PROTOCOL_VERSION), BUILD_ID):
        raise OtherBuildError(
            f"the files are of build {BUILD_ID}, and the server that started this process is of {build_id}"
        )


def check_extension(name: str, build_id: bytes) -> None:
    """Check that the extension that calls this is of the same build as the modules. Raises OtherBuildError."""
    if build_id.decode() != BUILD_ID:
        raise OtherBuildError(
            f"{name} is of build {build_id.decode()}, and the files around it are of {BUILD_ID or 'none'}: install "
            "vdusefast again (in a source tree: make build)"
        )
