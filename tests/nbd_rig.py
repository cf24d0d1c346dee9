"""NBD servers for tests: nbdkit and qemu-nbd as processes, and one of ours that breaks the protocol."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import vdusefast
from vdusefast.driver.loopback_driver import LoopbackDriver

MIB = 1 << 20
START_S = 20.0

FLAG_HAS_FLAGS, FLAG_READ_ONLY, FLAG_FLUSH, FLAG_FUA = 1, 2, 4, 8
FLAG_TRIM, FLAG_ZERO, FLAG_MULTI_CONN = 32, 64, 256
ALL_FLAGS = FLAG_HAS_FLAGS | FLAG_FLUSH | FLAG_FUA | FLAG_TRIM | FLAG_ZERO | FLAG_MULTI_CONN
READ, WRITE, DISC, FLUSH, TRIM, _CACHE, ZERO = range(7)
REPLY_MAGIC, STRUCTURED_MAGIC, REQUEST_MAGIC = 0x67446698, 0x668E33EF, 0x25609513


def unix_uri(path: Path, export: str = "", scheme: str = "nbd+unix", **parameters: object) -> str:
    """Return the URI of an export at a Unix socket."""
    more = "".join(f"&{key.replace('_', '-')}={value}" for key, value in parameters.items())
    return f"{scheme}:///{export}?socket={path}{more}"


class Server:
    """A server that is a process and listens at an address: a Unix socket's path, or a port here. A context manager."""

    def __init__(self, address: Path | int, words: list[str]) -> None:
        self.address = address
        self.uri = unix_uri(address) if isinstance(address, Path) else f"nbd://127.0.0.1:{address}"
        self.words = words
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        """The port that it listens at."""
        assert isinstance(self.address, int)
        return self.address

    def start(self) -> None:
        """Start it and wait until it listens."""
        if isinstance(self.address, Path):
            self.address.unlink(missing_ok=True)
        self._process = subprocess.Popen(self.words, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + START_S
        while not listens(self.address):
            assert self._process.poll() is None, f"{self.words[0]} has ended with {self._process.returncode}"
            assert time.monotonic() < deadline, f"{self.words[0]} does not listen"
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGKILL) -> None:
        """End it by a signal, and wait for that."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(START_S)
            self._process = None

    def signal(self, number: int) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


class KeptServer(Server):
    """A server that is started again whenever it ends by itself.

    nbdkit 1.32 does, by an assertion, when a client goes while an answer is being sent to it.
    """

    def start(self) -> None:
        """Start it, and wait until it listens."""
        super().start()
        self._ends = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="nbd server's keeper")
        self._keeper.start()

    def stop(self, number: int = signal.SIGKILL) -> None:
        """End it for good."""
        if self._process is not None:
            self._ends.set()
            self._keeper.join(START_S)
        super().stop(number)

    def _keep(self) -> None:
        while not self._ends.wait(0.02):
            if self._process is not None and self._process.poll() is not None:
                super().start()


def listens(address: Path | int) -> bool:
    """Return whether somebody accepts connections there."""
    unix = isinstance(address, Path)
    with socket.socket(socket.AF_UNIX if unix else socket.AF_INET, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(os.fspath(address) if isinstance(address, Path) else ("127.0.0.1", address))
        except OSError:
            return False
    return True


def nbdkit(path: Path, *words: str, options: tuple[str, ...] = ()) -> Server:
    """Return nbdkit with a plugin and its parameters, not started."""
    return Server(path, ["nbdkit", "--foreground", "--exit-with-parent", f"--unix={path}", *options, *words])


def kept_nbdkit(path: Path, *words: str, options: tuple[str, ...] = ()) -> KeptServer:
    """Return an nbdkit for clients that are killed."""
    return KeptServer(path, nbdkit(path, *words, options=options).words)


def nbdkit_tcp(*words: str, options: tuple[str, ...] = ()) -> Server:
    """Return nbdkit at a free port of the loopback address, not started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    where = ("--ipaddr=127.0.0.1", f"--port={port}")
    return Server(port, ["nbdkit", "--foreground", "--exit-with-parent", *where, *options, *words])


def qemu_nbd(path: Path, image: Path, *options: str) -> Server:
    """Return qemu-nbd over an image, not started. To end it in order: SIGTERM."""
    return Server(path, ["qemu-nbd", "--persistent", "--shared=8", f"--socket={path}", *options, str(image)])


@contextmanager
def served(uri: str, **options: object) -> Iterator[tuple[vdusefast.Device, LoopbackDriver]]:
    """Serve a store and drive it."""
    config = vdusefast.make_config(name="nbd", uri=uri, **options)
    with vdusefast.Device(config) as device, device.driver() as driver:
        yield device, driver


def verified_fio(uri: str, *options: str, seconds: float = 1.0) -> None:
    """Load the store with `bench raw` and have every block compared."""
    words = [
        "--name=v",
        "--rw=randrw",
        "--verify=crc32c",
        "--bs=4k",
        "--iodepth=32",
        "--size=8M",
        "--output-format=json",
    ]
    command = [sys.executable, "-m", "vdusefast.bench", "raw", *words, f"--runtime={seconds * 1000:g}ms", *options]
    done = subprocess.run(
        [*command, f"--backend={uri}"], capture_output=True, text=True, timeout=50, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    job = json.loads(done.stdout)["jobs"][0]
    assert job["error"] == 0
    assert job["write"]["total_ios"] > 50


@dataclass
class Request:
    """As it came over the socket."""

    flags: int
    kind: int
    cookie: int
    offset: int
    length: int
    data: bytes = b""


class CloseError(Exception):
    """A behaviour's way to have the connection closed."""


@dataclass
class Behaviour:
    """A server's behaviour. `on_request` may send, sleep or raise CloseError; False = serve it as usual."""

    size: int = 8 * MIB
    flags: int = ALL_FLAGS
    blocks: tuple[int, int, int] | None = None
    greeting: bytes | None = None  # in place of the right one
    go_reply: bytes | None = None  # in place of the right one
    refuse: tuple[int, str] | None = None  # the error that answers NBD_OPT_GO
    exports: tuple[str, ...] = ()
    hang_at: str = ""  # greeting, option
    on_request: Callable[[socket.socket, Request], bool] = field(default=lambda sock, request: False)


class FakeServer:
    """A server in a thread: each connection has the next behaviour, all that follow the last one. A context manager.

    data: what it stores. requests: all that it has got.
    """

    def __init__(self, path: Path, *behaviours: Behaviour) -> None:
        self.uri = unix_uri(path)
        self.data = bytearray(max(behaviour.size for behaviour in behaviours))
        self.requests: list[Request] = []
        self.connection_count = 0
        self._behaviours = list(behaviours)
        self._path = path
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._stopped = False

    def __enter__(self) -> FakeServer:
        self._path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(os.fspath(self._path))
        self._listener.listen(16)
        self._thread = threading.Thread(target=self._accept, name="fake nbd server")
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(START_S)
        self._listener.close()
        self.hang_up()
        for thread in self._threads:
            thread.join(START_S)

    def behave(self, *behaviours: Behaviour) -> None:
        """Change what the connections to come meet."""
        self._behaviours = list(behaviours)

    def hang_up(self) -> None:
        """End all connections that there are."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    @property
    def stopped(self) -> bool:
        """Return whether behaviours that wait are to end."""
        return self._stopped

    def _accept(self) -> None:
        while not self._stopped:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            behaviour = self._behaviours.pop(0) if len(self._behaviours) > 1 else self._behaviours[0]
            self.connection_count += 1
            self._sockets.append(sock)
            thread = threading.Thread(target=self._serve, args=(sock, behaviour), name="fake nbd connection")
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket, behaviour: Behaviour) -> None:
        with sock, contextlib.suppress(CloseError, OSError):
            if self._shake_hands(sock, behaviour):
                while True:
                    self._serve_request(sock, behaviour)

    def _hang(self, sock: socket.socket) -> None:
        while sock.recv(4096):
            pass
        raise CloseError

    def _shake_hands(self, sock: socket.socket, behaviour: Behaviour) -> bool:
        if behaviour.hang_at == "greeting":
            self._hang(sock)
        right = b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3)
        sock.sendall(right if behaviour.greeting is None else behaviour.greeting)
        receive(sock, 4)
        while True:
            _magic, option, length = struct.unpack(">QII", receive(sock, 16))
            body = receive(sock, length)
            if behaviour.hang_at == "option":
                self._hang(sock)
            if option == 7:
                name = body[4 : 4 + int.from_bytes(body[:4], "big")].decode()
                if self._go(sock, behaviour, name):
                    return True
            elif option == 3 and behaviour.exports:
                for name in behaviour.exports:
                    reply(sock, option, 2, struct.pack(">I", len(name)) + name.encode())
                reply(sock, option, 1, b"")
            elif option == 2:
                reply(sock, option, 1, b"")
                raise CloseError
            else:
                reply(sock, option, 0x80000001, b"")

    def _go(self, sock: socket.socket, behaviour: Behaviour, name: str) -> bool:
        if behaviour.go_reply is not None:
            sock.sendall(behaviour.go_reply)
            return True
        if behaviour.refuse is not None:
            reply(sock, 7, behaviour.refuse[0], behaviour.refuse[1].encode())
            return False
        if behaviour.exports and name not in behaviour.exports:
            reply(sock, 7, 0x80000006, b"")
            return False
        reply(sock, 7, 3, struct.pack(">HQH", 0, behaviour.size, behaviour.flags))
        if behaviour.blocks is not None:
            reply(sock, 7, 3, struct.pack(">HIII", 3, *behaviour.blocks))
        reply(sock, 7, 1, b"")
        return True

    def _serve_request(self, sock: socket.socket, behaviour: Behaviour) -> None:
        _magic, flags, kind, cookie, offset, length = struct.unpack(">IHHQQI", receive(sock, 28))
        request = Request(flags, kind, cookie, offset, length)
        if kind == WRITE:
            request.data = receive(sock, length)
        self.requests.append(request)
        if kind == DISC:
            raise CloseError
        if not behaviour.on_request(sock, request):
            self.serve(sock, request)

    def serve(self, sock: socket.socket, request: Request) -> None:
        """Carry a request out and answer it."""
        answer = b""
        if request.kind == WRITE:
            self.data[request.offset : request.offset + request.length] = request.data
        elif request.kind == READ:
            answer = bytes(self.data[request.offset : request.offset + request.length])
        elif request.kind in (TRIM, ZERO):
            self.data[request.offset : request.offset + request.length] = bytes(request.length)
        sock.sendall(simple_reply(request, 0) + answer)


def simple_reply(request: Request, error: int, *, magic: int = REPLY_MAGIC, cookie: int | None = None) -> bytes:
    """Return the header of a reply."""
    return struct.pack(">IIQ", magic, error, request.cookie if cookie is None else cookie)


def reply(sock: socket.socket, option: int, kind: int, body: bytes) -> None:
    """Answer an option."""
    sock.sendall(struct.pack(">QIII", 0x3E889045565A9, option, kind, len(body)) + body)


def receive(sock: socket.socket, size: int) -> bytes:
    """Return so many bytes. Raises CloseError at the end."""
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise CloseError
        data += more
    return data
