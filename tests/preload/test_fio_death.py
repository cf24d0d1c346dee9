"""The real fio is killed in mid-run, as a whole or one of its jobs: the disk lives on for others, and nothing leaks."""

from __future__ import annotations

import signal
import subprocess
import time

import psutil
import pytest
from disk_rig import regions, served, wait_until

from vdusefast.driver import preload
from vdusefast.driver.attach_server import AttachServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

FIO = ("fio", "--ioengine=libaio", "--direct=1", "--bs=4k", "--iodepth=16", "--size=2m", "--verify_state_save=0")
CHECKED = ("--rw=randwrite", "--verify=crc32c", "--verify_fatal=1")
LIMIT_S = 60
INTERRUPTED = 128  # fio's status then
ROUNDS = 3


def start(server: AttachServer, *words: str) -> subprocess.Popen[str]:
    """Start fio on the disk."""
    return subprocess.Popen(
        [*FIO, f"--filename={server.path}", *words],
        env=preload.environment(server),
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(fio: subprocess.Popen[str]) -> str:
    """Wait for fio, and return what it says, with its exit status at the end."""
    try:
        said, _ = fio.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        kill([psutil.Process(fio.pid), *psutil.Process(fio.pid).children(recursive=True)])
        raise AssertionError(f"fio hangs: {fio.communicate()[0]}") from None
    return f"{said}\nstatus {fio.returncode}"


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        process.send_signal(signal.SIGKILL)


def published(server: AttachServer) -> int:
    """Return how many requests all queues have had."""
    return sum(queue["published"] for queue in server.figures()["queues"])


def users_of(server: AttachServer, processes: list[psutil.Process]) -> int:
    """Return how many of the disk's users these processes are."""
    pids = {process.pid for process in processes}
    return sum(len(client.users) for client in list(server._clients.values()) if client.pid in pids)


def start_victim(server: AttachServer, *words: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """Start four jobs that would run for long, and return them once they work."""
    job = ("--name=victim", "--rw=randrw", "--numjobs=4", "--offset=32m", "--time_based", "--runtime=600")
    victim = start(server, *job, *words)
    family = psutil.Process(victim.pid)
    wait_until(
        lambda: users_of(server, [family, *family.children(recursive=True)]) >= 4, "the victim's jobs have the disk"
    )
    begun = published(server)
    wait_until(lambda: published(server) > begun + 1000, "there is load")
    return victim, psutil.Process(victim.pid).children(recursive=True)


@pytest.mark.parametrize("memory", ["malloc", "mmapshared"])
@pytest.mark.parametrize("kind", ["thread", "group_reporting"])
def test_fio_beside_it_verifies_its_data(kind: str, memory: str) -> None:
    words = (f"--{kind}", f"--mem={memory}")
    with served(queues=2) as (device, server):
        survivor = start(
            server, "--name=survivor", *CHECKED, "--time_based", "--runtime=600", "--verify_backlog=64", *words
        )
        for turn in range(ROUNDS):
            victim, jobs = start_victim(server, *words)
            assert bool(jobs) == (kind != "thread")
            time.sleep(turn / 100)
            kill([psutil.Process(victim.pid), *jobs])
            assert finish(victim).endswith(f"status -{signal.SIGKILL:d}")
        assert survivor.poll() is None
        survivor.send_signal(signal.SIGINT)
        said = finish(survivor)
        assert said.endswith(f"status {INTERRUPTED}")
        assert "err= 0" in said
        wait_until(lambda: not server.users, "no user is left")
        wait_until(lambda: regions(device) == 1, "the board is the only region")
        assert finish(start(server, "--name=after", *CHECKED, *words)).endswith("status 0")
        assert server.failure is None
        assert device.failure is None


def test_other_jobs_of_the_same_fio_continue() -> None:
    with served(queues=2) as (device, server):
        victim, jobs = start_victim(server)
        kill(jobs[:1])
        wait_until(lambda: len(server.users) < len(jobs), "the job's user is gone")
        begun = published(server)
        wait_until(lambda: published(server) > begun + 1000, "the others work")
        victim.send_signal(signal.SIGINT)
        said = finish(victim)
        assert "got signal=9" in said
        # fio 3.33 reports the killed job with the others; then it frees something twice, on a plain file as well.
        assert said.count("err= 0") == len(jobs)
        wait_until(lambda: not server.users, "no user is left")
        assert server.failure is None
        assert device.failure is None
