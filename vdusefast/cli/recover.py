"""The commands `recover` and `restart`."""

from __future__ import annotations

import click

_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object in place of the node.")

other_store_option = click.option(
    "--other-store", is_flag=True, help="Go on also when the store is another one than before, by its name."
)


@click.command()
@click.argument("name")
@other_store_option
@_json_option
def recover(name: str, other_store: bool, as_json: bool) -> None:
    """Go on with a device whose server has ended, make a broken one anew, or flush a store again that has lost data.

    Its driver has waited meanwhile, and goes on. It is served in the background as it was before, and its node printed.
    Flushes that fail since the store has lost data are carried out again: only you can say that it is well.
    """
    from vdusefast.cli.serve import fill_standard_descriptors, print_ready
    from vdusefast.server import lifecycle

    fill_standard_descriptors()
    print_ready(lifecycle.recover(name, other_store=other_store), as_json)


@click.command()
@click.argument("name")
@other_store_option
@_json_option
@click.option("--unseen", is_flag=True, help="Do not look first at a store that takes one client, or that is away.")
def restart(name: str, other_store: bool, as_json: bool, unseen: bool) -> None:
    """Serve a device by a new process, such as one of a newer version; its driver waits for a moment.

    The new process first proves that it can: it opens and starts everything beside the old one. Then the old one
    finishes what it has in flight and lets go of the device; it takes it back if the new one does not come to serve it.
    Where systemd runs the server, this is `systemctl reload` of its unit.
    """
    from vdusefast.cli.serve import fill_standard_descriptors, print_ready
    from vdusefast.server import lifecycle

    fill_standard_descriptors()
    print_ready(lifecycle.restart(name, other_store=other_store, unseen=unseen), as_json)
