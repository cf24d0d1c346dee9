"""`rbd:POOL/[NAMESPACE/]IMAGE[@SNAP]?conf=PATH&id=NAME&keyring=PATH`: an image of Ceph RBD, through librbd.

The image's features and librbd's configuration stay as they are. A snapshot is read-only.
"""

from __future__ import annotations

import errno
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, unquote

from vdusefast.backends.plugin import NOTES_BYTES, Description, StoreEvent, StoreSpec, Usability, extension_usability
from vdusefast.base.secret import check_file
from vdusefast.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from vdusefast.backends._rbd import Engine, Failure, Settings

CONF = "/etc/ceph/ceph.conf"
ALLOC_BYTES = 65536  # what librbd discards at least (rbd_discard_granularity_bytes); krbd calls it alloc_size
ID = "admin"
_BYTES = "surrogateescape"  # of percent-encoded bytes that are not UTF-8, and back
KEYS = ("conf", "id", "keyring")
LOOK_LIMIT_S = 10  # for the monitors, and for each operation, when a probe examines an image
CONNECT_LIMIT_S = 15  # for the monitors, each time a worker tries to open the image
NAMES_SHOWN = 8
_EXAMPLE = "rbd:POOL/IMAGE, rbd:POOL/NAMESPACE/IMAGE@SNAPSHOT?conf=/etc/ceph/ceph.conf&id=admin"
_OTHER_KEY = "name another one by ?keyring=PATH, or another client by ?id=NAME"


class Image(NamedTuple):
    """The parts of a URI. Empty: none."""

    pool: str
    namespace: str
    image: str
    snapshot: str
    conf: str = CONF
    id: str = ID
    keyring: str = ""


def parse(uri: str) -> Image:
    """Return the parts of a URI. Raises ConfigError."""
    _, _, rest = uri.partition(":")
    path, _, query = rest.partition("?")
    parts = [unquote(part) for part in path.partition("@")[0].split("/")]
    snapshot = unquote(path.partition("@")[2])
    if len(parts) not in (2, 3) or not all(parts) or ("@" in path and not snapshot) or "\0" in unquote(uri):
        raise ConfigError(f"backend.uri: {uri!r} does not name an image; write {_EXAMPLE}")
    options: dict[str, str] = {}
    for word in filter(None, query.split("&")):
        key, _, value = word.partition("=")
        if key not in KEYS:
            raise ConfigError(f"backend.uri: {uri!r}: there is no {key!r}; there are {', '.join(KEYS)}")
        if not value:
            raise ConfigError(f"backend.uri: {uri!r}: {key} is empty; write {key}=... or leave it out")
        options[key] = unquote(value, errors=_BYTES)
    if options.get("id", "").startswith("client."):
        name = options["id"].removeprefix("client.")
        raise ConfigError(f"backend.uri: {uri!r}: an id goes without 'client.'; write id={quote(name)}")
    return Image(parts[0], parts[1] if len(parts) == 3 else "", parts[-1], snapshot, **options)


def absolute_uri(uri: str) -> str:
    """See backends.absolute_uri."""
    parse(uri)

    def absolute(match: re.Match[str]) -> str:
        path = Path(unquote(match[2], errors=_BYTES)).absolute()
        return f"{match[1]}{quote(str(path), errors=_BYTES)}"

    head, mark, query = uri.partition("?")
    return head + mark + re.sub(r"(?:(?<=^)|(?<=&))((?:conf|keyring)=)([^&]+)", absolute, query)


def describe(spec: StoreSpec) -> Description:
    """See plugin.PluginModule. Raises ConfigError, BackendError."""
    image = parse(spec.uri)
    if not os.access(image.conf, os.R_OK):
        reason = "not readable" if Path(image.conf).exists() else "not there"
        raise BackendError(f"{spec.uri}: its configuration {image.conf} is {reason}; name another by ?conf=PATH")
    _check_keyring(spec.uri, image)
    module = _module(spec.uri)
    try:
        about = module.look(_settings(spec, image, connect_limit_s=LOOK_LIMIT_S, op_limit_s=LOOK_LIMIT_S))
    except module.Failure as failure:
        raise BackendError(f"{spec.uri}: {_reason(image, failure)}") from None
    read_only = bool(image.snapshot)
    best = _best_size(about["object_bytes"], about["stripe_unit_bytes"], about["stripe_count"])
    return Description(
        size_bytes=about["size_bytes"],
        physical_block_size_bytes=4096,
        opt_io_size_bytes=best,
        min_io_size_bytes=min(ALLOC_BYTES, best),
        discard_granularity_bytes=min(ALLOC_BYTES, best),
        rotational=0,
        read_only=read_only,
        can_discard=not read_only,
        can_write_zeroes=not read_only,
        zeroes_cheaply=not read_only,
        # A lock would go to and fro between processes, and one process does not see another's cache.
        identity=about["identity"].decode(),
        shareable=read_only or spec.read_only or not (about["exclusive_lock"] or about["caches"]),
    )


def _check_keyring(uri: str, image: Image) -> None:
    """Check that a keyring that the URI names is private. Raises BackendError."""
    try:
        if image.keyring:
            check_file(image.keyring)
    except OSError:
        pass  # librados reports that
    except ValueError as error:
        raise BackendError(f"{uri}: {error}") from None


def open_engine(spec: StoreSpec) -> RbdPlugin:
    """See plugin.PluginModule. Raises ConfigError, BackendError."""
    return RbdPlugin(spec)


def usability() -> Usability:
    """See plugin.PluginModule."""
    return _unusable() or Usability(True, "librbd is here")


class RbdPlugin:
    """The engine of one image; see plugin.Plugin."""

    def __init__(self, spec: StoreSpec) -> None:
        """Prepare; the engine opens the image. Raises ConfigError, BackendError."""
        self._uri = spec.uri
        self._spec = spec
        self._image = parse(spec.uri)
        module = _module(spec.uri)
        limit_s = math.ceil(spec.timeout_s)  # librados counts whole seconds
        try:
            self._engine: Engine = module.Engine(
                _settings(spec, self._image, connect_limit_s=CONNECT_LIMIT_S, op_limit_s=limit_s),
                size_bytes=spec.size_bytes,
                timeout_s=spec.timeout_s,
                reconnect_s=spec.reconnect_s,
                notes_fd=spec.notes_fd,
                notes_offset=spec.queue * NOTES_BYTES,
            )
        except OSError as error:
            raise BackendError(f"{spec.uri}: {error.strerror}") from None

    @property
    def engine(self) -> object:
        """See plugin.Plugin."""
        return self._engine.engine

    def fileno(self) -> int:
        """See plugin.Plugin."""
        return self._engine.fileno()

    def events(self) -> list[StoreEvent]:
        """See plugin.Plugin."""
        return [self._event(*event) for event in self._engine.events()]

    def close(self) -> None:
        """See plugin.Plugin. If the cluster is lost, it ends the process and does not return."""
        if not self._engine.close():
            # librbd waits for the cluster in threads of its own; we have nothing left that must be ended in order.
            os._exit(0)

    def _event(self, kind: str, step: str, error: int, value: int) -> StoreEvent:
        if kind == "resized":
            return StoreEvent("resized", size_bytes=value)
        return StoreEvent("log", f"{self._uri}: {self._text(kind, step, error)}")

    def _text(self, kind: str, step: str, error: int) -> str:
        reconnect = f"{self._spec.reconnect_s:g} s"
        if kind == "retries":
            return f"cannot be opened yet: {_failed_step(self._image, step, error)}; retrying, requests wait"
        if kind == "gave up":
            return f"could not be opened for {reconnect}: requests end with errors until it can"
        if kind == "shut out":
            return (
                "this client was blocklisted: another one has taken the image over, or an administrator did that; "
                "requests end with errors until the device is restarted"
            )
        if kind == "timed out":
            return f"no answer for {self._spec.timeout_s:g} s: such requests end with errors (backend.timeout_s)"
        if kind == "notes":
            return f"cannot note who has the image ({os.strerror(error)}): the lock may delay the worker after a crash"
        if kind == "fenced" and error:
            return (
                f"the previous worker could not be blocklisted ({os.strerror(error)}): waiting for its lock; "
                f"give client.{self._image.id} the monitor capability 'profile rbd'"
            )
        return {"opened": "open", "fenced": "the previous worker was blocklisted: its pending requests are void"}[kind]


def _module(uri: str):  # type: ignore[no-untyped-def]
    if unusable := _unusable():
        raise BackendError(f"{uri}: {unusable.text}; {unusable.remedy}")
    from vdusefast.backends import _rbd

    return _rbd


def _unusable() -> Usability | None:
    return extension_usability("_rbd", "librbd", "librbd-dev", "librbd1")


def _settings(spec: StoreSpec, image: Image, *, connect_limit_s: int, op_limit_s: int) -> Settings:
    settings: Settings = _module(spec.uri).Settings(
        (image.conf, image.id, image.keyring, image.pool, image.namespace, image.image, image.snapshot, spec.identity),
        read_only=spec.read_only or bool(image.snapshot),
        early_writes=spec.cache == "unsafe",
        connect_limit_s=connect_limit_s,
        op_limit_s=op_limit_s,
    )
    return settings


def _best_size(object_bytes: int, unit_bytes: int, count: int) -> int:
    """Return the best size of requests to an image: a whole object, or a whole stripe."""
    return object_bytes if count <= 1 else unit_bytes * count


def _failed_step(image: Image, step: str, error: int) -> str:
    """Return the failed step as a text for people."""
    what = {
        "client": "librados",
        "conf": f"reading {image.conf}",
        "connect": "connecting to the monitors",
        "fence": "blocklisting the previous worker",
        "pool": f"pool {image.pool}",
        "namespace": f"namespace {image.pool}/{image.namespace}",
        "image": f"image {image.image}",
        "snapshot": f"snapshot {image.snapshot}",
    }.get(step, "opening it")
    if error == errno.ESTALE:
        return (
            f"{what} is not the one that was served, but another one of that name; put the old one back, or continue "
            "with this one: vdusefast recover NAME --other-store"
        )
    return f"{what}: {os.strerror(error)}"


def _reason(image: Image, failure: Failure) -> str:
    """Return why an image cannot be opened and what to do, as a text for people."""
    client = f"client.{image.id}"
    if failure.step == "conf":
        return f"{image.conf} is no configuration of Ceph ({os.strerror(failure.error)}); name another by ?conf=PATH"
    if failure.step == "connect":
        return _connect_reason(image, failure, client)
    if failure.error == errno.ENOENT:
        return _absent(image, failure)
    if failure.error in (errno.EPERM, errno.EACCES):
        return (
            f"{_failed_step(image, failure.step, failure.error)}; {client} lacks the right: "
            f"ceph auth caps {client} mon 'profile rbd' osd 'profile rbd pool={image.pool}'"
        )
    if failure.error == errno.ETIMEDOUT:
        return (
            f"{_failed_step(image, failure.step, failure.error)}: no OSD has answered within {LOOK_LIMIT_S} s; "
            "see ceph -s"
        )
    return f"{_failed_step(image, failure.step, failure.error)}; see ceph -s"


def _connect_reason(image: Image, failure: Failure, client: str) -> str:
    if failure.error == errno.ETIMEDOUT:
        return (
            f"no monitor has answered within {LOOK_LIMIT_S} s; are they up, and is mon_host in {image.conf} right? "
            f"See ceph -c {image.conf} -s"
        )
    keyrings = failure.keyrings.replace(",", " ").replace(";", " ").split()
    readable = [path for path in keyrings if os.access(path, os.R_OK)]
    if not readable and failure.error in (errno.ENOENT, errno.EACCES, errno.EPERM):
        looked = ", ".join(keyrings) or "any keyring"
        return f"no keyring for {client}: {looked} cannot be read; {_OTHER_KEY}"
    if failure.error == errno.ENOENT or (readable and not any(f"[{client}]" in _text_of(path) for path in readable)):
        return f"{', '.join(readable)} has no key for {client}; {_OTHER_KEY}"
    if failure.error in (errno.EACCES, errno.EPERM):
        return (
            f"the monitors refuse {client}: its key in {', '.join(readable)} is not theirs; see ceph auth get {client}"
        )
    return f"{_failed_step(image, failure.step, failure.error)}; is mon_host in {image.conf} right?"


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _absent(image: Image, failure: Failure) -> str:
    within = f"{image.pool}/{image.namespace}" if image.namespace else image.pool
    what, make = {
        "pool": (f"pool {image.pool}", f"ceph osd pool create {image.pool}"),
        "namespace": (f"namespace {image.namespace} in pool {image.pool}", f"rbd namespace create {within}"),
        "image": (f"image {image.image} in {within}", f"rbd create --size 1G {within}/{image.image}"),
        "snapshot": (
            f"snapshot {image.snapshot} of {within}/{image.image}",
            f"rbd snap create {within}/{image.image}@{image.snapshot}",
        ),
    }[failure.step]
    if failure.names:
        shown = ", ".join(failure.names[:NAMES_SHOWN]) + (", ..." if len(failure.names) > NAMES_SHOWN else "")
        return f"there is no {what}; there are {shown}"
    return f"there is no {what}; make it: {make}"
