"""A relay: the only process that has a store open, if several may not, and serves the workers of all queues.

Started by the supervisor (relay_process.py), with the descriptor of a RelaySpec as its last argument. Its events
(protocol.FromWorker: HELLO, STARTUP_FAILED, LOG, STORE_SIZE) are packets of a socket of their own. The output of the
store's module goes to the log. It ends with the supervisor, or when the supervisor closes that socket.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import NamedTuple

from vdusefast.backends import find, plugin_module
from vdusefast.backends.plugin import Plugin, StoreSpec
from vdusefast.base.build import EXIT_OTHER_BUILD, OtherBuildError
from vdusefast.base.handed import read_arguments
from vdusefast.errors import VdusefastError
from vdusefast.host import final_kill, reclaim
from vdusefast.worker.protocol import Event, FromWorker, pack_event


class RelaySpec(NamedTuple):
    """The arguments of a relay."""

    supervisor_pid: int
    event_fd: int  # SOCK_SEQPACKET, for its events
    slot_count: int  # of a queue
    lock_memory: int  # be prepared for this machine's memory reclaim (reclaim.py)
    store_spec: str  # a StoreSpec as JSON
    places: tuple[tuple[int, int], ...]  # of each queue: a listening socket, the memory shared with its worker

    def to_arguments(self) -> list[str]:
        """Return the arguments that `from_arguments` reads."""
        numbers = [fd for place in self.places for fd in place]
        return [str(value) for value in (*self[:5], *numbers)]

    @classmethod
    def from_arguments(cls, arguments: list[str]) -> RelaySpec:
        """Return what `to_arguments` was called on. Raises ValueError."""
        pid, event_fd, slot_count, lock_memory, store_spec, *numbers = arguments
        fds = [int(number) for number in numbers]
        places = tuple(zip(fds[::2], fds[1::2], strict=True))
        return cls(int(pid), int(event_fd), int(slot_count), int(lock_memory), store_spec, places)


class Events:
    """The socket to the supervisor."""

    def __init__(self, fd: int):
        """Own the descriptor, which child processes of a user's class must not inherit."""
        os.set_inheritable(fd, False)
        self._socket = socket.socket(fileno=fd)

    def fileno(self) -> int:
        """Return the descriptor: readable when the relay has to end."""
        return self._socket.fileno()

    def send(self, event: Event, text: str, *, exit_code: int = 0) -> None:
        """Send an event to the supervisor. If the supervisor is gone, the error ends the relay.

        A log line is lost if the supervisor does not keep up, because the store must not wait for it.
        """
        flags = socket.MSG_DONTWAIT if event == Event.LOG else 0
        try:
            self._socket.send(pack_event(FromWorker(event, 0, exit_code=exit_code, text=text)), flags)
        except BlockingIOError:
            return


def send_store_events(plugin: Plugin, events: Events) -> None:
    """Send the events of the store's module to the supervisor."""
    for event in plugin.events():
        if event.kind == "resized":
            events.send(Event.STORE_SIZE, str(event.size_bytes))
        else:
            events.send(Event.LOG, event.text)


def main(argv: list[str]) -> int:
    """Serve until the end. Returns the exit status."""
    try:
        spec = RelaySpec.from_arguments(read_arguments(int(argv[-1])))
        from vdusefast.backends._relay import Server
        from vdusefast.worker import _datapath
    except OtherBuildError as error:
        print(f"{error}", file=sys.stderr)
        return EXIT_OTHER_BUILD
    events = Events(spec.event_fd)
    try:
        _datapath.die_with_parent(spec.supervisor_pid)
        final_kill.survive_with(spec.supervisor_pid)
        if spec.lock_memory:
            reclaim.begin()  # where that is refused, `show` says so
        store = StoreSpec.from_json(spec.store_spec)._replace(slot_count=len(spec.places) * spec.slot_count)
        plugin = plugin_module(store.uri).open_engine(store)
        server = Server(
            plugin,
            places=spec.places,
            slot_count=spec.slot_count,
            size_bytes=store.size_bytes,
            flushes=store.cache != "unsafe",
            read_only=store.read_only,
        )
        if spec.lock_memory and not find(store.uri).foreign:
            reclaim.complete()
    except (VdusefastError, OSError, ValueError) as error:
        code = error.exit_code if isinstance(error, VdusefastError) else 1
        events.send(Event.STARTUP_FAILED, str(error), exit_code=code)
        return 1
    events.send(Event.HELLO, "relay")
    while server.serve(events.fileno()):
        send_store_events(plugin, events)
    server.close()
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    os._exit(status)  # threads of a library are not waited for
