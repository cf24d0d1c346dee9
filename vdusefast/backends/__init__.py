"""Stores: what holds a device's bytes.

A backend is one module, found by the scheme of the URI, and one line in BACKENDS. There are two kinds:

- a *store of the core's* has a descriptor, or is none at all. Its module has
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
    identifies: bool = False  # and tells its store from another one of the name
    foreign: bool = False  # it runs a user's code, whose memory is the user's own: it is never locked
    keeps: bool = False  # its connections are kept when a worker dies, until their server has ended them: keeper.py


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
    can_write_zeroes: bool  # a worker can always write zeros itself, so: unless read-only
    zeroes_cheaply: bool  # whether the store knows a way that does not write them out, with and without UNMAP
    direct_align: int  # alignment that O_DIRECT needs of offset, length and memory; 0 = not O_DIRECT
    cache: str
    spec: StoreSpec | None = None  # of a plugin: the arguments of its module
    described: Description | None = None  # of a plugin: what its module has said
    shareable: bool = True  # several processes may serve it, each by itself
    persistent: bool = True  # its bytes outlive the server
    faults: str = ""  # errors and delays by rule, as JSON: backends.faulty
    present_size_bytes: int = 0  # of a plugin: what it had when somebody last looked
    granule_bytes: int = (
        0  # what its smallest blocks have, where a device may have smaller ones, by more work; 0: it may not
    )
    content_block_bytes: int = 0  # the sectors that its contents were made for (backends.content); 0: whichever
    path: str = ""  # that it was opened by
    said_raw: bool = False  # the URI says that it is a raw disk, whatever it looks like
    notes: list[str] = field(default_factory=list)  # what people are to know who make a device over it
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
        """Close the descriptor, and with the last copy of it give up the lock. Idempotent."""
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

    claim: keep other servers out of it. Without, nothing is to be written: for a look at a store that is being served.
    is_new: a device is to be made over it: what it holds is looked at, which nobody has written through a device yet.
    Raises ConfigError for a URI or an engine that cannot be, BackendError when the store cannot be used,
    DeviceBusyError when somebody else uses it.
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
    """Return the scheme of what holds the bytes, whatever faults are put in front of it. Raises ConfigError."""
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
    """Return a URI that means the same in a process that has gone to another directory.

    The module of a backend whose URIs have paths in them has a function of this name. Raises ConfigError.
    """
    change = getattr(import_module(find(uri).module), "absolute_uri", None)
    absolute = str(change(uri)) if change is not None else uri
    check_text(absolute)
    return absolute


def check_text(uri: str) -> None:
    """Refuse a URI that cannot go where URIs go: through JSON, to libraries in C, into a state file of bounded size.

    Raises ConfigError.
    """
    if len(uri) > URI_MAX_CHARACTERS:
        raise ConfigError(f"backend.uri: {len(uri)} characters; {URI_MAX_CHARACTERS} are possible: {uri[:64]}...")
    if "\0" in uri:
        raise ConfigError(f"backend.uri: {uri}: there is a zero byte in it")
    if not is_utf8(uri):
        raise ConfigError(
            f"backend.uri: {uri}: not UTF-8; rename the file or directory, or make a symbolic link to it that is, "
            "and name that"
        )


def look_again(store: Store) -> None:
    """Find out how large a plugin's store is now. Raises as `open_store`."""
    from vdusefast.backends import probe

    if store.spec is not None:
        store.present_size_bytes = probe.describe(store.spec).size_bytes


def plugin_store(backend: BackendConfig, *, read_only: bool, described: Description | None = None) -> Store:
    """Return a plugin's store as its module has described it; None: as it describes it now. Raises as `open_store`."""
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
    """Return the block size to offer: what was wanted; when that is 0, what the contents need, or else the store's.

    A smaller one than the store's is for files, block devices and NBD: whole blocks are read, changed and written then.
    Raises ConfigError when the store cannot take blocks that small, or its size is no multiple of them.
    """
    block_bytes = wanted_bytes or store.content_block_bytes or store.block_size_bytes
    if block_bytes < store.block_size_bytes and not store.granule_bytes:
        raise ConfigError(
            f"device.block_size_bytes: {wanted_bytes}, but {store.uri} takes no blocks below {store.block_size_bytes}"
        )
    # A file may end within a block: its last one becomes whole when it is written to.
    _check_multiple(store, block_bytes if store.is_file else max(block_bytes, store.block_size_bytes))
    return block_bytes


def _check_engine(backend: BackendConfig, registration: Registration) -> None:
    """Check that the engine and the cache mode can serve such a store."""
    scheme = registration.schemes[0]
    if registration.plugin:
        if backend.engine != "auto":
            raise ConfigError(f"backend.engine: {backend.uri} brings its own engine; leave {backend.engine!r} out")
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
    """Refuse a store that is no raw disk, and note what else is to be told of it. Raises ConfigError, BackendError."""
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
