"""What the unit calls that looks after orphaned devices, where release 0.1 has started it."""

from vdusefast.server.systemd.shutdown_unit import main

__all__ = ["main"]
