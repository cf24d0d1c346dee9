"""Entry of `python -m vdusefast.bench`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import click

from vdusefast.bench.fio.help import option_help
from vdusefast.bench.fio.jobs import parse_arguments
from vdusefast.bench.torture.plan import RINGS
from vdusefast.errors import VdusefastError

RAW = {"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []}


@click.group()
def main() -> None:
    """Measure block devices that vdusefast serves."""


@main.command(context_settings=RAW, short_help="run jobs in fio's vocabulary")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def fio(arguments: tuple[str, ...]) -> None:
    """Run jobs in fio's vocabulary on a device made for the purpose."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        click.echo("Usage: python -m vdusefast.bench fio [OPTION...] [JOBFILE...]\n")
        click.echo(option_help())
        return
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        from vdusefast.bench.fio.command import run_plan

        status = run_plan(parse_arguments(arguments))
    except VdusefastError as error:
        click.echo(f"vdusefast.bench: {error}", err=True)
        status = error.exit_code
    sys.exit(status)


PATH = click.Path(path_type=Path)


@main.command(short_help="compare with other ways to serve a file")
@click.option("--job", "jobs", multiple=True, metavar="OPTIONS", help="See above; may be repeated.")
@click.option("--peers", metavar="LIST", help="Names, with commas. Default: all that can run here.")
@click.option("--variants", default="", metavar="LIST", help="Of ourselves, each a peer: 'base:;deep:queue_size=1024'.")
@click.option("--runtime", metavar="TIME", help="Of one measurement. Default: 2s.")
@click.option("--ramp", metavar="TIME", help="Before each measurement, not counted. Default: 300ms.")
@click.option("--rounds", type=click.IntRange(1, 1000), help="How often each peer runs each job. Default: 5.")
@click.option("--size", metavar="SIZE", help="Of the file that each peer serves. Default: 64M.")
@click.option("--backing", metavar="DIR", type=PATH, help="Where these files are made. Default: a tmpfs.")
@click.option("--queues", type=click.IntRange(1, 64), help="Of each peer. Default: 2 where there are 2 CPUs.")
@click.option("--server-cpus", default="", metavar="LIST", help="CPUs of the servers. Default: any.")
@click.option("--driver-cpus", default="", metavar="LIST", help="CPUs of fio. Default: any.")
@click.option("--ioengine", type=click.Choice(["io_uring", "libaio"]), help="Of fio. Default: io_uring if it is there.")
@click.option("--load-modules", is_flag=True, help="Load the kernel modules that peers need.")
@click.option("--json", "json_path", metavar="FILE", type=PATH, help="Write everything measured there.")
@click.option("--plot", metavar="FILE", type=PATH, help="Draw it: FILE.png, .svg or .pdf.")
@click.option("--markdown", is_flag=True, help="Print Markdown.")
@click.option("--vm", type=click.Choice(["6.12", "7.3"]), help="In a guest with this kernel, from a source tree.")
@click.option("--icount", is_flag=True, help="With --vm: time is a count of instructions, one boot a measurement.")
@click.option("--note", default="", hidden=True)
@click.option("--keep-awake", is_flag=True, hidden=True)
def peers(**options: Any) -> None:
    """Run the same jobs by fio on vdusefast and on other ways to serve a file, and compare.

    A job is written in fio's options: --job "rw=randread bs=4k iodepth=32 numjobs=2". Without any there are eight:
    random reads and writes of 4 KiB, iodepth 1 and 32, 1 and 2 jobs.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        from vdusefast.bench.peers.options import run_command

        status = run_command(**options)
    except VdusefastError as error:
        click.echo(f"vdusefast.bench: {error}", err=True)
        status = error.exit_code
    sys.exit(status)


@main.command(short_help="kill what serves a device, and look whether anything is lost")
@click.option("--transport", type=click.Choice(["auto", "loopback", "kernel"]), default="auto", help="Of the device.")
@click.option("--kills", metavar="LIST", help="How often what is done: see above.")
@click.option("--seed", type=click.IntRange(0, 2**63), default=0, help="Of every random choice. Default: 0.")
@click.option("--queues", type=click.IntRange(1, 64), default=2, help="Of the device. Default: 2.")
@click.option("--ring", type=click.Choice(list(RINGS)), default="default", help="Format of the queues' rings.")
@click.option("--engine", metavar="NAME", default="auto", help="auto, sync, uring or memory.")
@click.option(
    "--cache", metavar="MODE", default="writeback", help="writeback, writethrough, none (O_DIRECT) or unsafe."
)
@click.option("--backend", metavar="URI", help="Default: a temporary file.")
@click.option("--size", metavar="SIZE", help="Of what is written to. Default: 8M.")
@click.option(
    "--depth", type=click.IntRange(1, 1024), default=16, help="Requests in flight on each queue. Default: 16."
)
@click.option(
    "--load", metavar="TIME", help="Of each cycle, before all is read back. Default: 0.1s, on a kernel device 0.3s."
)
@click.option("--duration", metavar="TIME", help="Go on with this mix for so long, rather than once.")
@click.option("--give-up", metavar="TIME", help="A request unanswered for so long is lost. Default: 30s.")
@click.option("--json", "json_path", metavar="FILE", type=PATH, help="Write everything found there.")
@click.option("--keep-going", is_flag=True, help="Go on after a loss.")
def torture(**options: Any) -> None:
    """Kill workers, supervisors and all of them at random moments while a device is written to; stop some for a while.

    \b
    --kills worker=N      kill a worker
            supervisor=N  kill the supervisor
            group=N       kill all of them at once
            relay=N       kill the process that has a store for all queues
            keeper=N      kill the process that keeps the connections to an NBD server
            stall=N       stop a worker or the supervisor for 0.1 to 2 s
            restart=N     have the server hand the device over to a new one
            resize=N      make the device larger and smaller again
            fail=N        have the store refuse all writes for 10 to 100 ms
    The default is worker=100,supervisor=20,group=10,stall=5,restart=5.

    Every write that was acknowledged is read back after each cycle, and compared with the store at the end.
    The exit status is 1 when anything was lost, answered with an error, or left behind.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        from vdusefast.bench.torture.options import run_command

        status = run_command(**options)
    except VdusefastError as error:
        click.echo(f"vdusefast.bench: {error}", err=True)
        status = error.exit_code
    sys.exit(status)


if __name__ == "__main__":
    main(prog_name="python -m vdusefast.bench")
