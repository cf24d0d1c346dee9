"""The driver of a loopback device that several processes share: it makes the board, and processes attach to it.

`AttachServer` is to a device what `LoopbackDriver` is, but its requests come from programs: csrc/preload/ in each of
them puts requests on the rings itself. The server starts the device, lets processes in, and cleans up after those that
end. If a process is killed while it works on a ring, the server resets the device and sends the requests of all others
again. csrc/board/board.h and docs/design/preload.md say how.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from vdusefast.driver._board import MAGIC, Board
from vdusefast.driver.attach_client import (
    ADD_REGION,
    END_USER,
    EVENTS,
    HELLO,
    MESSAGE,
    NEW_USER,
    REMOVE_REGION,
    Client,
    ProtocolError,
    accept,
    listen,
    make_room,
    peer_of,
)
from vdusefast.driver.board_sizes import board_words
from vdusefast.driver.disk_directory import DiskDirectory
from vdusefast.errors import VdusefastError
from vdusefast.transport import TransportError, uapi
from vdusefast.transport.virtio_blk import KNOWN_FEATURES, config_fields
from vdusefast.units import SECTOR_BYTES

if TYPE_CHECKING:
    from vdusefast.driver._board import Figures
    from vdusefast.transport.loopback_bus import LoopbackBus

ATTACH_VARIABLE = "VDUSEFAST_ATTACH"
SPIN_US = 50.0
FIRST_IOVA = 0x1_0000_0000
IOVA_STEP_BYTES = 0x10_0000
IOVA_END = 0x1000_0000_0000  # boards are above
CONNECTIONS_MAX = 1024
TIDY_S = 0.005  # between two looks at what a dead process left in flight
WATCH_S = 0.5  # between two looks at the device
LOCKS_TIMEOUT_S = 20.0  # for the living to finish what they do under a lock, however loaded the machine is
OUT_OF_FDS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

_log = logging.getLogger("vdusefast")


class AttachServer:
    """A context manager: processes can attach to the device from `__init__` to `close`."""

    def __init__(
        self,
        bus: LoopbackBus,
        *,
        serial: str = "",
        route: str = "own",
        spin_us: float | None = None,
        directory: Path | None = None,
        features: int | None = None,
    ) -> None:
        """Take the device on `bus`, and start it.

        serial: of the device, for programs. route: "own" gives each user a queue of its own where there are enough;
        with "cross" every block is read through another queue than wrote it. spin_us: how long a user spins before it
        sleeps; None: not at all on one CPU, else 50 us. directory: where the attach socket is made, private to this
        user of the machine; a new temporary one when None. features: as for LoopbackDriver. Raises VdusefastError.
        """
        self.bus = bus
        self.features = bus.offered_features & KNOWN_FEATURES if features is None else features
        if spin_us is None:
            spin_us = SPIN_US if len(os.sched_getaffinity(0)) > 1 else 0.0
        self._clients: dict[int, Client] = {}  # by their sockets
        self._pidfds: dict[int, Client] = {}  # those that were cut off, too
        self._accept_again_s = 0.0  # when to listen again, after descriptors had run out; 0: it listens
        self._ended: list[Client] = []
        self._next_iova = FIRST_IOVA
        self._failure: VdusefastError | None = None
        self._ending: list[tuple[Client, int]] = []
        self._wake_fd = -1
        self._stack = ExitStack()
        try:
            words = board_words(bus.config, self.features, bus.queue_count, bus.queue_size_max)
            self._board = Board(bus.name, serial=serial, route=route, spin_ns=int(spin_us * 1000), **words)
            self._stack.callback(self._board.close)
            self._stack.callback(self._release_device)
            bus.add_region(self._board.address, self._board.size_bytes, fd=self._board.fd)
            self._start_device()
            self._make_fds()
            self.path = self._make_socket(directory)
            self._thread = threading.Thread(target=self._serve, name=f"vdusefast-attach-{bus.name}", daemon=True)
            self._thread.start()
        except BaseException as error:
            self._stack.close()
            if isinstance(error, OSError | ValueError):
                raise VdusefastError(f"device {bus.name}: programs cannot attach: {error}") from error
            raise

    def __enter__(self) -> AttachServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs in its environment, besides the library."""
        return {ATTACH_VARIABLE: str(self.path)}

    @property
    def failure(self) -> VdusefastError | None:
        """Why the disk is gone for all programs, None while it is there."""
        return self._failure

    @property
    def capacity_bytes(self) -> int:
        """The size of the disk, as programs see it."""
        return self._board.capacity_bytes

    @property
    def users(self) -> list[int]:
        """The numbers of all users, those included whose process has ended with requests in flight."""
        return sorted(number for client in self._all_clients() for number in client.users)

    def figures(self) -> Figures:
        """Return what the queues and the server counted."""
        return self._board.figures()

    def close(self) -> None:
        """End the disk for programs: those attached get EIO. Reset the device. A second call does nothing."""
        if self._wake_fd >= 0:
            os.eventfd_write(self._wake_fd, 1)
            self._thread.join()
            self._wake_fd = -1
        try:
            self._stack.close()  # resets the device first: a program that gets EIO uses its buffers again
        finally:
            for client in self._all_clients():
                client.close()
            self._clients.clear()
            self._pidfds.clear()
            self._ended.clear()

    # -- the device

    def _start_device(self) -> None:
        """Take the device through the status up to DRIVER_OK, with the rings that are in the board."""
        self.bus.negotiate(self.features)
        for queue in range(self.bus.queue_count):
            areas = self._board.areas(queue)
            self.bus.set_vq(queue, self.bus.queue_size_max, *areas, uapi.fresh_vq_state(self.features))
            self.bus.set_vq_ready(queue, True)
        self.bus.driver_ok()
        for queue in range(self.bus.queue_count):
            self._board.set_fds(queue, self.bus.kickfd(queue), self.bus.irqfd(queue))

    def _release_device(self) -> None:
        regions = [iova for client in self._all_clients() for iova in client.regions]
        try:
            self.bus.reset()
            for iova in [*regions, self._board.address]:
                with suppress(KeyError):
                    self.bus.remove_region(iova)
        except TransportError:
            return  # the device is gone or broken; its server reports why, and the memory goes with the bus

    def _recover(self) -> None:
        """Reset the device after a process ended in the middle of something; send the requests of others again."""
        _log.info("device %s: a program was killed while it worked on a queue; the device is reset", self.bus.name)
        try:
            for queue in range(self.bus.queue_count):
                self._take_lock(queue)
            for client in self._ended:
                self._end_users(client)
            self.bus.reset()
            self._board.replay()
            self._start_device()
        except (VdusefastError, ValueError, OSError) as error:
            self._fail(error)
            return
        self._board.resume()

    def _take_lock(self, queue: int) -> None:
        """Lock a queue; take it over from a process that has ended."""
        deadline_s = time.monotonic() + LOCKS_TIMEOUT_S
        while holder := self._board.lock(queue):
            clients = [client for client in self._all_clients() if holder in client.users]
            if not clients and self._board.seize(queue, holder):
                return  # a write that went astray: there is no such user
            for client in clients:
                if client in self._ended or client.has_ended():
                    if client not in self._ended:
                        self._forget(client)
                    if self._board.seize(queue, holder):
                        return
                    break  # it unlocked before it ended
            if time.monotonic() > deadline_s:
                raise TransportError(f"device {self.bus.name}: queue {queue}: user {holder} does not unlock it")
            time.sleep(0.0002)

    def _fail(self, error: Exception) -> None:
        """Give the disk up: all requests of all programs fail."""
        if self._failure is None:
            failure = error if isinstance(error, VdusefastError) else VdusefastError(str(error))
            self._failure = failure
            _log.error("device %s: programs have lost the disk: %s", self.bus.name, error)
            with suppress(TransportError, OSError):  # of a device that is gone or broken
                self.bus.reset()  # before the programs get EIO, and use their buffers again
            for client in list(self._clients.values()):
                with suppress(OSError):
                    client.sock.shutdown(socket.SHUT_RDWR)

    # -- clients

    def _all_clients(self) -> list[Client]:
        """Return all clients of whom something is left, each once. Any thread may call this."""
        return list(dict.fromkeys([*list(self._clients.values()), *list(self._pidfds.values()), *list(self._ended)]))

    def _make_fds(self) -> None:
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stack.callback(os.close, self._wake_fd)
        self._epoll = select.epoll()
        self._stack.callback(self._epoll.close)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._epoll.register(self.bus.config_irqfd, select.EPOLLIN)

    def _make_socket(self, directory: Path | None) -> Path:
        if directory is None:
            made = DiskDirectory()
            self._stack.callback(made.close)
            directory = made.path
        path = directory / self.bus.name
        self._listener = listen(path)
        self._stack.callback(self._listener.close)
        self._stack.callback(path.unlink, missing_ok=True)
        self._epoll.register(self._listener, select.EPOLLIN)
        return path

    def _serve(self) -> None:
        """Serve until `close`."""
        try:
            while True:
                for fd, _events in self._epoll.poll(TIDY_S if self._untidy else WATCH_S):
                    if fd == self._wake_fd:
                        return
                    if fd == self._listener.fileno():
                        self._accept()
                    elif fd == self.bus.config_irqfd:
                        self._follow_config()
                    else:
                        self._serve_client(fd)
                self._tidy()
                self._watch()
                self._resume_accepting()
        except Exception as error:  # the programs must not wait for ever
            _log.exception("device %s: the attach server has failed", self.bus.name)
            self._fail(error)

    def _watch(self) -> None:
        """Notice a device that is gone, and a ring that is broken."""
        if self._failure is not None:
            return
        if self.bus.broken or not self.bus.attached:
            self._fail(TransportError(f"device {self.bus.name} is broken, or was stopped"))
        elif self._board.broken():
            self._fail(TransportError(f"device {self.bus.name}: a ring is broken"))
        elif (owners := self._board.owners()) and owners - set(self.users):
            self._recover()  # a lock that nobody will ever release

    def _follow_config(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self.bus.config_irqfd)
        self._board.set_capacity(config_fields(self.bus.config)["capacity"] * SECTOR_BYTES)

    def _accept(self) -> None:
        try:
            sock = accept(self._listener)
        except OSError as error:
            if error.errno in OUT_OF_FDS:
                self._pause_accepting(error)
            elif error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                _log.warning("device %s: cannot accept a program: %s", self.bus.name, error.strerror)
            return
        pid, uid = peer_of(sock)
        if uid not in (os.geteuid(), 0) or len(self._clients) >= CONNECTIONS_MAX:
            _log.warning("device %s: process %d (user %d) may not attach", self.bus.name, pid, uid)
            sock.close()
            return
        make_room(sock.fileno())
        pidfd = -1
        with suppress(OSError):
            pidfd = os.pidfd_open(pid)
        client = self._clients[sock.fileno()] = Client(sock, pid, pidfd)
        self._epoll.register(sock, select.EPOLLIN)
        if pidfd >= 0:
            self._pidfds[pidfd] = client
            self._epoll.register(pidfd, select.EPOLLIN)

    def _pause_accepting(self, error: OSError) -> None:
        """Listen again when a program has ended, or after a while: the listener stays readable until then."""
        make_room(self._listener.fileno())
        if not self._accept_again_s:
            _log.warning("device %s: programs must wait to attach: %s", self.bus.name, error.strerror)
            self._epoll.modify(self._listener, 0)
        self._accept_again_s = time.monotonic() + WATCH_S

    def _resume_accepting(self) -> None:
        if self._accept_again_s and time.monotonic() >= self._accept_again_s:
            self._accept_again_s = 0.0
            self._epoll.modify(self._listener, select.EPOLLIN)

    def _serve_client(self, fd: int) -> None:
        client = self._clients.get(fd) or self._pidfds.get(fd)
        if client is None:
            return  # it was forgotten by an earlier event of this round
        if client.deaf or fd == client.pidfd:
            if client.deaf or client.has_ended():  # else the event was of an earlier process, and of its descriptor
                self._end(client)
            return
        try:
            packet, fds, is_cut = client.receive()
        except BlockingIOError:
            return
        try:
            if not packet:
                self._end(client)
            elif is_cut and MESSAGE.size == len(packet) and MESSAGE.unpack(packet)[0] == ADD_REGION:
                make_room(client.sock.fileno())
                self._reply(client, ADD_REGION, error=errno.ENOMEM)  # our descriptors have run out: memory is copied
            else:
                self._answer(client, packet, fds)
        except ProtocolError as error:
            self._refuse(client, str(error))
        except (OSError, TransportError) as error:
            self._refuse(client, f"it cannot be answered, or does not take the answer: {error}")
        finally:
            for one in fds:
                os.close(one)

    def _refuse(self, client: Client, why: str) -> None:
        """Cut a client off that does not keep to the protocol. What it has in flight ends when the process does."""
        _log.warning("device %s: process %d is cut off: %s", self.bus.name, client.pid, why)
        client.deaf = True
        if client.users:  # to the program the end of the connection is EIO, but the device may be using its buffers
            with suppress(OSError):
                client.sock.shutdown(socket.SHUT_RD)
            self._epoll.modify(client.sock, 0)  # of its end alone
            return
        self._end(client)  # nothing of it is in flight

    def _answer(self, client: Client, packet: bytes, fds: list[int]) -> None:
        if len(packet) != MESSAGE.size:
            raise ProtocolError(f"a message of {len(packet)} bytes, where {MESSAGE.size} are due")
        op, _error, arg, _reserved, a, b = MESSAGE.unpack(packet)
        if len(fds) != (op == ADD_REGION):
            raise ProtocolError(f"{len(fds)} descriptors with message {op}")
        match op:
            case _ if op == HELLO:
                if a != MAGIC:
                    self._reply(client, op, error=errno.EPROTONOSUPPORT)
                else:
                    board = self._board
                    self._reply(client, op, (board.fd,), a=board.address, b=board.size_bytes)
            case _ if op == EVENTS:
                if arg >= self.bus.queue_count:
                    raise ProtocolError(f"there is no queue {arg}")
                self._reply(client, op, (self.bus.kickfd(arg), self.bus.irqfd(arg)))
            case _ if op == NEW_USER:
                number, queue = self._board.new_user(joined=bool(b))
                if number:
                    client.users.append(number)
                self._reply(client, op, error=0 if number else errno.EAGAIN, arg=number, a=queue)
            case _ if op == END_USER:
                self._end_user(client, arg)
            case _ if op == ADD_REGION:
                self._add_region(client, a, b, fds[0])
            case _ if op == REMOVE_REGION:
                if a not in client.regions:
                    raise ProtocolError(f"it has no region at {a:#x}")
                client.regions.remove(a)
                self._remove_region(a)
            case _:
                raise ProtocolError(f"message {op} is not known")

    def _reply(
        self, client: Client, op: int, fds: Sequence[int] = (), *, error: int = 0, arg: int = 0, a: int = 0, b: int = 0
    ) -> None:
        socket.send_fds(client.sock, [MESSAGE.pack(op, error, arg, 0, a, b)], fds)

    def _add_region(self, client: Client, size_bytes: int, offset_bytes: int, fd: int) -> None:
        iova = self._next_iova
        error = client.refuses_region(size_bytes, offset_bytes, fd)
        if not error and iova + size_bytes > IOVA_END:
            error = errno.ENOSPC
        elif not error:
            try:
                self.bus.add_region(iova, size_bytes, fd=fd, fd_offset=offset_bytes)
            except (OSError, ValueError, TransportError) as failure:
                _log.warning("device %s: process %d: memory is copied: %s", self.bus.name, client.pid, failure)
                error = errno.ENOMEM
            else:
                client.regions.append(iova)
                self._next_iova += -(-size_bytes // IOVA_STEP_BYTES) * IOVA_STEP_BYTES + IOVA_STEP_BYTES
        self._reply(client, ADD_REGION, error=error, a=iova)

    def _remove_region(self, iova: int) -> None:
        try:
            self.bus.remove_region(iova)
        except KeyError:
            return
        except TransportError as error:
            self._fail(error)

    # -- the ends of clients

    def _end_user(self, client: Client, number: int) -> None:
        """A user of a living process has ended, with nothing in flight."""
        if number not in client.users:
            raise ProtocolError(f"it has no user {number}")
        self._ending.append((client, number))
        self._tidy()

    def _forget(self, client: Client) -> None:
        """Note that a process has ended: its connection closes now, the rest once its requests have."""
        for clients, fd in ((self._clients, client.sock.fileno()), (self._pidfds, client.pidfd)):
            if clients.pop(fd, None) is not None:
                self._epoll.unregister(fd)
        client.close()
        self._ended.append(client)
        if self._accept_again_s:
            self._accept_again_s = time.monotonic()

    def _end(self, client: Client) -> None:
        if client in self._ended:
            return
        self._forget(client)
        if self._failure is None and any(self._board.holds_lock(user) for user in client.users):
            self._recover()
        elif client.users:
            self._kick_all()
        self._tidy()

    def _kick_all(self) -> None:
        """Kick the device for a process that was killed between publishing and its kick: others will send none."""
        with suppress(TransportError, OSError):  # of a device that is gone: `_watch` notices
            for queue in range(self.bus.queue_count):
                os.eventfd_write(self.bus.kickfd(queue), 1)

    def _end_living(self, client: Client, number: int) -> bool:
        """Free a user's number, unless a queue is locked just now. Returns True when it is free."""
        if number in client.users and self._board.end_user(number):
            return False
        client.users = [user for user in client.users if user != number]
        return True

    @property
    def _untidy(self) -> bool:
        return bool(self._ended or self._ending) and self._failure is None

    def _end_users(self, client: Client) -> None:
        client.users = [user for user in client.users if self._board.end_user(user)]

    def _tidy(self) -> None:
        """Clean up after processes that have ended, as far as their requests have."""
        if not self._untidy:
            return
        self._ending = [(client, user) for client, user in self._ending if not self._end_living(client, user)]
        self._board.reap()
        for client in list(self._ended):
            self._end_users(client)
            if any(self._board.holds_lock(user) for user in client.users):
                self._recover()
            if not client.users:
                for iova in client.regions:
                    self._remove_region(iova)
                client.regions.clear()
                if client in self._ended:
                    self._ended.remove(client)
