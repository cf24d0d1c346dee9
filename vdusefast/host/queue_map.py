"""The map of CPUs to the queues of a disk: the kernel's own, or, before the disk exists, by the kernel's rule.

The rule is that of lib/group_cpus.c (Linux 6.12): memory nodes get queues by their number of CPUs, and in a node each
queue the next CPUs with their siblings. virtio-vdpa and blk-mq both use it. Later kernels also keep CPU clusters
together, and virtio_blk may have poll queues. The kernel's own map counts as soon as the disk exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vdusefast.host import sysfs
from vdusefast.host.cpu_topology import Cpu, Topology, parse_cpu_list

# For each queue the CPUs that submit to it, offline ones included; none for a queue that the driver does not use.
QueueMap = tuple[frozenset[int], ...]


def read(node: str, queue_count: int) -> QueueMap:
    """Return the map of a disk, by its node. Raises OSError when there is no such disk."""
    directory = sysfs.SYS / "block" / Path(node).name / "mq"
    used = {int(entry.name): entry for entry in directory.iterdir() if entry.name.isdecimal()}
    return tuple(_read_cpus(used[index]) if index in used else frozenset() for index in range(queue_count))


def predict(topology: Topology, queue_count: int) -> QueueMap:
    """Return the map that the kernel makes for a disk of `queue_count` queues, unless the driver gets other settings.

    The driver uses no more queues than possible CPUs, and no more than virtio_blk's parameter allows.
    """
    known = [*topology.cpus, *topology.absent]
    present = [cpu for cpu in known if cpu.index in topology.online or cpu.index in topology.plugged]
    used_count = min(queue_count, max(cpu.index for cpu in known) + 1, sysfs.request_queue_limit() or queue_count)
    groups: list[set[int]] = [set() for _ in range(used_count)]
    done = _group(groups, 0, present)
    _group(groups, 0 if done >= used_count else done, [cpu for cpu in known if cpu not in present])
    return tuple(frozenset(group) for group in groups) + (frozenset(),) * (queue_count - used_count)


def _read_cpus(directory: Path) -> frozenset[int]:
    return frozenset(parse_cpu_list((directory / "cpu_list").read_text(), f"{directory}: "))


def _group(groups: list[set[int]], start: int, cpus: Sequence[Cpu]) -> int:
    """Spread `cpus` over `groups`, beginning with group `start`. Returns how many groups got some."""
    nodes = {number: [cpu for cpu in cpus if cpu.node == number] for number in sorted({cpu.node for cpu in cpus})}
    if len(groups) <= len(nodes):
        for place, members in enumerate(nodes.values()):
            groups[(start + place) % len(groups)] |= {cpu.index for cpu in members}
        return len(groups)
    left_groups, left_cpus, done = min(len(groups), len(cpus)), len(cpus), 0
    for members in sorted(nodes.values(), key=len):  # stable, as sort() of the kernel's few nodes
        share = max(1, left_groups * len(members) // left_cpus)
        left_groups, left_cpus = left_groups - share, left_cpus - len(members)
        waiting = {cpu.index: cpu for cpu in sorted(members, key=lambda cpu: cpu.index)}
        for place in range(share):
            size = len(members) // share + (place < len(members) % share)
            groups[(start + done) % len(groups)] |= _take(waiting, size)
            done += 1
    return done


def _take(waiting: dict[int, Cpu], count: int) -> set[int]:
    """Take `count` CPUs out of `waiting`, each with its siblings before the next one."""
    taken: set[int] = set()
    while len(taken) < count:
        first = waiting[next(iter(waiting))]
        for index in (first.index, *sorted(first.siblings)):
            if len(taken) < count and waiting.pop(index, None) is not None:
                taken.add(index)
    return taken
