"""`bench fio` over the kernel transport: jobs back into fio's words, fio's report into ours, and ends of all kinds."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_fio
import psutil
import pytest

from vdusefast import doctor
from vdusefast.bench.common import block_node, real_fio
from vdusefast.bench.common.real_fio import FioOutcome, FioProcess, FioStuckError, run_fio, split_output
from vdusefast.bench.common.transport import choose_transport
from vdusefast.bench.fio import kernel as kernel_fio
from vdusefast.bench.fio.fio_words import VERIFY_BACKLOG_COUNT, device_words, file_name, milliseconds
from vdusefast.bench.raw.command import build_config, run_plan
from vdusefast.bench.raw.jobs import parse_arguments
from vdusefast.bench.raw.measured import Outcome
from vdusefast.bench.raw.plan import place_jobs
from vdusefast.bench.raw.report import job_rows, verify_lines
from vdusefast.errors import ConfigError, KernelSupportError, VdusefastError
from vdusefast.server.signals import StopSignals

MIB = 1 << 20
NODE = "/dev/vdx"


def words(*arguments: str, direct: bool = True) -> list[str]:
    plan = parse_arguments(arguments)
    groups = place_jobs(plan.jobs, 8 * MIB, 512)
    return device_words("fio", NODE, groups, engine="libaio", direct=direct, cpus=[1, 2])


def sections(line: list[str]) -> list[set[str]]:
    starts = [place for place, word in enumerate(line) if word.startswith("--name=")]
    return [set(line[a:b]) for a, b in zip(starts, [*starts[1:], len(line)], strict=True)]


# -- options into words


def test_every_job_option_reaches_fio() -> None:
    line = words(
        *["--name=a", "--rw=randrw", "--rwmixread=70", "--bs=8k", "--size=1m", "--offset=64k", "--iodepth=16"],
        *["--runtime=1.5", "--time_based", "--ramp_time=250ms", "--fsync=4", "--norandommap", "--randrepeat=0"],
        *["--group_reporting", "--randseed=7"],
    )
    assert {"--ioengine=libaio", "--direct=1", f"--filename={NODE}", "--cpus_allowed=1-2"} <= set(line)
    (job,) = sections(line)
    assert {"--rw=randrw", "--rwmixread=70", "--bs=8192", "--size=1048576", "--offset=65536", "--iodepth=16"} <= job
    assert {"--runtime=1500ms", "--time_based", "--ramp_time=250ms", "--fsync=4", "--norandommap"} <= job
    assert {"--randrepeat=0", "--randseed=7", "--group_reporting"} <= job
    assert "--allow_file_create=0" in line  # a node that went away does not become a file


def test_direct_0_is_passed_on() -> None:
    assert "--direct=0" in words("--name=a", "--rw=read", direct=False)


def test_clones_that_verify_stay_in_their_slices() -> None:
    jobs = sections(words("--name=a", "--rw=randwrite", "--size=3m", "--numjobs=3", "--verify=crc32c"))
    assert len(jobs) == 3
    offsets = {word for job in jobs for word in job if word.startswith("--offset=")}
    assert offsets == {"--offset=0", f"--offset={MIB}", f"--offset={2 * MIB}"}
    assert all({f"--size={MIB}", "--verify=crc32c", "--do_verify=1", "--verify_state_save=0"} <= job for job in jobs)


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (["--runtime=2"], True),
        ([], False),
        (["--runtime=2", "--do_verify=0"], False),
        (["--runtime=2", "--rw=read"], False),
    ],
)
def test_verification_of_a_job_with_a_time_limit_goes_along_with_it(more: list[str], wanted: bool) -> None:
    line = words("--name=a", "--rw=randwrite", "--verify=crc32c", *more)
    assert (f"--verify_backlog={VERIFY_BACKLOG_COUNT}" in line) == wanted


def test_pattern_is_passed_as_written() -> None:
    line = words("--name=a", "--rw=write", "--bs=4k", "--verify=pattern", "--verify_pattern=0xa55a")
    assert "--verify_pattern=0xa55a" in line
    with pytest.raises(ConfigError, match="fio takes up to 512"):
        words("--name=a", "--rw=write", "--verify=pattern", f"--verify_pattern=0x{'ab' * 600}")


def test_stonewall_stands_at_the_first_clone_of_its_group() -> None:
    jobs = sections(words("--size=1m", "--name=a", "--rw=write", "--name=b", "--rw=read", "--stonewall", "--numjobs=2"))
    assert ["--stonewall" in job for job in jobs] == [False, True, False]


def test_words_that_fio_would_misread() -> None:
    assert file_name("/a:b\\c") == "--filename=/a\\:b\\\\c"
    assert milliseconds(0.3) == "300ms"


@pytest.mark.parametrize("option", ["--direct=0", "--ioengine=libaio"])
def test_options_of_the_real_fio_need_the_kernel_transport(option: str) -> None:
    with pytest.raises(ConfigError, match="the real fio's"):
        run_plan(parse_arguments(["--name=a", "--rw=read", "--transport=loopback", option]))


# -- which transport


@pytest.mark.parametrize(
    ("wanted", "usable", "expected"),
    [("auto", True, "kernel"), ("auto", False, "loopback"), ("kernel", True, "kernel"), ("loopback", True, "loopback")],
)
def test_choice_of_transport(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wanted: str, usable: bool, expected: str
) -> None:
    fake_fio.install(tmp_path)
    monkeypatch.setenv("PATH", fake_fio.first_on_path(tmp_path))
    monkeypatch.setattr(doctor, "kernel_usable", lambda: (usable, "because of the moon"))
    transport, reason = choose_transport(wanted)
    assert transport == expected
    assert ("because of the moon" in reason) == (wanted == "auto")


def test_kernel_transport_that_cannot_be_used_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "kernel_usable", lambda: (False, "no /dev/vduse; modprobe vduse"))
    with pytest.raises(KernelSupportError, match=r"no /dev/vduse; modprobe vduse; --transport=loopback") as raised:
        choose_transport("kernel")
    assert raised.value.exit_code == 5


def test_auto_without_fio_is_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "kernel_usable", lambda: (True, ""))
    monkeypatch.setenv("PATH", "/nonexistent")
    transport, reason = choose_transport("auto")
    assert transport == "loopback"
    assert "fio" in reason


# -- fio's report


def test_report_is_found_among_other_lines() -> None:
    report, messages = split_output('fio: warning {not this}\n{\n "jobs": [1]\n}\nverify: bad\n')
    assert report == {"jobs": [1]}
    assert messages == ["fio: warning {not this}", "verify: bad"]
    assert split_output("no report\n") == ({}, ["no report"])
    assert split_output('{\n "cut": ') == ({}, ["{", '"cut":'])


def test_figures_of_several_jobs() -> None:
    one, other = fake_fio.job(read=100), fake_fio.job(read=100, write=200)
    one["read"]["clat_ns"]["mean"] = 1000.0
    figures = real_fio.job_figures([one, other])
    assert (figures["iops"], figures["total_ios"], figures["clat_p99_ns"]) == (3000.0, 400, 5000)
    assert figures["clat_mean_ns"] == pytest.approx((100 * 1000 + 300 * 2000) / 400)


@pytest.mark.parametrize(
    ("rw", "verified"), [("randwrite", 40), ("read", 40), ("randrw", None)], ids=["writes", "reads", "mixed"]
)
def test_count_of_verified_blocks(rw: str, verified: int | None) -> None:
    plan = parse_arguments(["--name=a", f"--rw={rw}", "--verify=crc32c"])
    (check,) = kernel_fio.verification(plan.jobs, [fake_fio.job(rw=rw, read=40, write=50)], [])
    assert (check["blocks_verified"], check["verify_errors"]) == (verified, 0)
    (line, _failed) = verify_lines([check])
    assert ("40 blocks" in line) == (verified is not None)
    assert "0 wrong" in line


def test_wrong_data_is_told_in_fios_words() -> None:
    plan = parse_arguments(["--name=a", "--rw=read", "--verify=crc32c"])
    said = ["verify: bad magic header 0, wanted acca at file /dev/vda offset 409600", "fio: something else"]
    job = fake_fio.job(read=7, error=errno.EILSEQ)
    checks = kernel_fio.verification(plan.jobs, [job], said)
    lines = verify_lines(checks)
    assert "1 wrong" in lines[0]
    assert "offset 409600" in lines[2]
    assert kernel_fio.has_failed(Outcome(fio=FioOutcome(1, {"jobs": [job]}, said)))


def test_reads_of_a_verification_are_no_row_of_their_own() -> None:
    assert [row[1] for row in job_rows([fake_fio.job(rw="randwrite", read=5, write=5)])] == ["write"]
    assert [row[1] for row in job_rows([fake_fio.job(rw="randrw", read=5, write=5)])] == ["read", "write"]


@pytest.mark.parametrize(
    ("status", "error", "stopped_by", "failed"),
    [(0, 0, "", False), (1, errno.EIO, "", True), (128, 0, "SIGINT", False), (128, errno.EINTR, "SIGINT", False),
     (1, errno.EILSEQ, "SIGTERM", True), (2, 0, "", True)],
)  # fmt: skip
def test_what_counts_as_a_failure(status: int, error: int, stopped_by: str, failed: bool) -> None:
    fio = FioOutcome(status, {"jobs": [fake_fio.job(error=error)]}, [])
    assert kernel_fio.has_failed(Outcome(fio=fio, stopped_by=stopped_by)) == failed


# -- running fio


def test_run_returns_report_and_status(tmp_path: Path) -> None:
    fio = fake_fio.install(tmp_path, after="echo oops >&2", status=3)
    outcome = run_fio([str(fio)], limit_s=20)
    assert (outcome.status, outcome.messages) == (3, ["a line of no report", "oops"])
    assert real_fio.problem(outcome) == "fio ended with status 3: oops"


def test_stop_lets_fio_finish_and_report(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    fio = fake_fio.install(tmp_path, before=f"trap 'kill $!' INT; sleep 60 & : > {ready}; wait $!")
    stop_fd = os.eventfd(0)

    def tick(_passed_s: float) -> None:
        if ready.exists():
            os.eventfd_write(stop_fd, 1)

    try:
        outcome = run_fio([str(fio)], limit_s=20, stop_fd=stop_fd, finish=True, tick=tick)
        with pytest.raises(VdusefastError, match="stopped by a signal"):
            run_fio([str(fio)], limit_s=20, stop_fd=stop_fd)
    finally:
        os.close(stop_fd)
    assert outcome.report["jobs"]


@pytest.mark.parametrize("why", ["limit", "tick"])
def test_jobs_that_have_left_fios_group_are_killed_with_it(tmp_path: Path, why: str) -> None:
    marker = tmp_path / "pid"
    fio = fake_fio.install(tmp_path, before=f"setsid sh -c 'echo $$ > {marker}; exec sleep 60' & wait $!")

    def tick(_passed_s: float) -> None:
        if why == "tick" and marker.exists() and marker.read_text():
            raise VdusefastError("enough")

    with pytest.raises(VdusefastError, match="enough" if why == "tick" else "did not end within"):
        run_fio([str(fio)], limit_s=1.0 if why == "limit" else 20.0, tick=tick)
    pid, end = int(marker.read_text()), time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_fio_that_cannot_be_killed_is_handed_to_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FioProcess, "kill", lambda self: None)
    monkeypatch.setattr(real_fio, "KILL_S", 0.1)
    with pytest.raises(FioStuckError) as raised:
        run_fio(["sleep", "60"], limit_s=0.1)
    stuck = raised.value
    assert "did not end within" in str(stuck.cause)
    monkeypatch.undo()
    stuck.fio.kill()
    stuck.fio.reap(5)


def test_missing_program_is_a_clear_error() -> None:
    with pytest.raises(VdusefastError, match=r"/nonexistent/fio: cannot be started: No such file"):
        run_fio(["/nonexistent/fio"], limit_s=1)


def test_choice_of_ioengine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fio = str(fake_fio.install(tmp_path))
    monkeypatch.setattr(real_fio, "kernel_has_io_uring", lambda: True)
    assert (real_fio.choose_engine(fio), real_fio.choose_engine(fio, "libaio")) == ("io_uring", "libaio")
    with pytest.raises(ConfigError, match="this fio does not have it"):
        real_fio.choose_engine(fio, "posixaio")
    monkeypatch.setattr(real_fio, "kernel_has_io_uring", lambda: False)
    assert real_fio.choose_engine(fio) == "libaio"
    with pytest.raises(ConfigError, match="forbids it"):
        real_fio.choose_engine(fio, "io_uring")


def test_io_uring_probe_leaves_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    assert real_fio.kernel_has_io_uring() in (True, False)
    assert len(os.listdir("/proc/self/fd")) == before


# -- the node


def test_block_node_reads_sysfs(tmp_path: Path) -> None:
    (tmp_path / "class/block/vdx/queue").mkdir(parents=True)
    for name, value in {
        "size": 16,
        "ro": 1,
        "queue/logical_block_size": 4096,
        "queue/discard_max_bytes": 65536,
    }.items():
        (tmp_path / "class/block/vdx" / name).write_text(f"{value}\n")
    assert block_node.size_bytes(NODE, tmp_path) == 8192
    assert block_node.logical_block_bytes(NODE, tmp_path) == 4096
    assert block_node.discard_max_bytes(NODE, tmp_path) == 65536
    assert block_node.is_read_only(NODE, tmp_path)
    assert block_node.size_bytes("/dev/other", tmp_path) == 0


# -- the whole of it, over a device that is none


class FakeDevice:
    """The part of a Device that `run_on_kernel` uses."""

    made: list[FakeDevice] = []  # noqa: RUF012
    failing_after = 1 << 30  # looks at `failure`

    def __init__(self, config: Any) -> None:
        self.config, self.name, self.node = config, config.device.name, NODE
        self.stops: list[bool] = []
        self.looks = 0
        FakeDevice.made.append(self)

    def __enter__(self) -> FakeDevice:
        return self

    def __exit__(self, *_args: object) -> None:
        self.stop()

    def stop(self, *, force: bool = False) -> None:
        self.stops.append(force)

    @property
    def failure(self) -> VdusefastError | None:
        self.looks += 1
        return VdusefastError("queue 0: worker was killed") if self.looks > self.failing_after else None

    def queues(self) -> list[Any]:
        return [SimpleNamespace(index=0, pid=os.getpid(), cpu=-1, engine="sync")]

    def stats(self) -> Any:
        counters = dict.fromkeys(("requests", "bytes_read", "bytes_written", "errors", "kicks", "irqs", "batches"), 3)
        return SimpleNamespace(queues=[SimpleNamespace(index=0, pid=os.getpid(), cpu=-1, **counters)])


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeDevice]:
    monkeypatch.setattr(FakeDevice, "made", [])
    monkeypatch.setattr(kernel_fio, "Device", FakeDevice)
    monkeypatch.setattr(doctor, "kernel_usable", lambda: (True, ""))
    monkeypatch.setattr(block_node, "size_bytes", lambda node: 4 * MIB)
    monkeypatch.setenv("PATH", fake_fio.first_on_path(tmp_path))
    return FakeDevice


COMMAND = ["--name=a", "--rw=randread", "--bs=4k", "--iodepth=4", "--transport=kernel", "--backend=memory:4M"]


def test_report_has_fios_figures_and_the_devices_counters(
    fake_device: type[FakeDevice], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_fio.install(tmp_path)
    assert run_plan(parse_arguments([*COMMAND, "--queues=1", "--driver-cpus=0"])) == 0
    text = capsys.readouterr().out
    for line in ("transport: kernel (as asked)", f"device: {NODE}, 4 MiB on memory:4M", "ioengine", "1k", "req/irq"):
        assert line in text
    (device,) = fake_device.made
    assert device.config.device.transport == "kernel"
    assert device.stops == [False]
    calls = (tmp_path / "fio-calls").read_text()
    assert "--direct=1" in calls
    assert "--cpus_allowed=0 " in calls


def test_failed_verification_ends_with_status_1(
    fake_device: type[FakeDevice], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = fake_fio.job(rw="randread", read=3, error=errno.EILSEQ)
    fake_fio.install(tmp_path, [job], before="echo 'verify: bad header at offset 8192'", status=1)
    assert run_plan(parse_arguments([*COMMAND, "--verify=crc32c"])) == 1
    out = capsys.readouterr().out
    assert "1 wrong" in out
    assert "verify: bad header at offset 8192" in out
    assert fake_device.made[0].stops == [False]


def test_fio_that_fails_without_a_report_is_an_error(fake_device: type[FakeDevice], tmp_path: Path) -> None:
    fake_fio.install(tmp_path, before="echo 'fio: no such engine' >&2; exit 1")
    with pytest.raises(VdusefastError, match=r"/dev/vdx: fio ended with status 1: fio: no such engine"):
        run_plan(parse_arguments(COMMAND))


def test_failure_of_the_device_ends_fio_and_forces_it_off(
    fake_device: type[FakeDevice], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_device, "failing_after", 1)
    fake_fio.install(tmp_path, before="sleep 60")
    with pytest.raises(VdusefastError, match="worker was killed"):
        run_plan(parse_arguments(COMMAND))
    assert fake_device.made[0].stops[0] is True


def test_stuck_fio_goes_after_its_device(fake_device: type[FakeDevice], monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    monkeypatch.setattr(fake_device, "stop", lambda self, *, force=False: order.append(f"stop {force}"))
    fio = SimpleNamespace(reap=lambda timeout_s: order.append("reap"))

    def stuck(*_words: object, **_options: object) -> FioOutcome:
        raise FioStuckError("fio is stuck", fio)  # type: ignore[arg-type]

    monkeypatch.setattr(kernel_fio, "run_fio", stuck)
    plan = parse_arguments(COMMAND)
    with StopSignals() as signals, pytest.raises(VdusefastError, match="fio is stuck"):
        kernel_fio.run_on_kernel(plan, build_config(plan.run, "memory:4M", "kernel"), lambda text: None, signals)
    assert order[:2] == ["stop True", "reap"]


def test_signal_lets_fio_report_and_ends_with_status_0(
    fake_device: type[FakeDevice], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The script signals the process that runs it, as a terminal would.
    fake_fio.install(tmp_path, before="trap 'kill $!' INT; sleep 60 & kill -TERM $PPID; wait $!", status=128)
    before = signal.getsignal(signal.SIGTERM)
    assert run_plan(parse_arguments(COMMAND)) == 0
    assert "stopped early by SIGTERM" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before
    assert fake_device.made[0].stops == [False]


@pytest.mark.parametrize("signals", ["HUP", "TERM TERM", "HUP INT TERM"])
def test_no_signal_takes_the_server_from_the_disk(
    fake_device: type[FakeDevice], tmp_path: Path, capsys: pytest.CaptureFixture[str], signals: str
) -> None:
    kills = "; ".join(f"kill -{number} $PPID; sleep 0.6" for number in signals.split())
    fake_fio.install(tmp_path, before=f"trap : INT; {kills}", status=128)
    assert run_plan(parse_arguments(COMMAND)) == 0
    assert f"stopped early by SIG{signals.split()[0]}" in capsys.readouterr().out
    assert fake_device.made[0].stops == [False]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--backend=null:4M", "--verify=crc32c"], "keeps nothing"),
        (["--size=8m"], "the device has"),
        (["--rw=randtrim"], "cannot discard"),
    ],
)
def test_jobs_that_the_device_cannot_serve(fake_device: type[FakeDevice], more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_plan(parse_arguments([*COMMAND, *more]))
    assert fake_device.made[0].stops[0] is True


def test_bus_without_a_block_device_is_refused(fake_device: type[FakeDevice], tmp_path: Path) -> None:
    path = tmp_path / "vd.toml"
    path.write_text('[device]\nname = "vdbench"\nbus = "vhost"\n[backend]\nuri = "memory:4M"\n')
    with pytest.raises(ConfigError, match='use bus = "virtio"'):
        run_plan(parse_arguments(["--name=a", "--rw=read", "--transport=kernel", f"--config={path}"]))
    assert not fake_device.made


def test_help_of_the_command_names_the_kernel_transport() -> None:
    command = [sys.executable, "-m", "vdusefast.bench", "fio", "--help"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    assert any("--transport" in line and "kernel" in line for line in out.splitlines())
