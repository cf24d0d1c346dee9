"""For every test: what it opened, mapped and started must be gone afterwards, and in CI nothing may be skipped."""

from __future__ import annotations

import compileall
import gc
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import parts
import psutil
import pytest

if TYPE_CHECKING:
    import ceph_rig

RUN_DIR_KEY = pytest.StashKey[str]()
CPU_KEY = pytest.StashKey[float]()
# CPU time of a test in `make check`, with its fixtures. Several times what one without the mark `slow` takes, as a busy
# machine needs more of it for the same.
FAST_LIMIT_S = 1.5
SETTLE_S = 10.0  # how long a process or thread that was told to end may take, where others have the CPUs


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --soak: run the tests marked `soak`, and only these; without it they are left out. And --fast, --part."""
    parser.addoption("--fast", action="store_true", help="run the tests that take little time (make check)")
    parser.addoption("--soak", action="store_true", help="run the long tests, and only these (make soak)")
    parser.addoption("--part", choices=parts.PARTS, help="run the tests of one part of the suite (tests/parts.py)")


def pytest_configure(config: pytest.Config) -> None:
    """Keep the tests' run directories away from the machine's own, and signals as they usually are.

    A run under nohup, or in the background of a script, would hand its deafness on to every server that a test starts.
    """
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[RUN_DIR_KEY] = os.environ["VDUSEFAST_RUN_DIR"] = tempfile.mkdtemp(prefix="vdusefast-test-run-")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile what guests and servers import: many Pythons start, most of them below an emulator."""
    if not session.config.option.collectonly:
        for name in ("vdusefast", "bench", "examples", "tests"):
            compileall.compile_dir(str(session.config.rootpath / name), quiet=2)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[RUN_DIR_KEY], ignore_errors=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a CI run in which something was skipped: there, everything that a test needs is to be installed."""
    if os.environ.get("CI") != "true":
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if skipped and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter.section("skipped tests fail a CI run", sep="!", red=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the long tests (or all others), those of other parts, and without loop devices what needs them.

    With --fast also those marked `slow` or `vm`.
    """
    has_loop_devices = os.access("/dev/loop-control", os.W_OK) and shutil.which("losetup")
    left_out = [
        item
        for item in items
        if (item.get_closest_marker("soak") is not None) != config.option.soak
        or (item.get_closest_marker("loop_device") and not has_loop_devices)
        or (config.option.part and config.option.part != part_of(item))
        or (config.option.fast and (item.get_closest_marker("slow") or item.get_closest_marker("vm")))
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def part_of(item: pytest.Item) -> str:
    """Return the part of the suite that a test belongs to."""
    values = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return parts.part_of(item.path, values.get("kernel"), values.get("check"))


def cpu_time_s() -> float:
    """Return the CPU time of this process and of the children that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Note the CPU time before a test and its fixtures."""
    item.stash[CPU_KEY] = cpu_time_s()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test of `make check` that takes too long, so that it stays an inner loop. CPU time: others may run too."""
    result = yield
    used_s = cpu_time_s() - item.stash[CPU_KEY]
    if item.config.option.fast and used_s > FAST_LIMIT_S:
        pytest.fail(f"{used_s:.1f} s of CPU time, over {FAST_LIMIT_S:g}: make it faster or mark it slow", pytrace=False)
    return result


def open_descriptors() -> dict[int, str]:
    """Return this process's descriptors with what they lead to."""
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            found[int(entry)] = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:
            continue  # the one that lists the directory
    return found


def shared_mappings() -> list[str]:
    """Return the shared mappings of this process, without their addresses."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted(" ".join(line.split()[1:]) for line in lines if line.split()[1].endswith("s"))


def child_processes() -> dict[int, str]:
    """Return all descendants of this process, zombies among them, with their names, which change as they end."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        try:
            found[child.pid] = child.name()
        except psutil.NoSuchProcess:
            continue  # ended while we looked
    return found


def run_directories() -> set[str]:
    """Return what lies in the run directory."""
    return set(os.listdir(os.environ["VDUSEFAST_RUN_DIR"]))


class Resources:
    """The resources that this process holds, and those that it has got since then."""

    def __init__(self) -> None:
        self.descriptors = open_descriptors()
        self.mappings = shared_mappings()
        self.children = child_processes()
        self.threads = set(threading.enumerate())
        self.run_directories = run_directories()

    def added(self) -> list[str]:
        """Return one line for each thing that is there now and was not before."""
        old_mappings = list(self.mappings)
        mappings = []
        for mapping in shared_mappings():
            if mapping in old_mappings:
                old_mappings.remove(mapping)
            else:
                mappings.append(f"mapping {mapping}")
        return [
            *(f"descriptor {fd} -> {to}" for fd, to in open_descriptors().items() if self.descriptors.get(fd) != to),
            *mappings,
            *(f"process {pid} ({name})" for pid, name in child_processes().items() if pid not in self.children),
            *(f"thread {thread.name}" for thread in set(threading.enumerate()) - self.threads if thread.is_alive()),
            *(f"run directory {name}" for name in run_directories() - self.run_directories),
        ]

    def added_for_good(self) -> list[str]:
        """Return what is still there once everything that was told to end had time to."""
        deadline = time.monotonic() + SETTLE_S
        while self.added():
            gc.collect()  # a failing assertion's traceback and reference cycles hold things for a while
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        return self.added()


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves descriptors, shared mappings, processes, threads or run directories behind."""
    before = Resources()
    yield
    if request.node.get_closest_marker("keeps_resources"):
        return
    report = getattr(request.node, "call_report", None)
    if report is None or report.failed:
        return  # interrupted, or its traceback keeps objects alive: its own failure is what matters
    left = before.added_for_good()
    assert not left, "left behind by the test:\n" + "\n".join(left)


@pytest.fixture(scope="session")
def ceph() -> Iterator[ceph_rig.Cluster]:
    """Return a Ceph cluster that all tests of a session share: each makes images of its own in it."""
    import ceph_rig

    if missing := ceph_rig.missing():
        pytest.skip(f"{', '.join(missing)} missing; ./bootstrap.sh test installs them")
    with ceph_rig.cluster() as cluster:
        yield cluster


@pytest.fixture
def attach_loop() -> Iterator[Callable[..., str]]:
    """Return a function that makes a loop device over a file and returns its node; for tests marked loop_device.

    words: more for losetup.
    """
    nodes = []

    def attach(path: Path, *words: str) -> str:
        words = ("losetup", "--find", "--show", *words, str(path))
        nodes.append(subprocess.run(words, check=True, capture_output=True, text=True, timeout=20).stdout.strip())
        return nodes[-1]

    yield attach
    for node in nodes:
        # The flag would outlive the image: the next user of this node would get a read-only one.
        subprocess.run(["blockdev", "--setrw", node], check=True, timeout=20)
        subprocess.run(["losetup", "--detach", node], check=True, timeout=20)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Let the fixture above see how its test went."""
    report = yield
    if report.when == "call":
        item.call_report = report
    return report
