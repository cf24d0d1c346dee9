"""For nbdkit's python plugin: a disk in a file, some of whose writes take long, so that later ones overtake them.

nbdkit python tests/torture/slow_disk.py file=FILE [multi_conn=0] [share=0.05] [min_ms=100] [max_ms=1200]
"""

import os
import random
import time

import nbdkit

API_VERSION = 2

words = {"multi_conn": "1", "share": "0.05", "min_ms": "100", "max_ms": "1200"}


def config(key: str, value: str) -> None:
    words[key] = value


def thread_model() -> int:
    return nbdkit.THREAD_MODEL_PARALLEL


def open(readonly: bool) -> int:  # noqa: A001 (as nbdkit calls it)
    return os.open(words["file"], os.O_RDWR | os.O_CLOEXEC)


def close(fd: int) -> None:
    os.close(fd)


def get_size(fd: int) -> int:
    return os.fstat(fd).st_size


def can_multi_conn(fd: int) -> bool:
    return words["multi_conn"] == "1"


def can_flush(fd: int) -> bool:
    return True


def pread(fd: int, buf: bytearray, offset: int, flags: int) -> None:
    os.preadv(fd, [buf], offset)


def pwrite(fd: int, buf: bytes, offset: int, flags: int) -> None:
    if random.random() < float(words["share"]):
        time.sleep(random.uniform(float(words["min_ms"]), float(words["max_ms"])) / 1000)
    os.pwrite(fd, buf, offset)


def flush(fd: int, flags: int) -> None:
    pass
