"""vhost-vdpa: a real client (libblkio), one that dies in mid-I/O, and one of our own that does things in odd order."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import guest
import vhost
from checks import check
from guest import MIB

CLIENT = Path(__file__).parent / "blkio_client.py"
JOURNAL = guest.WORK / "vhost.journal"
DISK = guest.WORK / "vhost.img"


def client(action: str, *words: object) -> dict[str, object]:
    """Run the libblkio client on the device of this module and return what it says."""
    return dict(json.loads(guest.sh(*client_words(action, *words), timeout_s=90).splitlines()[-1]))


def client_words(action: str, *words: object) -> list[str]:
    return [sys.executable, str(CLIENT), guest.node_of("vd0"), action, *map(str, words)]


def requests() -> list[int]:
    """Return how many requests each queue has answered, those of virtio_vdpa with them, if that had it before."""
    return [int(queue["requests"]) for queue in guest.info("vd0")["queues"]]  # type: ignore[attr-defined]


def kill_worker(queue: int) -> None:
    """Kill the worker of a queue, and wait until another one serves."""

    def worker() -> tuple[object, object]:
        found = guest.info("vd0")["queues"][queue]  # type: ignore[index]
        return found["pid"], found["state"]

    killed = worker()[0]
    os.kill(int(str(killed)), signal.SIGKILL)
    guest.wait_for("another worker", lambda: worker()[1] == "running" and worker()[0] != killed)


@check(limit_s=60, keeps=True)
def appears() -> dict[str, object]:
    path = guest.image(DISK.name, 64 * MIB)
    JOURNAL.unlink(missing_ok=True)
    said = guest.add("vd0", f"file:{path}", bus="vhost", queues=4, queue_size=256)
    assert str(said["node"]).startswith("/dev/vhost-vdpa-"), said
    assert said["node"] == guest.node_of("vd0"), said
    assert said["bus"] == "vhost", said
    return said


@check(limit_s=60, keeps=True)
def properties() -> None:
    found = client("info")
    assert found == {"capacity_bytes": 64 * MIB, "max_queues": 4, "request_alignment": 512}, found


@check(limit_s=90, keeps=True)
def one_queue() -> dict[str, object]:
    """Three of the device's four queues stay unused."""
    before = requests()
    done = client("check", "--queues", 1)
    counts = [new - old for new, old in zip(requests(), before, strict=True)]
    assert counts[0] > 10, counts
    assert counts[1:] == [0, 0, 0], counts
    return done


@check(limit_s=90, keeps=True)
def two_and_four_queues() -> None:
    before = requests()
    client("check", "--queues", 2)
    client("check", "--queues", 4)
    counts = [new - old for new, old in zip(requests(), before, strict=True)]
    assert all(count > 10 for count in counts), counts


@check(limit_s=90, keeps=True)
def load_with_verification() -> dict[str, object]:
    done = client("load", "--journal", JOURNAL, "--queues", 2, "--depth", 16, "--seconds", 3)
    assert int(str(done["write"])) > 50, done
    assert client("verify", "--journal", JOURNAL)["written"] != 0
    return done


@check(limit_s=150, keeps=True)
def server_killed_in_mid_io() -> dict[str, object]:
    """All of its processes at once, while a client has requests in flight; and again, by a signal that it obeys.

    The next server continues; the client sees a pause.
    """
    words = client_words("load", "--journal", JOURNAL, "--queues", 2, "--depth", 16, "--seconds", 300)
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        try:
            for number in (signal.SIGKILL, signal.SIGINT):  # of a node that is in use, SIGINT leaves it
                pids = guest.pids_of("vd0")
                os.killpg(pids[0], number) if number == signal.SIGKILL else os.kill(pids[0], number)
                guest.wait_for("the server to end", lambda ended=pids: not any(map(guest.running, ended)), 20)
                guest.fork_server("vd0", f"file:{DISK}", bus="vhost", queues=4)
                before = sum(requests())
                guest.wait_for("requests to go on", lambda done=before: sum(requests()) > done, 20)
            process.terminate()
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, f"{out}{err}"
    client("verify", "--journal", JOURNAL)
    assert guest.info("vd0")["failure"] == ""
    return dict(json.loads(out.splitlines()[-1]))


@check(limit_s=120, keeps=True)
def client_killed_in_mid_io() -> None:
    """Twice; what it had completed is there, and the next client finds a device that works."""
    pids = guest.pids_of("vd0")
    for queues in (1, 2):
        words = client_words("load", "--journal", JOURNAL, "--queues", queues, "--depth", 16, "--seconds", 60)
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            time.sleep(0.5)
            process.send_signal(signal.SIGKILL)
            assert process.wait(20) == -signal.SIGKILL
        client("verify", "--journal", JOURNAL)
    client("check", "--queues", 2, "--blocks", 16)
    JOURNAL.unlink()
    assert guest.pids_of("vd0") == pids, "processes were replaced"
    assert guest.info("vd0")["failure"] == ""


@check(limit_s=60, keeps=True)
def queues_that_become_ready_late() -> None:
    """DRIVER_OK first, then one queue after the other; with F_QUEUE_READY (7.3) and without (6.12)."""
    data = os.urandom(4096)
    with vhost.VhostClient(guest.node_of("vd0"), queues=4) as driver:
        driver.start(enabled=(1,))
        driver.submit(1, vhost.T_OUT, 64, data)
        assert driver.finish(1)[0] == 0
        for queue in (3, 0, 2):
            driver.enable(queue)
            driver.submit(queue, vhost.T_IN, 64, length=4096)
            status, got = driver.finish(queue)
            assert status == 0
            assert got[:4096] == data, f"queue {queue}"
        # All of them go on working together.
        for queue in range(4):
            driver.submit(queue, vhost.T_OUT, 128 + 8 * queue, bytes([queue]) * 4096)
        assert [driver.finish(queue)[0] for queue in range(4)] == [0] * 4
    with DISK.open("rb") as disk:
        disk.seek(128 * 512)
        assert disk.read(4 * 4096) == b"".join(bytes([queue]) * 4096 for queue in range(4))


@check(limit_s=60, keeps=True)
def rings_of_other_sizes_than_offered() -> None:
    """Linux 6.12 passes on whatever a client sets up: QEMU's guests set up 1024 entries where 256 were offered."""
    data = os.urandom(4096)
    for size in (1024, 4, 512):
        with vhost.VhostClient(guest.node_of("vd0"), queues=2, size=size) as driver:
            try:
                driver.start(enabled=(0, 1))
            except OSError as error:  # newer kernels take no more than was offered
                if error.errno == errno.EINVAL and size > 256 and guest.kernel() >= (7, 0):
                    continue
                raise
            assert [queue["size"] for queue in guest.info("vd0")["queues"][:2]] == [size, size]  # type: ignore[index]
            for turn in range(5):
                driver.submit(turn % 2, vhost.T_OUT, 8 * turn, data)
                assert driver.finish(turn % 2)[0] == 0
            kill_worker(0)
            driver.submit(0, vhost.T_IN, 32, length=4096)
            status, got = driver.finish(0, 30)
            assert (status, got[:4096]) == (0, data)
    assert guest.info("vd0")["failure"] == ""


@check(limit_s=60, keeps=True)
def queue_that_the_driver_leaves_alone() -> None:
    """QEMU makes all queues ready, and those that its firmware has not set up have size 0."""
    with vhost.VhostClient(guest.node_of("vd0"), queues=4) as driver:
        driver.start(enabled=(0, 1, 2, 3), left_alone=(1, 2, 3))
        driver.submit(0, vhost.T_FLUSH, 0)
        assert driver.finish(0)[0] == 0
        info = guest.info("vd0")
        assert [queue["state"] for queue in info["queues"]] == ["running", *["unused"] * 3], info  # type: ignore[index]
        assert (info["state"], info["failure"]) == ("running", ""), info
    with vhost.VhostClient(guest.node_of("vd0"), queues=4) as driver:  # after a reset, as Linux after SeaBIOS
        driver.start(enabled=(0, 1, 2, 3))
        for queue in range(4):
            driver.submit(queue, vhost.T_FLUSH, 0)
            assert driver.finish(queue)[0] == 0


@check(limit_s=60, keeps=True)
def request_before_the_queue_is_ready() -> None:
    """A request that lies in the ring, and was kicked, before its queue becomes ready is served then."""
    with vhost.VhostClient(guest.node_of("vd0"), queues=2) as driver:
        driver.start(enabled=(0,))
        driver.submit(1, vhost.T_OUT, 8, b"early" * 100 + bytes(12))
        driver.submit(0, vhost.T_FLUSH, 0)
        assert driver.finish(0)[0] == 0
        driver.enable(1)
        os.eventfd_write(driver.kick[1], 1)  # the kernel passes a kick on only while a queue is ready
        assert driver.finish(1)[0] == 0
        assert driver.base(0) == 1
        assert driver.base(1) == 1


@check(limit_s=60, keeps=True)
def reset_and_again() -> None:
    """Twenty clients, each with rings at index 0: nothing of the previous one is left."""
    for turn in range(20):
        with vhost.VhostClient(guest.node_of("vd0"), queues=2) as driver:
            driver.start(enabled=(0, 1))
            for queue in (0, 1):
                driver.submit(queue, vhost.T_OUT, 8, bytes([turn]) * 512)
                assert driver.finish(queue)[0] == 0
            driver.submit(0, vhost.T_IN, 8, length=512)
            assert driver.finish(0)[1][:512] == bytes([turn]) * 512


@check(limit_s=60, keeps=True)
def suspend_where_the_kernel_can() -> str:
    with vhost.VhostClient(guest.node_of("vd0"), queues=2) as driver:
        driver.start(enabled=(0, 1))
        for _ in range(3):
            driver.submit(0, vhost.T_OUT, 8, bytes(512))
            assert driver.finish(0)[0] == 0
        if not driver.can_suspend:
            assert guest.kernel() < (7, 0), "7.3 offers SUSPEND to those who know of it"
            return "this kernel cannot"
        driver.suspend()
        assert driver.base(0) == 3
        assert driver.base(1) == 0
        driver.submit(0, vhost.T_OUT, 8, bytes(512))
        time.sleep(0.5)
        assert driver.used_idx(0) == 3, "a suspended queue has served a request"
        return "suspended"


@check(limit_s=60, keeps=True)
def del_while_a_client_is_connected() -> str:
    with vhost.VhostClient(guest.node_of("vd0"), queues=1) as driver:
        driver.start(enabled=(0,))
        line = guest.refused("del", "vd0", status=4, says=rf"pid {os.getpid()}\b", by_command=True)
        driver.submit(0, vhost.T_FLUSH, 0)
        assert driver.finish(0)[0] == 0, "the refused del has harmed the client"
    return line


@check(limit_s=60)
def goes_away() -> None:
    found = guest.info("vd0")
    assert found["failure"] == "", found["failure"]
    guest.delete("vd0")
    assert guest.node_of("vd0") == ""
