"""`python -m vdusefast.bench raw` as people run it: real devices, short jobs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vdusefast.driver import _driver

MIB = 1 << 20


def fio(*arguments: str, timeout_s: float = 50.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vdusefast.bench", "raw", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


def report(*arguments: str) -> dict[str, Any]:
    done = fio(*arguments, "--output-format=json")
    assert done.returncode == 0, done.stderr
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


@pytest.mark.slow
def test_verified_file_holds_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    arguments = ["--name=v", "--rw=randrw", "--bs=4k", "--iodepth=16", "--verify=crc32c", "--queues=2", "--size=4m"]
    data = report(*arguments, "--cpus=0,1" if os.cpu_count() != 1 else "--cpus=0,0", f"--backend=file:{path}")
    (check,) = data["vdusefast"]["verify"]
    assert check["verify_errors"] == check["request_errors"] == 0
    assert check["blocks_verified"] >= check["read_back_ios"] == data["jobs"][0]["write"]["total_ios"] > 0
    disk = path.read_bytes()
    good = sum(_driver.check_block(disk[at : at + 4096], at) == "none" for at in range(0, len(disk), 4096))
    assert good == data["jobs"][0]["write"]["total_ios"]
    queues = data["vdusefast"]["queues"]
    assert len({q["pid"] for q in queues}) == 2
    assert all(q["requests"] > 0 for q in queues)


@pytest.mark.slow
def test_report_has_fios_names() -> None:
    arguments = "--name=s --rw=randwrite --bs=4k --iodepth=4 --fsync=8 --size=1m --backend=memory:4M"
    data = report(*arguments.split())
    job = data["jobs"][0]
    assert (job["jobname"], job["error"], job["job options"]["rw"]) == ("s", 0, "randwrite")
    write = job["write"]
    assert (write["total_ios"], write["io_bytes"]) == (256, MIB)
    assert write["iops"] > 0
    clat = write["clat_ns"]
    assert clat["N"] == 256
    assert 0 < clat["min"] <= clat["percentile"]["50.000000"] <= clat["percentile"]["99.000000"] <= clat["max"]
    assert clat["min"] <= clat["mean"] <= clat["max"]
    assert job["read"]["total_ios"] == job["trim"]["total_ios"] == 0
    assert job["sync"]["total_ios"] == 32
    assert {"usr_cpu", "sys_cpu"} <= set(job)
    extra = data["vdusefast"]
    assert extra["transport"] == "loopback"
    assert extra["engine_used"] == "memory"
    assert {"cpu", "kernel", "versions"} <= set(extra["host"])
    fields = {"index", "pid", "cpu", "requests", "bytes_read", "bytes_written", "errors", "kicks", "irqs", "batches"}
    assert fields <= set(extra["queues"][0])
    assert extra["queues"][0]["bytes_written"] == MIB


@pytest.mark.slow
def test_write_then_read_in_two_runs(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    report(
        *["--name=w", "--rw=write", "--bs=8k", "--size=2m", "--verify=crc32c", "--do_verify=0"],
        f"--backend=file:{path}",
    )
    arguments = ["--name=r", "--rw=randread", "--bs=8k", "--iodepth=4", "--verify=crc32c", f"--backend=file:{path}"]
    assert report(*arguments)["vdusefast"]["verify"][0]["blocks_verified"] == 256
    with path.open("r+b") as disk:
        disk.seek(5 * 8192 + 100)
        disk.write(b"oops")
    done = fio(*arguments)
    assert done.returncode == 1
    assert "read of block 5 at byte 40960: checksum" in done.stdout


@pytest.mark.slow
def test_clones_are_reported_together() -> None:
    arguments = "--name=g --rw=randread --numjobs=3 --time_based --runtime=0.3 --ramp_time=0.1"
    data = report(*arguments.split(), "--backend=null:1G", "--queues=2")
    (job,) = data["jobs"]
    assert 250 <= job["read"]["runtime"] <= 2000
    assert job["read"]["total_ios"] > 100


@pytest.mark.slow
def test_text_report_says_what_was_done(tmp_path: Path) -> None:
    out = tmp_path / "report.txt"
    done = fio(*["--name=x", "--rw=rw", "--size=1m", "--verify=crc32c"], f"--output={out}")
    assert done.returncode == 0
    assert "worker process" in done.stdout
    text = out.read_text()
    for part in ("IOPS", "p99.9", "busy", "/kick", "/irq", "0 wrong"):
        assert part in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("--name=a --rw=read --nonsense=1", 2, "unknown option '--nonsense'"),
        ("--name=a --rw=read --backend=file:/nonexistent/x.img --size=1m", 1, "No such file"),
        ("--name=a --rw=read --backend=file:/nonexistent.img", 2, "give --size"),
        ("--name=a --rw=read --cpus=4095 --backend=null:1M", 2, "4095 does not exist"),
        ("--name=a --rw=read --driver-cpus=4095 --backend=null:1M", 2, "4095 does not exist"),
        ("--name=a --rw=read --size=2m --backend=null:1M", 2, "the device has"),
        ("--name=a --rw=write --verify=crc32c --backend=null:1M", 2, "keeps nothing"),
        ("--name=a --rw=read --bs=32m --backend=null:64M", 2, "smaller block size"),
    ],
)
def test_errors_are_one_line(arguments: str, status: int, message: str) -> None:
    done = fio(*arguments.split())
    assert done.returncode == status
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_existing_file_is_never_grown(tmp_path: Path) -> None:
    path = tmp_path / "small.img"
    path.write_bytes(bytes(MIB))
    done = fio("--name=a", "--rw=write", "--size=2m", f"--backend=file:{path}")
    assert done.returncode == 2
    assert "not grown" in done.stderr
    assert path.stat().st_size == MIB


@pytest.mark.slow
def test_what_is_wrong_is_said_before_anything_is_made(tmp_path: Path) -> None:
    new = tmp_path / "new.img"
    for arguments in (
        [f"--backend=file:{new}", "--cpus=4097"],
        [f"--backend=file:{new}", "--driver-cpus=4097"],
        [f"--backend=file:{new}", "--output=/nonexistent/report"],
        [f"--backend=file:{new}", "--transport=kernel"],
    ):
        done = fio("--name=b", "--rw=write", "--size=1m", *arguments)
        assert done.returncode == 2, arguments
        assert len(done.stderr.splitlines()) == 1
    assert not new.exists()


@pytest.mark.slow
def test_config_file_and_options_over_it(tmp_path: Path) -> None:
    path = tmp_path / "vd.toml"
    path.write_text('[device]\nname = "vdbench"\nqueues = 2\n[backend]\nuri = "memory:4M"\n[[queue]]\npoll_us = 0\n')
    arguments = ["--name=c", "--rw=randwrite", "--verify=crc32c", f"--config={path}"]
    assert len(report(*arguments)["vdusefast"]["queues"]) == 2
    data = report(*arguments, "--queues=1", "--cpus=0")["vdusefast"]
    assert [q["cpu"] for q in data["queues"]] == [0]
    assert data["backend"] == "memory:4M"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_drains_reports_and_ends_with_status_0(tmp_path: Path, number: signal.Signals) -> None:
    arguments = ["--name=s", "--rw=randrw", "--verify=crc32c", "--size=4m", "--time_based", "--runtime=60"]
    arguments += [f"--output={tmp_path / 'out'}"]
    command = [sys.executable, "-m", "vdusefast.bench", "raw", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(tmp_path)})
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("job:"):
            break
    time.sleep(0.5)
    process.send_signal(number)
    process.stdout.read()
    process.stdout.close()
    assert process.wait(20) == 0
    assert f"stopped early by {number.name}" in (tmp_path / "out").read_text()
    assert not list(tmp_path.glob("vdusefast-bench-*"))


@pytest.mark.slow
def test_a_run_survives_a_killed_worker_and_names_it() -> None:
    arguments = ["--name=k", "--rw=randrw", "--backend=memory:4M", "--queues=2", "--time_based", "--runtime=2"]
    command = [sys.executable, "-m", "vdusefast.bench", "raw", "--verify=crc32c", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = 0
    for line in process.stdout:
        if "queue 1: worker process" in line:
            pid = int(line.split("worker process ")[1].split(",")[0])
        if line.startswith("job:"):
            break
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    _out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert str(pid) in err
    assert "SIGKILL" in err
