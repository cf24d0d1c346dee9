"""Build the extensions; everything else about the package is in pyproject.toml.

Those of some backends need a library: one whose header is not there is left out, which `vdusefast check` tells.
"""

from __future__ import annotations

import os
import subprocess
import sys
from glob import glob
from typing import NamedTuple

from Cython.Build import cythonize
from setuptools import Extension, setup

CFLAGS = ["-O3", "-std=gnu11", "-Wall", "-Wextra"]
# An installer with a compiler newer than ours can turn this off: VDUSEFAST_WERROR=0.
if os.environ.get("VDUSEFAST_WERROR", "1") != "0":
    CFLAGS.append("-Werror")

# For tests alone: a data path with a fault (csrc/seed_fault.h), in a directory of its own (--build-lib, --build-temp).
if fault := os.environ.get("VDUSEFAST_SEED_FAULT"):
    CFLAGS.append(f"-DVF_SEED_FAULT={int(fault)}")

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": False,
}

# An edit of any of these rebuilds all extensions.
HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("vdusefast/**/*.pxd", recursive=True))


class Optional(NamedTuple):
    """The extension of a backend: vdusefast/backends/<name>.pyx with csrc/<directory>/*.c."""

    name: str
    directory: str
    header: str
    libraries: list[str]
    package: str  # Debian's, which has the header


OPTIONAL = [
    Optional("_nbd", "nbd", "libnbd.h", ["nbd"], "libnbd-dev"),
    Optional("_rbd", "rbd", "rbd/librbd.h", ["rbd", "rados"], "librbd-dev"),
]


def extension(name: str, sources: list[str], libraries: list[str]) -> Extension:
    """Return the extension of vdusefast/<name>.pyx, with dots for slashes, together with C files of csrc."""
    return Extension(
        f"vdusefast.{name}",
        [f"vdusefast/{name.replace('.', '/')}.pyx", *sources],
        include_dirs=["csrc", "vdusefast"],
        libraries=libraries,
        extra_compile_args=CFLAGS,
        depends=HEADERS,
    )


def can_link(header: str, libraries: list[str]) -> bool:
    """Return whether a program with that header and those libraries can be built here."""
    command = [os.environ.get("CC", "cc"), "-x", "c", "-", "-o", os.devnull, *(f"-l{name}" for name in libraries)]
    program = f"#include <{header}>\nint main(void) {{ return 0; }}\n"
    try:
        return subprocess.run(command, input=program, text=True, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def optional_extensions() -> list[Extension]:
    """Return those whose libraries are here, and name the others."""
    found = []
    for one in OPTIONAL:
        if can_link(one.header, one.libraries):
            sources = sorted(glob(f"csrc/{one.directory}/*.c"))
            found.append(extension(f"backends.{one.name}", sources, one.libraries))
        else:
            print(f"without backend {one.directory}: there is no {one.header} ({one.package})", file=sys.stderr)
    return found


setup(
    options={"build_ext": {"parallel": os.cpu_count()}},
    ext_modules=cythonize(
        [
            extension("_datapath", sorted(glob("csrc/*.c")), ["uring"]),
            extension("_driver", [], []),
            extension("backends._relay", sorted(glob("csrc/relay/*.c")), []),
            extension("backends._driver_memory", [], []),
            extension("backends._python_pieces", sorted(glob("csrc/python/*.c")), []),
            extension("backends._python", sorted(glob("csrc/python/*.c")), []),
            *optional_extensions(),
        ],
        build_dir=os.path.join("build", "cython"),
        compiler_directives=DIRECTIVES,
    ),
)
