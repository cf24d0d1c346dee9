"""The command `systemd-unit`: the unit file, with the path of this installation."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from vdusefast.errors import VdusefastError

UNIT = "vdusefast@.service"
PACKAGED_COMMAND = "/usr/bin/vdusefast"


@click.command("systemd-unit")
def systemd_unit() -> None:
    """Print vdusefast@.service for this installation.

    To install it: vdusefast systemd-unit | sudo tee /etc/systemd/system/vdusefast@.service
    """
    click.echo(unit_text(installed_command()), nl=False)


def unit_text(command: str) -> str:
    """Return the unit that runs `command`, an absolute path and words that go before the command's own."""
    from importlib import resources

    text = resources.files("vdusefast").joinpath("systemd", UNIT).read_text(encoding="utf-8")
    return text.replace(f"ExecStart={PACKAGED_COMMAND} ", f"ExecStart={command} ")


def installed_command() -> str:
    """Return how to start this very installation. Raises VdusefastError when its path cannot stand in a unit."""
    import shutil

    beside = Path(sys.executable).parent / "vdusefast"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("vdusefast")
    words = [os.path.abspath(found)] if found else [sys.executable, "-m", "vdusefast"]
    if any(set(word) & set(" \t\"'\\%$") for word in words):
        raise VdusefastError(f"{words[0]}: a unit file cannot hold this path; install vdusefast elsewhere")
    return " ".join(words)
