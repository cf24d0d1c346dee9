"""The kernel has the settings of the configuration, and `show` tells the truth."""

from __future__ import annotations

import os
from pathlib import Path

import guest
from checks import check
from guest import MIB

from vdusefast.host import queue_map
from vdusefast.host.cpu_topology import format_cpu_list, read_topology
from vdusefast.transport.kernel import REST_MSG_TIMEOUT_S


@check(limit_s=90)
def sysfs_and_show() -> dict[str, object]:
    path = guest.image("settings.img", 32 * MIB)
    settings = {"queues": 2, "queue": "irq_cpu = 1", "msg_timeout_s": 77, "bounce_size_bytes": 32 * MIB}
    with guest.device("vd0", f"file:{path}", serial="s1", **settings, by_command=True) as node:
        sysfs = guest.VDUSE_CLASS / "vd0"
        for queue in range(2):
            mask = (sysfs / f"vq{queue}" / "irq_cb_affinity").read_text().strip()
            assert int(mask.replace(",", ""), 16) == 0b10, f"vq{queue}: {mask}"
        assert guest.read_int(sysfs / "msg_timeout") == REST_MSG_TIMEOUT_S  # 77 s while it comes and goes
        assert guest.read_int(sysfs / "bounce_size") == 32 * MIB
        shown = guest.show("vd0")
        assert shown["node"] == node, shown
        assert shown["bus"] == "virtio", shown
        assert shown["driver"] == "virtio_vdpa", shown
        assert shown["size_bytes"] == 32 * MIB, shown
        assert shown["serial"] == "s1", shown
        assert shown["msg_timeout_s"] == 77, shown
        assert shown["bounce_size_bytes"] == 32 * MIB, shown
        assert shown["api_version"] == (0 if guest.kernel() < (7, 0) else 1), shown
        features = shown["vduse_features"]
        assert features == ([] if guest.kernel() < (7, 0) else ["QUEUE_READY", "SUSPEND"]), shown
        assert {queue["size"] for queue in shown["queues"]} == {1024}, shown  # type: ignore[attr-defined]
        assert "INDIRECT_DESC" not in shown["offered_features"], shown  # type: ignore[operator]
        acked, offered = set(shown["acked_features"]), set(shown["offered_features"])  # type: ignore[call-overload]
        assert acked <= offered, shown
        wanted = {"VERSION_1", "ACCESS_PLATFORM", "EVENT_IDX", "FLUSH", "MQ", "DISCARD", "WRITE_ZEROES", "SEG_MAX"}
        assert wanted <= acked, f"not acked: {sorted(wanted - acked)}"
        bits = (next((guest.VDPA_DEVICES / "vd0").glob("virtio*")) / "features").read_text().strip()
        assert bits.count("1") == len(acked), f"the driver has {bits}, show has {sorted(acked)}"
        assert shown["failure"] == "", shown
        for queue in shown["queues"]:  # type: ignore[attr-defined]
            assert queue["irq_cpu"] == 1, queue
            assert queue["state"] == "running", queue
            assert guest.running(queue["pid"]), queue
    return shown


@check(limit_s=90)
def one_queue_has_no_scheduler() -> None:
    """Where the kernel would give it one, since it has one queue only."""
    for wanted, chosen in (("none", "[none]"), ("kernel", "[mq-deadline]")):
        with guest.device("vd0", "memory:16M", scheduler=wanted):
            text = (guest.sysfs_of("vd0") / "queue" / "scheduler").read_text()
            assert chosen in text, f"scheduler = {wanted}: {text}"


@check(limit_s=90)
def pinned_workers() -> None:
    with guest.device("vd0", "memory:16M", queues=2, cpus=[0, 1]):
        shown = guest.info("vd0")
        for cpu, queue in enumerate(shown["queues"]):  # type: ignore[arg-type]
            assert queue["cpu"] == cpu, queue
            assert os.sched_getaffinity(queue["pid"]) == {cpu}, queue


@check(limit_s=90)
def interrupts_where_no_cpu_is_online() -> list[str]:
    """The driver spreads queues over CPUs that the machine may have; an interrupt to one that is offline would hang."""
    online = sum(1 << cpu for cpu in os.sched_getaffinity(0))
    with guest.device("vd0", "memory:16M", queues=4):
        assert len(list((guest.sysfs_of("vd0") / "mq").iterdir())) == 4, "this machine has no CPUs that are offline"
        masks = [
            (guest.VDUSE_CLASS / "vd0" / f"vq{queue}" / "irq_cb_affinity").read_text().strip() for queue in range(4)
        ]
        assert all(int(mask.replace(",", ""), 16) & online for mask in masks), f"{masks}, online {online:#x}"
    return masks


def _check_placement(queues: int) -> list[int]:
    """Check that a device is placed by what the kernel says, and that this was foreseen. Returns its workers' CPUs.

    The groups of CPUs that share a queue are foreseen. Newer kernels number the queues in another order, which only the
    disk tells.
    """
    foreseen = queue_map.predict(read_topology(), queues)
    with guest.device("vd0", "memory:16M", queues=queues, cpus="auto") as node:
        found = queue_map.read(node, queues)
        assert set(found) == set(foreseen), f"{found}, foreseen {foreseen}"
        assert found == foreseen or not os.uname().release.startswith("6."), f"{found}, foreseen {foreseen}"
        shown = guest.info("vd0")
        plan: dict[str, list[dict[str, object]]] = shown["placement"]  # type: ignore[assignment]
        assert f"{Path(node).name}/mq" in str(plan["source"]), plan
        assert [queue["submit_cpus"] for queue in plan["queues"]] == [format_cpu_list(group) for group in found]
        for index, queue in enumerate(shown["queues"]):  # type: ignore[arg-type]
            allowed = os.sched_getaffinity(queue["pid"])
            assert allowed == ({queue["cpu"]} if queue["cpu"] >= 0 else os.sched_getaffinity(0)), queue
            mask = (guest.VDUSE_CLASS / "vd0" / f"vq{index}" / "irq_cb_affinity").read_text().strip()
            if queue["irq_cpu"] >= 0:
                assert int(mask.replace(",", ""), 16) == 1 << queue["irq_cpu"], f"{mask}, {queue}"
                assert queue["irq_cpu"] in found[index], queue
            assert queues == 1 or queue["cpu"] not in found[index], queue  # of a single queue all CPUs submit
        return [int(str(queue["cpu"])) for queue in plan["queues"]]


@check(limit_s=300)
def placement_by_the_kernels_map() -> dict[str, list[int]]:
    """Two CPUs are left to the scheduler; of four each worker gets one that does not submit to its queue."""
    assert _check_placement(4) == [-1] * 4
    offline = [path for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]/online") if path.read_text()[0] == "0"]
    for path in offline:
        path.write_text("1")
    try:
        os.sched_setaffinity(0, range(4))  # which a process keeps from before
        found = {str(queues): _check_placement(queues) for queues in (1, 2, 4)}
    finally:
        for path in offline:
            path.write_text("0")
    assert found["4"] == [-1] * 4, found
    for queues in (1, 2):
        cpus = found[str(queues)]
        assert len(set(cpus) & set(range(4))) == queues, found  # each has one, and one of its own
    return found


@check(limit_s=120)
def small_bounce_with_large_requests() -> dict[str, int]:
    """1 MiB for the kernel to copy through: 4 MiB at once must neither hang nor be torn."""
    path = guest.image("bounce.img", 32 * MIB)
    with guest.device("vd0", f"file:{path}", queues=2, bounce_size_bytes=MIB) as node:
        assert guest.read_int(guest.VDUSE_CLASS / "vd0" / "bounce_size") == MIB
        data = os.urandom(16 * MIB)
        source = guest.WORK / "source"
        source.write_bytes(data)
        guest.sh("dd", f"if={source}", f"of={node}", "bs=4M", "oflag=direct", "conv=fsync", timeout_s=60)
        assert path.read_bytes()[: len(data)] == data
        guest.sh("dd", f"if={node}", f"of={source}", "bs=8M", "count=2", "iflag=direct", timeout_s=60)
        assert source.read_bytes() == data
        # Many at once, and buffered ones, which are merged as far as the device lets them.
        guest.sh("blockdev", "--setra", 16384, node)
        with open(node, "rb") as disk:
            assert disk.read(len(data)) == data
        limit = guest.read_int(guest.sysfs_of("vd0") / "queue" / "max_hw_sectors_kb")
        source.unlink()
    return {"max_hw_sectors_kb": limit}


@check(limit_s=60)
def by_options() -> None:
    """Without a configuration file, as in the README."""
    path = guest.image("options.img", 16 * MIB)
    node = guest.vdusefast("add", "vd0", "--backend", f"file:{path}", "--queues", 2).split()[-1]
    assert node == guest.node_of("vd0")
    assert Path(node).is_block_device()
    guest.delete("vd0")
