"""Jobs in fio's vocabulary: what is read, and the error line for what is not."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from vdusefast.bench.common.device_options import AUTO_QUEUES
from vdusefast.bench.raw.baseline import command
from vdusefast.bench.raw.help import JOB_HELP, RUN_HELP, option_help
from vdusefast.bench.raw.jobs import JOB_OPTIONS, RUN_OPTIONS, JobSpec, parse_arguments
from vdusefast.bench.raw.plan import place_jobs, plan_threads, required_bytes
from vdusefast.errors import ConfigError

MIB = 1 << 20


def jobfile(tmp_path: Path, text: str) -> str:
    path = tmp_path / "job.fio"
    path.write_text(text)
    return str(path)


def one(*words: str) -> JobSpec:
    (job,) = parse_arguments(words).jobs
    return job


@pytest.mark.parametrize("equals", [True, False])
def test_options_with_equals_and_with_space(equals: bool) -> None:
    pairs = {"--name": "a", "--rw": "randrw", "--bs": "8k", "--size": "1g", "--iodepth": "7", "--runtime": "500ms"}
    words = [f"{k}={v}" for k, v in pairs.items()] if equals else [w for pair in pairs.items() for w in pair]
    job = one(*words, "--time_based", "--rwmixread=70")
    assert (job.name, job.kind, job.order, job.bs, job.size) == ("a", "mixed", "random_once", 8192, 1 << 30)
    assert (job.iodepth, job.runtime, job.time_based, job.rwmixread) == (7, 0.5, True, 70)


def test_options_before_the_first_name_apply_to_all_jobs() -> None:
    plan = parse_arguments(["--bs=8k", "--name=a", "--rw=read", "--name=b", "--rw=write", "--bs=512"])
    assert [(j.name, j.rw, j.bs) for j in plan.jobs] == [("a", "read", 8192), ("b", "write", 512)]


def test_job_file(tmp_path: Path) -> None:
    text = """
        ; a comment
        # another
        [global]
        bs = 4k
        time_based
        runtime=2
        queues=auto
        [first]
        rw=randwrite
        verify=crc32c
        [second]
        stonewall
        rw=read
        time_based=0
    """
    plan = parse_arguments([jobfile(tmp_path, text), "--cpus=0,1", "--output-format", "json"])
    first, second = plan.jobs
    assert (first.rw, first.verify, first.time_based, first.stonewall) == ("randwrite", "crc32c", True, False)
    assert (second.rw, second.verify, second.time_based, second.stonewall) == ("read", "none", False, True)
    assert second.options["rw"] == "read"
    assert (plan.run.queues, plan.run.cpus, plan.run.output_format) == (AUTO_QUEUES, "0,1", "json")


def test_rw_without_a_name_makes_one_job() -> None:
    assert one("--rw=randread", "--size=1m").name == "job"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--name=a", "--rww=read"], "command line: unknown option '--rww'"),
        (["--name=a", "--iodepth_batch=1"], "command line: unknown option '--iodepth_batch'"),
        (["-x"], "command line: unknown option '-x'"),
        (["--name=a", "--bs"], "command line: option '--bs' needs a value"),
        (["--name=a", "--rw=sideways"], "command line: rw: 'sideways' is not one of"),
        (["--name=a", "--bs=1000"], "command line: bs: '1000' is not a multiple of 512"),
        (["--name=a", "--iodepth=0"], "command line: iodepth: '0' is not a whole number from 1"),
        (["--name=a", "--runtime=soon"], "command line: runtime: 'soon' is not a time"),
        (["--name=a", "--time_based"], "job a: time_based needs runtime"),
        (["--name=a", "--verify=pattern"], "job a: verify=pattern and verify_pattern go together"),
        (["--name=a", "--rw=trim", "--verify=crc32c"], "job a: rw=trim leaves nothing to verify"),
        (["--name=a", "--size=512"], "job a: size 512 is smaller than one block"),
        ([], "no job"),
        (["/nonexistent.fio"], "/nonexistent.fio: cannot read the job file"),
    ],
)
def test_one_line_says_what_is_wrong(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as raised:
        parse_arguments(words)
    assert str(raised.value).startswith(message)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]\nrw=read\nfilename=x\n", "3: unknown option 'filename'"),
        ("[a]\nqueues=2\n", "2: option 'queues' describes the whole run"),
        ("rw=read\n", "1: option before the first section"),
        ("[a\n", "1: '[a' is not a section"),
        ("[a]\nbs\n", "2: option 'bs' needs a value"),
        ("[a]\nbs=huge\n", "2: bs: 'huge' is not a size"),
    ],
)
def test_job_file_errors_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = jobfile(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        parse_arguments([path])
    assert str(raised.value).startswith(f"{path}:{message}")


@pytest.mark.parametrize(
    ("text", "start"), [("0xdeadbeef", b"\xde\xad\xbe\xef"), ("255", b"\xff"), ('"ab"', b"ab"), ("0xf", b"\x0f")]
)
def test_patterns_fill_a_block(text: str, start: bytes) -> None:
    job = one("--name=a", "--rw=write", "--bs=512", "--verify=pattern", f"--verify_pattern={text}")
    assert job.verify_pattern == start * (512 // len(start))


def test_help_explains_every_option_and_no_other() -> None:
    assert set(JOB_HELP) == {"name", *JOB_OPTIONS}
    assert set(RUN_HELP) == set(RUN_OPTIONS)
    assert all(f"--{name.replace('_', '-')} " in option_help() for name in RUN_OPTIONS)


# -- placing


def test_clones_that_verify_get_disjoint_slices() -> None:
    job = one("--name=a", "--rw=randwrite", "--size=1m", "--offset=1m", "--numjobs=3", "--verify=crc32c")
    (group,) = place_jobs([job], 4 * MIB, 512)
    windows = sorted((i.offset, i.last) for i in group)
    assert len(group) == 3
    assert windows[0][0] == MIB
    assert windows[-1][1] < 2 * MIB
    assert all(a[1] < b[0] for a, b in itertools.pairwise(windows))
    assert len({i.seed for i in group}) == 3


def test_clones_that_do_not_verify_share_the_window() -> None:
    (group,) = place_jobs([one("--name=a", "--rw=randread", "--numjobs=2")], 4 * MIB, 512)
    assert [(i.offset, i.size) for i in group] == [(0, 4 * MIB)] * 2


def test_overlap_with_verification_is_refused() -> None:
    jobs = parse_arguments(["--rw=write", "--verify=crc32c", "--name=a", "--size=2m", "--name=b", "--size=3m"]).jobs
    with pytest.raises(ConfigError, match=r"jobs . and . overlap"):
        place_jobs(jobs, 4 * MIB, 512)


def test_stonewall_begins_a_group() -> None:
    jobs = parse_arguments(
        ["--size=1m", "--verify=crc32c", "--name=a", "--rw=write", "--name=b", "--rw=read", "--stonewall"]
    ).jobs
    groups = place_jobs(jobs, 4 * MIB, 512)
    assert [[i.spec.name for i in group] for group in groups] == [["a"], ["b"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [("--size=8m", "the device has"), ("--bs=512", "multiples of the device's block"), ("--offset=4m", "offset")],
)
def test_jobs_that_do_not_fit(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place_jobs([one("--name=a", "--rw=read", words)], 4 * MIB, 4096)


@pytest.mark.parametrize("jobs", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("queues", [1, 2, 3, 4])
def test_every_queue_and_every_job_has_one_thread(jobs: int, queues: int) -> None:
    plans = plan_threads(jobs, queues)
    assert sorted(q for plan in plans for q in plan.queues) == list(range(queues))
    assert sorted(j for plan in plans for j in plan.jobs) == list(range(jobs))


def test_required_size() -> None:
    jobs = parse_arguments(["--name=a", "--rw=read", "--size=1m", "--offset=2m", "--name=b", "--rw=read"]).jobs
    assert required_bytes(jobs) == 3 * MIB


# -- baseline


def test_baseline_runs_the_same_job_on_as_many_cpus() -> None:
    job = one(*["--name=a", "--rw=randrw", "--rwmixread=70", "--size=1m", "--iodepth=8", "--runtime=2", "--time_based"])
    words = command("fio", "io_uring", [job], Path("/x"), [0, 1], direct=True)
    assert {"--ioengine=io_uring", "--direct=1", "--filename=/x", "--cpus_allowed=0-1", "--numjobs=2"} <= set(words)
    assert {
        "--rw=randrw",
        "--rwmixread=70",
        "--size=1048576",
        "--iodepth=8",
        "--runtime=2000ms",
        "--time_based",
    } <= set(words)
