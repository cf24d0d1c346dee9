"""Servers die, hang, hand over and are replaced while a disk is used: its users see a pause, and nothing else."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import guest
from checks import check
from guest import MIB
from verified_fio import verified_fio, wait_for_writes

ENDED_S = 20.0
BROKEN_S = 2  # what an administrator has set msg_timeout to


def kill(*, group: bool) -> None:
    """Kill the supervisor of vd0, or it and its workers at once, and wait until all have ended."""
    server, *workers = guest.pids_of("vd0")
    if group:
        os.killpg(server, signal.SIGKILL)
    else:
        os.kill(server, signal.SIGKILL)
    wait_for_end(server)
    guest.wait_for("the workers to end", lambda: not any(map(guest.running, workers)), ENDED_S)


def wait_for_end(server: int) -> int | None:
    """Wait until a server has ended; returns its exit status if it was our child."""
    guest.wait_for("the server to end", lambda: not guest.running(server), ENDED_S)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(server, 0)[1])
    except ChildProcessError:
        return None


def command(*words: str) -> str:
    """Run a vdusefast command that must succeed, and return what it prints."""
    done = guest.attempt_in_copy(*words)
    assert done.returncode == 0, f"{words}: status {done.returncode}: {done.stderr}"
    return done.stdout.strip()


def delete() -> None:
    """Remove vd0, and wait for its server if that is a child of ours."""
    server = guest.pids_of("vd0")[0]
    guest.delete("vd0")
    wait_for_end(server)


def dump(node: str, path: Path) -> None:
    """Compare the first MiB of a disk and its store."""
    disk = guest.sh("sh", "-c", f"dd if={node} bs=64k count=16 iflag=direct status=none | md5sum")
    assert disk == guest.sh("sh", "-c", f"dd if={path} bs=64k count=16 status=none | md5sum")


@check(limit_s=150)
def killed_under_verified_load() -> dict[str, float]:
    """All at once and the supervisor alone; adopted by `recover`, and by adding the same device again."""
    path = guest.image("recovery.img", 64 * MIB)
    node = guest.fork_server("vd0", f"file:{path}", queues=2)
    with verified_fio(node) as found:
        for by_command in (True, False):
            kill(group=by_command)
            shown = guest.show("vd0")
            assert (shown["state"], shown["node"]) == ("dead", node), shown
            assert "vdusefast recover vd0" in str(shown["advice"]), shown
            if by_command:
                assert command("recover", "vd0") == node
            else:
                assert guest.fork_server("vd0", f"file:{path}", queues=2) == node
            wait_for_writes(10)
    assert guest.info("vd0")["failure"] == ""
    delete()
    assert not (guest.RUN_BASE / "vd0").exists()
    return found


@check(limit_s=150)
def handed_over_under_verified_load() -> dict[str, float]:
    """SIGTERM leaves the disk to the next server, and `restart` takes it over."""
    path = guest.image("recovery.img", 64 * MIB)
    node = guest.fork_server("vd0", f"file:{path}", queues=2)
    with verified_fio(node) as found:
        server = guest.pids_of("vd0")[0]
        os.kill(server, signal.SIGTERM)
        assert wait_for_end(server) == 0
        assert guest.show("vd0")["state"] == "dead"
        assert guest.fork_server("vd0", f"file:{path}", queues=2) == node
        server = guest.pids_of("vd0")[0]
        assert command("restart", "vd0") == node
        assert wait_for_end(server) == 0
    guest.refused("recover", "vd0", status=4, says=r"is being served by pid \d+ \(state running\)")
    server = guest.pids_of("vd0")[0]
    os.kill(server, signal.SIGINT)  # removes a disk that nobody uses
    wait_for_end(server)
    guest.wait_for("the disk to go", lambda: not Path(node).exists(), 10)
    return found


def refused_to_serve(path: Path, what: str, **settings: object) -> str:
    """Try to serve vd0 as another device than it is; `what` is to be named. Returns the message."""
    try:
        guest.fork_server("vd0", f"file:{path}", **settings)
    except AssertionError as error:
        said = str(error)
    else:
        raise AssertionError(f"another {what} was taken")
    if f"{what}: the orphaned device was made with" not in said:
        raise AssertionError(said)
    return said


@check(limit_s=120)
def another_device_is_refused() -> list[str]:
    """With nothing touched: the right one adopts it afterwards."""
    path = guest.image("recovery.img", 32 * MIB)
    node = guest.fork_server("vd0", f"file:{path}")
    guest.sh("dd", "if=/dev/urandom", f"of={node}", "bs=64k", "count=16", "oflag=direct")
    kill(group=True)
    config = guest.write_config("vd0", f"file:{path}", queues=2)
    said = [guest.refused("add", config, status=2, says=r"^vdusefast: vd0: device\.queues: .* with 1, .* get 2")]
    said += [refused_to_serve(path, key, **{key: value}) for key, value in (("queue_size", 128), ("seg_max", 7))]
    os.truncate(path, 16 * MIB)
    said.append(refused_to_serve(path, "size in sectors"))
    os.truncate(path, 64 * MIB)  # the part that was cut off was never written to
    assert guest.fork_server("vd0", f"file:{path}") == node
    assert guest.info("vd0")["size_bytes"] == 32 * MIB
    dump(node, path)
    delete()
    return said


@check(limit_s=150)
def dead_device_is_deleted() -> None:
    """Its requests are finished first, or failed by force; its users are not robbed of it otherwise."""
    path = guest.image("recovery.img", 32 * MIB)
    node = guest.fork_server("vd0", f"file:{path}")
    fd = os.open(node, os.O_RDWR | os.O_CLOEXEC)
    kill(group=True)
    try:
        guest.refused("del", "vd0", status=4, says=rf"open by pid {os.getpid()}\b.*served again")
        assert len(os.pread(fd, 4096, 0)) == 4096
    finally:
        os.close(fd)
    kill(group=True)
    words = ["dd", "if=/dev/urandom", f"of={node}", "bs=64k", "count=16", "oflag=direct"]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as dd:
        time.sleep(0.5)
        assert dd.poll() is None, "nobody serves it"
        path.rename(guest.WORK / "away.img")
        guest.delete("vd0", "--force")
        assert dd.wait(20) != 0
    assert not Path(node).exists()
    with guest.device("vd0", "memory:16M"):  # and the machine's vDPA bus works
        pass


def break_device(server: int) -> None:
    """Stop the server of vd0, and have the kernel send it a message that it does not answer."""
    (guest.VDUSE_CLASS / "vd0/msg_timeout").write_text(str(BROKEN_S))
    os.kill(server, signal.SIGSTOP)
    started_s = time.monotonic()
    (guest.VDPA_DRIVERS / "virtio_vdpa/unbind").write_text("vd0")  # returns when the kernel has given up
    took_s = time.monotonic() - started_s
    assert took_s > BROKEN_S / 2, f"{took_s:.1f} s"


@check(limit_s=150)
def broken_device_is_made_anew() -> dict[str, object]:
    """A supervisor that is stopped for too long: its server may live on or not."""
    path = guest.image("recovery.img", 32 * MIB)
    said = {}
    for survives in (True, False):
        node = guest.fork_server("vd0", f"file:{path}")
        guest.sh("dd", "if=/dev/urandom", f"of={node}", "bs=64k", "count=16", "oflag=direct")
        server = guest.pids_of("vd0")[0]
        break_device(server)
        if survives:
            os.kill(server, signal.SIGCONT)
            guest.wait_for("the server to notice", lambda: guest.info("vd0")["state"] == "broken", 10)
            said["served"] = str(guest.info("vd0")["failure"])
        else:
            os.killpg(server, signal.SIGKILL)
            wait_for_end(server)
            assert guest.show("vd0")["state"] == "broken", guest.show("vd0")
            said["dead"] = str(guest.show("vd0")["advice"])
        node = command("recover", "vd0") if survives else guest.fork_server("vd0", f"file:{path}")
        wait_for_end(server)
        dump(node, path)
        delete()
    assert all("vdusefast recover vd0" in text for text in said.values()), said
    return dict(said)


@check(limit_s=150)
def restart_that_would_fail_changes_nothing() -> None:
    """The new server finds out beside the old one, which serves on; then the restart works."""
    path = guest.image("recovery.img", 32 * MIB)
    node = guest.fork_server("vd0", f"file:{path}", queues=2)
    server = guest.pids_of("vd0")[0]
    away = path.rename(guest.WORK / "away.img")
    guest.refused("restart", "vd0", status=1, says=rf"no such file.*pid {server} serves it")
    guest.sh("dd", "if=/dev/urandom", f"of={node}", "bs=64k", "count=16", "oflag=direct")
    assert guest.pids_of("vd0")[0] == server
    away.rename(path)
    assert command("restart", "vd0") == node
    wait_for_end(server)
    dump(node, path)
    delete()


@check(limit_s=200)
def lost_run_directory_is_claimed_or_its_disk_removed() -> None:
    """By an operator's configuration, where the kernel agrees and nothing was in flight; else all of it fails."""
    path = guest.image("recovery.img", 32 * MIB)
    node = guest.fork_server("vd0", f"file:{path}", queues=2)
    guest.sh("dd", "if=/dev/urandom", f"of={node}", "bs=64k", "count=16", "oflag=direct")
    config = guest.write_config("vd0", f"file:{path}", queues=2)

    def lose() -> None:
        kill(group=True)
        shutil.rmtree(guest.RUN_BASE / "vd0")

    lose()
    guest.refused("del", "vd0", "--force", status=3, says=r"vdusefast add CONFIG --claim")
    wrong = guest.write_config("vd0", f"file:{path}", queues=1)
    guest.refused("add", wrong, "--claim", status=2, says=r"device\.queues: 2, not 1")
    config = guest.write_config("vd0", f"file:{path}", queues=2)
    assert command("add", config, "--claim") == node
    dump(node, path)
    guest.sh("dd", "if=/dev/urandom", f"of={node}", "bs=64k", "count=16", "oflag=direct")
    dump(node, path)
    lose()
    words = ["dd", "if=/dev/urandom", f"of={node}", "bs=64k", "count=16", "oflag=direct"]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as dd:
        time.sleep(0.5)
        assert dd.poll() is None, "nobody serves it"
        guest.refused("add", config, "--claim", status=1, says=r"record of its completed requests is lost")
        command("del", "vd0", "--force", "--claim")
        assert dd.wait(20) != 0
    assert not Path(node).exists()
    with guest.device("vd0", "memory:16M"):  # and the machine's vDPA bus works
        pass
