"""Stores, which hold a device's bytes.

A backend is one module, found by the scheme of the URI, and one line in BACKENDS. There are two kinds:

- a *core store* has a descriptor, or needs none (null). Its module has
  `open_store(rest, backend, read_only, claim)`, which opens, checks and describes, and a worker's own engines do the
  I/O;
- a *plugin* brings its own engine, and may need libraries or a user's code. Its module is a `plugin.PluginModule`,
  loaded by workers, and by a probe that describes the store, but never by the supervisor.

Little is imported here, as workers load it.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, cast

from vdusefast.base.engines import OF_ONE_STORE
from vdusefast.base.kinds import StoreKind
from vdusefast.base.printable import is_utf8
from vdusefast.errors import BackendError, ConfigError, VdusefastError
from vdusefast.units import SECTOR_BYTES

if TYPE_CHECKING:
    from vdusefast.backends.plugin import Description, PluginModule, StoreSpec
    from vdusefast.config import BackendConfig

URI_MAX_CHARACTERS = 16384


class Registration(NamedTuple):
    """A backend: where it is, and how to ask for it."""

    schemes: tuple[str, ...]
    module: str
    example: str  # a URI
    plugin: bool = False  # the module brings the engine
    identifies: bool = False  # its store has an identity, which tells it from another one of that name
    foreign: bool = False  # it runs a user's code, whose memory is never locked
    keeps: bool = False  # keeper.py keeps a dead worker's connections until their server has ended them


BACKENDS = (
    Registration(("file",), "vdusefast.backends.file", "file:/srv/disk.img"),
    Registration(("memory",), "vdusefast.backends.memory", "memory:64M"),
    Registration(("null",), "vdusefast.backends.null", "null:1G"),
    Registration(
        ("nbd", "nbds", "nbd+unix", "nbds+unix"),
        "vdusefast.backends.nbd",
        "nbd://localhost/export",
        plugin=True,
        keeps=True,
    ),
    Registration(("faulty",), "vdusefast.backends.faulty", "faulty:op=read,error=EIO,every=100:file:/srv/disk.img"),
    Registration(("python",), "vdusefast.backends.python", "python:disk.py:Disk", plugin=True, foreign=True),
    Registration(("rbd",), "vdusefast.backends.rbd", "rbd:POOL/IMAGE", plugin=True, identifies=True),
)


@dataclass
class Store:
    """An open store. Owns its descriptor; `close` is idempotent."""

    uri: str
    kind: str  # a StoreKind, or the first scheme of a plugin
    fd: int  # -1 for null, for plugins, and once closed
    size_bytes: int
    block_size_bytes: int  # the smallest unit it takes
    physical_block_size_bytes: int
    opt_io_size_bytes: int  # 0 = unknown
    read_only: bool
    can_discard: bool
    can_write_zeroes: bool  # unless read-only, as a worker can always write zeroes itself
    zeroes_cheaply: bool  # whether the store can zero without writing the zeroes out, with and without UNMAP
    direct_align: int  # alignment that O_DIRECT needs of offset, length and memory; 0 = not O_DIRECT
    cache: str
    spec: StoreSpec | None = None  # of a plugin: the arguments of its module
    described: Description | None = None  # of a plugin: the answer of its probe
    shareable: bool = True  # several processes may serve it, each by itself
    persistent: bool = True  # its bytes outlive the server
    faults: str = ""  # errors and delays by rule, as JSON: backends.faulty
    present_size_bytes: int = 0  # of a plugin: its size at the last probe
    granule_bytes: int = 0  # its smallest block, if smaller ones can be emulated; 0: they cannot
    content_block_bytes: int = 0  # the sectors that its contents were made for (backends.content); 0: any
    path: str = ""  # that it was opened by
    said_raw: bool = False  # the URI says that it is a raw disk, even if it looks like another format
    notes: list[str] = field(default_factory=list)  # notes for the user who makes a device over it
    identity: dict[str, str] = field(default_factory=dict)  # backends.identity; empty: nothing is known
    # How its I/O should be aligned, as io_limits.IoLimits has it.
    min_io_size_bytes: int = 0
    alignment_offset_bytes: int = 0
    discard_granularity_bytes: int = 0  # 0 = physical_block_size_bytes
    discard_offset_bytes: int = 0
    rotational: int = -1

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file, which may be made longer, and end within a block."""
        return self.kind == StoreKind.FILE

    @property
    def is_block_device(self) -> bool:
        """Whether it is a block device, which has a size of its own."""
        return self.kind == StoreKind.BLOCKDEV

    @property
    def is_on_disk(self) -> bool:
        """Whether it is one of these two: there is a path to it, others may have it, and the kernel writes it back."""
        return self.is_file or self.is_block_device

    @property
    def is_memory(self) -> bool:
        """Whether its bytes are in memory that ends with the server."""
        return self.kind == StoreKind.MEMORY

    @property
    def is_null(self) -> bool:
        """Whether it keeps nothing."""
        return self.kind == StoreKind.NULL

    def close(self) -> None:
        """Close the descriptor; closing its last copy releases the lock. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if self.fd >= 0:
            warnings.warn(f"store {self.uri} was not closed", ResourceWarning, source=self, stacklevel=2)
            self.close()


def open_store(backend: BackendConfig, *, read_only: bool = False, claim: bool = True, is_new: bool = False) -> Store:
    """Open the store that `backend.uri` names.

    claim: lock other servers out of it. Without, nothing may be written: to examine a store that is being served.
    is_new: a new device is made over it, so its contents, which no driver has written, are checked.
    Raises ConfigError for an impossible URI or engine, BackendError when the store cannot be used, DeviceBusyError when
    another program uses it.
    """
    registration = find(backend.uri)
    _, _, rest = backend.uri.partition(":")
    if not rest:
        raise ConfigError(f"backend.uri: {backend.uri!r} is not complete; write for example {registration.example}")
    _check_engine(backend, registration)
    if registration.plugin:
        return plugin_store(backend, read_only=read_only)
    store: Store = import_module(registration.module).open_store(rest, backend, read_only, claim)
    try:
        if is_new:
            _look_inside(store)
        _check_size(store)
    except VdusefastError:
        store.close()
        raise
    return store


def find(uri: str) -> Registration:
    """Return the backend that a URI is for. Raises ConfigError."""
    scheme, colon, _ = uri.partition(":")
    for registration in BACKENDS:
        if colon and scheme in registration.schemes:
            return registration
    examples = ", ".join(registration.example for registration in BACKENDS)
    raise ConfigError(f"backend.uri: {uri!r} names no known kind of store; write for example {examples}")


def store_scheme(uri: str) -> str:
    """Return the scheme of the store itself, without any faults in front of it. Raises ConfigError."""
    registration = find(uri)
    behind = getattr(import_module(registration.module), "behind", None) if not registration.plugin else None
    return store_scheme(behind(uri)) if behind is not None else registration.schemes[0]


def keeps_data(uri: str) -> bool:
    """Return whether a read returns what was written. Raises ConfigError."""
    return store_scheme(uri) != StoreKind.NULL


def plugin_module(uri: str) -> PluginModule:
    """Load the module of the plugin that `uri` is for. Raises ConfigError for a URI, ImportError."""
    return cast("PluginModule", import_module(find(uri).module))


def absolute_uri(uri: str) -> str:
    """Return a URI that means the same in a process with another working directory.

    If a backend's URIs contain paths, its module has a function of this name. Raises ConfigError.
    """
    change = getattr(import_module(find(uri).module), "absolute_uri", None)
    absolute = str(change(uri)) if change is not None else uri
    check_text(absolute)
    return absolute


def check_text(uri: str) -> None:
    """Refuse a URI that does not fit into JSON, strings in C, or a state file of bounded size.

    Raises ConfigError.
    """
    if len(uri) > URI_MAX_CHARACTERS:
        raise ConfigError(f"backend.uri: {len(uri)} characters, but at most {URI_MAX_CHARACTERS} fit: {uri[:64]}...")
    if "\0" in uri:
        raise ConfigError(f"backend.uri: {uri}: it contains a zero byte")
    if not is_utf8(uri):
        raise ConfigError(
            f"backend.uri: {uri}: not UTF-8; rename the file or directory, or make a symbolic link to it that is, "
            "and name that"
        )


def look_again(store: Store) -> None:
    """Ask how large a plugin's store is now. Raises as `open_store`."""
    from vdusefast.backends import probe

    if store.spec is not None:
        store.present_size_bytes = probe.describe(store.spec).size_bytes


def plugin_store(backend: BackendConfig, *, read_only: bool, described: Description | None = None) -> Store:
    """Return a plugin's store by its module's description; None: ask the module now. Raises as `open_store`."""
    from vdusefast.backends import probe
    from vdusefast.backends.plugin import StoreSpec

    spec = StoreSpec(
        uri=backend.uri,
        read_only=read_only,
        cache=backend.cache,
        timeout_s=backend.timeout_s,
        reconnect_s=backend.reconnect_s,
    )
    described = described or probe.describe(spec)
    spec = spec._replace(identity=described.identity)
    store = Store(
        uri=backend.uri,
        kind=find(backend.uri).schemes[0],
        fd=-1,
        size_bytes=described.size_bytes,
        block_size_bytes=described.block_size_bytes,
        physical_block_size_bytes=max(described.physical_block_size_bytes, described.block_size_bytes),
        opt_io_size_bytes=described.opt_io_size_bytes,
        min_io_size_bytes=described.min_io_size_bytes,
        discard_granularity_bytes=described.discard_granularity_bytes,
        rotational=described.rotational,
        read_only=read_only or described.read_only,
        can_discard=described.can_discard and not (read_only or described.read_only),
        can_write_zeroes=described.can_write_zeroes and not (read_only or described.read_only),
        zeroes_cheaply=described.zeroes_cheaply,
        direct_align=0,
        cache=backend.cache,
        spec=spec,
        described=described,
        identity={"kind": "store", "id": described.identity} if described.identity else {},
        shareable=described.shareable,
        present_size_bytes=described.size_bytes,
        granule_bytes=described.granule_bytes,
    )
    _check_size(store)
    return store


def block_size(store: Store, wanted_bytes: int = 0) -> int:
    """Return the block size to offer: the configured one; if that is 0, the contents' or else the store's.

    Blocks smaller than the store's work on files, block devices and NBD: a worker reads, changes and writes whole ones.
    Raises ConfigError when the store does not support blocks that small, or its size is no multiple of them.
    """
    block_bytes = wanted_bytes or store.content_block_bytes or store.block_size_bytes
    if block_bytes < store.block_size_bytes and not store.granule_bytes:
        raise ConfigError(
            f"device.block_size_bytes: {wanted_bytes}, but {store.uri} has no blocks below {store.block_size_bytes}"
        )
    # A file may end within a block: a write to its last block extends it.
    _check_multiple(store, block_bytes if store.is_file else max(block_bytes, store.block_size_bytes))
    return block_bytes


def _check_engine(backend: BackendConfig, registration: Registration) -> None:
    """Check that the engine and the cache mode can serve this store. Raises ConfigError."""
    scheme = registration.schemes[0]
    if registration.plugin:
        if backend.engine != "auto":
            raise ConfigError(f"backend.engine: {backend.uri} has its own engine; remove engine = {backend.engine!r}")
        if backend.is_direct:
            raise ConfigError(
                f'backend.cache: "none" is O_DIRECT, which is for files and block devices, not for {backend.uri}'
            )
        return
    if backend.engine in OF_ONE_STORE and backend.engine != scheme:
        raise ConfigError(f"backend.engine: {backend.engine!r} serves {backend.engine}: stores, not {backend.uri}")
    if scheme == StoreKind.NULL and backend.engine not in ("auto", StoreKind.NULL):
        raise ConfigError(f"backend.engine: {backend.engine!r} needs a descriptor, and {backend.uri} has none")


def _look_inside(store: Store) -> None:
    """Refuse a store that is no raw disk, and append its notes. Raises ConfigError, BackendError."""
    from vdusefast.backends import image_format

    try:
        image_format.check(store)
    except OSError as error:
        raise BackendError(f"{store.uri}: cannot be read: {error.strerror}") from None


def _check_size(store: Store) -> None:
    if store.size_bytes <= 0:
        raise ConfigError(f"backend.uri: {store.uri} is empty; give it a size first, for example by truncate -s 1G")
    _check_multiple(store, SECTOR_BYTES)


def _check_multiple(store: Store, block_bytes: int) -> None:
    surplus = store.size_bytes % block_bytes
    if surplus:
        raise ConfigError(
            f"backend.uri: {store.uri} has {store.size_bytes} bytes, no multiple of the block size {block_bytes}; "
            f"make it {store.size_bytes - surplus + block_bytes}"
        )
