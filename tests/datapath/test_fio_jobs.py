"""Jobs as people write them run over the loopback transport, unchanged; other tools read what comes out."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fio_rig import JOBS, MIB

COMMANDS = [line.removeprefix("fio ") for line in (JOBS / "commands.txt").read_text().splitlines()]
LIMIT_S = 55


def bench_fio(
    *arguments: str, directory: Path, status: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vdusefast.bench", "fio", "--transport=loopback", *arguments]
    done = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, "BS": "4k", "TMPDIR": str(directory), **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def report(*arguments: str, directory: Path) -> dict[str, Any]:
    done = bench_fio(*arguments, "--output-format=json", directory=directory)
    parsed: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{\n") :])
    return parsed


def fio(*arguments: str, directory: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ["fio", *arguments], cwd=directory, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize("job", sorted(path.name for path in JOBS.glob("*.fio")))
def test_job_file_runs_as_it_is(tmp_path: Path, job: str) -> None:
    data = report(str(JOBS / job), "--queues=2", directory=tmp_path)
    assert [one["error"] for one in data["jobs"]] == [0] * len(data["jobs"])
    moved = sum(one[side]["io_bytes"] for one in data["jobs"] for side in ("read", "write", "trim"))
    served = sum(queue["bytes_read"] + queue["bytes_written"] for queue in data["vdusefast"]["queues"])
    assert served >= moved > 0
    assert sum(queue["errors"] for queue in data["vdusefast"]["queues"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS, ids=[line.partition("name=")[2].split()[0] for line in COMMANDS])
def test_command_line_runs_as_it_is(tmp_path: Path, line: str) -> None:
    done = bench_fio(*shlex.split(line), "--queues=2", directory=tmp_path)
    assert "err= 0" in done.stdout
    logs = {path.name for path in tmp_path.glob("*.log")}
    assert ("out_bw.1.log" in logs) == ("write_bw_log" in line)


# -- data


CHECKS = (["--verify=crc32c"], ["--verify=md5"], ["--verify=sha256"],
          ["--verify=pattern", "--verify_pattern=0xdeadbeef"], ["--verify=crc32c", "--verify_pattern=%o"])  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=[" ".join(check) for check in CHECKS])
def test_data_of_either_is_verified_by_the_other(tmp_path: Path, check: list[str]) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(4 * MIB))
    job = ["--name=v", "--bs=4k", "--size=4m", "--ioengine=libaio", "--iodepth=16", "--direct=1", *check]
    ours = [*job, f"--backend=file:{disk}", "--queues=2"]
    plain = [*job, f"--filename={disk}", "--direct=0"]
    bench_fio(*ours, "--rw=randwrite", "--do_verify=0", directory=tmp_path)
    fio(*plain, "--rw=read", directory=tmp_path)
    fio(*plain, "--rw=randwrite", "--do_verify=0", "--randseed=7", directory=tmp_path)
    bench_fio(*ours, "--rw=randread", directory=tmp_path)
    with disk.open("r+b") as stream:
        stream.seek(MIB + 8192 + 100)
        stream.write(b"oops")
    done = bench_fio(*ours, "--rw=read", directory=tmp_path, status=1)
    assert str(MIB + 8192) in done.stderr


MEMORY_OF_ITS_OWN = """
import vdusefast

class Disk(vdusefast.Backend):
    size_bytes = 8 << 20

    def __init__(self):
        self.data = bytearray(self.size_bytes)

    def pread(self, buffer, offset_bytes):
        buffer[:] = self.data[offset_bytes : offset_bytes + len(buffer)]

    def pwrite(self, buffer, offset_bytes):
        self.data[offset_bytes : offset_bytes + len(buffer)] = buffer
"""


@pytest.mark.slow
def test_every_block_is_read_through_another_queue_than_wrote_it(tmp_path: Path) -> None:
    """The job of `make fio` finds a class whose queues have memory of their own."""
    job = Path(__file__).parents[2] / "bench" / "jobs" / "default.fio"
    text = job.read_text().replace("size=256m", "size=8m").replace("runtime=3", "runtime=0.1")
    (tmp_path / "job.fio").write_text(text)
    (tmp_path / "disk.py").write_text(MEMORY_OF_ITS_OWN)
    arguments = ["job.fio", "--queues=2"]
    bench_fio(*arguments, "--backend=memory:8M", directory=tmp_path)
    done = bench_fio(*arguments, f"--backend=python:{tmp_path / 'disk.py'}:Disk", directory=tmp_path, status=1)
    assert "verify: bad" in done.stderr + done.stdout


@pytest.mark.slow
def test_fios_own_tools_read_json_plus(tmp_path: Path) -> None:
    arguments = ["--name=p", "--rw=randread", "--size=1m", "--direct=1", "--output-format=json+", "--output=p.json"]
    bench_fio(*arguments, directory=tmp_path)
    subprocess.run(["fio_jsonplus_clat2csv", "p.json", "p.csv"], cwd=tmp_path, check=True, timeout=LIMIT_S)
    rows = (tmp_path / "p_job0.csv").read_text().splitlines()
    assert rows[0].startswith("nsec, read_slat_ns_count")
    assert len(rows) > 5
