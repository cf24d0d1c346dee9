"""Each call of a program on the disk does as Linux does on a block device."""

from __future__ import annotations

from pathlib import Path

import pytest
from preload_rig import CAPACITY_BYTES, Disk


@pytest.mark.slow
def test_stat_tells_a_block_device_by_any_name(disk: Disk) -> None:
    (disk.path.parent / "link").symlink_to(disk.path)
    disk.python(
        """
        import stat
        fd = os.open("link", os.O_RDONLY)
        for found in (os.stat(PATH), os.stat("link"), os.lstat(PATH), os.fstat(fd)):
            assert stat.S_ISBLK(found.st_mode) and found.st_size == 0, found
            assert found.st_ino == os.stat(PATH).st_ino
        assert stat.S_ISLNK(os.lstat("link").st_mode)
        assert stat.S_ISREG(os.stat(STORE).st_mode)
        """
    )
    assert b"block special file" in disk.run("stat", disk.path).stdout  # statx()


def test_reads_and_writes_move_the_position_and_end_at_the_capacity(disk: Disk) -> None:
    disk.python(
        """
        size = os.stat(STORE).st_size
        fd = os.open(PATH, os.O_RDWR)
        assert os.lseek(fd, 0, os.SEEK_END) == size
        assert os.read(fd, 10) == b""
        assert os.lseek(fd, -1000, os.SEEK_CUR) == size - 1000
        assert os.write(fd, b"x" * 5000) == 1000
        try:
            os.write(fd, b"x")
            raise AssertionError
        except OSError as error:
            assert error.errno == errno.ENOSPC
        assert os.lseek(fd, 0, os.SEEK_CUR) == size
        assert os.pread(fd, 5000, size - 999) == b"x" * 999
        assert os.pread(fd, 10, size + 5) == b""
        assert os.preadv(fd, [bytearray(3), bytearray(0), bytearray(4)], size - 5) == 5
        for bad in ((-1, os.SEEK_SET), (1, os.SEEK_END), (0, os.SEEK_DATA), (0, 77)):
            try:
                os.lseek(fd, *bad)
                raise AssertionError(bad)
            except OSError as error:
                assert error.errno == errno.EINVAL
        """
    )
    assert disk.store.read_bytes().endswith(b"\0" + b"x" * 1000)


def test_any_offset_and_length_without_o_direct(disk: Disk) -> None:
    disk.python(
        """
        import random
        model = bytearray(open(STORE, "rb").read())
        fd = os.open(PATH, os.O_RDWR)
        chance = random.Random(1)
        for _ in range(300):
            length = chance.choice((1, 3, 511, 512, 513, 4096, 70000, 600000))
            offset = chance.randrange(len(model) - length)
            if chance.random() < 0.5:
                parts = [chance.randbytes(length // 3), b"", chance.randbytes(length - length // 3)]
                assert os.pwritev(fd, parts, offset) == length
                model[offset : offset + length] = b"".join(parts)
            else:
                parts = [bytearray(length // 2), bytearray(length - length // 2)]
                assert os.preadv(fd, parts, offset) == length
                assert b"".join(parts) == model[offset : offset + length]
        assert open(STORE, "rb").read() == model
        """
    )


def test_o_direct_refuses_what_is_not_aligned(disk: Disk) -> None:
    disk.python(
        """
        import mmap
        memory = mmap.mmap(-1, 8192, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        view = memoryview(memory)
        fd = os.open(PATH, os.O_RDWR | os.O_DIRECT)
        assert os.preadv(fd, [view[:4096]], 512) == 4096
        for part, offset in ((view[:4096], 1), (view[:100], 0), (view[1:513], 0), (view[:4097], 4096)):
            for call in (os.preadv, os.pwritev):
                try:
                    call(fd, [part], offset)
                    raise AssertionError((len(part), offset))
                except OSError as error:
                    assert error.errno == errno.EINVAL
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        assert flags & os.O_DIRECT and flags & os.O_ACCMODE == os.O_RDWR
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        assert os.preadv(fd, [view[:100]], 7) == 100
        """
    )


def test_access_modes_and_flags(disk: Disk) -> None:
    disk.python(
        """
        def fails(code, call, *words):
            try:
                call(*words)
            except OSError as error:
                assert error.errno == code, (error, call, words)
            else:
                raise AssertionError((call, words))
        reader, writer = os.open(PATH, os.O_RDONLY), os.open(PATH, os.O_WRONLY | os.O_SYNC)
        fails(errno.EBADF, os.write, reader, b"x")
        fails(errno.EBADF, os.read, writer, 1)
        fails(errno.EINVAL, os.pread, reader, 1, -1)
        fails(errno.EINVAL, os.ftruncate, writer, 0)
        fails(errno.EOPNOTSUPP, os.preadv, reader, [bytearray(1)], 0, 0x10000)
        fails(errno.EEXIST, os.open, PATH, os.O_CREAT | os.O_EXCL | os.O_RDWR)
        fails(errno.ENOTDIR, os.open, PATH, os.O_DIRECTORY)
        assert os.pwrite(writer, b"abc", 1) == 3
        assert os.pwritev(writer, [b"d"], 4, os.RWF_DSYNC) == 1
        os.fsync(writer), os.fdatasync(reader), os.posix_fadvise(reader, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(reader, 5, 0) == b"\\0abcd"
        """
    )


def test_a_read_only_disk_refuses_writes(preload_library: Path, tmp_path: Path) -> None:
    disk = Disk(preload_library, tmp_path, read_only="1")
    disk.python(
        """
        fd = os.open(PATH, os.O_RDWR)
        for call in (lambda: os.write(fd, b"x"), lambda: fcntl.ioctl(fd, 0x1277, struct.pack("QQ", 0, 4096))):
            try:
                call()
                raise AssertionError
            except OSError as error:
                assert error.errno == errno.EPERM
        assert struct.unpack("i", fcntl.ioctl(fd, 0x125E, bytes(4))) == (1,)
        """
    )


def test_ioctls_of_a_block_device(disk: Disk) -> None:
    disk.python(
        """
        BLKGETSIZE64, BLKGETSIZE, BLKSSZGET, BLKPBSZGET = 0x80081272, 0x1260, 0x1268, 0x127B
        BLKROGET, BLKFLSBUF, BLKDISCARD, BLKZEROOUT = 0x125E, 0x1261, 0x1277, 0x127F
        fd = os.open(PATH, os.O_RDWR)
        size = os.stat(STORE).st_size
        assert struct.unpack("Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8))) == (size,)
        assert struct.unpack("Q", fcntl.ioctl(fd, BLKGETSIZE, bytes(8))) == (size // 512,)
        for request, value in ((BLKSSZGET, 512), (BLKROGET, 0)):
            assert struct.unpack("i", fcntl.ioctl(fd, request, bytes(4))) == (value,)
        assert struct.unpack("i", fcntl.ioctl(fd, BLKPBSZGET, bytes(4)))[0] in (512, 4096)
        fcntl.ioctl(fd, BLKFLSBUF)
        os.pwrite(fd, b"x" * 16384, 0)
        fcntl.ioctl(fd, BLKDISCARD, struct.pack("QQ", 0, 4096))
        fcntl.ioctl(fd, BLKZEROOUT, struct.pack("QQ", 8192, 4096))
        assert os.pread(fd, 16384, 0) == bytes(4096) + b"x" * 4096 + bytes(4096) + b"x" * 4096
        for request, range_, code in (
            (BLKDISCARD, (1, 4096), errno.EINVAL),
            (BLKDISCARD, (0, 0), errno.EINVAL),
            (BLKZEROOUT, (size, 512), errno.EINVAL),
            (BLKZEROOUT, (2**64 - 512, 1024), errno.EINVAL),
            (0x127D, (0, 4096), errno.EOPNOTSUPP),
            (0x5413, (0, 0), errno.ENOTTY),
        ):
            try:
                fcntl.ioctl(fd, request, struct.pack("QQ", *range_))
                raise AssertionError(request)
            except OSError as error:
                assert error.errno == code, (request, error)
        """
    )


@pytest.mark.parametrize("plain", ["", "1"])
def test_fallocate_makes_zeroes(plain: str, preload_library: Path, tmp_path: Path) -> None:
    disk = Disk(preload_library, tmp_path, **({"plain": plain} if plain else {}))
    disk.store.write_bytes(b"x" * CAPACITY_BYTES)
    disk.run("fallocate", "-z", "-o", "4096", "-l", "1MiB", disk.path)
    disk.run("fallocate", "-p", "-o", "2MiB", "-l", "4096", disk.path, status=1 if plain else 0)
    content = disk.store.read_bytes()
    assert content[4096 : 4096 + (1 << 20)] == bytes(1 << 20)
    assert content[2 << 20 : (2 << 20) + 4096] == (b"x" * 4096 if plain else bytes(4096))
    assert content.count(0) == (1 << 20) + (0 if plain else 4096)


def test_mmap_is_refused_with_a_reason(disk: Disk) -> None:
    said = disk.python_says(
        """
        import mmap
        fd = os.open(PATH, os.O_RDWR)
        for _ in range(2):
            try:
                mmap.mmap(fd, 4096)
                raise AssertionError
            except OSError as error:
                assert error.errno == errno.ENODEV
        """
    )
    assert said == (
        f"vdusefast: mmap() of {disk.path} is refused (ENODEV): this disk can be read and written, but not mapped\n"
    )


def test_calls_that_are_not_intercepted_fail_and_read_nothing_else(disk: Disk) -> None:
    disk.python(
        """
        import select
        fd = os.open(PATH, os.O_RDWR)
        other = os.open(STORE, os.O_RDWR)
        for call in (
            lambda: os.sendfile(other, fd, 0, 4096),
            lambda: os.copy_file_range(fd, other, 4096),
            lambda: os.splice(fd, other, 4096),
            lambda: os.fchmod(fd, 0o600),
            lambda: fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, 4096),
        ):
            try:
                call()
                raise AssertionError
            except OSError as error:
                assert error.errno in (errno.EINVAL, errno.EBADF), error
        """
    )


def test_without_the_library_the_path_cannot_be_opened(disk: Disk) -> None:
    del disk.environment["LD_PRELOAD"]
    assert b"No such device or address" in disk.run("cat", disk.path, status=1).stderr


def test_a_signal_handler_in_the_first_call_of_a_thread_is_refused(preload_library: Path, tmp_path: Path) -> None:
    Disk(preload_library, tmp_path, signal="1").python(
        """
        import ctypes, signal
        fd, seen = os.open(PATH, os.O_RDWR), []
        def handler(_number):
            try:
                seen.append(len(os.pread(fd, 512, 0)))
            except OSError as error:
                seen.append(-error.errno)
        callback = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
        ctypes.CDLL(None).signal(signal.SIGUSR1, callback)
        assert len(os.pread(fd, 512, 0)) == 512
        assert seen == [-errno.EBUSY], seen
        assert len(os.pread(fd, 512, 0)) == 512
        """
    )
