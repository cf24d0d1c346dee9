"""Programs of the fio world read what our runs leave, and load our devices: those of Debian's package, and fio-plot."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fio_rig import MIB

pytestmark = pytest.mark.slow

DOCUMENTS = Path("/usr/share/doc/fio")  # Debian has some of the tools there, compressed
LIMIT_S = 55


def run(*arguments: str | os.PathLike[str], directory: Path, limit_s: float = LIMIT_S, **environment: str) -> str:
    """Run a command, and return what it prints. Fails where it fails."""
    done = subprocess.run(
        [os.fspath(argument) for argument in arguments],
        cwd=directory,
        env={**os.environ, "TMPDIR": str(directory), **environment},
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{arguments}: {done.returncode}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def bench_fio(*arguments: str, directory: Path) -> str:
    return run(sys.executable, "-m", "vdusefast.bench", "fio", "--transport=loopback", *arguments, directory=directory)


def report(path: Path) -> dict[str, Any]:
    text = path.read_text()
    found: dict[str, Any] = json.loads(text[text.index("{\n") :])
    return found


def test_genfio_makes_jobs_that_run(tmp_path: Path) -> None:
    """One job after another, then two disks at a time."""
    arguments = [
        "-d",
        "/dev/sdy,/dev/sdz",
        "-a",
        "-b",
        "4k,64k",
        "-m",
        "write,randread",
        "-D",
        "4",
        "-r",
        "0",
        "-z",
        "2m",
    ]
    run("genfio", *arguments, directory=tmp_path)
    (made,) = tmp_path.glob("*.fio")
    made.write_text(made.read_text().replace("ramp_time=5\n", ""))
    bench_fio(made.name, "--queues=2", "--output-format=json", "--output=g.json", directory=tmp_path)
    jobs = report(tmp_path / "g.json")["jobs"]
    assert len(jobs) == 16
    moved = [job[side]["io_bytes"] for job in jobs for side in ("read", "write")]
    assert sorted(moved) == [0] * 16 + [2 * MIB] * 16
    assert len(list(tmp_path.glob("*_bw.*.log"))) == 16


def test_a_verify_state_continues_on_the_plain_file(tmp_path: Path) -> None:
    """fio-verify-state reads the state of a run on the device, and fio verifies by it what the device has written."""
    (tmp_path / "disk.img").write_bytes(bytes(4 * MIB))
    job = ["--name=v", "--bs=4k", "--size=4m", "--ioengine=libaio", "--direct=1", "--verify=crc32c"]
    job += ["--rw=randwrite", "--verify_state_save=1"]
    bench_fio(*job, "--do_verify=0", "--number_ios=300", "--backend=file:disk.img", directory=tmp_path)
    (state,) = tmp_path.glob("*verify.state")
    said = run("fio-verify-state", state.name, directory=tmp_path)
    assert re.search(r"^Version:\s+0x\d+$", said, re.MULTILINE), said
    assert re.search(r"^Completions:\s+\d+$|^Number IOs:\s+300$", said, re.MULTILINE), said
    arguments = [*job, "--verify_only=1", "--verify_state_load=1", "--output-format=json", "--output=v.json"]
    run("fio", "--filename=disk.img", *arguments, directory=tmp_path)
    (verified,) = report(tmp_path / "v.json")["jobs"]
    assert verified["error"] == 0
    assert verified["read"]["total_ios"] == 300


@pytest.mark.parametrize(
    "arguments", [["-t", "1"], ["-o", "1", "-c", "1"], ["-t", "3"]], ids=["one", "direct", "threads"]
)
def test_fio_dedupe_counts_as_on_the_file(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "disk.img").write_bytes(os.urandom(MIB) + bytes(MIB) + b"same" * (MIB // 4) + os.urandom(MIB))
    arguments = ["-p", "0", "-B", "0", *arguments]  # not by its filter, which may take a new block for a known one
    wanted = run("fio-dedupe", *arguments, "disk.img", directory=tmp_path)
    served = [sys.executable, "-m", "vdusefast", "run", "--backend", "file:disk.img", "--queues", "2", "--"]
    found = run(*served, "fio-dedupe", *arguments, "{}", directory=tmp_path)
    assert "Extents=1024, Unique extents=514" in wanted
    counts = [re.findall(r"^.*Unique extents=\d+|^De-dupe ratio.*$", said, re.MULTILINE) for said in (wanted, found)]
    assert counts[0] == counts[1] != []


def document(name: str, directory: Path) -> Path:
    """Return one of the tools that Debian has among the documents."""
    path = directory / name
    path.write_bytes(gzip.decompress((DOCUMENTS / f"{name}.gz").read_bytes()))
    return path


def test_percentiles_of_histograms(tmp_path: Path) -> None:
    if not DOCUMENTS.joinpath("fio-histo-log-pctiles.py.gz").exists():
        pytest.skip(f"{DOCUMENTS} is empty: this system installs packages without their documents")
    arguments = ["--name=h", "--rw=randread", "--size=8m", "--bs=4k", "--time_based", "--runtime=1"]
    arguments += ["--write_hist_log=h", "--log_hist_msec=100", "--output-format=json"]
    bench_fio(*arguments, "--output=h.json", directory=tmp_path)
    (job,) = report(tmp_path / "h.json")["jobs"]
    tool = document("fio-histo-log-pctiles.py", tmp_path)
    arguments = ["--fio-version", "3", "--time-quantum", "1", "--output-unit", "usec", "h_clat_hist.1.log"]
    said = run(sys.executable, tool, *arguments, directory=tmp_path).splitlines()
    (header,) = [number for number, line in enumerate(said) if line.startswith("msec-since-start")]
    values = [float(cell) for cell in said[header + 1].split(",")[2:] if cell.strip()]
    assert values == sorted(values)
    mean, most = (job["read"]["clat_ns"][key] / 1000 for key in ("mean", "max"))
    assert 0 < values[0] <= mean <= values[-1] <= 2 * most


# -- fio-plot, from PyPI

FIO_PLOT = "fio-plot==1.1.21"
PLOTS = {
    "L": ["-L", "-t", "iops", "-n", "1", "2", "-d", "1", "4"],
    "l": ["-l", "-d", "1", "4", "-n", "1"],
    "N": ["-N", "-d", "1", "-n", "1", "2"],
    "H": ["-H", "-d", "1", "-n", "2"],
    "g": ["-g", "-t", "bw", "iops", "lat", "-d", "4", "-n", "1"],
}
# Draws, and keeps what fio-plot draws from.
DRAW = """
import copy, json, sys
import fio_plot
from fio_plot.fiolib import getdata

drawn, routes = {}, getdata.get_routing_dict

def noted():
    found = routes()
    for route in found.values():
        def function(settings, data, draw=route["function"]):
            drawn[kind] = copy.deepcopy(data)
            draw(settings, data)
        route["function"] = function
    return found

getdata.get_routing_dict = noted
for kind, arguments in json.loads(sys.argv[2]).items():
    sys.argv[3:] = ["-i", sys.argv[1], "-T", "t", "-r", "randread", "-o", f"{kind}.png", *arguments]
    before, sys.argv = sys.argv, [sys.argv[0], *sys.argv[3:]]
    try:
        fio_plot.main()
    except SystemExit as ended:
        assert not ended.code
    sys.argv = before
with open("drawn.json", "w") as file:
    json.dump(drawn, file, default=str)
"""


@pytest.fixture(scope="module")
def fio_plot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with fio-plot and bench-fio. What they import is there for other tests already."""
    into = tmp_path_factory.mktemp("fio-plot")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={into}", FIO_PLOT, directory=into)
    return into


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_bench_fio_runs_on_the_device_and_fio_plot_draws_it(tmp_path: Path, fio_plot: Path) -> None:
    """bench-fio finds `bench fio` under the name fio; fio-plot draws what its reports say."""
    programs = tmp_path / "bin"
    programs.mkdir()
    command = f'exec {sys.executable} -m vdusefast.bench fio --transport=loopback --queues=2 "$@"'
    (programs / "fio").write_text(f"#!/bin/sh\nPATH=${{PATH#*:}}\nexport PATH\n{command}\n")
    (programs / "fio").chmod(0o755)
    target = tmp_path / f"disk-{os.getpid()}.img"
    target.write_bytes(bytes(4 * MIB))
    job = Path(f"/tmp/{target.name}-tmpjobfile.fio")  # where bench-fio puts it
    arguments = [
        "--target",
        target.name,
        "--type",
        "file",
        "--output",
        "out",
        "--mode",
        "randread",
        "--iodepth",
        "1",
        "4",
    ]
    arguments += [
        "--numjobs",
        "1",
        "2",
        "--runtime",
        "1",
        "--time-based",
        "--size",
        "4m",
        "--loginterval",
        "100",
        "--quiet",
    ]
    libraries = {"PYTHONPATH": f"{fio_plot}:{Path(__file__).parents[2]}", "MPLCONFIGDIR": str(tmp_path)}
    search = f"{programs}:{os.environ['PATH']}"
    try:
        run(sys.executable, "-m", "bench_fio", *arguments, directory=tmp_path, limit_s=200, PATH=search, **libraries)
    finally:
        job.unlink(missing_ok=True)
    where = tmp_path / "out" / target.name / "4k"
    reports = {path.stem: report(path) for path in where.glob("*.json")}
    assert reports.keys() == {f"randread-{depth}-{jobs}" for depth in (1, 4) for jobs in (1, 2)}
    assert all(one["vdusefast"]["transport"] == "loopback" for one in reports.values())
    run(sys.executable, "-c", DRAW, where, json.dumps(PLOTS), directory=tmp_path, limit_s=120, **libraries)
    for kind in PLOTS:
        assert (tmp_path / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
    drawn = json.loads((tmp_path / "drawn.json").read_text())
    assert drawn.keys() == PLOTS.keys()
    rows = [(kind, row) for kind in "LlNH" for part in drawn[kind] for row in part["data"]]
    assert len(rows) == 4 + 2 + 2 + 1
    for kind, row in rows:
        jobs = reports[f"randread-{row['iodepth']}-{row['numjobs']}"]["jobs"]
        assert row["iops"] == pytest.approx(sum(job["read"]["iops"] for job in jobs)), kind
        assert row["lat"] == pytest.approx(sum(job["read"]["lat_ns"]["mean"] for job in jobs) / len(jobs)), kind
    assert {one["type"] for one in drawn["g"]} == {"bw", "iops", "lat"}
