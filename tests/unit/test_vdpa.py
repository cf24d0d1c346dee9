"""The netlink family vdpa, with the kernel's side played over a socket pair."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vdusefast.errors import KernelSupportError
from vdusefast.host import netlink, vdpa

FAMILY = 0x1D
HEADER = struct.Struct("=IHHII")


def message(kind: int, body: bytes, flags: int = 0) -> bytes:
    return HEADER.pack(HEADER.size + len(body), kind, flags, 1, 0) + body


def acknowledgement(err: int, words: str = "") -> bytes:
    text = words.encode() + b"\0"
    extra = struct.pack("=HH", 4 + len(text), 1) + text if words else b""
    return message(2, struct.pack("=i", -err) + bytes(HEADER.size) + extra, 0x200 if words else 0x100)


def family(number: int) -> bytes:
    return message(0x10, struct.pack("=BBH", 1, 2, 0) + struct.pack("=HHHxx", 6, 1, number))


@contextmanager
def kernel(monkeypatch: pytest.MonkeyPatch, *answers: list[bytes]) -> Iterator[list[bytes]]:
    """Answer each message with the packets of the next list; yields what was asked."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    asked: list[bytes] = []

    def serve() -> None:
        for packets in answers:
            asked.append(theirs.recv(4096))
            for packet in packets:
                theirs.send(packet)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    monkeypatch.setattr(netlink, "open_socket", lambda: ours)
    with ours, theirs:
        yield asked
        thread.join(5)


def test_device_new_names_the_device_and_its_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    with kernel(monkeypatch, [family(FAMILY), acknowledgement(0)], [acknowledgement(0)]) as asked:
        vdpa.device_new("vd0")
    size, kind, flags, _seq, _pid = HEADER.unpack_from(asked[1])
    assert (size, kind, flags) == (len(asked[1]), FAMILY, 5)
    assert asked[1][HEADER.size :] == (
        b"\x03\x01\0\0" + b"\x08\0\x04\0vd0\0" + b"\x0a\0\x02\0vduse\0\0\0"  # DEV_NEW, DEV_NAME, MGMTDEV_DEV_NAME
    )


def test_device_delete_names_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with kernel(monkeypatch, [family(FAMILY) + acknowledgement(0)], [acknowledgement(0)]) as asked:
        vdpa.device_delete("a-device")
    assert asked[1][HEADER.size :] == b"\x04\x01\0\0" + b"\x0d\0\x04\0a-device\0\0\0\0"


def test_the_kernels_refusal_is_raised_in_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = acknowledgement(errno.ENODEV, "vdpa: device not found")
    with kernel(monkeypatch, [family(FAMILY), acknowledgement(0)], [refusal]):
        with pytest.raises(OSError, match=r"No such device \(vdpa: device not found\)") as raised:
            vdpa.device_delete("x")
        assert raised.value.errno == errno.ENODEV


def test_a_kernel_without_vdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        kernel(monkeypatch, [acknowledgement(errno.ENOENT)]),
        pytest.raises(KernelSupportError, match="modprobe vduse"),
    ):
        vdpa.device_new("x")


@pytest.mark.parametrize(
    "packet",
    [HEADER.pack(8, 2, 0, 1, 0), HEADER.pack(4000, 2, 0, 1, 0)],
    ids=["shorter than its header", "longer than the packet"],
)
def test_an_answer_of_an_impossible_size(monkeypatch: pytest.MonkeyPatch, packet: bytes) -> None:
    with kernel(monkeypatch, [packet]), pytest.raises(OSError, match="impossible size"):
        vdpa.family_id()


@pytest.fixture
def no_netlink(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Forbid netlink, and put a `vdpa` of the given lines first in PATH; returns the file that it may write to."""

    def refuse() -> socket.socket:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    def make(script: str) -> Path:
        tool = tmp_path / "vdpa"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        return tmp_path / "words"

    monkeypatch.setattr(netlink, "open_socket", refuse)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return make


def test_the_tool_stands_in_where_netlink_is_forbidden(no_netlink: Callable[[str], Path]) -> None:
    words = no_netlink('echo "$@" >> "$(dirname "$0")/words"')
    vdpa.device_new("vd0")
    vdpa.device_delete("vd0")
    assert words.read_text().splitlines() == ["dev add name vd0 mgmtdev vduse", "dev del vd0"]


@pytest.mark.slow
def test_the_tools_own_words_are_passed_on(no_netlink: Callable[[str], Path]) -> None:
    no_netlink('echo "kernel answers: No such device" >&2; exit 1')
    with pytest.raises(OSError, match="vdpa dev del vd0: kernel answers: No such device"):
        vdpa.device_delete("vd0")
