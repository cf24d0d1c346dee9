"""`bench peers` in a guest with a Debian kernel, for machines whose own kernel has no VDUSE, and for counted time."""

from __future__ import annotations

import json
import shlex
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from vdusefast.base.json_types import Json
from vdusefast.bench.common import rounds
from vdusefast.bench.peers import variants as peers_variants
from vdusefast.bench.peers.report import OURS
from vdusefast.bench.peers.session import MARGIN_S, PeersOptions, check_outputs, emit, job_limit_s, say, standard_jobs
from vdusefast.bench.raw.jobs import JobSpec
from vdusefast.errors import ConfigError, VdusefastError
from vdusefast.server.signals import PatientStopSignals

KIT = Path(__file__).resolve().parents[3] / "bench" / "vm" / "run"
REPORT = "peers.json"
BOOT_S = 90.0  # to boot, to start every peer and to check its data, emulated
MEASUREMENT_S = 25.0  # beside the measured time: fio's start and end, emulated
ICOUNT_FACTOR = 8.0  # how much slower than its own clock such a guest is
END_S = 10.0

DISK_PLACE = "/tmp/disk"  # noqa: S108 (of a guest)
MAKE_DISK = (
    f"modprobe ext4 && mkfs.ext4 -q $VDUSEFAST_VM_DISK && mkdir {DISK_PLACE} && mount $VDUSEFAST_VM_DISK {DISK_PLACE}"
)
# One short measurement a boot: instructions repeat, so few rounds do, and a boot takes a while.
ICOUNT_DEFAULTS = PeersOptions(
    jobs=standard_jobs(),
    peers=(OURS, "qsd", "loop", "null_blk"),
    runtime_s=0.5,
    ramp_s=0.1,
    rounds=1,
    size_bytes=16 << 20,
)


def run_in_guest(options: PeersOptions, kernel: str, *, icount: bool) -> int:
    """Run everything in guests of `kernel`, print and write the report; return the exit status.

    icount: a boot for each measurement, in which time is a count of instructions. Raises VdusefastError.
    """
    if not KIT.exists():
        raise ConfigError(f"--vm needs the guest kit of a source tree ({KIT} is not there); run it from a checkout")
    check_outputs(options)
    options = replace(options, load_modules=True, keep_awake=icount)
    with PatientStopSignals() as signals:
        report = _counted(options, kernel, signals) if icount else _boot(options, kernel, False, signals)
        if report is None:
            say("stopped by a signal: a guest tells its figures when it is done")
            return 0
    emit(report, options)
    wanted = {row["name"] for row in report["not_run"]}
    return 1 if report["failed"] or (options.peers is not None and wanted) else 0


def _counted(options: PeersOptions, kernel: str, signals: PatientStopSignals) -> Json | None:
    """Measure each job, round and peer in a boot of its own and return one report over all."""
    names = [kind.name for kind in peers_variants.kinds(options.peers, options.variants)]
    reports: list[Json] = []
    for number, job, order in rounds.schedule(options.jobs, names, options.rounds):
        for name in order:
            variant = peers_variants.one_of(name, options.variants)
            alone = replace(options, jobs=(job,), peers=None if variant else (name,), variants=variant, rounds=1)
            one = _boot(alone, kernel, True, signals)
            if one is None or signals.requested:
                return merge(reports, options) if reports else None
            for run in one["runs"]:
                run["round"] = number
            reports.append(one)
    return merge(reports, options)


def merge(reports: list[Json], options: PeersOptions) -> Json:
    """Return one report over those of single boots: each peer once, all runs, a new table."""
    merged: Json = json.loads(json.dumps(reports[0]))
    jobs = [job.name for job in options.jobs]
    kinds = [kind.name for kind in peers_variants.kinds(options.peers, options.variants)]
    base = peers_variants.base_of(kinds, options.variants)
    merged["method"] |= {"jobs": jobs, "rounds": options.rounds, "variants": options.variants, "base": base}
    for key in ("peers", "not_run"):
        first = {entry["name"]: entry for report in reversed(reports) for entry in report[key]}
        merged[key] = [first[kind] for kind in kinds if kind in first]
    for key in ("runs", "failed"):
        merged[key] = [entry for report in reports for entry in report[key]]
    merged["stopped_by"] = next((report["stopped_by"] for report in reports if report["stopped_by"]), "")
    names = [peer["name"] for peer in merged["peers"]]
    merged["table"] = rounds.table(merged["runs"], jobs, names, base, over_base=bool(options.variants))
    return merged


def guest_arguments(options: PeersOptions, note: str) -> list[str]:
    """Return the command line that runs `options` in a guest, without where its report goes."""
    arguments = ["-m", "vdusefast.bench", "peers", "--load-modules", f"--rounds={options.rounds}", f"--note={note}"]
    arguments += [f"--runtime={options.runtime_s * 1000:g}ms", f"--ramp={options.ramp_s * 1000:g}ms"]
    arguments += [f"--size={options.size_bytes}"]
    arguments += [f"--queues={options.queues}"] if options.queues else []
    arguments += [f"--peers={','.join(options.peers)}"] if options.peers is not None else []
    arguments += [f"--variants={options.variants}"] if options.variants else []
    arguments += [f"--server-cpus={options.server_cpus}"] if options.server_cpus else []
    arguments += [f"--driver-cpus={options.driver_cpus}"] if options.driver_cpus else []
    arguments += [f"--ioengine={options.ioengine}"] if options.ioengine else []
    arguments += [f"--backing={options.backing}"] if options.backing is not None else []
    arguments += ["--keep-awake"] if options.keep_awake else []
    for job in options.jobs:
        arguments += ["--job", job_text(job)]
    return arguments


def job_text(job: JobSpec) -> str:
    """Return `job` as --job takes it."""
    options = {"rw": job.rw, "bs": job.bs, "iodepth": job.iodepth, "numjobs": job.numjobs}
    options |= {"direct": 0} if job.buffered else {}
    return " ".join(f"{key}={value}" for key, value in (options | job.options).items())


def _boot(options: PeersOptions, kernel: str, icount: bool, signals: PatientStopSignals) -> Json | None:
    """Boot a guest for `options` and return its report; None when a signal ended it. Raises VdusefastError."""
    counted = "; time is a count of instructions" if icount else ""
    note = f"Debian's kernel {kernel} on a software-emulated machine{counted}."
    on_disk = options.backing is None and any(job.buffered for job in options.jobs)
    command = f"exec python {shlex.join(guest_arguments(options, note))} --json=$VDUSEFAST_VM_RESULTS/{REPORT}"
    if on_disk:  # on a tmpfs no page is ever dirty
        command = f"{MAKE_DISK} && {command} --backing={DISK_PLACE}"
    limit_s = limit(options, icount)
    with tempfile.TemporaryDirectory(prefix="vdusefast-peers-") as directory:
        arguments = [str(KIT), "--kernel", kernel, "--timeout", f"{limit_s:.0f}", "--results", directory]
        arguments += [f"--disk={disk_mib(options)}M"] if on_disk else []
        arguments += ["--clock", "counted" if icount else "host", "--", "sh", "-c", command]
        # A group of its own: a terminal's Ctrl-C is ours to pass on. The guest's tables go unread, its report is read.
        process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, process_group=0)
        try:
            while process.poll() is None and not signals.wait(0.1):
                continue
        finally:
            _end(process)
        if signals.requested:
            return None
        with suppress(OSError, ValueError):
            report: Json = json.loads((Path(directory) / REPORT).read_text())
            return report
        raise VdusefastError(f"the guest with kernel {kernel} ended with status {process.returncode} and no report")


def disk_mib(options: PeersOptions) -> int:
    """Return the size of a disk that holds the peers' files."""
    peer_count = len(peers_variants.kinds(options.peers, options.variants))
    return (peer_count * options.size_bytes >> 20) * 5 // 4 + 256


def limit(options: PeersOptions, icount: bool) -> float:
    """Return the seconds that a guest may take for `options`."""
    peer_count = len(peers_variants.kinds(options.peers, options.variants))
    measurements = len(options.jobs) * options.rounds * peer_count
    measured_s = max(job_limit_s(job, options) - MARGIN_S for job in options.jobs) * (ICOUNT_FACTOR if icount else 1)
    return BOOT_S * (1 + peer_count / 2) + measurements * (MEASUREMENT_S + measured_s)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the kit, which takes its guest with it, if it has not ended."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
