"""The command `resize`: another size for a device while it is used."""

from __future__ import annotations

import json

import click


@click.command()
@click.argument("name")
@click.argument("size", required=False)
@click.option("--force", is_flag=True, help="Also make it smaller; what lies behind the new end is lost.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def resize(name: str, size: str | None, force: bool, as_json: bool) -> None:
    """Change the size of a device while it is in use. Its driver sees the new size.

    SIZE is for example 20G; a file grows by a hole. Without SIZE the device gets the size of its
    store, as after lvextend.
    """
    from vdusefast.base import time_limits
    from vdusefast.config import parse_size
    from vdusefast.server import registry
    from vdusefast.units import size_text

    params = {"size_bytes": None if size is None else parse_size(size), "force": force}
    with registry.connect(name) as client:
        answer = client.call("resize", params, time_limits.client_s(time_limits.resize_s()))
    if as_json:
        click.echo(json.dumps(answer))
        return
    after, before = answer["size_bytes"], answer["before_bytes"]
    was = f", was {size_text(before)} ({before} bytes)" if before != after else ", as before"
    click.echo(f"{name}: {size_text(after)} ({after} bytes){was}")
