"""Entry of `python -m vdusefast.bench`."""

from __future__ import annotations

import logging
import sys

import click

from vdusefast.bench.help import option_help
from vdusefast.bench.jobs import parse_arguments
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
        from vdusefast.bench.fio import run_plan

        status = run_plan(parse_arguments(arguments))
    except VdusefastError as error:
        click.echo(f"vdusefast.bench: {error}", err=True)
        status = error.exit_code
    sys.exit(status)


if __name__ == "__main__":
    main(prog_name="python -m vdusefast.bench")
