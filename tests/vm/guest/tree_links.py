"""Programs of Debian packages that this machine lacks, in a guest: links to the files of a tree in the kit's cache."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from bench.vm import cache

LIBRARIES = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu")


def link(tree: tuple[str, tuple[str, ...]], places: dict[str, Iterable[str]]) -> None:
    """Put links to files of a tree (cache.tree) where there is none of that name, and to all its libraries.

    places: directories, without a leading slash, and which of their names; none stands for all. Names that the tree
    does not have there are left out: /sbin is a link in some suites, and a directory in others.
    """
    root = cache.tree(*tree)
    for directory, names in {**dict.fromkeys(LIBRARIES, ()), **places}.items():
        place = Path("/") / directory
        place.mkdir(parents=True, exist_ok=True)
        there = set(os.listdir(place))
        available = set(os.listdir(root / directory)) if (root / directory).is_dir() else set()
        for name in available & set(names or available):
            if name not in there:
                (place / name).symlink_to(root / directory / name)
