"""Build the two extensions; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
from glob import glob
from typing import Any

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CFLAGS = ["-O3", "-std=gnu11", "-Wall", "-Wextra"]
# An installer with a compiler newer than ours can turn this off: VDUSEFAST_WERROR=0.
if os.environ.get("VDUSEFAST_WERROR", "1") != "0":
    CFLAGS.append("-Werror")

# What Cython's own boilerplate triggers; csrc is compiled without these.
CYTHON_CFLAGS = ["-Wno-unused-parameter", "-Wno-unused-function", "-Wno-missing-field-initializers"]
CYTHON_DIR = os.path.join("build", "cython")

# In a source tree of one's own an edit of any of these rebuilds both extensions.
HEADERS = sorted(glob("csrc/*.h") + glob("vdusefast/*.pxd"))


class BuildExt(build_ext):
    """Compile with warnings relaxed for generated sources only."""

    def build_extensions(self) -> None:
        """Wrap the compiler so that files below CYTHON_DIR get CYTHON_CFLAGS as well."""
        compile_one = self.compiler._compile

        def _compile(obj: str, src: str, ext: str, cc_args: Any, extra: list[str], pp_opts: Any) -> None:
            if CYTHON_DIR in os.path.normpath(src):
                extra = [*extra, *CYTHON_CFLAGS]
            compile_one(obj, src, ext, cc_args, extra, pp_opts)

        self.compiler._compile = _compile
        super().build_extensions()


def extension(name: str, sources: list[str], libraries: list[str]) -> list[Extension]:
    """Return the extension whose Cython source is `vdusefast/<name>.pyx`, with the C files beside it."""
    pyx = f"vdusefast/{name}.pyx"
    if not os.path.exists(pyx):
        return []
    return [
        Extension(
            f"vdusefast.{name}",
            [pyx, *sources],
            include_dirs=["csrc", "vdusefast"],
            libraries=libraries,
            extra_compile_args=CFLAGS,
            depends=HEADERS,
        )
    ]


setup(
    cmdclass={"build_ext": BuildExt},
    ext_modules=cythonize(
        extension("_datapath", sorted(glob("csrc/*.c")), ["uring"]) + extension("_driver", [], []),
        build_dir=CYTHON_DIR,
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
        },
    ),
)
