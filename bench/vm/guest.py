"""Boots a guest and runs one command in it.

The guest sees the host's file system as it is, read-only below a layer in its memory, and thus runs the same Python,
fio and checkout. Nothing of a guest lies in the host's file system: qemu gets its initramfs, disk and output as
inherited descriptors, and dies with the thread that started it, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import selectors
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bench.vm import cache, machine
from bench.vm.errors import GuestError, GuestTimeoutError
from bench.vm.kernel_log import findings
from bench.vm.machine import GuestConfig

END_LIMIT_S = 10.0  # what the guest may need to pass on the rest of the output after its command has ended
LAST_LINES = 25
BOOT_TRIES = 3  # with the clock "host" a kernel that patches itself while it boots dies at times
READ_BYTES = 1 << 16
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

GOING_DOWN = "guest: going down"  # what a command writes to /dev/kmsg before it ends its guest
DOWN = re.compile(r"^\[ *([\d.]+)\] reboot: (Power down|Restarting system|System halted)", re.MULTILINE)
MARK = re.compile(rf"^\[ *([\d.]+)\] {GOING_DOWN}", re.MULTILINE)

Sink = Callable[[bytes], object]


@dataclass(frozen=True)
class Outcome:
    """The end of a command in a guest. `boot_s` is from the start of qemu to that of the command."""

    status: int  # 0 when the guest went down
    kernel_log: str
    boot_s: float
    total_s: float
    went_down: str = ""  # as the kernel has it: "Power down", "Restarting system"
    down_s: float = 0.0  # from GOING_DOWN in the kernel log to that, in the guest's time


def run(config: GuestConfig, command: Sequence[str], stdout: Sink | None = None, stderr: Sink | None = None) -> Outcome:
    """Boot a guest, run `command` in it as root and return how it ended, once the guest is gone.

    Output is given to `stdout` and `stderr` as it comes; by default to this process's own.
    Raises GuestError where no guest can be had or it crashes, and GuestTimeoutError when it does not end in time.
    """
    machine.check_tools(config)
    for _ in range(BOOT_TRIES - 1):
        try:
            return _run_once(config, command, stdout, stderr)
        except GuestError as error:
            if not error.died_booting:
                raise
    return _run_once(config, command, stdout, stderr)


def _run_once(config: GuestConfig, command: Sequence[str], stdout: Sink | None, stderr: Sink | None) -> Outcome:
    kernel = cache.kernel(config.kernel)
    token = f"\x1e{secrets.token_hex(16)}\n".encode()
    with contextlib.ExitStack() as stack:
        pipes = [_Pipe(stack) for _ in range(5)]
        log, out, err, status, complaints = pipes
        initrd = os.memfd_create("initramfs", 0)
        stack.callback(os.close, initrd)
        _write_all(initrd, machine.initrd(config, kernel, command, token))
        inherited = [initrd, *(pipe.writer for pipe in pipes)]
        arguments = machine.command_line(
            config, kernel.image, initrd, [out.writer, err.writer, status.writer], log.writer
        )
        if config.disk:
            disk = stack.enter_context(_disk_file(config.disk_image))
            disk.truncate(size_bytes(config.disk))
            inherited.append(disk.fileno())
            arguments += machine.disk_arguments(disk.fileno())
        session = _Session(config, token, stdout or _to_descriptor(1), stderr or _to_descriptor(2))
        session.watch(log, out, err, status, complaints)
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=complaints.writer,
            pass_fds=inherited,
            start_new_session=True,
        )
        try:
            for pipe in pipes:
                pipe.close_writer()
            return session.follow()
        finally:
            process.kill()
            process.wait()


def captured(config: GuestConfig, command: Sequence[str]) -> tuple[Outcome, str, str]:
    """Run `command` as run() does, and return its output and complaints as text as well."""
    out, err = bytearray(), bytearray()
    outcome = run(config, command, out.extend, err.extend)
    return outcome, out.decode(errors="replace"), err.decode(errors="replace")


def size_bytes(text: str) -> int:
    """Return the bytes of a size such as 512M or 1G. Raises GuestError when it is none."""
    if not (match := re.fullmatch(r"(\d+)([KMGT]?)", text.upper())):
        raise GuestError(f"{text} is no size; write 512M or 1G")
    return int(match[1]) * UNITS.get(match[2], 1)


def _disk_file(image: Path | None) -> IO[bytes]:
    """Return the file that holds the guest's disk: a temporary one without `image`."""
    return tempfile.TemporaryFile() if image is None else image.open("a+b")


class _Pipe:
    """A pipe whose writing end qemu inherits."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.reader, self.writer = os.pipe2(os.O_CLOEXEC)
        stack.callback(os.close, self.reader)
        stack.callback(self.close_writer)

    def close_writer(self) -> None:
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1


class _Output:
    """One stream of the command, passed on as it comes, up to the end mark."""

    def __init__(self, sink: Sink, token: bytes) -> None:
        self._sink = sink
        self._token = token
        self._held = b""
        self.ended = False

    def feed(self, data: bytes) -> None:
        if self.ended:
            return
        data = self._held + data
        end = data.find(self._token)
        self.ended = end >= 0
        if not self.ended:  # what may be the beginning of the mark waits for the rest
            end = data.rfind(self._token[:1], -len(self._token) if len(data) > len(self._token) else 0)
            end = end if end >= 0 and self._token.startswith(data[end:]) else len(data)
        self._held = data[end:]
        if data[:end]:
            self._sink(data[:end])


class _Session:
    """Follows a guest from its first line of kernel log to the exit status of its command."""

    def __init__(self, config: GuestConfig, token: bytes, stdout: Sink, stderr: Sink) -> None:
        self._config = config
        self._outputs = [_Output(stdout, token), _Output(stderr, token)]
        self._log, self._status, self._complaints = bytearray(), bytearray(), bytearray()
        self._selector = selectors.DefaultSelector()
        self._started = time.monotonic()
        self._boot_s = 0.0

    def watch(self, log: _Pipe, out: _Pipe, err: _Pipe, status: _Pipe, complaints: _Pipe) -> None:
        """Register each pipe with the function that takes its bytes."""
        stdout, stderr = self._outputs
        feeds: list[tuple[_Pipe, Sink]] = [(log, self._log.extend), (out, stdout.feed), (err, stderr.feed)]
        for pipe, feed in [*feeds, (status, self._status.extend), (complaints, self._complaints.extend)]:
            self._selector.register(pipe.reader, selectors.EVENT_READ, feed)

    def follow(self) -> Outcome:
        """Pass on output until the guest has said how its command ended."""
        deadline = self._started + self._config.timeout_s
        ending = False
        with self._selector:
            while not (ending and all(output.ended for output in self._outputs)):
                left_s = deadline - time.monotonic()
                if left_s <= 0 and ending:
                    break
                if left_s <= 0:
                    raise self._failed(GuestTimeoutError, f"the guest did not end within {self._config.timeout_s:g} s")
                if not self._selector.get_map():
                    if self._config.systemd and (outcome := self._went_down()):
                        return outcome
                    raise self._failed(GuestError, "the guest ended by itself")
                self._read(left_s)
                if not ending and self._status.count(b"\n") == 2:
                    ending, deadline = True, time.monotonic() + END_LIMIT_S
        status = int(self._status.split()[-1])
        return Outcome(status, self._text(self._log), self._boot_s, time.monotonic() - self._started)

    def _went_down(self) -> Outcome | None:
        """Return how the guest went down in order, None when it did not."""
        log = self._text(self._log)
        if not (down := DOWN.search(log)):
            return None
        marks = MARK.findall(log)
        down_s = float(down[1]) - float(marks[-1]) if marks else 0.0
        return Outcome(0, log, self._boot_s, time.monotonic() - self._started, down[2], down_s)

    def _read(self, limit_s: float) -> None:
        for key, _ in self._selector.select(limit_s):
            data = os.read(key.fd, READ_BYTES)
            if data:
                key.data(data)
            else:
                self._selector.unregister(key.fd)
        if not self._boot_s and self._status:
            self._boot_s = time.monotonic() - self._started

    def _failed(self, kind: type[GuestError], what: str) -> GuestError:
        """Return an error with the log from the first trouble on, else its end, and what qemu complained about."""
        log = self._text(self._log)
        start = log.find(trouble[0]) if (trouble := findings(log)) else 0
        lines = log[start:].splitlines()
        lines = lines[:LAST_LINES] if trouble else lines[-LAST_LINES:]
        lines += self._text(self._complaints).splitlines()[-LAST_LINES:]
        said = "; it said:\n" + "\n".join(f"  {line}" for line in lines) if lines else "; it said nothing"
        error = kind(what + said)
        error.kernel_log = log
        error.died_booting = kind is GuestError and not self._boot_s and bool(log)
        return error

    @staticmethod
    def _text(data: bytearray) -> str:
        return data.decode(errors="replace").replace("\r\n", "\n")


def _to_descriptor(fd: int) -> Sink:
    return lambda data: _write_all(fd, data)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
