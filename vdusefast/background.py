"""What services call that `vdusefast add` of release 0.1 has started, whose files were upgraded meanwhile."""

from vdusefast.cli.systemd import reload_service
from vdusefast.server.launch import main_of_service

__all__ = ["main_of_service", "reload_service"]
