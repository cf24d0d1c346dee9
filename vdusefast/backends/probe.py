"""Have a module's store described by a process of its own, which may hang, crash or print whatever it likes.

The process is `python -m vdusefast.backends.probe FD`, with a StoreSpec as JSON on its standard input. It writes its
answer to the descriptor FD: a JSON object with `description`, or with `error` and `exit_code`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

from vdusefast.backends import plugin_module
from vdusefast.backends.plugin import Description, StoreSpec
from vdusefast.errors import BackendError, VdusefastError, from_exit_code

PROBE_LIMIT_S = 30
BLOCK_SIZE_MIN_BYTES = 512
BLOCK_SIZE_MAX_BYTES = 4096
STDERR_MAX_BYTES = 1 << 16


def describe(spec: StoreSpec, limit_s: float = PROBE_LIMIT_S) -> Description:
    """Return what the module of the store says of it.

    Raises what it raises, BackendError when it crashes or has not answered after `limit_s`.
    """
    here = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), here)))}
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "vdusefast.backends.probe", str(write_fd), str(limit_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[write_fd],
            env=environment,
            process_group=0,  # the terminal's Ctrl-C is for us, and ends it
        )
    except OSError as error:
        os.close(read_fd)
        raise BackendError(f"{spec.uri}: cannot be looked at: {error.strerror}") from None
    finally:
        os.close(write_fd)
    with os.fdopen(read_fd, "rb") as answer, process:
        return _take_answer(spec, process, answer, limit_s)


def _take_answer(spec: StoreSpec, process: subprocess.Popen[bytes], answer: IO[bytes], limit_s: float) -> Description:
    try:
        # What it writes into the pipe is a line, which fits: it does not wait for us to read it.
        _, said = process.communicate(spec.to_json().encode(), timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise BackendError(
            f"{spec.uri}: has not said what it is for {limit_s:g} s; whatever serves it may hang"
        ) from None
    finally:
        process.kill()
        process.wait()
    text = answer.read()
    if not text:
        lines = said[-STDERR_MAX_BYTES:].decode(errors="replace").strip().splitlines()
        ended = f"signal {-process.returncode}" if process.returncode < 0 else f"status {process.returncode}"
        last = f"; its last line: {lines[-1]}" if lines else ""
        raise BackendError(f"{spec.uri}: the process that looks at it has ended with {ended}{last}")
    result = json.loads(text)
    if "error" in result:
        raise from_exit_code(result["error"], result["exit_code"], BackendError)
    return _checked(spec.uri, Description(**result["description"]))


def _checked(uri: str, described: Description) -> Description:
    """Return what a device can be made of: a user's class may say anything. Raises BackendError."""
    sizes = {
        "size": described.size_bytes,
        "block size": described.block_size_bytes,
        "physical block size": described.physical_block_size_bytes,
        "best request size": described.opt_io_size_bytes,
    }
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
            raise BackendError(f"{uri}: says that its {name} is {value!r}; that must be a number of bytes")
    block = described.block_size_bytes
    if not BLOCK_SIZE_MIN_BYTES <= block <= BLOCK_SIZE_MAX_BYTES or block & (block - 1):
        raise BackendError(
            f"{uri}: says that its block size is {block}; that must be a power of two from {BLOCK_SIZE_MIN_BYTES} to "
            f"{BLOCK_SIZE_MAX_BYTES}"
        )
    return described


def main(argv: list[str]) -> int:
    """Describe the store of the specification on standard input. Returns the exit status."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(float(argv[1])) + 1)  # should nobody be left to end us
    spec = StoreSpec.from_json(sys.stdin.read())
    try:
        result: dict[str, object] = {"description": plugin_module(spec.uri).describe(spec)._asdict()}
    except VdusefastError as error:
        result = {"error": str(error), "exit_code": error.exit_code}
    with os.fdopen(int(argv[0]), "w") as answer:
        json.dump(result, answer, default=repr)
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # threads of a library or of a class are not waited for
