"""Entry of `python -m vdusefast.bench`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from vdusefast.bench.peers import PEERS
from vdusefast.bench.torture.plan import RINGS
from vdusefast.errors import VdusefastError

RAW = {"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []}


@click.group()
def main() -> None:
    """Measure block devices that vdusefast serves."""


@main.command(context_settings=RAW, short_help="load a device through the loopback driver")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def raw(arguments: tuple[str, ...]) -> None:
    """Load a device through the loopback driver, which issues requests faster than fio can."""
    if not arguments or {"--help", "-h"} & set(arguments):
        from vdusefast.bench.raw.help import option_help

        click.echo(option_help())
        return

    def command() -> int:
        from vdusefast.bench.raw.command import run_plan
        from vdusefast.bench.raw.jobs import parse_arguments

        return run_plan(parse_arguments(arguments))

    _run(command)


@main.command(context_settings=RAW, short_help="run any fio job on a device made for it")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def fio(arguments: tuple[str, ...]) -> None:
    """Run fio, with its own options and job files, on a device made for it."""

    def command() -> int:
        from vdusefast.bench.fio.command import run_command

        return run_command(arguments)

    _run(command)


def _run(command: Callable[[], int]) -> None:
    """Run a command and end with its status; say in one line what kept it from running."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        status = command()
    except VdusefastError as error:
        click.echo(f"vdusefast.bench: {error}", err=True)
        status = error.exit_code
    except BrokenPipeError:
        raise  # nobody reads any more: click ends quietly
    except OSError as error:  # of the output, most likely
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"vdusefast.bench: {where}{error.strerror or error}", err=True)
        status = 1
    sys.exit(status)


PATH = click.Path(path_type=Path)


@main.command(short_help="compare vdusefast with other servers of a file")
@click.option("--job", "jobs", multiple=True, metavar="OPTIONS", help="A job, as above. May be given several times.")
@click.option(
    "--peers",
    metavar="LIST",
    help=f"Peers to run, with commas, of: {', '.join(PEERS)}. Default: all that can run here.",
)
@click.option("--variants", default="", metavar="LIST", help="Our settings to compare: 'base:;deep:queue_size=1024'.")
@click.option("--runtime", metavar="TIME", help="Length of one measurement. Default: 2s.")
@click.option("--ramp", metavar="TIME", help="Load before each measurement, not counted. Default: 300ms.")
@click.option("--rounds", type=click.IntRange(1, 1000), help="How often each peer runs each job. Default: 5.")
@click.option("--size", metavar="SIZE", help="Size of the file that each peer serves. Default: 64M.")
@click.option("--backing", metavar="DIR", type=PATH, help="Directory for these files. Default: on a tmpfs.")
@click.option("--queues", type=click.IntRange(1, 64), help="Queues of each peer. Default: 2 on 2 or more CPUs.")
@click.option("--server-cpus", default="", metavar="LIST", help="CPUs of the servers. Default: any.")
@click.option("--driver-cpus", default="", metavar="LIST", help="CPUs of fio. Default: any.")
@click.option(
    "--ioengine", type=click.Choice(["io_uring", "libaio"]), help="Engine of fio. Default: io_uring if it is there."
)
@click.option("--load-modules", is_flag=True, help="Load the kernel modules that peers need.")
@click.option("--json", "json_path", metavar="FILE", type=PATH, help="Write all measurements to this file.")
@click.option("--plot", metavar="FILE", type=PATH, help="Draw a diagram: FILE.png, .svg or .pdf.")
@click.option("--markdown", is_flag=True, help="Print the report as Markdown.")
@click.option("--vm", type=click.Choice(["6.12", "7.3"]), help="Run in a guest with this kernel (needs a source tree).")
@click.option("--icount", is_flag=True, help="With --vm: count instructions in place of time, one boot for each run.")
@click.option("--note", default="", hidden=True)
@click.option("--keep-awake", is_flag=True, hidden=True)
def peers(**options: Any) -> None:
    """Run the same fio jobs on vdusefast and on other servers of a file, and compare.

    A job is written in fio's options: --job "rw=randread bs=4k iodepth=32 numjobs=2". The default is eight jobs:
    random reads and random writes of 4 KiB, each with iodepth 1 and 32 and with 1 and 2 jobs.
    """

    def command() -> int:
        from vdusefast.bench.peers.options import PeersArguments, run_command

        return run_command(PeersArguments(**options))

    _run(command)


@main.command(short_help="kill the processes of a device, and check that no data is lost")
@click.option(
    "--transport", type=click.Choice(["auto", "loopback", "kernel"]), default="auto", help="Transport of the device."
)
@click.option("--kills", metavar="LIST", help="What to do, and how often: see above.")
@click.option("--seed", type=click.IntRange(0, 2**63), default=0, help="Seed of every random choice. Default: 0.")
@click.option("--queues", type=click.IntRange(1, 64), default=2, help="Queues of the device. Default: 2.")
@click.option("--ring", type=click.Choice(list(RINGS)), default="default", help="Format of the rings.")
@click.option("--engine", metavar="NAME", default="auto", help="Engine: auto, sync, uring or memory.")
@click.option(
    "--cache",
    metavar="MODE",
    default="writeback",
    help="Cache mode: writeback, writethrough, none (O_DIRECT) or unsafe.",
)
@click.option("--backend", metavar="URI", help="Store of the device. Default: a temporary file.")
@click.option("--size", metavar="SIZE", help="Size of the area that is written. Default: 8M.")
@click.option(
    "--depth", type=click.IntRange(1, 1024), default=16, help="Requests in flight on each queue. Default: 16."
)
@click.option(
    "--load",
    metavar="TIME",
    help="Load in each cycle, before all is read back. Default: 0.1s, 0.3s on a kernel device.",
)
@click.option("--duration", metavar="TIME", help="Repeat the list of --kills for this long. Default: once.")
@click.option("--give-up", metavar="TIME", help="Count a request as lost after this time. Default: 30s.")
@click.option("--json", "json_path", metavar="FILE", type=PATH, help="Write all findings to this file.")
@click.option("--keep-going", is_flag=True, help="Continue after a loss.")
def torture(**options: Any) -> None:
    """Kill or stop processes of a device at random moments while it is written to.

    \b
    --kills worker=N      kill a worker
            supervisor=N  kill the supervisor
            group=N       kill the supervisor and all workers at once
            relay=N       kill the process that has the store for all queues
            keeper=N      kill the process that keeps the connections to an NBD server
            stall=N       stop a worker or the supervisor for 0.1 to 2 s, then continue it
            restart=N     have the server hand the device over to a new one
            resize=N      make the device larger and smaller again
            fail=N        make the store refuse all writes for 10 to 100 ms
    The default is worker=100,supervisor=20,group=10,stall=5,restart=5.

    After each cycle all acknowledged writes are read back. At the end they are compared with the store.
    The exit status is 1 if data was lost, a request failed, or a process or file was left behind.
    """

    def command() -> int:
        from vdusefast.bench.torture.options import TortureArguments, run_command

        return run_command(TortureArguments(**options))

    _run(command)


if __name__ == "__main__":
    main(prog_name="python -m vdusefast.bench")
