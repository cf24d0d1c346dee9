"""The commands about devices that are there: `list`, `show`, `stats`, `del`."""

from __future__ import annotations

import json
import os
import select
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vdusefast.errors import DeviceBusyError, DeviceNotFoundError, TimedOutError, VdusefastError

if TYPE_CHECKING:
    from vdusefast.rpc_client import RpcClient

DELETE_TIMEOUT_S = 30.0
# Beyond the server's own limit: its look for users, killing workers, destroying the device.
DELETE_MARGIN_S = 25.0
END_TIMEOUT_S = 10.0
TIMEOUT_MAX_S = 3600

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


@click.command("list")
@_json_option
def list_devices(as_json: bool) -> None:
    """List the devices that are served."""
    from vdusefast import display, registry

    infos = registry.describe_all()
    click.echo(json.dumps(infos, indent=2) if as_json else display.list_text(infos))
    hidden = [info["run_dir"] for info in infos if info["state"] == registry.HIDDEN]
    if hidden:
        click.echo(f"vdusefast: no permission for {', '.join(hidden)}; be root", err=True)


@click.command()
@click.argument("name")
@_json_option
def show(name: str, as_json: bool) -> None:
    """Show everything about one device: state, driver, features, queues, counters."""
    from vdusefast import display, registry

    info = registry.describe(name)
    click.echo(json.dumps(info, indent=2) if as_json else display.show_text(info))


@click.command()
@click.argument("name")
@_json_option
def stats(name: str, as_json: bool) -> None:
    """Show all counters of one device, and its latencies."""
    from vdusefast import display, registry

    with registry.connect(name) as client:
        counted = client.call("stats")
    click.echo(json.dumps(counted, indent=2) if as_json else display.stats_text(counted))


@click.command("del")
@click.argument("name")
@click.option("--force", is_flag=True, help="Remove it although it is in use; requests that are pending fail.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0, TIMEOUT_MAX_S, min_open=True),
    default=DELETE_TIMEOUT_S,
    show_default=True,
    help="Seconds for the requests that are pending.",
)
@_json_option
def delete(name: str, force: bool, timeout_s: float, as_json: bool) -> None:
    """Remove a device, unless it is mounted or open."""
    from vdusefast import registry, run_dir
    from vdusefast.rpc_client import NoServerError, RpcClient

    try:
        path = registry.find(name)
    except DeviceNotFoundError:
        if not force or not registry.remove_left(name):
            raise
        _print_deleted(name, as_json)
        return
    try:
        client = RpcClient(path)
    except NoServerError:
        if run_dir.is_held(path):
            raise DeviceBusyError(registry.embedded_text(path)) from None
        _delete_dead(path, force, timeout_s)
    else:
        with client:
            delete_served(client, path, force, timeout_s)
    _print_deleted(name, as_json)


def _print_deleted(name: str, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"name": name, "deleted": True}))


def _delete_dead(path: Path, force: bool, timeout_s: float) -> None:
    """Remove what a server that has ended has left. A device that its driver has is served for that, once more.

    Else the kernel would wait for the requests that wait in it, and keep every other vDPA device of the machine from
    being added or removed meanwhile. A broken one answers nothing any more, and nobody has to.
    """
    from vdusefast import left, registry
    from vdusefast.cli_recover import serve_to_delete
    from vdusefast.rpc_client import RpcClient

    if left.is_left(path) and left.is_attached(path.name):
        if not left.is_broken(path.name):
            serve_to_delete(path, force)
            try:
                with RpcClient(path) as client:
                    delete_served(client, path, force, timeout_s)
            except DeviceBusyError as error:
                raise DeviceBusyError(f"{error} (it is served again)") from None
            return
        left.remove_broken(path)
    registry.remove_dead(path)


def delete_served(client: RpcClient, path: Path, force: bool, timeout_s: float) -> None:
    """Have the server remove its device, and wait until all of it is gone. Raises VdusefastError."""
    from vdusefast import left, run_dir

    in_kernel = run_dir.holder_transport(path) == "kernel"
    pid = client.server_pid
    try:
        pid_fd = os.pidfd_open(pid)
    except ProcessLookupError:
        pid_fd = -1  # it has ended meanwhile, which the call will tell
    try:
        client.call("delete", {"force": force, "timeout_s": timeout_s}, timeout_s + DELETE_MARGIN_S)
        if pid_fd >= 0 and not select.select([pid_fd], [], [], END_TIMEOUT_S)[0]:
            raise TimedOutError(f"{path.name}: removed, but its server (pid {pid}) does not end; see {path / 'log'}")
    finally:
        if pid_fd >= 0:
            os.close(pid_fd)
    _check_gone(path, in_kernel and left.in_kernel(path.name))


def _check_gone(path: Path, kernel_device_left: bool) -> None:
    if kernel_device_left:
        raise VdusefastError(
            f"{path.name}: its server has ended, but the kernel still has /dev/vduse/{path.name}; try "
            f"vdusefast del {path.name} --force in a while"
        )
    if path.is_dir():
        from vdusefast import run_dir

        if not run_dir.is_held(path):  # else somebody has added a device of that name meanwhile
            raise VdusefastError(f"{path.name}: its server has ended, but {path} is still there; remove it")
