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


def common_arguments(fio: str, node: str, *, engine: str, direct: bool, cpus: Sequence[int]) -> list[str]:
    """Return the start of a command line: what all jobs on `node` share. cpus: where fio may run; empty = anywhere."""
    arguments = [fio, "--output-format=json", "--allow_file_create=0", file_name(node)]
    arguments += [f"--ioengine={engine}", f"--direct={int(direct)}"]
    if cpus:
        arguments += [f"--cpus_allowed={format_cpu_list(cpus)}", "--cpus_allowed_policy=split"]
    return arguments


def measure_arguments(
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
    arguments = common_arguments(
        fio, node, engine=BUFFERED_ENGINE if job.buffered else engine, direct=direct, cpus=cpus
    )
    arguments += [f"--name={job.name}", f"--rw={job.rw}", f"--bs={job.bs}", f"--iodepth={job.iodepth}"]
    arguments += [f"--numjobs={job.numjobs}", "--group_reporting"]
    if job.buffered:  # the time includes that of fsync: what is in the page cache alone does not count
        arguments += ["--end_fsync=1"]
    else:
        arguments += ["--time_based", f"--runtime={milliseconds(runtime_s)}"]
        arguments += [f"--ramp_time={milliseconds(ramp_s)}"] if ramp_s else []
    window = min(job.size, size_bytes - job.offset) if job.size else size_bytes - job.offset
    arguments += [f"--offset={job.offset}", f"--size={window}"]
    return arguments + _optional_arguments(job)


def verify_arguments(
    fio: str, node: str, *, engine: str, size_bytes: int, iodepth: int, cpus: Sequence[int]
) -> list[str]:
    """Return fio's command line for a check: random 4 KiB writes over [0, size_bytes), all of them verified."""
    arguments = common_arguments(fio, node, engine=engine, direct=True, cpus=cpus)
    arguments += ["--name=check", "--rw=randwrite", "--bs=4096", f"--iodepth={iodepth}", f"--size={size_bytes}"]
    return [*arguments, "--verify=crc32c", NO_STATE_FILE]


def _optional_arguments(job: JobSpec) -> list[str]:
    arguments = [f"--rwmixread={job.rwmixread}"] if job.kind == "mixed" else []
    arguments += [f"--fsync={job.fsync}"] if job.fsync else []
    arguments += ["--norandommap"] if job.norandommap else []
    return arguments
