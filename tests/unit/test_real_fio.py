"""The real fio as the benchmarks run it: the choice of transport, reports, signals, and ends of all kinds."""

from __future__ import annotations

import os
import time
from pathlib import Path

import fake_fio
import psutil
import pytest

from vdusefast import doctor
from vdusefast.bench.common import block_node, real_fio
from vdusefast.bench.common.real_fio import FioProcess, FioStuckError, run_fio, split_output
from vdusefast.bench.common.transport import choose_transport
from vdusefast.errors import ConfigError, KernelSupportError, VdusefastError

MIB = 1 << 20
NODE = "/dev/vdx"


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
