"""Run the checks inside of a guest, as root, one after another in one process each.

    runner.py RESULTS [--only TEXT]... [--skip TEXT]...

Writes one JSON object a line to RESULTS/checks.jsonl as each check ends: name, ok, seconds, detail. A check that
takes longer than its limit is killed, and what the processes of its device wait for in the kernel is its detail. After
each check but those that say otherwise, everything it made must be gone. The exit status is 0 when all are well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[2])]  # this directory, and the checkout

import checks  # noqa: E402
import guest  # noqa: E402
import kernel_log  # noqa: E402

DETAIL_MAX = 4000
SETTLE_S = 3.0


def run_check(check: checks.Check) -> tuple[bool, str]:
    """Run one check in a process of its own and return whether it went well, and the end of what it said."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_fd)
        _child(check, write_fd)
    os.close(write_fd)
    deadline, chunks = time.monotonic() + check.limit_s, []
    timed_out = False
    while True:
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not select.select([read_fd], [], [], left_s)[0]:
            timed_out = True
            break
        chunk = os.read(read_fd, 65536)
        if not chunk:
            break
        chunks.append(chunk)
    detail = b"".join(chunks).decode(errors="replace")
    if timed_out:
        detail += f"\nnot done after {check.limit_s:g} s\n" + guest.where_processes_wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # and whatever it has started and not waited for
    os.close(read_fd)
    status = _reap(pid)
    if status is None:
        return False, detail + "\nthe process of the check cannot be killed"
    return status == 0 and not timed_out, detail[-DETAIL_MAX:]


def _child(check: checks.Check, report_fd: int) -> None:
    """Run the check and write what went wrong, or what it returned, to `report_fd`. Does not return."""
    status = 1
    try:
        os.setpgid(0, 0)
        os.set_inheritable(report_fd, False)
        result = check.function()
        os.write(report_fd, b"" if result is None else json.dumps(result).encode())
        status = 0
    except AssertionError as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = str(error) or f"assert {place.line}"
        os.write(report_fd, f"{text}\n{_places(error)}".encode())
    except BaseException:
        os.write(report_fd, traceback.format_exc().encode())
    finally:
        os._exit(status)


def _places(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name != "runner.py"]
    return "\n".join(f"  at {Path(f.filename).name}:{f.lineno} {f.line}" for f in frames)


def _reap(pid: int) -> int | None:
    """Wait for the child for a while; returns its exit status, None when it stays."""
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def left_behind(before: guest.Resources) -> tuple[str, str]:
    """Return what a check has left, once everything had time to go, and what of it could not be removed."""
    deadline = time.monotonic() + SETTLE_S
    while (left := guest.Resources.now().beyond(before)) and time.monotonic() < deadline:
        time.sleep(0.1)
    if not left:
        return "", ""
    waits = guest.where_processes_wait()
    guest.clean_up()
    return f"left behind: {', '.join(left)}\n{waits}", ", ".join(guest.Resources.now().beyond(before))


class Results:
    """The file of results, a line a check, and one on standard output."""

    def __init__(self, directory: Path) -> None:
        self._file = (directory / "checks.jsonl").open("a")
        self.failed = 0

    def add(self, name: str, ok: bool, seconds: float, detail: str) -> None:
        """Write one result."""
        self._file.write(json.dumps({"name": name, "ok": ok, "seconds": round(seconds, 2), "detail": detail}) + "\n")
        self._file.flush()
        print(f"{'ok  ' if ok else 'FAIL'} {seconds:7.2f} s  {name}  {detail if not ok else ''}", flush=True)
        self.failed += not ok


def run_all(chosen: list[checks.Check], results: Results) -> None:
    """Run checks in order.

    Where one fails that leaves its device for the next, those fail without a try, up to the one that removes it. Where
    something is stuck in the kernel, the rest does.
    """
    log, before = kernel_log.Reader(), guest.Resources.now()
    stuck = broken = ""
    for check in chosen:
        if stuck or broken:
            results.add(check.name, False, 0, f"not run: {stuck or broken}")
            if not check.keeps:
                broken = ""
            continue
        started_s = time.monotonic()
        ok, detail = run_check(check)
        if not check.keeps or not ok:
            left, remains = left_behind(before)
            if left:
                ok, detail = False, f"{detail}\n{left}".strip()
            if remains:
                stuck = f"{check.name} has left what cannot be removed: {remains}"
                detail += f"\ncould not be removed: {remains}"
        if check.keeps and not ok:
            broken = f"{check.name} has failed, and its device was removed"
        complaints = kernel_log.complaints("\n".join(log.read()))
        if complaints:
            # The last check fails for it; here is written which one it came with.
            detail = f"{detail}\nkernel log: {' | '.join(complaints)}".strip()
            guest.note_complaints(check.name, complaints)
        results.add(check.name, ok, time.monotonic() - started_s, detail)


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--only", action="append", default=[], help="run the checks whose names begin with this")
    parser.add_argument("--skip", action="append", default=[], help="leave out those whose names begin with this")
    words = parser.parse_args()
    chosen = [c for c in checks.load() if c.name.startswith(tuple(words.only or [""]))]
    chosen = [c for c in chosen if not c.name.startswith(tuple(words.skip))]
    guest.prepare()
    guest.import_for_copies()
    results, started_s = Results(words.results), time.monotonic()
    run_all(chosen, results)
    print(f"{len(chosen)} checks in {time.monotonic() - started_s:.0f} s, {results.failed} failed", flush=True)
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
