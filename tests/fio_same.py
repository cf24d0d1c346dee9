"""fio's options for verification, trim and logs in combinations: a disk gets the same requests as a plain file."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SIZE_BYTES = 2 << 20  # of the disk, and of the file
RUN_S = 100.0
# Each reads or writes a part of SIZE_BYTES. fio chooses the same places in each run: its random numbers begin the same.
COMMON = "--randseed=11 --ioengine=libaio --bs=4k --size=1m"
COMBINATIONS = {
    # verification
    "crc32c": "--rw=randwrite --iodepth=16 --direct=1 --verify=crc32c",
    "md5 psync": "--rw=write --ioengine=psync --bs=8k --verify=md5",
    "sha256 mixed": "--rw=randrw --iodepth=8 --verify=sha256 --rwmixread=30",
    "sha3 large blocks": "--rw=write --ioengine=pvsync2 --bs=16k --verify=sha3-256",
    "crc16 interval": "--rw=randwrite --iodepth=4 --verify=crc16 --verify_interval=512",
    "crc64 block sizes": "--rw=randwrite --iodepth=8 --bsrange=512-8k --verify=crc64",
    "crc7 offset": "--rw=write --ioengine=sync --verify=crc7 --verify_offset=64",
    "xxhash unsorted": "--rw=randwrite --iodepth=16 --verify=xxhash --verifysort=0",
    "sha512 backlog": "--rw=randwrite --verify=sha512 --verify_backlog=16",
    "sha1 backlog batch": "--rw=randwrite --iodepth=16 --verify=sha1 --verify_backlog=32 --verify_backlog_batch=8",
    "crc32 threads": "--rw=randwrite --iodepth=8 --verify=crc32 --verify_async=2",
    "pattern": "--rw=randwrite --iodepth=8 --verify=pattern --verify_pattern=0xdeadbeef",
    "pattern of offsets": "--rw=write --ioengine=vsync --verify=pattern --verify_pattern=%o --verify_interval=512",
    "pattern in crc32c": "--rw=randwrite --iodepth=4 --verify=crc32c --verify_pattern='\"abcd\"-120xbeef'",
    "verify=null": "--rw=randrw --iodepth=8 --verify=null",
    "dump": "--rw=write --verify=md5 --verify_fatal=1 --verify_dump=1",
    "experimental": "--rw=write --iodepth=4 --verify=crc32c --experimental_verify=1",
    "not now": "--rw=randwrite --iodepth=8 --verify=crc32c --do_verify=0",
    "write, then verify only": "--verify=md5 --rw=randwrite --do_verify=0 --name=later --stonewall --verify=md5 "
    "--rw=randwrite --verify_only=1",
    "repeated places": "--rw=randwrite --norandommap=1 --verify=crc32c",
    "lfsr": "--rw=randwrite --random_generator=lfsr --iodepth=16 --verify=crc32c",
    "loops": "--rw=randwrite --iodepth=8 --loops=2 --verify=crc32c --size=512k",
    "threads of their own ranges": "--rw=randwrite --thread --numjobs=2 --offset_increment=1m --verify=md5",
    "flushes": "--rw=randwrite --ioengine=psync --fsync=8 --fdatasync=3 --end_fsync=1 --verify=crc32c",
    "state": "--rw=randwrite --iodepth=4 --verify=crc32c --verify_state_save=1 --number_ios=100",
    # trim
    "trim": "--rw=trim --ioengine=psync",
    "randtrim": "--rw=randtrim --iodepth=16 --bs=8k",
    "trimwrite": "--rw=trimwrite --ioengine=psync --bs=16k",
    "randtrimwrite": "--rw=randtrimwrite --iodepth=8 --bssplit=4k/60:16k/40",
    "randtrimwrite verified": "--rw=randtrimwrite --iodepth=8 --verify=crc32c --verify_backlog=32",
    "trimwrite verified": "--rw=trimwrite --ioengine=psync --bs=8k --verify=md5",
    # logs, and the orders that they show
    "block sizes of shares": "--rw=randread --iodepth=16 --bssplit=4k/50:16k/30:512/20",
    "zipf": "--rw=randrw --iodepth=8 --random_distribution=zipf:1.2 --io_size=2m",
    "half random": "--rw=rw --percentage_random=50 --iodepth=4 --rwmixread=70",
    "zones": "--rw=randread --zonemode=strided --zonesize=64k --zonerange=64k --zoneskip=64k --io_size=256k",
    "with gaps": "--rw=write:4k --ioengine=sync --io_size=512k",
    "same place twice": "--rw=randwrite:4 --rw_sequencer=identical --iodepth=1",
    "batches": "--rw=randread --iodepth=32 --iodepth_batch_submit=8 --iodepth_batch_complete_min=4",
    "few": "--rw=randread --iodepth=8 --number_ios=33 --offset=64k",
    "no latencies": "--rw=randrw --iodepth=4 --disable_clat=1 --disable_slat=1",
    "log of averages": "--rw=randrw --iodepth=4 --log_avg_msec=10 --write_hist_log=log --log_hist_msec=10",
    "one log for all": "--rw=randread --numjobs=2 --iodepth=4 --per_job_logs=0 --offset_increment=1m",
}  # fmt: skip
IN_EACH_RUN = ("crc32c", "flushes", "randtrimwrite verified", "block sizes of shares")  # of guests
LOGS = "--write_bw_log=log --write_iops_log=log --write_lat_log=log --log_offset=1"
ORDERS = ("read", "write", "trim", "sync", "datasync", "sync_file_range")


@dataclass(frozen=True)
class Seen:
    """What a run of fio tells about its requests. counts: of each job. order: of the requests, as they began.

    logs: by name, a (direction, bytes, offset) for each request; none where fio averages.
    """

    counts: list[dict[str, int]]
    order: list[tuple[str, int, int]]
    logs: dict[str, list[tuple[int, ...]]]


def trims(name: str) -> bool:
    """Return whether a combination needs a block device as its example: fio trims no file."""
    return "trim" in COMBINATIONS[name]


def words_of(name: str, target: str | os.PathLike[str]) -> list[str]:
    """Return fio's options. Those before the name are global."""
    words = [f"--filename={os.fspath(target)}", *shlex.split(COMMON), *shlex.split(LOGS)]
    # Clones would write into one log of requests.
    words += [] if "numjobs" in COMBINATIONS[name] else ["--write_iolog=requests"]
    return [*words, f"--name={name.replace(' ', '-')}", *shlex.split(COMBINATIONS[name])]


def run(words: Sequence[str], directory: Path, environment: Mapping[str, str] | None = None) -> Seen:
    """Run fio in a directory of its own, with logs, and return what it has done. Fails where it fails."""
    directory.mkdir()
    done = subprocess.run(
        ["fio", "--output-format=json", "--output=report.json", *words],
        cwd=directory,
        env=None if environment is None else dict(environment),
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert done.returncode == 0, f"{words}: {done.returncode}: {done.stdout}{done.stderr}"
    return seen(
        directory, is_averaged=any("log_avg_msec" in word for word in words), sort="verify_backlog" in str(words)
    )


def seen(directory: Path, *, is_averaged: bool, sort: bool) -> Seen:
    """Return what a run has left in its directory. sort: its order depends on when requests end."""
    text = (directory / "report.json").read_text()
    jobs = json.JSONDecoder().raw_decode(text, text.index("{"))[0]["jobs"]  # around it are fio's notes
    assert [job["error"] for job in jobs] == [0] * len(jobs)
    counts = [_counts(job) for job in jobs]
    order = []
    if (log := directory / "requests").exists():
        rows = [line.split() for line in log.read_text().splitlines()[1:]]
        order = [(row[2], int(row[3]), int(row[4])) for row in rows if row[2] in ORDERS]
    logs: dict[str, list[tuple[int, ...]]] = {}
    for path in sorted(directory.glob("log_*.log")):
        lines = [[int(cell, 0) for cell in line.split(",")] for line in path.read_text().splitlines()]
        # How many averages there are depends on the time that requests take.
        logs[path.name] = [] if is_averaged else sorted((row[2], row[3], row[4]) for row in lines)
    return Seen(counts, sorted(order) if sort else order, logs)


def _counts(job: dict[str, dict[str, int]]) -> dict[str, int]:
    names = ("total_ios", "io_bytes", "short_ios", "drop_ios")
    found = {f"{side} {name}": job[side][name] for side in ("read", "write", "trim") for name in names}
    return found | {"sync total_ios": job["sync"]["total_ios"]}


def check(name: str, ours: Seen, example: Seen) -> None:
    """Fail where a disk got other requests than the example, or fio did not do what the combination is for."""
    assert ours.counts == example.counts
    assert ours.order == example.order
    assert ours.logs == example.logs
    options = COMBINATIONS[name]
    total = {key: sum(job[key] for job in ours.counts) for key in ours.counts[0]}
    requests = sum(total[f"{side} total_ios"] for side in ("read", "write", "trim"))
    assert requests >= 33
    assert bool(total["trim total_ios"]) == trims(name)
    if "verify=" in options and "do_verify=0" not in options:
        assert total["read total_ios"] >= 33, "fio has verified nothing"
    if "fsync" in options:
        assert total["sync total_ios"] >= 256 // 8 - 1
    if "log_avg_msec" in options:
        return
    # fio notes each request when it ends, and when it begins. It counts the writes that verify_only leaves out.
    begun = len([one for one in ours.order if one[0] in ORDERS[:3]])
    assert "numjobs" in options or begun == requests - 256 * ("verify_only" in options)
    found = {re.sub(r"^log_|(\.\d+)?\.log$", "", log): rows for log, rows in ours.logs.items()}
    assert {"bw", "iops"} <= {kind for kind, rows in found.items() if rows}
