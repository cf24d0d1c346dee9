"""Old writes and NBD: what a server still works on lands before anything newer, or fails; whatever dies meanwhile."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from nbd_rig import MIB, READ, WRITE, Behaviour, CloseError, FakeServer, Request, nbdkit, served, simple_reply

from vdusefast.bench.torture.loopback_host import LoopbackHost
from vdusefast.bench.torture.server import LoopbackServer
from vdusefast.config import make_config
from vdusefast.driver.loopback_driver import LoopbackDriver

pytestmark = pytest.mark.slow

BLOCK = 4096
ROOT = Path(__file__).parents[2]


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not after {timeout_s} s: {what}"
        time.sleep(0.01)


@contextmanager
def served_apart(tmp_path: Path, uri: str, **options: Any) -> Iterator[tuple[LoopbackServer, LoopbackDriver]]:
    """Serve a store by processes that can all be killed, and drive it."""
    config = make_config(name="fence", uri=uri, **options)
    with (
        LoopbackHost(tmp_path / "bus") as host,
        LoopbackServer(config, host.path, tmp_path, msg_timeout_s=90) as server,
    ):
        server.start(recover=False)
        server.wait_ready()
        with LoopbackDriver(host.bus) as driver:
            yield server, driver
        server.stop()
    wait_until(lambda: not keepers(tmp_path), "no keeper is left")


def keepers(tmp_path: Path) -> list[psutil.Process]:
    """Return the keepers of devices whose run directory is in a directory of ours."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if any("vdusefast.state.keeper" in word for word in process.info["cmdline"] or ()) and any(
                file.path.startswith(os.fspath(tmp_path)) for file in process.open_files()
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


def relay_pid(server: LoopbackServer) -> int:
    workers = set(server.worker_pids())
    return next(child.pid for child in psutil.Process(server.pid).children() if child.pid not in workers)


class SlowDisk:
    """An nbdkit whose first write takes until `release`; files next to the image say how far it is."""

    def __init__(self, directory: Path, *, multi_conn: bool = True) -> None:
        self.image = directory / "disk.img"
        self.image.write_bytes(bytes(MIB))
        self._begun, self._done, self._released = (directory / name for name in ("begun", "done", "released"))
        write = (
            f"cat > $tmpdir/w.$$; if mkdir {self._begun} 2>/dev/null; then until [ -e {self._released} ]; do "
            f"sleep 0.05; done; slow=1; fi; "
            f"dd if=$tmpdir/w.$$ of={self.image} seek=$4 conv=notrunc oflag=seek_bytes bs=64k status=none; "
            f'rm $tmpdir/w.$$; [ -z "$slow" ] || touch {self._done}'
        )
        read = f"dd if={self.image} skip=$4 count=$3 iflag=count_bytes,skip_bytes bs=64k status=none"
        self.server = nbdkit(
            directory / "s",
            *("get_size=echo 1048576", "can_write=exit 0", "can_flush=exit 0", "flush=exit 0"),
            *("thread_model=echo parallel", f"can_multi_conn=exit {0 if multi_conn else 3}"),
            *(f"pread={read}", f"pwrite={write}"),
            options=("eval",),
        )

    def begun(self) -> bool:
        return self._begun.exists()

    def release(self) -> None:
        self._released.touch()

    def done(self) -> bool:
        return self._done.exists()


@pytest.mark.parametrize(
    ("victim", "slow_s"),
    [("worker", 6.0), ("relay", 0.5), ("supervisor", 0.5), ("group", 0.5), ("supervisor twice", 0.5), ("keeper", 0.5)],
)
def test_write_that_is_with_a_slow_server_lands_before_newer_ones(tmp_path: Path, victim: str, slow_s: float) -> None:
    disk = SlowDisk(tmp_path, multi_conn=victim != "relay")
    with disk.server, served_apart(tmp_path, disk.server.uri, queues=2) as (server, driver):
        if victim == "keeper":  # the next one has what this one had
            (first,) = keepers(tmp_path)
            first.kill()
            wait_until(lambda: [one for one in keepers(tmp_path) if one.pid != first.pid], "another keeper")
        thread = threading.Thread(target=lambda: driver.write(0, b"a" * BLOCK))
        thread.start()
        wait_until(disk.begun, "the slow write is there")
        if victim == "worker":
            server.kill_worker(0)
        elif victim == "relay":
            os.kill(relay_pid(server), signal.SIGKILL)
        else:
            server.kill(with_workers=victim == "group")
            server.start_again(0.5 if victim == "supervisor twice" else -1.0, with_workers=False)
        time.sleep(slow_s)
        assert thread.is_alive(), "acknowledged while the old one may still land"
        disk.release()
        thread.join(30)
        assert not thread.is_alive()
        assert disk.done()
        driver.write(0, b"b" * BLOCK)
        driver.flush()
        assert driver.read(0, BLOCK) == b"b" * BLOCK
        time.sleep(0.2)
        assert disk.image.read_bytes()[:BLOCK] == b"b" * BLOCK


def slow_first_write(server: list[FakeServer], order: list[str], slow_s: float) -> Callable[..., bool]:
    """Return a behaviour whose first write is slow, and quick from then on."""

    def behave(connection: socket.socket, request: Request) -> bool:
        if request.kind != WRITE:
            return False
        if order:
            order.append(f"quick {request.data[:1].decode()}")
            return False
        order.append("slow begins")
        time.sleep(slow_s)
        server[0].data[request.offset : request.offset + request.length] = request.data
        order.append("slow ends")
        connection.sendall(simple_reply(request, 0))
        return True

    return behave


@pytest.mark.parametrize("packed", [False, True])
def test_write_in_doubt_fails_after_a_while_and_the_rest_goes_on(tmp_path: Path, packed: bool) -> None:
    """Supervisor, workers and keeper are gone: nobody has the socket by which the end could be seen."""
    order: list[str] = []
    fake: list[FakeServer] = []
    with FakeServer(tmp_path / "s", Behaviour(on_request=slow_first_write(fake, order, 4.0))) as nbd:
        fake.append(nbd)
        nbd.data[BLOCK : 2 * BLOCK] = b"r" * BLOCK
        with served_apart(tmp_path, nbd.uri, reconnect_s=1.5, packed=packed) as (server, driver):
            errors: list[OSError] = []

            def write() -> None:
                try:
                    driver.write(0, b"a" * BLOCK)
                except OSError as error:
                    errors.append(error)

            thread = threading.Thread(target=write)
            thread.start()
            wait_until(lambda: order, "the slow write is there")
            (keeper,) = keepers(tmp_path)
            keeper.kill()
            server.kill(with_workers=True)
            began = time.monotonic()
            server.start_again(-1.0, with_workers=False)
            thread.join(30)
            assert errors, "the write in doubt is no success"
            assert time.monotonic() - began > 1.0
            driver.write(2 * BLOCK, b"c" * BLOCK)
            assert driver.read(BLOCK, BLOCK) == b"r" * BLOCK
            assert "quick a" not in order
            said = "a write of 4096 bytes at 0 ends with an error: it is unknown whether the server"
            wait_until(lambda: said in server.log.read_text(), said)


def test_read_in_doubt_is_no_reason_to_wait(tmp_path: Path) -> None:
    asked = threading.Event()

    def behave(connection: socket.socket, request: Request) -> bool:
        if request.kind != READ or asked.is_set():
            return False
        asked.set()
        time.sleep(0.5)
        raise CloseError

    with (
        FakeServer(tmp_path / "s", Behaviour(on_request=behave)) as nbd,
        served_apart(tmp_path, nbd.uri, reconnect_s=300) as (server, driver),
    ):
        found: list[bytes] = []
        thread = threading.Thread(target=lambda: found.append(driver.read(0, BLOCK)))
        thread.start()
        assert asked.wait(10)
        (keeper,) = keepers(tmp_path)
        keeper.kill()
        server.kill(with_workers=True)
        server.start_again(-1.0, with_workers=False)
        thread.join(25)
        assert found == [bytes(BLOCK)]


def test_connection_that_is_lost_is_ended_before_writes_are_sent_again(tmp_path: Path) -> None:
    """The worker lives, but its connection is of no use: the server breaks the protocol while it works."""
    order: list[str] = []

    def behave(connection: socket.socket, request: Request) -> bool:
        if request.kind != WRITE:
            return False
        if order:
            order.append(f"quick {request.data[:1].decode()}")
            return False
        order.append("slow begins")
        connection.sendall(b"\xa5" * 64)
        time.sleep(1.0)
        nbd.data[request.offset : request.offset + request.length] = request.data
        order.append("slow ends")
        raise CloseError

    with FakeServer(tmp_path / "s", Behaviour(on_request=behave)) as nbd, served(nbd.uri) as (device, driver):
        driver.write(0, b"a" * BLOCK)
        driver.write(0, b"b" * BLOCK)
        assert bytes(nbd.data[:BLOCK]) == b"b" * BLOCK
        assert device.failure is None
    assert order == ["slow begins", "slow ends", "quick a", "quick b"]


def test_write_without_an_answer_fails_once_its_connection_has_ended(tmp_path: Path) -> None:
    """It may land until then, over what is written once the driver knows of its failure."""
    order: list[str] = []
    fake: list[FakeServer] = []
    with FakeServer(tmp_path / "s", Behaviour(on_request=slow_first_write(fake, order, 4.0))) as nbd:
        fake.append(nbd)
        with served(nbd.uri, timeout_s=2.0) as (_, driver):
            with pytest.raises(OSError, match="request type 1"):
                driver.write(0, b"a" * BLOCK)
            assert order == ["slow begins", "slow ends"]
            driver.write(0, b"b" * BLOCK)
            assert driver.read(0, BLOCK) == b"b" * BLOCK
    assert order == ["slow begins", "slow ends", "quick b"]


def test_connection_that_the_kernel_gives_up_leaves_writes_in_doubt(tmp_path: Path) -> None:
    """As when the server's machine is silent for too long: nobody has heard that the connection has ended."""
    program = tmp_path / "doubt"
    sources = [Path(__file__).parent / "nbd_doubt.c", *sorted((ROOT / "csrc" / "nbd").glob("*.c"))]
    words = [
        "cc",
        "-std=gnu11",
        "-O1",
        "-g",
        f"-I{ROOT / 'csrc'}",
        "-Wl,--wrap=recvmsg",
        "-o",
        program,
        *sources,
        "-lnbd",
    ]
    compiled = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert compiled.returncode == 0, compiled.stderr
    writes: list[int] = []

    def behave(connection: socket.socket, request: Request) -> bool:
        if request.kind == WRITE:
            writes.append(request.offset)
        return nbd.connection_count == 1  # nothing is answered there

    with FakeServer(tmp_path / "s", Behaviour(on_request=behave)) as nbd:
        done = subprocess.run([program, nbd.uri], capture_output=True, text=True, timeout=40)
    assert done.returncode == 0, done.stdout + done.stderr
    assert writes == [0, BLOCK]
    assert "a write of 512 bytes at 0 ends with an error" in done.stdout
