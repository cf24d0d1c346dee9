"""Stores: what each kind is like, what is refused, and that two devices never serve one store."""

from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vdusefast.backends import BACKENDS, Store, block_size, open_store
from vdusefast.backends import file as file_backend
from vdusefast.config import BackendConfig
from vdusefast.errors import BackendError, ConfigError, DeviceBusyError

SIZE = 1 << 20


def open_uri(uri: str, *, read_only: bool = False, **fields: str) -> Store:
    return open_store(BackendConfig(uri=uri, **fields), read_only=read_only)  # type: ignore[arg-type]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"\xa5" * SIZE)
    return path


@pytest.fixture
def disk_image() -> Iterator[Path]:
    """Return an image on a file system with a disk beneath, which knows O_DIRECT: the source tree's."""
    path = Path(__file__).parents[2] / "build" / f"test-{os.getpid()}.img"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\xa5" * SIZE)
    yield path
    path.unlink()


def test_file_is_described(image: Path) -> None:
    with open_uri(f"file:{image}") as store:
        assert (store.kind, store.size_bytes, store.block_size_bytes) == ("file", SIZE, 512)
        assert store.physical_block_size_bytes in (512, 1024, 2048, 4096)
        assert (store.read_only, store.can_discard, store.can_write_zeroes) == (False, True, True)
        assert (store.direct_align, store.cache) == (0, "writeback")
        assert os.pread(store.fd, 4, 100) == b"\xa5" * 4
        assert not os.get_inheritable(store.fd)
        fd = store.fd
    assert store.fd == -1
    store.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize("cache", ["writeback", "writethrough", "unsafe"])
def test_cache_mode_is_handed_on(image: Path, cache: str) -> None:
    with open_uri(f"file:{image}", cache=cache) as store:
        assert (store.cache, store.direct_align) == (cache, 0)


def test_probing_leaves_the_file_as_it_was(image: Path) -> None:
    os.truncate(image, SIZE - 512)
    with open_uri(f"file:{image}") as store:
        assert store.can_discard
    assert image.read_bytes() == b"\xa5" * (SIZE - 512)


def test_file_that_cannot_punch_holes_has_no_discard(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_backend, "FALLOC_FL_PUNCH_HOLE", 0x80)  # a mode no file system has
    with open_uri(f"file:{image}") as store:
        assert not store.can_discard
        assert store.can_write_zeroes


def test_tmpfs_is_a_store_too() -> None:
    fd = os.memfd_create("tmpfs")
    os.ftruncate(fd, SIZE)
    try:
        with open_uri(f"file:/proc/self/fd/{fd}") as store:
            assert (store.kind, store.size_bytes, store.can_discard) == ("file", SIZE, True)
    finally:
        os.close(fd)


def test_direct_store_takes_the_alignment_it_says(disk_image: Path) -> None:
    with open_uri(f"file:{disk_image}", cache="none") as store:
        align = store.direct_align
        assert align in (512, 4096)
        assert store.block_size_bytes == align
        assert fcntl.fcntl(store.fd, fcntl.F_GETFL) & os.O_DIRECT
        with mmap.mmap(-1, 3 * 4096) as memory, memoryview(memory) as view, view[align : 2 * align] as buffer:
            assert os.preadv(store.fd, [buffer], align) == align
            assert bytes(buffer) == b"\xa5" * align
            assert os.pwritev(store.fd, [buffer], 3 * align) == align


def test_direct_store_is_a_multiple_of_its_alignment(disk_image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_backend, "find_align", lambda *_: 4096)
    with open_uri(f"file:{disk_image}", cache="none") as store:
        assert (store.direct_align, store.block_size_bytes) == (4096, 4096)
    os.truncate(disk_image, SIZE + 512)
    with open_uri(f"file:{disk_image}", cache="none") as store:
        assert block_size(store) == block_size(store, 512) == 512  # its last block becomes whole when it is written to
        with pytest.raises(ConfigError, match="no multiple of the block size 4096; make it 1052672"):
            block_size(store, 4096)


def test_file_system_without_direct_io_is_named() -> None:
    with pytest.raises(BackendError, match=r"has no O_DIRECT; use another cache mode|neither a regular file"):
        open_uri("file:/proc/version", cache="none", read_only=True)


def test_second_device_on_a_store_is_refused(image: Path) -> None:
    with open_uri(f"file:{image}"):
        for read_only in (False, True):
            with pytest.raises(DeviceBusyError, match=r"disk\.img: in use by pid \d+ \(.*\); end that first") as caught:
                open_uri(f"file:{image}", read_only=read_only)
            assert caught.value.exit_code == 4
    open_uri(f"file:{image}").close()


def test_read_only_devices_share_a_store(image: Path) -> None:
    with open_uri(f"file:{image}", read_only=True) as first, open_uri(f"file:{image}", read_only=True):
        assert (first.read_only, first.can_discard, first.can_write_zeroes) == (True, False, False)
        assert fcntl.fcntl(first.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        with pytest.raises(DeviceBusyError):
            open_uri(f"file:{image}")


def test_lock_lasts_as_long_as_a_worker_has_the_descriptor(image: Path) -> None:
    store = open_uri(f"file:{image}")
    command = [sys.executable, "-c", "input()"]
    worker = subprocess.Popen(command, pass_fds=[store.fd], stdin=subprocess.PIPE)
    store.close()
    with pytest.raises(DeviceBusyError):
        open_uri(f"file:{image}")
    worker.communicate(b"\n", timeout=20)
    open_uri(f"file:{image}").close()


def test_store_without_a_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"no such file; make it, for example by truncate -s 1G .*absent") as caught:
        open_uri(f"file:{tmp_path}/absent")
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("path", ["/", "/dev/null", "/proc/self/mem/x", "a\0b"])
def test_what_is_no_file_and_no_block_device_is_refused(path: str) -> None:
    with pytest.raises(BackendError, match=r"neither a regular file nor a block device|Not a directory|null"):
        open_uri(f"file:{path}")


def test_pipe_is_refused_without_waiting_for_its_other_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BackendError, match="neither a regular file nor a block device"):
        open_uri(f"file:{tmp_path}/pipe")


def test_file_that_may_not_be_opened_says_why(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(BackendError, match="cannot be opened: Permission denied; or set read_only"):
        open_uri(f"file:{image}")


@pytest.mark.parametrize(
    ("size", "problem"),
    [(0, "is empty; give it a size first"), (1000, "1000 bytes, no multiple of the block size 512; make it 1024")],
)
def test_size_that_makes_no_disk_is_refused(image: Path, size: int, problem: str) -> None:
    os.truncate(image, size)
    with pytest.raises(ConfigError, match=problem) as caught:
        open_uri(f"file:{image}")
    assert caught.value.exit_code == 2
    open(image, "rb").close()


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("", "names no known kind of store"),
        ("/srv/disk.img", "names no known kind of store; write for example file:/srv/disk.img, memory:64M, null:1G"),
        ("tape:host", "'tape:host' names no known kind of store"),
        ("file:", "'file:' is not complete; write for example file:/srv/disk.img"),
        ("memory:", "is not complete; write for example memory:64M"),
        ("memory:lots", "'lots' is not a size"),
        ("memory:0", "memory:0 is empty"),
        ("memory:1000", "1000 bytes, no multiple of the block size 512"),
        ("null:x", "'x' is not a size"),
        ("null:513", "no multiple of the block size 512"),
    ],
)
def test_uri_that_cannot_be_is_explained(uri: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        open_uri(uri)


@pytest.mark.parametrize(
    ("uri", "engine", "problem"),
    [
        ("null:1M", "sync", "'sync' needs a descriptor, and null:1M has none"),
        ("null:1M", "uring", "'uring' needs a descriptor"),
        ("null:1M", "memory", "'memory' serves memory: stores, not null:1M"),
        ("memory:1M", "null", "'null' serves null: stores, not memory:1M"),
        ("file:/x", "memory", "'memory' serves memory: stores, not file:/x"),
    ],
)
def test_engine_that_cannot_serve_a_store_is_refused(uri: str, engine: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        open_uri(uri, engine=engine)


@pytest.mark.parametrize("engine", ["auto", "memory", "sync", "uring"])
def test_memory_is_zeroed_and_its_size_is_sealed(engine: str) -> None:
    with open_uri("memory:64K", engine=engine) as store:
        assert (store.kind, store.size_bytes, store.block_size_bytes) == ("memory", 65536, 512)
        assert (store.can_discard, store.can_write_zeroes) == (True, True)
        assert os.pread(store.fd, 65536, 0) == bytes(65536)
        assert os.pwrite(store.fd, b"x", 65535) == 1
        for size in (0, 131072):
            with pytest.raises(PermissionError):
                os.ftruncate(store.fd, size)


def test_memory_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(27, "File too large")

    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(BackendError, match="memory:1G: cannot be created: File too large"):
        open_uri("memory:1G")


def test_null_has_a_size_and_no_descriptor() -> None:
    with open_uri("null:1G", read_only=True) as store:
        assert (store.kind, store.fd, store.size_bytes, store.read_only) == ("null", -1, 1 << 30, True)


def test_block_size_is_the_stores_or_a_larger_one() -> None:
    with open_uri("null:5K") as store:
        assert block_size(store) == 512
        assert block_size(store, 1024) == 1024
        with pytest.raises(ConfigError, match=r"null:5K has 5120 bytes, no multiple of the block size 4096"):
            block_size(store, 4096)
        store.block_size_bytes = 4096
        with pytest.raises(ConfigError, match=r"block_size_bytes: 512, but null:5K has no blocks below 4096"):
            block_size(store, 512)
        store.granule_bytes = 4096  # of a file: a worker changes parts of blocks
        with pytest.raises(ConfigError, match="no multiple of the block size 4096"):
            block_size(store, 512)
        store.size_bytes = 8192
        assert block_size(store, 512) == 512


def test_store_that_nobody_closed_is_closed_with_a_warning() -> None:
    stores = [open_uri("memory:64K")]
    with pytest.warns(ResourceWarning, match="store memory:64K was not closed"):
        stores.clear()


@pytest.mark.slow
def test_every_backend_opens_its_example_or_says_what_is_missing() -> None:
    for registration in BACKENDS:
        try:
            open_uri(registration.example).close()
        except BackendError as error:
            assert registration.example[-14:] in str(error)  # noqa: PT017  (faulty: names the one behind it)
            assert registration.plugin or "no such file" in str(error)  # noqa: PT017


@pytest.fixture
def loop(disk_image: Path, attach_loop: Callable[[Path], str]) -> str:
    """Return the node of a loop device over an image."""
    return attach_loop(disk_image)


@pytest.mark.loop_device
@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_block_device_is_described(loop: str, cache: str) -> None:
    with open_uri(f"file:{loop}", cache=cache) as store:
        assert (store.kind, store.size_bytes) == ("blockdev", SIZE)
        assert store.block_size_bytes in (512, 4096)
        assert store.physical_block_size_bytes >= store.block_size_bytes
        assert store.can_discard
        assert bool(store.direct_align) == (cache == "none")
        with pytest.raises(DeviceBusyError):
            open_uri(f"file:{loop}")
    with open_uri(f"file:{loop}", read_only=True) as store:
        assert not store.can_discard


@pytest.mark.loop_device
def test_block_device_that_is_claimed_is_refused(loop: str) -> None:
    claim = os.open(loop, os.O_RDWR | os.O_EXCL)
    try:
        with pytest.raises(DeviceBusyError, match=f"{loop}: in use: held by a process or a mount that cannot be seen"):
            open_uri(f"file:{loop}")
    finally:
        os.close(claim)


@pytest.mark.loop_device
def test_block_device_that_is_read_only_wants_a_read_only_device(loop: str) -> None:
    subprocess.run(["blockdev", "--setro", loop], check=True, timeout=20)
    with pytest.raises(BackendError, match=r"read-only|Operation not permitted|Permission denied"):
        open_uri(f"file:{loop}")
    open_uri(f"file:{loop}", read_only=True).close()
