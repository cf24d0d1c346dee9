"""The tools of the scenarios: they run commands and vdusefast, look into sysfs, and list what the machine holds."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import json
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vdusefast.cli import app as cli
from vdusefast.cli.serve import read_config
from vdusefast.config import Config
from vdusefast.errors import VdusefastError
from vdusefast.server.rpc_client import RpcClient
from vdusefast.server.service import Service
from vdusefast.transport.kernel_control import destroy_device

CHECKOUT = Path(__file__).parents[3]
RUN_BASE = Path("/run/vdusefast")
WORK = Path("/tmp/scenarios")  # a tmpfs: files here are O_DIRECT-able and never hang
COMPLAINTS = WORK / "complaints.jsonl"
VDUSE_CLASS = Path("/sys/class/vduse")
VDPA_DEVICES = Path("/sys/bus/vdpa/devices")
VDPA_DRIVERS = Path("/sys/bus/vdpa/drivers")
MIB = 1 << 20
# Commands and servers (-m vdusefast ...), workers (-P -c "... vdusefast ..."); never a path that contains the name.
_OURS = re.compile(r" -m vdusefast\b| -P -c .*\bvdusefast\b")
COPIED_PACKAGES = ("cli", "server", "server.systemd", "control", "state", "transport", "host", "backends")
CLEAN_UP_S = 100.0  # it may have to start a server that fails what is pending, on a host that is busy with others
COMMAND_S = 60.0  # one vdusefast command, emulated
SLOWEST = 3.0  # the limits of checks are for a host with nothing else to do: a busy one gets so much more


def prepare() -> None:
    """Make the machine what the checks expect."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    hung = Path("/proc/sys/kernel/hung_task_timeout_secs")
    if hung.exists():
        hung.write_text("60")
    os.environ["PYTHONPATH"] = str(CHECKOUT)
    os.environ.pop("VDUSEFAST_RUN_DIR", None)
    # Once, for all that is forked from here.
    import numpy  # noqa: F401

    import vdusefast.api  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def import_for_copies() -> None:
    """Import once all that commands and servers use, for processes that are forked from here many times.

    An import takes twenty times as long in a guest as on the host.
    """
    import vdusefast

    for package in COPIED_PACKAGES:
        path = Path(vdusefast.__path__[0], *package.split("."))
        for module in pkgutil.iter_modules([str(path)], f"vdusefast.{package}."):
            if not module.name.rpartition(".")[2].startswith("_"):  # __main__, and extensions that need a library
                importlib.import_module(module.name)
    gc.freeze()  # so that no copy looks through all of this, and has its pages copied


# -- commands


def sh(*words: object, timeout_s: float = 30.0, text_in: str | None = None) -> str:
    """Run a command and return its output. Raises AssertionError with all that it said when it fails."""
    done = attempt(*words, timeout_s=timeout_s, text_in=text_in)
    assert done.returncode == 0, f"{' '.join(map(str, words))}: status {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def attempt(
    *words: object, timeout_s: float = 30.0, text_in: str | None = None, uid: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command that may fail, as root or as `uid`, and return how it went."""
    return subprocess.run(
        [str(word) for word in words],
        input=text_in,
        stdin=subprocess.DEVNULL if text_in is None else None,
        capture_output=True,
        text=True,
        check=False,
        timeout=SLOWEST * timeout_s,
        user=uid,
        group=uid,
        extra_groups=[] if uid is not None else None,
    )


def sh_bytes(*words: object, data: bytes, timeout_s: float = 30.0) -> None:
    """Run a command that reads `data` from its standard input. Raises AssertionError when it fails."""
    done = subprocess.run(
        [str(word) for word in words], input=data, capture_output=True, check=False, timeout=SLOWEST * timeout_s
    )
    assert done.returncode == 0, f"{' '.join(map(str, words))}: status {done.returncode}: {done.stderr!r}"


def vdusefast_words(*words: object) -> list[str]:
    """Return the command line of one vdusefast command."""
    return [sys.executable, "-m", "vdusefast", *map(str, words)]


def vdusefast(*words: object, timeout_s: float = COMMAND_S) -> str:
    """Run a vdusefast command that must succeed and return what it prints."""
    return sh(*vdusefast_words(*words), timeout_s=timeout_s)


def attempt_in_copy(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a vdusefast command in a copy of this process, which starts no interpreter, and return how it went."""
    out_fd, err_fd = os.memfd_create("out"), os.memfd_create("err")
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.dup2(out_fd, 1)
            os.dup2(err_fd, 2)
            os.closerange(3, 1024)
            status = cli.run([str(word) for word in words])
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    texts = [os.pread(fd, os.fstat(fd).st_size, 0).decode() for fd in (out_fd, err_fd)]
    os.close(out_fd)
    os.close(err_fd)
    return subprocess.CompletedProcess(list(words), status, *texts)


def refused(
    *words: object, status: int, says: str, uid: int | None = None, under: Sequence[str] = (), by_command: bool = False
) -> str:
    """Run a vdusefast command that must fail with `status` and one line on stderr that matches `says`; returns it.

    uid: its user. under: a command that runs it, such as setpriv. by_command: as a program of its own, as both want.
    """
    if by_command or under or uid is not None:
        done = attempt(*under, *vdusefast_words(*words), timeout_s=COMMAND_S, uid=uid)
    else:
        done = attempt_in_copy(*words)
    said = f"vdusefast {' '.join(map(str, words))}: status {done.returncode}, stdout {done.stdout!r}, {done.stderr!r}"
    assert done.returncode == status, f"{said}; expected status {status}"
    lines = done.stderr.splitlines()
    assert len(lines) == 1, f"{said}; expected one line"
    assert lines[0].startswith("vdusefast: "), said
    assert re.search(says, lines[0]), f"{said}; expected {says!r}"
    return lines[0]


def write_config(
    name: str, uri: str, *, cpus: list[int] | str | None = None, queue: str | list[str] = "", **device: object
) -> Path:
    """Write NAME.toml. queue: lines for each [[queue]], or a list of them; `cache` and `engine` go to [backend]."""
    backend = {key: device.pop(key) for key in ("cache", "engine") if key in device}
    lines = ["[device]", f'name = "{name}"', *_toml(device)]
    if cpus is not None:
        lines.append(f"cpus = {json.dumps(cpus)}")
    lines += ["[backend]", f'uri = "{uri}"', *_toml(backend)]
    if isinstance(queue, str):
        queue = [queue] * int(str(device.get("queues", 1))) if queue else []
    for text in queue:
        lines += ["[[queue]]", text]
    path = WORK / f"{name}.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def _toml(values: dict[str, object]) -> list[str]:
    return [f"{key} = {json.dumps(value)}" for key, value in values.items()]


def add(name: str, uri: str, **settings: object) -> dict[str, object]:
    """`vdusefast add` a device by a configuration file; returns what it says of it."""
    return dict(json.loads(vdusefast("add", write_config(name, uri, **settings), "--json")))  # type: ignore[arg-type]


def delete(name: str, *words: str) -> None:
    """`vdusefast del`, without the start of an interpreter."""
    done = attempt_in_copy("del", name, *words)
    assert done.returncode == 0, f"del {name} {' '.join(words)}: status {done.returncode}: {done.stderr}"


def call(name: str, method: str, **params: object) -> dict[str, object]:
    """Call a method of the server of `name` on its socket: what the commands do, without starting one."""
    with RpcClient(RUN_BASE / name) as client:
        client.send(method, **params)
        return dict(client.receive(COMMAND_S))


def info(name: str) -> dict[str, object]:
    """Return what `show` shows."""
    return call(name, "info")


def counter(name: str, op: str) -> int:
    """Return how many requests of one kind (shm.OPS) the device has answered."""
    return int(call(name, "stats")["total"]["ops"][op]["requests"])  # type: ignore[index]


def show(name: str) -> dict[str, object]:
    """`vdusefast show --json`."""
    done = attempt_in_copy("show", name, "--json")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def fork_server(name: str, uri: str, **settings: object) -> str:
    """Serve a device as `add` does, by a copy of this process: no interpreter is started for command and server.

    Returns its node.
    """
    config = read_config(str(write_config(name, uri, **settings)), {})  # type: ignore[arg-type]
    read_fd, write_fd = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _serve(config, write_fd)
    os.close(write_fd)
    with open(read_fd, "rb") as report:
        said = report.read().decode()
    assert said == "ready", f"{name} was not added: {said or 'its server has died'}"
    assert node_of(name), f"{name} has no node"
    return node_of(name)


def _serve(config: Config, report_fd: int) -> None:
    """Be the server, and end with it. Does not return."""
    status = 1
    try:
        os.setsid()
        os.dup2(report_fd, 3)
        os.closerange(4, 1024)  # the pipes and files of checks
        os.umask(0o077)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            Service(config, RUN_BASE).run(lambda _: (os.write(3, b"ready"), os.close(3)))  # type: ignore[func-returns-value]
            status = 0
        except VdusefastError as error:
            os.write(3, str(error).encode())
    finally:
        os._exit(status)


@contextlib.contextmanager
def device(name: str, uri: str, *, by_command: bool = False, **settings: object) -> Iterator[str]:
    """Serve a device, give its node, and delete it.

    by_command: by `vdusefast add` and `vdusefast del`, which start interpreters; else the same without them.
    """
    node = str(add(name, uri, **settings)["node"]) if by_command else fork_server(name, uri, **settings)
    assert node == node_of(name), f"add {name} said {node!r}, sysfs {node_of(name)!r}"
    yield node
    if by_command:
        vdusefast("del", name)
        return
    server = int(str(info(name)["pid"]))
    call(name, "delete")
    wait_for(f"the server of {name} to end", lambda: not running(server), 20)


def image(name: str, size_bytes: int = 64 * MIB) -> Path:
    """Return a new sparse file of that size on tmpfs."""
    path = WORK / name
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


# -- looking


def node_of(name: str) -> str:
    """Return the device node that the bus driver has made for `name` now, "" without one."""
    for found in (VDPA_DEVICES / name).glob("virtio*/block/*"):
        return f"/dev/{found.name}"
    for found in (VDPA_DEVICES / name).glob("vhost-vdpa-*"):
        return f"/dev/{found.name}"
    return ""


def sysfs_of(name: str) -> Path:
    """Return the directory in sysfs of the disk of `name`."""
    return Path("/sys/block") / Path(node_of(name)).name


def read_int(path: Path) -> int:
    """Return the number in a file of sysfs."""
    return int(path.read_text())


def wait_for(what: str, condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait until `condition()` is true. Raises AssertionError that names `what`."""
    deadline = time.monotonic() + SLOWEST * timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {SLOWEST * timeout_s:g} s"
        time.sleep(0.02)


def pids_of(name: str) -> list[int]:
    """Return the pids of the server of `name` and its workers."""
    found = info(name)
    return [int(str(found["pid"])), *(int(queue["pid"]) for queue in found["queues"])]  # type: ignore[attr-defined]


def running(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def checksum(path: str | Path) -> str:
    """Return the digest of a file's or device's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def have_module(name: str) -> bool:
    """Return whether a kernel module is loaded."""
    return any(line.split()[0] == name for line in Path("/proc/modules").read_text().splitlines())


def kernel() -> tuple[int, int]:
    """Return the version of the running kernel, for what differs between them."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int(re.match(r"\d+", minor)[0])  # type: ignore[index]


# -- what is there


def _command_lines() -> dict[int, str]:
    """Return the command line of each process that is no kernel thread and no zombie."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if line:
                found[int(entry.name)] = line
    return found


def _server_pids() -> dict[int, str]:
    """Return the processes of vdusefast: servers, workers and commands; and the servers of `fork_server`."""
    found = {}
    for pid, line in _command_lines().items():
        with contextlib.suppress(ProcessLookupError):
            forked = "runner.py" in line and os.getsid(pid) == pid and pid not in (os.getpid(), os.getsid(0), 1)
            if _OURS.search(line) or forked:
                found[pid] = line
    return found


@dataclass(frozen=True)
class Resources:
    """Everything in the machine that a device could leave behind."""

    names: frozenset[str]

    @staticmethod
    def now() -> Resources:
        """Look."""
        names = {f"process {pid} ({line[:80]})" for pid, line in _server_pids().items()}
        for directory in (VDUSE_CLASS, VDPA_DEVICES, RUN_BASE, Path("/dev/vduse")):
            if directory.is_dir():
                names |= {f"{directory}/{name}" for name in os.listdir(directory) if name != "control"}
        names |= {f"/dev/{name}" for name in os.listdir("/dev") if re.match(r"vd[a-z]\b|vhost-vdpa-", name)}
        names |= {f"mount {line.split()[1]}" for line in Path("/proc/mounts").read_text().splitlines()}
        return Resources(frozenset(names))

    def beyond(self, before: Resources) -> list[str]:
        """Return what is here and was not there."""
        return sorted(self.names - before.names)


def clean_up() -> None:
    """Remove by force whatever a failed check has left."""
    for line in reversed(Path("/proc/mounts").read_text().splitlines()):
        if line.split()[1].startswith(str(WORK)):
            attempt("umount", "-l", line.split()[1])
    names = {path.name for path in (*VDPA_DEVICES.glob("*"), *VDUSE_CLASS.glob("*"), *RUN_BASE.glob("*"))}
    for name in sorted(names - {"control"}):
        with contextlib.suppress(subprocess.TimeoutExpired):
            attempt(*vdusefast_words("del", name, "--force"), timeout_s=CLEAN_UP_S)
    for name in {path.name for path in VDUSE_CLASS.glob("*")} - {path.name for path in VDPA_DEVICES.glob("*")}:
        if name != "control":
            with contextlib.suppress(VdusefastError):
                destroy_device(name)
    # A server that still has its device is left alone: without one, the next command would hang in the kernel.
    if not any(path.name != "control" for path in VDUSE_CLASS.glob("*")):
        for pid in _server_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def where_processes_wait() -> str:
    """Return, for the processes of vdusefast and of the running check, what each waits for in the kernel."""
    lines = []
    for pid, line in _command_lines().items():
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            state = re.search(r"State:\s+(\S)", status)
            if "runner.py" in line or _OURS.search(line) or (state and state[1] == "D"):
                stack = Path(f"/proc/{pid}/stack").read_text().split("\n")[:8]
                frames = " < ".join(part.split()[1].partition("+")[0] for part in stack if part.strip())
                lines.append(f"  {pid} {state[1] if state else '?'} {line[:80]}: {frames}")
    return "\n".join(lines)


def note_complaints(name: str, lines: list[str]) -> None:
    """Keep what the kernel said during a check, for the last check."""
    with COMPLAINTS.open("a") as file:
        file.write(json.dumps({"check": name, "lines": lines}) + "\n")
