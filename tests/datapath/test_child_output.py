"""The output of a class is text in the log: of a relay, a worker or a probe, much or little. Events are checked."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

import vdusefast
from vdusefast.api import Device
from vdusefast.backends import probe
from vdusefast.backends.plugin import StoreSpec
from vdusefast.base import child_output
from vdusefast.errors import BackendError
from vdusefast.worker.protocol import Event, FromWorker, pack_event, store_size_bytes

BLOCK = 4096
SIZE = 1 << 20
CLASS = """
import os, socket, struct, sys, threading
import vdusefast

def forge(packet):
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            sock = socket.socket(fileno=os.dup(fd))
            peer_pid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            if peer_pid == os.getppid() and sock.type == socket.SOCK_SEQPACKET:
                sock.send(packet)
        except OSError:
            pass

class Disk(vdusefast.Backend):
    size_bytes = {size}
    shareable = {shareable}

    def __init__(self):
        self.data = bytearray(self.size_bytes)
        {start}

    def open(self):
        {opened}

    def pread(self, buffer, offset_bytes):
        buffer[:] = self.data[offset_bytes : offset_bytes + len(buffer)]

    def pwrite(self, buffer, offset_bytes):
        self.data[offset_bytes : offset_bytes + len(buffer)] = buffer
        {written}
"""


def device_of(
    path: Path, *, written: str = "pass", opened: str = "pass", start: str = "pass", shareable: bool = False
) -> Device:
    text = CLASS.format(size=SIZE, shareable=shareable, start=start, written=written, opened=opened)
    (path / "disk.py").write_text(text)
    return Device(vdusefast.make_config(name="out", uri=f"python:{path}/disk.py:Disk", queues=2))


def answer_s(device: Device) -> float:
    """Return how long the supervisor's loop of a device takes to answer."""
    began = time.monotonic()
    assert device.responds(30)
    return time.monotonic() - began


def wait_for(caplog: pytest.LogCaptureFixture, text: str) -> None:
    deadline = time.monotonic() + 20
    while text not in caplog.text:
        assert time.monotonic() < deadline, caplog.text
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("shareable", [False, True], ids=["relay", "worker"])
@pytest.mark.parametrize(
    ("said", "logged"),
    [
        ("5", "5"),
        ('{"size_bytes": 4096}', '{"size_bytes": 4096}'),
        ('{"log": 5}', '{"log": 5}'),
        ("[" * 5000, "[" * 1000),
        ("\x1b[2J\x07", "\\x1b[2J\\x07"),
    ],
    ids=["number", "size", "log", "deep", "control"],
)
def test_print_is_a_line_of_the_log(
    tmp_path: Path, said: str, logged: str, shareable: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with device_of(tmp_path, written=f"print({said!r})", shareable=shareable) as device, device.driver() as driver:
        pids = [queue.pid for queue in device.queues()], device.info()["relay_pid"]
        driver.write(0, b"a" * BLOCK)
        wait_for(caplog, f": {logged}")
        assert driver.read(0, BLOCK) == b"a" * BLOCK
        info = device.info()
        assert (info["size_bytes"], info["failure"]) == (SIZE, "")
        assert ([queue.pid for queue in device.queues()], info["relay_pid"]) == pids


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stream", "piece"),
    [("stdout", r"'\n' * 4096"), ("stderr", r"'x' * 4096"), ("stdout", r"'y\n' * 100")],
    ids=["empty", "endless", "lines"],
)
def test_flood_holds_nobody_up(tmp_path: Path, stream: str, piece: str, caplog: pytest.LogCaptureFixture) -> None:
    """Of a thread of the class that never stops, in the relay. A device beside it shows how busy the machine is."""
    caplog.set_level("INFO")
    flood = f"threading.Thread(target=lambda: [sys.{stream}.write({piece}) for _ in iter(int, 1)], daemon=True).start()"
    quiet = Device(vdusefast.make_config(name="quiet", uri="memory:1M"))
    with quiet, device_of(tmp_path, opened=flood) as device, device.driver() as driver:
        end = time.monotonic() + 1.0
        slowest = slowest_quiet = 0.0
        while time.monotonic() < end:
            slowest_quiet = max(slowest_quiet, answer_s(quiet))
            slowest = max(slowest, answer_s(device))
        driver.write(0, b"a" * BLOCK)
        assert driver.read(0, BLOCK, queue=1) == b"a" * BLOCK
        assert device.failure is None
    assert slowest < 2 + 4 * slowest_quiet
    assert len(caplog.records) < child_output.BURST_LINES + 40 * child_output.LINES_A_SECOND


def once(path: Path, statement: str) -> str:
    """Return code that does something the first time that any process comes by."""
    mark = str(path / "done")
    return f"""
        if not os.path.exists({mark!r}):
            open({mark!r}, "w").close()
            {statement}"""


@pytest.mark.slow
def test_output_without_an_end_of_line_is_the_last_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = once(tmp_path, 'print("the last words", end=""); os._exit(3)')
    with device_of(tmp_path, written=written) as device, device.driver() as driver:
        driver.write(0, b"a" * BLOCK)
        assert driver.read(0, BLOCK, queue=1) == b"a" * BLOCK
    assert "ended with status 3; its last line: the last words; it is restarted" in caplog.text


def test_probe_may_print_what_it_likes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Much of it, and a process of its own that holds its output and lives longer."""
    caplog.set_level("INFO")
    start = 'print(\'{"error": "x"}\'); print("to stderr", file=sys.stderr); sys.stdout.write("z" * (1 << 20)); '
    start += "os.fork() or (os.close(0), __import__('time').sleep(1), os._exit(0))"
    (tmp_path / "disk.py").write_text(
        CLASS.format(size=SIZE, shareable=True, start=start, written="pass", opened="pass")
    )
    began = time.monotonic()
    described = probe.describe(StoreSpec(f"python:{tmp_path}/disk.py:Disk"), 20)
    assert described.size_bytes == SIZE
    assert time.monotonic() - began < 20
    assert ": probe (pid" in caplog.text
    assert '{"error": "x"}' in caplog.text
    assert "to stderr" in caplog.text
    time.sleep(max(0.0, began + 2 - time.monotonic()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer",
    ["[" * 60000, "5", '{"description": {"x": 1}}', '{"description": {"size_bytes": 1e999}}', "\\xff", '{"error": 5}',
     '{"description": {"size_bytes": 512, "read_only": "yes"}}', "x" * 70000,
     '{"description": {"size_bytes": ' + "9" * 5000 + "}}"],
    ids=["deep", "number", "unknown", "infinite", "utf8", "error", "flag", "long", "digits"],
)  # fmt: skip
def test_answer_of_a_probe_is_checked(tmp_path: Path, answer: str) -> None:
    """A class may write into the descriptor of the answer."""
    start = f"os.pwrite(int(sys.argv[3]), {answer!r}.encode('latin-1')[:65536], 0); os._exit(0)"
    (tmp_path / "disk.py").write_text(
        CLASS.format(size=SIZE, shareable=True, start="pass", written="pass", opened="pass") + "\n" + start + "\n"
    )
    with pytest.raises(BackendError, match=r"its (probe gave a malformed answer|module reports)"):
        probe.describe(StoreSpec(f"python:{tmp_path}/disk.py:Disk"), 20)


# -- events

MALFORMED = [
    b'{"size_bytes": 4096}',
    b"\xff" * 20,
    pack_event(FromWorker(Event.DONE, 0)),
    pack_event(FromWorker(Event.STARTUP_FAILED, 0, exit_code=1000)),
    pack_event(FromWorker(Event.STORE_SIZE, 0, text="-1")),
]


@pytest.mark.slow
@pytest.mark.parametrize("packet", MALFORMED)
def test_malformed_event_of_a_relay_is_seen_and_the_next_one_serves(tmp_path: Path, packet: bytes) -> None:
    """A class that looks for the socket of the events can write there what it likes."""
    with device_of(tmp_path, written=once(tmp_path, f"forge({packet!r})")) as device, device.driver() as driver:
        pid = device.info()["relay_pid"]
        driver.write(0, b"a" * BLOCK)
        deadline = time.monotonic() + 20
        while device.failure is None or device.info()["relay_pid"] in (pid, -1):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        # Written only now: what this class holds ends with its process.
        driver.write(0, b"b" * BLOCK, queue=1)
        assert driver.read(0, BLOCK) == b"b" * BLOCK
        assert f"device out: the relay of its store (pid {pid}) sent a malformed event (" in device.info()["failure"]
        assert device.info()["size_bytes"] == SIZE


@pytest.mark.parametrize("text", ["", "-1", "1.5", "x", "9" * 1000, str(1 << 63), "\u0661\u0662", "4096 ", "1_000"])
def test_only_sizes_are_sizes(text: str) -> None:
    assert store_size_bytes(FromWorker(Event.STORE_SIZE, 0, text="4096")) == 4096
    with pytest.raises(ValueError, match="a store of"):
        store_size_bytes(FromWorker(Event.STORE_SIZE, 0, text=text))


def test_much_output_is_kept_to_a_bounded_tail() -> None:
    output = child_output.Output("d0")
    read_fd, write_fd = os.pipe()
    os.set_blocking(read_fd, False)
    try:
        for n in range(100):
            os.write(write_fd, b"x" * 5000 + f"{n}\n".encode())
            while output.read(read_fd) > 0:
                pass
    finally:
        os.close(read_fd)
        os.close(write_fd)
    assert len(output.last_lines) == 16
    assert max(len(line) for line in output.last_lines) == 1024
