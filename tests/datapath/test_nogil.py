"""The C that Cython makes of the worker's loop: it calls nothing of the interpreter, and no compiler warns of it."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
MODULES = ("_loop", "_completion", "_virtio_blk", "_recover")
SOURCES = [f"vdusefast/worker/{name}.pxd" for name in MODULES]
MANGLED = "|".join(f"{len(name)}{name}" for name in MODULES)
DEFINITION = re.compile(
    rf"^static [^;={{}}]*?\b__pyx_f_9vdusefast_6worker_(?:{MANGLED})_(?P<name>\w+)\([^;{{}}]*\) \{{$", re.M
)
FORBIDDEN = re.compile(r"\b(?:_?Py[A-Z_]\w*|__Pyx_(?!pretend_to_initialize|unreachable)\w*|__pyx_(?:L\d+_error|m|b)\b)")


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("cython") / "_datapath.c"
    directives = "boundscheck=False,wraparound=False,cdivision=True,initializedcheck=False"
    command = [sys.executable, "-m", "cython", "-3", "-X", directives, "-I", ".", "-o", str(out)]
    subprocess.run([*command, "vdusefast/worker/_datapath.pyx"], cwd=ROOT, check=True, timeout=50)
    return out.read_text()


def bodies(source: str) -> dict[str, str]:
    """Return the functions of the loop and of the parser by name; Cython ends each with a brace in the first column."""
    return {m["name"]: source[m.end() : source.index("\n}\n", m.end())] for m in DEFINITION.finditer(source)}


def written() -> set[str]:
    """Return the names of the functions that the sources define."""
    names = re.compile(r"^cdef inline .*?\b(\w+)\(", re.M)
    return {name for path in SOURCES for name in names.findall((ROOT / path).read_text())}


def test_every_function_of_the_loop_is_found(generated: str) -> None:
    assert set(bodies(generated)) == written()
    assert {"queue_run", "queue_round", "queue_pop", "blk_parse", "blk_map"} <= written()


def test_the_loop_calls_nothing_of_python(generated: str) -> None:
    without_comments = re.sub(r"/\*.*?\*/", "", generated, flags=re.S)
    found = {name: FORBIDDEN.findall(body) for name, body in bodies(without_comments).items()}
    assert {name: calls for name, calls in found.items() if calls} == {}


def test_the_strict_compiler_has_no_warning(generated: str, tmp_path: Path) -> None:
    make = ["make", "--silent", "--eval=flags: ; @echo $(CC) $(C_STRICT)", "flags"]
    flags = subprocess.run(make, cwd=ROOT, check=True, capture_output=True, text=True, timeout=30).stdout.split()
    assert "-Wshadow" in flags
    (tmp_path / "loop.c").write_text(generated)
    python = f"-isystem{sysconfig.get_path('include')}"
    done = subprocess.run(
        [*flags, python, tmp_path / "loop.c"], cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_search_does_find_python_calls() -> None:
    assert FORBIDDEN.findall("  PyErr_Occurred(); __Pyx_AddTraceback(x); __pyx_L1_error:;") == [
        "PyErr_Occurred",
        "__Pyx_AddTraceback",
        "__pyx_L1_error",
    ]
