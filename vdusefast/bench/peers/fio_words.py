"""Jobs of `bench peers` as command lines of fio."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vdusefast.bench.raw.jobs import JobSpec
from vdusefast.host.cpu_topology import format_cpu_list

BUFFERED_ENGINE = "psync"  # as programs do that do not ask for anything else
NO_STATE_FILE = "--verify_state_save=0"  # fio would leave one in the current directory


def file_name(path: str | os.PathLike[str]) -> str:
    """Return the option that names one file: fio takes a colon for the end of a name."""
    return "--filename=" + os.fspath(path).replace("\\", "\\\\").replace(":", "\\:")


def milliseconds(seconds: float) -> str:
    """Return a time as fio reads it: it takes a fraction of a second for none."""
    return f"{round(seconds * 1000)}ms"


def common_words(fio: str, node: str, *, engine: str, direct: bool, cpus: Sequence[int]) -> list[str]:
    """Return the start of a command line: what all jobs on `node` share. cpus: where fio may run; empty = anywhere."""
    words = [fio, "--output-format=json", "--allow_file_create=0", file_name(node)]
    words += [f"--ioengine={engine}", f"--direct={int(direct)}"]
    if cpus:
        words += [f"--cpus_allowed={format_cpu_list(cpus)}", "--cpus_allowed_policy=split"]
    return words


def measure_words(
    fio: str,
    node: str,
    job: JobSpec,
    *,
    engine: str,
    direct: bool,
    cpus: Sequence[int],
    size_bytes: int,
    runtime_s: float,
    ramp_s: float,
) -> list[str]:
    """Return fio's command line for one timed job on [0, size_bytes) of `node`, all clones reported as one."""
    words = common_words(fio, node, engine=BUFFERED_ENGINE if job.buffered else engine, direct=direct, cpus=cpus)
    words += [f"--name={job.name}", f"--rw={job.rw}", f"--bs={job.bs}", f"--iodepth={job.iodepth}"]
    words += [f"--numjobs={job.numjobs}", "--group_reporting"]
    if job.buffered:  # the time includes that of fsync: what is in the page cache alone does not count
        words += ["--end_fsync=1"]
    else:
        words += ["--time_based", f"--runtime={milliseconds(runtime_s)}"]
        words += [f"--ramp_time={milliseconds(ramp_s)}"] if ramp_s else []
    window = min(job.size, size_bytes - job.offset) if job.size else size_bytes - job.offset
    words += [f"--offset={job.offset}", f"--size={window}"]
    return words + _optional_words(job)


def verify_words(fio: str, node: str, *, engine: str, size_bytes: int, iodepth: int, cpus: Sequence[int]) -> list[str]:
    """Return fio's command line for a check: random 4 KiB writes over [0, size_bytes), all of them verified."""
    words = common_words(fio, node, engine=engine, direct=True, cpus=cpus)
    words += ["--name=check", "--rw=randwrite", "--bs=4096", f"--iodepth={iodepth}", f"--size={size_bytes}"]
    return [*words, "--verify=crc32c", NO_STATE_FILE]


def _optional_words(job: JobSpec) -> list[str]:
    words = [f"--rwmixread={job.rwmixread}"] if job.kind == "mixed" else []
    words += [f"--fsync={job.fsync}"] if job.fsync else []
    words += ["--norandommap"] if job.norandommap else []
    return words
