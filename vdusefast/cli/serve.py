"""The commands `add` and `serve`: from a configuration file, or a name and options, to a device that is served."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vdusefast.base.engines import FILE_CHOICES
from vdusefast.base.kinds import Bus, TransportKind
from vdusefast.base.printable import printable
from vdusefast.cli.recover import other_store_option
from vdusefast.errors import ConfigError, VdusefastError
from vdusefast.host import containers

if TYPE_CHECKING:
    from vdusefast.config import Config

_SAYING = (
    ("--dry-run", "Make no device; print what --explain prints, as far as it is known before the device exists."),
    ("--explain", "Also print the CPUs of workers and interrupts, and why these."),
)
_F = TypeVar("_F", bound=Callable[..., Any])

# (option, type, help); the keyword is the name of the configuration's key. None of them has a default of its own:
# what is not given is what the file says, or the configuration's default.
DEVICE_OPTIONS: list[tuple[tuple[str, ...], Any, str]] = [
    (
        ("--backend", "uri"),
        str,
        "The store: file:PATH, memory:SIZE, nbd://..., rbd:..., python:FILE:CLASS; see docs/stores.md.",
    ),
    (("--bus",), click.Choice([bus.value for bus in Bus]), "virtio gives /dev/vdX, vhost gives /dev/vhost-vdpa-N."),
    (("--queues",), int, "Number of virtqueues. Each has its own worker process."),
    (("--queue-size",), int, "Entries of each virtqueue, as offered to the driver; a power of two."),
    (("--packed/--split", "packed"), bool, "Offer packed rings, or only split rings."),
    (
        ("--in-order/--any-order", "in_order"),
        bool,
        "Offer IN_ORDER, if the engine completes requests in order.",
    ),
    (("--cpus",), str, 'CPUs of the workers, one for each queue: 0,1 or 0-3; or "auto".'),
    (("--irq-cpus",), str, "CPUs that get the interrupts, one for each queue."),
    (("--indirect/--no-indirect",), bool, "Let the driver use indirect tables, or not."),
    (("--event-idx/--no-event-idx",), bool, "Offer EVENT_IDX: kicks and interrupts are requested by index."),
    (("--serial",), str, "Serial number that the driver reads."),
    (("--read-only/--read-write", "read_only"), bool, "Refuse writes, or allow them."),
    (("--block-size", "block_size_bytes"), int, "Size of a logical block in bytes: 512 to 4096."),
    (("--cache",), click.Choice(["writeback", "writethrough", "none", "unsafe"]), "none is O_DIRECT."),
    (("--poll",), click.Choice(["adaptive", "always", "never"]), "When workers spin; with always they never sleep."),
    (
        ("--store-timeout", "timeout_s"),
        float,
        "Seconds until a request fails that the store does not answer; 0 = never.",
    ),
    (("--reconnect", "reconnect_s"), float, "Seconds to wait for a store that was lost."),
    (("--engine",), click.Choice(FILE_CHOICES), "The engine for files."),
    (("--sqpoll/--no-sqpoll",), bool, "Have a kernel thread submit to io_uring, or not."),
    (("--map",), click.Choice(["auto", "off"]), "Whether the sync engine reads a file on tmpfs through a mapping."),
    (("--poll-us",), int, "Longest time in microseconds that an idle worker spins before it sleeps."),
    (("--irq-delay-us",), int, "Longest time in microseconds that an interrupt waits for more completions; 0: none."),
    (
        ("--msg-timeout", "msg_timeout_s"),
        int,
        "Seconds until the kernel gives up a server that does not answer; 0 = never.",
    ),
    (
        ("--bounce-size", "bounce_size_bytes"),
        str,
        "Size of the bounce memory that the kernel copies data through, such as 64M.",
    ),
    (("--user-memory",), click.Choice(["auto", "on", "off"]), "Use user memory in place of the kernel's bounce pages."),
    (
        ("--lock-memory",),
        click.Choice(["auto", "on", "off"]),
        "Lock the server's memory, so that it serves when the machine runs out of memory.",
    ),
    (
        ("--scheduler",),
        click.Choice(["none", "kernel"]),
        "I/O scheduler of the disk: none, or the kernel's choice.",
    ),
    (("--timeout", "attach_timeout_s"), int, "Seconds to wait for the node."),
]


def _device_options(command: _F) -> _F:
    for name, text in _SAYING:
        command = click.option(name, is_flag=True, help=text)(command)
    for names, kind, text in reversed(DEVICE_OPTIONS):
        flag = {"is_flag": True} if kind is bool else {"type": kind}
        command = click.option(*names, default=None, help=text, **flag)(command)
    return click.argument("target", metavar="CONFIG.toml|NAME")(command)


_claim_option = click.option(
    "--claim",
    is_flag=True,
    help="Adopt a device of the kernel whose run directory is lost, if the kernel shows that it is this one and has "
    "nothing in flight.",
)


@click.command()
@_device_options
@other_store_option
@_claim_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object in place of the node.")
def add(
    target: str, as_json: bool, explain: bool, dry_run: bool, other_store: bool, claim: bool, **options: Any
) -> None:
    """Serve a device in the background, and print its node once it is usable.

    CONFIG.toml describes the device; options replace keys of the file. With a NAME instead, --backend is required. If a
    device of this name was orphaned and its configuration matches, it is adopted.
    """
    from vdusefast.base.start_mode import StartMode
    from vdusefast.server import launch, lifecycle, registry

    fill_standard_descriptors()
    config = read_config(target, options)
    if dry_run:
        print_plan(config, as_json)
        return
    with lifecycle.accepting(registry.base_directory() / config.device.name, other_store):
        info = launch.start(config, mode=StartMode.CLAIM if claim else StartMode.ADD)
    for note in () if as_json else info.get("notes", ()):
        click.echo(f"vdusefast: {info['name']}: {printable(note)}", err=True)
    print_ready(info, as_json, explain=explain)


@click.command()
@_device_options
@other_store_option
@_claim_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object in place of the node.")
def serve(
    target: str, as_json: bool, explain: bool, dry_run: bool, other_store: bool, claim: bool, **options: Any
) -> int:
    """Serve a device in the foreground until a signal comes.

    The server prints the node once it is usable, and its messages on standard error. Under systemd it reports its state
    (Type=notify). SIGTERM leaves the device in the kernel, where requests wait for the next server. SIGINT (Ctrl-C)
    removes it, unless it is in use.
    """
    from vdusefast.base import logs
    from vdusefast.base.start_mode import StartMode
    from vdusefast.server import lifecycle, registry
    from vdusefast.server.service import Service

    fill_standard_descriptors()
    config = read_config(target, options)
    if dry_run:
        print_plan(config, as_json)
        return 0
    with logs.log_to_stderr():
        service = Service(config, registry.base_directory(), StartMode.CLAIM if claim else StartMode.ADD)
        with lifecycle.accepting(service.path, other_store):
            service.run(lambda info: print_ready(info, as_json, explain=explain))
    return service.exit_status


def read_config(target: str, options: dict[str, Any]) -> Config:
    """Return the configuration that the arguments of a command line describe.

    target: a file, or a device's name when there is `uri`. options: keys of the configuration and `irq_cpus`; None is
    what was not given. The transport is the kernel's unless the file names one. Raises ConfigError.
    """
    from vdusefast import config as configuration

    overrides = {key: value for key, value in options.items() if value is not None}
    irq_cpus = overrides.pop("irq_cpus", None)
    if (size := overrides.get("bounce_size_bytes")) is not None:
        overrides["bounce_size_bytes"] = configuration.parse_size(size)
    if _is_file(target, "uri" in overrides):
        config = configuration.load_config(target)
    else:
        config = configuration.make_config(name=target, uri=overrides.pop("uri"))
    if config.device.transport == TransportKind.AUTO:
        overrides.setdefault("transport", TransportKind.KERNEL)
    config = configuration.override(config, **overrides)
    if irq_cpus is not None:
        config = _with_irq_cpus(config, irq_cpus)
    return _with_absolute_path(configuration.resolve_cpus(config))


def _is_file(target: str, has_backend: bool) -> bool:
    """Return whether a command's first word names a configuration file rather than a device. Raises ConfigError."""
    if target.endswith(".toml"):
        return True
    if has_backend:
        return False
    if Path(target).is_file():
        return True
    raise ConfigError(
        f"{target}: no such configuration file; for a device of that name say what holds its bytes: --backend file:PATH"
    )


def _with_irq_cpus(config: Config, text: str) -> Config:
    import msgspec

    from vdusefast.config import validate
    from vdusefast.host.cpu_topology import parse_cpu_list

    cpus = parse_cpu_list(text, "--irq-cpus: ")
    if len(cpus) != len(config.queue):
        raise ConfigError(f"--irq-cpus: {len(cpus)} CPUs for {len(config.queue)} queues; name one a queue")
    queues = [msgspec.structs.replace(queue, irq_cpu=cpu) for queue, cpu in zip(config.queue, cpus, strict=True)]
    config = msgspec.structs.replace(config, queue=queues)
    validate(config)
    return config


def _with_absolute_path(config: Config) -> Config:
    """Return `config` with a URI that means the same in a process that has gone elsewhere."""
    import msgspec

    from vdusefast.backends import absolute_uri

    uri = absolute_uri(config.backend.uri)
    return msgspec.structs.replace(config, backend=msgspec.structs.replace(config.backend, uri=uri))


def print_plan(config: Config, as_json: bool) -> None:
    """Print where workers and interrupts of a device would go, as far as that is known before it is there."""
    import json

    from vdusefast.cli import render
    from vdusefast.control import placement

    name, plan = config.device.name, placement.foresee(config).to_dict()
    text = json.dumps({"name": name, "placement": plan}) if as_json else render.placement_text(name, plan)
    click.echo(text)


def print_ready(info: dict[str, Any], as_json: bool, *, explain: bool = False) -> None:
    """Print what a device that is usable is to be found by; `explain`: and where it runs. Raises VdusefastError."""
    if as_json:
        import json

        text = json.dumps(info)
    else:
        text = info["node"] or f"{info['name']}: no node, the transport is {info['transport']}"
        if explain:
            from vdusefast.cli import render

            text = f"{text}\n{render.placement_text(info['name'], info['placement'])}"
    number = info.get("device_number", "")
    try:
        click.echo(text)
        if number and not containers.is_same_node(info["node"], number):
            told = containers.missing_node_text(info["name"], info["node"], number)
            click.echo(f"vdusefast: {told}", err=True)
    except OSError as error:
        raise VdusefastError(
            f"{info['name']}: is served by pid {info['pid']}, which cannot be printed: {error.strerror or error}"
        ) from None


def fill_standard_descriptors() -> None:
    """Open /dev/null for those of the descriptors 0, 1 and 2 that are closed.

    Whatever else were opened under these numbers would be taken for them, by us and by the processes that we start.
    """
    while (fd := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
