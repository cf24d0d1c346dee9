"""fio's own example jobs (Debian's package fio-examples) run over the loopback transport, shortened."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path("/usr/share/doc/fio/examples")
MIB = 1 << 20
LIMIT_S = 120
UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
AMOUNT = re.compile(
    r"^(\s*(?:size|filesize|io_size|offset|offset_increment|zonesize|zoneskip|zonerange)\s*=\s*)"
    r"(\d+)([kmgtKMGT]?)[bB]?(\s.*|)$"
)
SHORTER = {"runtime": "1s", "timeout": "1s", "ramp_time": "0", "startdelay": "0", "ss_ramp": "0", "ss_dur": "2s",
           "steadystate_ramp_time": "0", "steadystate_duration": "2s", "loops": "1"}  # fmt: skip
# The verdicts of all are in docs/results/2026-11-30-fio-examples.md, with the reasons of these.
LEFT_OUT = {"1mbs_clients.fio", "fixed-rate-submission.fio", "poisson-rate-submission.fio", "numa.fio",
            "uring-cmd-zoned.fio", "xnvme-zoned.fio"}  # fmt: skip


def shortened(text: str) -> str:
    """Return a job file with sizes of 8 MiB at most, times of a second, and no loops."""
    out = []
    for line in text.splitlines():
        name, equals, _value = line.partition("=")
        if equals and name.strip() in SHORTER:
            line = f"{name}={SHORTER[name.strip()]}"
        elif match := AMOUNT.match(line):
            most = MIB if "offset" in match[1] else MIB // 8 if "io_size" in match[1] else 8 * MIB
            line = f"{match[1]}{min(int(match[2]) * UNITS[match[3].lower()], most)}{match[4]}"
        out.append(line)
    if not any(re.match(r"\s*(size|filesize|io_size)\s*=", line) for line in out):
        out = [f"{line}\nio_size=8m" if line.strip() == "[global]" else line for line in out]
    return "\n".join(out) + "\n"


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_example_for_a_disk_runs(tmp_path: Path) -> None:
    jobs = sorted([*EXAMPLES.glob("*.fio"), *EXAMPLES.glob("*.fio.gz")])
    assert jobs, f"{EXAMPLES} is empty; type: sudo apt-get install fio-examples"
    failed, ran, refused = [], 0, 0
    for path in jobs:
        name = path.name.removesuffix(".gz")
        if name in LEFT_OUT:
            continue
        text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
        (tmp_path / name).write_text(shortened(text))
        try:
            done = subprocess.run(
                [sys.executable, "-m", "vdusefast.bench", "fio", "--transport=loopback", "--queues=2", name],
                cwd=tmp_path,
                env={**os.environ, "FIO_RW": "randread", "FIO_IODEPTH": "4", "FIO_BS": "4k", "TMPDIR": str(tmp_path)},
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            failed.append(f"{name}: not done after {LIMIT_S} s")
            continue
        if done.returncode == 2:
            refused += 1
            assert re.search(r"^vdusefast.bench: (ioengine=\S+: |no job reads or writes)", done.stderr), done.stderr
        elif done.returncode:
            failed.append(f"{name}: {done.stderr[-300:]}")
        else:
            ran += 1
    assert not failed
    assert ran >= 35
    assert refused >= 35
