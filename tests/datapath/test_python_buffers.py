"""Buffers of Python classes: straight over the driver's memory, refused after completion, and taken away where kept."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from model import OK
from python_rig import BatchMemory, Memory, serve
from rig import IN_IOVA, OUT_IOVA

KEEPERS: dict[str, Callable[[memoryview], object]] = {
    "slice": lambda buffer: buffer[16:64],
    "memoryview": memoryview,
    "array": lambda buffer: np.frombuffer(buffer, "u1"),
    "cast": lambda buffer: buffer.cast("Q"),
    "toreadonly": lambda buffer: buffer.toreadonly(),
}


class Keeping(Memory):
    """Keeps something of the first buffer of each operation."""

    def __init__(self, keep: Callable[[memoryview], object]) -> None:
        super().__init__()
        self.keep = keep
        self.kept: list[object] = []

    def pread(self, buffer, offset_bytes):
        self.kept.append(self.keep(buffer))
        super().pread(buffer, offset_bytes)

    def pwrite(self, buffer, offset_bytes):
        self.kept.append(self.keep(buffer))
        super().pwrite(buffer, offset_bytes)


def test_buffer_is_the_drivers_memory() -> None:
    class Looking(Memory):
        def pread(self, buffer, offset_bytes):
            assert buffer.tobytes() == b"\xee" * 512
            assert not buffer.readonly
            super().pread(buffer, offset_bytes)
            seen.append(served.rig.memory.read(OUT_IOVA, 512) == buffer)

        def pwrite(self, buffer, offset_bytes):
            assert buffer.readonly
            with pytest.raises(TypeError):
                buffer[0] = 1
            served.rig.memory.write(IN_IOVA + 16, b"Y")  # a driver that changes its mind
            seen.append(buffer[0] == ord("Y"))

    seen: list[bool] = []
    with serve(Looking()) as served:
        served.read_ok(1)
        assert served.write(1, b"x" * 512) == OK
    assert seen == [True, True]


def test_buffer_is_released_after_completion() -> None:
    disk = Keeping(lambda buffer: buffer)
    with serve(disk) as served:
        served.read_ok(1)
        assert served.write(1, b"x" * 512) == OK
        for buffer in disk.kept:
            with pytest.raises(ValueError, match="released"):
                buffer[0]


def test_owner_of_a_buffer_makes_no_more_views_after_completion() -> None:
    disk = Keeping(lambda buffer: buffer.obj)
    with serve(disk) as served:
        served.read_ok(1)
        with pytest.raises(BufferError, match="complete"):
            memoryview(disk.kept[0])
        served.rig.queue.invalidate(0, 2**64 - 1)
        with pytest.raises(BufferError, match="complete"):
            memoryview(disk.kept[0])


@pytest.mark.parametrize("how", KEEPERS)
def test_kept_views_lead_nowhere_and_data_stay_right(how: str, capsys: pytest.CaptureFixture[str]) -> None:
    disk = Keeping(KEEPERS[how])
    with serve(disk) as served:
        assert served.read_ok(1) == bytes([2]) * 512
        kept = np.frombuffer(memoryview(disk.kept[0]).cast("B"), "u1")
        assert not kept.any()  # zeroes, not what was read
        for _ in range(3):
            served.rig.memory.write(OUT_IOVA, b"\xcc" * 512)
            assert not kept.any()  # nor what the driver has there now
            assert served.read_ok(2) == bytes([3]) * 512
            assert served.write(5, b"w" * 512) == OK
        if not kept.flags.writeable:
            kept = np.frombuffer(disk.kept[2], "u1") if how != "toreadonly" else kept
        if kept.flags.writeable:
            before = served.rig.memory.read(OUT_IOVA, 512)
            kept[:] = 0x77
            assert served.rig.memory.read(OUT_IOVA, 512) == before
        assert disk.data[5 * 512 : 6 * 512] == b"w" * 512
        served.rig.queue.invalidate(0, 2**64 - 1)
        assert kept.sum() in (0, 0x77 * kept.size)  # it still can be looked at
    said = capsys.readouterr().err
    assert said.count("Keeping has kept a buffer") == 1
    assert "bytes(buffer)" in said


def test_view_of_what_was_written_that_is_kept_is_read_only_and_zero() -> None:
    disk = Keeping(lambda buffer: buffer[:8])
    with serve(disk) as served:
        assert served.write(0, b"secret! " * 64) == OK
        assert bytes(disk.kept[0]) == bytes(8)
        assert disk.data[:512] == b"secret! " * 64


def test_views_that_are_let_go_in_time_cost_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    class Slicing(Memory):
        def pread(self, buffer, offset_bytes):
            half = buffer[: len(buffer) // 2]
            array = np.frombuffer(buffer, "u1")
            array[:] = 7
            half[:] = b"h" * len(half)

    with serve(Slicing()) as served:
        for _ in range(3):
            assert served.read_ok() == b"h" * 256 + b"\x07" * 256
    assert capsys.readouterr().err == ""


def test_request_with_a_kept_view_waits_for_the_others_of_its_region() -> None:
    """Taking the region away must not cost what is still being read into it."""
    batches = []

    class Late(BatchMemory):
        def submit(self, batch):
            batches.append(batch)

    with serve(Late()) as served:
        served.start_reads(2)
        served.rig.queue.poll()
        (batch,) = batches
        first, second = batch.requests["tag"].tolist()
        buffers = [batch.buffers[tag] for tag in (first, second)]
        buffers[0][:] = b"a" * 512
        kept = buffers[0][:]
        batch.complete(first)
        served.rig.queue.poll()
        assert served.rig.queue.inflight_count == 2
        buffers[1][:] = b"b" * 512
        batch.complete(second)
        assert bytes(kept) == bytes(512)
        served.rig.poll()
        assert [served.answer(i) for i in range(2)] == [(OK, b"a" * 512), (OK, b"b" * 512)]


def test_buffer_in_use_by_a_thread_is_taken_away_under_it() -> None:
    """A thread that still reads a request that another has completed sees zeroes in the end, and the process lives."""

    class Threaded(BatchMemory):
        def submit(self, batch):
            tag = int(batch.requests["tag"][0])
            self.array = np.frombuffer(batch.buffers[tag], "u1")
            super().submit(batch)

    disk = Threaded()
    stop = threading.Event()
    with serve(disk) as served:
        served.read_ok(1)

        def look() -> None:
            while not stop.is_set():
                int(disk.array.sum())

        thread = threading.Thread(target=look)
        thread.start()
        for sector in range(200):
            assert served.read_ok(sector % 100) == bytes([sector % 100 + 1]) * 512
        served.rig.queue.invalidate(0, 2**64 - 1)
        stop.set()
        thread.join()


def test_completed_tag_cannot_be_used_again_by_its_number() -> None:
    """Tags are never the same twice: what is completed late does not complete another request."""
    tags = []

    class Numbering(BatchMemory):
        def submit(self, batch):
            tags.extend(batch.requests["tag"].tolist())
            super().submit(batch)

    with serve(Numbering()) as served:
        for _ in range(50):
            served.read_ok()
    assert len(set(tags)) == 50
