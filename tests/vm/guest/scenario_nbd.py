"""A file system on a disk behind an NBD server, which is killed and started again while it is mounted."""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path

import guest
from checks import check
from guest import MIB
from scenario_filesystem import MOUNT, differences, fill, mounted

SOCKET = guest.WORK / "nbd.sock"
AWAY_S = 0.3  # so long there is no server after each kill
KILLS = 3


class Nbdkit:
    """nbdkit over a file. A context manager."""

    def __init__(self, path: Path) -> None:
        self._words = ["nbdkit", "--foreground", f"--unix={SOCKET}", "file", f"file={path}"]

    def __enter__(self) -> Nbdkit:
        SOCKET.unlink(missing_ok=True)
        self._process = subprocess.Popen(self._words, stdin=subprocess.DEVNULL)
        guest.wait_for("the server's socket", SOCKET.exists, 20)
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        """Kill it, and start it again a while later."""
        self.__exit__()
        time.sleep(AWAY_S)
        self.__enter__()


@check(limit_s=120)
def ext4_while_the_server_is_killed() -> dict[str, object]:
    path = guest.image("nbd.img", 64 * MIB)
    MOUNT.mkdir(exist_ok=True)
    with Nbdkit(path) as server, guest.device("vd0", f"nbd+unix:///?socket={SOCKET}", queues=2) as node:
        guest.sh("mkfs.ext4", "-q", "-F", node, timeout_s=60)
        with mounted(node):
            files: dict[str, str] = {}
            writer = threading.Thread(target=lambda: files.update(fill(MOUNT, 24 * MIB)))
            writer.start()
            kills = 0
            while kills < KILLS or writer.is_alive():
                if kills < KILLS:
                    server.restart()
                    kills += 1
                time.sleep(0.1)
            writer.join()
            assert files
        guest.sh("blockdev", "--flushbufs", node)
        with mounted(node):
            server.restart()
            assert differences(MOUNT, files) == []
            guest.sh("fstrim", MOUNT)
        guest.sh("e2fsck", "-f", "-n", node, timeout_s=60)
        total = guest.call("vd0", "stats")["total"]
        assert total["errors"] == 0, total  # type: ignore[index,call-overload]
        restarts = [queue["restarts"] for queue in guest.info("vd0")["queues"]]  # type: ignore[attr-defined]
        assert restarts == [0, 0]
    # And without us: the file is what was written to the disk.
    guest.sh("e2fsck", "-f", "-n", path, timeout_s=60)
    return {"files": len(files), "kills": kills + 1}
