"""The packages that are built, a newcomer's set-up, and the promises of the test suite itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from setuptools import find_packages

import vdusefast

ROOT = Path(__file__).parents[2]
SOURCES = ["setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "docs", "csrc", "vdusefast"]


def run(
    command: list[object], cwd: Path, *, env: dict[str, str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=280)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of what is needed to build, without anything that was built."""
    copy = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, copy / name)
    return copy


@pytest.fixture(scope="module")
def archives(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a wheel and a source archive, built without network by the tools that the tests run with.

    The wheel is built from what the source archive holds: what is missing there is missing in a build. It has the
    extensions that a device needs, which the compiler does not optimize: that is a fifth of the work.
    """
    out = tmp_path_factory.mktemp("dist")
    env = {**os.environ, "VDUSEFAST_OPTIMIZE": "-O0", "VDUSEFAST_EXTENSIONS": "worker._datapath driver._driver"}
    code = "import sys; from setuptools.build_meta import build_sdist; print(build_sdist(sys.argv[1]))"
    name = run([sys.executable, "-c", code, out], tree, env=env).stdout.split()[-1]
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run([*wheel, "--no-index", "--wheel-dir", out, out / name], out, env=env)
    (found,) = out.glob("*.whl")
    return found, out / name


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_source_archive_holds_every_source(archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for pattern in ("docs/**/*.md", "csrc/**/*.[ch]", "vdusefast/**/*.py", "vdusefast/*.py[xi]", "vdusefast/*.pxd"):
        expected = {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)}
        assert expected <= names
    assert {"vdusefast/py.typed", "LICENSE", "README.md", "pyproject.toml", "setup.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_wheel_holds_modules_types_and_extensions_and_no_sources(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[0]) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"vdusefast-{vdusefast.__version__}.dist-info/METADATA").decode()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "vdusefast").rglob("*.py")}
    stubs = {str(path.relative_to(ROOT)) for path in (ROOT / "vdusefast").rglob("*.pyi")}
    assert modules | stubs | {"vdusefast/py.typed", "vdusefast/server/systemd/vdusefast@.service"} <= names
    for extension in ("worker/_datapath", "driver/_driver"):
        assert [name for name in names if name.startswith(f"vdusefast/{extension}.") and name.endswith(".so")]
    assert not [name for name in names if name.endswith((".c", ".h", ".pyx", ".pxd"))]
    assert any(name.endswith("LICENSE") for name in names)
    assert f"Version: {vdusefast.__version__}\n" in metadata
    assert "Requires-Python: >=3.11" in metadata


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_wheel_works_in_an_environment_of_its_own(archives: tuple[Path, Path], tmp_path: Path) -> None:
    """Dependencies come from the running environment, so that no network is needed; the package does not."""
    venv = tmp_path / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", venv], tmp_path)
    python = venv / "bin/python"
    run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", archives[0]], tmp_path)
    dependencies = tmp_path / "dependencies"
    dependencies.mkdir()
    here = Path(pytest.__file__).parents[1]
    for entry in here.iterdir():
        if "vdusefast" not in entry.name and not entry.name.endswith(".pth"):
            (dependencies / entry.name).symlink_to(entry)
    env = {**os.environ, "PYTHONPATH": str(dependencies)}
    code = "import vdusefast.worker._datapath as d, vdusefast.driver._driver, vdusefast.api; print(d.__file__)"
    assert run([python, "-c", code], tmp_path, env=env).stdout.startswith(str(venv))
    assert (
        run([venv / "bin/vdusefast", "--version"], tmp_path, env=env).stdout == f"vdusefast {vdusefast.__version__}\n"
    )
    assert '"loopback": true' in run([venv / "bin/vdusefast", "check", "--json"], tmp_path, env=env).stdout


def test_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    assert project["dynamic"] == ["version"]
    assert f"## [{vdusefast.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_package_is_shipped() -> None:
    how = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    listed = find_packages(str(ROOT), include=how["include"])
    found = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in ROOT.glob("vdusefast/**/__init__.py")}
    assert set(listed) == found


def test_every_make_target_is_explained() -> None:
    makefile = (ROOT / "Makefile").read_text()
    declared = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert declared
    shown = {line.split()[1] for line in run(["make", "--no-print-directory"], ROOT).stdout.splitlines()}
    wanted = {"help", "build", "fio", "test", "check", "lint", "fuzz", "soak", "clean"}
    assert set(declared[1].split()) == shown == wanted


def test_ci_runs_the_readmes_test_command() -> None:
    script = (ROOT / ".ci/run").read_text()
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert "exec make test" in script
    assert "make test" in (ROOT / "README.md").read_text()


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Return a tree with the set-up script, and a PATH directory `bin` with the few tools that every machine has."""
    shutil.copy(ROOT / "bootstrap.sh", tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "env", "sed", "cut", "head", "dirname", "sha256sum", "cat", "uname", "ls", "true"):
        found = shutil.which(name)
        assert found
        (tools / name).symlink_to(found)
    # The script looks into the sbin directories too; an empty name there must not find this machine's tools.
    script = (tmp_path / "bootstrap.sh").read_text()
    (tmp_path / "bootstrap.sh").write_text(
        script.replace("$PATH:/usr/sbin:/sbin", "$PATH").replace("/usr/bin/python3", "")
    )
    return tmp_path


def tool(directory: Path, name: str, body: str) -> None:
    path = directory / "bin" / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_set_up_names_what_is_missing_with_the_command_to_type(bare: Path) -> None:
    tool(bare, "id", "echo 1000")
    tool(bare, "apt-get", "exit 1")
    done = run([bare / "bin/bash", "bootstrap.sh"], bare, env={"PATH": str(bare / "bin")}, check=False)
    assert done.returncode == 1
    for word in ("a C compiler", "liburing.h", "fio", "fuzzer runtime", "Python 3.11 or newer"):
        assert word in done.stderr
    command = re.search(r"sudo apt-get update && sudo apt-get install (.*)", done.stderr)
    assert command
    assert {"gcc", "libc6-dev", "make", "liburing-dev", "fio", "clang", "python3-venv"} <= set(command[1].split())
    assert not (bare / ".venv").exists()


def test_set_up_for_the_tests_names_what_guests_need_too(bare: Path) -> None:
    tool(bare, "id", "echo 1000")
    tool(bare, "apt-get", "exit 1")
    script = bare / "bootstrap.sh"
    script.write_text(script.read_text().replace("/bin/busybox /usr/bin/busybox", f"{bare}/bin/busybox"))
    shutil.copy(Path("/bin/true").resolve(), bare / "bin/busybox")  # it is there, but needs a loader

    def packages(*words: str) -> set[str]:
        done = run([bare / "bin/bash", script, *words], bare, env={"PATH": str(bare / "bin")}, check=False)
        assert done.returncode == 1
        command = re.search(r"sudo apt-get update && sudo apt-get install (.*)", done.stderr)
        assert command
        return set(command[1].split())

    for_guests = {"qemu-system-x86", "qemu-system-common", "qemu-utils", "nbdkit", "busybox-static", "kmod", "xfsprogs"}
    assert for_guests <= packages("test")
    assert not for_guests & packages()


def test_set_up_refuses_what_it_does_not_know() -> None:
    done = run([ROOT / "bootstrap.sh", "tests"], ROOT, check=False)
    assert done.returncode == 2
    assert "usage: ./bootstrap.sh [test]" in done.stderr


def test_set_up_without_apt_says_so(bare: Path) -> None:
    done = run([bare / "bin/bash", "bootstrap.sh"], bare, env={"PATH": str(bare / "bin")}, check=False)
    assert done.returncode == 1
    assert "there is no apt-get here" in done.stderr
    assert "liburing's header" in done.stderr


@pytest.mark.parametrize("by_sudo", [False, True])
def test_set_up_installs_when_it_may_and_updates_lists_that_fail(bare: Path, by_sudo: bool) -> None:
    log = bare / "log"
    tool(bare, "id", f"echo {1000 if by_sudo else 0}")
    tool(bare, "sudo", f'echo "sudo $*" >>{log}; [ "$1" = -n ] && shift; exec "$@"')
    tool(bare, "apt-get", f'echo "$DEBIAN_FRONTEND apt-get $*" >>{log}; [ "$1" = update ]')
    done = run([bare / "bin/bash", "bootstrap.sh"], bare, env={"PATH": str(bare / "bin")}, check=False)
    lines = log.read_text().splitlines()
    calls = [line for line in lines if line.startswith("noninteractive apt-get")]
    assert [call.split()[2] for call in calls][-2:] == ["update", "install"]
    assert any(line.startswith("sudo -n env DEBIAN_FRONTEND=noninteractive apt-get") for line in lines) is by_sudo
    assert done.returncode == 1
    assert "setup: this failed: apt-get install" in done.stderr


PROBES = {
    "skipped": "import pytest\n@pytest.mark.skip(reason='x')\ndef test_it():\n    pass\n",
    "skipped module": "import pytest\npytest.skip('x', allow_module_level=True)\n",
    "descriptor": "import os\ndef test_it():\n    os.dup(0)\n",
    "process": "import subprocess\nkept = []\ndef test_it():\n    kept.append(subprocess.Popen(['sleep', '5']))\n",
    "mapping": "import mmap\nkept = []\ndef test_it():\n    kept.append(mmap.mmap(-1, 4096))\n",
    "run directory": "import os\ndef test_it():\n    os.mkdir(os.environ['VDUSEFAST_RUN_DIR'] + '/vd0')\n",
    "nothing": "def test_it():\n    pass\n",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("probe", "ci", "status", "said"),
    [
        ("nothing", "true", 0, "1 passed"),
        ("skipped", "false", 0, "1 skipped"),
        ("skipped", "true", 1, "skipped tests fail a CI run"),
        ("skipped module", "true", 1, "skipped tests fail a CI run"),
        ("descriptor", "false", 1, "left behind by the test:"),
        ("process", "false", 1, "process "),
        ("mapping", "false", 1, "mapping rw-s"),
        ("run directory", "false", 1, "run directory vd0"),
    ],
)
def test_suite_notices_what_is_skipped_and_what_is_left_behind(
    tmp_path: Path, probe: str, ci: str, status: int, said: str
) -> None:
    shutil.copy(ROOT / "tests/parts.py", tmp_path)
    conftest, count = re.subn(r"(?m)^SETTLE_S = .*$", "SETTLE_S = 0.5", (ROOT / "tests/conftest.py").read_text())
    assert count == 1
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "test_probe.py").write_text(PROBES[probe])
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    done = run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "."],
        tmp_path,
        env={**os.environ, "CI": ci},
        check=False,
    )
    assert done.returncode == status, done.stdout
    assert said in done.stdout
