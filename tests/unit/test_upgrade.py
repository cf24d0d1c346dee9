"""Files of another build under a server that runs: nothing of theirs serves with it, and a new server takes over."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from daemon_rig import Rig

import vdusefast
from vdusefast.base import build, handed
from vdusefast.base.start_mode import StartMode
from vdusefast.cli import render
from vdusefast.server import upgrade

PACKAGE = Path(vdusefast.__file__).parent


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Return a directory with a package that may be upgraded: its modules are copies, its extensions links."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "bench", "*.pyx", "*.pxd")
    copy = tmp_path / "files"
    shutil.copytree(PACKAGE, copy / "vdusefast", ignore=ignored)
    for path in PACKAGE.rglob("*.so"):
        (copy / "vdusefast" / path.relative_to(PACKAGE)).symlink_to(path)
    return copy


def rename_build(files: Path, build_id: str = "9.9.9-of-another-build") -> None:
    """Have the files look like those of another build."""
    path = files / "vdusefast/build_id.txt"
    path.with_suffix(".new").write_text(f"{build_id}\n")
    path.with_suffix(".new").rename(path)


def run_with(files: Path, code: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code), *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(files)},
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )


@pytest.mark.parametrize(
    "extension", ["worker._datapath", "driver._driver", "backends._relay", "backends._driver_memory"]
)
def test_extension_of_another_build_is_not_loaded(files: Path, extension: str) -> None:
    rename_build(files)
    done = run_with(files, f"import vdusefast.{extension}")
    assert f"OtherBuildError: vdusefast.{extension} is of build {build.BUILD_ID}" in done.stderr
    assert "are of 9.9.9-of-another-build: install vdusefast again" in done.stderr


@pytest.mark.parametrize(("module", "words"), [("worker.main", ["d0/0"]), ("worker.relay", ["d0"])])
def test_worker_and_relay_of_another_build_end_before_they_do_anything(
    files: Path, module: str, words: list[str]
) -> None:
    rename_build(files)
    fd = handed.write_arguments(["device=d0", "a_word_of_tomorrow=1"])
    done = subprocess.run(
        [sys.executable, "-P", "-m", f"vdusefast.{module}", *words, str(fd)],
        env={**os.environ, "PYTHONPATH": str(files)},
        pass_fds=[fd],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    os.close(fd)
    assert done.returncode == build.EXIT_OTHER_BUILD
    assert "the files are of build 9.9.9-of-another-build, and the server that" in done.stderr
    assert f"is of {build.BUILD_ID}" in done.stderr


def test_another_protocol_is_another_build(monkeypatch: pytest.MonkeyPatch) -> None:
    fd = handed.write_arguments(["a"])
    monkeypatch.setattr(build, "PROTOCOL_VERSION", 3)
    with pytest.raises(build.OtherBuildError):
        handed.read_arguments(fd)


SERVE = """
    import logging, os, sys, time, vdusefast
    from pathlib import Path
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
    uri, files = sys.argv[1:]
    build = Path(files, "vdusefast/build_id.txt")
    own = build.read_text()

    def wait(condition):
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, device.queues()
            time.sleep(0.01)

    config = vdusefast.make_config(name="d0", uri=uri, queues=2)
    with vdusefast.Device(config) as device, device.driver() as driver:
        driver.write(0, b"a" * 4096)
        before = [queue.pid for queue in device.queues()]
        build.write_text("9.9.9-of-another-build")
        os.kill(before[1], 9)
        wait(lambda: device.upgraded)
        print("QUEUES", *(str(queue.state) for queue in device.queues()))
        print("REASON", device.queues()[1].reason)
        assert driver.read(0, 4096, queue=0) == b"a" * 4096
        assert device.queues()[0].pid == before[0]
        build.write_text(own)  # as if the upgrade were taken back
        wait(lambda: str(device.queues()[1].state) == "running")
        assert driver.read(0, 4096, queue=1) == b"a" * 4096
        assert not device.upgraded
"""


@pytest.mark.slow
def test_healthy_workers_serve_on_and_the_dead_ones_wait(files: Path, tmp_path: Path) -> None:
    (tmp_path / "store").write_bytes(bytes(1 << 20))
    done = run_with(files, SERVE, f"file:{tmp_path}/store", files)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "QUEUES running recovering\n" in done.stdout
    why = (
        "REASON device d0: queue 1: no new worker: the files of vdusefast were upgraded: they are of build "
        f"9.9.9-of-another-build, this server is of {build.BUILD_ID}: vdusefast restart d0\n"
    )
    assert why in done.stdout
    assert done.stdout.count("no new worker") == 2  # one line in the log


RELAY = """
    import os, sys, time, vdusefast
    from pathlib import Path
    build = Path(sys.argv[2], "vdusefast/build_id.txt")
    own = build.read_text()

    def wait(condition):
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    config = vdusefast.make_config(name="d0", uri=sys.argv[1], queues=2)
    with vdusefast.Device(config) as device, device.driver() as driver:
        assert driver.read(0, 512) == bytes(512)
        before = [queue.pid for queue in device.queues()]
        build.write_text("9.9.9-of-another-build")
        os.kill(device.info()["relay_pid"], 9)
        wait(lambda: device.upgraded)
        build.write_text(own)
        assert driver.read(0, 512, queue=1) == bytes(512)
        wait(lambda: not device.upgraded)
        assert [queue.pid for queue in device.queues()] == before
"""


@pytest.mark.slow
def test_relay_of_another_build_does_not_serve_either(files: Path, tmp_path: Path) -> None:
    disk = """
        import vdusefast

        class Disk(vdusefast.Backend):
            size_bytes, shareable = 1 << 20, False

            def pread(self, buffer, offset_bytes):
                buffer[:] = bytes(len(buffer))
    """
    (tmp_path / "disk.py").write_text(textwrap.dedent(disk))
    done = run_with(files, RELAY, f"python:{tmp_path}/disk.py:Disk", files)
    assert done.returncode == 0, done.stdout + done.stderr


PROBE = """
    import sys, vdusefast
    from pathlib import Path
    from vdusefast.backends import probe
    from vdusefast.backends.plugin import StoreSpec
    Path(sys.argv[1], "vdusefast/build_id.txt").write_text("9.9.9-of-another-build")
    probe.describe(StoreSpec("python:nowhere:Disk"))
"""


@pytest.mark.slow
def test_probe_of_another_build_says_so(files: Path) -> None:
    done = run_with(files, PROBE, files)
    assert f"ended with status {build.EXIT_OTHER_BUILD}" in done.stderr
    assert "the files are of build 9.9.9-of-another-build" in done.stderr


def test_tables_say_what_to_do() -> None:
    info = {"name": "d0", "state": "running", "upgraded": "the files were upgraded", "build": "1"}
    assert "running, files upgraded" in render.list_text([info])
    assert "the files were upgraded: vdusefast restart d0" in render.show_text(info)
    assert "upgrade" not in render.show_text({**info, "upgraded": ""})


def test_words_between_builds_stay() -> None:
    """A server starts the one that serves after it from the files that are on disk then."""
    assert {mode.name: mode.value for mode in StartMode} == {
        "ADD": "add",
        "NEW": "new",
        "ADOPT": "adopt",
        "RECOVER": "recover",
        "FAIL": "fail",
        "CLAIM": "claim",
        "CLAIM_FAIL": "claim to fail",
        "TAKE_OVER": "take over",
        "TAKE_OVER_UNSEEN": "take over unseen",
    }


def upgrader(tmp_path: Path, code: str) -> upgrade.Upgrader:
    return upgrade.Upgrader("d0", tmp_path, command=[sys.executable, "-c", textwrap.dedent(code)])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 25
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def look_until(made: upgrade.Upgrader, condition: Callable[[], bool]) -> None:
    def look() -> bool:
        if condition():
            return True
        made.look("the files were upgraded")
        return False

    wait_until(look)


def test_server_that_needs_new_files_has_itself_replaced(tmp_path: Path) -> None:
    note = tmp_path / "note"
    code = f"import os, sys; open({str(note)!r}, 'w').write(' '.join([*sys.argv[1:], os.environ['VDUSEFAST_RUN_DIR']]))"
    made = upgrader(tmp_path, code)
    made.look("")
    look_until(made, lambda: note.exists() and made._process is None)
    assert note.read_text() == f"restart d0 {tmp_path}"
    made.close()


def test_upgrade_that_fails_is_said_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upgrade, "RETRY_S", 0.05)
    made = upgrader(tmp_path, "import sys; print('vdusefast: d0: no such image', file=sys.stderr); sys.exit(1)")
    look_until(made, lambda: caplog.text.count("cannot take it over: vdusefast: d0: no such image; the workers") == 2)
    made.close()


def is_child(pid: int) -> bool:
    """Return whether a process is a child of this one; one that has ended is, until its end was seen."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


@pytest.mark.parametrize("systemd", [False, True])
def test_service_looks_for_the_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, systemd: bool) -> None:
    note = tmp_path / "note"
    code = f"import os, sys; open({str(note)!r}, 'w').write(f'{{os.getpid()}} ' + ' '.join(sys.argv[1:]))"
    monkeypatch.setattr(upgrade, "_default_command", lambda: [sys.executable, "-c", code])
    monkeypatch.setattr("vdusefast.server.service.TICK_S", 0.02)
    rig = Rig(tmp_path / "run", uri="file:/nowhere", transport="kernel")
    rig.service._systemd = systemd

    def act() -> None:
        rig.device.upgraded = "the files were upgraded"
        wait_until(lambda: note.exists() and note.read_text() != "")
        pid, _, words = note.read_text().partition(" ")
        assert words == "restart vd0"
        wait_until(lambda: not is_child(int(pid)))  # the service has seen its end
        assert not rig.device.hand_overs  # until the new server asks for it
        os.kill(os.getpid(), signal.SIGTERM)

    rig.run(act)
    assert rig.error is None
