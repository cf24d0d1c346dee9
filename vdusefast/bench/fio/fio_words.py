"""Jobs back into fio's own command line, for a device that the real fio opens by its node."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vdusefast.bench.raw.jobs import JobSpec, parse_pattern
from vdusefast.bench.raw.plan import Instance
from vdusefast.errors import ConfigError
from vdusefast.host.cpu_topology import format_cpu_list

# With a limit of time fio ends without its verification phase; so it has to verify after every so many writes.
VERIFY_BACKLOG_COUNT = 256
VERIFY_BATCH_COUNT = 1 << 20  # all of them, at each turn
PATTERN_MAX_BYTES = 512
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


def device_words(
    fio: str, node: str, groups: Sequence[Sequence[Instance]], *, engine: str, direct: bool, cpus: Sequence[int]
) -> list[str]:
    """Return fio's command line for placed jobs: a job of fio's for each clone, so that slices stay as they are."""
    words = common_words(fio, node, engine=engine, direct=direct, cpus=cpus)
    for index, group in enumerate(groups):
        for place, one in enumerate(group):
            words += _instance_words(one, stonewall=index > 0 and place == 0)
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


def _instance_words(one: Instance, *, stonewall: bool) -> list[str]:
    job = one.spec
    words = [f"--name={job.name}", f"--rw={job.rw}", f"--bs={job.bs}", f"--iodepth={job.iodepth}"]
    words += [f"--offset={one.offset}", f"--size={one.size}", f"--randrepeat={int(job.randrepeat)}"]
    words += [f"--runtime={milliseconds(job.runtime)}"] if job.runtime else []
    words += ["--time_based"] if job.time_based else []
    words += [f"--ramp_time={milliseconds(job.ramp_time)}"] if job.ramp_time else []
    words += [f"--randseed={one.order_seed}"] if job.randseed else []
    words += ["--stonewall"] if stonewall else []
    words += ["--group_reporting"] if job.group_reporting else []
    words += _optional_words(job)
    if job.verify != "none":
        words += [f"--verify={job.verify}", f"--do_verify={int(job.do_verify)}", NO_STATE_FILE]
        words += [_pattern_word(job)] if job.verify == "pattern" else []
        if job.writes and job.runtime and job.do_verify:
            # Without a batch as large, fio leaves most of a mixed job's backlog behind.
            words += [f"--verify_backlog={VERIFY_BACKLOG_COUNT}", f"--verify_backlog_batch={VERIFY_BATCH_COUNT}"]
    return words


def _pattern_word(job: JobSpec) -> str:
    """Return the pattern as it was written rather than filled up to a block: fio has a limit, and repeats it itself."""
    pattern = parse_pattern(job.options["verify_pattern"])[: job.bs]
    if len(pattern) > PATTERN_MAX_BYTES:
        raise ConfigError(f"job {job.name}: verify_pattern: fio takes up to {PATTERN_MAX_BYTES} bytes")
    return f"--verify_pattern=0x{pattern.hex()}"


def _optional_words(job: JobSpec) -> list[str]:
    words = [f"--rwmixread={job.rwmixread}"] if job.kind == "mixed" else []
    words += [f"--fsync={job.fsync}"] if job.fsync else []
    words += ["--norandommap"] if job.norandommap else []
    return words
