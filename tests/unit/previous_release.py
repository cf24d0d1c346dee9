"""The release before this one, taken from git's history and built, and a server of it: for tests of an upgrade."""

from __future__ import annotations

import io
import json
import os
import re
import select
import struct
import subprocess
import sys
import sysconfig
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import vdusefast
from vdusefast.state.shared_pages import HEADER_STRUCT, LINE_BYTES, Header

ROOT = Path(__file__).parents[2]
VERSION_FILE = "vdusefast/__init__.py"
SOURCES = ("csrc", "vdusefast", "setup.py", "pyproject.toml", "README.md", "LICENSE")
_STATUS = struct.Struct("=IIiIIII")  # struct vf_shm_status up to inflight_count
BUILD_S = 540.0
READY_S = 120.0

# A server whose store is a file needs one extension, the data path. -O1 halves the time of its build, and changes
# nothing that a driver or another release sees.
_BUILD = """
import runpy, sys
import Cython.Build
cythonize = Cython.Build.cythonize
def of_the_data_path(extensions, **words):
    chosen = [each for each in extensions if each.name.endswith("._datapath")]
    for each in chosen:
        each.extra_compile_args = [*each.extra_compile_args, "-O1"]
    return cythonize(chosen, **words)
Cython.Build.cythonize = of_the_data_path
sys.argv = ["setup.py", "--quiet", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""


def _git(*words: str) -> bytes:
    """Return what git prints, nothing where it fails or is not there."""
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, check=False, timeout=60).stdout
    except FileNotFoundError:
        return b""


def version_at(commit: str) -> str:
    """Return the version of vdusefast at a commit, "" where the history does not tell."""
    found = re.search(rb'^__version__ = "(.*)"$', _git("show", f"{commit}:./{VERSION_FILE}"), re.MULTILINE)
    return found[1].decode() if found else ""


def find_commit() -> str:
    """Return the last commit of a version other than this one, "" where the history does not tell."""
    line = f'__version__ = "{vdusefast.__version__}"'
    bump = _git("log", "-1", "--format=%H", "-S", line, "--", VERSION_FILE).decode().strip()
    commit = f"{bump}^" if bump else "HEAD"  # a version that has not been committed yet follows HEAD
    found = _git("rev-parse", "--verify", "--quiet", commit).decode().strip()
    return found if version_at(found) not in ("", vdusefast.__version__) else ""


def build(commit: str, tree: Path) -> None:
    """Build the sources of a commit in the folder `tree`."""
    with tarfile.open(fileobj=io.BytesIO(_git("archive", commit, *SOURCES))) as archive:
        archive.extractall(tree, filter="data")
    done = subprocess.run(
        [sys.executable, "-c", _BUILD],
        cwd=tree,
        env={**os.environ, "VDUSEFAST_WERROR": "0"},  # today's compiler may warn of what an older one did not
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=BUILD_S,
    )
    assert done.returncode == 0, done.stdout


class Server:
    """A server of the release in `tree`, with a device on the bus of the host at `bus`. A context manager."""

    def __init__(self, tree: Path, bus: Path, base: Path, **config: Any) -> None:
        """Start it, and wait until it serves. config: keywords of `make_config`."""
        script = str(Path(__file__).with_name("previous_server.py"))
        self.path = base / config["name"]
        self.process = subprocess.Popen(
            # Without `site`, whose finder of an editable install would add modules of this release (-S).
            [sys.executable, "-S", script, str(bus), str(base), json.dumps(config)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), sysconfig.get_path("platlib")])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.info: dict[str, Any] = {}
        try:
            assert self.process.stdout is not None
            assert select.select([self.process.stdout], [], [], READY_S)[0]
            line = self.process.stdout.readline()
            assert line, self.end()
            self.info = json.loads(line)
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def inflight_count(self, queue: int) -> int:
        """Return how many requests the worker of `queue` had in flight when it last began to wait.

        The place of this word is the same in the shared pages of every release (`pages_upgrade.py`).
        """
        whole = (self.path / "pages").read_bytes()
        header = Header(*HEADER_STRUCT.unpack_from(whole))
        return int(_STATUS.unpack_from(whole, header.header_bytes + queue * header.queue_stride_bytes + LINE_BYTES)[-1])

    def end(self) -> str:
        """Kill it, if it still runs, with kill -9. Returns what it has written to standard error."""
        with suppress(ProcessLookupError):
            self.process.kill()
        return self.process.communicate(timeout=READY_S)[1]
