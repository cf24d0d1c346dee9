"""`bench fio` with the real fio, whose target is the store's file: output, exit status, signals, comparison."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fio_rig
import psutil
import pytest
from fio_rig import MIB

from vdusefast.bench.common.store import BenchStore
from vdusefast.bench.fio.command import run_command
from vdusefast.bench.fio.output import JsonStream
from vdusefast.bench.fio.shown import Shown, run_shown
from vdusefast.errors import ConfigError, VdusefastError
from vdusefast.server.signals import PatientStopSignals

pytestmark = pytest.mark.slow

RUN = ["--transport=loopback", "--queues=1"]
JOB = ["--name=a", "--rw=randrw", "--bs=4k", "--size=1m"]


@pytest.fixture(autouse=True)
def _target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fio_rig.load_the_file_itself(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


def run(*arguments: str, status: int = 0) -> None:
    assert run_command([*RUN, *arguments]) == status


# -- output


def test_text_is_fios_then_ours(capfd: pytest.CaptureFixture[str]) -> None:
    run(*JOB, "--verify=crc32c", "--explain")
    out, err = capfd.readouterr()
    assert err == ""
    wanted = ("This starts", "store: a temporary file", "jobs: all on this device", "Starting 1 process", "err= 0",
              "Run status group 0", "/kick", "What this was")  # fmt: skip
    places = [out.index(text) for text in wanted]
    assert places == sorted(places)


@pytest.mark.parametrize("kind", ["json", "json+", "json,normal", "terse,json"])
def test_json_on_stdout_is_fios_with_one_more_object(capfd: pytest.CaptureFixture[str], kind: str) -> None:
    run(*JOB, f"--output-format={kind}")
    out, err = capfd.readouterr()
    assert "jobs: all on this device" in err
    report, end = json.JSONDecoder().raw_decode(out, out.index("{\n"))
    assert list(report)[-1] == "vdusefast"
    assert report["jobs"][0]["job options"]["rw"] == "randrw"
    assert report["vdusefast"]["transport"] == "loopback"
    assert ("Run status" in out[end:]) == ("normal" in kind)
    if kind == "json+":
        assert report["jobs"][0]["read"]["clat_ns"]["bins"]


@pytest.mark.parametrize("arguments", [["--minimal"], ["--output-format=terse", "--terse-version=5"]])
def test_terse_output_stays_alone_on_stdout(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    run(*JOB, *arguments)
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 1
    assert out.split(";")[1].startswith("fio-")
    assert "/kick" in err


def test_output_goes_into_a_file(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run(*JOB, "--output=text")
    run(*JOB, "--output=report", "--output-format=json")
    assert (tmp_path / "text").read_text().rstrip().splitlines()[-2].startswith("queue")
    assert "vdusefast" in json.loads((tmp_path / "report").read_text())
    assert "err= 0" not in capfd.readouterr().out


def test_logs_lie_where_fio_writes_them(tmp_path: Path) -> None:
    run(*JOB, "--write_bw_log=b", "--write_lat_log=l", "--write_iops_log=i", "--log_avg_msec=10")
    names = {path.name for path in tmp_path.iterdir() if path.suffix == ".log"}
    assert names == {"b_bw.1.log", "l_clat.1.log", "l_lat.1.log", "l_slat.1.log", "i_iops.1.log"}


def test_status_intervals_end_with_the_full_report(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--time_based", "--runtime=2", "--status-interval=1", "--output-format=json", "--rate_iops=100"]
    run(*JOB, *arguments)
    text, reports = capfd.readouterr().out, []
    while text.strip():
        report, end = json.JSONDecoder().raw_decode(text.lstrip())
        reports.append(report)
        text = text.lstrip()[end:]
    assert len(reports) >= 2
    assert ["vdusefast" in report for report in reports] == [False] * (len(reports) - 1) + [True]


def test_what_fio_answers_alone_needs_no_device(capfd: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        (["--version"], "fio-"),
        (["--cmdhelp=iodepth"], "IO buffers"),
        (["--enghelp"], "libaio"),
    ):
        assert run_command(arguments) == 0
        out = capfd.readouterr().out
        assert expected in out
        assert "device:" not in out
    assert run_command([]) == 0
    assert "--driver-cpus" in capfd.readouterr().out


# -- exit status and errors


def test_wrong_data_ends_with_fios_status(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(MIB))
    arguments = ["--name=v", "--bs=4k", "--size=1m", "--verify=crc32c", f"--backend=file:{disk}"]
    run(*arguments, "--rw=write")
    with disk.open("r+b") as stream:
        stream.seek(8192 + 99)
        stream.write(b"oops")
    run(*arguments, "--rw=read", status=1)
    assert "offset 8192" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--nonsense=1"], "unrecognized option '--nonsense=1'"),
        (["--rw=sideways"], "failed parsing rw=sideways"),
        (["--readonly"], "fio is in read-only mode"),
    ],
)
def test_what_fio_refuses_is_said_by_fio_before_there_is_a_device(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], says: str
) -> None:
    run(*JOB, *arguments, "--output=report", status=1)
    out, err = capfd.readouterr()
    assert says in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cpus=4097"], "does not exist"),
        (["--driver-cpus=4097"], "does not exist"),
        (["--output=/nonexistent/x"], "cannot write into"),
        (["--output=/"], "it is a directory"),
        (["--backend=memory:1M", "--baseline=psync"], "needs a file that fio can open"),
        (["--backend=null:1M", "--verify=md5"], "keeps nothing"),
        (["--route=cross"], "there is one queue"),
        (["--client=host"], "another machine"),
        (["--server"], "disks of its own"),
        (["--section=other"], "no job has this name"),
        (["--profile=act"], "a profile brings jobs of its own"),
        (["--read_iolog=x"], "a log names files of its own"),
        (["--ioengine=mmap"], "cannot be mapped"),
        (["--ioengine=net"], "loads a network"),
        (["--ioengine=external:/x.so"], "the loopback transport serves"),
        (["--daemonize=x"], "would end with this command"),
        (["--ioengine=null"], "moves no data"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_made(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_command([*RUN, *JOB, *arguments])
    assert list(tmp_path.iterdir()) == []


def test_existing_file_is_never_grown(tmp_path: Path) -> None:
    path = tmp_path / "small.img"
    path.write_bytes(bytes(MIB))
    with pytest.raises(ConfigError, match="not grown"):
        run_command([*RUN, "--name=a", "--rw=write", "--size=2m", f"--backend=file:{path}"])
    assert path.stat().st_size == MIB


def test_without_fio_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigError, match=r"^bench fio needs the real fio, which is not installed; type: [^\n]*$"):
        run_command(JOB)


def run_into(output: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vdusefast.bench", "fio", *RUN, *JOB, "--output-format=json"]
    return subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, timeout=60, check=False)


def test_output_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = run_into(full)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "vdusefast.bench: No space left on device"
    assert "Traceback" not in done.stderr
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    done = run_into(write_fd)
    os.close(write_fd)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".state")] == []


def test_nobody_who_reads_leaves_no_store(tmp_path: Path) -> None:
    def say(_text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        BenchStore(None, MIB, reads=True, say=say)
    assert list(tmp_path.iterdir()) == []


def test_store_too_large_to_fill_is_sparse(capfd: pytest.CaptureFixture[str]) -> None:
    run("--name=a", "--rw=randread", "--size=3g", "--io_size=1m", "--bs=4k")
    assert "so not filled" in capfd.readouterr().out


def test_failure_after_fio_costs_nothing_of_its_output(capfd: pytest.CaptureFixture[str]) -> None:
    def member(_status: int) -> dict[str, Any]:
        raise VdusefastError("no figures")

    for text in ('{\n  "jobs" : []\n}\n', '{\n  "jobs" : []\n}\nsaid, without an end', "no object"):
        with pytest.raises(VdusefastError, match="no figures"):
            show("printf", "%s", text, member=member)
        assert capfd.readouterr().out == text


def test_device_that_fails_costs_nothing_of_fios_output(capfd: pytest.CaptureFixture[str]) -> None:
    def tick() -> None:
        time.sleep(0.3)
        raise VdusefastError("failed")

    with pytest.raises(VdusefastError, match="failed"):
        show("sh", "-c", "echo one; sleep 0.1; echo two; sleep 60", tick=tick)
    assert capfd.readouterr().out == "one\ntwo\n"


def test_program_that_fio_left_behind_is_not_waited_for(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    began = time.monotonic()
    assert show("sh", "-c", f"sleep 60 & echo $! > {tmp_path}/pid; printf '{{\n \"a\" : 1\n}}\n'") == 0
    assert time.monotonic() - began < 20
    assert json.loads(capfd.readouterr().out) == {"a": 1, "vdusefast": {}}
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # it was left alone


def test_killed_fio_leaves_no_job_and_ends_as_in_a_shell(capfd: pytest.CaptureFixture[str]) -> None:
    killed = "--exec_prerun=kill -9 $(ps -o ppid= -p $PPID)"  # by a job, which continues and holds fio's stdout
    began = time.monotonic()
    run(*JOB, "--time_based", "--runtime=300", "--output-format=json", killed, status=128 + signal.SIGKILL)
    assert time.monotonic() - began < 100
    assert '"vdusefast"' not in capfd.readouterr().out
    assert not [one.pid for one in psutil.process_iter() if "--runtime=300" in cmdline(one)]


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def show(*command: str, **changed: Any) -> int:
    """Run a command in the place of fio, its output being JSON."""
    with PatientStopSignals() as signals:
        parts: dict[str, Any] = {"tick": lambda: None, "member": lambda _status: {}, "say": print, "signals": signals}
        shown = Shown(fio_rig.script(*JOB, "--output-format=json"))
        return run_shown(command, shown, environment={}, cpus=[], **(parts | changed))


def test_lines_of_ours_fit_into_a_terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("vdusefast.bench.fio.shown.terminal_width", lambda _stream: 80)
    (tmp_path / "disk.img").write_bytes(bytes(MIB))
    run(*JOB, "--queue-size=128", "--explain", f"--backend=file:{tmp_path}/disk.img", "--baseline=psync")
    before, _, after = capfd.readouterr().out.partition("jobs: ")
    ours = [*before.splitlines(), *after[after.index("\nqueue ") :].splitlines()]
    assert len(ours) > 20
    assert [line for line in ours if len(line) > 80 and " " in line.strip()] == []


# -- the comparison


def test_baseline_runs_both_in_turn_and_compares_medians(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[Path] = []
    monkeypatch.setattr("vdusefast.bench.fio.baseline._forget_pages", forgotten.append)
    disk = tmp_path / "c:d.img"
    arguments = ["--name=b", "--rw=randread", "--bs=4k", "--size=1m", "--output-format=json", f"--backend=file:{disk}"]
    run(*arguments, "--ioengine=posixaio", "--baseline=psync,job", "--write_lat_log=x", "--direct=1")
    out, err = capfd.readouterr()
    member = json.loads(out)["vdusefast"]
    assert member["replaced"] == ["ioengine=posixaio (now libaio)"]
    one, other = member["baseline"]
    assert (one["engine"], other["engine"], one["rounds"]) == ("psync", "job", 3)
    assert one["fio"]["iops"]["median"] > 0
    assert one["ratio"]["median"] == pytest.approx(one["ours"]["iops"]["median"] / one["fio"]["iops"]["median"], rel=1)
    assert {"--ioengine=psync", "--invalidate=0", "--direct=0"} <= set(one["command"])
    assert not [argument for argument in one["command"] if "lat_log" in argument]
    order = [line.partition(": ")[2] for line in err.splitlines() if line.startswith("round ")]
    ours, psync, own = "vdusefast", "fio alone, ioengine psync", "fio alone, ioengine job"
    assert order == [ours, psync, own, own, psync, ours, ours, psync, own]
    assert forgotten == [disk] * 9


def test_cache_stays_warm_where_the_job_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vdusefast.bench.fio.baseline._forget_pages", lambda path: pytest.fail("pages were dropped"))
    run(*JOB, "--invalidate=0", "--baseline=job")
    assert "times (+-" in capfd.readouterr().out


def test_failed_baseline_does_not_cost_the_report(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(VdusefastError, match="--baseline, nosuch"):
        run_command([*RUN, *JOB, "--baseline=nosuch", "--output-format=json"])
    assert "vdusefast" in json.loads(capfd.readouterr().out)


# -- the stream


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_stream_passes_everything_on_whatever_the_pieces(step: int) -> None:
    text = b'said\n{\n  "a" : 1\n}\nbetween\n{\n  "jobs" : [\n    {\n    }\n  ]\n}\nafter\nno end'
    out = io.BytesIO()
    stream = JsonStream(out)
    for at in range(0, len(text), step):
        stream.write(text[at : at + step])
    assert stream.finish("m", {"x": [1]})
    whole = out.getvalue()
    assert json.loads(whole[whole.rindex(b"\n{\n") : whole.index(b"after")]) == {"jobs": [{}], "m": {"x": [1]}}
    assert whole.replace(b',\n  "m" : {\n    "x": [\n      1\n    ]\n  }', b"") == text


def test_stream_without_an_object_is_unchanged() -> None:
    out = io.BytesIO()
    stream = JsonStream(out)
    stream.write(b"}\nfio: failed\n")
    assert not stream.finish("m", {})
    assert out.getvalue() == b"}\nfio: failed\n"
