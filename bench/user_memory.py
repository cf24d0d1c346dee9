"""Does memory of ours in place of the kernel's bounce pages pay? Two devices side by side, one with it and one without.

    bench/vm/run --kernel 7.3 --icount --timeout 600 --module vduse --module virtio_vdpa --module virtio_blk -- \\
        python bench/user_memory.py --icount --rounds 3 --seconds 0.3 [--cache none --null-blk] [--engine uring]

Each serves a tmpfs file of its own, or a null_blk device, which moves no data, to see O_DIRECT's share alone. A round
runs fio on one and then on the other, and begins with the other one each time. Prints a line of a Markdown table a job:
medians, the ratio of the medians, all figures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vdusefast import Device, make_config
from vdusefast.bench.peers.awake import Awake

FILE_BYTES = 16 << 20
DEFAULT_JOBS = "randread:4k:32,randwrite:4k:32,read:128k:8"
USE_WAIT_S = 120.0


def serve(stack: ExitStack, path: str, name: str, cache: str, engine: str, user_memory: str) -> Device:
    """Serve `path` until `stack` is closed."""
    # No message may time out: where instructions are counted, an hour passes in no time.
    settings = {"cache": cache, "engine": engine, "user_memory": user_memory, "msg_timeout_s": 0}
    device = Device(make_config(name=name, uri=f"file:{path}", transport="kernel", **settings))
    return stack.enter_context(device)


def make_stores(directory: str, null_blk: bool) -> list[str]:
    """Return the paths of two stores of the same kind."""
    if null_blk:
        subprocess.run(["modprobe", "null_blk", "nr_devices=2", "gb=1"], check=True)
        return ["/dev/nullb0", "/dev/nullb1"]
    paths = [Path(directory) / f"{number}.img" for number in range(2)]
    for path in paths:
        path.write_bytes(os.urandom(FILE_BYTES))
    return list(map(str, paths))


def wait_for_use(device: Device) -> None:
    """Wait until the device uses memory of ours. Raises SystemExit when it does not."""
    deadline = time.monotonic() + USE_WAIT_S
    while not (memory := str(device.info()["memory"])).startswith("user memory"):
        if time.monotonic() > deadline or "no user memory" in memory:
            raise SystemExit(f"user_memory: it is not used: {memory}")
        time.sleep(0.05)


def iops(node: str, job: str, seconds: float) -> float:
    """Return the IOPS of a job, KIND:SIZE:DEPTH, on `node`. Raises RuntimeError."""
    kind, size, depth = job.split(":")
    arguments = ["fio", "--name=job", "--thread", "--ioengine=io_uring", "--direct=1", "--norandommap", "--time_based"]
    arguments += [f"--rw={kind}", f"--bs={size}", f"--iodepth={depth}", f"--size={FILE_BYTES}", f"--filename={node}"]
    arguments += [f"--runtime={round(seconds * 1000)}ms", "--output-format=json"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"fio: {done.stdout}{done.stderr}")
    result = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return float((result["read"]["total_ios"] + result["write"]["total_ios"]) * 1000 / result["job_runtime"])


def main() -> None:
    """Serve, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--cache", default="writeback")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--null-blk", action="store_true")
    parser.add_argument("--jobs", default=DEFAULT_JOBS)
    parser.add_argument("--icount", action="store_true", help="keep a machine awake whose clock jumps over idle time")
    options = parser.parse_args()
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
        awake = stack.enter_context(Awake(options.icount))
        stores = make_stores(directory, options.null_blk)
        devices = {
            name: serve(stack, store, f"memory-{name}", options.cache, options.engine, name)
            for name, store in zip(("on", "off"), stores, strict=True)
        }
        wait_for_use(devices["on"])
        where = f"{options.cache}, {devices['on'].queues()[0].engine}"
        for job in options.jobs.split(","):
            found: dict[str, list[float]] = {"on": [], "off": []}
            for turn in range(options.rounds):
                for name in ("on", "off") if turn % 2 else ("off", "on"):
                    with awake.paused():
                        found[name].append(iops(str(devices[name].info()["node"]), job, options.seconds))
            on, off = statistics.median(found["on"]), statistics.median(found["off"])
            figures = " | ".join(" ".join(f"{value:.0f}" for value in sorted(found[name])) for name in ("on", "off"))
            print(f"| {where} | {job} | {on:.0f} | {off:.0f} | {on / off:.3f} | {figures} |", flush=True)
        if options.icount:
            os._exit(0)  # such a machine is for one measurement: it ends with all that is in it


if __name__ == "__main__":
    main()
