"""Output on a terminal of 80 columns: tables and lines are folded between words, and torture shows its progress."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import pytest

from vdusefast.base.columns import columns, terminal_width, wrap
from vdusefast.bench.common.tables import QUEUE_HEADINGS, print_tables
from vdusefast.bench.peers import PEERS, kinds
from vdusefast.bench.torture.progress import ProgressLine
from vdusefast.bench.torture.report import Findings, as_text
from vdusefast.cli import render

WIDE = [["NAME", "FIRST", "SECOND", "THIRD"], ["one", "a" * 20, "b" * 20, "c" * 20], ["two", "d", "e", "f"]]


class Terminal:
    """A stream that is a terminal of some columns; a context manager."""

    def __init__(self, width: int, lines: int = 50) -> None:
        self.width, self.lines = width, lines

    def __enter__(self) -> Terminal:
        self.master_fd, self.fd = pty.openpty()
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("4H", self.lines, self.width, 0, 0))
        self.stream = os.fdopen(os.dup(self.fd), "w")
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        os.close(self.fd)
        os.close(self.master_fd)

    def text(self) -> str:
        """Return what has been written so far, which must fit into the terminal's buffer."""
        self.stream.flush()
        os.set_blocking(self.master_fd, False)
        data = b""
        with suppress(BlockingIOError):
            while piece := os.read(self.master_fd, 1 << 16):
                data += piece
        return data.decode().replace("\r\n", "\n")


def run_on_terminal(words: list[str], directory: Path, width: int = 80) -> str:
    """Return what a command writes to a terminal of that width."""
    parts = []
    environment = {**os.environ, "VDUSEFAST_RUN_DIR": str(directory), "TERM": "xterm"}
    environment.pop("COLUMNS", None)
    with (
        Terminal(width) as terminal,
        subprocess.Popen(
            [sys.executable, "-m", *words], stdin=terminal.fd, stdout=terminal.fd, stderr=terminal.fd, env=environment
        ) as process,
    ):
        os.set_blocking(terminal.master_fd, False)
        deadline = time.monotonic() + 60
        ended = False
        while not ended:
            ended = process.poll() is not None
            assert time.monotonic() < deadline, b"".join(parts)
            try:
                while data := os.read(terminal.master_fd, 1 << 16):
                    parts.append(data)
            except BlockingIOError:
                time.sleep(0.02)
    return b"".join(parts).decode().replace("\r\n", "\n")


@pytest.fixture(autouse=True)
def no_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)


def test_columns_that_do_not_fit_follow_below_with_the_first_one() -> None:
    assert columns(WIDE, {0}, None).splitlines()[0] == f"NAME{'FIRST':>22}{'SECOND':>22}{'THIRD':>22}"
    assert columns(WIDE, {0}, 60).splitlines() == [
        f"NAME{'FIRST':>22}{'SECOND':>22}",
        f"one   {'a' * 20}  {'b' * 20}",
        f"two {'d':>22}{'e':>22}",
        "",
        f"NAME{'THIRD':>22}",
        f"one   {'c' * 20}",
        f"two {'f':>22}",
    ]
    for width in range(26, 80):
        folded = columns(WIDE, {0}, width)
        assert max(map(len, folded.splitlines())) <= width
        assert {word for row in WIDE for word in row} == set(folded.split())
    assert "a" * 20 in columns(WIDE, {0}, 10)  # a word is never broken


def test_lines_are_wrapped_between_words() -> None:
    text = "store: a temporary file, /tmp/a-very-long-name-of-a-file.img, 8 MiB, removed at the end"
    assert wrap(text, None) == text
    folded = wrap(text, 40, 7)
    assert folded.split() == text.split()
    assert all(line.startswith(" " * 7) for line in folded.splitlines()[1:])
    assert max(map(len, folded.splitlines())) <= 44  # the path alone is longer than its line


def test_width_is_that_of_the_terminal_or_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with Terminal(80) as terminal:
        assert terminal_width(terminal.stream) == 80
        monkeypatch.setenv("COLUMNS", "132")
        assert terminal_width(terminal.stream) == 132
        with (tmp_path / "file").open("w") as file:
            assert terminal_width(file) is None
    assert terminal_width(None) is None


def test_tables_of_benchmarks_fit_80_columns() -> None:
    row = ("0", "4194303", "any", "100 %", "1.23M", "1023.5 MiB", "1023.5 MiB", "12345.6", "12345.6", "0")
    peers = ("IOPS", *PEERS), [("randread 4k iodepth=32 numjobs=2", *(["1.23M ±12 %"] * len(PEERS)))] * 8
    with Terminal(80) as terminal:
        print_tables([(QUEUE_HEADINGS, [row]), peers], terminal.stream)
        text = terminal.text()
    assert max(map(len, text.splitlines())) <= 80
    assert set(QUEUE_HEADINGS) | set(PEERS) <= set(re.split(r"[\s│┃]+", text))
    findings = Findings("loopback", "sync", "file:x", "writeback", 2, 5)
    findings.row("supervisor, again while it recovers").pauses_s += [0.123]
    assert max(map(len, as_text(findings, 80).splitlines())) <= 80


def test_list_show_and_stats_fit_80_columns() -> None:
    queue = {"index": 0, "pid": 4194303, "cpu": 1, "irq_cpu": 1, "size": 256, "engine": "uring (sqpoll)"}
    queue |= {"poll": "adaptive, 200 us", "irq_hold": "up to 200 us", "state": "running", "restarts": 2}
    queue |= {"requests": 10**9, "bytes_read": 10**12, "errors": 3, "kicks": 10**9, "irqs": 10**9}
    info = {"name": "vd0", "state": "running", "queues": [queue, queue], "total": queue, "node": "/dev/vdb"}
    info |= {"size_bytes": 1 << 40, "bus": "virtio", "backend": "file:/srv/disks/one.img", "cache": "none"}
    info |= {"failure": "a long sentence about what has failed here, " * 4}
    counted = {"requests": 10**9, "ops": {"read": {"requests": 10**9, "bytes": 10**12, "errors": 0}}}
    counted["ops"]["read"]["latency_ns"] = dict.fromkeys(("p50", "p99", "p99.9", "max"), 10**9)
    stats = {"queues": [{**counted, "index": number} for number in range(16)], "total": counted}
    for text in (render.list_text([info], 80), render.show_text(info, 80), render.stats_text(stats, 80)):
        assert max(map(len, text.splitlines())) <= 80
    assert render.stats_text(stats, 80).split().count("queue") == 16


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_check_and_help_fit_a_terminal_and_are_one_line_each_in_a_pipe(tmp_path: Path) -> None:
    text = run_on_terminal(["vdusefast", "check"], tmp_path)
    plain = subprocess.run(
        [sys.executable, "-m", "vdusefast", "check"], capture_output=True, text=True, timeout=60, check=False
    ).stdout
    text = re.sub(r"\x1b\[\d+m", "", text)
    too_long = [line for line in text.splitlines() if len(line) > 80 and max(map(len, line.split())) < 58]
    assert not too_long  # a path may be longer than its column
    assert text.split()[:20] == plain.split()[:20]
    assert max(map(len, plain.splitlines())) > 80
    named = run_on_terminal(["vdusefast.bench", "peers", "--help"], tmp_path)
    assert all(re.search(rf"[ ,]{re.escape(peer)}[,.]", named) for peer in PEERS)


def test_help_names_the_peers_that_there_are() -> None:
    assert tuple(kinds.BY_NAME) == PEERS


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_torture_shows_its_progress_on_a_terminal(tmp_path: Path) -> None:
    text = run_on_terminal(["vdusefast.bench", "torture", "--kills=worker=4", "--size=1M", "--load=20ms"], tmp_path)
    assert re.search(r"\r\x1b\[K\d of 4 cycles, 0 lost; .* s, about .* left", text)
    last = text[text.rindex("\r\x1b[K") :]
    assert last.startswith("\r\x1b[Kwhat was done")  # the report replaces it
    assert max(map(len, text.split("\r\x1b[K")[-1].splitlines())) <= 80


def test_progress_is_a_plain_line_now_and_then_in_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    with (tmp_path / "log").open("w+") as log:
        line = ProgressLine(log, 40, 0.0)
        for cycles in range(1, 41):
            now_s[0] += 0.5
            line.done(cycles, 0)
        line.end()
        log.seek(0)
        found = log.read().splitlines()
    assert found == [
        "10 of 40 cycles, 0 lost; 5 s, about 15 s left",
        "20 of 40 cycles, 0 lost; 10 s, about 10 s left",
        "30 of 40 cycles, 0 lost; 15 s, about 5 s left",
        "40 of 40 cycles, 0 lost; 20 s, about 0 s left",
    ]
    with (tmp_path / "log").open("w") as log:
        timed = ProgressLine(log, 40, 60.0)
        assert timed.text(7, 1, 15.0) == "7 cycles, 1 lost; 15 s of 1 min 0 s, 45 s left"
