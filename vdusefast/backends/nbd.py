"""`nbd://`, `nbds://`, `nbd+unix://`, `nbds+unix://`: an export of an NBD server, by libnbd.

URIs are libnbd's: `nbd://HOST[:PORT]/EXPORT`, `nbd+unix:///EXPORT?socket=PATH`; with TLS nbds:// and, among the
parameters, `tls-certificates=DIRECTORY` or `tls-psk-file=FILE`.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

from vdusefast.backends.plugin import NOTES_BYTES, Description, Plugin, StoreSpec, Usability, extension_usability
from vdusefast.base.secret import check_file
from vdusefast.errors import BackendError, ConfigError, VdusefastError
from vdusefast.units import BLOCK_SIZE_MAX_BYTES, BLOCK_SIZE_MIN_BYTES

if TYPE_CHECKING:
    from vdusefast.backends._nbd import Export, ProbeError

HANDSHAKE_LIMIT_S = 10
PHYSICAL_BLOCK_MAX_BYTES = 4096
_BYTES = "surrogateescape"  # of percent-encoded bytes that are not UTF-8, and back
_PATHS = ("socket", "tls-certificates", "tls-psk-file")


def describe(spec: StoreSpec) -> Description:
    """Connect to the server and return the description of its export.

    Raises ConfigError for a URI that is none, BackendError when the server or its export cannot be used.
    """
    _check_extension(spec.uri)
    from vdusefast.backends._nbd import ProbeError, probe

    _check_keys(spec.uri)
    try:
        export = probe(spec.uri, HANDSHAKE_LIMIT_S * 1000)
    except ProbeError as error:
        raise _translate(spec.uri, error) from None
    return _description(spec, export)


def open_engine(spec: StoreSpec) -> Plugin:
    """Return the engine for a worker; it connects while it serves. Raises BackendError."""
    _check_extension(spec.uri)
    from vdusefast.backends._nbd import Engine

    try:
        return Engine(
            spec.uri,
            size_bytes=spec.size_bytes,
            block_size_bytes=spec.block_size_bytes,
            read_only=spec.read_only,
            sole=spec.sole,
            timeout_s=spec.timeout_s,
            reconnect_s=spec.reconnect_s,
            hold_fd=spec.hold_fd,
            notes_fd=spec.notes_fd,
            notes_offset=spec.queue * NOTES_BYTES,
        )
    except OSError as error:
        raise BackendError(f"{spec.uri}: the engine cannot be created: {error.strerror}") from None


def _unusable() -> Usability | None:
    return extension_usability("_nbd", "libnbd", "libnbd-dev", "libnbd0")


def _check_extension(uri: str) -> None:
    """Raise BackendError if the extension cannot be used."""
    if unusable := _unusable():
        raise BackendError(f"{uri}: {unusable.text}; {unusable.remedy}")


def _check_keys(uri: str) -> None:
    """Check that the files with keys that a URI names are private. Raises BackendError."""
    parameters = dict(parse_qsl(urlsplit(uri).query, errors=_BYTES))
    directory = parameters.get("tls-certificates")
    for path in (parameters.get("tls-psk-file"), directory and os.path.join(directory, "client-key.pem")):
        if not path:
            continue
        try:
            check_file(path)
        except FileNotFoundError:
            continue  # libnbd checks whether the file must exist
        except OSError as error:
            raise BackendError(f"{uri}: {path}: {error.strerror}") from None
        except ValueError as error:
            raise BackendError(f"{uri}: {error}") from None


def usability() -> Usability:
    """Return whether the backend can be used, with the version of its library."""
    if unusable := _unusable():
        return unusable
    from vdusefast.backends._nbd import library

    version, has_tls = library()
    return Usability(True, f"libnbd {version}, {'with' if has_tls else 'without'} TLS")


def absolute_uri(uri: str) -> str:
    """Return the URI with the paths in its parameters made absolute."""
    parts = urlsplit(uri)
    parameters = [
        (key, os.path.abspath(value) if key in _PATHS and value else value)
        for key, value in parse_qsl(parts.query, keep_blank_values=True, errors=_BYTES)
    ]
    query = urlencode(parameters, safe="/", errors=_BYTES, quote_via=quote)
    # Of scheme:///path?query, urlunsplit() drops the empty authority of schemes that it does not know.
    rest = urlunsplit(("", "", parts.path, query, parts.fragment))
    return f"{parts.scheme}://{parts.netloc}{rest}"


def _description(spec: StoreSpec, export: Export) -> Description:
    size, block_min = export["size_bytes"], max(export["block_min_bytes"], BLOCK_SIZE_MIN_BYTES)
    if size == 0:
        raise BackendError(f"{spec.uri}: the export is empty; give the server's store a size")
    if size % block_min:
        raise BackendError(
            f"{spec.uri}: the export has {size} bytes, no multiple of its block size {block_min}; "
            f"make the server's store {size - size % block_min + block_min} bytes"
        )
    if export["read_only"] and not spec.read_only:
        raise BackendError(f"{spec.uri}: the server exports it read-only; set read_only, or export it writable")
    preferred = export["block_preferred_bytes"]
    if preferred & (preferred - 1):
        preferred = 0
    return Description(
        size_bytes=size,
        block_size_bytes=min(block_min, BLOCK_SIZE_MAX_BYTES),
        granule_bytes=block_min,
        rotational=int(export["is_rotational"]),
        physical_block_size_bytes=max(block_min, min(preferred, PHYSICAL_BLOCK_MAX_BYTES)),
        opt_io_size_bytes=preferred if preferred > PHYSICAL_BLOCK_MAX_BYTES else 0,
        read_only=export["read_only"],
        can_discard=export["can_trim"],
        can_write_zeroes=export["can_zero"],
        zeroes_cheaply=export["can_zero"],
        shareable=export["can_multi_conn"],
    )


def _translate(uri: str, error: ProbeError) -> VdusefastError:
    """Return the error for the user: what happened, and what to do."""
    if error.stage == "uri":
        return ConfigError(f"backend.uri: {uri!r}: {error.text}; write for example nbd://localhost/export")
    if error.stage == "connect":
        return BackendError(f"{uri}: {_connect_trouble(error)}")
    if error.stage == "export":
        return BackendError(f"{uri}: {error.text}; correct the server")
    if error.err == errno.ETIMEDOUT:
        return BackendError(
            f"{uri}: the server has not finished the handshake within {HANDSHAKE_LIMIT_S} s; check whether it hangs, "
            "or is no NBD server"
        )
    if error.err == errno.ENOENT:
        return BackendError(f"{uri}: {_without(error.text)}; {_exports(uri)}")
    return BackendError(f"{uri}: {_handshake_trouble(error)}")


def _connect_trouble(error: ProbeError) -> str:
    if error.err in (errno.ECONNREFUSED, errno.ENOENT):
        return "nobody listens there; start the server, or correct the URI"
    if error.err == errno.ETIMEDOUT:
        return f"no connection within {HANDSHAKE_LIMIT_S} s; check whether the machine can be reached"
    if error.err == errno.EACCES:
        return "the socket may not be used by this user; change its permissions, or run as another user"
    return f"cannot connect: {error.text}; start the server, or correct the URI"


def _handshake_trouble(error: ProbeError) -> str:
    text = _without(error.text)
    if "requires TLS" in error.text or "policy prevents" in error.text:
        return f"{text}; write nbds:// (or nbds+unix://) with tls-certificates= or tls-psk-file="
    if "magic" in error.text or "not either" in error.text:
        return f"no NBD server listens there ({text}); correct the URI"
    if "refused TLS" in error.text or "oldstyle" in error.text:
        return f"{text}; write nbd:// (or nbd+unix://), or give the server certificates"
    if "gnutls" in error.text:
        return f"TLS has failed: {text}; check whether both sides have matching certificates or keys"
    if error.err in (errno.ECONNRESET, errno.EPIPE) or "disconnected" in error.text:
        return f"the server hung up in the handshake ({text}); see its log, and check whether it admits another client"
    return f"the handshake failed: {text}; see the server's log"


def _without(text: str) -> str:
    return text.removeprefix("handshake: ")


def _exports(uri: str) -> str:
    from vdusefast.backends._nbd import list_exports

    names, count = list_exports(uri, HANDSHAKE_LIMIT_S * 1000)
    if not count:
        return "the server does not tell which ones it has"
    more = f" and {count - len(names)} more" if count > len(names) else ""
    return f"it has {', '.join(repr(name) for name in names)}{more}"
