"""Inside of a guest, as root: what others test disks with, on disks of ours and then on loop devices of the same size.

    other_suites.py programs
    other_suites.py blktests CHECKOUT [TEST...]
    other_suites.py ext4|xfs CHECKOUT [TEST...]    (xfstests on that file system)

Prints a line as each test ends, then a table. The exit status is 1 where a test fails on ours and not on loop.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[2])]  # this directory, and the checkout

import blktests  # noqa: E402
import guest  # noqa: E402
import other_programs  # noqa: E402
import side_by_side  # noqa: E402
import xfstests  # noqa: E402


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=("programs", "blktests", *xfstests.MAKE))
    parser.add_argument("checkout", nargs="?", type=Path, help="a built checkout of blktests or xfstests")
    parser.add_argument("tests", nargs="*", help="only these, such as block/005; default: the ones named in the code")
    words = parser.parse_args()
    if (words.checkout is None) != (words.suite == "programs"):
        parser.error("blktests and xfstests need a checkout, and programs takes none")
    guest.prepare()
    if words.suite == "programs":
        return side_by_side.compare(other_programs.run, other_programs.SIZE_BYTES)
    if words.suite == "blktests":
        suite = partial(blktests.run, checkout=words.checkout, chosen=words.tests)
        return side_by_side.compare(suite, blktests.SIZE_BYTES)
    on = partial(xfstests.run, file_system=words.suite, checkout=words.checkout, chosen=words.tests)
    return side_by_side.compare(on, xfstests.SIZE_BYTES)


if __name__ == "__main__":
    sys.exit(main())
