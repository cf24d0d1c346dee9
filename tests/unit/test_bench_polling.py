"""bench/polling.py: what it makes of the counts, and what it asks for. The counting itself needs a kernel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "bench"))

import polling  # noqa: E402 (needs the path set above)

from vdusefast.errors import ConfigError, VdusefastError  # noqa: E402


def test_settings_of_a_queue_are_for_the_one_that_is_polled() -> None:
    config = polling.device_config({"poll_us": 77, "queue_size": 512})
    assert [queue.poll_us for queue in config.queue] == [0, 77]
    assert (config.device.queue_size, config.device.queues, config.device.transport) == (512, 2, "kernel")
    assert config.backend.uri == f"memory:{polling.DEVICE_BYTES}"
    with pytest.raises(ConfigError, match="poll_us"):
        polling.device_config({"poll_us": -1})


def test_calls_are_read_from_straces_table() -> None:
    text = "syscall               calls\n---------------- ---------\nioctl                    12\nread 3\ntotal 15\n"
    assert polling.parse_calls(text) == {"ioctl": 12, "read": 3}


def test_all_that_a_request_takes_counts() -> None:
    grown = {"requests": 10000, "kicks": 2, "irqs": 3, "sleeps": 1}
    figures = polling.summary(grown, {"ioctl": 3, "read": 1}, 9990, 1e5)
    assert (figures["system_calls"], figures["share"], figures["reached"]) == (4, 0.0009, True)
    assert polling.summary(grown, {"ioctl": 5}, 9990, 1e5)["reached"] is False


def test_requests_that_took_another_way_are_an_error() -> None:
    grown = {"requests": 10, "kicks": 0, "irqs": 0, "sleeps": 0}
    with pytest.raises(VdusefastError, match="of 900 requests 10 came by the queue for polling"):
        polling.summary(grown, {}, 900, 1.0)
    with pytest.raises(VdusefastError, match="of 0 requests 0"):
        polling.summary(grown | {"requests": 0}, {}, 0, 0.0)


def test_figures_are_shown_a_request(capsys: pytest.CaptureFixture[str]) -> None:
    grown = {"requests": 1000, "kicks": 1, "irqs": 0, "sleeps": 0}
    polling.print_figures(polling.summary(grown, {"read": 4}, 1000, 5e4))
    out = capsys.readouterr().out
    assert "| system calls | 4 | 0.004000 |" in out
    assert "missed: 0.005000 kicks, interrupts and system calls a request; 50000 IOPS" in out


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda tool: None if tool == "strace" else tool)
    assert "apt-get install strace" in polling.missing()
    monkeypatch.setattr("shutil.which", lambda tool: tool)
    monkeypatch.setattr(polling, "PARAMETER", tmp_path / "poll_queues")
    assert "modprobe virtio_blk poll_queues=1" in polling.missing()
    polling.PARAMETER.write_text("0\n")
    assert "poll_queues=1" in polling.missing()
    polling.PARAMETER.write_text("1\n")
    assert polling.missing() == ""


def test_tracer_of_nobody() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        assert polling._tracer_of(child.pid) == 0
        child.kill()
