"""The interface of a plugin, a backend's module with an engine of its own: NBD, Ceph RBD, Python classes.

Two kinds of processes load such a module: a probe, which describes the store before there is a device (probe.py), and
each worker. The supervisor does not, so that nothing in a library or in a user's class can hold it up.

Only the standard library is imported here: a worker loads this at its start.
"""

from __future__ import annotations

import json
from typing import NamedTuple, Protocol

NOTES_BYTES = 512


class StoreSpec(NamedTuple):
    """The arguments that a plugin gets. Sizes are in bytes."""

    uri: str
    read_only: bool = False  # whether the device is, even if the store is writable
    cache: str = "writeback"  # writeback, writethrough, unsafe
    timeout_s: float = 0.0  # longest time of a request, which ends with IOERR then; 0 = unlimited
    reconnect_s: float = 60.0  # a shorter loss of the store is a pause; after that requests get IOERR until it is back
    queue_count: int = 1
    identity: str = ""  # of the served store: a module with identities refuses another store; "": any
    # For a worker only:
    queue: int = 0
    slot_count: int = 0  # requests that may be in flight at once
    size_bytes: int = 0  # of the device
    block_size_bytes: int = 512  # of the device
    sole: bool = False  # this is the only process that serves it, so smaller blocks can be emulated
    # A file that outlives the worker, with NOTES_BYTES for each queue. The next worker's module reads the notes that
    # this one has written. -1: none.
    notes_fd: int = -1
    # A datagram socket that is connected to itself and outlives the worker. Messages that a module sends there, with
    # descriptors in them, wait for the next worker's module, which learns by them when the last one's requests end.
    # -1: none.
    hold_fd: int = -1

    def to_json(self) -> str:
        """Return what `from_json` reads."""
        return json.dumps(self._asdict())

    @classmethod
    def from_json(cls, text: str) -> StoreSpec:
        """Return what `to_json` was called on."""
        return cls(**json.loads(text))


class Description(NamedTuple):
    """A module's description of its store. Sizes are in bytes."""

    size_bytes: int
    block_size_bytes: int = 512  # the smallest unit it takes: a power of two
    physical_block_size_bytes: int = 0  # 0 = block_size_bytes
    opt_io_size_bytes: int = 0  # 0 = unknown
    read_only: bool = False  # it cannot be written
    can_discard: bool = False
    can_write_zeroes: bool = False
    zeroes_cheaply: bool = False  # without writing them out
    shareable: bool = True  # several processes may serve it at once, independently
    identity: str = ""  # no other store has it, not even one that gets the same name; "": unknown
    min_io_size_bytes: int = 0  # smaller requests cost more; 0 = physical_block_size_bytes
    discard_granularity_bytes: int = 0  # bytes that are freed at a time; 0 = physical_block_size_bytes
    rotational: int = -1  # 1 or 0; -1: not known
    # The store's own block size, if its engine emulates smaller blocks when it has the store alone; 0: it does not.
    granule_bytes: int = 0


class StoreEvent(NamedTuple):
    """An event of a store's module."""

    kind: str  # "log": `text` is a line for the device's log; "resized": the store has `size_bytes` from now on
    text: str = ""
    size_bytes: int = 0


class Usability(NamedTuple):
    """Whether a backend can be used on this machine, and how to make it so."""

    ok: bool
    text: str
    remedy: str = ""


def extension_usability(extension: str, library: str, headers: str, package: str) -> Usability | None:
    """Return why a module's extension cannot be used, None if it can.

    headers, package: Debian's names of the packages that it is built with and runs with.
    """
    import importlib
    from importlib.util import find_spec

    name = f"vdusefast.backends.{extension}"
    if find_spec(name) is None:
        remedy = f"sudo apt-get install {headers}, then make build (or reinstall vdusefast)"
        return Usability(False, f"vdusefast was built without {library}", remedy)
    try:
        importlib.import_module(name)
    except ImportError as error:
        return Usability(False, f"its extension cannot be loaded ({error})", f"sudo apt-get install {package}")
    return None


class Plugin(Protocol):
    """The engine that a module has made for a worker, with its events."""

    @property
    def engine(self) -> object:
        """A capsule "vdusefast.engine" around a `struct vf_engine_plugin` (engine.h), which lives until `close`."""

    def fileno(self) -> int:
        """Return a descriptor that is readable while there are events, -1 for none."""

    def events(self) -> list[StoreEvent]:
        """Return the events since the last call."""

    def close(self) -> None:
        """Release everything; the engine has been closed. A second call does nothing."""


class PluginModule(Protocol):
    """A module of a backend. It raises only errors of vdusefast, each one line that names the URI and the remedy."""

    def describe(self, spec: StoreSpec) -> Description:
        """Examine the store; runs in a probe, which is killed when that takes too long."""

    def open_engine(self, spec: StoreSpec) -> Plugin:
        """Make the engine for a worker. Does not wait for a server: the worker must answer messages meanwhile."""

    def usability(self) -> Usability:
        """Tell whether the backend can be used here. Does not raise."""
