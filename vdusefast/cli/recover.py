"""The commands `recover` and `restart`."""

from __future__ import annotations

import click

_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object in place of the node.")

other_store_option = click.option(
    "--other-store", is_flag=True, help="Adopt the device also if the store of this name is another one than before."
)


@click.command()
@click.argument("name")
@other_store_option
@_json_option
def recover(name: str, other_store: bool, as_json: bool) -> None:
    """Adopt an orphaned device, recreate a broken one, or flush a store again that has lost data.

    A new server serves the device in the background as before. Its driver has waited, and continues. The node is
    printed. If the store has lost data, all flushes fail until you run this command: only you can say that it is well.
    """
    from vdusefast.cli.serve import fill_standard_descriptors, print_ready
    from vdusefast.server import lifecycle

    fill_standard_descriptors()
    print_ready(lifecycle.recover(name, other_store=other_store), as_json)


@click.command()
@click.argument("name")
@other_store_option
@_json_option
@click.option(
    "--unseen", is_flag=True, help="Do not open the store first: it takes one client only, or cannot be reached."
)
def restart(name: str, other_store: bool, as_json: bool, unseen: bool) -> None:
    """Replace the server of a device by a new process, such as one of a newer version. The driver waits for a moment.

    The new server first proves that it can serve the device: it opens and starts everything beside the old one. Then
    the old server completes its requests and hands the device over. It takes the device back if the new server fails.
    If systemd runs the server, this command is `systemctl reload` of its unit.
    """
    from vdusefast.cli.serve import fill_standard_descriptors, print_ready
    from vdusefast.server import lifecycle

    fill_standard_descriptors()
    print_ready(lifecycle.restart(name, other_store=other_store, unseen=unseen), as_json)
