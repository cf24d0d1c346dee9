"""Peers that are plain files, results that were never measured, and the command with all of its options unset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vdusefast.base.json_types import Json
from vdusefast.bench.peers import options as peers_options
from vdusefast.bench.peers.peer import Peer


def run(peer: str, number: int, iops: float, job: str = "j") -> Json:
    return {"job": job, "peer": peer, "round": number, "iops": iops, "clat_mean_ns": 10.0, "clat_p99_ns": 100 * iops}


def command(**changed: Any) -> int:
    values: dict[str, Any] = dict.fromkeys(("peers", "runtime", "ramp", "rounds", "size", "backing", "queues"))
    values |= dict.fromkeys(("ioengine", "json_path", "plot", "vm"))
    values |= {"server_cpus": "", "driver_cpus": "", "note": "", "variants": "", "jobs": ()}
    values |= dict.fromkeys(("load_modules", "markdown", "icount", "keep_awake"), False)
    return peers_options.run_command(peers_options.PeersArguments(**(values | changed)))


class FilePeer(Peer):
    """A peer whose node is its file."""

    title = "a file"
    cache = "none"
    log: list[str] = []  # noqa: RUF012
    started: Callable[[FilePeer], None] | None = None

    @classmethod
    def missing_in_kernel(cls) -> str:
        return ""

    def _start(self) -> str:
        FilePeer.log.append(f"start {self.name}")
        self._stack.callback(FilePeer.log.append, f"stop {self.name}")
        if type(self).started is not None:
            type(self).started(self)  # type: ignore[misc]
        return str(self.setup.path)


class A(FilePeer):
    name = "a"


class B(FilePeer):
    name = "b"


class C(FilePeer):
    name = "c"
