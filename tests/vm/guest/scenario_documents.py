"""Types the commands that the documents print."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import guest
from checks import check

# There is no sudo here, and nobody to keep out.
SHELL = 'set -euo pipefail; sudo() { "$@"; }; cd "$0"\n'


def blocks_of(heading: str, document: str = "README.md") -> list[str]:
    """Return the shell blocks of a document between a heading and the next one of whatever level."""
    (text,) = re.split(rf"^##+ {re.escape(heading)}$", (guest.CHECKOUT / document).read_text(), flags=re.MULTILINE)[1:]
    section = re.split(r"^##+ ", text, maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


@check(limit_s=300)
def from_nothing_to_a_mounted_file_system() -> dict[str, object]:
    """The README's section about a real disk, line by line, on a machine whose kernel has VDUSE."""
    make, use = blocks_of("A real disk")
    assert len(make.splitlines()) == 3, make
    proof = "echo hello | tee /mnt/file; sync /mnt/file; findmnt --noheadings --output FSTYPE /mnt\n"
    try:
        said = guest.sh("bash", "-c", SHELL + make + proof + use, guest.CHECKOUT, timeout_s=290)
    finally:
        guest.attempt("umount", "/mnt")
        (guest.CHECKOUT / "disk.img").unlink(missing_ok=True)
    assert "hello\next4\n" in said, said
    assert re.search(r"^vd0 +running +/dev/vd[a-z]+ ", said, re.MULTILINE), said
    assert "\nvd0: 2 GiB (2147483648 bytes), was 1 GiB" in said, said
    assert "VIRTIO" in said or "FLUSH" in said, said
    assert not (guest.RUN_BASE / "vd0").exists()
    return {"said": said}


@check(limit_s=120)
def the_real_fio_on_a_kernel_device() -> dict[str, object]:
    """bench fio --transport auto takes the kernel here, says so, and verifies every block."""
    report = guest.WORK / "fio.json"
    words = ["--name=g", "--rw=randrw", "--bs=4k", "--iodepth=16", "--size=4m", "--verify=crc32c", "--queues=2"]
    words += ["--ioengine=libaio", "--direct=1"]
    said = guest.sh(
        *(sys.executable, "-m", "vdusefast.bench", "fio", "--transport=auto", *words),
        *("--output-format=json", f"--output={report}"),
        timeout_s=110,
    )
    assert "transport: kernel" in said, said
    measured = json.loads(report.read_text())
    job = measured["jobs"][0]
    assert job["error"] == 0
    assert job["read"]["total_ios"] + job["write"]["total_ios"] >= 1024, job
    served = measured["vdusefast"]["queues"]
    assert sum(queue["requests"] for queue in served) >= 1024, served
    assert not any(queue["errors"] for queue in served)
    assert not list(guest.VDUSE_CLASS.glob("bench-*"))
    return {"iops": [job["read"]["iops"], job["write"]["iops"]]}


@check(limit_s=200)
def peers_side_by_side() -> dict[str, object]:
    """bench peers measures, checks the data of both, and leaves nothing."""
    report = guest.WORK / "peers.json"
    words = ["--peers=vdusefast,qsd,loop", "--job=rw=randread iodepth=32", "--rounds=1", "--runtime=500ms"]
    words += ["--size=4M", "--queues=1"]  # with more, and CPUs that are absent as here, qsd locks the kernel up
    guest.sh(
        *(sys.executable, "-m", "vdusefast.bench", "peers", "--load-modules", *words, f"--json={report}"),
        timeout_s=190,
    )
    measured = json.loads(report.read_text())
    iops = {run["peer"]: run["iops"] for run in measured["runs"]}
    assert set(iops) == {"vdusefast", "qsd", "loop"}, iops
    assert all(value > 0 for value in iops.values()), iops
    assert {entry.name for entry in guest.VDUSE_CLASS.iterdir()} == {"control"}
    assert not list(Path("/sys/block").glob("loop*/loop"))
    return iops
