"""The command line of the guest kit."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from bench.vm import cache, guest, machine
from bench.vm.errors import GuestError
from bench.vm.kernel_log import findings
from bench.vm.machine import ROOT, GuestConfig

EPILOG = """\
Options end at --. The command runs as root, in this directory or else in the checkout, with the checkout's environment
first in PATH. It sees the host's files; files that it writes are gone afterwards, except below --results.
Exit status: the command's own; 124 when the time was up; 125 when there was no guest or it crashed; 1 for --check-log.
In the guest's environment: VDUSEFAST_VM (the kernel asked for), VDUSEFAST_LIBBLKIO (libblkio.so.1 of Debian trixie),
VDUSEFAST_VM_RESULTS and VDUSEFAST_VM_DISK with --results and --disk.
Kernels are fetched from Debian when first asked for, and kept in VDUSEFAST_VM_CACHE (~/.cache/vdusefast/vm)."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="bench/vm/run",
        usage="%(prog)s [OPTION...] -- COMMAND...",
        description="Boot a Debian kernel under software emulation, run a command in it and return its exit status.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--kernel", choices=cache.ALL_KERNELS, default=cache.KERNELS[0], help="default: %(default)s")
    add("--cpus", type=int, default=2, metavar="N", help="default: %(default)s")
    add("--memory", default="3G", metavar="SIZE", help="of the guest; its files lie there too; default: %(default)s")
    add("--timeout", type=float, default=120, metavar="SECONDS", help="for all of it; default: %(default)s")
    add("--disk", default="", metavar="SIZE", help="add an empty virtio-blk disk, for example 1G")
    add("--network", action="store_true", help="add a network card; 127.0.0.1 of this machine is 10.0.2.2 in the guest")
    add(
        "--clock", choices=machine.CLOCKS, default="steady", help="how time passes: see README.md; default: %(default)s"
    )
    add("--icount", dest="clock", action="store_const", const="counted", help="the same as --clock counted")
    add(
        "--instruction-ns",
        type=int,
        choices=(1, 2, 4, 8),
        default=machine.INSTRUCTION_NS,
        help="how fast the guest shows itself by a clock that counts; default: %(default)s",
    )
    add("--systemd", action="store_true", help="systemd is process 1; the command is a service, and may end the guest")
    add("--over", type=Path, metavar="DIR", help="its files lie over the host's, for example a newer systemd")
    add("--before", default="", metavar="COMMANDS", help="shell commands to run before systemd starts")
    add("--accel", choices=("tcg", "kvm"), default="tcg", help="default: tcg, software emulation")
    add("--append", action="append", default=[], metavar="ARGUMENT", help="further kernel argument; may be repeated")
    add("--module", action="append", default=[], metavar="NAME", help="kernel module to load first; may be repeated")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="for the command; may be repeated")
    add("--results", type=Path, metavar="DIR", help="directory that the guest may write to")
    add("--log", type=Path, metavar="FILE", help="write the kernel log there")
    add("--check-log", action="store_true", help="fail where the kernel log has warnings, hangs, crashes or I/O errors")
    add("--verbose", action="store_true", help="say how long the boot took")
    add("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command in a guest and return the exit status."""
    options = parser().parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser().error("no command; write it after --")
    if options.results is not None and not options.results.is_dir():
        parser().error(f"{options.results} is no directory")
    if options.before and not options.systemd:
        parser().error("--before is what is done before systemd starts; add --systemd")
    if options.clock == "counted" and options.accel != "tcg":
        parser().error("--clock counted counts the instructions of software emulation; leave --accel out")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    try:
        return _run(options, command)
    except GuestError as error:
        _say(str(error))
        return error.exit_status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads: nothing is to be flushed at exit either
        return 128 + signal.SIGPIPE


def _run(options: argparse.Namespace, command: list[str]) -> int:
    here = Path.cwd()
    config = GuestConfig(
        kernel=options.kernel,
        cpus=options.cpus,
        memory=options.memory,
        timeout_s=options.timeout,
        disk=options.disk,
        network=options.network,
        clock=options.clock,
        instruction_ns=options.instruction_ns,
        accel=options.accel,
        kernel_arguments=tuple(options.append),
        modules=tuple(options.module),
        systemd=options.systemd,
        over=options.over,
        before=options.before,
        results=options.results,
        directory=here if here.is_relative_to(ROOT) else ROOT,
        environment=dict(entry.partition("=")[::2] for entry in options.env),
    )
    kernel_log = ""
    try:
        outcome = guest.run(config, command)
        kernel_log = outcome.kernel_log
    except GuestError as error:
        kernel_log = error.kernel_log
        raise
    finally:
        if options.log is not None:
            options.log.write_text(kernel_log)
    if options.verbose:
        _say(f"booted in {outcome.boot_s:.1f} s, {outcome.total_s:.1f} s in all")
    if outcome.went_down:
        _say(f"{outcome.went_down}, after {outcome.down_s:.1f} s")
    found = findings(kernel_log) if options.check_log else []
    if found:
        _say("the kernel log is not clean:", *found)
    return outcome.status or (1 if found else 0)


def _say(*lines: str) -> None:
    print("bench/vm/run:", "\n  ".join(lines), file=sys.stderr)


def _end(number: int, _frame: FrameType | None) -> None:
    """End as the signal asks for, but through what cleans up."""
    sys.exit(128 + number)
