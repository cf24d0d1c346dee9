"""fio with verification on the disk of vd0, while something happens to its servers: no request may fail or be lost."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from collections.abc import Iterator

import guest

FIO = [
    "fio",
    "--name=verified",
    "--thread",
    "--ioengine=libaio",
    "--direct=1",
    "--rw=randwrite",
    "--bs=4k",
    "--size=8M",
]
FIO += ["--iodepth=16", "--offset=32M", "--time_based", "--runtime=600", "--rate_iops=300", "--output-format=json"]
FIO += ["--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64"]  # reads back as it goes
INTERRUPTED = 128  # fio's status then, whatever it has found before


@contextlib.contextmanager
def verified_fio(node: str) -> Iterator[dict[str, float]]:
    """Have fio write and verify meanwhile; nothing may fail. Gives what, at the end, says how long it waited."""
    found: dict[str, float] = {}
    report = guest.WORK / "fio.json"
    words = [*FIO, f"--filename={node}", f"--output={report}"]
    fio = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_writes(100)
        yield found
        wait_for_writes(100)
        assert fio.poll() is None, f"fio has ended: {report.read_text()[-800:]}"
        fio.send_signal(signal.SIGINT)
        status = fio.wait(30)
    finally:
        fio.kill()
        with contextlib.suppress(
            subprocess.TimeoutExpired
        ):  # when nobody serves its disk; what has failed matters then
            fio.wait(2)
    text = report.read_text()
    assert status == INTERRUPTED, f"status {status}: {text[-800:]}"
    job = json.loads(text[text.index("{") : text.rindex("}") + 1])["jobs"][0]
    assert job["error"] == 0, text
    assert job["read"]["total_ios"] > 100, f"fio has verified {job['read']['total_ios']} blocks"
    found["longest_write_s"] = round(job["write"]["clat_ns"]["max"] / 1e9, 2)


def wait_for_writes(count: int) -> None:
    """Wait until vd0 has answered so many more."""
    before = guest.counter("vd0", "write")
    guest.wait_for("writes", lambda: guest.counter("vd0", "write") >= before + count, 60)
