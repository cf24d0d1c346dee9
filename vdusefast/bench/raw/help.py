"""The text of `python -m vdusefast.bench raw --help`."""

from __future__ import annotations

from vdusefast.bench.common.device_options import HELP, option_lines
from vdusefast.bench.raw.jobs import JOB_HELP, REPORT_HELP


def option_help() -> str:
    """Return the list of all options with their meaning."""
    lines = ["Usage: python -m vdusefast.bench raw [OPTION...]", "", "Options:"]
    return "\n".join([*lines, *option_lines(JOB_HELP | HELP | REPORT_HELP)])
