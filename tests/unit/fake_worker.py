"""A worker without a data path, for tests of the control plane: `fake_worker.py BEHAVIOUR ... DESCRIPTOR`.

It counts kicks in place of requests. How it fails is chosen by BEHAVIOUR (at its start) or by `desc_addr` (at START).
It prints each command on stderr, so that a test can see which arrived.
"""

from __future__ import annotations

import array
import os
import select
import signal
import socket
import struct
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from vdusefast.base.handed import read_arguments
from vdusefast.worker.protocol import (
    MESSAGE_MAX_BYTES,
    Command,
    Event,
    FromWorker,
    ToWorker,
    WorkerSpec,
    pack_event,
    unpack_command,
)

REFUSED_ADDR = 0xBAD000
RING_FAILED_ADDR = 0xBAD001
CRASH_ADDR = 0xBAD002
MALFORMED_ADDR = 0xBAD003
EXIT_ADDR = 0xBAD004


class FakeWorker:
    def __init__(self, spec: WorkerSpec):
        self.spec = spec
        self.ctl = socket.socket(fileno=spec.ctl_fd)
        self.port = socket.socket(fileno=spec.port_fd)
        self.last_avail_idx = 0
        self.running = False

    def send(self, event: Event, seq: int = 0, *, exit_code: int = 0, text: str = "") -> None:
        self.ctl.send(pack_event(FromWorker(event, seq, self.last_avail_idx, self.last_avail_idx, exit_code, text)))

    def fetch(self, iova: int) -> None:
        """Ask the bus for the region at `iova`, as a worker does when it maps a ring."""
        self.port.send(struct.pack("=QQ", iova, iova))
        data, control, _flags, _address = self.port.recvmsg(64, socket.CMSG_SPACE(4))
        for _level, _kind, payload in control:
            os.close(array.array("i", payload)[0])
        print(f"fetched {iova:#x}: errno {struct.unpack_from('=i', data)[0]}", file=sys.stderr)

    def start(self, message: ToWorker) -> None:
        if message.desc_addr == REFUSED_ADDR:
            self.send(Event.REFUSED, message.seq, text="desc_addr is not mapped")
            return
        if message.desc_addr == EXIT_ADDR:
            print("out of pixie dust", file=sys.stderr)
            sys.exit(3)
        if message.desc_addr == CRASH_ADDR:
            os.kill(os.getpid(), signal.SIGSEGV)
        if message.desc_addr == MALFORMED_ADDR:
            self.ctl.send(b"?")
            time.sleep(60)
        self.fetch(message.desc_addr)
        self.last_avail_idx = message.last_avail_idx
        self.running = True
        self.send(Event.DONE, message.seq)
        if message.desc_addr == RING_FAILED_ADDR:
            self.running = False
            self.send(Event.RING_FAILED, text="head 99 is out of range")

    def command(self, message: ToWorker) -> bool:
        """Carry one command out. Returns whether to go on."""
        command = Command(message.command)
        print(f"{command.name} {message.start:#x} {message.last:#x} at {message.last_avail_idx}", file=sys.stderr)
        if command == Command.START:
            self.start(message)
            return True
        if command not in (Command.INVALIDATE, Command.RESIZE):
            self.running = False
        self.send(Event.DONE, message.seq)
        return command != Command.STOP

    def serve(self) -> None:
        self.send(Event.HELLO, text="fake")
        while True:
            waiting = [self.ctl.fileno(), self.spec.kick_fd] if self.running else [self.ctl.fileno()]
            ready = select.select(waiting, [], [])[0]
            if self.spec.kick_fd in ready:
                taken = (self.last_avail_idx + os.eventfd_read(self.spec.kick_fd)) & 0xFFFF
                self.last_avail_idx = self.last_avail_idx & ~0xFFFF | taken  # the upper half is a packed ring's
                os.eventfd_write(self.spec.irq_fd, 1)
            if self.ctl.fileno() in ready:
                packet = self.ctl.recv(MESSAGE_MAX_BYTES)
                if not packet or not self.command(unpack_command(packet)):
                    return


def main() -> None:
    behaviour = sys.argv[1]
    worker = FakeWorker(WorkerSpec.from_arguments(read_arguments(int(sys.argv[-1]))))
    if behaviour.startswith("startup-failed="):
        worker.send(Event.STARTUP_FAILED, exit_code=int(behaviour.partition("=")[2]), text="no engine today")
        sys.exit(1)
    if behaviour == "silent":
        time.sleep(60)
    if behaviour == "exit":
        print("first line\nthe last words", file=sys.stderr)
        sys.exit(7)
    if behaviour == "second-queue-exits" and worker.spec.queue == 1:
        sys.exit(1)
    worker.serve()


if __name__ == "__main__":
    main()
