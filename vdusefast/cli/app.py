"""The command line. A failure is one line on stderr that says what to do, and an exit status of errors.py."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

import click

import vdusefast
from vdusefast.base.columns import terminal_width, wrap
from vdusefast.base.printable import printable
from vdusefast.base.secret import redact
from vdusefast.cli import manage, recover, serve
from vdusefast.cli import resize as cli_resize
from vdusefast.cli import run as cli_run
from vdusefast.cli import systemd as cli_systemd
from vdusefast.errors import KernelSupportError, VdusefastError

TEXT_COLUMN = 22  # of the findings of `check`
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # as a shell reports SIGINT


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(vdusefast.__version__, prog_name="vdusefast", message="%(prog)s %(version)s")
def cli() -> None:
    """Serve VDUSE block devices from Python at the speed of C."""


for _command in (
    serve.add,
    serve.serve,
    cli_run.run,
    manage.delete,
    manage.list_devices,
    manage.show,
    manage.stats,
    recover.recover,
    recover.restart,
    cli_resize.resize,
    cli_systemd.systemd_unit,
    cli_systemd.systemd_reload,
):
    cli.add_command(_command)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def check(as_json: bool) -> None:
    """Say what works on this machine, what does not, and the remedy.

    The exit status is 0 when devices can be served over the loopback transport, which needs no kernel module, else 5.
    """
    from vdusefast import doctor

    findings = doctor.examine()
    if as_json:
        click.echo(json.dumps(doctor.to_dict(findings), indent=2))
    else:
        width = terminal_width(sys.stdout)
        for finding in findings:
            _print_finding(finding, width)
    missing = [finding.name for finding in findings if finding.needed and not finding.ok]
    if missing:
        raise KernelSupportError(f"devices cannot be served here: {', '.join(missing)}; see the remedies above")


def _print_finding(finding: vdusefast.doctor.Finding, width: int | None) -> None:
    """Print a finding and its remedy. width: of the terminal."""
    mark, colour = ("ok", "green") if finding.ok else ("NO", "red") if finding.needed else ("no", "yellow")
    line = wrap(f"{mark:3}{finding.name:18} {finding.text}", width, TEXT_COLUMN)
    click.echo(f"{click.style(line[:3], fg=colour)}{line[3:]}")
    if finding.remedy:
        click.echo(wrap(f"{'':{TEXT_COLUMN - 1}} remedy: {finding.remedy}", width, TEXT_COLUMN))


def run(args: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status. `args` is None for the process's own."""
    try:
        result = cli.main(args=args, prog_name="vdusefast", standalone_mode=False)
    except VdusefastError as error:
        return _fail(str(error), error.exit_code, getattr(error, "__notes__", ()))
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return EXIT_USAGE
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", EXIT_INTERRUPTED)
    except OSError as error:  # of the output, most likely
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", EXIT_FAILURE)
    return result if isinstance(result, int) else 0


def _fail(message: str, exit_code: int, notes: Sequence[str] = ()) -> int:
    """Say what has failed, after the lines that led to it."""
    if sys.stderr is not None:  # None when it was closed as we were started
        with suppress(OSError):  # there is nobody left to tell
            for line in "\n".join(notes).splitlines():
                print(printable(redact(line)), file=sys.stderr)
            print(f"vdusefast: {printable(redact(message))}", file=sys.stderr)
    return exit_code


def main() -> None:
    """Run the process's command line and exit with its status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the terminal's encoding may not have every character
    status = run()
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # told already; the interpreter would try again, and complain in its own way
        null_fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(null_fd, sys.stdout.fileno())
        os.close(null_fd)
    sys.exit(status)
