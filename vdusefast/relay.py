"""A relay: one process that has a store which several may not have at once, and serves the workers of all queues.

Started by the supervisor (relay_control.py) as `python -m vdusefast.relay` with the words of a RelaySpec. What it has
to say goes to its standard output, a line of JSON each: {"log": TEXT} or {"size_bytes": N}; why it cannot start, to
standard error. It ends with the supervisor, or when its standard input is closed.
"""

from __future__ import annotations

import json
import os
import sys
from typing import NamedTuple

from vdusefast.backends import plugin_module
from vdusefast.backends.plugin import Plugin, StoreSpec
from vdusefast.errors import VdusefastError


class RelaySpec(NamedTuple):
    """What a relay is told."""

    supervisor_pid: int
    listen_fd: int
    queue_count: int
    slot_count: int  # of a queue
    store_spec: str  # a StoreSpec as JSON

    def to_argv(self) -> list[str]:
        """Return the words for the command line."""
        return [str(value) for value in self]

    @classmethod
    def from_argv(cls, words: list[str]) -> RelaySpec:
        """Return what `to_argv` was called on. Raises ValueError."""
        pid, listen_fd, queue_count, slot_count, store_spec = words
        return cls(int(pid), int(listen_fd), int(queue_count), int(slot_count), store_spec)


def say(**values: object) -> None:
    """Write a line for the supervisor; one that is gone takes us with it."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def tell_news(plugin: Plugin) -> None:
    """Pass on what the store's module has to say."""
    for news in plugin.news():
        if news.kind == "resized":
            say(size_bytes=news.size_bytes)
        else:
            say(log=news.text)


def main(argv: list[str]) -> int:
    """Serve until the end. Returns the exit status."""
    from vdusefast import _datapath
    from vdusefast.backends._relay import Server

    try:
        spec = RelaySpec.from_argv(argv)
        _datapath.die_with_parent(spec.supervisor_pid)
        store = StoreSpec.from_json(spec.store_spec)._replace(slot_count=spec.queue_count * spec.slot_count)
        plugin = plugin_module(store.uri).open_engine(store)
        server = Server(
            plugin,
            listen_fd=spec.listen_fd,
            queue_count=spec.queue_count,
            slot_count=spec.slot_count,
            size_bytes=store.size_bytes,
            flushes=store.cache != "unsafe",
        )
    except (VdusefastError, OSError, ValueError) as error:
        print(f"{error}", file=sys.stderr)
        return 1
    while server.serve(sys.stdin.fileno()):
        tell_news(plugin)
    server.close()
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    os._exit(status)  # threads of a library are not waited for
