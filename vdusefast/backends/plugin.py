"""What the module of a backend brings that serves its store by an engine of its own: NBD, Ceph RBD, Python classes.

Two kinds of processes load such a module: a probe, which describes the store before there is a device (probe.py), and
each worker. The supervisor does not, so that nothing in a library or in a user's class can hold it up.

Only the standard library is imported here: a worker loads this at its start.
"""

from __future__ import annotations

import json
from typing import NamedTuple, Protocol

NOTES_BYTES = 512


class StoreSpec(NamedTuple):
    """The arguments of a module. Sizes are in bytes."""

    uri: str
    read_only: bool = False  # the device is, whatever the store allows
    cache: str = "writeback"  # writeback, writethrough, unsafe
    timeout_s: float = 0.0  # a request without an answer for so long ends with IOERR; 0 = it waits for ever
    reconnect_s: float = 60.0  # a store lost for less is a pause; after that requests get IOERR until it is back
    queue_count: int = 1
    identity: str = (
        ""  # of the store that is served: a module that knows one refuses another store. "": whichever it is
    )
    # Of a worker:
    queue: int = 0
    slot_count: int = 0  # requests that may be in flight at once
    size_bytes: int = 0  # of the device
    block_size_bytes: int = 512  # of the device
    sole: bool = False  # nobody else serves it: parts of blocks that are larger may be read, changed and written
    # A file that outlives the worker, with NOTES_BYTES for each queue: what a module writes there, the next worker's
    # reads. -1: none.
    notes_fd: int = -1
    # A datagram socket that is connected to itself and outlives the worker. What a module sends there waits, with the
    # descriptors in it, for the reader: the next worker's finds out when the last one's requests end. -1: none.
    hold_fd: int = -1

    def to_json(self) -> str:
        """Return what `from_json` reads."""
        return json.dumps(self._asdict())

    @classmethod
    def from_json(cls, text: str) -> StoreSpec:
        """Return what `to_json` was called on."""
        return cls(**json.loads(text))


class Description(NamedTuple):
    """What a module says of its store. Sizes are in bytes."""

    size_bytes: int
    block_size_bytes: int = 512  # the smallest unit it takes: a power of two
    physical_block_size_bytes: int = 0  # 0 = block_size_bytes
    opt_io_size_bytes: int = 0  # 0 = unknown
    read_only: bool = False  # it cannot be written
    can_discard: bool = False
    can_write_zeroes: bool = False
    zeroes_cheaply: bool = False  # without writing them out
    shareable: bool = True  # several processes may serve it at once, each by itself
    identity: str = ""  # what no other store has, also one that takes its name; "": not known
    min_io_size_bytes: int = 0  # smaller requests cost more; 0 = physical_block_size_bytes
    discard_granularity_bytes: int = 0  # what is freed at a time; 0 = physical_block_size_bytes
    rotational: int = -1  # 1 or 0; -1: not known
    # What it takes by itself, where its engine serves smaller blocks if it has the store alone; 0: it does not.
    granule_bytes: int = 0


class News(NamedTuple):
    """Something that a store's module has seen."""

    kind: str  # "log": `text` is a line for the device's log; "resized": the store has `size_bytes` from now on
    text: str = ""
    size_bytes: int = 0


class Usability(NamedTuple):
    """Whether a backend can be used on this machine, and how to make it so."""

    ok: bool
    text: str
    remedy: str = ""


def extension_usability(extension: str, library: str, headers: str, package: str) -> Usability | None:
    """Say why a module's extension cannot be used, None where it can.

    headers, package: Debian's, with which it is built and runs.
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
    """The engine that a module has made for a worker, and its ear."""

    @property
    def engine(self) -> object:
        """A capsule "vdusefast.engine" around a `struct vf_engine_plugin` (engine.h), which lives until `close`."""

    def fileno(self) -> int:
        """Return a descriptor that is readable while there are events, -1 for none."""

    def news(self) -> list[News]:
        """Take what there is."""

    def close(self) -> None:
        """Release everything; the engine has been closed. A second call does nothing."""


class PluginModule(Protocol):
    """A module of a backend. What it raises are errors of vdusefast, each a line that names the URI and the remedy."""

    def describe(self, spec: StoreSpec) -> Description:
        """Look at the store; runs in a probe, which is killed when that takes too long."""

    def open_engine(self, spec: StoreSpec) -> Plugin:
        """Make the engine for a worker. Does not wait for a server: the worker has to answer messages meanwhile."""

    def usability(self) -> Usability:
        """Tell whether the backend can be used here. Does not raise."""
