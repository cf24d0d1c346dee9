"""The commands about devices that exist: `list`, `show`, `stats`, `del`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from vdusefast.base.columns import terminal_width
from vdusefast.base.printable import printable
from vdusefast.base.time_limits import STOP_TIMEOUT_S
from vdusefast.errors import ConfigError

if TYPE_CHECKING:
    pass

TIMEOUT_MAX_S = 3600

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


@click.command("list")
@_json_option
def list_devices(as_json: bool) -> None:
    """List the devices that are served."""
    from vdusefast.cli import render
    from vdusefast.server import registry

    infos = registry.describe_all()
    click.echo(json.dumps(infos, indent=2) if as_json else render.list_text(infos, terminal_width(sys.stdout)))
    hidden = [info["run_dir"] for info in infos if info["state"] == registry.HIDDEN]
    if hidden:
        click.echo(f"vdusefast: no permission for {printable(', '.join(hidden))}; be root", err=True)


@click.command()
@click.argument("name")
@_json_option
def show(name: str, as_json: bool) -> None:
    """Show everything about one device: state, driver, features, queues, counters."""
    from vdusefast.cli import render
    from vdusefast.server import registry

    info = registry.describe(name)
    click.echo(json.dumps(info, indent=2) if as_json else render.show_text(info, terminal_width(sys.stdout)))


@click.command()
@click.argument("name")
@_json_option
def stats(name: str, as_json: bool) -> None:
    """Show all counters of one device, and its latencies."""
    from vdusefast.cli import render
    from vdusefast.server import registry

    with registry.connect(name) as client:
        counted = client.call("stats")
    click.echo(json.dumps(counted, indent=2) if as_json else render.stats_text(counted, terminal_width(sys.stdout)))


@click.command("del")
@click.argument("name")
@click.option("--force", is_flag=True, help="Remove it even while it is in use; pending requests fail.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0, TIMEOUT_MAX_S, min_open=True),
    default=STOP_TIMEOUT_S,
    show_default=True,
    help="Seconds to wait for pending requests.",
)
@click.option(
    "--claim", is_flag=True, help="With --force: also remove a device of the kernel whose run directory is lost."
)
@_json_option
def delete(name: str, force: bool, timeout_s: float, claim: bool, as_json: bool) -> None:
    """Remove a device, unless it is mounted or open."""
    from vdusefast.server import lifecycle

    if claim and not force:
        raise ConfigError(f"{name}: --claim fails pending requests: confirm that with --force")
    lifecycle.delete(name, force=force, timeout_s=timeout_s, claimed=claim)
    if as_json:
        click.echo(json.dumps({"name": name, "deleted": True}))
