"""`python:PATH_OR_MODULE:Class?key=value`: a disk written as a Python class; see python_class.Backend.

`?key@=PATH` gives the class the contents of the file at PATH, which are read each time that a process opens the disk:
for secrets, which do not belong on a command line.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from vdusefast.backends.plugin import Description, Plugin, StoreSpec, Usability
from vdusefast.backends.python_errors import describe as say
from vdusefast.backends.python_errors import placed_if_slow, print_traceback
from vdusefast.base.secret import read_file
from vdusefast.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from types import ModuleType

    from vdusefast.backends._python import Engine
    from vdusefast.backends.python_class import Backend

BYTES = "surrogateescape"  # of percent-encoded bytes that are not UTF-8, and back
EXAMPLE = "python:/srv/disk.py:Disk?size=1G"

_has_site = False


def describe(spec: StoreSpec) -> Description:
    """Make a disk, open it, describe it and close it. Raises ConfigError, BackendError."""
    from vdusefast.backends.python_class import wrong_method

    with placed_if_slow():
        disk = make_disk(spec)
        if wrong := wrong_method(disk):
            raise BackendError(f"{spec.uri}: {wrong}")
        _run(spec, disk, "open")
        try:
            return _description(spec, disk)
        finally:
            _run(spec, disk, "close")


def open_engine(spec: StoreSpec) -> Plugin:
    """Make a disk for a worker and open it. Raises ConfigError, BackendError."""
    with placed_if_slow():
        return _open_engine(spec)


def _open_engine(spec: StoreSpec) -> Plugin:
    disk = make_disk(spec)
    from vdusefast.backends._python import Engine

    engine = Engine(disk, spec)
    try:
        _open_within(engine, spec, disk)
        described = _description(spec, disk)
        if described.size_bytes < spec.size_bytes:
            raise BackendError(
                f"{spec.uri}: has {described.size_bytes} bytes, but the device {spec.size_bytes}; "
                "every process must find the same size_bytes"
            )
        engine.begin()
        engine.name_hangs()
    except BaseException:
        engine.abandon()
        raise
    return engine


def usability() -> Usability:
    """Return whether the backend can be used: it needs its extension, and NumPy for the rows of a batch."""
    from importlib.util import find_spec

    if find_spec("vdusefast.backends._python") is None:
        return Usability(False, "its extension is not built", "reinstall vdusefast, or run ./bootstrap.sh")
    return Usability(True, "classes derived from vdusefast.Backend")


def absolute_uri(uri: str) -> str:
    """See backends.absolute_uri. Raises ConfigError."""
    import re
    from pathlib import Path
    from urllib.parse import quote, unquote

    def absolute(match: re.Match[str]) -> str:
        path = os.path.abspath(unquote(match[2], errors=BYTES))
        return match[1] + quote(path, errors=BYTES)

    target, name, query = split_uri(uri)
    if is_path(target):
        target = str(Path(target).absolute())
    query = re.sub(r"(?<=[?&])(\w+@=)([^&]+)", absolute, query)
    return f"python:{target}:{name}{query}"


def split_uri(uri: str) -> tuple[str, str, str]:
    """Return (path or module, class, the part from "?" on or nothing). Raises ConfigError."""
    rest, mark, query = uri.partition(":")[2].partition("?")
    target, colon, name = rest.rpartition(":")
    if not colon or not target or not name.isidentifier():
        raise ConfigError(f"{uri}: names no class; write python:PATH_OR_MODULE:Class, for example {EXAMPLE}")
    return target, name, mark + query


def is_path(target: str) -> bool:
    """Return whether the target is a file and not a module."""
    return "/" in target or target.endswith(".py")


def arguments_of(uri: str) -> dict[str, str]:
    """Return the arguments after "?", percent-decoded, with the contents of the files that `key@=` names.

    Raises ConfigError, BackendError for such a file.
    """
    found: dict[str, str] = {}
    for word in split_uri(uri)[2][1:].split("&"):
        if not word:
            continue
        key, equals, value = (_decoded(part) for part in word.partition("="))
        in_file, key = key.endswith("@"), key.removesuffix("@")
        if not equals or not key.isidentifier():
            raise ConfigError(f"{uri}: {word!r} is no key=value; write for example {EXAMPLE}")
        if key in found:
            raise ConfigError(f"{uri}: {key} is given twice; write it once")
        found[key] = _file_text(uri, key, value) if in_file else value
    return found


def _file_text(uri: str, key: str, path: str) -> str:
    """Return the contents of a file for a class's argument. Raises BackendError."""
    try:
        return read_file(path)
    except OSError as error:
        raise BackendError(f"{uri}: {key}@={path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BackendError(f"{uri}: {key}@: {error}") from None


def _decoded(text: str) -> str:
    if "%" not in text:
        return text
    from urllib.parse import unquote  # a worker's start need not wait for it

    return unquote(text, errors=BYTES)


def make_disk(spec: StoreSpec) -> Backend:
    """Import the class and make one of it. Raises ConfigError, BackendError."""
    from vdusefast.backends.python_class import Backend, overrides

    uri = spec.uri
    target, name, _ = split_uri(uri)
    arguments = arguments_of(uri)
    _use_site_packages()
    module = _load(uri, target)
    made = getattr(module, name, None)
    if made is None:
        raise BackendError(f"{uri}: {target} has no class {name}; it has {_classes(module)}")
    if not isinstance(made, type) or not issubclass(made, Backend):
        raise BackendError(f"{uri}: {name} is no Backend; write class {name}(vdusefast.Backend)")
    try:
        disk = made(**arguments)
    except BaseException as error:
        print_traceback(error)
        given = ", ".join(arguments) or "no arguments"
        raise BackendError(
            f"{uri}: {name}() raised {say(error)}; it was called with {given}, as the URI has them ({EXAMPLE})"
        ) from error
    if not overrides(disk, "submit") and not overrides(disk, "pread"):
        raise BackendError(f"{uri}: {name} has neither pread nor submit; write one of them")
    disk.queue, disk.queue_count = spec.queue, spec.queue_count
    disk.writable = not spec.read_only and not is_read_only(disk)
    return disk


def is_read_only(disk: Backend) -> bool:
    """Return whether a disk cannot be written."""
    from vdusefast.backends.python_class import overrides

    if disk.read_only is not None:
        return bool(disk.read_only)
    return not overrides(disk, "submit") and not overrides(disk, "pwrite")


def _use_site_packages() -> None:
    """Add the usual directories of modules to the path: a worker is started without them."""
    global _has_site
    if sys.flags.no_site and not _has_site:
        import site

        site.main()
        _has_site = True


def _load(uri: str, target: str) -> ModuleType:
    import importlib
    import importlib.util

    try:
        if not is_path(target):
            return importlib.import_module(target)
        path = os.path.abspath(target)
        if not os.path.isfile(path):
            raise BackendError(f"{uri}: there is no file {path}; write its path, or the name of a module without .py")
        name = f"vdusefast_disk_{os.path.basename(path).partition('.')[0]}"
        found = importlib.util.spec_from_file_location(name, path)
        if found is None or found.loader is None:
            raise BackendError(f"{uri}: {path} is no Python file; its name must end in .py")
        module = importlib.util.module_from_spec(found)
        sys.modules[name] = module
        sys.path.insert(0, os.path.dirname(path))  # modules beside the file can be imported, as for a script
        found.loader.exec_module(module)
    except BackendError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (target == error.name or target.startswith(f"{error.name}.")):
            raise BackendError(
                f"{uri}: there is no module {error.name}; install it, set PYTHONPATH, or write the path of its file"
            ) from error
        print_traceback(error)
        raise BackendError(f"{uri}: cannot be imported: {say(error)}; install what it needs") from error
    except BaseException as error:
        print_traceback(error)
        raise BackendError(f"{uri}: cannot be imported: {say(error)}; fix it there") from error
    return module


def _classes(module: ModuleType) -> str:
    from vdusefast.backends.python_class import Backend

    names = [
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Backend) and value is not Backend
    ]
    return ", ".join(names) or "none that is derived from vdusefast.Backend"


def _run(spec: StoreSpec, disk: Backend, method: str) -> None:
    """Call open or close, which may be coroutines. Raises BackendError."""
    try:
        result: Any = getattr(disk, method)()
        if hasattr(result, "__await__"):
            import asyncio

            async def wait() -> None:
                await result

            asyncio.run(wait())
    except BaseException as error:
        print_traceback(error)
        raise BackendError(f"{spec.uri}: {method}() raised {say(error)}; nothing is served") from error


def _open_within(engine: Engine, spec: StoreSpec, disk: Backend) -> None:
    """Open a worker's disk; a coroutine runs in the loop that serves later. Raises BackendError."""
    try:
        result: Any = disk.open()
        if hasattr(result, "__await__"):
            engine.have_loop().call(result)
    except BaseException as error:
        print_traceback(error)
        raise BackendError(f"{spec.uri}: open() raised {say(error)}; nothing is served") from error


def _description(spec: StoreSpec, disk: Backend) -> Description:
    """Return the class's description, with its values checked. Raises BackendError."""
    from vdusefast.backends.python_class import overrides

    size, block = _size_of(spec, disk, "size_bytes"), _size_of(spec, disk, "block_size_bytes")
    if block < 512 or block > 4096 or block & (block - 1):
        raise BackendError(f"{spec.uri}: block_size_bytes is {block}; it must be a power of two from 512 to 4096")
    if not size:
        raise BackendError(f"{spec.uri}: size_bytes is 0; set it in the class, in its constructor or in open()")
    if size % block:
        raise BackendError(f"{spec.uri}: size_bytes is {size}; it must be a multiple of block_size_bytes ({block})")
    read_only = is_read_only(disk)
    batched = overrides(disk, "submit")
    zeroes = bool(disk.can_write_zeroes) if batched else overrides(disk, "write_zeroes")
    discards = bool(disk.can_discard) if batched else overrides(disk, "discard")
    return Description(
        size_bytes=size,
        block_size_bytes=block,
        read_only=read_only,
        can_discard=discards and not read_only,
        can_write_zeroes=not read_only,
        zeroes_cheaply=zeroes and not read_only,
        shareable=bool(disk.shareable),
    )


def _size_of(spec: StoreSpec, disk: Backend, name: str) -> int:
    """Return a size attribute, checked to be a whole number. Raises BackendError."""
    try:
        value: object = getattr(disk, name)
    except BaseException as error:
        print_traceback(error)
        raise BackendError(f"{spec.uri}: {name} raised {say(error)}; fix it there") from error
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise BackendError(f"{spec.uri}: {name} is {value!r}; it must be a whole number of bytes")
    return value
