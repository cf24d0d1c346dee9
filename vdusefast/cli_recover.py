"""The commands `recover` and `restart`, and how a device whose server has ended is deleted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vdusefast.errors import DeviceBusyError, DeviceNotFoundError, VdusefastError

if TYPE_CHECKING:
    from vdusefast.background import Json, Mode
    from vdusefast.rpc_client import RpcClient

REBUILD_TIMEOUT_S = 30.0

_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object in place of the node.")


@click.command()
@click.argument("name")
@_json_option
def recover(name: str, as_json: bool) -> None:
    """Go on with a device whose server has ended, or make a broken one anew.

    Its driver has waited meanwhile, and goes on. It is served in the background as it was before, and its node printed.
    """
    from vdusefast import registry
    from vdusefast.cli_serve import fill_standard_descriptors, print_ready
    from vdusefast.rpc_client import NoServerError, RpcClient

    fill_standard_descriptors()
    path = registry.find(name)
    try:
        client = RpcClient(path)
    except NoServerError:
        print_ready(recover_dead(path), as_json)
        return
    with client:
        print_ready(_rebuild_served(client, path), as_json)


@click.command()
@click.argument("name")
@_json_option
def restart(name: str, as_json: bool) -> None:
    """Serve a device by a new process, such as one of a newer version; its driver waits for a moment.

    The new process is started first, and takes over from the old one, which finishes what it has in flight.
    """
    from vdusefast import registry
    from vdusefast.background import Mode
    from vdusefast.cli_serve import fill_standard_descriptors, print_ready
    from vdusefast.rpc_client import NoServerError, RpcClient

    fill_standard_descriptors()
    path = registry.find(name)
    try:
        with RpcClient(path) as client:
            info = client.call("info")
    except NoServerError:
        print_ready(recover_dead(path), as_json)
        return
    _refuse_service(info)
    if info["transport"] != "kernel":
        raise VdusefastError(f"{name}: cannot be restarted: a {info['transport']} device ends with its server")
    if info["state"] == "broken":
        raise DeviceBusyError(f"{name}: is broken, which a restart does not mend: vdusefast recover {name}")
    print_ready(_serve(path, Mode.TAKE_OVER), as_json)


def recover_dead(path: Path) -> Json:
    """Serve a device that was left in the background and return its info.

    Raises DeviceNotFoundError when the kernel has none, DeviceBusyError when a process holds it, VdusefastError.
    """
    from vdusefast import left, registry, run_dir
    from vdusefast.background import Mode

    if run_dir.is_held(path):
        raise DeviceBusyError(registry.embedded_text(path))
    if not left.is_left(path):
        raise DeviceNotFoundError(
            f"{path.name}: its server has ended and left nothing to go on with: vdusefast del {path.name}, then add it"
        )
    return _serve(path, Mode.ADD)


def serve_to_delete(path: Path, force: bool) -> None:
    """Serve a device that was left, so that the requests that wait in it end: with `force`, by errors.

    Raises VdusefastError.
    """
    from vdusefast.background import Mode

    _serve(path, Mode.FAIL if force else Mode.ADD)


def _serve(path: Path, mode: Mode) -> Json:
    """Serve a device by the configuration that it was served by, in the background, and return its info."""
    from vdusefast import background, left

    config = left.load_state(path).config
    return background.start(config, config.device.attach_timeout_s + background.START_MARGIN_S, mode=mode)


def _rebuild_served(client: RpcClient, path: Path) -> Json:
    """Make a broken device anew, whose server still runs. Raises DeviceBusyError for one that is well or in use."""
    from vdusefast import background, left
    from vdusefast.cli_manage import delete_served

    info = client.call("info")
    if info["state"] != "broken":
        raise DeviceBusyError(
            f"{path.name}: is being served by pid {info['pid']} (state {info['state']}): there is nothing to recover"
        )
    _refuse_service(info)
    left.refuse_users(path.name)
    config = left.load_state(path).config  # which goes with the device
    delete_served(client, path, False, REBUILD_TIMEOUT_S)
    return background.start(config, config.device.attach_timeout_s + background.START_MARGIN_S)


def _refuse_service(info: Json) -> None:
    """Leave to systemd what it has started. Raises DeviceBusyError."""
    if info.get("systemd"):
        raise DeviceBusyError(
            f"{info['name']}: its server (pid {info['pid']}) is run by systemd: systemctl restart its service, such as "
            f"vdusefast@{info['name']}, which goes on with the device or makes a broken one anew"
        )
