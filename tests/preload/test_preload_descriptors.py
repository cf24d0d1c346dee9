"""Descriptors of the disk: dup, fork, exec, threads, signals."""

from __future__ import annotations

import pytest
from preload_rig import Disk


@pytest.mark.slow
def test_a_program_sees_one_descriptor_for_an_open(disk: Disk) -> None:
    disk.python(
        """
        fds = [os.open(PATH, os.O_RDWR) for _ in range(3)]
        assert fds == list(range(fds[0], fds[0] + 3))
        assert os.open(os.devnull, os.O_RDONLY) == fds[-1] + 1
        for fd in fds:
            os.close(fd)
        try:
            os.read(fds[0], 1)
            raise AssertionError
        except OSError as error:
            assert error.errno == errno.EBADF
        """
    )


def test_dup_shares_the_position_and_open_does_not(disk: Disk) -> None:
    disk.store.write_bytes(bytes(range(256)) * (disk.store.stat().st_size // 256))
    disk.python(
        """
        fd = os.open(PATH, os.O_RDONLY)
        copy, high, second = os.dup(fd), fcntl.fcntl(fd, fcntl.F_DUPFD, 100), os.open(PATH, os.O_RDONLY)
        assert high >= 100
        assert os.read(fd, 3) == b"\\0\\1\\2"
        assert os.read(copy, 3) == b"\\3\\4\\5"
        assert os.read(high, 1) == b"\\6"
        assert os.read(second, 1) == b"\\0"
        os.close(fd)
        assert os.read(copy, 1) == b"\\7"
        store = os.open(STORE, os.O_RDONLY)
        os.dup2(store, copy)  # a foreign file over a descriptor of the disk
        assert os.fstat(copy).st_size > 0 and os.read(copy, 2) == b"\\0\\1"
        os.dup2(high, store)  # and the other way
        assert os.fstat(store).st_size == 0 and os.read(store, 1) == b"\\10"
        assert os.dup2(high, high) == high and os.read(high, 1) == b"\\11"
        """
    )


def test_direct_and_buffered_descriptors_of_one_program_see_the_same_data(disk: Disk) -> None:
    """Both are opened twice, copied, and closed in any order."""
    disk.python(
        """
        import mmap
        memory = memoryview(mmap.mmap(-1, 4096))
        direct, buffered = ([os.open(PATH, os.O_RDWR | flag) for _ in range(2)] for flag in (os.O_DIRECT, 0))
        copies = [os.dup(direct[0]), os.dup(buffered[0])]
        for fd in (direct[0], buffered[1], buffered[0]):
            os.close(fd)
        flags = [fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT for fd in (*copies, direct[1])]
        assert [bool(flag) for flag in flags] == [True, False, True]
        for turn in range(200):
            place = turn * 4096
            memory[:] = bytes([turn]) * 4096
            assert os.pwritev(copies[0], [memory], place) == 4096
            assert os.pwrite(copies[1], b"odd", place + 1001) == 3
            expected = bytes([turn]) * 1001 + b"odd" + bytes([turn]) * 3092
            assert os.preadv(direct[1], [memory], place) == 4096
            assert memory == expected == os.pread(copies[1], 4096, place)
        try:
            os.pwrite(copies[0], b"odd", 1)
            raise AssertionError
        except OSError as error:
            assert error.errno == errno.EINVAL
        os.close(copies[0]), os.close(direct[1])
        assert os.pread(copies[1], 3, 1001) == b"odd"
        os.close(copies[1])
        again = os.open(PATH, os.O_RDONLY)
        assert os.pread(again, 3, 1001) == b"odd"
        """
    )


def test_close_range_spares_what_the_library_holds(disk: Disk) -> None:
    disk.python(
        """
        fd = os.open(PATH, os.O_RDWR)
        os.pwrite(fd, b"odd", 1)  # has the lock file opened
        os.closerange(3, 100000)
        for fd in range(3, 2000):
            try:
                os.close(fd)
            except OSError as error:
                assert error.errno == errno.EBADF
        fd = os.open(PATH, os.O_RDWR)
        assert os.pread(fd, 4, 0) == b"\\0odd"
        assert os.pwrite(fd, b"even", 7) == 4
        """
    )


def test_a_forked_child_and_its_parent_share_a_position(disk: Disk) -> None:
    disk.python(
        """
        fd = os.open(PATH, os.O_RDWR)
        assert os.write(fd, b"parent") == 6
        if child := os.fork():
            assert os.waitpid(child, 0)[1] == 0
            assert os.lseek(fd, 0, os.SEEK_CUR) == 11
            assert os.pread(fd, 11, 0) == b"parentchild"
        else:
            os.write(fd, b"child")
            os.close(fd)
            os._exit(0)
        """
    )


def test_programs_inherit_the_disk(disk: Disk) -> None:
    disk.run("sh", "-c", f"(printf one; printf two) > {disk.path}")
    assert disk.store.read_bytes()[:7] == b"onetwo\0"
    shown = disk.run("sh", "-c", f"(dd bs=3 count=1; dd bs=3 count=1) < {disk.path}").stdout
    assert shown == b"onetwo"
    assert disk.run("sh", "-c", f"exec 5< {disk.path}; head -c 3 /dev/fd/5; head -c 3 <&5").stdout == b"oneone"
    disk.python(
        """
        import subprocess
        fd = os.open(PATH, os.O_RDONLY)
        done = subprocess.run(["head", "-c", "6"], stdin=fd, capture_output=True, check=True)
        assert done.stdout == b"onetwo"
        assert os.fstat(0).st_ino != os.fstat(fd).st_ino  # of the child alone
        """
    )


def test_streams_of_stdio(disk: Disk) -> None:
    content = bytes(range(256)) * (disk.store.stat().st_size // 256)
    disk.store.write_bytes(content)
    expected = disk.run("sha256sum", disk.store).stdout.split()[0]
    assert disk.run("sha256sum", disk.path).stdout.split()[0] == expected
    assert disk.run("sh", "-c", f"sha256sum < {disk.path}").stdout.split()[0] == expected
    disk.run("sh", "-c", f"seq 20000 > {disk.path}")
    assert disk.store.read_bytes().startswith(disk.run("seq", "20000").stdout)


def test_threads_open_read_and_close(disk: Disk) -> None:
    disk.python(
        """
        import threading
        faults = []
        def work(number):
            try:
                for turn in range(100):
                    fd = os.open(PATH, os.O_RDWR)
                    at = number * 65536 + turn * 100
                    text = b"%d-%d" % (number, turn)
                    assert os.pwrite(fd, text, at) == len(text)
                    copy = os.dup(fd)
                    os.close(fd)
                    assert os.pread(copy, len(text), at) == text
                    os.close(copy)
            except BaseException as error:
                faults.append(error)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
        [one.start() for one in threads], [one.join() for one in threads]
        assert not faults, faults
        """
    )


def test_processes_write_parts_of_the_same_blocks(disk: Disk) -> None:
    disk.python(
        """
        children = []
        for number in range(4):
            if not (child := os.fork()):
                fd = os.open(PATH, os.O_RDWR)
                for turn in range(500):
                    os.pwrite(fd, bytes([number + 1]) * 100, (turn * 4 + number) * 100)
                os._exit(0)
            children.append(child)
        for child in children:
            assert os.waitpid(child, 0)[1] == 0
        expected = b"".join(bytes([number + 1]) * 100 for number in range(4)) * 500
        assert os.pread(os.open(PATH, os.O_RDONLY), len(expected), 0) == expected
        """
    )


def test_signals_interrupt_no_request_and_may_open_the_disk(disk: Disk) -> None:
    disk.python(
        """
        import signal
        opened = []
        def handle(*_):
            fd = os.open(PATH, os.O_RDONLY)
            opened.append(os.fstat(fd).st_ino)
            os.close(fd)
        signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        for _ in range(2000):
            fd = os.open(PATH, os.O_RDWR)
            assert os.pwrite(fd, b"x" * 1000, 3) == 1000
            os.close(fd)
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert opened
        """
    )


def test_locks_exclude_each_other(disk: Disk) -> None:
    disk.python(
        """
        first, second = os.open(PATH, os.O_RDWR), os.open(PATH, os.O_RDWR)
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raise AssertionError
        except BlockingIOError:
            pass
        os.close(first)
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(second, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 100)
        """
    )


def test_closing_all_descriptors_leaves_segments(disk: Disk) -> None:
    disk.python(
        """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        libc.shmat.restype = ctypes.c_void_p
        segment = libc.shmget(0, 4096, 0o600)
        assert segment >= 0
        os.closerange(3, 1 << 16)
        others = [os.open("/dev/null", os.O_RDWR) for _ in range(600)]
        at = libc.shmat(segment, None, 0)
        assert at not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
        ctypes.memset(at, 1, 4096)
        assert libc.shmctl(segment, 0, None) == 0
        """
    )
