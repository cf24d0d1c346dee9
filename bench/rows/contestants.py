"""The contestants: our device, the real fio, and the bare limits of bench/micro. Each returns one figure of one run."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vdusefast.config import Config, make_config

ROOT = Path(__file__).resolve().parents[2]
MICRO = ROOT / "build" / "bench"
FILE_BYTES = 512 << 20
IODEPTH = 32
TOOL_S = 600.0
RAMP = "500ms"


class RowError(Exception):
    """A row that cannot be measured: why, and what to do."""


@dataclass(frozen=True)
class Setup:
    """The setup that all measurements share. settings: keys of our devices' configuration, beside those of the row."""

    seconds: float
    worker_cpu: int
    driver_cpu: int
    tmpfs_file: Path
    disk_file: Path
    settings: dict[str, Any] = field(default_factory=dict)


def parse_json(arguments: list[str]) -> Any:
    """Run a program and return the JSON object that it printed, other text before it or not. Raises RowError."""
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=TOOL_S, check=False)
    except OSError as error:
        raise RowError(f"{arguments[0]}: cannot be started: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise RowError(f"{arguments[0]} did not end within {TOOL_S:g} s") from None
    start = done.stdout.find("{")
    if done.returncode or start < 0:
        said = (done.stderr.strip() or done.stdout.strip() or "it printed nothing").splitlines()[-1]
        raise RowError(f"{' '.join(arguments)}: status {done.returncode}: {said}")
    return json.loads(done.stdout[start:])


def config_text(config: Config) -> str:
    """Return `config` as TOML: all values are flat, and such values are written alike in TOML and JSON."""
    import msgspec

    raw = msgspec.to_builtins(config)
    tables = [("[device]", raw["device"]), ("[backend]", raw["backend"]), *(("[[queue]]", one) for one in raw["queue"])]
    lines = []
    for header, values in tables:
        lines.append(header)
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None]
    return "\n".join(lines) + "\n"


def device_config(setup: Setup, backend: str, **changed: Any) -> Config:
    """Return the configuration of our device on the worker's CPU, with what the row and then the user say."""
    settings = {"queues": 1, "cpus": [setup.worker_cpu], **changed, **setup.settings}
    return make_config(name="speed", uri=backend, transport="loopback", **settings)


def vdusefast(
    setup: Setup,
    backend: str,
    *,
    rw: str = "randread",
    bs: str = "4k",
    jobs: int = 1,
    driver_cpus: list[int] | None = None,
    **changed: Any,
) -> float:
    """Return IOPS of our device under one job or several."""
    cpus = driver_cpus if driver_cpus is not None else [setup.driver_cpu]
    arguments = [sys.executable, "-m", "vdusefast.bench", "raw", "--name=speed", f"--rw={rw}", f"--bs={bs}"]
    arguments += [f"--iodepth={IODEPTH}", "--time_based", f"--runtime={setup.seconds * 1000:g}ms"]
    arguments += [f"--ramp_time={RAMP}", f"--numjobs={jobs}", "--output-format=json"]
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(config_text(device_config(setup, backend, **changed)))
        file.flush()
        report = parse_json([*arguments, f"--driver-cpus={','.join(map(str, cpus))}", f"--config={file.name}"])
    return sum(float(job["read"]["iops"]) for job in report["jobs"])


def fio_arguments(setup: Setup, engine: str, rw: str = "randread", bs: str = "4k") -> list[str]:
    """Return the command of the real fio on the worker's CPU, without its file."""
    arguments = ["fio", "--name=speed", f"--rw={rw}", f"--bs={bs}", f"--iodepth={IODEPTH}", "--time_based"]
    arguments += [f"--runtime={setup.seconds * 1000:g}ms", f"--ramp_time={RAMP}", f"--ioengine={engine}"]
    return [*arguments, f"--size={FILE_BYTES}", f"--cpus_allowed={setup.worker_cpu}", "--output-format=json"]


def fio(setup: Setup, engine: str, path: Path, *, direct: bool, rw: str = "randread", bs: str = "4k") -> float:
    """Return IOPS of the real fio for the same job on the worker's CPU."""
    arguments = fio_arguments(setup, engine, rw, bs)
    report = parse_json([*arguments, f"--filename={path}", f"--direct={int(direct)}"])
    return float(report["jobs"][0]["read"]["iops"])


def ring_exchange(setup: Setup) -> float:
    """Return the bare exchange in requests a second, by a ring of the format that our device offers."""
    arguments = [str(MICRO / "ring_exchange"), "-t", f"{setup.seconds:g}", "-d", str(IODEPTH)]
    arguments += ["-p"] if getattr(device_config(setup, "null:1G").device, "packed", False) else []
    return float(parse_json([*arguments, "-c", str(setup.driver_cpu), "-C", str(setup.worker_cpu)])["iops"])


def read_loop(setup: Setup) -> float:
    """Return the bare read loop in reads a second."""
    arguments = [
        str(MICRO / "read_loop"),
        "-t",
        f"{setup.seconds:g}",
        "-c",
        str(setup.worker_cpu),
        str(setup.tmpfs_file),
    ]
    return float(parse_json(arguments)["iops"])
