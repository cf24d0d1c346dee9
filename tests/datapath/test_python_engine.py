"""The engine of Python classes, in this process: what a class is asked for, what its answers and errors become."""

from __future__ import annotations

import asyncio
import errno
import threading
import time

import numpy as np
import pytest
from device_model import F_DISCARD, Params
from model import IOERR, OK, T_DISCARD
from python_rig import PARAMS, STORE_BYTES, BatchMemory, Memory, serve

from vdusefast import Backend

FORMS = [Memory, BatchMemory]
NO_FLUSH = PARAMS.features & ~(1 << 9)


@pytest.mark.parametrize("form", FORMS)
def test_reads_and_writes_move_the_bytes(form: type[Memory]) -> None:
    disk = form()
    with serve(disk) as served:
        assert served.read_ok(3, 1024) == disk.data[3 * 512 : 5 * 512]
        assert served.write(7, b"a" * 1024) == OK
        assert disk.data[7 * 512 : 9 * 512] == b"a" * 1024
        assert served.read_ok(6, 2048) == disk.data[6 * 512 : 10 * 512]
        assert served.flush() == OK


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [[512, 512, 512], [768, 256, 512, 1, 511], [8] * 128])
def test_memory_in_pieces(form: type[Memory], sizes: list[int]) -> None:
    """Pieces of whole blocks are given one by one, others together, by way of a buffer of our own."""
    disk = form()
    total = sum(sizes) // 512 * 512
    with serve(disk, params=Params(capacity_sectors=STORE_BYTES // 512, queue_size_max=256)) as served:
        if len(sizes) > 12:  # the rig's ring has 16 descriptors
            sizes = [total // 8 - 4, total // 8 + 4] * 4
        status, data = served.read_pieces(2, sizes)
        assert (status, data) == (OK, bytes(disk.data[1024 : 1024 + total]))
        pieces = [bytes([65 + i]) * size for i, size in enumerate(sizes)]
        assert served.write_pieces(20, pieces) == OK
        assert disk.data[20 * 512 : 20 * 512 + total] == b"".join(pieces)


def test_pieces_in_private_memory_reach_a_batch_that_asks_for_buffers() -> None:
    class Buffered(BatchMemory):
        def submit(self, batch):
            for offset, length, tag, operation, _ in batch.requests.tolist():
                if operation == self.READ:
                    batch.buffers[tag][:] = self.data[offset : offset + length]
                else:
                    self.data[offset : offset + length] = batch.buffers[tag]
            batch.complete(batch.requests["tag"])

    disk = Buffered()
    with serve(disk) as served:
        assert served.read_pieces(4, [500, 12])[1] == disk.data[2048:2560]
        assert served.write_pieces(5, [b"p" * 100, b"q" * 412]) == OK
        assert disk.data[2560:3072] == b"p" * 100 + b"q" * 412


def test_without_pwrite_flush_discard_and_write_zeroes() -> None:
    class ReadOnly(Backend):
        size_bytes = STORE_BYTES

        def pread(self, buffer, offset_bytes):
            buffer[:] = bytes([offset_bytes // 512 & 255]) * len(buffer)

    with serve(ReadOnly()) as served:
        assert served.read_ok(9) == bytes([9]) * 512
        assert served.flush() == OK
        assert served.zero(0, 4, T_DISCARD) == OK  # advice
        assert served.write(0, bytes(512)) == IOERR


def test_zeroes_are_written_where_there_is_no_other_way() -> None:
    disk = Memory()
    with serve(disk) as served:
        assert served.zero(10, 50) == OK
    assert disk.data[5120 : 60 * 512] == bytes(50 * 512)
    assert disk.data[5119]
    assert disk.data[60 * 512]
    assert disk.calls == [("pwrite", 5120, 25600)]


def test_class_zeroes_and_discards_itself() -> None:
    class Zeroing(Memory):
        def write_zeroes(self, offset_bytes, length_bytes, unmap):
            self.calls.append(("write_zeroes", offset_bytes, length_bytes, unmap))

    disk = Zeroing()
    with serve(disk) as served:
        assert served.zero(1, 3) == OK
        assert served.zero(2, 5, T_DISCARD) == OK
    assert disk.calls == [("write_zeroes", 512, 1536, False), ("discard", 1024, 2560)]


@pytest.mark.parametrize("cache", ["writethrough", "writeback"])
def test_flush_behind_each_write_where_the_driver_cannot_ask_for_one(cache: str) -> None:
    disk = Memory()
    with serve(disk, cache=cache, features=PARAMS.features if cache == "writethrough" else NO_FLUSH) as served:
        assert served.write(0, bytes(512)) == OK
        assert served.zero(2, 2) == OK
    assert disk.calls == [("pwrite", 0, 512), ("flush",), ("pwrite", 1024, 1024), ("flush",)]


def test_batch_form_flushes_behind_writes_and_a_failed_flush_fails_the_write() -> None:
    class Failing(BatchMemory):
        operations: list[int]

        def submit(self, batch):
            for _, _, tag, operation, _ in batch.requests.tolist():
                self.operations.append(operation)
                batch.complete(tag, error=errno.ENOSPC if operation == self.FLUSH else 0)

    disk = Failing()
    disk.operations = []
    with serve(disk, cache="writethrough") as served:
        assert served.write(0, bytes(512)) == IOERR
        assert served.rig.counter("last_host_errno") == errno.ENOSPC
    assert disk.operations == [Backend.WRITE, Backend.FLUSH]


def test_unsafe_flushes_nothing() -> None:
    disk = Memory()
    with serve(disk, cache="unsafe", features=NO_FLUSH) as served:
        assert served.write(0, bytes(512)) == OK
        assert served.flush() == OK
    assert disk.calls == [("pwrite", 0, 512)]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (256, "returned 256, but the request has 512 bytes"),
        (513, "returned 513"),
        (0, "returned 0"),
        (True, "returned bool"),
        (b"x" * 512, "returned bytes"),
        ("all", "returned str"),
    ],
)
def test_answers_that_make_no_sense_are_ioerr(answer: object, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    class Odd(Memory):
        def pread(self, buffer, offset_bytes):
            return answer

        def pwrite(self, buffer, offset_bytes):
            return answer

    with serve(Odd()) as served:
        assert served.read()[0] == IOERR
        assert served.write(0, bytes(512)) == IOERR
        assert served.rig.counter("host_eio") == 2
    lines = capsys.readouterr().err
    assert said in lines
    assert "python:test.py:Disk" in lines
    assert lines.count("\n") == 1  # the second within a second is counted only


def test_full_count_is_as_good_as_none() -> None:
    class Counting(Memory):
        def pread(self, buffer, offset_bytes):
            super().pread(buffer, offset_bytes)
            return len(buffer)

    with serve(Counting()) as served:
        assert served.read_ok(1) == bytes([2]) * 512


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError("no errno"), errno.EIO),
        (OSError(70000, "no such errno"), errno.EIO),
        (ValueError("wrong"), errno.EIO),
        (SystemExit(3), errno.EIO),
        (KeyboardInterrupt(), errno.EIO),
        (MemoryError(), errno.EIO),
    ],
)
def test_exceptions_become_ioerr_with_their_errno(
    form: type[Memory], error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    class Raising(form):  # type: ignore[misc,valid-type]
        raising = True

        def pread(self, buffer, offset_bytes):
            if self.raising:
                raise error
            super().pread(buffer, offset_bytes)

        def submit(self, batch):
            if self.raising:
                raise error
            super().submit(batch)

    if form is Memory:
        del Raising.submit
    disk = Raising()
    with serve(disk) as served:
        assert served.read()[0] == IOERR
        assert served.rig.counter("last_host_errno") == code
        disk.raising = False
        assert served.read_ok(1) == bytes([2]) * 512
    said = capsys.readouterr().err
    assert type(error).__name__ in said
    assert "test_python_engine.py:" in said
    assert ("Traceback" in said) == (not isinstance(error, OSError))


def test_errors_are_said_once_a_second_with_a_count(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Raising(Memory):
        def pread(self, buffer, offset_bytes):
            raise OSError(errno.EIO, "broken")

    with serve(Raising()) as served:
        for _ in range(5):
            served.read()
        assert capsys.readouterr().err.count("OSError") == 1
        monkeypatch.setattr("vdusefast.backends.python_errors.time.monotonic", lambda: time.time() + 1e9)
        served.read()
        assert "(4 more like this" in capsys.readouterr().err


def test_completing_wrongly_raises_and_harms_nothing() -> None:
    seen: list[str] = []

    class Wrong(BatchMemory):
        def submit(self, batch):
            tags = batch.requests["tag"]
            wrongs = [
                (ValueError, 12345 << 16),
                (ValueError, -1),
                (ValueError, [int(tags[0]), 99 << 16]),  # nothing of it is done
                (ValueError, [int(tags[0]), int(tags[0])]),
                (TypeError, "tag"),
                (TypeError, 1.5),
                (TypeError, [1.5]),
                (TypeError, np.zeros((2, 2), "i8")),
                (TypeError, True),
            ]
            for kind, tag in wrongs:
                with pytest.raises(kind):
                    batch.complete(tag)
            for error in (-1, 4096, "EIO", True):
                with pytest.raises(ValueError, match="errno"):
                    batch.complete(tags, error)
            super().submit(batch)
            with pytest.raises(ValueError, match="not open"):
                batch.complete(int(tags[0]))
            with pytest.raises(ValueError, match="not open"):
                batch.buffers[int(tags[0])]
            batch.complete()  # of what is open: nothing
            seen.append("all")

    with serve(Wrong()) as served:
        assert served.read_ok(4) == bytes([5]) * 512
        assert served.read_ok(5) == bytes([6]) * 512
    assert seen == ["all", "all"]


def test_store_that_is_too_small_for_a_batch_raises_before_anything_moves() -> None:
    class Small(BatchMemory):
        def submit(self, batch):
            with pytest.raises(IndexError, match="outside"):
                batch.read_from(self.data[: STORE_BYTES // 2])
            with pytest.raises(ValueError, match="places"):
                batch.read_from(self.data, at=[1, 2, 3])
            with pytest.raises(IndexError):
                batch.read_from(self.data, at=[-1])
            assert batch.read_from(self.data, at=[0]) == 1
            batch.complete()

    with serve(Small()) as served:
        assert served.read_ok(100) == bytes([1]) * 512


def test_batch_has_all_that_the_ring_held() -> None:
    counts = []

    class Counting(BatchMemory):
        def submit(self, batch):
            assert batch.requests["operation"].tolist() == [self.READ] * len(batch)
            assert not batch.requests.flags.writeable
            counts.append(len(batch))
            super().submit(batch)

    disk = Counting()
    with serve(disk) as served:
        for _ in range(3):
            served.start_reads(5)
            served.rig.poll()
            served.rig.ring.reap()
            assert [served.answer(i) for i in range(5)] == [(OK, bytes([i + 1]) * 512) for i in range(5)]
    assert counts == [5, 5, 5]


def test_rows_that_a_class_keeps_stay_as_they_were() -> None:
    kept = []

    class Keeping(BatchMemory):
        def submit(self, batch):
            kept.append(batch.requests["offset_bytes"])
            super().submit(batch)

    with serve(Keeping()) as served:
        for sector in range(5):
            served.read_ok(sector)
    assert [rows.tolist() for rows in kept] == [[512 * sector] for sector in range(5)]


def test_requests_are_completed_later_in_any_order_by_another_thread() -> None:
    batches = []

    class Late(BatchMemory):
        def submit(self, batch):
            batches.append(batch)

    disk = Late()
    with serve(disk) as served:
        served.start_reads(4)
        served.rig.queue.poll()
        assert served.rig.queue.inflight_count == 4
        (batch,) = batches

        def complete() -> None:
            for row in batch.requests[::-1]:
                time.sleep(0.01)
                batch.buffers[row["tag"]][:] = bytes([row["offset_bytes"] // 512 + 65]) * 512
                batch.complete(row["tag"])

        thread = threading.Thread(target=complete)
        thread.start()
        served.rig.poll()
        thread.join()
        assert len(served.rig.ring.reap()) == 4
        assert [served.answer(i) for i in range(4)] == [(OK, bytes([65 + i]) * 512) for i in range(4)]


@pytest.mark.parametrize("form", ["calls", "batch"])
def test_coroutines_overlap(form: str) -> None:
    order: list[int] = []

    class Calls(Memory):
        async def pread(self, buffer, offset_bytes):
            sector = offset_bytes // 512
            await asyncio.sleep(0.05 - sector * 0.01)
            order.append(sector)
            buffer[:] = bytes([65 + sector]) * len(buffer)

    class Batched(BatchMemory):
        async def submit(self, batch):
            async def one(row):
                await asyncio.sleep(0.05 - row["offset_bytes"] / 512 * 0.01)
                order.append(int(row["offset_bytes"]) // 512)
                batch.buffers[row["tag"]][:] = bytes([65 + int(row["offset_bytes"]) // 512]) * 512
                batch.complete(row["tag"])

            await asyncio.gather(*map(one, batch.requests))

    with serve(Calls() if form == "calls" else Batched()) as served:
        served.start_reads(4)
        served.rig.poll()
        served.rig.ring.reap()
        assert [served.answer(i) for i in range(4)] == [(OK, bytes([65 + i]) * 512) for i in range(4)]
    assert order == [3, 2, 1, 0]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), SystemExit(1), asyncio.CancelledError()])
@pytest.mark.parametrize("form", ["calls", "batch"])
def test_coroutine_that_raises_is_ioerr(form: str, error: BaseException) -> None:
    class Calls(Memory):
        async def pread(self, buffer, offset_bytes):
            await asyncio.sleep(0)
            raise error

    class Batched(BatchMemory):
        async def submit(self, batch):
            await asyncio.sleep(0)
            raise error

    with serve(Calls() if form == "calls" else Batched()) as served:
        assert served.read()[0] == IOERR
        assert served.rig.counter("last_host_errno") == (errno.ENOSPC if isinstance(error, OSError) else errno.EIO)


def test_request_that_is_never_answered_ends_after_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    class Never(BatchMemory):
        def submit(self, batch):
            self.late = (batch, int(batch.requests["tag"][0]), batch.buffers[int(batch.requests["tag"][0])])

    disk = Never()
    with serve(disk, timeout_s=0.2) as served:
        assert served.read()[0] == IOERR
        batch, tag, buffer = disk.late
        with pytest.raises(ValueError, match="not open"):
            batch.complete(tag)
        with pytest.raises(ValueError, match="released"):
            buffer[0] = 1
        assert served.rig.counter("last_host_errno") == errno.ETIMEDOUT
    assert "backend.timeout_s" in capsys.readouterr().err


def test_flush_has_no_buffer() -> None:
    seen = []

    class Looking(BatchMemory):
        def submit(self, batch):
            with pytest.raises(ValueError, match="no buffer"):
                batch.buffers[int(batch.requests["tag"][0])]
            seen.append(int(batch.requests["operation"][0]))
            batch.complete()

    with serve(Looking()) as served:
        assert served.flush() == OK
        assert served.zero(0, 8, T_DISCARD) == OK
    assert seen == [Backend.FLUSH, Backend.DISCARD]
    assert PARAMS.features & F_DISCARD
