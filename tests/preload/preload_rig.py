"""A stand-in disk for tests of the interception layer: its C files with the double of the ring side (disk_double.c)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
RING_SIDE = {"attach.c", "disk.c", "plain.c", "regions.c", "send.c", "wait.c"}  # what the double stands for
CAPACITY_BYTES = 8 << 20
WARNINGS = ("-Wall", "-Wextra", "-Werror")
CHECKS = ("-fsanitize=undefined", "-fno-sanitize-recover=all")
FLAGS = ("-std=gnu11", *WARNINGS, *CHECKS, "-fPIC", "-shared", "-fvisibility=hidden", "-O1", "-g", "-Icsrc")


def build(library: Path) -> Path:
    """Build the interception layer with the double."""
    sources = [path for path in sorted((ROOT / "csrc/preload").glob("*.c")) if path.name not in RING_SIDE]
    sources += [ROOT / "csrc/base/page.c", Path(__file__).with_name("disk_double.c")]
    subprocess.run(["cc", *FLAGS, "-o", library, *sources], cwd=ROOT, check=True, timeout=60)
    return library


class Disk:
    """A disk in a file `store`, which programs see as `path`."""

    def __init__(self, library: Path, directory: Path, **settings: str) -> None:
        self.store = directory / "store"
        self.path = directory / "disk"
        self.store.touch()
        os.truncate(self.store, CAPACITY_BYTES)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stand_in:
            stand_in.bind(str(self.path))
        self.environment = {
            **os.environ,
            "LD_PRELOAD": str(library),
            "VDUSEFAST_ATTACH": str(self.path),
            "VDUSEFAST_DOUBLE": str(self.store),
            **{f"VDUSEFAST_DOUBLE_{name.upper()}": value for name, value in settings.items()},
        }

    def run(self, *command: str | Path, status: int = 0, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run a program, and return it once it has ended with that status."""
        words = [str(word) for word in command]
        done = subprocess.run(
            words, env=self.environment, cwd=self.path.parent, input=stdin, capture_output=True, timeout=45, check=False
        )
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout!r}\n{done.stderr.decode()}"
        return done

    def python(self, code: str, *words: str) -> str:
        """Run a Python program, which finds the disk's path and its store in argv. Returns what it prints."""
        return self._python(code, *words).stdout.decode()

    def python_says(self, code: str) -> str:
        """Run a Python program, and return what it writes on stderr."""
        return self._python(code).stderr.decode()

    def _python(self, code: str, *words: str) -> subprocess.CompletedProcess[bytes]:
        program = "import errno, fcntl, os, struct, sys\nPATH, STORE = sys.argv[1:3]\n" + textwrap.dedent(code)
        return self.run(sys.executable, "-I", "-c", program, self.path, self.store, *words)
