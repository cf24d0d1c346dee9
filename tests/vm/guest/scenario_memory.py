"""User memory in place of the kernel's bounce pages: data through it is right, also after a death or a refusal."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
from pathlib import Path

import guest
from checks import check
from guest import MIB
from scenario_recovery import delete, kill, wait_for_end
from verified_fio import verified_fio, wait_for_writes

HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")
HUGE_PAGE_BYTES = 2 * MIB
CAP_SYS_RESOURCE = 24
MEMLOCK_BYTES = 8 * MIB  # the usual limit of a login session


def memory() -> str:
    """Return the line of `show` about vd0's memory."""
    return str(guest.info("vd0")["memory"])


def wait_for_user_memory() -> str:
    """Wait until vd0 has put its memory to use; its workers then have nothing of the bounce pages mapped."""
    guest.wait_for("user memory", lambda: memory().startswith("user memory"), 20)
    sizes = [largest_mapping(worker, r"\[vduse-domain\]") for worker in guest.pids_of("vd0")[1:]]
    assert max(sizes) < MIB, f"workers have mapped {sizes} bytes of what the kernel shows"
    return memory()


def assert_used() -> None:
    """All of it is mapped by a worker, who has had requests since."""
    sizes = [largest_mapping(worker, "memfd:vdusefast-vd0") for worker in guest.pids_of("vd0")[1:]]
    assert max(sizes) == guest.info("vd0")["bounce_size_bytes"], f"workers have mapped {sizes} bytes of our memory"


def largest_mapping(pid: int, name: str) -> int:
    """Return the bytes of the largest mapping of a process whose file's name matches; rings are of the domain, too."""
    sizes = [0]
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if re.search(name, line):
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            sizes.append(last - first)
    return max(sizes)


def pinned(pid: int) -> int:
    """Return the bytes that the kernel counts as pinned by a process."""
    found = re.search(r"VmPin:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) << 10


@check(limit_s=200)
def servers_come_and_go_under_verified_load() -> dict[str, object]:
    """A worker is killed, then everything, then a server hands over; the next one takes requests that wait."""
    path = guest.image("memory.img", 64 * MIB)
    # tmpfs had no O_DIRECT before, and a buffered store gets user memory by request alone.
    direct = {"cache": "none"} if guest.kernel() >= (6, 6) else {"user_memory": "on"}
    settings = {"queues": 2, **direct}
    node = guest.fork_server("vd0", f"file:{path}", **settings)
    found: dict[str, object] = {"memory": wait_for_user_memory()}
    server, worker, _ = guest.pids_of("vd0")
    assert pinned(server) == guest.info("vd0")["bounce_size_bytes"]
    with verified_fio(node) as waited:
        os.kill(worker, signal.SIGKILL)
        guest.wait_for("another worker", lambda: guest.pids_of("vd0")[1] not in (worker, -1), 20)
        wait_for_writes(20)
        assert_used()
        kill(group=True)
        assert guest.fork_server("vd0", f"file:{path}", **settings) == node
        wait_for_user_memory()
        wait_for_writes(20)
        assert_used()
        server = guest.pids_of("vd0")[0]
        os.kill(server, signal.SIGTERM)
        assert wait_for_end(server) == 0
        assert guest.fork_server("vd0", f"file:{path}", **settings) == node
        wait_for_user_memory()
    assert guest.info("vd0")["failure"] == ""
    delete()
    return found | waited


@check(limit_s=60)
def huge_pages_of_the_machine_are_used() -> str:
    """And are back when the device is gone. A reset in between changes nothing."""
    size_bytes = (32 if guest.kernel() >= (6, 4) else 64) * MIB  # before, the kernel has no other size
    HUGE_PAGES.write_text(str(size_bytes // HUGE_PAGE_BYTES))
    try:
        before = free_huge_pages()
        assert before * HUGE_PAGE_BYTES == size_bytes, f"{before} huge pages"
        path = guest.image("memory.img", 16 * MIB)
        with guest.device("vd0", f"file:{path}", user_memory="on", bounce_size_bytes=size_bytes) as node:
            said = wait_for_user_memory()
            assert said == "user memory (huge pages)", said
            assert free_huge_pages() == 0, f"{free_huge_pages()} huge pages are free"
            for driver in ("unbind", "bind"):
                (guest.VDPA_DRIVERS / "virtio_vdpa" / driver).write_text("vd0")
            guest.wait_for("the disk", lambda: guest.node_of("vd0") == node and Path(node).exists())
            guest.sh("dd", "if=/dev/urandom", f"of={node}", "bs=1M", "count=16", "oflag=direct")
            assert guest.sh("sh", "-c", f"dd if={node} bs=1M iflag=direct status=none | md5sum") == guest.sh(
                "sh", "-c", f"md5sum <{path}"
            )
            assert memory() == said
            assert_used()
        assert free_huge_pages() == before
    finally:
        HUGE_PAGES.write_text("0")
    return said


def free_huge_pages() -> int:
    found = re.search(r"HugePages_Free:\s+(\d+)", Path("/proc/meminfo").read_text())
    assert found
    return int(found[1])


@check(limit_s=60)
def a_limit_that_is_too_small_costs_nothing_else() -> str:
    """The device is served from the kernel's pages, and says why."""
    path = guest.image("memory.img", 16 * MIB)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (MEMLOCK_BYTES, MEMLOCK_BYTES))
    drop_capability(CAP_SYS_RESOURCE)  # a process that has it raises the limit by itself
    with guest.device("vd0", f"file:{path}", user_memory="on") as node:
        guest.wait_for("a refusal", lambda: "no user memory" in memory())
        said = memory()
        why = r"the kernel's bounce pages; .*64 MiB would be locked, .*RLIMIT_MEMLOCK allows 8 MiB"
        assert re.search(why, said), said
        guest.sh("dd", "if=/dev/urandom", f"of={node}", "bs=1M", "count=16", "oflag=direct")
        assert guest.checksum(path) == guest.checksum(node)
    return said


def drop_capability(number: int) -> None:
    """Give up one of this process's capabilities."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: for capabilities below 32, and the others
    assert libc.capget(header, sets) == 0
    for kind in range(3):
        sets[kind] &= ~(1 << number)
    assert libc.capset(header, sets) == 0
