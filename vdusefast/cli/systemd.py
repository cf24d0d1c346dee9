"""The commands for systemd: `systemd-unit` prints a unit file, `systemd-reload` is what its ExecReload runs."""

from __future__ import annotations

import os
from collections.abc import Sequence

import click

from vdusefast.base.time_limits import client_s, take_over_s
from vdusefast.errors import ConfigError, VdusefastError


@click.command("systemd-unit")
@click.argument("name", required=False)
def systemd_unit(name: str | None) -> None:
    """Print vdusefast@NAME.service for this installation, or vdusefast@.service for all devices without NAME.

    With NAME the unit also says what the store of /etc/vdusefast/NAME.toml needs: its mount, or the network. To install
    it: vdusefast systemd-unit NAME | sudo tee /etc/systemd/system/vdusefast@NAME.service
    """
    from vdusefast.cli.serve import read_config
    from vdusefast.server.systemd import unit

    command = unit.installed_command()
    if name is None:
        click.echo(unit.unit_text(command), nl=False)
        return
    unit.check_name(name)
    path = f"{unit.CONFIG_DIRECTORY}/{name}.toml"
    config = read_config(path, {})
    if config.device.name != name:
        raise ConfigError(f"{path}: its device.name is {config.device.name}; the unit goes by the file's name: {name}")
    click.echo(unit.unit_text(command, unit.needed_units(config, command)), nl=False)


@click.command("systemd-reload", hidden=True)
@click.argument("target")
def systemd_reload(target: str) -> None:
    """Replace the server of a service by a new one, which becomes the main process: for ExecReload=.

    TARGET is the configuration file, or the name of a device, which then keeps its configuration.
    """
    from vdusefast.base.start_mode import StartMode
    from vdusefast.cli.serve import fill_standard_descriptors, read_config
    from vdusefast.server import launch, registry
    from vdusefast.server.lifecycle import refuse_restart, who_serves
    from vdusefast.server.sd_notify import Notifier
    from vdusefast.state import orphans

    fill_standard_descriptors()
    variables = dict(os.environ)
    manager = Notifier()
    os.environ.update(variables)  # the new server is to have them
    config = read_config(target, {}) if target.endswith(".toml") else orphans.load_state(registry.find(target)).config
    name = config.device.name
    limit_s = client_s(take_over_s(config.device.attach_timeout_s))
    manager.send(EXTEND_TIMEOUT_USEC=int(limit_s * 1e6))
    try:
        info = registry.describe(name)
        refuse_restart(info)
        # systemd tells the watchdog's limit to the processes alone that it starts itself as main ones.
        os.environ["WATCHDOG_USEC"] = str(int(info.get("watchdog_s", 0) * 1e6))
        launch.start(config, limit_s, mode=StartMode.TAKE_OVER, service=True)
    except VdusefastError as error:
        text = f"{error}; {who_serves(registry.base_directory() / name)}"
        manager.send(STATUS=f"reload failed: {text}")
        raise type(error)(text) from None


def reload_service(arguments: Sequence[str]) -> int:
    """Replace the server of a service that `add` has started, as its ExecReload=. arguments: the name of its device."""
    from vdusefast.cli.app import run
    from vdusefast.server import launch
    from vdusefast.server.systemd import start_file

    launch.enter(start_file.read(arguments[0]))
    return run(["systemd-reload", arguments[0]])
