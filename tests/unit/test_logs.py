"""The log of a server in the background, and that of one under systemd."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_log_is_bounded(tmp_path: Path) -> None:
    code = f"""
import logging
from pathlib import Path
from vdusefast.base import logs
logs.LOG_MAX_BYTES = 2000
file = logs.LogFile()
log = logging.getLogger("vdusefast")
log.warning("before")
file.move(Path({str(tmp_path / "log")!r}))
for number in range(100):
    log.warning("message %d %s", number, "x" * 50)
import sys
print("still here", file=sys.stderr)
"""
    with (tmp_path / "first").open("w+b") as first:
        subprocess.run([sys.executable, "-c", code], check=True, timeout=20, stdout=first, stderr=first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "log", "log.1"]
    assert (tmp_path / "log").stat().st_size + (tmp_path / "log.1").stat().st_size < 4500
    assert "before" in (tmp_path / "first").read_text()
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[-1] == "still here"
    assert " WARNING message 99 " in lines[-2]


def test_journal_gets_priorities(tmp_path: Path) -> None:
    code = """
import logging
from vdusefast.base import logs
with logs.log_to_stderr():
    logging.getLogger("vdusefast").error("one\\n<0>line", stack_info=True)
    logging.getLogger("vdusefast").info("fine")
"""
    with (tmp_path / "journal").open("w+b") as journal:
        status = os.fstat(journal.fileno())
        env = {**os.environ, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        subprocess.run([sys.executable, "-c", code], check=True, timeout=20, stderr=journal, env=env)
    lines = (tmp_path / "journal").read_text().splitlines()
    assert (lines[0], lines[-1]) == (r"<3>one\n<0>line", "<6>fine")
    assert len(lines) > 3
    assert all(line.startswith("<3>") for line in lines[:-1])
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=20, capture_output=True, text=True)
    assert done.stderr.startswith("vdusefast: one\\n<0>line\n")
    assert done.stderr.endswith("\nvdusefast: fine\n")
