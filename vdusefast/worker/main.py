"""A worker: one process, one virtqueue, one CPU. It pins itself, maps, serves, and reports why it ended.

Started by the supervisor with the arguments of a WorkerSpec (protocol.py) and the descriptors that these name. It
knows nothing of the kernel's control messages, of netlink or of configuration files. Its imports and tables are part
of the start-up time and the memory of every queue, so it is little.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
import socket
import struct
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from vdusefast.base.build import EXIT_OTHER_BUILD, OtherBuildError
from vdusefast.base.engines import IO_URING, OF_ONE_STORE
from vdusefast.base.handed import read_arguments
from vdusefast.base.kinds import TransportKind
from vdusefast.errors import ConfigError, KernelSupportError, VdusefastError, WorkerError
from vdusefast.host import final_kill
from vdusefast.worker.protocol import MESSAGE_MAX_BYTES, Command, Event, FromWorker, ToWorker, WorkerSpec
from vdusefast.worker.protocol import pack_event as pack
from vdusefast.worker.protocol import unpack_command as unpack

if TYPE_CHECKING:
    from collections.abc import Callable

    from vdusefast.backends.plugin import Plugin
    from vdusefast.worker._datapath import Queue

_MADV_POPULATE_WRITE = 23  # Linux 5.14
# How often to check whether the rings are in the driver's map again; an invalidation triggers a check, too.
_REMAP_MS = 100
_PAGES_HEADER = struct.Struct("=8sII4xIIIII")  # the start of struct vf_shm_header, without the number of queues
_IO_URING_REFUSED = (errno.ENOSYS, errno.EPERM, errno.EACCES, errno.ENOMEM)
_CANNOT_NOT_WAIT = (errno.EOPNOTSUPP, errno.EINVAL)


def _engine_order(spec: WorkerSpec) -> list[str]:
    """Return the engines to try, best first."""
    if spec.engine != "auto":
        return [spec.engine]
    if spec.store in OF_ONE_STORE:
        return [spec.store]
    # O_DIRECT waits for a device, and a ring for many. Data in the page cache costs the same by a plain read, and the
    # ring is for the rest. Where a read cannot be asked not to wait, as on tmpfs, there is nothing to wait for.
    return ["uring" if spec.direct_align else "cached", "sync"]


def _lock_pages(shm_fd: int) -> int:
    """Return a descriptor with a shared lock on the shared pages, of an open file of its own. Raises OSError."""
    fd = os.open(f"/proc/self/fd/{shm_fd}", os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return fd


def _open_engine(queue: Queue, spec: WorkerSpec) -> str:
    """Open the configured engine, or the best that this kernel allows. Returns its name for people.

    Raises VdusefastError.
    """
    order = _engine_order(spec)
    # Held open until our last I/O completes, so that a successor knows when it may replay: our supervisor by the pipe,
    # a later one by the lock (SharedPages.reopen).
    hold_fds = [fd for fd in (spec.life_fd, _lock_pages(spec.shm_fd)) if fd >= 0]
    for name in order:
        try:
            queue.open_engine(
                name,
                store=spec.store,
                fd=spec.store_fd,
                size_bytes=spec.capacity_sectors * 512,
                cache=spec.cache,
                direct_align=spec.direct_align,
                granule=spec.granule_bytes,
                discard_unit=spec.discard_unit_bytes,
                discard_offset=spec.discard_offset_bytes,
                lock_fd=spec.shm_fd,
                witness_fd=spec.store_witness_fd,
                hold_fds=hold_fds,
                merge=bool(spec.merge and not spec.faults),  # a request that a rule delays must not be part of another
                sqpoll=bool(spec.sqpoll),
                map_reads=bool(spec.map_reads and not spec.faults),
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        except OSError as error:
            if name == order[-1] or not _is_refusal(name, error):
                raise _engine_error(name, error) from error
        else:
            special = ["mapped reads"] * queue.maps_reads + ["sqpoll"] * bool(spec.sqpoll and name in IO_URING)
            return f"{name} ({', '.join(special)})" if special else name
    raise WorkerError("no engine to try")


def _is_refusal(name: str, error: OSError) -> bool:
    """Return whether the kernel or the store refuses an engine, so that the next one is tried."""
    if name == "cached" and error.errno in _CANNOT_NOT_WAIT:
        return True
    return name in IO_URING and error.errno in _IO_URING_REFUSED


def _engine_error(name: str, error: OSError) -> VdusefastError:
    """Return the error for a configured engine that cannot be opened."""
    if name == "cached" and error.errno in _CANNOT_NOT_WAIT:
        return KernelSupportError(
            'engine cached: this store cannot be read without waiting (tmpfs, or cache = "none"); use engine "auto"'
        )
    if not _is_refusal(name, error):
        return WorkerError(f"engine {name} cannot be opened: {error.strerror}")
    return KernelSupportError(
        f"engine {name}: this kernel refuses io_uring ({os.strerror(error.errno or 0)}); "
        'use engine "sync", or allow it (sysctl kernel.io_uring_disabled, seccomp, memlock)'
    )


def _try_reclaim(step: Callable[[], None]) -> None:
    """Do a step of reclaim.py. If the kernel refuses it, continue without: `show` names the process and the reason."""
    try:
        step()
    except OSError:
        return


def _is_plugin(spec: WorkerSpec) -> bool:
    """Return whether a backend's module has the engine."""
    return bool(spec.store_spec) and spec.engine != "fail"


class Worker:
    """The state of the process between two control messages."""

    def __init__(self, spec: WorkerSpec):
        """Take over the descriptors in `spec`, map the shared pages, open the engine.

        Raises VdusefastError, OSError.
        """
        from vdusefast.worker import _datapath

        self._datapath = _datapath
        self._spec = spec
        self._ctl = socket.socket(fileno=spec.ctl_fd)
        self._ctl.setblocking(False)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        _datapath.install_stop(self._wake_fd)
        self._running = False
        self._held = False  # between HOLD and RELEASE
        self._done = False
        self._memlock_noted = False
        offset_bytes, length_bytes = _datapath.block_extent(spec.queue)
        _check_pages(spec.shm_fd, spec.queue_size)
        self._pages = mmap.mmap(spec.shm_fd, length_bytes, mmap.MAP_SHARED, offset=offset_bytes)
        self._pages.madvise(mmap.MADV_DONTDUMP)
        self._populate(spec.queue_size)
        self._header = mmap.mmap(spec.shm_fd, _datapath.HEADER_BYTES, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._header.madvise(mmap.MADV_DONTDUMP)
        self._queue = _datapath.Queue(
            self._pages,
            queue_size=spec.queue_size,
            capacity_sectors=spec.capacity_sectors,
            block_size=spec.block_size,
            read_only=bool(spec.read_only),
            **spec.limits._asdict(),
            ignores_discards=bool(spec.ignores_discards),
            keeps_zeroes=bool(spec.keeps_zeroes),
            serial=spec.serial,
            header=self._header,
        )
        if spec.port == TransportKind.KERNEL:
            self._queue.set_port_kernel(spec.port_fd, spec.port_api, spec.queue)
            self._queue.use_memory(spec.user_memory_fd, spec.user_memory_bytes)
        elif spec.port == TransportKind.LOOPBACK:
            self._queue.set_port_loopback(spec.port_fd, spec.irq_fd, spec.queue)
        else:
            raise WorkerError(f"this worker has no port called {spec.port!r}")
        if spec.lock_memory:
            self._begin_reclaim()
        self._plugin: Plugin | None = None
        self._is_foreign = False  # a user's code runs here, whose memory is not to be locked
        faulty = spec.faults != "" and spec.engine != "fail"
        if faulty:
            self._inject_faults()
        self.engine = self._open_plugin() if _is_plugin(spec) else _open_engine(self._queue, spec)
        self.engine += ", with faults" * faulty
        if spec.lock_memory and not self._is_foreign:
            _try_reclaim(self._queue.lock_memory)
        self._queue.guard()
        self._queue.identify(os.getpid(), spec.cpu)

    def _populate(self, ring_size: int) -> None:
        """Fault in the pages of our block that a ring of that size needs, so that no request waits for a fault."""
        with suppress(OSError):  # a kernel before 5.14: pages are faulted in one by one
            self._pages.madvise(_MADV_POPULATE_WRITE, 0, self._datapath.block_used_bytes(ring_size))

    def _begin_reclaim(self) -> None:
        """Prepare for memory reclaim before the engine is opened, because its threads inherit these settings."""
        _try_reclaim(self._datapath.mark_io_flusher)
        _try_reclaim(self._datapath.lock_memory)

    def send(self, event: FromWorker) -> None:
        """Send one event to the supervisor; it reads them as fast as they come."""
        self._ctl.setblocking(True)
        try:
            self._ctl.send(pack(event))
        finally:
            self._ctl.setblocking(False)

    def serve(self) -> None:
        """Serve until STOP, a signal, or the supervisor's end."""
        self.send(FromWorker(Event.HELLO, 0, text=self.engine))
        while not self._done and not self._datapath.stop_requested():
            if self._running and not self._held:
                self._run_queue()
            else:
                self._wait_idle()
        self._queue.quiesce()
        self._queue.close()
        if self._plugin is not None:
            self._plugin.close()

    def _open_plugin(self) -> str:
        """Open the engine that the backend's module provides. Returns its name. Raises VdusefastError."""
        from vdusefast.backends import find, plugin_module
        from vdusefast.backends.plugin import StoreSpec

        spec = self._spec
        self._lock_fd = _lock_pages(spec.shm_fd)  # a successor waits for our end
        store = StoreSpec.from_json(spec.store_spec)._replace(
            queue=spec.queue,
            slot_count=min(spec.queue_size, self._datapath.SLOT_MAX),
            size_bytes=spec.capacity_sectors * 512,
            block_size_bytes=spec.block_size,
            hold_fd=spec.store_hold_fd,
        )
        if spec.relay_fd >= 0:
            from vdusefast.backends._relay import Client

            self._plugin = Client(f"/proc/self/fd/{spec.relay_fd}", spec.queue, spec.relay_memory_fd)
        else:
            self._is_foreign = find(store.uri).foreign
            self._plugin = plugin_module(store.uri).open_engine(store)
        try:
            return self._queue.open_plugin(self._plugin, size_bytes=store.size_bytes, cache=store.cache)
        except OSError as error:
            if error.errno == errno.EPROTO:
                raise WorkerError(
                    f"{store.uri}: its module was built for another vdusefast; build both again"
                ) from error
            raise WorkerError(f"{store.uri}: {error}") from error

    def _inject_faults(self) -> None:
        from vdusefast.backends import faulty

        faults, seed = faulty.from_json(self._spec.faults)
        self._queue.inject_faults(faults, seed=seed + self._spec.queue)

    def _send_store_events(self) -> None:
        """Send the events of the store's module to the supervisor."""
        if self._plugin is None:
            return
        for event in self._plugin.events():
            if event.kind == "resized":
                self.send(FromWorker(Event.STORE_SIZE, 0, text=str(event.size_bytes)))
            else:
                self.send(FromWorker(Event.LOG, 0, text=event.text))

    def _run_queue(self) -> None:
        spec = self._spec
        reason = self._queue.run(spec.kick_fd, spec.ctl_fd, self._wake_fd, spec.poll_us, spec.irq_delay_us)
        if reason == self._datapath.FAILED:
            self._running = False
            self.send(FromWorker(Event.RING_FAILED, 0, text=self._queue.failure))
        elif reason == self._datapath.CONTROL:
            self._read_control()
        elif reason == self._datapath.UNMAPPED:
            self._wait_idle(_REMAP_MS)

    def _wait_idle(self, timeout_ms: int | None = None) -> None:
        waiting = select.poll()
        waiting.register(self._ctl, select.POLLIN)
        waiting.register(self._wake_fd, select.POLLIN)
        if self._plugin is not None and self._plugin.fileno() >= 0:
            waiting.register(self._plugin.fileno(), select.POLLIN)
        waiting.poll(timeout_ms)
        self._read_control()

    def _read_control(self) -> None:
        """Carry out all pending commands. The control word is read first, so a later message is noticed next time."""
        self._queue.control_seen()
        self._send_store_events()
        while not self._done:
            try:
                packet = self._ctl.recv(MESSAGE_MAX_BYTES)
            except BlockingIOError:
                return
            if not packet:  # the supervisor is gone; nobody may keep the device open without it
                self._done = True
                return
            self._carry_out(unpack(packet))

    def _carry_out(self, message: ToWorker) -> None:
        queue = self._queue
        last_avail_idx = last_used_idx = 0
        note = ""
        if message.command == Command.START:
            if not self._start(message):
                return
            note = queue.note or self._note_memlock()
        elif message.command == Command.INVALIDATE:
            queue.invalidate(message.start, message.last)
        elif message.command == Command.HOLD:
            queue.invalidate(message.start, message.last)
            self._held = True
        elif message.command == Command.RELEASE:
            queue.use_memory(self._spec.user_memory_fd, message.last)
            self._held = False
        elif message.command == Command.RESIZE:
            queue.set_capacity(message.start)
        elif message.command in (Command.QUIESCE, Command.RESET, Command.STOP):
            last_avail_idx, last_used_idx, waiting = queue.quiesce()
            self._running = False
            if waiting:  # we have consumed their kick, so kick the next worker again
                os.eventfd_write(self._spec.kick_fd, 1)
            if message.command == Command.RESET:
                queue.invalidate(0, 2**64 - 1)
            self._done = message.command == Command.STOP
        else:
            self.send(FromWorker(Event.REFUSED, message.seq, text=f"unknown command {message.command}"))
            return
        self.send(FromWorker(Event.DONE, message.seq, last_avail_idx, last_used_idx, text=note))

    def _note_memlock(self) -> str:
        """Return, once, that the driver's memory could not be registered with io_uring, or an empty string."""
        refused = self._queue.fixed_buffers[1]
        if not refused or self._memlock_noted:
            return ""
        self._memlock_noted = True
        return (
            f"io_uring may not pin the driver's memory ({os.strerror(refused)}), so each request pins its own; "
            "raise the limit of locked memory (LimitMEMLOCK=, ulimit -l)"
        )

    def _start(self, message: ToWorker) -> bool:
        self._running = False
        try:
            self._populate(message.queue_size)
            self._queue.start(
                acked_features=message.acked_features,
                size=message.queue_size,
                desc_addr=message.desc_addr,
                driver_addr=message.driver_addr,
                device_addr=message.device_addr,
                last_avail_idx=message.last_avail_idx,
                recover=bool(message.recover),
            )
        except (OSError, self._datapath.RingError) as error:
            self.send(FromWorker(Event.REFUSED, message.seq, text=str(error)))
            return False
        self._running = True
        return True


def _check_pages(shm_fd: int, queue_size: int) -> None:
    """Check that the shared pages have the layout that the extension writes. Raises WorkerError."""
    from vdusefast.worker import _datapath

    layout = _datapath.layout()
    offsets = layout["offsets"]
    first, stride_bytes = _datapath.block_extent(0)
    header = (layout["constants"]["version"], first, queue_size, stride_bytes)
    wanted = (b"VDUSFAST", *header, *(offsets[name] for name in ("counters", "hist", "inflight")))
    packed = os.pread(shm_fd, _PAGES_HEADER.size, 0)
    if len(packed) < _PAGES_HEADER.size or _PAGES_HEADER.unpack(packed) != wanted:
        raise WorkerError("the shared pages have another layout than this build of vdusefast: nothing is served")


def _report_failure(ctl_fd: int, error: VdusefastError | OSError) -> None:
    """Report to the supervisor, if it still runs, why this process ends."""
    code = error.exit_code if isinstance(error, VdusefastError) else 1
    with socket.socket(fileno=os.dup(ctl_fd)) as ctl:
        try:
            ctl.send(pack(FromWorker(Event.STARTUP_FAILED, 0, exit_code=code, text=str(error))))
        except OSError as send_error:
            print(f"vdusefast worker: {error} (and could not be reported: {send_error})", file=sys.stderr)


def _pin(spec: WorkerSpec) -> tuple[WorkerSpec, str]:
    """Pin to the CPU in `spec`. Returns the spec with the actual CPU, and a text if the kernel refuses that CPU."""
    if spec.cpu < 0:
        return spec, ""
    try:
        os.sched_setaffinity(0, {spec.cpu})
    except OSError as error:  # offline, or outside the cpuset: it may be back at any time
        return spec._replace(cpu=-1), f"the worker is not pinned: the kernel refuses CPU {spec.cpu}: {error.strerror}"
    return spec, ""


def main(argv: list[str]) -> int:
    """Run a worker. The last argument is the descriptor of its WorkerSpec; others are for `ps`. Returns the status."""
    try:
        spec = WorkerSpec.from_arguments(read_arguments(int(argv[-1])))
        from vdusefast.worker import _datapath
    except OtherBuildError as error:
        print(f"vdusefast worker: {error}", file=sys.stderr)
        return EXIT_OTHER_BUILD
    except (IndexError, OSError, ValueError) as error:
        print(f"vdusefast worker: {error}; workers are started by the supervisor", file=sys.stderr)
        return 2
    try:
        spec, pin_trouble = _pin(spec)  # first, so that all memory is allocated near this CPU
        _datapath.die_with_parent(spec.supervisor_pid)
        final_kill.survive_with(spec.supervisor_pid)
        worker = Worker(spec)
    except (VdusefastError, OSError) as error:
        _report_failure(spec.ctl_fd, error)
        return 1
    if pin_trouble:
        worker.send(FromWorker(Event.LOG, 0, text=pin_trouble))
    worker.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
