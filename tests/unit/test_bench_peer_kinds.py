"""The peers' own sides: servers and tools, nbd's handshake, and whether the data on them are right."""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
from dataclasses import replace
from pathlib import Path

import fake_fio
import pytest
from fake_peers import A

from vdusefast.bench.peers import data_check
from vdusefast.bench.peers import kernel_nbd as nbd
from vdusefast.bench.peers import kinds as peer_kinds
from vdusefast.bench.peers.peer import PeerSetup, ServerProcess, first_line, run_tool
from vdusefast.errors import TimedOutError, VdusefastError
from vdusefast.host import netlink

MIB = 1 << 20


# -- servers and tools


def setup_of(tmp_path: Path) -> PeerSetup:
    return PeerSetup(tmp_path / "f", 4 * MIB, 2, (), tmp_path, "tag")


def test_server_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    server = ServerProcess("kind", ["sh", "-c", "echo first; echo last words; exit 3"], tmp_path / "log")
    with pytest.raises(VdusefastError, match="kind ended with status 3: last words"):
        server.wait_for("socket", lambda: None)
    server.end()


def test_server_that_is_never_ready_and_ignores_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vdusefast.bench.peers.peer.END_S", 0.2)
    words = ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"]
    server = ServerProcess("kind", words, tmp_path / "log")
    server.wait_for("word", lambda: "ready" in (tmp_path / "log").read_text())
    with pytest.raises(TimedOutError, match=r"kind: no socket after 0\.1 s: ready"):
        server.wait_for("socket", lambda: None, 0.1)
    server.end()
    assert server.process.returncode == -signal.SIGKILL
    server.end()


def test_death_of_a_server_ends_the_wait_for_fio(tmp_path: Path) -> None:
    peer = A(setup_of(tmp_path))
    server = peer.serve(["sh", "-c", "exit 4"])
    server.process.wait()
    with pytest.raises(VdusefastError, match="sh ended with status 4"):
        peer.check()
    peer.stop()


def test_servers_are_pinned_where_that_is_asked_for(tmp_path: Path) -> None:
    peer = A(replace(setup_of(tmp_path), cpus=(0,)))
    server = peer.serve(["sh", "-c", "grep Cpus_allowed_list /proc/self/status"])
    server.process.wait()
    peer.stop()
    assert server.said.split() == ["Cpus_allowed_list:", "0"]
    assert peer.commands == [["sh", "-c", "grep Cpus_allowed_list /proc/self/status"]]


def test_tool_that_fails_is_told_with_its_words() -> None:
    with pytest.raises(VdusefastError, match="status 2: cannot"):
        run_tool(["sh", "-c", "echo cannot >&2; exit 2"])
    with pytest.raises(VdusefastError, match="cannot be started"):
        run_tool(["/nonexistent/tool"])
    assert first_line(["/nonexistent/tool"]) == ""
    assert first_line(["sh", "-c", "echo one; echo two"]) == "one"


def test_peers_that_are_not_installed_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "apt-get install qemu-system-common" in peer_kinds.QemuStorageDaemon.missing()
    assert "apt-get install nbdkit" in peer_kinds.Nbdkit.missing()
    assert "no ublk server" in peer_kinds.Ublk.missing()


def test_ublk_server_is_added_and_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "ublk"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", fake_fio.first_on_path(tmp_path))
    monkeypatch.setattr("vdusefast.bench.common.block_node.wait_for", lambda node, size_bytes, timeout_s: None)
    monkeypatch.setattr(peer_kinds, "_free_number", lambda prefix: 7)
    peer = peer_kinds.Ublk(setup_of(tmp_path))
    peer.start()
    assert peer.node == "/dev/ublkb7"
    peer.stop()
    added, deleted = (tmp_path / "calls").read_text().splitlines()
    assert added == f"add -t loop -n 7 -q 2 -d 128 -f {tmp_path / 'f'}"
    assert deleted == "del -n 7"


# -- nbd


def serve_nbd(sock: socket.socket, answers: bytes, asked: list[bytes]) -> threading.Thread:
    def serve() -> None:
        sock.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        asked.append(sock.recv(4))
        asked.append(sock.recv(1024))
        sock.sendall(answers)
        sock.close()

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def nbd_reply(kind: int, data: bytes) -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, 7, kind, len(data)) + data


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (nbd_reply(3, struct.pack(">HQH", 0, 64 * MIB, 0x103)) + nbd_reply(1, b""), ""),
        (nbd_reply((1 << 31) + 6, b"go away"), "refuses its export: go away"),
        (nbd_reply(1, b""), "did not say how large"),
        (b"\0" * 20, "makes no sense"),
        (b"", "hung up"),
    ],
    ids=["export", "refused", "no size", "nonsense", "closed"],
)
def test_nbd_handshake(answers: bytes, message: str) -> None:
    ours, theirs = socket.socketpair()
    asked: list[bytes] = []
    thread = serve_nbd(theirs, answers, asked)
    with ours:
        if message:
            with pytest.raises(VdusefastError, match=message):
                nbd.handshake(ours)
        else:
            assert nbd.handshake(ours) == nbd.Export(64 * MIB, 0x103)
            assert asked == [struct.pack(">I", 3), b"IHAVEOPT" + struct.pack(">IIIH", 7, 6, 0, 0)]
    thread.join()


def test_nbd_refuses_what_is_no_server() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"SSH-2.0-OpenSSH_9.2")
        with pytest.raises(VdusefastError, match="newstyle"):
            nbd.handshake(ours)


def test_nbd_attributes_are_aligned_and_nested() -> None:
    item = netlink.attribute(nbd._SOCK_ITEM | netlink.NESTED, nbd._u32(nbd._SOCK_FD, 5))
    packed = nbd._u64(nbd._ATTR_SIZE_BYTES, MIB) + netlink.attribute(9, b"abc") + item
    assert len(packed) % 4 == 0
    found = netlink._unpack(packed)
    assert found == {nbd._ATTR_SIZE_BYTES: MIB.to_bytes(8, "little"), 9: b"abc", nbd._SOCK_ITEM: nbd._u32(1, 5)}


# -- is the data right


@pytest.fixture
def buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files stand in for devices where their file system has no O_DIRECT."""
    monkeypatch.setattr(os, "O_DIRECT", 0)


@pytest.mark.usefixtures("buffered")
def test_data_check_passes_what_is_right_and_leaves_it_so(tmp_path: Path) -> None:
    path = tmp_path / "f"
    data_check.make_file(path, 2 * MIB, 1)
    before = path.read_bytes()
    assert len({before[at : at + 4096] for at in range(0, len(before), 4096)}) == 512
    data_check.compare(str(path), path, 2 * MIB)
    data_check.check_writes(str(path), path, 2 * MIB, 1)
    assert path.read_bytes() == before


@pytest.mark.usefixtures("buffered")
def test_data_check_finds_one_wrong_byte(tmp_path: Path) -> None:
    path, node = tmp_path / "f", tmp_path / "node"
    data_check.make_file(path, 2 * MIB, 1)
    content = bytearray(path.read_bytes())
    content[MIB + 3 * 4096 + 100] ^= 1
    node.write_bytes(content)
    with pytest.raises(data_check.DataError, match=f"read at byte {MIB + 3 * 4096} differs from its file"):
        data_check.compare(str(node), path, 2 * MIB)


@pytest.mark.usefixtures("buffered")
def test_data_check_finds_writes_that_do_not_arrive(tmp_path: Path) -> None:
    path, node = tmp_path / "f", tmp_path / "node"
    for each in (path, node):
        data_check.make_file(each, MIB, 1)
    with pytest.raises(data_check.DataError, match="flushed is not in its file"):
        data_check.check_writes(str(node), path, MIB, 1)


@pytest.mark.usefixtures("buffered")
def test_data_check_finds_a_device_that_is_too_short(tmp_path: Path) -> None:
    path, node = tmp_path / "f", tmp_path / "node"
    data_check.make_file(path, 2 * MIB, 1)
    data_check.make_file(node, MIB, 1)
    with pytest.raises(data_check.DataError, match="came up short"):
        data_check.compare(str(node), path, 2 * MIB)
