"""The text of `python -m vdusefast.bench raw --help`."""

from __future__ import annotations

from vdusefast.bench.common.device_options import HELP
from vdusefast.bench.raw.jobs import JOB_HELP, REPORT_HELP


def option_help() -> str:
    """Return the list of all options with their meaning."""
    options = JOB_HELP | HELP | REPORT_HELP
    width = 2 + max(len(name) for name in options)
    lines = ["Usage: python -m vdusefast.bench raw [OPTION...]", "", "Options:"]
    return "\n".join([*lines, *(f"  --{name.replace('_', '-'):<{width}} {text}" for name, text in options.items())])
