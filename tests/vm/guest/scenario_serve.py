"""`serve` in the foreground under a service manager's eyes, and the socket on which commands are taken."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import guest
from checks import check

NOBODY = 65534
READY_S = 60.0


class Manager:
    """The socket of a service manager (sd_notify), and what it was told."""

    def __init__(self) -> None:
        self.path = guest.WORK / "notify"
        self.path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self.told: list[str] = []

    def wait_for(self, line: str, timeout_s: float = READY_S) -> None:
        """Wait until a message with that line has come."""
        deadline = time.monotonic() + timeout_s
        while not any(line in message.splitlines() for message in self.told):
            self._socket.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                self.told.append(self._socket.recv(4096).decode())
            except TimeoutError:
                raise AssertionError(f"no {line} within {timeout_s:g} s: {self.told}") from None

    def close(self) -> None:
        """Remove the socket."""
        self._socket.close()
        self.path.unlink()


@contextlib.contextmanager
def served(name: str, uri: str) -> Iterator[tuple[subprocess.Popen[str], Manager]]:
    """Run `serve` with a manager, from its being ready on; it must have ended at the end."""
    manager = Manager()
    environment = os.environ | {"NOTIFY_SOCKET": str(manager.path)}
    words = guest.vdusefast_words("serve", guest.write_config(name, uri))
    with subprocess.Popen(words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            manager.wait_for("READY=1")
            yield process, manager
            assert process.poll() is not None, "it still runs"
        finally:
            if process.poll() is None:
                process.terminate()  # a killed server would leave its device in the kernel
                process.wait(40)
            manager.close()


def ask(connection: socket.socket, method: str) -> dict[str, object]:
    """Send one call by hand and return the answer."""
    connection.settimeout(20)
    with contextlib.suppress(BrokenPipeError):  # hung up already; its last word can still be read
        connection.sendall(json.dumps({"jsonrpc": "2.0", "id": 7, "method": method, "params": {}}).encode() + b"\n")
    with connection.makefile("rb") as stream:
        return dict(json.loads(stream.readline()))


@check(limit_s=120)
def tells_the_service_manager() -> dict[str, object]:
    """READY=1 comes when the disk is there, STOPPING=1 after SIGTERM, and the end is a clean one."""
    with served("vd0", "memory:16M") as (process, manager):
        node = guest.node_of("vd0")
        assert Path(node).is_block_device(), node
        guest.sh("dd", "if=/dev/zero", f"of={node}", "bs=64k", "count=4", "oflag=direct")
        process.send_signal(signal.SIGTERM)
        manager.wait_for("STOPPING=1")
        out, err = process.communicate(timeout=40)
        assert process.returncode == 0, f"status {process.returncode}: {out}{err}"
        assert not Path(node).exists()
        return {"told": manager.told, "stdout": out}


@check(limit_s=120)
def sigterm_of_a_background_server() -> None:
    """The same for what `add` has started: the device goes, once what is in flight is done."""
    node = str(guest.add("vd0", "memory:16M", queues=2)["node"])
    pids = guest.pids_of("vd0")
    guest.sh("dd", "if=/dev/zero", f"of={node}", "bs=1M", "count=4", "oflag=direct")
    os.kill(pids[0], signal.SIGTERM)
    guest.wait_for("the server to end", lambda: not any(map(guest.running, pids)), 40)
    assert not Path(node).exists()


@check(limit_s=120)
def the_socket() -> None:
    """JSON-RPC for root alone: by mode, and by the kernel's word on who the peer is."""
    with guest.device("vd0", "memory:16M"):
        directory = guest.RUN_BASE / "vd0"
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        path = next(entry for entry in directory.iterdir() if entry.is_socket())
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            answer = ask(connection, "info")
            assert answer["id"] == 7, answer
            assert answer["result"]["name"] == "vd0", answer  # type: ignore[index]
            assert answer["result"]["node"] == guest.node_of("vd0"), answer  # type: ignore[index]
            assert "error" in ask(connection, "nonsense")
        assert in_child(lambda: try_as_nobody(path)) == "no way in"
        for place in (guest.RUN_BASE, directory):
            place.chmod(0o755)
        path.chmod(0o666)
        said = in_child(lambda: try_as_nobody(path))
        assert said.startswith("{"), said
        assert "error" in json.loads(said), said
        assert "result" not in json.loads(said), said
        for place in (guest.RUN_BASE, directory):
            place.chmod(0o700)
        assert guest.info("vd0")["state"] == "running"


def try_as_nobody(path: Path) -> str:
    """Ask for the device's deletion as nobody, and return the answer."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(path))
        except PermissionError:
            return "no way in"
        return json.dumps(ask(connection, "delete"))


def in_child(work: object) -> str:
    """Run `work()` in a process of its own and return the string that it returns."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write_fd, work().encode())  # type: ignore[operator]
        except BaseException as error:
            os.write(write_fd, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write_fd)
    with open(read_fd, "rb") as stream:
        said = stream.read().decode()
    os.waitpid(pid, 0)
    return said


@check(limit_s=120)
def list_is_quick() -> dict[str, float]:
    """`list` loads and asks little: compared with a bare start of the interpreter, which emulation slows too."""
    with guest.device("vd0", "memory:16M"):
        spent: dict[str, list[float]] = {"bare": [], "list": []}
        for _ in range(3):
            for what, words in (("bare", ["-c", "pass"]), ("list", ["-m", "vdusefast", "list"])):
                started_s = time.monotonic()
                said = guest.sh(guest.vdusefast_words()[0], *words)
                spent[what].append(time.monotonic() - started_s)
        assert "vd0" in said
    best = {what: min(times) for what, times in spent.items()}
    assert best["list"] < 8 * best["bare"], best
    return {what: round(seconds, 2) for what, seconds in best.items()}
