"""The placement of a device's workers and interrupts on CPUs, and its reasons.

A spinning worker and a submitting program need a CPU each, and exchange a few cache lines. So the worker of a queue
goes to a CPU that shares a cache with those that submit to the queue, but that is none of them and no sibling of one.
The interrupts of a queue go to a CPU that submits to it, because the driver's next step runs there.

If there are not enough CPUs for each worker besides one that submits, nothing is pinned. A worker pinned to its
driver's CPU would take turns with the driver, while the scheduler can move either of them. Interrupts then stay where
the kernel has them, among the CPUs that submit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vdusefast.host import queue_map, sysfs
from vdusefast.host.cpu_topology import CAPACITY_FULL, Cpu, Distance, Topology, format_cpu_list, plan, read_topology

if TYPE_CHECKING:
    from vdusefast.config import Config
    from vdusefast.host.queue_map import QueueMap

# In a guest of two CPUs, where every CPU submits to the only queue, a worker on one of them and the interrupts on the
# other took 8,300 requests a second of counted time at 32 in flight, and 5,800 at one; left alone 13,500 and 7,100.
PIN_CPUS_MIN = 3

GIVEN = "as configured"
UNKNOWN_DRIVER = "it is unknown which CPUs submit to this queue: a core of its own if one is free"


@dataclass(frozen=True)
class QueuePlace:
    """The placement of one queue. A CPU of -1 is none: the worker is not pinned, the interrupts stay where they are."""

    index: int
    submit_cpus: str  # a list as the kernel writes it; "" if unknown or empty
    cpu: int
    cpu_reason: str
    irq_cpu: int
    irq_reason: str


@dataclass(frozen=True)
class Placement:
    """A plan. source: of the map of submitting CPUs. advice: changes that would make the device faster."""

    queues: tuple[QueuePlace, ...]
    source: str
    advice: tuple[str, ...] = ()

    @property
    def cpus(self) -> list[int]:
        """Return the CPU of each queue's worker, -1 = not pinned."""
        return [queue.cpu for queue in self.queues]

    @property
    def irq_cpus(self) -> tuple[int | None, ...]:
        """Return the CPU of each queue's interrupts, None = the kernel's choice."""
        return tuple(None if queue.irq_cpu < 0 else queue.irq_cpu for queue in self.queues)

    def apply(self, config: Config) -> Config:
        """Return `config` with the CPUs of this plan as those of its queues."""
        queues = [
            msgspec.structs.replace(queue, cpu=None if place.cpu < 0 else place.cpu, irq_cpu=irq_cpu)
            for queue, place, irq_cpu in zip(config.queue, self.queues, self.irq_cpus, strict=True)
        ]
        return msgspec.structs.replace(config, queue=queues)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return {"source": self.source, "queues": [asdict(queue) for queue in self.queues], "advice": list(self.advice)}


def foresee(config: Config) -> Placement:
    """Return the placement of a device before its disk is there, or as that of a device that was left shows it.

    config: checked. Raises ConfigError.
    """
    if not config.device.is_kernel_disk:
        return place(config, read_topology(), None)
    if (placement := observe(config, sysfs.node(config.device.name))) is not None:
        return placement
    topology = read_topology()
    return place(config, topology, queue_map.predict(topology, config.device.queues), "as the kernel's rule has it")


def observe(config: Config, node: str) -> Placement | None:
    """Return the placement of a device whose disk is there, None for one without. Raises ConfigError.

    node: such as /dev/vda.
    """
    if not config.device.is_kernel_disk or not node:
        return None
    try:
        found = queue_map.read(node, config.device.queues)
    except OSError:
        return None  # it has just gone, or its kernel does not show the map
    return place(config, read_topology(), found, f"as the kernel has it (/sys/block/{Path(node).name}/mq)")


def place(config: Config, topology: Topology, submitters: QueueMap | None, source: str = "") -> Placement:
    """Return the placement of a device's queues: the configured one, and where that is "auto", the best one.

    config: checked. submitters: the CPUs that submit to each queue, None if they cannot be known, because the driver is
    a virtual machine's or no kernel. source: of that map.
    """
    auto = config.device.cpus == "auto"
    cpus = [queue.cpu for queue in config.queue]
    if submitters is None:
        return _place_blindly(config, topology, auto)
    planner = _Planner(topology, submitters, cpus, [queue.irq_cpu for queue in config.queue])
    return Placement(planner.places(auto), source, planner.advice(auto))


def _place_blindly(config: Config, topology: Topology, auto: bool) -> Placement:
    """Return a placement without knowledge of the driver: it only spreads the workers."""
    cpus = [queue.cpu for queue in config.queue]
    fixed = [cpu for cpu in cpus if cpu is not None]
    chosen = iter(plan(len(cpus) - len(fixed), topology, taken=fixed) if auto else ())
    queues = []
    for index, queue in enumerate(config.queue):
        cpu = queue.cpu if queue.cpu is not None else next(chosen, -1)
        why = GIVEN if queue.cpu is not None else UNKNOWN_DRIVER if auto else "not pinned: no CPU is configured"
        irq_cpu, irq_why = (-1, "") if queue.irq_cpu is None else (queue.irq_cpu, GIVEN)
        queues.append(QueuePlace(index, "", cpu, why, irq_cpu, irq_why))
    return Placement(tuple(queues), "not known: the driver is no kernel's block driver")


class _Planner:
    """Places the queues of one disk, one after another."""

    def __init__(
        self, topology: Topology, mapped: QueueMap, cpus: Sequence[int | None], irq_cpus: Sequence[int | None]
    ):
        self.topology = topology
        self.online = {cpu.index: cpu for cpu in topology.cpus}
        self.submitters = [[self.online[cpu] for cpu in sorted(group) if cpu in self.online] for group in mapped]
        self.mapped = mapped
        self.cpus = list(cpus)
        self.irq_cpus = list(irq_cpus)
        self.placed: list[int] = []  # the workers' CPUs, once they are known
        self.used = [index for index, group in enumerate(self.submitters) if group]
        self.workers = Counter(cpu for index, cpu in enumerate(cpus) if cpu is not None and index in self.used)
        self.irqs = Counter(cpu for cpu in irq_cpus if cpu is not None)

    @property
    def room(self) -> int:
        """Return how many workers can have a CPU besides one that submits, each."""
        if len(self.online) < PIN_CPUS_MIN:
            return 0
        return min(len(self.online) // 2, len(self.topology.allowed))

    def places(self, auto: bool) -> tuple[QueuePlace, ...]:
        """Return every queue's place. Workers are placed first, and interrupts avoid their CPUs."""
        chosen = [self._place_worker(index, auto) for index in range(len(self.mapped))]
        self.placed = [cpu for cpu, _ in chosen]
        return tuple(
            QueuePlace(index, format_cpu_list(self.mapped[index]), *chosen[index], *self._place_irqs(index, auto))
            for index in range(len(self.mapped))
        )

    def advice(self, auto: bool) -> tuple[str, ...]:
        """Return changes that would make the device faster, a sentence each."""
        advice = []
        idle = len(self.mapped) - len(self.used)
        if idle:
            advice.append(
                f"{idle} of {len(self.mapped)} queues get no requests, as no online CPU submits to them: "
                f"queues = {max(1, len(self.used))} does the same with fewer processes"
            )
        if auto and len(self.used) > self.room > 0:
            allowed, online = len(self.topology.allowed), len(self.online)
            where = f"{online} CPUs" if allowed == online else f"{online} CPUs, of which workers may use {allowed}"
            advice.append(
                f"{len(self.used)} queues on {where}: when all are busy, fewer are faster: queues = {self.room} leaves "
                "each worker a CPU that its driver does not need"
            )
        return tuple(advice)

    def _place_worker(self, index: int, auto: bool) -> tuple[int, str]:
        given = self.cpus[index]
        if given is not None:
            return given, GIVEN
        if not auto:
            return -1, "not pinned: no CPU is configured"
        if not self.submitters[index]:
            return -1, "not pinned: no CPU that is online submits to it"
        if len(self.used) > self.room:
            return -1, (
                f"not pinned: {len(self.used)} queues leave no CPU of {len(self.online)} for each worker besides one "
                "that submits; it would take turns with its own driver, so the scheduler may move it"
            )
        candidates = [self.online[cpu] for cpu in sorted(self.topology.allowed)]
        best = min(candidates, key=lambda cpu: self._worker_cost(cpu, index))
        self.workers[best.index] += 1
        return best.index, self._worker_reason(best, index)

    def _worker_cost(self, cpu: Cpu, index: int) -> tuple[float, ...]:
        """Return the sort key of CPUs for the worker of queue `index`: the first element that differs decides."""
        group = self.submitters[index]
        others = [other for other in group if other.index != cpu.index]
        return (
            self.workers[cpu.index],
            cpu in group,
            any(cpu.distance(other) == Distance.SIBLING for other in others),
            sum(self.workers[sibling] for sibling in cpu.siblings if sibling != cpu.index),
            -cpu.capacity,
            sum(cpu.distance(other) for other in others),
            self.irqs[cpu.index],
            -cpu.index,  # the first CPUs do the machine's own work
        )

    def _worker_reason(self, cpu: Cpu, index: int) -> str:
        group = self.submitters[index]
        others = [other for other in group if other.index != cpu.index]
        nearest = min((cpu.distance(other) for other in others), default=Distance.SAME)
        reasons = ["does not submit to this queue"]
        if cpu in group:
            reasons = ["every CPU that workers may use submits to this queue; this one has the least other work"]
        elif nearest == Distance.SIBLING:
            reasons.append("but shares a core with one that does, as no other core is free")
        if nearest == Distance.CACHE:
            reasons.append(
                "shares a cache with those that do" if cpu not in group else "shares a cache with the others"
            )
        elif nearest == Distance.FAR:
            reasons.append("is in another package: no nearer one is free")
        if cpu.capacity < CAPACITY_FULL:
            reasons.append("a small core: no large one is free")
        if self.workers[cpu.index] > 1:
            reasons.append("shared with another worker")
        return ", ".join(reasons)

    def _place_irqs(self, index: int, auto: bool) -> tuple[int, str]:
        given = self.irq_cpus[index]
        if given is not None:
            return given, GIVEN
        group = self.submitters[index]
        if not group:
            return -1, "no online CPU submits to this queue"
        if not auto or self.placed[index] < 0:
            return -1, "as the kernel has them, among the CPUs that submit to this queue"
        best = min(group, key=self._irq_cost)
        self.irqs[best.index] += 1
        if self.workers[best.index]:
            return best.index, "the CPU that submits to this queue, although a worker is there"
        return best.index, "submits to this queue, and has no worker" if len(group) > 1 else "submits to this queue"

    def _irq_cost(self, cpu: Cpu) -> tuple[int, ...]:
        siblings = sum(self.workers[sibling] for sibling in cpu.siblings)
        return (self.workers[cpu.index], siblings, self.irqs[cpu.index], -cpu.capacity, cpu.index)
