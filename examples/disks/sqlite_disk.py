"""A disk over an SQLite file: a row for each block of 4 KiB that is not zero.

    vdusefast serve: uri = "python:examples/disks/sqlite_disk.py:SqliteDisk?path=/srv/disk.db&size=1G"

Several queues may serve it: SQLite's own locks keep their processes apart. Each write is a transaction, in the log of
the database (WAL) when it is answered, and on the disk after a flush.
"""

import contextlib
import os
import sqlite3

import vdusefast

ZEROES = bytes(4096)


class SqliteDisk(vdusefast.Backend):
    """A key for each block."""

    block_size_bytes = 4096

    def __init__(self, path: str, size: str = "1G") -> None:
        self.path, self.size_bytes = path, vdusefast.parse_size(size)

    def open(self) -> None:
        self.db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = NORMAL")  # it syncs the log before it takes from it, and we at a flush
        self.db.execute("CREATE TABLE IF NOT EXISTS block (number INTEGER PRIMARY KEY, data BLOB NOT NULL)")

    def close(self) -> None:
        self.db.close()

    def pread(self, buffer: memoryview, offset_bytes: int) -> None:
        first, count = offset_bytes // 4096, len(buffer) // 4096
        buffer[:] = bytes(len(buffer))
        rows = self.db.execute(
            "SELECT number, data FROM block WHERE number BETWEEN ? AND ?", (first, first + count - 1)
        )
        for number, data in rows:
            buffer[(number - first) * 4096 : (number - first + 1) * 4096] = data

    def pwrite(self, buffer: memoryview, offset_bytes: int) -> None:
        first, data = offset_bytes // 4096, bytes(buffer)  # SQLite keeps what it is given
        rows = [(first + i, data[4096 * i : 4096 * (i + 1)]) for i in range(len(data) // 4096)]
        with self._transaction():
            self.db.executemany("INSERT OR REPLACE INTO block VALUES (?, ?)", [row for row in rows if row[1] != ZEROES])
            self.db.executemany("DELETE FROM block WHERE number = ?", [row[:1] for row in rows if row[1] == ZEROES])

    def write_zeroes(self, offset_bytes: int, length_bytes: int, unmap: bool) -> None:
        first, count = offset_bytes // 4096, length_bytes // 4096
        self.db.execute("DELETE FROM block WHERE number BETWEEN ? AND ?", (first, first + count - 1))

    def discard(self, offset_bytes: int, length_bytes: int) -> None:
        self.write_zeroes(offset_bytes, length_bytes, True)

    def flush(self) -> None:
        with contextlib.suppress(FileNotFoundError), open(f"{self.path}-wal", "rb") as log:  # none: nothing was written
            os.fdatasync(log.fileno())

    @contextlib.contextmanager
    def _transaction(self):
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")
