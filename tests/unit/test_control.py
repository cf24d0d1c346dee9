"""Messages between supervisor and worker survive their packets; bad ones are refused."""

from __future__ import annotations

import os

import pytest

from vdusefast.base.handed import read_arguments, write_arguments
from vdusefast.worker.protocol import (
    MESSAGE_MAX_BYTES,
    Command,
    Event,
    FromWorker,
    RequestLimits,
    ToWorker,
    WorkerSpec,
    pack_command,
    pack_event,
    unpack_command,
    unpack_event,
)

SPEC = WorkerSpec(
    device="d",
    queue=1,
    queue_size=64,
    supervisor_pid=2,
    ctl_fd=3,
    shm_fd=4,
    kick_fd=5,
    limits=RequestLimits(seg_max=6, write_zeroes_max_seg=7),
    serial="a=b c",
)


def test_commands_survive_packing() -> None:
    message = ToWorker(Command.START, 7, 2**63, 2**64 - 1, 2, 3, 32768, 0xFFFF, 5, 2**64 - 1)
    assert unpack_command(pack_command(message)) == message


def test_events_survive_packing() -> None:
    message = FromWorker(Event.RING_FAILED, 2**32 - 1, 0xFFFF, 0xFFFE, 5, "head 99 is out of range - réally")
    assert unpack_event(pack_event(message)) == message


def test_long_texts_are_cut_to_one_packet() -> None:
    packet = pack_event(FromWorker(Event.HELLO, 0, text="é" * MESSAGE_MAX_BYTES))
    assert len(packet) == MESSAGE_MAX_BYTES
    assert unpack_event(packet).text.startswith("éé")


def test_packets_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="3 bytes"):
        unpack_command(b"abc")
    with pytest.raises(ValueError, match="3 bytes"):
        unpack_event(b"abc")


def test_worker_words_survive_the_way_to_the_worker() -> None:
    assert WorkerSpec.from_arguments(read_arguments(write_arguments(SPEC.to_arguments()))) == SPEC


@pytest.mark.parametrize("word", ["colour=red", "queue", "ctl_fd=three", "seg_max=many", "limits=1"])
def test_wrong_worker_words_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match=r"unknown argument|invalid literal"):
        WorkerSpec.from_arguments([*SPEC.to_arguments(), word])


def test_missing_worker_words_are_named() -> None:
    with pytest.raises(ValueError, match="missing arguments device, queue_size"):
        WorkerSpec.from_arguments([w for w in SPEC.to_arguments() if not w.startswith(("device=", "queue_size="))])


def test_what_is_handed_over_cannot_be_changed_any_more() -> None:
    fd = write_arguments(["key=secret", ""])
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"KEY", 0)
    with pytest.raises(PermissionError):
        os.truncate(fd, 0)
    assert read_arguments(fd) == ["key=secret", ""]
    with pytest.raises(ValueError, match="NUL"):
        write_arguments(["a\0b"])
