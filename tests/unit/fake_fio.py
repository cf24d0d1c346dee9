"""A stand-in for fio, as a shell script: prints a report in fio's schema, or misbehaves as its first line says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

NAMES = "name filename directory rw bs size offset iodepth numjobs ioengine direct runtime verify mem thread stonewall"


def side(count: int, iops: float = 1000.0, mean_ns: float = 2000.0) -> dict[str, Any]:
    marks = {"50.000000": 1900, "99.000000": 5000, "99.900000": 9000}
    clat = {"mean": mean_ns, "percentile": marks} if count else {"mean": 0.0}
    return {"total_ios": count, "iops": iops if count else 0.0, "bw_bytes": int(iops * 4096), "clat_ns": clat}


def job(name: str = "a", rw: str = "randread", *, error: int = 0, read: int = 0, write: int = 0) -> dict[str, Any]:
    return {
        "jobname": name,
        "error": error,
        "job options": {"name": name, "rw": rw},
        "read": side(read),
        "write": side(write),
        "trim": side(0),
        "sync": {"total_ios": 0, "lat_ns": {}},
        "job_runtime": 1000,
        "usr_cpu": 1.0,
        "sys_cpu": 2.0,
    }


def install(
    directory: Path, jobs: list[dict[str, Any]] | None = None, *, before: str = "", after: str = "", status: int = 0
) -> Path:
    """Write a fio into `directory`: runs the shell text `before`, prints a report of `jobs`, runs `after`."""
    report = json.dumps({"fio version": "fio-3.33", "jobs": jobs if jobs is not None else [job(read=10)]}, indent=1)
    path = directory / "fio"
    path.write_text(
        "#!/bin/sh\n"
        'case "$1" in --enghelp) echo io_uring; echo libaio; exit 0;; --version) echo fio-3.33; exit 0;;\n'
        "--parse-only) exit 0;;\n"
        f"--cmdhelp=all) printf '%s : text\\n' {NAMES}; exit 0;; --cmdhelp=thread) echo 'empty or boolean'; exit 0;;\n"
        "--cmdhelp=*|--enghelp=*) exit 0;; esac\n"
        f"echo \"$@\" >> {directory}/fio-calls\n{before}\necho 'a line of no report'\ncat <<'EOF'\n{report}\nEOF\n"
        f"{after}\nexit {status}\n"
    )
    path.chmod(0o755)
    return path


def first_on_path(directory: Path) -> str:
    """Return a PATH in which `directory` comes first."""
    return f"{directory}{os.pathsep}{os.environ['PATH']}"
