"""Configuration of one device: a TOML file or keyword arguments, checked, as frozen structs."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from vdusefast.backends import check_text
from vdusefast.base.decoding import decode_toml
from vdusefast.base.engines import IO_URING, EngineName
from vdusefast.base.kinds import Bus, CacheMode, TransportKind
from vdusefast.base.page import PAGE_BYTES
from vdusefast.base.secret import find_ambiguous
from vdusefast.base.toml_lines import line_of
from vdusefast.errors import ConfigError
from vdusefast.units import BLOCK_SIZE_MAX_BYTES, BLOCK_SIZE_MIN_BYTES
from vdusefast.units import parse_size as parse_size

if TYPE_CHECKING:
    from vdusefast.host.cpu_topology import Topology

QUEUE_COUNT_MAX = 64
QUEUE_SIZE_MAX = 32768  # VIRTIO 1.3, 2.7
QUEUE_SIZE_DEFAULT = 256
QUEUE_SIZE_KERNEL = 1024  # as QEMU's drivers have it, too
# Where the kernel maps each descriptor, an indirect table is one more to map and to copy. A ring of this size holds
# enough requests without such tables: 341 of three descriptors.
QUEUE_SIZE_DIRECT = 1024
DESCRIPTORS_MIN = 3  # of a request: header, data, status
SIZE_MAX_MIN_BYTES = 4096
SIZE_MAX_MAX_BYTES = 1 << 30
SEG_MAX_DEFAULT = 126
SEG_MAX_LIMIT = 1022  # with header and status byte a chain of 1024
SERIAL_MAX_BYTES = 20  # VIRTIO_BLK_ID_BYTES
NAME_MAX_BYTES = 63  # with its terminating zero it fits the shared pages' header
POLL_MAX_US = 1_000_000
POLL_ALWAYS = -1  # as a spin limit: none
IRQ_DELAY_MAX_US = 10_000
MSG_TIMEOUT_MAX_S = 3600
ATTACH_TIMEOUT_MAX_S = 600
STORE_TIMEOUT_MAX_S = 86400
MSG_TIMEOUT_MIN_S = 30
BOUNCE_SIZE_MIN_BYTES = 1 << 20  # both limits are the kernel's
BOUNCE_SIZE_MAX_BYTES = 1 << 30
# A request that does not fit into the bounce pages waits for ever; one that fills them keeps every other out.
BOUNCE_REQUESTS_MIN = 2
BOUNCE_SIZE_DEFAULT_BYTES = 64 << 20  # the kernel's
BOUNCE_STEP_BYTES = 1 << 20
CONFIG_MAX_BYTES = 1 << 20

SchedulerName = Literal["none", "kernel"]
PollMode = Literal["adaptive", "always", "never"]
MapMode = Literal["auto", "off"]
DiscardMode = Literal["unmap", "ignore"]
ZeroesMode = Literal["unmap", "thick"]
UserMemoryMode = Literal["auto", "on", "off"]
LockMemoryMode = Literal["auto", "on", "off"]


class DeviceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The device as the driver sees it."""

    name: str
    serial: str = ""
    transport: TransportKind = (
        TransportKind.AUTO
    )  # kernel for the commands `add` and `serve`, loopback for the Python API
    bus: Bus = Bus.VIRTIO  # kernel transport: virtio gives /dev/vdX, vhost gives /dev/vhost-vdpa-N
    queues: int = 1
    queue_size: int = 0  # as offered to the driver; 0 = 1024 for the kernel transport, else 256
    read_only: bool = False
    block_size_bytes: int = 0  # 0 = the store's
    size_max_bytes: int = 131072  # largest segment
    seg_max: int = 0  # data segments in one request; 0 = chosen from queue_size
    event_idx: bool = True
    packed: bool = False  # offer packed rings; a driver that does not know them takes split ones
    in_order: bool = False  # offer IN_ORDER where requests end in order: engine sync, and memory: and null:
    indirect: bool | None = None  # None = unless the driver maps each descriptor and has a large ring
    cpus: str | list[int] = ""  # "auto", a list such as "0,2" or [0, 2] (one a queue), or "" = as the queues say
    msg_timeout_s: int = 90  # kernel transport: a control message unanswered for so long breaks the device; 0 = never
    bounce_size_bytes: int = 0  # kernel transport, bus virtio: what the kernel copies data through; 0 = computed
    # Kernel transport, bus virtio: memory of ours in place of the kernel's bounce pages. auto = where it pays.
    user_memory: UserMemoryMode = "auto"
    scheduler: SchedulerName = "none"  # kernel transport, bus virtio: of the disk; kernel = what the kernel gives it
    attach_timeout_s: int = 30  # kernel transport: for the driver to come up
    # Be prepared for this machine's own write-back to go through the device when memory is short; see reclaim.py.
    lock_memory: LockMemoryMode = "auto"

    @property
    def is_in_kernel(self) -> bool:
        """Whether the device is on the kernel's vDPA bus, where it outlives its server."""
        return self.transport == TransportKind.KERNEL

    @property
    def is_kernel_disk(self) -> bool:
        """Whether the driver is the kernel's own: it makes a /dev/vdX, and maps each descriptor that it uses."""
        return self.is_in_kernel and self.bus == Bus.VIRTIO

    @property
    def locks_memory(self) -> bool:
        """Return lock_memory with its default filled in: a device of the kernel can be a disk of this machine."""
        return self.lock_memory == "on" or (self.lock_memory == "auto" and self.is_in_kernel)

    @property
    def effective_queue_size(self) -> int:
        """Return queue_size with its default filled in."""
        return self.queue_size or (QUEUE_SIZE_KERNEL if self.is_in_kernel else QUEUE_SIZE_DEFAULT)

    @property
    def effective_indirect(self) -> bool:
        """Return indirect with its default filled in."""
        if self.indirect is not None:
            return self.indirect
        return not self.is_kernel_disk or self.effective_queue_size < QUEUE_SIZE_DIRECT

    @property
    def effective_bounce_size_bytes(self) -> int:
        """Return bounce_size_bytes with its default filled in.

        That is room for as many requests as the rings hold, each with a segment of size_max_bytes, but not less than
        the kernel's own choice, nor more than it takes. Pages come into being only as far as they are in use at once.
        """
        if self.bounce_size_bytes:
            return self.bounce_size_bytes
        requests = self.queues * (self.effective_queue_size // DESCRIPTORS_MIN)
        wanted = -(-requests * self.size_max_bytes // BOUNCE_STEP_BYTES) * BOUNCE_STEP_BYTES
        return min(max(wanted, BOUNCE_SIZE_DEFAULT_BYTES), BOUNCE_SIZE_MAX_BYTES)

    @property
    def bounce_size_min_bytes(self) -> int:
        """Return how large the bounce pages have to be, where the kernel has them in another size than the default."""
        return self.bounce_size_bytes or BOUNCE_REQUESTS_MIN * self.size_max_bytes * self.effective_seg_max

    @property
    def effective_seg_max(self) -> int:
        """Return seg_max with its default filled in.

        A chain also holds the header and the status byte; the largest request must fit into the kernel's bounce pages.
        """
        default = SEG_MAX_DEFAULT
        if self.is_kernel_disk:
            default = min(default, self.effective_bounce_size_bytes // (BOUNCE_REQUESTS_MIN * self.size_max_bytes))
        return self.seg_max or max(1, min(default, self.effective_queue_size - 2))


class BackendConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The store, and how a worker reaches it."""

    uri: str
    cache: CacheMode = CacheMode.WRITEBACK
    engine: EngineName = "auto"
    map: MapMode = "auto"  # engine sync: read a file on tmpfs through a mapping
    merge: bool = True  # engines sync and cached: adjacent requests of a batch become one preadv or pwritev
    discard: DiscardMode = "unmap"  # ignore: not offered to the driver, and what is allocated stays so
    write_zeroes: ZeroesMode = "unmap"  # thick: what is zeroed stays allocated, or becomes so
    sqpoll: bool = False  # io_uring: a thread of the kernel's, with a CPU of its own while there is work, submits
    # Stores behind a library or in a class: a request without an answer for so long ends with IOERR; 0 = it waits.
    timeout_s: float = 0.0
    reconnect_s: float = (
        60.0  # stores behind a network: lost for less is a pause, lost for longer is IOERR until it is back
    )

    @property
    def is_direct(self) -> bool:
        """Whether I/O goes past the page cache."""
        return self.cache == CacheMode.NONE

    @property
    def keeps_zeroes(self) -> bool:
        """Whether writes of zeroes never free what they zero."""
        return self.write_zeroes == "thick" or self.discard == "ignore"


class QueueConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One queue's worker."""

    cpu: int | None = None  # None = not pinned
    irq_cpu: int | None = None  # kernel transport: where the driver's interrupts go
    poll: PollMode = "adaptive"  # always: the worker never sleeps while its queue runs; never: it sleeps at once
    poll_us: int = 200  # upper limit of the adaptive spin, 0 = sleep at once
    irq_delay_us: int = 200  # longest hold of an interrupt for more completions, 0 = interrupt at once

    @property
    def spin_limit_us(self) -> int:
        """Return how long the worker may spin before it sleeps: microseconds, or POLL_ALWAYS."""
        return {"adaptive": self.poll_us, "always": POLL_ALWAYS, "never": 0}[self.poll]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One device. `queue` has an entry for every queue once loaded."""

    device: DeviceConfig
    backend: BackendConfig
    queue: list[QueueConfig] = msgspec.field(default_factory=list)


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read the TOML file at `path`; queues without an entry of their own get the defaults.

    Returns: the configuration, checked by `validate`. Raises ConfigError that names the file, the key and its place.
    """
    where = os.fspath(path)
    text = _read_text(Path(path))
    try:
        config = decode_toml(text, Config)
        config = _fill_queues(config)
        validate(config)
    except msgspec.ValidationError as error:
        key, problem = _explain(str(error))
        raise ConfigError(f"{where}{line_of(text, key)}: {problem}") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{where}: not TOML: {error}") from None
    except ConfigError as error:
        key = str(error).partition(":")[0]
        raise ConfigError(f"{where}{line_of(text, key)}: {error}") from None
    return config


def make_config(*, name: str, uri: str, **overrides: object) -> Config:
    """Return the configuration of a device `name` on the store `uri`, checked by `validate`.

    overrides: fields of DeviceConfig, BackendConfig or QueueConfig; the last are applied to every queue.
    Raises ConfigError.
    """
    config = Config(device=DeviceConfig(name=name), backend=BackendConfig(uri=uri))
    return override(config, name=name, uri=uri, **overrides)


def override(config: Config, **overrides: object) -> Config:
    """Return `config` with fields replaced by name, as `make_config` does.

    Fewer queues than before drop the last ones, more get the defaults; `cpus` replaces every queue's `cpu`.
    Raises ConfigError.
    """
    device, backend, queue = (
        {field: overrides.pop(field) for field in struct.__struct_fields__ if field in overrides}
        for struct in (DeviceConfig, BackendConfig, QueueConfig)
    )
    if overrides:
        raise ConfigError(f"no such option: {', '.join(sorted(overrides))}")
    raw: dict[str, Any] = msgspec.to_builtins(config)
    raw["device"].update(device)
    raw["backend"].update(backend)
    if "cpus" in device:
        queue.setdefault("cpu", None)  # the new list replaces what the queues said
    count = raw["device"]["queues"]
    if isinstance(count, int) and not 1 <= count <= QUEUE_COUNT_MAX:
        raise ConfigError(_range_problem("device.queues", count, 1, QUEUE_COUNT_MAX))
    if isinstance(count, int):
        entries = (raw["queue"] + [{} for _ in range(count)])[:count]
        raw["queue"] = [{**entry, **queue} for entry in entries]
    try:
        changed = msgspec.convert(raw, type=Config)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error))[1]) from None
    validate(changed)
    return changed


def validate(config: Config, topology: Topology | None = None) -> list[str]:
    """Check everything that can be known without opening the store.

    topology: this machine's when None; it is read only when the configuration names CPUs.
    Returns: warnings, one line each. Raises ConfigError naming the key.
    """
    _check_device(config.device)
    if not config.backend.uri:
        raise ConfigError("backend.uri: empty; write for example file:/srv/disk.img, memory:64M or null:1G")
    check_text(config.backend.uri)
    if ambiguous := find_ambiguous(config.backend.uri):
        raise ConfigError(
            f"backend.uri: {ambiguous} has a space, a quote or a punctuation mark at its end, so that messages cannot "
            "hide it: write that as %20 and the like, or name a file that holds it"
        )
    if config.backend.sqpoll and config.backend.engine not in ("auto", *IO_URING):
        raise ConfigError(f'backend.sqpoll: engine {config.backend.engine!r} has no io_uring; use engine "uring"')
    _check_range("backend.timeout_s", config.backend.timeout_s, 0, STORE_TIMEOUT_MAX_S)
    _check_range("backend.reconnect_s", config.backend.reconnect_s, 0, STORE_TIMEOUT_MAX_S)
    if len(config.queue) > config.device.queues:
        raise ConfigError(f"queue: {len(config.queue)} [[queue]] entries, but device.queues is {config.device.queues}")
    for index, queue in enumerate(config.queue):
        _check_range(f"queue[{index}].poll_us", queue.poll_us, 0, POLL_MAX_US)
        _check_range(f"queue[{index}].irq_delay_us", queue.irq_delay_us, 0, IRQ_DELAY_MAX_US)
    resolved = resolve_cpus(config, topology)
    return [*_cpu_warnings(resolved), *_poll_warnings(resolved, topology)]


def resolve_cpus(config: Config, topology: Topology | None = None) -> Config:
    """Return `config` with `device.cpus` turned into a CPU for each queue, and `device.cpus` empty.

    "auto" leaves the queues that name a CPU as they are. It stays as it is for a disk of the kernel's, whose workers
    are placed by what the kernel makes of it (placement.py). Raises ConfigError for a CPU that this machine never has,
    and for a list that does not have one CPU a queue.
    """
    queues = _fill_queues(config).queue
    cpus = config.device.cpus
    named = any(queue.cpu is not None or queue.irq_cpu is not None for queue in queues)
    if not cpus and not named:
        return msgspec.structs.replace(config, queue=queues)

    from vdusefast.host import cpu_topology

    topology = topology or cpu_topology.read_topology()
    placed_later = cpus == "auto" and config.device.is_kernel_disk
    if cpus == "auto" and not placed_later:
        fixed = [queue.cpu for queue in queues if queue.cpu is not None]
        chosen = iter(cpu_topology.plan(len(queues) - len(fixed), topology, taken=fixed))
        queues = [q if q.cpu is not None else msgspec.structs.replace(q, cpu=next(chosen)) for q in queues]
    elif cpus and not placed_later:
        listed = cpu_topology.parse_cpu_list(cpus, "device.cpus: ") if isinstance(cpus, str) else cpus
        queues = _assign_cpus(listed, queues)
    for index, queue in enumerate(queues):
        if queue.cpu is not None:
            cpu_topology.check_possible(queue.cpu, topology, f"queue[{index}].cpu")
        if queue.irq_cpu is not None:
            cpu_topology.check_possible(queue.irq_cpu, topology, f"queue[{index}].irq_cpu")
    device = config.device if placed_later else msgspec.structs.replace(config.device, cpus="")
    return msgspec.structs.replace(config, device=device, queue=queues)


def check_cpus(config: Config, topology: Topology | None = None) -> None:
    """Check that the CPUs of a device that is to be made can be used now. Raises ConfigError.

    An adopted device must also be served when a CPU has gone meanwhile.
    """
    from vdusefast.host import cpu_topology

    for index, queue in enumerate(config.queue):
        if queue.cpu is not None or queue.irq_cpu is not None:
            topology = topology or cpu_topology.read_topology()
        if topology is not None and queue.cpu is not None:
            cpu_topology.check_cpu(queue.cpu, topology, f"queue[{index}].cpu")
        if topology is not None and queue.irq_cpu is not None:
            cpu_topology.check_cpu(queue.irq_cpu, topology, f"queue[{index}].irq_cpu", pinned=False)


def _check_device(device: DeviceConfig) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", device.name) or len(device.name) > NAME_MAX_BYTES:
        raise ConfigError(
            f"device.name: {device.name!r}; a name is 1 to {NAME_MAX_BYTES} letters, digits, '_', '.' and '-', "
            "and begins with a letter or a digit"
        )
    if device.name == "control":
        raise ConfigError("device.name: 'control' is the name of the kernel's own node, choose another")
    if not device.serial.isascii() or not (device.serial or "x").isprintable() or len(device.serial) > SERIAL_MAX_BYTES:
        raise ConfigError(f"device.serial: {device.serial!r}; a serial is at most {SERIAL_MAX_BYTES} ASCII characters")
    _check_range("device.queues", device.queues, 1, QUEUE_COUNT_MAX)
    if device.queue_size:
        _check_power("device.queue_size", device.queue_size, 2, QUEUE_SIZE_MAX)
    if device.block_size_bytes:
        _check_power("device.block_size_bytes", device.block_size_bytes, BLOCK_SIZE_MIN_BYTES, BLOCK_SIZE_MAX_BYTES)
    _check_range("device.size_max_bytes", device.size_max_bytes, SIZE_MAX_MIN_BYTES, SIZE_MAX_MAX_BYTES)
    if device.size_max_bytes % BLOCK_SIZE_MAX_BYTES:
        raise ConfigError(f"device.size_max_bytes: {device.size_max_bytes} is no multiple of {BLOCK_SIZE_MAX_BYTES}")
    if device.seg_max:
        _check_range("device.seg_max", device.seg_max, 1, min(SEG_MAX_LIMIT, max(1, device.effective_queue_size - 2)))
    _check_kernel(device)


def _check_kernel(device: DeviceConfig) -> None:
    """Check what the kernel transport alone uses."""
    _check_range("device.msg_timeout_s", device.msg_timeout_s, 0, MSG_TIMEOUT_MAX_S)
    if 0 < device.msg_timeout_s < MSG_TIMEOUT_MIN_S:
        raise ConfigError(
            f"device.msg_timeout_s: {device.msg_timeout_s} is below the {MSG_TIMEOUT_MIN_S} s that an answer may take"
        )
    _check_range("device.attach_timeout_s", device.attach_timeout_s, 1, ATTACH_TIMEOUT_MAX_S)
    key, bounce = "device.bounce_size_bytes", device.effective_bounce_size_bytes
    _check_range(key, bounce, BOUNCE_SIZE_MIN_BYTES, BOUNCE_SIZE_MAX_BYTES)
    if bounce % PAGE_BYTES:  # the kernel would cut it to whole pages
        raise ConfigError(f"{key}: {bounce} is no multiple of {PAGE_BYTES}")
    if device.user_memory == "on" and not device.bus.copies_data:
        raise ConfigError(
            'device.user_memory: only bus "virtio" copies data; the client of "vhost" gives its own memory'
        )
    largest = device.size_max_bytes * device.effective_seg_max
    if device.is_kernel_disk and largest * BOUNCE_REQUESTS_MIN > bounce:
        raise ConfigError(
            f"{key}: {bounce} does not hold {BOUNCE_REQUESTS_MIN} requests of size_max_bytes x seg_max = "
            f"{largest} bytes; raise it, or lower one of these"
        )


def _range_problem(key: str, value: float, low: int, high: int) -> str:
    return f"{key}: {value} is not between {low} and {high}"


def _check_range(key: str, value: float, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ConfigError(_range_problem(key, value, low, high))


def _check_power(key: str, value: int, low: int, high: int) -> None:
    _check_range(key, value, low, high)
    if value & (value - 1):
        raise ConfigError(f"{key}: {value} is no power of two")


def _fill_queues(config: Config) -> Config:
    """Return `config` with an entry for every queue; surplus entries stay for `validate` to refuse."""
    missing = min(config.device.queues, QUEUE_COUNT_MAX) - len(config.queue)
    return msgspec.structs.replace(config, queue=config.queue + [QueueConfig() for _ in range(missing)])


def _assign_cpus(cpus: list[int], queues: list[QueueConfig]) -> list[QueueConfig]:
    if len(cpus) != len(queues):
        raise ConfigError(f'device.cpus: {len(cpus)} CPUs for {len(queues)} queues; name one a queue, or "auto"')
    for index, (cpu, queue) in enumerate(zip(cpus, queues, strict=True)):
        if queue.cpu not in (None, cpu):
            raise ConfigError(f"device.cpus: gives CPU {cpu} to queue {index}, which has cpu = {queue.cpu} of its own")
    return [msgspec.structs.replace(queue, cpu=cpu) for cpu, queue in zip(cpus, queues, strict=True)]


def _cpu_warnings(config: Config) -> list[str]:
    times = Counter(queue.cpu for queue in config.queue if queue.cpu is not None)
    warnings = []
    for cpu in sorted(cpu for cpu, count in times.items() if count > 1):
        queues = ", ".join(str(index) for index, queue in enumerate(config.queue) if queue.cpu == cpu)
        warnings.append(f"{config.device.name}: queues {queues} share CPU {cpu}; they will slow each other down")
    return warnings


def _poll_warnings(config: Config, topology: Topology | None) -> list[str]:
    """Return a line for each worker that never sleeps where something else needs its CPU."""
    polling = [index for index, queue in enumerate(config.queue) if queue.poll == "always"]
    if not polling:
        return []
    from vdusefast.host import cpu_topology

    allowed = (topology or cpu_topology.read_topology()).allowed
    name, warnings = config.device.name, []
    for index in polling:
        cpu = config.queue[index].cpu
        others = [place for place, queue in enumerate(config.queue) if place != index and queue.cpu == cpu]
        if cpu is not None and others:
            text = f"and the worker of queue {', '.join(map(str, others))} needs it, too"
        elif cpu is not None and any(queue.irq_cpu == cpu for queue in config.queue):
            text = "and interrupts of the device are to go there, too; choose another irq_cpu"
        else:
            continue
        warnings.append(f'{name}: queue {index} has poll = "always": its worker takes all of CPU {cpu}, {text}')
    if len(polling) >= len(allowed):
        warnings.append(
            f'{name}: {len(polling)} queues have poll = "always", and {len(allowed)} CPUs are allowed: none is left '
            'to the driver and to everything else; use fewer queues, or poll = "adaptive"'
        )
    return warnings


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > CONFIG_MAX_BYTES:
            raise ConfigError(f"{path}: larger than {CONFIG_MAX_BYTES} bytes, not a configuration")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None


_STRUCTS: dict[str, type[msgspec.Struct]] = {"device": DeviceConfig, "backend": BackendConfig, "queue": QueueConfig}


def _explain(message: str) -> tuple[str, str]:
    """Turn msgspec's message into the key it is about and a line that names it."""
    problem, _, path = message.partition(" - at `$")
    place = path.rstrip("`").lstrip(".")
    for wording in ("Object contains unknown field `", "Object missing required field `"):
        if not problem.startswith(wording):
            continue
        field = problem.removeprefix(wording).rstrip("`")
        key = f"{place}.{field}" if place else field
        if "missing" in wording:
            return key, f"{key}: missing"
        struct = _STRUCTS.get(re.sub(r"\[.*", "", place), Config)
        return key, f"{key}: unknown key; known here: {', '.join(struct.__struct_fields__)}"
    return place, f"{place or 'configuration'}: {problem[:1].lower()}{problem[1:]}"
