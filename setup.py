"""Build the extensions; everything else about the package is in pyproject.toml.

Those of some backends need a library: one whose header is not there is left out, which `vdusefast check` tells.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import shlex
import subprocess
import sys
from glob import glob
from pathlib import Path
from typing import NamedTuple

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# For tests alone: a build for which -O0 is enough takes a third of the time.
CFLAGS = [os.environ.get("VDUSEFAST_OPTIMIZE", "-O3"), "-std=gnu11", "-Wall", "-Wextra"]
# An installer with a compiler newer than ours can turn this off: VDUSEFAST_WERROR=0.
if os.environ.get("VDUSEFAST_WERROR", "1") != "0":
    CFLAGS.append("-Werror")

# For tests alone: a data path with a fault (csrc/base/seed_fault.h), in a directory of its own
# (--build-lib, --build-temp).
if fault := os.environ.get("VDUSEFAST_SEED_FAULT"):
    CFLAGS.append(f"-DVF_SEED_FAULT={int(fault)}")

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": False,
}

# The folders of csrc that make up the data path; each of the others belongs to one extension.
DATAPATH = ("base", "memory", "ring", "engine", "queue")

# An edit of any of these rebuilds all extensions.
HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("vdusefast/**/*.pxd", recursive=True))

# What processes of a device share besides: what they tell each other, and the layout of the shared pages.
SHARED_MODULES = [
    f"vdusefast/{name}.py"
    for name in (
        *("backends/plugin", "backends/probe", "base/build", "base/handed"),
        *("state/shared_pages", "worker/protocol", "worker/relay"),
    )
]


def build_id() -> str:
    """Return the identity of this build (base/build.py): its version, and a digest of what its parts share."""
    version = re.search(r'__version__ = "(.*)"', Path("vdusefast/__init__.py").read_text())
    assert version
    digest = hashlib.sha256()
    for name in [*HEADERS, *SHARED_MODULES]:
        content = Path(name).read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return f"{version[1]}-{digest.hexdigest()[:16]}"


BUILD_ID = build_id()


class BuildExtensions(build_ext):
    """Build all extensions of one build, and write its identity beside the modules."""

    def run(self) -> None:
        """Build. Rebuild an extension of another build, however new it is."""
        package = Path("." if self.inplace else self.build_lib) / "vdusefast"
        path = package / "build_id.txt"
        if not path.exists() or path.read_text().strip() != BUILD_ID:
            self.force = True
        super().run()
        if package.is_dir():
            path.write_text(f"{BUILD_ID}\n")

    def build_extensions(self) -> None:
        """Have the identity in each extension, from an object that all share."""
        macros = [("VF_BUILD_ID", f'"{BUILD_ID}"')]
        objects = self.compiler.compile(
            ["csrc/identity/build_id.c"], self.build_temp, macros, ["csrc"], extra_postargs=CFLAGS
        )
        for one in self.extensions:
            one.extra_objects = [*one.extra_objects, *objects]
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        """Build one extension in a directory of its own: others that have the same C files are built meanwhile."""
        own = copy.copy(self)
        own.build_temp = os.path.join(self.build_temp, ext.name)
        super(BuildExtensions, own).build_extension(ext)


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


def c_files(*folders: str) -> list[str]:
    """Return the C files of these folders of csrc."""
    return sorted(path for folder in folders for path in glob(f"csrc/{folder}/*.c"))


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


def preload_library() -> Extension:
    """Return the library that programs preload. It is no module: it has only the functions that it stands before."""
    return Extension(
        "vdusefast.driver._preload",
        [*c_files("preload"), "csrc/base/page.c"],
        include_dirs=["csrc"],
        extra_compile_args=[*CFLAGS, "-fvisibility=hidden"],
        depends=HEADERS,
    )


def can_link(header: str, libraries: list[str]) -> bool:
    """Return whether a program with that header and those libraries can be built here."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    command = [*compiler, "-x", "c", "-", "-o", os.devnull, *(f"-l{name}" for name in libraries)]
    program = f"#include <{header}>\nint main(void) {{ return 0; }}\n"
    try:
        return subprocess.run(command, input=program, text=True, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def chosen(modules: list[Extension]) -> list[Extension]:
    """Return those that $VDUSEFAST_EXTENSIONS names, else all. For tests alone: a second build need not be whole."""
    names = os.environ.get("VDUSEFAST_EXTENSIONS", "").split()
    return [one for one in modules if not names or one.name.removeprefix("vdusefast.") in names]


def optional_extensions() -> list[Extension]:
    """Return those whose libraries are here, and name the others."""
    found = []
    for one in OPTIONAL:
        if can_link(one.header, one.libraries):
            found.append(extension(f"backends.{one.name}", c_files(one.directory), one.libraries))
        else:
            print(f"without backend {one.directory}: there is no {one.header} ({one.package})", file=sys.stderr)
    return found


setup(
    cmdclass={"build_ext": BuildExtensions},
    options={"build_ext": {"parallel": os.cpu_count()}},
    ext_modules=cythonize(
        chosen(
            [
                extension("worker._datapath", c_files(*DATAPATH), ["uring"]),
                extension("driver._driver", [], []),
                extension("driver._board", c_files("board"), []),
                preload_library(),
                extension("backends._relay", c_files("relay"), []),
                extension("backends._driver_memory", [], []),
                extension("backends._python_pieces", c_files("python"), []),
                extension("backends._python", c_files("python"), []),
                *optional_extensions(),
            ]
        ),
        build_dir=os.path.join("build", "cython"),
        compiler_directives=DIRECTIVES,
    ),
)
