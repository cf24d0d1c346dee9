"""A compressed thin disk: blocks of 64 KiB in a log, packed by zlib; what was never written takes no room.

    vdusefast serve: uri = "python:examples/disks/thin_disk.py:ThinDisk?path=/srv/thin.vft&size=64G"

The file has records (block number, length, checksum, packed bytes); a block of zeroes is one without bytes. Where each
block's last record lies is a NumPy array, made from the log when the disk is opened, which cuts off a record that
a crash has left half-written. Two processes would not know of each other's records: one serves all queues.
"""

import os
import zlib

import numpy as np

import vdusefast

BLOCK_BYTES = 1 << 16
RECORD = np.dtype([("block", "<u4"), ("length", "<u4"), ("crc", "<u4")])


class ThinDisk(vdusefast.Backend):
    """One instance for all queues."""

    shareable = False

    def __init__(self, path: str, size: str = "1G", level: str = "1") -> None:
        self.path, self.level = path, int(level)
        self.size_bytes = -(-vdusefast.parse_size(size) // BLOCK_BYTES) * BLOCK_BYTES

    def open(self) -> None:
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        count = self.size_bytes // BLOCK_BYTES
        self.at = np.zeros(count, "i8")  # of the packed bytes; with length 0: zeroes
        self.length = np.zeros(count, "u4")
        self.end = 0
        while len(head := os.pread(self.fd, RECORD.itemsize, self.end)) == RECORD.itemsize:
            block, length, crc = np.frombuffer(head, RECORD)[0]
            packed = os.pread(self.fd, int(length), self.end + RECORD.itemsize)
            if block >= count or len(packed) != length or zlib.crc32(packed, int(block)) != crc:
                break
            self._note(int(block), int(length))
        if self.writable:
            os.ftruncate(self.fd, self.end)

    def close(self) -> None:
        os.close(self.fd)

    def pread(self, buffer: memoryview, offset_bytes: int) -> None:
        for block, start, part in self._parts(buffer, offset_bytes):
            part[:] = self._block(block)[start : start + len(part)]

    def pwrite(self, buffer: memoryview, offset_bytes: int) -> None:
        for block, start, part in self._parts(buffer, offset_bytes):
            data = bytearray(BLOCK_BYTES) if len(part) == BLOCK_BYTES else bytearray(self._block(block))
            data[start : start + len(part)] = part
            self._append(block, zlib.compress(data, self.level) if np.frombuffer(data, "u8").any() else b"")

    def discard(self, offset_bytes: int, length_bytes: int) -> None:
        first, last = -(-offset_bytes // BLOCK_BYTES), (offset_bytes + length_bytes) // BLOCK_BYTES
        for block in range(first, last):
            if self.length[block]:
                self._append(block, b"")

    def flush(self) -> None:
        os.fdatasync(self.fd)

    def _parts(self, buffer: memoryview, offset_bytes: int):
        done = 0
        while done < len(buffer):
            block, start = divmod(offset_bytes + done, BLOCK_BYTES)
            part = buffer[done : done + BLOCK_BYTES - start]
            yield block, start, part
            done += len(part)

    def _block(self, block: int) -> bytes:
        if not self.length[block]:
            return bytes(BLOCK_BYTES)
        return zlib.decompress(os.pread(self.fd, int(self.length[block]), int(self.at[block])))

    def _append(self, block: int, packed: bytes) -> None:
        record = np.array((block, len(packed), zlib.crc32(packed, block)), RECORD).tobytes() + packed
        if os.pwrite(self.fd, record, self.end) != len(record):
            raise OSError(28, "no room for the record")
        self._note(block, len(packed))

    def _note(self, block: int, length: int) -> None:
        self.at[block], self.length[block] = self.end + RECORD.itemsize, length
        self.end += RECORD.itemsize + length
