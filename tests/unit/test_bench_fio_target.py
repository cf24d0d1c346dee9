"""Jobs turned to one device: what is replaced, what stays, and which range each job gets."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from fio_rig import JOBS, MIB, know, retarget, rewritten

from vdusefast.bench.fio.numbers import Amount, Numbers
from vdusefast.bench.fio.target import Target
from vdusefast.errors import ConfigError

GIB = 1 << 30
DISK = ["--filename=/dev/vdx", "--allow_file_create=0"]


def arguments(tmp_path: Path, *given: str, transport: str = "loopback", capacity: int = 0) -> list[str]:
    return rewritten(tmp_path, given, transport=transport, capacity=capacity)[0]


def test_only_the_target_is_replaced(tmp_path: Path) -> None:
    given = ["--output=x", "--name=a", "--rw=randrw:2", "--bssplit=4k/50:8k/50", "--size=1m", "--thread"]
    out, notes = rewritten(tmp_path, [*given, "--filename=/dev/sda", "--directory=/mnt"])
    assert out == [*given, *DISK]
    assert notes == ["filename=/dev/sda", "directory=/mnt"]


def test_colon_in_the_path_does_not_end_it(tmp_path: Path) -> None:
    out, _ = rewritten(tmp_path, ["--name=a", "--size=1m"], "/a:b\\c")
    assert "--filename=/a\\:b\\\\c" in out


@pytest.mark.parametrize("option", ["unlink=1", "opendir=/tmp", "nrfiles=4", "lockfile=exclusive", "file_append=1"])
def test_options_about_files_do_not_reach_a_device(tmp_path: Path, option: str) -> None:
    out, notes = rewritten(tmp_path, ["--name=a", "--rw=read", "--size=1m", f"--{option}"])
    assert f"--{option}" not in out
    assert notes == [option]


def test_abbreviated_filename_is_the_target_too(tmp_path: Path) -> None:
    out = arguments(tmp_path, "--name=a", "--size=1m", "--filename_form=x.$jobnum", "--filename", "/dev/sda")
    assert not [argument for argument in out if "sda" in argument or "jobnum" in argument]


# -- engines


@pytest.mark.parametrize(
    ("engine", "loopback", "kernel"),
    [
        ("io_uring", "libaio", "io_uring"),
        ("posixaio", "libaio", "posixaio"),
        ("psync", "psync", "psync"),
        ("pvsync2", "pvsync2", "pvsync2"),
        ("rbd", "libaio", "libaio"),
        ("io_uring_cmd", "libaio", "libaio"),
        ("sg", "libaio", "libaio"),
    ],
)
def test_engines_that_are_mapped(tmp_path: Path, engine: str, loopback: str, kernel: str) -> None:
    for transport, wanted in (("loopback", loopback), ("kernel", kernel)):
        (tmp_path / transport).mkdir()
        given = ["--name=a", "--rw=read", f"--ioengine={engine}", "--size=1m"]
        out, notes = rewritten(tmp_path / transport, given, transport=transport)
        assert f"--ioengine={wanted}" in out
        assert (f"ioengine={engine} (now {wanted})" in notes) == (engine != wanted)


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        ("null", "moves no data"),
        ("net", "loads a network"),
        ("filecreate", "files of a file system"),
        ("http", "object store"),
        ("libpmem", "persistent memory"),
        ("mmap", "use ioengine=psync, or --transport=kernel"),
        ("splice", "use ioengine=psync, or --transport=kernel"),
        ("external:/x.so", "the loopback transport serves"),
    ],
)
def test_engines_that_make_no_sense_are_refused_with_a_reason(engine: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        retarget("--name=a", "--rw=read", f"--ioengine={engine}", "--size=1m")


def test_mmap_stays_on_a_node(tmp_path: Path) -> None:
    assert "--ioengine=mmap" in arguments(tmp_path, "--name=a", "--size=1m", "--ioengine=mmap", transport="kernel")


def test_options_of_a_replaced_engine_go_with_it(tmp_path: Path) -> None:
    given = ["--name=a", "--ioengine=io_uring", "--size=1m", "--hipri", "--fixedbufs", "--sqthread_poll=1"]
    assert arguments(tmp_path, *given) == ["--name=a", "--ioengine=libaio", "--size=1m", *DISK]
    (tmp_path / "n").mkdir()
    assert "--hipri" in arguments(tmp_path / "n", *given, transport="kernel")


def test_job_that_does_no_io_stays_as_it_is(tmp_path: Path) -> None:
    given = ["--name=busy", "--ioengine=cpuio", "--cpuload=10", "--name=a", "--rw=read", "--ioengine=sync", "--size=1m"]
    assert arguments(tmp_path, *given) == [*given, *DISK]
    with pytest.raises(ConfigError, match="no job reads or writes"):
        retarget("--name=busy", "--ioengine=cpuio")


@pytest.mark.parametrize("option", ["read_iolog=x", "create_only=1", "profile=tiobench"])
def test_jobs_that_would_open_other_files_are_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=option.partition("=")[0]):
        retarget("--name=a", "--rw=read", "--size=1m", f"--{option}")


# -- ranges


def test_jobs_on_one_file_share_the_device(tmp_path: Path) -> None:
    job = str(JOBS / "phases.fio")
    assert retarget(job).required_bytes == 8 * MIB
    out = arguments(tmp_path, job)
    assert not [line for line in out if line.startswith("offset")]
    assert out.count("size=8m") == 1


def test_clones_with_files_of_their_own_get_ranges_of_their_own(tmp_path: Path) -> None:
    given = ["--name=a", "--rw=write", "--verify=crc32c", "--size=3m", "--numjobs=4", "--directory=/mnt"]
    assert retarget(*given).required_bytes == 12 * MIB
    out, notes = rewritten(tmp_path, given)
    assert out[-3:] == ["--offset=0", f"--size={3 * MIB}", f"--offset_increment={3 * MIB}"]
    assert notes[-1] == "job a: 4 ranges of 3 MiB from 0 B on"


def test_files_of_several_jobs_lie_one_after_another(tmp_path: Path) -> None:
    given = ["--rw=write", "--size=2m", "--name=a", "--name=b", "--filename=x", "--name=c", "--filename=x"]
    out = arguments(tmp_path, *given)
    assert [argument for argument in out if argument.startswith("--offset=")] == [
        "--offset=0",
        *[f"--offset={2 * MIB}"] * 2,
    ]


def test_offset_and_percentages_are_those_of_the_file(tmp_path: Path) -> None:
    given = ["--name=a", "--size=50%", "--filename=x", "--name=b", "--filename=y", "--offset=25%"]
    out = arguments(tmp_path, *given, capacity=64 * MIB)
    a, b = out[: out.index("--name=b")], out[out.index("--name=b") :]
    assert {"--offset=0", f"--size={16 * MIB}"} <= set(a)
    assert {f"--offset={40 * MIB}", f"--size={24 * MIB}"} <= set(b)


def test_files_of_a_job_count_together(tmp_path: Path) -> None:
    assert retarget("--name=a", "--nrfiles=4", "--filesize=1m").required_bytes == 4 * MIB
    assert f"--size={4 * MIB}" in arguments(tmp_path, "--name=a", "--nrfiles=4", "--filesize=1m")
    assert retarget("--name=a", "--filename=x:y", "--filesize=1m-2m").required_bytes == 4 * MIB


@pytest.mark.parametrize(("offset", "size"), [("256k", 768 << 10), ("25%", 768 << 10), ("0", MIB)])
def test_a_file_with_an_offset_ends_where_its_size_says(tmp_path: Path, offset: str, size: int) -> None:
    given = ["--name=a", "--filename=x", "--filesize=1m", f"--offset={offset}"]
    assert retarget(*given).required_bytes == MIB
    out = arguments(tmp_path, *given)
    assert f"--size={size}" in out
    assert size == MIB or f"--offset={MIB - size}" in out


def test_more_io_than_a_file_has_goes_round_in_it(tmp_path: Path) -> None:
    out = arguments(tmp_path, "--name=a", "--filename=x", "--filesize=1m", "--size=5m")
    assert {f"--size={MIB}", f"--io_size={5 * MIB}"} <= set(out)


def test_jobs_for_one_image_share_the_device(tmp_path: Path) -> None:
    given = ["--ioengine=rbd", "--pool=rbd", "--rbdname=disk", "--size=4m", "--name=a", "--name=b"]
    assert retarget(*given).required_bytes == 4 * MIB
    assert not [
        argument
        for argument in arguments(tmp_path, *given)
        if "offset" in argument or "rbd" in argument or "pool" in argument
    ]


@pytest.mark.parametrize(
    "given",
    [["--name=a", "--size=65m"], ["--size=40m", "--name=a", "--name=b"], ["--size=64m", "--name=a", "--numjobs=2"]],
)
def test_jobs_that_do_not_fit_are_refused(given: list[str]) -> None:
    with pytest.raises(ConfigError, match="the device has"):
        retarget(*given).turn_to(Target("/dev/vdx", "loopback", "libaio"), 64 * MIB)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4096", Amount(4096)),
        ("8m", Amount(8 * MIB)),
        ("30%", Amount(percent=30)),
        ("2GiB", Amount(2_000_000_000)),  # with kb_base=1024 fio takes Gi for a thousand of thousands
        ("4194304B", Amount(4 * MIB)),
        ("1m-2m", Amount(2 * MIB)),
    ],
)
def test_numbers_are_fios(text: str, expected: Amount) -> None:
    assert Numbers(know()).amount("size", text) == expected


def test_numbers_that_fio_does_not_understand_are_named() -> None:
    numbers = Numbers(know())
    assert numbers.amount("size", "1m", "1000") == Amount(1_000_000)
    assert numbers.amount("numjobs", "$ncpus").count >= 1
    with pytest.raises(ConfigError, match="size=much"):
        numbers.amount("size", "much")


@pytest.mark.parametrize("transport", ["loopback", "kernel"])
@pytest.mark.parametrize("job", sorted(path.name for path in JOBS.glob("*.fio")))
def test_fio_takes_what_is_written_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, transport: str
) -> None:
    monkeypatch.setenv("BS", "4k")
    jobs = retarget(str(JOBS / job), transport=transport)
    made = jobs.turn_to(Target("/dev/null", transport, "libaio", "shm"), max(GIB, jobs.required_bytes))
    command = ["fio", "--parse-only", *made.arguments(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
