"""The text of the unit that serves a device: the template of systemd/, for this installation and for one device."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from vdusefast.errors import ConfigError, VdusefastError

if TYPE_CHECKING:
    from vdusefast.config import Config

UNIT = "vdusefast@.service"
PACKAGED_COMMAND = "/usr/bin/vdusefast"
CONFIG_DIRECTORY = "/etc/vdusefast"
NETWORK = ["network-online.target"]
_ELSEWHERE = re.compile(r"(?:^|:)(?:nbds?|rbd):")
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:_.")


def unit_text(command: str, needs: Iterable[str] = ()) -> str:
    """Return the unit that runs `command`, an absolute path and arguments that go before the command's own.

    needs: units to be started first, and stopped later.
    """
    from importlib import resources

    text = resources.files("vdusefast.server.systemd").joinpath(UNIT).read_text(encoding="utf-8")
    text = re.sub(rf"^(Exec\w+=){PACKAGED_COMMAND} ", lambda found: f"{found[1]}{command} ", text, flags=re.MULTILINE)
    if not (names := " ".join(needs)):
        return text
    # No Requires=, also not by RequiresMountsFor=: a mount that fails at first would keep the server from being tried.
    lines = f"# What the store and the programs are on.\nWants={names}\nAfter={names}\n"
    return text.replace("[Unit]\n", f"[Unit]\n{lines}", 1)


def installed_command() -> str:
    """Return how to start this very installation. Raises VdusefastError when its path cannot stand in a unit."""
    import shutil

    beside = Path(sys.executable).parent / "vdusefast"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("vdusefast")
    arguments = [os.path.abspath(found)] if found else [sys.executable, "-m", "vdusefast"]
    if any(set(argument) & set(" \"'\\%$;") or not argument.isprintable() for argument in arguments):
        raise VdusefastError(f"{arguments[0]}: a unit file cannot hold this path; install vdusefast elsewhere")
    return " ".join(arguments)


def needed_units(config: Config, command: str) -> list[str]:
    """Return the units that a device's server needs: mounts and disks that paths lead to, and the network.

    There may be no mount unit of a name; systemd does not mind.
    """
    uri = config.backend.uri
    # A path ends where the next part of the URI begins. If a path holds such a character, only the directories
    # before it are found.
    paths = [unquote(part) for part in re.split(r"[:?&=,]", uri) if re.match(r"/[^/]", part)]
    found: dict[str, None] = {}
    for path in [*paths, command.split()[0]]:
        found |= dict.fromkeys(_units_of_path(path))
        if not path.startswith("/dev/"):  # such a link may lead elsewhere after the next boot
            found |= dict.fromkeys(_units_of_path(os.path.realpath(path)))
    return [*(NETWORK if _ELSEWHERE.search(uri) else ()), *found]


def _units_of_path(path: str) -> list[str]:
    """Return the mount unit of each directory on the way to an absolute path, and the device unit of a disk."""
    if path.startswith("/dev/"):
        return [f"{escape(path)}.device"]
    parents = [parent for parent in Path(os.path.normpath(path)).parents if parent != Path("/")]
    return [f"{escape(os.fspath(parent))}.mount" for parent in reversed(parents)]


def escape(path: str) -> str:
    """Return a path as names of units have it, like systemd-escape --path."""
    text = os.fsencode(os.path.normpath(path).strip("/"))
    return "".join(
        "-" if byte == ord("/") else chr(byte) if byte in _PLAIN and (place or byte != ord(".")) else f"\\x{byte:02x}"
        for place, byte in enumerate(text)
    )


def check_name(name: str) -> None:
    """Raise ConfigError for a name that systemd would read as something else behind the @ of a unit."""
    if not re.fullmatch(r"[A-Za-z0-9:_.-]+", name):
        raise ConfigError(f"{name}: not usable as vdusefast@NAME.service: use letters, digits and :_.- in the name")
