"""A run directory without any space left, on a real tmpfs, and with files in it that are not ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vdusefast import errors
from vdusefast.api import Device
from vdusefast.bench.torture.loopback_host import LoopbackHost, RemoteLoopbackTransport
from vdusefast.cli import app as cli
from vdusefast.config import Config, make_config, resolve_cpus
from vdusefast.driver.loopback_driver import LoopbackDriver
from vdusefast.host import run_dirs
from vdusefast.state import saved_state, shared_pages, state_file
from vdusefast.state.run_dir import RunDirectory
from vdusefast.state.shared_pages import SharedPages

SIZE_KIB = 512


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root may mount a tmpfs")
    path = tmp_path / "small"
    path.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_KIB}k,mode=700", "vdusefast-test", str(path)]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def fill(path: Path) -> Path:
    """Take all the space of the file system, to the last page."""
    filler = path / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return filler


def file_config(tmp_path: Path) -> Config:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    return resolve_cpus(make_config(name="vd0", uri=f"file:{tmp_path}/disk.img"))


@pytest.mark.slow
def test_device_is_handed_over_recovered_and_resized_without_space(small: Path, tmp_path: Path) -> None:
    config = file_config(tmp_path)
    with LoopbackHost(tmp_path / "bus") as host:

        def make_device() -> Device:
            return Device(config, run_dir=small, transport=RemoteLoopbackTransport(host.path))

        first = make_device()
        first.start()
        fill(small)
        with LoopbackDriver(host.bus) as driver:
            driver.write(0, b"1" * 4096)
            make_device().prove()
            first.hand_over()
            for number in (2, 3):
                device = make_device()
                device.start(recover=True)
                assert driver.read(0, 4096) == b"1" * 4096
                device.resize(number << 20)
                state = saved_state.load(small / "vd0/state")
                assert state is not None
                assert (state.capacity_sectors, state.resizing) == (number << 11, False)
                assert run_dirs.holder_transport(small / "vd0") == "loopback"
                if number == 2:
                    device.hand_over()
        device.stop()
    assert not (small / "vd0").exists()


def test_state_of_an_older_version_does_not_undo_a_take_over(
    small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its file has no space set aside; what it says stays right."""
    config = file_config(tmp_path)
    with LoopbackHost(tmp_path / "bus") as host:
        first = Device(config, run_dir=small, transport=RemoteLoopbackTransport(host.path))
        first.start()
        first.hand_over()
        text = state_file.read(small / "vd0/state")
        (small / "vd0/state").write_bytes(text)
        fill(small)
        second = Device(config, run_dir=small, transport=RemoteLoopbackTransport(host.path))
        second.start(recover=True)
        assert second.failure is None
        second.hand_over()
        assert "cannot write" in caplog.text
        assert state_file.read(small / "vd0/state") == text
        third = Device(config, run_dir=small, transport=RemoteLoopbackTransport(host.path))
        third.start(recover=True)
        third.stop()


def test_new_device_without_space_is_one_error_and_leaves_nothing(small: Path, tmp_path: Path) -> None:
    filler = fill(small)
    config = file_config(tmp_path)
    for left_bytes in (0, 4096, 8192):
        os.truncate(filler, filler.stat().st_size - left_bytes)
        with pytest.raises(errors.VdusefastError, match="No space left on device"):
            Device(config, run_dir=small).start()
        assert os.listdir(small) == ["filler"]


def test_pages_and_notes_never_fault_for_lack_of_space(small: Path) -> None:
    """A page of a tmpfs that cannot be had would be a SIGBUS in the process that touches it."""
    with RunDirectory("vd0", small) as directory:
        notes_fd = directory.open_store_notes(2 * 4096)
        with SharedPages.create(directory.pages_path, "vd0", 2, 256) as pages:
            filler = fill(small)
            used_bytes = shared_pages.block_used_bytes(256)
            for start, length in (
                (0, shared_pages.HEADER_BYTES),
                *((shared_pages.queue_offset(queue), used_bytes) for queue in (0, 1)),
            ):
                pages.map[start : start + length] = b"\1" * length
            # A ring that is larger than offered has a longer log: for that there is room, or an error.
            with pytest.raises(errors.VdusefastError, match="no room for the log of 4096 requests: No space left"):
                pages.reserve_log(1, 4096)
            filler.unlink()
            pages.reserve_log(1, 4096)
            fill(small)
            pages.begin_log(1, 0, shared_pages.INFLIGHT_SPLIT, 4096)
            assert not pages.has_inflight(1)
        assert os.pwrite(notes_fd, b"n" * 4096, 4096) == 4096
        os.close(notes_fd)


def test_log_that_cannot_be_written_does_not_end_a_server() -> None:
    code = (
        "import sys; from pathlib import Path; from vdusefast.base import logs\n"
        "print('before', file=sys.stderr)\n"
        "logs.LogFile().move(Path('/dev/full'))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


# -- the file that is written in place


def test_torn_write_leaves_the_text_before(tmp_path: Path) -> None:
    path = tmp_path / "state"
    for text in (b"one", b"two", b"three"):
        state_file.write(path, text)
        assert state_file.read(path) == text
    whole, inode = path.read_bytes(), path.stat().st_ino
    at = whole.index(b"three")
    path.write_bytes(whole[:at] + b"thr" + bytes(2) + whole[at + 5 :])
    assert state_file.read(path) == b"two"
    state_file.write(path, b"four")  # over the torn one
    assert state_file.read(path) == b"four"
    assert (path.stat().st_ino, path.stat().st_size) == (inode, len(whole))
    state_file.write(path, b"x" * len(whole))  # has outgrown it
    assert state_file.read(path) == b"x" * len(whole)
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["state"]


# -- files of others


def test_foreign_file_in_a_run_directory_is_named_by_every_del(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(os.environ["VDUSEFAST_RUN_DIR"])
    directory = RunDirectory("vd0", base, "loopback")
    (directory.path / "notes.txt").write_text("mine")
    (directory.path / "relay-x1").mkdir()  # what a killed server of ours has left
    directory.release()
    for _ in range(2):
        assert cli.run(["del", "vd0"]) == 1
        err = capsys.readouterr().err
        assert "removed, but" in err
        assert "not vdusefast's: notes.txt; remove them, then: vdusefast del vd0" in err
        assert os.listdir(base / "vd0") == ["notes.txt"]
    (base / "vd0/notes.txt").unlink()
    assert cli.run(["del", "vd0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "vd0", "deleted": True}
    assert not (base / "vd0").exists()
