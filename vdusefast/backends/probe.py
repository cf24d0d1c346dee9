"""Describe a module's store in a process of its own, which may hang, crash or print anything.

The process is `python -m vdusefast.backends.probe PROTOCOL BUILD FD LIMIT`, with a StoreSpec as JSON on its standard
input. It writes its answer to the descriptor FD: a JSON object with `description`, or with `error` and `exit_code`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any

import msgspec

from vdusefast.backends import plugin_module
from vdusefast.backends.plugin import Description, StoreSpec
from vdusefast.base import spawn
from vdusefast.base.build import BUILD_ID, EXIT_OTHER_BUILD, PROTOCOL_VERSION, OtherBuildError, check_process
from vdusefast.base.child_output import Output
from vdusefast.base.decoding import decode_json
from vdusefast.base.time_limits import PROBE_LIMIT_S
from vdusefast.errors import BackendError, VdusefastError, from_exit_code
from vdusefast.units import BLOCK_SIZE_MAX_BYTES, BLOCK_SIZE_MIN_BYTES

ANSWER_MAX_BYTES = 64 << 10
IDENTITY_MAX = 1024
SLOW_S = 4.0  # without an answer: people learn what they wait for
REAP_S = 5.0  # a killed process that stays longer waits in the kernel


class _Answer(msgspec.Struct):
    """The answer of the process."""

    description: dict[str, Any] = {}
    error: str = ""
    exit_code: int = 1


def describe(spec: StoreSpec, limit_s: float = PROBE_LIMIT_S) -> Description:
    """Return the description of a store by its module.

    Raises the module's errors, and BackendError when it crashes or does not answer within `limit_s`.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), spawn.HERE))),
    }
    with ExitStack() as opened:
        answer_fd = _make_answer(opened)
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        opened.callback(os.close, read_fd)
        os.set_blocking(write_fd, True)
        arguments = [str(PROTOCOL_VERSION), BUILD_ID, str(answer_fd), str(limit_s)]
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-u", "-m", "vdusefast.backends.probe", *arguments],
                stdin=subprocess.PIPE,
                stdout=write_fd,
                stderr=write_fd,
                pass_fds=[answer_fd],
                env=environment,
                process_group=0,  # the terminal's Ctrl-C is for us, and ends it
            )
        except OSError as error:
            raise BackendError(f"{spec.uri}: cannot be examined: {error.strerror}") from None
        finally:
            os.close(write_fd)
        output = Output(f"{spec.uri}: probe (pid {process.pid})")
        try:
            _send_spec(process, spec)
            ended = _listen(process, spec.uri, read_fd, output, limit_s)
        finally:
            _end(process, spec.uri)
        if not ended:
            raise BackendError(f"{spec.uri}: no answer to the probe for {limit_s:g} s; its server may hang")
        text = os.pread(answer_fd, ANSWER_MAX_BYTES, 0).strip(b"\0")
    return _take_answer(spec.uri, process.returncode, text, output.last_line)


def _make_answer(opened: ExitStack) -> int:
    """Return a file in memory for the answer: its size is fixed, and its writer never waits for us."""
    fd = os.memfd_create("vdusefast-probe", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    opened.callback(os.close, fd)
    os.ftruncate(fd, ANSWER_MAX_BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def _send_spec(process: subprocess.Popen[bytes], spec: StoreSpec) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(spec.to_json().encode())
        process.stdin.close()
    except BrokenPipeError:
        pass  # it has ended already, which shows in its status


def _listen(process: subprocess.Popen[bytes], uri: str, output_fd: int, output: Output, limit_s: float) -> bool:
    """Log what a process writes until it ends. Returns whether that is within `limit_s`."""
    began_s = time.monotonic()
    deadline = began_s + limit_s
    slow_s = began_s + min(SLOW_S, limit_s)
    poll = select.poll()
    pid_fd = os.pidfd_open(process.pid)
    try:
        poll.register(pid_fd, select.POLLIN)
        poll.register(output_fd, select.POLLIN)
        while (left_s := deadline - time.monotonic()) > 0:
            ready = dict(poll.poll(min(left_s, max(0.0, slow_s - time.monotonic())) * 1000))
            if time.monotonic() >= slow_s:
                slow_s = deadline + 1
                output.budget.log(
                    logging.WARNING,
                    f"{uri}: its probe (pid {process.pid}) has not answered for {SLOW_S:g} s; it is killed after "
                    f"{limit_s:g} s",
                )
            if output_fd in ready and not output.read(output_fd):
                poll.unregister(output_fd)
            if pid_fd in ready:
                output.finish(output_fd)
                return True
        return False
    finally:
        os.close(pid_fd)


def _end(process: subprocess.Popen[bytes], uri: str) -> None:
    """Kill and reap a process, if it has not ended. Raises BackendError when it hangs in the kernel."""
    process.kill()
    try:
        process.wait(REAP_S)
    except subprocess.TimeoutExpired:
        raise BackendError(
            f"{uri}: its probe (pid {process.pid}) waits in the kernel and cannot be killed; see "
            f"/proc/{process.pid}/stack"
        ) from None


def _take_answer(uri: str, status: int, text: bytes, last_line: str) -> Description:
    if not text:
        ended = f"signal {-status}" if status < 0 else f"status {status}"
        last = f"; its last line: {last_line}" if last_line else ""
        raise BackendError(f"{uri}: its probe has ended with {ended}{last}")
    try:
        answer = decode_json(text, _Answer)
        if answer.error:
            raise from_exit_code(answer.error, answer.exit_code, BackendError)
        return _checked(uri, Description(**answer.description))
    except (msgspec.DecodeError, TypeError) as error:
        raise BackendError(f"{uri}: its probe gave a malformed answer: {error}") from None


def _checked(uri: str, described: Description) -> Description:
    """Return the checked description, as a user's class may return anything. Raises BackendError."""
    sizes = {
        "size": described.size_bytes,
        "block size": described.block_size_bytes,
        "physical block size": described.physical_block_size_bytes,
        "best request size": described.opt_io_size_bytes,
        "smallest good request size": described.min_io_size_bytes,
        "discard granularity": described.discard_granularity_bytes,
        "granule": described.granule_bytes,
    }
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
            raise BackendError(f"{uri}: its module reports {name} {value!r}; it must be a number of bytes")
    flags = {
        name: value
        for name, value in described._asdict().items()
        if isinstance(Description._field_defaults.get(name), bool)
    }
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise BackendError(f"{uri}: its module reports {name} = {value!r}; it must be true or false")
    if not isinstance(described.identity, str) or len(described.identity) > IDENTITY_MAX:
        raise BackendError(f"{uri}: its module reports identity {described.identity!r:.100}; it must be a short text")
    if described.rotational not in (-1, 0, 1):
        raise BackendError(f"{uri}: its module reports rotational = {described.rotational!r}; it must be -1, 0 or 1")
    block = described.block_size_bytes
    if not BLOCK_SIZE_MIN_BYTES <= block <= BLOCK_SIZE_MAX_BYTES or block & (block - 1):
        raise BackendError(
            f"{uri}: its module reports block size {block}; it must be a power of two from {BLOCK_SIZE_MIN_BYTES} to "
            f"{BLOCK_SIZE_MAX_BYTES}"
        )
    return described


def main(argv: list[str]) -> int:
    """Describe the store of the specification on standard input. Returns the exit status."""
    protocol, build_id, answer_fd, limit_s = argv
    try:
        check_process(protocol, build_id)
    except OtherBuildError as error:
        print(f"{error}: restart it", file=sys.stderr)
        return EXIT_OTHER_BUILD
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(float(limit_s)) + 1)  # in case no parent is left to kill this process
    spec = StoreSpec.from_json(sys.stdin.read())
    try:
        result: dict[str, object] = {"description": plugin_module(spec.uri).describe(spec)._asdict()}
    except VdusefastError as error:
        result = {"error": str(error), "exit_code": error.exit_code}
    os.pwrite(int(answer_fd), json.dumps(result, default=repr).encode()[:ANSWER_MAX_BYTES], 0)
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # threads of a library or of a class are not waited for
