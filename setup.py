"""Build the two extensions; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
from glob import glob

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

# An edit of any of these rebuilds both extensions.
HEADERS = sorted(glob("csrc/*.h") + glob("vdusefast/*.pxd"))


def extension(name: str, sources: list[str], libraries: list[str]) -> Extension:
    """Return the extension of vdusefast/<name>.pyx together with C files of csrc."""
    return Extension(
        f"vdusefast.{name}",
        [f"vdusefast/{name}.pyx", *sources],
        include_dirs=["csrc", "vdusefast"],
        libraries=libraries,
        extra_compile_args=CFLAGS,
        depends=HEADERS,
    )


setup(
    ext_modules=cythonize(
        [extension("_datapath", sorted(glob("csrc/*.c")), ["uring"]), extension("_driver", [], [])],
        build_dir=os.path.join("build", "cython"),
        compiler_directives=DIRECTIVES,
    ),
)
