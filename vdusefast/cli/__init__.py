"""The command line: what a person types.

`run` and `main` stay here: the command `vdusefast`, and servers of earlier builds, which start the files that are on
disk in their place, call them by these names.
"""

from vdusefast.cli.app import main, run

__all__ = ["main", "run"]
