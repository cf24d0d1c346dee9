"""The real fio with verification: many kinds of load, each on a part of the device of its own, in one process."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import guest
from checks import LONG, check
from guest import MIB

sys.path.append(str(guest.CHECKOUT / "tests"))
import fio_same

FIO_S = 150.0
COMMON = {
    "thread": 1,
    "verify": "crc32c",
    "verify_fatal": 1,
    "do_verify": 1,
    "verify_backlog": 64,
    "verify_state_save": 0,
    "random_generator": "lfsr",
    "randseed": 3,
    "group_reporting": 0,
}
DIRECT = {"direct": 1, "ioengine": "libaio"}
BUFFERED = {"direct": 0, "ioengine": "psync"}


def fio(jobs: dict[str, dict[str, object]], timeout_s: float = FIO_S) -> dict[str, dict[str, object]]:
    """Run jobs (name: options; without `filename` there is an error) and return fio's results by name.

    Raises AssertionError when a job has errors or did not do what it was to do.
    """
    lines = ["[global]", *(f"{key}={value}" for key, value in COMMON.items())]
    for name, options in jobs.items():
        lines += [f"[{name}]", *(f"{key}={value}" for key, value in options.items())]
    path = guest.WORK / "jobs.fio"
    path.write_text("\n".join(lines) + "\n")
    done = guest.attempt("fio", "--output-format=json", path, timeout_s=timeout_s)
    start = done.stdout.find("{")
    assert done.returncode == 0, f"fio: status {done.returncode}: {done.stdout[:1500]}{done.stderr[-1500:]}"
    results = {str(job["jobname"]): job for job in json.loads(done.stdout[start:])["jobs"]}
    assert results.keys() == jobs.keys()
    for name, job in results.items():
        assert job["error"] == 0, f"{name}: error {job['error']}: {done.stderr}"
        transferred = job["read"]["io_bytes"] + job["write"]["io_bytes"] + job["trim"]["io_bytes"]
        assert transferred > 0, f"{name} has done nothing"
        if "rw" in jobs[name] and "read" not in str(jobs[name]["rw"]):
            assert job["read"]["io_bytes"] > 0, f"{name} has verified nothing: {job['read']}"
    return results


def places(node: str, jobs: dict[str, dict[str, object]], size_bytes: int) -> dict[str, dict[str, object]]:
    """Give each job `size_bytes` of the device of its own."""
    return {
        name: {"filename": node, "offset": place * size_bytes, "size": size_bytes, **options}
        for place, (name, options) in enumerate(jobs.items())
    }


MIXED: dict[str, dict[str, object]] = {
    "randrw-512-to-1m": {**DIRECT, "rw": "randrw", "iodepth": 16, "bsrange": "512-1m", "bs_unaligned": 0},
    "depth-1": {**DIRECT, "rw": "randwrite", "iodepth": 1, "bs": 4096, "io_size": 3 * MIB},
    "depth-128": {**DIRECT, "rw": "randrw", "iodepth": 128, "bs": 4096, "io_size": 12 * MIB},
    "sectors": {**DIRECT, "rw": "randrw", "iodepth": 32, "bs": 512, "io_size": 2 * MIB},
    "large": {**DIRECT, "rw": "write", "iodepth": 4, "bs": MIB},
    "buffered": {**BUFFERED, "rw": "randrw", "bsrange": "512-128k", "fsync": 32},
    "trim": {**DIRECT, "rw": "trimwrite", "iodepth": 16, "bs": 65536, "verify_backlog": 0},
}


def totals(before: dict[str, object], after: dict[str, object]) -> list[int]:
    """Return how many requests each queue has answered between two calls of `stats`."""
    queues = zip(after["queues"], before["queues"], strict=True)  # type: ignore[call-overload]
    return [int(new["requests"]) - int(old["requests"]) for new, old in queues]


@check(limit_s=200)
def one_queue() -> dict[str, object]:
    path = guest.image("fio.img", 128 * MIB)
    with guest.device("vd0", f"file:{path}", queues=1) as node:
        results = fio(places(node, MIXED, 16 * MIB))
        trims = guest.counter("vd0", "discard")
        assert trims >= 16 * MIB // 65536, f"{trims} discards"
        stats = guest.call("vd0", "stats")["total"]
        assert stats["errors"] == 0, stats  # type: ignore[index]
        assert stats["bad_requests"] == 0, stats  # type: ignore[index]
    return {name: round(job["job_runtime"] / 1000, 1) for name, job in results.items()}  # type: ignore[operator]


@check(limit_s=120)
def four_queues() -> dict[str, object]:
    """With as many CPUs as queues, so that the driver uses them all."""
    offline = [path for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]/online") if path.read_text()[0] == "0"]
    for path in offline:
        path.write_text("1")
    try:
        disk = guest.image("fio.img", 64 * MIB)
        with guest.device("vd0", f"file:{disk}", queues=4) as node:
            used = len(list((guest.sysfs_of("vd0") / "mq").iterdir()))
            assert used == 4, f"{used} queues; the driver makes one for each CPU that the machine may have"
            before = guest.call("vd0", "stats")
            jobs = {
                f"cpu{cpu}": {
                    **DIRECT,
                    "rw": "randrw",
                    "iodepth": 8,
                    "bs": 8192,
                    "io_size": 2 * MIB,
                    "cpus_allowed": cpu,
                }
                for cpu in range(used)
            }
            fio(places(node, jobs, 4 * MIB))
            counts = totals(before, guest.call("vd0", "stats"))
            assert all(count > 100 for count in counts[:used]), f"requests of each queue: {counts}"
    finally:
        for path in offline:
            path.write_text("0")
    return {"queues": used, "requests": counts}


@check(limit_s=120)
def two_devices_at_once() -> dict[str, object]:
    """Three queues and a store without a page cache beside one queue in memory; each job knows its own data."""
    disk = guest.image("fio.img", 64 * MIB)
    with (
        guest.device("vd0", f"file:{disk}", queues=3, cache="none") as first,
        guest.device("vd1", "memory:64M", queues=1) as second,
    ):
        assert first != second
        job = {**DIRECT, "rw": "randrw", "iodepth": 16, "bsrange": "4k-64k", "io_size": 8 * MIB}
        both = {
            "first": {"filename": first, "size": 16 * MIB, **job},
            "second": {"filename": second, "size": 16 * MIB, **job, "randseed": 5},
        }
        results = fio(both)
        assert guest.counter("vd0", "write") > 50
        assert guest.counter("vd1", "write") > 50
        assert {entry["name"] for entry in json.loads(guest.attempt_in_copy("list", "--json").stdout)} == {"vd0", "vd1"}
    return {name: round(entry["job_runtime"] / 1000, 1) for name, entry in results.items()}  # type: ignore[operator]


@check(limit_s=240)
def same_requests_as_on_a_file() -> dict[str, object]:
    """fio's options for verification, trim and logs, beside a plain file, and beside a loop device where fio trims."""
    names = list(fio_same.COMBINATIONS) if LONG else fio_same.IN_EACH_RUN
    disk = guest.image("fio.img", fio_same.SIZE_BYTES)
    runs = guest.WORK / "same"
    runs.mkdir()
    guest.sh("modprobe", "loop")
    with guest.device("vd0", f"file:{disk}", queues=2) as node:
        for place, name in enumerate(names):
            example = guest.image("example.img", fio_same.SIZE_BYTES)
            loop = guest.sh("losetup", "--find", "--show", example).strip() if fio_same.trims(name) else ""
            try:
                wanted = fio_same.run(fio_same.words_of(name, loop or example), runs / f"{place}-example")
            finally:
                if loop:
                    guest.sh("losetup", "--detach", loop)
            found = fio_same.run(fio_same.words_of(name, node), runs / f"{place}-device")
            try:
                fio_same.check(name, found, wanted)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
        stats = guest.call("vd0", "stats")["total"]
        assert stats["errors"] == 0, stats  # type: ignore[index]
    shutil.rmtree(runs)
    return {"combinations": len(names)}
